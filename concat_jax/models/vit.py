"""Plain vision transformers as encoders of a segmentor: DINOv2, DINOv3 and CLIP's image tower.

Oquab et al., arXiv 2304.07193; registers of Darcet et al., arXiv 2309.16588; Siméoni et al.,
arXiv 2508.10104. Sources: `transformers` `models/dinov2_with_registers` and `models/dinov3_vit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.config import Count, Positive
from concat_jax.models.clip import VisionTower, make_clip
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.ops.layers_in_turn import Run, run_in_turn
from concat_jax.models.ops.linear import Dense
from concat_jax.models.ops.transformer_block import Block, layer_norm
from concat_jax.models.segmentor_output import unnormalize_images

Rotation = tuple[np.ndarray, np.ndarray]

# The published sizes, and what the families differ in.
_SIZES = {
    "small": dict(width=384, depth=12, num_heads=6, ffn_width=1536),
    "base": dict(width=768, depth=12, num_heads=12, ffn_width=3072),
    "large": dict(width=1024, depth=24, num_heads=16, ffn_width=4096),
}
_FAMILIES = {
    "dinov2": dict(patch_size=14, num_registers=4, grid=37),
    "dinov3": dict(
        patch_size=16, num_registers=4, positions="rotary", key_bias=False, norm_epsilon=1e-5
    ),
}
VIT_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    f"{family}-{size}": {**fields, **own}
    for family, own in _FAMILIES.items()
    for size, fields in _SIZES.items()
}


def rotations(rows: int, columns: int, channels: int, theta: float) -> Rotation:
    """DINOv3's axial rotary positions: cosines and sines [rows * columns, channels / 2] float32.

    Patch centres lie in -1..1 on both axes, whatever the grid. The first half of the angles is the
    row's, the second the column's, each at channels / 4 wavelengths up to `theta`.
    """
    frequencies = 1 / theta ** (np.arange(0, 1, 4 / channels, dtype=np.float32))
    centres = [2 * (np.arange(n, dtype=np.float32) + 0.5) / n - 1 for n in (rows, columns)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (2 * np.pi * grid[:, :, None] * frequencies).reshape(len(grid), -1)
    return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)


class ViT(nn.Module):
    """Patches, a class token, registers and pre-norm blocks; the defaults are EoMT's DINOv2-L.

    Its parts are methods, for a segmentor that adds tokens of its own before some block.

    Attributes:
      num_registers: tokens without a meaning of their own, after the class token.
      positions: "learned", a table that is added to the patches; or "rotary", of DINOv3.
      grid: side of the learned table, resized to an image's own (bicubic, antialiased).
      rotary_theta: the longest wavelength of rotary positions.
      key_bias, layer_scale, norm_epsilon: see `Block`.
      remat: recompute each block in the backward pass instead of storing it.
      scan_layers: compile one block and run it in a loop, see `run_in_turn`.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    ffn_width: int = 4096
    patch_size: int = 16
    num_registers: Count = 4
    positions: str = "learned"
    grid: int = 40
    rotary_theta: Positive = 100.0
    key_bias: bool = True
    layer_scale: bool = True
    norm_epsilon: float = 1e-6
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.patch_projection = Dense(self.width, kernel_init=normal, dtype=self.dtype)
        self.class_token = self.param("class_token", normal, (1, self.width))
        if self.num_registers:
            shape = (self.num_registers, self.width)
            self.register_tokens = self.param("register_tokens", normal, shape)
        if self.positions == "learned":
            shape = (self.grid**2, self.width)
            self.position_embedding = self.param("position_embedding", normal, shape)
        block = nn.remat(Block) if self.remat else Block
        self.blocks = [
            block(
                num_heads=self.num_heads,
                depth=self.depth,
                ffn_width=self.ffn_width,
                activation="gelu",
                key_bias=self.key_bias,
                layer_scale=self.layer_scale,
                norm_epsilon=self.norm_epsilon,
                dtype=self.dtype,
            )
            for _ in range(self.depth)
        ]
        # Float32 whatever the compute type: what follows are queries, and losses.
        self.norm = layer_norm(jnp.float32, epsilon=self.norm_epsilon)

    def embed(self, images: jax.Array) -> tuple[jax.Array, Rotation | None]:
        """Tokens [B, 1 + registers + patches, D] of images [B, H, W, 3], and how patches turn.

        Raises ValueError for sides that the patch size does not divide.
        """
        p = self.patch_size
        batch, height, width, channels = images.shape
        if height % p or width % p:
            raise ValueError(
                f"A ViT got images of {height} x {width}; give sides divisible by its patch size "
                f"{p}."
            )
        rows, columns = height // p, width // p
        patches = images.astype(self.dtype).reshape(batch, rows, p, columns, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = self.patch_projection(patches)
        if self.positions == "learned":
            table = self.position_embedding.reshape(self.grid, self.grid, self.width)
            if (rows, columns) != (self.grid, self.grid):
                shape = (rows, columns, self.width)
                table = jax.image.resize(table, shape, "bicubic", antialias=True)
            x = x + table.reshape(-1, self.width).astype(self.dtype)
        prefix = self.class_token
        if self.num_registers:
            prefix = jnp.concatenate([prefix, self.register_tokens])
        prefix = jnp.broadcast_to(prefix.astype(self.dtype), (batch, *prefix.shape))
        x = jnp.concatenate([prefix, x], axis=1)
        if self.positions == "learned":
            return x, None
        return x, rotations(rows, columns, self.width // self.num_heads, self.rotary_theta)

    def run(self, x: jax.Array, rotation: Rotation | None, first: int, last: int) -> jax.Array:
        """Blocks `first` to `last` - 1 on tokens [B, L, D], of which the patches are the last."""
        return self.in_turn(lambda blocks, x: (blocks[0](x, rotation), None), x, first, last)[0]

    def in_turn(self, run: Run, carry: Any, first: int, last: int) -> tuple[Any, list[Any]]:
        """`run_in_turn` over blocks `first` to `last` - 1, one a round."""
        rounds = [[block] for block in self.blocks[first:last]]
        return run_in_turn(self, rounds, run, carry, scan=self.scan_layers)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised tokens [B, 1 + registers + patches, D] float32 of images [B, H, W, 3]."""
        x, rotation = self.embed(images)
        return self.norm(self.run(x, rotation, 0, self.depth))


class ClipEncoder(VisionTower):
    """CLIP's image tower in the place of `ViT`, with the parameters of a "vision_model"."""

    rotary_theta: float = 100.0  # of what turns; CLIP's own positions are learned

    def embed(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Class token and patches of images from `normalize_images`, and how they turn: not."""
        return super().embed(normalize_clip_images(unnormalize_images(images))), None

    def run(self, x: jax.Array, rotation: None, first: int, last: int) -> jax.Array:
        return super().run(x, first, last)

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
