"""Overlays: size, colours, borders, names that fit, errors."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from concat_jax.visualize import overlay as pictures

NAMES = ("cat", "sky", "dog")
IS_THING = (True, False, True)
IS_SEEN = (True, True, False)


def two_segments(size=64):
    """Left half sky, a dog in the lower right, the rest void."""
    ids = np.zeros((size, size), np.uint8)
    ids[:, : size // 2] = 1
    ids[size // 2 :, size // 2 :] = 2
    image = np.full((size, size, 3), 128, np.uint8)
    return image, ids, np.array([1, 2, -1], np.int32)


def overlay(*arguments, **options):
    picture = pictures.panoptic_overlay(*arguments, NAMES, IS_THING, **options)
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("letters", ["éø", "шж", "λπ"])
def test_letters_beyond_ascii_are_told_apart(letters):
    def drawn(letter):
        page = Image.new("L", (30, 30))
        pictures.draw_text(ImageDraw.Draw(page), (0, 0), letter, 20, 255)
        return np.asarray(page)

    first, second = map(drawn, letters)
    assert first.any() and (first != second).any()
    assert pictures.text_size(letters, 20)[1] == pictures.text_size("ab", 20)[1]


def test_small_maps_are_enlarged_and_segments_differ():
    image, ids, labels = two_segments()
    pixels = overlay(image, ids, labels)
    assert pixels.shape == (320, 320, 3)
    sky, dog, void = pixels[300, 80], pixels[310, 310], pixels[20, 300]
    assert np.abs(sky - dog).max() > 60
    assert void.max() < 90  # dark, whatever the hatch
    border = np.delete(pixels[:, 160], np.s_[140:180], axis=0)  # rounded where three meet
    assert (border < 40).all()  # dark between the halves


def test_void_only_and_mapping_tables():
    image, ids, _ = two_segments()
    assert overlay(image, np.zeros_like(ids), {}).shape == (320, 320, 3)
    by_row, by_id = overlay(image, ids, [1, 2]), overlay(image, ids * 90, {90: 1, 180: 2})
    np.testing.assert_array_equal(by_row, by_id)


def test_names_are_drawn_where_they_fit_and_unseen_ones_stand_out():
    image, ids, labels = two_segments()
    plain = overlay(image, ids, labels)
    marked = overlay(image, ids, labels, is_seen=IS_SEEN)
    changed = np.argwhere((plain != marked).any(-1))
    assert len(changed), "the unseen name must look different"
    assert (changed >= 160).all(), "only the label inside the dog changes"
    yellow = (marked[..., 0] > 220) & (marked[..., 1] > 190) & (marked[..., 2] < 120)
    assert yellow.sum() > 100
    assert not ((plain[..., 0] > 220) & (plain[..., 1] > 190) & (plain[..., 2] < 120)).any()


def test_what_is_too_small_for_its_name_has_a_number_and_a_legend():
    image, ids, labels = two_segments()
    assert overlay(image, ids, labels).shape == (320, 320, 3)
    ids[:] = 1
    plain = overlay(image, ids, labels)
    ids[10:13, 10:13] = 2
    lone = overlay(image, ids, labels)
    legend = lone[320:]
    assert 20 < len(legend) < 60 and (legend == 255).all(-1).mean() > 0.5
    changed = np.argwhere((lone[:320] != plain).any(-1))
    assert (changed < 100).all(), "the number lies at the segment, the name of the sky stays"
    # The same name has the same number, another one the next.
    ids[40:43, 40:43] = 3
    np.testing.assert_array_equal(overlay(image, ids, [1, 2, 2])[320:], legend)
    assert (overlay(image, ids, [1, 2, 0])[320:] != legend).any()
    # On a strip of two columns the legend takes lines and keeps the width.
    narrow = overlay(np.zeros((400, 2, 3), np.uint8), np.repeat([[1, 2]], 400, 0), [0, 1], scale=1)
    assert narrow.shape[1] == 2 and len(narrow) > 400


def test_outlines_are_smooth():
    rows, columns = np.mgrid[:64, :64] + 0.5
    ids = (np.hypot(rows - 32, columns - 32) < 20).astype(int)
    rows, columns = (np.mgrid[:320, :320] + 0.5) / 5
    disc = np.hypot(rows - 32, columns - 32) < 20
    stairs, (smooth, _) = ids.repeat(5, 0).repeat(5, 1), pictures._smooth_enlarge(ids, 5, 0.8)
    assert (smooth != disc).sum() < 0.6 * (stairs != disc).sum()
    # A pixel and a line of pixels stay.
    ids[5, 5], ids[:, 60] = 2, 3
    areas = np.bincount(pictures._smooth_enlarge(ids, 5, 0.8)[0].ravel())
    assert areas[2] > 0 and areas[3] > 320 * 2
    # At native size a line fades on either side.
    image = np.full((640, 640, 3), 128, np.uint8)
    ids = np.tri(640, dtype=int) + 1
    across = overlay(image, ids, [1, 1])[20:40, 30].sum(-1)
    assert len(np.unique(across)) > 3 and across.min() < 80


def test_a_slanted_border_has_no_stairs_at_native_size():
    """Its centre, by brightness row by row, lies on a line to a fraction of a pixel."""
    rows, columns = np.mgrid[:400, :400]
    ids = 1 + (columns > 150 + 0.4 * rows)
    image = np.full((400, 400, 3), 128, np.uint8)
    pixels = overlay(image, ids, [1, 1], scale=1)[60:130, 150:250].sum(-1)  # clear of the names
    dark = np.maximum(pixels[:, :1] - pixels, 0) * (pixels < pixels[:, -1:])
    centres = (dark * np.arange(100)).sum(1) / dark.sum(1)
    line = np.polyfit(np.arange(70), centres, 1)
    assert line[0] == pytest.approx(0.4, abs=0.005)
    assert np.std(centres - np.polyval(line, np.arange(70))) < 0.065


def test_labels_do_not_overlap():
    ids = np.repeat(np.repeat(np.arange(1, 10).reshape(3, 3), 24, 0), 24, 1)
    blank = np.zeros((360, 360), bool)
    names = [pictures._Label(i, "cat", (200, 100, 100), False) for i in range(1, 10)]
    taken = blank.copy()
    compact = ids.repeat(5, 0).repeat(5, 1)
    for label in names:
        corner = pictures._place(compact == label.row, taken, (60, 20), 0.97)
        x, y = corner
        assert (compact[y : y + 20, x : x + 60] == label.row).all()
        assert not taken[y : y + 20, x : x + 60].any()
        taken[y : y + 20, x : x + 60] = True
    assert pictures._place(compact == 1, np.ones_like(blank), (60, 20), 0.5) is None


def test_class_colours_are_stable_and_apart():
    assert pictures.segment_colour(7, True) == pictures.segment_colour(7, True)
    colours = [pictures.segment_colour(k, True) for k in range(24)]
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 20
    shades = {pictures.segment_colour(7, True, instance) for instance in range(5)}
    assert len(shades) == 5
    for label in range(133):
        assert all(0 <= c <= 255 for c in pictures.segment_colour(label, label % 2 == 0, label))


def test_an_id_without_a_label_is_refused():
    with pytest.raises(ValueError, match="id 3 has no label"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 3), [0, 1])
