"""Figures: bars with error bars, and vision queries in two dimensions.

Figures are made by matplotlib's objects alone: `pyplot` would keep every one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from concat_jax.core.files import replacing
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize.overlay import oklch_to_rgb

Value = tuple[float | None, float | None]

INK, FAINT, GRID = "#19191e", "#696973", "#e6e6ea"
# Okabe and Ito's, which the colour-blind can tell apart, without those too dark for a whisker.
BAR_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
# Seen classes are the background: two greys, the lighter for the many real queries.
SEEN_REAL, SEEN_PSEUDO = "#d3d5db", "#8d919c"
REAL, PSEUDO = "o", "x"
_DPI, _WIDTH = 120, 10.0
_MAX_NAMED = 32


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of 120 pixels an inch; the file appears whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})


def bar_chart(
    titles: Sequence[str], groups: Mapping[str, Sequence[Value]], *, title: str, unit: str
) -> Figure:
    """Bars lie, so that long titles of rows can be read; the numbers stand beside them.

    `groups` are colours, by name, with R pairs of mean and deviation. A mean of None or NaN is a
    dash; a deviation of None or NaN, as of one run alone, has no whisker. `unit` is under the axis.
    Raises ValueError for rows that do not fit the titles, or a number that cannot be drawn.
    """
    if not titles or not groups:
        raise ValueError("bar_chart got nothing to draw; pass at least one row and one group.")
    for name, pairs in groups.items():
        if len(pairs) != len(titles):
            raise ValueError(
                f"The group {name!r} has {len(pairs)} rows but there are {len(titles)} titles."
            )
    values = {name: [_clean(*pair) for pair in pairs] for name, pairs in groups.items()}
    rows, thickness = np.arange(len(titles)), 0.68 / len(groups)
    row_titles = [textwrap.fill(text, 52) for text in titles]
    names = [textwrap.fill(name, 40) for name in groups]
    # Inches: bars or a title's lines, whichever is higher, and what stands above and below.
    row_height = max(0.17 * len(groups) + 0.1, 0.18 * max(map(_num_lines, row_titles)) + 0.16)
    figure, axes = _figure(title, 0.8 + 0.2 * sum(map(_num_lines, names)), row_height * len(titles))
    for number, (name, pairs) in enumerate(values.items()):
        places = rows + (number - (len(values) - 1) / 2) * thickness
        known = [row for row, (mean, _) in enumerate(pairs) if mean is not None]
        means = [pairs[row][0] for row in known]
        colour = BAR_COLOURS[number % len(BAR_COLOURS)]
        axes.barh(places[known], means, thickness * 0.9, color=colour, label=name)
        spread = [row for row in known if pairs[row][1] is not None]
        axes.errorbar(
            [pairs[row][0] for row in spread],
            places[spread],
            xerr=[pairs[row][1] for row in spread],
            fmt="none",
            ecolor=INK,
            elinewidth=1.1,
            capsize=2.5,
        )
        for place, pair in zip(places, pairs, strict=True):
            axes.annotate(
                _label(*pair),
                (1.0, place),
                (8, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_yticks(rows, row_titles, fontsize=9, color=INK)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    if not any(mean is not None for pairs in values.values() for mean, _ in pairs):
        axes.set_xlim(0, 1)
    axes.set_xlabel(unit, fontsize=9, color=FAINT, parse_math=False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=9, labelcolor=FAINT)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.spines[:].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    place = dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    _finish_legend(axes.legend(handles, names, **place))
    return figure


def bias_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> Figure:
    """Unseen against seen scores [P] in percent, a line a name, as a bias between them sweeps.

    The better, the further to the upper right; a bias moves along a line and to no other.
    """
    figure, axes = _figure(title or "Unseen against seen PQ, as a bias on seen names sweeps", 5.5)
    for number, (name, (seen, unseen)) in enumerate(curves.items()):
        colour = BAR_COLOURS[number % len(BAR_COLOURS)]
        style = ("-", "--", ":")[number // len(BAR_COLOURS) % 3]
        axes.plot(seen, unseen, style, color=colour, label=textwrap.fill(name, 40), linewidth=1.8)
    limit = 1.05 * max(np.max(values) for curve in curves.values() for values in curve)
    axes.set_xlim(0, max(limit, 1))
    axes.set_ylim(0, max(limit, 1))
    axes.set_aspect("equal")
    axes.set_xlabel("seen, %", fontsize=9, color=FAINT)
    axes.set_ylabel("unseen, %", fontsize=9, color=FAINT)
    axes.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    axes.grid(color=GRID)
    axes.spines[:].set_visible(False)
    _finish_legend(axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False))
    return figure


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
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _num_lines(text: str) -> int:
    return text.count("\n") + 1


def _figure(title: str, *heights: float) -> tuple[Figure, Axes]:
    """A figure of one plot under its title; heights of what the plot holds, in inches."""
    text = textwrap.fill(title, 80)
    height = sum(heights) + 0.2 + 0.25 * _num_lines(text)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    figure.suptitle(text, x=0.015, ha="left", fontsize=14, color=INK, parse_math=False)
    return figure, figure.add_subplot()


def _finish_legend(legend) -> None:
    for text in legend.get_texts():
        text.set(color=INK, fontsize=9.5, parse_math=False)


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane through the mean [D] along two axes [2, D], and their shares of variance [2]."""

    mean: np.ndarray
    axes: np.ndarray
    shares: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """Coordinates [M, 2] float64 of points [M, D]."""
        return (np.asarray(points, np.float64) - self.mean) @ self.axes.T


def principal_plane(points: np.ndarray) -> Plane:
    """The plane of the largest variance of finite points [M, D], M and D at least 2."""
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or min(points.shape) < 2:
        raise ValueError(
            f"A plane needs at least 2 queries of at least 2 numbers, got shape {points.shape}."
        )
    if not np.isfinite(points).all():
        raise ValueError("A query holds a number that is not finite; check the checkpoint.")
    mean = points.mean(axis=0)
    _, scales, axes = np.linalg.svd(points - mean, full_matrices=False)
    axes, variances = axes[:2], scales**2
    # The signs of singular vectors are anybody's; a picture must not mirror itself.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    shares = variances[:2] / max(variances.sum(), np.finfo(np.float64).tiny)
    return Plane(mean, axes * np.where(largest < 0, -1.0, 1.0), shares)


def query_space(
    real: np.ndarray,
    real_labels: np.ndarray,
    pseudo: np.ndarray,
    pseudo_labels: np.ndarray,
    vocabulary: Vocabulary,
    title: str,
    *,
    points_per_class: int = 60,
) -> Figure:
    """Real and pseudo queries in the plane of the largest variance of the real ones.

    The plane is linear and the same for every kind of point, so a pseudo query drawn apart from the
    real ones of its class is apart; what is near in the plane may be far in what it leaves out.
    Real queries are dots for seen classes and rings for unseen ones (from evaluation data, to be
    looked at; nothing learns from them), pseudo queries crosses. Seen classes are grey, an unseen
    class has one colour.

    `real` [M, D] and `pseudo` [P, D], P may be 0, are floats; labels are class indices, -1 is left
    out. At most `points_per_class` of each class and kind are drawn; the plane is fitted to all.
    """
    kinds = {"real": (real, real_labels), "pseudo": (pseudo, pseudo_labels)}
    points, labels = {}, {}
    for kind, (queries, classes) in kinds.items():
        points[kind], labels[kind] = _check(kind, queries, classes, len(vocabulary))
    if points["real"].shape[1] != points["pseudo"].shape[1]:
        raise ValueError(
            f"Real queries have {points['real'].shape[1]} numbers and pseudo queries "
            f"{points['pseudo'].shape[1]}; both must come from one segmentor."
        )
    plane = principal_plane(points["real"])
    for kind, classes in labels.items():
        rows = _spread_rows(classes, points_per_class)
        points[kind], labels[kind] = plane.project(points[kind][rows]), classes[rows]

    figure, axes = _figure(title, 6.75)
    present = np.union1d(*labels.values())
    unseen = [k for k in vocabulary.unseen.tolist() if k in present]
    colours = dict(zip(unseen, _distinct_colours(len(unseen)), strict=True))
    drawn = [kind for kind in kinds if len(labels[kind])]
    for kind in drawn:
        seen = ~np.isin(labels[kind], unseen)
        style = _mark_style(kind, None)
        axes.scatter(*points[kind][seen].T, s=18, label=f"seen, {kind}", zorder=2, **style)
    for kind, label in itertools.product(drawn, unseen):
        own = labels[kind] == label
        name, style = f"{vocabulary.names[label]}, {kind}", _mark_style(kind, colours[label])
        axes.scatter(*points[kind][own].T, s=26, label=name, zorder=3, **style)
    # One scale for both axes: distances in the picture are distances in the plane.
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.03)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GRID)
    right, up = plane.shares
    axes.set_xlabel(
        f"principal axes of the real queries: {right:.0%} of their variance to the right, "
        f"{up:.0%} up",
        fontsize=9,
        color=FAINT,
    )
    _add_legend(axes, drawn, {vocabulary.names[k]: colours[k] for k in unseen})
    return figure


def _check(
    kind: str, queries: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    queries, labels = np.asarray(queries, np.float64), np.asarray(labels)
    if queries.ndim != 2 or labels.shape != queries.shape[:1]:
        raise ValueError(
            f"The {kind} queries have shape {queries.shape} and their labels {labels.shape}; "
            "they must be [M, D] and [M]."
        )
    if len(labels) and not -1 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"The {kind} queries hold labels from {labels.min()} to {labels.max()}, but the "
            f"vocabulary has {num_classes} classes."
        )
    if not np.isfinite(queries).all():
        raise ValueError(f"A number of the {kind} queries is not finite; check the checkpoint.")
    return queries[labels >= 0], labels[labels >= 0]


def _spread_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows of every class, evenly spaced among the rows of the class."""
    chosen = [np.zeros(0, int)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)])
    return np.sort(np.concatenate(chosen))


def _distinct_colours(count: int) -> list[str]:
    """Strong colours on white paper: seven hues, then again lighter or darker."""
    # More than seven hues cannot be told apart in a small mark.
    hues = max(1, min(count, 7))
    colours = []
    for k in range(count):
        lightness = (0.62, 0.44, 0.78, 0.53)[(k // hues) % 4]
        rgb = oklch_to_rgb(lightness, 0.19, 0.07 + (k % hues + k // hues / 2) / hues)
        colours.append("#{:02x}{:02x}{:02x}".format(*rgb))
    return colours


def _mark_style(kind: str, colour: str | None) -> dict[str, object]:
    """How a scatter draws queries of a kind; no colour is a seen class."""
    if kind == "pseudo":
        return {"marker": PSEUDO, "c": colour or SEEN_PSEUDO, "linewidths": 1.2 if colour else 0.9}
    if colour:
        return {"marker": REAL, "facecolors": "none", "edgecolors": colour, "linewidths": 1.2}
    return {"marker": REAL, "c": SEEN_REAL, "linewidths": 0}


def _add_legend(axes: Axes, kinds: Sequence[str], unseen: Mapping[str, str]) -> None:
    """Marks and their meaning, right of the plot; of unseen classes as many as have room."""

    def mark(kind: str, colour: str | None) -> Line2D:
        fill = "none" if colour else SEEN_REAL
        edge = colour or (SEEN_PSEUDO if kind == "pseudo" else SEEN_REAL)
        marker = PSEUDO if kind == "pseudo" else REAL
        style = dict(markerfacecolor=fill, markeredgecolor=edge, markersize=6, linestyle="none")
        return Line2D([], [], marker=marker, markeredgewidth=1.3, **style)

    blank = Line2D([], [], linestyle="none")
    entries = [(mark(kind, None), f"seen, {kind}") for kind in kinds]
    if unseen:
        shapes = {"real": "ring real", "pseudo": "cross pseudo"}
        entries.append((blank, f"unseen: {', '.join(shapes[kind] for kind in kinds)}"))
    for name, colour in list(unseen.items())[:_MAX_NAMED]:
        marks = tuple(mark(kind, colour) for kind in kinds)
        entries.append((marks, textwrap.shorten(name, 30, placeholder="…")))
    if len(unseen) > _MAX_NAMED:
        entries.append((blank, f"and {len(unseen) - _MAX_NAMED} more"))
    handles, names = zip(*entries, strict=True)
    legend = axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
        borderaxespad=0,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
    )
    _finish_legend(legend)
