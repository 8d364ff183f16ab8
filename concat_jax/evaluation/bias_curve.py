"""Seen against unseen scores while a bias on the names' logits sweeps: what no bias can fake.

A generalized zero-shot score at one bias compares how much two models favour seen names, which one
number corrects (calibrated stacking, Chao et al., arXiv 1605.04253). The area under the curve of
seen against unseen accuracy (AUSUC, ibid.) does not depend on the bias that a model was trained to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class NamedQueries(NamedTuple):
    """What the names of Q queries, each of which holds a segment, make of every bias.

    Attributes:
      labels: [Q] int, the segments' classes.
      gaps: [Q] float, the best seen name's logit over the best unseen one's: a query gets an unseen
        name once the bias exceeds it.
      seen_right, unseen_right: [Q] bool, the best name of that side is the segment's.
      images: [Q] int, the number of the image.
    """

    labels: np.ndarray
    gaps: np.ndarray
    seen_right: np.ndarray
    unseen_right: np.ndarray
    images: np.ndarray


class Naming(NamedTuple):
    """How queries are named, means over classes in percent.

    `area` is that under unseen against seen accuracy as the bias sweeps (AUSUC); `among_seen` and
    `among_unseen` are the accuracies where only names of the own side compete, `seen` and `unseen`
    those where all do and none is favoured.
    """

    area: float
    among_seen: float
    among_unseen: float
    seen: float
    unseen: float


def name_queries(
    log_probs: np.ndarray, labels: np.ndarray, is_seen: np.ndarray, images: np.ndarray
) -> NamedQueries:
    """Of logits, or logarithms of probabilities, [Q, K] of K classes."""
    rows = np.arange(len(labels))
    best = [
        side[np.argmax(log_probs[:, side], axis=1)]
        for side in (np.flatnonzero(is_seen), np.flatnonzero(~np.asarray(is_seen, bool)))
    ]
    gaps = log_probs[rows, best[0]] - log_probs[rows, best[1]]
    return NamedQueries(labels, gaps, best[0] == labels, best[1] == labels, images)


def curve_area(seen: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Area [...] under scores `unseen` [..., P] against `seen` [..., P], percent of the square.

    Points are in the order of the bias, from the one that leaves seen names alone to the one that
    leaves unseen ones, in percent; trapezoids between them.
    """
    steps = seen[..., :-1] - seen[..., 1:]
    return np.sum(steps * (unseen[..., :-1] + unseen[..., 1:]) / 2, axis=-1) / 100.0


def accuracy_curve(
    names: NamedQueries, is_seen: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seen and unseen accuracy [..., P] with `weights` [..., Q] of the queries.

    Exact: a point for each bias at which a query changes sides. Each class counts alike, whatever
    its number of queries; NaN where a side has none.
    """
    # Queries of one gap change sides together.
    edges, step = np.unique(names.gaps, return_inverse=True)
    shape = (*weights.shape[:-1], len(edges) + 1)
    gains = []
    for right, side in ((names.seen_right, is_seen), (names.unseen_right, ~is_seen)):
        member = np.eye(len(is_seen), dtype=weights.dtype)[names.labels] * side  # [Q, K]
        totals = weights @ member  # [..., K]
        share = np.divide(100.0, totals, out=np.zeros_like(totals), where=totals > 0)
        num_classes = (totals > 0).sum(axis=-1, keepdims=True)
        share = share / np.maximum(num_classes, 1)
        gain = np.zeros(shape)
        gain[..., :1] = np.where(num_classes > 0, 0.0, np.nan)
        hits = np.flatnonzero(right)
        values = weights[..., hits] * share[..., names.labels[hits]]
        np.add.at(gain, (..., step[hits] + 1), values)
        gains.append(np.cumsum(gain, axis=-1))
    lost, gained = gains
    return lost[..., -1:] - lost, gained


def naming_curve(names: NamedQueries, is_seen: np.ndarray) -> Naming:
    """What a sweep of the bias makes of the names; NaN if one side has no query."""
    is_seen = np.asarray(is_seen, bool)
    of_seen = is_seen[names.labels]
    if not of_seen.any() or of_seen.all():
        return Naming(*[float("nan")] * len(Naming._fields))
    seen, unseen = accuracy_curve(names, is_seen, np.ones(len(names.labels)))
    plain = len(np.unique(names.gaps[names.gaps <= 0]))  # steps before the bias is above 0
    points = seen[0], unseen[-1], seen[plain], unseen[plain]
    return Naming(*map(float, (curve_area(seen, unseen), *points)))
