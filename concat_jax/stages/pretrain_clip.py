"""Stage 0 of the demo: a small CLIP on image-caption pairs, where no CLIP weights are given."""

from __future__ import annotations

import jax.numpy as jnp

from concat_jax.losses.contrastive import contrastive_loss
from concat_jax.models.clip_images import l2_normalize, normalize_clip_images
from concat_jax.stages.networks import Networks
from concat_jax.stages.stage import NO_DECAY, Stage


def make_stage(networks: Networks) -> Stage:
    """Contrastive training of both CLIP towers (Radford et al. 2021, section 2.3)."""

    def loss(params, frozen, batch, rng):
        del frozen, rng
        images = normalize_clip_images(batch["image"])
        image, text, scale = networks.clip.apply(
            {"params": params["clip"]}, images, batch["tokens"]
        )
        same = jnp.all(batch["tokens"][:, None] == batch["tokens"][None], axis=-1)
        value = contrastive_loss(image, text, scale, same_caption=same).mean()
        similarity = l2_normalize(image) @ l2_normalize(text).T
        best = jnp.argmax(similarity, axis=1)
        hit = jnp.take_along_axis(same, best[:, None], axis=1)[:, 0]
        return value, {"loss_contrastive": value, "accuracy": jnp.mean(hit.astype(jnp.float32))}

    rules = ((NO_DECAY, 1.0, 0.0), (r".*", 1.0, 1.0))
    return Stage(("clip",), (), loss, rules, ("image", "tokens"))
