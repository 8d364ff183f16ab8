"""What Hugging Face, OpenAI and open_clip call CLIP's parameters.

Columns: `transformers.CLIPModel.state_dict()`; `openai/CLIP clip/model.py`, which open_clip took
over, where the projections to the joint space are matrices that multiply from the right. The
convolutional image towers are OpenAI's ResNet there, and timm's ConvNeXt in open_clip.
"""

from __future__ import annotations

from collections.abc import Collection

from concat_jax.weights.names.table import Naming, columns

VISION = "vision_model"
TEXT = "text_model"
BACKBONE, POOLING = f"{VISION}/backbone/", f"{VISION}/pooling/"
_TEXT = """
logit_scale             array   logit_scale      logit_scale
text_projection         linear  text_projection  -
text_projection/kernel  array   -                text_projection
@ text_model/  text_model.  -
token_embedding/embedding  array  embeddings.token_embedding.weight     token_embedding.weight
position_embedding         array  embeddings.position_embedding.weight  positional_embedding
final_layer_norm           norm   final_layer_norm                      ln_final
@ text_model/layers_{i}/ text_model.encoder.layers.{i}. transformer.resblocks.{i}.
"""
_VISION = """
@ -  -  -
visual_projection         linear  visual_projection  -
visual_projection/kernel  array   -                  visual.proj
@ vision_model/  vision_model.  visual.
class_embedding                  array    embeddings.class_embedding            class_embedding
patch_embedding/projection       patches  embeddings.patch_embedding            conv1
position_embedding              array    embeddings.position_embedding.weight  positional_embedding
pre_layrnorm                     norm     pre_layrnorm                          ln_pre
post_layernorm                   norm     post_layernorm                        ln_post
@ vision_model/layers_{i}/ vision_model.encoder.layers.{i}. visual.transformer.resblocks.{i}.
"""
_LAYER = """
layer_norm{1,2}         norm    layer_norm{1,2}         ln_{1,2}
self_attn/{q,k,v}_proj  linear  self_attn.{q,k,v}_proj  attn.in_proj_*[{0,1,2}]
self_attn/out_proj      linear  self_attn.out_proj      attn.out_proj
fc1                     linear  mlp.fc1                 mlp.c_fc
fc2                     linear  mlp.fc2                 mlp.c_proj
"""
_RESNET = """
@ vision_model/backbone/  visual.
stem_conv{1,2,3}  conv    conv{1,2,3}
stem_norm{1,2,3}  frozen  bn{1,2,3}
@ vision_model/backbone/res{s+1}_block{b}/  visual.layer{s}.{b}.
conv{1,2,3}       conv    conv{1,2,3}
norm{1,2,3}       frozen  bn{1,2,3}
shortcut          conv    downsample.0
shortcut_norm     frozen  downsample.1
@ vision_model/pooling/  visual.attnpool.
positions         array   positional_embedding
{q,k,v,c}_proj    linear  {q,k,v,c}_proj
"""
_CONVNEXT = """
@ vision_model/backbone/  visual.trunk.stem.
stem_conv         conv    0
stem_norm         norm    1
@ vision_model/backbone/stage{s}_  visual.trunk.stages.{s}.downsample.
merge_norm        norm    0
merge_conv        conv    1
@ vision_model/backbone/stage{s}_block{b}/  visual.trunk.stages.{s}.blocks.{b}.
layer_scale       array   gamma
conv              conv    conv_dw
norm              norm    norm
fc{1,2}           linear  mlp.fc{1,2}
@ vision_model/pooling/  visual.
norm              norm    trunk.head.norm
fc{1,2}           linear  head.mlp.fc{1,2}
projection        linear  head.proj
"""
_TOWERS = {"resnet": _RESNET, "convnext": _CONVNEXT}
# An array that only such a tower has.
FIRSTS = {
    "resnet": "visual.attnpool.positional_embedding",
    "convnext": "visual.trunk.stem.0.weight",
}
# Sizes that OpenAI's files hold as numbers.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
# Last parts of the names of what is no parameter: index vectors (0, 1, 2, ...) that transformers
# stored before version 4.31, those sizes, the causal mask, one or one a layer, and the counters of
# torch's norms.
_BUFFERS = rf"(^|\.)(position_ids|attn_mask|num_batches_tracked|{'|'.join(OPENAI_SIZES)})$"

_hf, _openai = columns(_TEXT + _LAYER + _VISION + _LAYER, "", "", "")
HUGGING_FACE = Naming(_hf, _BUFFERS)
# open_clip keeps the text tower of its newer class under "text."; inside, names are the same.
_SPELLINGS = ((r"^text\.", ""),)
OPENAI = Naming(_openai, _BUFFERS, _SPELLINGS)


def tower_of(names: Collection[str]) -> str:
    """`CLIP.image_tower` of a CLIP with OpenAI's or open_clip's names."""
    return next((tower for tower, first in FIRSTS.items() if first in names), "vit")


def conv_clip(tower: str) -> Naming:
    """OpenAI's or open_clip's names of a CLIP with a convolutional image tower."""
    _, text = columns(_TEXT + _LAYER, "", "", "")
    (vision,) = columns(_TOWERS[tower], "", "")
    return Naming(text + vision, _BUFFERS, _SPELLINGS)
