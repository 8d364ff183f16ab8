"""Does a training step fit a TPU? The real compiler answers, without a TPU.

python -m concat_jax.tpu_report --config=configs/coco_zps.py --topology=v5e:4x4

Compiles the step of a CON stage as the training loop runs it (its optimizer, its sharding, its
state donated) from shapes alone, so no data and no weights are needed. Needs the `libtpu` package
of the installed JAX (`pip install "jax[tpu]"`) on Linux x86-64, and minutes of compile time.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from concat_jax.core import cli
from concat_jax.core.config import build, check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.registry import make_stage
from concat_jax.stages.stage import TEXT, Context, StageConfig
from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
)
from concat_jax.training.sharding import along_batch, mesh_of, replicated
from concat_jax.training.state import TrainState, make_train_step

# Memory of a chip in bytes, by the platform part of a topology's name (Google Cloud's TPU pages).
HBM_BYTES = {"v4": 32e9, "v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
# What libtpu asks of its surroundings before it describes a topology it does not run on.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
_ELEMENT_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_COLLECTIVE = re.compile(
    rf"= (?P<result>.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\((?!.*-done\()"
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
# A report names at most this many sources of one kind of collective.
MAX_SOURCES = 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: one of `COLLECTIVES`.
        num_bytes: of its result on one chip.
        source: path of the operation it serves, e.g. "jit(train_step)/transpose(jvp(...))/...".
    """

    kind: str
    num_bytes: int
    source: str

    @property
    def in_loop(self) -> bool:
        """Whether it runs once an iteration of a loop rather than once a step."""
        return "/while/" in self.source


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program; sizes in bytes on one chip.

    Attributes:
        topology: its name.
        num_chips: devices of the mesh.
        batch_size: images a step, over all chips.
        image_size: side of the images in pixels.
        seconds: of compilation.
        memory: name -> bytes: arguments, outputs, donated (outputs that reuse arguments),
            temporaries and program.
        collectives: all of them.
        gradient_bytes: of the gradients of all trained parameters, which is what a step has to sum
            over the chips.
    """

    topology: str
    num_chips: int
    batch_size: int
    image_size: int
    seconds: float
    memory: Mapping[str, int]
    collectives: Sequence[Collective]
    gradient_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What a chip must hold: arguments, temporaries, program, and outputs of their own."""
        own = self.memory["outputs"] - self.memory["donated"]
        return own + sum(self.memory[k] for k in ("arguments", "temporaries", "program"))


def array_bytes(text: str) -> int:
    """Bytes of all arrays in an HLO type such as `(f32[8,4]{1,0:T(8,128)}, s32[])`."""
    total = 0
    for kind, shape in _ARRAY.findall(text):
        digits = re.search(r"\d+$", kind)
        bits = _ELEMENT_BITS.get(kind) or (int(digits[0]) if digits else 0)
        total += int(np.prod([int(n) for n in shape.split(",") if n])) * bits // 8
    return total


def find_collectives(text: str) -> list[Collective]:
    """The collectives of an optimised HLO module.

    Args:
        text: `compiled.as_text()`. Of an asynchronous pair the start counts, without the operand
            that its result repeats.
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        num_bytes = array_bytes(match["result"])
        # The start of a gather or permute returns (operand, result, ...); that of a reduction, for
        # which no copy of the operand is kept, the result alone.
        if match["start"] and match["kind"] != "all-reduce":
            operand = line[match.end() :].split(")", 1)[0]
            num_bytes -= array_bytes(operand)
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(match["kind"], num_bytes, source[1] if source else "unnamed"))
    return found


def format_bytes(count: float) -> str:
    """ "1.50 GB"; powers of ten, as chips are sold."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_report(report: Report) -> str:
    """The report as lines of text."""
    lines = [
        f"Topology {report.topology}: {report.num_chips} chips, {report.batch_size} images of "
        f"{report.image_size} x {report.image_size} a step, "
        f"{report.batch_size // report.num_chips} a chip",
        f"Compiled in {report.seconds:.0f} s",
        "Memory of a chip:",
        *(f"  {name:<12} {format_bytes(size):>10}" for name, size in report.memory.items()),
    ]
    available = HBM_BYTES.get(platform_of(report.topology))
    of = f" of {format_bytes(available)}" if available else ""
    lines.append(f"  {'in all':<12} {format_bytes(report.peak_bytes):>10}{of}")
    lines.append(f"Gradients to sum over the chips: {format_bytes(report.gradient_bytes)}")
    lines.append("Collectives of a step:")
    if not report.collectives:
        lines.append("  none")
    for kind in COLLECTIVES:
        mine = [c for c in report.collectives if c.kind == kind]
        if not mine:
            continue
        size = format_bytes(sum(c.num_bytes for c in mine))
        lines.append(f"  {kind:<18} {len(mine):>5}  {size:>10}")
        # Sums of gradients and losses are what data parallelism is; say where others come from.
        named = [c for c in mine if kind != "all-reduce" or c.in_loop]
        sources: dict[str, list[int]] = {}
        for c in named:
            sources.setdefault(c.source, []).append(c.num_bytes)
        ranked = sorted(sources.items(), key=lambda item: -sum(item[1]))
        for source, sizes in ranked[:MAX_SOURCES]:
            loop = "in a loop, " if "/while/" in source else ""
            lines.append(f"    {loop}{len(sizes)} x, {format_bytes(sum(sizes))}: {source}")
        if len(ranked) > MAX_SOURCES:
            lines.append(f"    and {len(ranked) - MAX_SOURCES} more sources")
    return "\n".join(lines)


def platform_of(topology: str) -> str:
    """ "v5e" of "v5e:16x16"."""
    return topology.split(":")[0]


def make_topology_mesh(topology: str) -> Mesh:
    """The training mesh over the chips of a topology that need not exist.

    Args:
        topology: such as "v5e:16x16".

    Raises:
        ValueError: libtpu is not installed or does not know the topology.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            'The TPU compiler is not installed; run `pip install "jax[tpu]"` (Linux, x86-64).'
        ) from None
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"libtpu knows no topology {topology!r}; use one such as v5e:4x4 or v4:2x2x1. It says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return mesh_of(devices)


def vocabulary_of(config: ml_collections.ConfigDict) -> Vocabulary:
    """The classes of a config's data, without the data."""
    from data_pipelines.datasets import make_datasets
    from data_pipelines.sources.registry import DATASETS, label_space

    if config.data.kind in DATASETS:
        return label_space(config.data.kind, config.data.split_file)
    return make_datasets(config.data, seed=config.seed).vocabulary


def abstract_step(
    config: ml_collections.ConfigDict, name: str, mesh: Mesh
) -> tuple[Any, tuple[Any, Any, Any], int]:
    """The training step of a stage as the loop jits it, and shapes of its arguments.

    Args:
        config: as the files in `configs/` make it.
        name: of a stage that trains the segmentor.
        mesh: of `make_topology_mesh`.

    Returns:
        The jitted step; (state, frozen, batch), trees of `jax.ShapeDtypeStruct` with shardings; and
        the bytes of the trained parameters' gradients.

    Raises:
        ValueError: the stage is unknown or another, the batch cannot be split over the
            chips, or the config has a key that does not exist.
    """
    check_choice(name, config.train.keys(), "--stage names no stage of the config:")
    settings = build(StageConfig, config.train[name], f"config.train.{name}")
    if settings.batch_size % mesh.size:
        raise ValueError(
            f"The batch of {settings.batch_size} images cannot be split over {mesh.size} chips; "
            f"set config.train.{name}.batch_size to a multiple."
        )
    networks = make_networks(config.model.to_dict())
    vocabulary = vocabulary_of(config)
    context = Context(
        networks,
        vocabulary,
        build(SegmentationLossConfig, config.loss, "config.loss"),
        build(CropConfig, config.crops, "config.crops"),
        has_clip_targets=bool(config.data.get("clip_targets", "")),
    )
    stage = make_stage(name, settings, context)
    if "segmentor" not in stage.trains:
        raise ValueError(f"Stage {name!r} trains no segmentor; give one that does, as 'con'.")
    everywhere, split = replicated(mesh), along_batch(mesh)

    def place(tree, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def shapes(subtree):
        return jax.eval_shape(lambda: networks.init(subtree, jax.random.key(0)))

    params = {subtree: shapes(subtree) for subtree in stage.trains}
    frozen = {subtree: shapes(subtree) for subtree in stage.reads if subtree != TEXT}
    text = (len(vocabulary), networks.clip.embed_dim)
    frozen[TEXT] = jax.ShapeDtypeStruct(text, jnp.float32)
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(
        build(OptimizerConfig, settings.optimizer, f"config.train.{name}.optimizer"),
        settings.steps,
        labels,
    )
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    gradient_bytes = sum(x.size * x.dtype.itemsize for x, label in pairs if label != FROZEN)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    size, segments = config.data.image_size, config.data.max_segments
    fields = {
        "image": ((size, size, 3), jnp.uint8),
        "segment_ids": ((size, size), jnp.uint8 if segments < 256 else jnp.uint16),
        "segment_labels": ((segments,), jnp.int32),
        "segment_is_crowd": ((segments,), jnp.bool_),
        "image_size": ((2,), jnp.int32),
        "clip_image_target": ((networks.clip.embed_dim,), jnp.float32),
        "clip_segment_targets": ((segments, networks.clip.embed_dim), jnp.float32),
    }
    batch = {
        field: jax.ShapeDtypeStruct((settings.batch_size, *fields[field][0]), fields[field][1])
        for field in stage.batch_fields
    }
    step = jax.jit(
        make_train_step(stage.loss, optimizer, config.seed),
        donate_argnums=0,
        out_shardings=(everywhere, everywhere),
    )
    arguments = place(state, everywhere), place(frozen, everywhere), place(batch, split)
    return step, arguments, gradient_bytes


def make_report(config: ml_collections.ConfigDict, name: str, topology: str) -> Report:
    """Compile the step of stage `name` for a topology and read what the compiler says.

    Raises:
        ValueError: as `make_topology_mesh` and `abstract_step`, or the step does not fit a chip.
    """
    mesh = make_topology_mesh(topology)
    step, arguments, gradient_bytes = abstract_step(config, name, mesh)
    batch = arguments[2]["image"].shape
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(compile_error(str(error), topology)) from error
    analysis = compiled.memory_analysis()
    return Report(
        topology=topology,
        num_chips=mesh.size,
        batch_size=batch[0],
        image_size=batch[1],
        seconds=time.monotonic() - start,
        memory={
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "donated": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
        },
        collectives=find_collectives(compiled.as_text()),
        gradient_bytes=gradient_bytes,
    )


def compile_error(message: str, topology: str) -> str:
    """One sentence of a failed compilation."""
    used = re.search(r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    if used:
        return (
            f"The step does not fit a chip of {topology}: its temporaries need {used[1]} of "
            f"{used[2]}; set config.model.segmentor.remat or .dtype = 'bfloat16', or more chips."
        )
    return f"The TPU compiler refuses the step: {message.splitlines()[0]}"


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command, besides --config."""
    flags.string("topology", "v5e:4x4", "Chips, as v5e:16x16 or v4:2x2x1.")
    flags.string("stage", "con", "Stage of the config that trains the segmentor.")


def command(given: cli.Flags, arguments: Sequence[str]) -> None:
    """What the flags ask for."""
    # The chips are described, never opened; everything that runs, runs here.
    jax.config.update("jax_platforms", "cpu")
    print(format_report(make_report(cli.config_of(given), given.stage, given.topology)))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, with_config=True, computes=False)


if __name__ == "__main__":
    main()
