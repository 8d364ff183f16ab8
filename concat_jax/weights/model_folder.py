"""A model on disk: `model.json`, which says what it is, beside `params/`, its arrays in Orbax."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from concat_jax.core.config import build, check_choice
from concat_jax.core.files import as_path, on_disk, read_json, write_json
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.clip import CLIP, make_clip
from concat_jax.models.segmentor import make_segmentor, segmentor_settings
from concat_jax.models.segmentor_output import LinearClassifier
from concat_jax.models.semantic_projector import SemanticProjector
from concat_jax.text.tokenizer import Tokenizer, save_tokenizer
from concat_jax.weights.disk import CARD_NAME, new_folder
from concat_jax.weights.report import LoadingReport, Shape, shapes_of

PARAMS_NAME = "params"
TOKENIZER_NAME = "tokenizer"
TASKS = ("panoptic", "instance", "semantic")
# Of the file's layout; raised when a reader of today could no longer read it.
FORMAT = 2
# Fields of a segmentor's config that no parameter's shape tells.
_SHAPELESS = ("num_heads", "num_points", "num_groups", "num_blocks")
_SHAPELESS_OF_VIT = ("num_heads", "activation", "norm_epsilon", "rotary_theta")

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
      ensemble: `alpha`, `beta` and `needs_places` of `inference.heads.EnsembleHead`, where CLIP
        names the masks beside the projector; else None.
    """

    projector: Mapping[str, Any]
    clip: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    templates: tuple[str, ...]
    clean_names: bool
    synonyms: str
    ensemble: Mapping[str, Any] | None = None


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
      windows: semantic maps are made through windows, see `inference.images.Windows`.
    """

    segmentor: Mapping[str, Any]
    vocabulary: Vocabulary | None = None
    task: str = ""
    source: str = ""
    knows_things: bool = False
    text: TextCard | None = None
    short_side: int = 800
    long_side: int = 1333
    windows: bool = False


def text_modules(card: TextCard) -> tuple[CLIP, SemanticProjector]:
    """A CLIP whose text tower is the model's, and the projector."""
    clip = make_clip(card.clip)
    return clip, SemanticProjector(joint_width=clip.embed_dim, **card.projector)


def parameter_shapes(config: Mapping[str, Any], num_classes: int | None = None) -> dict[str, Shape]:
    """Shapes of the parameters of a segmentor and a linear head of K classes, without making them.

    Paths joined by "/" begin with "segmentor/" or "classifier/".
    """
    return dict(_traced_shapes(json.dumps(dict(config), default=dict), num_classes))


@functools.lru_cache(maxsize=8)
def _traced_shapes(text: str, num_classes: int | None) -> dict[str, Shape]:
    config = json.loads(text)
    # Parameter shapes do not depend on the image size; the smallest one traces fastest.
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree = {"segmentor": abstract_params(make_segmentor(config), image)}
    if num_classes is not None:
        tree["classifier"] = abstract_params(LinearClassifier(num_classes), _queries(config))
    return shapes_of(tree)


def _queries(config: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, make_segmentor(config).width), jnp.float32)


def abstract_params(module: nn.Module, *inputs: jax.ShapeDtypeStruct, **options: Any) -> Params:
    """The parameters that `module.init` would make, as shapes and types."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(functools.partial(module.init, **options), key, *inputs)["params"]


def text_shapes(card: ModelCard) -> dict[str, Shape]:
    """As `parameter_shapes`, of "projector/" and "text_tower/"."""
    clip, projector = text_modules(card.text)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    text = jax.ShapeDtypeStruct((1, clip.embed_dim), jnp.float32)
    queries = _queries(card.segmentor)
    tree = {
        "projector": abstract_params(projector, queries, text, method="predict"),
        "text_tower": abstract_params(clip, tokens, method="encode_text"),
    }
    return shapes_of(tree)


def save_model(
    folder: str | os.PathLike[str],
    params: Params,
    card: ModelCard,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    float16: bool = False,
) -> None:
    """Write a model's folder; it appears under its name complete or not at all.

    `params` are trees of arrays: "segmentor", and "classifier" where there is a linear head, or
    "projector", "text_tower" and "training_text" [K, C] where text names the classes;
    `{"segmentor": {"backbone": ...}}` for the weights of a backbone alone. `float16` rounds what is
    float32, for half the room. Raises ValueError if the name is taken, or params and card do not
    belong together; OSError if the disk refuses.
    """
    _check_together(params, card, "The parameters")
    params = jax.tree.map(np.asarray, params)
    if float16:
        params = jax.tree.map(_rounded, params)
    content = {"format": FORMAT, **dataclasses.asdict(card)}
    with new_folder(folder, params, overwrite=overwrite) as temporary:
        if tokenizer is not None:
            content["text"]["tokenizer"] = save_tokenizer(tokenizer, temporary / TOKENIZER_NAME)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(temporary / PARAMS_NAME, params)
        # Orbax's mark for stores that cannot rename; it names the exporter's folders.
        (temporary / PARAMS_NAME / "commit_success.txt").unlink(missing_ok=True)
        write_json(temporary / CARD_NAME, content)


def _rounded(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    most = np.finfo(np.float16).max
    if (np.abs(array) > most).any():
        raise ValueError(f"A weight exceeds {most}, the most of float16; keep float32.")
    return array.astype(np.float16)


def load_card(folder: str | os.PathLike[str]) -> ModelCard:
    """What the model in a folder is, without its arrays.

    Raises ValueError if the folder or its `model.json` is missing, or does not say what a card
    says.
    """
    path = as_path(folder) / CARD_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {CARD_NAME}; make a model's folder with "
            "`python -m concat_jax.convert SOURCE DESTINATION`."
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("format", None) not in (1, FORMAT):
        raise ValueError(
            f"{path} is no card of format 1 to {FORMAT}; convert the model again with this version."
        )
    if not isinstance(segmentor := content.get("segmentor", {}), dict):
        raise ValueError(f"{path} holds no usable segmentor: it is {segmentor!r}.")
    check_choice(content.get("task", ""), ("", *TASKS), f"{path} names the task")
    for name, kind in (("vocabulary", Vocabulary), ("text", TextCard)):
        if content.get(name) is not None:
            try:
                content[name] = build(kind, content[name], "it")
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} holds no usable {name}: {error}") from error
    return build(ModelCard, content, str(path))


def load_model(folder: str | os.PathLike[str]) -> tuple[Params, ModelCard]:
    """Read a folder of `save_model`: nested dicts of numpy arrays in host memory, and the card.

    What was kept as float16 is float32 again.

    Raises ValueError as `load_card`; or the arrays are missing, unreadable or not those of the
    card.
    """
    card = load_card(folder)
    path = as_path(folder).absolute() / PARAMS_NAME
    if not path.is_dir():
        raise ValueError(f"{folder} lacks {PARAMS_NAME}/; convert the model again.")
    try:
        with on_disk(path) as local, ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(local).item_metadata
            tree = getattr(saved, "tree", saved)
            # numpy: where the arrays belong is for the caller to say, not for the file.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = checkpointer.restore(local, restore_args=as_numpy)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The arrays in {path} cannot be read ({reason}); convert the model again."
        ) from error
    _check_together(params, card, f"The arrays in {path}")
    half = np.dtype(np.float16)
    params = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == half else a, params)
    return params, card


def _check_together(params: Params, card: ModelCard, what: str) -> None:
    """Every array of the parameters where the card's config has it, and with its shape."""
    found, classes = shapes_of(params), len(card.vocabulary) if card.vocabulary else None
    if card.text is not None:
        wanted = parameter_shapes(card.segmentor) | text_shapes(card)
        # One row a class, whatever the synonyms make of it.
        rows = found.pop("training_text", (0,))[0]
        if rows != classes:
            raise ValueError(f"{what} have text for {rows} classes where the card has {classes}.")
    elif ("classifier" in params) != (classes is not None):
        has = "a class head" if "classifier" in params else "no class head"
        given = "absent" if classes is None else "there"
        raise ValueError(f"{what} have {has} but the vocabulary is {given}; the two go together.")
    else:
        wanted = parameter_shapes(card.segmentor, classes)
    if set(params.get("segmentor", {})) == {"backbone"}:
        wanted = {k: v for k, v in wanted.items() if k.startswith("segmentor/backbone/")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{what} have {found.get(name, 'nothing')} at {name} where the model of the card "
                f"has {wanted.get(name, 'nothing')}; the two must be of one architecture."
            )


def _shapeless(config: Mapping[str, Any], is_whole: bool) -> dict[str, Any]:
    """Fields of a segmentor, or of its backbone alone, that no parameter's shape tells."""
    settings = segmentor_settings(config)
    fields = {field: settings[field] for field in _SHAPELESS if field in settings}
    fields = fields if is_whole else {}
    if settings["kind"] == "eomt":
        vit = make_segmentor(config).backbone
        fields |= {f"backbone.{f}": getattr(vit, f, None) for f in _SHAPELESS_OF_VIT}
    return fields


def segmentor_from_folder(
    folder: str | os.PathLike[str], config: Mapping[str, Any], fresh: Params
) -> tuple[Params, LoadingReport]:
    """Fill a freshly initialised segmentor with everything that a model's folder has for it.

    The folder is of a whole segmentor or of a backbone. Its class head is left out: here text tells
    the classes. What it lacks stays as in `fresh`. Raises ValueError if the folder cannot be read,
    or holds a parameter that the segmentor has not, has in another shape, or uses otherwise.
    """
    params, card = load_model(folder)
    ours, theirs = shapes_of({"segmentor": fresh}), shapes_of({"segmentor": params["segmentor"]})
    for name, shape in theirs.items():
        if shape != (mine := ours.get(name, "nothing")):
            raise ValueError(
                f"{folder} holds {shape} for {name} where the config's segmentor has {mine}; "
                "make config.model.segmentor fit the folder."
            )
    is_whole = set(params["segmentor"]) != {"backbone"}
    given, wanted = (_shapeless(c, is_whole) for c in (card.segmentor, config))
    for field, value in given.items():
        if value != (mine := wanted.get(field)):
            raise ValueError(
                f"{folder} is of a segmentor with {field} {value} where the config's has {mine}; "
                "make config.model.segmentor fit the folder."
            )
    report = LoadingReport(
        loaded={name: name for name in theirs},
        shapes=theirs,
        new={name: shape for name, shape in ours.items() if name not in theirs},
        ignored=shapes_of({"classifier": params.get("classifier", {})}),
    )
    fresh, loaded = (traverse_util.flatten_dict(tree) for tree in (fresh, params["segmentor"]))
    return traverse_util.unflatten_dict({**fresh, **loaded}), report
