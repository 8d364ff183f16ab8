"""Segmentor and projector as one of Scenic's models, for its trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.files import as_path
from concat_jax.experiment.class_embeddings import ClassEmbeddings
from concat_jax.experiment.parameters import Parameters
from concat_jax.experiment.setup import Setup, make_setup
from concat_jax.losses.segmentation import SegmentationLoss, segmentation_loss
from concat_jax.neighbours.scenic import scenic_module
from concat_jax.stages.con import matched_accuracy, training_labels
from concat_jax.stages.stage import INIT
from concat_jax.training.sharding import make_mesh


class NamingSegmentor(nn.Module):
    """Segmentor and projector on fixed names; subtrees of parameters are called as in ours.

    Attributes:
      text: [K, C] or [K, S, C] embeddings of the seen classes.
    """

    segmentor: nn.Module
    projector: nn.Module
    text: np.ndarray

    def __call__(
        self, inputs: jax.Array, *, train: bool = False, debug: bool = False
    ) -> dict[str, jax.Array]:
        """What the loss takes, of images [B, S, S, 3] uint8, all of them valid.

        "key" is what its points are drawn with: of the stream "dropout" in training, else constant.
        """
        output = self.segmentor(self.segmentor.normalize(inputs))
        return {
            "class_logits": self.projector.predict(output.queries, self.text),
            "mask_embeddings": output.mask_embeddings,
            "mask_features": output.mask_features,
            "key": self.make_rng("dropout") if train else jax.random.PRNGKey(0),
        }


def segmentor_model() -> type:
    """A subclass of `scenic.model_lib.base_models.base_model.BaseModel`: a trainer's `model_cls`.

    Its config is one of ours with Scenic's own keys beside; `config.init.clip` embeds the names.
    The loss is the segmentor's of CON on the seen classes, without alignment to CLIP. Raises
    ValueError if Scenic cannot be imported.
    """
    base = scenic_module("model_lib.base_models.base_model").BaseModel
    summed = scenic_module("model_lib.base_models.model_utils").psum_metric_normalizer

    class SegmentorModel(base):
        def __init__(self, config: Any, dataset_meta_data: Mapping[str, Any]):
            self.setup = make_setup(config, dataset_meta_data["labels"])
            super().__init__(config, dataset_meta_data)

        def build_flax_model(self) -> NamingSegmentor:
            networks = self.setup.networks
            if networks.segmentor.anneals:
                raise ValueError(
                    "Scenic's trainers do not tell a segmentor how far the training is, which this "
                    "kind asks for; train it with python -m concat_jax.main."
                )
            text = _text(self.setup)[self.setup.vocabulary.seen]
            return NamingSegmentor(networks.segmentor, networks.projector, text)

        def loss_function(self, logits: Any, batch: Any, model_params: Any = None) -> jax.Array:
            terms, _ = self._terms(logits, batch)
            return terms.loss_class + terms.loss_mask + terms.loss_dice

        def get_metrics_fn(self, split: str | None = None):
            """Sums and what to divide them by; the whole loss in training, where none is padded."""

            def metrics(logits: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
                terms, num_segments = self._terms(logits, batch)
                class_logits, queries = logits["class_logits"][:, -1], terms.query_labels[:, -1]
                matched = jnp.sum(queries < class_logits.shape[-1] - 1)
                found = {
                    "loss_mask": (terms.loss_mask * num_segments, num_segments),
                    "loss_dice": (terms.loss_dice * num_segments, num_segments),
                    "accuracy": (matched_accuracy(class_logits, queries) * matched, matched),
                }
                if split == "train":
                    images = jnp.asarray(len(class_logits), jnp.float32)
                    loss = terms.loss_class + terms.loss_mask + terms.loss_dice
                    found["loss"] = (loss * images, images)
                return {name: summed(pair) for name, pair in found.items()}

            return metrics

        def _terms(self, logits: Any, batch: Any) -> tuple[SegmentationLoss, jax.Array]:
            given = batch["label"]
            labels = training_labels(
                given["segment_labels"], given["segment_is_crowd"], self.setup.vocabulary
            )
            labels = jnp.where(batch["batch_mask"][:, None] > 0, labels, -1)
            fields = ("key", "class_logits", "mask_embeddings", "mask_features")
            arguments = (logits[field] for field in fields)
            loss = self.setup.context.loss
            return segmentation_loss(*arguments, given["segment_ids"], labels, loss), jnp.sum(
                labels >= 0
            )

    return SegmentorModel


def _text(setup: Setup) -> np.ndarray:
    """Embeddings of all names by the CLIP of `config.init.clip`."""
    parameters = Parameters(setup, as_path("."), make_mesh(devices=1))
    embeddings = ClassEmbeddings(
        setup.config.text,
        setup.networks.clip,
        setup.tokenizer,
        lambda source: parameters.whole("clip", source),
    )
    return embeddings.get(INIT, setup.vocabulary)
