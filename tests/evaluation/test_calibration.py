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
# from 0.2 on the second is a lynx, from 0.6 on the first is one, too.
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
    summaries = sweep([0.3, 0.0])
    assert list(summaries) == [0.0, 0.3]
    assert [summary["images"] for summary in summaries.values()] == [3, 3]
    # gamma 0: every lynx is called a cat, so cats have PQ 1 / (1 + 1/2) and lynxes 0.
    without = pq(summaries[0.0])
    assert without["lynx"] == 0
    assert without["cat"] == pytest.approx(200 / 3, abs=1)
    # gamma 0.3: 0.45 - 0.3 < 0.25, and everything is right but the blurred borders.
    assert min(pq(summaries[0.3])[name] for name in ("cat", "lynx", "sky")) > 95
    assert calibration.best_gamma(summaries) == 0.3


def same(found, expected):
    for key in expected.keys() - {"images_per_second"}:
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
    gammas = [0.0, 0.1, 0.35, 0.8]
    summaries = sweep(gammas, probs=probs, **settings)
    distinct = set()
    for gamma in gammas:
        predictor = make_predictor(gamma, probs=probs, **settings)
        expected = evaluate(predictor, examples(), name="test")
        same(summaries[gamma], expected)
        distinct.add(tuple(np.nan_to_num([*pq(expected).values()])))
    assert len(distinct) >= 3, "gamma must change something for this to be a test"


def test_another_gamma_compiles_no_network():
    network, head = fakes.network(), fakes.FakeHead(PROBS)
    for gammas in ((0.0, 0.1), (0.2, 0.3), (0.0, 0.1, 0.2)):
        config = PredictConfig(batch_size=2, short_side=32, long_side=32, gamma=gammas)
        predictor = Predictor(network, head, VOCABULARY, config)
        calibration.sweep(predictor, examples(), name="test")
    assert len(network.module.traced) == 1


def summary(harmonic, seen=50.0, unseen=20.0):
    groups = {"harmonic": harmonic, "seen": seen, "unseen": unseen}
    return {group: {"pq": value} for group, value in groups.items()}


def test_the_smallest_of_the_best_gammas_is_chosen():
    nothing = float("nan")
    found = {0.0: summary(30.0), 0.4: summary(42.5), 0.2: summary(42.5), 0.6: summary(nothing)}
    assert calibration.best_gamma(found) == 0.2
    with pytest.raises(ValueError, match="must show seen and unseen classes"):
        calibration.best_gamma({0.0: summary(nothing)})


def test_gamma_is_chosen_on_held_out_images_alone():
    asked = []

    def sweep_of(images, gammas):
        asked.append((images, gammas))
        # On the test images another gamma would be the best.
        best = 0.2 if images == "held out" else 0.0
        return {gamma: summary(100 - abs(gamma - best)) for gamma in gammas}

    found = calibration.calibrate(sweep_of, "held out", "test", [0.2, 0.4])
    assert asked == [("held out", (0.0, 0.2, 0.4)), ("test", (0.0, 0.2))]
    assert found.gamma == 0.2
    assert list(found.held_out) == [0.0, 0.2, 0.4] and list(found.test) == [0.0, 0.2]


def test_the_table():
    table = calibration.format_sweep({0.0: summary(30.0), 0.25: summary(40.04, 48, 33)}, 0.25)
    assert table.splitlines()[0] == "| gamma | hPQ | PQ seen | PQ unseen |"
    assert table.splitlines()[2:] == [
        "| 0 | 30.0 | 50.0 | 20.0 |",
        "| **0.25** | **40.0** | **48.0** | **33.0** |",
    ]


@pytest.mark.parametrize(
    ("gammas", "sentence"),
    [([], "no gamma to try"), ([0.1, 1.2], "must lie in 0 to 1, got 1.2"), ([np.nan], "got nan")],
)
def test_bad_gammas_are_refused(gammas, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibration.check_gammas(gammas)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="no image to choose gamma on"):
        calibration.sweep(make_predictor((0.0,)), [], name="test")
