"""Many pictures on few pages, to be looked over."""

from __future__ import annotations

import contextlib
from pathlib import Path

from PIL import Image, ImageDraw

from concat_jax.core.files import write_png
from concat_jax.visualize.overlay import FAINT, INK, PAPER, draw_text, text_size

COLUMNS, ROWS = 4, 5
# Sides of a cell's picture, which keeps its proportions, and what lies between cells.
CELL, GAP, TEXT = (320, 240), 16, 13


class ContactSheet(contextlib.AbstractContextManager):
    """Pages of pictures with two lines below each, written as they fill up.

    `path` is of the first page, NAME.overlay.png; the others are NAME-2.overlay.png and so on. One
    picture alone needs no page. What an earlier run wrote beyond the last page stays.
    """

    def __init__(self, path: Path):
        self._path, self._pages = path, 0
        self._cells: list[tuple[Image.Image, str, str]] = []

    def add(self, picture: Image.Image, name: str, about: str) -> None:
        """Puts a picture on the page."""
        small = picture.copy()
        small.thumbnail(CELL, Image.Resampling.LANCZOS, reducing_gap=2.0)
        self._cells.append((small, name, about))
        if len(self._cells) == COLUMNS * ROWS:
            self._write()

    def _write(self) -> None:
        self._pages += 1
        stem, *rest = self._path.name.split(".", 1)
        number = f"-{self._pages}" * (self._pages > 1)
        write_png(self._path.with_name(".".join((stem + number, *rest))), page(self._cells))
        self._cells.clear()

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None and self._cells and (self._pages or len(self._cells) > 1):
            self._write()


def page(cells: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """Pictures, names and what is said of them, row by row on white paper."""
    line = text_size("", TEXT)[1] + 5
    columns = min(COLUMNS, len(cells))
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [max(picture.height for picture, *_ in row) + 2 * line + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (CELL[0] + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, *lines) in enumerate(row):
            left, under = GAP + column * (CELL[0] + GAP), top + height - 2 * line - GAP + 4
            sheet.paste(picture, (left, under - 4 - picture.height))
            for number, (text, ink) in enumerate(zip(lines, (INK, FAINT), strict=True)):
                draw_text(draw, (left, under + number * line), _fit(text, CELL[0]), TEXT, ink)
        top += height
    return sheet


def _fit(text: str, width: int) -> str:
    """The text, or its beginning, that is not wider."""
    if text_size(text, TEXT)[0] <= width:
        return text
    while text and text_size(text + "...", TEXT)[0] > width:
        text = text[:-1]
    return text.rstrip(" ,") + "..."
