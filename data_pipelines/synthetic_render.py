"""Drawing of the synthetic world: shapes, textures, grounds and lighting as small numpy arrays.

Every edge is anti-aliased from a signed distance, so one evaluation a pixel is enough and ids stay
hard while colours blend. All lengths are pixels of the reference scene of 64 x 64 times `scale`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

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


@dataclasses.dataclass(frozen=True)
class Look:
    """How one region is painted: keys of the tables of this file; `shape` is None for stuff."""

    colour: str
    texture: str
    shape: str | None = None


@functools.lru_cache(maxsize=256)
def _pixel_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x [1, W] and y [H, 1], float32; shared, so read-only."""
    x = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    x.flags.writeable = y.flags.writeable = False
    return x, y


# ---------------------------------------------------------------------------------------------
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
    side = 0.62
    x = np.abs(x)
    y = y + 0.15 * side
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

# ---------------------------------------------------------------------------------------------
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

# ---------------------------------------------------------------------------------------------
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

# ---------------------------------------------------------------------------------------------
# Painting.


def _jittered(
    rng: np.random.Generator, colour: Sequence[float], hue: float, brightness: float
) -> np.ndarray:
    """Colour [3] float32, each channel moved by up to `hue` and all by up to `brightness`."""
    moves = 2.0 * rng.random(4, dtype=np.float32) - 1.0
    return np.asarray(colour, np.float32) * (1.0 + hue * moves[:3] + brightness * moves[3])


def light_direction(rng: np.random.Generator) -> tuple[float, float]:
    """Unit (x, y) towards the light; always from above, as in most photographs."""
    angle = rng.uniform(-0.8, 0.8)
    return float(np.sin(angle)), -float(np.cos(angle))


def ground_tone(
    rng: np.random.Generator, texture: str, height: int, width: int, scale: float
) -> np.ndarray:
    """Brightness map [H, W] float32 of one stuff texture with random phase and a slight turn.

    Args:
      rng: drawn from in a fixed order.
      texture: key of `STUFF_TEXTURES`.
      height, width: size in pixels.
      scale: pixels per pixel of the reference scene.
    """
    x, y = _pixel_grid(height, width)
    angle = rng.uniform(-0.45, 0.45)
    cos, sin = float(np.cos(angle)) / scale, float(np.sin(angle)) / scale
    u0, v0 = rng.uniform(0.0, 64.0, 2).tolist()
    u = x * cos + (y * sin + u0)
    v = y * cos - (x * sin - v0)
    return STUFF_TEXTURES[texture](u, v, rng)


def region_weights(
    rng: np.random.Generator, height: int, width: int, scale: float, count: int
) -> np.ndarray:
    """Soft membership [R, H, W] float32 of `count` regions, summing to 1; argmax is the owner.

    Half of the scenes are wavy bands (a landscape), half are curved Voronoi cells.
    """
    x, y = _pixel_grid(height, width)
    if count == 1:
        return np.ones((1, height, width), np.float32)
    phases = rng.uniform(0.0, 2 * np.pi, 2).tolist()
    lengths = (rng.uniform(28.0, 52.0, 2) * scale).tolist()
    bend = rng.uniform(2.0, 4.5) * scale
    wx = x + bend * np.sin(y * (2 * np.pi / lengths[0]) + phases[0])
    wy = y + bend * np.sin(x * (2 * np.pi / lengths[1]) + phases[1])
    if rng.random() < 0.5:
        angle = rng.uniform(-0.6, 0.6)
        along = (wy - height / 2) * float(np.cos(angle)) + (wx - width / 2) * float(np.sin(angle))
        cuts = (np.arange(1, count) + rng.uniform(-0.25, 0.25, count - 1)) / count - 0.5
        cuts = np.concatenate([[-9.0], cuts, [9.0]]).astype(np.float32) * height
        low, high = cuts[:-1, None, None], cuts[1:, None, None]
        field = np.maximum(low - along, along - high)
    else:
        sites = _spread_points(rng, count, tries=6)
        sx = (sites[:, 0] * width).astype(np.float32)[:, None, None]
        sy = (sites[:, 1] * height).astype(np.float32)[:, None, None]
        field = np.hypot(wx - sx, wy - sy)
    # Two fields cross with slope 2, so this exponent makes a boundary one to two pixels wide.
    weights = np.exp(2.0 * (field.min(axis=0) - field))
    return weights / weights.sum(axis=0)


def _spread_points(rng: np.random.Generator, count: int, tries: int) -> np.ndarray:
    """Points [count, 2] in the unit square, each the farthest from the others of `tries` draws."""
    candidates = rng.random((count, tries, 2))
    points = [candidates[0, 0]]
    for options in candidates[1:]:
        gaps = np.hypot(*(options[:, None] - np.stack(points)).transpose(2, 0, 1)).min(axis=1)
        points.append(options[gaps.argmax()])
    return np.stack(points)


def paint_ground(
    rng: np.random.Generator, looks: Sequence[Look], height: int, width: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Background of a picture.

    Args:
      rng: drawn from in a fixed order.
      looks: R stuff looks, one a region.
      height, width: size in pixels.
      scale: pixels per pixel of the reference scene.

    Returns:
      canvas [H, W, 3] float32 in about [0, 1] and owner [H, W] uint8, the index into `looks`.
    """
    weights = region_weights(rng, height, width, scale, len(looks))
    owner = weights.argmax(axis=0).astype(np.uint8)
    canvas = np.zeros((height, width, 3), np.float32)
    for weight, look in zip(weights, looks, strict=True):
        tone = ground_tone(rng, look.texture, height, width, scale)
        colour = _jittered(rng, STUFF_COLOURS[look.colour], 0.015, 0.05)
        canvas += (weight * tone)[..., None] * colour
    return canvas, owner


def _overlap(start: int, length: int, size: int) -> tuple[slice, slice]:
    """Slices of a canvas axis and of a window placed at `start`, where the two overlap."""
    low, high = max(start, 0), max(min(start + length, size), max(start, 0))
    return slice(low, high), slice(low - start, high - start)


def paint_thing(
    rng: np.random.Generator,
    canvas: np.ndarray,
    look: Look,
    *,
    centre: tuple[float, float],
    radius: float,
    scale: float,
    light: tuple[float, float],
) -> tuple[tuple[slice, slice], np.ndarray, int]:
    """Paints one thing with its cast shadow onto `canvas`, in place.

    Args:
      rng: drawn from in a fixed order.
      canvas: [H, W, 3] float32.
      look: colour, texture and shape.
      centre: (x, y) in pixels.
      radius: in pixels.
      scale: pixels per pixel of the reference scene; sets the texture's period.
      light: unit vector towards the light.

    Returns:
      The canvas window as (rows, columns), the hard mask [h, w] bool in it, and the area in pixels
      that the whole thing would have on an endless canvas.
    """
    height, width = canvas.shape[:2]
    reach = radius + 2.0
    left, top = int(np.floor(centre[0] - reach)), int(np.floor(centre[1] - reach))
    span = int(np.ceil(2 * reach)) + 1
    gx, gy = _pixel_grid(span, span)
    dx, dy = gx - (centre[0] - left), gy - (centre[1] - top)
    angle = rng.uniform(0.0, 2 * np.pi)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = SHAPES[look.shape](u / radius, v / radius) * radius
    inside = distance <= 0.0

    phase = rng.uniform(0.0, 6.0, 2).tolist()
    share = THING_TEXTURES[look.texture](u / scale + phase[0], v / scale + phase[1])
    colour = _jittered(rng, THING_COLOURS[look.colour], 0.06, 0.06)
    paint = colour + share[..., None] * (CREAM - colour)

    # Balloon shading: brighter towards the light, darker rim, one small glint.
    toward = (dx * light[0] + dy * light[1]) / radius
    rim = np.clip((distance + 1.6 * scale) / scale, 0.0, 1.0)
    paint *= ((0.95 + 0.16 * toward) * (1.0 - 0.38 * rim))[..., None]
    hx, hy = light[0] * 0.42 * radius, light[1] * 0.42 * radius
    glint = np.exp(((dx - hx) ** 2 + (dy - hy) ** 2) * (-1.0 / (0.03 * radius**2)))
    paint += (0.45 * glint)[..., None] * (1.0 - paint)

    drop = (round(-1.5 * light[0] * scale), round(-2.0 * light[1] * scale))
    shade = 1.0 - 0.30 * np.clip(0.5 - distance / (3.0 * scale), 0.0, 1.0)
    rows, window_rows = _overlap(top + drop[1], span, height)
    columns, window_columns = _overlap(left + drop[0], span, width)
    canvas[rows, columns] *= shade[window_rows, window_columns, None]

    rows, window_rows = _overlap(top, span, height)
    columns, window_columns = _overlap(left, span, width)
    cover = np.clip(0.5 - distance[window_rows, window_columns], 0.0, 1.0)[..., None]
    target = canvas[rows, columns]
    target += cover * (paint[window_rows, window_columns] - target)
    return (rows, columns), inside[window_rows, window_columns], int(np.count_nonzero(inside))


def finish(
    rng: np.random.Generator, canvas: np.ndarray, light: tuple[float, float], noise: float = 0.012
) -> np.ndarray:
    """Adds a slight fall-off of the light and pixel noise (standard deviation `noise`).

    Returns:
      [H, W, 3] uint8.
    """
    height, width = canvas.shape[:2]
    x, y = _pixel_grid(height, width)
    fall_off = (x / width - 0.5) * (0.12 * light[0]) + (y / height - 0.5) * (0.12 * light[1]) + 1.0
    canvas = canvas * fall_off[..., None]
    canvas += noise * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def paint_scene(
    rng: np.random.Generator,
    stuff: Sequence[Look],
    things: Sequence[Look],
    *,
    size: int,
    scale: float,
    radius: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A whole picture: a ground of regions and things in front of each other.

    Args:
      rng: drawn from in a fixed order.
      stuff: R looks of ground regions.
      things: T looks; later ones lie in front.
      size: height and width in pixels.
      scale: pixels per pixel of the reference scene.
      radius: range of thing radii in pixels.

    Returns:
      image [size, size, 3] uint8; owner [size, size] uint8, 1..R stuff then R+1..R+T things; and
      full_areas [T] int64, each thing's area in pixels with nothing in front of it.
    """
    light = light_direction(rng)
    canvas, owner = paint_ground(rng, stuff, size, size, scale)
    owner += 1
    full_areas = np.zeros(len(things), np.int64)
    # Two tries a centre: things keep some distance, yet about one in three overlaps another.
    centres = _spread_points(rng, len(things), tries=2) if things else ()
    for number, (look, centre) in enumerate(zip(things, centres, strict=True)):
        r = rng.uniform(*radius)
        # The outer tenth of the scene lets things stick out of the picture, as in photographs.
        margin = 0.55 * r
        x, y = (margin + centre * (size - 2 * margin)).tolist()
        window, mask, full_areas[number] = paint_thing(
            rng, canvas, look, centre=(x, y), radius=r, scale=scale, light=light
        )
        owner[window][mask] = len(stuff) + 1 + number
    return finish(rng, canvas, light), owner, full_areas
