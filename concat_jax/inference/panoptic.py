"""From mask logits and class probabilities to panoptic maps.

`panoptic_inference` does it in one jitted call. Its three parts are public, so that a map too large
for one call can be made in tiles: `rank_queries`, `assign_pixels` tile by tile, `settle_segments`.
What they say of an image becomes `ImageSegments` on the host.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.inference.assign_pixels import PixelCounts, RankedQueries, assign_pixels
from concat_jax.inference.heads import bias_names

KEEP_RULES = ("objectness", "score")


class Fate(enum.IntEnum):
    """What became of a query; the first rule that applies, in the order of the post-processing."""

    SEGMENT = 0  # owns the segment id of its own row
    MERGED = 1  # stuff whose pixels were added to an earlier segment of the same class
    NO_OBJECT = 2  # no-object is its most likely class, or its objectness is under the threshold
    LOW_SCORE = 3  # its best class is under the score threshold (keep rule "score" only)
    NO_PIXELS = 4  # kept, but owns no pixel of its own mask
    OVERLAPPED = 5  # kept, but other queries own too much of its mask


# What to change where all queries met one of these fates: what to do with which setting.
_REMEDIES = {
    "overlapped": (("lower", "overlap_threshold"), ("raise", "mask_threshold")),
    "no_pixels": (("lower", "mask_threshold"),),
    "low_score": (("lower", "score_threshold"), ("use", 'keep_rule="objectness"')),
    "no_object": (
        ("lower", "objectness_threshold"),
        ("check", "that trained weights were loaded"),
    ),
}


@flax.struct.dataclass
class SegmentTables:
    """The verdict on the N queries of B images; row n is query n, and segment id n + 1.

    Attributes:
      lookup: [B, 2N + 2] int32, segment id of every code of `assign_pixels`, 0 void.
      labels: [B, N] int32 class index, -1 where the query holds no segment id.
      scores: [B, N] float32 probability of that class, 0 where absent.
      keep_scores: [B, N] float32, of every query what the keep rule compares with its threshold.
      fates: [B, N] int32 values of `Fate`.
      areas: [B, N] int32 pixels of the segment, 0 where absent.
    """

    lookup: jax.Array
    labels: jax.Array
    scores: jax.Array
    keep_scores: jax.Array
    fates: jax.Array
    areas: jax.Array


@functools.partial(
    jax.jit, static_argnames=("output_size", "keep_rule", "strip_rows", "queries_at_once")
)
def panoptic_inference(
    mask_logits: jax.Array,
    class_probs: jax.Array,
    is_thing: jax.Array,
    is_seen: jax.Array,
    *,
    output_size: tuple[int, int],
    source_size: jax.Array | None = None,
    image_size: jax.Array | None = None,
    keep_rule: str = "objectness",
    score_threshold: float = 0.8,
    objectness_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    gamma: float = 0.0,
    strip_rows: int = 32,
    queries_at_once: int = 8,
) -> tuple[jax.Array, SegmentTables]:
    """Mask2Former's panoptic post-processing, with a zero-shot keep rule and calibration.

    Mask logits are resized bilinearly, then squashed. Kept queries compete for every pixel with
    keep score * mask probability. A query becomes a segment where it owns the pixel and its mask
    probability reaches `mask_threshold`, provided the pixels it owns (in its mask or not, as in
    the reference) are at least `overlap_threshold` of the pixels of its mask. Stuff segments of
    one class are merged into the first of them. Unowned pixels are void.

    The reference is `panoptic_inference` in Mask2Former mask2former/maskformer_model.py. Ours
    differs in four ways: ids are query index + 1 and so have gaps; the keep rule "objectness";
    gamma, which renames segments and leaves their geometry alone; and the resize goes straight from
    the logits to the image's own size, where the reference goes through the size of the network's
    input (two blends in a row, which soften borders by a fraction of a pixel).

    Args:
      mask_logits: [B, N, h, w] float, before the sigmoid, at any resolution.
      class_probs: [B, N, K+1] float32 probabilities, the last one no-object.
      is_thing, is_seen: [K] bool.
      output_size: (H, W) of the maps, which every image_size fits. Static.
      source_size: [B, 2] (height, width) of the valid extent of mask_logits, at the top left; may
        be a fraction, image size / 4 for logits at stride 4. None: all of it.
      image_size: [B, 2] that the extent is resized to; beyond is void. None: output_size.
      keep_rule, score_threshold, objectness_threshold, gamma: see `rank_queries`.
      mask_threshold, overlap_threshold: 0.5 and 0.8 in the reference.
      strip_rows, queries_at_once: see `assign_pixels`.

    Returns:
      segment_ids [B, H, W] int32, 0 void, and the tables.
    """
    queries = rank_queries(
        class_probs,
        1.0 - class_probs[..., -1].astype(jnp.float32),
        is_seen,
        keep_rule=keep_rule,
        score_threshold=score_threshold,
        objectness_threshold=objectness_threshold,
        gamma=gamma,
    )
    codes, counts = assign_pixels(
        mask_logits,
        queries,
        output_size=output_size,
        source_size=source_size,
        image_size=image_size,
        mask_threshold=mask_threshold,
        strip_rows=strip_rows,
        queries_at_once=queries_at_once,
    )
    is_thing = jnp.asarray(is_thing)[queries.labels]
    tables = settle_segments(queries, counts, is_thing, overlap_threshold=overlap_threshold)
    return jax.vmap(lambda table, code: table[code])(tables.lookup, codes), tables


def rank_queries(
    class_probs: jax.Array,
    objectness: jax.Array,
    is_seen: jax.Array,
    *,
    keep_rule: str,
    score_threshold: float,
    objectness_threshold: float,
    gamma: float = 0.0,
) -> RankedQueries:
    """Names the queries and decides which take part.

    Args:
      class_probs: [B, N, K+1] float, the last one no-object.
      objectness: [B, N] float32, 1 - p(no-object).
      is_seen: [K] bool, the classes that gamma handicaps.
      keep_rule: "objectness" keeps queries whose objectness exceeds its threshold and names them by
        the best real class: a threshold on the class score costs unseen classes most. "score" is
        the reference: the best of all K+1 classes must not be no-object, and its probability must
        exceed score_threshold. Scores are probabilities among the names by the first rule, among
        names and no-object by the second.
      gamma: see `heads.bias_names`; it names queries and decides nothing else.
    """
    class_probs = class_probs.astype(jnp.float32)
    real_probs, no_object = class_probs[..., :-1], class_probs[..., -1]
    biased = bias_names(class_probs, is_seen, gamma)
    labels = jnp.argmax(biased[..., :-1], axis=-1).astype(jnp.int32)  # [B, N]
    scores = jnp.take_along_axis(real_probs, labels[..., None], axis=-1)[..., 0]
    if keep_rule == "score":
        keep_scores = real_probs.max(axis=-1)
        is_object = keep_scores >= no_object
        keep = is_object & (keep_scores > score_threshold)
    else:
        keep_scores = objectness
        is_object = keep_scores > objectness_threshold
        keep = is_object
        # Of an object: what objectness is judged by need not be among these names.
        scores /= jnp.maximum(real_probs.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    return RankedQueries(
        labels=labels,
        scores=scores,
        keep_scores=keep_scores,
        is_object=is_object,
        keep=keep,
        # Stable: equal bids go to the first query, before and after sorting.
        order=jnp.argsort(~keep, axis=-1, stable=True).astype(jnp.int32),
    )


def settle_segments(
    queries: RankedQueries, counts: PixelCounts, is_thing: jax.Array, *, overlap_threshold: float
) -> SegmentTables:
    """Which kept queries become segments, and which stuff merges.

    `counts` are of the whole image; `is_thing` [B, N] bool says it of the queries' names.
    """
    batch, num_queries = queries.labels.shape
    labels = queries.labels
    has_pixels = counts.both > 0
    share = counts.owned / jnp.maximum(counts.covered, 1)
    accepted = queries.keep & has_pixels & (share >= overlap_threshold)

    # [B, N, N]: query n may take over the id of m. For stuff the first such m owns the segment.
    same_stuff = (labels[:, :, None] == labels[:, None, :]) & ~is_thing[:, :, None]
    numbers = jnp.arange(num_queries)
    may_use = accepted[:, None, :] & (same_stuff | (numbers[:, None] == numbers))
    owner = jnp.argmax(may_use, axis=-1)
    is_segment = accepted & (owner == numbers)
    ids = jnp.where(accepted, owner + 1, 0).astype(jnp.int32)

    by_rank = jnp.take_along_axis(ids, queries.order, axis=-1)
    lookup = jnp.stack([jnp.zeros_like(by_rank), by_rank], axis=-1).reshape(batch, -1)
    areas = jnp.sum(
        jnp.where(ids[:, :, None] == numbers + 1, counts.both[:, :, None], 0), axis=1
    )  # [B, N]
    rules = [is_segment, accepted, ~queries.is_object, ~queries.keep, ~has_pixels]
    fates = [Fate.SEGMENT, Fate.MERGED, Fate.NO_OBJECT, Fate.LOW_SCORE, Fate.NO_PIXELS]
    return SegmentTables(
        lookup=jnp.pad(lookup, ((0, 0), (2, 0))),
        labels=jnp.where(is_segment, labels, -1),
        scores=jnp.where(is_segment, queries.scores, 0.0),
        keep_scores=queries.keep_scores,
        fates=jnp.select(rules, [jnp.int32(f) for f in fates], jnp.int32(Fate.OVERLAPPED)),
        areas=areas.astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class ImageSegments:
    """The panoptic result of one image on the host.

    Attributes:
      id_map: [h, w] int32, 0 void.
      segments: by ascending id: "id", "label" (class index), "score" (class probability), "area".
      fates: how many queries met each `Fate`, keyed by its lower-case name.
      best_keep_score: the highest keep score of all queries.
    """

    id_map: np.ndarray
    segments: list[dict]
    fates: dict[str, int]
    best_keep_score: float

    def labels_by_id(self) -> dict[int, int]:
        """Class index of every segment id, as `PanopticQuality.update` takes it."""
        return {segment["id"]: segment["label"] for segment in self.segments}

    def explain(self, settings: Mapping[str, str] | None = None) -> str:
        """One sentence on what the rules did, which says what to change when nothing was found.

        `settings` are the fields of `PredictConfig` that who reads it can set, by what they are
        called there; None: all, by their own names.
        """
        total = sum(self.fates.values())
        found = (
            f"{len(self.segments)} segments from {total} queries" if self.segments else "No segment"
        )
        reasons = {
            "merged": "merged into stuff of the same class",
            "no_object": "hold no object",
            "low_score": "under the score threshold",
            "no_pixels": "own no pixel of their mask",
            "overlapped": "covered by other segments",
        }
        parts = [f"{self.fates[k]} {text}" for k, text in reasons.items() if self.fates[k]]
        sentence = f"{found}; of {total} queries " + ", ".join(parts) if parts else found
        if self.segments:
            return sentence + "."
        most = max(("overlapped", "no_pixels"), key=self.fates.get)
        cause = next((k for k in (most, "low_score") if self.fates[k]), "no_object")
        hints = [
            f"{verb} {settings[what] if settings else what}"
            for verb, what in _REMEDIES[cause]
            if settings is None or what in settings
        ]
        remedy = f": {' or '.join(hints)}" if hints else ""
        return f"{sentence}; the best keep score is {self.best_keep_score:.4f}{remedy}."


def list_segments(id_map: np.ndarray, tables: SegmentTables) -> ImageSegments:
    """The segments of one image from its map [h, w] and its row [N] of the tables, on the host."""
    segments = [
        {
            "id": int(n) + 1,
            "label": int(tables.labels[n]),
            "score": float(tables.scores[n]),
            "area": int(tables.areas[n]),
        }
        for n in np.flatnonzero(tables.labels >= 0)
    ]
    counts = np.bincount(tables.fates, minlength=len(Fate))
    return ImageSegments(
        id_map=id_map,
        segments=segments,
        fates={fate.name.lower(): int(counts[fate]) for fate in Fate},
        best_keep_score=float(tables.keep_scores.max()),
    )
