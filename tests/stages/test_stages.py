"""Every stage's loss: finite, its gradients where they belong, and no unseen class leaking in."""

import functools
import re

import jax
import numpy as np
import pytest

from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.stages import cat, con, finetune, pretrain_clip
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.text.vocabulary import Vocabulary
from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
    path_name,
)

# The programs run once, so compiling them is what these tests cost.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KEY = jax.random.key(3)

NETWORKS = make_networks(
    {
        "clip": dict(
            embed_dim=16,
            image_size=16,
            patch_size=8,
            image_width=16,
            image_depth=1,
            image_heads=2,
            text_width=16,
            text_depth=1,
            text_heads=2,
            vocab_size=12,
            context_length=5,
            eot_id=11,
        ),
        "segmentor": dict(
            # Frozen statistics: the only parameters that CON must leave alone.
            backbone=dict(
                stage_sizes=(1, 1, 1, 1), width=8, block="basic", norm="frozen_batch", stem="small"
            ),
            width=32,
            num_queries=6,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_heads=4,
            num_points=2,
            ffn_width=32,
            decoder_ffn_width=32,
            num_groups=8,
        ),
        "projector": dict(hidden_width=16, num_layers=2),
        "generator": dict(hidden_width=16, num_layers=1, noise_width=4),
    }
)
# Class 0 is unseen: a padded label that is clipped to 0 would leak it.
VOCABULARY = Vocabulary(
    names=("red cat", "dog", "blue cat", "sky", "sea", "grass"),
    is_thing=(True, True, True, False, False, False),
    is_seen=(False, True, True, False, True, True),
    category_ids=(1, 2, 3, 4, 5, 6),
)
SEEN, UNSEEN = [1, 2, 4, 5], [0, 3]


def random_params(name, seed):
    """Parameters of a network with nothing at zero: zero kernels hide the gradients behind them."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path_name(path).endswith("variance"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        offset = 1.0 if path_name(path).endswith("scale") else 0.0
        return (offset + rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    shapes = jax.eval_shape(lambda: NETWORKS.init(name, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


PARAMS = {
    name: random_params(name, seed)
    for seed, name in enumerate(("clip", "segmentor", "projector", "generator"))
}
TEXT = unit(np.random.default_rng(10).normal(size=(len(VOCABULARY), 16)))
OTHER_UNSEEN = TEXT.copy()
OTHER_UNSEEN[UNSEEN] = unit(np.random.default_rng(11).normal(size=(2, 16)))
OTHER_SEEN = TEXT.copy()
OTHER_SEEN[SEEN[0]] = OTHER_UNSEEN[UNSEEN[0]]


def image_batch():
    rng = np.random.default_rng(12)
    ids = np.zeros((2, 32, 32), np.uint8)
    ids[:, :16], ids[:, 16:, :12] = 1, 2
    ids[1, 20:, 20:] = 3
    return {
        "image": rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "segment_ids": ids,
        "segment_labels": np.array([[1, 4, -1, -1], [2, 5, 4, -1]], np.int32),
        "segment_is_crowd": np.zeros((2, 4), bool),
        "image_size": np.full((2, 2), 32, np.int32),
    }


def query_batch():
    rng = np.random.default_rng(13)
    labels = np.array([[1, -1, 4, -1], [2, 1, -1, -1], [5, 4, 2, -1]], np.int32)
    # Classes sit apart, as real queries do.
    centres = rng.normal(size=(len(VOCABULARY) + 1, 32))
    queries = centres[labels] + 0.3 * rng.normal(size=(*labels.shape, 32))
    return {"queries": queries.astype(np.float32), "query_labels": labels}


def caption_batch():
    tokens = np.array([[10, 1, 2, 11, 0], [10, 3, 11, 0, 0], [10, 1, 2, 11, 0], [10, 4, 5, 6, 11]])
    images = np.random.default_rng(14).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return {"image": images, "tokens": tokens.astype(np.int32)}


def evaluate(stage, batch):
    """(params, frozen, batch, rng) -> ((loss, metrics), gradients of params and of frozen)."""
    assert set(batch) == set(stage.batch_fields)
    return jax.jit(
        jax.value_and_grad(stage.loss, argnums=(0, 1), has_aux=True), compiler_options=FAST_COMPILE
    )


def trained(stage):
    return {name: PARAMS[name] for name in stage.trains}


def frozen(stage, text=TEXT):
    """What the loop hands over: the subtrees the stage says it reads, and nothing else."""
    given = {name: PARAMS[name] for name in stage.reads}
    return given if text is None else {**given, "text": text}


def reached(gradients):
    """Names of the parameters with a gradient above rounding."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(gradients))
    return {path_name(path) for path, g in leaves if np.abs(g).max() > 1e-6}


def to_train(stage):
    """Names of the parameters that the stage's rules do not freeze."""
    labels = label_params(trained(stage), stage.rules)
    leaves = jax.tree_util.tree_leaves_with_path(labels)
    return {path_name(path) for path, label in leaves if label != FROZEN}


def unreached(stage, gradients):
    """Trained parameters without a gradient, less attention's key biases, which softmax cancels."""
    missing = to_train(stage) - reached(gradients)
    return {name for name in missing if not re.search(r"/(key|k_proj)/bias$", name)}


def assert_finite(value, metrics, gradients):
    assert np.isfinite(value)
    assert metrics["loss"] == value
    for name, metric in metrics.items():
        assert np.isfinite(metric) and np.shape(metric) == (), name
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path_name(path)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def con_run():
    stage = con.make_stage(
        NETWORKS,
        VOCABULARY,
        con.ConConfig(),
        SegmentationLossConfig(num_points=32),
        CropConfig(),
    )
    batch = image_batch()
    return stage, evaluate(stage, batch), batch


def test_con_trains_segmentor_and_projector_and_leaves_clip_alone(con_run):
    stage, function, batch = con_run
    (value, metrics), (gradients, others) = function(trained(stage), frozen(stage), batch, KEY)
    assert stage.trains == ("segmentor", "projector") and stage.reads == ("clip",)
    assert_finite(value, metrics, gradients)
    parts = ("class", "mask", "dice", "global", "instance")
    np.testing.assert_allclose(value, sum(metrics[f"loss_{part}"] for part in parts), rtol=1e-5)
    assert unreached(stage, gradients) == set()
    assert reached(gradients) <= to_train(stage)
    assert reached(others["clip"]) == set()


def test_con_does_not_see_unseen_names(con_run):
    stage, function, batch = con_run
    known = function(trained(stage), frozen(stage), batch, KEY)
    changed = function(trained(stage), frozen(stage, OTHER_UNSEEN), batch, KEY)
    assert_same(known, changed)
    assert not np.asarray(known[1][1]["text"])[UNSEEN].any()
    seen_changed = function(trained(stage), frozen(stage, OTHER_SEEN), batch, KEY)
    assert abs(seen_changed[0][0] - known[0][0]) > 1e-4


def test_con_ignores_segments_of_unseen_classes_and_crowds(con_run):
    """A segment of an unseen class or a crowd is to the loss as if its row were padding."""
    stage, function, batch = con_run
    results = []
    for label, crowd in ((-1, False), (UNSEEN[0], False), (UNSEEN[1], False), (4, True)):
        labels, crowds = batch["segment_labels"].copy(), batch["segment_is_crowd"].copy()
        labels[1, 2], crowds[1, 2] = label, crowd
        changed = {**batch, "segment_labels": labels, "segment_is_crowd": crowds}
        results.append(function(trained(stage), frozen(stage), changed, KEY))
    for other in results[1:]:
        assert_same(results[0], other)


def test_con_with_infonce_trains_the_projector_otherwise(con_run):
    stage, function, batch = con_run
    variant = con.make_stage(
        NETWORKS,
        VOCABULARY,
        con.ConConfig(alignment="infonce"),
        SegmentationLossConfig(num_points=32),
        CropConfig(),
    )

    def loss(projector, frozen, batch, rng):
        params = {**trained(variant), "projector": projector}
        return variant.loss(params, frozen, batch, rng)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)
    (value, metrics), gradients = gradient(PARAMS["projector"], frozen(variant), batch, KEY)
    assert_finite(value, metrics, gradients)
    leaves = jax.tree_util.tree_leaves_with_path(PARAMS["projector"])
    assert reached(gradients) == {path_name(path) for path, _ in leaves}
    (_, cosine), (cosine_gradients, _) = function(trained(stage), frozen(stage), batch, KEY)
    np.testing.assert_allclose(metrics["loss_mask"], cosine["loss_mask"], rtol=1e-4)
    last = "layer_1"
    difference = gradients[last]["kernel"] - cosine_gradients["projector"][last]["kernel"]
    assert np.abs(difference).max() > 1e-3


def test_con_without_alignment_does_not_take_clip():
    stage = con.make_stage(
        NETWORKS,
        VOCABULARY,
        con.ConConfig(global_weight=0.0, instance_weight=0.0),
        SegmentationLossConfig(num_points=32),
        CropConfig(),
    )
    assert stage.reads == ()
    _, metrics = jax.eval_shape(stage.loss, trained(stage), frozen(stage), image_batch(), KEY)
    assert "loss_mask" in metrics and "loss_global" not in metrics


def test_con_optimizer_leaves_frozen_statistics_and_moves_the_rest(con_run):
    """Even a gradient where there should be none cannot move what the rules freeze."""
    stage = con_run[0]
    params = trained(stage)
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 10, labels)
    ones = jax.tree.map(np.ones_like, params)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def update(gradients, params):
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    updates = update(ones, params)
    moved = {
        path_name(path)
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.asarray(update).any()
    }
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names - moved == {name for name in names if "/frozen_" in name}
    assert len(names - moved) > 20


def test_con_refuses_an_unknown_alignment():
    with pytest.raises(ValueError, match="'l2'.*'cosine' or 'infonce'"):
        con.ConConfig(alignment="l2")


def test_training_labels_by_hand():
    labels = np.array([[1, 5, 0, 3, -1, 2]])
    crowd = np.array([[False, False, False, False, False, True]])
    rows = con.training_labels(labels, crowd, VOCABULARY)
    np.testing.assert_array_equal(rows, [[0, 3, -1, -1, -1, -1]])


def test_matched_accuracy_by_hand():
    logits = np.zeros((1, 3, 3), np.float32)
    logits[0, 0, 1] = logits[0, 1, 0] = 1
    logits[0, 2, 2] = 1  # no-object is not a class that a matched query may answer
    labels = np.array([[1, 1, 0]])
    np.testing.assert_allclose(con.matched_accuracy(logits, labels), 2 / 3)
    assert con.matched_accuracy(logits, np.full((1, 3), 2)) == 0


CAT_VARIANTS = {
    "default": cat.CatConfig(),
    "inductive": cat.CatConfig(unseen_names=False),
    "cosine by class": cat.CatConfig(contrast_distance="cosine", mmd_per_class=True),
}


@pytest.fixture(scope="module", params=CAT_VARIANTS)
def cat_run(request):
    stage = cat.make_stage(NETWORKS, VOCABULARY, CAT_VARIANTS[request.param])
    batch = query_batch()
    return request.param, stage, evaluate(stage, batch), batch


def test_cat_trains_the_generator_and_knows_unseen_names_only_if_told(cat_run):
    variant, stage, function, batch = cat_run
    known = function(trained(stage), frozen(stage), batch, KEY)
    (value, metrics), (gradients, others) = known
    assert stage.trains == ("generator",) and stage.reads == ("segmentor", "projector")
    assert_finite(value, metrics, gradients)
    parts = {"mmd": 1.0, "contrast": 0.1, "cycle": 0.1}  # the config's defaults
    total = sum(weight * metrics[f"loss_{part}"] for part, weight in parts.items())
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert all(metrics[f"loss_{part}"] > 0 for part in parts)
    assert unreached(stage, gradients) == set()
    # Only the scale that pseudo queries go through is read of the segmentor.
    assert reached(others["segmentor"]) == set()

    changed = function(trained(stage), frozen(stage, OTHER_UNSEEN), batch, KEY)
    if variant == "inductive":
        assert_same(known, changed)
        assert not np.asarray(others["text"])[UNSEEN].any()
    else:
        assert abs(changed[0][1]["loss_cycle"] - metrics["loss_cycle"]) > 1e-4
        # What is learnt from real queries cannot depend on classes that have none.
        for name in ("loss_mmd", "loss_contrast", "spread_ratio"):
            np.testing.assert_array_equal(changed[0][1][name], metrics[name])
    seen_changed = function(trained(stage), frozen(stage, OTHER_SEEN), batch, KEY)
    assert abs(seen_changed[0][0] - value) > 1e-4


def test_cat_survives_a_batch_without_a_matched_query(cat_run):
    _, stage, function, batch = cat_run
    empty = {**batch, "query_labels": np.full_like(batch["query_labels"], -1)}
    (value, metrics), (gradients, _) = function(trained(stage), frozen(stage), empty, KEY)
    assert_finite(value, metrics, gradients)
    assert metrics["loss_mmd"] == 0 and metrics["loss_contrast"] == 0


def test_generated_queries_have_the_scale_of_the_last_layer_norm():
    text = np.repeat(TEXT[:2], 500, axis=0)
    queries = np.asarray(cat.generate(NETWORKS, PARAMS, text, KEY))
    norm = PARAMS["segmentor"]["transformer_decoder"]["decoder_norm"]
    normalised = (queries - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(normalised.mean(axis=-1), 0, atol=1e-4)
    np.testing.assert_allclose((normalised**2).mean(axis=-1), 1, atol=1e-3)
    # Queries of one class differ by their noise, and classes differ by more than that.
    within = queries[:500].std(axis=0).mean()
    assert within > 0.01
    assert not np.array_equal(queries[0], queries[1])


FINETUNE_VARIANTS = {
    "union": finetune.FinetuneConfig(pseudo_per_class=2),
    "seen and deviations": finetune.FinetuneConfig(
        pseudo_per_class=2, pseudo_seen=True, deviation=0.7
    ),
    "control": finetune.FinetuneConfig(pseudo_per_class=0),
}


@pytest.fixture(scope="module", params=FINETUNE_VARIANTS)
def finetune_run(request):
    config = FINETUNE_VARIANTS[request.param]
    stage = finetune.make_stage(NETWORKS, VOCABULARY, config)
    return config.pseudo_per_class, stage, evaluate(stage, query_batch())


def test_finetune_trains_the_projector_only(finetune_run):
    pseudo_per_class, stage, function = finetune_run
    known = function(trained(stage), frozen(stage), query_batch(), KEY)
    (value, metrics), (gradients, others) = known
    assert stage.trains == ("projector",)
    assert_finite(value, metrics, gradients)
    assert unreached(stage, gradients) == set()
    # Names of all classes compete, so both kinds of rows matter, with pseudo queries or without.
    assert np.abs(others["text"]).max(axis=1).all()
    if pseudo_per_class:
        assert stage.reads == ("segmentor", "generator")
        assert reached(others["segmentor"]) == set()
        assert "accuracy_pseudo" in metrics
        other = {**frozen(stage), "generator": random_params("generator", 77)}
        changed = function(trained(stage), other, query_batch(), KEY)
        assert abs(changed[0][0] - value) > 1e-5


def test_finetune_control_ignores_generator_and_noise(finetune_run):
    pseudo_per_class, stage, function = finetune_run
    first = function(trained(stage), frozen(stage), query_batch(), KEY)
    second = function(trained(stage), frozen(stage), query_batch(), jax.random.key(4))
    if pseudo_per_class:
        assert abs(first[0][0] - second[0][0]) > 1e-6
        return
    assert stage.reads == ()  # it is not even handed a generator
    assert_same(first, second)
    with_generator = {**frozen(stage), "generator": PARAMS["generator"]}
    offered = function(trained(stage), with_generator, query_batch(), KEY)
    assert_same(first[0], offered[0])
    assert_same(first[1][0], offered[1][0])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(offered[1][1]["generator"]))


def test_inductive_finetune_does_not_see_unseen_names():
    config = finetune.FinetuneConfig(pseudo_per_class=2, pseudo_seen=True, unseen_names=False)
    stage = finetune.make_stage(NETWORKS, VOCABULARY, config)
    function = evaluate(stage, query_batch())
    before = function(trained(stage), frozen(stage), query_batch(), KEY)
    other = {**frozen(stage), "text": OTHER_UNSEEN}
    after = function(trained(stage), other, query_batch(), KEY)
    assert_same(before[0], after[0])
    assert_same(before[1][0], after[1][0])
    assert_finite(*before[0], before[1][0])
    seen = function(trained(stage), {**frozen(stage), "text": OTHER_SEEN}, query_batch(), KEY)
    assert abs(seen[0][0] - before[0][0]) > 1e-5


def test_finetune_cross_entropy_by_hand():
    """Two real queries, one of them without a segment, against a softmax written out."""
    config = finetune.FinetuneConfig(pseudo_per_class=0, no_object_weight=0.25)
    stage = finetune.make_stage(NETWORKS, VOCABULARY, config)
    batch = {
        "queries": np.random.default_rng(5).normal(size=(1, 2, 32)).astype(np.float32),
        "query_labels": np.array([[4, -1]], np.int32),
    }
    value, metrics = stage.loss(trained(stage), frozen(stage), batch, KEY)
    logits = NETWORKS.projector.apply(
        {"params": PARAMS["projector"]}, batch["queries"], TEXT, method="predict"
    )
    exponents = np.exp(np.asarray(logits, np.float64)[0])
    probabilities = exponents / exponents.sum(axis=-1, keepdims=True)
    expected = -(np.log(probabilities[0, 4]) + 0.25 * np.log(probabilities[1, 6])) / 1.25
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert metrics["accuracy_real"] in (0.0, 1.0)


def test_sampled_deviations_by_hand():
    """Class 0 has two queries, class 1 one; what holds no segment has no class to deviate from."""
    queries = np.array([[[1.0, 2.0], [5.0, 5.0]], [[3.0, 6.0], [100.0, 100.0]]], np.float32)
    labels = np.array([[0, 1], [0, -1]])
    drawn = finetune.sample_deviations(KEY, queries, labels, num_classes=3, count=300)
    assert drawn.shape == (300, 2)
    rows, counts = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    np.testing.assert_array_equal(rows, [[-1, -2], [0, 0], [1, 2]])
    assert counts.min() > 70  # a third each
    nothing = finetune.sample_deviations(KEY, queries, np.full((2, 2), -1), 3, 10)
    np.testing.assert_array_equal(nothing, np.zeros((10, 2)))


def test_pretrain_clip_trains_all_of_clip():
    stage = pretrain_clip.make_stage(
        NETWORKS, pretrain_clip.PretrainClipConfig(erase_probability=0.5)
    )
    batch = caption_batch()
    function = evaluate(stage, batch)
    (value, metrics), (gradients, _) = function(trained(stage), {}, batch, KEY)
    assert stage.trains == ("clip",) and stage.reads == ()
    assert_finite(value, metrics, gradients)
    assert unreached(stage, gradients) == set()
    # With every caption alike nothing can be told apart, and nothing is asked to be.
    same = {**batch, "tokens": np.repeat(batch["tokens"][:1], 4, axis=0)}
    (_, metrics), _ = function(trained(stage), {}, same, KEY)
    assert metrics["accuracy"] == 1
