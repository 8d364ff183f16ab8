"""Our side of the benchmark."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.measure import Measurement, Turn, measure
from concat_jax.core.runtime import step_compiler_options
from concat_jax.inference.panoptic import panoptic_inference
from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from concat_jax.models.networks import Networks, make_networks
from concat_jax.models.segmentor import (
    DEFAULTS,
    LinearClassifier,
    make_segmentor,
    mask_logits,
    normalize_images,
)
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.state import TrainState, make_train_step
from concat_jax.weights.model_folder import ModelCard, load_model


def run(case: Case, model: Path, repeats: int) -> Measurement:
    """Measure a case.

    Args:
      case: what to measure.
      model: folder of `save_model`, with a linear class head.
      repeats: timed calls.
    """
    params, card = load_model(model)
    segmentor = make_segmentor({**card.segmentor, "dtype": case.dtype})
    classifier = LinearClassifier(len(card.vocabulary))
    params = jax.device_put(params)

    def predict(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = segmentor.apply({"params": params["segmentor"]}, normalize_images(images))
        logits = classifier.apply({"params": params["classifier"]}, output.queries[:, -1])
        return logits, mask_logits(output.mask_embeddings[:, -1], output.mask_features)

    if case.task == "forward":
        images = jnp.asarray(cases.images(case))
        program, seconds = compile_program(jax.jit(predict), params, images)

        def call() -> dict[str, np.ndarray]:
            logits, masks = jax.block_until_ready(program(params, images))
            return {"class_logits": np.asarray(logits), "mask_logits": np.asarray(masks)}

        return _measure(program, seconds, call, repeats)

    if case.task == "postprocess":
        num_queries = params["segmentor"]["transformer_decoder"]["query_feature_embedding"].shape[0]
        logits, masks = map(jnp.asarray, cases.logits(case, num_queries))
        is_thing = jnp.asarray(card.vocabulary.is_thing)

        @jax.jit
        def postprocess(logits: jax.Array, masks: jax.Array):
            return panoptic_inference(
                masks,
                jax.nn.softmax(logits, axis=-1),
                is_thing,
                jnp.ones_like(is_thing),
                output_size=cases.native_size(case),
                keep_rule="score",
            )

        program, seconds = compile_program(postprocess, logits, masks)

        def call() -> dict[str, np.ndarray]:
            output = jax.block_until_ready(program(logits, masks))
            segment_ids = np.asarray(output.segment_ids)
            count = [len(np.unique(ids[ids > 0])) for ids in segment_ids]
            return {"void": segment_ids == 0, "segments": np.asarray(count)}

        return _measure(program, seconds, call, repeats)

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

    labels = label_params(params, ((r".*/frozen_\w+", 0.0, 0.0), (r".*", 1.0, 1.0)))
    optimizer = make_optimizer(OptimizerConfig(), 1000, labels)
    step = jax.jit(
        make_train_step(loss, optimizer, seed=0),
        donate_argnums=0,
        compiler_options=step_compiler_options(),
    )
    segment_ids, segment_labels = cases.segments(case)
    batch = jax.device_put(
        {
            "image": cases.images(case),
            "segment_ids": segment_ids,
            "segment_labels": segment_labels,
        }
    )
    state = jax.jit(lambda p: TrainState.create(p, optimizer), donate_argnums=0)(params)
    program, seconds = compile_program(step, state, {}, batch)

    def call() -> dict[str, np.ndarray]:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, {}, batch))
        return {"loss": np.asarray(metrics["loss"])}

    return _measure(program, seconds, call, repeats)


def method_networks(case: Case, card: ModelCard) -> Networks:
    """The method's networks around a model's segmentor; projector as in `configs/coco_zps.py`."""
    config = {
        "clip": {**case.clip, "dtype": case.dtype},
        "segmentor": {**DEFAULTS, **card.segmentor, "dtype": case.dtype},
        "projector": {"hidden_width": 512},
        "generator": {"hidden_width": 1},  # takes no part in what is measured
    }
    return make_networks(config)


def random_params(networks: Networks, name: str) -> Any:
    """Initial values of one of the networks, on the device."""
    return jax.jit(networks.init, static_argnums=0)(name, jax.random.key(0))


def random_embeddings(*shape: int) -> np.ndarray:
    """Normalised vectors [..., C] float32, seeded: in the place of texts' or CLIP's targets."""
    vectors = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def compile_program(function: Any, *arguments: Any) -> tuple[Any, float]:
    """A jitted function compiled for the arguments, and the seconds that took."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - start


def make_turn(program: Any, seconds: float, call: Any, calls: int = 1) -> Turn:
    """A compiled program as a `Turn`.

    Args:
      program: compiled.
      seconds: that it took to compile.
      call: runs it.
      calls: how often `call` does.
    """
    costs = program.cost_analysis() or {}
    memory = program.memory_analysis()
    return Turn(
        call,
        compile=seconds,
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        flops=calls * costs.get("flops", 0.0),
        bytes_accessed=calls * costs.get("bytes accessed", 0.0),
    )


def _measure(program: Any, seconds: float, call: Any, repeats: int) -> Measurement:
    costs = program.cost_analysis() or {}
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_in_use" in statistics:  # an accelerator counts for itself
        before = statistics["bytes_in_use"]

        def peak() -> int:
            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] - before
    else:
        peak = None
    return measure(
        call,
        repeats,
        peak_bytes=peak,
        compile_seconds=seconds,
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
    )
