"""The four networks of the method, and their parameters as named subtrees.

A parameter tree is a dict of subtrees `clip`, `segmentor`, `projector`, `generator`; stages say by
these names what they take, train and give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.core.config import check_fields
from concat_jax.models.clip import CLIP, make_clip
from concat_jax.models.generators import make_generator
from concat_jax.models.mask2former import Segmentor
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.semantic_projector import SemanticProjector

Params = dict[str, Any]
SUBTREES = ("clip", "segmentor", "projector", "generator")


@dataclasses.dataclass(frozen=True)
class Networks:
    """Unbound modules; the field names are the names of the parameter subtrees."""

    clip: CLIP
    segmentor: Segmentor
    projector: SemanticProjector
    generator: nn.Module

    def init(self, name: str, rng: jax.Array) -> Params:
        """Fresh parameters, float32, of "clip", "segmentor", "projector" or "generator"."""
        if name == "clip":
            images = jnp.zeros((1, self.clip.image_size, self.clip.image_size, 3))
            variables = self.clip.init(rng, images, jnp.zeros((1, 1), jnp.int32))
        elif name == "segmentor":
            # Parameter shapes don't depend on the image size; 64 is the least with a pixel at
            # stride 32 on either side of the centre.
            variables = self.segmentor.init(rng, jnp.zeros((1, 64, 64, 3)))
        elif name == "projector":
            queries, text = (jnp.zeros((1, n)) for n in (self.segmentor.width, self.clip.embed_dim))
            variables = self.projector.init(rng, queries, text, method="predict")
        else:
            rng, noise = jax.random.split(rng)
            text, norm = jnp.zeros((1, self.clip.embed_dim)), jnp.ones(self.segmentor.width)
            variables = self.generator.init(rng, text, noise, norm, norm)
        return variables["params"]


def make_networks(config: Mapping[str, Any]) -> Networks:
    """Networks from the `model` section of a config; ValueError for what they cannot take."""
    what = "config.model.projector has no key"
    check_fields(config["projector"], SemanticProjector, what, "joint_width")
    clip = make_clip(config["clip"])
    segmentor = make_segmentor(config["segmentor"])
    return Networks(
        clip=clip,
        segmentor=segmentor,
        projector=SemanticProjector(joint_width=clip.embed_dim, **config["projector"]),
        generator=make_generator(config["generator"], segmentor.width),
    )
