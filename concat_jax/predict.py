"""Segments images, by the names of the model or by any that it can read.

    python -m concat_jax.predict --model=models/m2f --output=out photo.jpg folder/
    python -m concat_jax.predict --model=runs/demo --output=out photo.png \\
        --classes="red striped balloon, blue dotted balloon; grey wavy ground, mint brick ground"

--model is a folder that `concat_jax.convert` made, or the workdir of `concat_jax.main`, of which
the last evaluated stage is taken unless --stage names another. --classes has things, a semicolon,
stuff; or is a file with a name a line, or a JSON list of {"name", "isthing"}. Names that training
showed no pixel of carry a star in the pictures.

    python -m concat_jax.predict --model=models/eomt --clip=clip-vit-base-patch16 --output=out \\
        photo.jpg --classes="corgi, tea cup; parquet"

A model that knows its own names alone finds the masks, and CLIP, of Hugging Face, OpenAI or
open_clip, names them: a forward pass of CLIP a mask, and what that took is printed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import ImageError, as_path, refuse_inputs
from concat_jax.core.progress import format_seconds
from concat_jax.experiment.model import open_model
from concat_jax.inference.inputs import data_set_names, find_images, image_ids, source_names
from concat_jax.inference.model import Model, segment_all
from concat_jax.inference.outputs import ResultWriter, result_files, result_names
from concat_jax.inference.panoptic import KEEP_RULES
from concat_jax.inference.predictor import PredictConfig, Predictor
from concat_jax.weights.model_folder import TASKS

# From so many images on, lines say how far it is and how long it will take.
PROGRESS_FROM = 4
# The tasks that a flag means something to, where not to all.
FLAG_TASKS = {
    **dict.fromkeys(("keep_rule", "objectness_threshold", "mask_threshold"), ("panoptic",)),
    "overlap_threshold": ("panoptic",),
    "score_threshold": ("panoptic", "instance"),
}


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command; those of `PredictConfig` keep its names and defaults."""
    flags.string("model", "", "Folder that concat_jax.convert wrote, or a workdir.")
    flags.string("stage", "", "Of a workdir; the last that is evaluated by default.")
    flags.string("classes", "", "Things; stuff. Or a file. The model's own by default.")
    flags.string("clip", "", "A CLIP that names the masks of a model that reads no names.")
    flags.string("output", "", "Folder for the results; made if absent.")
    flags.string(
        "annotations", "", "COCO json of the images' data set: its names and ids are used."
    )
    flags.string("task", "", "panoptic, instance or semantic; the model's own by default.")
    flags.string("keep_rule", "", f"Of panoptic maps: {' or '.join(KEEP_RULES)}.")
    flags.number(
        "score_threshold", None, "Of --keep_rule=score: 0.8, 0 of an FC-CLIP; of instances: 0.5."
    )
    flags.number("objectness_threshold", 0.5, "Of --keep_rule=objectness.")
    flags.number("mask_threshold", 0.5, "Mask probability of a panoptic pixel.")
    flags.number("overlap_threshold", 0.8, "Share of its mask that a segment owns.")
    flags.number("gamma", 0.0, "Taken from the logits of names seen in training.")
    flags.integer("short_side", None, "Of the network's input; the model's own by default.")
    flags.integer("long_side", None, "Bound on its longer side.")
    flags.string("dtype", "", "float32 or bfloat16; the model's own by default.")
    flags.integer("batch_size", 1, "Images that the network takes at once.")


def run(predictor: Predictor, inputs: Sequence[str], output: Path, annotations: str = "") -> int:
    """Segments what the inputs stand for and writes the results; returns the exit code.

    It is 1 if an input failed, or if there was none to segment.
    `annotations` is a COCO json that names and numbers the images; "" does so by their files.
    """
    start = time.monotonic()
    found = find_images(inputs)
    paths, failures = found.paths, found.failures
    if annotations:
        sources, ids = data_set_names(paths, annotations)
        names = result_names(sources)
    else:
        sources = source_names(paths)
        names = result_names(sources)
        ids = image_ids(names)
    (task,) = predictor.config.tasks
    files = result_files(output, task, names)
    refuse_inputs(files, [*paths, *([as_path(annotations)] if annotations else ())])
    for sentence, _ in found.skipped:
        print(f"Passed over: {sentence}")

    done = num_written = 0

    def report(index: int, what: str) -> None:
        nonlocal done
        done += 1
        progress = ""
        if len(paths) >= PROGRESS_FROM:
            left = (time.monotonic() - start) / done * (len(paths) - done)
            progress = f"[{done}/{len(paths)}, {format_seconds(left)} left] "
        print(f"{progress}{paths[index]}: {what}", flush=True)

    def failed(index: int, error: ImageError) -> None:
        failures.append(str(error))
        report(index, "failed.")

    with contextlib.ExitStack() as stack:
        writer = None
        for index, image, prediction in segment_all(predictor, paths, failed):
            if writer is None:  # where all inputs fail, the results of an earlier call stay
                writer = stack.enter_context(ResultWriter(output, task, predictor.vocabulary))
            part = next(part for part in prediction if part is not None)
            said = writer.add(names[index], ids[index], sources[index], image, part)
            num_written += 1
            report(index, said)

    where = f"written to {output}" if num_written else f"nothing is written, {output} is as it was"
    total = num_written + found.num_skipped + len(failures)
    print(
        f"{num_written} of {total} inputs in {format_seconds(time.monotonic() - start)}, "
        f"{found.num_skipped} passed over, {len(failures)} failed; "
        f"{where}; {len(predictor.programs)} programs compiled: "
        f"{', '.join(predictor.programs) or 'none'}.",
        flush=True,
    )
    if predictor.namer is not None:
        print(predictor.namer.cost(), flush=True)
    if failures:
        print(f"{len(failures)} failed:", *failures, sep="\n  ", flush=True)
    return int(bool(failures) or not num_written)


@cli.command(
    __doc__,
    define_flags,
    arguments="IMAGES...",
    interrupted="Stopped; pictures of the images above are written, the json of all of them is "
    "not. The same command starts anew.",
)
def main(given: cli.Flags, arguments: Sequence[str]) -> int:
    """What the flags ask for; returns as `run`."""
    if not (given.model and given.output and arguments):
        raise ValueError("give --model=DIR, --output=DIR and the images to segment.")
    output = cli.output_folder(given)
    if given.clip and not given.classes:
        raise ValueError(
            f"--clip={given.clip} is for names of one's own; give them, as --classes='cat; sky'."
        )
    model = open_model(given.model, stage=given.stage, dtype=given.dtype, clip=given.clip)
    if model.clip is not None:
        print(f"Names by CLIP on each mask that may be an object: {model.clip.about}.")
    predictor = model.predictor(config_of(given, model), given.classes or None)
    for notice in predictor.notices:
        print(notice)
    return run(predictor, arguments, output, given.annotations)


def config_of(given: cli.Flags, model: Model) -> PredictConfig:
    """How the flags, and where they are silent the model, want to predict.

    Raises:
      ValueError: for a value out of range, or a flag that means nothing to the task.
    """
    task = given.task or model.card.task or "panoptic"
    check_choice(task, TASKS, "There is no task")
    for name, tasks in FLAG_TASKS.items():
        if given[name].present and task not in tasks:
            raise ValueError(f"--{name} means nothing to the task {task}; leave it out.")
    threshold = given.score_threshold
    sides = {name: given[name].value for name in ("short_side", "long_side") if given[name].present}
    return model.config(
        tasks=(task,),
        keep_rule=given.keep_rule,
        score_threshold=threshold,
        # Average precision wants all instances; nobody can look at them.
        instance_threshold=0.5 if threshold is None else threshold,
        objectness_threshold=given.objectness_threshold,
        mask_threshold=given.mask_threshold,
        overlap_threshold=given.overlap_threshold,
        gamma=given.gamma,
        batch_size=given.batch_size,
        **sides,
    )


if __name__ == "__main__":
    main()
