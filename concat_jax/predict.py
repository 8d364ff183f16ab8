"""Segments images with converted weights.

python -m concat_jax.predict --model=MODEL_FOLDER --output=DIR IMAGES...
"""

from __future__ import annotations

import dataclasses
import glob
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from concat_jax.core import cli
from concat_jax.core.files import ImageError
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import format_seconds
from concat_jax.inference.images import OVERLAY_SUFFIX, SUFFIXES, read_image
from concat_jax.inference.model import Model
from concat_jax.inference.outputs import ResultWriter, image_ids, output_names
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


def find_images(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files of the command line's inputs, each once, in order.

    A folder stands for the images directly in it, without the overlay pictures of earlier runs.

    Returns:
      (paths, a sentence for every input that stands for no file).
    """
    paths: dict[Path, Path] = {}
    errors = []
    for given in inputs:
        path = Path(given)
        found = [path]
        if path.is_dir():
            found = sorted(
                child
                for child in path.iterdir()
                if child.suffix.lower() in SUFFIXES and not child.name.endswith(OVERLAY_SUFFIX)
            )
            if not found:
                errors.append(f"{given} holds no image.")
        elif not path.exists():
            is_pattern = glob.has_magic(given)
            found = sorted(map(Path, glob.glob(given, recursive=True))) if is_pattern else []
            if not found:
                errors.append(f"{given} {'matches no file' if is_pattern else 'does not exist'}.")
        for file in found:
            paths.setdefault(file.resolve(), file)
    return list(paths.values()), errors


def run(predictor: Predictor, inputs: Sequence[str], output: Path) -> int:
    """Segments what the inputs stand for and writes the results; prints a line an image.

    Args:
      predictor: of the model.
      inputs: files, folders and globs.
      output: folder of the results.

    Returns:
      How many inputs failed; the others are written.
    """
    start = time.monotonic()
    paths, failures = find_images(inputs)
    names = output_names(paths)
    ids = image_ids(names)

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
            path = paths[item.index]
            result = next(part for part in result if part is not None)
            found = writer.add(names[item.index], ids[item.index], path.name, item.image, result)
            num_written += 1
            report(item.index, found)

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

    print(
        f"{num_written} of {len(paths)} images in {format_seconds(time.monotonic() - start)}, "
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
    return min(1, run(model.predictor(config), arguments, Path(given.output)))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, arguments="IMAGES...")


if __name__ == "__main__":
    main()
