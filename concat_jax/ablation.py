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

import functools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
from matplotlib.figure import Figure

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import read_json, read_text, write_json
from concat_jax.core.progress import format_seconds
from concat_jax.evaluation.calibration import calibrate
from concat_jax.evaluation.report import markdown_table
from concat_jax.experiment.ablation_rows import GAP, ROWS, SCORED, stages_before, with_rows
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.query_pictures import write_picture
from concat_jax.visualize import plots

# Of pseudo queries of seen classes, in units of the real queries' spread.
_STATISTICS = ("spread", "offset")

# Title, part of the cell, group and metric.
COLUMNS = (
    *(
        (f"{metric.upper()} {group}", "summary", group, metric)
        for group in ("unseen", "seen")
        for metric in ("pq", "sq", "rq")
    ),
    ("hPQ", "summary", "harmonic", "pq"),
    ("PQ unseen at γ", "calibrated", "unseen", "pq"),
    ("PQ seen at γ", "calibrated", "seen", "pq"),
    ("hPQ at γ", "calibrated", "harmonic", "pq"),
)


def run_seed(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int, workdir: Path
) -> dict[str, dict]:
    """Trains and scores the rows for one seed, as far as that is not done; row -> its cell.

    A cell has "summary" of `PanopticQuality.summarize`, "gamma", "calibrated", the summary at that
    γ, and "seconds" that training and scoring took, without the stages before the row.
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
        run = Experiment(config, folder, make_datasets(config.data, seed=seed))
        held_out = make_datasets({**config.data, "eval_split": "validation"}, seed=seed)
    for row in rows:
        if not files[row].exists():
            for stage in (*stages_before(config, row), row):
                began = time.monotonic()
                if not run.parameters.is_finished(stage):
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
                write_picture(run, row)
                if generator := config.train[row].takes.get("generator"):
                    write_picture(run, generator)
        cells[row] = read_json(files[row])
        cells[row]["pseudo"] = pseudo_statistics(folder, config.train[row].takes.get("generator"))
    return cells


def pseudo_statistics(folder: Path, generator: str | None) -> dict[str, float]:
    """ "spread" and "offset" of pseudo queries of seen classes against real ones, at a stage's end.

    They are `spread_ratio` and `offset_ratio` of its last metrics; empty without a generator.
    """
    log = folder / str(generator) / "metrics.jsonl"
    if generator is None or not log.exists():
        return {}
    last = json.loads(read_text(log).splitlines()[-1])
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
    if not set(GAP) <= cells.keys():
        return None
    scores = [
        [cell["calibrated"]["harmonic"]["pq"] for cell in cells[name]] for name in (*GAP, row)
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
    cli.main(
        __doc__,
        define_flags,
        command,
        argv,
        with_config=True,
        interrupted="Stopped; finished stages and scored cells are kept, and the same command goes "
        "on.",
    )


if __name__ == "__main__":
    main()
