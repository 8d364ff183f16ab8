"""Pictures for people: the images that are predicted worst and best, and each class's PQ."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils.epath import Path

from concat_jax.core.arrays import Table
from concat_jax.core.files import FileError, write_png
from concat_jax.evaluation.counts import mean_of_known
from concat_jax.evaluation.panoptic_quality import PanopticQuality, class_quality
from concat_jax.visualize import comparison, plots

# Files in the folder of a report.
WORST_BEST, PQ_PER_CLASS = "worst_best.png", "pq_per_class.png"
Maps = tuple[np.ndarray, Table]


class WorstAndBest:
    """Of the images that are added, `count` of the lowest PQ and as many of the highest.

    The PQ of an image is the mean over the classes in it, true or predicted; an image without any
    is left out.
    """

    def __init__(self, count: int, read: Callable[[str], np.ndarray] | None = None):
        """`read` gives the image [H, W, 3] uint8 of a name, where it is not added; None is grey.

        Grey is also what it raises a FileError for; `faults` has what was said.
        """
        self._count, self._read = count, read
        self.faults: list[str] = []
        self._found: list[tuple[float, str, Maps, Maps, np.ndarray | None]] = []

    def add(
        self,
        quality: PanopticQuality,
        name: str,
        truth: Maps,
        found: Maps,
        image: np.ndarray | None = None,
    ) -> None:
        """Looks at one image: its counts, its id maps [H, W] with the class of each id."""
        pq = mean_of_known(class_quality(quality.counts)["pq"])
        if np.isfinite(pq):
            entry = pq, name, truth, found, image
            bisect.insort(self._found, entry, key=lambda one: one[0])
            del self._found[self._count : max(self._count, len(self._found) - self._count)]

    def write(self, folder: Path, per_class: Sequence[Mapping]) -> list[Path]:
        """Writes the images, from the worst to the best, and PQ by class; paths of what there is.

        `per_class` are those of `PanopticQuality.summarize`.
        """
        classes = [[row[key] for row in per_class] for key in ("name", "is_thing", "is_seen")]
        rows, written = [], []
        for pq, name, truth, found, image in self._found:
            image = self._image(name, truth[0].shape) if image is None else image
            caption = f"PQ {pq:.1f}: {name}"
            rows.append(comparison.comparison_row(image, truth, found, *classes, caption=caption))
        if rows:
            written.append(folder / WORST_BEST)
            write_png(written[-1], comparison.comparison_sheet(rows))
        if measured := [row for row in per_class if np.isfinite(row["pq"])]:
            written.append(folder / PQ_PER_CLASS)
            plots.save_figure(plots.class_bars(measured), written[-1])
        return written

    def _image(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        grey = np.full((*shape, 3), 128, np.uint8)
        if self._read is None:
            return grey
        try:
            image = self._read(name)
        except FileError as error:
            self.faults.append(str(error))
            return grey
        if image.shape[:2] != shape:
            sizes = [f"{height}x{width}" for height, width in (image.shape[:2], shape)]
            self.faults.append(
                f"{name} is {sizes[0]} (height x width) and its annotation {sizes[1]}; give the "
                "folder of the images that were annotated."
            )
            return grey
        return image
