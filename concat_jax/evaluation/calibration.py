"""Seen-class calibration: panoptic quality at many γ from one pass over the images.

γ is subtracted from the probabilities of seen classes before a query is named (calibrated
stacking, Chao et al. 2016; ZegFormer's γ). It renames segments and leaves their geometry alone
(`panoptic_inference`), so the networks and the competition for pixels run once a batch, and
only names, merges of stuff and matches are made again for every γ.

γ is chosen where PQ of unseen classes can be measured, and so with labels of unseen classes: on
images apart from those that are tested on. A score at the best γ stands beside other scores at
their best γ and not beside uncalibrated ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.evaluate import (
    EvalConfig,
    Sizes,
    predict_batches,
    program_of,
    run_networks,
    split_batch,
)
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.report import markdown_table
from concat_jax.inference.assign_pixels import assign_pixels
from concat_jax.inference.panoptic import SegmentTables, rank_queries, settle_segments
from concat_jax.models.networks import Networks

# In a softmax over many classes the probabilities of seen and unseen names differ by anything from
# nothing to nearly one.
GAMMAS = tuple(round(0.05 * step, 2) for step in range(20))

Examples = Iterable[tuple[Mapping, Mapping]]
Summaries = dict[float, dict]


@flax.struct.dataclass
class CalibratedOutput:
    """Panoptic maps of B images at R values of γ.

    Attributes:
      codes: [B, H, W] uint8 or uint16, the codes of `assign_pixels`, which are the same at every γ.
      tables: SegmentTables with an axis of γ after that of the images: lookup [B, R, 2N + 2], the
        others [B, R, N].
    """

    codes: jax.Array
    tables: SegmentTables


def make_calibrated_predict(
    networks: Networks,
    vocabulary: Vocabulary,
    config: EvalConfig,
    sharding: Sharding | None = None,
) -> Callable[..., CalibratedOutput]:
    """Makes (params, text, images, sizes, gammas) -> CalibratedOutput.

    `gammas` is [R] float32; the rest, the programs that are compiled and the rules are those of
    `make_predict`, as are the arguments, but for `config.gamma`, which has no part in it. Another γ
    compiles nothing; another number of them only the small program behind the competition for
    pixels.
    """
    is_thing = np.asarray(vocabulary.is_thing)
    is_seen = np.asarray(vocabulary.is_seen)
    rank = functools.partial(
        rank_queries,
        keep_rule=config.keep_rule,
        score_threshold=config.score_threshold,
        objectness_threshold=config.objectness_threshold,
    )

    @functools.partial(jax.jit, static_argnames=("output_size", "is_padded"))
    def assign(params, text, images, sizes, *, output_size, is_padded):
        found = run_networks(networks, params, text, images, sizes, is_padded=is_padded)
        codes, counts = assign_pixels(
            found.mask_logits,
            rank(found.class_probs, jnp.asarray(is_seen)),
            output_size=output_size,
            source_size=found.source_size,
            image_size=sizes.native,
            mask_threshold=config.mask_threshold,
        )
        return found.class_probs, codes, counts

    @jax.jit
    def settle(class_probs, counts, gammas):
        def at(gamma):
            return settle_segments(
                rank(class_probs, jnp.asarray(is_seen), gamma=gamma),
                counts,
                jnp.asarray(is_thing),
                overlap_threshold=config.overlap_threshold,
            )

        return jax.vmap(at, out_axes=1)(gammas)

    def predict(params, text, images, sizes: Sizes, gammas) -> CalibratedOutput:
        program = program_of(images.shape, sizes)
        class_probs, codes, counts = assign(
            params, text, *split_batch((images, sizes), sharding), **program
        )
        return CalibratedOutput(codes, settle(class_probs, counts, gammas))

    return predict


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


def sweep(
    predict: Callable[[np.ndarray, Sizes, np.ndarray], CalibratedOutput],
    examples: Examples,
    vocabulary: Vocabulary,
    config: EvalConfig,
    gammas: Iterable[float],
    *,
    name: str,
) -> Summaries:
    """Scores every γ as `evaluate` would at that γ, with one prediction an image.

    Args:
      predict: (images [B, H, W, 3] uint8, `Sizes`, gammas [R] float32) -> CalibratedOutput.
      examples: as of `evaluate`.
      vocabulary: the label space of the ground truth and the prediction.
      config: for the batch size.
      gammas: R values in [0, 1].
      name: for the progress line.

    Returns:
      γ, ascending, to its `PanopticQuality.summarize` with "images".

    Raises:
      ValueError: for a γ out of range, or if there is no image.
    """
    values = check_gammas(gammas)
    on_device = np.asarray(values, np.float32)
    totals = [PanopticQuality(len(vocabulary)) for _ in values]
    count, start = 0, time.monotonic()
    for natives, sizes, output in predict_batches(
        lambda images, sizes: predict(images, sizes, on_device), examples, config.batch_size
    ):
        for row, native in enumerate(natives):
            height, width = sizes.native[row]
            codes = output.codes[row, :height, :width]
            tables = output.tables.lookup[row], output.tables.labels[row]
            for total, quality in zip(
                totals, _score(native, codes, *tables, len(vocabulary)), strict=True
            ):
                total.merge(quality)
            count += 1
    if not count:
        raise ValueError("There is no image to choose gamma on; check the held-out data.")
    speed = count / (time.monotonic() - start)
    print(
        f"{name}: {count} images scored, values of gamma: {len(values)}, {speed:.1f} images/s",
        flush=True,
    )
    return {
        gamma: {**total.summarize(vocabulary), "images": count}
        for gamma, total in zip(values, totals, strict=True)
    }


def _score(
    native: Mapping, codes: np.ndarray, lookup: np.ndarray, labels: np.ndarray, num_classes: int
) -> list[PanopticQuality]:
    """Counts of one image at every γ, from codes [h, w], lookup [R, 2N + 2] and labels [R, N]."""
    # An image has few queries whose name a γ changes, so most γ give what their neighbour gave.
    known: dict[bytes, PanopticQuality] = {}
    scores = []
    for ids_of_codes, classes in zip(lookup, labels, strict=True):
        key = ids_of_codes.tobytes() + classes.tobytes()
        if key not in known:
            known[key] = PanopticQuality(num_classes)
            known[key].update(
                native["segment_ids"],
                native["segment_labels"],
                native["segment_is_crowd"],
                ids_of_codes[codes],
                classes,
            )
        scores.append(known[key])
    return scores


def best_gamma(summaries: Mapping[float, Mapping]) -> float:
    """The γ of the highest hPQ; of equal ones the smallest, which changes least.

    Args:
      summaries: of `sweep`.

    Raises:
      ValueError: if hPQ was measured at no γ, for want of a seen or an unseen class.
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
    """γ chosen on held-out images, and what it does on the test images.

    Attributes:
      gamma: the chosen value.
      held_out: γ to summary on the held-out images.
      test: γ to summary on the test images, of 0 and the chosen γ.
    """

    gamma: float
    held_out: Summaries
    test: Summaries


def calibrate(
    sweep_of: Callable[[Examples, Sequence[float]], Summaries],
    held_out: Examples,
    test: Examples,
    gammas: Iterable[float] = GAMMAS,
) -> Calibration:
    """Chooses γ on held-out images, then scores the test images without γ and with the choice.

    Args:
      sweep_of: (examples, gammas) -> `sweep` of one stage, as `Run.sweep` with its name.
      held_out: examples to choose on.
      test: examples to report on, none of which may be among the held-out ones.
      gammas: to choose from; 0 always is among them.

    Raises:
      ValueError: as `sweep` and `best_gamma`.
    """
    found = sweep_of(held_out, check_gammas((0.0, *gammas)))
    chosen = best_gamma(found)
    return Calibration(chosen, found, sweep_of(test, check_gammas((0.0, chosen))))


def format_sweep(summaries: Mapping[float, Mapping], chosen: float) -> str:
    """Markdown table of hPQ, seen and unseen PQ against γ, percent.

    Args:
      summaries: of `sweep`.
      chosen: the γ whose row is in bold.
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
