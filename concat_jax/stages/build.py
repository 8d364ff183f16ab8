"""From a stage's settings to the stage."""

from __future__ import annotations

from concat_jax.core.config import build, check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import Networks
from concat_jax.stages import cat, con, finetune, pretrain_clip
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.image_queries import on_images
from concat_jax.stages.stage import Stage, StageConfig

KINDS = ("pretrain_clip", "con", "cat", "finetune")
# Stages that learn from vision queries, and where they have them from.
QUERY_KINDS = ("cat", "finetune")
QUERY_SOURCES = ("bank", "images")


def check_stage(name: str, settings: StageConfig) -> None:
    """Refuse a stage of an unknown kind, or that cannot know whose vision queries it learns from.

    Args:
      name: of the stage, for the message.
      settings: of the stage.

    Raises:
      ValueError: saying which field is wrong.
    """
    where = f"config.train.{name}"
    check_choice(settings.kind, KINDS, f"{where}.kind is unknown:")
    check_choice(settings.queries, QUERY_SOURCES, f"{where}.queries is")
    if settings.kind in QUERY_KINDS and settings.takes.get("segmentor", "init") == "init":
        raise ValueError(
            f"Stage {name!r} learns from vision queries; say in {where}.takes.segmentor which "
            "stage trained the segmentor, and the projector that goes with it."
        )
    if settings.oracle and settings.queries != "bank":
        raise ValueError(f"{where}.oracle needs a bank; set {where}.queries to 'bank'.")


def make_stage(
    name: str,
    settings: StageConfig,
    networks: Networks,
    vocabulary: Vocabulary,
    loss: SegmentationLossConfig,
    crops: CropConfig,
    *,
    has_clip_targets: bool,
) -> Stage:
    """The stage that the settings describe.

    Args:
      name: of the stage, for messages.
      settings: of the stage, which `check_stage` has passed.
      networks: with the generator that the stage trains or reads.
      vocabulary: the label space.
      loss: of the segmentor, and weights of the cost that matches queries and segments.
      crops: what CLIP sees of a segment in CON.
      has_clip_targets: the config names a cache of CON's targets.

    Raises:
      ValueError: for a field of `settings.method` that the kind lacks, or a value it refuses.
    """
    where = f"config.train.{name}.method"
    if settings.kind == "pretrain_clip":
        config = build(pretrain_clip.PretrainClipConfig, settings.method, where)
        return pretrain_clip.make_stage(networks, config)
    if settings.kind == "con":
        config = con.make_config(settings.method, has_cache=has_clip_targets, where=where)
        return con.make_stage(networks, vocabulary, config, loss, crops)
    if settings.kind == "cat":
        stage = cat.make_stage(networks, vocabulary, build(cat.CatConfig, settings.method, where))
    else:
        stage = finetune.make_stage(
            networks, vocabulary, build(finetune.FinetuneConfig, settings.method, where)
        )
    if settings.queries == "bank":
        return stage
    return on_images(stage, networks, vocabulary, loss)
