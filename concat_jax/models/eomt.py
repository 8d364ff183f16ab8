"""EoMT: a plain ViT whose last blocks see learned queries, and heads that read masks off them.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", arXiv 2503.19108;
`transformers` `models/eomt/modeling_eomt.py`. With `frozen` the encoder stays as it is and the
queries get blocks of their own behind it, the form of PMT (Cavagnero et al., arXiv 2603.25398).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.config import Count, check_choice, check_fields
from concat_jax.models.ops.convolution import by_bands, depthwise_by_shifts
from concat_jax.models.ops.layers_in_turn import Run, run_in_turn
from concat_jax.models.ops.linear import Dense, gelu, matmul
from concat_jax.models.ops.transformer_block import Block, layer_norm
from concat_jax.models.ops.valid_area import resize_bilinear, valid_mask, valid_size, zero_beyond
from concat_jax.models.segmentor_output import (
    DTYPES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SegmentorOutput,
    mask_logits,
    normalize_images,
)
from concat_jax.models.vit import (
    VIT_VARIANTS,
    ClipEncoder,
    Rotation,
    ViT,
    make_clip_encoder,
    rotations,
)

# EoMT-L on DINOv2, as published for COCO panoptic at 640 x 640.
DEFAULTS: Mapping[str, Any] = {
    "kind": "eomt",
    "backbone": {},
    "num_queries": 200,
    "num_blocks": 4,
    "num_upscales": Count(2),
    "frozen": False,
    "frozen_ffn_width": 0,
    "remat": False,
    "scan_layers": False,
    "dtype": "float32",
}
ENCODERS = ("vit", "clip")
# A black pixel after `normalize_images`, with which the reference pads.
BLACK = -np.asarray(IMAGENET_MEAN, np.float32) / np.asarray(IMAGENET_STD, np.float32)
# Exponent of the annealing (`mask_annealing` of `tue-mps/eomt training/lightning_module.py`).
ANNEALING_POWER = 0.9
NORM_EPSILON = 1e-6

_torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def mask_rate(progress: jax.Array, index: int, num_blocks: int) -> jax.Array:
    """Share of queries that block `index` of `num_blocks` masks, at a progress [B] of 0 to 1.

    Blocks are set free one after another, from the first. All are masked in the first sixth of the
    training and nothing is in the last one, as at inference; each falls from 1 to 0 in a sixth of
    it, the first one in the second, the last one in the fifth and the others at even distances.
    These are the reference's steps for three blocks (configs/dinov2/cityscapes) and for four
    (configs/dinov2/coco).
    """
    start = 1 + 3 * index / max(num_blocks - 1, 1)
    done = jnp.clip(6 * progress - start, 0.0, 1.0)
    return (1.0 - done) ** ANNEALING_POWER


class Upscale(nn.Module):
    """A map twice as large: a transposed convolution that does not overlap, GELU, a 3 x 3 one.

    Of matrix products and shifts: [B, h, w, D] -> [B, 2 h, 2 w, D].
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        shape = (channels, 2, 2, channels)
        spread = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0)
        kernel = self.param("spread_kernel", spread, shape).astype(self.dtype)
        bias = self.param("spread_bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        # Whole rows of a product, which are then put in their places.
        x = matmul(x, kernel.reshape(channels, -1)).reshape(batch, height, width, 2, 2, channels)
        x = x.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, channels) + bias
        around = self.param("around_kernel", _torch_init, (3, 3, 1, channels)).astype(self.dtype)
        norm = layer_norm(self.dtype, "norm", NORM_EPSILON)
        if self.is_initializing():
            return norm(x)
        params, norm = self.variables["params"]["norm"], norm.clone(parent=None, name=None)

        def refine(x: jax.Array) -> jax.Array:
            x = gelu(x)  # zero at zero
            # By shifts on a TPU, too, whose compiler takes three times as long for groups.
            x = depthwise_by_shifts(x, around, row_padding=0)
            # Else a TPU's compiler computes the filter again in each pass of the norm.
            x = jax.lax.optimization_barrier(x)
            return norm.apply({"params": params}, x)

        return by_bands(refine, x, edge=1)


class EoMT(nn.Module):
    """Images in, queries and mask features out, as of `Segmentor`.

    Attributes:
      backbone: the encoder.
      num_queries: N.
      num_blocks: L, the blocks that see the queries.
      num_upscales: doublings from the patches to the mask features.
      frozen: no gradient reaches the encoder, of which four depths are read and added, each through
        a learned MLP; the L blocks are new ones, which see queries and patches.
      frozen_ffn_width: hidden width of those blocks' MLPs.
      remat: recompute the upscaled maps in the backward pass; the backbone's blocks have their own.
    """

    backbone: ViT | ClipEncoder
    num_queries: int = 200
    num_blocks: int = 4
    num_upscales: int = 2
    frozen: bool = False
    frozen_ffn_width: int = 0
    remat: bool = False
    dtype: Any = jnp.float32
    anneals = True
    normalize = staticmethod(normalize_images)

    @property
    def stride(self) -> int:
        """Pixels from one mask feature to the next."""
        return self.backbone.patch_size // 2**self.num_upscales

    @property
    def width(self) -> int:
        """Of the queries."""
        return self.backbone.width

    @property
    def gives_clip_tokens(self) -> bool:
        return self.frozen and isinstance(self.backbone, ClipEncoder)

    @staticmethod
    def query_norm(params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Scale and bias [D] of the norm that the queries come out of."""
        return params.get("decoder_norm") or params["backbone"]["norm"]

    def setup(self) -> None:
        width = self.backbone.width
        normal = nn.initializers.normal(1.0)
        self.query_embedding = self.param("query_embedding", normal, (self.num_queries, width))
        # Maps of every set, which weigh more than the blocks' tokens.
        upscale = nn.remat(Upscale) if self.remat else Upscale
        self.upscales = [upscale(dtype=self.dtype) for _ in range(self.num_upscales)]
        self.mask_mlp = [Dense(width, dtype=jnp.float32, kernel_init=_torch_init) for _ in range(3)]
        if self.frozen:
            self.laterals = [
                [Dense(features, dtype=self.dtype) for features in (width // 2, width)]
                for _ in self._depths
            ]
            self.lateral_scale = self.param(
                "lateral_scale", nn.initializers.ones, (len(self._depths), width)
            )
            self.decoder_blocks = [
                Block(
                    num_heads=self.backbone.num_heads,
                    depth=self.num_blocks,
                    ffn_width=self.frozen_ffn_width or self.backbone.ffn_width,
                    activation="gelu",
                    key_bias=False,
                    layer_scale=True,
                    dtype=self.dtype,
                )
                for _ in range(self.num_blocks)
            ]
            self.decoder_norm = layer_norm(jnp.float32)

    @property
    def _depths(self) -> list[int]:
        """Blocks of a frozen encoder after which it is read: the quarters."""
        return [self.backbone.depth * quarter // 4 for quarter in range(1, 5)]

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array | None = None,
        progress: jax.Array | None = None,
    ) -> SegmentorOutput:
        """Segment a batch of images [B, H, W, 3] float from `normalize_images`.

        `image_size` [B, 2] int32 is the valid area at the top left. Beyond it the network sees
        black, as the reference pads to its square, whatever is there; the positions are those of
        the padded image. Sides that the patch size does not divide are padded, too.

        In training `progress` [B] float32 in 0..1 says how much of it is done: queries of the
        blocks look at their own predicted masks only, at the `mask_rate`, drawn by the key "masks";
        the prediction sets are those before each block and the last one, each with mask features
        [B, L + 1, h, w, D] of its own. None: nobody is masked, and there is the last set alone.
        """
        if image_size is not None:
            image_size = jnp.maximum(image_size, 1)
            inside = valid_mask(image_size, *images.shape[1:3])[..., None]
            images = jnp.where(inside, images, BLACK)
        patch = self.backbone.patch_size
        grid = tuple(-(-side // patch) for side in images.shape[1:3])
        missing = [n * patch - side for n, side in zip(grid, images.shape[1:3], strict=True)]
        if any(missing):
            # Shifted, so that padding with zeros is black.
            padding = ((0, 0), *((0, m) for m in missing), (0, 0))
            images = jnp.pad(images - BLACK, padding) + BLACK
        x, rotation, clip_tokens = self._encode(images, grid)
        queries = self.query_embedding.astype(x.dtype)
        queries = jnp.broadcast_to(queries, (len(x), *queries.shape))
        x = jnp.concatenate([queries, x], axis=1)

        def see(blocks: Sequence[Callable], carry: tuple) -> tuple[tuple, SegmentorOutput]:
            x, index = carry
            prediction = self._predict(x, grid, image_size)
            rate = mask_rate(progress, index, self.num_blocks)
            draw = jax.random.uniform(jax.random.fold_in(key, index), (len(x), self.num_queries))
            allowed = self._allowed(prediction, grid, x.shape[1], draw >= rate[:, None])
            return (blocks[0](x, rotation, allowed), index + 1), prediction

        if progress is None:
            sets = []
            x, _ = self._in_turn(lambda blocks, x: (blocks[0](x, rotation), None), x)
        else:
            key = self.make_rng("masks")
            (x, _), sets = self._in_turn(see, (x, 0))
        sets.append(self._predict(x, grid, image_size))
        output = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *sets)
        if progress is None:
            output = output.replace(mask_features=sets[-1].mask_features)
        return output.replace(clip_tokens=clip_tokens)

    def _encode(
        self, images: jax.Array, grid: tuple[int, int]
    ) -> tuple[jax.Array, Rotation | None, jax.Array | None]:
        """Tokens [B, P, D] that the queries are put before, how patches turn, CLIP's tokens."""
        backbone = self.backbone
        x, rotation = backbone.embed(images)
        if not self.frozen:
            return backbone.run(x, rotation, 0, backbone.depth - self.num_blocks), rotation, None
        total, depth, clip_tokens = 0, 0, None
        for lateral, scale, until in zip(
            self.laterals, self.lateral_scale, self._depths, strict=True
        ):
            if self.gives_clip_tokens and until == backbone.depth:
                x = clip_tokens = backbone.run(x, rotation, depth, until - 1)
                depth = until - 1
            x = backbone.run(x, rotation, depth, until)
            depth = until
            read = jax.lax.stop_gradient(backbone.norm(x)).astype(self.dtype)
            hidden = gelu(lateral[0](read))
            total += (read + lateral[1](hidden)) * scale.astype(self.dtype)
        channels = backbone.width // backbone.num_heads
        return total, rotations(*grid, channels, backbone.rotary_theta), clip_tokens

    def _in_turn(self, run: Run, carry: Any) -> tuple[Any, list[Any]]:
        """`run_in_turn` over the blocks that see the queries."""
        if not self.frozen:
            depth = self.backbone.depth
            return self.backbone.in_turn(run, carry, depth - self.num_blocks, depth)
        rounds = [[block] for block in self.decoder_blocks]
        return run_in_turn(self, rounds, run, carry, scan=self.backbone.scan_layers)

    def _predict(
        self, x: jax.Array, grid: tuple[int, int], image_size: jax.Array | None
    ) -> SegmentorOutput:
        """One prediction set, without the axis L."""
        x = self.decoder_norm(x) if self.frozen else self.backbone.norm(x)
        queries, patches = x[:, : self.num_queries], x[:, -grid[0] * grid[1] :]
        hidden = queries
        for layer in self.mask_mlp[:-1]:
            hidden = gelu(layer(hidden))
        features = patches.reshape(len(x), *grid, -1).astype(self.dtype)
        for upscale in self.upscales:
            features = upscale(features)
        features = zero_beyond(features, valid_size(image_size, self.stride))
        return SegmentorOutput(queries, self.mask_mlp[-1](hidden), features)

    def _allowed(
        self, prediction: SegmentorOutput, grid: tuple[int, int], length: int, free: jax.Array
    ) -> jax.Array:
        """Whom the queries see, [B, N, length] bool: of the patches their masks', if not `free`."""
        embeddings, features = jax.lax.stop_gradient(
            (prediction.mask_embeddings, prediction.mask_features)
        )
        # Logits are linear in the features, and so is the resize.
        logits = mask_logits(embeddings, resize_bilinear(features, *grid))
        inside = (logits > 0).reshape(*logits.shape[:2], -1)
        inside |= free[..., None]
        rest = length - inside.shape[-1]
        return jnp.pad(inside, ((0, 0), (0, 0), (rest, 0)), constant_values=True)


def _make_vit(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> ViT:
    fields = dict(fields)
    if (variant := fields.pop("variant", None)) is not None:
        check_choice(variant, VIT_VARIANTS, "There is no ViT variant")
        fields = {**VIT_VARIANTS[variant], **fields}
    check_fields(fields, ViT, "The backbone config of an EoMT has no key", "dtype")
    for field in ("remat", "scan_layers"):
        fields.setdefault(field, settings[field])
    vit = ViT(**fields, dtype=DTYPES[settings["dtype"]])
    check_choice(vit.positions, ("learned", "rotary"), "A ViT's positions are")
    return vit


def make_eomt(settings: Mapping[str, Any]) -> EoMT:
    """An EoMT from all its fields, see `DEFAULTS`.

    `backbone` holds fields of `ViT` and may name a `variant` of `VIT_VARIANTS`, which they
    override; its remat and scan_layers are the outer ones unless given, its dtype always. With
    `kind` "clip" it holds fields of `make_clip` instead. Raises ValueError for an unknown field, or
    sizes that do not go together.
    """
    fields = dict(settings["backbone"])
    kind = fields.pop("kind", ENCODERS[0])
    check_choice(kind, ENCODERS, "The backbone of an EoMT is")
    if kind == "clip":
        shared = {"scan_layers": settings["scan_layers"], "dtype": settings["dtype"]}
        vit = make_clip_encoder({**fields, **shared})
    else:
        vit = _make_vit(fields, settings)
    if vit.width % (4 * vit.num_heads):
        raise ValueError(
            f"The ViT's width {vit.width} is not divisible by 4 times its {vit.num_heads} heads; "
            "change one of them."
        )
    if vit.patch_size % 2 ** settings["num_upscales"]:
        raise ValueError(
            f"The patches of {vit.patch_size} pixels cannot be halved {settings['num_upscales']} "
            "times; make num_upscales smaller."
        )
    if settings["num_blocks"] > vit.depth and not settings["frozen"]:
        raise ValueError(
            f"The queries are to see {settings['num_blocks']} blocks of {vit.depth}; make "
            "num_blocks smaller."
        )
    own = ("num_queries", "num_blocks", "num_upscales", "frozen", "frozen_ffn_width", "remat")
    return EoMT(vit, **{field: settings[field] for field in own}, dtype=DTYPES[settings["dtype"]])
