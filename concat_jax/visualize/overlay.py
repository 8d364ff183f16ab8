"""Panoptic maps as pictures, with class names.

Text is set in Pillow's built-in font, or where that lacks its letters in the one that matplotlib
brings, so pictures look the same on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from concat_jax.core.arrays import Table, table_rows

Colour = tuple[int, int, int]

UNSEEN_MARK = "*"

# Hues a golden angle apart: neighbouring class indices differ, and no count of classes is assumed.
_GOLDEN_TURN = 0.618034
# Lightness and hue steps of the instances of one class, small enough to stay the class's colour.
_INSTANCE_STEPS = ((0.0, 0.0), (-0.11, 0.015), (0.08, -0.02), (-0.06, -0.035), (0.13, 0.03))
_VOID_DARK, _VOID_LIGHT = 26, 58
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 30), (105, 105, 115)


def oklch_to_rgb(lightness: float, chroma: float, hue: float) -> Colour:
    """OKLCH (hue in turns) to sRGB, clipped; equal lightness looks equally bright at every hue.

    Matrices: Ottosson, "A perceptual color space for image processing" (2020).
    """
    a, b = chroma * math.cos(math.tau * hue), chroma * math.sin(math.tau * hue)
    cone = np.array(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear @ cone**3, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = np.round(255 * encoded).astype(int).tolist()
    return red, green, blue


def segment_colour(label: int, is_thing: bool, instance: int = 0) -> Colour:
    """(red, green, blue), the same for a class in every picture, a shade apart for instances."""
    lighter, turn = _INSTANCE_STEPS[instance % len(_INSTANCE_STEPS)]
    hue = label * _GOLDEN_TURN + 0.08 + turn
    # Hues come close again after 13, 21, 34 and 55 classes, none a multiple of these four levels.
    lightness = (0.74 if is_thing else 0.62) + (0.0, -0.09, 0.05, -0.04)[label % 4] + lighter
    return oklch_to_rgb(lightness, 0.17 if is_thing else 0.085, hue)


@functools.cache
def _font(size: int, is_ascii: bool) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    if is_ascii:
        return ImageFont.load_default(size)
    import matplotlib

    # No letters of Chinese, Japanese and Korean; at this size it is as tall.
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), 0.95 * size)


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width of the text and height of a line of the font (the same for every text)."""
    _, top, _, bottom = _font(size, True).getbbox("Ag")
    return math.ceil(_font(size, text.isascii()).getlength(text)), math.ceil(bottom - top)


def draw_text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, fill) -> None:
    """Text whose line box, not its baseline, starts at `at`."""
    font = _font(size, text.isascii())
    draw.text((at[0], at[1] - font.getbbox("Ag")[1]), text, font=font, fill=fill)


def _smooth_enlarge(compact: np.ndarray, scale: int, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """A map `scale` times as large whose outlines are curves, and how clear each pixel's id is.

    Ids are those of the strongest of the masks, blurred by `blur` pixels; [H, W] uint8 is by how
    much, 0 where two are equal.
    """
    height, width = compact.shape
    best, second = np.zeros((2, height * scale, width * scale), np.uint8)
    large = np.zeros(best.shape, compact.dtype)
    margin = math.ceil(4 * blur)  # beyond, a segment has no strength
    for row in range(int(compact.max()) + 1):
        inside = compact == row
        top, left, part = _surroundings(inside, (margin, margin))
        # Blurred before it is enlarged, or the stairs would stay.
        mask = Image.fromarray(255 * inside[part].astype(np.uint8))
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
        mask = mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.BILINEAR)
        strength = np.asarray(mask)
        # What is a pixel wide would be blurred away.
        if (most := int(strength.max())) < 255:
            strength = (strength * (255 / max(1, most))).astype(np.uint8)
        (rows, columns), (top, left) = strength.shape, (top * scale, left * scale)
        part = slice(top, top + rows), slice(left, left + columns)
        large[part][strength > best[part]] = row
        second[part] = np.maximum(second[part], np.minimum(best[part], strength))
        best[part] = np.maximum(best[part], strength)
    return large, best - second


def _line_strength(clear: np.ndarray, blur: float, width: float) -> np.ndarray:
    """[H, W, 1] float in 0..1: lines of a width where ids are not clear, see `_smooth_enlarge`.

    A straight border blurred by a Gaussian tells how far away it is, to a fraction of a pixel.
    """
    distances = np.linspace(0, 4 * blur, 100)
    known = [math.erf(distance / blur / math.sqrt(2)) for distance in distances]
    distance = np.interp(np.arange(256) / 255, known, distances)
    return np.clip(width / 2 + 0.5 - distance, 0, 1)[clear][..., None]


def default_scale(height: int, width: int, target: int = 320, longest: int = 1600) -> int:
    """Integer factor that brings the shorter side near `target`, so that names can be read.

    The longer side stays under `longest`, however thin the image is.
    """
    return max(1, min(round(target / min(height, width)), longest // max(height, width)))


def shrink(
    image: np.ndarray, segment_ids: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 and its id map [H, W], shrunk until no side exceeds `longest`.

    Colours are averaged, ids taken at the nearest pixel centre; small ones are left as they are.
    """
    height, width = segment_ids.shape
    factor = longest / max(height, width)
    if factor >= 1:
        return image, segment_ids
    height_to, width_to = max(1, round(height * factor)), max(1, round(width * factor))
    small = Image.fromarray(image).resize((width_to, height_to), Image.Resampling.BOX)
    rows = ((np.arange(height_to) + 0.5) * height / height_to).astype(int)
    columns = ((np.arange(width_to) + 0.5) * width / width_to).astype(int)
    return np.asarray(small), segment_ids[rows[:, None], columns[None]]


def enlarge(image: np.ndarray, scale: int) -> Image.Image:
    """[H, W, 3] uint8 to a PIL image `scale` times as large; pixels stay square as in the map."""
    height, width = image.shape[:2]
    size = width * scale, height * scale
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST)


def panoptic_overlay(
    image: np.ndarray,
    segment_ids: np.ndarray,
    labels: Table,
    names: Sequence[str],
    is_thing: Sequence[bool],
    *,
    is_seen: Sequence[bool] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Segments over the image: one colour a class, dark borders, names inside, void hatched.

    A segment that is too small for its name has a number, which a legend below the image explains;
    the picture is then so much higher.

    Args:
      image: [H, W, 3] uint8.
      segment_ids: [H, W] ints, 0 void.
      labels: class index of every id, as of `arrays.table_rows`.
      is_seen: names of unseen classes get a star and a yellow label. None marks nothing.
      scale: integer enlargement of the result; see `default_scale`.

    Raises ValueError if an id has no label.
    """
    scale = default_scale(*segment_ids.shape) if scale is None else scale
    ids, classes = table_rows(labels)
    class_of = dict(zip(ids.tolist(), classes.tolist(), strict=True))
    present, compact, areas = np.unique(segment_ids, return_inverse=True, return_counts=True)
    compact = compact.reshape(segment_ids.shape)
    unknown = [int(i) for i in present if i != 0 and int(i) not in class_of]
    if unknown:
        raise ValueError(f"The segment id {unknown[0]} has no label; list every id of the map.")

    palette = np.zeros((len(present), 3), np.float32)
    instances: dict[int, int] = {}
    for row, segment in enumerate(present.tolist()):
        if segment:
            label = class_of[segment]
            rank = instances[label] = instances.get(label, -1) + 1
            palette[row] = segment_colour(label, bool(is_thing[label]), rank)

    large = np.asarray(enlarge(image, scale)).astype(np.float32)
    width = 1 + max(1, min(large.shape[:2]) / 320)
    # At native size outlines must lose stairs of a pixel; enlarged, they keep what is small.
    blur = max(1.2, width / 4) if scale == 1 else 0.8
    drawn, clear = _smooth_enlarge(compact, scale, blur)
    compact = compact if scale == 1 else drawn
    void = (present == 0)[drawn]
    # Under the colour the image is kept as brightness only: its own hues would tint the palette.
    grey = large.mean(axis=-1, keepdims=True)
    blend = 0.6 * palette[drawn] + 0.4 * (0.75 * grey + 0.25 * large)
    rows, columns = np.mgrid[: compact.shape[0], : compact.shape[1]]
    hatch = np.where((rows + columns) % 10 < 3, _VOID_LIGHT, _VOID_DARK)[..., None]
    blend = np.where(void[..., None], hatch + 0.12 * grey, blend)
    strength = _line_strength(clear, blur * scale, width)
    blend = (1 - strength) * blend + strength * np.array([18, 18, 22])
    picture = Image.fromarray(np.clip(blend, 0, 255).astype(np.uint8))

    order = sorted((r for r in range(len(present)) if present[r]), key=lambda r: -areas[r])
    labels = []
    for row in order:
        label = class_of[int(present[row])]
        is_unseen = is_seen is not None and not is_seen[label]
        colour = tuple(int(c) for c in palette[row])
        labels.append(_Label(row, names[label] + UNSEEN_MARK * is_unseen, colour, is_unseen))
    small = _draw_labels(picture, compact, labels)
    return _with_legend(picture, small) if small else picture


@dataclasses.dataclass(frozen=True)
class _Label:
    row: int  # of the compact id map
    text: str
    colour: Colour
    is_unseen: bool


_LABEL_SIZES = (15, 13, 11)  # points tried from large to small; below 11 nothing can be read
# Shorter side up to which these sizes are right; letters of larger pictures grow with them, which
# are looked at as a whole.
_LABEL_SIDE = 640
_PADDING = (4, 3)


def _sizes(picture: Image.Image) -> list[int]:
    growth = max(1.0, min(picture.size) / _LABEL_SIDE)
    return [round(growth * size) for size in _LABEL_SIZES]


def _draw_labels(
    picture: Image.Image, compact: np.ndarray, labels: Sequence[_Label]
) -> dict[str, _Label]:
    """Names the segments, largest first; one whose name finds no room inside gets a number.

    Returns the names of these, in the order of their numbers 1, 2...
    """
    taken = np.zeros(compact.shape, bool)
    draw = ImageDraw.Draw(picture, "RGBA")
    sizes = _sizes(picture)
    numbered: list[_Label] = []

    def put(label: _Label, text: str, size: int, min_inside: float) -> bool:
        inside = compact == label.row
        if not inside.any():  # among others as small
            return False
        width, height = text_size(text, size)
        box = (width + 2 * _PADDING[0], height + 2 * _PADDING[1])
        # A label overhangs its segment by less than itself, so only this part matters.
        top, left, part = _surroundings(inside, box)
        corner = _place(inside[part], taken[part], box, min_inside)
        if corner is None:
            return False
        x, y = corner[0] + left, corner[1] + top
        _draw_tag(draw, (x, y), text, size, label)
        taken[max(y - 1, 0) : y + box[1] + 1, max(x - 1, 0) : x + box[0] + 1] = True
        return True

    for label in labels:
        # The smallest size may overhang its segment a little; the large ones must fit.
        shares = {size: 0.97 for size in sizes} | {sizes[-1]: 0.72}
        if not any(put(label, label.text, size, shares[size]) for size in shares):
            numbered.append(label)
    legend: dict[str, _Label] = {}
    for label in numbered:
        legend.setdefault(label.text, label)
        number = str(list(legend).index(label.text) + 1)
        any(put(label, number, sizes[-1], share) for share in (0.97, 0.5, 0.05, 0.0))
    return legend


def _draw_tag(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, label: _Label
) -> tuple[int, int]:
    """A name or number on its label's ground; returns its width and height."""
    width, height = (a + 2 * b for a, b in zip(text_size(text, size), _PADDING, strict=True))
    dark = tuple(int(0.3 * c) for c in label.colour)
    fill = (255, 226, 70, 235) if label.is_unseen else (*dark, 205)
    ink = INK if label.is_unseen else PAPER
    x, y = at
    draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 4, fill=fill)
    draw_text(draw, (x + _PADDING[0], y + _PADDING[1]), text, size, ink)
    return width, height


def _with_legend(picture: Image.Image, legend: Mapping[str, _Label]) -> Image.Image:
    """The picture above a line or more that say which name each number stands for."""
    size, gap = _sizes(picture)[-1], 8
    line = text_size("", size)[1] + 2 * _PADDING[1] + 4
    places, x, y = [], gap, gap // 2
    for number, name in enumerate(legend, start=1):
        width = text_size(str(number), size)[0] + text_size(name, size)[0] + 2 * _PADDING[0] + 6
        if x > gap and x + width > picture.width:
            x, y = gap, y + line
        places.append((x, y))
        x += width + 2 * gap
    whole = Image.new("RGB", (picture.width, picture.height + y + line + gap // 2), PAPER)
    whole.paste(picture)
    draw = ImageDraw.Draw(whole, "RGBA")
    for number, ((name, label), (x, y)) in enumerate(zip(legend.items(), places, strict=True), 1):
        at = x, y + picture.height
        width, _ = _draw_tag(draw, at, str(number), size, label)
        draw_text(draw, (x + width + 6, at[1] + _PADDING[1]), name, size, INK)
    return whole


def _surroundings(
    inside: np.ndarray, margin: tuple[int, int]
) -> tuple[int, int, tuple[slice, slice]]:
    """Top, left and slices of a mask's bounding box, widened by a margin (width, height)."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, left = max(0, int(rows[0]) - margin[1]), max(0, int(columns[0]) - margin[0])
    part = slice(top, int(rows[-1]) + margin[1] + 1), slice(left, int(columns[-1]) + margin[0] + 1)
    return top, left, part


def _place(
    inside: np.ndarray, taken: np.ndarray, box: tuple[int, int], min_inside: float
) -> tuple[int, int] | None:
    """Top left corner (x, y) of a free box that lies in the segment, near its centre of mass.

    Box sums come from a summed-area table, so every position is tried.
    """
    width, height = box
    if width > inside.shape[1] or height > inside.shape[0]:
        return None
    covered, blocked = _box_sums(inside, box), _box_sums(taken, box)
    free = (blocked == 0) & (covered >= min_inside * width * height)
    if not free.any():
        return None
    rows, columns = np.nonzero(inside)
    y, x = np.nonzero(free)
    offset = np.hypot(y + height / 2 - rows.mean(), x + width / 2 - columns.mean())
    # A box fully inside beats one nearer the centre; the distance settles the rest.
    best = np.argmin(offset / max(inside.shape) - 3.0 * covered[y, x] / (width * height))
    return int(x[best]), int(y[best])


def _box_sums(mask: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Number of True pixels in every box of (width, height); [H - height + 1, W - width + 1]."""
    width, height = box
    total = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    return (
        total[height:, width:]
        - total[:-height, width:]
        - total[height:, :-width]
        + total[:-height, :-width]
    )
