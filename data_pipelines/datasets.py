"""Data sets by name: what a config's `data` section builds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from concat_jax.configuration import check_choice
from concat_jax.text.vocabulary import Vocabulary
from data_pipelines import synthetic_world
from data_pipelines.augment import resize_longest
from data_pipelines.clip_target_cache import (
    ClipTargetCache,
    check_manifest,
    dataset_identity,
)
from data_pipelines.coco_panoptic import CocoPanoptic, DataError
from data_pipelines.vocabulary_files import load_vocabulary, with_synonyms

KINDS = ("synthetic", "coco_panoptic")

BatchFn = Callable[[int], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run needs of its data. A batch function gives the same batch whenever asked.

    Attributes:
      vocabulary: all classes, seen and unseen.
      train: batch size -> batch function; no batch holds a pixel of an unseen class. Where cached
        CLIP targets are configured, batches carry `clip_image_target` [B, C] and
        `clip_segment_targets` [B, G, C] float32, zeros where padded.
      captions: (batch size, side) -> batch function giving "image" [B, side, side, 3] uint8 and
        "captions", a list of B strings.
      caption_words: every word a caption or a class name can hold.
      evaluation: () -> pairs (example at native size, the same fitted to the input size).
      check_clip_targets: what the targets must have been made with (fields of the cache's manifest)
        -> None; raises ClipTargetError unless the configured cache is of that and of this data,
        complete and undamaged. None where no cache is configured.
    """

    vocabulary: Vocabulary
    train: Callable[[int], BatchFn]
    captions: Callable[[int, int], BatchFn]
    caption_words: tuple[str, ...]
    evaluation: Callable[[], Iterable[tuple[Mapping, Mapping]]]
    check_clip_targets: Callable[[Mapping[str, Any]], None] | None = None


def make_datasets(
    config: Mapping[str, Any], *, seed: int, process_index: int = 0, process_count: int = 1
) -> Datasets:
    """Data sets from a config's `data` section.

    Args:
      config: `kind` and the fields of that kind, as the files in `configs/` give them.
      seed: of order, augmentation and drawing.
      process_index: this host among those that share a global batch.
      process_count: number of hosts.

    Raises:
      ValueError: for an unknown kind, or data that is missing or damaged.
    """
    check_choice(config["kind"], KINDS, "config.data.kind is unknown:")
    if config["kind"] == "synthetic":
        return _synthetic(config, seed, process_index, process_count)
    return _coco_panoptic(config, seed, process_index, process_count)


def _synthetic(config, seed: int, process_index: int, process_count: int) -> Datasets:
    shared = dict(preset=config["preset"], image_size=config["image_size"], seed=seed)

    def of_this_host(make: Callable[[int], BatchFn], batch_size: int) -> BatchFn:
        if batch_size % process_count:
            raise ValueError(
                f"A batch of {batch_size} cannot be shared by {process_count} hosts; make the "
                "batch size a multiple of it."
            )
        # Scenes are endless, so hosts take different steps of one stream and stay disjoint.
        batch = make(batch_size // process_count)
        return lambda step: batch(step * process_count + process_index)

    def train(batch_size: int) -> BatchFn:
        def make(size):
            return synthetic_world.SyntheticWorld(
                **shared, classes="seen", batch_size=size, max_segments=config["max_segments"]
            ).batch

        return of_this_host(make, batch_size)

    def captions(batch_size: int, side: int) -> BatchFn:
        def make(size):
            return synthetic_world.CaptionWorld(
                **shared,
                batch_size=size,
                crop_size=side,
                scene_ratio=config["caption_scene_ratio"],
            ).batch

        return of_this_host(make, batch_size)

    test = synthetic_world.SyntheticWorld(
        **shared,
        split=config["eval_split"],
        classes="all",
        max_segments=config["max_segments"],
        num_eval_images=config["num_eval_images"],
    )
    return Datasets(
        vocabulary=test.vocabulary,
        train=train,
        captions=captions,
        caption_words=synthetic_world.word_list(config["preset"]),
        evaluation=lambda: ((example, example) for example in test.eval_examples()),
    )


def _coco_panoptic(config, seed: int, process_index: int, process_count: int) -> Datasets:
    if not config["root"]:
        raise DataError(
            "No data directory is configured: set config.data.root to a COCO panoptic directory "
            "(train2017/, val2017/, annotations/panoptic_{train,val}2017.json and their PNGs in "
            "annotations/panoptic_{train,val}2017/)."
        )
    part = functools.partial(
        training_part,
        config,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )
    target_folder = config.get("clip_targets", "")

    @functools.cache
    def data_identity() -> dict[str, int | str]:
        data = part(process_count)
        records = [data.records[i] for i in data.training_indices]
        return dataset_identity(records, data.vocabulary.category_ids)

    @functools.cache
    def targets() -> ClipTargetCache:
        return ClipTargetCache(target_folder, data_identity())

    def check_clip_targets(expected: Mapping[str, Any]) -> None:
        check_manifest(Path(target_folder), {**expected, **data_identity()})
        targets()

    def train(batch_size: int) -> BatchFn:
        batch = part(batch_size).batch
        if not target_folder:
            return batch
        cache = targets()
        return lambda step: cache.add_to(batch(step))

    def captions(batch_size: int, side: int) -> BatchFn:
        data = part(batch_size)
        return lambda step: data.caption_batch(step, batch_size, side)

    test = CocoPanoptic(
        config["root"],
        part=config["eval_part"],
        batch_size=1,
        image_size=config["eval_size"],
        num_eval_images=config["num_eval_images"] or None,
        **_shared(config, seed),
    )
    vocabulary = test.vocabulary
    if config.get("synonyms", ""):
        vocabulary = with_synonyms(vocabulary, load_vocabulary(config["synonyms"]))
    names = [name for texts in vocabulary.texts for name in texts]
    words = sorted({word for name in names for word in name.replace("-", " ").split()})
    return Datasets(
        vocabulary=vocabulary,
        train=train,
        captions=captions,
        caption_words=tuple(words),
        evaluation=lambda: (
            (example, resize_longest(example, config["eval_size"]))
            for example in test.eval_examples()
        ),
        check_clip_targets=check_clip_targets if target_folder else None,
    )


def _shared(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return dict(
        split_file=config["split_file"],
        max_segments=config["max_segments"],
        num_threads=config["num_threads"],
        seed=seed,
    )


def training_part(
    config: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> CocoPanoptic:
    """The part that a COCO config trains on; arguments as `make_datasets` and `CocoPanoptic`."""
    return CocoPanoptic(
        config["root"],
        part=config["train_part"],
        batch_size=batch_size,
        image_size=config["image_size"],
        scale_range=tuple(config["scale_range"]),
        augment=config["augment"],
        unseen_images=config["unseen_images"],
        on_bad_example=config["on_bad_example"],
        process_index=process_index,
        process_count=process_count,
        **_shared(config, seed),
    )
