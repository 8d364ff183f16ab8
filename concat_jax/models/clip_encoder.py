"""CLIP's image tower as the encoder of a segmentor, with the parameters of a "vision_model"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from concat_jax.models.clip import VisionTower, make_clip
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.segmentor_output import unnormalize_images


class ClipEncoder(VisionTower):
    """Takes the place of `ViT` in `EoMT`."""

    rotary_theta: float = 100.0  # of what turns; CLIP's own positions are learned

    def embed(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Class token and patches of images from `normalize_images`, and how they turn: not."""
        return super().embed(normalize_clip_images(unnormalize_images(images))), None

    def run(self, x: jax.Array, rotation: None, first: int, last: int) -> jax.Array:
        return super().run(x, first, last)

    def run_masked(
        self, x: jax.Array, rotation: None, index: int, allowed: jax.Array | None
    ) -> jax.Array:
        return self.layers[index](x, None, allowed)

    def norm(self, x: jax.Array) -> jax.Array:
        return self.post_layernorm(x).astype("float32")


def make_clip_encoder(fields: Mapping[str, Any]) -> ClipEncoder:
    """The encoder with the sizes of a `make_clip` config; ValueError if its tower is no ViT."""
    clip = make_clip(fields)
    if clip.image_tower != "vit":
        raise ValueError(
            f"The encoder of an EoMT is a ViT and CLIP's image tower is a {clip.image_tower}; "
            'take a variant such as "ViT-B/16".'
        )
    return ClipEncoder(**clip.vision_fields)
