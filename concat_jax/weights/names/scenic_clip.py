"""What Scenic calls CLIP's parameters: in its CLIP, and in OWL-ViT, which stands on one.

Source: google-research/scenic `projects/baselines/clip/layers.py` and `projects/owl_vit/`
(`clip/layers.py`; `models.py` for older names). Image towers are ViTs; attention has heads apart,
which `merge_heads` puts together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from concat_jax.weights.names.table import Naming, columns

# Where the CLIP of an OWL-ViT is among its parameters.
OWL_VIT = "backbone/clip/"
_TOWER = """
layer_norm{1,2}         flax_norm    ln_{1,2}/*
self_attn/{q,k,v}_proj  flax_linear  attn/{query,key,value}/*
self_attn/out_proj      flax_linear  attn/out/*
fc1                     flax_linear  mlp/c_fc/*
fc2                     flax_linear  mlp/c_proj/*
"""
_TABLE = f"""
logit_scale        array        logit_scale
text_projection    flax_linear  text/text_projection/*
visual_projection  flax_linear  visual/proj/*
@ text_model/  text/
token_embedding/embedding  array      token_embedding/embedding
position_embedding         array      positional_embedding
final_layer_norm           flax_norm  ln_final/*
@ text_model/layers_{{i}}/  text/transformer/resblocks_{{i}}/
{_TOWER}
@ vision_model/  visual/
class_embedding             array         class_embedding
patch_embedding/projection  flax_patches  conv1/*
position_embedding          array         positional_embedding
pre_layrnorm                flax_norm     ln_pre/*
post_layernorm              flax_norm     ln_post/*
@ vision_model/layers_{{i}}/  visual/transformer/resblocks_{{i}}/
{_TOWER}
"""
# OWL-ViT's heads, and what it makes of the class token.
_HEADS = r"^(class_head|obj_box_head|obj_mask_head|objectness_head|backbone/merged_class_token)/"
_SPELLINGS = ((f"^{OWL_VIT}", ""), (r"/resblocks\.", "/resblocks_"))
# Of OWL-ViT's newer code, which counts norms from 0.
_FROM_ZERO = (("/ln_1/", "/ln_2/"), ("/ln_0/", "/ln_1/"))
# Axes of attention's arrays, by whether they are of the projection that comes last.
_AXES = {(False, "kernel"): 3, (False, "bias"): 2, (True, "kernel"): 3, (True, "bias"): 1}
_HEADED = re.compile(r"/attn/(query|key|value|out)/(kernel|bias)$")


def is_scenic(names: Collection[str]) -> bool:
    """Whether a file holds a CLIP with these names."""
    return any(name.endswith("text/text_projection/kernel") for name in names)


def naming(names: Collection[str]) -> Naming:
    """The table, with the spelling of this file."""
    from_zero = any("/ln_0/" in name for name in names)
    (rows,) = columns(_TABLE, "", "")
    return Naming(rows, _HEADS, _SPELLINGS + _FROM_ZERO * from_zero)


def merge_heads(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Attention's arrays with heads and their width as one axis; and how many heads towers have.

    Heads are fields of `CLIP`. Raises ValueError for an array that has no heads.
    """
    merged, heads = dict(arrays), {}
    for name, array in arrays.items():
        if not (found := _HEADED.search(name)):
            continue
        if array.ndim != (axes := _AXES[found[1] == "out", found[2]]):
            raise ValueError(f"its {name} has shape {array.shape}, where {axes} axes are needed")
        if found[1] == "out":
            merged[name] = array.reshape(-1, array.shape[-1]) if axes == 3 else array
            continue
        merged[name] = array.reshape(*array.shape[:-2], -1)
        heads["text_heads" if "text/" in name else "image_heads"] = array.shape[-2]
    return merged, heads
