"""What the figures hold: curves, marks, names; pixels are matplotlib's."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize import plots

VOCABULARY = Vocabulary(("cat", "lynx", "fog"), (True,) * 3, (True, False, False), (1, 2, 3))


def test_curves_are_lines_of_their_names_on_equal_axes(tmp_path):
    long = "finetune without pseudo queries (the fair control), $at$ the γ of the validation " * 3
    points = np.array([[0.0, 40.0, 60.0], [30.0, 20.0, 0.0]])
    figure = plots.bias_curves({"all": tuple(points), long: tuple(points[::-1])})
    (axes,) = figure.axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), points.T)
    assert first.get_color() != second.get_color()
    assert axes.get_xlim() == axes.get_ylim() == (0, 63)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "all" and names[1].replace("\n", " ") == long.strip()
    plots.save_figure(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 1200
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all(), "nothing is cut off"


def test_a_side_that_shows_no_class_has_no_curve_and_stops_no_other():
    nothing, points = np.full(3, np.nan), np.array([0.0, 40.0, 60.0])
    figure = plots.bias_curves({"one": (points, points[::-1]), "other": (points, nothing)})
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim() == (0, 63)
    assert plots.bias_curves({"other": (nothing, nothing)}).axes[0].get_xlim() == (0, 1)


def test_the_plane_of_points_on_a_known_plane():
    """Points in the plane of two given directions, twice as far along the first."""
    first, second = np.array([0.6, 0.0, -0.8]), np.array([0.0, 1.0, 0.0])
    steps = np.array([[-2, 0], [2, 0], [0, -1], [0, 1]])
    plane = plots.principal_plane(steps @ np.stack([first, second]) + [5.0, 6.0, 7.0])
    np.testing.assert_allclose(plane.mean, [5, 6, 7])
    np.testing.assert_allclose(plane.axes, [-first, second], atol=1e-12)  # largest component +
    np.testing.assert_allclose(plane.shares, [0.8, 0.2])  # 4 + 4 against 1 + 1
    np.testing.assert_allclose(plane.project([[5.0, 8.0, 7.0]]), [[0, 2]], atol=1e-12)


def test_the_plane_does_not_depend_on_the_order_of_the_points():
    points = np.random.default_rng(0).normal(size=(20, 5))
    one, other = plots.principal_plane(points), plots.principal_plane(points[::-1])
    np.testing.assert_allclose(one.axes, other.axes, atol=1e-9)


def space(real, real_labels, pseudo=(), pseudo_labels=(), **options):
    pseudo = np.asarray(pseudo, float).reshape(-1, np.shape(real)[1])
    figure = plots.query_space(
        np.asarray(real, float),
        np.asarray(real_labels),
        pseudo,
        np.asarray(pseudo_labels, int),
        VOCABULARY,
        "title",
        **options,
    )
    return figure.axes[0]


def groups(axes):
    """Label of every group of marks to its coordinates [n, 2]."""
    return {group.get_label(): np.asarray(group.get_offsets()) for group in axes.collections}


# A seen class to the left and right, lynxes above and below, and a query that holds nothing.
REAL = [[-10, 0, 0], [10, 0, 0], [0, -4, 0], [0, 4, 0], [9, 9, 9]]
REAL_LABELS = [0, 0, 1, 1, -1]


def test_marks_lie_at_their_coordinates():
    axes = space(REAL, REAL_LABELS, [[0, 900, 3], [2, 1, 0]], [2, 0])
    found = groups(axes)
    assert found.keys() == {
        *("seen, real", "seen, pseudo", "lynx, real", "lynx, pseudo", "fog, real", "fog, pseudo")
    }
    np.testing.assert_allclose(found["seen, real"], [[-10, 0], [10, 0]], atol=1e-12)
    np.testing.assert_allclose(found["lynx, real"], [[0, -4], [0, 4]], atol=1e-12)
    np.testing.assert_allclose(found["fog, pseudo"], [[0, 900]], atol=1e-12)
    np.testing.assert_allclose(found["seen, pseudo"], [[2, 1]], atol=1e-12)
    assert not len(found["lynx, pseudo"]) and not len(found["fog, real"])
    assert axes.get_aspect() == 1, "one scale for both axes"
    axes.figure.draw_without_rendering()
    assert axes.get_ylim()[1] > 900
    assert "86% of their variance to the right, 14% up" in axes.get_xlabel()  # 200 against 32


def test_kinds_and_classes_can_be_told_apart():
    axes = space(REAL, REAL_LABELS, [[0, 0, 3], [1, 0, 0], [2, 0, 0]], [2, 1, 0])
    marks = {group.get_label(): group for group in axes.collections}

    def shape(name):
        return len(marks[name].get_paths()[0].vertices)

    def colour(name):
        return to_hex(marks[name].get_edgecolor()[0])

    assert shape("seen, real") == shape("lynx, real") != shape("lynx, pseudo")
    assert shape("seen, pseudo") == shape("lynx, pseudo")
    assert len(marks["lynx, real"].get_facecolor()) == 0, "a ring"
    assert to_hex(marks["seen, real"].get_facecolor()[0]) == plots.SEEN_REAL
    assert colour("lynx, real") == colour("lynx, pseudo") != colour("fog, pseudo")
    assert colour("seen, pseudo") == plots.SEEN_PSEUDO
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = ["seen, real", "seen, pseudo", "unseen: ring real, cross pseudo", "lynx", "fog"]
    assert texts == expected


def test_the_legend_names_what_is_there():
    axes = space(REAL, REAL_LABELS)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["seen, real", "unseen: ring real", "lynx"]
    texts = space(REAL[:2], [0, 0]).get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["seen, real"]


def test_the_legend_of_many_classes_ends():
    names = tuple(f"class {k}" for k in range(90))
    vocabulary = Vocabulary(names, (True,) * 90, (False,) * 90, tuple(range(1, 91)))
    points = np.random.default_rng(0).normal(size=(90, 3))
    figure = plots.query_space(points, np.arange(90), points[:0], np.zeros(0, int), vocabulary, "")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts[-1] == "and 58 more" and texts[-2] == "class 31"


def test_few_points_of_a_class_are_drawn_and_the_plane_knows_all():
    real = np.random.default_rng(1).normal(size=(400, 3)) * [5, 2, 1]
    labels = np.repeat([0, 1], 200)
    few, all_ = (groups(space(real, labels, points_per_class=count)) for count in (5, 200))
    assert len(all_["lynx, real"]) == 200
    np.testing.assert_allclose(few["lynx, real"], all_["lynx, real"][[0, 49, 99, 149, 199]])


def test_colours_of_unseen_classes_are_apart():
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in plots._distinct_colours(14)]
    colours = np.array(colours, int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(14)
    assert apart.min() > 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([[1.0, 2.0]], [0]), "at least 2 queries"),
        ((np.ones((3, 1)), [0, 0, 0]), "at least 2 numbers"),
        (([[1.0, np.nan], [0, 0]], [0, 0]), "real queries is not finite"),
    ],
)
def test_bad_queries_are_refused(arguments, sentence):
    none = np.ones((0, np.shape(arguments[0])[1])), []
    real, labels, pseudo, pseudo_labels = (*arguments, *none)[:4]
    with pytest.raises(ValueError, match=sentence):
        space(real, labels, pseudo, pseudo_labels)


def test_bars_of_classes_are_sorted_and_told_apart():
    kinds = [(True, True), (False, True), (True, False), (False, False)]
    rows = [
        {
            "name": f"class {k}",
            "is_thing": kinds[k % 4][0],
            "is_seen": kinds[k % 4][1],
            "pq": 0.5 * k,
        }
        for k in range(133)
    ]
    figure = plots.class_bars(rows)
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    stars = {2: "*", 3: "*"}
    assert names == [f"class {k}{stars.get(k % 4, '')}" for k in range(132, -1, -1)]
    bars = [bar for axes in figure.axes for bar in axes.patches]
    assert [bar.get_width() for bar in bars] == [0.5 * k for k in range(132, -1, -1)]
    colours = [to_hex(bar.get_facecolor()) for bar in reversed(bars)]
    assert len(set(colours[:4])) == 4 and colours[:4] == colours[4:8]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["thing, seen", "stuff, seen", "thing, unseen *", "stuff, unseen *"]
    # Names and numbers of neighbours do not meet: letters are lower than a bar's share of a page.
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(a.y0 >= b.y1 for a, b in zip(boxes, boxes[1:], strict=False))
    (lone,) = plots.class_bars(rows[:1]).legends
    assert [text.get_text() for text in lone.get_texts()] == ["thing, seen"]
