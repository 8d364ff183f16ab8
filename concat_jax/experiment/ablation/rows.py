"""The rows of the ablation: what each changes of a config's stages, as data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from concat_jax.core.config import check_choice


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage made of one of the config's with some `changes`, scored where it has a title.

    `takes` is subtree to the row that gives it, where that is not the config's stage; None: it is
    not taken. `base` is the row that it is compared to, seed by seed and scene by scene. γ is
    chosen on validation scenes with labels of unseen classes; a row that is `chosen_among` others
    is that of them which is best, at its γ, in the same world without its unseen classes, where
    every LEFT_OUT-th of the seen ones is unseen to all that is trained.
    """

    title: str
    stage: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    base: str = ""
    chosen_among: tuple[str, ...] = ()


LEFT_OUT = 4
# Steps of a finetune that knows no unseen name, to choose among.
_INDUCTIVE_STEPS = (300, 600, 1200)

_STAGE_1 = {"segmentor": "con", "projector": "con"}
_PROJECTION = {"segmentor": "projection", "projector": "projection"}
_NO_PULL = {"method.global_weight": 0.0, "method.instance_weight": 0.0}
_INDUCTIVE = {"method.unseen_names": False}

# PADing's generator, cut down to the demo's widths, and its losses without those of structure: MMD,
# and a thousandth of the classification of pseudo queries.
_PADING = {
    "generator": dict(
        kind="primitives", num_primitives=128, num_layers=3, num_heads=4, ffn_width=256
    ),
    "method.contrast_weight": 0.0,
    "method.cycle_weight": 0.001,
}


def _regression(on: str) -> dict[str, Any]:
    """Of a stage in closed form instead of CAT; pseudo queries are its means and deviations."""
    return {
        "kind": "regression",
        "steps": 0,
        "generator": dict(kind="regression"),
        "method": dict(on=on),
        "oracle": on == "means",
    }


def _with_cat(
    title: str, name: str, changes: Mapping[str, Any], stage_1: Mapping[str, str] = _STAGE_1
) -> dict[str, Row]:
    """A variant of CAT and the finetune on its pseudo queries, which is the row that is scored."""
    return {
        f"cat_{name}": Row("", "cat", changes, stage_1),
        name: Row(title, "finetune", {}, {**stage_1, "generator": f"cat_{name}"}, base="fair"),
    }


def _inductive(
    title: str,
    name: str,
    stage: str,
    changes: Mapping[str, Any],
    takes: Mapping[str, str],
    base: str,
) -> dict[str, Row]:
    """A finetune that knows no unseen name, whose steps and γ no unseen label chooses."""
    tried = {
        f"{name}_{steps}": Row("", stage, {**_INDUCTIVE, **changes, "steps": steps}, takes)
        for steps in _INDUCTIVE_STEPS
    }
    return tried | {name: Row(title, base=base, chosen_among=tuple(tried))}


def _pull(weight: float, name: str) -> dict[str, Row]:
    """CON's instance term at another weight, alone."""
    changes = {"method.global_weight": 0.0, "method.instance_weight": weight}
    return {name: Row(f"instance pull {weight:g}", "con", changes, base="projection")}


ROWS: Mapping[str, Row] = {
    "projection": Row("stage 1, projection only", "con", _NO_PULL),
    **_pull(0.25, "pull_quarter"),
    **_pull(1.0, "pull_1"),
    **_pull(4.0, "pull_4"),
    **_pull(16.0, "pull_16"),
    "con": Row("stage 1 + CON", "con", base="projection"),
    "con_area": Row(
        "CON, segments by the root of their area", "con", {"method.area_power": 0.5}, base="con"
    ),
    # At the cross-entropy's weight, as `attributes` has none of it.
    "con_image": Row(
        "CON with a pull of the image", "con", {"method.global_weight": 1.0}, base="con"
    ),
    "con_segments": Row(
        "CON with a pull of the image to the mean of its segments",
        "con",
        {"method.global_weight": 1.0, "method.global_target": "segments"},
        base="con",
    ),
    "control": Row(
        "CON, finetune without pseudo queries and without its term",
        "control",
        {"method.con_weight": 0.0},
        _STAGE_1,
        base="fair",
    ),
    "fair": Row("CON, finetune without pseudo queries", "control", {}, _STAGE_1, base="con"),
    "cat_pading": Row("", "cat", _PADING, _PROJECTION),
    "pading": Row(
        "PADing-style generator and finetune, no CON",
        "finetune",
        {"method.deviation": 0.0, "method.pseudo_per_class": 1, "method.con_weight": 0.0},
        {**_PROJECTION, "generator": "cat_pading"},
        base="fair",
    ),
    **_with_cat("CON + CAT", "full", {}),
    # What reads the class back need not be what named the queries: a projector that starts anew,
    # on real queries, their names and CLIP's embeddings; no unseen name is a wrong answer to it.
    "teacher": Row(
        "",
        "control",
        {**_INDUCTIVE, "method.con_weight": 4.0, "steps": 2000},
        {"segmentor": "con", "projector": None},
    ),
    "cat_own_teacher": Row("", "cat", {}, {"segmentor": "con", "projector": "teacher"}),
    "own_teacher": Row(
        "CON + CAT, a teacher of its own for the cycle",
        "finetune",
        {},
        {**_STAGE_1, "generator": "cat_own_teacher"},
        base="full",
    ),
    **_with_cat("CON + CAT, no cycle", "no_cycle", {"method.cycle_weight": 0.0}),
    **_with_cat("CON + CAT, no query contrast", "no_contrast", {"method.contrast_weight": 0.0}),
    **_with_cat("CON + CAT, no MMD", "no_mmd", {"method.mmd_weight": 0.0}),
    **_with_cat("CON, ridge of class means on text", "text_ridge", _regression("text")),
    **_with_cat("CON, kernel regression on CLIP's instances", "kernel", _regression("images")),
    **_with_cat("CON, real means of all classes", "means", _regression("means")),
    **_with_cat("no CON + CAT", "no_con", {}, _PROJECTION),
    **_inductive(
        "CON, finetune without pseudo queries, inductive", "refit", "control", {}, _STAGE_1, "con"
    ),
    "cat_inductive": Row("", "cat", _INDUCTIVE, _STAGE_1),
    **_inductive(
        "CON + CAT, inductive",
        "inductive",
        "finetune",
        {"method.pseudo_seen": True},
        {**_STAGE_1, "generator": "cat_inductive"},
        "refit",
    ),
    "oracle": Row(
        "oracle: CON, finetune on real unseen queries",
        "finetune",
        {"method.pseudo_per_class": 0, "oracle": True},
        {**_STAGE_1, "generator": None},
        base="fair",
    ),
}
SCORED = tuple(name for name, row in ROWS.items() if row.title)


def with_rows(config: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
    """The config with every row as a stage of its own, for one seed.

    Raises:
      ValueError: if the config lacks a stage that a row copies.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        config.seed = seed
        stages = {name: stage.to_dict() for name, stage in config.train.items()}
        for key, row in ROWS.items():
            if row.chosen_among:
                continue
            check_choice(row.stage, stages, f"Row {key!r} copies a stage that is not there:")
            stage = copy.deepcopy(stages[row.stage])
            for field, value in row.changes.items():
                *folders, name = field.split(".")
                section = stage
                for folder in folders:
                    section = section[folder]
                section[name] = value
            takes = {**stage["takes"], **row.takes}
            stage["takes"] = {subtree: source for subtree, source in takes.items() if source}
            config.train[key] = stage
        config.stages, config.eval.stages = (), {}
    return config


def stages_before(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """The stages that stage `name` takes from, theirs before them, each once."""
    order: list[str] = []
    for source in config.train[name].takes.values():
        if source != "init":
            new = [*stages_before(config, source), source]
            order += [stage for stage in new if stage not in order]
    return order
