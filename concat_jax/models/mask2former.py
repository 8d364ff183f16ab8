"""The segmentor: backbone, pixel decoder and transformer decoder of Mask2Former, without classes.

Source: Cheng et al., arXiv 2112.01527; Mask2Former `mask2former/maskformer_model.py`. Which class a
query holds is decided outside, from `SegmentorOutput.queries`: by text through the semantic
projector, or by `LinearClassifier` where converted weights bring a linear head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.core.config import check_choice, check_fields
from concat_jax.models.backbones import BACKBONES
from concat_jax.models.pixel_decoder import PixelDecoder
from concat_jax.models.segmentor_output import DTYPES, SegmentorOutput, normalize_images
from concat_jax.models.transformer_decoder import TransformerDecoder

# Mask2Former R50, `configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml`.
DECODERS: Mapping[str, Any] = {
    "width": 256,
    "num_queries": 100,
    "num_decoder_layers": 9,
    "num_encoder_layers": 6,
    "num_heads": 8,
    "num_points": 4,
    "ffn_width": 1024,
    "decoder_ffn_width": 2048,
    "num_groups": 32,
    "dtype": "float32",
}
DEFAULTS: Mapping[str, Any] = {
    "kind": "mask2former",
    "backbone": {"kind": "resnet"},
    **DECODERS,
    "remat": False,
    "scan_layers": False,
}


class Segmentor(nn.Module):
    """Images in, queries and mask features out. Each part has the image_size as last argument.

    Attributes:
      backbone: returns four maps [B, H/s, W/s, C_s], s = 4, 8, 16, 32.
      pixel_decoder: those maps -> (mask_features, three scales).
      transformer_decoder: (scales, mask_features) -> (queries, mask_embeddings).
    """

    backbone: nn.Module
    pixel_decoder: nn.Module
    transformer_decoder: nn.Module
    anneals = frozen = gives_clip_tokens = False
    normalize = staticmethod(normalize_images)

    @property
    def width(self) -> int:
        """Of the queries."""
        return self.transformer_decoder.width

    @property
    def num_queries(self) -> int:
        """Of an image."""
        return self.transformer_decoder.num_queries

    @staticmethod
    def query_norm(params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Scale and bias [D] of the norm that the queries come out of."""
        return params["transformer_decoder"]["decoder_norm"]

    @property
    def stride(self) -> int:
        """Pixels from one mask feature to the next."""
        return self.backbone.stride

    def __call__(self, images: jax.Array, image_size: jax.Array | None = None) -> SegmentorOutput:
        """Segment a batch of images [B, H, W, 3] float from `normalize_images`.

        `image_size` [B, 2] int32 is the (height, width) of each image's valid area at the top left;
        None where nothing is padded. The rest is padding, whatever its values: the output is that
        of the unpadded image run alone at its own size. Of the mask features the first
        ceil(height / 4) rows and ceil(width / 4) columns belong to the image; the rest is zero.
        """
        if image_size is not None:
            # At least a pixel: statistics and softmaxes over nothing would be NaN.
            image_size = jnp.clip(image_size, 1, jnp.asarray(images.shape[1:3]))
        features = self.backbone(images, image_size)
        mask_features, scales = self.pixel_decoder(features, image_size)
        queries, mask_embeddings = self.transformer_decoder(scales, mask_features, image_size)
        return SegmentorOutput(queries, mask_embeddings, mask_features)


def make_mask2former(settings: Mapping[str, Any]) -> Segmentor:
    """A Mask2Former from all its fields.

    `backbone` holds `kind` (a key of `BACKBONES`) and the fields of that backbone, as `{"kind":
    "swin", **SWIN_VARIANTS["tiny"]}`; its num_groups, remat and scan_layers are the outer ones
    unless given, its dtype always. `ffn_width` is the encoder's, `decoder_ffn_width` the decoder's.
    """
    dtype = DTYPES[settings["dtype"]]
    backbone = dict(settings["backbone"])
    kind = backbone.pop("kind", "resnet")
    check_choice(kind, BACKBONES, "Backbone kind is")
    backbone_class = BACKBONES[kind]
    what = f"The backbone config of kind {kind!r} has no key"
    check_fields(backbone, backbone_class, what, "dtype")
    for field in {"num_groups", "remat", "scan_layers"}.intersection(
        backbone_class.__dataclass_fields__
    ):
        backbone.setdefault(field, settings[field])
    backbone = {k: tuple(v) if isinstance(v, list) else v for k, v in backbone.items()}

    built_backbone = backbone_class(dtype=dtype, **backbone)
    loops = {field: settings[field] for field in ("remat", "scan_layers")}
    return Segmentor(built_backbone, **make_decoders(settings, built_backbone.stride, **loops))


def make_decoders(settings: Mapping[str, Any], stride: int, **fields: Any) -> dict[str, nn.Module]:
    """Pixel and transformer decoder, by their names in `Segmentor`; both have `fields` and the
    backbone's `stride`. ValueError for a width that cannot be divided."""
    for divisor in ("num_heads", "num_groups"):
        if settings["width"] % settings[divisor]:
            raise ValueError(
                f"The segmentor's width {settings['width']} is not divisible by {divisor} "
                f"{settings[divisor]}; change one of them."
            )
    shared = {"width": settings["width"], "num_heads": settings["num_heads"], "stride": stride}
    shared |= {"dtype": DTYPES[settings["dtype"]], **fields}
    return {
        "pixel_decoder": PixelDecoder(
            num_layers=settings["num_encoder_layers"],
            num_points=settings["num_points"],
            ffn_width=settings["ffn_width"],
            num_groups=settings["num_groups"],
            **shared,
        ),
        "transformer_decoder": TransformerDecoder(
            num_queries=settings["num_queries"],
            num_layers=settings["num_decoder_layers"],
            ffn_width=settings["decoder_ffn_width"],
            **shared,
        ),
    }
