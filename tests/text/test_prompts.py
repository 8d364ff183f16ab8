"""Prompt ensembles by hand, and the readable names of COCO panoptic."""

import json

import numpy as np
import pytest

from concat_jax.text.prompts import COCO_PANOPTIC_NAMES, TEMPLATES, clean_name, embed_classes

# What the stub text encoder answers for each prompt; lengths differ so that normalisation shows.
ANSWERS = {
    "a dog": [2.0, 0.0],
    "the dog": [0.0, 7.0],
    "a cat": [0.0, 3.0],
    "the cat": [0.0, 1.0],
    "a kitty": [5.0, 0.0],
    "the kitty": [0.5, 0.0],
    "a sky": [1.0, 1.0],
    "the sky": [1.0, 1.0],
    "a sky-other-merged": [-1.0, 0.0],
    "the sky-other-merged": [-1.0, 0.0],
}
TWO = ("a {}", "the {}")


class StubTokenizer:
    """Prompt i of a fixed list is the row [i]."""

    vocab_size = len(ANSWERS)
    context_length = 1
    eot_id = 0

    def __call__(self, texts):
        return np.array([[list(ANSWERS).index(text)] for text in texts], np.int32)


class StubEncoder:
    def __init__(self):
        self.shapes = []

    def __call__(self, tokens):
        self.shapes.append(tokens.shape)
        return np.array(list(ANSWERS.values()), np.float32)[tokens[:, 0]]


def _embed(names, templates=TWO, **options):
    return embed_classes(StubEncoder(), StubTokenizer(), names, templates, **options)


def test_ensemble_by_hand():
    half = np.sqrt(0.5)
    got = _embed(["dog", "cat"])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[half, half], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(_embed(["dog"], ["a {}"]), [[1, 0]], atol=1e-6)


def test_synonyms_are_averaged_as_classes_are():
    half = np.sqrt(0.5)
    # dog (half, half), cat (0, 1), kitty (1, 0): each synonym counts once, whatever its prompts'
    # spread.
    mean = np.array([half + 0, half + 1])
    expected = [mean / np.linalg.norm(mean), [half, half]]
    np.testing.assert_allclose(_embed(["dog, cat", "cat, kitty"]), expected, atol=1e-6)


def test_cleaning_can_be_turned_off():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(_embed(["sky-other-merged"]), [[half, half]], atol=1e-6)
    np.testing.assert_allclose(_embed(["sky-other-merged"], clean=False), [[-1, 0]], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 256])
def test_the_encoder_sees_one_shape_only(batch_size):
    encoder = StubEncoder()
    names = ["dog", "cat, kitty", "sky"]  # 8 prompts
    got = embed_classes(encoder, StubTokenizer(), names, TWO, batch_size=batch_size)
    assert set(encoder.shapes) == {(batch_size, 1)}
    assert len(encoder.shapes) == -(-8 // batch_size)
    np.testing.assert_allclose(got, _embed(names), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["dog", "Dog"], TWO, "'dog' and 'Dog' are the same text 'dog'"),
        (["sky", "sky-other-merged"], TWO, "or pass clean=False"),
        (["dog", ""], TWO, "class name '' is empty"),
        (["dog, "], TWO, "empty synonym"),
        ([], TWO, "no class names"),
        ("dog", TWO, "sequence of names"),
        (["dog"], ["a photo"], "'a photo' must hold '{}' once"),
        (["dog"], ["{} and {}"], "once"),
        (["dog"], [], "no templates"),
        (["dog"], "a {}", "sequence of templates"),
    ],
)
def test_bad_input_is_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        _embed(names, templates)


def test_a_broken_encoder_is_noticed():
    with pytest.raises(ValueError, match="not finite"):
        embed_classes(
            lambda tokens: np.full((len(tokens), 2), np.nan), StubTokenizer(), ["dog"], TWO
        )


def test_template_sets():
    assert TEMPLATES["single"] == ("a photo of a {}.",)
    assert len(TEMPLATES["eight"]) == len(set(TEMPLATES["eight"])) == 8
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)


def test_every_coco_panoptic_name_becomes_readable(shared_data):
    path = shared_data / "vocabularies" / "panoptic_coco_categories.json"
    raw = [category["name"] for category in json.loads(path.read_text())]
    assert len(raw) == 133
    assert set(COCO_PANOPTIC_NAMES) <= set(raw)
    clean = [clean_name(name) for name in raw]
    assert len(set(clean)) == 133
    assert not any("-" in name or "merged" in name for name in clean)
    unchanged = {name for name in raw if clean_name(name) == name}
    assert len(unchanged) == 133 - len(COCO_PANOPTIC_NAMES)
    assert clean_name("a name of another data set-merged") == "a name of another data set-merged"
