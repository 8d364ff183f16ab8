"""Checks a data set on disk, counts what it holds, and prepares it for training at scale.

    python -m data_pipelines.prepare coco_panoptic_zps --root=/path/to/coco
    python -m data_pipelines.prepare coco_panoptic_zps --root=/path/to/coco --out=DIR

The first checks the layout, prints a count table by part, split and class, runs the leak test on
what training would use, and then reads every image and its annotation. The second does so to write
a TensorFlow data set, in parallel, into a folder or a bucket, gs://NAME/...: training reads it with
--config.data.kind=tfds --config.data.root=DIR, and anybody's program with
`tfds.builder_from_directory(DIR).as_dataset(split=PART)`. Given again, the command finds what is
finished, and begins anew with a part that was stopped.

A training part is written as training may see it (--unseen), an evaluation part whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import FileError, as_path
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.count_table import PartCounts, count_part, format_classes, format_parts
from data_pipelines.leak_test import check_no_leak
from data_pipelines.prepared.build import build_part, check_name
from data_pipelines.prepared.files import tensorflow
from data_pipelines.sources.pictures import check_images
from data_pipelines.sources.registry import DATASETS, open_source
from data_pipelines.sources.source import (
    UNSEEN_IMAGES,
    FolderSource,
    Source,
    UnseenImages,
    treat_unseen,
)


def prepare(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    parts: Sequence[str] = (),
    split_file: str | None = None,
    unseen: UnseenImages | None = None,
    out: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
) -> dict[str, PartCounts]:
    """Checks, counts and, where `out` is given, writes parts of a data set; part -> its counts.

    Args:
      parts: () takes the training and the evaluation part of the layout.
      split_file: instead of the layout's own, see `open_source`.
      unseen: see `source.treat_unseen`; None takes what the data set's protocol does. Without
        `parts` it holds for the training part alone, since evaluation is over all classes.
      out: see `build_part`.
      skip_bad: leave out images of other parts than the data set's evaluation part that cannot be
        used, count and name them, instead of raising.

    Raises FileError for what is missing, damaged or leaks, or a folder made with something else.
    """
    treatments = _treatments(dataset, parts, unseen)
    if out is not None:
        tensorflow("tensorflow_datasets")
        as_path(out)
        for part in treatments:
            check_name("part", part)
    # Never of an evaluation part: a missing image would change the metric in silence.
    training, evaluation = DATASETS[dataset].parts
    skips = {
        part: skip_bad and part != evaluation and (part == training or treatment != "keep")
        for part, treatment in treatments.items()
    }
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
        _check_something_is_left(part, counts[part], vocabulary)
        print(_test_leak(part, source, treatments[part]), flush=True)
        left_out = getattr(source, "skipped", 0)
        if out is None:
            left_out += _check_images(part, source, treatments[part], skips[part])
        if left_out:
            print(f"{part}: {left_out} images cannot be used and are left out of training.")
    if out is None:
        return counts
    # TFDS decodes the id maps of all parts alike.
    most = max(len(record.labels) for source in sources.values() for record in source.records)
    for part, source in sources.items():
        made, was_there = build_part(
            out,
            source,
            dataset=dataset,
            part=part,
            unseen=treatments[part],
            id_bits=16 if most > 255 else 8,
            skip_bad=skips[part],
        )
        for why in made.skipped.values():
            print(f"Left out: {why}")
        print(
            f"{part}: {sum(made.shard_lengths)} images in {out}, {len(made.skipped)} bad images "
            f"left out{', as it was there already' if was_there else ''}.",
            flush=True,
        )
    return counts


def _check_something_is_left(part: str, counts: PartCounts, vocabulary: Vocabulary) -> None:
    if counts.crowd and counts.crowd == counts.class_segments.sum():
        raise FileError(
            f"All {counts.crowd} segments of {part} are crowd, so there is nothing to learn or "
            'score; check their "iscrowd".'
        )
    if counts.kept_images:
        return
    if not counts.class_segments.any():
        raise FileError(
            f"Not one of the {counts.images} images of {part} has a segment, so there is nothing "
            "to learn or score; check that the annotation lists segments."
        )
    if not any(vocabulary.is_seen):
        raise FileError(
            f"The split marks no class seen, so none of the {counts.images} images of {part} is "
            'left to train on; give each class a "split" of "seen" or "unseen" there.'
        )
    raise FileError(
        f"Every one of the {counts.images} images of {part} shows unseen classes"
        f"{' alone' if counts.unseen == 'void' else ''}, so none is left to train on with "
        f"--unseen={counts.unseen}; give {'--unseen=void, or ' if counts.unseen == 'drop' else ''}"
        "another --split."
    )


def _check_images(part: str, source: FolderSource, unseen: UnseenImages, skips: bool) -> int:
    # How many cannot be used.
    bad: set[int] = set()

    def on_fault(index: int, error: FileError) -> None:
        if not skips:
            raise error
        print(f"Left out: {error}")
        bad.add(index)

    check_images(source, part, on_fault)
    if bad.issuperset(treat_unseen(source, unseen)[1].tolist()):
        raise FileError(
            f"Not one of the images of {part} that training would take can be used; mend those "
            "that are named above."
        )
    return len(bad)


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


def define_flags(flags: cli.Flags) -> None:
    flags.string("root", "", "Folder of the data set.")
    flags.string("part", "", "A part, or several with commas; both of the data set by default.")
    flags.string("split", None, "Split or vocabulary file, or the name of one that ships.")
    flags.choice("unseen", None, UNSEEN_IMAGES, "Training images that show unseen classes.")
    flags.string("out", None, "Folder or bucket to prepare the data in; none without.")
    flags.choice("on_bad_example", "raise", ("raise", "skip"), "Unusable images for training.")


@cli.command(
    __doc__,
    define_flags,
    arguments="DATASET",
    computes=False,
    interrupted="Stopped; finished parts are kept, and the same command begins with the next one.",
)
def main(given: cli.Flags, arguments: Sequence[str]) -> None:
    if len(arguments) != 1 or not given.root:
        raise ValueError(
            "give the data set's name and its folder: python -m data_pipelines.prepare DATASET "
            f"--root=DIR; the names are {', '.join(DATASETS)}."
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    prepare(
        arguments[0],
        given.root,
        parts=tuple(part for part in given.part.split(",") if part),
        split_file=given.split,
        unseen=given.unseen,
        out=given.out,
        skip_bad=given.on_bad_example == "skip",
    )


if __name__ == "__main__":
    main()
