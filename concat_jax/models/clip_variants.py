"""The sizes of published CLIPs as fields of `CLIP`.

OpenAI's are of Radford et al. 2021, tables 19 and 20, the ConvNeXts of open_clip `model_configs/`.
What is not here (MLP ratio 4, quick GELU of OpenAI's, 77 tokens of 49408) is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concat_jax.models.clip_pooling import STRIDE, resnet_heads

_BASE = dict(embed_dim=512, image_size=224, image_width=768, image_depth=12, image_heads=12)
_BASE |= dict(text_width=512, text_depth=12, text_heads=8)
_LARGE = dict(embed_dim=768, image_size=224, image_width=1024, image_depth=24, image_heads=16)
_LARGE |= dict(text_width=768, text_depth=12, text_heads=12, patch_size=14)


def _conv(
    tower: str, embed_dim: int, image_size: int, stages: tuple[int, ...], width: int, text: int
) -> dict[str, Any]:
    sizes = dict(embed_dim=embed_dim, image_size=image_size, image_stages=stages)
    sizes |= dict(image_tower=tower, image_width=width, patch_size=STRIDE)
    return sizes | dict(text_width=text, text_depth=12, text_heads=text // 64)


def _resnet(*sizes: Any) -> dict[str, Any]:
    fields = _conv("resnet", *sizes)
    return fields | dict(image_heads=resnet_heads(fields["image_width"]))


def _convnext(
    embed_dim: int, image_size: int, width: int, projection: str, text: int, depth: int
) -> dict[str, Any]:
    fields = _conv("convnext", embed_dim, image_size, (3, 3, 27, 3), width, text)
    return fields | dict(projection=projection, text_depth=depth, activation="gelu")


CLIP_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "ViT-B/32": {**_BASE, "patch_size": 32},
    "ViT-B/16": {**_BASE, "patch_size": 16},
    "ViT-L/14": _LARGE,
    "ViT-L/14@336": {**_LARGE, "image_size": 336},
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "convnext_base": _convnext(512, 224, 128, "linear", 512, 12),
    "convnext_base_w": _convnext(640, 256, 128, "linear", 640, 12),
    "convnext_base_w_320": _convnext(640, 320, 128, "linear", 640, 12),
    "convnext_large_d": _convnext(768, 256, 192, "mlp", 768, 16),
    "convnext_large_d_320": _convnext(768, 320, 192, "mlp", 768, 16),
}
