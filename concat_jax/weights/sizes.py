"""What a config of Hugging Face or the arrays say of a network, read by tables of fields."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from concat_jax.weights.names.table import Naming, Shape

# Published files round pixel statistics to three digits or to float32.
_STATISTICS_TOLERANCE = 1e-3
# What a field of a config has to be, by the type of its default.
_KINDS = {int: "a whole number, 1 or more", float: "a number above 0", str: "a word"}
_KINDS[list] = "a list of whole numbers, 1 or more"
# The most layers of anything: tracing a network takes a time for each.
_MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """A section of a config.json.

    Attributes:
      fields: our field -> theirs, and what transformers assumes where it is absent.
      fixed: their field -> the value that our network is built for, which transformers assumes too.
      derived: our fields -> those among them that follow from the others, and that we do not have.
      may_be_none: their fields of which 0 is a number, too.
    """

    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda fields: {}
    may_be_none: Collection[str] = ()

    def read(self, content: Any, where: str) -> dict[str, Any]:
        """Our fields of a parsed section, which errors call `where`.

        Raises ValueError if a field is of another type, or asks for what our network does not do.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{where} is no JSON object")
        given = {field: _listed(value) for field, value in content.items() if value is not None}
        for field, needed in self.fixed.items():
            if (value := given.get(field, needed)) != needed:
                raise ValueError(
                    f"{where} has {field} {value!r}, which is not done here; it must be {needed!r}"
                )
        fields = {}
        for ours, (theirs, default) in self.fields.items():
            value = given.get(theirs, default)
            is_none = theirs in self.may_be_none and type(value) is int and value == 0
            fields[ours] = 0 if is_none else _as_kind(value, type(default))
            if fields[ours] is None:
                kind = _KINDS[type(default)]
                kind = kind.replace("1 or", "0 or") if theirs in self.may_be_none else kind
                raise ValueError(f"{where} has {theirs} {value!r}; it must be {kind}")
            counts_layers = re.search("layers|blocks|depths", theirs)
            if counts_layers and np.max(fields[ours]) > _MOST_LAYERS:
                raise ValueError(f"{where} has {theirs} {value!r}; at most {_MOST_LAYERS} are read")
        for ours, needed in self.derived(fields).items():
            if (value := fields.pop(ours)) != needed:
                raise ValueError(
                    f"{where} has {self.fields[ours][0]} {value!r}, which is not done here; by its "
                    f"other fields it must be {needed!r}"
                )
        return fields

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `read`; a field that is absent takes the default."""
        whole = {ours: fields.get(ours, default) for ours, (_, default) in self.fields.items()}
        whole |= self.derived(whole)
        content = {theirs: _listed(whole[ours]) for ours, (theirs, _) in self.fields.items()}
        return {**content, **self.fixed}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_kind(value: Any, kind: type) -> Any:
    """The value as a field of this type, None if it is none."""
    if kind is list:
        whole = [_as_kind(v, int) for v in value] if isinstance(value, list) else []
        return whole if whole and None not in whole else None
    if kind is int and isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]  # the sides of a square
    if isinstance(value, bool) or not isinstance(value, str if kind is str else int | float):
        return None
    if kind is int:
        return int(value) if value == value // 1 and value >= 1 else None
    return value if kind is str or value > 0 else None


def check_statistics(
    content: Mapping[str, Any], where: str, needed: Mapping[str, Sequence[float] | float]
) -> None:
    """Raise a ValueError where fields of a config are given and are not these pixel statistics."""
    for field, ours in needed.items():
        value = content.get(field)
        with contextlib.suppress(TypeError, ValueError):
            theirs = np.asarray(ours if value is None else value, np.float64)
            is_near = np.allclose(theirs, ours, 0, _STATISTICS_TOLERANCE)
            if is_near and theirs.shape == np.shape(ours):
                continue
        raise ValueError(
            f"{where} has {field} {value!r}, but pictures are normalised here with "
            f"{np.round(ours, 4).tolist()}"
        )


def read_sizes(
    sizes: Mapping[str, str], shapes: Mapping[str, Shape], naming: Naming | None = None
) -> dict[str, int]:
    """Sizes of a network by where arrays show them.

    `sizes` maps a field to our path with the array's axes, the wanted one called n, such as
    "query_position [n, _]"; or to a path with # in the place of a number, to count the layers.
    Raises ValueError if an array is missing or has other axes.
    """
    values = {}
    for field, place in sizes.items():
        path, _, axes = place.partition(" ")
        if "#" in path:
            layer = re.compile(re.escape(path).replace(r"\#", r"(\d+)") + "/")
            found = [int(match[1]) for name in shapes if (match := layer.match(name))]
            values[field] = 1 + max(found, default=-1)
            continue
        name = naming.theirs(path) if naming else path
        if path not in shapes:
            raise ValueError(f"it lacks {name}, which tells a size of the network; use a whole one")
        names = axes.strip("[]").split(", ")
        if len(shapes[path]) != len(names):
            raise ValueError(
                f"its {name} has shape {shapes[path]}, but {len(names)} axes are needed"
            )
        values[field] = shapes[path][names.index("n")]
    return values
