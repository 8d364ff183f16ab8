"""What each stage of a run learns from: captions, images, or the vision queries of a bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from concat_jax.core.arrays import fingerprint
from concat_jax.core.config import flat
from concat_jax.experiment.query_extraction import extract_bank
from concat_jax.stages.queries import QueryBank, missing_classes
from concat_jax.stages.registry import learns_from, method_of

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment

BatchFn = Callable[[int], Mapping[str, np.ndarray]]


def stage_batches(experiment: Experiment, name: str, text: np.ndarray | None) -> BatchFn:
    """Step -> this host's rows of a stage's batch; only a query bank needs the text embeddings."""
    setup, settings = experiment.setup, experiment.setup.stages[name]
    source = learns_from(settings)
    if source == "images":
        return experiment.datasets.train(settings.batch_size)
    if source == "queries":
        return query_bank(experiment, name, text).batch
    pairs = experiment.datasets.captions(settings.batch_size, setup.networks.clip.image_size)

    def caption_batch(step: int) -> Mapping[str, np.ndarray]:
        batch = pairs(step)
        return {"image": batch["image"], "tokens": setup.tokenizer(batch["captions"])}

    return caption_batch


def query_bank(experiment: Experiment, name: str, text: np.ndarray) -> QueryBank:
    """The bank that a stage learns from, extracted into the folder of the stage of its segmentor.

    A bank belongs to the weights that made it; for an oracle it also shows unseen classes. Raises
    ValueError if the bank there is another, holds no seen class or is smaller than a batch.
    """
    setup, datasets = experiment.setup, experiment.datasets
    config, settings = setup.config, setup.stages[name]
    source = settings.takes["segmentor"]
    size = setup.stages[source].batch_size
    # The projector that stage 1 trained names the queries, whatever this stage starts from.
    params = {s: experiment.parameters.get(s, source) for s in ("segmentor", "projector")}
    num_batches = -(-settings.bank_images // size)
    num_images = num_batches * size
    model = flat(config.model).items()
    context, batches, kind = setup.context, datasets.train, "query_bank"
    if settings.oracle:
        if datasets.oracle is None:
            raise ValueError(
                f"config.train.{name}.oracle needs images that show unseen classes, and data "
                f"of kind {config.data.kind!r} offers none for training."
            )
        every = dataclasses.replace(setup.vocabulary, is_seen=(True,) * len(setup.vocabulary))
        context = dataclasses.replace(context, vocabulary=every)
        batches, kind = datasets.oracle, "oracle_bank"
    queries, labels = extract_bank(
        experiment.workdir / source / f"{kind}_{num_images}",
        {
            "kind": kind,
            "stage": source,
            "steps": setup.stages[source].steps,
            "images": num_images,
            "model": str(sorted(item for item in model if not item[0].startswith("generator"))),
            "weights": fingerprint(jax.device_get(params))[:16],
        },
        context,
        params,
        text,
        batches(size),
        num_batches=num_batches,
        batch_size=size,
        seed=config.seed,
        config=setup.bank,
        mesh=experiment.mesh,
    )
    warning = missing_classes(labels, setup.vocabulary)
    if warning and jax.process_index() == 0:
        print(f"Warning: {warning}")
    return QueryBank(
        queries,
        labels,
        batch_size=settings.batch_size,
        seed=config.seed,
        memory_per_class=getattr(method_of(name, settings), "memory_per_class", 0),
        num_classes=len(setup.vocabulary),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
