"""What each part of the method is worth: rows of a table, each trained from several seeds.

    python -m concat_jax.ablation --config=configs/demo_zps.py --workdir=runs/ablation

A row is a stage of the config with a few fields changed. Rows of one seed share the stages before
them and the workdir `seed_N`, so a stage that is finished is not run again, nor is a cell that has
been scored. Every cell is scored without calibration and at the γ that is best on a validation
world, because a gain that a γ could give is none. The table goes to `ablation.md` and
`ablation.json`, its bars to `ablation.png`; the stages of the first seed get pictures of their
query space.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from matplotlib.figure import Figure

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import write_json
from concat_jax.core.progress import format_seconds
from concat_jax.evaluation.calibration import calibrate
from concat_jax.evaluation.report import markdown_table
from concat_jax.experiment.experiment import Run
from concat_jax.query_space import PICTURE, draw
from concat_jax.visualize import plots


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage that is made of one of the config's, and scored where it has a title.

    Attributes:
      title: its name in the table; "" for a stage that other rows take from.
      stage: of `config.train`, which the row copies.
      changes: field of the stage, as "method.global_weight", to its value in this row.
      takes: subtree to the row that gives it, where that is not the config's stage; None: it is
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


# Of pseudo queries of seen classes, in units of the real queries' spread.
_STATISTICS = ("spread", "offset")

# Rows whose hPQ are the ends of the gap that the others close a share of.
_GAP = ("control", "oracle")

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

# Title, part of the cell, group and metric.
COLUMNS = (
    ("PQ unseen", "summary", "unseen", "pq"),
    ("SQ unseen", "summary", "unseen", "sq"),
    ("RQ unseen", "summary", "unseen", "rq"),
    ("PQ seen", "summary", "seen", "pq"),
    ("SQ seen", "summary", "seen", "sq"),
    ("RQ seen", "summary", "seen", "rq"),
    ("hPQ", "summary", "harmonic", "pq"),
    ("PQ unseen at γ", "calibrated", "unseen", "pq"),
    ("PQ seen at γ", "calibrated", "seen", "pq"),
    ("hPQ at γ", "calibrated", "harmonic", "pq"),
)


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


def run_seed(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int, workdir: Path
) -> dict[str, dict]:
    """Trains and scores the rows for one seed, as far as that is not done.

    Returns:
      Row to its cell: "summary" of `PanopticQuality.summarize`, "gamma", "calibrated", the summary
      at that γ, and "seconds" that training and scoring took, without the stages before the row.

    Raises:
      ValueError: if the config's data has no validation part, or a row cannot be run.
    """
    from data_pipelines.datasets import make_datasets

    if "eval_split" not in config.data:
        raise ValueError(
            f"config.data of kind {config.data.kind!r} has no validation part to choose γ on; the "
            "ablation runs on the synthetic world."
        )
    config = with_rows(config, seed)
    folder = workdir / f"seed_{seed}"
    files = {row: folder / row / "cell.json" for row in rows}
    cells: dict[str, dict] = {}
    if not all(file.exists() for file in files.values()):
        run = Run(config, folder, make_datasets(config.data, seed=seed))
        held_out = make_datasets({**config.data, "eval_split": "validation"}, seed=seed)
    for row in rows:
        if not files[row].exists():
            for stage in (*stages_before(config, row), row):
                began = time.monotonic()
                if not run.is_finished(stage):
                    print(f"\n[seed {seed}]", end=" ")
                    run.train(stage)
            found = calibrate(
                functools.partial(run.sweep, row), held_out.evaluation(), run.datasets.evaluation()
            )
            cell = {
                "summary": found.test[0.0],
                "gamma": found.gamma,
                "calibrated": found.test[found.gamma],
                "seconds": round(time.monotonic() - began, 1),
            }
            write_json(files[row], cell)
            if seed == 0:  # one picture of each stage tells what the others would
                plots.save_figure(draw(run, row), folder / row / PICTURE)
                if generator := config.train[row].takes.get("generator"):
                    plots.save_figure(draw(run, generator), folder / generator / PICTURE)
        cells[row] = json.loads(files[row].read_text())
        cells[row]["pseudo"] = pseudo_statistics(folder, config.train[row].takes.get("generator"))
    return cells


def pseudo_statistics(folder: Path, generator: str | None) -> dict[str, float]:
    """How pseudo queries of seen classes lie against real ones, at the end of a stage's training.

    Args:
      folder: workdir of a seed.
      generator: the stage that trained one; None for none.

    Returns:
      "spread" and "offset", `spread_ratio` and `offset_ratio` of the stage's last metrics; empty
      without a generator.
    """
    log = folder / str(generator) / "metrics.jsonl"
    if generator is None or not log.exists():
        return {}
    last = json.loads(log.read_text().splitlines()[-1])
    return {name: last[f"{name}_ratio"] for name in _STATISTICS if f"{name}_ratio" in last}


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and sample deviation of what several seeds gave; a dash where a seed gave nothing."""
    if not values or None in values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def closed_gap(cells: Mapping[str, Sequence[Mapping]], row: str) -> float | None:
    """Share of the gap from control to oracle, in hPQ at γ and means over seeds, that a row closes.

    None where one of the two is not among the rows, or they do not differ.
    """
    if not set(_GAP) <= cells.keys():
        return None
    scores = [
        [cell["calibrated"]["harmonic"]["pq"] for cell in cells[name]] for name in (*_GAP, row)
    ]
    if any(not of_row or None in of_row for of_row in scores):
        return None
    low, high, own = map(statistics.fmean, scores)
    return (own - low) / (high - low) if high != low else None


def format_ablation(cells: Mapping[str, Sequence[Mapping]]) -> str:
    """Markdown table of rows whose cells are given, one a seed: percent, mean ± deviation."""
    lines = []
    for row, of_seeds in cells.items():
        numbers = [
            spread([cell[part][group][metric] for cell in of_seeds])
            for _, part, group, metric in COLUMNS
        ]
        gammas = "/".join(f"{cell['gamma']:g}" for cell in of_seeds)
        seconds = statistics.fmean(cell["seconds"] for cell in of_seeds)
        gap = closed_gap(cells, row)
        share = "-" if gap is None else f"{gap:.0%}"
        pseudo = [
            spread([cell.get("pseudo", {}).get(name) for cell in of_seeds], digits=2)
            for name in _STATISTICS
        ]
        lines.append([ROWS[row].title, *numbers, share, gammas, *pseudo, format_seconds(seconds)])
    titles = [title for title, *_ in COLUMNS]
    return markdown_table(["row", *titles, "gap closed", "γ", *_STATISTICS, "time a seed"], lines)


def chart(cells: Mapping[str, Sequence[Mapping]]) -> Figure:
    """The table's hPQ as bars with their deviations, without calibration and with it."""

    def bar(of_seeds: Sequence[Mapping], part: str) -> tuple[float | None, float | None]:
        values = [cell[part]["harmonic"]["pq"] for cell in of_seeds]
        if None in values:
            return None, None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    groups = {"hPQ": "summary", "hPQ at the best γ": "calibrated"}
    return plots.bar_chart(
        [ROWS[row].title for row in cells],
        {title: [bar(seeds, part) for seeds in cells.values()] for title, part in groups.items()},
        title="Harmonic mean of seen and unseen PQ",
        unit="%",
    )


def ablation(
    config: ml_collections.ConfigDict, rows: Sequence[str], seeds: int, workdir: Path
) -> str:
    """Runs the rows from seeds 0, 1, …; writes and returns the table.

    Raises:
      ValueError: for an unknown row, or a config that lacks what a row needs.
    """
    for row in rows:
        check_choice(row, SCORED, "There is no row")
    cells: dict[str, list[dict]] = {row: [] for row in rows}
    for seed in range(seeds):
        for row, cell in run_seed(config, rows, seed, workdir).items():
            cells[row].append(cell)
        table = format_ablation(cells)
        print(f"\nAfter {seed + 1} of {seeds} seeds, mean ± deviation:\n{table}", flush=True)
    plots.save_figure(chart(cells), workdir / "ablation.png")
    (workdir / "ablation.md").write_text(table + "\n", encoding="utf-8")
    write_json(workdir / "ablation.json", {"seeds": seeds, "rows": cells})
    return table


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command, besides those of a config."""
    flags.strings("rows", SCORED, f"Any of {', '.join(SCORED)}.")
    flags.string("preset", None, "Another world than config.data.preset.")
    flags.integer("seeds", 3, "How many: 0, 1, 2, …", 1)


def command(given: cli.Flags, arguments: Sequence[str]) -> None:
    """What the flags ask for."""
    config, workdir = cli.config_and_workdir(given)
    if given.preset:
        config.data.preset = given.preset
    ablation(config, given.rows, given.seeds, workdir)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, with_config=True)


if __name__ == "__main__":
    main()
