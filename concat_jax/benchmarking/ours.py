"""Our side of the comparison with transformers' Mask2Former."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.benchmarking import inputs
from concat_jax.benchmarking.harness import Work
from concat_jax.benchmarking.inputs import Case
from concat_jax.benchmarking.programs import Trainer, compile_program
from concat_jax.inference.panoptic import panoptic_inference
from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from concat_jax.models.segmentor import (
    LinearClassifier,
    make_segmentor,
    mask_logits,
    normalize_images,
)
from concat_jax.weights.model_folder import load_model


def works(case: Case) -> dict[str, Work]:
    """ "forward", "postprocess" or "train", with the model's linear class head."""
    params, card = load_model(case.model)
    segmentor = make_segmentor({**card.segmentor, "dtype": case.dtype})
    classifier = LinearClassifier(len(card.vocabulary))
    make = {"forward": _forward, "postprocess": _postprocess, "train": _train}[case.task]
    return {"ours": make(case, segmentor, classifier, jax.device_put(params), card.vocabulary)}


def _forward(case: Case, segmentor, classifier, params: Any, vocabulary) -> Work:
    images = jnp.asarray(inputs.images(case))

    @jax.jit
    def predict(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        output = segmentor.apply({"params": params["segmentor"]}, normalize_images(images))
        queries = output.queries[:, -1]
        return {
            "class_logits": classifier.apply({"params": params["classifier"]}, queries),
            "mask_logits": mask_logits(output.mask_embeddings[:, -1], output.mask_features),
        }

    program, fields = compile_program(predict, params, images)
    return Work(lambda: jax.device_get(program(params, images)), **fields)


def _postprocess(case: Case, segmentor, classifier, params: Any, vocabulary) -> Work:
    num_queries = params["segmentor"]["transformer_decoder"]["query_feature_embedding"].shape[0]
    logits, masks = map(jnp.asarray, inputs.logits(case, num_queries, len(vocabulary)))

    @jax.jit
    def postprocess(logits: jax.Array, masks: jax.Array) -> jax.Array:
        segment_ids, _ = panoptic_inference(
            masks,
            jax.nn.softmax(logits, axis=-1),
            jnp.asarray(vocabulary.is_thing),
            jnp.ones(len(vocabulary), bool),
            output_size=inputs.native_size(case),
            keep_rule="score",
        )
        return segment_ids

    program, fields = compile_program(postprocess, logits, masks)

    def call() -> dict[str, np.ndarray]:
        maps = jax.device_get(program(logits, masks))
        return {"segments": np.array([len(np.unique(ids[ids > 0])) for ids in maps])}

    return Work(call, **fields)


def _train(case: Case, segmentor, classifier, params: Any, vocabulary) -> Work:
    def loss(params, frozen, batch, rng):
        output = segmentor.apply({"params": params["segmentor"]}, normalize_images(batch["image"]))
        terms = segmentation_loss(
            rng,
            classifier.apply({"params": params["classifier"]}, output.queries),
            output.mask_embeddings,
            output.mask_features,
            batch["segment_ids"],
            batch["segment_labels"],
            SegmentationLossConfig(),
        )
        total = terms.loss_class + terms.loss_mask + terms.loss_dice
        return total, {"loss": total}

    names = ("image", "segment_ids", "segment_labels")
    arrays = (inputs.images(case), *inputs.segments(case, len(vocabulary)))
    batch = jax.device_put(dict(zip(names, arrays, strict=True)))
    trainer = Trainer(params, ((r".*/frozen_\w+", 0.0, 0.0), (r".*", 1.0, 1.0)))
    return trainer.work(loss, {}, lambda number: batch)
