"""Programs of ours as works: what they share, and our side of the comparison with transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import NUM_CLASSES, Case
from concat_jax.benchmarking.harness import Work
from concat_jax.core.arrays import unit
from concat_jax.core.batch import PROGRESS
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.panoptic import panoptic_inference
from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from concat_jax.models.backbones.swin import SWIN_VARIANTS
from concat_jax.models.networks import Networks, make_networks
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier, mask_logits, training_arguments
from concat_jax.models.vit import VIT_VARIANTS
from concat_jax.stages.stage import LossFn
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState, jit_train_step
from concat_jax.weights.hugging_face_folder import save_hf_folder
from concat_jax.weights.model_folder import ModelCard, load_model, save_model


def compile_program(function: Any, *arguments: Any, calls: int = 1) -> tuple[Any, dict[str, Any]]:
    """A jitted function compiled for the arguments, and fields of the `Work` that it is part of."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    fields = {
        "compile": seconds,
        "flops": calls * cost.get("flops", 0.0),
        "traffic_bytes": calls * cost.get("bytes accessed", 0.0),
        "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
    }
    device = jax.local_devices()[0]
    held = (device.memory_stats() or {}).get("bytes_in_use")
    if held is not None:  # an accelerator counts for itself
        fields["peak_bytes"] = lambda: device.memory_stats()["peak_bytes_in_use"] - held
    return program, fields


class Trainer:
    """A state that one or several train steps move, each compiled as the training loop does."""

    def __init__(self, params: Any, rules: Sequence[tuple[str, float, float]]):
        """Copies what is trained; `rules` are of a `Stage`."""
        self._mesh = make_mesh(devices=1)
        self._optimizer = make_optimizer(OptimizerConfig(), 1000, label_params(params, rules))
        copies = jax.tree.map(lambda x: jax.numpy.array(x), params)
        self._state = jax.jit(lambda p: TrainState.create(p, self._optimizer))(copies)

    def work(
        self,
        loss: LossFn,
        frozen: Any,
        batches: Callable[[int], Mapping[str, np.ndarray]],
        **told: np.ndarray,
    ) -> Work:
        """A step of a loss, the making of its batch included."""
        step = jit_train_step(loss, self._optimizer, 0, self._mesh, self._state)
        with jax.set_mesh(self._mesh):
            program, fields = compile_program(step, self._state, frozen, batches(0))
        number = 0

        def call() -> dict[str, np.ndarray]:
            nonlocal number
            self._state, metrics = program(self._state, frozen, batches(number))
            jax.block_until_ready(self._state)
            number += 1
            return {"loss": np.asarray(metrics["loss"]), **told}

        return Work(call, **fields)


def method_networks(case: Case, card: ModelCard) -> Networks:
    """The method's networks around a model's segmentor, as wide as in `configs/coco_zps.py`."""
    return make_networks(
        {
            "clip": {**case.clip, "dtype": case.dtype},
            "segmentor": {**card.segmentor, "dtype": case.dtype},
            "projector": {"hidden_width": 512},
            "generator": {"hidden_width": 1024, "num_layers": 2, "noise_width": 256},
        }
    )


def random_params(networks: Networks, name: str) -> Any:
    """Initial values of one of the networks, on the device."""
    return jax.jit(networks.init, static_argnums=0)(name, jax.random.key(0))


def random_embeddings(*shape: int) -> np.ndarray:
    """Normalised vectors [..., C] float32, seeded: in the place of texts' or CLIP's targets."""
    return unit(np.random.default_rng(3).normal(size=shape).astype(np.float32))


# Segmentors with random weights, when no converted model is given. EoMT's are the published ones
# for COCO panoptic at 640 x 640 (github.com/tue-mps/eomt, configs/dinov2/coco/panoptic).
SEGMENTORS = {
    "mask2former_resnet50": {"backbone": {"kind": "resnet"}},
    "mask2former_resnet101": {"backbone": {"kind": "resnet", "stage_sizes": (3, 4, 23, 3)}},
    **{
        f"mask2former_swin_{name}": {"backbone": {"kind": "swin", **fields}}
        for name, fields in SWIN_VARIANTS.items()
    },
    **{
        f"eomt_{name}": {
            "kind": "eomt",
            "backbone": {**VIT_VARIANTS[f"dinov2-{name}"], "patch_size": 16, "grid": 40},
            "num_blocks": num_blocks,
        }
        for name, num_blocks in (("small", 3), ("base", 3), ("large", 4))
    },
}


def prepare_models(
    model: str, segmentor: str, folder: Path, needs_head: bool, with_reference: bool
) -> str:
    """Writes the weights of every implementation into a folder each; returns what they are.

    Raises ValueError for a model without a linear class head where one is needed.
    """
    if model:
        params, card = load_model(model)
        if needs_head and "classifier" not in params:
            raise ValueError(
                f"--model={model} has no linear class head, which is timed here; name another, or "
                "leave it out for random weights."
            )
        source = card.source
    else:
        config = SEGMENTORS[segmentor]
        rng, flags = jax.random.key(0), (True,) * NUM_CLASSES
        ids = tuple(range(1, NUM_CLASSES + 1))
        vocabulary = Vocabulary(tuple(f"class_{i - 1}" for i in ids), flags, flags, ids)
        network = make_segmentor(config)
        queries = np.zeros((1, 1, network.width))
        params = {
            "segmentor": jax.jit(network.init)(rng, np.zeros((1, 64, 64, 3)))["params"],
            "classifier": LinearClassifier(NUM_CLASSES).init(rng, queries)["params"],
        }
        card = ModelCard(config, vocabulary, "panoptic", "random weights", True)
        source = f"{segmentor}, random weights"
    save_model(folder / "ours", params, card)
    if with_reference:
        save_hf_folder(folder / "reference", params, card)
    return source


def works(case: Case) -> dict[str, Work]:
    """ "forward", "postprocess" or "train", with the model's linear class head."""
    params, card = load_model(case.model)
    segmentor = make_segmentor({**card.segmentor, "dtype": case.dtype})
    classifier = LinearClassifier(len(card.vocabulary))
    make = {"forward": _forward, "postprocess": _postprocess, "train": _train}[case.task]
    return {"ours": make(case, segmentor, classifier, jax.device_put(params), card.vocabulary)}


def _forward(case: Case, segmentor, classifier, params: Any, vocabulary) -> Work:
    images = jnp.asarray(cases.images(case))

    @jax.jit
    def predict(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        output = segmentor.apply({"params": params["segmentor"]}, segmentor.normalize(images))
        queries = output.queries[:, -1]
        return {
            "class_logits": classifier.apply({"params": params["classifier"]}, queries),
            "mask_logits": mask_logits(output.mask_embeddings[:, -1], output.mask_features),
        }

    program, fields = compile_program(predict, params, images)
    return Work(lambda: jax.device_get(program(params, images)), **fields)


def _postprocess(case: Case, segmentor, classifier, params: Any, vocabulary) -> Work:
    num_queries = segmentor.num_queries
    logits, masks = map(jnp.asarray, cases.logits(case, num_queries, len(vocabulary)))

    @jax.jit
    def postprocess(logits: jax.Array, masks: jax.Array) -> jax.Array:
        segment_ids, _ = panoptic_inference(
            masks,
            jax.nn.softmax(logits, axis=-1),
            jnp.asarray(vocabulary.is_thing),
            jnp.ones(len(vocabulary), bool),
            output_size=cases.native_size(case),
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
        begun = {PROGRESS: jnp.zeros(len(batch["image"]))}  # where an EoMT masks all its queries
        output = segmentor.apply(
            {"params": params["segmentor"]},
            segmentor.normalize(batch["image"]),
            **training_arguments(segmentor, rng, begun),
        )
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
    arrays = (cases.images(case), *cases.segments(case, len(vocabulary)))
    batch = jax.device_put(dict(zip(names, arrays, strict=True)))
    trainer = Trainer(params, ((r".*/frozen_\w+", 0.0, 0.0), (r".*", 1.0, 1.0)))
    return trainer.work(loss, {}, lambda number: batch)
