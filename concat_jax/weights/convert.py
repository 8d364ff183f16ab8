"""A model from wherever it is: our folder, a Hugging Face folder, or a file of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.class_names import Classes, classes_from_hf, default_classes
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.hugging_face_config import EXTRA_KEY
from concat_jax.weights.hugging_face_folder import CONFIG_NAME, load_hf_folder
from concat_jax.weights.model_folder import CARD_NAME, TASKS, Params, load_model
from concat_jax.weights.names.mask2former import PADING_MODULES
from concat_jax.weights.report import LoadingReport, name_keys
from concat_jax.weights.segmentors import (
    backbone_params_from_imagenet,
    is_imagenet_backbone,
    segmentor_params_from_detectron2,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was read.

    Attributes:
      kind: what it is, for a person to read.
      params: as `save_model` takes them.
      config: for `make_segmentor`.
      classes: of the class head, None without one.
      task: one of `TASKS`, or "" where nothing tells.
      notes: sentences that somebody who uses the weights should read.
      sides: short_side and long_side of a card, where the source says them.
    """

    kind: str
    params: Params
    config: Mapping[str, Any]
    report: LoadingReport
    classes: Classes | None
    task: str
    notes: tuple[str, ...] = ()
    sides: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """K of the class head, None without one."""
        head = self.params.get("classifier")
        # The last is no-object.
        return None if head is None else len(head["class_embed"]["bias"]) - 1


def load_source(
    path: str | os.PathLike[str],
    known: Vocabulary | None = None,
    named: Classes | None = None,
    *,
    new_head: bool = False,
) -> Source:
    """Read a model; what it is is told by its content.

    Args:
      path: a folder (ours or Hugging Face's), or a file that `read_weights` reads.
      known: COCO panoptic's classes: for heads of as many classes that nothing names, and for the
        thing flags of heads whose names are among them.
      named: the classes, where somebody named them; the source's own are not looked at then.
      new_head: the class head is to be replaced: the source may name other classes than it has.

    Raises:
      ValueError: it is none of these, broken, or of an architecture that is none of ours.
      OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    with _named(path):
        if not path.is_dir():
            return _from_file(path, known, named)
        if (path / CARD_NAME).is_file():
            return _from_model_folder(path, named)
        if (path / CONFIG_NAME).is_file():
            return _from_hf_folder(path, known, named, new_head)
    raise ValueError(
        f"{path} holds neither {CARD_NAME} (a model of ours) nor {CONFIG_NAME} (a Hugging Face "
        "model); name a folder with one of them, or a file of weights."
    )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the source."""
    try:
        yield
    except ValueError as error:
        reason = str(error).rstrip(".")
        what = reason if str(path) in reason else f"{path} cannot be converted: {reason}"
        raise ValueError(f"{what}.") from error


def _from_model_folder(path: Path, named: Classes | None) -> Source:
    params, card = load_model(path)
    flat = traverse_util.flatten_dict(params, sep="/")
    report = LoadingReport({name: name for name in flat}, {k: np.shape(v) for k, v in flat.items()})
    classes = named
    if card.vocabulary is not None and named is None:
        classes = Classes(card.vocabulary, card.knows_things, f"{path / CARD_NAME}")
    sides = {"short_side": card.short_side, "long_side": card.long_side}
    kind = "a model folder"
    return Source(kind, params, card.segmentor, report, classes, card.task, (), sides)


def _from_hf_folder(
    path: Path, known: Vocabulary | None, named: Classes | None, new_head: bool
) -> Source:
    params, config, report, content, sides, notes = load_hf_folder(path)
    model = Source("a Hugging Face Mask2Former", params, config, report, named, "", notes, sides)
    if (count := model.num_classes) is not None and named is None:
        classes = classes_from_hf(content, None if new_head else count, known)
        model = dataclasses.replace(model, classes=classes or default_classes(count, known))
    extra = content.get(EXTRA_KEY)
    task = extra.get("task") if isinstance(extra, Mapping) else ""
    return dataclasses.replace(
        model, task=task if task in TASKS else _guess_task(path, model.classes)
    )


def _from_file(path: Path, known: Vocabulary | None, named: Classes | None) -> Source:
    file = read_weights(path)
    notes = list(file.notes)
    if any(".pixel_level_module." in f".{key}" for key in file.arrays):
        raise ValueError(
            f"{path} holds a Hugging Face Mask2Former, whose sizes stand in its config.json; name "
            "the folder with both."
        )
    if any(key.startswith("sem_seg_head.") for key in file.arrays):
        params, config, report = segmentor_params_from_detectron2(file.arrays)
        if any(key.startswith("new_fc.") for key in report.ignored):
            notes.append(
                "It is a checkpoint of PADing's second stage: the class head is the first stage's "
                f"class_embed; the second stage's {', '.join(PADING_MODULES)} are ignored."
            )
        kind = "a Detectron2 Mask2Former"
        model = Source(kind, params, config, report, named, "", tuple(notes))
        if model.num_classes is not None and named is None:
            model = dataclasses.replace(model, classes=default_classes(model.num_classes, known))
        return dataclasses.replace(model, task=_guess_task(path, model.classes))
    if is_imagenet_backbone(file.arrays):
        params, config, report = backbone_params_from_imagenet(file.arrays)
        kind = "a backbone trained on ImageNet"
        return Source(kind, params, config, report, None, "", tuple(notes))
    raise ValueError(
        f"{path} holds weights of an unknown model ({name_keys(file.arrays)}); what can be "
        "converted are a Detectron2 Mask2Former, PADing, and a ResNet or Swin of ImageNet."
    )


def _guess_task(path: Path, classes: Classes | None) -> str:
    """The task in the source's name, else panoptic if the classes are things and stuff."""
    named = [task for task in TASKS if task in path.resolve().name.lower()]
    if len(named) == 1:
        return named[0]
    if classes is None or not classes.knows_things:
        return ""
    return "panoptic" if len(set(classes.vocabulary.is_thing)) == 2 else ""
