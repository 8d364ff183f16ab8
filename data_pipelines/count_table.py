"""How many images and segments a data set holds, by part, split and class, as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.sources.source import Source, UnseenImages, treat_unseen


@dataclasses.dataclass(frozen=True)
class PartCounts:
    """Counts of one part, crowd included: annotated images, and what `unseen` keeps of them.

    `class_images`, `class_segments` and `kept_segments` are [K] int64.
    """

    unseen: UnseenImages
    images: int
    crowd: int
    kept_images: int
    class_images: np.ndarray
    class_segments: np.ndarray
    kept_segments: np.ndarray


def count_part(source: Source, unseen: UnseenImages) -> PartCounts:
    """Counts a part from its tables; no picture is read.

    Raises:
      ValueError: for an unknown treatment of unseen classes.
    """
    treated, positions = treat_unseen(source, unseen)
    size = len(source.vocabulary)
    return PartCounts(
        unseen=unseen,
        images=len(source.records),
        crowd=sum(int(record.is_crowd.sum()) for record in source.records),
        kept_images=len(positions),
        class_images=_count((np.unique(record.labels) for record in source.records), size),
        class_segments=_count((record.labels for record in source.records), size),
        kept_segments=_count((treated.records[i].labels for i in positions), size),
    )


def format_parts(vocabulary: Vocabulary, counts: Mapping[str, PartCounts]) -> str:
    """A table of parts, and under it which unseen classes each part shows."""
    rows = [["part", "images", "segments", "seen", "unseen", "crowd", "kept images", "segments"]]
    notes = []
    seen, unseen = vocabulary.seen, vocabulary.unseen
    for part, c in counts.items():
        by_split = [int(c.class_segments[classes].sum()) for classes in (seen, unseen)]
        numbers = [c.images, sum(by_split), *by_split, c.crowd]
        kept = [f"{c.unseen}: {c.kept_images:,}", f"{c.kept_segments.sum():,}"]
        rows.append([part, *(f"{number:,}" for number in numbers), *kept])
        occurring = unseen[c.class_segments[unseen] > 0]
        if len(unseen):
            names = ", ".join(vocabulary.names[k] for k in occurring) or "none"
            notes.append(
                f"{part}: {len(occurring)} of {len(unseen)} unseen classes occur: {names}."
            )
    return "\n".join([*_columns(rows), *notes])


def format_classes(vocabulary: Vocabulary, counts: Mapping[str, PartCounts]) -> str:
    """A table of classes, seen ones first: images that show the class, segments, segments kept."""
    head = ["class", "split", "kind"]
    for part in counts:
        head += [f"{part} images", "segments", "kept"]
    rows = [head]
    for k in [*vocabulary.seen, *vocabulary.unseen]:
        row = [vocabulary.names[k]]
        row += ["seen" if vocabulary.is_seen[k] else "unseen"]
        row += ["thing" if vocabulary.is_thing[k] else "stuff"]
        for c in counts.values():
            row += [f"{x[k]:,}" for x in (c.class_images, c.class_segments, c.kept_segments)]
        rows.append(row)
    return "\n".join(_columns(rows))


def _count(labels: Iterable[np.ndarray], size: int) -> np.ndarray:
    return np.bincount(np.concatenate([np.empty(0, np.int64), *labels]), minlength=size)


def _columns(rows: list[list[str]]) -> list[str]:
    # Text to the left, numbers to the right, each column as wide as its widest entry.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [column[-1][0].isdigit() for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    ]
