"""The classes of a linear head: where their names come from, and a new head for other classes."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor import LinearClassifier
from concat_jax.weights.hugging_face_config import EXTRA_KEY
from concat_jax.weights.model_folder import Params
from concat_jax.weights.report import LoadingReport


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a head, as far as they are known.

    Attributes:
        vocabulary: K classes.
        knows_things: whether its thing flags mean something.
        origin: where they come from, for a person to read.
    """

    vocabulary: Vocabulary
    knows_things: bool
    origin: str


def _classes(
    names: Sequence[str],
    origin: str,
    known: Vocabulary | None = None,
    is_thing: Sequence[bool] | None = None,
    category_ids: Sequence[int] | None = None,
) -> Classes:
    """Classes with these names; flags and ids are looked up among `known` if all names are there.

    A name that occurs twice (ADE20K's long list has such) gets its index, as names tell classes
    apart here.
    """
    counts = collections.Counter(names)
    unique = [n if counts[n] == 1 else f"{n} ({i})" for i, n in enumerate(names)]
    if is_thing is None and known is not None and set(unique) <= set(known.names):
        places = [known.names.index(name) for name in unique]
        is_thing = [known.is_thing[place] for place in places]
        category_ids = [known.category_ids[place] for place in places]
    count = len(unique)
    vocabulary = Vocabulary(
        names=tuple(unique),
        is_thing=(False,) * count if is_thing is None else tuple(is_thing),
        is_seen=(True,) * count,
        category_ids=tuple(range(count)) if category_ids is None else tuple(category_ids),
    )
    return Classes(vocabulary, is_thing is not None, origin)


def read_classes(path: str | os.PathLike[str], known: Vocabulary | None = None) -> Classes:
    """Classes from a file.

    Args:
        path: a JSON list of `{"id": 1, "name": "person", "isthing": 1}` as COCO's panoptic
            categories are (id and isthing may be absent), or a text file with a name a line.
        known: classes whose flags and ids hold where a text file names nothing but them.

    Raises:
        ValueError: the file is missing or not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--classes names {path}, which is not a file.")
    try:
        text = path.read_text(encoding="utf-8")
        is_json = text.lstrip().startswith(("[", "{"))
        content = json.loads(text) if is_json else text.splitlines()
    except ValueError as error:
        raise ValueError(f"The classes in {path} are not readable: {error}.") from error
    try:
        if not is_json:
            return _classes([n.strip() for n in content if n.strip()] or [""], str(path), known)
        if not isinstance(content, list) or not all(isinstance(c, dict) for c in content):
            raise ValueError('it must be a list of {"id", "name", "isthing"}')
        names = [entry.get("name") for entry in content]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError('every class needs a "name"')
        things = [entry.get("isthing") for entry in content]
        ids = [entry.get("id", index) for index, entry in enumerate(content)]
        if not all(flag in (0, 1, None) for flag in things):
            raise ValueError('"isthing" must be 0 or 1')
        if not all(type(i) is int for i in ids):
            raise ValueError('"id" must be an integer')
        is_thing = None if None in things else [bool(flag) for flag in things]
        return _classes(names, str(path), None, is_thing, ids)
    except ValueError as error:
        raise ValueError(
            f"The classes in {path} cannot be used: {error}.".replace("..", ".")
        ) from (error)


def classes_from_hf(
    content: Mapping[str, Any], count: int, known: Vocabulary | None = None
) -> Classes | None:
    """Classes from config.json, None where it only numbers them.

    Args:
        content: the parsed file.
        count: K of the head.
        known: classes whose flags and ids hold where id2label names nothing but them.

    Raises:
        ValueError: id2label is not about K classes.
    """
    labels = content.get("id2label") or {}
    names = [labels.get(str(index)) for index in range(len(labels))]
    if not labels or names == [f"LABEL_{index}" for index in range(len(names))]:
        return None
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"id2label in config.json names {len(names)} classes from 0 on, but the class head has "
            f"{count}; correct it or pass --classes."
        )
    extra = content.get(EXTRA_KEY)
    if not isinstance(extra, Mapping) or "is_thing" not in extra:
        return _classes(names, "id2label in config.json", known)
    columns = {key: tuple(extra[key]) for key in ("is_thing", "is_seen", "category_ids")}
    vocabulary = Vocabulary(names=tuple(names), **columns)
    return Classes(vocabulary, bool(extra.get("knows_things")), "config.json")


def default_classes(count: int, known: Vocabulary | None = None) -> Classes:
    """Classes of a head that nothing names: those of `known` if they are as many, else numbers."""
    if known is not None and len(known) == count:
        vocabulary = dataclasses.replace(known, is_seen=(True,) * count)
        origin = f"COCO panoptic's, because the head has {count} classes and nothing names them"
        return Classes(vocabulary, True, origin)
    names = [f"class_{index}" for index in range(count)]
    return _classes(names, "numbered, because nothing names them; pass --classes to name them")


def new_head(
    params: Params, report: LoadingReport, num_classes: int, width: int, seed: int = 0
) -> tuple[Params, LoadingReport]:
    """Replace the class head, or add one, by a freshly initialised one.

    Args:
        params: of a segmentor, with or without "classifier".
        report: of how they were loaded.
        num_classes: K of the new head.
        width: D of the queries.
        seed: of the initial values.

    Returns:
        New parameters, and the report with the old head among the ignored and the new one named.
    """
    queries = jnp.zeros((1, 1, width), jnp.float32)
    head = LinearClassifier(num_classes).init(jax.random.key(seed), queries)["params"]
    head = jax.tree.map(np.asarray, head)
    old = [path for path in report.loaded if path.startswith("classifier/")]
    report = LoadingReport(
        loaded={p: key for p, key in report.loaded.items() if p not in old},
        shapes={p: shape for p, shape in report.shapes.items() if p not in old},
        new={
            **report.new,
            **{f"classifier/class_embed/{k}": v.shape for k, v in head["class_embed"].items()},
        },
        ignored={**report.ignored, **{report.loaded[p]: report.shapes[p][::-1] for p in old}},
    )
    return {**params, "classifier": head}, report
