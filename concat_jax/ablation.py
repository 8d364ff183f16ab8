"""What each part of the method is worth: rows of a table, each trained from several seeds.

    python -m concat_jax.ablation --config=configs/demo_zps.py --workdir=runs/ablation

A row is a stage of the config with a few fields changed. Rows of one seed share the stages before
them and the workdir `seed_N`, so a stage that is finished is not run again, nor is a cell that has
been scored. The table goes to `ablation.md` and `ablation.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging

from concat_jax.compilation_cache import enable_compilation_cache
from concat_jax.configuration import check_choice
from concat_jax.evaluation.report import markdown_table, write_report
from concat_jax.host_memory import keep_freed_memory
from concat_jax.main import parse_flags  # which defines --config and --workdir, too
from concat_jax.run import Run
from concat_jax.training.loop import NonFiniteLossError
from concat_jax.training.metric_writer import format_seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      title: its name in the table.
      stage: of `config.train`, which the row copies.
      changes: field of the stage, as "method.global_weight", to its value in this row.
    """

    title: str
    stage: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ROWS: Mapping[str, Row] = {
    "projection": Row(
        "stage 1, projection only",
        "con",
        {"method.global_weight": 0.0, "method.instance_weight": 0.0},
    ),
    "con_global": Row("stage 1 + CON, global", "con", {"method.instance_weight": 0.0}),
    "con_instance": Row("stage 1 + CON, instance", "con", {"method.global_weight": 0.0}),
    "con_both": Row("stage 1 + CON, both", "con"),
}

COLUMNS = (
    ("PQ unseen", ("unseen", "pq")),
    ("PQ seen", ("seen", "pq")),
    ("hPQ", ("harmonic", "pq")),
    ("SQ unseen", ("unseen", "sq")),
    ("RQ unseen", ("unseen", "rq")),
)

_ROWS = flags.DEFINE_list("rows", ["projection", "con_both"], f"Any of {', '.join(ROWS)}.")
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
      Row to its cell: "summary" of `PanopticQuality.summarize`, and "seconds" that training and
      scoring took, without the stages before the row.
    """
    from data_pipelines.datasets import make_datasets

    config = with_rows(config, seed)
    folder = workdir / f"seed_{seed}"
    cells: dict[str, dict] = {}
    files = {row: folder / row / "cell.json" for row in rows}
    if all(file.exists() for file in files.values()):
        return {row: json.loads(file.read_text()) for row, file in files.items()}
    run = Run(config, folder, make_datasets(config.data, seed=seed))
    for row in rows:
        if not files[row].exists():
            for stage in stages_before(config, row):
                if not run.is_finished(stage):
                    print(f"\n[seed {seed}]", end=" ")
                    run.train(stage)
            began = time.monotonic()
            if not run.is_finished(row):
                print(f"\n[seed {seed}]", end=" ")
                run.train(row)
            summary = run.evaluate(row)
            seconds = round(time.monotonic() - began, 1)
            write_report(files[row], {"summary": summary, "seconds": seconds})
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
            spread([cell["summary"][group][metric] for cell in of_seeds])
            for _, (group, metric) in COLUMNS
        ]
        seconds = statistics.fmean(cell["seconds"] for cell in of_seeds)
        lines.append([ROWS[row].title, *numbers, format_seconds(seconds)])
    return markdown_table(["row", *(title for title, _ in COLUMNS), "time a seed"], lines)


def ablation(
    config: ml_collections.ConfigDict, rows: Sequence[str], seeds: int, workdir: Path
) -> str:
    """Runs the rows from seeds 0, 1, …; writes and returns the table.

    Raises:
      ValueError: for an unknown row, or a config that lacks what a row needs.
    """
    for row in rows:
        check_choice(row, ROWS, "There is no row")
    cells: dict[str, list[dict]] = {row: [] for row in rows}
    for seed in range(seeds):
        for row, cell in run_seed(config, rows, seed, workdir).items():
            cells[row].append(cell)
        table = format_ablation(cells)
        print(f"\nAfter {seed + 1} of {seeds} seeds, mean ± deviation:\n{table}", flush=True)
    (workdir / "ablation.md").write_text(table + "\n", encoding="utf-8")
    write_report(workdir / "ablation.json", {"seeds": seeds, "rows": cells})
    return table


def main(argv: list[str]) -> None:
    """Entry point; a user's mistake ends in one sentence and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"Error: unknown argument {argv[1]!r}; flags look like --workdir=DIR.")
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    keep_freed_memory()
    try:
        config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
        if config is None or not workdir:
            raise ValueError("give --config=configs/demo_zps.py and --workdir=DIR.")
        ablation(config, _ROWS.value, _SEEDS.value, Path(workdir))
    except (ValueError, OSError, NonFiniteLossError) as error:
        sys.exit(f"Error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
