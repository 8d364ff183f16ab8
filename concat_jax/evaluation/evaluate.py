"""A trained segmentor and a vocabulary on a data set: metrics, pictures, COCO files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from concat_jax.core.config import check_choice
from concat_jax.core.hosts import sum_over_hosts, total_over_hosts
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.score_images import (
    InstanceScore,
    PanopticScore,
    SemanticScore,
    comparison_row,
)
from concat_jax.inference.panoptic import PanopticOutput, panoptic_inference
from concat_jax.inference.semantic import semantic_inference
from concat_jax.models.networks import Networks
from concat_jax.models.segmentor import mask_logits, normalize_images
from concat_jax.visualize import overlay as pictures

Output = TypeVar("Output")

# File of the overlay pictures in a stage's folder.
PICTURES = "pictures.png"
METRICS = ("panoptic", "semantic", "instance")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Attributes:
    keep_rule: "objectness" (a query is kept if it likely holds anything; a threshold on the class
      score costs unseen classes most) or "score" (Mask2Former's rule).
    score_threshold: of the rule "score".
    objectness_threshold: of the rule "objectness".
    mask_threshold: mask probability from which a pixel is in the mask.
    overlap_threshold: share of its mask a segment must own.
    gamma: subtracted from seen classes' probabilities; 0 is no calibration.
    batch_size: images a step of one host, which are split over as many of its devices as divide
      this number.
    num_pictures: overlay pictures written, of panoptic maps.
    metrics: any of `METRICS`; the networks run once for all of them.

    Raises:
      ValueError: for a metric that does not exist, or none.
    """

    keep_rule: str = "objectness"
    score_threshold: float = 0.8
    objectness_threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_threshold: float = 0.8
    gamma: float = 0.0
    batch_size: int = 1
    num_pictures: int = 8
    metrics: Sequence[str] = ("panoptic",)

    def __post_init__(self):
        if not self.metrics or isinstance(self.metrics, str):
            raise ValueError(f"metrics is {self.metrics!r}; give a tuple of {', '.join(METRICS)}.")
        for metric in self.metrics:
            check_choice(metric, METRICS, "There is no metric")


class Sizes(NamedTuple):
    """Sizes of a batch of padded images.

    Attributes:
      image: [B, 2] int32 (height, width) of the valid area.
      native: [B, 2] int32 (height, width) of the images as they were, which the maps take.
    """

    image: np.ndarray
    native: np.ndarray


class NetworkOutput(NamedTuple):
    """What the networks say of a batch, before any rule of post-processing.

    Attributes:
      mask_logits: [B, N, h, w] float32, before the sigmoid.
      class_probs: [B, N, K+1] float32, the last one no-object.
      source_size: [B, 2] float32 (height, width) of the valid part of mask_logits.
    """

    mask_logits: jax.Array
    class_probs: jax.Array
    source_size: jax.Array


class Predictions(NamedTuple):
    """What the metrics of an `EvalConfig` need of a batch; None what none of them needs.

    Attributes:
      panoptic: maps and segments.
      semantic: [B, H, W] class indices.
      instance: what instances are made of on the host, γ applied.
    """

    panoptic: PanopticOutput | None
    semantic: jax.Array | None
    instance: NetworkOutput | None


Predict = Callable[..., Predictions]


def run_networks(
    networks: Networks, params, text: jax.Array, images: jax.Array, sizes: Sizes, *, is_padded: bool
) -> NetworkOutput:
    """Segmentor and projector of a batch, to be traced; arguments as of `make_predict`'s result.

    Args:
      is_padded: whether an image is smaller than the batch; then the network masks its padding.
    """
    output = networks.segmentor.apply(
        {"params": params["segmentor"]},
        normalize_images(images),
        sizes.image if is_padded else None,
    )
    logits = networks.projector.apply(
        {"params": params["projector"]}, output.queries[:, -1], text, method="predict"
    )
    return NetworkOutput(
        mask_logits=mask_logits(output.mask_embeddings[:, -1], output.mask_features),
        class_probs=jax.nn.softmax(logits, axis=-1),
        source_size=sizes.image / networks.segmentor.stride,
    )


def make_predict(
    networks: Networks,
    vocabulary: Vocabulary,
    config: EvalConfig,
    sharding: Sharding | None = None,
) -> Predict:
    """Makes (params, text, images, sizes) -> Predictions.

    `params` holds "segmentor" and "projector"; text is [K, C]; images [B, H, W, 3] uint8; sizes
    is `Sizes`, and the maps, at native size, lie in a bucket of H and W times powers of two, so
    that few programs are compiled whatever the sizes are. CLIP's image tower has no part in it.

    γ is subtracted before segments are named, and before semantic scores and instances are made;
    for these two a probability does not fall below 0.

    Args:
      networks: the networks.
      vocabulary: K classes, which says what is thing or stuff, seen or unseen.
      config: rules of post-processing, and what is needed of it.
      sharding: of a batch over devices of this host, on all of which `params` lie. None leaves
        images where JAX puts them.
    """
    is_thing = np.asarray(vocabulary.is_thing)
    is_seen = np.asarray(vocabulary.is_seen)

    @functools.partial(jax.jit, static_argnames=("output_size", "is_padded"))
    def run(params, text, images, sizes, *, output_size, is_padded):
        found = run_networks(networks, params, text, images, sizes, is_padded=is_padded)
        places = dict(
            output_size=output_size, source_size=found.source_size, image_size=sizes.native
        )
        # The last column is no-object.
        shift = config.gamma * np.append(is_seen, False)
        calibrated = jnp.maximum(found.class_probs - shift, 0.0)
        panoptic = semantic = instance = None
        if "panoptic" in config.metrics:
            panoptic = panoptic_inference(
                found.mask_logits,
                found.class_probs,
                jnp.asarray(is_thing),
                jnp.asarray(is_seen),
                **places,
                keep_rule=config.keep_rule,
                score_threshold=config.score_threshold,
                objectness_threshold=config.objectness_threshold,
                mask_threshold=config.mask_threshold,
                overlap_threshold=config.overlap_threshold,
                gamma=config.gamma,
            )
        if "semantic" in config.metrics:
            semantic = semantic_inference(found.mask_logits, calibrated, **places)
        if "instance" in config.metrics:
            instance = found._replace(class_probs=calibrated)
        return Predictions(panoptic, semantic, instance)

    def predict(params, text, images, sizes: Sizes) -> Predictions:
        program = program_of(images.shape, sizes)
        return run(params, text, *split_batch((images, sizes), sharding), **program)

    return predict


def split_batch(batch: Any, sharding: Sharding | None) -> Any:
    """A tree of arrays [B, ...] put on devices as a sharding says; as it is without one."""
    return batch if sharding is None else jax.device_put(batch, sharding)


def program_of(image_shape: Sequence[int], sizes: Sizes) -> dict[str, Any]:
    """Static arguments that choose the compiled program of a batch: output_size and is_padded.

    Where nothing is padded the network needs no masks: two programs, the lighter for most.
    """
    return {
        "output_size": output_bucket(image_shape[1:3], sizes.native.max(axis=0)),
        "is_padded": bool((np.asarray(sizes.image) != image_shape[1:3]).any()),
    }


def output_bucket(input_size: Sequence[int], native_size: Sequence[int]) -> tuple[int, int]:
    """The input size, each side doubled until the native size fits."""
    height, width = (
        int(side) * 2 ** max(0, math.ceil(math.log2(int(native) / int(side))))
        for side, native in zip(input_size, native_size, strict=True)
    )
    return height, width


def evaluate(
    predict: Callable[[np.ndarray, Sizes], Predictions],
    examples: Iterable[tuple[Mapping, Mapping]],
    vocabulary: Vocabulary,
    config: EvalConfig,
    *,
    name: str,
    picture_folder: Path | None = None,
    coco_folder: Path | None = None,
) -> dict:
    """Predict every image and score it at its native size, seen and unseen in one label space.

    On several hosts each calls it with examples of its own, and all return the sum.

    Args:
      predict: (images [B, H, W, 3] uint8, `Sizes`) -> Predictions with maps at native size.
      examples: pairs of an example at native size and the same fitted to the input size. One with
        a true "is_padding" fills a batch up and counts nowhere.
      vocabulary: the label space of the ground truth and the prediction.
      config: metrics, batch size and number of pictures.
      name: for the progress line.
      picture_folder: where overlay pictures go, if any.
      coco_folder: where predictions go, if anywhere: COCO panoptic json and PNGs, COCO instance
        results (`instance_predictions.json`), label maps of category ids
        (`semantic_predictions/`), for each metric. Several hosts must all see it.

    Returns:
      `PanopticQuality.summarize` if the panoptic metric is among them, with "semantic":
      `SemanticIoU.summarize` and "instance": `AveragePrecision.summarize` if they are, "images"
      and "images_per_second" (compilation included). Instances are scored against the things of
      the panoptic ground truth, which do not overlap; COCO's own instance annotations do.
    """
    kinds = {"panoptic": PanopticScore, "semantic": SemanticScore, "instance": InstanceScore}
    rows: list[pictures.ComparisonRow] = []
    count, start = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        scores = {
            metric: stack.enter_context(kinds[metric](vocabulary, coco_folder))
            for metric in METRICS
            if metric in config.metrics
        }
        for natives, sizes, output in predict_batches(predict, examples, config.batch_size):
            for row, native in enumerate(natives):
                if native.get("is_padding", False):
                    continue
                size = tuple(map(int, sizes.native[row]))
                for metric, score in scores.items():
                    of_image = jax.tree.map(operator.itemgetter(row), getattr(output, metric))
                    result = score.add(native, size, of_image)
                    shows = metric == "panoptic" and picture_folder
                    if shows and len(rows) < config.num_pictures:
                        rows.append(comparison_row(native, result, vocabulary))
                count += 1
    count = total_over_hosts(count)
    if not count:
        raise ValueError("There is no image to evaluate; check the data section of the config.")
    if rows:
        picture_folder.mkdir(parents=True, exist_ok=True)
        pictures.comparison_sheet(rows).save(picture_folder / PICTURES)
    seconds = time.monotonic() - start
    print(f"{name}: {count} images evaluated, {count / seconds:.1f} images/s", flush=True)
    summaries = {
        metric: sum_over_hosts(score.counts).summarize(vocabulary)
        for metric, score in scores.items()
    }
    speed = {"images": count, "images_per_second": count / seconds}
    return {**summaries.pop("panoptic", {}), **summaries, **speed}


def predict_batches(
    predict: Callable[[np.ndarray, Sizes], Output],
    examples: Iterable[tuple[Mapping, Mapping]],
    batch_size: int,
) -> Iterator[tuple[list[Mapping], Sizes, Output]]:
    """Predicts the examples of `evaluate`, `batch_size` at once.

    Yields:
      (b examples at native size, their `Sizes`, numpy arrays that `predict` gave for them), with
      b = batch_size but for the last batch.
    """
    for chunk in _batched(examples, batch_size):
        # The last batch is filled up with its last image: one shape, one compilation.
        filled = [*chunk, *[chunk[-1]] * (batch_size - len(chunk))]
        sizes = Sizes(
            image=np.stack([boxed["image_size"] for _, boxed in filled]),
            native=np.array([native["segment_ids"].shape for native, _ in filled], np.int32),
        )
        output = predict(np.stack([boxed["image"] for _, boxed in filled]), sizes)
        first_rows = operator.itemgetter(slice(len(chunk)))
        sizes, output = jax.tree.map(first_rows, (sizes, jax.device_get(output)))
        yield [native for native, _ in chunk], sizes, output


def _batched(items: Iterable, size: int) -> Iterator[Sequence]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
