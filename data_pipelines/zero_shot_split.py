"""Zero-shot splits as data: a JSON file that lists every class and says which are seen.

A split file is one object with the keys `name`, `description`, `source` and `categories`. Each
category is `{"id": 21, "name": "cow", "isthing": 1, "split": "unseen"}`; the order of the list is
the order of the label space. COCO's panoptic 119/14 split (`splits/coco_panoptic_119_14.json`)
keeps COCO's native order, with the unseen classes in between, as PADing's
`datasets/mscoco_unseen_classes.json` and detectron2's `COCO_CATEGORIES` do.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.vocabulary_files import VOCABULARIES_FOLDER, load_vocabulary

SPLITS_FOLDER = pathlib.Path(__file__).parent / "splits"

_FILE_KEYS = ("name", "description", "source", "categories")
_CATEGORY_KEYS = ("id", "name", "isthing", "split")


def load_split(split_file: str | os.PathLike[str]) -> Vocabulary:
    """Reads a split file into a vocabulary whose class order is that of the file.

    Args:
      split_file: path of a split file, or the bare name of one that ships with the package, such
        as `coco_panoptic_119_14`.

    Raises:
      ValueError: if the file is missing, is not JSON, has an unknown or missing key, a value of
        the wrong kind, a name or id twice, or no seen class. The sentence names the file.
    """
    path = pathlib.Path(split_file)
    shipped = SPLITS_FOLDER / f"{split_file}.json"
    if not path.is_file() and path.name == str(split_file) and shipped.is_file():
        path = shipped
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SPLITS_FOLDER.glob("*.json")))
        raise ValueError(
            f"There is no split file {str(split_file)!r}; give a path or one of: {names}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The split file {path} is not valid JSON: {error}.") from error
    return split_vocabulary(content, where=f"The split file {path}")


def load_label_space(name_or_path: str | os.PathLike[str]) -> Vocabulary:
    """A label space from a split file or a vocabulary file, or the name of one that ships.

    Of a vocabulary, which knows no split, all classes are unseen.

    Raises:
      ValueError: if there is no such file, or it is neither.
    """
    shipped = VOCABULARIES_FOLDER / f"{name_or_path}.json"
    path = pathlib.Path(name_or_path)
    if shipped.is_file() and not path.is_file():
        return load_vocabulary(name_or_path)
    if path.is_file() and '"split"' not in path.read_text(encoding="utf-8", errors="replace"):
        return load_vocabulary(path)
    if path.is_file() or (SPLITS_FOLDER / f"{name_or_path}.json").is_file():
        return load_split(name_or_path)
    names = sorted(p.stem for f in (SPLITS_FOLDER, VOCABULARIES_FOLDER) for p in f.glob("*.json"))
    raise ValueError(
        f"There is no split or vocabulary {str(name_or_path)!r}; give a path or one of: "
        f"{', '.join(names)}."
    )


def split_vocabulary(content: Any, *, where: str = "The split") -> Vocabulary:
    """Checks a split file's parsed content and turns it into a vocabulary.

    Args:
      content: the parsed JSON object.
      where: how error sentences begin, for example "The split file a.json".

    Raises:
      ValueError: as `load_split`, except for the reading of the file.
    """
    _check_keys(content, _FILE_KEYS, where)
    categories = content["categories"]
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{where} needs a non-empty list under 'categories'.")
    for position, category in enumerate(categories):
        entry = f"{where}, category {position}"
        _check_keys(category, _CATEGORY_KEYS, entry)
        # bool is an int to Python, but `"id": true` is a slip of the pen.
        if not isinstance(category["id"], int) or isinstance(category["id"], bool):
            raise ValueError(f"{entry}: 'id' is {category['id']!r} and must be an integer.")
        if not isinstance(category["name"], str):
            raise ValueError(f"{entry}: 'name' is {category['name']!r} and must be a string.")
        if category["isthing"] not in (0, 1):
            raise ValueError(f"{entry}: 'isthing' is {category['isthing']!r} and must be 0 or 1.")
        if category["split"] not in ("seen", "unseen"):
            raise ValueError(
                f"{entry}: 'split' is {category['split']!r} and must be 'seen' or 'unseen'."
            )
    if all(category["split"] == "unseen" for category in categories):
        raise ValueError(f"{where} marks every class unseen, so nothing is left to train on.")
    try:
        return Vocabulary(
            names=tuple(category["name"] for category in categories),
            is_thing=tuple(bool(category["isthing"]) for category in categories),
            is_seen=tuple(category["split"] == "seen" for category in categories),
            category_ids=tuple(category["id"] for category in categories),
        )
    except ValueError as error:
        raise ValueError(f"{where} is not a label space: {error}") from error


def make_split(
    categories: Sequence[Mapping[str, Any]],
    unseen_ids: Iterable[int],
    *,
    name: str,
    description: str,
    source: str,
) -> dict[str, Any]:
    """Builds a split file's content from a COCO-style category list and the unseen ids.

    Args:
      categories: dicts with at least `id`, `name` and `isthing`, in the order to keep (the
        `categories` of a panoptic JSON, or panopticapi's `panoptic_coco_categories.json`).
      unseen_ids: category ids (not positions) of the unseen classes.
      name, description, source: what the file says about itself.

    Returns:
      The object to write with `json.dump`; `split_vocabulary` accepts it.

    Raises:
      ValueError: if an unseen id is not among the categories, or the result is not a split.
    """
    unseen = set(unseen_ids)
    unknown = sorted(unseen - {category["id"] for category in categories})
    if unknown:
        raise ValueError(
            f"The unseen id {unknown[0]} is not among the {len(categories)} categories."
        )
    content = {
        "name": name,
        "description": description,
        "source": source,
        "categories": [
            {
                "id": category["id"],
                "name": category["name"],
                "isthing": category["isthing"],
                "split": "unseen" if category["id"] in unseen else "seen",
            }
            for category in categories
        ],
    }
    split_vocabulary(content, where=f"The split {name!r}")
    return content


def _check_keys(content: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__} and must be a JSON object.")
    unknown = [key for key in content if key not in keys]
    if unknown:
        raise ValueError(
            f"{where} has the unknown key {unknown[0]!r}; known keys are {', '.join(keys)}."
        )
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}.")
