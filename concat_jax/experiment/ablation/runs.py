"""The ablation's runs: a world, what its seeds share, and the rows of each, trained and scored."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from concat_jax.core.config import build
from concat_jax.core.files import FileError, write_json
from concat_jax.evaluation.calibration import GAMMAS
from concat_jax.experiment.ablation.rows import LEFT_OUT, ROWS, stages_before, with_rows
from concat_jax.experiment.evidence import load_sweep, measure
from concat_jax.experiment.experiment import Experiment, open_experiment
from concat_jax.experiment.workdir import evaluation_settings, read_result
from concat_jax.stages.registry import learns_from
from concat_jax.stages.stage import StageConfig


def shared_stages(
    config: ml_collections.ConfigDict, captions: Sequence[str] = ("all", "seen")
) -> list[str]:
    """The stages that all seeds of a world share: those on captions, of these classes."""
    stages = {
        name: build(StageConfig, config.train[name], f"config.train.{name}")
        for name in config.stages
    }
    return [
        name
        for name, settings in stages.items()
        if learns_from(settings) == "captions" and settings.captions in captions
    ]


def train_shared(config: ml_collections.ConfigDict, world: Path) -> None:
    """Trains what all seeds of a world share, with the world's own seed."""
    config = copy.deepcopy(config)
    with config.unlocked():
        config.seed = config.data.world_seed
        config.stages, config.eval.stages = tuple(shared_stages(config)), {}
    is_finished = open_experiment(config, world, trains=False).parameters.is_finished
    # Where nothing is left to train the folder is not claimed: others may be at other seeds.
    if left := [name for name in config.stages if not is_finished(name)]:
        run = open_experiment(config, world)
        for name in left:
            run.train(name)


def link_stages(names: Sequence[str], folder: Path) -> None:
    """Makes a folder in which these stages are those of the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to(f"../{name}")


def config_of_seed(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int
) -> ml_collections.ConfigDict:
    """One seed's config, whose stages are those of the rows and those before them."""
    shared, config = shared_stages(config), with_rows(config, seed)
    ends = [stage for row in rows for stage in ROWS[row].chosen_among or (row,)]
    stages = [stage for end in ends for stage in (*stages_before(config, end), end)]
    config.stages = tuple(dict.fromkeys((*shared, *stages)))
    return config


def open_seed(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int, world: Path
) -> Experiment:
    """One seed's experiment; ValueError if a stage of it learnt from one that is gone."""
    folder = world / f"seed_{seed}"
    link_stages(shared_stages(config), folder)
    return open_experiment(config_of_seed(config, rows, seed), folder)


def train_row(run: Experiment, row: str) -> float:
    """Trains a row and those before it, as far as that is not done; seconds of the row's own."""
    for stage in (*stages_before(run.setup.config, row), row):
        began = time.monotonic()
        if not run.parameters.is_finished(stage):
            print(f"\n[seed {run.setup.config.seed}]", end=" ")
            run.train(stage)
    return time.monotonic() - began


def choose(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int, world: Path
) -> tuple[str, float]:
    """Which of the rows, at which γ, has the highest hPQ where seen classes play the unseen ones.

    That world is trained anew but for the CLIP, which knows the names of all classes anyway.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.left_out = LEFT_OUT
    folder = world / "left_out"
    link_stages(shared_stages(config, ["all"]), folder)
    train_shared(config, folder)
    run = open_seed(config, rows, seed, folder)
    scores = {}
    for row in rows:
        train_row(run, row)
        found = run.sweep(row, run.held_out().evaluation(), GAMMAS)
        gamma = found.best()
        scores[row, gamma] = found.summary(gamma)["harmonic"]["pq"]
    return max(scores, key=scores.get)


def read_cell(file: Path, row: str, run: Experiment) -> dict[str, Any] | None:
    """A row's cell; None where the row is to be scored, as there is none or it cannot be used.

    It must be of what the row is now: its stage, and how the config says to score it. Of how cells
    of before were scored nothing is known, and they pass. One that is damaged, or whose sweep is,
    is said.
    """
    if not (cell := read_result(file, "gamma", "calibrated", "seconds")):
        return None
    stage, shown = cell.get("stage", row), evaluation_settings(run.setup.config)
    is_there = stage in (ROWS[row].chosen_among or (row,)) and run.parameters.is_finished(stage)
    if not is_there or cell.get("config", shown) != shown:
        return None
    try:
        load_sweep(file.with_name("sweep.npz"), run.datasets.vocabulary)
    except FileError as error:
        print(f"{error} It is made anew.")
        return None
    return cell


def run_seed(
    config: ml_collections.ConfigDict, rows: Sequence[str], seed: int, world: Path
) -> tuple[dict[str, dict], bool]:
    """Trains and scores the rows for one seed, as far as that is not done.

    Returns row -> its cell, and whether one of them is new. A cell is what `evidence.measure`
    returns, the "stage" that was scored, the "config" by which, and the "seconds" that training and
    scoring it took this process, without the stages before it.
    """
    run, cells, is_new = open_seed(config, rows, seed, world), {}, False
    shown = evaluation_settings(run.setup.config)
    for row in rows:
        file = world / f"seed_{seed}" / row / "cell.json"
        if cell := read_cell(file, row, run):
            cells[row] = cell
            continue
        is_new = True
        # A kill from here on may leave another stage or sweep than it is of.
        file.unlink(missing_ok=True)
        stage, gamma = row, None
        if rivals := ROWS[row].chosen_among:
            stage, gamma = choose(config, rivals, seed, world)
        seconds, began = train_row(run, stage), time.monotonic()
        held_out, test = run.held_out().evaluation(), run.datasets.evaluation()
        cell = measure(run, stage, held_out, test, file.parent, gamma)
        seconds = round(seconds + time.monotonic() - began, 1)
        cells[row] = cell | {"stage": stage, "config": shown, "seconds": seconds}
        write_json(file, cells[row])
    return cells, is_new
