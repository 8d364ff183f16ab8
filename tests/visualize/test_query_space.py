"""The plane of known points, and marks that lie where they should in the picture."""

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize.drawing import distinct_colours
from concat_jax.visualize.query_space import principal_plane, query_space_picture

VOCABULARY = Vocabulary(("cat", "lynx", "fog"), (True,) * 3, (True, False, False), (1, 2, 3))
LYNX, FOG = distinct_colours(2)
FRAME = np.s_[70:800, 30:900]
SEEN_REAL, SEEN_PSEUDO = (198, 200, 206), (112, 116, 126)


def test_the_plane_of_points_on_a_known_plane():
    """Points in the plane of two given directions, twice as far along the first."""
    first, second = np.array([0.6, 0.0, -0.8]), np.array([0.0, 1.0, 0.0])
    steps = np.array([[-2, 0], [2, 0], [0, -1], [0, 1]])
    plane = principal_plane(steps @ np.stack([first, second]) + [5.0, 6.0, 7.0])
    np.testing.assert_allclose(plane.mean, [5, 6, 7])
    np.testing.assert_allclose(plane.axes, [-first, second], atol=1e-12)  # largest component +
    np.testing.assert_allclose(plane.shares, [0.8, 0.2])  # 4 + 4 against 1 + 1
    np.testing.assert_allclose(plane.project([[5.0, 8.0, 7.0]]), [[0, 2]], atol=1e-12)


def test_the_plane_does_not_depend_on_the_order_of_the_points():
    points = np.random.default_rng(0).normal(size=(20, 5))
    one, other = principal_plane(points), principal_plane(points[::-1])
    np.testing.assert_allclose(one.axes, other.axes, atol=1e-9)


def near(picture, colour, tolerance=12):
    """[n, 2] (x, y) in this colour inside the frame, counted from a corner of it."""
    pixels = np.asarray(picture).astype(int)[FRAME]
    found = np.abs(pixels - colour).max(axis=-1) <= tolerance
    rows, columns = np.nonzero(found)
    return np.stack([columns, rows], axis=-1)


def picture(real, real_labels, pseudo=(), pseudo_labels=(), title="title", **options):
    pseudo = np.asarray(pseudo, float).reshape(-1, np.shape(real)[1])
    pseudo_labels = np.asarray(pseudo_labels, int)
    return query_space_picture(
        np.asarray(real, float),
        np.asarray(real_labels),
        pseudo,
        pseudo_labels,
        VOCABULARY,
        title,
        **options,
    )


REAL = [[-10, 0, 0], [10, 0, 0], [0, -4, 0], [0, 4, 0], [9, 9, 9]]
REAL_LABELS = [0, 0, 1, 1, -1]


def test_marks_lie_at_their_coordinates():
    """A seen class to the left and right, lynxes above and below, a pseudo fog in the middle."""
    real, labels = REAL[:4], REAL_LABELS[:4]
    drawn = picture(real, labels, [[0, 0, 3]], [2])
    assert drawn.size == (1200, 860)
    seen, lynx, fog = (near(drawn, colour) for colour in (SEEN_REAL, LYNX, FOG))
    assert np.ptp(seen[:, 0]) > 800 and np.ptp(seen[:, 1]) < 12, "along the first axis"
    assert np.ptp(lynx[:, 1]) > 280 and np.ptp(lynx[:, 0]) < 16, "along the second, same scale"
    assert np.ptp(seen[:, 0]) / np.ptp(lynx[:, 1]) == pytest.approx(2.5, rel=0.05)
    np.testing.assert_allclose(fog.mean(axis=0), seen.mean(axis=0), atol=1.5)
    # A ring lets its centre free, a dot and a cross do not.
    pixels = np.asarray(drawn)[FRAME]
    upper = lynx[lynx[:, 1] < lynx[:, 1].mean()].mean(axis=0).round().astype(int)
    assert (pixels[upper[1], upper[0]] == 255).all()
    left = seen[seen[:, 0] < seen[:, 0].mean()].mean(axis=0).round().astype(int)
    np.testing.assert_allclose(pixels[left[1], left[0]], SEEN_REAL, atol=3)


def test_a_query_that_holds_nothing_takes_no_part():
    with_void = picture(REAL, REAL_LABELS, [[0, 0, 3]], [2])
    without = picture(REAL[:4], REAL_LABELS[:4], [[0, 0, 3]], [2])
    assert with_void.tobytes() == without.tobytes()


def test_pseudo_queries_far_away_are_inside_the_frame():
    drawn = picture(REAL[:4], REAL_LABELS[:4], [[0, 900, 0], [-900, 0, 0]], [2, 0])
    pixels = np.asarray(drawn)
    assert len(near(drawn, FOG)) and len(near(drawn, SEEN_PSEUDO))
    assert (pixels[:, :20] == 255).all() and (pixels[-20:] == 255).all(), "margins are white"


def test_few_points_of_a_class_are_drawn_and_the_plane_knows_all():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(400, 3)) * [5, 2, 1]
    labels = np.repeat([0, 1], 200)
    few, many = (picture(real, labels, points_per_class=count) for count in (5, 200))
    assert len(near(few, LYNX)) * 5 < len(near(many, LYNX))
    assert picture(real, labels).tobytes() == picture(real, labels).tobytes()


def test_the_legend_names_the_unseen_classes_that_are_there():
    both = np.asarray(picture(REAL[:4], [0, 0, 1, 2]))[:, 920:]
    one = np.asarray(picture(REAL[:4], [0, 0, 1, 1]))[:, 920:]

    def lowest_ink(pixels):
        return np.flatnonzero((pixels < 250).any(axis=(1, 2))).max()

    assert (both[:, -24:] == 255).all()
    assert lowest_ink(both) > lowest_ink(one) + 15


def test_colours_of_unseen_classes_are_apart():
    colours = np.array(distinct_colours(14), int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(14)
    assert apart.min() > 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([[1.0, 2.0]], [0]), "at least 2 queries"),
        ((np.ones((3, 1)), [0, 0, 0]), "at least 2 numbers"),
        ((np.ones((3, 2)), [0, 0]), r"real queries have shape \(3, 2\) and their labels \(2,\)"),
        ((np.ones((2, 2)), [0, 3]), "labels from 0 to 3, but the vocabulary has 3"),
        (([[1.0, np.nan], [0, 0]], [0, 0]), "real queries is not finite"),
    ],
)
def test_bad_input_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        picture(*arguments)


def test_queries_of_another_width_are_refused():
    with pytest.raises(ValueError, match="3 numbers and pseudo queries 2"):
        query_space_picture(
            np.ones((3, 3)), np.zeros(3, int), np.ones((1, 2)), np.zeros(1, int), VOCABULARY, ""
        )
