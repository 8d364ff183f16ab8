"""Jitter, crop, pad and flip: image and id map stay aligned, and PIL is the reference."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines import augment, id_runs, placement


def _random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _blocks(height=60, width=80):
    """Twelve segments as 4 x 3 blocks, and an image painted in a colour for each."""
    ids = (1 + np.arange(height)[:, None] * 3 // height * 4 + np.arange(width) * 4 // width).astype(
        np.uint16
    )
    colours = np.random.default_rng(1).integers(0, 256, (13, 3), dtype=np.uint8)
    return colours[ids], ids, colours


def _whole(ids, resized, mirrored=False):
    return placement.Placement((0, ids.shape[0]), (0, ids.shape[1]), resized, mirrored)


def _place(image, ids, where, size, **options):
    """Image and id map, as many segments as there are."""
    out, out_ids, rows = placement.place(image, ids, where, size, max_segments=65535, **options)
    # With the numbers that they had.
    return out, np.concatenate([[0], rows + 1])[out_ids]


def _interior(ids, margin):
    """[H, W] bool: every pixel within `margin` has the same id (bilinear cannot have mixed)."""
    inside = np.zeros(ids.shape, bool)
    h, w = ids.shape
    core = ids[margin : h - margin, margin : w - margin]
    same = np.ones(core.shape, bool)
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            same &= core == ids[margin + dy : h - margin + dy, margin + dx : w - margin + dx]
    inside[margin : h - margin, margin : w - margin] = same
    return inside


@pytest.mark.parametrize("seed", range(12))
def test_jitter_keeps_image_and_ids_aligned(seed):
    image, ids, colours = _blocks()
    out, out_ids, rows = augment.augment_example(
        "lsj",
        np.random.default_rng(seed),
        Image.fromarray(image),
        ids,
        64,
        scale_range=(0.5, 2.0),
        max_segments=300,
    )
    height, width = out_ids.shape
    assert out.shape == (64, 64, 3) and max(height, width) <= 64 and out_ids.dtype == np.uint16
    assert (out[height:] == 128).all() and (out[:, width:] == 128).all()
    assert (out_ids > 0).all()
    inside = _interior(out_ids, 2)
    assert inside.sum() > 100
    np.testing.assert_array_equal(
        out[:height, :width][inside], colours[1 + rows[out_ids[inside] - 1]]
    )


def test_a_window_is_what_the_whole_resized_image_shows_there():
    # detectron2 resizes the whole image, then cuts. The window's edges are whole source pixels
    # here, so what is cut lies up to one of them off: a smooth image changes by as much.
    slope = np.arange(41) * 6
    image = np.broadcast_to(slope[None, :, None], (30, 41, 3)).astype(np.uint8)
    ids = np.zeros((30, 41), np.uint8)
    whole = np.asarray(Image.fromarray(image).resize((97, 71), 2)).astype(int)
    for top, left in [(0, 0), (7, 33), (7, 13)]:
        where = placement.resize_then_cut((30, 41), (71, 97), (top, left), 64)
        assert where.resized == (64, 64)
        out, out_ids = _place(image, ids, where, 64)
        assert out_ids.shape == (64, 64)
        assert np.abs(out.astype(int) - whole[top : top + 64, left : left + 64]).max() <= 6


def test_a_window_is_widened_to_whole_source_pixels_by_hand():
    # Twice as large, then columns 3 to 10: source columns 1.5 to 5, so 1 to 5.
    where = placement.resize_then_cut((10, 20), (20, 40), (0, 3), 7, mirrored=True)
    assert where == placement.Placement((0, 4), (1, 5), (7, 7), True)
    # A seventh of the size, smaller than the canvas: the whole image.
    where = placement.resize_then_cut((70, 140), (10, 20), (0, 0), 64)
    assert where == placement.Placement((0, 70), (0, 140), (10, 20))


def test_mirroring_reverses_the_valid_area_and_pads_at_the_same_corner():
    # Sizes at which no pixel centre falls between two source pixels: either may win there.
    image, ids, _ = _blocks()
    plain = _place(image, ids, _whole(ids, (20, 32)), 48)
    mirrored = _place(image, ids, _whole(ids, (20, 32), True), 48)
    assert plain[1].shape == mirrored[1].shape == (20, 32)
    np.testing.assert_array_equal(mirrored[0][:20, :32], plain[0][:20, :32][:, ::-1])
    np.testing.assert_array_equal(mirrored[1], plain[1][:, ::-1])
    assert (mirrored[0][:20, 32:] == 128).all()


def test_same_size_placement_is_the_identity_and_takes_pil_images():
    image, ids = _random_image(32, 32), np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for given in (image, Image.fromarray(image)):
        out, out_ids = _place(given, ids, _whole(ids, (32, 32)), 32)
        np.testing.assert_array_equal(out, image)
        np.testing.assert_array_equal(out_ids, ids)


def test_jitter_geometry_over_many_draws():
    size, mirrored, longest = 100, 0, []
    for seed in range(2000):
        p = augment.sample_jitter(np.random.default_rng(seed), 600, 1200, size)
        (top, bottom), (left, right) = p.rows, p.columns
        assert 0 <= top < bottom <= 600 and 0 <= left < right <= 1200
        assert max(p.resized) <= size
        scale = p.resized[1] / (right - left)
        assert abs(p.resized[0] - scale * (bottom - top)) <= 1  # aspect kept
        longest.append(1200 * scale / size)
        mirrored += p.mirrored
    assert min(longest) >= 0.1 - 0.002 and max(longest) <= 2.0
    assert np.mean(longest) == pytest.approx(1.05, abs=0.04)  # uniform over [0.1, 2]
    assert np.std(longest) == pytest.approx(1.9 / 12**0.5, abs=0.03)
    assert 900 < mirrored < 1100


def test_windows_reach_both_ends():
    draws = [
        augment.sample_jitter(np.random.default_rng(s), 40, 120, 100, scale_range=(1.2, 1.2))
        for s in range(200)
    ]
    # Not resized: a hundred of 120 columns, from each of 21 places.
    assert {p.columns for p in draws} == {(left, left + 100) for left in range(21)}


def test_jitter_is_a_function_of_the_generator():
    draw = [augment.sample_jitter(np.random.default_rng(5), 60, 80, 64) for _ in range(2)]
    assert draw[0] == draw[1]
    assert draw[0] != augment.sample_jitter(np.random.default_rng(6), 60, 80, 64)


def test_jitter_never_loses_the_whole_image():
    p = augment.sample_jitter(np.random.default_rng(0), 2, 500, 10, scale_range=(0.1, 0.1))
    assert p.resized == (1, 1) and p.rows == (0, 2) and p.columns == (0, 500)


def test_keep_largest_segments_by_hand():
    ids = np.array([[0, 2, 2, 2], [5, 5, 4, 4], [7, 0, 0, 2]], np.uint16)  # 2: 4, 5: 2, 4: 2, 7: 1
    new, rows = id_runs.keep_largest_segments(ids, 10)
    assert rows.tolist() == [1, 3, 4, 6] and new.dtype == np.uint8
    assert new.tolist() == [[0, 1, 1, 1], [3, 3, 2, 2], [4, 0, 0, 1]]
    new, rows = id_runs.keep_largest_segments(ids, 2)
    assert rows.tolist() == [1, 3]  # 4 wins the tie against 5
    assert new.tolist() == [[0, 1, 1, 1], [0, 0, 2, 2], [0, 0, 0, 1]]
    assert id_runs.keep_largest_segments(ids, 256)[0].dtype == np.uint16
    new, rows = id_runs.keep_largest_segments(np.zeros((2, 2), np.uint8), 3)
    assert rows.tolist() == [] and not new.any()


def test_more_than_255_segments_survive_in_sixteen_bits():
    ids = np.arange(400, dtype=np.uint16).reshape(20, 20)
    new, rows = id_runs.keep_largest_segments(ids, 400)
    np.testing.assert_array_equal(new, ids)
    assert len(rows) == 399


def test_resize_longest_letterboxes_and_drops_what_vanishes():
    ids = np.full((40, 80), 1, np.uint8)
    ids[0, 0] = 2  # one pixel, gone at an eighth of the size
    ids[20:, 40:] = 3
    example = {
        "image": _random_image(40, 80),
        "segment_ids": ids,
        "segment_labels": np.array([5, 6, 7, -1], np.int32),
        "segment_is_thing": np.array([False, True, True, False]),
        "segment_is_crowd": np.array([False, False, True, False]),
        "segment_source_ids": np.array([50, 60, 70, 0]),
        "image_id": np.int64(9),
        "image_size": np.array([40, 80], np.int32),
        "file_name": "a.jpg",
    }
    small = augment.resize_longest(example, 10)
    assert small["image"].shape == (10, 10, 3)
    assert small["image_size"].tolist() == [5, 10] and small["image_size"].dtype == np.int32
    assert small["segment_labels"].tolist() == [5, 7, -1, -1]
    assert small["segment_is_thing"].tolist() == [False, True, False, False]
    assert small["segment_is_crowd"].tolist() == [False, True, False, False]
    assert small["segment_source_ids"].tolist() == [50, 70, 0, 0]
    expected = np.zeros((10, 10), int)
    expected[:5] = 1
    expected[2:5, 5:] = 2
    # Row centres of the small map are 4, 12, 20, 28, 36 in the large one.
    assert small["segment_ids"].tolist() == expected.tolist()
    assert small["file_name"] == "a.jpg" and small["image_id"] == 9
    assert example["image_size"].tolist() == [40, 80]  # the input is left alone
    assert augment.resize_longest(example, 160)["image_size"].tolist() == [80, 160]


@pytest.mark.parametrize("factor", [1.0, 1.04, 1.7, 3.3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_enlarging_is_that_of_pil(factor, mirrored):
    # Both are bilinear; OpenCV has 11 bits of weight where PIL has 22.
    image, ids = _random_image(70, 61, seed=3), np.zeros((70, 61), np.uint8)
    resized = (round(70 * factor), round(61 * factor))
    out, out_ids = _place(image, ids, _whole(ids, resized, mirrored), 256)
    assert out_ids.shape == resized
    expected = np.asarray(Image.fromarray(image).resize(resized[::-1], 2)).astype(int)
    expected = expected[:, ::-1] if mirrored else expected
    difference = np.abs(out[: resized[0], : resized[1]] - expected)
    assert difference.max() <= 2 and difference.mean() < 0.3


def _scene(height, width):
    """Soft blobs with hard edges and fine grain, as a photograph has them."""
    rng = np.random.default_rng(3)
    soft = rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(soft).resize((width, height), 2)).astype(int)
    image[height // 3 :, width // 2 :] = 255 - image[height // 3 :, width // 2 :]
    return np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("factor", [1.05, 1.15, 1.5, 1.9, 2.6, 7.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_shrinking_comes_near_to_that_of_pil(factor, mirrored):
    # Pillow's bilinear filter widens with the factor, as detectron2's resize does.
    image, ids = _scene(240, 320), np.zeros((240, 320), np.uint8)
    resized = (round(240 / factor), round(320 / factor))
    out, out_ids = _place(image, ids, _whole(ids, resized, mirrored), 320)
    assert out_ids.shape == resized

    def shrink(filter):
        small = np.asarray(Image.fromarray(image).resize(resized[::-1], filter)).astype(float)
        return small[:, ::-1] if mirrored else small

    def error(found):
        return np.sqrt(np.square(found - shrink(Image.Resampling.BILINEAR)).mean())

    ours = error(out[: resized[0], : resized[1]])
    # Taking no care of what lies between the samples errs twice as much and more.
    assert ours < 2.6 and ours < 0.4 * error(shrink(Image.Resampling.NEAREST))


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_shrinking_by_a_whole_factor_is_the_mean(factor):
    image, ids = _random_image(30, 60, seed=3), np.zeros((30, 60), np.uint8)
    resized = (30 // factor, 60 // factor)
    out, _ = _place(image, ids, _whole(ids, resized), 40)
    expected = image.reshape(resized[0], factor, resized[1], factor, 3).mean((1, 3))
    assert np.abs(out[: resized[0], : resized[1]] - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("factor", [1, 7])
def test_tiny_images(height, width, factor):
    image, ids = _random_image(height, width), np.ones((height, width), np.uint16)
    resized = (height * factor, width * factor)
    out, out_ids = _place(image, ids, _whole(ids, resized), 64)
    assert out_ids.shape == resized and out_ids.all()
    expected = np.asarray(Image.fromarray(image).resize(resized[::-1], 2)).astype(int)
    assert np.abs(out[: resized[0], : resized[1]] - expected).max() <= 1


@pytest.mark.parametrize("rows", [(0, 37), (5, 30)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_ids_are_the_nearest_pixels_of_the_window(rows, mirrored):
    ids = np.random.default_rng(4).integers(0, 900, (37, 53)).astype(np.uint16)
    columns = (7, 50)
    for resized in [(64, 64), (20, 31), (rows[1] - rows[0], 43)]:
        where = placement.Placement(rows, columns, resized, mirrored)
        out, kept = placement.place_segments(ids, where, 900)
        assert out.dtype == np.uint16 and out.shape == resized
        assert np.unique(out[out > 0]).tolist() == list(range(1, len(kept) + 1))
        out = np.concatenate([[0], kept + 1])[out]
        for y in range(resized[0]):
            for x in range(resized[1]):
                column = resized[1] - 1 - x if mirrored else x
                source = (
                    rows[0] + (2 * y + 1) * (rows[1] - rows[0]) // (2 * resized[0]),
                    columns[0] + (2 * column + 1) * 43 // (2 * resized[1]),
                )
                assert out[y, x] == ids[source]


@pytest.mark.parametrize("resized", [(3, 4), (12, 16), (48, 64)])
def test_of_too_many_segments_the_largest_in_the_window_stay(resized):
    ids = np.zeros((12, 20), np.uint8)
    ids[:, :8], ids[:, 8:12], ids[:4, 12:16], ids[:, 16:] = 1, 2, 3, 4  # 4 is out of the window
    where = placement.Placement((0, 12), (0, 16), resized)
    out, rows = placement.place_segments(ids, where, 3)
    assert rows.tolist() == [0, 1, 2]
    out, rows = placement.place_segments(ids, where, 2)
    assert rows.tolist() == [0, 1] and out.shape == resized
    assert [(out == k).mean() for k in range(3)] == [1 / 4, 1 / 2, 1 / 4]


def test_a_canvas_is_written_all_over():
    image, ids, _ = _blocks()
    cut = placement.resize_then_cut((60, 80), (90, 120), (26, 50), 64, mirrored=True)
    for where in (_whole(ids, (20, 30)), cut):
        canvas = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        out, _ = _place(image, ids, where, 64, canvas=canvas)
        assert out is canvas
        np.testing.assert_array_equal(out, _place(image, ids, where, 64)[0])


def test_padding_of_ids():
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    padded = placement.pad_ids(ids, 4)
    assert padded.dtype == np.uint16
    assert padded.tolist() == [[0, 1, 2, 0], [3, 4, 5, 0], [0] * 4, [0] * 4]


def test_keep_largest_segments_on_random_maps():
    rng = np.random.default_rng(0)
    for limit in (1, 3, 30):
        ids = rng.integers(0, 20, (17, 23)).astype(np.uint16)
        new, rows = id_runs.keep_largest_segments(ids, limit)
        areas = [(-(ids == value).sum(), value) for value in range(1, 20) if (ids == value).any()]
        kept = sorted(value for _, value in sorted(areas)[:limit])
        assert (rows + 1).tolist() == kept
        for position, value in enumerate(kept, start=1):
            np.testing.assert_array_equal(new == position, ids == value)
        assert ((new == 0) == ~np.isin(ids, kept)).all()


def test_semantic_placement_takes_the_shortest_edge_and_limits_the_longest():
    options = dict(shortest_edges=(30, 60, 90), longest_edge=300)
    drawn = [
        augment.sample_semantic(np.random.default_rng(s), 60, 240, 40, **options)
        for s in range(300)
    ]
    # 90 would make the longer side 360, so a canvas of 40 shows 40 / 1.25 source pixels of it.
    heights = {p.rows[1] - p.rows[0] for p in drawn}
    assert heights == {60, 40, 32, 33}  # 33 where the window is widened to whole pixels
    counts = [sum(p.rows[1] - p.rows[0] in h for p in drawn) for h in ({60}, {40}, {32, 33})]
    assert min(counts) > 70
    assert 110 < sum(p.mirrored for p in drawn) < 190
    halved = [p for p in drawn if p.rows == (0, 60)]
    assert {p.resized for p in halved} == {(30, 40)}
    lefts = [p.columns[0] for p in halved]
    assert min(lefts) < 16 and max(lefts) > 144


def test_semantic_examples_are_functions_of_the_generator():
    image, ids, _ = _blocks()
    picture = Image.fromarray(image)

    def draw(kind, seed):
        return augment.augment_example(
            kind,
            np.random.default_rng(seed),
            picture,
            ids,
            48,
            scale_range=(0.5, 1.5),
            max_segments=12,
        )

    for left, right in zip(draw("semantic", 1), draw("semantic", 1), strict=True):
        np.testing.assert_array_equal(left, right)
    drawn = [draw("semantic", seed) for seed in range(12)]
    assert len({out.tobytes() for out, _, _ in drawn}) == 12
    # Shortest edges of 24 to 72: an image of 60 x 80 is cut at 48 or padded.
    assert all(24 <= ids.shape[0] <= 48 and 32 <= ids.shape[1] <= 48 for _, ids, _ in drawn)
    colours = {tuple(out[0, 0]) for out, _, _ in drawn}
    assert len(colours) > 6
    letterboxed = draw("none", 0)
    np.testing.assert_array_equal(letterboxed[0], draw("none", 1)[0])
    assert letterboxed[1].shape == (36, 48)
