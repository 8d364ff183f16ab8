"""Label spaces of the synthetic world as data: names, looks and the seen-unseen split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.synthetic import patterns
from data_pipelines.synthetic.attributes import (
    STUFF_ATTRIBUTES,
    THING_ATTRIBUTES,
    AttributeClass,
    attribute_classes,
)
from data_pipelines.synthetic.render import Look

# Attributes of a class and the values that the renderer knows for each.
THING_TABLES = {
    "colour": patterns.THING_COLOURS,
    "texture": patterns.THING_TEXTURES,
    "shape": patterns.SHAPES,
}
STUFF_TABLES = {"colour": patterns.STUFF_COLOURS, "texture": patterns.STUFF_TEXTURES}


@dataclasses.dataclass(frozen=True)
class WorldClass:
    """One class: its name, and the attributes, keys of the tables, that all its instances have.

    An attribute that is None is nuisance: drawn anew for each instance. Stuff has no shape. The
    name need not mention the attributes, so opaque names are a matter of data.
    """

    name: str
    is_seen: bool
    colour: str | None = None
    texture: str | None = None
    shape: str | None = None

    def look(self, rng: np.random.Generator, is_thing: bool) -> Look:
        """One instance, with its nuisance filled in at random."""
        tables = THING_TABLES if is_thing else STUFF_TABLES
        drawn = {
            attribute: table[getattr(self, attribute) or tuple(table)[rng.integers(len(table))]]
            for attribute, table in tables.items()
        }
        return Look(**drawn) if is_thing else Look(**drawn, turn=(-0.45, 0.45))


@dataclasses.dataclass(frozen=True)
class WorldPreset:
    """A label space with its looks.

    Attributes:
      num_things: least and most of a scene.
      radius: least and greatest of a thing, in pixels of the reference scene.
    """

    name: str
    things: tuple[WorldClass | AttributeClass, ...]
    stuff: tuple[WorldClass | AttributeClass, ...]
    num_things: tuple[int, int] = (2, 5)
    radius: tuple[float, float] = (8.0, 15.0)

    def leaving_out(self, every: int) -> WorldPreset:
        """The world of its seen classes, with every `every`-th thing and ground of them unseen.

        What is chosen in it has seen none that is unseen here.
        """

        def split(classes: Sequence[WorldClass]) -> tuple[WorldClass, ...]:
            seen = enumerate(entry for entry in classes if entry.is_seen)
            return tuple(dataclasses.replace(c, is_seen=k % every > 0) for k, c in seen)

        return dataclasses.replace(self, things=split(self.things), stuff=split(self.stuff))

    @functools.cached_property
    def classes(self) -> tuple[WorldClass | AttributeClass, ...]:
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
    looks = ((c, dict(zip(axes, c, strict=True))) for c in itertools.product(*axes.values()))
    return tuple(WorldClass(template.format(**look), c not in unseen, **look) for c, look in looks)


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
    unseen={("red", "striped"), ("yellow", "checkered"), ("blue", "dotted"), ("purple", "plain")},
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
    pairs = zip(classes, names, strict=True)
    return tuple(dataclasses.replace(entry, name=name) for entry, name in pairs)


def _attributes(
    name: str,
    *,
    unseen: tuple[int, int] = (20, 8),
    draw: int = 0,
    opaque: bool = False,
    beyond: bool = False,
) -> WorldPreset:
    """64 things and 24 grounds of continuous attributes; `unseen` of either are unseen.

    Things are fewer and larger than elsewhere: their stripes are to be read.
    """
    options = dict(draw=draw, opaque=opaque, beyond=beyond)
    things, stuff = unseen
    return WorldPreset(
        name,
        attribute_classes(64, things, THING_ATTRIBUTES, "egg", **options),
        attribute_classes(24, stuff, STUFF_ATTRIBUTES, "ground", **options),
        num_things=(1, 3),
        radius=(10.0, 17.0),
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
    "attributes": _attributes("attributes"),
    # Other points, and other ones of them unseen: what holds in both is not of one choice of names.
    "attributes_redrawn": _attributes("attributes_redrawn", draw=1),
    "attributes_opaque": _attributes("attributes_opaque", opaque=True),
    "attributes_few": _attributes("attributes_few", unseen=(48, 14)),
    "attributes_beyond": _attributes("attributes_beyond", beyond=True),
}
