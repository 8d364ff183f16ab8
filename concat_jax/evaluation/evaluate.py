"""A predictor on a data set: metrics, pictures, COCO files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

from etils.epath import Path

from concat_jax.core.files import write_png
from concat_jax.core.hosts import total_over_hosts
from concat_jax.evaluation.score_images import SCORES, comparison_row
from concat_jax.evaluation.worst_best import WorstAndBest
from concat_jax.inference.predictor import Prediction, Predictor
from concat_jax.visualize import comparison

# File of the overlay pictures in a stage's folder.
PICTURES = "pictures.png"


def predict_examples(
    predictor: Predictor, examples: Iterable[Mapping]
) -> Iterator[tuple[Mapping, Prediction]]:
    """Pairs of an example at native size and what is predicted of it."""
    return predictor.stream((example, predictor.prepare(example["image"])) for example in examples)


def evaluate(
    predictor: Predictor,
    examples: Iterable[Mapping],
    *,
    name: str,
    num_pictures: int = 0,
    num_extremes: int = 0,
    picture_folder: Path | None = None,
    coco_folder: Path | None = None,
) -> dict:
    """Predicts every image and scores it at its native size, seen and unseen in one label space.

    On several hosts each calls it with examples of its own, and all return the sum.

    Args:
      examples: at native size. One with a true "is_padding" fills a batch up and counts nowhere.
      num_pictures: images of which overlay pictures are written, of panoptic maps.
      num_extremes: of the worst and of the best images, which `WorstAndBest` draws.
      coco_folder: where predictions go, if anywhere: COCO panoptic json and PNGs, COCO instance
        results (`instance_predictions.json`), label maps of category ids
        (`semantic_predictions/`), for each task. Several hosts must all see it.

    Returns:
      `PanopticQuality.summarize` if panoptic is among the predictor's tasks, with "semantic":
      `SemanticIoU.summarize` and "instance": `AveragePrecision.summarize` if they are, "classes",
      "images" and "images_per_second" (compilation included). Instances are scored against the
      masks of the annotations where the data set has them ("segment_masks"), else against the
      things of the panoptic ground truth, which do not overlap.
    """
    vocabulary = predictor.vocabulary
    rows: list[comparison.ComparisonRow] = []
    extremes = WorstAndBest(num_extremes)
    count, start = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        scores = {
            task: stack.enter_context(score(vocabulary, coco_folder))
            for task, score in SCORES.items()
            if task in predictor.config.tasks
        }
        if "panoptic" in scores:
            scores["panoptic"].extremes = extremes
        for native, prediction in predict_examples(predictor, examples):
            if native.get("is_padding", False):
                continue
            for score in scores.values():
                score.add(native, prediction)
            if picture_folder and prediction.panoptic and len(rows) < num_pictures:
                rows.append(comparison_row(native, prediction.panoptic, vocabulary))
            count += 1
    count = total_over_hosts(count)
    if not count:
        raise ValueError("There is no image to evaluate; check the data section of the config.")
    if rows:
        picture_folder.mkdir(parents=True, exist_ok=True)
        write_png(picture_folder / PICTURES, comparison.comparison_sheet(rows))
    seconds = time.monotonic() - start
    print(f"{name}: {count} images evaluated, {count / seconds:.1f} images/s", flush=True)
    summaries = {
        task: score.counts.over_hosts().summarize(vocabulary) for task, score in scores.items()
    }
    if picture_folder and (num_pictures or num_extremes) and "panoptic" in summaries:
        extremes.write(picture_folder, summaries["panoptic"]["per_class"])
    counts = {"classes": len(vocabulary), "images": count, "images_per_second": count / seconds}
    return {**summaries.pop("panoptic", {}), **summaries, **counts}
