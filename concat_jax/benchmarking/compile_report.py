"""Programs compiled from shapes alone for chips that need not exist, and what that says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np

from concat_jax.benchmarking.abstract_programs import (
    Program,
    prediction_programs,
    setup_of,
    training_program,
)
from concat_jax.benchmarking.chips import HBM_BYTES, make_topology_mesh, topology_of
from concat_jax.core.config import check_choice
from concat_jax.training.speed import count_flops

# What of a stage can be compiled.
STEPS = {"train": lambda *given: [training_program(*given)], "eval": prediction_programs}
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
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{\n(?P<lines>(?:  .*\n)*)\}", re.MULTILINE
)
_LOOP = re.compile(r" while\(.*condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)")
_CALLED = re.compile(r" (?:call|conditional)\(.*?\), .*?(?:to_apply|computations?)=(.*)")
_COUNT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
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
      flops: of matrix products and convolutions on one chip, see `count_flops`.
      memory: name -> bytes: arguments, outputs, donated (outputs that reuse arguments),
        temporaries and program.
      cycles: see `expected_cycles`.
      whole_cycles: see `whole_cycles`.
      bytes_accessed: by XLA's cost analysis, of a loop one pass.
    """

    program: Program
    topology: str
    seconds: float
    flops: float
    cycles: int
    whole_cycles: int
    bytes_accessed: float
    memory: Mapping[str, int]
    collectives: Sequence[Collective]

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


def expected_cycles(text: str) -> int:
    """Cycles that a TPU's compiler expects of an optimised HLO module, of a loop one pass.

    What it has no estimate for, -1 or the largest number of 64 bits, is left out.
    """
    return sum(cycles for cycles in map(int, _CYCLES.findall(text)) if cycles < 1 << 62)


def whole_cycles(text: str) -> int:
    """As `expected_cycles`, of a loop as many passes as it takes where the module says how many.

    The condition of a scan compares its counter to the only whole number that it holds; other loops
    count for one pass.
    """
    computations = {
        match["name"]: match["lines"].splitlines() for match in _COMPUTATION.finditer(text)
    }

    @functools.cache
    def total(name: str) -> int:
        cycles = 0
        for line in computations[name]:
            cycles += expected_cycles(line)
            if loop := _LOOP.search(line):
                numbers = _COUNT.findall("\n".join(computations[loop["condition"]]))
                passes = int(numbers[0]) if len(numbers) == 1 else 1
                cycles += passes * (total(loop["condition"]) + total(loop["body"]))
            elif called := _CALLED.search(line):
                names = re.findall(r"%([\w.\-]+)", called[1])
                cycles += sum(total(name) for name in names if name in computations)
        return cycles

    (entry,) = (match["name"] for match in _COMPUTATION.finditer(text) if match["entry"])
    return total(entry)


def format_bytes(count: float) -> str:
    """ "1.50 GB"; powers of ten, as chips are sold."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_report(report: Report) -> str:
    program, chips = report.program, report.program.mesh.size
    lines = [
        f"{program.name}, topology {report.topology}: {chips} chips, {program.batch_size} "
        f"{program.content} a step, {program.batch_size // chips} a chip",
        f"Compiled in {report.seconds:.0f} s",
        f"Products and convolutions of a chip: {report.flops / 1e9:.1f} GFLOP",
        f"Cycles that the compiler expects: {report.whole_cycles / 1e6:.1f} million, of loops one "
        f"pass {report.cycles / 1e6:.1f} million",
        f"Bytes accessed, of loops one pass: {format_bytes(report.bytes_accessed)}",
        "Memory of a chip:",
        *(f"  {name:<12} {format_bytes(size):>10}" for name, size in report.memory.items()),
    ]
    available = HBM_BYTES.get(report.topology.split(":")[0])
    of = f" of {format_bytes(available)}" if available else ""
    lines.append(f"  {'in all':<12} {format_bytes(report.peak_bytes):>10}{of}")
    if program.gradient_bytes:
        lines.append(f"Gradients to sum over the chips: {format_bytes(program.gradient_bytes)}")
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
            f"The program does not fit a chip of {topology}: its temporaries need {used[1]} of "
            f"{used[2]}; set config.model.segmentor.remat or .dtype = 'bfloat16', or more chips."
        )
    return f"The TPU compiler refuses the program: {message.splitlines()[0]}"


def make_reports(
    config: ml_collections.ConfigDict, name: str, step: str, slice_name: str
) -> list[Report]:
    """Compile what stage `name` runs on TPUs and read what the compiler says.

    Args:
      step: of `STEPS`: "train", one program, or "eval", those of one batch of predictions.
      slice_name: as `topology_of`.

    Raises:
      ValueError: as `topology_of`, `make_topology_mesh` and the functions of `STEPS`, or a program
        does not fit a chip.
    """
    check_choice(step, STEPS, "--step is none of a stage's:")
    topology, setup = topology_of(slice_name), setup_of(config)
    mesh = make_topology_mesh(topology, setup.mesh.fsdp)
    return [compile_program(program, topology) for program in STEPS[step](setup, name, mesh)]


def compile_program(program: Program, topology: str) -> Report:
    """What the compiler says of one program; ValueError if it does not fit a chip."""
    start = time.monotonic()
    # The training loop sets its mesh, a predictor none.
    trains = program.gradient_bytes > 0
    with jax.set_mesh(program.mesh) if trains else contextlib.nullcontext():
        traced = program.jitted.trace(*program.arguments, **program.static)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(compile_error(str(error), topology)) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        program=program,
        topology=topology,
        seconds=time.monotonic() - start,
        flops=count_flops(traced.jaxpr.jaxpr) / program.mesh.size,
        cycles=expected_cycles(text),
        whole_cycles=whole_cycles(text),
        bytes_accessed=compiled.cost_analysis()["bytes accessed"],
        memory={key: getattr(memory, f"{of}_size_in_bytes") for key, of in _MEMORY.items()},
        collectives=find_collectives(text),
    )
