"""How a step of stage 1 grows with batch, side, queries and segments, as power laws.

Of a config's own sizes one at a time is changed. An exponent is the slope of least squares between
logarithms: what grows with an exponent of 1 doubles with the size, with one of 2 it quadruples.
"""

from __future__ import annotations

import functools
import operator
import runpy
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.abstract_programs import batch_sizes, setup_of
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement, Work
from concat_jax.benchmarking.programs import Trainer, random_embeddings, random_params
from concat_jax.core.batch import FIELDS, batch_shapes
from concat_jax.evaluation.report import markdown_table
from concat_jax.stages.stage import TEXT
from concat_jax.visualize import plots

STAGE = "con"
# What is changed, the config's key that it is, and its values as multiples of the config's own.
AXES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "batch": (f"train.{STAGE}.batch_size", (0.5, 1, 2, 4)),
    "side": ("data.image_size", (0.5, 1, 1.5, 2)),
    "queries": ("model.segmentor.num_queries", (1, 2, 4, 8)),
    "segments": ("data.max_segments", (0.125, 0.25, 0.5, 1)),
}


def works(case: Case) -> dict[str, Work]:
    """A step at every size of every axis, named "batch 8"; the config's own sizes are one work."""
    steps: dict[tuple[int, ...], Work] = {}
    found = {}
    for axis, (key, factors) in AXES.items():
        for factor in factors:
            config = load_config(case.recipe)
            # Online, CLIP looks at every segment, or it would be another step from some size on.
            config.train[STAGE].method.max_segments = 0
            value = round(factor * _get(config, key))
            config.update_from_flattened_dict({key: value})
            sizes = tuple(_get(config, key) for key, _ in AXES.values())
            if sizes not in steps:
                steps[sizes] = _step(config)
            found[f"{axis} {value}"] = steps[sizes]
    return found


def load_config(name: str) -> ConfigDict:
    """The config of "FILE" or "FILE:ARGUMENT"."""
    file, _, argument = name.partition(":")
    return runpy.run_path(file)["get_config"](argument)


def _get(config: ConfigDict, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), config)


# Most sizes have the same networks, whose values are made once.
_params = functools.cache(random_params)


def _step(config: ConfigDict) -> Work:
    """A step with random weights and texts, on images full of segments."""
    setup = setup_of(config)
    stage, sizes = setup.make_stage(STAGE), batch_sizes(setup, STAGE)
    params = {name: _params(setup.networks, name) for name in (*stage.trains, "clip")}
    params[TEXT] = random_embeddings(len(setup.vocabulary), sizes["C"])
    side = sizes["S"]
    drawn = Case(STAGE, side, side, batch=sizes["B"], segments=sizes["G"])
    segment_ids, labels = cases.segments(drawn, len(setup.vocabulary))
    fields = {
        name: np.full(shape, FIELDS[name].padding, dtype)
        for name, (shape, dtype) in batch_shapes(stage.batch_fields, **sizes).items()
    }
    fields |= {
        "image": cases.images(drawn),
        "segment_ids": segment_ids,
        "segment_labels": setup.vocabulary.seen[labels % len(setup.vocabulary.seen)],
        "image_size": np.full((sizes["B"], 2), side, np.int32),
    }
    batch = jax.device_put({name: fields[name] for name in stage.batch_fields})
    trainer = Trainer({name: params[name] for name in stage.trains}, stage.rules)
    frozen = jax.device_put({name: params[name] for name in stage.reads})
    return trainer.work(stage.loss, frozen, lambda number: batch)


def curves(results: Mapping[str, Measurement]) -> dict[str, dict[str, plots.Curve]]:
    """Axis -> what grows ("time", "FLOPs", "bytes") -> (sizes, seconds or counts)."""
    found: dict[str, dict[str, plots.Curve]] = {}
    for axis in AXES:
        rows = sorted((int(n.split()[1]), r) for n, r in results.items() if n.split()[0] == axis)
        sizes = np.array([size for size, _ in rows])
        grown = {
            "time": [result.median for _, result in rows],
            "FLOPs": [result.flops for _, result in rows],
            "bytes": [result.traffic_bytes for _, result in rows],
        }
        found[axis] = {name: (sizes, np.array(values)) for name, values in grown.items()}
    return found


def exponent(sizes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The slope of log(values) on log(sizes), three at least, and its standard error."""
    x, y = np.log(sizes) - np.log(sizes).mean(), np.log(values) - np.log(values).mean()
    slope = (x @ y) / (x @ x)
    return slope, np.sqrt(np.sum((y - slope * x) ** 2) / (len(x) - 2) / (x @ x))


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """Every axis with its sizes, the seconds of a step, and the exponents."""
    heads = ["axis", "sizes", "ms a step", "time", "FLOPs", "bytes"]
    rows = []
    for axis, grown in curves(results).items():
        sizes, seconds = grown["time"]
        fits = ["{:.2f} ± {:.2f}".format(*exponent(*curve)) for curve in grown.values()]
        rows.append([axis, _listed(sizes), _listed(1000 * seconds), *fits])
    return (
        f"{markdown_table(heads, rows)}\n\n"
        "Exponents of time, FLOPs and bytes, ± their standard error. FLOPs, and bytes read and "
        "written, by XLA's own account of the compiled programs, which counts a loop once."
    )


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def figure(case: Case, results: Mapping[str, Measurement]) -> Figure:
    """A panel an axis: time, FLOPs and bytes over those of the smallest size."""
    panels = {
        axis: {f"{name}, {exponent(*curve)[0]:.2f}": curve for name, curve in grown.items()}
        for axis, grown in curves(results).items()
    }
    return plots.power_laws(panels, f"A step of stage 1 ({case.recipe}) as one size grows")
