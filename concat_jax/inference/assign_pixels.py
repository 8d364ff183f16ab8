"""The competition of the kept queries for the pixels, in strips of rows and groups of queries."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from concat_jax.inference.resize import blend, tile_taps


@flax.struct.dataclass
class RankedQueries:
    """What the class probabilities say of the N queries of B images, before any pixel.

    Attributes:
      labels: [B, N] int32, the best real class after calibration.
      scores: [B, N] float32 probability of that class.
      keep_scores: [B, N] float32, the number that the keep rule compares with its threshold.
      is_object: [B, N] bool, not called no-object.
      keep: [B, N] bool, takes part in the competition for pixels.
      order: [B, N] int32, the kept queries in their order, then the others.
    """

    labels: jax.Array
    scores: jax.Array
    keep_scores: jax.Array
    is_object: jax.Array
    keep: jax.Array
    order: jax.Array


@flax.struct.dataclass
class PixelCounts:
    """Pixels [B, N] int32 that a query owns, that its mask covers, and both. Tiles add up."""

    owned: jax.Array
    covered: jax.Array
    both: jax.Array

    def __add__(self, other: PixelCounts) -> PixelCounts:
        return jax.tree.map(lambda a, b: a + b, self, other)


def assign_pixels(
    mask_logits: jax.Array,
    queries: RankedQueries,
    *,
    output_size: tuple[int, int],
    source_size: jax.Array | None = None,
    image_size: jax.Array | None = None,
    origin: jax.Array | None = None,
    mask_threshold: float = 0.5,
    strip_rows: int = 32,
    queries_at_once: int = 8,
) -> tuple[jax.Array, PixelCounts]:
    """Resizes the masks of the kept queries and lets them compete for every pixel.

    The work follows what is there, not the static sizes: the loops run over groups of kept
    queries, up to the most that an image of the batch keeps, and over strips of rows, down to the
    end of the tallest image. The full-size logits [B, N, H, W] are never stored. Beyond input and
    output the memory is about B * W * (queries_at_once * (h + strip_rows) + 2 H) floats.

    Args:
      origin: [2] int (row, column) of the map's first pixel in the image, for a map that is one
        tile of the image. None: the image's first.
      strip_rows: rows handled at once, few enough to stay in the cache. Static.
      queries_at_once: kept queries handled at once: more read and write the best bids less often,
        fewer leave less of the last group empty. Static.

    Returns:
      (codes [B, H, W], uint8 where they fit, else uint16: what `SegmentTables.lookup` turns into
      segment ids, 0 where the best bidder's mask does not cover the pixel; PixelCounts.)
    """
    batch, num_queries = mask_logits.shape[:2]
    height, width = output_size
    rows, group = min(strip_rows, height), min(queries_at_once, num_queries)
    padded_height = -(-height // rows) * rows
    row_taps, column_taps, end = tile_taps(
        mask_logits, output_size, padded_height, source_size, image_size, origin
    )
    valid_columns = jnp.arange(width) < end[:, 1:]

    num_kept = queries.keep.sum(axis=-1)
    order = jnp.pad(queries.order, ((0, 0), (0, -num_queries % group)))
    bid_scores = jnp.take_along_axis(queries.keep_scores, order, axis=-1)
    # A query that is not kept, or pads the last group, must lose to nothing at all (best < 0).
    bid_scores = jnp.where(jnp.arange(order.shape[1]) < num_kept[:, None], bid_scores, -jnp.inf)

    def bid(number, state):
        best, codes, covered = state
        first = number * group
        members = jax.lax.dynamic_slice_in_dim(order, first, group, axis=1)
        scores = jax.lax.dynamic_slice_in_dim(bid_scores, first, group, axis=1)
        logits = jnp.take_along_axis(mask_logits, members[:, :, None, None], axis=1)
        # Columns first, while there are only the few rows of the source; kept apart by the
        # barrier, or the compiler would gather columns again for every target row.
        wide = jax.vmap(functools.partial(blend, axis=2))(logits.astype(jnp.float32), column_taps)
        wide = jax.lax.optimization_barrier(wide)  # [B, group, h, W]

        def strip(index, state):
            best, codes, covered = state
            start = index * rows
            here = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=rows, axis=1
            )
            taps = jax.tree.map(here, row_taps)
            masks = jax.nn.sigmoid(jax.vmap(functools.partial(blend, axis=1))(wide, taps))
            covers = masks >= mask_threshold  # [B, group, rows, W]
            valid_rows = start + jnp.arange(rows) < end[:, :1]
            valid = valid_rows[:, :, None] & valid_columns[:, None, :]
            best_here, codes_here = here(best), here(codes)
            for member in range(group):
                offer = scores[:, member, None, None] * masks[:, member]
                code = 2 * (first + member + 1) + covers[:, member]
                better = offer > best_here
                codes_here = jnp.where(better, code, codes_here)
                best_here = jnp.where(better, offer, best_here)
            covered += jnp.sum(covers & valid[:, None], axis=(2, 3), dtype=jnp.int32)
            codes_here = jnp.where(valid, codes_here, 0)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            return put(best, best_here), put(codes, codes_here), covered

        empty = jnp.zeros((batch, group), jnp.int32)
        num_strips = (end[:, 0].max() + rows - 1) // rows
        best, codes, added = jax.lax.fori_loop(0, num_strips, strip, (best, codes, empty))
        covered = jax.lax.dynamic_update_slice_in_dim(covered, added, first, axis=1)
        return best, codes, covered

    state = (
        jnp.full((batch, padded_height, width), -1.0),
        jnp.zeros((batch, padded_height, width), jnp.int32),
        jnp.zeros(order.shape, jnp.int32),
    )
    num_groups = (num_kept.max() + group - 1) // group
    _, codes, covered = jax.lax.fori_loop(0, num_groups, bid, state)
    codes = codes[:, :height]

    num_codes = 2 * num_queries + 2
    histogram = jax.vmap(lambda c: jnp.zeros(num_codes, jnp.int32).at[c.ravel()].add(1))(codes)
    histogram = histogram.reshape(batch, num_queries + 1, 2)[:, 1:]  # by rank; bare and covered
    by_rank = PixelCounts(
        owned=histogram.sum(axis=-1), covered=covered[:, :num_queries], both=histogram[..., 1]
    )
    rank = jnp.argsort(queries.order, axis=-1)
    counts = jax.tree.map(lambda count: jnp.take_along_axis(count, rank, axis=-1), by_rank)
    # The code of a pixel that its best bidder does not cover is only good for counting.
    codes = jnp.where(codes % 2 == 1, codes, 0)
    return codes.astype(jnp.uint8 if num_codes <= 256 else jnp.uint16), counts
