"""Stage 0 of the demo: a small CLIP on image-caption pairs, where no CLIP weights are given."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.core.config import Share
from concat_jax.losses.alignment import contrastive_loss
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.semantic_projector import unit
from concat_jax.stages.stage import PLAIN_RULES, Context, Stage

LEARNS_FROM = "captions"


@dataclasses.dataclass(frozen=True)
class Config:
    """Constants of the contrastive training; ours.

    Attributes:
      erase_probability: share of pictures of which a random part is painted in the mean colour.
        CLIP will be shown masked images, and a small one misreads what it never saw.
      max_erased: greatest share of a picture that is erased.
    """

    erase_probability: Share = 0.0
    max_erased: Share = 0.7


def erase(rng: jax.Array, images: jax.Array, config: Config) -> jax.Array:
    """Paints random smooth regions in the mean colour, 0 (random erasing, Zhong et al. 2017).

    The regions of [B, H, W, 3] are level sets of smooth noise and know nothing of what it shows.
    """
    batch, height, width, _ = images.shape
    rng_noise, rng_share, rng_apply = jax.random.split(rng, 3)
    noise = jax.random.normal(rng_noise, (batch, 4, 4))
    noise = jax.image.resize(noise, (batch, height, width), "cubic")
    share = jax.random.uniform(rng_share, (batch, 1), maxval=config.max_erased)
    levels = jnp.sort(noise.reshape(batch, -1), axis=1)
    index = (share * levels.shape[1]).astype(jnp.int32)
    level = jnp.take_along_axis(levels, index, axis=1)
    applied = jax.random.bernoulli(rng_apply, config.erase_probability, (batch, 1, 1))
    keep = (noise >= level[..., None]) | ~applied
    return jnp.where(keep[..., None], images, 0.0)


def make_stage(context: Context, config: Config) -> Stage:
    """Contrastive training of both CLIP towers (Radford et al. 2021, section 2.3)."""
    clip = context.networks.clip

    def loss(params, frozen, batch, rng):
        del frozen
        images = erase(rng, normalize_clip_images(batch["image"]), config)
        image, text, scale = clip.apply({"params": params["clip"]}, images, batch["tokens"])
        same = jnp.all(batch["tokens"][:, None] == batch["tokens"][None], axis=-1)
        value = contrastive_loss(image, text, scale, same_caption=same).mean()
        similarity = unit(image) @ unit(text).T
        best = jnp.argmax(similarity, axis=1)
        hit = jnp.take_along_axis(same, best[:, None], axis=1)[:, 0]
        return value, {"loss": value, "accuracy": jnp.mean(hit.astype(jnp.float32))}

    return Stage(("clip",), (), loss, PLAIN_RULES, ("image", "tokens"))
