"""Segments images with converted weights.

python -m concat_jax.predict --model=MODEL_FOLDER --output=DIR IMAGES...
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from concat_jax.core import cli
from concat_jax.core.coco_writers import result_names
from concat_jax.core.files import ImageError
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import format_seconds
from concat_jax.inference.images import read_image
from concat_jax.inference.inputs import data_set_names, find_images, image_ids, source_names
from concat_jax.inference.model import Model
from concat_jax.inference.outputs import ResultWriter
from concat_jax.inference.panoptic import KEEP_RULES
from concat_jax.inference.predictor import PredictConfig, Predictor, Prepared

# From so many images on, lines say how far it is and how long it will take.
PROGRESS_FROM = 4


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An input read from disk: `error` says why there is no image."""

    index: int
    image: np.ndarray | None = None
    prepared: Prepared | None = None
    error: str = ""


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command; those of `PredictConfig` keep its names and defaults."""
    flags.string("model", "", "Folder that concat_jax.convert wrote.")
    flags.string("output", "", "Folder for the results; made if absent.")
    flags.string(
        "annotations", "", "COCO json of the images' data set: its names and ids are used."
    )
    flags.string("task", "", "panoptic, instance or semantic; the model's own by default.")
    flags.string("keep_rule", "", f"Of panoptic maps: {' or '.join(KEEP_RULES)}.")
    flags.number("score_threshold", None, "0.8 for panoptic maps, 0.5 for instances.")
    flags.number("objectness_threshold", 0.5, "Of --keep_rule=objectness.")
    flags.number("mask_threshold", 0.5, "Mask probability of a panoptic pixel.")
    flags.number("overlap_threshold", 0.8, "Share of its mask that a segment owns.")
    flags.integer("short_side", None, "Of the network's input; the model's own by default.")
    flags.integer("long_side", None, "Bound on its longer side.")
    flags.string("dtype", "", "float32 or bfloat16; the model's own by default.")
    flags.integer("batch_size", 1, "Images that the network takes at once.")


def run(predictor: Predictor, inputs: Sequence[str], output: Path, annotations: str = "") -> int:
    """Segments what the inputs stand for and writes the results; prints a line an image.

    Args:
      predictor: of the model.
      inputs: files, folders and globs.
      output: folder of the results.
      annotations: a COCO json that names and numbers the images; "" does so by their files.

    Returns:
      How many inputs failed; the others are written, or passed over with a word.

    Raises:
      ValueError: if `annotations` does not list an image.
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
    for sentence, _ in found.skipped:
        print(f"Passed over: {sentence}")

    def load(index: int) -> Loaded:
        try:
            image = read_image(paths[index])
        except ImageError as error:
            return Loaded(index, error=str(error))
        return Loaded(index, image, predictor.prepare(image))

    done = num_written = 0

    def report(index: int, what: str) -> None:
        nonlocal done
        done += 1
        progress = ""
        if len(paths) >= PROGRESS_FROM:
            left = (time.monotonic() - start) / done * (len(paths) - done)
            progress = f"[{done}/{len(paths)}, {format_seconds(left)} left] "
        print(f"{progress}{paths[index]}: {what}", flush=True)

    def flush(waiting: list[Loaded]) -> None:
        nonlocal num_written
        results = predictor.predict([item.prepared for item in waiting])
        for item, result in zip(waiting, results, strict=True):
            of_image = names[item.index], ids[item.index], sources[item.index]
            part = next(part for part in result if part is not None)
            said = writer.add(*of_image, item.image, part)
            num_written += 1
            report(item.index, said)

    (task,), vocabulary = predictor.config.tasks, predictor.vocabulary
    with ResultWriter(output, task, vocabulary, vocabulary.is_thing) as writer:
        waiting: dict[tuple, list[Loaded]] = defaultdict(list)
        for item in prefetch(load, 0, len(paths), depth=2, num_threads=1):
            if item.error:
                failures.append(item.error)
                report(item.index, "failed.")
                continue
            bucket = waiting[item.prepared.image.shape]
            bucket.append(item)
            if len(bucket) == predictor.config.batch_size:
                flush(waiting.pop(item.prepared.image.shape))
        for rest in waiting.values():
            flush(rest)

    total = num_written + found.num_skipped + len(failures)
    print(
        f"{num_written} of {total} inputs in {format_seconds(time.monotonic() - start)}, "
        f"{found.num_skipped} passed over, {len(failures)} failed; "
        f"written to {output}; {len(predictor.programs)} programs compiled: "
        f"{', '.join(predictor.programs) or 'none'}.",
        flush=True,
    )
    if failures:
        print(f"{len(failures)} failed:", *failures, sep="\n  ", flush=True)
    return len(failures)


def command(given: cli.Flags, arguments: Sequence[str]) -> int:
    """What the flags ask for; 1 if an image failed."""
    if not (given.model and given.output and arguments):
        raise ValueError("give --model=DIR, --output=DIR and the images to segment.")
    model = Model.from_folder(given.model, dtype=given.dtype)
    task = given.task or model.card.task or "panoptic"
    threshold = given.score_threshold
    config = PredictConfig(
        tasks=(task,),
        keep_rule=given.keep_rule,
        score_threshold=0.8 if threshold is None else threshold,
        # Average precision wants all instances; nobody can look at them.
        instance_threshold=0.5 if threshold is None else threshold,
        objectness_threshold=given.objectness_threshold,
        mask_threshold=given.mask_threshold,
        overlap_threshold=given.overlap_threshold,
        short_side=given.short_side or model.card.short_side,
        long_side=given.long_side or model.card.long_side,
        batch_size=given.batch_size,
    )
    if model.notice and task == "panoptic":
        print(model.notice)
    return min(1, run(model.predictor(config), arguments, Path(given.output), given.annotations))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, arguments="IMAGES...")


if __name__ == "__main__":
    main()
