"""Pictures of the vision queries after a stage: where real and pseudo queries lie.

Real queries are those of evaluation images, of unseen classes too: to be looked at, nothing learns
from them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from concat_jax.core.arrays import unit
from concat_jax.models.networks import Params
from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages.cat import generate
from concat_jax.stages.finetune import sample_deviations
from concat_jax.stages.queries import IMAGE_FIELDS, extract_queries
from concat_jax.stages.registry import method_of
from concat_jax.training.sharding import along_batch, copy_to_host, inference_mesh
from concat_jax.visualize import plots
from data_pipelines.augment import resize_longest

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment

PICTURE = "query_space.png"
# Compiled once, however often the parameters change.
_extract = jax.jit(extract_queries, static_argnums=0)


def has_queries(run: Experiment, name: str) -> bool:
    """Whether the stage trains something that a picture of vision queries shows."""
    return not {"segmentor", "projector", "generator"}.isdisjoint(run.setup.make_stage(name).trains)


def _text(run: Experiment, name: str) -> np.ndarray:
    return run.embeddings.get(run.setup.stages[name].takes["clip"], run.setup.vocabulary)


def _params(run: Experiment, sources: Mapping[str, str]) -> Params:
    """Subtrees by the stage that gave each, on this host's devices alone, of all hosts together."""
    mesh = inference_mesh(run.mesh, run.setup.predict.batch_size)
    return copy_to_host({s: run.parameters.whole(s, stage) for s, stage in sources.items()}, mesh)


class TooFewQueriesError(ValueError):
    """The evaluation images show too little for a picture."""


def real_queries(run: Experiment, source: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries [M, D] float32 of evaluation images that hold a segment, and classes [M].

    `source` is the stage of the segmentor and of the projector that queries are matched with.
    Raises TooFewQueriesError where there is no batch of images, or not two segments.
    """
    size = run.setup.predict.batch_size
    mesh = inference_mesh(run.mesh, size)
    params = _params(run, {"segmentor": source, "projector": source})
    text = copy_to_host(_text(run, source), mesh)
    # Every class may be matched here: the picture shows the unseen ones.
    vocabulary = run.setup.vocabulary.all_seen()
    context = dataclasses.replace(run.setup.context, vocabulary=vocabulary)
    examples = (resize_longest(e, run.datasets.eval_size) for e in run.datasets.evaluation())
    queries, labels = [], []
    for number in range(0, num_images, size):
        chunk = list(itertools.islice(examples, size))
        if len(chunk) < size:  # one shape, one program; a few images less in a picture
            break
        batch = {name: np.stack([example[name] for example in chunk]) for name in IMAGE_FIELDS}
        batch = jax.device_put(batch, along_batch(mesh))
        found = jax.device_get(_extract(context, params, text, batch, jax.random.key(number)))
        queries.append(found["queries"].reshape(-1, found["queries"].shape[-1]))
        labels.append(found["query_labels"].reshape(-1))
    if not queries:
        raise TooFewQueriesError(
            f"The evaluation data hold fewer images than config.eval.settings.batch_size = {size}; "
            "make it smaller."
        )
    matched = np.concatenate(labels) >= 0
    if matched.sum() < 2:
        raise TooFewQueriesError(
            f"Of {len(queries) * size} evaluation images {matched.sum()} segments are matched by a "
            "query, and a picture of queries needs two; take more images, or other ones."
        )
    return np.concatenate(queries)[matched], np.concatenate(labels)[matched]


def write_picture(run: Experiment, name: str, num_images: int = 300) -> Path:
    """Draws a stage's picture into its folder; arguments and errors as `query_figure`."""
    path = run.workdir / name / PICTURE
    figure = query_figure(run, name, num_images=num_images)
    if jax.process_index() == 0:
        plots.save_figure(figure, path)
    return path


def query_figure(
    run: Experiment, name: str, *, num_images: int = 300, per_class: int = 60
) -> Figure:
    """The figure of one finished stage, of `plots.query_space`.

    After CON the real vision queries; after CAT the pseudo queries of its generator as well; after
    the finetune both as semantic queries, which is where they are told apart, the pseudo queries
    with the deviations that the finetune gave them. Raises ValueError for a stage without queries,
    too few images, or a config that evaluates on another data set than it trains on.
    """
    settings = run.setup.stages[name]
    if run.setup.eval_vocabulary is not run.setup.vocabulary:
        raise ValueError(
            "The picture names real queries of evaluation images by the classes of training, and "
            "the config evaluates on others; set config.data.eval_kind to '' to draw it."
        )
    if not has_queries(run, name):
        raise ValueError(f"Stage {name!r} is of kind {settings.kind!r}, which has no queries.")
    trains = run.setup.make_stage(name).trains
    source = name if "segmentor" in trains else settings.takes["segmentor"]
    real, real_labels = real_queries(run, source, num_images)
    pseudo, labels = real[:0], real_labels[:0]
    generator = name if "generator" in trains else settings.takes.get("generator")
    if generator:
        labels = np.repeat(np.arange(len(run.setup.vocabulary), dtype=np.int32), per_class)
        sources = {"generator": generator, "segmentor": source}
        params = _params(run, sources)
        vectors = class_vectors(jnp.asarray(_text(run, name)))[labels]
        networks = run.setup.networks_of(generator)
        pseudo = generate(networks, params, vectors, jax.random.key(0))
    what = "Real and pseudo vision queries" if "generator" in trains else "Real vision queries"
    if trains == ("projector",):
        what = "Semantic queries"
        deviation = getattr(method_of(name, settings), "deviation", 0.0)
        if len(labels) and deviation:
            seen = np.isin(real_labels, run.setup.vocabulary.seen)
            known = np.where(seen, real_labels, -1)
            deviations = sample_deviations(
                jax.random.key(1), real[None], known[None], len(run.setup.vocabulary), len(labels)
            )
            pseudo = pseudo + deviation * deviations
        projector = {"params": _params(run, {"projector": name})["projector"]}
        real, pseudo = (
            unit(np.asarray(run.setup.networks.projector.apply(projector, jnp.asarray(q))))
            for q in (real, pseudo)
        )
    title = f"{what} after stage {name}"
    return plots.query_space(
        real, real_labels, np.asarray(pseudo), labels, run.setup.vocabulary, title
    )
