"""Checks a data set on disk, counts what it holds, and packs it into shards.

    python -m data_pipelines.prepare coco_panoptic_zps --root=/path/to/coco
    python -m data_pipelines.prepare coco_panoptic_zps --root=/path/to/coco --out=SHARDS --workers=8

The first checks the layout, prints a count table by part, split and class, and runs the leak test
on what training would use. The second also decodes every image and writes TFRecord shards, in
parallel; a command that was stopped goes on where it stood when it is given again. Training reads
them with --config.data.kind=shards --config.data.root=SHARDS, and anybody's tf.data program with
`tfds.builder_from_directory(SHARDS).as_dataset()`.

A training part is packed as training may see it (--unseen), an evaluation part whole.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from concat_jax.command_line import Parser, one_sentence
from concat_jax.configuration import check_choice
from data_pipelines.build_shards import IMAGES_PER_SHARD, build_shards
from data_pipelines.count_table import PartCounts, count_part, format_classes, format_parts
from data_pipelines.layouts import DATASETS, open_source
from data_pipelines.leak_test import check_no_leak
from data_pipelines.source import UNSEEN_IMAGES, Source, UnseenImages, treat_unseen
from data_pipelines.tfds_metadata import is_tfds_installed, write_tfds_metadata


def prepare(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    parts: Sequence[str] = (),
    split_file: str | None = None,
    unseen: UnseenImages | None = None,
    out: str | os.PathLike[str] | None = None,
    num_shards: int | None = None,
    workers: int = 2,
    skip_bad: bool = False,
) -> dict[str, PartCounts]:
    """Checks, counts and, where `out` is given, packs parts of a data set; prints what it finds.

    Args:
      dataset: a name of `layouts`.
      root: its folder.
      parts: of the data set; () takes the training and the evaluation part of its layout.
      split_file: instead of the layout's own, see `layouts.open_source`.
      unseen: what training does with images that show unseen classes, see `source.treat_unseen`;
        None takes what the data set's protocol does. Without `parts` it holds for the training part
        alone, since evaluation is over all classes.
      out: folder of the shards; None writes nothing.
      num_shards, workers: see `build_shards`.
      skip_bad: leave out images of other parts than the data set's evaluation part that cannot be
        used, count and name them, instead of raising.

    Returns:
      Part to its counts.

    Raises:
      DataError: for a wrong layout, files that are missing or damaged, a leak, or shards in `out`
        that were begun with something else.
      ValueError: for an argument out of range.
    """
    treatments = _treatments(dataset, parts, unseen)
    # Never of the evaluation part: a missing image would change the metric in silence.
    skips = {part: skip_bad and part != DATASETS[dataset].parts[1] for part in treatments}
    sources = {
        part: open_source(
            dataset, root, part, split_file, on_bad_example="skip" if skips[part] else "raise"
        )
        for part in treatments
    }
    counts = {part: count_part(source, treatments[part]) for part, source in sources.items()}
    vocabulary = next(iter(sources.values())).vocabulary
    print(format_classes(vocabulary, counts), format_parts(vocabulary, counts), sep="\n\n")
    for part, source in sources.items():
        print(_test_leak(part, source, treatments[part]), flush=True)
    if out is None:
        return counts
    for part, source in sources.items():
        report = build_shards(
            out,
            source,
            dataset=dataset,
            part=part,
            unseen=treatments[part],
            num_shards=num_shards,
            workers=workers,
            skip_bad=skips[part],
        )
        for why in report.skipped.values():
            print(f"Left out: {why}")
        print(
            f"{part}: {report.images} images in {out}, {report.finished_before} shards as they "
            f"were, {report.written} written, {len(report.skipped)} bad images left out.",
            flush=True,
        )
    if is_tfds_installed():
        write_tfds_metadata(Path(out))
    else:
        print(
            "tensorflow-datasets is not installed, so tfds.builder_from_directory cannot read "
            "these shards yet; training can. Install requirements-data.txt and give the command "
            "again."
        )
    return counts


def _test_leak(part: str, source: Source, treatment: UnseenImages) -> str:
    if treatment == "keep":
        return f"{part}: no leak test, because all images and classes are kept: for evaluation."
    treated, positions = treat_unseen(source, treatment)
    check_no_leak(treated, positions)
    return f"{part}: leak test passed, {len(positions)} images show no unseen class."


def _treatments(
    dataset: str, parts: Sequence[str], unseen: UnseenImages | None
) -> dict[str, UnseenImages]:
    # Part to what happens to its images that show unseen classes.
    check_choice(dataset, DATASETS, "There is no data set")
    known = DATASETS[dataset]
    training, evaluation = known.parts
    if not parts:
        return {training: unseen or known.unseen_images, evaluation: "keep"}
    defaults = {training: known.unseen_images, evaluation: "keep"}
    for part in parts:
        if unseen is None and part not in defaults:
            raise ValueError(
                f"{part!r} is neither {training!r} nor {evaluation!r}, so say what is done with "
                "its unseen classes: --unseen=drop or void for training, keep for evaluation."
            )
    return {part: unseen or defaults[part] for part in parts}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses; a mistake ends the program in one sentence, an unknown flag with the nearest."""
    parser = Parser(
        prog="python -m data_pipelines.prepare",
        description="Checks a data set, counts what it holds, and packs it into shards.",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=", ".join(DATASETS))
    add("--root", metavar="DIR", help="folder of the data set")
    add(
        "--part", default="", help="a part, or several with commas; both of the data set by default"
    )
    add("--split", help="split or vocabulary file, or the name of one that ships")
    add("--unseen", choices=UNSEEN_IMAGES, help="training images that show unseen classes")
    add("--out", metavar="DIR", help="folder for shards; none are written without")
    add("--shards", type=int, help=f"files a part; one for {IMAGES_PER_SHARD} images by default")
    add("--workers", type=int, default=2, help="processes that write shards")
    add(
        "--on_bad_example",
        choices=("raise", "skip"),
        default="raise",
        help="unusable images for training",
    )
    arguments = parser.parse_args(argv)
    if not arguments.root:
        parser.error("Give --root=DIR, the folder of the data set")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Entry point; a user's mistake ends in one sentence and exit code 1."""
    arguments = parse_arguments(argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with one_sentence():
            prepare(
                arguments.dataset,
                arguments.root,
                parts=tuple(part for part in arguments.part.split(",") if part),
                split_file=arguments.split,
                unseen=arguments.unseen,
                out=arguments.out,
                num_shards=arguments.shards,
                workers=arguments.workers,
                skip_bad=arguments.on_bad_example == "skip",
            )
    except KeyboardInterrupt:
        sys.exit("Stopped; finished shards are kept, and the same command goes on.")


if __name__ == "__main__":
    main(sys.argv)
