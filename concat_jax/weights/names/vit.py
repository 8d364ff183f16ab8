"""What Hugging Face calls the parameters of EoMT and of the plain ViTs that it is made of.

Sources: `transformers` `models/eomt`, `eomt_dinov3`, `dinov2`, `dinov2_with_registers` and
`dinov3_vit`, by the names of the published files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from concat_jax.weights.names.table import Naming, columns

# Columns: EoMT, EoMT on DINOv3, DINOv2, DINOv3; the rows of an MLP follow.
_VIT = """
@ segmentor/backbone/  -  =  =  =
class_token          tokens   embeddings.cls_token                    =  =  =
register_tokens      tokens   embeddings.register_tokens              =  =  =
position_embedding   array    embeddings.position_embeddings.weight   -  -  -
position_embedding   tokens   -  -  embeddings.position_embeddings    -
patch_projection     patches  embeddings.patch_embeddings.projection  embeddings.patch_embeddings \
  embeddings.patch_embeddings.projection  embeddings.patch_embeddings
norm                 norm     layernorm   =   =   norm
@ segmentor/backbone/blocks_{i}/  layers.{i}.  =  encoder.layer.{i}.  layer.{i}.
layer_norm{1,2}         norm    norm{1,2}               =  =  =
layer_scale{1,2}        array   layer_scale{1,2}.lambda1  =  =  =
self_attn/{q,k,v}_proj  linear  attention.{q,k,v}_proj  = \
  attention.attention.{query,key,value}  attention.{q,k,v}_proj
self_attn/out_proj      linear  attention.out_proj  attention.o_proj \
  attention.output.dense  attention.o_proj
fc{1,2}  linear  mlp.fc{1,2}  mlp.{up,down}_proj  mlp.fc{1,2}  mlp.{up,down}_proj
"""
_HEADS = """
@ classifier/  -
class_embed              linear  class_predictor
@ segmentor/  -
query_embedding          array   query.weight
mask_mlp_{0,1,2}         linear  mask_head.fc{1,2,3}
@ segmentor/upscales_{i}/  upscale_block.block.{i}.
spread_kernel            transposed  conv1.weight
spread_bias              array       conv1.bias
around_kernel            filter      conv2.weight
norm                     norm        layernorm2d
"""
FAMILIES = ("eomt", "eomt_dinov3", "dinov2", "dinov3")
# Buffers, the token of pixels that pretraining hides, and what classifies ImageNet.
_IGNORED = r"^(attn_mask_probs|criterion\.empty_weight|embeddings\.mask_token|classifier\.\w+)$"
# Names in memory (transformers 5) of what the files call otherwise.
_SPELLINGS = {
    "dinov2": (
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    "dinov3": ((r"^model\.layer\.", "layer."),),
}


def hugging_face(family: str) -> Naming:
    """The names of one of `FAMILIES`."""
    rows = columns(_VIT, *[""] * 5)[FAMILIES.index(family)]
    if family.startswith("eomt"):
        (heads,) = columns(_HEADS, "", "")
        rows += heads
    return Naming(rows, _IGNORED, _SPELLINGS.get(family, ()))


def as_segmentors(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a DINOv2 as a segmentor has them.

    What a classifier around it puts before the names is taken off, and the class token's position
    becomes part of the token.
    """
    arrays = {re.sub(r"^dinov2(_with_registers)?\.", "", name): a for name, a in arrays.items()}
    table, token = "embeddings.position_embeddings", "embeddings.cls_token"
    if table in arrays and token in arrays:
        arrays[token] = arrays[token] + arrays[table][:, :1]
        arrays[table] = arrays[table][:, 1:]
    return arrays
