"""Stage 1: its terms, what gets a gradient and moves, targets online and cached, no unseen name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.batch import TARGET_FIELDS
from concat_jax.models.segmentor_output import normalize_images
from concat_jax.stages import con
from concat_jax.stages.clip_targets import clip_targets
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer, path_name
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState, make_train_step
from tests import tiny
from tests.tiny import KEY, UNSEEN

NETWORKS, VOCABULARY, CONTEXT = tiny.networks(), tiny.vocabulary(), tiny.context()


@pytest.fixture(scope="module")
def online():
    """The stage with CLIP in every step, its gradient function, and what that gives on a batch."""
    stage = con.make_stage(CONTEXT, con.Config())
    function = tiny.evaluate(stage)
    return stage, function, function(tiny.trained(stage), tiny.frozen(stage), tiny.batch(), KEY)


@pytest.fixture(scope="module")
def cached_batch():
    """The batch with the targets that CLIP would give, as a cache adds them."""
    batch = tiny.batch()
    targets = jax.jit(
        lambda clip, batch: clip_targets(
            NETWORKS.clip,
            clip,
            batch["image"],
            batch["segment_ids"],
            4,
            CONTEXT.crops,
            image_size=batch["image_size"],
        ),
    )(tiny.params("clip"), batch)
    batch |= dict(zip(TARGET_FIELDS, jax.device_get(targets), strict=True))
    del batch["image_size"]
    return batch


def projector_gradient(stage, batch):
    """((loss, metrics), gradient of the projector): all that the variants of a pull change."""

    def loss(projector, segmentor, frozen, batch):
        return stage.loss({"segmentor": segmentor, "projector": projector}, frozen, batch, KEY)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return gradient(tiny.params("projector"), tiny.params("segmentor"), tiny.frozen(stage), batch)


def test_con_trains_segmentor_and_projector_and_leaves_clip_alone(online):
    stage, _, ((value, metrics), (gradients, others)) = online
    assert stage.trains == ("segmentor", "projector") and stage.reads == ("text", "clip")
    tiny.assert_finite(value, metrics, gradients)
    parts = ("class", "mask", "dice", "global", "instance")
    np.testing.assert_allclose(value, sum(metrics[f"loss_{part}"] for part in parts), rtol=1e-5)
    assert tiny.unreached(stage, gradients) == set()
    assert not any("/frozen_" in name for name in tiny.reached(gradients))
    assert tiny.reached(others["clip"]) == set()


def test_con_does_not_see_unseen_names(online):
    """A number that is multiplied by zero would show as NaN, too."""
    stage, function, known = online
    blind = tiny.text()
    blind[UNSEEN] = np.nan
    arguments = tiny.batch(), KEY
    unknown = function(tiny.trained(stage), tiny.frozen(stage, blind), *arguments)
    tiny.assert_same(known, unknown)
    assert not np.asarray(known[1][1]["text"])[UNSEEN].any()
    other = tiny.text()
    other[1] = -other[1]
    seen = function(tiny.trained(stage), tiny.frozen(stage, other), *arguments)
    assert abs(seen[0][0] - known[0][0]) > 1e-4


def test_con_ignores_segments_of_unseen_classes_and_crowds(online):
    """A segment of an unseen class or a crowd is to the loss as if its row were padding."""
    stage, function, _ = online
    results = []
    for label, crowd in ((-1, False), (UNSEEN[0], False), (UNSEEN[1], False), (4, True)):
        batch = tiny.batch()
        batch["segment_labels"][1, 2], batch["segment_is_crowd"][1, 2] = label, crowd
        results.append(function(tiny.trained(stage), tiny.frozen(stage), batch, KEY))
    for other in results[1:]:
        tiny.assert_same(results[0], other)


def test_con_with_infonce_trains_the_projector_otherwise(online, cached_batch):
    (_, cosine), (cosine_gradients, _) = online[2]
    stage = con.make_stage(CONTEXT, con.Config(alignment="infonce", targets="cached"))
    (value, metrics), gradients = projector_gradient(stage, cached_batch)
    tiny.assert_finite(value, metrics, gradients)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    assert tiny.reached(gradients) == {path_name(path) for path, _ in leaves}
    np.testing.assert_allclose(metrics["loss_mask"], cosine["loss_mask"], rtol=1e-4)
    difference = gradients["layer_1"]["kernel"] - cosine_gradients["projector"]["layer_1"]["kernel"]
    assert np.abs(difference).max() > 1e-3


def test_small_segments_do_not_pull_and_an_image_can_pull_to_its_segments(cached_batch):
    """Both are other targets: as if the batch had them."""
    areas = np.stack(
        [np.bincount(ids.ravel(), minlength=5)[1:5] for ids in cached_batch["segment_ids"]]
    )
    limit = int(np.median(areas[areas > 0]))
    options = dict(targets="cached", min_area=limit, global_target="segments")
    other = dict(cached_batch)
    image_field, segment_field = TARGET_FIELDS
    targets = np.where((areas >= limit)[..., None], other[segment_field], 0)
    assert (targets != other[segment_field]).any() and targets.any()
    sums = targets.sum(axis=1)
    other[segment_field] = targets
    other[image_field] = sums / np.linalg.norm(sums, axis=-1, keepdims=True)
    found = []
    for batch, fields in ((cached_batch, options), (other, dict(targets="cached"))):
        stage = con.make_stage(CONTEXT, con.Config(**fields))
        arguments = tiny.trained(stage), tiny.frozen(stage), batch, KEY
        found.append(jax.jit(stage.loss)(*arguments)[1])
    for name, value in found[1].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-4, err_msg=name)


def test_large_segments_can_pull_more(cached_batch):
    """Of two segments in one image that are all there is to pull, by the root of their areas."""
    ids = np.zeros_like(cached_batch["segment_ids"])
    ids[0, :8, :8], ids[0, -2:, -8:] = 1, 2  # 64 and 16 pixels
    labels = np.full_like(cached_batch["segment_labels"], -1)
    labels[0, :2] = CONTEXT.vocabulary.seen[:2]
    field = TARGET_FIELDS[1]
    batch = {**cached_batch, "segment_ids": ids, "segment_labels": labels}
    single = []
    for kept in (0, 1):
        targets = np.zeros_like(batch[field])
        targets[0, kept] = cached_batch[field][0, kept]
        single.append({**batch, field: targets})
    stage = con.make_stage(CONTEXT, con.Config(targets="cached", area_power=0.5))
    loss = jax.jit(stage.loss)
    large, small, both = (
        loss(tiny.trained(stage), tiny.frozen(stage), given, KEY)[1]["loss_instance"]
        for given in (*single, batch)
    )
    assert abs(large - small) > 1e-2
    np.testing.assert_allclose(both, (2 * large + small) / 3, rtol=1e-5)


def test_con_without_alignment_does_not_take_clip():
    stage = con.make_stage(CONTEXT, con.Config(global_weight=0.0, instance_weight=0.0))
    assert stage.reads == ("text",)
    arguments = tiny.trained(stage), tiny.frozen(stage), tiny.batch(), KEY
    _, metrics = jax.eval_shape(stage.loss, *arguments)
    assert "loss_mask" in metrics and "loss_global" not in metrics


def test_con_learns_the_same_from_cached_targets_which_are_taken_where_at_hand(
    online, cached_batch
):
    stage = con.make_stage(tiny.context(has_clip_targets=True), con.Config())
    assert set(cached_batch) == set(stage.batch_fields)
    (_, metrics), gradients = projector_gradient(stage, cached_batch)
    (_, expected), (expected_gradients, _) = online[2]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)

    def compare(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max() + 1e-6)

    jax.tree.map(compare, gradients, expected_gradients["projector"])
    told = con.make_stage(tiny.context(has_clip_targets=True), con.Config(targets="online"))
    assert told.reads == ("text", "clip") and "image_size" in told.batch_fields


def test_con_aligns_the_sets_that_it_is_told_to(online, cached_batch):
    """The sum over prediction sets of the global term, written out; all sets by default."""

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

    stage = con.make_stage(CONTEXT, con.Config(targets="cached", aligned_sets=1))
    params, text = tiny.trained(stage), tiny.text()
    by_set = jax.jit(expected)(params, text, cached_batch)
    assert len(by_set) == 2 and np.ptp(by_set) > 1e-3
    loss = jax.jit(stage.loss)
    _, metrics = loss(params, tiny.frozen(stage), cached_batch, KEY)
    weight = CONTEXT.loss.class_weight * con.Config().global_weight
    np.testing.assert_allclose(metrics["loss_global"], weight * by_set[-1], rtol=1e-4)
    np.testing.assert_allclose(online[2][0][1]["loss_global"], weight * by_set.sum(), rtol=1e-3)


def test_con_with_cached_targets_holds_no_clip(online, cached_batch):
    """Neither among what the step is given, nor as constants, nor in what it computes."""
    stage = online[0]
    without = con.make_stage(CONTEXT, con.Config(targets="cached"))
    assert without.reads == ("text",)
    params = tiny.trained(stage)
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant"), 10, label_params(params, stage.rules)
    )
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)

    def trace(stage, batch):
        step = jax.jit(make_train_step(stage.loss, optimizer, 0, make_mesh(devices=1)))
        return step.trace(state, tiny.frozen(stage), batch)

    traced = trace(without, cached_batch)
    held, cached = trace(stage, tiny.batch()).lower(), traced.lower()
    clip = tiny.params("clip")
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(clip["vision_model"])}
    sizes -= {np.shape(leaf) for leaf in jax.tree.leaves((params, state, cached_batch))}
    assert sizes  # shapes that only CLIP's image tower has

    def arguments(lowered):
        return {tuple(leaf.shape) for leaf in jax.tree.leaves(lowered.args_info)}

    assert sizes <= arguments(held) and not sizes & arguments(cached)
    assert "vision_model" in held.as_text(debug_info=True)
    assert "vision_model" not in cached.as_text(debug_info=True)
    assert not sizes & {np.shape(constant) for constant in traced.jaxpr.consts}
    pictures = np.zeros((2 * (1 + 4), 16, 16, 3), np.float32)
    tower = jax.jit(
        lambda clip: NETWORKS.clip.apply({"params": clip}, pictures, method="encode_image")
    ).lower(clip)
    flops = [program.cost_analysis()["flops"] for program in (tower, cached, held)]
    assert flops[1] + flops[0] < flops[2]


def test_a_step_moves_all_but_frozen_statistics(online):
    """With decay off gradients alone move; a gradient on what the rules freeze moves nothing."""
    stage, _, (_, (gradients, _)) = online
    params = tiny.trained(stage)
    config = OptimizerConfig(schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(config, 10, label_params(params, stage.rules))
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert {name.split("/")[0] for name in names} == {"segmentor", "projector"}
    still = {name for name in names if "/frozen_" in name}
    assert len(still) > 20
    for given in (gradients, jax.tree.map(np.ones_like, params)):
        updates = jax.device_get(update(given, params))
        assert tiny.reached(jax.tree.map(np.sign, updates)).isdisjoint(still)
        assert tiny.unreached(stage, jax.tree.map(np.sign, updates)) == set()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(targets="cache"), "CON targets are 'cache'; did you mean 'cached'"),
        (dict(alignment="l2"), "CON alignment is 'l2'; there are cosine, infonce"),
        (dict(pooling="max"), "CON pooling is 'max'"),
    ],
)
def test_con_refuses_unknown_constants(field, message):
    with pytest.raises(ValueError, match=message):
        con.Config(**field)


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
