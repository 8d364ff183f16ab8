"""A model on disk: `model.json`, which says what it is, beside `params/`, its arrays in Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor import DEFAULTS, LinearClassifier, make_segmentor

CARD_NAME = "model.json"
PARAMS_NAME = "params"
TASKS = ("panoptic", "instance", "semantic")
# Of the file's layout; raised when a reader of today could no longer read it.
FORMAT = 1
# Files that a folder this package writes has at its top: what `overwrite` may replace.
MARKERS = (CARD_NAME, "config.json")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a set of weights is.

    Attributes:
        segmentor: config for `make_segmentor`.
        vocabulary: the K classes of the linear class head, None without a head.
        task: what the weights were trained for, one of `TASKS`, or "" where nothing said so.
        source: name of the file the weights came from.
        knows_things: False where nothing said which classes are things; the vocabulary's flags
            are then all False and mean nothing.
    """

    segmentor: Mapping[str, Any]
    vocabulary: Vocabulary | None = None
    task: str = ""
    source: str = ""
    knows_things: bool = False


def parameter_shapes(
    config: Mapping[str, Any], num_classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of a configured model, without making it.

    Args:
        config: for `make_segmentor`.
        num_classes: K of the linear class head, None without one.

    Returns:
        Path joined by "/" -> shape; paths begin with "segmentor/" or "classifier/".

    Raises:
        ValueError: as `make_segmentor`.
    """
    # Parameter shapes do not depend on the image size; the smallest one traces fastest.
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = {"segmentor": jax.eval_shape(make_segmentor(config).init, key, image)["params"]}
    if num_classes is not None:
        width = {**DEFAULTS, **config}["width"]
        queries = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
        classifier = LinearClassifier(num_classes)
        tree["classifier"] = jax.eval_shape(classifier.init, key, queries)["params"]
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its final name only when it is complete.

    Args:
        folder: final name; its parents are made.
        overwrite: replace what is there, if it is a model's folder or an empty one.

    Yields:
        A temporary folder beside the final one; it is removed if the block raises.

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
    """Say before any work is done whether `new_folder` would refuse `folder`.

    Raises:
        ValueError: as `new_folder`.
    """
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
    overwrite: bool = False,
) -> None:
    """Write a model's folder; it appears under its name complete or not at all.

    Args:
        folder: to make.
        params: `{"segmentor": tree, "classifier": {"class_embed": ...}}` of arrays, without
            "classifier" where there is no head; `{"segmentor": {"backbone": ...}}` for the weights
            of a backbone alone.
        card: what it is.
        overwrite: replace a model that is there.

    Raises:
        ValueError: the name is taken, or params and card do not belong together.
        OSError: the disk refuses.
    """
    _check_together(params, card, "The parameters")
    content = {
        "format": FORMAT,
        "segmentor": dict(card.segmentor),
        "vocabulary": dataclasses.asdict(card.vocabulary) if card.vocabulary else None,
        "task": card.task,
        "source": card.source,
        "knows_things": card.knows_things,
    }
    with new_folder(folder, overwrite=overwrite) as temporary:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(temporary / PARAMS_NAME, jax.tree.map(np.asarray, params))
        (temporary / CARD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_card(folder: str | os.PathLike[str]) -> ModelCard:
    """What the model in a folder is, without its arrays.

    Raises:
        ValueError: the folder or its `model.json` is missing, or the file does not say what a card
            says.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {CARD_NAME}; make a model's folder with "
            "`python -m concat_jax.convert SOURCE DESTINATION`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    known = {"format", *(field.name for field in dataclasses.fields(ModelCard))}
    if not isinstance(content, dict) or set(content) != known:
        raise ValueError(
            f"{path} has other keys than {', '.join(sorted(known))}; convert the model again."
        )
    if content.pop("format") != FORMAT:
        raise ValueError(f"{path} is of another format than {FORMAT}; convert the model again.")
    if content["task"] not in ("", *TASKS):
        raise ValueError(
            f"{path} names the task {content['task']!r}; use one of {', '.join(TASKS)}."
        )
    if content["vocabulary"] is not None:
        try:
            columns = {name: tuple(column) for name, column in content["vocabulary"].items()}
            content["vocabulary"] = Vocabulary(**columns)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no usable vocabulary: {error}") from error
    return ModelCard(**content)


def load_model(folder: str | os.PathLike[str]) -> tuple[Params, ModelCard]:
    """Read a model's folder.

    Args:
        folder: as `save_model` wrote it.

    Returns:
        Parameters as nested dicts of numpy arrays in host memory, and the card.

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
    if ("classifier" in params) != (card.vocabulary is not None):
        has = "a class head" if "classifier" in params else "no class head"
        raise ValueError(
            f"{what} have {has} but the vocabulary is "
            f"{'absent' if card.vocabulary is None else 'there'}; the two go together."
        )
    wanted = parameter_shapes(card.segmentor, len(card.vocabulary) if card.vocabulary else None)
    if set(params.get("segmentor", {})) == {"backbone"}:
        wanted = {k: v for k, v in wanted.items() if k.startswith("segmentor/backbone/")}
    found = {
        k: tuple(np.shape(v)) for k, v in traverse_util.flatten_dict(dict(params), sep="/").items()
    }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{what} have {found.get(name, 'nothing')} at {name} where the model of the card "
                f"has {wanted.get(name, 'nothing')}; the two must be of one architecture."
            )
