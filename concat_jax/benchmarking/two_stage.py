"""Our inference beside the same segmentor followed by CLIP on every mask.

The second is what `inference.clip_names` does where a model reads no names, of a set number of
masks. Pipelines that pool one pass of CLIP over the masks are not measured here.

Both paths share segmentor and post-processing. Each is one compiled program that sees images and
gives panoptic maps; the second spends nothing on a projector, on pixels that are not cropped, or on
more masks than it is asked to name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.benchmarking.cases import Case, pictures
from concat_jax.benchmarking.harness import Measurement, Work, table_in_turns
from concat_jax.benchmarking.programs import (
    compile_program,
    method_networks,
    random_embeddings,
    random_params,
)
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.clip_names import ImageTower, cut_masks, rank_masks, show_masks
from concat_jax.inference.heads import ClipHead, ClipQueries, LinearHead, TextHead
from concat_jax.inference.panoptic import Fate, SegmentTables, panoptic_inference
from concat_jax.inference.programs import Network, run_segmentor
from concat_jax.models.networks import Networks
from concat_jax.models.segmentor_output import ClipEmbeddings
from concat_jax.weights.model_folder import load_model

# CLIP's multiplier of cosines, as OVSeg has it.
CLIP_SCALE = 100.0
# Every query of a published Mask2Former: what pipelines that name all proposals would encode.
ALL_QUERIES = 100


def works(case: Case) -> dict[str, Work]:
    """All images by our path, and with CLIP on each number of masks, named by the model's classes.

    Raises:
      ValueError: if there are fewer queries than masks wanted, or an image cannot be read.
    """
    params, card = load_model(case.model)
    networks = method_networks(case, card)
    num_queries = networks.segmentor.num_queries
    if max(case.num_masks) > num_queries:
        raise ValueError(
            f"The segmentor predicts {num_queries} masks an image and CLIP is to see "
            f"{max(case.num_masks)} of them; ask for at most {num_queries}."
        )
    source = pictures(case)
    rows = [slice(x, x + case.batch) for x in range(0, len(source.images), case.batch)]
    chunks = [jax.device_put([column[r] for column in source]) for r in rows]
    paths = Paths(
        networks,
        card.vocabulary,
        is_padded=bool((source.image_size != source.images.shape[1:3]).any()),
        output_size=tuple(source.native_size.max(axis=0).tolist()),
    )
    text = jnp.asarray(random_embeddings(len(card.vocabulary), networks.clip.embed_dim))
    params = jax.device_put(params) | {
        name: random_params(networks, name) for name in ("projector", "clip")
    }

    def work(path: Callable[..., Result]) -> Work:
        jitted = jax.jit(path)  # which drops the parameters that a path does not read
        program, fields = compile_program(jitted, params, text, *chunks[0], calls=len(chunks))

        def call() -> dict[str, np.ndarray]:
            # A batch at a time is what fits; the next must not be under way beside it.
            results = [jax.block_until_ready(program(params, text, *chunk)) for chunk in chunks]
            kept = [np.isin(result.tables.fates, (Fate.SEGMENT, Fate.MERGED)) for result in results]
            return {
                "kept": np.concatenate(kept).sum(axis=1),
                "proposals": np.concatenate([result.num_proposals for result in results]),
            }

        return Work(call, **fields)

    with_clip = {
        f"CLIP on {number} masks an image": functools.partial(paths.two_stage, num_masks=number)
        for number in case.num_masks
    }
    return {name: work(path) for name, path in {"ours": paths.ours, **with_clip}.items()}


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """And what a mask costs, so that a reader can scale it to as many as their pipeline has."""
    (_, ours), *others = results.items()
    proposals, kept = (np.asarray(ours.outputs[key]) for key in ("proposals", "kept"))
    lines = [
        table_in_turns(results),
        f"Of an image's queries {proposals.mean():.1f} have a mask with a pixel; our "
        f"post-processing keeps {kept.mean():.1f} ({kept.min()} to {kept.max()}).",
    ]
    for (name, result), number in zip(others, case.num_masks, strict=True):
        cost = (result.median - ours.median) / (case.num_images * number)
        scaled = (ours.median + cost * case.num_images * ALL_QUERIES) / ours.median
        lines.append(
            f"{name}: {1000 * cost:.0f} ms a mask beyond ours, so all {ALL_QUERIES} queries would "
            f"be {scaled:.1f} times ours (scaled, not measured)."
        )
    return "\n".join(lines)


class Result(NamedTuple):
    """Maps [B, H', W'] int32, verdicts, and queries with a pixel at stride 4, [B] int32."""

    segment_ids: jax.Array
    tables: SegmentTables
    num_proposals: jax.Array


@dataclasses.dataclass(frozen=True)
class Paths:
    """The two ways from images to panoptic maps, each of which `output_size` fits.

    Both take parameters by subtree, text [K, C], images [B, H, W, 3], and [B, 2] int32 (height,
    width) of their valid areas and of the maps wanted.
    """

    networks: Networks
    vocabulary: Vocabulary
    is_padded: bool
    output_size: tuple[int, int]

    def ours(self, params: Any, text: jax.Array, images, image_size, native_size) -> Result:
        """As `Predictor` with a `TextHead`: the projector names the queries."""
        masks, queries = self.segment(params, images, image_size)
        head = TextHead(params["projector"], text, None, None, self.networks.projector)
        return self._finish(masks, head(queries).class_probs, image_size, native_size)

    def two_stage(
        self, params: Any, text: jax.Array, images, image_size, native_size, *, num_masks: int
    ) -> Result:
        """CLIP names the `num_masks` likeliest objects of an image; the others are none."""
        masks, queries = self.segment(params, images, image_size)
        own, clip = LinearHead(params["classifier"]), self.networks.clip
        tower = ImageTower.of(params["clip"], clip)
        order, counts = rank_masks(own, queries, masks, 0.0)
        chosen, stride = order[:, :num_masks], self.networks.segmentor.stride
        crops = cut_masks(tower, images, image_size, masks, chosen, stride=stride)
        known = ClipEmbeddings(
            jnp.zeros((*queries.shape[:2], clip.embed_dim)), jnp.zeros(queries.shape[:2], bool)
        )
        is_shown = jnp.arange(num_masks) < counts[:, None]
        seen = show_masks(tower, crops, chosen, is_shown, known)
        head = ClipHead(own, text, None, jnp.asarray(CLIP_SCALE))
        probs = head(ClipQueries(queries, seen)).class_probs
        return self._finish(masks, probs, image_size, native_size)

    def segment(self, params: Any, images, image_size) -> tuple[jax.Array, jax.Array]:
        """Mask logits [B, N, h, w], and queries."""
        return run_segmentor(
            Network(params["segmentor"], self.networks.segmentor),
            images,
            image_size,
            is_padded=self.is_padded,
            canvas=images.shape[1:3],
        )

    def _finish(self, masks: jax.Array, probs: jax.Array, image_size, native_size) -> Result:
        segment_ids, tables = panoptic_inference(
            masks,
            probs,
            jnp.asarray(self.vocabulary.is_thing),
            jnp.asarray(self.vocabulary.is_seen),
            output_size=self.output_size,
            source_size=image_size / self.networks.segmentor.stride,
            image_size=native_size,
            keep_rule=TextHead.KEEP_RULE,
        )
        return Result(segment_ids, tables, (masks > 0).any(axis=(2, 3)).sum(axis=1))
