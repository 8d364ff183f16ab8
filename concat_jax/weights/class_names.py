"""The classes of a linear head: where their names come from, and a new head for other classes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor_output import LinearClassifier
from concat_jax.weights.hugging_face_folder import EXTRA_KEY
from concat_jax.weights.model_folder import Params
from concat_jax.weights.report import LoadingReport, name_keys, shapes_of


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a head, as far as they are known.

    Attributes:
      knows_things: whether the vocabulary's thing flags mean something.
      origin: where they come from, for a person to read.
      notes: sentences about what was made of the names.
    """

    vocabulary: Vocabulary
    knows_things: bool
    origin: str
    notes: tuple[str, ...] = ()


def _classes(names: Sequence[str], origin: str, known: Vocabulary | None = None) -> Classes:
    """Classes with these names; flags and ids are looked up among `known` if all names are there.

    A name that occurs twice (ADE20K's long list has such) gets its index, as names tell classes
    apart here.
    """
    counts, count = collections.Counter(names), len(names)
    unique, taken = [], {name for name in names if counts[name] == 1}
    for i, name in enumerate(names):
        if counts[name] > 1:
            name = f"{name} ({i})"
            while name in taken:
                name = f"{name} ({i})"
            taken.add(name)
        unique.append(name)
    vocabulary = Vocabulary(tuple(unique), (False,) * count, (True,) * count, tuple(range(count)))
    same = vocabulary.with_flags_of(known) if known else None
    return Classes(same or vocabulary, same is not None, origin)


def classes_from_hf(
    content: Mapping[str, Any], count: int | None, known: Vocabulary | None = None
) -> Classes | None:
    """Classes from the content of config.json, None where it only numbers them.

    They are id2label's in ascending order of its numbers; `Classes.notes` say where these are not 0
    to K - 1, or more than K, and which classes have no name. Flags and ids of `known` hold where
    id2label names nothing but them. `count` is K of the head, None for as many as there are names.
    Raises ValueError if id2label is not about K classes.
    """
    where = "id2label in config.json"
    labels = content.get("id2label") or {}
    labels = dict(enumerate(labels)) if isinstance(labels, list) else labels
    try:
        ids = sorted(map(int, labels))
        found = [labels[key] for key in sorted(labels, key=int)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} does not number its classes; pass --classes=FILE with a name a line."
        ) from error
    if found == [f"LABEL_{index}" for index in range(len(found))]:
        return None
    if not all(name is None or isinstance(name, str | int) for name in found):
        raise ValueError(f"{where} holds what is no name; pass --classes=FILE with a name a line.")
    names = ["" if name is None else str(name) for name in found]
    notes, is_dense = [], ids == list(range(len(ids)))
    count = len(names) if count is None else count
    if len(names) < count or (len(names) > count and not is_dense):
        raise ValueError(
            f"{where} names {len(names)} classes, but the class head has {count}; pass "
            f"--classes=FILE with {count} names, or --reinit_head for a new head of {len(names)}, "
            "which has to be trained."
        )
    if len(names) > count:
        notes.append(
            f"{where} names {len(names)} classes, but the class head has {count}; what "
            f"comes after is left out: {name_keys(names[count:])}."
        )
        names = names[:count]
    if not is_dense:
        shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        notes.append(f"{where} numbers its classes {shown}; they are taken in ascending order.")
    if blank := [index for index, name in enumerate(names) if not name.strip()]:
        notes.append(f"{where} has no name for {', '.join(f'class_{index}' for index in blank)}.")
        names = [name if name.strip() else f"class_{index}" for index, name in enumerate(names)]
    if len(set(names)) < len(names):
        notes.append(f"{where} gives several classes one name; their numbers are added to it.")
    extra = content.get(EXTRA_KEY)
    if not isinstance(extra, Mapping) or "is_thing" not in extra or len(names) < len(found):
        classes = _classes(names, where, known)
        return dataclasses.replace(classes, notes=tuple(notes))
    try:
        columns = {key: tuple(extra[key]) for key in ("is_thing", "is_seen", "category_ids")}
        if not all(isinstance(value, int) for column in columns.values() for value in column):
            raise ValueError("flags are true or false, ids whole numbers")
        vocabulary = Vocabulary(names=tuple(names), **columns)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The entry {EXTRA_KEY!r} of config.json does not fit its id2label; remove the entry "
            "or pass --classes=FILE with a name a line."
        ) from error
    return Classes(vocabulary, bool(extra.get("knows_things")), "config.json", tuple(notes))


def default_classes(count: int, known: Vocabulary | None = None) -> Classes:
    """Classes of a head that nothing names: those of `known` if they are as many, else numbers."""
    if known is not None and len(known) == count:
        vocabulary = dataclasses.replace(known, is_seen=(True,) * count)
        origin = f"COCO panoptic's, because the head has {count} classes and nothing names them"
        return Classes(vocabulary, True, origin)
    names = [f"class_{index}" for index in range(count)]
    return _classes(names, "numbered, because nothing names them; pass --classes to name them")


def fresh_head(
    params: Params, report: LoadingReport, num_classes: int, width: int
) -> tuple[Params, LoadingReport]:
    """Replace the class head, or add one, by a fresh one for K classes and queries of `width`.

    The report then has the old head among the ignored and names the new one.
    """
    queries = jnp.zeros((1, 1, width), jnp.float32)
    head = LinearClassifier(num_classes).init(jax.random.key(0), queries)["params"]
    head = jax.tree.map(np.asarray, head)
    old = [path for path in report.loaded if path.startswith("classifier/")]
    report = LoadingReport(
        loaded={p: key for p, key in report.loaded.items() if p not in old},
        shapes={p: shape for p, shape in report.shapes.items() if p not in old},
        new={**report.new, **shapes_of({"classifier": head})},
        ignored={**report.ignored, **{report.loaded[p]: report.shapes[p][::-1] for p in old}},
    )
    return {**params, "classifier": head}, report
