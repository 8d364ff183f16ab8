"""Vision queries in two dimensions: whether pseudo queries lie where the real ones do.

The plane is that of the largest variance of the real queries (PCA). It is linear and the same for
every kind of point, so a pseudo query drawn apart from the real ones of its class is apart. The
converse does not hold: what is near in the plane may be far in what the plane leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize.drawing import (
    FAINT,
    GRID,
    INK,
    Canvas,
    Colour,
    distinct_colours,
    line_step,
    shorten,
    wrap,
)

_WIDTH, _HEIGHT, _MARGIN = 1200, 860, 24
_TITLE_SIZE, _TEXT_SIZE = 22, 15
_LEGEND_WIDTH = 250
_RADIUS, _STROKE = 4.5, 1.8
# Seen classes are the background: two greys, the lighter for the many real queries.
_SEEN_REAL, _SEEN_PSEUDO = (198, 200, 206), (112, 116, 126)


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane through the mean along the first two principal axes.

    Attributes:
      mean: [D] float64.
      axes: [2, D] float64, orthonormal; the largest component of each is positive.
      shares: [2] float64, the part of the variance along each axis, 0..1.
    """

    mean: np.ndarray
    axes: np.ndarray
    shares: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """Coordinates [M, 2] float64 of points [M, D]."""
        return (np.asarray(points, np.float64) - self.mean) @ self.axes.T


def principal_plane(points: np.ndarray) -> Plane:
    """Fits the plane by a singular value decomposition.

    Args:
      points: [M, D], M and D at least 2.

    Raises:
      ValueError: if there are fewer than 2 points or dimensions, or a number is not finite.
    """
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


def query_space_picture(
    real: np.ndarray,
    real_labels: np.ndarray,
    pseudo: np.ndarray,
    pseudo_labels: np.ndarray,
    vocabulary: Vocabulary,
    title: str,
    *,
    points_per_class: int = 60,
) -> Image.Image:
    """Real and pseudo queries in the plane of the real ones.

    Real queries of seen classes are grey dots, of unseen classes rings (from evaluation data, to
    be looked at; nothing learns from them); pseudo queries are crosses, grey for seen classes. An
    unseen class has one colour.

    Args:
      real: [M, D] float, real vision queries.
      real_labels: [M] int class index, -1 (no segment) is left out.
      pseudo: [P, D] float, P may be 0.
      pseudo_labels: [P] int class index.
      vocabulary: of the K classes.
      title: above the plot.
      points_per_class: drawn at most of each class and kind, spread over the rows; the plane is
        fitted to all real queries.

    Returns:
      RGB PIL image of 1200 x 860 pixels, the same for the same input.

    Raises:
      ValueError: as `principal_plane`, or if shapes disagree or a label is outside the vocabulary.
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

    canvas = Canvas(_WIDTH, _HEIGHT)
    heading = wrap(title, _TITLE_SIZE, _WIDTH - 2 * _MARGIN)
    heading_height = len(heading) * line_step(_TITLE_SIZE)
    canvas.lines(_MARGIN, _MARGIN + heading_height / 2, heading, _TITLE_SIZE, align="left")
    top, bottom = _MARGIN + heading_height + 14, _HEIGHT - _MARGIN - line_step(_TEXT_SIZE) - 8
    left, right = _MARGIN, _WIDTH - _MARGIN - _LEGEND_WIDTH - 20
    _draw_frame(canvas, left, top, right, bottom)
    caption = "principal axes of the real queries: {:.0%} of their variance to the right, {:.0%} up"
    canvas.text(
        (left + right) / 2,
        _HEIGHT - _MARGIN - line_step(_TEXT_SIZE) / 2,
        caption.format(*plane.shares),
        _TEXT_SIZE,
        FAINT,
        align="centre",
    )

    # One scale for both axes: distances in the picture are distances in the plane.
    every = np.concatenate([points["real"], points["pseudo"]])
    low, high = every.min(axis=0), every.max(axis=0)
    room = np.array([right - left, bottom - top]) - 2 * (_RADIUS + 10)
    scale = (room / np.maximum(high - low, 1e-12)).min()
    middle = np.array([left + right, top + bottom]) / 2
    unseen = vocabulary.unseen.tolist()
    colours = dict(zip(unseen, distinct_colours(len(unseen)), strict=True))

    def draw(kind: str, is_unseen: bool) -> None:
        for place, label in zip(points[kind], labels[kind].tolist(), strict=True):
            if (label in colours) == is_unseen:
                x, y = middle + (place - (low + high) / 2) * scale * [1.0, -1.0]
                _draw_mark(canvas, x, y, kind, colours.get(label))

    for kind, is_unseen in (("real", False), ("pseudo", False), ("real", True), ("pseudo", True)):
        draw(kind, is_unseen)
    present = set(labels["real"].tolist()) | set(labels["pseudo"].tolist())
    shown = [(vocabulary.names[k], colours[k]) for k in unseen if k in present]
    drawn = [kind for kind in points if len(points[kind])]
    _draw_legend(canvas, right + 20, top, bottom, drawn, shown)
    return canvas.finish()


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
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, int)


def _draw_mark(canvas: Canvas, x: float, y: float, kind: str, colour: Colour | None) -> None:
    """The mark of a query; no colour is a seen class."""
    if kind == "pseudo":
        canvas.cross(x, y, _RADIUS, colour or _SEEN_PSEUDO, _STROKE)
    elif colour:
        canvas.ring(x, y, _RADIUS + 0.5, colour, _STROKE)
    else:
        canvas.dot(x, y, _RADIUS - 1, _SEEN_REAL)


def _draw_frame(canvas: Canvas, left: float, top: float, right: float, bottom: float) -> None:
    for x in (left, right):
        canvas.line(x, top, x, bottom, GRID, 1)
    for y in (top, bottom):
        canvas.line(left, y, right, y, GRID, 1)


def _draw_legend(
    canvas: Canvas,
    x: float,
    top: float,
    bottom: float,
    kinds: Sequence[str],
    unseen: Sequence[tuple[str, Colour]],
) -> None:
    """Marks and their meaning; of unseen classes (name, colour) as many as there is room for."""
    step = line_step(_TEXT_SIZE) + 3
    y = top + step / 2

    def entry(text: str, marks: Sequence[str], mark_colour, ink: Colour = INK) -> None:
        nonlocal y
        for place, kind in enumerate(marks):
            _draw_mark(canvas, x + 6 + 18 * place, y, kind, mark_colour)
        canvas.text(x + 38, y, shorten(text, _TEXT_SIZE, _LEGEND_WIDTH - 44), _TEXT_SIZE, ink)
        y += step

    for kind in kinds:
        entry(f"seen, {kind}", [kind], None)
    y += step / 2
    if unseen:
        # No sample mark here: in grey it would be that of a seen class.
        meaning = {"real": "ring real", "pseudo": "cross pseudo"}
        text = f"unseen: {', '.join(meaning[kind] for kind in kinds)}"
        canvas.text(x, y, text, _TEXT_SIZE, FAINT)
        y += step
    room = int((bottom - y) / step)
    named = unseen if len(unseen) <= room else unseen[: room - 1]
    for name, colour in named:
        entry(name, kinds, colour)
    if len(named) < len(unseen):
        entry(f"and {len(unseen) - len(named)} more", [], None, FAINT)
