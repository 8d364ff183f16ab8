"""What every segmentor takes and gives, whatever its network.

A segmentor is a linen module (images, image_size) -> `SegmentorOutput` with attributes `stride`,
`width` and `num_queries`; `query_norm`, which finds in its parameters the norm that queries come
out of; `frozen`, whether nothing trains its subtree "backbone"; `gives_clip_tokens`; `anneals`: in
training its call also takes what `training_arguments` gives; and `normalize`, which makes its input
of images [..., 3] uint8.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import PROGRESS

# RGB statistics of ImageNet in 0..255, as every published Mask2Former uses them.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ClipEmbeddings(NamedTuple):
    """What CLIP's image tower says of N masks: [B, N, C] float32, and [B, N] bool, of those that
    have a place on its map; the embedding of another means nothing."""

    embeddings: jax.Array
    is_seen: jax.Array


@flax.struct.dataclass
class SegmentorOutput:
    """What the segmentor predicts, before any class is named.

    Attributes:
      queries: [B, L, N, D] float32, normalised queries of all L prediction sets; `queries[:, -1]`
        are the vision queries.
      mask_embeddings: [B, L, N, D] float32.
      mask_features: [B, h, w, D] at the segmentor's stride, in the compute type; zero beyond the
        valid area. [B, L, h, w, D] where each prediction set has its own.
      clip_tokens: of a frozen CLIP as encoder, [B, 1 + P, D] before its last block; else None.
      clip: of the last set's masks, where the segmentor stands on CLIP and asks it; else None.
    """

    queries: jax.Array
    mask_embeddings: jax.Array
    mask_features: jax.Array
    clip_tokens: jax.Array | None = None
    clip: ClipEmbeddings | None = None


def normalize_images(images: jax.Array) -> jax.Array:
    """[..., 3] uint8 RGB (0..255) -> float32 with ImageNet mean 0 and deviation 1."""
    mean = np.asarray(IMAGENET_MEAN, np.float32)
    std = np.asarray(IMAGENET_STD, np.float32)
    return (jnp.asarray(images, jnp.float32) - mean) / std


def training_arguments(
    segmentor: Any, rng: jax.Array, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Further arguments of a segmentor's call in training; draws apart from `split(rng)`."""
    if not segmentor.anneals:
        return {}
    return {"rngs": {"masks": jax.random.fold_in(rng, 1)}, PROGRESS: batch[PROGRESS]}


def unnormalize_images(images: jax.Array) -> jax.Array:
    """RGB in 0..255 of `normalize_images`, float32."""
    return images * np.asarray(IMAGENET_STD, np.float32) + np.asarray(IMAGENET_MEAN, np.float32)


def mask_logits(mask_embeddings: jax.Array, mask_features: jax.Array) -> jax.Array:
    """[B, ..., N, h, w] float32 of embeddings [B, ..., N, D] and features [B, h, w, D]."""
    return jnp.einsum(
        "b...nd,bhwd->b...nhw",
        mask_embeddings.astype(mask_features.dtype),
        mask_features,
        preferred_element_type=jnp.float32,
    )


class LinearClassifier(nn.Module):
    """Mask2Former's own class head, for converted weights: D -> K classes and no-object (last)."""

    num_classes: int

    @nn.compact
    def __call__(self, queries: jax.Array) -> jax.Array:
        """[..., N, D] -> [..., N, K + 1] float32 logits."""
        return nn.Dense(self.num_classes + 1, dtype=jnp.float32, name="class_embed")(queries)
