"""FC-CLIP: Mask2Former's decoders on a frozen convolutional CLIP, and that CLIP over their masks.

Source: Yu et al., "Convolutions Die Hard", arXiv 2308.02487; `bytedance/fc-clip fcclip/fcclip.py`
and `modeling/transformer_decoder/fcclip_transformer_decoder.py`. Whatever names are asked for, the
network is the same: what they are compared with are two vectors a query, and comparing them is for
`inference.heads.EnsembleHead`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.models.clip import CLIP, make_clip
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.clip_pooling import STRIDE, make_conv_tower, masked_mean
from concat_jax.models.mask2former import DECODERS, Segmentor, make_decoders
from concat_jax.models.ops.linear import Dense
from concat_jax.models.ops.valid_area import resize_within, valid_size
from concat_jax.models.pixel_decoder import NORM_EPSILON
from concat_jax.models.segmentor_output import (
    ClipEmbeddings,
    SegmentorOutput,
    mask_logits,
)

# `configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml`.
DEFAULTS: Mapping[str, Any] = {
    "kind": "fcclip",
    "clip": {"variant": "convnext_large_d_320"},
    **DECODERS,
    "num_queries": 250,
}


class FCCLIP(Segmentor):
    """Images in; of the last prediction set alone queries, masks and CLIP's embeddings of them.

    Attributes:
      backbone, pooling: the two parts of CLIP's image tower, see `make_conv_tower`.
    """

    pooling: nn.Module
    frozen = True
    normalize = staticmethod(normalize_clip_images)

    @nn.compact
    def __call__(self, images: jax.Array, image_size: jax.Array | None = None) -> SegmentorOutput:
        """As `Segmentor`, of images from `normalize_clip_images`.

        To the decoder's queries is added what the mask features are inside their masks, so that
        they tell of what is there and not of where alone.
        """
        if image_size is not None:
            image_size = jnp.clip(image_size, 1, jnp.asarray(images.shape[1:3]))
        maps = jax.lax.stop_gradient(self.backbone(images, image_size))
        features, scales = self.pixel_decoder(maps, image_size)
        queries, embeddings = self.transformer_decoder(scales, features, image_size)
        queries, embeddings = queries[:, -1:], embeddings[:, -1:]

        def inside(features: jax.Array) -> jax.Array:  # [B, N, h, w] bool
            return mask_logits(embeddings[:, 0], features) > 0

        where = inside(features)  # beyond the image the features are zero
        flat = features.reshape(features.shape[0], -1, features.shape[-1])
        pooled = masked_mean(flat, where.reshape(*where.shape[:2], -1))
        norm = nn.LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, name="mask_pooling_norm")
        project = Dense(self.width, dtype=jnp.float32, name="mask_pooling_projection")
        queries = queries + project(norm(pooled))[:, None]

        size = valid_size(image_size, STRIDE)
        height, width = maps[-1].shape[1:3]
        finest = valid_size(image_size, self.stride)
        # Logits are linear in the features, and so is the resize.
        small = inside(resize_within(features, finest, height, width, size))
        clip = self.pooling(maps[-1], small, size)
        seen = ClipEmbeddings(clip, small.any(axis=(2, 3)))
        return SegmentorOutput(queries, embeddings, features, clip=seen)


def tower_of(settings: Mapping[str, Any]) -> CLIP:
    """The CLIP whose image tower a config of kind "fcclip" has; its text tower means nothing."""
    clip = make_clip({**settings["clip"], "dtype": settings["dtype"]})
    if clip.image_tower == "vit":
        raise ValueError("FC-CLIP's tower is convolutional; set clip to have variant='RN50', say.")
    return clip


def make_fcclip(settings: Mapping[str, Any]) -> FCCLIP:
    """An FC-CLIP from all its fields; `clip` holds those of `make_clip`."""
    backbone, pooling = make_conv_tower(tower_of(settings))
    return FCCLIP(backbone, pooling=pooling, **make_decoders(settings, backbone.stride))
