"""Images in, segments out: the one way to a prediction."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from PIL import Image

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference import programs
from concat_jax.inference.assign_pixels import PixelCounts
from concat_jax.inference.clip_names import MASKS_AT_ONCE, MaskNamer
from concat_jax.inference.heads import Head, bias_names
from concat_jax.inference.images import Buckets, Windows
from concat_jax.inference.instance import Instance, instance_inference
from concat_jax.inference.panoptic import KEEP_RULES, ImageSegments, SegmentTables, list_segments
from concat_jax.inference.programs import NamedQueries, Network, Sizes
from data_pipelines.pixels import to_rgb

T = TypeVar("T")

# "queries" hands out the masks and names of all queries, for what is measured on them.
TASKS = ("panoptic", "semantic", "instance", "queries")


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """How to predict; the reference's values are Mask2Former's.

    Attributes:
      tasks: any of `TASKS`; the networks run once for all of them.
      keep_rule: of panoptic maps, see `rank_queries`; "" takes the head's.
      score_threshold: of the rule "score"; None takes the head's, 0.8 for a linear one as in the
        reference.
      objectness_threshold: of the rule "objectness": even odds of holding a segment.
      mask_threshold: mask probability from which a pixel is in the mask, 0.5 in the reference.
      overlap_threshold: share of its mask that a panoptic segment must own, 0.8 in the reference.
      instance_threshold: 0 in the reference, for average precision wants all.
      gamma: see `heads.bias_names`; 0 is no calibration. Several values give a panoptic map for
        each, from one run of the networks.
      short_side, long_side: of the network's input, see `Buckets`.
      windows: semantic maps are made through square windows of `short_side`, see `Windows`.
      batch_size: images that the network takes at once.
    """

    tasks: Sequence[str] = ("panoptic",)
    keep_rule: str = ""
    score_threshold: float | None = None
    objectness_threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_threshold: float = 0.8
    instance_threshold: float = 0.0
    gamma: float | tuple[float, ...] = 0.0
    short_side: int = 800
    long_side: int = 1333
    windows: bool = False
    batch_size: int = 1

    def __post_init__(self):
        if not self.tasks or isinstance(self.tasks, str):
            raise ValueError(f"tasks is {self.tasks!r}; give a tuple of {', '.join(TASKS)}.")
        for task in self.tasks:
            check_choice(task, TASKS, "There is no task")
        if self.keep_rule:
            check_choice(self.keep_rule, KEEP_RULES, "There is no keep_rule")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_threshold = field.name.endswith("_threshold") and value is not None
            if is_threshold and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value} and must lie in 0..1.")
        is_number = isinstance(self.gamma, numbers.Real) and np.isfinite(self.gamma)
        if not isinstance(self.gamma, tuple) and not is_number:
            raise ValueError(f"gamma is {self.gamma} and must be a finite number.")
        _ = self.shapes_of_input  # refuses sides that cannot be
        if self.windows and tuple(self.tasks) != ("semantic",):
            raise ValueError("Windows are for the task semantic alone; set windows=False.")
        if isinstance(self.gamma, tuple) and {"semantic", "instance"} & set(self.tasks):
            raise ValueError("Several values of gamma are for the task panoptic alone.")

    @property
    def shapes_of_input(self) -> Buckets | Windows:
        if self.windows:
            return Windows(self.short_side)
        return Buckets(self.short_side, self.long_side)

    @property
    def least_objectness(self) -> float:
        """Below it a query is in no result, whatever it is named."""
        threshold = getattr(self, f"{self.keep_rule}_threshold", 0.0) or 0.0
        least = {"panoptic": threshold, "instance": self.instance_threshold}
        return min(least.get(task, 0.0) for task in self.tasks)

    @property
    def gammas(self) -> tuple[float, ...]:
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)


class Prepared(NamedTuple):
    """An image [h, w, 3] uint8 resized and padded, its size in it, and its size as given."""

    image: np.ndarray
    image_size: tuple[int, int]
    native_size: tuple[int, int]


class Queries(NamedTuple):
    """All queries of an image, whose masks are where the logits exceed 0.

    Attributes:
      class_probs: [N, K+1] float32, the last no-object.
      mask_logits: [N, h, w] float32, of which `source_size` (height, width) is the image.
    """

    class_probs: np.ndarray
    mask_logits: np.ndarray
    source_size: tuple[float, float]


class Prediction(NamedTuple):
    """What was predicted of one image; None for a task that was not asked for.

    `panoptic` is a tuple for several values of gamma; `semantic` [H, W] class indices; `instances`
    by descending score, of things alone where the vocabulary has some.
    """

    panoptic: ImageSegments | tuple[ImageSegments, ...] | None = None
    semantic: np.ndarray | None = None
    instances: list[Instance] | None = None
    queries: Queries | None = None


class Predictor:
    """A segmentor and a head that segment images.

        predictor = Predictor(Network(params, segmentor), head, vocabulary)
        result = predictor(PIL.Image.open("cat.jpg")).panoptic
        [predictor.vocabulary.names[s["label"]] for s in result.segments]

    What is compiled depends on shapes alone: another head of as many names, another vocabulary or
    another threshold compiles nothing, and more names only what names the queries. `programs` are
    the names of those that were used so far.
    """

    def __init__(
        self,
        segmentor: Network,
        head: Head,
        vocabulary: Vocabulary,
        config: PredictConfig | None = None,
        *,
        sharding: Sharding | None = None,
        notices: Sequence[str] = (),
        programs_used: list[str] | None = None,
        namer: MaskNamer | None = None,
    ):
        """`vocabulary` has at most head.num_classes classes, in the head's order.

        `sharding` lays a batch over devices, on all of which the parameters lie; None leaves it to
        JAX. `notices` are sentences on what cannot be done as asked; `programs_used` is a list that
        predictors of one segmentor share; `namer` shows masks to CLIP for a `ClipHead`.
        """
        config = PredictConfig() if config is None else config
        rule = config.keep_rule or head.KEEP_RULE
        threshold = config.score_threshold
        threshold = head.SCORE_THRESHOLD if threshold is None else threshold
        self.config = dataclasses.replace(config, keep_rule=rule, score_threshold=threshold)
        self.vocabulary, self.buckets = vocabulary, config.shapes_of_input
        self.programs = [] if programs_used is None else programs_used
        self.notices = tuple(notices) if "panoptic" in config.tasks else ()
        if config.gammas != (0.0,) and len({*vocabulary.is_seen}) == 1:
            which = "every" if vocabulary.is_seen[0] else "no"
            self.notices += (f"gamma changes nothing: {which} name was seen in training.",)
        unset = {"score": None, "objectness": PredictConfig.objectness_threshold}
        for other in unset.keys() - {rule}:
            if "panoptic" in config.tasks and getattr(config, f"{other}_threshold") != unset[other]:
                self.notices += (
                    f"{other}_threshold changes nothing: queries are kept by {rule}; set "
                    f"{rule}_threshold, or keep_rule={other}.",
                )
        self._segmentor, self._head, self._sharding = segmentor, head, sharding
        self.namer = namer
        padding = (0, head.num_classes - len(vocabulary))
        self._is_thing = np.pad(np.asarray(vocabulary.is_thing), padding)
        self._is_seen = np.pad(np.asarray(vocabulary.is_seen), padding)

    @property
    def networks(self) -> tuple[Network, Head]:
        """What it runs: the segmentor, and the head with the texts of the names."""
        return self._segmentor, self._head

    def __call__(self, image: np.ndarray | Image.Image) -> Prediction:
        """Segments one image: a Pillow image of any mode, or an array [H, W, 3] uint8 RGB."""
        return self.predict([self.prepare(to_rgb(image))])[0]

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resizes and pads an image [H, W, 3] uint8 for the network; may run in a thread."""
        padded, image_size = self.buckets.prepare(image)
        return Prepared(padded, image_size, image.shape[:2])

    def predict(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """Segments 1 to batch_size images of one padded shape, else ValueError."""
        size = self.config.batch_size
        if not 1 <= len(batch) <= size or len({item.image.shape for item in batch}) > 1:
            raise ValueError(
                f"predict takes 1 to {size} images (batch_size) of one padded shape, got "
                f"{len(batch)} of {sorted({item.image.shape for item in batch})}."
            )
        # Filled up with the last one: a batch of another size would be another program.
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        images = np.stack([item.image for item in filled])
        image_size = np.array([item.image_size for item in filled], np.int32)
        native_size = np.array([item.native_size for item in filled], np.int32)
        native = [item.native_size for item in batch]
        if self.config.windows:
            maps = self._in_windows(images, image_size, native_size)
            return [Prediction(semantic=one) for one in maps[: len(batch)]]
        stride = self._segmentor.module.stride
        sizes = Sizes((image_size / stride).astype(np.float32), native_size)
        images, image_size, sizes = self._put((images, image_size, sizes))
        # While nothing is padded the network needs no masks. Once something was, the program that
        # masks serves every image: another one would cost its compilation.
        is_padded = any(item.image_size != item.image.shape[:2] for item in batch)
        is_padded |= any(program.startswith("padded ") for program in self.programs)
        logits, named = self._run(images, image_size, is_padded)
        scores = named.scores
        panoptic = semantic = instances = queries = (None,) * len(batch)
        if "panoptic" in self.config.tasks:
            panoptic = self._panoptic(logits, named, sizes, native)
        if "semantic" in self.config.tasks:
            semantic = self._semantic(logits, scores, sizes, native)
        if "instance" in self.config.tasks:
            instances = self._instances(logits, scores, sizes, native)
        if "queries" in self.config.tasks:
            host = jax.device_get((scores.class_probs, logits, sizes.source_size))
            queries = [Queries(*row) for row in zip(*host, strict=True)][: len(batch)]
        outputs = zip(panoptic, semantic, instances, queries, strict=True)
        return [Prediction(*row) for row in outputs]

    def stream(self, items: Iterable[tuple[T, Prepared]]) -> Iterator[tuple[T, Prediction]]:
        """Predicts any number of images, as batches of one padded shape fill up, in that order."""
        waiting: dict[tuple[int, ...], list[tuple[T, Prepared]]] = {}

        def flush(batch: list[tuple[T, Prepared]]) -> Iterator[tuple[T, Prediction]]:
            names, images = zip(*batch, strict=True)
            return zip(names, self.predict(images), strict=True)

        for item in items:
            shape = item[1].image.shape
            waiting.setdefault(shape, []).append(item)
            if len(waiting[shape]) == self.config.batch_size:
                yield from flush(waiting.pop(shape))
        for batch in waiting.values():
            yield from flush(batch)

    def _run(
        self, images: jax.Array, image_size: jax.Array, is_padded: bool
    ) -> tuple[jax.Array, NamedQueries]:
        """Mask logits of images [B, H, W, 3] uint8, and what the head says of their queries."""
        height, width = images.shape[1:3]
        self._use(f"{'padded ' * is_padded}network {height}x{width}")
        logits, queries = programs.run_segmentor(
            self._segmentor, images, image_size, is_padded=is_padded, canvas=self.buckets.canvas
        )
        config = self.config
        if self.namer is not None:
            self._use(f"CLIP on {MASKS_AT_ONCE} masks")
            how = {"least": config.least_objectness, "stride": self._segmentor.module.stride}
            queries = self.namer(images, image_size, logits, queries, **how)
        several = f" at {len(config.gammas)} gammas" * (len(config.gammas) > 1)
        self._use(f"{self._head.num_classes} names{several}")
        named = programs.name_queries(
            self._head,
            queries,
            self._is_thing,
            self._is_seen,
            np.asarray(config.gammas, np.float32),
            {
                "score_threshold": config.score_threshold,
                "objectness_threshold": config.objectness_threshold,
            },
            keep_rule=config.keep_rule,
        )
        return logits, named

    def _put(self, arrays: Any) -> Any:
        return arrays if self._sharding is None else jax.device_put(arrays, self._sharding)

    def _use(self, program: str) -> None:
        if program not in self.programs:
            self.programs.append(program)

    def _panoptic(
        self, logits, named: NamedQueries, sizes: Sizes, native: Sequence[tuple[int, int]]
    ) -> list:
        config = self.config
        zeros = self._put(np.zeros(named.scores.objectness.shape, np.int32))
        counts = PixelCounts(zeros, zeros, zeros)

        def tile(origin: np.ndarray, side: int) -> jax.Array:
            nonlocal counts
            self._use(f"panoptic map {side}x{side}")
            codes, counts = programs.panoptic_tile(
                logits, named.bids, counts, sizes, origin, config.mask_threshold, side=side
            )
            return codes

        maps = programs.in_tiles(tile, native)
        self._use("segments")
        tables = programs.settle(named.named, named.is_thing, counts, config.overlap_threshold)
        tables = jax.device_get(tables)
        results = [
            _at_each_gamma(codes, jax.tree.map(lambda table, r=row: table[r], tables))
            for row, codes in enumerate(maps)
        ]
        return results if isinstance(config.gamma, tuple) else [one for (one,) in results]

    def _semantic(self, logits, scores, sizes, native) -> list[np.ndarray]:
        gamma = np.float32(self.config.gamma)

        def tile(origin: np.ndarray, side: int) -> jax.Array:
            self._use(f"semantic map {side}x{side}")
            return programs.semantic_tile(
                logits, scores, self._is_seen, gamma, sizes, origin, side=side
            )

        return programs.in_tiles(tile, native)

    def _in_windows(
        self, images: np.ndarray, image_size: np.ndarray, native_size: np.ndarray
    ) -> list[np.ndarray]:
        """Semantic maps, by way of the class scores [B, K, H, W] of whole padded images."""
        side = self.config.short_side
        axis = 1 if images.shape[1] > images.shape[2] else 2
        starts = self.buckets.starts(image_size[:, axis - 1], images.shape[axis] // side)
        weights = self.buckets.weights(starts)
        shape = (len(images), self._head.num_classes, *images.shape[1:3])
        totals = self._put(np.zeros(shape, np.float32))
        gamma = np.float32(self.config.gamma)
        for start, weight in zip(starts, weights, strict=True):
            places = start[:, None] + np.arange(side)
            places = places[:, :, None, None] if axis == 1 else places[:, None, :, None]
            window = self._put(np.take_along_axis(images, places, axis))
            logits, named = self._run(window, np.full_like(image_size, side), is_padded=False)
            self._use("sum of windows")
            at = self._put((start, weight))
            totals = programs.add_window(
                totals, logits, named.scores, self._is_seen, gamma, *at, axis=axis + 1
            )
        sizes = self._put(Sizes(image_size.astype(np.float32), native_size))

        def tile(origin: np.ndarray, side: int) -> jax.Array:
            self._use(f"semantic map {side}x{side}")
            return programs.best_class_tile(totals, sizes, origin, side=side)

        return programs.in_tiles(tile, native_size)

    def _instances(self, logits, scores, sizes, native) -> list[list[Instance]]:
        logits, probs, source_size = jax.device_get((logits, scores.class_probs, sizes.source_size))
        probs = bias_names(probs, self._is_seen, np.float32(self.config.gamma))
        # A panoptic model also has queries for stuff, which holds no instances.
        things = self._is_thing if self._is_thing.any() else None
        return [
            instance_inference(
                logits[row],
                probs[row],
                image_size=size,
                source_size=tuple(map(float, source_size[row])),
                is_thing=things,
                score_threshold=self.config.instance_threshold,
            )
            for row, size in enumerate(native)
        ]


def _at_each_gamma(codes: np.ndarray, tables: SegmentTables) -> tuple[ImageSegments, ...]:
    """Segments of one image at R values of gamma, from codes [H, W] and tables [R, ...]."""
    # An image has few queries whose name a gamma changes, so most give what another gave.
    known: dict[bytes, ImageSegments] = {}
    results = []
    for number in range(len(tables.labels)):
        here = jax.tree.map(lambda table, n=number: table[n], tables)
        key = here.lookup.tobytes() + here.labels.tobytes()
        if key not in known:
            known[key] = list_segments(here.lookup[codes], here)
        results.append(known[key])
    return tuple(results)
