"""The best seen-class calibration γ of a trained stage, chosen on images that nothing is tested on.

    python -m concat_jax.calibrate --config=configs/demo_zps.py --workdir=runs/demo

γ is taken from the logits of seen names. Scores the stage at many γ in one pass over held-out
images, prints hPQ, seen and unseen PQ against γ and the area under their curve, writes the table to
`calibration.md` and `calibration.json` in the stage's folder and the curve to `calibration.png`,
and ends with the flag that sets the chosen γ. Which images are held out:

- The synthetic world draws its validation split, whatever `config.data.eval_split` says.
- Data in COCO's layout need --part=NAME, one of
    the part that is trained on (train2017), of which only those images are taken that training
    leaves out because they show an unseen class (config.data.unseen_images is "drop");
    another annotated part, which is neither trained nor tested on;
    one half of the part that is tested on, by image id: --part=val2017:even or --part=val2017:odd.
    The other half is then scored, too, without γ and with the chosen one. A score of the whole
    part at that γ is no test score, as half of its images chose γ.

Choosing γ looks at labels of unseen classes, so compare with methods that had the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import write_json, write_text
from concat_jax.core.prefetch import prefetch
from concat_jax.evaluation.calibration import (
    GAMMAS,
    Sweep,
    calibrate,
    check_gammas,
    format_areas,
    format_sweep,
)
from concat_jax.experiment.experiment import open_experiment
from concat_jax.visualize import plots

HALVES = ("even", "odd")

Examples = Callable[[], Iterable[Mapping]]


class HeldOut(NamedTuple):
    """Images to choose γ on, and the `rest` where they are one half of the test part."""

    name: str
    held_out: Examples
    rest: Examples | None = None


def held_out_images(data: Mapping[str, Any], part: str, *, seed: int, num_images: int) -> HeldOut:
    """The images that γ may be chosen on, at most `num_images` evenly spread over those there are.

    Raises ValueError where the part is missing, superfluous, or tested or trained on.
    """
    if data["kind"] == "synthetic":
        from data_pipelines.datasets import make_datasets

        if part:
            raise ValueError(
                f"--part={part} is for data in COCO's layout; the synthetic world draws its own "
                "validation split, so leave the flag out."
            )
        world = make_datasets({**data, "eval_split": "validation"}, seed=seed)
        limit = num_images or None
        return HeldOut("validation split", lambda: itertools.islice(world.evaluation(), limit))
    part, _, half = part.partition(":")
    if not part:
        raise ValueError(
            "Choosing gamma needs held-out images: give --part=NAME of a part that is not tested "
            f"on, or one half of it as --part={data['eval_part']}:even."
        )
    if half:
        check_choice(half, HALVES, f"--part={part}:{half} names no half:")
        if part == data["train_part"]:
            raise ValueError(
                f"--part={part}:{half} is half of what is trained on; --part={part} takes the "
                "images of it that training leaves out."
            )
    elif part == data["eval_part"]:
        raise ValueError(
            f"--part={part} is the part that the config tests on, so gamma must not be chosen on "
            f"it; give another part, or one half of this one as --part={part}:even."
        )
    elif part == data["train_part"] and data["unseen_images"] != "drop":
        raise ValueError(
            f"--part={part} is trained on whole (config.data.unseen_images is "
            f"{data['unseen_images']!r}); give a part that is not."
        )
    return _coco_images(data, part, half, seed=seed, num_images=num_images)


def _coco_images(
    data: Mapping[str, Any], part: str, half: str, *, seed: int, num_images: int
) -> HeldOut:
    from data_pipelines.datasets import training_part

    source = training_part({**data, "train_part": part}, seed=seed)
    everything = range(len(source.records))

    def examples(indices: Sequence[int]) -> Iterator[Mapping]:
        if num_images and len(indices) > num_images:
            indices = [indices[i] for i in np.linspace(0, len(indices) - 1, num_images).astype(int)]
        threads = data["num_threads"]
        yield from prefetch(
            lambda step: source.eval_example(indices[step]), 0, len(indices), threads + 1, threads
        )

    name, chosen, other = f"images of {part}", list(everything), None
    if half:
        is_chosen = [source.records[i].image_id % 2 == HALVES.index(half) for i in everything]
        chosen, other = (
            [i for i in everything if is_chosen[i] == wanted] for wanted in (True, False)
        )
        name += f" with {half} ids"
        if not chosen or not other:
            (only,) = {source.records[i].image_id % 2 for i in everything}
            raise ValueError(
                f"--part={part}:{half}: the ids of all {len(everything)} images of {part} are "
                f"{HALVES[only]}, so one half is empty; give another annotated part, --part=NAME."
            )
    elif part == data["train_part"]:
        trained = set(source.training_indices.tolist())
        chosen = [i for i in everything if i not in trained]
        name += " that training leaves out"
        if not chosen:
            raise ValueError(
                f"--part={part}: training leaves out none of its {len(everything)} images; give "
                f"another annotated part, or a half of one as --part={data['eval_part']}:even."
            )
    rest = None if other is None else functools.partial(examples, other)
    return HeldOut(name, functools.partial(examples, chosen), rest)


def calibrate_stage(
    config: ml_collections.ConfigDict,
    workdir: Path,
    stage: str,
    gammas: Iterable[float],
    *,
    part: str = "",
    num_images: int = 0,
) -> float:
    """Chooses γ for a finished stage among `gammas` and 0; writes the report."""
    check_gammas((0.0, *gammas))
    images = held_out_images(config.data, part, seed=config.seed, num_images=num_images)
    run = open_experiment(config, workdir, trains=False)
    run.check_stage(stage)

    print(f"Stage {stage}, {images.name}:", flush=True)
    sweep_of = functools.partial(run.sweep, stage)
    test = images.rest and images.rest()
    gamma, held_out, rest = calibrate(sweep_of, images.held_out(), test, gammas)
    flag = f"--config.eval.settings.gamma={gamma:g}"
    sections = [f"Stage {stage}, {images.name}, percent:", format_sweep(held_out, gamma)]
    sections.append(format_areas(held_out))
    if rest:
        sections += [
            "The other half, which gamma was not chosen on:",
            format_sweep(rest, gamma, sorted({0.0, gamma})),
            format_areas(rest),
        ]
    sections.append(f"Best hPQ at gamma {gamma:g}: {flag}")
    if gamma in (held_out.gammas[0], held_out.gammas[-1]):
        sections.append(f"{gamma:g} is the last gamma tried; one beyond may be better.")
    text = "\n\n".join(sections)
    print(f"\n{text}", flush=True)  # before a disk may refuse
    folder = workdir / stage
    write_text(folder / "calibration.md", text + "\n")
    write_json(
        folder / "calibration.json",
        {
            "stage": stage,
            "images": images.name,
            "gamma": gamma,
            "flag": flag,
            "held_out": _summaries(held_out),
            "other_half": _summaries(rest) if rest else [],
        },
    )
    curves = {images.name: held_out.curve()} | ({"the other half": rest.curve()} if rest else {})
    plots.save_figure(plots.bias_curves(curves), folder / "calibration.png")
    print(f"\nReport: {folder / 'calibration.md'}")
    return gamma


def _summaries(found: Sweep) -> list[dict]:
    return [{"gamma": gamma, "summary": found.summary(gamma)} for gamma in found.gammas]


def parse_gamma(text: str) -> float:
    """One number of the flag --gammas."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--gammas holds {text!r}; give numbers like --gammas=0,0.5,1.") from None


def define_flags(flags: cli.Flags) -> None:
    flags.string("stage", "finetune", "Stage of config.train to calibrate.")
    flags.strings(
        "gammas", [], f"Values to try; {len(GAMMAS)} from {GAMMAS[0]:g} to {GAMMAS[-1]:g}."
    )
    flags.string("part", "", "Held-out part of data in COCO's layout; see above.")
    flags.integer("num_images", 2000, "Held-out images at most; 0 is all.", 0)


@cli.command(
    __doc__,
    define_flags,
    with_config=True,
    interrupted="Stopped; no gamma was chosen, and the same command starts anew.",
)
def main(given: cli.Flags) -> None:
    config, workdir = cli.config_and_workdir(given)
    gammas = [*map(parse_gamma, given.gammas)] or GAMMAS
    images = dict(part=given.part, num_images=given.num_images)
    calibrate_stage(config, workdir, given.stage, gammas, **images)


if __name__ == "__main__":
    main()
