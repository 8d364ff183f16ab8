"""Exports a model for programs that have nothing of this package: JAX, TensorFlow, ONNX Runtime.

    python -m concat_jax.export MODEL OUT --format=onnx --classes="cat, dog; sky" --size=480x640

MODEL is a folder that `concat_jax.convert` made, the workdir of `concat_jax.main`, or demo. OUT is
a folder to make, with the artefact and `export.json`, which says what goes in and out. Without
--classes the text embeddings of the names are an input of a model that reads names; those of its
training lie in `text.npy`. docs/export.md shows how to load each.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import numpy as np

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import files_below, size_of, write_json
from concat_jax.core.progress import format_seconds
from concat_jax.experiment.model import DEMO, open_model
from concat_jax.exporting.formats import FORMATS
from concat_jax.exporting.program import check_size, deviation, make_program
from concat_jax.weights.disk import EXPORT_NAME, check_apart, check_destination, new_folder

TEXT_NAME = "text.npy"
# Runtimes round differently. What is further off is another graph.
MOST_DEVIATION = 1e-2


def define_flags(flags: cli.Flags) -> None:
    flags.string("format", "", f"One of {', '.join(FORMATS)}.")
    flags.string("classes", "", "Things; stuff. Or a file. They become part of the artefact.")
    flags.string("size", "", "HxW of the image; the square of the model's short side by default.")
    flags.string("stage", "", "Of a workdir; the last that is evaluated by default.")
    flags.switch("overwrite", "Replace an export at OUT.")


@cli.command(
    __doc__,
    define_flags,
    arguments="MODEL OUT",
    interrupted="Stopped; nothing was written to OUT.",
)
def main(given: cli.Flags, arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or not all(arguments):
        raise ValueError("give a model and a folder to make: python -m concat_jax.export MODEL OUT")
    source, destination = arguments
    if not given.format:
        raise ValueError(f"give --format, one of {', '.join(FORMATS)}.")
    check_choice(given.format, FORMATS, "There is no format")
    format_ = FORMATS[given.format]
    format_.check_installed(given.format)
    size = _size(given.size)
    check_destination(destination, overwrite=given.overwrite)
    check_apart(destination, "" if source == DEMO else source, given.classes)

    model = open_model(source, stage=given.stage, dtype="float32")
    predictor = model.predictor(classes=given.classes or None)
    print(*predictor.notices, sep="\n", end="\n" * bool(predictor.notices))
    named, size = predictor.vocabulary, size or predictor.buckets.shapes[0]
    program = make_program(predictor, size, open_names=not given.classes)
    start = time.monotonic()
    with new_folder(destination, {"all": program.params}, overwrite=given.overwrite) as folder:
        path = folder / format_.file
        try:
            format_.write(program, path)
            seconds = time.monotonic() - start
            off = deviation(program, format_.load(path))
        except OSError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"{given.format} cannot hold this model ({what}); use another --format."
            ) from error
        most = np.max([*off.values()])
        if not most <= MOST_DEVIATION:  # NaN is not
            raise ValueError(
                f"What {given.format} makes of this model is another function (its outputs are off "
                f"by {most:.2g}), so nothing was written; use another --format."
            )
        config = predictor.config
        content = {
            "format": given.format,
            "file": format_.file,
            "source": model.card.source,
            "names": named.names,
            "is_thing": named.is_thing,
            "is_seen": named.is_seen,
            "inputs": {name: spec._asdict() for name, spec in program.inputs.items()},
            "outputs": {name: spec._asdict() for name, spec in program.outputs.items()},
            "keep_rule": config.keep_rule,
            "keep_threshold": getattr(config, f"{config.keep_rule}_threshold"),
            "mask_threshold": config.mask_threshold,
            "overlap_threshold": config.overlap_threshold,
            "deviation": off,
            "versions": format_.versions(),
        }
        if "text" in program.inputs:
            np.save(folder / TEXT_NAME, np.asarray(program.params[1].text))
        write_json(folder / EXPORT_NAME, content)
        total = sum(files_below(path).values()) or size_of(path)  # a folder, of some formats
    what = "names are an input" if "text" in program.inputs else f"{len(named)} names"
    print(
        f"Wrote {destination}/{format_.file}, {total / 1e6:.1f} MB in {format_seconds(seconds)}: "
        f"images of {size[0]}x{size[1]}, {what}."
    )
    print(
        "Against the model, on one image, it is off by at most, of each output's largest value, "
        + ", ".join(f"{value:.1e} ({name})" for name, value in off.items())
        + "."
    )


def _size(text: str) -> tuple[int, int] | None:
    """(height, width) of --size; None where it is not given."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if not match:
        raise ValueError(f"--size={text} is no HEIGHTxWIDTH; give for example --size=480x640.")
    size = int(match[1]), int(match[2])
    check_size(size)
    return size


if __name__ == "__main__":
    main()
