"""Seen-class calibration: panoptic quality at many γ from one pass over the images.

γ is subtracted from the probabilities of seen classes before a query is named (calibrated
stacking, Chao et al. 2016; ZegFormer's γ). It renames segments and leaves their geometry alone
(`inference.panoptic`), so the networks and the competition for pixels run once a batch, and
only names, merges of stuff and matches are made again for every γ.

γ is chosen where PQ of unseen classes can be measured, and so with labels of unseen classes: on
images apart from those that are tested on. A score at the best γ stands beside other scores at
their best γ and not beside uncalibrated ones.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from concat_jax.evaluation.evaluate import predict_examples
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.report import markdown_table
from concat_jax.evaluation.score_images import quality_of
from concat_jax.inference.predictor import Predictor

# In a softmax over many classes the probabilities of seen and unseen names differ by anything from
# nothing to nearly one.
GAMMAS = tuple(round(0.05 * step, 2) for step in range(20))

Examples = Iterable[Mapping]
Summaries = dict[float, dict]


def check_gammas(gammas: Iterable[float]) -> tuple[float, ...]:
    """The values ascending, each once.

    Raises:
      ValueError: if there is none, or one that is no number in [0, 1].
    """
    values = tuple(sorted({float(gamma) for gamma in gammas}))
    if not values:
        raise ValueError("There is no gamma to try; give at least one number from 0 to 1.")
    for gamma in values:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(
                f"gamma is subtracted from probabilities and must lie in 0 to 1, got {gamma}."
            )
    return values


def sweep(predictor: Predictor, examples: Examples, *, name: str) -> Summaries:
    """Scores every γ as `evaluate` would at that γ, with one prediction an image; γ -> summary."""
    gammas, vocabulary = predictor.config.gammas, predictor.vocabulary
    totals = [PanopticQuality(len(vocabulary)) for _ in gammas]
    count, start = 0, time.monotonic()
    for native, prediction in predict_examples(predictor, examples):
        # Most values of gamma give the very segments that another gave.
        known: dict[int, PanopticQuality] = {}
        for total, segments in zip(totals, prediction.panoptic, strict=True):
            if id(segments) not in known:
                known[id(segments)] = quality_of(native, segments, len(vocabulary))
            total.merge(known[id(segments)])
        count += 1
    if not count:
        raise ValueError("There is no image to choose gamma on; check the held-out data.")
    speed = count / (time.monotonic() - start)
    print(
        f"{name}: {count} images scored, values of gamma: {len(gammas)}, {speed:.1f} images/s",
        flush=True,
    )
    return {
        gamma: {**total.summarize(vocabulary), "images": count}
        for gamma, total in zip(gammas, totals, strict=True)
    }


def best_gamma(summaries: Mapping[float, Mapping]) -> float:
    """The γ of the highest hPQ; of equal ones the smallest, which changes least.

    Raises ValueError if hPQ was measured at no γ, for want of a seen or an unseen class.
    """
    scores = {gamma: summary["harmonic"]["pq"] for gamma, summary in summaries.items()}
    measured = {gamma: score for gamma, score in scores.items() if math.isfinite(score)}
    if not measured:
        raise ValueError(
            "hPQ was measured at no gamma: the held-out images must show seen and unseen classes."
        )
    return min(measured, key=lambda gamma: (-measured[gamma], gamma))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """γ chosen on held-out images; γ -> summary there, and on the test images."""

    gamma: float
    held_out: Summaries
    test: Summaries


def calibrate(
    sweep_of: Callable[[Examples, Sequence[float]], Summaries],
    held_out: Examples,
    test: Examples | None,
    gammas: Iterable[float] = GAMMAS,
) -> Calibration:
    """Chooses γ on held-out images, then scores the test images without it and with it.

    `sweep_of` is (examples, gammas) -> `sweep` of one stage; 0 always is among the gammas.
    """
    found = sweep_of(held_out, check_gammas((0.0, *gammas)))
    chosen = best_gamma(found)
    tested = {} if test is None else sweep_of(test, check_gammas((0.0, chosen)))
    return Calibration(chosen, found, tested)


def format_sweep(summaries: Mapping[float, Mapping], chosen: float) -> str:
    """Markdown table of hPQ, seen and unseen PQ against γ, percent.

    Args:
      summaries: of `sweep`.
    """
    rows = []
    for gamma, summary in summaries.items():
        scores = [summary[group]["pq"] for group in ("harmonic", "seen", "unseen")]
        cells = [
            f"{gamma:g}",
            *(f"{score:.1f}" if math.isfinite(score) else "-" for score in scores),
        ]
        rows.append([f"**{cell}**" for cell in cells] if gamma == chosen else cells)
    return markdown_table(["gamma", "hPQ", "PQ seen", "PQ unseen"], rows)
