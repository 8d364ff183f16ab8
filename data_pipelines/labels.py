"""Label spaces as data: files that list classes, and of a zero-shot split which of them are seen.

A file is one JSON object with the keys `name`, `description`, `source` and `categories`, whose
order is that of the label space. Those of a split say which classes training may show, those of a
vocabulary have other words for each class:

    {"id": 21, "name": "cow", "isthing": 1, "split": "unseen"}
    {"id": 17, "name": "cat", "isthing": 1, "synonyms": ["kitty"]}

A vocabulary says nothing of training: all its classes are unseen, as in open-vocabulary evaluation.
Its `isthing` is null where nobody has said. A bare list of categories does, too, of which `name` is
all that each must have. A text file is shorter: a class a line, its synonyms after commas, as
"cat, kitty". A class's `name` is the data set's own, "tree-merged"; its readable
form is for `concat_jax.text.prompts` to say, and often the first synonym.

COCO's panoptic 119/14 split keeps COCO's native order, with the unseen classes in between, as
PADing's `datasets/mscoco_unseen_classes.json` and detectron2's `COCO_CATEGORIES` do.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from concat_jax.core.config import check_choice
from concat_jax.core.files import read_json, read_text
from concat_jax.core.vocabulary import Vocabulary

_HERE = pathlib.Path(__file__).parent
# Where the files lie that ship.
FOLDERS = (_HERE / "splits", _HERE / "vocabularies")

# Names that somebody asks for, see `parse_classes`.
Names = str | os.PathLike[str] | Sequence[str] | Mapping[str, Sequence[str]]

_FILE_KEYS = ("name", "description", "source", "categories")


def load_label_space(name_or_path: str | os.PathLike[str]) -> Vocabulary:
    """As `load_classes`, the classes alone."""
    return load_classes(name_or_path)[0]


def load_classes(
    name_or_path: str | os.PathLike[str], known: Vocabulary | None = None
) -> tuple[Vocabulary, bool]:
    """The classes of a file in its order, and whether it is said which of them are things.

    `name_or_path` is a split, a vocabulary or a list of names, or the bare name of one that ships.
    Where nothing says which are things, none is; ids that a file does not say count from 1. A text
    file that names nothing but `known` classes has their flags and ids. Raises ValueError, naming
    file and line, for whatever is missing, unknown, empty or twice.
    """
    path = _find(name_or_path)
    if path is None:
        raise ValueError(
            f"There is no file of classes {str(name_or_path)!r}; give a path or one of: "
            f"{', '.join(_shipped())}."
        )
    text = read_text(path)
    if path.suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        return _from_json(read_json(path), f"The file of classes {path}")
    found, knows_things = _from_lines(text, f"The list of names {path}")
    same = found.with_flags_of(known) if known else None
    return (same, True) if same else (found, knows_things)


def _find(name_or_path: str | os.PathLike[str]) -> pathlib.Path | None:
    shipped = [folder / f"{name_or_path}.json" for folder in FOLDERS]
    is_bare = os.path.basename(name_or_path) == str(name_or_path)
    files = [name_or_path, *(shipped if is_bare else ())]
    return next((pathlib.Path(file) for file in files if os.path.isfile(file)), None)


def parse_classes(classes: Names, training: Vocabulary) -> tuple[Vocabulary, bool]:
    """A vocabulary from the names that somebody asks for, and whether it says which are things.

    `classes` is "red balloon, blue balloon; grey ground" (things; stuff), a file, {"things": [...],
    "stuff": [...]}, or a list, of which those are stuff that are stuff in `training`. A class is
    seen if a word for it is one for a class that was seen in `training`; any other is unseen. Where
    nothing says which are things, all are taken as such. Raises ValueError as `load_classes`, and
    for a name that is empty, no text, twice, or nearly that of a file that ships.
    """
    found, knows_things = None, True
    if isinstance(classes, str | os.PathLike) and _find(classes):
        found, knows_things = load_classes(classes, training)
        names, is_thing = found.names, found.is_thing if knows_things else (True,) * len(found)
    else:
        names, is_thing = _asked_for(classes, training)
    if not names:
        raise ValueError("The classes hold no name; give some, as 'cat, dog; sky'.")
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"Name {number} of the classes is empty; take it out.")
        if name.casefold() in {other.casefold() for other in names[: number - 1]}:
            raise ValueError(f"The classes hold the name {name!r} more than once; take one out.")
    texts = found.texts if found else tuple((name,) for name in names)
    seen = {word.casefold() for k in training.seen for word in training.texts[k]}
    is_seen = tuple(any(word.casefold() in seen for word in words) for words in texts)
    flags = dict(is_thing=is_thing, is_seen=is_seen)
    if found:
        return dataclasses.replace(found, **flags), knows_things
    ids = tuple(range(1, len(names) + 1))
    return Vocabulary(names, **flags, category_ids=ids), knows_things


def _asked_for(classes: Names, training: Vocabulary) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Names, and which of them are things."""
    if isinstance(classes, os.PathLike) or (
        isinstance(classes, str) and classes.endswith((".txt", ".json"))
    ):
        raise ValueError(f"There is no file {classes}; name one that is there, or the classes.")
    if isinstance(classes, str):
        if os.sep in classes and os.path.isdir(classes):
            raise ValueError(f"{classes} is a folder; name a file of classes, or the classes.")
        _refuse_misspelt(classes)
        # A line end is a comma, beside one or alone.
        lines = (re.sub(r"\s*,?\s*\n\s*,?\s*", ",", part.strip()) for part in classes.split(";"))
        parts = [[name.strip() for name in line.split(",")] for line in lines]
        parts = [part if part != [""] else [] for part in parts]
        if len(parts) > 2:
            raise ValueError(f"{classes!r} has several semicolons; one ends the things.")
    elif isinstance(classes, Mapping):
        for key in classes:
            check_choice(key, ("things", "stuff"), "The classes have no key")
        parts = [classes.get(key, ()) for key in ("things", "stuff")]
    else:
        parts = [classes]
        if isinstance(classes, Sequence) and len(classes) == 1 and classes[0] in _shipped():
            raise ValueError(
                f"{list(classes)!r} is a list of one class; for the names of the vocabulary give "
                f"{classes[0]!r} itself, and for a class of that name '{classes[0]};'."
            )
    for part in parts:
        is_list = isinstance(part, Sequence) and not isinstance(part, str)
        if not is_list or not all(isinstance(name, str) for name in part):
            raise ValueError(f"The classes hold {part!r} where a list of names belongs.")
    if isinstance(classes, str | Mapping):
        flags = [number == 0 for number, part in enumerate(parts) for _ in part]
    else:
        stuff = {
            n.casefold()
            for n, flag in zip(training.names, training.is_thing, strict=True)
            if not flag
        }
        flags = [name.strip().casefold() not in stuff for name in classes]
    return tuple(name.strip() for part in parts for name in part), tuple(flags)


def _shipped() -> list[str]:
    """Names of the splits and vocabularies that ship."""
    return sorted(file.stem for folder in FOLDERS for file in folder.glob("*.json"))


def _refuse_misspelt(text: str) -> None:
    """ValueError for a single word that is nearly the name of a vocabulary that ships."""
    names = _shipped()
    is_word = text.strip() and not set(text.strip()) & set(",; ")
    # Words of a language have neither, so of one without it is asked more.
    cutoff = 0.6 if set(text) & set("_0123456789") else 0.85
    close = difflib.get_close_matches(text.strip().casefold(), names, 1, cutoff)
    if is_word and close:
        raise ValueError(
            f"No vocabulary that ships is named {text!r}; did you mean {close[0]!r}? A class of "
            f"that name is asked for as '{text};'."
        )


def with_synonyms(vocabulary: Vocabulary, source: Vocabulary) -> Vocabulary:
    """`vocabulary` with the synonyms that `source` has for classes of the same name.

    A class for which it has none keeps its own. Raises ValueError if no class is in `source`.
    """
    known = dict(zip(source.names, source.synonyms, strict=True))
    if not any(name in known for name in vocabulary.names):
        raise ValueError(
            f"None of the {len(vocabulary)} classes, {vocabulary.names[0]!r} for one, is among the "
            f"{len(source)} that synonyms were to be taken from."
        )
    pairs = zip(vocabulary.names, vocabulary.synonyms, strict=True)
    return dataclasses.replace(
        vocabulary, synonyms=tuple(known.get(name) or words for name, words in pairs)
    )


def _from_json(content: Any, where: str) -> tuple[Vocabulary, bool]:
    is_list = isinstance(content, list)
    if not is_list:
        _check_keys(content, _FILE_KEYS, (), where)
    categories = content if is_list else content["categories"]
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{where} needs a non-empty list of 'categories'.")
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
        if is_list and isinstance(category, dict):
            category = categories[position] = {"id": position + 1, "isthing": None, **category}
        entry = f"{where}, category {position}"
        _check_keys(category, needed, ("synonyms", "supercategory", "color"), entry)
        for key, (is_fine, wanted) in checks.items():
            if key in category and not is_fine(category[key]):
                raise ValueError(f"{entry}: {key!r} is {category[key]!r} and must be {wanted}.")
    if is_split and not any(category["split"] == "seen" for category in categories):
        raise ValueError(f"{where} marks every class unseen, so nothing is left to train on.")
    return _vocabulary(categories, where)


def _are_texts(words: Any) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _from_lines(text: str, where: str) -> tuple[Vocabulary, bool]:
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
        if ";" in line:
            raise ValueError(
                f"{where} has a semicolon in line {number}; write a class a line, or a JSON list "
                'of {"name", "isthing"} to say which are things.'
            )
        if not all(synonyms):
            raise ValueError(
                f"{where} has an empty synonym of {name!r} in line {number}; take the comma out."
            )
        # Tokenizers put names into lower case, so these would be one class.
        before = first.setdefault(name.lower(), number)
        if before != number:
            raise ValueError(
                f"{where} names {name!r} in line {before} and again in line {number}; rename "
                "one or take it out."
            )
        categories.append({"id": number, "name": name, "isthing": None, "synonyms": synonyms})
    return _vocabulary(categories, where)


def _vocabulary(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[Vocabulary, bool]:
    """The classes, and whether they say which of them are things."""
    things = [category["isthing"] for category in categories]
    knows_things = None not in things
    if not knows_things and any(flag is not None for flag in things):
        raise ValueError(f"{where} does not say it of all: every class or none needs 'isthing'.")
    try:
        vocabulary = Vocabulary(
            names=tuple(category["name"] for category in categories),
            is_thing=tuple(map(bool, things)),
            is_seen=tuple(category.get("split") == "seen" for category in categories),
            category_ids=tuple(category["id"] for category in categories),
            synonyms=tuple(tuple(category.get("synonyms", ())) for category in categories),
        )
    except ValueError as error:
        raise ValueError(f"{where} is not a label space: {error}") from error
    return vocabulary, knows_things


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
