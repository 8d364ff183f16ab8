"""Classes in a space of continuous attributes, whose instances vary: a world that is hard to name.

In a grid of colours and textures every value of an unseen class is shown by seen ones, and naming
is solved. Here a class is a point of a cube (hue, stripes, their angle, aspect) and its instances
scatter about it, so that what a name looks like is not pinned down by the names around it. Light,
contrast, place and size are nuisance.
"""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from data_pipelines.synthetic import patterns
from data_pipelines.synthetic.render import Look

# An instance's deviation from its class, in units of the attribute's range. Neighbours among the 64
# things are 0.3 apart at least, so two in a hundred instances lie nearer to another name.
DEVIATION = 0.06
# Words of each attribute, from its low end to its high one; hue and angle are circles.
_WORDS = {
    "hue": (
        *("red", "orange", "amber", "lime", "green", "jade"),
        *("cyan", "azure", "blue", "violet", "magenta", "pink"),
    ),
    "stripes": ("broad", "wide", "even", "narrow", "fine"),
    "angle": ("upright", "leaning", "sloping", "level", "tilted", "slanted"),
    "aspect": ("tall", "slim", "plump", "flat"),
}
_IS_CIRCLE = {"hue": True, "stripes": False, "angle": True, "aspect": False}
THING_ATTRIBUTES = ("hue", "stripes", "angle", "aspect")
STUFF_ATTRIBUTES = ("hue", "stripes", "angle")
# Periods in pixels of the reference scene at the two ends of "stripes".
_PERIODS = (14.0, 3.6)


@dataclasses.dataclass(frozen=True)
class AttributeClass:
    """A class whose instances scatter about `prototype`, values in [0, 1] of its attributes."""

    name: str
    is_seen: bool
    prototype: tuple[float, ...]

    def look(self, rng: np.random.Generator, is_thing: bool) -> Look:
        attributes = THING_ATTRIBUTES if is_thing else STUFF_ATTRIBUTES
        values = np.add(self.prototype, DEVIATION * rng.standard_normal(len(self.prototype)))
        drawn = {
            name: float(value % 1 if _IS_CIRCLE[name] else np.clip(value, 0, 1))
            for name, value in zip(attributes, values, strict=True)
        }
        low, high = _PERIODS
        wave = 2 * np.pi / (low * (high / low) ** drawn["stripes"])
        across = np.pi * drawn["angle"]
        kx, ky = wave * float(np.cos(across)), wave * float(np.sin(across))
        light, contrast = rng.random(2).tolist()
        if not is_thing:  # pastel and of low contrast, so that things stand out
            depth = 0.06 + 0.06 * contrast

            def tone(u, v, rng):
                return 1.0 - depth + depth * np.sin(kx * u + ky * v)

            colour = colorsys.hsv_to_rgb(drawn["hue"], 0.26, 0.84 + 0.14 * light)
            return Look(colour, tone, turn=(-0.1, 0.1))

        depth = 0.3 + 0.5 * contrast

        def share(u, v):
            return depth * np.clip(0.5 + 1.2 * np.sin(kx * u + ky * v), 0.0, 1.0)

        stretch = float(np.exp(0.45 * (drawn["aspect"] - 0.5)))

        def egg(x, y):
            return patterns.SHAPES["round"](x / stretch, y * stretch)

        colour = colorsys.hsv_to_rgb(drawn["hue"], 0.78, 0.55 + 0.4 * light)
        return Look(colour, share, egg, turn=(-0.2, 0.2))


def spread_points(rng: np.random.Generator, count: int, is_circle: Sequence[bool]) -> np.ndarray:
    """Points [count, A] in the unit cube that keep their distance (best of many candidates)."""
    circle = np.asarray(is_circle)
    points = [rng.random(len(circle))]
    for _ in range(count - 1):
        candidates = rng.random((200, len(circle)))
        apart = np.abs(candidates[:, None] - np.array(points))
        # A circle's diameter is half its length: to be as far apart takes more of it.
        apart = np.where(circle, np.minimum(apart, 1 - apart) * 1.4, apart)
        points.append(candidates[(apart**2).sum(-1).min(1).argmax()])
    return np.array(points)


def _word(attribute: str, value: float) -> str:
    words = _WORDS[attribute]
    place = value * len(words) + (0.5 if _IS_CIRCLE[attribute] else 0.0)
    return words[int(place) % len(words)]


def _invented(count: int) -> tuple[str, ...]:
    """Words that mean nothing, all different."""
    syllables = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pe", "ra", "su", "ti", "vo", "we")
    pairs = itertools.product(syllables, repeat=2)
    return tuple("".join(pair) + "n" for pair in itertools.islice(pairs, count))


def attribute_classes(
    count: int,
    unseen: int,
    attributes: Sequence[str],
    noun: str,
    *,
    draw: int,
    opaque: bool,
    beyond: bool,
) -> tuple[AttributeClass, ...]:
    """Classes spread over the cube of their attributes, `unseen` of them unseen.

    Args:
      noun: of a name, behind a word for each attribute; `opaque` invents a word instead.
      draw: which draw of the points and of the unseen ones.
      beyond: unseen are those with the finest stripes, which no seen class has, rather than any.
    """
    rng = np.random.default_rng([len(attributes), draw])
    points = spread_points(rng, count, [_IS_CIRCLE[a] for a in attributes])
    order = np.argsort(-points[:, 1]) if beyond else rng.permutation(count)
    hidden = set(order[:unseen].tolist())
    described = [
        " ".join([*(_word(a, v) for a, v in zip(attributes, point, strict=True)), noun])
        for point in points
    ]
    # Things and stuff of one preset take different words.
    invented = _invented(len(attributes) * count)[-count:]
    names = invented if opaque else described
    return tuple(
        AttributeClass(name, k not in hidden, tuple(point.tolist()))
        for k, (name, point) in enumerate(zip(names, points, strict=True))
    )
