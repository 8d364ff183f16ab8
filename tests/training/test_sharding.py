"""CON's train step on eight devices: the numbers of one device, and no batch sent around."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from concat_jax.benchmarking import abstract_programs
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.stages import con
from concat_jax.stages.stage import Context
from concat_jax.training import sharding
from concat_jax.training.optimizer import (
    OptimizerConfig,
    label_params,
    make_optimizer,
    path_name,
)
from concat_jax.training.sharding import (
    along_batch,
    make_mesh,
    replicated,
    shard_batch,
    split_by_rule,
)
from concat_jax.training.state import TrainState, make_train_step
from configs import coco_zps
from tests import tiny

LEARNING_RATE = 1e-2
BATCH = 8
# GroupNorm: all is trained.
BACKBONE = {**tiny.MODEL["segmentor"]["backbone"], "norm": "group"}
NETWORKS = make_networks(tiny.model(segmentor=dict(backbone=BACKBONE)))
VOCABULARY = tiny.vocabulary()


def image_batch():
    """Images that differ in how many segments they have: the mean must be the global one."""
    rng = np.random.default_rng(0)
    labels = np.full((BATCH, 4), -1, np.int32)
    ids = np.zeros((BATCH, 32, 32), np.uint8)
    for b in range(BATCH):
        for g in range(1 + b % 4):
            labels[b, g] = rng.choice(tiny.SEEN)
            ids[b, 8 * g : 8 * g + 8, : 8 + 3 * b] = g + 1
    return {
        "image": rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8),
        "segment_ids": ids,
        "segment_labels": labels,
        "segment_is_crowd": np.zeros((BATCH, 4), bool),
        "image_size": np.full((BATCH, 2), 32, np.int32),
    }


def by_name(tree):
    """{"a/b/c": leaf} of a tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def two_steps(devices, fsdp=1):
    """Two train steps as the loop takes them.

    Returns the HLO text, the metrics of both steps, the parameters after the first, their first
    moments by name (a tenth of the clipped gradient), the shardings of the state, and its bytes on
    the first device.
    """
    mesh = make_mesh(devices=devices, fsdp=fsdp)
    context = Context(NETWORKS, VOCABULARY, SegmentationLossConfig(num_points=64))
    stage = con.make_stage(context, con.Config())
    params = {name: tiny.params(name, seed, NETWORKS) for seed, name in enumerate(stage.trains)}
    text = tiny.text()
    frozen = {"clip": tiny.params("clip", 8, NETWORKS), "text": text}
    frozen = jax.device_put(frozen, split_by_rule(frozen, mesh))
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", clip_norm=1.0),
        10,
        label_params(params, stage.rules),
    )
    abstract = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    shardings = split_by_rule(abstract, mesh)
    make = jax.jit(
        lambda p: TrainState.create(p, optimizer),
        out_shardings=shardings,
    )
    state = make(params)
    step = jax.jit(
        make_train_step(stage.loss, optimizer, 0, mesh),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        batch = shard_batch(image_batch(), mesh)
        assert batch["image"].sharding == along_batch(mesh)
        compiled = step.lower(state, frozen, batch).compile()
        state, metrics = compiled(state, frozen, batch)
        after, first = jax.device_get((state, metrics))
        shardings = {leaf.sharding for leaf in jax.tree.leaves(state)}
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        _, second = jax.device_get(compiled(state, frozen, batch))
    moments = {
        name.split("/mu/")[1]: leaf
        for name, leaf in by_name(after.opt_state).items()
        if "/mu/" in name
    }
    return compiled.as_text(), (first, second), after.params, moments, shardings, here


@pytest.fixture(scope="module")
def one():
    return two_steps(1)


@pytest.fixture(scope="module")
def eight():
    return two_steps(8)


@pytest.fixture(scope="module")
def split():
    """On a mesh of 2 x 4 devices that splits small arrays, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SPLIT", 256)
        return two_steps(8, fsdp=4)


def collectives(text):
    """(kind, op_name) of every collective in an HLO text."""
    kinds = (
        "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    found = []
    for line in text.splitlines():
        match = re.search(rf"= [^=]*?\b({kinds})(-start)?\(", line)
        if match:
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match[1], name[1] if name else ""))
    return found


def test_random_numbers_do_not_depend_on_the_partitioning():
    """JAX's default; without it eight devices would sample other points than one."""
    assert jax.config.jax_threefry_partitionable


@pytest.mark.parametrize("mesh", ["eight", "split"])
def test_eight_devices_compute_what_one_computes(one, mesh, request):
    _, one_metrics, one_params, one_moments, *_ = one
    _, eight_metrics, eight_params, eight_moments, *_ = request.getfixturevalue(mesh)
    for first, second in zip(one_metrics, eight_metrics, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_allclose(second[name], first[name], rtol=1e-4, err_msg=name)
    assert one_metrics[0]["loss"] > 1 and one_metrics[1]["loss"] != one_metrics[0]["loss"]

    # Gradients first: Adam divides them by their size, which turns rounding noise into full steps.
    assert one_moments.keys() == by_name(one_params).keys()
    rounding = 1e-6 * max(np.abs(moment).max() for moment in one_moments.values())
    first, second = by_name(one_params), by_name(eight_params)
    before = by_name({name: tiny.params(name, s, NETWORKS) for s, name in enumerate(one_params)})
    moved = 0
    for name, moment in one_moments.items():
        scale = np.abs(moment).max()
        np.testing.assert_allclose(
            eight_moments[name], moment, rtol=0, atol=1e-4 * scale + rounding, err_msg=name
        )
        real = np.abs(moment) > 1e-2 * scale + 10 * rounding
        np.testing.assert_allclose(
            second[name][real],
            first[name][real],
            rtol=1e-4,
            atol=1e-4 * LEARNING_RATE,
            err_msg=name,
        )
        moved += np.sum(np.abs(first[name] - before[name])[real] > 0.5 * LEARNING_RATE)
    assert moved > 1000


def test_losses_of_split_parameters_are_those_of_replicated_ones(eight, split):
    for first, second in zip(eight[1], split[1], strict=True):
        for name in first:
            np.testing.assert_allclose(second[name], first[name], rtol=1e-5, err_msg=name)


def test_the_state_stays_on_every_device(eight):
    (everywhere,) = eight[4]
    assert len(everywhere.device_set) == 8 and everywhere.is_fully_replicated


def test_the_state_stays_split(eight, split):
    specs = {part.spec for part in split[4]}
    assert PartitionSpec() in specs and len(specs) > 2
    assert all(len(part.device_set) == 8 for part in split[4])
    assert eight[5] / 4 < split[5] < eight[5] / 3


def test_what_is_split_is_gathered_as_parameters_and_no_batch_is(split):
    """On a CPU XLA writes a reduce-scatter as a sum and the slice of it."""
    kinds = {(kind, name.split("/")[-1]) for kind, name in collectives(split[0])}
    assert {name for kind, name in kinds if kind != "all-reduce"} == {"sharding_constraint"}
    assert {kind for kind, _ in kinds} == {"all-reduce", "all-gather"}
    assert not [name for _, name in collectives(split[0]) if "/while/" in name]


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((512, 256), ("fsdp",)),
        ((256, 512), (None, "fsdp")),
        ((64, 64), ("fsdp",)),  # the first of equal ones
        ((1001, 3, 32), (None, None, "fsdp")),  # the largest that divides
        ((7, 1001), ()),  # none does
        ((4095,), ()),
        ((4096,), ("fsdp",)),
        ((), ()),
    ],
)
def test_the_rule_that_splits(shape, spec):
    arrays = {"a": [jax.ShapeDtypeStruct(shape, np.float32)]}
    mesh = make_mesh(fsdp=4)
    assert split_by_rule(arrays, mesh) == {"a": [NamedSharding(mesh, PartitionSpec(*spec))]}
    one = make_mesh()
    assert split_by_rule(arrays, one) == {"a": [replicated(one)]}


def test_the_full_config_leaves_an_eighth_on_each_of_eight_devices():
    mesh = make_mesh(fsdp=8)
    setup = abstract_programs.setup_of(coco_zps.get_config())
    state, _, _ = abstract_programs.training_program(setup, "con", mesh).arguments
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.size for leaf in leaves)
    here = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert whole > 3 * 44e6 and 1 / 8 < here / whole < 0.13


def test_no_batch_is_gathered_or_exchanged(eight):
    """Gradients and sums are reduced; nothing else may cross devices."""
    found = collectives(eight[0])
    assert "all-reduce" in {kind for kind, _ in found}
    others = [(kind, name) for kind, name in found if kind != "all-reduce"]
    assert not others, f"collectives that are no sum: {others}"


def test_no_collective_runs_inside_a_loop(eight):
    """The matching loops until its slowest problem is done; each shard must do so alone."""
    looping = [name for _, name in collectives(eight[0]) if "/while/" in name]
    assert not looping


def test_one_device_has_no_collective(one):
    assert collectives(one[0]) == []


def test_the_search_for_collectives_finds_them():
    mesh = make_mesh()
    total = jax.jit(lambda x: (x.sum(), x * 2), in_shardings=along_batch(mesh))
    text = total.lower(jax.ShapeDtypeStruct((8, 4), np.float32)).compile().as_text()
    assert {kind for kind, _ in collectives(text)} == {"all-reduce"}
    gather = jax.jit(
        lambda x: x * 2, in_shardings=along_batch(mesh), out_shardings=replicated(mesh)
    )
    text = gather.lower(jax.ShapeDtypeStruct((8, 4), np.float32)).compile().as_text()
    assert {kind for kind, _ in collectives(text)} == {"all-gather"}


def test_a_mesh_splits_the_batch_over_its_devices():
    mesh = make_mesh(devices=4)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1}
    batch = shard_batch({"x": np.arange(8)}, mesh)
    shards = [s.data.tolist() for s in batch["x"].addressable_shards]
    assert shards == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 devices does not fit the 8 .*config.mesh.devices"):
        make_mesh(9)
    for fsdp, remedy in ((3, 1), (6, 2), (0, 8), (-1, 1)):
        message = rf"fsdp = {fsdp} of 8 devices; set --config.mesh.fsdp={remedy} or"
        with pytest.raises(ValueError, match=message):
            make_mesh(fsdp=fsdp)
        assert make_mesh(fsdp=remedy).shape["fsdp"] == remedy
