"""Seen-class calibration: panoptic quality at many γ from one pass over the images.

γ is taken from the logits of seen names (`inference.heads.bias_names`). It renames segments and
leaves their geometry alone, so the networks and the competition for pixels run once a batch, and
only names, merges of stuff and matches are made again for every γ.

One γ is chosen where PQ of unseen classes can be measured, and so with labels of unseen classes: on
images apart from those that are tested on. A score at the best γ stands beside other scores at
their best γ and not beside uncalibrated ones. The area under seen against unseen PQ, as γ goes from
minus to plus infinity, needs no choice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.bias_curve import NamedQueries, curve_area, naming_curve
from concat_jax.evaluation.counts import harmonic_mean
from concat_jax.evaluation.evaluate import predict_examples
from concat_jax.evaluation.panoptic_quality import PanopticQuality, class_quality
from concat_jax.evaluation.query_names import QueryNames
from concat_jax.evaluation.report import markdown_table, number
from concat_jax.evaluation.score_images import quality_of
from concat_jax.inference.predictor import Predictor

# Logits are cosines times a scale of at most 100; what finetuning adds to seen names is a few.
_STEPS = (
    *(round(0.25 * step, 2) for step in range(17)),
    *(4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0, 24.0),
)
GAMMAS = tuple(sorted({sign * step for step in _STEPS for sign in (1.0, -1.0)}))

Examples = Iterable[Mapping]


def check_gammas(gammas: Iterable[float]) -> tuple[float, ...]:
    """The values ascending, each once.

    Raises:
      ValueError: if there is none, or one that is no number.
    """
    values = tuple(sorted({float(gamma) for gamma in gammas}))
    if not values:
        raise ValueError("There is no gamma to try; give at least one number, as --gammas=0,1.")
    for gamma in values:
        if not math.isfinite(gamma):
            raise ValueError(f"gamma is taken from logits and must be a number, got {gamma:g}.")
    return values


def sides(counts: np.ndarray, is_seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seen and unseen PQ [...] in percent of counts [..., 4, K]; NaN where no class occurs."""
    quality = class_quality(counts)["pq"]
    with np.errstate(invalid="ignore"):
        means = [
            np.nansum(quality[..., side], axis=-1) / (~np.isnan(quality[..., side])).sum(axis=-1)
            for side in (is_seen, ~is_seen)
        ]
    return means[0], means[1]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a model makes of M images at R values of γ.

    Attributes:
      gammas: ascending.
      counts: [R, M, 4, K] float32, of each image as `class_quality` takes them.
      names: how the queries of segments are named, where that was measured.
    """

    vocabulary: Vocabulary
    gammas: tuple[float, ...]
    counts: np.ndarray
    names: NamedQueries | None = None

    def at(self, gamma: float) -> np.ndarray:
        """Counts [M, 4, K] at one of the values."""
        return self.counts[self.gammas.index(gamma)]

    def summary(self, gamma: float) -> dict:
        """`PanopticQuality.summarize` at one of the values, "classes" and "images"."""
        total = PanopticQuality(len(self.vocabulary))
        total.iou_sum, total.tp, total.fp, total.fn = self.at(gamma).sum(axis=0, dtype=np.float64)
        sizes = {"classes": len(self.vocabulary), "images": self.counts.shape[1]}
        return {**total.summarize(self.vocabulary), **sizes}

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Seen and unseen PQ [R], percent."""
        counts = self.counts.sum(axis=1, dtype=np.float64)
        return sides(counts, np.asarray(self.vocabulary.is_seen))

    def area(self) -> float:
        """Area under the curve, percent; the values of γ should reach far on both sides."""
        return float(curve_area(*self.curve()))

    def best(self) -> float:
        """The finite γ of the highest hPQ; of equal ones the nearest to 0, which changes least.

        Raises ValueError if hPQ was measured at no γ, for want of a seen or an unseen class.
        """
        scores = {
            gamma: harmonic_mean(*map(float, pair))
            for gamma, *pair in zip(self.gammas, *self.curve(), strict=True)
        }
        measured = {g: score for g, score in scores.items() if np.isfinite([g, score]).all()}
        if not measured:
            raise ValueError(
                "hPQ was measured at no gamma: the held-out images must show seen and unseen "
                "classes."
            )
        return min(measured, key=lambda gamma: (-measured[gamma], abs(gamma), gamma))


def sweep(predictor: Predictor, examples: Examples, *, name: str) -> Sweep:
    """Scores every γ as `evaluate` would at that γ, with one prediction an image.

    With "queries" among the predictor's tasks the names of queries are measured, too.
    """
    gammas, vocabulary = predictor.config.gammas, predictor.vocabulary
    counts: list[np.ndarray] = []
    names = QueryNames(np.asarray(vocabulary.is_seen))
    start = time.monotonic()
    for native, prediction in predict_examples(predictor, examples):
        # Most values of gamma give the very segments that another gave.
        known: dict[int, np.ndarray] = {}
        for segments in prediction.panoptic:
            if id(segments) not in known:
                quality = quality_of(native, segments, len(vocabulary))
                known[id(segments)] = quality.counts.astype(np.float32)
        counts.append(np.stack([known[id(segments)] for segments in prediction.panoptic]))
        if prediction.queries is not None:
            names.add(native, prediction.queries)
    if not counts:
        raise ValueError("There is no image to choose gamma on; check the held-out data.")
    speed = len(counts) / (time.monotonic() - start)
    print(
        f"{name}: {len(counts)} images scored, values of gamma: {len(gammas)}, "
        f"{speed:.1f} images/s",
        flush=True,
    )
    named = names.queries() if "queries" in predictor.config.tasks else None
    return Sweep(vocabulary, gammas, np.stack(counts, axis=1), named)


def calibrate(
    sweep_of: Callable[[Examples, Sequence[float]], Sweep],
    held_out: Examples,
    test: Examples | None,
    gammas: Iterable[float] = GAMMAS,
) -> tuple[float, Sweep, Sweep | None]:
    """Chooses γ on held-out images, then scores the test images at all of them; γ and both sweeps.

    `sweep_of` is (examples, gammas) -> `sweep` of one stage; 0 always is among the gammas.
    """
    gammas = check_gammas((0.0, *gammas))
    found = sweep_of(held_out, gammas)
    return found.best(), found, None if test is None else sweep_of(test, gammas)


def format_sweep(found: Sweep, chosen: float, shown: Iterable[float] | None = None) -> str:
    """Markdown table of hPQ, seen and unseen PQ against γ, percent; `shown` None shows all."""
    rows = []
    for gamma in found.gammas if shown is None else shown:
        summary = found.summary(gamma)
        scores = [summary[group]["pq"] for group in ("harmonic", "seen", "unseen")]
        cells = [f"{gamma:g}", *map(number, scores)]
        rows.append([f"**{cell}**" for cell in cells] if gamma == chosen else cells)
    return markdown_table(["gamma", "hPQ", "PQ seen", "PQ unseen"], rows)


def format_areas(found: Sweep) -> str:
    """What no bias can change, in a line."""
    parts = [f"Area under unseen against seen PQ: {number(found.area())}."]
    if found.names is not None:
        names = naming_curve(found.names, np.asarray(found.vocabulary.is_seen))
        parts.append(
            f"Names of the queries that hold a segment: area {number(names.area)}, right among "
            f"unseen names {number(names.among_unseen)}, among seen {number(names.among_seen)}."
        )
    return " ".join(parts)
