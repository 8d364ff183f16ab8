"""Scores of predictions in files, ours or anybody's, and of a trained stage.

    python -m concat_jax.evaluate --task=panoptic --split=coco_panoptic_119_14 \\
      --annotations=coco/annotations/panoptic_val2017.json --predictions=panoptic_predictions.json

prints PQ, SQ and RQ for all, seen and unseen classes and their harmonic means; --classes adds
every class and --output=report.json writes it all. --split is a split file, a vocabulary, whose
classes are all unseen, or the name of one that ships; without it every class is seen.

- panoptic: COCO panoptic jsons, each with a folder of PNGs that has its name or is given by
  --annotation_pngs and --png_folder. What the official panopticapi refuses is refused, and so are
  predictions for images that have no annotation. --pictures=4 draws the 4 worst and the 4 best
  images, on the photographs of the folder --images, as worst_best.png beside --output, and PQ by
  class, pq_per_class.png.
- semantic: folders of label maps (mIoU, hIoU, accuracies) or panoptic jsons. Pixels are what the
  json beside the folder says (concat_jax.predict writes one), or else the split's ids, or positions
  in it with --annotation_values=indices and --prediction_values=indices.
- instance: a COCO results list against a COCO instances json (mask AP). --protocol=zsi takes the
  IoUs 0.4, 0.5 and 0.6 of the 48/17 and 65/15 splits, whose papers quote AP50 and recall50.

Images and classes that the two sides number differently are told by their names.

    python -m concat_jax.evaluate --config=configs/demo_zps.py --workdir=runs/demo --stage=finetune

scores a finished stage by config.eval.settings, as the training command does, which may try other
keep rules besides; --pictures go to the stage's folder. With --namers it is asked instead how the
stage's own text head, CLIP on the same masks, and both together name them.
"""

from __future__ import annotations

from collections.abc import Sequence

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import as_path, refuse_inputs, write_json
from concat_jax.evaluation.average_precision import COCO_THRESHOLDS, ZSI_THRESHOLDS
from concat_jax.evaluation.report import format_table
from concat_jax.evaluation.result_files import manifest_path, result_in
from concat_jax.evaluation.score_files import score_instances, score_panoptic
from concat_jax.evaluation.score_label_maps import IGNORED_VALUES, score_semantic
from concat_jax.evaluation.worst_best import WorstAndBest
from concat_jax.inference.images import read_image
from data_pipelines.labels import load_classes

TASKS = ("panoptic", "semantic", "instance")
PROTOCOLS = {"coco": COCO_THRESHOLDS, "zsi": ZSI_THRESHOLDS}
# Flags of one way to call this, which mean nothing to the other.
FILE_FLAGS = ("task", "annotations", "predictions", "split", "annotation_pngs", "png_folder")
FILE_FLAGS += ("annotation_values", "prediction_values", "ignore", "protocol", "images")
# Flags of scores, of which --namers gives none.
SCORE_FLAGS = ("pictures", "classes", "output")


def define_flags(flags: cli.Flags) -> None:
    values = ("", "ids", "indices")
    flags.string("task", "", f"Of files: one of {', '.join(TASKS)}.")
    flags.string("annotations", "", "Ground truth: a json, or a folder of label maps.")
    flags.string("predictions", "", "A json, a folder of label maps, or of what predict wrote.")
    flags.string("split", "", "Split file or vocabulary, or the name of one that ships.")
    flags.string("annotation_pngs", "", "PNGs of --annotations, if not beside it.")
    flags.string("png_folder", "", "PNGs of --predictions, if not beside it.")
    flags.choice("annotation_values", "", values, "Pixels of --annotations' label maps.")
    flags.choice("prediction_values", "", values, "Pixels of --predictions' label maps.")
    ignored = ",".join(map(str, IGNORED_VALUES))
    flags.string("ignore", ignored, "Pixels of label maps that are no class.")
    flags.choice("protocol", "coco", list(PROTOCOLS), "IoUs of the instance task.")
    flags.string("stage", "finetune", "Of a config: the stage to score.")
    flags.switch("namers", "Of a config: how text head and CLIP name the stage's masks.")
    flags.integer("pictures", 0, "Images to draw, of the worst and of the best each.", 0)
    flags.string("images", "", "Folder of the annotated images, for --pictures.")
    flags.switch("classes", "Also print every class.")
    flags.string("output", "", "A json file for the report.")


def _check_flags(given: cli.Flags, files: Sequence[str]) -> None:
    """Refuses flags that mean nothing to the task and its files, ground truth first."""
    are_maps = [given.task == "semantic" and as_path(path).is_dir() for path in files]
    have_pngs = [given.task != "instance" and not of_maps for of_maps in are_maps]
    meant = {"protocol": given.task == "instance", "ignore": any(are_maps)}
    meant |= dict.fromkeys(("pictures", "images"), given.task == "panoptic")
    meant |= zip(("annotation_values", "prediction_values"), are_maps, strict=True)
    meant |= zip(("annotation_pngs", "png_folder"), have_pngs, strict=True)
    for name, has_meaning in meant.items():
        if given[name].present and not has_meaning:
            raise ValueError(
                f"--{name} means nothing to --task={given.task} of these files; leave it out."
            )
    if given.pictures and not given.output:
        raise ValueError("--pictures are written beside the report; give --output=report.json.")
    if given.images and not (given.pictures and as_path(given.images).is_dir()):
        fault = "is no folder" if given.pictures else "is for --pictures; give both"
        raise ValueError(f"--images={given.images} {fault}.")


def evaluate_files(given: cli.Flags, extremes: WorstAndBest | None = None) -> dict:
    """Scores the files that the flags name; returns the summary, as `evaluate` has it.

    `extremes` are shown the images of the panoptic task.

    Raises:
      ValueError: for a flag that is missing or has no meaning, or files at fault.
    """
    check_choice(given.task, TASKS, "--task names no task:")
    for name in ("annotations", "predictions"):
        if not getattr(given, name):
            raise ValueError(f"Scoring files needs --{name}.")
    vocabulary, knows_things = load_classes(given.split) if given.split else (None, True)
    paths = [result_in(path, given.task) for path in (given.annotations, given.predictions)]
    if given.output:
        read = [
            *map(as_path, (*paths, given.split)),
            *(manifest_path(p, given.task) for p in paths),
        ]
        refuse_inputs([as_path(given.output)], read)
    _check_flags(given, paths)
    files, things = (*paths, vocabulary), dict(knows_things=knows_things)
    folders = dict(
        annotation_folder=given.annotation_pngs or None, prediction_folder=given.png_folder or None
    )
    if given.task == "panoptic":
        return score_panoptic(*files, **folders, **things, extremes=extremes)
    if given.task == "instance":
        thresholds = PROTOCOLS[given.protocol]
        return {"instance": score_instances(*files, **things, thresholds=thresholds)}
    ignored = [value.strip() for value in given.ignore.split(",") if value.strip()]
    if not all(value.isdecimal() for value in ignored):
        raise ValueError(f"--ignore={given.ignore} is not like --ignore=0,255.")
    summary = score_semantic(
        *files,
        **folders,
        **things,
        annotation_values=given.annotation_values,
        prediction_values=given.prediction_values,
        ignored_values=tuple(map(int, ignored)),
    )
    return {"semantic": summary}


def evaluate_stage(given: cli.Flags) -> dict:
    """Scores a finished stage of the flags' config and workdir; returns the summary.

    Predictions and pictures go to the stage's folder, as after training. With --namers it prints
    their table instead, and there is no summary.
    """
    from concat_jax.experiment.experiment import open_experiment
    from concat_jax.experiment.workdir import RUN_FILES

    stage = given.stage
    config, workdir = cli.config_and_workdir(given)
    cli.join_hosts(given)
    run = open_experiment(config, workdir, trains=False)
    run.check_stage(stage)
    if given.output:
        output, place = as_path(given.output).resolve(), workdir.resolve()
        first = output.relative_to(place).parts[0] if place in output.parents else ""
        if first in (*RUN_FILES, *config.train):
            raise ValueError(
                f"--output={given.output} is a place of the run's own files; name another one, as "
                f"{workdir / 'scores.json'}."
            )
    if given.namers:
        from concat_jax.benchmarking import naming

        print(f"\n{naming.compare(run, stage)}")
        return {}
    if given.pictures and "panoptic" not in run.setup.predict.tasks:
        raise ValueError(
            "--pictures are of panoptic maps, which config.eval.settings.tasks lacks; leave it out."
        )
    summary = run.evaluate(stage, num_extremes=given.pictures)
    if "panoptic" in run.setup.predict.tasks:
        print(f"Stage {stage}, queries kept by the rule {summary['keep_rule']}:")
    if given.pictures:
        print(f"Pictures: {workdir / stage}")
    if others := run.elsewhere.score(run, stage):
        print(f"\n{run.elsewhere.format({stage: summary}, {stage: others})}")
        summary = summary | {"elsewhere": others}
    return summary


def evaluate_flags(given: cli.Flags) -> dict:
    """What the flags ask for: prints the tables, writes the report and returns the summary.

    Raises ValueError for flags that do not go together.
    """
    report = cli.output_file(given) if given.output else as_path("report.json")
    if report.is_dir() or given.output.endswith("/") or report.suffix == ".png":
        raise ValueError(
            f"--output={given.output} is no name of a json; give --output=report.json."
        )
    extremes = None
    of_files = [name for name in FILE_FLAGS if given[name].present]
    if any(name in given and given[name].present for name in ("config", "workdir")):
        if of_files:
            raise ValueError(
                f"--{of_files[0]} is for predictions in files and --config for a trained stage; "
                "give one or the other."
            )
        for name in SCORE_FLAGS:
            if given.namers and given[name].present:
                raise ValueError(f"--{name} means nothing to --namers, a table; leave it out.")
        summary = evaluate_stage(given)
        if given.namers:
            return summary
    elif given["stage"].present or not of_files:
        raise ValueError(
            "give --task, --annotations and --predictions to score files, or --config, --workdir "
            "and --stage to score a trained stage."
        )
    elif given.namers:
        raise ValueError("--namers is for a trained stage; give --config and --workdir.")
    else:
        if given.pictures:
            folder = as_path(given.images)
            read = (lambda name: read_image(folder / name)) if given.images else None
            extremes = WorstAndBest(given.pictures, read)
        summary = evaluate_files(given, extremes)
    for inner in (summary, *(summary.get(task, {}) for task in TASKS)):
        for note in inner.get("notes", ()):
            print(f"Note: {note}")
    print(f"\n{format_table(summary, classes=given.classes)}")
    if given.output:
        write_json(given.output, summary)
        print(f"\nReport: {given.output}")
    if extremes:
        for path in extremes.write(report.parent, summary["per_class"]):
            print(f"Picture: {path}")
        for fault in extremes.faults:
            print(f"Drawn on grey: {fault}")
    return summary


@cli.command(
    __doc__,
    define_flags,
    with_config=True,
    interrupted="Stopped; nothing was scored, and the same command starts anew.",
)
def main(given: cli.Flags) -> None:
    evaluate_flags(given)


if __name__ == "__main__":
    main()
