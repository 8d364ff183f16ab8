"""A training step compiled from shapes alone for chips that need not exist, and what that says."""

from __future__ import annotations

import dataclasses
import os
import re
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from concat_jax.core.batch import batch_shapes
from concat_jax.core.config import check_choice
from concat_jax.experiment.setup import Setup, make_setup
from concat_jax.models.segmentor import DEFAULTS
from concat_jax.stages.registry import learns_from
from concat_jax.stages.stage import MATCHING_PROJECTOR, TEXT
from concat_jax.training.optimizer import FROZEN, label_params, make_optimizer
from concat_jax.training.sharding import along_batch, mesh_of, split_by_rule
from concat_jax.training.state import TrainState, jit_train_step

# What libtpu asks of its surroundings before it describes a topology it does not run on.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# Of CLIP's tokenizer, whose file need not be there.
CLIP_TOKENIZER = types.SimpleNamespace(vocab_size=49408, context_length=77, eot_id=49407)
# Memory of a chip in bytes, by the platform part of a topology's name (Google Cloud's TPU pages).
HBM_BYTES = {"v4": 32e9, "v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
COLLECTIVES += ("reduce-scatter", "collective-broadcast")
# Names of XLA's analysis of the memory.
_MEMORY = {"arguments": "argument", "outputs": "output", "donated": "alias"}
_MEMORY |= {"temporaries": "temp", "program": "generated_code"}
_ELEMENT_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_COLLECTIVE = re.compile(
    rf"= (?P<result>.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\((?!.*-done\()"
)
_SCATTER = re.compile(r" fusion\((?=.*calls=%all-reduce-scatter)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
# A report names at most this many sources of one kind of collective.
MAX_SOURCES = 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program: bytes of its result on one chip, and what it serves."""

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
      batch_size: rows of a batch, over all chips; `content` says what a row is.
      memory: name -> bytes: arguments, outputs, donated (outputs that reuse arguments),
        temporaries and program.
      gradient_bytes: of all trained parameters, which is what a step has to sum over the chips.
    """

    topology: str
    num_chips: int
    batch_size: int
    content: str
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
    found, is_scatter = [], False
    for line in text.splitlines():
        # A TPU's reduce-scatter is a fusion that calls a sum and the slice of it.
        is_scatter = line.startswith("%all-reduce-scatter") or (is_scatter and line != "}")
        match = not is_scatter and _COLLECTIVE.search(_SCATTER.sub(" reduce-scatter(", line))
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
    lines = [
        f"Topology {report.topology}: {report.num_chips} chips, {report.batch_size} "
        f"{report.content} a step, {report.batch_size // report.num_chips} a chip",
        f"Compiled in {report.seconds:.0f} s",
        "Memory of a chip:",
        *(f"  {name:<12} {format_bytes(size):>10}" for name, size in report.memory.items()),
    ]
    available = HBM_BYTES.get(report.topology.split(":")[0])
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
        sources = {c.source: [x.num_bytes for x in named if x.source == c.source] for c in named}
        ranked = sorted(sources.items(), key=lambda item: -sum(item[1]))
        for source, sizes in ranked[:MAX_SOURCES]:
            loop = "in a loop, " if "/while/" in source else ""
            lines.append(f"    {loop}{len(sizes)} x, {format_bytes(sum(sizes))}: {source}")
        if len(ranked) > MAX_SOURCES:
            lines.append(f"    and {len(ranked) - MAX_SOURCES} more sources")
    return "\n".join(lines)


def compile_error(message: str, topology: str) -> str:
    """One sentence of a failed compilation."""
    used = re.search(r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
    if used:
        return (
            f"The step does not fit a chip of {topology}: its temporaries need {used[1]} of "
            f"{used[2]}; set config.model.segmentor.remat or .dtype = 'bfloat16', or more chips."
        )
    return f"The TPU compiler refuses the step: {message.splitlines()[0]}"


def make_topology_mesh(topology: str, fsdp: int = 1) -> Mesh:
    """The training mesh over the chips of a topology that need not exist, such as "v5e:16x16".

    Raises ValueError as `mesh_of`, or if libtpu is not installed or does not know the topology.
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
    return mesh_of(devices, fsdp)


def setup_of(config: ml_collections.ConfigDict) -> Setup:
    """What a config says, without its data, and without the file of CLIP's tokenizer.

    Raises:
      ValueError: as `make_setup`, or the label space lies in the data.
    """
    from data_pipelines.datasets import make_datasets
    from data_pipelines.sources.registry import DATASETS, label_space

    if config.data.kind not in DATASETS:
        labels = make_datasets(config.data, seed=config.seed)
    else:
        vocabulary = label_space(config.data.kind, config.data.split_file)
        labels = types.SimpleNamespace(
            vocabulary=vocabulary,
            eval_vocabulary=None,
            caption_words=vocabulary.names,
            eval_size=config.data.image_size,
        )
    tokenizer = CLIP_TOKENIZER if config.text.tokenizer == "clip" else None
    return make_setup(config, labels, tokenizer)


def abstract_step(setup: Setup, name: str, mesh: Mesh) -> tuple[Any, tuple[Any, Any, Any], int]:
    """The training step of a stage as the loop jits it, and shapes of its arguments.

    Returns the jitted step; (state, frozen, batch), trees of `jax.ShapeDtypeStruct` with shardings;
    and the bytes of the trained parameters' gradients. Raises ValueError for an unknown stage, or a
    batch that cannot be split over the chips.
    """
    check_choice(name, setup.stages, "--stage names no stage of the config:")
    settings, stage = setup.stages[name], setup.make_stage(name)
    if settings.batch_size % mesh.size:
        raise ValueError(
            f"The batch of {settings.batch_size} images cannot be split over {mesh.size} chips; "
            f"set config.train.{name}.batch_size to a multiple."
        )
    if stage.loss is None:
        raise ValueError(f"Stage {name!r} is in closed form: it has no step to compile.")
    networks, text = setup.networks_of(name), (len(setup.vocabulary), setup.networks.clip.embed_dim)

    def shapes(read: str) -> Any:
        if read == TEXT:
            return jax.ShapeDtypeStruct(text, np.float32)
        subtree = "projector" if read == MATCHING_PROJECTOR else read
        return jax.eval_shape(lambda: networks.init(subtree, jax.random.key(0)))

    params = {subtree: shapes(subtree) for subtree in stage.trains}
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(setup.optimizer(name), settings.steps, labels)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    gradient_bytes = sum(x.size * x.dtype.itemsize for x, label in pairs if label != FROZEN)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    fields = batch_shapes(stage.batch_fields, **batch_sizes(setup, name))
    batch = {field: jax.ShapeDtypeStruct(*of_field) for field, of_field in fields.items()}
    arguments = (state, {read: shapes(read) for read in stage.reads}, batch)
    on_mesh = split_by_rule(arguments[:2], mesh)
    shardings = (*on_mesh, jax.tree.map(lambda _: along_batch(mesh), batch))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arguments, shardings
    )
    step = jit_train_step(stage.loss, optimizer, setup.config.seed, mesh, state)
    return step, placed, gradient_bytes


def batch_sizes(setup: Setup, name: str) -> dict[str, int]:
    """Sizes of the dimensions of a stage's batches, by the letters of `core.batch`."""
    settings, networks, data = setup.stages[name], setup.networks, setup.config.data
    segmentor = {**DEFAULTS, **setup.config.model.segmentor}
    of_captions = learns_from(settings) == "captions"
    return {
        "B": settings.batch_size,
        "S": networks.clip.image_size if of_captions else data.image_size,
        "G": data.get("max_segments", 0),
        "C": networks.clip.embed_dim,
        "T": setup.tokenizer.context_length,
        "N": segmentor["num_queries"],
        "D": networks.query_width,
        "K": -(-len(setup.vocabulary) // settings.batch_size) * settings.batch_size,
        "M": settings.method.get("memory_per_class", 0),
    }


def make_report(config: ml_collections.ConfigDict, name: str, topology: str) -> Report:
    """Compile the step of stage `name` for a topology and read what the compiler says.

    Raises:
      ValueError: as `make_topology_mesh` and `abstract_step`, or the step does not fit a chip.
    """
    setup, mesh = setup_of(config), make_topology_mesh(topology, config.mesh.get("fsdp", 1))
    step, arguments, gradient_bytes = abstract_step(setup, name, mesh)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(compile_error(str(error), topology)) from error
    sizes, memory = batch_sizes(setup, name), compiled.memory_analysis()
    content = "images of {S} x {S}" if "image" in arguments[2] else "images' {N} vision queries"
    return Report(
        topology=topology,
        num_chips=mesh.size,
        batch_size=sizes["B"],
        content=content.format(**sizes),
        seconds=time.monotonic() - start,
        memory={key: getattr(memory, f"{of}_size_in_bytes") for key, of in _MEMORY.items()},
        collectives=find_collectives(compiled.as_text()),
        gradient_bytes=gradient_bytes,
    )
