"""The pure parts of the TPU report: reading HLO text, formatting, refusing; no compiler needed."""

import builtins
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from concat_jax.benchmarking import abstract_programs, chips, compile_report
from concat_jax.benchmarking.abstract_programs import Program
from concat_jax.benchmarking.compile_report import (
    Collective,
    Report,
    find_collectives,
    format_report,
)
from concat_jax.training.sharding import make_mesh
from configs import coco_zps

# Lines as the TPU compiler prints them, shortened.
HLO = """
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[8,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), to_apply=%add
  ROOT %slice = f32[8,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %start, %zero)
}

ENTRY %main {
  %fusion = f32[8,8]{1,0:T(8,128)} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=4}
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = (f32[256]{0:T(256)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%a, %b), \
channel_id=1, metadata={op_name="jit(step)/transpose(jvp(Segmentor))/add_any" stack_frame_id=3}
  %all-gather-start = (u8[1,4]{1,0}, u8[16,4]{1,0}) all-gather-start(u8[1,4]{1,0} %c), \
metadata={op_name="jit(step)/while/body/reshape"}
  %all-gather-done = u8[16,4]{1,0} all-gather-done(%all-gather-start)
  %permute = s32[] collective-permute(%d), source_target_pairs={{0,1}}
  %get = f32[256]{0} get-tuple-element(%all-reduce.1), index=0
"""


def test_collectives_are_found_with_their_size_and_source():
    assert find_collectives(HLO) == [
        Collective("reduce-scatter", 256, "jit(step)/transpose(jvp())/dot_general"),
        Collective("all-reduce", 4 * 256 + 2 * 6, "jit(step)/transpose(jvp(Segmentor))/add_any"),
        Collective("all-gather", 64, "jit(step)/while/body/reshape"),
        Collective("collective-permute", 4, "unnamed"),
    ]
    assert [c.in_loop for c in find_collectives(HLO)] == [False, False, True, False]


def test_collectives_of_a_program_that_was_compiled():
    mesh = make_mesh()
    sharded = jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    total = jax.jit(lambda x: x.sum(), in_shardings=sharded)
    text = total.lower(jax.ShapeDtypeStruct((8, 4), np.float32)).compile().as_text()
    assert [(c.kind, c.num_bytes) for c in find_collectives(text)] == [("all-reduce", 4)]


@pytest.mark.parametrize(
    "text, size",
    [
        ("f32[]", 4),
        ("pred[3,5]{1,0}", 15),
        ("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[2])", 2056),
        ("(token[], u64[3])", 24),
        ("f8e4m3fn[10]", 10),
        ("f32[0,4]", 0),
    ],
)
def test_array_bytes(text, size):
    assert compile_report.array_bytes(text) == size


def test_expected_cycles():
    line = 'ROOT %f = f32[2] fusion(%p), backend_config={"estimated_cycles":"{}","iterations":"9"}'
    text = "\n".join(line.replace("{}", str(cycles)) for cycles in (40, 2))
    assert compile_report.expected_cycles(text) == 42
    unknown = "\n".join(line.replace("{}", str(2**bits - 1)) for bits in (63, 64))
    assert compile_report.expected_cycles(f"{text}\n{unknown}") == 42
    assert compile_report.expected_cycles(HLO) == 0


LOOPS = """HloModule step

%inner_condition (p: (s32[], f32[2])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %f = f32[2] fusion(%p), backend_config={"estimated_cycles":"10"}
}

%outer_condition (p: (s32[], f32[2])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %a = f32[2] fusion(%p), backend_config={"estimated_cycles":"1000"}
  ROOT %w = (s32[], f32[2]) while(%t), condition=%inner_condition, body=%inner
}

%until_met (p: f32[2]) -> pred[] {
  ROOT %c = pred[] fusion(%p), calls=%x, backend_config={"estimated_cycles":"5"}
}

%either (p: f32[2]) -> f32[2] {
  ROOT %b = f32[2] copy(%p), backend_config={"estimated_cycles":"100000"}
}

%unused (p: f32[2]) -> f32[2] {
  ROOT %b = f32[2] copy(%p), backend_config={"estimated_cycles":"400000"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %w = (s32[], f32[2]) while(%t), condition=%outer_condition, body=%outer
  %u = f32[2] while(%t), condition=%until_met, body=%either
  ROOT %r = f32[2] conditional(%p, %u, %x), true_computation=%either, false_computation=%either
}
"""


def test_cycles_of_loops():
    assert compile_report.whole_cycles(LOOPS) == 3 * (1000 + 7 * 10) + 5 + 3 * 100_000
    assert compile_report.expected_cycles(LOOPS) == 501_015


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2.5e9, "2.50 GB")]
)
def test_format_bytes(count, text):
    assert compile_report.format_bytes(count) == text


def make_report(collectives):
    memory = {
        "arguments": 3_000_000_000,
        "outputs": 2_000_000_000,
        "donated": 1_500_000_000,
        "temporaries": 4_000_000_000,
        "program": 100_000_000,
    }
    return Report(
        program=Program(
            "Training step of con",
            None,
            (),
            SimpleNamespace(size=16),
            batch_size=32,
            content="images of 928 x 928",
            gradient_bytes=178_000_000,
        ),
        topology="v5e:4x4",
        seconds=61.4,
        flops=2.5e12,
        cycles=3_640_000,
        whole_cycles=9_400_000,
        bytes_accessed=1.5e9,
        memory=memory,
        collectives=collectives,
    )


def test_the_report_in_text():
    text = format_report(make_report(find_collectives(HLO)))
    assert "16 chips, 32 images of 928 x 928 a step, 2 a chip" in text
    assert "Cycles that the compiler expects: 9.4 million, of loops one pass 3.6 million" in text
    assert "Bytes accessed, of loops one pass: 1.50 GB" in text
    assert "Compiled in 61 s" in text and "convolutions of a chip: 2500.0 GFLOP" in text
    # Arguments, temporaries, program, and the half gigabyte of outputs that reuses no argument.
    assert "in all          7.60 GB of 16.00 GB" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["all-reduce", "1", "1.04", "kB"] in rows
    assert ["all-gather", "1", "64", "B"] in rows
    assert "    in a loop, 1 x, 64 B: jit(step)/while/body/reshape" in text
    assert "add_any" not in text  # a sum of gradients needs no explanation
    assert "Gradients to sum over the chips: 178.00 MB" in text
    assert "  none" not in text


def test_the_report_without_collectives_and_with_many():
    assert "  none" in format_report(make_report([]))
    many = [Collective("all-to-all", 8, f"op{i}") for i in range(compile_report.MAX_SOURCES + 3)]
    text = format_report(make_report(many))
    assert f"op{compile_report.MAX_SOURCES - 1}" in text
    assert f"op{compile_report.MAX_SOURCES}" not in text
    assert "and 3 more sources" in text


def test_a_missing_compiler_is_said(monkeypatch):
    real = builtins.__import__

    def no_libtpu(name, *args, **kwargs):
        if name == "libtpu":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_libtpu)
    for name in chips.LIBTPU_ENVIRONMENT:
        monkeypatch.setenv(name, "test")  # so that they are put back
    with pytest.raises(ValueError, match="TPU compiler is not installed; run `pip install"):
        chips.make_topology_mesh("v5e:4x4")


def small_setup(**stages):
    """Of the mini COCO config, with fields of its stages changed."""
    config = coco_zps.get_config("mini")
    config.data.image_size = 64
    with config.unlocked():
        for name, fields in stages.items():
            config.train[name].update(fields)
    return abstract_programs.setup_of(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("fusion", 6, "config.mesh has no key 'fusion'; did you mean 'fusion_mb'"),
        ("fusion_mb", 0, "config.mesh.fusion_mb is 0 and must be at least 1"),
        ("fusion_mb", 5.5, "config.mesh.fusion_mb is 5.5 and must be a whole number"),
        ("devices", -1, "config.mesh.devices is -1 and must be at least 0"),
    ],
)
def test_what_a_mesh_cannot_be(key, value, message):
    config = coco_zps.get_config("mini")
    config.mesh = {**config.mesh, key: value}
    with pytest.raises(ValueError, match=message):
        abstract_programs.setup_of(config)


@pytest.mark.parametrize(
    "stage, con, message",
    [
        ("cno", {}, "names no stage of the config: 'cno'; did you mean 'con'"),
        ("con", {"batch_size": 12}, "cannot be split over 8 devices; set --config.*=16 or"),
    ],
)
def test_a_step_that_cannot_be_is_refused(stage, con, message):
    with pytest.raises(ValueError, match=message):
        abstract_programs.training_program(small_setup(con=con), stage, make_mesh())


def lowered_step(setup, name):
    """(state, frozen, batch), what the lowered step returns, and whether its state is donated."""
    mesh = make_mesh()
    program = abstract_programs.training_program(setup, name, mesh)
    arguments = program.arguments
    specs = [{x.sharding.spec for x in jax.tree.leaves(tree)} for tree in arguments]
    assert specs[0] | specs[1] == {PartitionSpec()}
    assert specs[2] == {PartitionSpec(mesh.axis_names)}
    with jax.set_mesh(mesh):
        lowered = program.jitted.lower(*arguments)
    donated = [x.donated for x in jax.tree.leaves(lowered.args_info[0][0])]
    assert donated and all(donated)
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, new_state) == jax.tree.map(
        lambda x: x.shape, arguments[0]
    )
    return arguments, metrics, program.gradient_bytes


def test_the_step_is_that_of_the_loop():
    """From shapes alone: state replicated and donated, batch split, as `train_stage` has it."""
    (state, frozen, batch), metrics, gradient_bytes = lowered_step(
        small_setup(con={"batch_size": 16}), "con"
    )
    # The mini backbone has no frozen norms: all is trained.
    assert gradient_bytes == 4 * sum(x.size for x in jax.tree.leaves(state.params))
    assert batch["image"].shape == (16, 64, 64, 3) and batch["segment_labels"].shape == (16, 32)
    assert batch["segment_ids"].dtype == np.uint8
    assert set(state.params) == {"segmentor", "projector"} and set(frozen) == {"clip", "text"}
    assert {"loss", "loss_instance", "gradient_norm"} <= set(metrics)


@pytest.mark.parametrize("name", ["clip", "cat", "finetune"])
def test_other_stages_have_a_step_too(name):
    """CAT with a memory, whose classes are filled up to a multiple of the batch."""
    cat = {"batch_size": 16, "method": {"memory_per_class": 4}}
    changes = {"clip": {"batch_size": 8}, "cat": cat, "finetune": {"batch_size": 8}}
    (state, frozen, batch), metrics, _ = lowered_step(small_setup(**changes), name)
    expected = {"clip": "clip", "cat": "generator", "finetune": "projector"}
    assert set(state.params) == {expected[name]} and "loss" in metrics
    if name == "cat":
        assert batch["queries"].shape == (16, 32, 64)
        assert batch["memory_queries"].shape == (144, 4, 64)


def test_predictions_have_their_programs_too():
    """Shapes, and that what a program hands on is what the next one takes."""
    setup = small_setup()
    network, names, tile = abstract_programs.prediction_programs(setup, "con", make_mesh())
    assert network.batch_size == setup.predict.batch_size == network.mesh.size
    assert network.arguments[1].shape == (4, 128, 128, 3)
    assert len(names.arguments[2]) == len(setup.vocabulary)
    codes, counts = jax.eval_shape(functools.partial(tile.jitted, **tile.static), *tile.arguments)
    assert codes.shape[1] == codes.shape[2] and counts.owned.shape == (4, 32)
    with pytest.raises(ValueError, match="--stage names stage 'clip', which has no segmentor"):
        abstract_programs.prediction_programs(setup, "clip", make_mesh())


@pytest.mark.parametrize(
    "name, topology",
    [("v5e-256", "v5e:16x16"), ("v5litepod-8", "v5e:2x4"), ("v4-32", "v4:2x2x4"), ("v6e:2x2",) * 2],
)
def test_slices_as_they_are_rented(name, topology):
    assert chips.topology_of(name) == topology


def test_an_unknown_slice_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no TPU slice 'v5e-255'; did you mean 'v5e-256'"):
        chips.topology_of("v5e-255")


def test_clip_need_not_be_there():
    """The full config's CLIP has its published sizes without a file of its vocabulary."""
    setup = abstract_programs.setup_of(coco_zps.get_config())
    shapes = jax.eval_shape(lambda: setup.networks.init("clip", jax.random.key(0)))
    sizes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    assert (49408, 512) in sizes and abstract_programs.batch_sizes(setup, "con")["T"] == 77


@pytest.mark.parametrize(
    "message, sentence",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.76G) exceeds available HBM (15.75G).",
            "does not fit a chip of v5e:4x4: its temporaries need 19.76G of 15.75G; set",
        ),
        ("INTERNAL: something else\nat line 3", "refuses the program: INTERNAL: something else"),
    ],
)
def test_compiler_errors_become_a_sentence(message, sentence):
    text = compile_report.compile_error(message, "v5e:4x4")
    assert sentence in text and "\n" not in text
