"""Swin Transformer image backbone, for any image size.

Source: Liu et al., arXiv 2103.14030; the dense-prediction variant of Mask2Former
`mask2former/modeling/backbone/swin.py`, which `transformers` calls `SwinBackbone`: windows keep
their size and shift on small maps too, and every stage has a norm of its own on its output.

Stochastic depth, which the published recipes train with, is not here: the model is deterministic
and needs no random key, and inference is the same without it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.ops.layers_in_turn import run_in_turn
from concat_jax.models.ops.linear import Dense, gelu
from concat_jax.models.ops.valid_area import valid_size, zero_beyond

# PyTorch's default, with which every published Swin was trained.
NORM_EPSILON = 1e-5
# Added to the logits of token pairs that only the cyclic shift brought together. The reference's
# number: e**-100 is zero in float32, and unlike minus infinity it can meet no 0 * inf.
BLOCKED_LOGIT = -100.0

# Published sizes as fields of `Swin`: T and S of the paper, B and L with the windows of 12 that
# their 384 x 384 pretraining, and so every Mask2Former built on them, uses.
_PRETRAINED_AT_384 = {"stage_sizes": (2, 2, 18, 2), "window_size": 12}
SWIN_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"stage_sizes": (2, 2, 6, 2), "width": 96, "num_heads": (3, 6, 12, 24)},
    "small": {"stage_sizes": (2, 2, 18, 2), "width": 96, "num_heads": (3, 6, 12, 24)},
    "base": {"width": 128, "num_heads": (4, 8, 16, 32), **_PRETRAINED_AT_384},
    "large": {"width": 192, "num_heads": (6, 12, 24, 48), **_PRETRAINED_AT_384},
}

_dense_init = nn.initializers.truncated_normal(0.02)


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window, numbered row by row.

    [w**2, w**2] int32 in 0..(2 w - 1)**2 - 1, for (attending, attended) tokens: row difference
    times 2 w - 1 plus column difference, both counted from their least value.
    """
    rows, columns = np.divmod(np.arange(window**2), window)
    row_steps = rows[:, None] - rows[None, :] + window - 1
    column_steps = columns[:, None] - columns[None, :] + window - 1
    return (row_steps * (2 * window - 1) + column_steps).astype(np.int32)


def _blocked_along_axis(
    num_windows: int, window: int, shift: int, extent: jax.Array | None
) -> np.ndarray | jax.Array:
    """[num_windows, w, w] bool: positions of one axis that the cyclic shift alone made neighbours.

    The last window's final `shift` positions came round from the other end. For maps that end at
    their own `extent` [B], [B, num_windows, w, w]: the unpadded map would be filled up to whole
    windows, and its tokens see those zeros; only what the bucket adds after them is a region of its
    own.
    """
    length = num_windows * window
    places = np.arange(length)
    region = places >= length - shift
    if extent is not None:
        filled = -(-extent // window) * window
        region = jnp.where(region, 2, (places + shift) % length >= filled[:, None])
    region = region.reshape(*region.shape[:-1], num_windows, window)
    return region[..., :, None] != region[..., None, :]


def shifted_window_mask(
    grid: tuple[int, int], window: int, shift: int, size: jax.Array | None = None
) -> jax.Array:
    """Pairs of tokens of a window, shifted up and left, that may not see each other.

    [nh, nw, w**2, w**2] bool for a `grid` of (nh, nw) windows, True where attention is blocked;
    with the valid areas `size` [B, 2] a batch axis before.
    """
    rows, columns = (
        _blocked_along_axis(n, window, shift, None if size is None else size[:, axis])
        for axis, n in enumerate(grid)
    )
    # Rows and columns are combined by broadcasting in the program: their product as a constant
    # would be tens of megabytes for a large image.
    rows = jnp.asarray(rows[..., :, None, :, None, :, None])
    blocked = rows | jnp.asarray(columns[..., None, :, None, :, None, :])
    return blocked.reshape(*blocked.shape[:-6], *grid, window**2, window**2)


def partition_windows(features: jax.Array, window: int) -> jax.Array:
    """[B, nh w, nw w, C] -> [B, nh, nw, w**2, C], the tokens of a window row by row."""
    batch, height, width, channels = features.shape
    grid = (height // window, width // window)
    windows = features.reshape(batch, grid[0], window, grid[1], window, channels)
    return windows.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *grid, window**2, channels)


def merge_windows(windows: jax.Array, window: int) -> jax.Array:
    """[B, nh, nw, w**2, C] -> [B, nh w, nw w, C], the inverse of `partition_windows`."""
    batch, rows, columns, _, channels = windows.shape
    features = windows.reshape(batch, rows, columns, window, window, channels)
    features = features.transpose(0, 1, 3, 2, 4, 5)
    return features.reshape(batch, rows * window, columns * window, channels)


def _pad_to_multiple(features: jax.Array, divisor: int) -> jax.Array:
    """Zeros at the bottom and right until height and width are multiples of `divisor`."""
    _, height, width, _ = features.shape
    padding = ((0, 0), (0, -height % divisor), (0, -width % divisor), (0, 0))
    return jnp.pad(features, padding)


class WindowAttention(nn.Module):
    """Multi-head attention inside each window, with a learned bias for each relative position."""

    num_heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, windows: jax.Array, blocked: jax.Array | None = None) -> jax.Array:
        """Attend within windows [B, nh, nw, w**2, C]; logits, bias and softmax are float32.

        `blocked` [nh, nw, w**2, w**2], with a batch axis before it or not, is True where attention
        is blocked.
        """
        width = windows.shape[-1]
        depth = width // self.num_heads

        def project(name: str) -> jax.Array:
            dense = Dense(width, dtype=self.dtype, kernel_init=_dense_init, name=name)
            return dense(windows).reshape(*windows.shape[:-1], self.num_heads, depth)

        query = project("query") * depth**-0.5
        key, value = project("key"), project("value")
        table = self.param(
            "relative_position_bias",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.num_heads),
        )
        # h heads, y x the window's place, q k tokens.
        bias = table[relative_position_index(self.window)].transpose(2, 0, 1)
        logits = jnp.einsum("byxqhd,byxkhd->byxhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)
        if blocked is not None:
            logits = logits + jnp.where(blocked, BLOCKED_LOGIT, 0.0)[..., None, :, :]
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        attended = jnp.einsum("byxhqk,byxkhd->byxqhd", weights, value)
        return Dense(width, dtype=self.dtype, kernel_init=_dense_init, name="output")(
            attended.reshape(windows.shape)
        )


class SwinBlock(nn.Module):
    """Window attention and a two-layer perceptron, pre-norm: [B, H, W, C] -> [B, H, W, C].

    `shift` are the positions by which windows are displaced, 0 for every other block.
    """

    num_heads: int
    window: int
    shift: int
    mlp_ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C], valid [B, 2] or None -> [B, H, W, C] in `dtype`."""
        _, height, width, channels = features.shape
        norm = {"epsilon": NORM_EPSILON, "dtype": self.dtype}
        dense = {"dtype": self.dtype, "kernel_init": _dense_init}

        hidden = nn.LayerNorm(name="attention_norm", **norm)(features)
        # The padding is seen by the attention, as zeros behind the norm: the published weights
        # were trained so.
        hidden = _pad_to_multiple(zero_beyond(hidden, size), self.window)
        blocked = None
        if self.shift:
            hidden = jnp.roll(hidden, (-self.shift, -self.shift), axis=(1, 2))
            grid = (hidden.shape[1] // self.window, hidden.shape[2] // self.window)
            blocked = shifted_window_mask(grid, self.window, self.shift, size)
        windows = WindowAttention(self.num_heads, self.window, self.dtype, name="attention")(
            partition_windows(hidden, self.window), blocked
        )
        hidden = merge_windows(windows, self.window)
        if self.shift:
            hidden = jnp.roll(hidden, (self.shift, self.shift), axis=(1, 2))
        features = features + hidden[:, :height, :width]

        hidden = nn.LayerNorm(name="ffn_norm", **norm)(features)
        hidden = Dense(self.mlp_ratio * channels, name="ffn_in", **dense)(hidden)
        hidden = gelu(hidden)
        return features + Dense(channels, name="ffn_out", **dense)(hidden)


class PatchMerging(nn.Module):
    """Halves the resolution: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2 C]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C], valid [B, 2] or None -> [B, ceil(H/2), ceil(W/2), 2 C] in `dtype`.

        Odd sizes gain a zero edge.
        """
        features = _pad_to_multiple(zero_beyond(features, size), 2)
        batch, height, width, channels = features.shape
        patches = features.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # The four neighbours lie column by column in the channels of the published weights.
        patches = patches.transpose(0, 1, 3, 4, 2, 5)
        patches = patches.reshape(batch, height // 2, width // 2, 4 * channels)
        patches = nn.LayerNorm(epsilon=NORM_EPSILON, dtype=self.dtype, name="norm")(patches)
        dense = {"dtype": self.dtype, "kernel_init": _dense_init}
        return Dense(2 * channels, use_bias=False, name="reduction", **dense)(patches)


class Swin(nn.Module):
    """Swin Transformer returning the normalised feature map of every stage.

    Attributes:
      stage_sizes: number of blocks of each of up to four stages; (2, 2, 6, 2) is Swin-T. The
        sizes that have names are in `SWIN_VARIANTS`.
      width: channels of the first stage; stage i works with width * 2**i channels.
      num_heads: attention heads of each stage; each must divide its stage's channels.
      window_size: side of the attention windows, in positions of the stage's map.
      patch_size: side of an image patch, which is the stride of the first map.
      mlp_ratio: hidden width of a block's perceptron over its channels.
      remat: recompute each block in the backward pass instead of storing it.
      scan_layers: compile one of a stage's pairs of blocks and run it in a loop, see `run_in_turn`;
        where there are whole pairs.
    """

    stage_sizes: Sequence[int] = (2, 2, 6, 2)
    width: int = 96
    num_heads: Sequence[int] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    mlp_ratio: int = 4
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the first map."""
        return self.patch_size

    def _check(self) -> None:
        sizes, heads = tuple(self.stage_sizes), tuple(self.num_heads)
        if not 1 <= len(sizes) <= 4 or min(sizes) < 1:
            raise ValueError(
                f"Swin stage_sizes is {sizes}; give one to four block counts of 1 or more."
            )
        if len(heads) != len(sizes):
            raise ValueError(
                f"Swin num_heads is {heads} but there are {len(sizes)} stages; give one number of "
                "heads a stage."
            )
        for field in ("width", "window_size", "patch_size", "mlp_ratio"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"Swin {field} is {value}; give a number of 1 or more.")
        for stage, count in enumerate(heads):
            channels = self.width * 2**stage
            if count < 1 or channels % count:
                raise ValueError(
                    f"Swin stage {stage + 1} has {channels} channels, which {count} heads do not "
                    "divide; change width or num_heads."
                )

    @nn.compact
    def __call__(self, images: jax.Array, image_size: jax.Array | None = None) -> list[jax.Array]:
        """A map [B, ceil(H/s), ceil(W/s), C_s] a stage, s = patch_size * (1, 2, 4, 8).

        C_s = width * (1, 2, 4, 8). Images of any size are padded with zeros to whole patches.
        `image_size` [B, 2] int32 (height, width) is each image's valid area, whose maps are those
        of the unpadded image and without meaning beyond; None where nothing is padded.
        """
        self._check()
        norm = {"epsilon": NORM_EPSILON, "dtype": self.dtype}
        patch = (self.patch_size, self.patch_size)

        def size_at(stage: int) -> jax.Array | None:
            return valid_size(image_size, self.patch_size * 2**stage)

        images = zero_beyond(images.astype(self.dtype), image_size)
        features = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_dense_init,
            name="patch_projection",
        )(_pad_to_multiple(images, self.patch_size))
        features = nn.LayerNorm(name="patch_norm", **norm)(features)

        block_class = nn.remat(SwinBlock) if self.remat else SwinBlock
        outputs = []
        for stage, (num_blocks, num_heads) in enumerate(
            zip(self.stage_sizes, self.num_heads, strict=True)
        ):
            if stage > 0:
                merging = PatchMerging(self.dtype, name=f"merging_{stage}")
                features = merging(features, size_at(stage - 1))
            blocks = [
                block_class(
                    num_heads=num_heads,
                    window=self.window_size,
                    shift=self.window_size // 2 if index % 2 else 0,
                    mlp_ratio=self.mlp_ratio,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{index}",
                )
                for index in range(num_blocks)
            ]

            size = size_at(stage)

            def run(pair: Sequence[Callable], features: jax.Array, size=size) -> tuple:
                for block in pair:
                    features = block(features, size)
                return features, None

            pairs = [blocks[start : start + 2] for start in range(0, num_blocks, 2)]
            scan = self.scan_layers and num_blocks % 2 == 0
            features, _ = run_in_turn(self, pairs, run, features, scan=scan)
            outputs.append(nn.LayerNorm(name=f"output_norm_{stage}", **norm)(features))
        return outputs
