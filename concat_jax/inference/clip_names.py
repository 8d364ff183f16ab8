"""CLIP names masks of a segmentor: the two-stage way to any words, for weights that know none.

The image is cut to a mask's box, what is not the mask is painted in the mean colour, and CLIP's
image tower encodes the result: a forward pass a mask. ZegFormer (Ding et al., arXiv 2112.07910,
`mask_former/mask_former_model.py`) does it for every query, OVSeg (Liang et al., arXiv 2210.04150,
`open_vocab_seg/modeling/clip_adapter/adapter.py`) for every query whose mask has a pixel. Here it
is done for those that could still be kept, which changes no result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.inference.heads import ClipHead, ClipQueries, Head
from concat_jax.inference.text_tower import TextTower, find_clip_tokenizer, text_params
from concat_jax.models.clip import CLIP, cosine_scale, make_clip
from concat_jax.models.clip_images import cut_out, mask_windows
from concat_jax.models.segmentor_output import ClipEmbeddings
from concat_jax.weights.clip import read_clip

# Masks of an image that CLIP sees at once: one program serves any number of them.
MASKS_AT_ONCE = 8


@flax.struct.dataclass
class ImageTower:
    """CLIP's image tower, and the sides of what it sees in pixels of the image: `mask_windows`."""

    params: Any
    module: CLIP = flax.struct.field(pytree_node=False)
    min_side: float = flax.struct.field(pytree_node=False, default=0.0)
    max_side: float = flax.struct.field(pytree_node=False, default=math.inf)

    @classmethod
    def of(cls, params: Any, module: CLIP, *sides: float) -> ImageTower:
        """Of the parameters of a whole CLIP, put on the device without its text tower."""
        params = {name: tree for name, tree in params.items() if not name.startswith("text_")}
        return cls(jax.device_put(params), module, *sides)

    @property
    def scale(self) -> jax.Array:
        """Of cosines, [] float32."""
        return cosine_scale(self.params)


@jax.jit
def rank_masks(
    own: Head, queries: jax.Array, logits: jax.Array, least: float
) -> tuple[jax.Array, jax.Array]:
    """Queries [B, N] int32, the likeliest object first, and how many [B] CLIP is to see.

    Those are at least as likely as `least` and have a pixel in their masks, logits [B, N, h, w].
    """
    objectness = own(queries).objectness
    is_shown = (objectness >= least) & (logits > 0).any(axis=(2, 3))
    order = jnp.argsort(jnp.where(is_shown, -objectness, jnp.inf), axis=1)
    return order.astype(jnp.int32), is_shown.sum(axis=1)


@functools.partial(jax.jit, static_argnames="stride")
def cut_masks(
    tower: ImageTower, images: jax.Array, image_size, logits: jax.Array, chosen, *, stride: int
) -> jax.Array:
    """Crops [B, M, S, S, 3] for the tower of the masks `chosen` [B, M]; see `cut_out`."""
    masks = jnp.take_along_axis(logits, chosen[:, :, None, None], axis=1)
    windows = mask_windows(masks, tower.min_side / stride, tower.max_side / stride)
    how = {"stride": stride, "size": tower.module.image_size, "image_size": image_size}
    return cut_out(images, masks, windows, **how)


@jax.jit
def show_masks(
    tower: ImageTower, crops: jax.Array, chosen, is_shown, known: ClipEmbeddings
) -> ClipEmbeddings:
    """`known` of all queries with the embeddings of the crops, where `is_shown` [B, M]."""
    encode = functools.partial(tower.module.apply, method="encode_image")
    # The axis of the batch stays apart from that of the masks.
    encode = jax.vmap(encode, in_axes=(None, 1), out_axes=1)
    put = jax.vmap(lambda table, rows, values: table.at[rows].set(values))
    embeddings = put(known.embeddings, chosen, encode({"params": tower.params}, crops))
    return ClipEmbeddings(embeddings, put(known.is_seen, chosen, is_shown))


class MaskNamer:
    """Shows masks to CLIP, and knows what that cost so far.

    Attributes:
      own: the head that says which queries are objects.
      num_masks: that were shown.
    """

    def __init__(self, tower: ImageTower, own: Head):
        self.tower, self.own, self.num_masks = tower, own, 0
        self._rounds: dict[bool, list[float]] = {False: [], True: []}
        self._compiled: set[tuple[int, ...]] = set()

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array,
        logits: jax.Array,
        queries: jax.Array,
        *,
        least: float,
        stride: int,
    ) -> ClipQueries:
        """What `ClipHead` names queries by; `least` and the arrays are as `rank_masks` has them."""
        batch, number = queries.shape[:2]
        order, counts = rank_masks(self.own, queries, logits, least)
        width = self.tower.module.embed_dim
        known = ClipEmbeddings(jnp.zeros((batch, number, width)), jnp.zeros((batch, number), bool))
        counts = np.asarray(counts)
        at_once = min(MASKS_AT_ONCE, number)
        for start in range(0, counts.max(), at_once):
            begun = time.monotonic()
            start = min(start, number - at_once)
            chosen = order[:, start : start + at_once]
            is_shown = start + np.arange(at_once) < counts[:, None]
            crops = cut_masks(self.tower, images, image_size, logits, chosen, stride=stride)
            known = jax.block_until_ready(show_masks(self.tower, crops, chosen, is_shown, known))
            is_first = images.shape not in self._compiled
            self._compiled.add(images.shape)
            self._rounds[is_first].append((time.monotonic() - begun) / chosen.size)
        self.num_masks += int(counts.sum())
        return ClipQueries(queries, known)

    def cost(self) -> str:
        """A sentence on the time that was spent."""
        said = f"CLIP was shown {self.num_masks} masks, {MASKS_AT_ONCE} of an image at once"
        if not any(self._rounds.values()):
            return f"{said}."
        seconds = self._rounds[False] or self._rounds[True]
        note = "" if self._rounds[False] else ", compilation included"
        return f"{said}; a mask took {1000 * np.median(seconds):.0f} ms{note}."


@dataclasses.dataclass(frozen=True)
class ClipNames:
    """A CLIP that names masks by any text: `about` says in words which it is."""

    text: TextTower
    tower: ImageTower
    about: str

    def head(self, own: Head) -> ClipHead:
        """Without names yet, see `text_head_for`."""
        return ClipHead(own, None, None, self.tower.scale)


def read_clip_names(path: str | os.PathLike[str], dtype: str = "float32") -> ClipNames:
    """A CLIP from whatever `read_clip` reads, with a tokenizer beside it; ValueError as there."""
    weights = read_clip(path)
    clip = make_clip({**weights.config, "dtype": dtype, "scan_layers": True})
    tokenizer = find_clip_tokenizer(str(path), clip)
    params = jax.device_put(text_params(weights.params))
    text = TextTower(clip, params, tokenizer, "fourteen", True, "max")
    return ClipNames(text, ImageTower.of(weights.params, clip), str(weights))
