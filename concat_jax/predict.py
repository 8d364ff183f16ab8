"""Segments images with converted weights.

python -m concat_jax.predict --model=MODEL_FOLDER --output=DIR IMAGES...
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from concat_jax.command_line import Parser, one_sentence
from concat_jax.compilation_cache import enable_compilation_cache
from concat_jax.evaluation.panoptic_inference import KEEP_RULES
from concat_jax.image_files import ImageError
from concat_jax.prediction.images import OVERLAY_SUFFIX, SUFFIXES, read_image
from concat_jax.prediction.outputs import ResultWriter, image_ids, output_names
from concat_jax.prediction.predictor import PredictConfig, Predictor, Prepared
from concat_jax.training.metric_writer import format_seconds
from concat_jax.training.prefetch import prefetch
from concat_jax.weights.model_folder import load_model

# From so many images on, lines say how far it is and how long it will take.
PROGRESS_FROM = 4


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An input read from disk: `error` says why there is no image."""

    index: int
    image: np.ndarray | None = None
    prepared: Prepared | None = None
    error: str = ""


def make_parser() -> argparse.ArgumentParser:
    """Flags of the command line; those of `PredictConfig` keep its names and defaults."""
    parser = Parser(
        prog="python -m concat_jax.predict",
        description="Segments images with converted weights: COCO files and overlay pictures.",
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGES", help="files, folders (their images) and globs")
    add("--model", metavar="DIR", help="folder that concat_jax.convert wrote")
    add("--output", metavar="DIR", help="folder for the results; made if absent")
    add("--task", default="", help="panoptic, instance or semantic; the model's own by default")
    add("--keep_rule", default="score", help=f"of panoptic maps: {' or '.join(KEEP_RULES)}")
    add("--score_threshold", type=float, help="0.8 for panoptic maps, 0.5 for instances")
    add("--objectness_threshold", type=float, default=0.5, help="of --keep_rule=objectness")
    add("--mask_threshold", type=float, default=0.5, help="mask probability of a panoptic pixel")
    add("--overlap_threshold", type=float, default=0.8, help="share of its mask a segment owns")
    add("--short_side", type=int, default=800, help="of the network's input")
    add("--long_side", type=int, default=1333, help="bound on its longer side")
    add("--dtype", default="", help="float32 or bfloat16; the model's own by default")
    add("--batch_size", type=int, default=1, help="images the network takes at once")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses; a mistake ends the program in one sentence, an unknown flag with the nearest."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not (arguments.model and arguments.output and arguments.images):
        parser.error("Give --model=DIR, --output=DIR and the images to segment")
    return arguments


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
            found = writer.add(names[item.index], ids[item.index], path.name, item.image, result)
            num_written += 1
            report(item.index, found)

    if predictor.notice:
        print(predictor.notice)
    task, vocabulary = predictor.config.task, predictor.vocabulary
    with ResultWriter(output, task, vocabulary, predictor.is_thing) as writer:
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


def main(argv: Sequence[str]) -> None:
    """Entry point; a user's mistake ends in one sentence and exit code 1."""
    arguments = vars(parse_arguments(argv[1:]))
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every restore at INFO
    enable_compilation_cache()
    folder, output, inputs = (arguments.pop(name) for name in ("model", "output", "images"))
    with one_sentence():
        config = PredictConfig(**arguments)
        predictor = Predictor(*load_model(folder), config)
        failed = run(predictor, inputs, Path(output))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv)
