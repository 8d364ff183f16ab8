"""Post-processing against a loop that follows the reference, and its corner cases."""

from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

from concat_jax.inference.assign_pixels import assign_pixels
from concat_jax.inference.panoptic import (
    Fate,
    list_segments,
    panoptic_inference,
    rank_queries,
    settle_segments,
)
from tests.golden import cases


@flax.struct.dataclass
class Output:
    """Maps and tables of `panoptic_inference` as one tree."""

    segment_ids: Any
    tables: Any

    def __getattr__(self, name):
        return getattr(self.tables, name)


def panoptic(*arguments, **options):
    return Output(*panoptic_inference(*arguments, **options))


def unpack(output, sizes=((None, None),)):
    return [
        list_segments(ids[: size[0], : size[1]], jax.tree.map(lambda t, r=row: t[r], output.tables))
        for row, (ids, size) in enumerate(zip(output.segment_ids, sizes, strict=True))
    ]


@pytest.mark.parametrize("keep_rule", cases.KEEP_RULES)
@pytest.mark.parametrize(
    ("size", "strip_rows"), list(zip(cases.PANOPTIC_SIZES, (8, 32, 4), strict=True)), ids=str
)
def test_equals_the_reference_loop(keep_rule, size, strip_rows):
    """Mask2Former's loop over kept queries, whose results tests/golden holds."""
    mask_logits, probs = cases.panoptic_inputs()
    output = jax.device_get(
        panoptic(
            mask_logits,
            probs,
            cases.PANOPTIC_IS_THING,
            cases.PANOPTIC_IS_SEEN,
            output_size=size,
            keep_rule=keep_rule,
            strip_rows=strip_rows,
        )
    )
    golden = cases.load("panoptic")
    key = f"{keep_rule}_{size[0]}x{size[1]}"
    np.testing.assert_array_equal(output.labels, golden[f"{key}_labels"])
    # Torch and XLA round the resize differently: a near tie may fall the other way.
    assert ((golden[f"{key}_ids"] != output.segment_ids).mean(axis=(1, 2)) < 0.002).all()
    labels = probs[..., :-1].argmax(-1)
    chosen = np.take_along_axis(probs, labels[..., None], axis=-1)[..., 0]
    if keep_rule == "objectness":
        chosen = chosen / probs[..., :-1].sum(-1)
    np.testing.assert_allclose(output.scores, np.where(output.labels >= 0, chosen, 0), rtol=1e-6)
    fates = set(output.fates.ravel().tolist())
    assert {Fate.SEGMENT, Fate.MERGED, Fate.NO_OBJECT, Fate.OVERLAPPED} <= fates
    assert (Fate.LOW_SCORE in fates) == (keep_rule == "score")


def masks_of(rows):
    """Logits +8 / -8 from strings of 0 and 1, one string a query, one pixel row."""
    return np.where(np.array([[[list(r)] for r in rows]]) == "1", 8.0, -8.0).astype(np.float32)


def infer(mask_logits, probs, is_thing, is_seen=None, **options):
    is_thing = np.array(is_thing)
    is_seen = np.ones(len(is_thing), bool) if is_seen is None else np.array(is_seen)
    return jax.device_get(
        panoptic(
            mask_logits,
            np.array([probs], np.float32),
            is_thing,
            is_seen,
            output_size=options.pop("output_size", mask_logits.shape[2:]),
            **options,
        )
    )


def test_stuff_merges_into_its_first_segment_and_things_do_not():
    masks = masks_of(["110000", "001100", "000011"])
    probs = [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.9, 0.05, 0.05]]
    stuff = infer(masks, probs, [False, True])
    assert stuff.segment_ids[0, 0].tolist() == [1, 1, 2, 2, 1, 1]
    assert stuff.labels[0].tolist() == [0, 1, -1]
    assert stuff.fates[0].tolist() == [Fate.SEGMENT, Fate.SEGMENT, Fate.MERGED]
    things = infer(masks, probs, [True, True])
    assert things.segment_ids[0, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_overlapped_query_is_dropped_and_its_pixels_stay_void():
    masks = masks_of(["1111100000", "0001111111"])
    probs = [[0.95, 0.05], [0.85, 0.15]]
    output = infer(masks, probs, [True])  # query 1 owns 5 of its 7 pixels
    assert output.segment_ids[0, 0].tolist() == [1] * 5 + [0] * 5
    assert output.fates[0].tolist() == [Fate.SEGMENT, Fate.OVERLAPPED]
    lenient = infer(masks, probs, [True], overlap_threshold=0.7)
    assert lenient.segment_ids[0, 0].tolist() == [1] * 5 + [2] * 5


def test_overlap_of_exactly_the_threshold_is_kept():
    output = infer(masks_of(["11100000", "00111110"]), [[0.95, 0.05], [0.85, 0.15]], [True])
    assert output.labels[0].tolist() == [0, 0]  # query 1 owns 4 of 5


def test_objectness_keeps_what_the_class_score_drops():
    masks = masks_of(["1100", "0011"])
    probs = [[0.45, 0.40, 0.15], [0.1, 0.1, 0.8]]
    assert infer(masks, probs, [True, True]).labels[0].tolist() == [0, -1]
    by_score = infer(masks, probs, [True, True], keep_rule="score")
    assert by_score.labels[0].tolist() == [-1, -1]
    assert by_score.fates[0].tolist() == [Fate.LOW_SCORE, Fate.NO_OBJECT]
    np.testing.assert_allclose(by_score.keep_scores[0], [0.45, 0.1], rtol=1e-6)


def test_gamma_renames_towards_unseen_and_moves_no_pixel():
    masks = masks_of(["1100", "0011"])
    probs = [[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]
    plain = infer(masks, probs, [True, True], [True, False])
    calibrated = infer(masks, probs, [True, True], [True, False], gamma=0.3)
    assert plain.labels[0].tolist() == [0, 0]
    assert calibrated.labels[0].tolist() == [1, 0]
    np.testing.assert_array_equal(plain.segment_ids, calibrated.segment_ids)
    assert calibrated.scores[0, 0] == pytest.approx(0.4 / 0.9)


def test_gamma_sweep_compiles_once():
    masks, probs = masks_of(["1100", "0011"]), np.full((1, 2, 3), 1 / 3, np.float32)
    traces = []

    @jax.jit
    def sweep(gamma):
        traces.append(gamma)
        return panoptic(
            masks, probs, np.ones(2, bool), np.array([True, False]), output_size=(1, 4), gamma=gamma
        )

    labels = [sweep(gamma).labels[0].tolist() for gamma in (0.0, 0.1, 0.2)]
    assert labels == [[0, 0], [1, 1], [1, 1]]
    assert len(traces) == 1


@pytest.mark.parametrize("keep_rule", ["score", "objectness"])
def test_no_query_kept_gives_void_and_an_explanation(keep_rule):
    masks = masks_of(["1100", "0011"])
    output = infer(masks, [[0.1, 0.9], [0.2, 0.8]], [True], keep_rule=keep_rule)
    assert not output.segment_ids.any()
    assert (output.labels == -1).all()
    (image,) = unpack(output)
    assert image.segments == []
    assert image.fates["no_object"] == 2
    assert "2 hold no object" in image.explain()
    assert "0.20" in image.explain()


def test_explanation_names_the_rule_to_relax():
    masks = masks_of(["1100", "0011"])
    low = infer(masks, [[0.7, 0.3], [0.6, 0.4]], [True], keep_rule="score")
    assert "lower score_threshold" in unpack(low)[0].explain()
    empty = infer(masks_of(["0000"]), [[0.9, 0.1]], [True])
    assert empty.fates[0, 0] == Fate.NO_PIXELS
    assert unpack(empty)[0].explain().endswith(": lower mask_threshold.")
    covered = unpack(empty)[0]
    covered.fates.update(no_pixels=0, overlapped=1)
    assert covered.explain().endswith(": lower overlap_threshold or raise mask_threshold.")
    # To who has other names for them, and not all of them.
    assert covered.explain({"mask_threshold": "the slider"}).endswith(": raise the slider.")
    assert "threshold" not in covered.explain({}).partition("keep score is")[2]


def test_one_class_one_query():
    output = infer(masks_of(["1111"]), [[0.9, 0.1]], [False])
    assert output.segment_ids[0, 0].tolist() == [1, 1, 1, 1]
    assert unpack(output)[0].segments == [
        {"id": 1, "label": 0, "score": pytest.approx(1.0), "area": 4}
    ]


def test_padding_counts_in_no_area():
    # Query 1 owns 4 of its 8 pixels in all, but all 4 in the valid area of width 6.
    masks = masks_of(["1100000011", "0011111111"])
    probs = [[0.95, 0.05], [0.85, 0.15]]
    cut = np.array([[1, 6]])
    padded = infer(masks, probs, [True], overlap_threshold=0.9)
    assert padded.labels[0].tolist() == [0, -1]
    output = infer(masks, probs, [True], overlap_threshold=0.9, image_size=cut, source_size=cut)
    assert output.segment_ids[0, 0].tolist() == [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]
    (image,) = unpack(output, cut)
    assert image.id_map.shape == (1, 6)
    assert [s["area"] for s in image.segments] == [2, 4]
    assert image.labels_by_id() == {1: 0, 2: 0}


def test_images_of_a_batch_do_not_touch():
    rng = np.random.RandomState(3)
    masks = np.stack([cases.blobs(rng, 6, 8, 8) for _ in range(3)])
    probs = cases.peaked_probs(rng, 3, 6, 4)
    flags = np.array([True, False, True, False])
    together = panoptic(masks, probs, flags, flags, output_size=(16, 16))
    for b in range(3):
        alone = panoptic(masks[b : b + 1], probs[b : b + 1], flags, flags, output_size=(16, 16))
        for whole, part in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(whole[b], part[0], rtol=1e-6)


@pytest.mark.parametrize("side", cases.TRANSFORMERS_SIDES)
def test_equals_the_map_of_transformers(side):
    """The same segments, where transformers' rules are the reference's.

    It resizes to 384x384 first, whatever the logits' size; it compares score * mask probability,
    not the mask probability, with the threshold, which is the same at scores of 1; it gives a
    pixel to the best bidder also where its mask does not cover it, which is left out here; and
    after fusing stuff it gives out ids that are taken, so nothing is fused here.
    """
    logits, class_logits = cases.transformers_inputs(side)
    golden = cases.load("panoptic")
    is_thing = np.ones(8, bool)
    ours = jax.device_get(
        panoptic(
            logits,
            jax.nn.softmax(class_logits),
            is_thing,
            is_thing,
            output_size=(384, 384),
            keep_rule="score",
            overlap_threshold=0.2,
        )
    )
    labels = dict(golden[f"transformers_{side}_labels"].tolist())
    assert 2 < len(labels) < (class_logits.argmax(-1) < 8).sum()
    their_map = golden[f"transformers_{side}_map"]
    mine = ours.segment_ids[0]
    pairs, counts = np.unique(
        np.stack([mine[mine > 0], their_map[mine > 0]]), axis=1, return_counts=True
    )
    # A segment of ours is one of theirs, but for ties of single pixels.
    matched = pairs[:, counts > 5]
    assert len(set(matched[0])) == len(set(matched[1])) == matched.shape[1] == len(labels)
    assert counts[counts <= 5].sum() <= 10
    assert {int(t): int(ours.labels[0, m - 1]) for m, t in matched.T} == labels


def test_sizes_in_buckets_give_what_exact_sizes_give():
    """Padded logits and a padded map, in one program, against each image alone."""
    rng = np.random.RandomState(5)
    sources, natives = [(12, 16), (20, 7)], [(37, 50), (64, 13)]
    padded = rng.normal(0, 9, (2, 6, 20, 20)).astype(np.float32)  # garbage where nothing is valid
    masks = [cases.blobs(rng, 6, *source) for source in sources]
    for row, mask in enumerate(masks):
        padded[row, :, : mask.shape[1], : mask.shape[2]] = mask
    probs = cases.peaked_probs(rng, 2, 6, 4)
    flags = np.array([True, False, True, False])
    together = panoptic(
        padded,
        probs,
        flags,
        flags,
        output_size=(64, 70),
        source_size=np.array(sources),
        image_size=np.array(natives),
    )
    assert {2, 3, 4} & set(np.unique(together.segment_ids).tolist())
    for row, (mask, native) in enumerate(zip(masks, natives, strict=True)):
        alone = panoptic(mask[None], probs[row : row + 1], flags, flags, output_size=native)
        ids = np.asarray(together.segment_ids[row])
        np.testing.assert_array_equal(ids[: native[0], : native[1]], alone.segment_ids[0])
        assert not ids[native[0] :].any() and not ids[:, native[1] :].any()
        for name in ("labels", "fates", "areas"):
            np.testing.assert_array_equal(getattr(together, name)[row], getattr(alone, name)[0])
        areas = np.bincount(ids.ravel(), minlength=7)[1:]
        np.testing.assert_array_equal(alone.areas[0], areas)


def test_fractional_extents_keep_the_scale_of_the_image():
    """An image 6 pixels wide has 1.5 logits at stride 4: the second starts at pixel 4."""
    logits = np.array([[[[8.0, -8.0, 99.0]]]], np.float32)
    output = infer(
        logits,
        [[0.9, 0.1]],
        [True],
        output_size=(1, 6),
        source_size=np.array([[1, 1.5]]),
        overlap_threshold=0.0,
    )
    # Logit centres lie at 1.5 and 5.5, so the logit changes its sign at 3.5: three pixels are
    # above zero and the fourth, whose own centre is 3.5, is exactly at it.
    assert output.segment_ids[0, 0].tolist() == [1, 1, 1, 1, 0, 0]


def test_neither_strips_nor_groups_show():
    rng = np.random.RandomState(10)
    masks, probs = cases.blobs(rng, 10, 12, 16)[None], cases.peaked_probs(rng, 1, 10, 4)
    flags = np.array([True, False, True, False])
    sizes = {"output_size": (37, 50)}
    plain = panoptic(masks, probs, flags, flags, **sizes, strip_rows=37)
    other = panoptic(masks, probs, flags, flags, **sizes, strip_rows=5, queries_at_once=3)
    assert (np.asarray(plain.labels) >= 0).sum() > 2
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_tiles_add_up_to_the_whole():
    rng = np.random.RandomState(7)
    masks, probs = cases.blobs(rng, 10, 12, 16)[None], cases.peaked_probs(rng, 1, 10, 4)
    flags = np.array([True, False, True, False])
    native = np.array([[37, 50]])
    whole = panoptic(masks, probs, flags, flags, output_size=(37, 50))
    rule = dict(keep_rule="objectness", score_threshold=0.8, objectness_threshold=0.5)
    queries = rank_queries(probs, 1 - probs[..., -1], flags, **rule)
    tile = jax.jit(
        lambda origin: assign_pixels(
            masks, queries, output_size=(20, 20), image_size=native, origin=origin
        )
    )
    tiles, counts = {}, None
    for top in (0, 20):
        for left in (0, 20, 40):
            tiles[top, left], here = tile(np.array([top, left]))
            counts = here if counts is None else counts + here
    tables = settle_segments(queries, counts, flags[queries.labels], overlap_threshold=0.8)
    codes = np.block([[np.asarray(tiles[t, l][0]) for l in (0, 20, 40)] for t in (0, 20)])
    ids = np.asarray(tables.lookup[0])[codes]
    np.testing.assert_array_equal(ids[:37, :50], whole.segment_ids[0])
    assert not ids[37:].any() and not ids[:, 50:].any()
    np.testing.assert_array_equal(tables.areas, whole.areas)


def test_through_the_input_size_differs_by_border_pixels():
    """The reference blends twice, logits to input size to image size; ours once."""
    torch = pytest.importorskip("torch")
    rng = np.random.RandomState(8)
    probs = np.tile(np.array([0.95, 0.0, 0.05], np.float32), (12, 1))
    masks = cases.blobs(rng, 12, 50, 67)
    direct = infer(
        masks[None], probs, [True, True], output_size=(96, 128), source_size=np.array([[50, 66.75]])
    )
    large = torch.nn.functional.interpolate(
        torch.tensor(masks)[None], size=(200, 268), mode="bilinear", align_corners=False
    )[..., :267]
    twice = infer(large.numpy(), probs, [True, True], output_size=(96, 128))
    differing = (direct.segment_ids != twice.segment_ids).mean()
    assert differing < 0.01
    np.testing.assert_array_equal(direct.labels, twice.labels)
