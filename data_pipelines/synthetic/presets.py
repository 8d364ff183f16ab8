"""Label spaces of the synthetic world as data: names, looks and the seen-unseen split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.synthetic import patterns

# Attributes of a class and the values that the renderer knows for each.
THING_TABLES = {
    "colour": patterns.THING_COLOURS,
    "texture": patterns.THING_TEXTURES,
    "shape": patterns.SHAPES,
}
STUFF_TABLES = {"colour": patterns.STUFF_COLOURS, "texture": patterns.STUFF_TEXTURES}


@dataclasses.dataclass(frozen=True)
class WorldClass:
    """One class: its name, and the attributes that every instance of it has.

    An attribute that is None is nuisance: drawn anew for each instance. Stuff has no shape. The
    name need not mention the attributes, so opaque names are a matter of data.
    """

    name: str
    is_seen: bool
    colour: str | None = None
    texture: str | None = None
    shape: str | None = None


@dataclasses.dataclass(frozen=True)
class WorldPreset:
    """A label space with its looks.

    Raises:
      ValueError: if a class has an attribute that the renderer does not know, or one side is empty.
    """

    name: str
    things: tuple[WorldClass, ...]
    stuff: tuple[WorldClass, ...]

    def __post_init__(self):
        for what, classes, tables in (
            ("thing", self.things, THING_TABLES),
            ("stuff", self.stuff, STUFF_TABLES),
        ):
            if not classes:
                raise ValueError(
                    f"The preset {self.name!r} has no {what} class; give at least one."
                )
            for entry, (attribute, table) in itertools.product(classes, tables.items()):
                value = getattr(entry, attribute)
                if value is not None:
                    check_choice(value, table, f"Class {entry.name!r}: no {what} {attribute}")

    @functools.cached_property
    def classes(self) -> tuple[WorldClass, ...]:
        """All K classes in vocabulary order: things, then stuff."""
        return self.things + self.stuff

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The label space; category ids are class index + 1."""
        return Vocabulary(
            names=tuple(entry.name for entry in self.classes),
            is_thing=tuple(k < len(self.things) for k in range(len(self.classes))),
            is_seen=tuple(entry.is_seen for entry in self.classes),
            category_ids=tuple(range(1, len(self.classes) + 1)),
        )


def _compose(
    template: str, axes: Mapping[str, Sequence[str]], unseen: Collection[tuple[str, ...]]
) -> tuple[WorldClass, ...]:
    """All combinations of the attributes in `axes`, named by `template`, all seen but `unseen`."""
    combinations = [dict(zip(axes, c, strict=True)) for c in itertools.product(*axes.values())]
    return tuple(
        WorldClass(template.format(**c), is_seen=tuple(c.values()) not in unseen, **c)
        for c in combinations
    )


# Unseen combinations lie on a diagonal: each attribute value is missing in at most two of its
# combinations, so seen classes show every value at least twice.
_GROUNDS = _compose(
    "{colour} {texture} ground",
    {"colour": tuple(patterns.STUFF_COLOURS), "texture": tuple(patterns.STUFF_TEXTURES)},
    unseen={("grey", "wavy"), ("mint", "brick"), ("peach", "speckled")},
)
_TEXTURED = _compose(
    "{colour} {texture} balloon",
    {"colour": tuple(patterns.THING_COLOURS), "texture": tuple(patterns.THING_TEXTURES)},
    unseen={
        ("red", "striped"),
        ("yellow", "checkered"),
        ("blue", "dotted"),
        ("purple", "plain"),
    },
)
# One invented word a class: nothing in the name of an unseen class points to seen ones.
_OPAQUE_THINGS = (
    *("blick", "dax", "fep", "gazzer", "hux", "jop", "kiv", "lorp"),
    *("mib", "noog", "pabe", "quim", "rilk", "sarn", "toma", "vesk"),
)
_OPAQUE_STUFF = (
    *("wug", "yorn", "zelt", "brosk", "cavv", "drem"),
    *("flun", "glip", "snave", "plonth", "tevel", "skiff"),
)


def _renamed(classes: Sequence[WorldClass], names: Sequence[str]) -> tuple[WorldClass, ...]:
    return tuple(
        dataclasses.replace(entry, name=name) for entry, name in zip(classes, names, strict=True)
    )


PRESETS: dict[str, WorldPreset] = {
    "texture": WorldPreset(name="texture", things=_TEXTURED, stuff=_GROUNDS),
    "opaque": WorldPreset(
        name="opaque",
        things=_renamed(_TEXTURED, _OPAQUE_THINGS),
        stuff=_renamed(_GROUNDS, _OPAQUE_STUFF),
    ),
    "shape": WorldPreset(
        name="shape",
        things=_compose(
            "{colour} {shape} balloon",
            {
                "colour": tuple(patterns.THING_COLOURS),
                "shape": ("round", "square", "triangle", "star", "heart"),
            },
            unseen={
                ("red", "star"),
                ("red", "triangle"),
                ("yellow", "round"),
                ("blue", "heart"),
                ("purple", "square"),
            },
        ),
        stuff=_GROUNDS,
    ),
}


def get_preset(preset: str | WorldPreset) -> WorldPreset:
    """Preset of a name; a `WorldPreset` passes through.

    Raises:
      ValueError: if the name is unknown; the message gives the nearest one.
    """
    if isinstance(preset, WorldPreset):
        return preset
    check_choice(preset, PRESETS, "There is no preset")
    return PRESETS[preset]


def caption(names: Sequence[str]) -> str:
    """One caption for class names: "a red striped balloon and a grey wavy ground".

    Raises:
      ValueError: if `names` is empty.
    """
    if not names:
        raise ValueError("A caption needs at least one class name; got none.")
    return " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
