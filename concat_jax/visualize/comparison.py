"""Sheets that compare images, their ground truth and predictions, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from concat_jax.core.arrays import Table
from concat_jax.visualize.overlay import (
    FAINT,
    INK,
    PAPER,
    UNSEEN_MARK,
    default_scale,
    draw_text,
    enlarge,
    panoptic_overlay,
    shrink,
    text_size,
)

HEADERS = ("image", "ground truth", "prediction")
FOOTER = f"{UNSEEN_MARK} unseen class: no pixel of it was labelled in training"
# Larger images are shrunk: three stand side by side.
LONGEST_SIDE = 800


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """Panels of one image (left to right, under `HEADERS`) and a line of text below them."""

    panels: tuple[Image.Image, ...]
    caption: str = ""


def comparison_row(
    image: np.ndarray,
    ground_truth: tuple[np.ndarray, Table],
    prediction: tuple[np.ndarray, Table],
    names: Sequence[str],
    is_thing: Sequence[bool],
    is_seen: Sequence[bool],
    *,
    caption: str = "",
) -> ComparisonRow:
    """Image, ground truth and prediction of one image, for `comparison_sheet`."""
    overlays = []
    for ids, labels in (ground_truth, prediction):
        small, ids = shrink(image, ids, LONGEST_SIDE)
        scale = default_scale(*ids.shape)
        overlays.append(
            panoptic_overlay(small, ids, labels, names, is_thing, is_seen=is_seen, scale=scale)
        )
    return ComparisonRow((enlarge(small, scale), *overlays), caption)


def comparison_sheet(rows: Sequence[ComparisonRow]) -> Image.Image:
    """Rows on white paper, each column as wide as its widest, under its header."""
    gap, margin, head, small = 10, 14, 17, 13
    widths = [max(row.panels[c].width for row in rows) for c in range(len(HEADERS))]
    lefts = [margin + sum(widths[:c]) + gap * c for c in range(len(HEADERS))]
    caption_height = text_size("", small)[1] + 6
    heights = [
        max(p.height for p in row.panels) + (caption_height if row.caption else 0) for row in rows
    ]
    top = margin + text_size("", head)[1] + 8
    bottom = margin + caption_height + 4
    sheet_size = (
        lefts[-1] + widths[-1] + margin,
        top + sum(heights) + gap * (len(rows) - 1) + bottom,
    )
    sheet = Image.new("RGB", sheet_size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, header in zip(lefts, HEADERS, strict=True):
        draw_text(draw, (left, margin), header, head, INK)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for left, panel in zip(lefts, row.panels, strict=True):
            sheet.paste(panel, (left, y))
        if row.caption:
            draw_text(draw, (margin, y + height - caption_height + 5), row.caption, small, FAINT)
        y += height + gap
    draw_text(draw, (margin, y - gap + 8), FOOTER, small, FAINT)
    return sheet
