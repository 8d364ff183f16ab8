"""What each part of the method is worth: rows of a table, each trained from several seeds.

    python -m concat_jax.ablation --config=configs/demo_zps.py --workdir=runs/ablation

A row is a stage of the config with a few fields changed. All seeds share one world, one CLIP and
one set of test scenes, and differ in training alone; rows of one seed share the stages before them.
A stage that is finished is not run again, nor is a cell that has been scored by the same settings.
Processes may share the seeds, as `--seeds=2` and `--seeds=3 --first_seed=2`, from when the first
prints `[seed 0]`; `--seeds=5` then prints the table of all.

What is printed no bias towards seen names can fake: hPQ at the γ that is best on validation scenes,
and the areas under seen against unseen scores as γ sweeps; hPQ without γ stands beside them. A
row's difference to the row that it adds to is paired, seed by seed and scene by scene, with the
middle 95 % of a bootstrap over both. The table goes to `ablation.md` and `ablation.json`, the
curves to `ablation.png`, and how soon the rows of stage 1 learnt seen names to `learning.png`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import in_bucket, write_json, write_text
from concat_jax.core.progress import format_seconds
from concat_jax.evaluation.bootstrap import difference, estimate
from concat_jax.evaluation.calibration import Sweep
from concat_jax.evaluation.report import markdown_table, number
from concat_jax.experiment.ablation.rows import ROWS, SCORED
from concat_jax.experiment.ablation.runs import config_of_seed, run_seed, train_shared
from concat_jax.experiment.evidence import SCORES, load_sweep, scores
from concat_jax.experiment.experiment import open_experiment
from concat_jax.training.metrics import METRICS
from concat_jax.visualize import plots

Cells = Mapping[str, Sequence[Mapping[str, Any]]]


def load_row(
    world: Path, row: str, seeds: Sequence[int], config: ml_collections.ConfigDict
) -> tuple[list[Sweep], list[float]]:
    """What a row's seeds counted on the test scenes, and their γ."""
    from data_pipelines.synthetic.presets import PRESETS

    vocabulary = PRESETS[config.data.preset].vocabulary
    files = [world / f"seed_{seed}" / row / "sweep.npz" for seed in seeds]
    sweeps, gammas = zip(*(load_sweep(file, vocabulary) for file in files), strict=True)
    return list(sweeps), list(gammas)


def learning(world: Path, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, list]:
    """Title of each row of stage 1 -> (steps, accuracies) of its seeds, as training had them."""
    curves: dict[str, list] = {}
    for row in rows:
        for seed in seeds:
            file = world / f"seed_{seed}" / row / METRICS
            points = {}
            for line in file.read_bytes().splitlines() if file.exists() else ():
                # Of other losses, or cut off where the machine went down.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found = json.loads(line)
                    points[found["step"]] = float(found["accuracy"])
            if points:
                curves.setdefault(ROWS[row].title, []).append(np.array([*points.items()]).T)
    return curves


def format_ablation(cells: Cells, found: Mapping[str, Mapping]) -> str:
    """Markdown tables of rows: scores, and paired differences to their base.

    Args:
      cells: row to its cells, one a seed.
      found: row to `evidence.scores` of them.
    """
    lines, pairs = [], []
    for row, values in found.items():
        numbers = [estimate(*values[key]).as_score() for key in SCORES]
        chosen = bool(ROWS[row].chosen_among)
        gammas = "/".join(
            f"{cell['gamma']:g} ({cell['stage']})" if chosen else f"{cell['gamma']:g}"
            for cell in cells[row]
        )
        seconds = format_seconds(np.mean([cell["seconds"] for cell in cells[row]]))
        parts = (
            np.array([cell["calibrated"][group]["pq"] for cell in cells[row]], float).mean()
            for group in ("seen", "unseen")  # None, in JSON, is NaN
        )
        shown = "/".join(map(number, parts))
        lines.append([ROWS[row].title, *numbers, shown, gammas, seconds])
        base = ROWS[row].base
        if base in found:
            apart = [difference(values[key], found[base][key]).as_difference() for key in SCORES]
            pairs.append([ROWS[row].title, ROWS[base].title, *apart])
    titles = [*SCORES.values()]
    table = markdown_table(["row", *titles, "seen/unseen at γ", "γ", "time a seed"], lines)
    if not pairs:
        return table
    return f"{table}\n\n{markdown_table(['row', 'less', *titles], pairs)}"


def ablation(
    config: ml_collections.ConfigDict,
    rows: Sequence[str],
    seeds: Sequence[int],
    world: int,
    workdir: Path,
) -> str:
    """Runs the rows from each of the seeds; writes and returns the table.

    Raises:
      ValueError: for an unknown row, or a config that lacks what a row needs.
    """
    if not rows:
        raise ValueError("There is no row to run; give some, as --rows=projection,con.")
    for row in rows:
        check_choice(row, SCORED, "There is no row")
    if config.data.kind != "synthetic":
        raise ValueError(
            f"config.data of kind {config.data.kind!r} has no validation part to choose γ on; the "
            "ablation runs on the synthetic world."
        )
    if not config.eval.get("bias_split", ""):
        raise ValueError(
            "γ is chosen on other scenes than are scored, and config.eval.bias_split names none; "
            "give --config.eval.bias_split=validation."
        )
    with config.unlocked():
        config.data.world_seed = world
    folder = workdir / f"world_{world}"
    # A mistake in a row's settings must not show after what all share has been trained.
    first = config_of_seed(config, rows, seeds[0])
    open_experiment(first, folder / f"seed_{first.seed}", trains=False).held_out()
    train_shared(config, folder)
    cells: dict[str, list[dict]] = {row: [] for row in rows}
    for count, seed in enumerate(seeds, start=1):
        of_seed, is_new = run_seed(config, rows, seed, folder)
        for row, cell in of_seed.items():
            cells[row].append(cell)
        if not is_new and count < len(seeds):  # a table takes minutes, and it says nothing new
            continue
        found, curves = {}, {}
        for row in rows:  # one in memory at a time: a sweep of 2,000 scenes is 0.15 GB
            sweeps, gammas = load_row(folder, row, seeds[:count], config)
            found[row] = scores(sweeps, gammas)
            curves[ROWS[row].title] = tuple(np.mean([sweep.curve() for sweep in sweeps], axis=0))
        table = format_ablation(cells, found)
        print(f"\nAfter {count} of {len(seeds)} seeds, percent:\n{table}", flush=True)
    write_text(folder / "ablation.md", table + "\n")
    write_json(folder / "ablation.json", {"seeds": [*seeds], "world": world, "rows": cells})
    plots.save_figure(plots.bias_curves(curves), folder / "ablation.png")
    if learnt := learning(folder, rows, seeds):
        plots.save_figure(plots.learning_curves(learnt), folder / "learning.png")
    return table


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command, besides those of a config."""
    flags.strings("rows", SCORED, f"Any of {', '.join(SCORED)}.")
    flags.string("preset", None, "Another world than config.data.preset.")
    # Scenes are numbered from a seed's own number on, and some thousands of seeds have room.
    flags.integer("seeds", 3, "How many, one after the other from --first_seed.", 1, 1000)
    flags.integer("first_seed", 0, "The first of them.", 0, 1000)
    flags.integer("world", 0, "Seed of the world, its CLIP and its scenes.", 0)
    flags.integer("scenes", 2000, "Test scenes, and as many to choose γ on.", 1)


@cli.command(
    __doc__,
    define_flags,
    with_config=True,
    interrupted="Stopped; finished stages and scored cells are kept, and the same command goes on.",
)
def main(given: cli.Flags) -> None:
    config, workdir = cli.config_and_workdir(given)
    if in_bucket(workdir):
        raise ValueError(
            f"--workdir={workdir}: seeds share what a world trained by links to its folders, which "
            "a bucket has none of; give a folder of this machine."
        )
    with config.unlocked():
        if given.preset:
            config.data.preset = given.preset
        config.data.num_eval_images = given.scenes
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    ablation(config, given.rows, seeds, given.world, workdir)


if __name__ == "__main__":
    main()
