"""What charts are drawn with: text, colours, axes, wrapped titles. Pillow only, as `pictures`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from concat_jax.visualize import overlay as pictures

Colour = pictures.Colour

PAPER, INK, FAINT = pictures.PAPER, pictures.INK, pictures.FAINT
GRID = (228, 228, 232)

_SMOOTHING = 3


def text_width(text: str, size: int) -> int:
    """Pixels that the text takes."""
    return pictures.text_size(text, size)[0]


def line_height(size: int) -> int:
    """Pixels of a line of text, the same for every text."""
    return pictures.text_size("", size)[1]


def line_step(size: int) -> int:
    """Pixels from a line of text to the next."""
    return line_height(size) + size // 3


class Canvas:
    """White paper for shapes and text; coordinates are pixels of the finished picture.

    Shapes are drawn several times as large and shrunk, which smooths them; text is set after that,
    in the order of the calls, over all shapes.
    """

    def __init__(self, width: int, height: int):
        """A picture of width x height pixels."""
        self.size = (width, height)
        self._large = Image.new("RGB", (width * _SMOOTHING, height * _SMOOTHING), PAPER)
        self._draw = ImageDraw.Draw(self._large)
        self._texts: list[tuple[tuple[int, int], str, int, Colour]] = []

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """A filled rectangle between two corners in any order, at least a third of a pixel wide."""
        (left, right), (top, bottom) = (
            (round(min(ends) * _SMOOTHING), round(max(ends) * _SMOOTHING) - 1)
            for ends in ((x0, x1), (y0, y1))
        )
        # Pillow draws the last pixel, too, and refuses a box that ends before it starts.
        self._draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill)

    def line(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, width: float) -> None:
        """A straight line."""
        ends = [round(value * _SMOOTHING) for value in (x0, y0, x1, y1)]
        self._draw.line(ends, fill=fill, width=round(width * _SMOOTHING))

    def dot(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """A filled circle."""
        self._draw.ellipse(_box(x, y, radius), fill=fill)

    def ring(self, x: float, y: float, radius: float, fill: Colour, width: float) -> None:
        """A circle that shows what lies below."""
        self._draw.ellipse(_box(x, y, radius), outline=fill, width=round(width * _SMOOTHING))

    def cross(self, x: float, y: float, radius: float, fill: Colour, width: float) -> None:
        """Two diagonals."""
        self.line(x - radius, y - radius, x + radius, y + radius, fill, width)
        self.line(x - radius, y + radius, x + radius, y - radius, fill, width)

    def text(
        self, x: float, y: float, text: str, size: int, fill: Colour = INK, *, align: str = "left"
    ) -> None:
        """A line of text. Pillow's font has Latin letters and ± · …, and no Greek ones.

        Args:
          x: its left end, its middle or its right end, as `align` says.
          y: the middle of the line.
          text: without line breaks.
          size: points.
          fill: colour.
          align: "left", "centre" or "right".
        """
        shift = {"left": 0.0, "centre": 0.5, "right": 1.0}[align] * text_width(text, size)
        # A line's box has room for descenders; most letters have none and would sit too high.
        corner = round(x - shift), round(y - line_height(size) / 2 + size / 14)
        self._texts.append((corner, text, size, fill))

    def lines(self, x: float, y: float, texts: Sequence[str], size: int, *, align: str) -> None:
        """Lines of text under each other, y the middle of them all."""
        step = line_step(size)
        for number, text in enumerate(texts):
            self.text(x, y + (number - (len(texts) - 1) / 2) * step, text, size, align=align)

    def finish(self) -> Image.Image:
        """The RGB picture."""
        picture = self._large.resize(self.size, Image.Resampling.BOX)
        draw = ImageDraw.Draw(picture)
        for corner, text, size, fill in self._texts:
            pictures.draw_text(draw, corner, text, size, fill)
        return picture


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    low, high = (tuple((c + r) * _SMOOTHING for c in (x, y)) for r in (-radius, radius))
    return (*low, *high)


def shorten(text: str, size: int, width: int) -> str:
    """The text, or as much of it as fits the width, with an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, size: int, width: int) -> list[str]:
    """The text in lines that fit the width, broken at spaces; a word too long is shortened."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, size, width))
    return lines or [""]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high], steps of 1, 2 or 5 times a power of ten.

    Raises:
      ValueError: unless low < high, both finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"An axis must reach from a number to a larger one, got {low} to {high}.")
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def distinct_colours(count: int) -> list[Colour]:
    """Strong colours for shapes on white paper: seven hues, then again lighter or darker."""
    # More than seven hues cannot be told apart in a small mark.
    hues = max(1, min(count, 7))
    return [
        pictures.oklch_to_rgb(
            (0.62, 0.44, 0.78, 0.53)[(k // hues) % 4],
            0.19,
            0.07 + (k % hues + k // hues / 2) / hues,
        )
        for k in range(count)
    ]
