"""CLIP's two towers in flax.linen.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
sections 2.4-2.5; layer for layer `openai/CLIP clip/model.py`. Submodules carry the names of the
Hugging Face checkpoints (`transformers models/clip/modeling_clip.py`), so that
`concat_jax.weights.clip` needs little but rename tables; the convolutional image towers, which
those do not have, are in `clip_pooling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.core.config import Positive, check_choice, check_fields
from concat_jax.models.clip_pooling import (
    CONV_TOWERS,
    PROJECTIONS,
    STRIDE,
    ConvTower,
    make_conv_tower,
    resnet_heads,
)
from concat_jax.models.clip_stems import STEMS
from concat_jax.models.ops.layers_in_turn import Run, run_in_turn
from concat_jax.models.ops.transformer_block import ACTIVATIONS, Block, layer_norm

# The largest multiplier CLIP lets its similarities have (section 2.5), kept against instability.
MAX_LOGIT_SCALE = 100.0
# "equivalent of 0.07" in section 2.5: the temperature that training starts from.
INITIAL_LOGIT_SCALE = 1.0 / 0.07

# The sizes that OpenAI published (Radford et al. 2021, tables 19 and 20) and those of open_clip's
# ConvNeXts (`model_configs/`) as fields of `CLIP`. What is not here is the default.
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


def interpolate_positions(
    table: jax.Array, grid: tuple[int, int], target: tuple[int, int], method: str
) -> jax.Array:
    """Learned positions of a class token and a patch grid, resampled for another grid.

    As `open_clip resize_pos_embed`: the class token's row is kept, the grid is resized with
    antialiasing and half-pixel centres (torch `interpolate(mode="bicubic", antialias=True)` gives
    the same numbers). `table` is [1 + h * w, D], row 0 the class token's, then the grid (h, w) in
    row-major order.
    """
    if grid == target:
        return table
    width = table.shape[-1]
    patches = table[1:].reshape(*grid, width)
    patches = jax.image.resize(patches, (*target, width), method, antialias=True)
    return jnp.concatenate([table[:1], patches.reshape(-1, width)])


class _Tower(nn.Module):
    """What both towers have."""

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    activation: str
    scan_layers: bool
    dtype: Any

    def make_blocks(self, is_causal: bool) -> list[Block]:
        """The blocks, to be called in `setup`."""
        return [
            Block(
                num_heads=self.num_heads,
                depth=self.depth,
                ffn_width=self.ffn_width,
                activation=self.activation,
                is_causal=is_causal,
                dtype=self.dtype,
            )
            for _ in range(self.depth)
        ]

    @property
    def ffn_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    def run(self, x: jax.Array, first: int, last: int) -> jax.Array:
        """Blocks `first` to `last` - 1, [B, L, D] -> [B, L, D]."""
        return self.in_turn(lambda blocks, x: (blocks[0](x), None), x, first, last)[0]

    def in_turn(self, run: Run, carry: Any, first: int, last: int) -> tuple[Any, list[Any]]:
        """`run_in_turn` over blocks `first` to `last` - 1, one a round."""
        rounds = [[block] for block in self.layers[first:last]]
        return run_in_turn(self, rounds, run, carry, scan=self.scan_layers)


class VisionTower(_Tower):
    """ViT up to the normalised class token, [B, H, W, 3] -> [B, D]."""

    image_size: int
    patch_size: int
    stem: str
    position_interpolation: str

    def setup(self) -> None:
        side = self.image_size // self.patch_size
        scale = nn.initializers.normal(self.width**-0.5)
        self.patch_embedding = STEMS[self.stem](self.patch_size, self.width, self.dtype)
        self.class_embedding = self.param("class_embedding", scale, (self.width,))
        shape = (1 + side * side, self.width)
        self.position_embedding = self.param("position_embedding", scale, shape)
        self.pre_layrnorm = layer_norm(self.dtype)  # the checkpoints' own spelling
        self.layers = self.make_blocks(is_causal=False)
        self.post_layernorm = layer_norm(self.dtype)

    def embed(self, images: jax.Array) -> jax.Array:
        """Class token and patches [B, 1 + P, D] before the first block."""
        side = self.image_size // self.patch_size
        x = self.patch_embedding(images.astype(self.dtype))
        batch, rows, columns, width = x.shape
        table = interpolate_positions(
            self.position_embedding, (side, side), (rows, columns), self.position_interpolation
        )
        cls = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (batch, 1, width))
        x = jnp.concatenate([cls, x.reshape(batch, rows * columns, width)], axis=1)
        return self.pre_layrnorm(x + table.astype(self.dtype))

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.post_layernorm(self.run(self.embed(images), 0, self.depth)[:, 0])

    def regions(self, tokens: jax.Array, inside: jax.Array) -> jax.Array:
        """Normalised class tokens [B, R, D] that saw a region each in the last block.

        From tokens [B, 1 + P, D] before that block, and which patches are inside, [B, R, P] bool.
        With all of them it is what `__call__` gives.
        """
        batch, number, _ = inside.shape
        cls = jnp.broadcast_to(tokens[:, :1], (batch, number, tokens.shape[-1]))
        x = jnp.concatenate([cls, tokens[:, 1:]], axis=1)
        own = jnp.broadcast_to(jnp.eye(number, dtype=bool), (batch, number, number))
        allowed = jnp.concatenate([own, inside], axis=2)
        return self.post_layernorm(self.layers[-1](x, None, allowed)[:, :number])


class TextTower(_Tower):
    """Causal transformer up to the normalised end-of-text token, [M, L] int32 -> [M, D]."""

    vocab_size: int
    context_length: int
    eot_id: int | None

    def setup(self) -> None:
        embedding = nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(
            self.vocab_size, self.width, embedding_init=embedding, dtype=self.dtype
        )
        shape = (self.context_length, self.width)
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.01), shape
        )
        self.layers = self.make_blocks(is_causal=True)
        self.final_layer_norm = layer_norm(self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.position_embedding[: tokens.shape[1]]
        x = self.token_embedding(tokens) + positions.astype(self.dtype)
        x = self.final_layer_norm(self.run(x, 0, self.depth))
        eot = jnp.argmax(tokens if self.eot_id is None else tokens == self.eot_id, axis=1)
        return jnp.take_along_axis(x, eot[:, None, None], axis=1)[:, 0]


class CLIP(nn.Module):
    """CLIP with image and text tower; the defaults are OpenAI's ViT-B/16.

    Build it with `make_clip`, which checks the fields. Attributes:
      embed_dim: C, width of the joint space.
      image_tower: "vit", or one of `CONV_TOWERS`: "resnet" (OpenAI's) and "convnext" (open_clip's),
        which read `image_stages`, `image_width` (of the first stage), the first `image_heads` and
        the second `projection`, and have 32 for `patch_size`.
      image_size: native picture side; other sizes interpolate the positions.
      patch_size: pixels a token; a power of two for the "conv" stem, 2 to 16 for "resnet".
      image_stages: blocks of each stage of a convolutional tower.
      projection: "linear" or "mlp", of a ConvNeXt to the joint space.
      image_mlp_ratio, text_mlp_ratio: hidden width of the MLPs over the tower's width.
      activation: "quick_gelu" (OpenAI's weights) or "gelu" (exact; most OpenCLIP weights).
      stem: "patch" (CLIP's), "conv" (small pictures from scratch, see `ConvStem`) or "resnet" (also
        small; a segmentor's backbone can start from it, see `ResNetStem`).
      eot_id: pool the text at the first occurrence of this id; None pools at the largest id of the
        row, as OpenAI's code does. A row without `eot_id` is pooled at its first token.
      position_interpolation: "bicubic" or "bilinear", for pictures of another size.
      scan_layers: compile one of a tower's blocks and run it in a loop, see `run_in_turn`.
    """

    embed_dim: int = 512
    image_tower: str = "vit"
    image_size: int = 224
    patch_size: int = 16
    image_stages: Sequence[int] = ()
    projection: str = "linear"
    image_width: int = 768
    image_depth: int = 12
    image_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    image_mlp_ratio: Positive = 4.0
    text_mlp_ratio: Positive = 4.0
    activation: str = "quick_gelu"
    stem: str = "patch"
    eot_id: int | None = None
    position_interpolation: str = "bicubic"
    scan_layers: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.image_tower == "vit":
            self.vision_model = VisionTower(**self.vision_fields)
            self.visual_projection = self._projection(self.image_width)
        else:
            self.vision_model = ConvTower(*make_conv_tower(self))
        self.text_model = TextTower(
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            eot_id=self.eot_id,
            **self._shared("text"),
        )
        self.text_projection = self._projection(self.text_width)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(math.log(INITIAL_LOGIT_SCALE)), ()
        )

    @property
    def vision_fields(self) -> dict[str, Any]:
        """Fields of the `VisionTower`."""
        own = ("image_size", "patch_size", "stem", "position_interpolation")
        return {**{field: getattr(self, field) for field in own}, **self._shared("image")}

    @nn.nowrap
    def _shared(self, tower: str) -> dict[str, Any]:
        names = {"width": "width", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio"}
        own = {field: getattr(self, f"{tower}_{name}") for field, name in names.items()}
        shared = ("activation", "scan_layers", "dtype")
        return {**own, **{field: getattr(self, field) for field in shared}}

    def _projection(self, width: int) -> nn.Dense:
        init = nn.initializers.normal(width**-0.5)
        return nn.Dense(self.embed_dim, use_bias=False, kernel_init=init, dtype=self.dtype)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embeddings [B, C] float32 (a ViT's projected class token), not L2-normalised.

        Images are [B, H, W, 3] float, normalised as by `normalize_clip_images`, with sides
        divisible by the patch size, else ValueError.
        """
        p = self.patch_size
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % p or images.shape[2] % p:
            raise ValueError(
                f"CLIP's image tower got images of shape {images.shape}; give [B, H, W, 3] with H "
                f"and W divisible by the patch size {p}."
            )
        embeddings = self.vision_model(images)
        if self.image_tower == "vit":
            embeddings = self.visual_projection(embeddings)
        return embeddings.astype(jnp.float32)

    def encode_regions(self, tokens: jax.Array, inside: jax.Array) -> jax.Array:
        """Projected class tokens [B, R, C] float32 of regions of a picture, not L2-normalised.

        As of `VisionTower.regions`.
        """
        return self.visual_projection(self.vision_model.regions(tokens, inside)).astype(jnp.float32)

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Projected end-of-text tokens [M, C] float32, not L2-normalised.

        Tokens are [M, L] int32 of a tokenizer of `concat_jax.text.tokenizer`, L <= context_length,
        else ValueError.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"CLIP's text tower got tokens of shape {tokens.shape}; give [M, L] with L at most "
                f"the context length {self.context_length}."
            )
        return self.text_projection(self.text_model(tokens)).astype(jnp.float32)

    def __call__(
        self, images: jax.Array, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings [B, C] and [M, C] and the multiplier [] of their cosine similarities, float32.

        It is exp of the parameter `logit_scale`, at most `MAX_LOGIT_SCALE` (no gradient flows to
        the parameter beyond that).
        """
        log_scale = jnp.minimum(self.logit_scale, math.log(MAX_LOGIT_SCALE))
        return self.encode_image(images), self.encode_text(tokens), jnp.exp(log_scale)


def cosine_scale(params: Mapping[str, Any]) -> jax.Array:
    """The multiplier [] of cosines as `CLIP` has it, of its parameters alone."""
    return jnp.minimum(jnp.exp(params["logit_scale"]), MAX_LOGIT_SCALE)


def make_clip(config: Mapping[str, Any]) -> CLIP:
    """A `CLIP` from a mapping of its fields; absent fields take the ViT-B/16 defaults.

    `variant` names one of `CLIP_VARIANTS`, whose fields the other keys override. Raises ValueError
    for a key that is no field (the nearest is named) and for values that do not fit together.
    """
    config = dict(config)
    for key in config:
        check_choice(key, ("variant", *CLIP.__dataclass_fields__), "CLIP has no field")
    if (variant := config.pop("variant", None)) is not None:
        check_choice(variant, CLIP_VARIANTS, "CLIP has no variant")
        config = {**CLIP_VARIANTS[variant], **config}
    check_fields(config, CLIP, "CLIP has no field")
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    if "dtype" in config:
        try:
            config["dtype"] = jnp.dtype(config["dtype"])
        except TypeError as error:
            fault = f"CLIP's dtype is {config['dtype']!r}, which is none of numbers; give float32."
            raise ValueError(fault) from error
    clip = CLIP(**config)
    for field, allowed in (
        ("image_tower", ("vit", *CONV_TOWERS)),
        ("projection", PROJECTIONS),
        ("stem", STEMS),
        ("activation", ACTIVATIONS),
        ("position_interpolation", ("bicubic", "bilinear")),
    ):
        check_choice(getattr(clip, field), allowed, f"CLIP's {field} is")
    for tower in ("image", "text"):
        width, heads = getattr(clip, f"{tower}_width"), getattr(clip, f"{tower}_heads")
        # A ResNet's heads are of the last stage, and a ConvNeXt has none.
        factor = {"resnet": 32, "convnext": heads}.get(clip.image_tower, 1)
        if width * (factor if tower == "image" else 1) % heads:
            raise ValueError(f"CLIP's {tower}_width {width} is not divisible by its {heads} heads.")
    if clip.image_tower != "vit" and (clip.patch_size != STRIDE or len(clip.image_stages) != 4):
        raise ValueError(
            f"CLIP's {clip.image_tower} tower has four image_stages and patch_size {STRIDE}, not "
            f"{tuple(clip.image_stages)} and {clip.patch_size}."
        )
    if clip.image_size % clip.patch_size:
        raise ValueError(
            f"CLIP's image_size {clip.image_size} is not divisible by patch_size {clip.patch_size}."
        )
    most = 16 if clip.stem == "resnet" else clip.patch_size
    is_power = clip.patch_size.bit_count() == 1 and 2 <= clip.patch_size <= most
    if clip.image_tower == "vit" and clip.stem != "patch" and not is_power:
        raise ValueError(
            f"CLIP's {clip.stem} stem needs a patch_size that is a power of two"
            f"{' up to 16' * (clip.stem == 'resnet')}, not {clip.patch_size}."
        )
    return clip
