"""Tables that say where an array of another code base lives in our tree, read in both directions.

A table has a line a layer, with our name, the kind of layer, and a column for each code base:

    @ layer_{i}/             encoder.layers.{i}.  encoder.{i}.
    ffn_in                   linear  fc1          linear1
    attention/{query,key}    linear  {q,k}_proj   qkv_*[{0,1}]

`{i}` is any number, the same one in every column, and `{i+1}` one more; `{a,b}` stands for a line
with each, in every column in turn; `-` says that the code base has no such layer. A leaf ("weight")
is the last part of a name, or stands for its `*`; `[1]` is the second third of the rows, where
torch stacks query, key and value. No table knows how deep or wide a network is: what has to be
there, the shapes of a configured model say, and `sizes` reads such a config off the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from concat_jax.weights.report import LoadingReport, Shape, name_keys

# Kind of a layer -> their leaf, torch's or flax's -> our leaf and how its axes turn.
_LEAVES = {
    "array": {"": ("", "same")},
    "linear": {"weight": ("kernel", "dense"), "bias": ("bias", "same")},
    "conv": {"weight": ("kernel", "conv"), "bias": ("bias", "same")},
    "patches": {"weight": ("kernel", "patches"), "bias": ("bias", "same")},
    "filter": {"": ("", "conv")},
    "transposed": {"": ("", "transposed")},
    "tokens": {"": ("", "tokens")},
    "flax_linear": {"kernel": ("kernel", "same"), "bias": ("bias", "same")},
    "flax_norm": {"scale": ("scale", "same"), "bias": ("bias", "same")},
    "flax_patches": {"kernel": ("kernel", "flax_patches")},
    "norm": {"weight": ("scale", "same"), "bias": ("bias", "same")},
    "frozen": {
        "weight": ("frozen_scale", "same"),
        "bias": ("frozen_bias", "same"),
        "running_mean": ("frozen_mean", "same"),
        "running_var": ("frozen_variance", "same"),
    },
}
_AXES = {"dense": 2, "conv": 4, "patches": 4, "flax_patches": 4, "transposed": 4, "tokens": 3}
_NUMBER = re.compile(r"\{(\w)([+-]\d)?\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one of our arrays comes from.

    Attributes:
      ours: path in our tree, joined by "/".
      layout: "same", "dense" ([out, in] -> [in, out]), "conv" ([out, in, h, w] -> [h, w, in, out],
        or [in, out] where ours is a product and h = w = 1), "patches" (-> [h * w * in, out]),
        "flax_patches" ([h, w, in, out] -> [h * w * in, out]), "transposed" ([in, out, h, w] ->
        [in, h, w, out]) or "tokens" ([1, n, D] -> [n, D]).
      third: which third of the rows, where torch stacks query, key and value; else None.
    """

    ours: str
    theirs: str
    layout: str = "same"
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class Naming:
    """How one code base calls our arrays.

    Attributes:
      rows: its column of the tables.
      ignored: pattern of names that hold nothing an output depends on.
      spellings: (pattern, replacement) of older names, and of names in memory.
    """

    rows: tuple[Row, ...]
    ignored: str = r"(?!)"
    spellings: tuple[tuple[str, str], ...] = ()

    def spelt(self, key: str) -> str:
        """The name in the table of an array that the file calls `key`."""
        for pattern, replacement in self.spellings:
            key = re.sub(pattern, replacement, key)
        return key

    def theirs(self, path: str) -> str:
        """The name of one of our arrays, its own path where the table has none."""
        found = self.row(path)
        return found.theirs if found else path

    def row(self, path: str) -> Row | None:
        """The row of one of our arrays, its numbers filled in."""
        for row in self.rows:
            if (theirs := _translate(path, row.ours, row.theirs)) is not None:
                return dataclasses.replace(row, ours=path, theirs=theirs)
        return None


def columns(table: str, *prefixes: str) -> tuple[tuple[Row, ...], ...]:
    """The rows of each code base; prefixes stand before all names of ours, and of each.

    Lines of the table that begin with @ say what stands before the names of the lines below, a
    column each, "-" for nothing. "=" is the name in the column before.
    """
    found: tuple[list[Row], ...] = tuple([] for _ in prefixes[1:])
    ours, *theirs = prefixes
    for line in _lines(table):
        path, kind, *names = line.split()
        for column, name in enumerate(names):
            names[column] = names[column - 1] if name == "=" else name
        if path == "@":
            inner = ["" if name == "-" else name for name in (kind, *names)]
            ours, *theirs = map("".join, zip(prefixes, inner, strict=True))
            continue
        for rows, prefix, name in zip(found, theirs, names, strict=True):
            name, _, third = name.rstrip("]").partition("[")
            for leaf, (our_leaf, layout) in _LEAVES[kind].items() if name != "-" else ():
                whole = name.replace("*", leaf) if "*" in name else f"{name}.{leaf}".rstrip(".")
                target = f"{ours}{path}/{our_leaf}".rstrip("/")
                rows.append(Row(target, prefix + whole, layout, int(third) if third else None))
    return tuple(map(tuple, found))


def _lines(text: str) -> Iterable[str]:
    """The lines of a table, one for each choice."""
    for line in filter(None, map(str.strip, text.splitlines())):
        choices = [choice.split(",") for choice in _CHOICE.findall(line)]
        for values in zip(*choices, strict=True) if choices else [()]:
            parts = iter(values)
            yield _CHOICE.sub(lambda _: next(parts), line)  # noqa: B023


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    literals = re.split(r"\{\w(?:[+-]\d)?\}", template)
    return re.compile(r"(0|[1-9]\d{0,3})".join(map(re.escape, literals)))


def _translate(name: str, source: str, target: str) -> str | None:
    """`target` with the numbers that `name` has in the places of `source`; None if it differs."""
    if (match := _pattern(source).fullmatch(name)) is None:
        return None
    numbers = {
        place[1]: int(number) - int(place[2] or 0)
        for place, number in zip(_NUMBER.finditer(source), match.groups(), strict=True)
    }
    if min(numbers.values(), default=0) < 0:
        return None
    return _NUMBER.sub(lambda place: str(numbers[place[1]] + int(place[2] or 0)), target)


def _as_ours(array: np.ndarray, row: Row) -> np.ndarray:
    """Their array in our layout, as a view where that can be."""
    if row.third is not None:
        array = np.split(array, 3)[row.third]
    if row.layout == "dense":
        return array.T
    if row.layout == "same":
        return array
    if row.layout == "tokens":
        return array[0]
    if row.layout == "transposed":
        return array.transpose(0, 2, 3, 1)
    if row.layout != "flax_patches":
        array = array.transpose(2, 3, 1, 0)
    return array.reshape(-1, array.shape[-1]) if "patches" in row.layout else array


def _as_torchs(array: np.ndarray, row: Row) -> np.ndarray:
    """The inverse of `_as_ours`, of one third where there are three."""
    if row.layout == "dense":
        return array.T
    if row.layout == "same":
        return array
    if row.layout == "tokens":
        return array[None]
    if row.layout == "transposed":
        return array.transpose(0, 3, 1, 2)
    if array.ndim == 2:
        side = math.isqrt(array.shape[0] // 3) if "patches" in row.layout else 1
        array = array.reshape(side, side, -1, array.shape[1])
    return array if row.layout == "flax_patches" else array.transpose(3, 2, 0, 1)


def our_shape(shape: Shape, row: Row) -> Shape:
    """Shape of our array, from that of the whole torch array that a row reads.

    Raises ValueError if it has other axes than the layer.
    """
    axes = _AXES.get(row.layout, len(shape))
    if len(shape) != axes or (row.third is not None and (not shape or shape[0] % 3)):
        raise ValueError(f"its {row.theirs} has shape {shape}, which is none of such a layer")
    sides_and_colours = {"patches": (*shape[2:], *shape[1:2]), "flax_patches": shape[:3]}
    height, width, colours = sides_and_colours.get(row.layout, (0, 0, 3))
    if colours != 3 or height != width:
        raise ValueError(
            f"its {row.theirs} has shape {shape}, which is no convolution of square patches of RGB "
            "pictures"
        )
    return _as_ours(np.broadcast_to(0, shape), row).shape


def torch_shape(shape: Shape, row: Row) -> Shape:
    """Shape of the whole torch array that a row reads, from that of our array."""
    shape = _as_torchs(np.broadcast_to(0, shape), row).shape
    return shape if row.third is None else (3 * shape[0], *shape[1:])


@dataclasses.dataclass(frozen=True)
class Found:
    """The arrays of a file by our paths.

    Attributes:
      places: our path -> the row, and the name in the file.
      unknown: names that the table does not have.
      ignored: name -> shape of what no output depends on.
    """

    arrays: Mapping[str, np.ndarray]
    naming: Naming
    places: Mapping[str, tuple[Row, str]]
    unknown: frozenset[str]
    ignored: Mapping[str, Shape]

    def shapes(self) -> dict[str, Shape]:
        """Our path -> shape of our array; ValueError where one is no layer of its kind."""
        return {
            path: our_shape(np.shape(self.arrays[key]), dataclasses.replace(row, theirs=key))
            for path, (row, key) in self.places.items()
        }


def find(arrays: Mapping[str, np.ndarray], naming: Naming) -> Found:
    """Look up every name of a file; ValueError where two names mean the same array.

    Arrays without a number in them are ignored: transformers writes those of layers that a config
    has none of.
    """
    shapes = {key: tuple(np.shape(array)) for key, array in arrays.items()}
    ignored = {k: s for k, s in shapes.items() if 0 in s or re.search(naming.ignored, k)}
    places: dict[str, tuple[Row, str]] = {}
    unknown = set()
    for key in arrays.keys() - ignored.keys():
        name = naming.spelt(key)
        paths = [(_translate(name, row.theirs, row.ours), row) for row in naming.rows]
        paths = [(path, row) for path, row in paths if path is not None]
        for path, row in paths:
            if path in places:
                first, second = sorted((places[path][1], key))
                raise ValueError(f"it holds the same array as {first} and as {second}; remove one")
            places[path] = dataclasses.replace(row, ours=path, theirs=name), key
        if not paths:
            unknown.add(key)
    return Found(arrays, naming, places, frozenset(unknown), ignored)


def to_ours(found: Found, shapes: Mapping[str, Shape]) -> tuple[dict[str, Any], LoadingReport]:
    """Nested dict of a file's float32 numpy arrays, as `shapes` has them by our path; a report.

    Raises ValueError if the file lacks an array, holds one that the config has no place for, or one
    of another shape or with a value that is not finite.
    """
    missing = {found.naming.theirs(path) for path in shapes.keys() - found.places.keys()}
    extra = {key for path, (_, key) in found.places.items() if path not in shapes}
    for what, keys, place in (
        ("lacks", missing, "needs"),
        ("also holds", extra | found.unknown, "has no place for"),
    ):
        if keys:
            raise ValueError(
                f"it {what} {len(keys)} array{'s' * (len(keys) > 1)} that the config {place} "
                f"({name_keys(keys)}); check depths and backbone"
            )
    flat: dict[str, np.ndarray] = {}
    checked: set[str] = set()
    for path, shape in shapes.items():
        row, key = found.places[path]
        array = np.asarray(found.arrays[key])
        if array.shape != (needs := torch_shape(shape, row)):
            raise ValueError(f"its {key} has shape {array.shape}, but the config needs {needs}")
        if key not in checked and not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise ValueError(f"its {key} holds a value that is not finite; use another one")
        checked.add(key)
        flat[path] = np.array(_as_ours(array, row).reshape(shape), np.float32, order="C")
    loaded = {path: found.places[path][1] for path in flat}
    report = LoadingReport(loaded, dict(shapes), ignored=found.ignored)
    return traverse_util.unflatten_dict(flat, sep="/"), report


def to_theirs(params: Mapping[str, Any], naming: Naming) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`: name -> float32 array in C order."""
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for path, array in traverse_util.flatten_dict(dict(params), sep="/").items():
        if (row := naming.row(path)) is None:
            raise ValueError(f"The format has no name for {path}; it cannot be written.")
        array = _as_torchs(np.asarray(array, np.float32), row)
        parts.setdefault(row.theirs, {})[row.third] = np.ascontiguousarray(array)
    # One part has no third, or there are all three.
    return {
        name: part[None] if None in part else np.concatenate([part[i] for i in sorted(part)])
        for name, part in parts.items()
    }
