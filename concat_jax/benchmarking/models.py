"""The weights that are measured: a converted model's, or random ones at published sizes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from concat_jax.benchmarking.inputs import NUM_CLASSES
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.backbones.swin import SWIN_VARIANTS
from concat_jax.models.segmentor import LinearClassifier, make_segmentor
from concat_jax.weights.hugging_face_folder import save_hf_folder
from concat_jax.weights.model_folder import ModelCard, load_model, save_model

# Backbones with random weights, when no converted model is given.
BACKBONES = {
    "resnet50": {"kind": "resnet"},
    "resnet101": {"kind": "resnet", "stage_sizes": (3, 4, 23, 3)},
    **{f"swin_{name}": {"kind": "swin", **fields} for name, fields in SWIN_VARIANTS.items()},
}


def prepare_models(model: str, backbone: str, folder: Path, with_reference: bool) -> str:
    """Writes the weights of every implementation into a folder each; returns what they are."""
    if model:
        params, card = load_model(model)
        source = card.source
    else:
        config = {"backbone": BACKBONES[backbone]}
        rng, flags = jax.random.key(0), (True,) * NUM_CLASSES
        ids = tuple(range(1, NUM_CLASSES + 1))
        vocabulary = Vocabulary(tuple(f"class_{i - 1}" for i in ids), flags, flags, ids)
        init = jax.jit(make_segmentor(config).init)
        params = {
            "segmentor": init(rng, np.zeros((1, 64, 64, 3)))["params"],
            "classifier": LinearClassifier(NUM_CLASSES).init(rng, np.zeros((1, 1, 256)))["params"],
        }
        card = ModelCard(config, vocabulary, "panoptic", "random weights", True)
        source = f"{backbone}, random weights"
    save_model(folder / "ours", params, card)
    if with_reference:
        save_hf_folder(folder / "reference", params, card)
    return source
