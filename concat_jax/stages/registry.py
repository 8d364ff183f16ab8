"""The stages by the `kind` of their settings, and from the settings to the stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from concat_jax.core.config import build, check_choice
from concat_jax.models.networks import SUBTREES
from concat_jax.stages import cat, con, finetune, pretrain_clip, regression
from concat_jax.stages.queries import on_images
from concat_jax.stages.stage import COMES_WITH, INIT, Context, Stage, StageConfig

# A new stage is a module, see `stage.py`, and a line here.
STAGES: dict[str, ModuleType] = {
    "pretrain_clip": pretrain_clip,
    "con": con,
    "cat": cat,
    "finetune": finetune,
    "regression": regression,
}
QUERY_SOURCES = ("bank", "images")
CAPTIONS = ("all", "seen")


@contextlib.contextmanager
def _remedies_of(name: str) -> Iterator[None]:
    """Names the stage in flags of an error's text, --config.train.STAGE.KEY=VALUE."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(".STAGE.", f".{name}.")) from error


def learns_from(settings: StageConfig) -> str:
    """What the stage's batches hold: "captions", "images", or "queries" of a bank."""
    module = STAGES[settings.kind]
    on_images = module.LEARNS_FROM == "queries" and settings.queries == "images"
    return "images" if on_images else module.LEARNS_FROM


def method_of(name: str, settings: StageConfig) -> Any:
    """The constants of stage `name`, a `Config` of its kind; ValueError for what it refuses."""
    check_choice(settings.kind, STAGES, f"config.train.{name}.kind is unknown:")
    with _remedies_of(name):
        return build(STAGES[settings.kind].Config, settings.method, f"config.train.{name}.method")


def make_stage(name: str, settings: StageConfig, context: Context) -> Stage:
    """The stage that the settings describe.

    Raises ValueError as `method_of`, for a source of vision queries that it cannot have, or for
    something it reads that the settings do not say where to take from.
    """
    where = f"config.train.{name}"
    method = method_of(name, settings)
    check_choice(settings.queries, QUERY_SOURCES, f"{where}.queries is")
    check_choice(settings.captions, CAPTIONS, f"{where}.captions are")
    module = STAGES[settings.kind]
    if module.LEARNS_FROM == "queries" and settings.takes.get("segmentor", INIT) == INIT:
        raise ValueError(
            f"Stage {name!r} learns from vision queries; say in {where}.takes.segmentor which "
            "stage trained the segmentor, and the projector that goes with it."
        )
    if settings.oracle and settings.queries != "bank":
        raise ValueError(f"{where}.oracle needs a bank; set --{where}.queries=bank.")
    if settings.oracle and not getattr(method, "unseen_names", True):
        raise ValueError(
            f"{where}.oracle shows unseen classes, and no stage learns what has no name to it; set "
            f"--{where}.method.unseen_names=True, or --{where}.oracle=False."
        )
    for subtree in settings.takes:
        check_choice(subtree, SUBTREES, f"{where}.takes names no subtree:")
    with _remedies_of(name):
        stage = module.make_stage(context, method)
        if stage.loss is None and (settings.steps or settings.queries != "bank"):
            raise ValueError(
                f"Stage {name!r} is in closed form, from a bank; set --{where}.steps=0 and "
                f"--{where}.queries=bank."
            )
        if stage.loss is not None and not settings.steps:
            raise ValueError(f"{where}.steps is 0; set --{where}.steps=1 or more.")
        least = settings.batch_size
        if learns_from(settings) == "queries" and settings.bank_images < least:
            raise ValueError(
                f"{where}.bank_images is {settings.bank_images}; set --{where}.bank_images={least} "
                f"(its batch_size) or more, images whose vision queries are learnt from."
            )
        if learns_from(settings) != module.LEARNS_FROM:
            stage = on_images(stage, context)
    for read in stage.reads:
        subtree = COMES_WITH.get(read, read)
        if subtree not in settings.takes:
            raise ValueError(
                f"Stage {name!r} reads {subtree!r}; say in {where}.takes which stage gives it."
            )
    return stage
