"""ResNet image backbone, the layout of torchvision and detectron2 (stride in the 3x3 convolution).

Source: He et al., arXiv 1512.03385; torchvision `models/resnet.py`; detectron2
`modeling/backbone/resnet.py` (`STRIDE_IN_1X1 False`, FrozenBN).

1x1 convolutions are written as matrix products on the channel axis: the numbers are the same and
XLA's CPU backend runs them markedly faster than its 1x1 convolutions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.core.config import check_choice
from concat_jax.models.ops.convolution import square_conv
from concat_jax.models.ops.layers_in_turn import run_in_turn
from concat_jax.models.ops.linear import Dense, relu
from concat_jax.models.ops.valid_area import statistics_mask, valid_size, zero_beyond

# detectron2 and torchvision both normalise with this epsilon; published weights assume it.
NORM_EPSILON = 1e-5
BLOCKS = ("bottleneck", "basic", "antialiased")
NORMS = ("frozen_batch", "group")
STEMS = ("standard", "small", "deep")
# Channels of a bottleneck block's output over those of its inner convolutions.
BOTTLENECK_EXPANSION = 4

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with stored statistics: a fixed affine map of the channels.

    The four leaves live in `params` so that one tree holds the whole model, and are called
    `frozen_scale`, `frozen_bias`, `frozen_mean`, `frozen_variance` so that a label rule on
    `frozen_` keeps the optimizer off them; no gradient flows into them either.
    Source: detectron2 `layers/batch_norm.py` FrozenBatchNorm2d.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[..., C] -> [..., C] in `dtype`; the folded affine map is formed in float32."""
        shape = (features.shape[-1],)
        scale = self.param("frozen_scale", nn.initializers.ones, shape)
        bias = self.param("frozen_bias", nn.initializers.zeros, shape)
        mean = self.param("frozen_mean", nn.initializers.zeros, shape)
        variance = self.param("frozen_variance", nn.initializers.ones, shape)
        scale, bias, mean, variance = jax.lax.stop_gradient((scale, bias, mean, variance))
        multiplier = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
        offset = bias - mean * multiplier
        return features * multiplier.astype(self.dtype) + offset.astype(self.dtype)


def _normalize(
    norm: str, num_groups: int, dtype: Any, features: jax.Array, size: jax.Array | None, name: str
) -> jax.Array:
    """[B, H, W, C] through the layer called `norm`; its statistics see the valid `size` only."""
    if norm == "frozen_batch":
        return FrozenBatchNorm(dtype=dtype, name=name)(features)
    group_norm = nn.GroupNorm(num_groups=num_groups, epsilon=NORM_EPSILON, dtype=dtype, name=name)
    return group_norm(features, mask=statistics_mask(features, size))


def _pointwise(features: jax.Array, width: int, stride: int, dtype: Any, name: str) -> jax.Array:
    """A 1x1 convolution without bias: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), width]."""
    if stride > 1:
        features = features[:, ::stride, ::stride]
    return Dense(width, use_bias=False, dtype=dtype, kernel_init=_conv_init, name=name)(features)


def _conv(
    features: jax.Array,
    width: int,
    kernel: int,
    stride: int,
    dtype: Any,
    size: jax.Array | None,
    name: str,
) -> jax.Array:
    """A convolution without bias, padded by kernel // 2 on every side as in torch.

    What lies beyond the valid `size` is read as that padding: zero.
    """
    convolution = square_conv(width, kernel, stride, dtype=dtype, kernel_init=_conv_init, name=name)
    return convolution(zero_beyond(features, size))


def _average(features: jax.Array, stride: int, size: jax.Array | None) -> jax.Array:
    """Means of squares: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), C]; beyond `size` are zeros."""
    if stride == 1:
        return features
    missing = ((0, -side % stride) for side in features.shape[1:3])
    features = jnp.pad(zero_beyond(features, size), ((0, 0), *missing, (0, 0)))
    batch, height, width, channels = features.shape
    squares = (batch, height // stride, stride, width // stride, stride, channels)
    return features.reshape(squares).mean(axis=(2, 4))


class ResidualBlock(nn.Module):
    """One residual block of any kind: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), out_width]."""

    width: int
    stride: int
    block: str
    norm: str
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C], valid [B, 2] or None -> [B, ceil(H/stride), ceil(W/stride), out_width]."""
        norm = functools.partial(_normalize, self.norm, self.num_groups, self.dtype)
        out_size = valid_size(size, self.stride)
        out_width = self.width
        averages = self.block == "antialiased"
        if self.block != "basic":
            out_width = self.width * BOTTLENECK_EXPANSION
            hidden = _pointwise(features, self.width, 1, self.dtype, "conv1")
            hidden = relu(norm(hidden, size, "norm1"))
            stride = 1 if averages else self.stride
            hidden = _conv(hidden, self.width, 3, stride, self.dtype, size, "conv2")
            hidden = relu(norm(hidden, size if averages else out_size, "norm2"))
            if averages:
                hidden = _average(hidden, self.stride, size)
            hidden = _pointwise(hidden, out_width, 1, self.dtype, "conv3")
            hidden = norm(hidden, out_size, "norm3")
        else:
            hidden = _conv(features, self.width, 3, self.stride, self.dtype, size, "conv1")
            hidden = relu(norm(hidden, out_size, "norm1"))
            hidden = _conv(hidden, self.width, 3, 1, self.dtype, out_size, "conv2")
            hidden = norm(hidden, out_size, "norm2")
        if self.stride > 1 or features.shape[-1] != out_width:
            stride = self.stride
            if averages:
                features, stride = _average(features, stride, size), 1
            features = _pointwise(features, out_width, stride, self.dtype, "shortcut")
            features = norm(features, out_size, "shortcut_norm")
        return relu(hidden + features)


class ResNet(nn.Module):
    """ResNet returning the feature map of every stage.

    Attributes:
      stage_sizes: number of blocks of each of up to four stages; (3, 4, 6, 3) is ResNet-50.
      width: channels of the stem; stage i works with width * 2**i channels.
      block: "bottleneck" (1x1, 3x3, 1x1; ResNet-50 and up), "basic" (two 3x3) or "antialiased" (a
        bottleneck that averages where others stride; CLIP's, `openai/CLIP clip/model.py`).
      norm: "frozen_batch" for pretrained weights, "group" for training from scratch.
      stem: "standard" (7x7 stride 2 and a 3x3 max-pool of stride 2), "deep" (three 3x3, the first
        of stride 2, and averages of 2x2; CLIP's) or "small" (two 3x3 convolutions, one of stride 2:
        halves all strides, for images of a hundred pixels).
      num_groups: groups of GroupNorm; must divide every width. Unused by "frozen_batch".
      remat: recompute each block in the backward pass instead of storing it.
      scan_layers: compile one of a stage's blocks of equal shape and run it in a loop, see
        `run_in_turn`.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    block: str = "bottleneck"
    norm: str = "frozen_batch"
    stem: str = "standard"
    num_groups: int = 32
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the first map."""
        return 2 if self.stem == "small" else 4

    def _check(self) -> None:
        for field, valid in (("block", BLOCKS), ("norm", NORMS), ("stem", STEMS)):
            check_choice(getattr(self, field), valid, f"ResNet {field} is")
        if not 1 <= len(self.stage_sizes) <= 4 or min(self.stage_sizes) < 1:
            raise ValueError(
                f"ResNet stage_sizes is {tuple(self.stage_sizes)}; give one to four block counts "
                "of 1 or more."
            )
        if self.norm == "group" and self.width % self.num_groups:
            raise ValueError(
                f"ResNet width {self.width} is not divisible by num_groups {self.num_groups}; "
                "change one of them."
            )

    @nn.compact
    def __call__(self, images: jax.Array, image_size: jax.Array | None = None) -> list[jax.Array]:
        """A map [B, ceil(H/s), ceil(W/s), C_s] a stage, s = 4, 8, 16, 32 (small stem: 2 to 16).

        C_s = width * (1, 2, 4, 8), times 4 but for basic blocks. `image_size` [B, 2] int32
        (height, width) is each image's valid area, whose maps are those of the unpadded image and
        without meaning beyond; None where nothing is padded.
        """
        self._check()
        features = images.astype(self.dtype)
        norm = functools.partial(_normalize, self.norm, self.num_groups, self.dtype)

        size_at = functools.partial(valid_size, image_size)
        if self.stem == "standard":
            features = _conv(features, self.width, 7, 2, self.dtype, image_size, "stem_conv")
            features = relu(norm(features, size_at(2), "stem_norm"))
            # Behind a ReLU the zeros lose against, or tie with, every value of the valid area.
            features = zero_beyond(features, size_at(2))
            # Padded here, for jax2onnx knows no pooling that pads; XLA folds it in, in float32.
            padding = ((0, 0), (1, 1), (1, 1), (0, 0))
            features = jnp.pad(features, padding, constant_values=-jnp.inf)
            features = nn.max_pool(features, window_shape=(3, 3), strides=(2, 2))
        else:
            widths, strides = (self.width, self.width), (2, 1)
            if self.stem == "deep":
                widths, strides = (self.width // 2, self.width // 2, self.width), (2, 1, 1)
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
                size = image_size if i == 1 else size_at(2)
                features = _conv(features, width, 3, stride, self.dtype, size, f"stem_conv{i}")
                features = relu(norm(features, size_at(2), f"stem_norm{i}"))
            if self.stem == "deep":
                features = _average(features, 2, size_at(2))
        block_class = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        outputs = []
        for stage, num_blocks in enumerate(self.stage_sizes):
            halves = stage > 0
            first, *others = (
                block_class(
                    width=self.width * 2**stage,
                    stride=2 if halves and index == 0 else 1,
                    block=self.block,
                    norm=self.norm,
                    num_groups=self.num_groups,
                    dtype=self.dtype,
                    # detectron2 calls the stage of stride 4 "res2".
                    name=f"res{stage + 2}_block{index}",
                )
                for index in range(num_blocks)
            )
            size = size_at(self.stride * 2**stage)

            def run(blocks: Sequence[Callable], features: jax.Array, size=size) -> tuple:
                return blocks[0](features, size), None

            features = first(features, size_at(self.stride * 2 ** (stage - halves)))
            rounds = [[block] for block in others]
            features, _ = run_in_turn(self, rounds, run, features, scan=self.scan_layers)
            outputs.append(features)
        return outputs
