"""A model from wherever somebody has one: a workdir, or a folder that `convert` made."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import types

import jax
import ml_collections
from etils.epath import Path

from concat_jax import weights
from concat_jax.core.config import unflatten
from concat_jax.core.files import as_path, read_json, write_json
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.class_embeddings import ClassEmbeddings
from concat_jax.experiment.parameters import INIT, Parameters
from concat_jax.experiment.setup import Labels, Setup, make_setup
from concat_jax.experiment.workdir import check_origins
from concat_jax.inference.model import Model
from concat_jax.inference.predictor import PredictConfig
from concat_jax.inference.text_tower import text_params
from concat_jax.models.networks import Params
from concat_jax.text.templates import find_templates
from concat_jax.text.tokenizer import Tokenizer
from concat_jax.training.sharding import make_mesh
from concat_jax.weights.disk import EXPORT_NAME, check_destination
from concat_jax.weights.model_folder import (
    CARD_NAME,
    TASKS,
    ModelCard,
    TextCard,
    save_model,
)

CONFIG_NAME = "config.json"
LABELS_NAME = "labels.json"
# The model that ships: its name, and its folder.
DEMO, SHIPPED = "demo", pathlib.Path(weights.__file__).parent / "demo"
# What of CLIP's fields decides its text tower.
_TEXT_FIELDS = (
    "embed_dim",
    "vocab_size",
    "context_length",
    "text_width",
    "text_depth",
    "text_heads",
    "text_mlp_ratio",
    "activation",
    "eot_id",
)


def write_labels(workdir: Path, labels: Labels) -> None:
    """Keeps in a workdir what `load_workdir` needs of the data."""
    content = {
        "vocabulary": dataclasses.asdict(labels.vocabulary),
        "caption_words": labels.caption_words,
        "eval_size": labels.eval_size,
    }
    write_json(workdir / LABELS_NAME, content)


def _read_labels(workdir: Path, config: ml_collections.ConfigDict) -> Labels:
    path = workdir / LABELS_NAME
    if not path.exists():  # a workdir of before; the data can tell
        from data_pipelines.datasets import make_datasets

        return make_datasets(config.data, seed=config.seed)
    try:
        content = read_json(path)
        columns = {name: tuple(column) for name, column in content["vocabulary"].items()}
        return types.SimpleNamespace(
            vocabulary=Vocabulary(**columns),
            eval_vocabulary=None,
            caption_words=tuple(content["caption_words"]),
            eval_size=content["eval_size"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it, and the command reads the classes from the "
            "run's data."
        ) from error


def is_workdir(folder: Path) -> bool:
    """Whether `python -m concat_jax.main` made a folder."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{error} If a training wrote it, remove it: the training's command writes it anew."
        ) from error
    return isinstance(content, dict) and any(key.startswith("train.") for key in content)


def open_model(
    path: str | os.PathLike[str],
    *,
    stage: str = "",
    dtype: str = "",
    clip: str | os.PathLike[str] = "",
) -> Model:
    """A model from a workdir, or from a folder that `python -m concat_jax.convert` made.

    The text "demo" names the model that ships; "./demo", as any `Path`, is a folder. `stage` ""
    takes the last that the config evaluates, or the last of all; `dtype` "" the model's own; `clip`
    is one that names the masks of a linear head. Raises ValueError if the folder is neither, the
    stage has not finished, or what is there is damaged.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"{path!r} is no model; give a model's folder, or demo.")
    folder = as_path(path)
    if path == DEMO:
        if (folder / CARD_NAME).is_file() or is_workdir(folder):
            raise ValueError(
                f"{path} is the model that ships, and there is one in the folder {path} here; give "
                f"./{path} for the folder's, or {SHIPPED} for the other."
            )
        folder = SHIPPED
    if (folder / CARD_NAME).is_file():
        if stage:
            raise ValueError(f"The stage {stage!r} is of a workdir; {folder} holds one model.")
        return Model.from_folder(folder, dtype=dtype, clip=clip)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give a model's folder, or demo.")
    if (folder / EXPORT_NAME).is_file():
        raise ValueError(
            f"{folder} was exported for programs without this package; give the model that it was "
            "exported from."
        )
    if not is_workdir(folder):
        if (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"{folder} is a folder of Hugging Face's; convert it first: python -m "
                f"concat_jax.convert {folder} models/NAME, and give models/NAME."
            )
        raise ValueError(
            f"{folder} holds neither {CARD_NAME}, which python -m concat_jax.convert writes, nor "
            f"the {CONFIG_NAME} of a workdir, which python -m concat_jax.main writes."
        )
    return Model(*load_workdir(folder, stage), dtype=dtype, clip=clip)


def export_workdir(
    workdir: str | Path,
    destination: str | Path,
    *,
    stage: str = "",
    overwrite: bool = False,
    float16: bool = False,
) -> None:
    """Writes what holds after a stage as a model's folder, to be handed to somebody."""
    check_destination(destination, overwrite=overwrite)
    params, card, tokenizer = load_workdir(as_path(workdir), stage)
    for name, tree in params.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(tree))
        print(f"  {name:<14}{count:>12,} numbers")
    how = {"overwrite": overwrite, "float16": float16}
    save_model(destination, params, card, tokenizer=tokenizer, **how)
    print(f"Wrote {destination}, {len(card.vocabulary)} classes of training and any other names.")


def load_workdir(workdir: Path, stage: str = "") -> tuple[Params, ModelCard, Tokenizer]:
    """What holds after a stage of a workdir, without optimizer and image tower of CLIP."""
    config = unflatten(read_json(workdir / CONFIG_NAME))
    fields = {field.name for field in dataclasses.fields(PredictConfig)}
    config.eval.stages = config.eval.get("stages", {})  # where none is evaluated
    given = config.eval.get("settings", {})
    config.eval.settings = {key: value for key, value in given.items() if key in fields}
    labels = _read_labels(workdir, config)
    setup = make_setup(config, labels)
    parameters = Parameters(setup, workdir, make_mesh(devices=1))
    stage = stage or (*config.stages, *config.eval.stages)[-1]
    _check_stage(setup, parameters, workdir, stage)
    print(f"Stage {stage} of {workdir}.")
    sources = setup.holds_after(stage)
    clip_source = sources["clip"]
    clip = setup.networks.clip
    embeddings = ClassEmbeddings(
        config.text, clip, setup.tokenizer, lambda source: parameters.get("clip", source)
    )
    params = {name: parameters.get(name, sources[name]) for name in ("segmentor", "projector")}
    params["text_tower"] = text_params(parameters.get("clip", clip_source))
    params["training_text"] = embeddings.get(clip_source, setup.vocabulary)
    (task, *_) = (*setup.predict.tasks, TASKS[0])
    card = ModelCard(
        segmentor=config.model.segmentor.to_dict(),
        vocabulary=setup.vocabulary,
        task=task,
        source=f"{workdir.resolve().name}, stage {stage}",
        knows_things=True,
        text=TextCard(
            projector=config.model.projector.to_dict(),
            clip={name: getattr(clip, name) for name in _TEXT_FIELDS},
            tokenizer={},  # `save_model` fills it in
            templates=find_templates(config.text.templates),
            clean_names=config.text.clean_names,
            synonyms=config.text.synonyms,
        ),
        short_side=setup.predict.short_side,
        long_side=setup.predict.long_side,
    )
    return jax.device_get(params), card, setup.tokenizer


def _check_stage(setup: Setup, parameters: Parameters, workdir: Path, stage: str) -> None:
    setup.check_predicts(stage, f"--stage of {workdir}")

    def missing(name: str) -> list[str]:
        sources = setup.holds_after(name)
        given = [sources[s] for s in ("segmentor", "projector", "clip") if sources[s] != INIT]
        return [n for n in dict.fromkeys([*given, name]) if not parameters.is_finished(n)]

    if unfinished := missing(stage):
        ready = [n for n in setup.stages if setup.predicts(n) and not missing(n)]
        other = f", or give --stage, one of {', '.join(ready)}" if ready else ""
        raise ValueError(
            f"Of {workdir} the stages {', '.join(unfinished)} have not finished; go on with python "
            f"-m concat_jax.main and the same --config and --workdir{other}."
        )
    check_origins(workdir, (stage,))
