"""Rows that say where an array of a torch model lives in our tree, read in both directions.

A table of `Rename` rows is the whole knowledge about a code base: which of its names holds which of
our parameters, and how its axes turn. Arrays are numpy on both sides, and every key has to be
accounted for: one that is missing, one too many or one of another shape is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from concat_jax.weights.report import LoadingReport

# An error names at most this many keys: enough to see the pattern, short enough to read.
MAX_KEYS_NAMED = 5

NORM = {"weight": "scale", "bias": "bias"}
FROZEN_NORM = {
    "weight": "frozen_scale",
    "bias": "frozen_bias",
    "running_mean": "frozen_mean",
    "running_var": "frozen_variance",
}


@dataclasses.dataclass(frozen=True)
class Rename:
    """Where one of our arrays comes from.

    Attributes:
        source: key of the torch weights file.
        target: path in our tree, joined by "/".
        kind: "same", "dense" ([out, in] -> [in, out]), "pointwise" ([out, in, 1, 1] -> [in, out])
            or "conv" ([out, in, h, w] -> [h, w, in, out]).
        third: which third of the rows, where torch stacks query, key and value; else None.
    """

    source: str
    target: str
    kind: str = "same"
    third: int | None = None


def norm_rows(source: str, target: str, leaves: Mapping[str, str] = NORM) -> Iterator[Rename]:
    """Rows of a normalisation layer; `leaves` is `NORM` or `FROZEN_NORM`."""
    for theirs, ours in leaves.items():
        yield Rename(f"{source}.{theirs}", f"{target}/{ours}")


def linear_rows(
    source: str, target: str, kind: str = "dense", bias: bool = True
) -> Iterator[Rename]:
    """Rows of a linear layer or convolution."""
    yield Rename(f"{source}.weight", f"{target}/kernel", kind)
    if bias:
        yield Rename(f"{source}.bias", f"{target}/bias")


def stacked_rows(weight: str, bias: str, target: str) -> Iterator[Rename]:
    """Rows of query, key and value that torch stacks in one weight and one bias."""
    for third, name in enumerate(("query", "key", "value")):
        yield Rename(weight, f"{target}/{name}/kernel", "dense", third)
        yield Rename(bias, f"{target}/{name}/bias", "same", third)


def to_ours(array: np.ndarray, kind: str) -> np.ndarray:
    """Turn the axes of a torch array of this `Rename.kind` into our order."""
    if kind == "dense":
        return array.T
    if kind == "pointwise":
        return array[:, :, 0, 0].T
    if kind == "conv":
        return array.transpose(2, 3, 1, 0)
    return array


def to_torch(array: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `to_ours`."""
    if kind == "dense":
        return array.T
    if kind == "pointwise":
        return array.T[:, :, None, None]
    if kind == "conv":
        return array.transpose(3, 2, 0, 1)
    return array


def torch_shape(shape: Sequence[int], row: Rename) -> tuple[int, ...]:
    """Shape of the whole torch array that a row reads, from the shape of our array."""
    if row.kind == "dense":
        shape = shape[::-1]
    elif row.kind == "pointwise":
        shape = (*shape[::-1], 1, 1)
    elif row.kind == "conv":
        shape = (shape[3], shape[2], shape[0], shape[1])
    return tuple(shape) if row.third is None else (3 * shape[0], *shape[1:])


def name_keys(keys: Iterable[str]) -> str:
    """The first keys in alphabetical order, and how many more there are."""
    keys = sorted(keys)
    named = ", ".join(keys[:MAX_KEYS_NAMED])
    return (
        named if len(keys) <= MAX_KEYS_NAMED else f"{named} and {len(keys) - MAX_KEYS_NAMED} more"
    )


def params_from_state_dict(
    state_dict: Mapping[str, np.ndarray],
    table: Sequence[Rename],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    file_name: Callable[[str], str] = lambda key: key,
    is_ignored: Callable[[str], bool] = lambda key: False,
) -> tuple[dict[str, Any], LoadingReport]:
    """Our parameters from a torch state dict.

    Args:
        state_dict: name -> array of any float type.
        table: a row for each of our parameters.
        shapes: our path -> shape, as the configured model has it.
        file_name: the name in the table of a key that the file spells otherwise.
        is_ignored: whether a key holds nothing that an output depends on.

    Returns:
        Nested dict of float32 numpy arrays, and a report.

    Raises:
        ValueError: the state dict lacks a key of the table, holds one that the table has no place
            for or two that mean the same, an array has another shape than the config asks for, or
            holds a value that is not finite.
    """
    ignored = {k: tuple(np.shape(v)) for k, v in state_dict.items() if is_ignored(k)}
    keys: dict[str, str] = {}
    for key in state_dict:
        if key not in ignored and keys.setdefault(file_name(key), key) != key:
            raise ValueError(
                f"The checkpoint holds the same array as {keys[file_name(key)]} and as {key}; "
                "remove one."
            )
    needed = {row.source for row in table}
    if missing := needed - set(keys):
        raise ValueError(
            f"The checkpoint lacks {len(missing)} arrays that the config needs "
            f"({name_keys(missing)}); check the depths and the backbone of the config."
        )
    if unused := {keys[name] for name in set(keys) - needed}:
        raise ValueError(
            f"The checkpoint holds {len(unused)} arrays that the config has no place for "
            f"({name_keys(unused)}); check the depths and the backbone of the config."
        )
    if unfilled := set(shapes) - {row.target for row in table}:
        raise ValueError(f"The rename table has no row for {name_keys(unfilled)}; add one.")

    flat: dict[str, np.ndarray] = {}
    checked: set[str] = set()
    for row in table:
        key = keys[row.source]
        array = np.asarray(state_dict[key])
        if array.shape != (needs := torch_shape(shapes[row.target], row)):
            raise ValueError(
                f"The checkpoint's {key} has shape {array.shape}, but the config needs {needs}; "
                "check the widths of the config."
            )
        if key not in checked:
            checked.add(key)
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise ValueError(
                    f"The checkpoint's {key} holds a value that is not finite; use another one."
                )
        if row.third is not None:
            array = np.split(array, 3, axis=0)[row.third]
        flat[row.target] = np.array(to_ours(array, row.kind), dtype=np.float32, order="C")
    report = LoadingReport(
        loaded={row.target: keys[row.source] for row in table},
        shapes={target: array.shape for target, array in flat.items()},
        ignored=ignored,
    )
    return traverse_util.unflatten_dict(flat, sep="/"), report


def state_dict_from_params(
    params: Mapping[str, Any], table: Sequence[Rename]
) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state_dict`.

    Args:
        params: nested dict of arrays.
        table: a row for each of them; the thirds of a stacked array in torch's order.

    Returns:
        name -> float32 array in C order.

    Raises:
        ValueError: `params` and the table do not describe the same arrays.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    if different := set(flat) ^ {row.target for row in table}:
        raise ValueError(
            f"The parameters and the config differ in {len(different)} arrays "
            f"({name_keys(different)}); pass the config that they were made with."
        )
    parts: dict[str, list[np.ndarray]] = {}
    for row in table:
        array = np.ascontiguousarray(to_torch(np.asarray(flat[row.target], np.float32), row.kind))
        parts.setdefault(row.source, []).append(array)
    return {name: np.concatenate(p) if len(p) > 1 else p[0] for name, p in parts.items()}
