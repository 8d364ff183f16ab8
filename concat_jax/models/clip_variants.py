"""The sizes that OpenAI published CLIP in, as fields of `concat_jax.models.clip.CLIP`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_BASE = {
    "embed_dim": 512,
    "image_size": 224,
    "image_width": 768,
    "image_depth": 12,
    "image_heads": 12,
    "text_width": 512,
    "text_depth": 12,
    "text_heads": 8,
}
_LARGE = {
    "embed_dim": 768,
    "image_size": 224,
    "patch_size": 14,
    "image_width": 1024,
    "image_depth": 24,
    "image_heads": 16,
    "text_width": 768,
    "text_depth": 12,
    "text_heads": 12,
}

# Radford et al. 2021, table 20. Whatever is not here (MLP ratio 4, quick GELU, 77 tokens of 49408)
# is the same in all of them, and CLIP's default.
CLIP_VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ViT-B/32": {**_BASE, "patch_size": 32},
        "ViT-B/16": {**_BASE, "patch_size": 16},
        "ViT-L/14": _LARGE,
        "ViT-L/14@336": {**_LARGE, "image_size": 336},
    }
)
