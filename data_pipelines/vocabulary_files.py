"""Vocabularies as data: the classes of a data set, or a user's own, with other words for each.

A vocabulary file is one JSON object with the keys `name`, `description`, `source` and
`categories`. Each category is `{"id": 17, "name": "cat", "synonyms": ["kitty"], "isthing": 1}`; the
order of the list is the order of the label space, and `isthing` is null where nobody has said. The
data set's own name of a class, "tree-merged", is its `name`; its readable form is for
`concat_jax.text.name_cleaning` to say, and is often the first synonym as well, because the lists
that ship here begin each class with a word that CLIP can read. Texts of a class that are one after
cleaning count once.

A text file is shorter: a class a line, its synonyms after commas.

    cat, kitty
    sky
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from concat_jax.core.vocabulary import Vocabulary

VOCABULARIES_FOLDER = pathlib.Path(__file__).parent / "vocabularies"

_FILE_KEYS = ("name", "description", "source", "categories")
_CATEGORY_KEYS = ("id", "name", "synonyms", "isthing")


def load_vocabulary(name_or_path: str | os.PathLike[str]) -> Vocabulary:
    """A vocabulary from a file, in the order of the file.

    A vocabulary says nothing of training: every class is unseen, as in open-vocabulary evaluation,
    where no pixel of this label space was learnt from. What is trained on comes from a split
    (`data_pipelines.zero_shot_split`).

    Args:
      name_or_path: path of a `.json` vocabulary file or of a `.txt` list of names, or the bare name
        of a vocabulary that ships with the package, such as `ade20k_150`.

    Returns:
      The vocabulary, with synonyms. Thing flags are False where the file does not know. The ids of
      a text file are its line numbers, from 1.

    Raises:
      ValueError: if the file is missing, is not readable, has an unknown or missing key, a value of
        the wrong kind, no class, an empty name, or a name or id twice. The sentence names the file,
        and the lines of a text file.
    """
    path = pathlib.Path(name_or_path)
    shipped = VOCABULARIES_FOLDER / f"{name_or_path}.json"
    if not path.is_file() and path.name == str(name_or_path) and shipped.is_file():
        path = shipped
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in VOCABULARIES_FOLDER.glob("*.json")))
        raise ValueError(
            f"There is no vocabulary {str(name_or_path)!r}; give a path or one of: {names}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark first
        content = json.loads(text) if path.suffix != ".txt" else None
    except ValueError as error:
        kind = "UTF-8 text" if path.suffix == ".txt" else "valid JSON"
        raise ValueError(f"The vocabulary file {path} is not {kind}: {error}.") from error
    where = f"The vocabulary file {path}"
    return _from_json(content, where) if path.suffix != ".txt" else _from_lines(text, where)


def with_synonyms(vocabulary: Vocabulary, source: Vocabulary) -> Vocabulary:
    """`vocabulary` with the synonyms that `source` has for classes of the same name.

    So that a split, which has none, can use those of a vocabulary file.

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
    _check_keys(content, _FILE_KEYS, where)
    categories = content["categories"]
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{where} needs a non-empty list under 'categories'.")
    for position, category in enumerate(categories):
        entry = f"{where}, category {position}"
        _check_keys(category, _CATEGORY_KEYS, entry)
        # bool is an int to Python, but `"id": true` is a slip of the pen.
        if type(category["id"]) is not int:
            raise ValueError(f"{entry}: 'id' is {category['id']!r} and must be an integer.")
        if not isinstance(category["name"], str):
            raise ValueError(f"{entry}: 'name' is {category['name']!r} and must be a string.")
        synonyms = category["synonyms"]
        if not isinstance(synonyms, list) or not all(isinstance(w, str) for w in synonyms):
            raise ValueError(f"{entry}: 'synonyms' is {synonyms!r} and must be a list of strings.")
        if category["isthing"] not in (0, 1, None):
            raise ValueError(
                f"{entry}: 'isthing' is {category['isthing']!r} and must be 0, 1 or null."
            )
    return _vocabulary(
        [(category["name"], *category["synonyms"]) for category in categories],
        [category["id"] for category in categories],
        [bool(category["isthing"]) for category in categories],
        where,
    )


def _from_lines(text: str, where: str) -> Vocabulary:
    # Blank lines at the end are how editors end files; one in between is a class without a name.
    lines = text.rstrip().splitlines()
    if not lines:
        raise ValueError(f"{where} names no class; write a class a line.")
    classes = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = tuple(word.strip() for word in line.split(","))
        if not words[0]:
            raise ValueError(f"{where} has no name in line {number}; write a class a line.")
        if not all(words):
            raise ValueError(
                f"{where} has an empty synonym of {words[0]!r} in line {number}; take the comma "
                "out."
            )
        # Tokenizers put names into lower case, so these would be one class.
        before = first.setdefault(words[0].lower(), number)
        if before != number:
            raise ValueError(
                f"{where} names {words[0]!r} in line {before} and again in line {number}; take one "
                "out."
            )
        classes.append(words)
    return _vocabulary(classes, range(1, len(classes) + 1), [False] * len(classes), where)


def _vocabulary(
    classes: Sequence[Sequence[str]], ids: Sequence[int], is_thing: Sequence[bool], where: str
) -> Vocabulary:
    try:
        return Vocabulary(
            names=tuple(words[0] for words in classes),
            is_thing=tuple(is_thing),
            is_seen=(False,) * len(classes),
            category_ids=tuple(ids),
            synonyms=tuple(tuple(words[1:]) for words in classes),
        )
    except ValueError as error:
        raise ValueError(f"{where} is not a label space: {error}") from error


def _check_keys(content: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__} and must be a JSON object.")
    for key in content:
        if key not in keys:
            raise ValueError(f"{where} has the unknown key {key!r}; it takes {', '.join(keys)}.")
    for key in keys:
        if key not in content:
            raise ValueError(f"{where} lacks the key {key!r}.")
