"""Data sets by name: what a config's `data` section builds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from concat_jax.core.config import check_choice
from concat_jax.core.files import FileError
from concat_jax.core.prefetch import Batches, in_threads
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.clip_target_cache import ClipTargetCache, dataset_identity, find_targets
from data_pipelines.labels import load_label_space, with_synonyms
from data_pipelines.loader import SegmentationLoader
from data_pipelines.prepared.pipeline import training_batches
from data_pipelines.prepared.source import PreparedSource
from data_pipelines.sources.registry import DATASETS, open_source
from data_pipelines.sources.source import Source, UnseenImages
from data_pipelines.synthetic.presets import PRESETS
from data_pipelines.synthetic.world import CaptionWorld, SyntheticWorld

KINDS = ("synthetic", *DATASETS, "tfds")

BatchFn = Callable[[int], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run needs of its data. A step's batch is the same whenever asked.

    Attributes:
      train: batch size -> batches of steps; none holds a pixel of an unseen class. Where cached
        CLIP targets are configured, batches carry them.
      captions: (batch size, side, "all" or "seen" classes) -> batch function of "image"
        [B, side, side, 3] uint8 and "captions", a list of B strings.
      caption_words: texts that hold every word of a caption or a class name.
      evaluation: () -> examples of all images at native size, or (process_index, process_count) ->
        those of this host's share of the images.
      eval_size: longer side of the network's input at evaluation.
      check_clip_targets: fields of the cache's manifest -> None; raises StoreError unless the
        configured cache is of that and of this data, complete and undamaged.
      bank: as `train`, of the images whose queries a bank holds.
      oracle: as `bank`, of images that show unseen classes too: an upper bound, not zero-shot.
      eval_vocabulary: the classes of the evaluation images, where they are of another data set, as
        in open-vocabulary evaluation; None where they are those of `vocabulary`.
      identity: () -> fingerprint of the training images' records and of the classes, wherever the
        files lie. None where images are drawn.
    """

    vocabulary: Vocabulary
    train: Callable[[int], Batches]
    bank: Callable[[int], Batches]
    captions: Callable[..., BatchFn]
    caption_words: tuple[str, ...]
    evaluation: Callable[..., Iterable[Mapping]]
    eval_size: int
    check_clip_targets: Callable[[Mapping[str, Any]], None] | None = None
    eval_vocabulary: Vocabulary | None = None
    oracle: Callable[[int], Batches] | None = None
    identity: Callable[[], str] | None = None


def make_datasets(
    config: Mapping[str, Any], *, seed: int, process_index: int = 0, process_count: int = 1
) -> Datasets:
    """Data sets from a config's `data` section; ValueError for an unknown kind or damaged data."""
    check_choice(config["kind"], KINDS, "config.data.kind is unknown:")
    make = _synthetic if config["kind"] == "synthetic" else _on_disk
    return make(config, seed, process_index, process_count)


# Steps of a run in a world that several share: each goes on where the one before ends.
_STEPS_OF_A_RUN = 1 << 24


def _synthetic(config, seed: int, process_index: int, process_count: int) -> Datasets:
    world = config.get("world_seed", seed)
    first = 0 if world == seed else (seed + 1) * _STEPS_OF_A_RUN
    check_choice(config["preset"], PRESETS, "There is no preset")
    whole = preset = PRESETS[config["preset"]]
    if every := config.get("left_out", 0):
        preset = whole.leaving_out(every)
    shared = dict(preset=preset, image_size=config["image_size"], seed=world)
    segments = dict(max_segments=config["max_segments"])

    def share_of(batch_size: int) -> int:
        if batch_size % process_count:
            raise ValueError(
                f"A batch of {batch_size} cannot be shared by {process_count} hosts; make the "
                "batch size a multiple of it."
            )
        return batch_size // process_count

    num_train_images = config.get("num_train_images", 0)
    held_out_bank = config.get("held_out_bank", False)
    if held_out_bank and not num_train_images:
        raise ValueError(
            "config.data.held_out_bank is for training scenes that end, and they do not; set "
            "--config.data.num_train_images=2500, say, or --config.data.held_out_bank=False."
        )

    def scenes(batch_size: int, classes: str, held_out: bool = False) -> Batches:
        # A scene depends on its index alone, so a host draws its own rows of the global batch.
        share = share_of(batch_size)
        begin, images = first, num_train_images
        if held_out:  # from the first batch on that holds none of them, for all seeds of a world
            begin, images = -(-images // batch_size), 0
        options = dict(classes=classes, num_train_images=images, batch_size=share)
        batch = SyntheticWorld(**shared, **segments, **options).batch
        return in_threads(lambda step: batch((begin + step) * process_count + process_index))

    def captions(batch_size: int, side: int, classes: str = "all") -> BatchFn:
        # A batch of captions is one stream of random numbers: every host draws it whole.
        share = share_of(batch_size)
        own = slice(process_index * share, (process_index + 1) * share)
        options = dict(crop_size=side, scene_ratio=config["caption_scene_ratio"], classes=classes)
        batch = CaptionWorld(**shared, **options, batch_size=batch_size).batch
        return lambda step: {name: rows[own] for name, rows in batch(first + step).items()}

    test = SyntheticWorld(
        **shared,
        **segments,
        split=config["eval_split"],
        classes="all",
        num_eval_images=config["num_eval_images"],
    )
    return Datasets(
        vocabulary=test.vocabulary,
        train=functools.partial(scenes, classes="seen"),
        bank=functools.partial(scenes, classes="seen", held_out=held_out_bank),
        captions=captions,
        # Those of the whole world: its CLIP has read them all.
        caption_words=(*whole.vocabulary.names, "a an and"),
        oracle=functools.partial(scenes, classes="all", held_out=held_out_bank),
        evaluation=test.eval_examples,
        eval_size=config["image_size"],
    )


def _on_disk(config, seed: int, process_index: int, process_count: int) -> Datasets:
    # Every stage asks for its part, and COCO's JSON takes half a minute to read.
    training = functools.cache(
        lambda: training_part(
            config, seed=seed, process_index=process_index, process_count=process_count
        )
    )
    test = evaluation_part(config, seed=seed)
    scored = test.records[: test.num_eval_images]
    if all(record.is_crowd.all() for record in scored):
        raise FileError(
            f"Not one image of the evaluation part {config['eval_part']!r} has a segment that is "
            "no crowd, so there is nothing to score; check that the annotation lists segments."
        )
    # Where evaluation is on another data set, the training part says which classes training knows.
    elsewhere = bool(config.get("eval_kind", ""))
    vocabulary = training().vocabulary if elsewhere else test.vocabulary
    if config.get("synonyms", ""):
        vocabulary = with_synonyms(vocabulary, load_label_space(config["synonyms"]))
    texts = [*vocabulary.texts, *(test.vocabulary.texts if elsewhere else ())]

    @functools.cache
    def described() -> dict[str, int | str]:
        data = training()
        records = (data.records[i] for i in data.training_indices)
        return dataset_identity(records, data.vocabulary.category_ids)

    def identity() -> str:
        text = json.dumps([described(), dataclasses.asdict(training().vocabulary)])
        return hashlib.sha256(text.encode()).hexdigest()

    folder = config.get("clip_targets", "")

    @functools.cache
    def targets() -> ClipTargetCache:
        return ClipTargetCache(folder, described())

    def check_clip_targets(expected: Mapping[str, Any]) -> None:
        find_targets(folder, {**expected, **described()})
        targets()

    def train(batch_size: int) -> Batches:
        data = training()
        if config["kind"] == "tfds":
            batches = functools.partial(training_batches, data, batch_size=batch_size)
        else:
            batches = in_threads(functools.partial(data.batch, batch_size=batch_size))
        return targets().added_to(batches) if folder else batches

    return Datasets(
        vocabulary=vocabulary,
        train=train,
        bank=train,
        captions=lambda batch_size, side, classes="all": (
            lambda step: training().caption_batch(step, batch_size, side)
        ),
        caption_words=tuple(word for words in texts for word in words),
        evaluation=test.eval_examples,
        eval_size=config["eval_size"],
        check_clip_targets=check_clip_targets if folder else None,
        eval_vocabulary=test.vocabulary if elsewhere else None,
        identity=identity,
    )


def evaluation_part(config: Mapping[str, Any], *, seed: int) -> SegmentationLoader:
    """The part that a config evaluates on, of another data set where it has an `eval_kind`."""
    return SegmentationLoader(
        _open(config, "eval_" if config.get("eval_kind", "") else "", "eval_part", "keep"),
        image_size=config["eval_size"],
        num_eval_images=config["num_eval_images"] or None,
        unseen_images="keep",
        max_segments=config["max_segments"],
        num_threads=config["num_threads"],
        seed=seed,
    )


def training_part(
    config: Mapping[str, Any], *, seed: int, process_index: int = 0, process_count: int = 1
) -> SegmentationLoader:
    """The part that a config trains on; ValueError for data prepared with another `unseen`."""
    return SegmentationLoader(
        _open(config, "", "train_part", config["unseen_images"]),
        image_size=config["image_size"],
        scale_range=tuple(config["scale_range"]),
        augment=config["augment"],
        unseen_images=config["unseen_images"],
        on_bad_example=config["on_bad_example"],
        process_index=process_index,
        process_count=process_count,
        max_segments=config["max_segments"],
        num_threads=config["num_threads"],
        seed=seed,
    )


def _open(config: Mapping[str, Any], prefix: str, part_key: str, unseen: UnseenImages) -> Source:
    # `prefix` is "eval_" where the part is another data set's; `unseen` is what is done with its
    # images that show unseen classes.
    kind, root, split_file = (config[f"{prefix}{name}"] for name in ("kind", "root", "split_file"))
    check_choice(kind, KINDS[1:], f"config.data.{prefix}kind is unknown:")
    part = config[part_key]
    if not root:
        tree = DATASETS[kind].tree.format(part=part) if kind in DATASETS else "what prepare made"
        raise FileError(
            f"No data directory is configured: set config.data.{prefix}root to a {kind} directory "
            f"({tree})."
        )
    trains = part_key == "train_part"
    if kind != "tfds":
        # Evaluation never skips: a missing image would change the metric in silence.
        on_bad = config["on_bad_example"] if trains else "raise"
        return open_source(kind, root, part, split_file or None, on_bad_example=on_bad)
    source = PreparedSource(root, part)
    asked = load_label_space(split_file) if split_file else source.vocabulary
    if (source.vocabulary.names, source.vocabulary.is_seen) != (asked.names, asked.is_seen):
        raise FileError(
            f"The data in {root} was prepared with other classes than those of {split_file}; "
            "prepare it anew, or set the split file to that it was prepared with."
        )
    source.check_treatment(unseen, "config.data.unseen_images" if trains else "evaluation")
    return source
