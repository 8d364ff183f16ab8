"""Every stage's loss: finite, its gradients where they belong, and no unseen class leaking in."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.models.segmentor import normalize_images
from concat_jax.stages import cat, con, finetune, pretrain_clip
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from concat_jax.stages.stage import Context
from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
    path_name,
)
from concat_jax.training.state import TrainState, make_train_step

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
CONTEXT = Context(NETWORKS, VOCABULARY, SegmentationLossConfig(num_points=32))
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


def memory_batch():
    """The same with a memory: class 4 has no query, and rows from 6 on are padding."""
    rng = np.random.default_rng(15)
    valid = np.zeros((9, 3), bool)
    valid[[1, 2, 5]] = True
    memory = np.where(valid[..., None], rng.normal(size=(9, 3, 32)), 0).astype(np.float32)
    return {**query_batch(), "memory_queries": memory, "memory_valid": valid}


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
    return {name: text if name == "text" else PARAMS[name] for name in stage.reads}


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
    stage = con.make_stage(CONTEXT, con.Config())
    batch = image_batch()
    return stage, evaluate(stage, batch), batch


def test_con_trains_segmentor_and_projector_and_leaves_clip_alone(con_run):
    stage, function, batch = con_run
    (value, metrics), (gradients, others) = function(trained(stage), frozen(stage), batch, KEY)
    assert stage.trains == ("segmentor", "projector") and stage.reads == ("text", "clip")
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
    variant = con.make_stage(CONTEXT, con.Config(alignment="infonce"))

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
    stage = con.make_stage(CONTEXT, con.Config(global_weight=0.0, instance_weight=0.0))
    assert stage.reads == ("text",)
    _, metrics = jax.eval_shape(stage.loss, trained(stage), frozen(stage), image_batch(), KEY)
    assert "loss_mask" in metrics and "loss_global" not in metrics


def with_targets(batch):
    """The batch with the targets that CLIP would give, as a cache adds them."""
    targets = jax.jit(
        lambda clip, batch: clip_targets(
            NETWORKS.clip,
            clip,
            batch["image"],
            batch["segment_ids"],
            4,
            CropConfig(),
            image_size=batch["image_size"],
        ),
        compiler_options=FAST_COMPILE,
    )(PARAMS["clip"], batch)
    cached = {**batch, **dict(zip(con.TARGET_FIELDS, targets, strict=True))}
    del cached["image_size"]
    return cached


@pytest.fixture(scope="module")
def cached_con():
    return con.make_stage(CONTEXT, con.Config(targets="cached"))


def test_con_learns_the_same_from_cached_targets(con_run, cached_con):
    stage, function, batch = con_run
    online = function(trained(stage), frozen(stage), batch, KEY)
    cached_batch = with_targets(batch)

    def loss(projector, frozen, batch, rng):
        params = {**trained(cached_con), "projector": projector}
        return cached_con.loss(params, frozen, batch, rng)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)
    (_, metrics), gradients = gradient(PARAMS["projector"], frozen(cached_con), cached_batch, KEY)
    assert set(cached_batch) == set(cached_con.batch_fields)
    for name, value in online[0][1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    for path, ours in jax.tree_util.tree_leaves_with_path(gradients):
        theirs = online[1][0]["projector"]
        for key in path:
            theirs = theirs[key.key]
        tolerance = 1e-3 * np.abs(theirs).max() + 1e-6
        np.testing.assert_allclose(ours, theirs, atol=tolerance, err_msg=path_name(path))


@pytest.mark.parametrize("aligned_sets", [0, 1])
def test_con_aligns_the_sets_that_it_is_told_to(con_run, aligned_sets):
    """The mean over prediction sets of the global term, written out."""
    _, _, batch = con_run
    cached_batch = with_targets(batch)
    stage = con.make_stage(CONTEXT, con.Config(targets="cached", aligned_sets=aligned_sets))

    def expected(params, text, batch):
        output = NETWORKS.segmentor.apply(
            {"params": params["segmentor"]}, normalize_images(batch["image"])
        )
        projector = {"params": params["projector"]}
        semantic = NETWORKS.projector.apply(projector, output.queries)
        logits = NETWORKS.projector.apply(
            projector, semantic, text[VOCABULARY.seen], method="classify"
        )
        weights = jax.nn.softmax((1 - jax.nn.softmax(logits)[..., -1]) / 0.1)
        pooled = jnp.einsum("bln,blnc->blc", weights, semantic)
        pooled /= jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        cosines = jnp.einsum("blc,bc->bl", pooled, batch["clip_image_target"])
        return 1 - cosines.mean(axis=0)

    by_set = jax.jit(expected, compiler_options=FAST_COMPILE)(
        trained(stage), frozen(stage)["text"], cached_batch
    )
    assert len(by_set) == 2
    loss = jax.jit(stage.loss, compiler_options=FAST_COMPILE)
    _, metrics = loss(trained(stage), frozen(stage), cached_batch, KEY)
    np.testing.assert_allclose(metrics["loss_global"], by_set[-aligned_sets:].mean(), rtol=1e-4)
    assert np.ptp(by_set) > 1e-3


def test_con_with_cached_targets_holds_no_clip(con_run, cached_con):
    """Neither among what the step is given, nor as constants, nor in what it computes."""
    stage, _, batch = con_run
    cached_batch = {name: np.asarray(value) for name, value in with_targets(batch).items()}
    assert cached_con.reads == ("text",)
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant"), 10, label_params(trained(stage), stage.rules)
    )
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), trained(stage))

    def trace(stage, batch):
        step = jax.jit(make_train_step(stage.loss, optimizer, 0))
        return step.trace(state, frozen(stage), batch)

    traced = trace(cached_con, cached_batch)
    online, cached = trace(stage, batch).lower(), traced.lower()
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(PARAMS["clip"]["vision_model"])}
    sizes -= {np.shape(leaf) for leaf in jax.tree.leaves((trained(stage), state, cached_batch))}
    assert sizes  # shapes that only CLIP's image tower has

    def arguments(lowered):
        return {tuple(leaf.shape) for leaf in jax.tree.leaves(lowered.args_info)}

    assert sizes <= arguments(online) and not sizes & arguments(cached)
    assert "vision_model" in online.as_text(debug_info=True)
    assert "vision_model" not in cached.as_text(debug_info=True)
    assert not sizes & {np.shape(constant) for constant in traced.jaxpr.consts}
    pictures = np.zeros((batch["image"].shape[0] * (1 + 4), 16, 16, 3), np.float32)
    tower = jax.jit(
        lambda clip: NETWORKS.clip.apply({"params": clip}, pictures, method="encode_image")
    ).lower(PARAMS["clip"])
    flops = [program.cost_analysis()["flops"] for program in (tower, cached, online)]
    assert flops[1] + flops[0] < flops[2]


def test_con_refuses_unknown_targets():
    with pytest.raises(ValueError, match="CON targets are 'cache'; did you mean 'cached'"):
        con.Config(targets="cache")


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
        con.Config(alignment="l2")


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
    "default": cat.Config(),
    "inductive": cat.Config(unseen_names=False),
    "cosine by class": cat.Config(contrast_distance="cosine", mmd_per_class=True),
    "memory": cat.Config(
        class_contrast_weight=0.2,
        spread_weight=0.3,
        memory_per_class=3,
        memory_pseudo=True,
        mmd_memory=True,
    ),
}


@pytest.fixture(scope="module", params=CAT_VARIANTS)
def cat_run(request):
    stage = cat.make_stage(CONTEXT, CAT_VARIANTS[request.param])
    batch = memory_batch() if request.param == "memory" else query_batch()
    return request.param, stage, evaluate(stage, batch), batch


def test_cat_trains_the_generator_and_knows_unseen_names_only_if_told(cat_run):
    variant, stage, function, batch = cat_run
    known = function(trained(stage), frozen(stage), batch, KEY)
    (value, metrics), (gradients, others) = known
    assert stage.trains == ("generator",) and stage.reads == ("text", "segmentor", "projector")
    assert_finite(value, metrics, gradients)
    parts = {"mmd": 1.0, "contrast": 0.3, "cycle": 0.03}  # the config's defaults
    if variant == "memory":
        parts |= {"class_contrast": 0.2, "spread": 0.3}
    assert {f"loss_{part}" for part in parts} == {m for m in metrics if m.startswith("loss_")}
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
        for name in ("loss_mmd", "loss_contrast", "spread_ratio", "offset_ratio"):
            np.testing.assert_array_equal(changed[0][1][name], metrics[name])
    seen_changed = function(trained(stage), frozen(stage, OTHER_SEEN), batch, KEY)
    assert abs(seen_changed[0][0] - value) > 1e-4


def test_cat_survives_a_batch_without_a_matched_query(cat_run):
    _, stage, function, batch = cat_run
    empty = {**batch, "query_labels": np.full_like(batch["query_labels"], -1)}
    if "memory_valid" in batch:
        empty["memory_valid"] = np.zeros_like(batch["memory_valid"])
    (value, metrics), (gradients, _) = function(trained(stage), frozen(stage), empty, KEY)
    assert_finite(value, metrics, gradients)
    assert metrics["loss_mmd"] == 0 and metrics["loss_contrast"] == 0


def test_cat_learns_from_the_memory_what_the_batch_does_not_hold():
    """With a memory of the batch's own queries the losses are those of the batch."""
    config = cat.Config(class_contrast_weight=1.0, spread_weight=1.0, class_negatives=False)
    rng = np.random.default_rng(16)
    batch = {
        "queries": rng.normal(size=(2, 4, 32)).astype(np.float32),
        "query_labels": np.array([[1, 1, -1, -1], [4, 4, -1, -1]], np.int32),
        "memory_queries": np.zeros((6, 2, 32), np.float32),
        "memory_valid": np.zeros((6, 2), bool),
    }
    batch["memory_queries"][[1, 4]] = batch["queries"][:, :2]
    batch["memory_valid"][[1, 4]] = True
    batch["memory_queries"][0] = np.nan  # never valid, never read

    def metrics(**changes):
        stage = cat.make_stage(CONTEXT, dataclasses.replace(config, **changes))
        inputs = {name: batch[name] for name in stage.batch_fields}
        loss = jax.jit(stage.loss, compiler_options=FAST_COMPILE)
        return loss(trained(stage), frozen(stage), inputs, KEY)[1]

    plain, memory = metrics(), metrics(memory_per_class=2, mmd_memory=True)
    for name in ("loss_mmd", "loss_contrast", "loss_class_contrast", "offset_ratio"):
        np.testing.assert_allclose(memory[name], plain[name], rtol=1e-4, err_msg=name)
    batch["memory_valid"][2], batch["memory_queries"][2] = True, 3.0
    batch["memory_queries"][1] += 1.0
    changed = metrics(memory_per_class=2)
    np.testing.assert_allclose(changed["loss_mmd"], plain["loss_mmd"], rtol=1e-4)
    for name in ("loss_contrast", "loss_class_contrast", "loss_spread"):
        assert abs(changed[name] - memory[name]) > 1e-3, name
    with_memory = metrics(memory_per_class=2, mmd_memory=True)
    assert abs(with_memory["loss_mmd"] - plain["loss_mmd"]) > 1e-3


@pytest.mark.parametrize("name", ["memory_pseudo", "mmd_memory"])
def test_cat_refuses_to_use_a_memory_that_is_off(name):
    with pytest.raises(ValueError, match=f"{name} needs a memory; set memory_per_class"):
        cat.Config(**{name: True})


ALL_SEEN = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))


def test_unseen_names_are_refused_where_there_are_none():
    for make in (
        lambda **fields: cat.make_stage(Context(NETWORKS, ALL_SEEN), cat.Config(**fields)),
        lambda **fields: finetune.make_stage(
            Context(NETWORKS, ALL_SEEN), finetune.Config(pseudo_seen=True, **fields)
        ),
    ):
        with pytest.raises(ValueError, match="all 2 classes of the vocabulary are seen; set uns"):
            make()
        make(unseen_names=False)
    # The control generates nothing.
    finetune.make_stage(Context(NETWORKS, ALL_SEEN), finetune.Config(pseudo_per_class=0))
    with pytest.raises(ValueError, match="neither unseen nor seen classes; set pseudo_seen=True"):
        finetune.Config(unseen_names=False)


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
    "union": finetune.Config(pseudo_per_class=2),
    "seen and deviations": finetune.Config(pseudo_per_class=2, pseudo_seen=True, deviation=0.7),
    "control": finetune.Config(pseudo_per_class=0),
}


@pytest.fixture(scope="module", params=FINETUNE_VARIANTS)
def finetune_run(request):
    config = FINETUNE_VARIANTS[request.param]
    stage = finetune.make_stage(CONTEXT, config)
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
        assert stage.reads == ("text", "segmentor", "generator")
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
    assert stage.reads == ("text",)  # it is not even handed a generator
    assert_same(first, second)
    with_generator = {**frozen(stage), "generator": PARAMS["generator"]}
    offered = function(trained(stage), with_generator, query_batch(), KEY)
    assert_same(first[0], offered[0])
    assert_same(first[1][0], offered[1][0])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(offered[1][1]["generator"]))


def test_inductive_finetune_does_not_see_unseen_names():
    config = finetune.Config(pseudo_per_class=2, pseudo_seen=True, unseen_names=False)
    stage = finetune.make_stage(CONTEXT, config)
    function = evaluate(stage, query_batch())
    before = function(trained(stage), frozen(stage), query_batch(), KEY)
    other = {**frozen(stage), "text": OTHER_UNSEEN}
    after = function(trained(stage), other, query_batch(), KEY)
    assert_same(before[0], after[0])
    assert_same(before[1][0], after[1][0])
    assert_finite(*before[0], before[1][0])
    seen = function(trained(stage), {**frozen(stage), "text": OTHER_SEEN}, query_batch(), KEY)
    assert abs(seen[0][0] - before[0][0]) > 1e-5


INDUCTIVE = {
    "cat": cat.Config(
        unseen_names=False, class_contrast_weight=0.2, spread_weight=0.3, memory_per_class=3,
        memory_pseudo=True,
    ),
    "finetune": finetune.Config(
        pseudo_per_class=2, pseudo_seen=True, unseen_names=False, deviation=0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["con", *INDUCTIVE])
def test_no_unseen_name_reaches_an_inductive_stage(name, con_run):
    """A number that is multiplied by zero would show as NaN, too."""
    no_number = TEXT.copy()
    no_number[UNSEEN] = np.nan
    if name == "con":
        stage, function, batch = con_run
    else:
        module = {"cat": cat, "finetune": finetune}[name]
        stage = module.make_stage(CONTEXT, INDUCTIVE[name])
        batch = memory_batch() if name == "cat" else query_batch()
        function = evaluate(stage, batch)
    known = function(trained(stage), frozen(stage, TEXT), batch, KEY)
    blind = function(trained(stage), frozen(stage, no_number), batch, KEY)
    assert_finite(*known[0], known[1])
    assert_same(known[0], blind[0])
    assert_same(known[1], blind[1])
    if name != "con":
        config = dataclasses.replace(INDUCTIVE[name], unseen_names=True)
        told = module.make_stage(CONTEXT, config)
        # The same text where names are known: this test would see them.
        value, _ = jax.jit(told.loss, compiler_options=FAST_COMPILE)(
            trained(told), frozen(told, no_number), batch, KEY
        )
        assert np.isnan(value)


# What a stage trains, and what of it gets no gradient: statistics of a frozen batch norm, and
# biases of attention's keys, which shift all logits of a query alike.
WHOLE_TREE = {
    "con": (("segmentor", "projector"), r"/frozen_(scale|bias|mean|variance)$|/(key|k_proj)/bias$"),
    "cat": (("generator",), None),
    "finetune": (("projector",), None),
}


@pytest.mark.parametrize("name", WHOLE_TREE)
def test_a_step_moves_exactly_what_the_stage_trains(name, con_run):
    """Over all four networks: a real step of the loop's, with decay off so gradients alone move."""
    subtrees, exceptions = WHOLE_TREE[name]
    stage, function, batch = con_run
    if name == "cat":
        batch = query_batch()
        stage = cat.make_stage(CONTEXT, cat.Config())
        function = evaluate(stage, batch)
    elif name == "finetune":
        batch = query_batch()
        config = finetune.Config(pseudo_per_class=2)
        stage = finetune.make_stage(CONTEXT, config)
        function = evaluate(stage, batch)
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant", weight_decay=0.0),
        10,
        label_params(trained(stage), stage.rules),
    )
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), trained(stage))
    assert set(state.params) == set(subtrees)  # the loop differentiates by these alone

    _, (gradients, _) = function(trained(stage), frozen(stage), batch, KEY)
    update = jax.jit(
        lambda g, p: optimizer.update(g, optimizer.init(p), p)[0], compiler_options=FAST_COMPILE
    )
    updates = update(gradients, trained(stage))
    nothing = jax.tree.map(np.zeros_like, PARAMS)
    whole = {**nothing, **jax.tree.map(lambda g, u: np.abs(g) * (u != 0), gradients, updates)}
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)}
    expected = {path for path in names if path.split("/")[0] in subtrees}
    if exceptions:
        excluded = {path for path in expected if re.search(exceptions, path)}
        assert excluded
        expected -= excluded
    assert reached(whole) == expected


def test_finetune_cross_entropy_by_hand():
    """Two real queries, one of them without a segment, against a softmax written out."""
    config = finetune.Config(pseudo_per_class=0, no_object_weight=0.25)
    stage = finetune.make_stage(CONTEXT, config)
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
    stage = pretrain_clip.make_stage(CONTEXT, pretrain_clip.Config(erase_probability=0.5))
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
