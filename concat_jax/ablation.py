"""What each part of the method is worth: rows of a table, each trained from several seeds.

    python -m concat_jax.ablation --config=configs/demo_zps.py --workdir=runs/ablation

A row is a stage of the config with a few fields changed. Rows of one seed share the stages before
them and the workdir `seed_N`, so a stage that is finished is not run again, nor is a cell that has
been scored. Every cell is scored without calibration and at the γ that is best on a validation
world, because a gain that a γ could give is none. The table goes to `ablation.md` and
`ablation.json`, its bars to `ablation.png`.
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
from absl import app, flags
from PIL import Image

from concat_jax.configuration import check_choice
from concat_jax.evaluation.bar_chart import bar_chart
from concat_jax.evaluation.calibration import calibrate
from concat_jax.evaluation.report import markdown_table, write_report
from concat_jax.main import config_and_workdir, parse_flags, run_command
from concat_jax.run import Run
from concat_jax.training.metric_writer import format_seconds


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


_SPREAD = {
    "method.spread_weight": 0.1,
    "method.class_contrast_weight": 0.1,
    "method.memory_per_class": 8,
    "method.memory_pseudo": True,
}


def _with_cat(title: str, name: str, changes: Mapping[str, Any]) -> dict[str, Row]:
    """A variant of CAT and the finetune on its pseudo queries, which is the row that is scored."""
    return {
        f"cat_{name}": Row("", "cat", changes, _STAGE_1),
        name: Row(title, "finetune", {}, {**_STAGE_1, "generator": f"cat_{name}"}),
    }


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
    **_with_cat("CON + CAT", "full", {}),
    **_with_cat("CON + CAT, no cycle", "no_cycle", {"method.cycle_weight": 0.0}),
    **_with_cat("CON + CAT, no query contrast", "no_contrast", {"method.contrast_weight": 0.0}),
    **_with_cat("CON + CAT, no MMD", "no_mmd", {"method.mmd_weight": 0.0}),
    **_with_cat(
        "CON + CAT, no MMD, with spread, class contrast and memory",
        "spread",
        {"method.mmd_weight": 0.0, **_SPREAD},
    ),
    **_with_cat("CON + CAT, with spread, class contrast and memory", "all_terms", _SPREAD),
    "no_deviation": Row(
        "CON + CAT, no deviations in the finetune",
        "finetune",
        {"method.deviation": 0.0},
        {**_STAGE_1, "generator": "cat_full"},
    ),
    **_with_cat("CON + CAT, MMD by class", "mmd_by_class", {"method.mmd_per_class": True}),
}
SCORED = tuple(name for name, row in ROWS.items() if row.title)

# Title, part of the cell, group and metric.
COLUMNS = (
    ("PQ unseen", "summary", "unseen", "pq"),
    ("PQ seen", "summary", "seen", "pq"),
    ("hPQ", "summary", "harmonic", "pq"),
    ("PQ unseen at γ", "calibrated", "unseen", "pq"),
    ("PQ seen at γ", "calibrated", "seen", "pq"),
    ("hPQ at γ", "calibrated", "harmonic", "pq"),
)

_ROWS = flags.DEFINE_list("rows", list(SCORED), f"Any of {', '.join(SCORED)}.")
_PRESET = flags.DEFINE_string("preset", None, "Another world than config.data.preset.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many: 0, 1, 2, …", 1)


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
    if all(file.exists() for file in files.values()):
        return {row: json.loads(file.read_text()) for row, file in files.items()}
    run = Run(config, folder, make_datasets(config.data, seed=seed))
    held_out = make_datasets({**config.data, "eval_split": "validation"}, seed=seed)
    cells: dict[str, dict] = {}
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
            write_report(files[row], cell)
        cells[row] = json.loads(files[row].read_text())
    return cells


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample deviation of what several seeds gave; a dash where a seed gave nothing."""
    if not values or None in values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


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
        lines.append([ROWS[row].title, *numbers, gammas, format_seconds(seconds)])
    titles = [title for title, *_ in COLUMNS]
    return markdown_table(["row", *titles, "γ", "time a seed"], lines)


def chart(cells: Mapping[str, Sequence[Mapping]]) -> Image.Image:
    """The table's hPQ as bars with their deviations, without calibration and with it."""

    def bar(of_seeds: Sequence[Mapping], part: str) -> tuple[float | None, float | None]:
        values = [cell[part]["harmonic"]["pq"] for cell in of_seeds]
        if None in values:
            return None, None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    groups = {"hPQ": "summary", "hPQ at the best gamma": "calibrated"}
    return bar_chart(
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
    chart(cells).save(workdir / "ablation.png")
    (workdir / "ablation.md").write_text(table + "\n", encoding="utf-8")
    write_report(workdir / "ablation.json", {"seeds": seeds, "rows": cells})
    return table


def main(argv: list[str]) -> None:
    """Entry point."""

    def command() -> None:
        config, workdir = config_and_workdir()
        if _PRESET.value:
            config.data.preset = _PRESET.value
        ablation(config, _ROWS.value, _SEEDS.value, Path(workdir))

    run_command(argv, command)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
