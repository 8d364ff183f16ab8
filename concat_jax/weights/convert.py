"""A model from wherever it is: our folder, a Hugging Face folder, or a file of weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path

from concat_jax.core.files import as_path
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights import eomt, fcclip
from concat_jax.weights.backbones import FORMATS
from concat_jax.weights.class_names import Classes, classes_from_hf, default_classes, fresh_head
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.hugging_face_folder import (
    BILINEAR,
    CONFIG_NAME,
    EXTRA_KEY,
    PREPROCESSOR_NAME,
    TIMM_KEY,
    WEIGHTS_NAMES,
    check_classifier,
    check_preprocessing,
    read_json_object,
    segmentor_config_from_hf,
    weights_in,
)
from concat_jax.weights.model_folder import CARD_NAME, TASKS, ModelCard, Params, load_model
from concat_jax.weights.names.mask2former import PADING_MODULES
from concat_jax.weights.report import LoadingReport, name_keys, shapes_of
from concat_jax.weights.segmentors import (
    backbone_params_from_dino,
    backbone_params_from_imagenet,
    segmentor_params_from_detectron2,
    segmentor_params_from_hf,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was read.

    Attributes:
      kind: what it is, for a person to read.
      card: what `save_model` writes beside `params`.
      notes: sentences that somebody who uses the weights should read.
      classes: those of the card, None without a class head.
      content: of Hugging Face's config.json.
      num_trained: how many classes it was trained on, where it names them by text; 0 where the
        file does not tell.
    """

    kind: str
    params: Params
    card: ModelCard
    report: LoadingReport
    notes: tuple[str, ...] = ()
    classes: Classes | None = None
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_trained: int | None = None


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
      new_head: replace the class head by a fresh one for `named` or for all classes that the source
        names, be they more than it has.

    Raises:
      ValueError: it is none of these, broken, or of an architecture that is none of ours; or
        its head is not for as many classes as were named.
      OSError: it cannot be read.
    """
    path = as_path(path)
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    try:
        if not path.is_dir():
            source = _from_file(path)
        elif (path / CARD_NAME).is_file():
            source = _from_model_folder(path)
        elif (path / CONFIG_NAME).is_file():
            source = _from_hf_folder(path)
        else:
            raise ValueError(
                f"{path} holds neither {CARD_NAME} (a model of ours) nor {CONFIG_NAME} (a Hugging "
                "Face model); name a folder with one of them, or a file of weights."
            )
        head = source.params.get("classifier")
        # The last is no-object.
        count = None if head is None else len(head["class_embed"]["bias"]) - 1
        if count == 0:
            raise ValueError("its class head has no class besides no-object")
        classes = named or source.classes
        if classes is None and count is not None:
            classes = classes_from_hf(source.content, None if new_head else count, known)
            classes = classes or default_classes(count, known)
    except ValueError as error:
        reason = str(error).rstrip(".")
        what = reason if str(path) in reason else f"{path} cannot be converted: {reason}"
        raise ValueError(f"{what}.") from error
    if source.num_trained is not None:
        return _trained_on_text(source, path, named, known, new_head)
    is_backbone = set(source.params["segmentor"]) == {"backbone"}
    card = dataclasses.replace(
        source.card,
        vocabulary=classes.vocabulary if classes else None,
        knows_things=classes is not None and classes.knows_things,
        task=source.card.task or ("" if is_backbone else _guess_task(path, classes)),
        source=path.resolve().name,
    )
    source = dataclasses.replace(source, classes=classes, card=card)
    if named is None and not new_head:
        return source
    if is_backbone:
        raise ValueError(
            "The source is a backbone alone and has no class head; leave out --classes and "
            "--reinit_head."
        )
    if classes is None:
        raise ValueError("The source has no class head; pass --classes with --reinit_head.")
    want = len(classes.vocabulary)
    if new_head:
        width = make_segmentor(card.segmentor).width
        params, report = fresh_head(source.params, source.report, want, width)
        return dataclasses.replace(source, params=params, report=report)
    if count is None:
        raise ValueError(
            "The source has no class head to name the classes of; pass --reinit_head for a new one."
        )
    if count != want:
        raise ValueError(
            f"{classes.origin} names {want} classes, but the class head is for {count}; pass "
            "--reinit_head for a new head, which has to be trained."
        )
    return source


def _trained_on_text(
    source: Source, path: Path, named: Classes | None, known: Vocabulary | None, new_head: bool
) -> Source:
    """With the classes that it was trained on: the named, else COCO panoptic's."""
    count = source.num_trained
    if new_head:
        raise ValueError(f"{path} names classes by text and has no head to make; no --reinit_head.")
    if named is None and known is not None and count in (0, len(known)):
        why = f"it was trained on {count} classes" if count else "nothing names or counts its own"
        named = Classes(known, True, f"COCO panoptic's, because {why}")
    notes = source.notes
    if not count and named is not None:
        count = len(named.vocabulary)
        notes += (
            f"It lacks {fcclip.WEIGHTS}, which tells how many classes it was trained on: that they "
            f"are these {count} is assumed. If they are not, pass --classes with those that are.",
        )
    if named is None or len(named.vocabulary) != count:
        other = f"and {named.origin} names {len(named.vocabulary)}" if named else "not COCO's 133"
        raise ValueError(
            f"{path} is an FC-CLIP that was trained on {count or 'unknown'} classes, {other}; pass "
            "--classes with those of its training, as --classes=ade20k_150."
        )
    card = dataclasses.replace(
        source.card,
        vocabulary=named.vocabulary,
        knows_things=named.knows_things,
        task="panoptic",
        source=path.resolve().name,
    )
    return dataclasses.replace(source, classes=named, card=card, notes=notes, num_trained=count)


def _from_model_folder(path: Path) -> Source:
    params, card = load_model(path)
    if card.text is not None:
        raise ValueError(
            f"{path} names classes by text: it is used as it is, and no other format can hold it."
        )
    shapes = shapes_of(params)
    report = LoadingReport({name: name for name in shapes}, shapes)
    classes = None
    if card.vocabulary is not None:
        classes = Classes(card.vocabulary, card.knows_things, f"{path / CARD_NAME}")
    return Source("a model folder", params, card, report, classes=classes)


def _from_hf_folder(path: Path) -> Source:
    """A model of Hugging Face's or timm's; preprocessor_config.json may be absent."""
    content = read_json_object(path / CONFIG_NAME)
    model_type = content.get("model_type")
    has_processor = (path / PREPROCESSOR_NAME).is_file()
    processor = read_json_object(path / PREPROCESSOR_NAME) if has_processor else {}
    if model_type in [*FORMATS] or (model_type is None and TIMM_KEY in content):
        # A ResNet or Swin of ImageNet; the config of timm's says nothing of sizes.
        check_classifier(content)
        check_preprocessing(processor)
        return _from_file(weights_in(path, WEIGHTS_NAMES))
    config = segmentor_config_from_hf(content)
    is_eomt = model_type in eomt.ARCHITECTURES
    sides, notes = check_preprocessing(processor, is_square=is_eomt)
    if is_eomt and not sides:
        side = eomt.image_size(content, CONFIG_NAME)
        sides = {"short_side": side, "long_side": side}
        why = "asks for no size to keep" if has_processor else "is not there"
        notes = (f"{PREPROCESSOR_NAME} {why}; by {CONFIG_NAME}, pictures are {side} square.",)
    if (resample := processor.get("resample", BILINEAR)) not in (None, BILINEAR):
        notes += (f"By {PREPROCESSOR_NAME}, the filter is Pillow's {resample}; here bilinear.",)
    file = read_weights(weights_in(path, WEIGHTS_NAMES))
    if family := eomt.ENCODERS.get(model_type):
        params, report = backbone_params_from_dino(file.arrays, config, family)
        kind = "a DINO, which can be the encoder of an EoMT"
        return Source(kind, params, ModelCard(config), report, file.notes)
    params, report = segmentor_params_from_hf(file.arrays, config)
    extra = content.get(EXTRA_KEY)
    task = extra.get("task") if isinstance(extra, Mapping) else None
    card = ModelCard(config, task=task if task in TASKS else "", **sides)
    notes = (*file.notes, *notes)
    kind = "a Hugging Face Mask2Former"
    if is_eomt:
        kind = "a Hugging Face EoMT"
        if np.any(file.arrays.get("attn_mask_probs")):
            notes += (
                "Its attn_mask_probs are not zero, so transformers masks queries at inference; "
                "here none is masked then, as after training.",
            )
    return Source(kind, params, card, report, notes, content=content)


def _from_file(path: Path) -> Source:
    file = read_weights(path)
    if any(".pixel_level_module." in f".{key}" for key in file.arrays):
        raise ValueError(
            f"{path} holds a Hugging Face Mask2Former, whose sizes stand in its config.json; name "
            "the folder with both."
        )
    if any(key.startswith(fcclip.CLIP) for key in file.arrays):
        params, card, report, count = fcclip.fcclip_of_arrays(file.arrays)
        return Source("an FC-CLIP", params, card, report, file.notes, num_trained=count)
    if any(key.startswith("sem_seg_head.") for key in file.arrays):
        params, config, report = segmentor_params_from_detectron2(file.arrays)
        notes = file.notes
        if any(key.startswith("new_fc.") for key in report.ignored):
            notes += (
                "It is a checkpoint of PADing's second stage: the class head is the first stage's "
                f"class_embed; the second stage's {', '.join(PADING_MODULES)} are ignored.",
            )
        return Source("a Detectron2 Mask2Former", params, ModelCard(config), report, notes)
    if loaded := backbone_params_from_imagenet(file.arrays):
        params, config, report = loaded
        kind = "a backbone trained on ImageNet"
        return Source(kind, params, ModelCard(config), report, file.notes)
    raise ValueError(
        f"{path} holds weights of an unknown model ({name_keys(file.arrays)}); what can be "
        "converted are a Detectron2 Mask2Former, PADing, FC-CLIP, and of ImageNet torchvision's, "
        "timm's, Detectron2's or Hugging Face's ResNet and the Swin repository's or Hugging Face's "
        "Swin."
    )


def _guess_task(path: Path, classes: Classes | None) -> str:
    """The task in the source's name, else panoptic if the classes are things and stuff."""
    named = [task for task in TASKS if task in path.resolve().name.lower()]
    if len(named) == 1:
        return named[0]
    is_thing = classes.vocabulary.is_thing if classes and classes.knows_things else ()
    return "panoptic" if len(set(is_thing)) == 2 else ""
