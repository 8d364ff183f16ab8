"""Images in, segments out: a model's networks and post-processing behind one call."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from concat_jax.core.config import check_choice
from concat_jax.inference.assign_pixels import PixelCounts, RankedQueries, assign_pixels
from concat_jax.inference.images import SIDE_MULTIPLE, Buckets, to_rgb
from concat_jax.inference.instance import Instance, instance_inference
from concat_jax.inference.panoptic import KEEP_RULES, rank_queries, settle_segments
from concat_jax.inference.segments import ImageSegments, list_segments
from concat_jax.inference.semantic import semantic_inference
from concat_jax.models.segmentor import (
    DTYPES,
    LinearClassifier,
    make_segmentor,
    mask_logits,
    normalize_images,
)
from concat_jax.weights.model_folder import TASKS, ModelCard, load_model

# Sides of the square tiles that maps at native size are made in: an image takes the first that it
# fits, or as many of the last as cover it. Two programs serve every size, at bounded memory.
TILE_SIDES = (640, 1344)
# Of score_threshold where the user names none: the reference's for panoptic maps; for instances it
# keeps all, which nobody can look at.
SCORE_THRESHOLDS = {"panoptic": 0.8, "instance": 0.5, "semantic": 0.0}


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """How to predict.

    Attributes:
      task: "panoptic", "instance" or "semantic"; "" is the model's own, panoptic if it has none.
      keep_rule: of panoptic maps, "score" (the reference) or "objectness" (for models that name
        classes by text).
      score_threshold: class probability above which a query (instance: its score above which an
        instance) is kept; None takes `SCORE_THRESHOLDS`.
      objectness_threshold: of the keep rule "objectness".
      mask_threshold: mask probability from which a pixel is in the mask.
      overlap_threshold: share of its mask that a panoptic segment must own.
      short_side, long_side: of the network's input, see `Buckets`.
      dtype: compute type, "float32" or "bfloat16"; "" is the model's own.
      batch_size: images that the network takes at once.
    """

    task: str = ""
    keep_rule: str = "score"
    score_threshold: float | None = None
    objectness_threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_threshold: float = 0.8
    short_side: int = 800
    long_side: int = 1333
    dtype: str = ""
    batch_size: int = 1

    def __post_init__(self):
        if self.task:
            check_choice(self.task, TASKS, "There is no task")
        if self.dtype:
            check_choice(self.dtype, DTYPES, "There is no dtype")
        check_choice(self.keep_rule, KEEP_RULES, "There is no keep_rule")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size} and must be at least 1.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_threshold") and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value} and must lie in 0..1.")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image ready for the network.

    Attributes:
      image: [h, w, 3] uint8, resized and padded into a bucket.
      image_size: (height, width) of the image in it.
      native_size: (height, width) of the image as it was given.
    """

    image: np.ndarray
    image_size: tuple[int, int]
    native_size: tuple[int, int]


Result = ImageSegments | list[Instance] | np.ndarray


class Predictor:
    """A converted model that segments images.

        predictor = Predictor.from_folder("mask2former-r50")
        result = predictor(PIL.Image.open("cat.jpg"))
        [predictor.vocabulary.names[s["label"]] for s in result.segments]

    The result is by task: `ImageSegments` (panoptic), a list of `Instance`, or a semantic map
    [H, W] of class indices.

    Attributes:
      vocabulary: the classes of the model.
      is_thing: [K] bool numpy, all True where the model does not know.
      config: with task and score_threshold filled in.
      notice: a sentence on what the model cannot do as asked, or "".
      programs: names of the compiled programs so far, in order.
    """

    def __init__(self, params: Any, card: ModelCard, config: PredictConfig | None = None):
        """Args:
          params, card: of `load_model`.
          config: how to predict.

        Raises:
          ValueError: the weights have no class head, or the config has a value out of range.
        """
        config = PredictConfig() if config is None else config
        if card.vocabulary is None or "classifier" not in params:
            whose = f"The weights of {card.source}" if card.source else "These weights"
            raise ValueError(
                f"{whose} have no class head (a backbone alone?) and cannot name segments; convert "
                "a whole Mask2Former."
            )
        task = config.task or card.task or "panoptic"
        threshold = config.score_threshold
        threshold = SCORE_THRESHOLDS[task] if threshold is None else threshold
        self.config = dataclasses.replace(config, task=task, score_threshold=threshold)
        self.vocabulary, self.notice = card.vocabulary, ""
        self.is_thing = np.array(card.vocabulary.is_thing)
        if not card.knows_things:
            # Stuff flags that nobody set would merge every class into one segment.
            self.is_thing[:] = True
            if task == "panoptic":
                self.notice = (
                    "The model does not say which classes are things: all are treated as things, "
                    "so no segments of one class are merged."
                )
        self.buckets = Buckets(config.short_side, config.long_side)
        settings = dict(card.segmentor)
        if config.dtype:
            settings["dtype"] = config.dtype
        self._segmentor = make_segmentor(settings)
        self._stride = self._segmentor.stride
        self._classifier = LinearClassifier(len(card.vocabulary))
        self._params = jax.device_put({k: params[k] for k in ("segmentor", "classifier")})
        self.programs: list[str] = []
        self._network = jax.jit(self._run_network)
        self._panoptic_tile = jax.jit(self._run_panoptic_tile, static_argnames="side")
        self._semantic_tile = jax.jit(self._run_semantic_tile, static_argnames="side")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], **settings) -> Predictor:
        """A predictor of a folder that `python -m concat_jax.convert` wrote.

        Args:
          folder: of the model.
          **settings: fields of `PredictConfig`.

        Raises:
          ValueError: as `load_model` and `Predictor`.
        """
        return cls(*load_model(folder), PredictConfig(**settings))

    def __call__(self, image: np.ndarray | Image.Image) -> Result:
        """Segments one image: a Pillow image of any mode, or an array [H, W, 3] uint8 RGB."""
        return self.predict([self.prepare(to_rgb(image))])[0]

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resizes and pads an image [H, W, 3] uint8 for the network; may run in a thread."""
        padded, image_size = self.buckets.prepare(image)
        return Prepared(padded, image_size, image.shape[:2])

    def predict(self, batch: Sequence[Prepared]) -> list[Result]:
        """Segments up to batch_size images of one bucket.

        Raises:
          ValueError: none or too many images, or of several buckets.
        """
        size = self.config.batch_size
        if not 1 <= len(batch) <= size or len({item.image.shape for item in batch}) > 1:
            raise ValueError(
                f"predict takes 1 to {size} images (batch_size) of one padded shape, got "
                f"{len(batch)} of {sorted({item.image.shape for item in batch})}."
            )
        # Filled up with the last one: a batch of another size would be another program.
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        image_size = np.array([item.image_size for item in filled], np.int32)
        native_size = np.array([item.native_size for item in filled], np.int32)
        logits, probs, queries = self._network(
            self._params, np.stack([item.image for item in filled]), image_size
        )
        sizes = {"source_size": (image_size / self._stride).astype(np.float32)}
        if self.config.task == "instance":
            return self._instances(logits, probs, sizes["source_size"], batch)
        sizes["image_size"] = native_size
        if self.config.task == "semantic":
            return self._semantic_maps(logits, probs, sizes, batch)
        return self._panoptic_maps(logits, queries, sizes, batch)

    def _run_network(self, params, images, image_size):
        self.programs.append(f"network {images.shape[1]}x{images.shape[2]}")
        output = self._segmentor.apply(
            {"params": params["segmentor"]}, normalize_images(images), image_size
        )
        logits = mask_logits(output.mask_embeddings[:, -1], output.mask_features)
        # One shape for all buckets: the post-processing is compiled once, not once a bucket.
        side = -(-self.buckets.long_side // SIDE_MULTIPLE) * SIDE_MULTIPLE // self._stride
        height, width = logits.shape[2:]
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, side - height), (0, side - width)))
        probs = jax.nn.softmax(
            self._classifier.apply({"params": params["classifier"]}, output.queries[:, -1])
        )
        config = self.config
        queries = rank_queries(
            probs,
            jnp.ones(len(self.vocabulary), bool),
            keep_rule=config.keep_rule,
            score_threshold=config.score_threshold,
            objectness_threshold=config.objectness_threshold,
        )
        return logits, probs, queries

    def _run_panoptic_tile(self, logits, queries: RankedQueries, counts, sizes, origin, *, side):
        self.programs.append(f"panoptic map {side}x{side}")
        codes, here = assign_pixels(
            logits,
            queries,
            output_size=(side, side),
            origin=origin,
            mask_threshold=self.config.mask_threshold,
            **sizes,
        )
        counts += here
        # Of use after the last tile only, but far too little work for a program of its own.
        tables = settle_segments(
            queries,
            counts,
            jnp.asarray(self.is_thing),
            overlap_threshold=self.config.overlap_threshold,
        )
        return codes, counts, tables

    def _run_semantic_tile(self, logits, probs, sizes, origin, *, side):
        self.programs.append(f"semantic map {side}x{side}")
        return semantic_inference(logits, probs, output_size=(side, side), origin=origin, **sizes)

    def _panoptic_maps(self, logits, queries, sizes, batch) -> list[ImageSegments]:
        zeros = np.zeros(queries.labels.shape, np.int32)
        counts, tables = PixelCounts(zeros, zeros, zeros), None

        def make(origin, side):
            nonlocal counts, tables
            codes, counts, tables = self._panoptic_tile(
                logits, queries, counts, sizes, origin, side=side
            )
            return codes

        maps = _in_tiles(make, [item.native_size for item in batch])
        tables = jax.device_get(tables)
        results = []
        for row, codes in enumerate(maps):
            of_image = jax.tree.map(lambda table, r=row: table[r], tables)
            results.append(list_segments(of_image.lookup[codes], of_image))
        return results

    def _semantic_maps(self, logits, probs, sizes, batch) -> list[np.ndarray]:
        make = functools.partial(self._semantic_tile, logits, probs, sizes)
        return _in_tiles(
            lambda origin, side: make(origin, side=side), [item.native_size for item in batch]
        )

    def _instances(self, logits, probs, source_size, batch) -> list[list[Instance]]:
        logits, probs = jax.device_get((logits, probs))
        # A panoptic model also has queries for stuff, which holds no instances.
        things = self.is_thing if self.is_thing.any() else None
        return [
            instance_inference(
                logits[row],
                probs[row],
                image_size=item.native_size,
                source_size=tuple(source_size[row]),
                is_thing=things,
                score_threshold=self.config.score_threshold,
            )
            for row, item in enumerate(batch)
        ]


def _in_tiles(make, native_sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Maps of a batch at native sizes from tiles of one static side.

    Args:
      make: (origin [2] int32, side) -> [B, side, side] device array.
      native_sizes: (height, width) of the images wanted.
    """
    height, width = np.max(native_sizes, axis=0)
    side = next((s for s in TILE_SIDES if max(height, width) <= s), TILE_SIDES[-1])
    maps = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = np.asarray(make(np.array([top, left], np.int32), side))
            maps = maps or [np.empty(size, tile.dtype) for size in native_sizes]
            for whole, part in zip(maps, tile, strict=False):
                place = whole[top : top + side, left : left + side]
                place[...] = part[: place.shape[0], : place.shape[1]]
    return maps
