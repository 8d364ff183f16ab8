"""Prompt ensembles and synonyms by hand."""

import numpy as np
import pytest

from concat_jax.models.semantic_projector import class_vectors
from concat_jax.text.embeddings import embed_classes
from concat_jax.text.prompts import make_prompts, tokenize
from concat_jax.text.tokenizer import WordTokenizer

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
    context_length = 3
    eot_id = 0

    def __call__(self, texts):
        return np.array([[list(ANSWERS).index(text)] for text in texts], np.int32)

    def lengths(self, texts):
        return np.full(len(texts), 3)


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


LISTED = [("dog", "cat", "kitty"), ("sky",)]


def test_listed_synonyms_by_mean_max_and_not_at_all():
    half = np.sqrt(0.5)
    dog, cat, kitty, sky = (half, half), (0, 1), (1, 0), (half, half)
    # dog + cat + kitty lies on the diagonal, like dog itself.
    mean = _embed([("cat", "dog"), ("sky",)])[0]
    expected = np.array([half, half + 1]) / np.hypot(half, half + 1)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_array_equal(_embed([("cat", "dog"), "sky"])[0], mean)
    best = _embed(LISTED, synonyms="max")
    assert best.dtype == np.float32
    np.testing.assert_allclose(best, [[dog, cat, kitty], [sky, sky, sky]], atol=1e-6)
    none = _embed([("cat", "dog"), ("sky",)], synonyms="none")
    np.testing.assert_allclose(none, [cat, sky], atol=1e-6)


def test_a_name_that_lists_synonyms_itself_stands_for_all_of_them():
    names = ["dog, cat", "kitty"]
    np.testing.assert_array_equal(_embed(names), _embed([("dog", "cat"), ("kitty",)]))
    np.testing.assert_array_equal(_embed(names, synonyms="none"), _embed(names))
    mixed = _embed([("dog, cat", "kitty")], synonyms="max")
    np.testing.assert_array_equal(mixed, _embed(LISTED[:1], synonyms="max"))


def test_the_mean_over_synonyms_kept_apart_is_the_mean_mode():
    """Classes of different counts: the repeats that fill a row must not weigh."""
    names = [("cat", "dog"), ("dog", "cat", "kitty"), ("kitty",)]
    apart = _embed(names, synonyms="max")
    assert apart.shape == (3, 3, 2)
    np.testing.assert_allclose(class_vectors(apart), _embed(names), atol=1e-6)


def test_a_text_that_comes_twice_counts_once():
    half = np.sqrt(0.5)
    names = [("cat", "dog", "Cat", "dog"), ("sky-other-merged", "sky")]
    prompts = make_prompts(names, TWO)
    assert prompts.texts == (("cat", "dog"), ("sky",))
    assert prompts.prompts() == ["a cat", "the cat", "a dog", "the dog", "a sky", "the sky"]
    expected = np.array([half, half + 1]) / np.hypot(half, half + 1)
    np.testing.assert_allclose(_embed(names), [expected, [half, half]], atol=1e-6)
    assert make_prompts(names, TWO, clean=False).texts[1] == ("sky-other-merged", "sky")


def test_classes_may_share_a_synonym_but_not_all_texts():
    assert _embed([("dog", "cat"), ("kitty", "cat")]).shape == (2, 2)
    with pytest.raises(ValueError, match=r"same text: 'dog' and 'cat' \(all 'dog, cat'\); rename"):
        _embed([("dog", "cat"), ("cat", "dog")])
    with pytest.raises(ValueError, match="'cat' and 'cat' "):
        _embed([("cat", "dog"), ("cat", "kitty")], synonyms="none")


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
        (["dog", "Dog"], TWO, r"'dog' and 'Dog' \(all 'dog'\); rename all but one"),
        (["sky", "sky-other-merged"], TWO, "or set config.text.clean_names to False"),
        (["a", "b", "A", "c", "B"], TWO, "'a' and 'A' .*, 'b' and 'B' "),
        (["dog", "", "cat", " "], TWO, r"empty .*: number 2 \(''\), number 4 \(' '\); name these"),
        (["dog, "], TWO, "empty synonym"),
        ([("dog", "")], TWO, r"number 1 \('dog', ''\)"),
        ([("dog",), ()], TWO, r"number 2 \(\)"),
        ([], TWO, "no class names"),
        (["dog"], ["a photo"], "'a photo' must hold '{}' once"),
        (["dog"], ["{} and {}"], "once"),
        (["dog"], [], "no templates"),
    ],
)
def test_bad_input_is_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        _embed(names, templates)


def test_an_unknown_way_to_join_synonyms_is_refused():
    with pytest.raises(ValueError, match="Synonyms are 'min'; there are mean, max, none"):
        _embed(["dog"], synonyms="min")


def test_a_broken_encoder_is_noticed():
    with pytest.raises(ValueError, match="not finite"):
        embed_classes(
            lambda tokens: np.full((len(tokens), 2), np.nan), StubTokenizer(), ["dog"], TWO
        )


WORDS = WordTokenizer(["a", "an", "red", "dog", "cat", "t", "shirt", "very"], 5)


def test_names_that_would_be_cut_are_all_listed():
    names = ["dog", "very very red dog", ("cat", "very red red cat")]
    # Start, end and two words fit beside "a"; the second template takes one word less.
    message = (
        r"more than the 5 tokens .*, with the template 'a red \{\}': 'very very red dog' \(8\), "
        r"'very red red cat' \(8\); shorten the names or the template"
    )
    with pytest.raises(ValueError, match=message):
        tokenize(WORDS, make_prompts(names, ("a {}", "a red {}")))
    assert tokenize(WORDS, make_prompts(["red dog", "cat"], ("a {}",))).shape == (2, 5)
    with pytest.raises(ValueError, match=r"'red dog' \(6\); shorten"):
        tokenize(WORDS, make_prompts(["red dog", "cat"], ("a very {}",)))
    many = [f"dog {'very ' * i}cat" for i in range(3, 20)]
    with pytest.raises(ValueError, match="'dog very very very cat'.*, 7 more; shorten"):
        tokenize(WORDS, make_prompts(many, ("{}",)))


def test_names_with_the_same_tokens_are_listed():
    names = ["t-shirt", "dog", "T shirt", "t. shirt!", "(dog)"]
    message = "same to the tokenizer: 't-shirt' and 'T shirt' and 't. shirt!', 'dog' and '"
    with pytest.raises(ValueError, match=message):
        tokenize(WORDS, make_prompts(names, ("a {}",), clean=False))
    # One text in common does not make them the same.
    shared = [("t-shirt", "dog"), ("t shirt", "cat")]
    assert tokenize(WORDS, make_prompts(shared, ("a {}",))).shape == (4, 5)


def test_names_without_a_token_are_listed():
    with pytest.raises(ValueError, match="reads nothing of class names: '!', '--'; rename"):
        tokenize(WORDS, make_prompts(["!", "dog", "--"], ("a {}",)))
