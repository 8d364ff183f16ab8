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
    not taken.
    """

    title: str
    stage: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


_STAGE_1 = {"segmentor": "con_both", "projector": "con_both"}
_PROJECTION = {"segmentor": "projection", "projector": "projection"}
_INSTANCE = {"segmentor": "con_instance", "projector": "con_instance"}
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

# Query contrast without MMD. A sharp one is content once a pseudo query is nearer to its class than
# to any other, wherever that is; a smooth one pulls on, and takes the spread, which is given back.
_CONTRAST = {"method.mmd_weight": 0.0, "method.contrast_weight": 1.0}
_SHARP = {**_CONTRAST, "method.contrast_temperature": 0.1}
_SPREAD = {"method.spread_weight": 0.1, "method.memory_per_class": 8, "method.memory_pseudo": True}


def _with_cat(
    title: str, name: str, changes: Mapping[str, Any], stage_1: Mapping[str, str] = _STAGE_1
) -> dict[str, Row]:
    """A variant of CAT and the finetune on its pseudo queries, which is the row that is scored."""
    return {
        f"cat_{name}": Row("", "cat", changes, stage_1),
        name: Row(title, "finetune", {}, {**stage_1, "generator": f"cat_{name}"}),
    }


# Rows whose hPQ are the ends of the gap that the others close a share of.
GAP = ("control", "oracle")

ROWS: Mapping[str, Row] = {
    "projection": Row(
        "stage 1, projection only",
        "con",
        {"method.global_weight": 0.0, "method.instance_weight": 0.0},
    ),
    "con_global": Row("stage 1 + CON, global", "con", {"method.instance_weight": 0.0}),
    "con_instance": Row("stage 1 + CON, instance", "con", {"method.global_weight": 0.0}),
    "con_both": Row("stage 1 + CON, both", "con"),
    "control": Row(
        "CON, finetune without pseudo queries",
        "finetune",
        {"method.pseudo_per_class": 0},
        {**_STAGE_1, "generator": None},
    ),
    "cat_pading": Row("", "cat", _PADING, _PROJECTION),
    "pading": Row(
        "PADing-style generator and finetune, no CON",
        "finetune",
        {"method.deviation": 0.0, "method.pseudo_per_class": 1},
        {**_PROJECTION, "generator": "cat_pading"},
    ),
    **_with_cat("CON + CAT", "full", {}),
    **_with_cat("CON + CAT, no cycle", "no_cycle", {"method.cycle_weight": 0.0}),
    **_with_cat("CON + CAT, no query contrast", "no_contrast", {"method.contrast_weight": 0.0}),
    **_with_cat("CON + CAT, no MMD", "no_mmd", {"method.mmd_weight": 0.0}),
    **_with_cat(
        "contrast instead of MMD: cosine, temperature 0.1",
        "cosine",
        {**_SHARP, "method.contrast_distance": "cosine"},
    ),
    **_with_cat("contrast instead of MMD: Euclidean, temperature 0.1", "sharp", _SHARP),
    **_with_cat("contrast instead of MMD: Euclidean, temperature 1", "smooth", _CONTRAST),
    **_with_cat(
        "contrast instead of MMD: temperature 1, spread and memory",
        "contrast",
        {**_CONTRAST, **_SPREAD},
    ),
    "no_deviation": Row(
        "CON + CAT, no deviations in the finetune",
        "finetune",
        {"method.deviation": 0.0},
        {**_STAGE_1, "generator": "cat_full"},
    ),
    "unseen_2": Row(
        "CON + CAT, unseen classes weigh 2 in the finetune",
        "finetune",
        {"method.unseen_weight": 2.0},
        {**_STAGE_1, "generator": "cat_full"},
    ),
    **_with_cat("CON's instance term alone + CAT", "instance", {}, _INSTANCE),
    **_with_cat("no CON + CAT", "no_con", {}, _PROJECTION),
    "cat_images": Row("", "cat", {"queries": "images"}, _STAGE_1),
    "images": Row(
        "CON + CAT, images in the loop",
        "finetune",
        {"queries": "images"},
        {**_STAGE_1, "generator": "cat_images"},
    ),
    "cat_inductive": Row("", "cat", _INDUCTIVE, _STAGE_1),
    "inductive": Row(
        "CON + CAT, inductive",
        "finetune",
        {**_INDUCTIVE, "method.pseudo_seen": True},
        {**_STAGE_1, "generator": "cat_inductive"},
    ),
    "oracle": Row(
        "oracle: CON, finetune on real unseen queries",
        "finetune",
        {"method.pseudo_per_class": 0, "oracle": True},
        {**_STAGE_1, "generator": None},
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
        for key, row in ROWS.items():
            check_choice(row.stage, config.train, f"Row {key!r} copies a stage that is not there:")
            stage = config.train[row.stage].to_dict()
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
