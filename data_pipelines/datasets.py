"""Data sets by name: what a config's `data` section builds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.augment import resize_longest
from data_pipelines.clip_target_cache import (
    ClipTargetCache,
    check_manifest,
    dataset_identity,
)
from data_pipelines.labels import load_label_space, with_synonyms
from data_pipelines.loader import SegmentationLoader
from data_pipelines.shards.source import ShardSource
from data_pipelines.sources.registry import DATASETS, open_source
from data_pipelines.sources.source import DataError, Source
from data_pipelines.synthetic import world as synthetic_world

KINDS = ("synthetic", *DATASETS, "shards")

BatchFn = Callable[[int], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run needs of its data. A batch function gives the same batch whenever asked.

    Attributes:
      vocabulary: all classes that training knows of, seen and unseen.
      train: batch size -> batch function; no batch holds a pixel of an unseen class. Where cached
        CLIP targets are configured, batches carry `clip_image_target` [B, C] and
        `clip_segment_targets` [B, G, C] float32, zeros where padded.
      captions: (batch size, side) -> batch function giving "image" [B, side, side, 3] uint8 and
        "captions", a list of B strings.
      caption_words: every word a caption or a class name can hold.
      evaluation: () -> pairs (example at native size, the same fitted to the input size) of all
        images, or (process_index, process_count) -> those of this host's share of the images.
      check_clip_targets: what the targets must have been made with (fields of the cache's manifest)
        -> None; raises ClipTargetError unless the configured cache is of that and of this data,
        complete and undamaged. None where no cache is configured.
      oracle: as `train`, of images that show unseen classes too: for an upper bound that is not
        zero-shot. None where there are none.
      eval_vocabulary: the classes of the evaluation images, where they are of another data set, as
        in open-vocabulary evaluation; None where they are those of `vocabulary`.
    """

    vocabulary: Vocabulary
    train: Callable[[int], BatchFn]
    captions: Callable[[int, int], BatchFn]
    caption_words: tuple[str, ...]
    evaluation: Callable[..., Iterable[tuple[Mapping, Mapping]]]
    check_clip_targets: Callable[[Mapping[str, Any]], None] | None = None
    eval_vocabulary: Vocabulary | None = None
    oracle: Callable[[int], BatchFn] | None = None


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
    return _on_disk(config, seed, process_index, process_count)


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

    def scenes(batch_size: int, *, classes: str) -> BatchFn:
        def make(size):
            return synthetic_world.SyntheticWorld(
                **shared, classes=classes, batch_size=size, max_segments=config["max_segments"]
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
        train=functools.partial(scenes, classes="seen"),
        captions=captions,
        caption_words=synthetic_world.word_list(config["preset"]),
        oracle=functools.partial(scenes, classes="all"),
        evaluation=lambda *share: ((example, example) for example in test.eval_examples(*share)),
    )


def _on_disk(config, seed: int, process_index: int, process_count: int) -> Datasets:
    # Every stage asks for its part, and COCO's JSON takes half a minute to read.
    source = functools.cache(lambda: open_training_part(config))

    def part(batch_size: int) -> SegmentationLoader:
        return training_part(
            config,
            batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            source=source(),
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

    test = SegmentationLoader(
        _open_for_evaluation(config),
        batch_size=1,
        image_size=config["eval_size"],
        num_eval_images=config["num_eval_images"] or None,
        unseen_images="keep",
        **_shared(config, seed),
    )
    # Where evaluation is on another data set, the training part says which classes training knows.
    elsewhere = bool(config.get("eval_kind", ""))
    vocabulary = source().vocabulary if elsewhere else test.vocabulary
    if config.get("synonyms", ""):
        vocabulary = with_synonyms(vocabulary, load_label_space(config["synonyms"]))
    texts = [*vocabulary.texts, *(test.vocabulary.texts if elsewhere else ())]
    names = [name for words in texts for name in words]
    words = sorted({word for name in names for word in name.replace("-", " ").split()})
    return Datasets(
        vocabulary=vocabulary,
        train=train,
        captions=captions,
        caption_words=tuple(words),
        evaluation=lambda *share: (
            (example, resize_longest(example, config["eval_size"]))
            for example in test.eval_examples(*share)
        ),
        check_clip_targets=check_clip_targets if target_folder else None,
        eval_vocabulary=test.vocabulary if elsewhere else None,
    )


def _shared(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return dict(
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
    source: Source | None = None,
) -> SegmentationLoader:
    """The part that a config trains on.

    Args:
      config, seed, process_index, process_count: as `make_datasets`.
      batch_size: of the global batch.
      source: the part, where it has been opened before.

    Raises:
      ValueError: if the data is missing or damaged, or an argument is out of range.
    """
    return SegmentationLoader(
        source or open_training_part(config),
        batch_size=batch_size,
        image_size=config["image_size"],
        scale_range=tuple(config["scale_range"]),
        augment=config["augment"],
        max_class_area=config.get("max_class_area", 1.0),
        unseen_images=config["unseen_images"],
        on_bad_example=config["on_bad_example"],
        process_index=process_index,
        process_count=process_count,
        **_shared(config, seed),
    )


def open_training_part(config: Mapping[str, Any]) -> Source:
    """The source of a config's training part.

    Raises:
      ValueError: if the data is missing or damaged, or shards were made with another treatment of
        unseen images than the config's.
    """
    source = _open(config, "", config["train_part"], config["on_bad_example"])
    if isinstance(source, ShardSource):
        source.check_treatment(config["unseen_images"], "config.data.unseen_images")
    return source


def _open_for_evaluation(config: Mapping[str, Any]) -> Source:
    other, part = config.get("eval_kind", ""), config["eval_part"]
    if other:
        check_choice(other, KINDS[1:], "config.data.eval_kind is unknown:")
    prefix = "eval_" if other else ""
    # Never skipped: a missing image would change the metric in silence.
    source = _open(config, prefix, part, "raise")
    if isinstance(source, ShardSource):
        source.check_treatment("keep", "evaluation")
    return source


def _open(config: Mapping[str, Any], prefix: str, part: str, on_bad_example: str) -> Source:
    kind, root, split_file = (config[f"{prefix}{name}"] for name in ("kind", "root", "split_file"))
    if not root:
        tree = DATASETS[kind].tree.format(part=part) if kind in DATASETS else "what prepare made"
        raise DataError(
            f"No data directory is configured: set config.data.{prefix}root to a {kind} directory "
            f"({tree})."
        )
    if kind == "shards":
        source = ShardSource(root, part)
        if split_file:
            _check_label_space(source.vocabulary, split_file, root)
        return source
    return open_source(kind, root, part, split_file or None, on_bad_example=on_bad_example)


def _check_label_space(vocabulary: Vocabulary, split_file: str, root: str) -> None:
    asked = load_label_space(split_file)
    if (vocabulary.names, vocabulary.is_seen) != (asked.names, asked.is_seen):
        raise DataError(
            f"The shards in {root} were made with other classes than those of {split_file}; make "
            "them anew, or set the split file to that they were made with."
        )
