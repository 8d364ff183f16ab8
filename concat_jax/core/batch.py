"""The batch contract: what every field of a batch holds, its dimensions, type and padding.

Loader, world and query bank make it; the stages learn from it; reports and tests read its shapes.
Dimensions: B images of this host, S side of the images, G rows of the segment tables, C width of
CLIP's embeddings, T CLIP's context length, N queries, D their width, K classes (in a memory padded
up to a multiple of the batch size), M queries of each class in a memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
    """One field; `dimensions` are letters of the module's text or numbers."""

    dtype: str
    dimensions: tuple[str | int, ...]
    padding: int | float | bool
    meaning: str


FIELDS: Mapping[str, Field] = {
    # A batch of images.
    "image": Field("uint8", ("B", "S", "S", 3), 128, "RGB; padded at the bottom and the right"),
    "segment_ids": Field("uint8", ("B", "S", "S"), 0, "0 void, g owns row g - 1 of the tables"),
    "segment_labels": Field("int32", ("B", "G"), -1, "class index into the vocabulary"),
    "segment_is_thing": Field("bool", ("B", "G"), False, "of a countable class"),
    "segment_is_crowd": Field("bool", ("B", "G"), False, "a group; neither learnt nor scored"),
    "segment_source_ids": Field("int64", ("B", "G"), 0, "id in the data set's own files"),
    "image_id": Field("int64", ("B",), 0, "number of the image, unique in its part"),
    "image_size": Field("int32", ("B", 2), 0, "height and width of the valid area in pixels"),
    "clip_image_target": Field("float32", ("B", "C"), 0.0, "CLIP's embedding of the image"),
    "clip_segment_targets": Field("float32", ("B", "G", "C"), 0.0, "and of each segment's crop"),
    # The loop adds it for stages that ask.
    "progress": Field("float32", ("B",), 0.0, "share of the stage's steps that are done"),
    # A batch of captions has images and tokens.
    "tokens": Field("int32", ("B", "T"), 0, "token ids of a caption"),
    # A batch of vision queries.
    "queries": Field("float32", ("B", "N", "D"), 0.0, "vision queries of an image"),
    "query_labels": Field("int32", ("B", "N"), -1, "class index of the segment that a query holds"),
    "query_targets": Field("float32", ("B", "N", "C"), 0.0, "CLIP's embedding of that segment"),
    "memory_queries": Field("float32", ("K", "M", "D"), 0.0, "real queries of each class"),
    "memory_valid": Field("bool", ("K", "M"), False, "whether there is such a query"),
}
# The columns of a segment table.
SEGMENT_TABLES = tuple(name for name, field in FIELDS.items() if field.dimensions == ("B", "G"))
IMAGE_FIELDS = ("image", "segment_ids", *SEGMENT_TABLES, "image_id", "image_size")
PROGRESS = "progress"
TARGET_FIELDS = ("clip_image_target", "clip_segment_targets")
QUERY_FIELDS = ("queries", "query_labels")
QUERY_TARGETS = "query_targets"
MEMORY_FIELDS = ("memory_queries", "memory_valid")


def batch_shapes(
    fields: Iterable[str], **sizes: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of fields, from letter to size (B=2, S=64); without B those of one example."""
    shapes = {}
    for name in fields:
        field = FIELDS[name]
        dimensions = [d for d in field.dimensions if d != "B" or "B" in sizes]
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in dimensions)
        dtype = id_dtype(sizes.get("G", 0)) if name == "segment_ids" else np.dtype(field.dtype)
        shapes[name] = (shape, dtype)
    return shapes


def id_dtype(num_segments: int) -> np.dtype:
    """The type of id maps whose tables have so many rows."""
    return np.dtype(np.uint8 if num_segments <= 255 else np.uint16)


def pad_table(values: np.ndarray, name: str, length: int) -> np.ndarray:
    """A column [n] of a segment table as [length], lengthened by its padding; n <= length."""
    field = FIELDS[name]
    padded = np.full(length, field.padding, field.dtype)
    padded[: len(values)] = values
    return padded
