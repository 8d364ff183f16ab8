"""Figures: scores as a bias sweeps, as training goes on, by class; queries in two dimensions.

Figures are made by matplotlib's objects alone: `pyplot` would keep every one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from concat_jax.core.files import replacing
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize.overlay import UNSEEN_MARK, oklch_to_rgb

INK, FAINT, GRID = "#19191e", "#696973", "#e6e6ea"
# Okabe and Ito's, which the colour-blind can tell apart.
CURVE_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
# Seen classes are the background: two greys, the lighter for the many real queries.
SEEN_REAL, SEEN_PSEUDO = "#d3d5db", "#8d919c"
REAL, PSEUDO = "o", "x"
_DPI, _WIDTH = 120, 10.0
_MAX_NAMED = 32
# Of bars by whether the class is a thing and seen.
BAR_COLOURS = {
    (True, True): "#a9c9e0",
    (False, True): "#b3d9cc",
    (True, False): "#0072b2",
    (False, False): "#009e73",
}
_BARS, _MOST_COLUMNS = 45, 4  # a column before another is begun
Curve = tuple[np.ndarray, np.ndarray]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of 120 pixels an inch; the file appears whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})


def bias_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Unseen against seen scores [P] in percent, a line a name, as a bias between them sweeps.

    The better, the further to the upper right; a bias moves along a line and to no other.
    """
    figure, axes = _figure("Unseen against seen PQ, as a bias on seen names sweeps", 5.5)
    _draw_lines(axes, {name: [curve] for name, curve in curves.items()}, "seen, %", "unseen, %")
    # NaN of a side that shows no class.
    limit = np.nanmax([1, *(1.05 * x for curve in curves.values() for x in np.ravel(curve))])
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    axes.set_aspect("equal")
    return figure


def learning_curves(curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Share of matched queries that training names right, by step, a line a seed of each name.

    `curves`: name -> (steps [T], accuracies [T] in 0..1) of each seed.
    """
    figure, axes = _figure("Queries of training scenes with the right seen name", 4.5)
    in_percent = {name: [(x, 100 * y) for x, y in seeds] for name, seeds in curves.items()}
    _draw_lines(axes, in_percent, "steps", "right, %")
    axes.set_ylim(0, 100)
    return figure


def power_laws(panels: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """How quantities grow with a size, over what they are at the smallest; both logarithmic.

    `panels`: name of the size -> name of the quantity -> (sizes [P] ascending, values [P] > 0).
    Dotted is what grows as the size does.
    """
    rows = -(-len(panels) // 2)
    figure = _page(title, 2.9 * rows)
    for axes, (size, curves) in zip(
        figure.subplots(rows, 2, squeeze=False).flat, panels.items(), strict=False
    ):
        lines = {name: [(x, y / y[0])] for name, (x, y) in curves.items()}
        _draw_lines(axes, lines, size, "times as much")
        sizes = next(iter(curves.values()))[0]
        axes.plot(sizes, sizes / sizes[0], ":", color=FAINT, linewidth=1, zorder=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{value:g}" for value in sizes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        for line in axes.lines[: len(lines)]:
            line.set_marker("o")
            line.set_markersize(4)
    return figure


def _draw_lines(axes: Axes, lines: Mapping[str, Sequence], across: str, up: str) -> None:
    """Lines (x, y) by name, those of a name alike, with their legend and the names of the axes."""
    for number, (name, alike) in enumerate(lines.items()):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        style = ("-", "--", ":")[number // len(CURVE_COLOURS) % 3]
        for k, (x, y) in enumerate(alike):
            label = textwrap.fill(name, 40) if k == 0 else None
            axes.plot(x, y, style, color=colour, label=label, linewidth=1.8)
    axes.set_xlabel(across, fontsize=9, color=FAINT)
    axes.set_ylabel(up, fontsize=9, color=FAINT)
    axes.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    axes.grid(color=GRID)
    axes.spines[:].set_visible(False)
    _finish_legend(axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False))


def class_bars(classes: Sequence[Mapping]) -> Figure:
    """PQ of each class in percent, the best first, down one column and on in the next.

    `classes`, at least one, have "name", "is_thing", "is_seen" and a finite "pq".
    """
    rows = sorted(classes, key=lambda row: (-row["pq"], row["name"]))
    columns = min(_MOST_COLUMNS, -(-len(rows) // _BARS))
    length = -(-len(rows) // columns)
    figure = _page("PQ by class", 0.17 * length + 0.75)
    for axes, first in zip(
        figure.subplots(1, columns, squeeze=False)[0], range(0, len(rows), length), strict=True
    ):
        shown = rows[first : first + length]
        colours = [BAR_COLOURS[row["is_thing"], row["is_seen"]] for row in shown]
        bars = axes.barh(range(len(shown)), [row["pq"] for row in shown], 0.8, color=colours)
        numbers = [f"{row['pq']:.1f}" for row in shown]
        axes.bar_label(bars, numbers, padding=2, fontsize=7.5, color=FAINT)
        names = [
            textwrap.shorten(row["name"], 26, placeholder="…") + UNSEEN_MARK * (not row["is_seen"])
            for row in shown
        ]
        axes.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
        for label, row in zip(axes.get_yticklabels(), shown, strict=True):
            label.set(color=INK, weight="normal" if row["is_seen"] else "bold")
        axes.set(xlim=(0, 112), ylim=(length - 0.4, -0.6), xticks=())
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    known, kinds = (f"unseen {UNSEEN_MARK}", "seen"), ("stuff", "thing")
    entries = [
        Patch(color=colour, label=f"{kinds[is_thing]}, {known[is_seen]}")
        for (is_thing, is_seen), colour in BAR_COLOURS.items()
        if any((row["is_thing"], row["is_seen"]) == (is_thing, is_seen) for row in rows)
    ]
    legend = figure.legend(handles=entries, loc="outside lower left", ncols=4, frameon=False)
    _finish_legend(legend)
    return figure


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot of a height in inches under its title."""
    figure = _page(title, height)
    return figure, figure.add_subplot()


def _page(title: str, height: float) -> Figure:
    text = textwrap.fill(title, 80)
    height += 0.45 + 0.25 * text.count("\n")
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    figure.suptitle(text, x=0.015, ha="left", fontsize=14, color=INK, parse_math=False)
    return figure


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
    for kind, (queries, _) in kinds.items():
        if not np.isfinite(queries).all():
            raise ValueError(f"A number of the {kind} queries is not finite; check the checkpoint.")
    plane = principal_plane(real[real_labels >= 0])
    points, labels = {}, {}
    for kind, (queries, classes) in kinds.items():
        rows = _spread_rows(classes, points_per_class)
        points[kind], labels[kind] = plane.project(queries[rows]), classes[rows]

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
    shares = f"{right:.0%} of their variance to the right, {up:.0%} up"
    axes.set_xlabel(f"principal axes of the real queries: {shares}", fontsize=9, color=FAINT)
    _add_legend(axes, drawn, [vocabulary.names[k] for k in unseen])
    return figure


def _spread_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows of every class from 0 on, evenly spaced among those of the class."""
    chosen = [np.zeros(0, int)]
    for label in np.unique(labels[labels >= 0]):
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


def _add_legend(axes: Axes, kinds: Sequence[str], unseen: Sequence[str]) -> None:
    """The marks and their meaning, right of the plot; of unseen classes as many as have room."""
    marks = {group.get_label(): group for group in axes.collections}
    blank = Line2D([], [], linestyle="none")
    entries = [(marks[f"seen, {kind}"], f"seen, {kind}") for kind in kinds]
    if unseen:
        shapes = {"real": "ring real", "pseudo": "cross pseudo"}
        entries.append((blank, f"unseen: {', '.join(shapes[kind] for kind in kinds)}"))
    for name in unseen[:_MAX_NAMED]:
        of_class = tuple(marks[f"{name}, {kind}"] for kind in kinds)
        entries.append((of_class, textwrap.shorten(name, 30, placeholder="…")))
    if len(unseen) > _MAX_NAMED:
        entries.append((blank, f"and {len(unseen) - _MAX_NAMED} more"))
    handles, names = zip(*entries, strict=True)
    beside = dict(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    of_pairs = {tuple: HandlerTuple(ndivide=None, pad=0.6)}
    _finish_legend(axes.legend(handles, names, handler_map=of_pairs, **beside))
