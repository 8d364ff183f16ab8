"""Images in the loop: the loss of the bank for the same images, and gradients where they belong."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.batch import TARGET_FIELDS
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.batches import BankConfig, fill_bank
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.generators import QueryGenerator
from concat_jax.models.mask2former import Segmentor
from concat_jax.models.networks import Networks
from concat_jax.models.segmentor_output import SegmentorOutput, normalize_images
from concat_jax.models.semantic_projector import SemanticProjector
from concat_jax.stages import cat, finetune
from concat_jax.stages.queries import (
    IMAGE_FIELDS,
    QueryBank,
    extract_queries,
    matching_key,
    on_images,
)
from concat_jax.stages.stage import MATCHING_PROJECTOR, Context
from tests import tiny

WIDTH, QUERIES, JOINT, BATCH = 8, 6, 16, 4
KEY = tiny.KEY
LOSS = SegmentationLossConfig(num_points=16)


class Norm(nn.Module):
    """What stages 2 and 3 read of a segmentor: the last LayerNorm of its decoder."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="decoder_norm")(x)


class PatchSegmentor(nn.Module):
    """Queries from the image's patches: a segmentor that compiles in no time."""

    width = WIDTH
    query_norm = staticmethod(Segmentor.query_norm)
    normalize = staticmethod(normalize_images)

    @nn.compact
    def __call__(self, images):
        features = nn.Conv(WIDTH, (4, 4), (4, 4), name="patches")(images)
        rows = nn.Dense(QUERIES * WIDTH, name="mix")(features.reshape(len(images), -1))
        queries = Norm(name="transformer_decoder")(rows.reshape(-1, 1, QUERIES, WIDTH))
        return SegmentorOutput(queries, nn.Dense(WIDTH, name="masks")(queries), features)


NETWORKS = Networks(
    clip=types.SimpleNamespace(embed_dim=JOINT),  # no image of these tests is CLIP's
    segmentor=PatchSegmentor(),
    projector=SemanticProjector(joint_width=JOINT, hidden_width=16, num_layers=2),
    generator=QueryGenerator(width=WIDTH, hidden_width=16, num_layers=1, noise_width=4),
)
# Class 0 is unseen: a label that is clipped to 0 would leak it.
VOCABULARY = Vocabulary(
    names=("red cat", "dog", "sky", "sea"),
    is_thing=(True, True, False, False),
    is_seen=(False, True, True, True),
    category_ids=(1, 2, 3, 4),
)
TEXT = tiny.unit(np.random.default_rng(0).normal(size=(4, JOINT)))


def random_params(name, seed):
    def init():
        if name != "segmentor":
            return NETWORKS.init(name, KEY)
        return NETWORKS.segmentor.init(KEY, jnp.zeros((1, 16, 16, 3)))["params"]

    return tiny.fill(jax.eval_shape(init), seed)


SEGMENTOR, GENERATOR = random_params("segmentor", 1), random_params("generator", 2)
# The finetune moves on from the projector that names the queries.
PROJECTOR, MOVED = random_params("projector", 3), random_params("projector", 4)


def image_batch():
    rng = np.random.default_rng(5)
    ids = np.zeros((BATCH, 16, 16), np.uint8)
    ids[:, :8], ids[:, 8:, :6] = 1, 2
    ids[1::2, 9:, 9:] = 3
    labels = np.array([[1, 2, -1], [3, 1, 0], [2, 3, -1], [1, 1, 2]], np.int32)
    return {
        "image": rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8),
        "segment_ids": ids,
        "segment_labels": labels,
        "segment_is_crowd": np.array([[False] * 3] * 3 + [[False, True, False]]),
        # Of half precision, as the bank holds them.
        TARGET_FIELDS[1]: tiny.unit(rng.normal(size=(BATCH, 3, JOINT)))
        .astype(np.float16)
        .astype(np.float32),
    }


CONTEXT = Context(NETWORKS, VOCABULARY, LOSS, has_clip_targets=True)
STAGES = {
    "cat": cat.make_stage(CONTEXT, cat.Config(unseen_names=False)),
    "finetune": finetune.make_stage(CONTEXT, finetune.Config(pseudo_per_class=2, deviation=0.7)),
    "control": finetune.make_stage(CONTEXT, finetune.Config(pseudo_per_class=0)),
    "fair control": finetune.make_stage(
        CONTEXT, finetune.Config(pseudo_per_class=0, con_weight=4.0)
    ),
}
ON_IMAGES = {name: on_images(stage, CONTEXT) for name, stage in STAGES.items()}


@functools.cache
def bank_queries():
    """Queries of the batch as the bank's extraction gives them."""
    extract = jax.jit(
        lambda params, batch: extract_queries(
            CONTEXT, params, TEXT, batch, matching_key(KEY), with_targets=True
        ),
    )
    params = {"segmentor": SEGMENTOR, "projector": PROJECTOR}
    return jax.device_get(extract(params, image_batch()))


def test_a_segmentor_normalises_its_images_itself():
    class Reversed(PatchSegmentor):
        normalize = staticmethod(lambda images: normalize_images(images[..., ::-1]))

    networks = dataclasses.replace(NETWORKS, segmentor=Reversed())
    batch = image_batch()
    batch["image"] = batch["image"][..., ::-1]
    found = extract_queries(
        dataclasses.replace(CONTEXT, networks=networks),
        {"segmentor": SEGMENTOR, "projector": PROJECTOR},
        TEXT,
        batch,
        matching_key(KEY),
    )
    np.testing.assert_allclose(found["queries"], bank_queries()["queries"], atol=1e-5)


@functools.cache
def gradient_of(stage):
    gradient = jax.value_and_grad(stage.loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)


def evaluate(stage, batch):
    """((loss, metrics), (gradients of what is trained, gradients of what is frozen))."""
    subtrees = {"segmentor": SEGMENTOR, "projector": PROJECTOR, "generator": GENERATOR}
    subtrees |= {"text": TEXT, MATCHING_PROJECTOR: PROJECTOR}
    frozen = {name: subtrees[name] for name in stage.reads}
    params = {name: MOVED if name == "projector" else subtrees[name] for name in stage.trains}
    batch = {field: batch[field] for field in stage.batch_fields}
    return gradient_of(stage)(params, frozen, batch, KEY)


@pytest.mark.parametrize("name", STAGES)
def test_the_first_step_from_images_is_that_from_their_bank(name, tmp_path):
    """Loss, metrics and gradients, through the files of a bank of these very images."""
    stage, variant = STAGES[name], ON_IMAGES[name]
    bank = fill_bank(
        tmp_path,
        {},
        lambda batch: bank_queries(),
        lambda steps: (image_batch() for _ in steps),
        num_batches=1,
        batch_size=BATCH,
        config=BankConfig(),
        with_targets=True,
    )
    batch = QueryBank(*bank[:2], batch_size=BATCH, seed=0, targets=bank.targets).batch(0)
    extracted = bank_queries()["queries"]
    order = np.argsort([np.abs(extracted - q).sum((1, 2)).argmin() for q in batch["queries"]])
    from_bank = evaluate(stage, {field: value[order] for field, value in batch.items()})
    assert variant.trains == stage.trains and variant.rules == stage.rules
    from_images = evaluate(variant, image_batch())

    (value, metrics), (gradients, others) = from_images
    (expected, expected_metrics), (expected_gradients, _) = from_bank
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(metrics) == set(expected_metrics)
    for metric, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[metric], number, rtol=1e-4, atol=1e-6, err_msg=metric)
    assert tiny.reached(gradients) == tiny.reached(expected_gradients) != set()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        gradients,
        expected_gradients,
    )
    assert not tiny.reached(others["segmentor"]) and not tiny.reached(others[MATCHING_PROJECTOR])


def test_the_batch_is_worth_a_test():
    queries, labels, targets = bank_queries().values()
    assert queries.shape == (BATCH, QUERIES, WIDTH) and labels.shape == (BATCH, QUERIES)
    # Seen segments that are no crowd, each held by one query; unseen and crowd by none.
    found = [sorted(row[row >= 0]) for row in labels]
    assert found == [[1, 2], [1, 3], [2, 3], [1, 2]]
    # A target is where a segment is held, and it is that segment's.
    np.testing.assert_array_equal(targets.any(axis=-1), labels >= 0)
    row, query = np.argwhere(labels == 3)[0]
    segment = np.flatnonzero(image_batch()["segment_labels"][row] == 3)[0]
    np.testing.assert_array_equal(
        targets[row, query], image_batch()[TARGET_FIELDS[1]][row, segment]
    )


def test_other_views_of_the_images_give_another_loss():
    stage = ON_IMAGES["control"]
    assert (
        stage.reads == ("text", "segmentor", MATCHING_PROJECTOR)
        and stage.batch_fields == IMAGE_FIELDS
    )
    batch = image_batch()
    flipped = {**batch, **{f: batch[f][:, :, ::-1] for f in ("image", "segment_ids")}}
    losses = [evaluate(stage, b)[0][0] for b in (batch, flipped)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_no_unseen_name_reaches_an_inductive_stage_on_images():
    _, (_, others) = evaluate(ON_IMAGES["cat"], image_batch())
    reads = np.asarray(others["text"]).any(axis=1)
    np.testing.assert_array_equal(reads, [False, True, True, True])


def test_a_memory_needs_the_bank():
    stage = cat.make_stage(CONTEXT, cat.Config(memory_per_class=4))
    with pytest.raises(
        ValueError, match="is drawn from a query bank.*set --config.train.STAGE.queries=bank, or"
    ):
        on_images(stage, CONTEXT)
