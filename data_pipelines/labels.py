"""Label spaces as data: files that list classes, and of a zero-shot split which of them are seen.

A file is one JSON object with the keys `name`, `description`, `source` and `categories`, whose
order is that of the label space. Those of a split say which classes training may show, those of a
vocabulary have other words for each class:

    {"id": 21, "name": "cow", "isthing": 1, "split": "unseen"}
    {"id": 17, "name": "cat", "isthing": 1, "synonyms": ["kitty"]}

A vocabulary says nothing of training: all its classes are unseen, as in open-vocabulary evaluation.
Its `isthing` is null where nobody has said. A text file is shorter: a class a line, its synonyms
after commas, as "cat, kitty". A class's `name` is the data set's own, "tree-merged"; its readable
form is for `concat_jax.text.name_cleaning` to say, and often the first synonym.

COCO's panoptic 119/14 split keeps COCO's native order, with the unseen classes in between, as
PADing's `datasets/mscoco_unseen_classes.json` and detectron2's `COCO_CATEGORIES` do.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from concat_jax.core.files import read_json, read_text
from concat_jax.core.vocabulary import Vocabulary

_HERE = pathlib.Path(__file__).parent
# Where the files lie that ship.
FOLDERS = (_HERE / "splits", _HERE / "vocabularies")

_FILE_KEYS = ("name", "description", "source", "categories")


def load_label_space(name_or_path: str | os.PathLike[str]) -> Vocabulary:
    """The classes of a split, a vocabulary or a list of names, in the order of the file.

    `name_or_path` is a `.json` or `.txt` file, or the bare name of one that ships. Thing flags are
    False where the file does not know; the ids of a text file are its line numbers, from 1. Raises
    ValueError, naming file and line, for whatever is missing, unknown, empty or twice.
    """
    path = pathlib.Path(name_or_path)
    if not path.is_file() and path.name == str(name_or_path):
        shipped = [folder / f"{name_or_path}.json" for folder in FOLDERS]
        path = next((file for file in shipped if file.is_file()), path)
    if not path.is_file():
        names = sorted(file.stem for folder in FOLDERS for file in folder.glob("*.json"))
        raise ValueError(
            f"There is no split or vocabulary {str(name_or_path)!r}; give a path or one of: "
            f"{', '.join(names)}."
        )
    if path.suffix == ".txt":
        return _from_lines(read_text(path), f"The list of names {path}")
    return _from_json(read_json(path), f"The file of classes {path}")


def with_synonyms(vocabulary: Vocabulary, source: Vocabulary) -> Vocabulary:
    """`vocabulary` with the synonyms that `source` has for classes of the same name.

    Raises:
      ValueError: if no class of `vocabulary` is in `source`.
    """
    known = dict(zip(source.names, source.synonyms, strict=True))
    if not any(name in known for name in vocabulary.names):
        raise ValueError(
            f"None of the {len(vocabulary)} classes, {vocabulary.names[0]!r} for one, is among the "
            f"{len(source)} that synonyms were to be taken from."
        )
    pairs = zip(vocabulary.names, vocabulary.synonyms, strict=True)
    return dataclasses.replace(
        vocabulary, synonyms=tuple(known.get(name, words) for name, words in pairs)
    )


def _from_json(content: Any, where: str) -> Vocabulary:
    _check_keys(content, _FILE_KEYS, (), where)
    categories = content["categories"]
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{where} needs a non-empty list under 'categories'.")
    is_split = any(isinstance(category, dict) and "split" in category for category in categories)
    checks = {
        # bool is an int to Python, but `"id": true` is a slip of the pen.
        "id": (lambda value: type(value) is int, "an integer"),
        "name": (lambda value: isinstance(value, str), "a string"),
        "isthing": (lambda value: value in (0, 1), "0 or 1"),
        "split": (lambda value: value in ("seen", "unseen"), "'seen' or 'unseen'"),
        "synonyms": (_are_texts, "a list of strings"),
    }
    if not is_split:
        del checks["split"]
        checks["isthing"] = (lambda value: value in (0, 1, None), "0, 1 or null")
    needed = [key for key in checks if key != "synonyms"]
    for position, category in enumerate(categories):
        entry = f"{where}, category {position}"
        _check_keys(category, needed, ("synonyms",), entry)
        for key, (is_fine, wanted) in checks.items():
            if key in category and not is_fine(category[key]):
                raise ValueError(f"{entry}: {key!r} is {category[key]!r} and must be {wanted}.")
    if is_split and not any(category["split"] == "seen" for category in categories):
        raise ValueError(f"{where} marks every class unseen, so nothing is left to train on.")
    return _vocabulary(categories, where)


def _are_texts(words: Any) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _from_lines(text: str, where: str) -> Vocabulary:
    # Blank lines at the end are how editors end files; one in between is a class without a name.
    lines = text.rstrip().splitlines()
    if not lines:
        raise ValueError(f"{where} names no class; write a class a line.")
    categories = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name, *synonyms = (word.strip() for word in line.split(","))
        if not name:
            raise ValueError(f"{where} has no name in line {number}; write a class a line.")
        if not all(synonyms):
            raise ValueError(
                f"{where} has an empty synonym of {name!r} in line {number}; take the comma out."
            )
        # Tokenizers put names into lower case, so these would be one class.
        before = first.setdefault(name.lower(), number)
        if before != number:
            raise ValueError(
                f"{where} names {name!r} in line {before} and again in line {number}; take one out."
            )
        categories.append({"id": number, "name": name, "isthing": None, "synonyms": synonyms})
    return _vocabulary(categories, where)


def _vocabulary(categories: Sequence[Mapping[str, Any]], where: str) -> Vocabulary:
    try:
        return Vocabulary(
            names=tuple(category["name"] for category in categories),
            is_thing=tuple(bool(category["isthing"]) for category in categories),
            is_seen=tuple(category.get("split") == "seen" for category in categories),
            category_ids=tuple(category["id"] for category in categories),
            synonyms=tuple(tuple(category.get("synonyms", ())) for category in categories),
        )
    except ValueError as error:
        raise ValueError(f"{where} is not a label space: {error}") from error


def _check_keys(content: Any, keys: Sequence[str], optional: Collection[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__} and must be a JSON object.")
    for key in content:
        if key not in keys and key not in optional:
            known = ", ".join([*keys, *optional])
            raise ValueError(f"{where} has the unknown key {key!r}; it takes {known}.")
    for key in keys:
        if key not in content:
            raise ValueError(f"{where} lacks the key {key!r}.")
