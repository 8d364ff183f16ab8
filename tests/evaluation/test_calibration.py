"""A sweep over gamma beside evaluation at each gamma, and which gamma is chosen."""

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation import calibration
from concat_jax.evaluation.evaluate import evaluate
from concat_jax.inference.predictor import PredictConfig, Predictor
from tests.inference import fakes

VOCABULARY = Vocabulary(
    ("cat", "lynx", "sky", "fog"),
    (True, True, False, False),
    (True, False, True, False),
    (1, 2, 3, 4),
)
# Probabilities of cat, lynx, sky, fog, no-object. At gamma = 0 the queries are cat, cat and sky;
# from log(45 / 25) = 0.6 on the second is a lynx, from log(7) = 1.9 on the first is one, too.
PROBS = np.array(
    [[0.7, 0.1, 0.05, 0.05, 0.1], [0.45, 0.25, 0.1, 0.1, 0.1], [0.02, 0.02, 0.9, 0.01, 0.05]],
    np.float32,
)


def examples(count=3, size=32):
    """A cat at the upper left, a lynx at the upper right, sky below."""
    found = []
    for number in range(count):
        ids = np.full((size, size), 3, np.uint8)
        middle = size // 2 + 4 * (number % 2)
        ids[: size // 2, :middle], ids[: size // 2, middle:] = 1, 2
        found.append(fakes.example(number, ids, [0, 1, 2]))
    return found


def make_predictor(gamma, *, probs=PROBS, traced=None, **settings):
    config = PredictConfig(batch_size=2, short_side=32, long_side=32, gamma=gamma, **settings)
    return Predictor(fakes.network(traced), fakes.FakeHead(probs), VOCABULARY, config)


def sweep(gammas, **settings):
    predictor = make_predictor(calibration.check_gammas(gammas), **settings)
    return calibration.sweep(predictor, examples(), name="test")


def pq(summary):
    return {row["name"]: row["pq"] for row in summary["per_class"]}


def test_two_gammas_by_hand():
    found = sweep([0.9, 0.0])
    assert found.gammas == (0.0, 0.9) and found.counts.shape == (2, 3, 4, 4)
    # gamma 0: every lynx is called a cat, so cats have PQ 1 / (1 + 1/2) and lynxes 0.
    without = pq(found.summary(0.0))
    assert without["lynx"] == 0
    assert without["cat"] == pytest.approx(200 / 3, abs=1)
    # gamma 0.9: 0.45 / e^0.9 < 0.25, and everything is right but the blurred borders.
    assert min(pq(found.summary(0.9))[name] for name in ("cat", "lynx", "sky")) > 95
    assert found.best() == 0.9 and found.summary(0.9)["images"] == 3


def test_the_area_is_that_under_seen_against_unseen():
    found = sweep([-50.0, 0.0, 0.9, 50.0])
    seen, unseen = found.curve()
    summaries = [found.summary(gamma) for gamma in found.gammas]
    assert seen.tolist() == pytest.approx([summary["seen"]["pq"] for summary in summaries])
    assert unseen.tolist() == pytest.approx([summary["unseen"]["pq"] for summary in summaries])
    by_hand = sum(
        (seen[i] - seen[i + 1]) * (unseen[i] + unseen[i + 1]) / 200 for i in range(len(seen) - 1)
    )
    assert found.area() == pytest.approx(by_hand) and found.area() > 50


def test_names_of_queries_are_measured_where_asked_for():
    """Every segment has a query; the lynx's is called a cat until the bias exceeds log(45 / 25)."""
    names = sweep([0.0], tasks=("panoptic", "queries")).names
    assert names.labels.tolist() == [0, 1, 2] * 3
    assert names.images.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(names.gaps[:3], np.log([7, 1.8, 45]), rtol=1e-5)
    assert names.seen_right[:3].tolist() == [True, False, True]
    assert names.unseen_right[:3].tolist() == [False, True, False]
    assert sweep([0.0]).names is None


def same(found, expected):
    # A sweep keeps no names of other classes.
    for key in expected.keys() - {"images_per_second", "confusion"}:
        if key == "per_class":
            for mine, theirs in zip(found[key], expected[key], strict=True):
                same(mine, theirs)
        elif isinstance(expected[key], dict):
            same(found[key], expected[key])
        else:
            assert found[key] == pytest.approx(expected[key], nan_ok=True), key


@pytest.mark.parametrize("keep_rule", ["objectness", "score"])
def test_every_gamma_as_evaluation_at_that_gamma(keep_rule):
    """Also where gamma merges stuff: sky and sky, then fog and sky, then fog and fog."""
    probs = np.array(
        [[0.7, 0.1, 0.05, 0.05, 0.1], [0.05, 0.1, 0.4, 0.35, 0.1], [0.02, 0.02, 0.6, 0.31, 0.05]],
        np.float32,
    )
    settings = dict(keep_rule=keep_rule, score_threshold=0.3)
    gammas = [-1.0, 0.0, 0.5, 2.5]
    found = sweep(gammas, probs=probs, **settings)
    distinct = set()
    for gamma in gammas:
        predictor = make_predictor(gamma, probs=probs, **settings)
        expected = evaluate(predictor, examples(), name="test")
        same(found.summary(gamma), expected)
        distinct.add(tuple(np.nan_to_num([*pq(expected).values()])))
    assert len(distinct) >= 3, "gamma must change something for this to be a test"


def test_another_gamma_compiles_no_network():
    network, head = fakes.network(), fakes.FakeHead(PROBS)
    for gammas in ((0.0, 0.1), (0.2, 0.3), (0.0, 0.1, 0.2)):
        config = PredictConfig(batch_size=2, short_side=32, long_side=32, gamma=gammas)
        predictor = Predictor(network, head, VOCABULARY, config)
        calibration.sweep(predictor, examples(), name="test")
    assert len(network.module.traced) == 1


def sweep_with(**harmonic):
    """A sweep whose hPQ at each gamma, in percent, is given: of one seen and one unseen class."""
    vocabulary = Vocabulary(("cat", "lynx"), (True, True), (True, False), (1, 2))
    gammas = tuple(sorted(map(float, harmonic)))
    counts = np.zeros((len(gammas), 1, 4, 2), np.float32)
    for row, gamma in enumerate(gammas):
        value = harmonic[f"{gamma:g}"]
        if value is not None:
            counts[row, 0, 0], counts[row, 0, 1] = value, 100.0
    return calibration.Sweep(vocabulary, gammas, counts)


def test_the_best_gamma_nearest_to_zero_is_chosen():
    found = sweep_with(**{"0": 30.0, "4": 42.5, "-2": 42.5, "6": None})
    assert found.best() == -2.0
    with pytest.raises(ValueError, match="must show seen and unseen classes"):
        sweep_with(**{"0": None}).best()


def test_an_infinite_gamma_is_not_chosen():
    assert sweep_with(**{"0": 30.0, "inf": 40.0}).best() == 0.0


def test_gamma_is_chosen_on_held_out_images_alone():
    asked = []

    def sweep_of(images, gammas):
        asked.append((images, gammas))
        # On the test images another gamma would be the best.
        best = 2.0 if images == "held out" else 0.0
        return sweep_with(**{f"{gamma:g}": 50 - abs(gamma - best) for gamma in gammas})

    gamma, *_ = calibration.calibrate(sweep_of, "held out", "test", [2, 4])
    assert asked == [("held out", (0.0, 2.0, 4.0)), ("test", (0.0, 2.0, 4.0))]
    assert gamma == 2.0


def test_the_table():
    found = sweep_with(**{"0": 30.0, "0.25": 40.04})
    lines = calibration.format_sweep(found, 0.25).splitlines()
    assert lines[0] == "| gamma | hPQ | PQ seen | PQ unseen |"
    assert lines[2:] == [
        "| 0 | 30.0 | 30.0 | 30.0 |",
        "| **0.25** | **40.0** | **40.0** | **40.0** |",
    ]
    assert len(calibration.format_sweep(found, 0.25, (0.25,)).splitlines()) == 3


@pytest.mark.parametrize(
    ("gammas", "sentence"),
    [([], "no gamma to try"), ([0.1, np.nan], "must be a number, got nan")],
)
def test_bad_gammas_are_refused(gammas, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibration.check_gammas(gammas)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="no image to choose gamma on"):
        calibration.sweep(make_predictor((0.0,)), [], name="test")
