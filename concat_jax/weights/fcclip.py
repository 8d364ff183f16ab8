"""FC-CLIP's published files: a Mask2Former's decoders, and the whole CLIP that they stand on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from concat_jax.text.templates import TEMPLATES
from concat_jax.weights.clip import clip_of_arrays
from concat_jax.weights.model_folder import (
    ModelCard,
    Params,
    TextCard,
    parameter_shapes,
    text_shapes,
)
from concat_jax.weights.names.clip import VISION
from concat_jax.weights.names.mask2former import fcclip
from concat_jax.weights.names.table import find, to_ours
from concat_jax.weights.report import LoadingReport
from concat_jax.weights.segmentors import decoders_config

# What stands before the names of the CLIP.
CLIP = "backbone.clip_model."
_VOID, WEIGHTS = "void_embedding.weight", "criterion.empty_weight"
# The powers of CLIP (arXiv 2308.02487, section 4.1).
_ALPHA, _BETA = 0.4, 0.8
_SEGMENTORS_FIELDS = (
    "embed_dim image_tower image_stages image_width image_heads image_size patch_size projection"
).split()


def fcclip_of_arrays(
    arrays: Mapping[str, np.ndarray],
) -> tuple[Params, ModelCard, LoadingReport, int]:
    """Parameters but the training text, the card, a report, and how many classes it was trained on.

    That number is 0 where the file has no `criterion.empty_weight`, which tells it. Raises
    ValueError if the CLIP or a decoder is none that can be read, or arrays are missing or left.
    """
    clip_config, clip, clip_report = clip_of_arrays(
        {k.removeprefix(CLIP): v for k, v in arrays.items() if k.startswith(CLIP)}
    )
    rest = {key: value for key, value in arrays.items() if not key.startswith(CLIP)}
    if np.shape(rest.get(_VOID))[:-1] == (1,):
        rest[_VOID] = rest[_VOID][0]
    count = 0
    if WEIGHTS in rest:
        # The last is no-object.
        shape = np.shape(rest[WEIGHTS])
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(
                f"its {WEIGHTS} has shape {shape}, but is one number a class and one more; use "
                "another file"
            )
        count = shape[0] - 1
    found = find(rest, fcclip())
    decoders = decoders_config(found)
    own = {k: v for k, v in clip_config.items() if k in _SEGMENTORS_FIELDS}
    config = {"kind": "fcclip", "clip": own, **decoders}
    text = TextCard(
        projector={"hidden_width": decoders["width"], "num_layers": 3},
        clip={
            k: v for k, v in clip_config.items() if not k.startswith(("image_", "patch_", "proj"))
        },
        tokenizer={},
        templates=TEMPLATES["fourteen"],
        clean_names=False,
        synonyms="max",
        ensemble={
            "alpha": _ALPHA,
            "beta": _BETA,
            # `fcclip_convnext_large_eval_ade20k_r50.yaml` ENSEMBLE_ON_VALID_MASK
            "needs_places": clip_config["image_tower"] == "resnet",
        },
    )
    card = ModelCard(config, text=text)
    wanted = parameter_shapes(config) | text_shapes(card)
    of_clip = ("segmentor/backbone/", "segmentor/pooling/", "text_tower/")
    params, report = to_ours(
        found, {path: shape for path, shape in wanted.items() if not path.startswith(of_clip)}
    )
    vision = clip.pop(VISION)
    params["segmentor"] |= vision
    params["text_tower"] = clip

    def ours(path: str) -> str:
        is_vision = path.startswith(f"{VISION}/")
        return path.replace(VISION, "segmentor", 1) if is_vision else f"text_tower/{path}"

    report = LoadingReport(
        {**report.loaded, **{ours(p): CLIP + key for p, key in clip_report.loaded.items()}},
        {**report.shapes, **{ours(p): shape for p, shape in clip_report.shapes.items()}},
        ignored={**report.ignored, **{CLIP + k: v for k, v in clip_report.ignored.items()}},
    )
    return params, card, report, count
