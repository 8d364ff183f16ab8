"""Speed and memory of ours beside transformers/PyTorch, with the same weights, in one run.

    python -m concat_jax.benchmark --output=benchmark

Every case is run by each implementation in a process of its own, one after another, on whatever
device each framework finds. `benchmark.md` and `benchmark.json` are written. Without torch and
transformers only ours is measured. `--segmentor=eomt_base --sizes=640` measures an EoMT.

    python -m concat_jax.benchmark --tasks=alignment
    python -m concat_jax.benchmark --tasks=two_stage --images=FOLDER --batch=4

compare variants of ours, which take turns in one process: what alignment to CLIP costs a step of
stage 1, and inference without CLIP beside inference with CLIP on every mask.

    python -m concat_jax.benchmark --tasks=panoptic_quality

times the metric beside the official algorithm and PNG decoding, on drawn maps or on those of a COCO
panoptic json (--images).

    python -m concat_jax.benchmark --tasks=query_stages

times stages 2 and 3 from a query bank at COCO's size, and says how large that is.

    python -m concat_jax.benchmark --tasks=scaling --recipe=configs/coco_zps.py:mini

fits how time, FLOPs and bytes of a step of stage 1 grow with batch, side, queries and segments, and
draws `scaling.png`.

    python -m concat_jax.benchmark --tasks=input_pipeline --images=COCO

times training batches from COCO's folder and from it prepared for tf.data, beside decoding its
JPEGs alone.

    python -m concat_jax.benchmark --tasks=matching

times the assignment of queries to segments, beside Scenic's where that is installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from concat_jax.benchmarking.cases import (
    COMPARED,
    TASKS,
    WITHOUT_MODEL,
    Case,
    make_cases,
)
from concat_jax.benchmarking.harness import (
    Measurement,
    in_own_process,
    machine,
    measure,
    table_in_turns,
    table_of_compared,
)
from concat_jax.benchmarking.programs import SEGMENTORS, prepare_models
from concat_jax.benchmarking.reference import is_installed
from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import write_json, write_text
from concat_jax.visualize.plots import save_figure

# Outputs larger than this are compared, but not written down.
MAX_WRITTEN = 1000


def define_flags(flags: cli.Flags) -> None:
    flags.string("output", "benchmark", "Folder for benchmark.md and benchmark.json.")
    flags.string("model", "", "A converted model's folder; else random weights.")
    flags.string("segmentor", "mask2former_resnet50", "Of random weights.")
    flags.strings("tasks", COMPARED, f"Any of {', '.join(TASKS)}.")
    flags.strings("sizes", [], "As 512 or 800x1088; each task's own by default.")
    flags.integer("batch", None, "Images at once; each task's own by default.", 1)
    flags.integer("segments", 12, "Annotated segments an image.", 1, 255)
    flags.string(
        "clip",
        "ViT-B/16",
        "Of alignment, two_stage and query_stages: a variant, or make_clip's config in JSON.",
    )
    flags.string(
        "images",
        "",
        "Folder or glob of two_stage, panoptic json of panoptic_quality, else drawn; COCO's folder "
        "of input_pipeline.",
    )
    flags.integer("two_stage_images", 20, "Images in all, of two_stage and panoptic_quality.", 1)
    # An average image of COCO panoptic has eleven segments, so ten is kind to the other side.
    flags.strings("two_stage_masks", ["10"], "Masks that CLIP sees of an image.")
    flags.string("recipe", "configs/coco_zps.py:mini", "Of scaling: FILE or FILE:ARGUMENT.")
    flags.choice("dtype", "float32", ("float32", "bfloat16"), "Compute type.")
    flags.integer("repeats", 5, "Timed calls of a case, after one to warm up.", 1)
    flags.switch("same_allocator", "Give the reference's train step ours setting, too.")
    flags.strings("reference", ["torch"], "Any of torch and torch.compile; empty for none.")


def measure_case(
    case: Case, names: Sequence[str], given: cli.Flags, folder: Path
) -> dict[str, Measurement | str]:
    """What was measured, by implementation or variant; the reason where that failed."""
    results: dict[str, Measurement | str] = {}
    for name in names:
        ours = name == "ours"
        module = "reference" if not ours else "programs" if case.task in COMPARED else case.task
        model = str(folder / ("ours" if ours else "reference"))
        settings = dataclasses.replace(case, model=model, compiled=name == "torch.compile")
        # Our training command sets it; the reference runs as its users run it, unless asked.
        trains = case.task in ("train", "alignment", "scaling", "input_pipeline")
        keep_memory = trains and (ours or given.same_allocator)
        try:
            found = in_own_process(measure, module, settings, given.repeats, keep_memory)
        except BrokenProcessPool:
            found = {name: "its process was killed, for want of memory it may be"}
        except Exception as error:  # the others are measured all the same
            found = {name: " ".join(f"{error}".split()) or repr(error)}
        for variant, one in found.items():
            said = f"failed: {one}" if isinstance(one, str) else f"{one.median:.3f} s"
            print(f"{case.name}, {variant}: {said}", flush=True)
        results |= found
    return results


def run(given: cli.Flags) -> tuple[dict[str, Any], str, dict[str, Figure]]:
    """Run what the flags ask for; returns the report, its tables and its figures by their tasks.

    Raises:
      ValueError: for a flag without meaning, or where every case failed.
    """
    cases = make_cases(given)
    check_choice(given.segmentor, SEGMENTORS, "--segmentor is unknown:")
    for name in given.reference:
        check_choice(name, ("torch", "torch.compile"), "--reference is unknown:")
    implementations = ["ours", *given.reference]
    is_compared = any(case.task in COMPARED for case in cases) and len(implementations) > 1
    if is_compared and not is_installed():
        print("torch and transformers are not installed: only ours is measured.")
        implementations, is_compared = ["ours"], False
    source, measured = "none", []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not all(case.task in WITHOUT_MODEL for case in cases):
            needs_head = any(case.task in (*COMPARED, "two_stage") for case in cases)
            arguments = (given.model, given.segmentor, folder, needs_head, is_compared)
            source = in_own_process(prepare_models, *arguments)
        for case in cases:
            names = implementations if case.task in COMPARED else ["ours"]
            measured.append((case, measure_case(case, names, given, folder)))
    found = [result for _, results in measured for result in results.values()]
    if all(isinstance(result, str) for result in found):
        raise ValueError(f"Nothing could be measured, and nothing is written: {found[0]}")
    about = in_own_process(machine)
    report = {
        "model": source,
        "machine": about,
        "repeats": given.repeats,
        "cases": [_as_json(case, results) for case, results in measured],
    }
    figures = {
        case.task: figure(case, results)
        for case, results in measured
        if (figure := getattr(_module(case), "figure", None)) and not _failed(results)
    }
    return report, _as_markdown(source, about, given.repeats, measured), figures


def _module(case: Case) -> Any:
    name = "programs" if case.task in COMPARED else case.task
    return importlib.import_module(f"concat_jax.benchmarking.{name}")


def _failed(results: dict[str, Measurement | str]) -> list[str]:
    return [result for result in results.values() if isinstance(result, str)]


def _as_json(case: Case, results: dict[str, Measurement | str]) -> dict[str, Any]:
    shown = {}
    for name, result in results.items():
        if isinstance(result, str):
            shown[name] = {"error": result}
            continue
        shown[name] = {**dataclasses.asdict(result), "median": result.median}
        outputs = {k: v for k, v in result.outputs.items() if v.size <= MAX_WRITTEN}
        shown[name]["outputs"] = outputs
    return {"name": case.name, "case": dataclasses.asdict(case), "results": shown}


def _as_markdown(source: str, about: dict[str, str], repeats: int, measured: list) -> str:
    machine_ = ", ".join(f"{key} {value}" for key, value in about.items())
    parts = [f"Model: {source}. {machine_}. Median of {repeats} calls after a warm-up."]
    if compared := [(c.name, results) for c, results in measured if c.task in COMPARED]:
        parts.append(table_of_compared(compared))
    for case, results in measured:
        if case.task in COMPARED:
            continue
        failed = _failed(results)
        table = getattr(_module(case), "table", lambda case, results: table_in_turns(results))
        parts.append(f"{case.name}:")
        parts.append(f"Failed: {failed[0]}" if failed else table(case, results))
    return "\n\n".join(parts) + "\n"


@cli.command(__doc__, define_flags, computes=False)
def main(given: cli.Flags) -> None:
    output = cli.output_folder(given)
    report, markdown, figures = run(given)
    write_json(output / "benchmark.json", report)
    for name, figure in figures.items():
        save_figure(figure, output / f"{name}.png")
    write_text(output / "benchmark.md", markdown)
    print(f"\n{markdown}\nWritten to {output}.")


if __name__ == "__main__":
    main()
