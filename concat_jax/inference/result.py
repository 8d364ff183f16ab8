"""What was found in an image: named segments, to be looked at, read and written."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path
from PIL import Image

from concat_jax.core import coco_writers
from concat_jax.core.files import as_path, refuse_inputs
from concat_jax.core.mask_codes import bounding_box
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.inputs import image_ids
from concat_jax.inference.outputs import (
    ResultWriter,
    overlay,
    result_files,
    result_names,
    summary,
)
from concat_jax.inference.panoptic import ImageSegments


@dataclasses.dataclass(frozen=True)
class Segment:
    """One segment of a result.

    Attributes:
      id: of its pixels in `Result.panoptic`.
      score: probability of its name among those asked for.
      is_seen: whether training segmented its class.
      area: in pixels.
    """

    id: int
    name: str
    score: float
    is_thing: bool
    is_seen: bool
    area: int
    _map: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def mask(self) -> np.ndarray:
        """[H, W] bool, made when it is asked for."""
        return self._map == self.id

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) in pixels, from the upper left."""
        x, y, width, height = bounding_box(self.mask)
        return x, y, width, height


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The panoptic segments of one image; in a notebook it shows itself.

    Attributes:
      image: [H, W, 3] uint8, as it was segmented: turned as its EXIF data say.
      vocabulary: the classes that were asked for.
      source: name of its file, "image.png" where there was none.
    """

    image: np.ndarray
    vocabulary: Vocabulary
    source: str
    _found: ImageSegments
    _path: Path | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def panoptic(self) -> np.ndarray:
        """[H, W] int32 ids of segments, 0 void."""
        return self._found.id_map

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, largest first."""
        classes = self.vocabulary
        found = [
            Segment(
                id=segment["id"],
                name=classes.names[k],
                score=segment["score"],
                is_thing=classes.is_thing[k],
                is_seen=classes.is_seen[k],
                area=segment["area"],
                _map=self.panoptic,
            )
            for segment in self._found.segments
            for k in (segment["label"],)
        ]
        return tuple(sorted(found, key=lambda segment: -segment.area))

    def explain(self, settings: Mapping[str, str] | None = None) -> str:
        """What the rules did, and what to change where nothing was found; `settings` as there."""
        return self._found.explain(settings)

    def overlay(self) -> Image.Image:
        """The image with its segments in colour, and their names; stars mark unseen classes."""
        return overlay(self.image, self.panoptic, self._found.labels_by_id(), self.vocabulary)

    def to_coco(self) -> dict[str, Any]:
        """The content of COCO's panoptic json, of this one image; ids are those of `panoptic`."""
        ((name, number),) = _names([self])
        return {
            **coco_writers.head("panoptic", "segment_ids", self.vocabulary),
            "annotations": [
                {
                    "image_id": number,
                    "file_name": f"{name}.png",
                    "segments_info": coco_writers.segments_info(
                        self.panoptic, self._found.segments, self.vocabulary, number
                    ),
                }
            ],
            "images": [coco_writers.image_entry(number, self.source, self.panoptic.shape)],
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what `python -m concat_jax.predict` writes of one image; see `Results.save`."""
        Results([self]).save(folder)

    def __repr__(self) -> str:
        height, width = self.panoptic.shape
        labels = [segment["label"] for segment in self._found.segments]
        return f"<{self.source}, {height}x{width}: {summary(self.vocabulary, labels, 'segment')}>"

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.overlay().save(buffer, "PNG")
        return buffer.getvalue()


class Results(list[Result]):
    """The results of a list of images, in its order."""

    def __getitem__(self, index: int | slice) -> Result | Results:
        found = super().__getitem__(index)
        return Results(found) if isinstance(index, slice) else found

    def __add__(self, other: list[Result]) -> Results:
        return Results([*self, *other])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes them to a folder, which is made if absent.

        It holds `panoptic.json` of all images, `panoptic/NAME.png` in COCO's id colours,
        `NAME.overlay.png` and, of several, `contact_sheet.overlay.png`. Files of the same names are
        replaced. Raises FileError if it cannot be written or an image is such a file, and
        ValueError if there is no result, or some are of other names.
        """
        if not self:
            raise ValueError("There is no result to save; segment at least one image.")
        if any(result.vocabulary != self[0].vocabulary for result in self):
            raise ValueError(
                "Results of different names cannot be saved together; save those of each call in a "
                "folder of their own."
            )
        names = [name for name, _ in _names(self)]
        files = result_files(as_path(folder), "panoptic", names)
        refuse_inputs(files, [result._path for result in self if result._path])
        with ResultWriter(as_path(folder), "panoptic", self[0].vocabulary) as writer:
            for (name, number), result in zip(_names(self), self, strict=True):
                writer.add(name, number, result.source, result.image, result._found)


def _names(results: list[Result]) -> list[tuple[str, int]]:
    """Names of files and ids of results that are written together."""
    names = result_names([result.source for result in results])
    return list(zip(names, image_ids(names), strict=True))
