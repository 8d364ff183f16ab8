"""What Hugging Face and OpenAI call CLIP's parameters.

Columns: `transformers.CLIPModel.state_dict()`; `openai/CLIP clip/model.py`, which open_clip took
over, where the projections to the joint space are matrices that multiply from the right.
"""

from __future__ import annotations

from concat_jax.weights.names.table import Naming, columns

VISION = "vision_model"
TEXT = "text_model"
_CLIP = """
logit_scale                      array    logit_scale    logit_scale
{visual,text}_projection         linear   {visual,text}_projection  -
{visual,text}_projection/kernel  array    -              {visual.proj,text_projection}
@ vision_model/  vision_model.  visual.
class_embedding                  array    embeddings.class_embedding            class_embedding
patch_embedding/projection       patches  embeddings.patch_embedding            conv1
position_embedding              array    embeddings.position_embedding.weight  positional_embedding
pre_layrnorm                     norm     pre_layrnorm                          ln_pre
post_layernorm                   norm     post_layernorm                        ln_post
@ text_model/  text_model.  -
token_embedding/embedding  array  embeddings.token_embedding.weight     token_embedding.weight
position_embedding         array  embeddings.position_embedding.weight  positional_embedding
final_layer_norm           norm   final_layer_norm                      ln_final
"""
_LAYER = """
layer_norm{1,2}         norm    layer_norm{1,2}         ln_{1,2}
self_attn/{q,k,v}_proj  linear  self_attn.{q,k,v}_proj  attn.in_proj_*[{0,1,2}]
self_attn/out_proj      linear  self_attn.out_proj      attn.out_proj
fc1                     linear  mlp.fc1                 mlp.c_fc
fc2                     linear  mlp.fc2                 mlp.c_proj
"""
_TABLE = (
    _CLIP
    + "@ vision_model/layers_{i}/ vision_model.encoder.layers.{i}. "
    + "visual.transformer.resblocks.{i}."
    + _LAYER
    + "@ text_model/layers_{i}/ text_model.encoder.layers.{i}. transformer.resblocks.{i}."
    + _LAYER
)
# Sizes that OpenAI's files hold as numbers.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
# Last parts of the names of what is no parameter: index vectors (0, 1, 2, ...) that transformers
# stored before version 4.31, those sizes, and the causal mask, one or one a layer.
_BUFFERS = rf"(^|\.)(position_ids|attn_mask|{'|'.join(OPENAI_SIZES)})$"

_hf, _openai = columns(_TABLE, "", "", "")
HUGGING_FACE = Naming(_hf, _BUFFERS)
# open_clip keeps the text tower of its newer class under "text."; inside, names are the same.
OPENAI = Naming(_openai, _BUFFERS, ((r"^text\.", ""),))
