"""Ways to name a stage's masks, side by side: its text head, CLIP on the masks, and both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from concat_jax.evaluation.bias_curve import naming_curve
from concat_jax.evaluation.calibration import GAMMAS, calibrate, sweep
from concat_jax.evaluation.report import markdown_table
from concat_jax.inference.clip_names import ImageTower, MaskNamer
from concat_jax.inference.heads import ClipHead, EnsembleHead
from concat_jax.inference.predictor import Predictor

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment

# FC-CLIP's powers of CLIP for names that training showed and for others, and halves of them.
POWERS = ((0.4, 0.8), (0.2, 0.4))
VOID_WEIGHTS = (0.5, 1.0)
COLUMNS = ("seen", "unseen", "unseen among unseen", "hPQ", "hPQ at γ", "γ")


def predictors(run: Experiment, name: str) -> Iterator[tuple[str, Predictor]]:
    """Each way by its title; all have the masks of stage `name`, and CLIP is the stage's own."""
    plain = run.predictor(name, gamma=GAMMAS, tasks=("panoptic", "queries"))
    segmentor, text = plain.networks
    yield "text head", plain
    setup = run.setup
    params = run.parameters.whole("clip", setup.holds_after(name)["clip"])
    crops = setup.context.crops
    sides = (crops.min_side, crops.max_side or math.inf)
    tower = ImageTower.of(params, setup.networks.clip, *sides)
    same = ("params", "text", "is_name", "training_text", "projector")
    both = EnsembleHead(
        **{field: getattr(text, field) for field in same},
        scale=tower.scale,
        is_seen=jnp.asarray(plain.vocabulary.is_seen),
        needs_places=True,
    )
    heads = {"CLIP on its masks": ClipHead(text, text.text, text.is_name, tower.scale)}
    for alpha, beta in POWERS:
        title = f"both, CLIP's power {alpha} for seen names and {beta} for unseen ones"
        heads[title] = both.replace(alpha=alpha, beta=beta)
    for weight in VOID_WEIGHTS:
        title = f"text head, no-object times 1 - {weight:g} max p of CLIP"
        heads[title] = both.replace(alpha=0.0, beta=0.0, void_weight=weight)
    for title, head in heads.items():
        how = {"namer": MaskNamer(tower, text)}
        yield title, Predictor(segmentor, head, plain.vocabulary, plain.config, **how)


def compare(run: Experiment, name: str) -> str:
    """A Markdown table of how each way names, percent; γ is chosen on the world's other split.

    Accuracies are means over classes, of the queries that hold a segment: "seen" and "unseen" where
    all names compete. ValueError where the config has no `eval.bias_split`.
    """
    held_out = run.held_out()
    if held_out is None:
        raise ValueError(
            "--namers chooses gamma on other scenes than are scored, and config.eval.bias_split "
            "names none; it is for the synthetic world."
        )
    rows = []
    for title, predictor in predictors(run, name):

        def sweep_of(examples, _, predictor=predictor, title=title):
            return sweep(predictor, examples, name=title)

        gamma, _, found = calibrate(sweep_of, held_out.evaluation(), run.datasets.evaluation())
        names = naming_curve(found.names, np.asarray(found.vocabulary.is_seen))
        scores = [names.seen, names.unseen, names.among_unseen]
        scores += [found.summary(g)["harmonic"]["pq"] for g in (0.0, gamma)]
        rows.append([title, *(f"{score:.1f}" for score in scores), f"{gamma + 0:g}"])
    return markdown_table(["names by", *COLUMNS], rows)
