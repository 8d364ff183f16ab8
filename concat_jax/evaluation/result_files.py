"""What prediction files are of: which image is which, which category is which class.

Ids are a data set's own business, and whoever makes predictions may number images and classes in
another way. Names say what is meant where both sides have them: the manifest beside a result
(`coco_writers`), what the result itself says, and COCO's "images" and "categories".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from concat_jax.core.coco import (
    Category,
    CocoImage,
    ImageId,
    check_categories,
    read_categories,
    read_images,
    spelt,
)
from concat_jax.core.coco_writers import MAP_CLASSES
from concat_jax.core.files import FileError, as_path, open_image, read_json
from concat_jax.core.mask_codes import checked_rle
from concat_jax.core.vocabulary import Vocabulary

# What `python -m concat_jax.predict --output=DIR`, and evaluation in a stage's folder, call them.
RESULTS = {
    "panoptic": ("panoptic.json", "panoptic_predictions.json"),
    "semantic": ("semantic", "semantic_predictions", "panoptic.json", "panoptic_predictions.json"),
    "instance": ("instances.json", "instance_predictions.json"),
}
One = TypeVar("One", bound=Hashable)
Other = TypeVar("Other", bound=Hashable)
# The remedy where numbers and names of images contradict each other.
NUMBER_ALIKE = (
    "make the predictions with --annotations of that file (concat_jax.predict), which numbers "
    "images as it does"
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What lies beside a result of ours, see `coco_writers`.

    `categories` are by the pixels of label maps, of which `void` is no class; `maps` are these,
    relative to their folder, to the file names of their images.
    """

    path: epath.Path
    void: int | None
    categories: dict[int, Category]
    images: dict[ImageId, CocoImage]
    maps: dict[str, str]


def result_in(given: str, task: str) -> str:
    """A task's result in a folder that `predict` or a stage's evaluation filled; else as given."""
    folder = as_path(given)
    found = [(kind, folder / name) for kind in (task, *RESULTS) for name in RESULTS[kind]]
    kind, path = next((one for one in found if one[1].exists()), (task, folder))
    if kind != task:
        raise FileError(
            f"{given} holds what --task={kind} makes; score that, or predict with --task={task}."
        )
    if path.is_dir() and task != "semantic":
        raise FileError(f"{given} is a folder without {RESULTS[task][0]}; name the json.")
    return str(path)


def manifest_path(result: str | os.PathLike[str], task: str) -> epath.Path:
    """Where the manifest of a result lies, label maps or instances."""
    result = as_path(result)
    name = f"{result.name}.json" if task == "semantic" else f"{result.stem}.manifest.json"
    return result.absolute().with_name(name)


def read_manifest(result: str | os.PathLike[str], task: str) -> Manifest | None:
    """The manifest beside a result, label maps or instances; None where there is none."""
    path = manifest_path(result, task)
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("task") != task:
        return None
    images = read_images(path, content)
    maps = {str(entry.get("map", "")): entry["file_name"] for entry in content["images"]}
    pixels, void = content.get("pixels"), content.get("void")
    if task == "semantic" and (
        pixels not in ("category_ids", "indices") or type(void) is not int or "" in maps
    ):
        raise FileError(f"{path} does not say what the label maps of {result} hold.")
    categories = read_categories(path, content, must_say_things=False)
    if pixels == "indices":
        categories = dict(enumerate(categories.values()))
    return Manifest(path, void, categories, images, maps)


def manifest_in(folder: epath.Path, maps: Sequence[str]) -> Manifest | None:
    """What a folder's label maps say themselves; None where one of them does not."""
    named: set[tuple[int, str]] = set()
    void = -1
    for name in maps:
        with open_image(folder / name) as image:
            text = image.info.get(MAP_CLASSES)
        if text is None:
            return None
        try:
            said = {int(value): name for value, name in json.loads(text).items()}
            if not all(isinstance(name, str | None) for name in said.values()):
                raise ValueError("a name is a text, or null for void")
        except (AttributeError, ValueError) as error:
            raise FileError(
                f"{folder / name} names no classes in its text {MAP_CLASSES}; make it again."
            ) from error
        void = next((value for value, name in said.items() if name is None), void)
        named |= said.items() - {(void, None)}
    if not named:
        return None
    return Manifest(folder, void, _categories(named, folder), {}, {name: name for name in maps})


def _categories(named: Iterable[tuple[int, str]], path: epath.Path) -> dict[int, Category]:
    categories: dict[int, Category] = {}
    for number, name in named:
        other = categories.setdefault(number, Category(number, name, None)).name
        if other != name:
            names = " and ".join(sorted((repr(name), repr(other))))
            raise FileError(
                f"{path} calls the class {number} both {names}; keep results of two models apart."
            )
    return categories


def check_counts(
    annotated: int,
    predicted: int,
    right: float,
    truth: str | os.PathLike[str],
    found: str | os.PathLike[str],
    *,
    is_told: bool,
) -> None:
    """Refuses what has no score, and a score of 0 where nothing told the classes."""
    if not annotated:
        raise FileError(f"{truth} shows no class that is scored; there is nothing to score.")
    if predicted and not right and not is_told:
        raise FileError(
            f"Nothing in {found} is right, a score of 0, and nothing there names its classes: "
            f"their numbers may be of another list; number them as {truth} does."
        )


def classes_of(
    path: epath.Path, categories: Mapping[int, Category] | None, vocabulary: Vocabulary
) -> tuple[dict[int, int], str]:
    """Category id -> class index of predictions, and a sentence if they were told by their names.

    `categories` None takes the ids for the label space's own. FileError if one is not of it.
    """
    index_of = vocabulary.index_of_category
    if categories is None:
        return index_of, ""
    known = {name: k for k, name in enumerate(vocabulary.names)}
    names = [category.name for category in categories.values()]
    same = all(index_of.get(i) == known.get(c.name, -1) for i, c in categories.items())
    if same or len(set(names)) < len(names) or not known.keys() >= set(names):
        bare = {i: dataclasses.replace(c, is_thing=None) for i, c in categories.items()}
        remedy = "predict by its classes, with --classes of concat_jax.predict"
        check_categories(path, bare, vocabulary, must_have_all=False, remedy=remedy)
        return index_of, ""
    note = f"{path} numbers its categories in another way; they were told by their names."
    return {number: known[category.name] for number, category in categories.items()}, note


def classes_in(category_ids: Iterable[int], class_of: Mapping[int, int], what: str) -> list[int]:
    """Class indices of what has the categories; FileError if one of them is not scored."""
    for category in category_ids:
        if category not in class_of:
            raise FileError(
                f"{what} has the category {category}, which is not among the classes that are "
                "scored."
            )
    return [class_of[category] for category in category_ids]


def check_sizes(truth: Sequence[int], found: Sequence[int], truth_of, found_of) -> None:
    """Refuses maps of different sizes (height, width) with a FileError."""
    if tuple(truth) != tuple(found):
        sizes = (f"{height}x{width}" for height, width in (found, truth))
        raise FileError(
            f"{found_of} is {next(sizes)} (height x width) and its ground truth {truth_of} "
            f"{next(sizes)}; predictions must have the images' own size."
        )


def pair_images(
    truth: Mapping[One, str | None],
    found: Mapping[Other, str | None],
    truth_path: str | os.PathLike[str],
    found_path: str | os.PathLike[str],
    *,
    may_miss: bool = False,
) -> tuple[dict[Other, One], str]:
    """Id in the predictions -> id in the annotations, and a sentence if they were told by name.

    By name where names tell the images apart, as one ends like the other, if not in the extension;
    else by id, unless the files' own names differ. Raises FileError if both do not hold the same
    images, or neither tells them apart.
    """
    if not truth:
        raise FileError(f"{truth_path} holds no image; there is nothing to score.")
    missing, extra = truth.keys() - found.keys(), found.keys() - truth.keys()
    same = {i: i for i in found}
    named = all(truth.values()) and all(found.values())
    by_name = _pair_by_path(truth, found, may_miss) if named else None
    if by_name is not None:
        note = f"{found_path} numbers its images in another way; they were told by their names."
        return by_name, note if by_name != same else ""
    clash = [
        i
        for i in found
        if i in truth and truth[i] and found[i] and _ends(truth[i])[-1] != _ends(found[i])[-1]
    ]
    if not (clash or extra or missing and not may_miss):
        return same, ""
    by_text = {str(i): i for i in truth}
    if not (clash or named) and by_text.keys() >= {str(i) for i in found}:  # "1" is 1
        pairs = {i: by_text[str(i)] for i in found}
        if _is_pairing(pairs, truth, may_miss):
            return pairs, ""
    if clash:
        image_id = clash[0]
        raise FileError(
            f"{found_path} calls its image {image_id} {found[image_id]!r} and {truth_path} "
            f"{truth[image_id]!r}; {NUMBER_ALIKE}."
        )
    for keys, has, lacks in ((missing, truth_path, found_path), (extra, found_path, truth_path)):
        if keys and not (may_miss and keys is missing):
            raise FileError(
                f"{lacks} has no image {min(keys, key=str)}, which {has} has ({len(keys)} of "
                f"{max(len(truth), len(found))} are missing); both must hold the same images."
            )
    raise AssertionError("unreachable")


def bare_name(name: str) -> str:
    """A path without its extension, which is no number: "a.001" has none."""
    return re.sub(r"(?<=[^/])\.[^\W\d][^\W_]*$", "", spelt(name).as_posix())


def _ends(name: str) -> list[str]:
    """What a path ends in, each with its extension and without: all of it first, the file last.

    All of it begins with a slash, which tells it from the end of a longer one.
    """
    parts = spelt(name).as_posix().strip("/").split("/")
    ends = ["/".join(("", *parts)), *("/".join(parts[k:]) for k in range(len(parts)))]
    return [*dict.fromkeys(one for end in ends for one in (end, bare_name(end)))]


def _pair_by_path(
    truth: Mapping[One, str], found: Mapping[Other, str], may_miss: bool
) -> dict[Other, One] | None:
    """Each to the one whose path shares the longest end; None where that leaves two or none."""
    with_end: dict[str, list[One]] = {}
    for number, name in truth.items():
        for end in _ends(name):
            with_end.setdefault(end, []).append(number)
    pairs: dict[Other, One] = {}
    for number, name in found.items():
        nearest = next((with_end[end] for end in _ends(name) if end in with_end), ())
        if len(nearest) != 1:
            return None
        (pairs[number],) = nearest
    return pairs if _is_pairing(pairs, truth, may_miss) else None


def _is_pairing(pairs: Mapping[Other, One], truth: Mapping[One, Any], may_miss: bool) -> bool:
    used = {*pairs.values()}
    return len(used) == len(pairs) and (may_miss or len(used) == len(truth))


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceResult:
    """One detection of a results file; `rle` is of any size yet."""

    category_id: int
    score: float
    rle: dict


def read_instance_results(
    path: str | os.PathLike[str],
) -> tuple[
    dict[ImageId, list[InstanceResult]], dict[ImageId, str | None], dict[int, Category] | None
]:
    """COCO instance results and file names by image id, and categories; None where not said."""
    path = as_path(path)
    content = read_json(path, constants=True)
    wanted = "--task=instance needs a list of {image_id, category_id, segmentation, score}"
    if not isinstance(content, list):
        raise FileError(f"{path} is not a list; {wanted}.")
    results: dict[ImageId, list[InstanceResult]] = {}
    names: dict[ImageId, str | None] = {}
    named: set[tuple[int, Any]] = set()
    for position, entry in enumerate(content):
        where = f"Entry {position} of {path}"
        result = _instance_result(entry, where, wanted)
        image_id = entry["image_id"]
        results.setdefault(image_id, []).append(result)
        name = entry.get("file_name")
        names[image_id] = name if isinstance(name, str) and name else None
        category = entry.get("category_name")
        named.add((result.category_id, category if isinstance(category, str) else None))
    says = named and all(name for _, name in named)
    return results, names, _categories(named, path) if says else None


def _instance_result(entry: Any, where: str, wanted: str) -> InstanceResult:
    if not isinstance(entry, dict):
        raise FileError(f"{where} is {ascii(entry):.50}; {wanted}.")
    for key in ("image_id", "category_id", "segmentation", "score"):
        if key not in entry:
            raise FileError(f"{where} lacks {key!r}; {wanted}.")
    image_id, category, score = entry["image_id"], entry["category_id"], entry["score"]
    if type(category) is not int or not (type(image_id) is int or isinstance(image_id, str)):
        raise FileError(
            f"{where} has the image_id {image_id!r:.30} and category_id {category!r:.30}, which "
            "must be whole numbers."
        )
    if type(score) not in (int, float) or not math.isfinite(score):
        raise FileError(f"{where} has the score {score!r:.30}; it must be a finite number.")
    if not isinstance(entry["segmentation"], dict):
        raise FileError(f"{where} has a segmentation without run lengths; {wanted}.")
    try:
        return InstanceResult(category, float(score), checked_rle(entry["segmentation"]))
    except ValueError as error:
        raise FileError(f"The segmentation of {where} cannot be used: {error}") from error
