"""What Hugging Face and Detectron2 call a Mask2Former's parameters, and ImageNet its backbone's.

Sources: `transformers` `models/mask2former/modeling_mask2former.py`, by the names of the published
files, and Mask2Former `mask2former/modeling/`, on which PADing is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concat_jax.weights.backbones import FORMATS, PREFIX, BackboneFormat
from concat_jax.weights.names.table import Naming, columns

# Values of the segmentor that other code bases have no field for.
OURS_FIXED = {"num_points": 4, "num_groups": 32}

# Columns: Hugging Face, Detectron2.
_HEADS = """
@ classifier/  -  sem_seg_head.predictor.
class_embed                linear  class_predictor         class_embed
@ segmentor/pixel_decoder/  model.pixel_level_module.decoder.  sem_seg_head.pixel_decoder.
level_embedding            array   level_embed              transformer.level_embed
input_projection_{i}       conv    input_projections.{i}.0  input_proj.{i}.0
input_norm_{i}             norm    input_projections.{i}.1  input_proj.{i}.1
lateral_projection         conv    adapter_1.0              adapter_1
lateral_norm               norm    adapter_1.1              adapter_1.norm
output_conv                conv    layer_1.0                layer_1
output_norm                norm    layer_1.1                layer_1.norm
mask_projection            conv    mask_projection          mask_features
@ segmentor/pixel_decoder/layer_{i}/  model.pixel_level_module.decoder.encoder.layers.{i}. \
  sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}.
self_attention/sampling_offsets   linear  self_attn.sampling_offsets   =
self_attention/attention_weights  linear  self_attn.attention_weights  =
self_attention/value_projection   linear  self_attn.value_proj         =
self_attention/output_projection  linear  self_attn.output_proj        =
self_attention_norm               norm    self_attn_layer_norm         norm1
ffn_{in,out}                      linear  fc{1,2}                      linear{1,2}
ffn_norm                          norm    final_layer_norm             norm2
@ segmentor/transformer_decoder/  model.transformer_module.  sem_seg_head.predictor.
query_feature_embedding    array   queries_features.weight  query_feat.weight
query_position_embedding   array   queries_embedder.weight  query_embed.weight
level_embedding            array   level_embed.weight       level_embed.weight
decoder_norm               norm    decoder.layernorm        decoder_norm
mask_mlp_{i}  linear  decoder.mask_predictor.mask_embedder.{i}.0  mask_embed.layers.{i}
@ segmentor/transformer_decoder/layer_{i}/cross_attention \
  model.transformer_module.decoder.layers.{i}.cross_attn \
  sem_seg_head.predictor.transformer_cross_attention_layers.{i}.
/{query,key,value}         linear  .in_proj_*[{0,1,2}]  multihead_attn.in_proj_*[{0,1,2}]
/output                    linear  .out_proj            multihead_attn.out_proj
_norm                      norm    _layer_norm          norm
@ segmentor/transformer_decoder/layer_{i}/self_attention \
  model.transformer_module.decoder.layers.{i}.self_attn \
  sem_seg_head.predictor.transformer_self_attention_layers.{i}.
/{query,key,value}         linear  .{q,k,v}_proj        self_attn.in_proj_*[{0,1,2}]
/output                    linear  .out_proj            self_attn.out_proj
_norm                      norm    _layer_norm          norm
@ segmentor/transformer_decoder/layer_{i}/ffn_  model.transformer_module.decoder.layers.{i}. \
  sem_seg_head.predictor.transformer_ffn_layers.{i}.
{in,out}                   linear  fc{1,2}              linear{1,2}
norm                       norm    final_layer_norm     norm
"""
# What FC-CLIP (`fcclip/modeling/transformer_decoder`) has for a class head.
_FCCLIP = """
@ projector/  sem_seg_head.predictor.
layer_{i}            linear  class_embed.layers.{i}
log_scale            array   logit_scale
@ -  -
projector/no_object_embedding    array   void_embedding.weight
@ segmentor/mask_pooling_  sem_seg_head.predictor._mask_pooling_proj.
norm                 norm    0
projection           linear  1
"""
# Modules that PADing adds at the top for its second stage (`PADing/PADing_model.py`): a generator
# of queries with its losses' networks, and the classifier trained on what it generates.
PADING_MODULES = (
    "new_fc",
    "fc_projection",
    "dict_feature",
    "generator",
    "projection_related",
    "projection_unrelated",
    "relation",
    "decoder",
)
# Bookkeeping, and weights that no output depends on.
_BOOKKEEPING = r"\.(num_batches_tracked|relative_position_index)$|criterion\.empty_weight$"

# What a Swin's layers are called in memory, since transformers 5.
_SWIN_IN_MEMORY = (
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

_HF_HEADS, _DETECTRON2_HEADS = columns(_HEADS, "", "", "")


def backbone_format(backbone: Mapping[str, Any]) -> BackboneFormat:
    """The format of a backbone of our config; ValueError where other code bases have none such."""
    kind = backbone.get("kind", "resnet")
    if kind not in FORMATS:
        raise ValueError(
            f"Other code bases have backbones of kind {' or '.join(FORMATS)}, but the config has "
            f"{kind!r}; change it."
        )
    for field, needed in FORMATS[kind].needed:
        if backbone.get(field, needed) != needed:
            raise ValueError(
                f"Other code bases have backbones with {field} {needed!r}, but the config has "
                f"{backbone[field]!r}; change it."
            )
    return FORMATS[kind]


def hugging_face(backbone: Mapping[str, Any]) -> Naming:
    """Hugging Face's names, for a backbone of our config; errors as `backbone_format`."""
    table = backbone_format(backbone).table
    rows, *_ = columns(table, PREFIX, "model.pixel_level_module.encoder.", "", "")
    return Naming(
        rows + _HF_HEADS,
        # A Swin carries the final norm of its classifier.
        rf"{_BOOKKEEPING}|\.encoder\.swin\.layernorm\.(weight|bias)$",
        (
            # Of a Mask2FormerModel, which has no class head around it.
            (r"^(pixel_level_module|transformer_module)\.", r"model.\1."),
            (r"^(model\.pixel_level_module\.encoder)\.swin\.", r"\1."),
            *_SWIN_IN_MEMORY,
        ),
    )


def detectron2(kind: str) -> Naming:
    """Detectron2's names, for a kind of backbone."""
    rows = columns(FORMATS[kind].table, PREFIX, "", "backbone.", "")[1]
    return Naming(
        rows + _DETECTRON2_HEADS,
        rf"{_BOOKKEEPING}|^pixel_(mean|std)$|^({'|'.join(PADING_MODULES)})\.",
        (
            # The learned queries were once `static_query`, and the pixel decoder's modules once lay
            # directly in the head (the reference's `_load_from_state_dict`).
            (r"^(sem_seg_head\.predictor)\.static_query\.", r"\1.query_feat."),
            (r"^sem_seg_head\.(?!pixel_decoder\.|predictor)", "sem_seg_head.pixel_decoder."),
        ),
    )


def fcclip() -> Naming:
    """FC-CLIP's names of all but its CLIP."""
    rows = (*_DETECTRON2_HEADS, *columns(_FCCLIP, "", "")[0])
    return Naming(rows, rf"{_BOOKKEEPING}|^pixel_(mean|std)$")


def imagenet(kind: str) -> tuple[Naming, ...]:
    """The names of classifiers of ImageNet: their own, Detectron2's and Hugging Face's.

    The second are those of Detectron2's `tools/convert-torchvision-to-d2.py`. The last layers are
    ignored, and tables that follow from the sizes.
    """
    hub, converted, own = columns(FORMATS[kind].table, PREFIX, f"{kind}.", "", "")
    ignored = rf"{_BOOKKEEPING}|^(stem\.)?(fc|head|norm)\.(weight|bias)$|\.attn_mask$"
    # Hugging Face's have nothing in front where there is no classifier around them.
    bare = (r"^(?=(embedder|embeddings|encoder|layernorm)\.)", f"{kind}.")
    return (
        *(Naming(rows, ignored, ((r"^backbone\.", ""),)) for rows in (own, converted)),
        Naming(
            hub,
            rf"{_BOOKKEEPING}|^classifier\.|^({kind}\.)?layernorm\.",
            (bare, *_SWIN_IN_MEMORY),
        ),
    )
