"""A config made into objects, once: stages, networks, label spaces, and how to predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import ml_collections

from concat_jax.core.config import build, check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.batches import BankConfig
from concat_jax.experiment.class_embeddings import check_names, check_text, make_tokenizer
from concat_jax.inference.panoptic import KEEP_RULES
from concat_jax.inference.predictor import PredictConfig
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.generators import make_generator
from concat_jax.models.networks import Networks, make_networks
from concat_jax.neighbours.matchers import OURS, make_matcher
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.registry import make_stage
from concat_jax.stages.stage import INIT, Context, Stage, StageConfig
from concat_jax.text.tokenizer import Tokenizer
from concat_jax.training.optimizer import OptimizerConfig
from concat_jax.training.profile import ProfileConfig
from concat_jax.training.sharding import MeshConfig


class Labels(Protocol):
    """What of the data decides a run's networks; `datasets.Datasets` has it."""

    vocabulary: Vocabulary
    eval_vocabulary: Vocabulary | None
    caption_words: tuple[str, ...]
    eval_size: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config says, checked: stages in order, and what they are made with.

    `eval_vocabulary` is the same object as `vocabulary` where it is the same.
    """

    config: ml_collections.ConfigDict
    stages: Mapping[str, StageConfig]
    vocabulary: Vocabulary
    eval_vocabulary: Vocabulary
    tokenizer: Tokenizer
    predict: PredictConfig
    bank: BankConfig
    profile: ProfileConfig
    context: Context
    mesh: MeshConfig

    @property
    def networks(self) -> Networks:
        """With the config's own generator."""
        return self.context.networks

    def networks_of(self, name: str) -> Networks:
        """The networks of stage `name`; its generator is that of the stage it first came from.

        Raises:
          ValueError: if a generator that the stage names cannot be made.
        """
        source = name
        for _ in self.stages:  # no chain is longer; one that ends in itself is refused elsewhere
            if source in self.stages:
                source = self.stages[source].takes.get("generator", source)
        fields = self.stages[source].generator if source in self.stages else {}
        if not fields:
            return self.networks
        where = f"config.train.{source}.generator"
        generator = make_generator(fields, self.networks.segmentor.width, where)
        return dataclasses.replace(self.networks, generator=generator)

    def make_stage(self, name: str) -> Stage:
        """The parameters that stage `name` trains and reads, and its loss.

        Raises:
          ValueError: for settings that its kind does not have.
        """
        context = dataclasses.replace(self.context, networks=self.networks_of(name))
        return make_stage(name, self.stages[name], context)

    def holds_after(self, name: str) -> dict[str, str]:
        """Subtree to the stage that gave it, of all that holds once stage `name` has finished."""
        return {**self.stages[name].takes, **{s: name for s in self.make_stage(name).trains}}

    def predicts(self, name: str) -> bool:
        """Whether there is all that a prediction needs once stage `name` has finished."""
        return self.holds_after(name).keys() >= {"segmentor", "projector", "clip"}

    def check_predicts(self, name: str, where: str) -> None:
        """Refuse a stage named by `where` that predicts nothing, by a ValueError naming others."""
        check_choice(name, self.stages, f"{where} names no stage of config.train:")
        if not self.predicts(name):
            others = ", ".join(filter(self.predicts, self.stages))
            raise ValueError(
                f"{where} names stage {name!r}, which has no segmentor with a projector; name one "
                f"of {others}."
            )

    def check_files(self) -> None:
        """Refuse, by a ValueError, a file that the config names and no stage reads."""
        init, text = self.config.get("init", {}), self.config.text
        takes = [taken for stage in self.stages.values() for taken in stage.takes.items()]
        with_clip = text.tokenizer == "clip"
        for key, path, is_read in (
            ("init.clip", init.get("clip"), with_clip or ("clip", INIT) in takes),
            ("init.segmentor", init.get("segmentor"), ("segmentor", INIT) in takes),
            ("text.bpe_path", text.bpe_path, with_clip),
        ):
            if path and not is_read:
                raise ValueError(
                    f"config.{key} is {path}, which no stage and no tokenizer of this config reads "
                    "(train.STAGE.takes and text.tokenizer say what they read); leave it out."
                )

    def optimizer(self, name: str) -> OptimizerConfig:
        """Constants of a stage's optimizer; ValueError for a field or value that cannot be."""
        where, steps = f"config.train.{name}", self.stages[name].steps
        optimizer = build(OptimizerConfig, self.stages[name].optimizer, f"{where}.optimizer")
        if left := steps % (count := optimizer.accumulate):
            raise ValueError(
                f"{where}.steps is {steps}, and {count} batches make an update (optimizer."
                f"accumulate); set --{where}.steps={steps - left + count}."
            )
        return optimizer


def make_setup(
    config: ml_collections.ConfigDict, labels: Labels, tokenizer: Tokenizer | None = None
) -> Setup:
    """What a config says; ValueError for a key that there is not, or a value that cannot be.

    A given tokenizer is only asked for its sizes; None makes the config's and checks the names.
    """
    stages = {
        name: build(StageConfig, section, f"config.train.{name}")
        for name, section in config.train.items()
    }
    for where, names in (("stages", config.stages), ("eval.stages", config.eval.stages)):
        for name in names:
            check_choice(name, stages, f"config.{where} names no stage of")
    if (pictures := config.eval.get("num_pictures", 0)) < 0:
        raise ValueError(f"config.eval.num_pictures is {pictures} and must be at least 0.")
    size = config.eval.settings.get("batch_size", 1)
    if any(stage.eval_every for stage in stages.values()) and config.eval.look_images < size:
        raise ValueError(
            f"config.eval.look_images is {config.eval.look_images}; set --config.eval.look_images "
            f"to {size} (config.eval.settings.batch_size) or more, for stages with an eval_every."
        )
    for rule in config.eval.get("keep_rules", ()):
        check_choice(rule, KEEP_RULES, "config.eval.keep_rules names no rule:")
    check_text(config.text)
    evaluated = labels.eval_vocabulary or labels.vocabulary
    if tokenizer is None:
        tokenizer = make_tokenizer(config, labels.caption_words)
        for vocabulary in {labels.vocabulary, evaluated}:
            check_names(config.text, tokenizer, vocabulary)
    model = config.model.to_dict()
    if model["segmentor"].get("kind") == "fcclip":
        raise ValueError(
            "config.model.segmentor.kind is 'fcclip', which predicts and is not trained here: of "
            "its prediction sets it gives the last alone, and losses want all. Convert FC-CLIP's "
            "own file for it, or set config.model.segmentor.kind to 'mask2former' or 'eomt'."
        )
    sizes = ("vocab_size", "context_length", "eot_id")
    model["clip"] |= {size: getattr(tokenizer, size) for size in sizes}
    constants = dict(config.get("loss", {}))
    matcher = make_matcher(constants.pop("matcher", OURS))
    loss = build(SegmentationLossConfig, {**constants, "matcher": matcher}, "config.loss")
    crops, bank, profile, mesh = (
        build(cls, config.get(name, {}), f"config.{name}")
        for name, cls in (
            ("crops", CropConfig),
            ("bank", BankConfig),
            ("profile", ProfileConfig),
            ("mesh", MeshConfig),
        )
    )
    if profile.stage:
        check_choice(profile.stage, config.stages, "config.profile.stage is none of config.stages:")
        steps = stages[profile.stage].steps
        if profile.after + profile.steps > steps:
            few = min(profile.steps, steps)
            raise ValueError(
                f"config.profile: stage {profile.stage!r} has no {profile.steps} steps after "
                f"{profile.after}, but {steps} in all; set --config.profile.after={steps - few} "
                f"--config.profile.steps={few}."
            )
    sides = {"short_side": labels.eval_size, "long_side": labels.eval_size}
    predict = build(PredictConfig, {**sides, **config.eval.settings}, "config.eval.settings")
    if isinstance(predict.gamma, tuple):
        raise ValueError(
            f"config.eval.settings.gamma is {predict.gamma} and must be one number; python -m "
            "concat_jax.calibrate tries several, its --gammas."
        )
    context = Context(
        make_networks(model),
        labels.vocabulary,
        loss,
        crops,
        has_clip_targets=bool(config.data.get("clip_targets", "")),
    )
    return Setup(
        config,
        stages,
        labels.vocabulary,
        evaluated,
        tokenizer,
        predict,
        bank,
        profile,
        context,
        mesh,
    )
