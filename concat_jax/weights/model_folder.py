"""A model on disk: `model.json`, which says what it is, beside `params/`, its arrays in Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from concat_jax.core.files import read_json
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.clip import CLIP, make_clip
from concat_jax.models.segmentor import DEFAULTS, LinearClassifier, make_segmentor
from concat_jax.models.semantic_projector import SemanticProjector
from concat_jax.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from concat_jax.weights.disk import one_reason

CARD_NAME = "model.json"
PARAMS_NAME = "params"
TOKENIZER_NAME = "tokenizer"
TASKS = ("panoptic", "instance", "semantic")
# Of the file's layout; raised when a reader of today could no longer read it.
FORMAT = 2
# Files that a folder this package writes has at its top: what `overwrite` may replace.
MARKERS = (CARD_NAME, "config.json")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextCard:
    """What names the classes of a model by text.

    Attributes:
      projector: fields of `SemanticProjector` besides its joint width.
      clip: fields of `make_clip` that decide the text tower.
      tokenizer: its `kind`, "words" or "clip", its `context_length` and for words the `words`;
        CLIP's lies in the folder `TOKENIZER_NAME` beside the card.
      templates, clean_names, synonyms: see `inference.text_tower.TextTower`.
    """

    projector: Mapping[str, Any]
    clip: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    templates: tuple[str, ...]
    clean_names: bool
    synonyms: str


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a set of weights is.

    Attributes:
      segmentor: config for `make_segmentor`.
      vocabulary: the K classes of a linear head, or of training where text names them.
      task: what the weights were trained for, one of `TASKS`, or "" where nothing said so.
      source: name of the file the weights came from.
      knows_things: False where nothing said which classes are things; the vocabulary's flags are
        then all False and mean nothing.
      text: what names classes by text, None where a linear head does.
      short_side, long_side: of the network's input, see `inference.images.Buckets`.
    """

    segmentor: Mapping[str, Any]
    vocabulary: Vocabulary | None = None
    task: str = ""
    source: str = ""
    knows_things: bool = False
    text: TextCard | None = None
    short_side: int = 800
    long_side: int = 1333


def text_modules(card: TextCard) -> tuple[CLIP, SemanticProjector]:
    """A CLIP whose text tower is the model's, and the projector."""
    clip = make_clip(card.clip)
    return clip, SemanticProjector(joint_width=clip.embed_dim, **card.projector)


def parameter_shapes(
    config: Mapping[str, Any], num_classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a segmentor and a linear head of K classes, without making them.

    Paths joined by "/" begin with "segmentor/" or "classifier/".
    """
    # Parameter shapes do not depend on the image size; the smallest one traces fastest.
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree = {"segmentor": _shapes(make_segmentor(config), image)}
    if num_classes is not None:
        queries = jax.ShapeDtypeStruct((1, 1, _width(config)), jnp.float32)
        tree["classifier"] = _shapes(LinearClassifier(num_classes), queries)
    return traverse_util.flatten_dict(tree, sep="/")


def _width(config: Mapping[str, Any]) -> int:
    return {**DEFAULTS, **config}["width"]


def _shapes(module: nn.Module, *inputs: jax.ShapeDtypeStruct, **options) -> Any:
    init = functools.partial(module.init, **options)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(init, key, *inputs)["params"])


def _text_shapes(card: ModelCard) -> dict[str, tuple[int, ...]]:
    """As `parameter_shapes`, of "projector/", "text_tower/" and the array "training_text"."""
    clip, projector = text_modules(card.text)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    row, text = (
        jax.ShapeDtypeStruct((1, width), jnp.float32)
        for width in (_width(card.segmentor), clip.embed_dim)
    )
    tree = {
        "projector": _shapes(projector, row, text, method="predict"),
        "text_tower": _shapes(clip, tokens, method="encode_text"),
    }
    return traverse_util.flatten_dict(tree, sep="/")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which takes its final name only when the block has not raised.

    `overwrite` replaces what is there, if it is a model's folder or an empty one.

    Raises:
      ValueError: the final name is taken, or by something that is no model and is kept even with
        `overwrite`.
    """
    # realpath: a link to a folder stays a link to what replaces that folder.
    final = Path(os.path.realpath(folder))
    check_destination(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        # mkdtemp keeps others out; a model is as readable as any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        check_destination(final, overwrite=overwrite)
        if final.exists():
            old = temporary.with_suffix(".old")
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old)
        else:
            temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_destination(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise the ValueError of `new_folder` about `folder` before any work is done."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write to.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder} is there already; name another folder or pass --overwrite.")
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise ValueError(
            f"{folder} holds no model ({' or '.join(MARKERS)}), so --overwrite leaves it alone; "
            "name another folder."
        )


def save_model(
    folder: str | os.PathLike[str],
    params: Params,
    card: ModelCard,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model's folder; it appears under its name complete or not at all.

    `params` are trees of arrays: "segmentor", and "classifier" where there is a linear head, or
    "projector", "text_tower" and "training_text" [K, C] where text names the classes;
    `{"segmentor": {"backbone": ...}}` for the weights of a backbone alone.

    Raises:
      ValueError: the name is taken, or params and card do not belong together.
      OSError: the disk refuses.
    """
    _check_together(params, card, "The parameters")
    content = {"format": FORMAT, **dataclasses.asdict(card)}
    with one_reason(folder, params), new_folder(folder, overwrite=overwrite) as temporary:
        if tokenizer is not None:
            content["text"]["tokenizer"] = save_tokenizer(tokenizer, temporary / TOKENIZER_NAME)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(temporary / PARAMS_NAME, jax.tree.map(np.asarray, params))
        (temporary / CARD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_model_tokenizer(folder: str | os.PathLike[str], card: TextCard) -> Tokenizer:
    """The tokenizer of a model's text tower."""
    return load_tokenizer(Path(folder) / TOKENIZER_NAME, card.tokenizer)


def load_card(folder: str | os.PathLike[str]) -> ModelCard:
    """What the model in a folder is, without its arrays.

    Raises:
      ValueError: the folder or its `model.json` is missing, or does not say what a card says.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {CARD_NAME}; make a model's folder with "
            "`python -m concat_jax.convert SOURCE DESTINATION`."
        )
    content = read_json(path)
    fields = {field.name: field for field in dataclasses.fields(ModelCard)}
    if not isinstance(content, dict) or not set(content) <= {"format", *fields}:
        raise ValueError(
            f"{path} has other keys than {', '.join(('format', *fields))}; convert the model again."
        )
    if content.pop("format", None) not in (1, FORMAT) or "segmentor" not in content:
        raise ValueError(
            f"{path} is no card of format 1 to {FORMAT}; convert the model again with this version."
        )
    if content.get("task", "") not in ("", *TASKS):
        raise ValueError(
            f"{path} names the task {content['task']!r}; use one of {', '.join(TASKS)}."
        )
    for name, build in (("vocabulary", Vocabulary), ("text", TextCard)):
        if content.get(name) is not None:
            try:
                content[name] = build(**{k: _tuples(v) for k, v in content[name].items()})
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} holds no usable {name}: {error}") from error
    return ModelCard(**content)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def load_model(folder: str | os.PathLike[str]) -> tuple[Params, ModelCard]:
    """Read a folder of `save_model`: nested dicts of numpy arrays in host memory, and the card.

    Raises:
      ValueError: as `load_card`; or the arrays are missing, unreadable or not those of the card.
    """
    card = load_card(folder)
    path = Path(folder).absolute() / PARAMS_NAME
    if not path.is_dir():
        raise ValueError(f"{folder} lacks {PARAMS_NAME}/; convert the model again.")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(path).item_metadata
            tree = getattr(saved, "tree", saved)
            # numpy: where the arrays belong is for the caller to say, not for the file.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = checkpointer.restore(path, restore_args=as_numpy)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The arrays in {path} cannot be read ({reason}); convert the model again."
        ) from error
    _check_together(params, card, f"The arrays in {path}")
    return params, card


def _check_together(params: Params, card: ModelCard, what: str) -> None:
    """Every array of the parameters where the card's config has it, and with its shape."""
    found = {
        k: tuple(np.shape(v)) for k, v in traverse_util.flatten_dict(dict(params), sep="/").items()
    }
    classes = len(card.vocabulary) if card.vocabulary else None
    if card.text is not None:
        wanted = parameter_shapes(card.segmentor) | _text_shapes(card)
        # One row a class, whatever the synonyms make of it.
        rows = found.pop("training_text", (0,))[0]
        if rows != classes:
            raise ValueError(f"{what} have text for {rows} classes where the card has {classes}.")
    else:
        if ("classifier" in params) != (card.vocabulary is not None):
            has = "a class head" if "classifier" in params else "no class head"
            raise ValueError(
                f"{what} have {has} but the vocabulary is "
                f"{'absent' if card.vocabulary is None else 'there'}; the two go together."
            )
        wanted = parameter_shapes(card.segmentor, classes)
    if set(params.get("segmentor", {})) == {"backbone"}:
        wanted = {k: v for k, v in wanted.items() if k.startswith("segmentor/backbone/")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{what} have {found.get(name, 'nothing')} at {name} where the model of the card "
                f"has {wanted.get(name, 'nothing')}; the two must be of one architecture."
            )
