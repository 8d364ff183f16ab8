"""The command line for weights: other people's in, ours out, and back.

    python -m concat_jax.convert SOURCE DESTINATION

SOURCE is a Hugging Face folder (a Mask2Former's, an EoMT's, a DINO's, a ResNet's or a Swin's), a
file of weights (a Detectron2 Mask2Former's .pkl or .pth, PADing's, FC-CLIP's, or an ImageNet
ResNet's or Swin's), a folder that this command made, or a workdir of `concat_jax.main`, of which
segmentor, projector, text tower and tokenizer are taken.
DESTINATION is a folder to make: for `concat_jax.predict` and `config.init.segmentor`, or with
--to=hf for transformers. What became of every array is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.files import as_path
from concat_jax.experiment.model import export_workdir, is_workdir
from concat_jax.inference.text_tower import embed_training_names, find_clip_tokenizer
from concat_jax.weights.class_names import Classes
from concat_jax.weights.convert import load_source
from concat_jax.weights.disk import check_apart, check_destination
from concat_jax.weights.hugging_face_folder import save_hf_folder
from concat_jax.weights.model_folder import TASKS, ModelCard, save_model, text_modules
from data_pipelines.labels import load_classes, load_label_space, with_synonyms

FORMATS = ("orbax", "hf")
USAGE = "python -m concat_jax.convert SOURCE DESTINATION [flags]"
COCO_SPLIT, COCO_VOCABULARY = "coco_panoptic_119_14", "coco_panoptic_133"


def define_flags(flags: cli.Flags) -> None:
    flags.string(
        "classes",
        "",
        'Names of the classes: a JSON list of {"id", "name", "isthing"}, or a text file with a '
        "name a line.",
    )
    flags.switch("reinit_head", "Make a new class head.")
    flags.string(
        "tokenizer",
        "",
        "Of an FC-CLIP: CLIP's bpe_simple_vocab_16e6.txt.gz, tokenizer.json, or a folder with it.",
    )
    flags.string("task", "", f"What the weights are for: {', '.join(TASKS)}.")
    flags.string("to", "orbax", "orbax: for this package; hf: for transformers.")
    flags.string("stage", "", "Of a workdir; the last that is evaluated by default.")
    flags.switch("float16", "Keep weights in half the room; they are read as float32.")
    flags.switch("overwrite", "Replace a model at DESTINATION.")


@cli.command(
    __doc__,
    define_flags,
    arguments="SOURCE DESTINATION",
    interrupted="Stopped; nothing was written to the destination.",
)
def main(given: cli.Flags, arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or not all(arguments):
        raise ValueError(f"give a source and a destination: {USAGE}")
    source, destination = arguments
    check_apart(destination, source, given.classes, given.tokenizer)
    if is_workdir(as_path(source)):
        for name in ("classes", "reinit_head", "task", "tokenizer"):
            if given[name].present:
                raise ValueError(f"--{name} is for weights of others, not for a workdir.")
        if given.to != "orbax":
            raise ValueError(f"--to={given.to} cannot hold a model that names classes by text.")
        how = {"overwrite": given.overwrite, "float16": given.float16}
        export_workdir(source, destination, stage=given.stage, **how)
        return
    if given.stage:
        raise ValueError(f"--stage={given.stage} is for workdirs, and {source} is none.")
    for flag, valid in (("to", FORMATS), ("task", ("", *TASKS))):
        check_choice(given[flag].value, valid, f"--{flag} is unknown:")
    if given.float16 and given.to == "hf":
        raise ValueError("--float16 is for --to=orbax; folders of Hugging Face's hold float32.")
    check_destination(destination, overwrite=given.overwrite)
    known, named = load_label_space(COCO_SPLIT), None
    known = with_synonyms(known, load_label_space(COCO_VOCABULARY)).all_seen()
    if given.classes:
        vocabulary, knows_things = load_classes(given.classes, known)
        named = Classes(vocabulary.all_seen(), knows_things, given.classes)

    model = load_source(source, known, named, new_head=given.reinit_head)
    print(f"{source} is {model.kind}.", model.report, sep="\n")
    tokenizer = None
    if model.num_trained is not None:
        if given.to == "hf":
            raise ValueError("--to=hf cannot hold a model that names classes by text.")
        clip, _ = text_modules(model.card.text)
        tokenizer = find_clip_tokenizer(given.tokenizer or source, clip)
        model = embed_training_names(model, tokenizer)
    elif given.tokenizer:
        raise ValueError("--tokenizer is for models that name classes by text; leave it out.")
    card = dataclasses.replace(model.card, task=given.task or model.card.task)
    print(*model.notes, *_describe(card, model.classes), sep="\n")
    how = {"overwrite": given.overwrite}
    if given.to == "hf":
        save_hf_folder(destination, model.params, card, **how)
    else:
        how |= {"float16": given.float16, "tokenizer": tokenizer}
        save_model(destination, model.params, card, **how)
    print(f"Wrote {destination}.")


def _describe(card: ModelCard, classes: Classes | None) -> list[str]:
    if classes is None:
        return ["Classes: none, there is no class head."]
    things = "which are things is unknown"
    if classes.knows_things:
        things = f"{sum(classes.vocabulary.is_thing)} of them things"
    return [
        *classes.notes,
        f"Classes: {len(classes.vocabulary)}, {things}; from {classes.origin}.",
        f"Task: {card.task or 'unknown; pass --task to say it'}.",
    ]


if __name__ == "__main__":
    main()
