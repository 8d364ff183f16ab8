"""Colours, shapes and textures of the synthetic world as functions of coordinates.

All lengths are pixels of the reference scene of 64 x 64. Edges are about one pixel wide there, so
one evaluation a pixel shows no stair steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Things are saturated and grounds pastel, so that a thing stands out on every ground.
THING_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.16, 0.17),
    "yellow": (0.97, 0.72, 0.04),
    "blue": (0.10, 0.42, 0.86),
    "purple": (0.56, 0.20, 0.70),
}
STUFF_COLOURS: dict[str, tuple[float, float, float]] = {
    "grey": (0.74, 0.76, 0.79),
    "mint": (0.66, 0.87, 0.74),
    "peach": (0.97, 0.80, 0.66),
}
# Second tone of every textured thing; the same for all so that it tells nothing of the class.
CREAM = np.array([1.0, 0.98, 0.93], np.float32)

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


# Shapes: signed distances on unit coordinates, negative inside, reaching about radius 1.


def _folded_polygon(points: int, inner: float, rounding: float) -> Field:
    """Star of `points` tips; `inner` is the radius between tips (cos(pi / n) gives a polygon)."""
    tip = 1.0 - rounding
    angle = np.pi / points
    edge_x = inner * tip * float(np.cos(angle)) - tip
    edge_y = inner * tip * float(np.sin(angle))
    length2 = edge_x**2 + edge_y**2

    def distance(x, y):
        # All wedges between a tip and its neighbouring dent are mirror images: fold onto one.
        theta = np.arctan2(y, x)
        theta = np.abs(theta - 2 * angle * np.round(theta / (2 * angle)))
        radius = np.hypot(x, y)
        px = radius * np.cos(theta) - tip
        py = radius * np.sin(theta)
        along = np.clip((px * edge_x + py * edge_y) / length2, 0.0, 1.0)
        outside = np.sign(edge_y * px - edge_x * py)
        return outside * np.hypot(px - along * edge_x, py - along * edge_y) - rounding

    return distance


def _disc(x, y):
    return np.hypot(x, y) - 0.92


def _heart(x, y):
    # A square standing on a corner with a disc on each of its two upper sides.
    side = 0.56
    x = np.abs(x)
    y = y + 0.36 * side  # the circle about the heart is centred
    square = np.maximum(x + y, np.abs(x - y)) * np.float32(0.5**0.5) - side
    disc = np.hypot(x - side * 0.5**0.5, y - side * 0.5**0.5) - side
    return np.minimum(square, disc)


def _diamond(x, y):
    short, long = 0.74, 1.0
    norm = float(np.hypot(short, long))
    return (np.abs(x) * (long / norm) + np.abs(y) * (short / norm)) - short * long / norm


def _flower(x, y):
    # Not a true distance; the factor makes the gradient about 1 on the outline.
    return (np.hypot(x, y) - 0.82 - 0.13 * np.cos(6 * np.arctan2(y, x))) * 0.86


SHAPES: dict[str, Field] = {
    "round": _disc,
    "square": _folded_polygon(4, float(np.cos(np.pi / 4)), 0.12),
    "triangle": _folded_polygon(3, 0.5, 0.12),
    "star": _folded_polygon(5, 0.52, 0.05),
    "heart": _heart,
    "diamond": _diamond,
    "flower": _flower,
}

# Thing textures: share of the second tone in [0, 1] at object coordinates in pixels.


def _hard(wave: np.ndarray, steepness: float) -> np.ndarray:
    """Square wave with edges about one pixel wide."""
    return np.clip(wave * steepness + 0.5, 0.0, 1.0)


def _plain(u, v):
    return np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)


def _striped(u, v, period: float = 5.6):
    return _hard(np.sin(u * (2 * np.pi / period)), 1.2)


def _checkered(u, v, period: float = 6.4):
    k = 2 * np.pi / period
    return _hard(np.sin(u * k) * np.sin(v * k), 2.0)


def _dotted(u, v, period: float = 5.5):
    k = 2 * np.pi / period
    return _hard(np.cos(u * k) + np.cos(v * k) - 0.7, 0.9)


THING_TEXTURES: dict[str, Field] = {
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
}

# Stuff textures: brightness around 1 at ground coordinates in pixels. Low contrast on purpose.


def _smooth(u, v, rng):
    return np.ones(np.broadcast_shapes(u.shape, v.shape), np.float32)


def _wavy(u, v, rng, period: float = 7.0):
    crest = v + 1.5 * np.sin(u * (2 * np.pi / 13.0))
    return 0.96 + 0.12 * np.sin(crest * (2 * np.pi / period))


def _brick(u, v, rng, width: float = 10.0, height: float = 6.0):
    row = np.floor(v / height)
    across = np.abs((u / width + 0.5 * row) % 1.0 - 0.5) * width
    up = np.abs(v / height - row - 0.5) * height
    joint = np.maximum(across - (width / 2 - 1.1), up - (height / 2 - 1.1))
    return 1.02 - 0.24 * np.clip(joint, 0.0, 1.0)


def _speckled(u, v, rng, cell: float = 3.4):
    # One grain a cell, moved at random; the table of 16 x 16 cells repeats every 54 pixels.
    grains = rng.random((3, 256), dtype=np.float32)
    cu, cv = np.floor(u / cell), np.floor(v / cell)
    index = (cu.astype(np.int32) & 15) * 16 + (cv.astype(np.int32) & 15)
    gu, gv, size = grains.take(index, axis=1)
    # Grains are kept off the cell's border because a pixel asks its own cell only.
    distance = np.hypot(u / cell - cu - 0.2 - 0.6 * gu, v / cell - cv - 0.2 - 0.6 * gv) * cell
    return 1.03 - 0.30 * np.clip(0.5 + 1.1 * size - distance, 0.0, 1.0)


STUFF_TEXTURES: dict[str, Callable] = {
    "smooth": _smooth,
    "wavy": _wavy,
    "brick": _brick,
    "speckled": _speckled,
}
