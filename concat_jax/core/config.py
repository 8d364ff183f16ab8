"""Config sections become dataclasses; a key that does not exist fails with the nearest name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")

# Sections whose keys are fields of a dataclass or a network, which refuse what they do not have: a
# flag may set a field that the config file leaves at its default.
_OPEN = re.compile(
    r"(train\.\w+(\.\w+)?|model\.\w+(\.backbone)?|loss|crops|bank|mesh|eval\.settings|profile)\.\w+"
)
# What a value must be, by the annotation of its field; others are not checked.
_KINDS = {
    "bool": (bool, "True or False"),
    "int": (numbers.Integral, "a whole number"),
    "Count": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "Positive": (numbers.Real, "a number"),
    "Share": (numbers.Real, "a number"),
    "str": (str, "text"),
}


class Count(int):
    """Annotates a field that may be 0; an int may only where that is its default."""


class Positive(float):
    """Annotates a number above 0."""


class Share(float):
    """Annotates a number from 0 to 1."""


def is_open(path: str) -> bool:
    """Whether a dotted key may be added to a config: whoever reads its section knows its fields."""
    return _OPEN.fullmatch(path) is not None


def build(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """A dataclass from a config section.

    Args:
      cls: a dataclass; fields with a default may be absent.
      section: field name to value; lists become tuples.
      where: how to call the section in an error, e.g. "config.loss".

    Raises:
      ValueError: for an unknown or a missing key, a value of another type, or what the class
        itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in section.items():
        check_choice(key, fields, f"{where} has no key")
        check_type(value, fields[key].type, f"{where}.{key}", fields[key].default)
    for name, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and name not in section:
            raise ValueError(f"{where} lacks the key {name!r}.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    try:
        return cls(**values)
    except ValueError as error:
        if not where.startswith("config.") or where in str(error):
            raise
        raise ValueError(f"In {where}: {error}") from error


def check_type(value: Any, annotation: Any, what: str, default: Any) -> None:
    """Raise a ValueError unless a value is of the type that its field is annotated with.

    True is no number, and a flag's "no" is not False. Numbers are finite, none is negative, and an
    int is not 0 where the `default` is not, nor where there is none. A tuple of `Positive` or
    `Share` has at least one.
    """
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = re.sub(r"\b(\w+\.)+", "", name)  # of a module
    if value is None and name.endswith(" | None"):
        return
    name = name.removesuffix(" | None")
    if of_tuple := re.fullmatch(r"tuple\[(Positive|Share), \.\.\.\]", name):
        if not isinstance(value, tuple | list) or not value:
            raise ValueError(f"{what} is {value!r} and must be a tuple, as {default!r}.")
        for item in value:
            check_type(item, of_tuple[1], f"{what} holds what", default)
        return
    kind, words = _KINDS.get(name, (object, ""))
    is_bool = isinstance(value, bool)
    if not isinstance(value, kind) or (is_bool and kind not in (bool, object)):
        raise ValueError(f"{what} is {value!r} and must be {words}.")
    if kind not in (numbers.Integral, numbers.Real):
        return
    least = int(name == "int" and default != 0)
    for holds, bound in (
        (math.isfinite(value), "finite"),
        (name != "Share" or 0 <= value <= 1, "in 0..1"),
        (name != "Positive" or value > 0, "above 0"),
        (value >= least, f"at least {least}"),
    ):
        if not holds:
            raise ValueError(f"{what} is {value} and must be {bound}.")


def check_fields(section: Mapping[str, Any], module: type, what: str, *decided: str) -> None:
    """Raise a ValueError for a key that is no field of a linen module, or a value it cannot be.

    Args:
      section: of a config.
      module: its class.
      what: as "config.model.projector has no key".
      decided: fields that are decided elsewhere.
    """
    own = {"parent", "name"}  # linen's
    fields = {f.name: f for f in dataclasses.fields(module) if f.name not in (*own, *decided)}
    for key, value in section.items():
        check_choice(key, sorted(fields), what)
        field = fields[key]
        check_type(value, field.type, f"{module.__name__}.{key}", field.default)


def check_choice(value: str, valid: Collection[str], what: str) -> None:
    """Raise a ValueError, with the nearest name or all if none is near, unless `value` is one."""
    if value not in valid:
        folded = {name.casefold().lstrip("-"): name for name in valid}
        given = str(value).casefold().lstrip("-")
        close = [name for name in folded if given and name.startswith(given)]
        close = close or difflib.get_close_matches(given, folded, 1, cutoff=0.6)
        others = f"; there are {', '.join(filter(None, valid))}." if folded else "."
        hint = f"; did you mean {folded[close[0]]!r}?" if close else others
        raise ValueError(f"{what} {value!r}{hint}")


def with_arguments(
    config: ml_collections.ConfigDict,
    arg: str,
    **variants: Callable[[ml_collections.ConfigDict], None],
) -> ml_collections.ConfigDict:
    """A recipe, changed in place by the variants that `--config=file.py:flag,flag` names.

    `arg` is what follows the colon; variants apply in their own order. Raises ValueError for a flag
    that is none of them, naming the nearest.
    """
    flags = {flag for flag in arg.split(",") if flag}
    for flag in sorted(flags):
        check_choice(flag, variants, "The config has no argument")
    for name, change in variants.items():
        if name in flags:
            change(config)
    return config


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Dotted key to value, lists as tuples: to compare two configs."""

    def walk(prefix, section):
        for key, value in section.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) or isinstance(value, ml_collections.ConfigDict):
                yield from walk(name + ".", value)
            else:
                yield name, tuple(value) if isinstance(value, list) else value

    return dict(walk("", config))


def unflatten(keys: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config that `flat` made dotted keys of, as JSON gives them back; empty sections lack."""
    config: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, name = key.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return ml_collections.ConfigDict(config)
