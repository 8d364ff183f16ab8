"""What is looked at of a stage, while it trains and at its end: scores, pictures, queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils.epath import Path

from concat_jax.core.files import open_image
from concat_jax.evaluation import report
from concat_jax.evaluation.evaluate import PICTURES, evaluate
from concat_jax.evaluation.worst_best import PQ_PER_CLASS
from concat_jax.experiment import query_pictures
from concat_jax.inference.predictor import Predictor
from concat_jax.training.loop import Look
from concat_jax.training.metrics import MetricWriter

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment

# Of their own, as they are of fewer images than the scores at a stage's end.
GROUP = "look"
# On the terminal, of the scores that there are.
TOLD = ("pq_seen", "pq_unseen", "hpq", "miou_seen", "miou_unseen", "hiou", "hap")


def score(
    run: Experiment,
    predictor: Predictor,
    examples: Iterable[Mapping],
    writer: MetricWriter,
    step: int,
    folder: Path,
    *,
    group: str = "eval",
    **options: Any,
) -> dict:
    """The summary of `evaluate` with the config's pictures, which the writer gets as well.

    There they are `group/...`, and PQ by class `group_pq/CLASS`; `options` are of `evaluate`.
    """
    leads = jax.process_index() == 0  # shows pictures of the images that are its own
    pictures = run.setup.config.eval.num_pictures
    summary = evaluate(
        predictor,
        examples,
        num_pictures=pictures,
        picture_folder=folder if leads else None,
        **options,
    )
    scalars = {f"{group}/{key}": v for key, v in report.flatten_summary(summary).items()}
    classes = {f"{group}_pq/{row['name']}": row["pq"] for row in summary.get("per_class", ())}
    known = {key: value for key, value in classes.items() if np.isfinite(value)}
    writer.scalars(step, scalars | known)
    if pictures and "panoptic" in predictor.config.tasks:
        show(writer, step, group, folder / PICTURES, folder / PQ_PER_CLASS)
    return summary


def show(writer: MetricWriter, step: int, group: str, *paths: Path) -> None:
    """Gives a writer those of the pictures that there are, by name; of several hosts, the first."""
    for path in paths if jax.process_index() == 0 else ():
        if path.exists():
            with open_image(path) as picture:
                writer.images(step, {f"{group}/{path.stem}": np.asarray(picture.convert("RGB"))})


def check(run: Experiment, name: str) -> None:
    """Refuses a stage with an `eval_every` by a ValueError where nothing can be looked at."""
    if run.setup.stages[name].eval_every and not query_pictures.has_queries(run, name):
        raise ValueError(
            f"Stage {name!r} is of kind {run.setup.stages[name].kind!r}, of which nothing can be "
            f"looked at while it trains; set --config.train.{name}.eval_every=0."
        )


def look(run: Experiment, name: str) -> Look:
    """What the training loop asks for every `eval_every` steps of a stage.

    It scores the first `config.eval.look_images` evaluation images, the same each time, if the
    stage trains what predicts, and draws their queries. To be looked at: nothing learns from it.
    """
    setup, folder = run.setup, run.workdir / name
    trains = set(setup.make_stage(name).trains)
    number = setup.config.eval.look_images

    def now(step: int, params: Any, writer: MetricWriter) -> dict[str, float]:
        scores: dict[str, float] = {}
        with run.parameters.holding(name, params):
            if setup.predicts(name) and trains & {"segmentor", "projector"}:
                examples = run.datasets.evaluation(jax.process_index(), jax.process_count())
                share = itertools.islice(examples, -(-number // jax.process_count()))
                options = {"name": f"{name}, step {step}", "group": GROUP}
                summary = score(run, run.predictor(name), share, writer, step, folder, **options)
                scores = report.flatten_summary(summary)
                told = [f"{key} {scores[key]:.1f}" for key in TOLD if key in scores]
                print(f"{options['name']}: {', '.join(told)}", flush=True)
            if setup.eval_vocabulary is setup.vocabulary:
                try:
                    figure = query_pictures.write_picture(run, name, num_images=number)
                    show(writer, step, GROUP, figure)
                except query_pictures.TooFewQueriesError as error:  # no reason to end a training
                    print(f"{name}, step {step}: no picture of queries. {error}", flush=True)
        return scores

    return now
