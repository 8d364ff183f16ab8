"""A trained segmentor and a vocabulary on a data set: panoptic quality, pictures, COCO files."""

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

from concat_jax.evaluation import pictures
from concat_jax.evaluation.coco_format import PanopticWriter
from concat_jax.evaluation.image_segments import unpack_segments
from concat_jax.evaluation.panoptic_inference import PanopticOutput, panoptic_inference
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.models.networks import Networks
from concat_jax.models.segmentor import mask_logits, normalize_images
from concat_jax.text.vocabulary import Vocabulary

Predict = Callable[..., PanopticOutput]
Output = TypeVar("Output")

# File of the overlay pictures in a stage's folder.
PICTURES = "pictures.png"


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
    batch_size: images a step.
    num_pictures: overlay pictures written.
    """

    keep_rule: str = "objectness"
    score_threshold: float = 0.8
    objectness_threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_threshold: float = 0.8
    gamma: float = 0.0
    batch_size: int = 1
    num_pictures: int = 8


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
        source_size=sizes.image / networks.segmentor.backbone.stride,
    )


def make_predict(networks: Networks, vocabulary: Vocabulary, config: EvalConfig) -> Predict:
    """Makes (params, text, images, sizes) -> PanopticOutput.

    `params` holds "segmentor" and "projector"; text is [K, C]; images [B, H, W, 3] uint8; sizes
    is `Sizes`, and the maps, at native size, lie in a bucket of H and W times powers of two, so
    that few programs are compiled whatever the sizes are. CLIP's image tower has no part in it.
    """
    is_thing = np.asarray(vocabulary.is_thing)
    is_seen = np.asarray(vocabulary.is_seen)

    @functools.partial(jax.jit, static_argnames=("output_size", "is_padded"))
    def run(params, text, images, sizes, *, output_size, is_padded):
        found = run_networks(networks, params, text, images, sizes, is_padded=is_padded)
        return panoptic_inference(
            found.mask_logits,
            found.class_probs,
            jnp.asarray(is_thing),
            jnp.asarray(is_seen),
            output_size=output_size,
            source_size=found.source_size,
            image_size=sizes.native,
            keep_rule=config.keep_rule,
            score_threshold=config.score_threshold,
            objectness_threshold=config.objectness_threshold,
            mask_threshold=config.mask_threshold,
            overlap_threshold=config.overlap_threshold,
            gamma=config.gamma,
        )

    def predict(params, text, images, sizes: Sizes) -> PanopticOutput:
        return run(params, text, images, sizes, **program_of(images.shape, sizes))

    return predict


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
    predict: Callable[[np.ndarray, Sizes], PanopticOutput],
    examples: Iterable[tuple[Mapping, Mapping]],
    vocabulary: Vocabulary,
    config: EvalConfig,
    *,
    name: str,
    picture_folder: Path | None = None,
    coco_folder: Path | None = None,
) -> dict:
    """Predict every image and score it at its native size, seen and unseen in one label space.

    Args:
      predict: (images [B, H, W, 3] uint8, `Sizes`) -> PanopticOutput with maps at native size.
      examples: pairs of an example at native size and the same fitted to the input size.
      vocabulary: the label space of the ground truth and the prediction.
      config: batch size and number of pictures.
      name: for the progress line.
      picture_folder: where overlay pictures go, if any.
      coco_folder: where COCO panoptic json and PNGs go, if any.

    Returns:
      `PanopticQuality.summarize`, with "images" and "images_per_second" (compilation included).
    """
    quality = PanopticQuality(len(vocabulary))
    rows: list[pictures.ComparisonRow] = []
    count, start = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        writer = (
            stack.enter_context(PanopticWriter(coco_folder, vocabulary)) if coco_folder else None
        )
        for natives, sizes, output in predict_batches(predict, examples, config.batch_size):
            for native, result in zip(natives, unpack_segments(output, sizes.native), strict=True):
                id_map, segments = result.id_map, result.segments
                labels = result.labels_by_id()
                truth = native["segment_ids"], native["segment_labels"]
                quality.update(*truth, native["segment_is_crowd"], id_map, labels)
                if writer:
                    writer.add(int(native["image_id"]), native["file_name"], id_map, segments)
                if picture_folder and len(rows) < config.num_pictures:
                    rows.append(
                        pictures.comparison_row(
                            native["image"],
                            truth,
                            (id_map, labels),
                            vocabulary.names,
                            vocabulary.is_thing,
                            vocabulary.is_seen,
                            caption=native["file_name"],
                        )
                    )
                count += 1
    if not count:
        raise ValueError("There is no image to evaluate; check the data section of the config.")
    if rows:
        picture_folder.mkdir(parents=True, exist_ok=True)
        pictures.comparison_sheet(rows).save(picture_folder / PICTURES)
    seconds = time.monotonic() - start
    print(f"{name}: {count} images evaluated, {count / seconds:.1f} images/s", flush=True)
    return {**quality.summarize(vocabulary), "images": count, "images_per_second": count / seconds}


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
