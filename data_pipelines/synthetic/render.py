"""Painting of the synthetic world: grounds, things with light and shadow, whole scenes.

Every edge is anti-aliased from a signed distance, so one evaluation a pixel is enough and ids stay
hard while colours blend. `scale` is the number of pixels per pixel of the 64 x 64 reference scene.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.synthetic import patterns

# Standard deviation of a picture's pixel noise.
NOISE = 0.012


@dataclasses.dataclass(frozen=True)
class Look:
    """How one region is painted.

    Attributes:
      colour: red, green and blue in [0, 1].
      texture: of a thing (u, v) -> share of the second tone, of stuff (u, v, rng) -> brightness.
      shape: a signed distance of `patterns`, None for stuff.
      turn: least and greatest angle in radians that it is turned by.
    """

    colour: Sequence[float]
    texture: Callable[..., np.ndarray]
    shape: patterns.Field | None = None
    turn: tuple[float, float] = (0.0, 2 * np.pi)


@functools.lru_cache(maxsize=256)
def _pixel_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x [1, W] and y [H, 1], float32; shared, so read-only."""
    x = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    x.flags.writeable = y.flags.writeable = False
    return x, y


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
    rng: np.random.Generator, look: Look, height: int, width: int, scale: float
) -> np.ndarray:
    """Brightness [H, W] float32 of a stuff texture with random phase and a slight turn.

    `scale` is pixels per pixel of the reference scene, here and below.
    """
    x, y = _pixel_grid(height, width)
    angle = rng.uniform(*look.turn)
    cos, sin = float(np.cos(angle)) / scale, float(np.sin(angle)) / scale
    u0, v0 = rng.uniform(0.0, 64.0, 2).tolist()
    u = x * cos + (y * sin + u0)
    v = y * cos - (x * sin - v0)
    return look.texture(u, v, rng)


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
    """Background: canvas [H, W, 3] float32 in about [0, 1], owner [H, W] uint8 into `looks`."""
    weights = region_weights(rng, height, width, scale, len(looks))
    owner = weights.argmax(axis=0).astype(np.uint8)
    canvas = np.zeros((height, width, 3), np.float32)
    for weight, look in zip(weights, looks, strict=True):
        tone = ground_tone(rng, look, height, width, scale)
        colour = _jittered(rng, look.colour, 0.015, 0.05)
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
    """Paints one thing with its cast shadow onto `canvas` [H, W, 3] float32, in place.

    `centre` (x, y) and `radius` are in pixels. Returns the canvas window as (rows, columns), the
    hard mask [h, w] bool in it, and the area that the whole thing would have on an endless canvas.
    """
    height, width = canvas.shape[:2]
    reach = radius + 2.0
    left, top = int(np.floor(centre[0] - reach)), int(np.floor(centre[1] - reach))
    span = int(np.ceil(2 * reach)) + 1
    gx, gy = _pixel_grid(span, span)
    dx, dy = gx - (centre[0] - left), gy - (centre[1] - top)
    angle = rng.uniform(*look.turn)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = look.shape(u / radius, v / radius) * radius
    inside = distance <= 0.0

    phase = rng.uniform(0.0, 6.0, 2).tolist()
    share = look.texture(u / scale + phase[0], v / scale + phase[1])
    colour = _jittered(rng, look.colour, 0.06, 0.06)
    paint = colour + share[..., None] * (patterns.CREAM - colour)

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


def finish(rng: np.random.Generator, canvas: np.ndarray, light: tuple[float, float]) -> np.ndarray:
    """[H, W, 3] uint8 of a canvas, with a slight fall-off of the light and pixel noise."""
    height, width = canvas.shape[:2]
    x, y = _pixel_grid(height, width)
    fall_off = (x / width - 0.5) * (0.12 * light[0]) + (y / height - 0.5) * (0.12 * light[1]) + 1.0
    canvas = canvas * fall_off[..., None]
    canvas += NOISE * rng.standard_normal(canvas.shape, dtype=np.float32)
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
    """A whole picture: a ground of regions and things in front of each other, of a `radius`.

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
        r = rng.uniform(radius[0] * scale, radius[1] * scale)
        # The outer tenth of the scene lets things stick out of the picture, as in photographs.
        margin = 0.55 * r
        x, y = (margin + centre * (size - 2 * margin)).tolist()
        window, mask, full_areas[number] = paint_thing(
            rng, canvas, look, centre=(x, y), radius=r, scale=scale, light=light
        )
        owner[window][mask] = len(stuff) + 1 + number
    return finish(rng, canvas, light), owner, full_areas
