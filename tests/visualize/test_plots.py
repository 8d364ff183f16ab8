"""What the figures hold: bars, whiskers, marks, names; pixels are matplotlib's."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.visualize import plots

VOCABULARY = Vocabulary(("cat", "lynx", "fog"), (True,) * 3, (True, False, False), (1, 2, 3))


def chart(groups, titles=("first", "second")):
    (axes,) = plots.bar_chart(titles, groups, title="title", unit="percent").axes
    return axes


def bars(axes, name):
    """(middle, length) of a quantity's bars."""
    (container,) = [c for c in axes.containers if c.get_label() == name]
    return [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in container]


def test_bars_and_numbers_of_every_row():
    axes = chart({"unseen": [(20.0, 1.5), (40.0, None)], "seen": [(80.0, 3.0), (-60.0, 0.0)]})
    np.testing.assert_allclose(bars(axes, "unseen"), [(-0.17, 20), (0.83, 40)])
    np.testing.assert_allclose(bars(axes, "seen"), [(0.17, 80), (1.17, -60)])
    numbers = {text.get_text(): round(text.xy[1], 2) for text in axes.texts}
    assert numbers == {"20.0 ± 1.5": -0.17, "40.0": 0.83, "80.0 ± 3.0": 0.17, "-60.0 ± 0.0": 1.17}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row is above"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unseen", "seen"]
    assert axes.get_xlabel() == "percent"
    low, high = axes.get_xlim()
    assert low < -60 and high > 83


def test_whiskers_reach_a_deviation_to_both_sides():
    axes = chart({"h": [(50.0, 10.0), (7.0, None)]})
    (whiskers,) = axes.collections
    np.testing.assert_allclose(whiskers.get_segments(), [[(40, 0), (60, 0)]])


def test_what_was_not_measured_has_a_dash_and_no_bar():
    axes = chart({"h": [(None, None), (float("nan"), 1.0)]})
    assert bars(axes, "h") == []
    assert [text.get_text() for text in axes.texts] == ["–", "–"]
    axes.figure.draw_without_rendering()


def test_long_titles_and_signs_of_formulas_are_set_as_they_are(tmp_path):
    long = "finetune without pseudo queries (the fair control), $at$ the γ of the validation " * 3
    figure = plots.bar_chart([long], {long: [(60.0, 9.0)]}, title=long, unit="$%$ of $_")
    plots.save_figure(figure, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.width == 1200
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all(), "nothing is cut off"
    (name,) = figure.axes[0].get_yticklabels()
    assert max(map(len, name.get_text().split("\n"))) <= 52
    assert name.get_text().replace("\n", " ") == long.strip()


@pytest.mark.parametrize(
    ("titles", "groups", "sentence"),
    [
        ((), {"h": []}, "nothing to draw"),
        (("a",), {}, "nothing to draw"),
        (("a", "b"), {"h": [(1.0, 0.0)]}, "'h' has 1 rows but there are 2 titles"),
        (("a",), {"h": [(1.0, -2.0)]}, "bar of 1.0 ± -2.0 cannot be drawn"),
        (("a",), {"h": [(float("inf"), 0.0)]}, "means must be finite"),
    ],
)
def test_a_chart_of_nothing_or_of_no_numbers_is_refused(titles, groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        plots.bar_chart(titles, groups, title="", unit="")


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
    figure = plots.query_space(points, np.arange(90), points[:0], [], vocabulary, "")
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
        ((np.ones((3, 2)), [0, 0]), r"real queries have shape \(3, 2\) and their labels \(2,\)"),
        ((np.ones((2, 2)), [0, 3]), "labels from 0 to 3, but the vocabulary has 3"),
        (([[1.0, np.nan], [0, 0]], [0, 0]), "real queries is not finite"),
        ((np.ones((3, 3)), [0, 0, 0], np.ones((1, 2)), [0]), "3 numbers and pseudo queries 2"),
    ],
)
def test_bad_queries_are_refused(arguments, sentence):
    none = np.ones((0, np.shape(arguments[0])[1])), []
    real, labels, pseudo, pseudo_labels = (*arguments, *none)[:4]
    with pytest.raises(ValueError, match=sentence):
        plots.query_space(real, labels, pseudo, pseudo_labels, VOCABULARY, "")
