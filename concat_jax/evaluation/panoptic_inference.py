"""From mask logits and class probabilities to panoptic maps: one jitted function, a host helper."""

from __future__ import annotations

import dataclasses
import enum
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

KEEP_RULES = ("objectness", "score")


class Fate(enum.IntEnum):
    """What became of a query; the first rule that applies, in the order of the post-processing."""

    SEGMENT = 0  # owns the segment id of its own row
    MERGED = 1  # stuff whose pixels were added to an earlier segment of the same class
    NO_OBJECT = 2  # no-object is its most likely class, or its objectness is under the threshold
    LOW_SCORE = 3  # its best class is under the score threshold (keep rule "score" only)
    NO_PIXELS = 4  # kept, but owns no pixel of its own mask
    OVERLAPPED = 5  # kept, but other queries own too much of its mask


@flax.struct.dataclass
class PanopticOutput:
    """Panoptic maps of B images; row n of every table is query n and segment id n + 1.

    Attributes:
      segment_ids: [B, H, W] int32, 0 void, else n + 1 for the segment of query n.
      labels: [B, N] int32 class index of the segment, -1 where query n holds no segment id.
      scores: [B, N] float32 probability of that class in [0, 1], 0 where absent.
      keep_scores: [B, N] float32, for every query the number that the keep rule compares with its
        threshold (best class probability, or objectness), so that an empty map can be explained.
      fates: [B, N] int32 values of `Fate`.
    """

    segment_ids: jax.Array
    labels: jax.Array
    scores: jax.Array
    keep_scores: jax.Array
    fates: jax.Array


def bilinear_weights(source: int, target: int) -> np.ndarray:
    """Matrix that resizes one axis bilinearly, half-pixel centres, clamped edges, no antialias.

    The same numbers as torch `interpolate(mode="bilinear", align_corners=False)`, which the
    reference applies to mask logits when it enlarges and when it shrinks them.

    Returns:
      [target, source] float32; every row has one or two non-zeros and sums to 1.
    """
    position = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0.0)
    low = np.minimum(np.floor(position).astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    fraction = position - low
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1.0 - fraction)
    np.add.at(weights, (np.arange(target), high), fraction)
    return weights.astype(np.float32)


def _row_strips(source: int, target: int, strip_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the row-resize matrix into strips of target rows that touch a narrow band of sources.

    Returns:
      (starts [S] int32, weights [S, R, band] float32): strip s of R target rows is
      `weights[s] @ rows[starts[s] : starts[s] + band]`; rows past `target` have zero weights.
    """
    rows = min(strip_rows, target)
    count = -(-target // rows)
    full = np.zeros((count * rows, source), np.float32)
    full[:target] = bilinear_weights(source, target)
    strips = full.reshape(count, rows, source)
    used = strips.any(axis=1)
    first = used.argmax(axis=1)
    last = source - 1 - used[:, ::-1].argmax(axis=1)
    band = int((last - first).max()) + 1
    starts = np.minimum(first, source - band)
    weights = np.stack([s[:, b : b + band] for s, b in zip(strips, starts, strict=True)])
    return starts.astype(np.int32), weights


def _check_inputs(mask_logits, class_probs, is_thing, is_seen, keep_rule, strip_rows) -> None:
    if mask_logits.ndim != 4 or class_probs.ndim != 3:
        raise ValueError(
            "panoptic_inference needs mask_logits [B, N, h, w] and class_probs [B, N, K+1], got "
            f"{mask_logits.shape} and {class_probs.shape}."
        )
    if mask_logits.shape[:2] != class_probs.shape[:2]:
        raise ValueError(
            f"mask_logits {mask_logits.shape} and class_probs {class_probs.shape} differ in their "
            "first two axes; both must start with [B, N]."
        )
    num_classes = class_probs.shape[-1] - 1
    for name, flags in (("is_thing", is_thing), ("is_seen", is_seen)):
        if flags.shape != (num_classes,):
            raise ValueError(
                f"{name} has shape {flags.shape} but class_probs holds {num_classes} classes plus "
                f"no-object; pass one flag a class, [{num_classes}]."
            )
    if keep_rule not in KEEP_RULES:
        raise ValueError(f"keep_rule is {keep_rule!r}; choose one of {', '.join(KEEP_RULES)}.")
    if strip_rows < 1:
        raise ValueError(f"strip_rows is {strip_rows}; it must be at least 1.")


@functools.partial(jax.jit, static_argnames=("output_size", "keep_rule", "strip_rows"))
def panoptic_inference(
    mask_logits: jax.Array,
    class_probs: jax.Array,
    is_thing: jax.Array,
    is_seen: jax.Array,
    *,
    output_size: tuple[int, int],
    image_size: jax.Array | None = None,
    keep_rule: str = "objectness",
    score_threshold: float = 0.8,
    objectness_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    gamma: float = 0.0,
    strip_rows: int = 32,
) -> PanopticOutput:
    """Mask2Former's panoptic post-processing, with a zero-shot keep rule and calibration.

    Mask logits are resized bilinearly, then squashed. Kept queries compete for every pixel with
    keep score * mask probability. A query becomes a segment where it owns the pixel and its mask
    probability reaches `mask_threshold`, provided the pixels it owns (in its mask or not, as in
    the reference) are at least `overlap_threshold` of the pixels of its mask. Stuff segments of
    one class are merged into the first of them. Unowned pixels are void.

    The reference is `panoptic_inference` in Mask2Former mask2former/maskformer_model.py. Ours
    differs in three ways: ids are query index + 1 and so have gaps; the keep rule "objectness";
    gamma. Keep scores and so the geometry ignore gamma, which only renames segments (and so
    decides which stuff merges).

    The full-size logits [B, N, H, W] are never stored: strips of rows are resized and reduced one
    after another, so memory beyond the input is about B * N * strip_rows * W floats.

    Args:
      mask_logits: [B, N, h, w] float, before the sigmoid, at any resolution.
      class_probs: [B, N, K+1] float32 probabilities, the last one no-object.
      is_thing: [K] bool.
      is_seen: [K] bool, the classes that gamma handicaps.
      output_size: (H, W) of the maps. Static.
      image_size: [B, 2] int (height, width) of the valid area in output pixels; the padding
        beyond counts in no area and is void. None: everything is valid.
      keep_rule: "objectness" keeps queries with 1 - p(no-object) > objectness_threshold and names
        them by the best real class, the zero-shot default because a threshold on the class score
        costs unseen classes most. "score" is the reference: the best of all K+1 classes must not
        be no-object and its probability must be above score_threshold. Static.
      score_threshold: 0.8 in the reference.
      objectness_threshold: 0.5, even odds of holding a segment.
      mask_threshold: 0.5 in the reference.
      overlap_threshold: 0.8 in the reference.
      gamma: subtracted from the probability of every seen class before the best class is chosen
        (calibrated stacking, as in ZegFormer; PADing uses none). May be traced: a sweep does not
        recompile.
      strip_rows: rows handled at once; memory against loop steps. Static.

    Returns:
      PanopticOutput. All tables follow the query order.

    Raises:
      ValueError: if shapes disagree or keep_rule is unknown.
    """
    _check_inputs(mask_logits, class_probs, is_thing, is_seen, keep_rule, strip_rows)
    num_queries = mask_logits.shape[1]
    class_probs = class_probs.astype(jnp.float32)
    real_probs, no_object = class_probs[..., :-1], class_probs[..., -1]
    labels = jnp.argmax(real_probs - gamma * is_seen, axis=-1).astype(jnp.int32)  # [B, N]
    scores = jnp.take_along_axis(real_probs, labels[..., None], axis=-1)[..., 0]
    if keep_rule == "score":
        keep_scores = real_probs.max(axis=-1)
        is_object = keep_scores >= no_object
        keep = is_object & (keep_scores > score_threshold)
    else:
        keep_scores = 1.0 - no_object
        is_object = keep_scores > objectness_threshold
        keep = is_object

    owner_map, owned, covered, both = _assign_pixels(
        mask_logits, keep, keep_scores, output_size, image_size, mask_threshold, strip_rows
    )
    has_pixels = both > 0
    accepted = keep & has_pixels & (owned / jnp.maximum(covered, 1) >= overlap_threshold)

    # [B, N, N]: query n may take over the id of m. For stuff the first such m owns the segment.
    same_stuff = (labels[:, :, None] == labels[:, None, :]) & ~is_thing[labels][:, :, None]
    queries = jnp.arange(num_queries)
    may_use = accepted[:, None, :] & (same_stuff | (queries[:, None] == queries))
    owner = jnp.argmax(may_use, axis=-1)
    is_segment = accepted & (owner == queries)
    new_ids = jnp.where(accepted, owner + 1, 0)

    lookup = jnp.pad(new_ids, ((0, 0), (1, 0)))  # row 0: void stays void
    segment_ids = jax.vmap(lambda table, ids: table[ids])(lookup, owner_map)
    rules = [is_segment, accepted, ~is_object, ~keep, ~has_pixels]
    fates = [Fate.SEGMENT, Fate.MERGED, Fate.NO_OBJECT, Fate.LOW_SCORE, Fate.NO_PIXELS]
    return PanopticOutput(
        segment_ids=segment_ids.astype(jnp.int32),
        labels=jnp.where(is_segment, labels, -1),
        scores=jnp.where(is_segment, scores, 0.0),
        keep_scores=keep_scores,
        fates=jnp.select(rules, [jnp.int32(f) for f in fates], jnp.int32(Fate.OVERLAPPED)),
    )


def _assign_pixels(
    mask_logits: jax.Array,
    keep: jax.Array,
    keep_scores: jax.Array,
    output_size: tuple[int, int],
    image_size: jax.Array | None,
    mask_threshold: float,
    strip_rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Resizes the masks strip by strip and lets the kept queries compete for every pixel.

    Returns:
      (owner_map [B, H, W] int32: query + 1 where the owner's own mask covers the pixel, else 0;
      owned [B, N], covered [B, N], both [B, N] int32: pixels that query n owns, pixels of its
      mask, and pixels that are both).
    """
    batch, num_queries, source_height, source_width = mask_logits.shape
    height, width = output_size
    starts, row_weights = _row_strips(source_height, height, strip_rows)
    num_strips, rows, band = row_weights.shape
    column_weights = jnp.asarray(bilinear_weights(source_width, width))
    if image_size is None:
        image_size = jnp.broadcast_to(jnp.asarray(output_size, jnp.int32), (batch, 2))
    valid_height = jnp.minimum(image_size[:, 0], height)[:, None]
    valid_columns = jnp.arange(width) < image_size[:, 1][:, None]  # [B, W]

    def strip(counts, inputs):
        start, weights, first_row = inputs
        logits = jax.lax.dynamic_slice_in_dim(mask_logits, start, band, axis=2)
        logits = logits.astype(jnp.float32)
        # HIGHEST: the default would round to bfloat16 on TPU and TF32 on GPU and move borders.
        if source_width != width:
            logits = jnp.einsum(
                "bnhw,vw->bnhv", logits, column_weights, precision=jax.lax.Precision.HIGHEST
            )
        logits = jnp.einsum("bnhv,uh->bnuv", logits, weights, precision=jax.lax.Precision.HIGHEST)
        masks = jax.nn.sigmoid(logits)  # [B, N, R, W]
        bids = jnp.where(keep[..., None, None], keep_scores[..., None, None] * masks, -1.0)
        owner = jnp.argmax(bids, axis=1)  # [B, R, W]
        valid_rows = first_row + jnp.arange(rows) < valid_height  # [B, R]
        valid = valid_rows[:, :, None] & valid_columns[:, None, :]
        owns = (owner[:, None] == jnp.arange(num_queries)[:, None, None]) & valid[:, None]
        covers = (masks >= mask_threshold) & valid[:, None]
        counts = tuple(
            count + jnp.sum(pixels, axis=(2, 3), dtype=jnp.int32)
            for count, pixels in zip(counts, (owns, covers, owns & covers), strict=True)
        )
        return counts, jnp.where(jnp.any(owns & covers, axis=1), owner + 1, 0)

    zeros = jnp.zeros((batch, num_queries), jnp.int32)
    first_rows = jnp.arange(num_strips, dtype=jnp.int32) * rows
    counts, strips = jax.lax.scan(
        strip, (zeros, zeros, zeros), (jnp.asarray(starts), jnp.asarray(row_weights), first_rows)
    )
    owner_map = jnp.moveaxis(strips, 0, 1).reshape(batch, num_strips * rows, width)[:, :height]
    return owner_map, *counts


@dataclasses.dataclass(frozen=True)
class ImageSegments:
    """The panoptic result of one image on the host.

    Attributes:
      id_map: [h, w] int32, 0 void.
      segments: one dict a segment, by ascending id: "id" (int), "label" (class index), "score"
        (class probability) and "area" (pixels, at least 1).
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

    def explain(self) -> str:
        """One sentence on what the rules did, which says what to change when nothing was found."""
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
        hint = (
            "lower overlap_threshold or mask_threshold"
            if self.fates["no_pixels"] + self.fates["overlapped"]
            else 'lower score_threshold or use keep_rule="objectness"'
            if self.fates["low_score"]
            else "lower objectness_threshold, or check that trained weights were loaded"
        )
        return f"{sentence}; the best keep score is {self.best_keep_score:.2f}: {hint}."


def unpack_segments(
    output: PanopticOutput, image_size: np.ndarray | None = None
) -> list[ImageSegments]:
    """Moves a PanopticOutput to the host, crops the padding and lists the segments of each image.

    Args:
      output: of `panoptic_inference`, device or numpy arrays.
      image_size: [B, 2] (height, width) to crop each map to, the one given to
        `panoptic_inference`; None crops nothing.

    Returns:
      B ImageSegments.
    """
    output = jax.device_get(output)
    results = []
    for row, id_map in enumerate(output.segment_ids):
        if image_size is not None:
            id_map = id_map[: int(image_size[row][0]), : int(image_size[row][1])]
        labels, scores = output.labels[row], output.scores[row]
        areas = np.bincount(id_map.ravel(), minlength=len(labels) + 1)
        segments = [
            {
                "id": int(n) + 1,
                "label": int(labels[n]),
                "score": float(scores[n]),
                "area": int(areas[n + 1]),
            }
            for n in np.flatnonzero((labels >= 0) & (areas[1:] > 0))
        ]
        counts = np.bincount(output.fates[row], minlength=len(Fate))
        results.append(
            ImageSegments(
                id_map=id_map,
                segments=segments,
                fates={fate.name.lower(): int(counts[fate]) for fate in Fate},
                best_keep_score=float(output.keep_scores[row].max()),
            )
        )
    return results
