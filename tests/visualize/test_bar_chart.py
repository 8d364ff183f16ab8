"""Bars as long as their numbers, whiskers as long as their deviations."""

import numpy as np
import pytest

from concat_jax.visualize import drawing
from concat_jax.visualize.bar_chart import bar_chart

ORANGE, BLUE, INK = (213, 94, 0), (86, 180, 233), (25, 25, 30)


def chart(groups, titles=("first", "second"), title="title", unit="percent"):
    picture = bar_chart(titles, groups, title=title, unit=unit)
    assert picture.size[0] == 1200
    return np.asarray(picture).astype(int)


def runs(pixels, colour, shortest=60):
    """(y, first x, last x) of the rows of the picture with a long run of the colour."""
    found = np.abs(pixels - colour).max(axis=-1) <= 8
    return [
        (y, int(np.flatnonzero(row).min()), int(np.flatnonzero(row).max()))
        for y, row in enumerate(found)
        if row.sum() >= shortest
    ]


def test_bars_are_as_long_as_their_means():
    pixels = chart({"unseen": [(20.0, None), (40.0, None)], "seen": [(80.0, None), (60.0, None)]})
    lengths = {}
    for name, colour in (("unseen", ORANGE), ("seen", BLUE)):
        bars = runs(pixels, colour)
        tops = [bar for k, bar in enumerate(bars) if k == 0 or bar[0] != bars[k - 1][0] + 1]
        assert len(tops) == 2, "one bar a row"
        assert len(bars) == 32, "16 pixels each"
        lengths[name] = [end - start + 1 for _, start, end in tops]
    (short, middle), (longest, long) = lengths["unseen"], lengths["seen"]
    np.testing.assert_allclose([short, middle, long], np.array([20, 40, 60]) / 80 * longest, atol=3)


def test_whiskers_reach_a_deviation_to_both_sides():
    pixels = chart({"h": [(50.0, 10.0)]}, titles=("one",))
    (_, start, end), *_ = runs(pixels, ORANGE)
    unit = (end - start + 1) / 50
    whisker = runs(pixels[:, start + 3 : 1100], INK)  # right of the title, left of the number
    assert len(whisker) == 2
    y, first, last = whisker[0]
    assert last - first == pytest.approx(20 * unit, abs=4)
    assert (first + last) / 2 + start + 3 == pytest.approx(end, abs=3)
    assert y == pytest.approx(np.mean([run[0] for run in runs(pixels, ORANGE)]), abs=1.5)
    without = chart({"h": [(50.0, None)]}, titles=("one",))
    assert not runs(without[:, start + 3 : 1100], INK)


def test_negative_numbers_go_to_the_left_of_zero():
    pixels = chart({"share": [(-10.0, None), (30.0, None)]})
    bars = runs(pixels, ORANGE)
    left, right = bars[0], bars[-1]
    assert left[2] == pytest.approx(right[1], abs=6), "both start at zero, but for the axis"
    assert right[2] - right[1] == pytest.approx(3 * (left[2] - left[1]), abs=6)


def test_what_was_not_measured_has_no_bar():
    nothing = chart({"h": [(None, None), (float("nan"), 1.0)]})
    assert not runs(nothing, ORANGE)


def test_long_titles_are_wrapped_and_nothing_is_cut_off():
    long = "finetune without pseudo queries (the fair control), at the gamma of the validation " * 2
    pixels = chart({"unseen " * 9: [(60.0, 9.0)], "seen " * 30: [(50.0, 9.0)]}, (long,), long)
    assert (pixels[:, :20] == 255).all() and (pixels[:, -20:] == 255).all()
    assert (pixels[:20] == 255).all() and (pixels[-20:] == 255).all()
    assert runs(pixels, ORANGE)[0][1] > 300, "the bars begin right of the title"


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
def test_bad_input_is_refused(titles, groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        bar_chart(titles, groups, title="", unit="")


def test_ticks_are_round_numbers():
    np.testing.assert_allclose(drawing.ticks(0.0, 64.4, 6), [0, 20, 40, 60])
    np.testing.assert_allclose(drawing.ticks(-17.0, 0.0, 6), [-15, -10, -5, 0])
    np.testing.assert_allclose(drawing.ticks(0.0, 0.05, 5), [0, 0.01, 0.02, 0.03, 0.04, 0.05])
    with pytest.raises(ValueError, match="got 1 to 1"):
        drawing.ticks(1, 1, 5)


def test_lines_fit_their_width():
    text = "one two three " * 5 + "x" * 300
    lines = drawing.wrap(text, 16, 120)
    assert all(drawing.text_width(line, 16) <= 120 for line in lines)
    assert " ".join(lines[:-1]) == ("one two three " * 5).strip()
    assert lines[-1].endswith("…")
    assert drawing.wrap("", 16, 120) == [""]
