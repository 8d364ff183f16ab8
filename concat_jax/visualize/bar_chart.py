"""A bar chart with error bars: one row a run, one bar a quantity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from concat_jax.visualize.drawing import (
    FAINT,
    GRID,
    INK,
    Canvas,
    line_step,
    shorten,
    text_width,
    ticks,
    wrap,
)

Value = tuple[float | None, float | None]

_WIDTH, _MARGIN = 1200, 24
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 22, 16, 14
_BAR, _BAR_STEP, _ROW_GAP = 16, 20, 18
_MAX_TITLE_WIDTH = 400
# Okabe and Ito's, which the colour-blind can tell apart, without those too dark for a whisker.
_COLOURS = ((213, 94, 0), (86, 180, 233), (0, 158, 115), (230, 159, 0), (204, 121, 167))


def bar_chart(
    titles: Sequence[str], groups: Mapping[str, Sequence[Value]], *, title: str, unit: str
) -> Image.Image:
    """Bars lie, so that long titles of rows can be read; the numbers stand beside them.

    Args:
      titles: R names of rows, top to bottom.
      groups: name of a quantity (a colour, explained above the bars) to its R pairs of mean and
        deviation. A mean of None or NaN is a dash without a bar; a deviation of None or NaN, as
        of one run alone, has no whisker.
      title: above the chart.
      unit: under the axis, e.g. "PQ in percent".

    Returns:
      RGB PIL image, 1200 pixels wide, as high as its rows need.

    Raises:
      ValueError: if there is no row or no group, a group has another number of rows than titles,
        a number is infinite or a deviation negative.
    """
    if not titles or not groups:
        raise ValueError("bar_chart got nothing to draw; pass at least one row and one group.")
    for name, pairs in groups.items():
        if len(pairs) != len(titles):
            raise ValueError(
                f"The group {name!r} has {len(pairs)} rows but there are {len(titles)} titles."
            )
    values = {name: [_clean(*pair) for pair in pairs] for name, pairs in groups.items()}
    colours = dict(zip(values, itertools.cycle(_COLOURS), strict=False))
    row_titles = [wrap(text, _TEXT_SIZE, _MAX_TITLE_WIDTH) for text in titles]
    heading = wrap(title, _TITLE_SIZE, _WIDTH - 2 * _MARGIN)

    bars_height = (len(values) - 1) * _BAR_STEP + _BAR
    heights = [max(bars_height, len(lines) * line_step(_TEXT_SIZE)) for lines in row_titles]
    heading_height = len(heading) * line_step(_TITLE_SIZE)
    legend, legend_height = _legend(values)
    legend_top = _MARGIN + heading_height + 14
    top = legend_top + legend_height + 20
    bottom = top + sum(heights) + (len(titles) - 1) * _ROW_GAP + 8
    left = _MARGIN + max(text_width(t, _TEXT_SIZE) for lines in row_titles for t in lines) + 16
    numbers = [_label(*pair) for pairs in values.values() for pair in pairs]
    right = _WIDTH - _MARGIN - max(text_width(text, _SMALL_SIZE) for text in numbers) - 16
    low, high = _range(values)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    axis_y, unit_y = bottom + 16, bottom + 20 + line_step(_SMALL_SIZE) + 4
    canvas = Canvas(_WIDTH, unit_y + line_step(_SMALL_SIZE) // 2 + _MARGIN)
    canvas.lines(_MARGIN, _MARGIN + heading_height / 2, heading, _TITLE_SIZE, align="left")
    for name, x, y in legend:
        canvas.rectangle(x, legend_top + y - 7, x + 14, legend_top + y + 7, colours[name])
        text = shorten(name, _TEXT_SIZE, _WIDTH - _MARGIN - x - 22)
        canvas.text(x + 22, legend_top + y, text, _TEXT_SIZE)
    for mark in ticks(low, high, 6):
        canvas.rectangle(x_of(mark) - 0.5, top - 8, x_of(mark) + 0.5, bottom, GRID)
        canvas.text(x_of(mark), axis_y, f"{mark:g}", _SMALL_SIZE, align="centre")
    canvas.text((left + right) / 2, unit_y, unit, _SMALL_SIZE, FAINT, align="centre")

    y = top
    for row, (lines, height) in enumerate(zip(row_titles, heights, strict=True)):
        canvas.lines(left - 16, y + height / 2, lines, _TEXT_SIZE, align="right")
        bar_top = y + (height - bars_height) // 2
        for name, pairs in values.items():
            mean, deviation = pairs[row]
            middle = bar_top + _BAR / 2
            if mean is not None:
                canvas.rectangle(x_of(0.0), bar_top, x_of(mean), bar_top + _BAR, colours[name])
            if mean is not None and deviation is not None:
                ends = x_of(mean - deviation), x_of(mean + deviation)
                canvas.rectangle(ends[0], middle - 1, ends[1], middle + 1, INK)
                for x in ends:
                    canvas.rectangle(x - 1, middle - 5, x + 1, middle + 5, INK)
            label = _label(mean, deviation)
            canvas.text(_WIDTH - _MARGIN, middle, label, _SMALL_SIZE, align="right")
            bar_top += _BAR_STEP
        y += height + _ROW_GAP
    canvas.rectangle(x_of(0.0) - 0.75, top - 8, x_of(0.0) + 0.75, bottom, FAINT)
    return canvas.finish()


def _clean(mean: float | None, deviation: float | None) -> Value:
    """Plain numbers, None for what was not measured."""
    mean, deviation = (
        None if value is None or math.isnan(value) else float(value) for value in (mean, deviation)
    )
    if math.isinf(mean or 0.0) or not 0.0 <= (deviation or 0.0) < math.inf:
        raise ValueError(
            f"A bar of {mean} ± {deviation} cannot be drawn; means must be finite and deviations "
            "finite and not negative."
        )
    return mean, deviation


def _label(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _range(values: Mapping[str, Sequence[Value]]) -> tuple[float, float]:
    """The axis: from 0, or the lowest whisker below it, to 0 or the highest whisker."""
    known = [pair for pairs in values.values() for pair in pairs if pair[0] is not None]
    low = min([0.0, *(mean - (deviation or 0.0) for mean, deviation in known)])
    high = max([0.0, *(mean + (deviation or 0.0) for mean, deviation in known)])
    return low, (high if high > low else low + 1.0)


def _legend(names: Iterable[str]) -> tuple[list[tuple[str, int, int]], int]:
    """(name, x, y) of every name, left to right in as many lines as it takes, and their height."""
    step = line_step(_TEXT_SIZE)
    places, x, y = [], _MARGIN, step // 2
    for name in names:
        width = 22 + text_width(name, _TEXT_SIZE)
        if x > _MARGIN and x + width > _WIDTH - _MARGIN:
            x, y = _MARGIN, y + step
        places.append((name, x, y))
        x += width + 28
    return places, y + step - step // 2
