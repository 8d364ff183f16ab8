"""Vocabulary: index sets, category ids, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary

FIELDS = dict(
    names=("cow", "sky", "cat", "road"),
    is_thing=(True, False, True, False),
    is_seen=(False, True, True, False),
    category_ids=(21, 187, 17, 149),
)


def test_index_sets():
    vocabulary = Vocabulary(**FIELDS)
    assert len(vocabulary) == 4
    np.testing.assert_array_equal(vocabulary.seen, [1, 2])
    np.testing.assert_array_equal(vocabulary.unseen, [0, 3])
    assert vocabulary.seen.dtype == vocabulary.unseen.dtype == np.int32
    assert vocabulary.index_of_category == {21: 0, 187: 1, 17: 2, 149: 3}


def test_all_seen_leaves_an_empty_unseen_set():
    vocabulary = Vocabulary(**{**FIELDS, "is_seen": (True,) * 4})
    assert vocabulary.unseen.shape == (0,)
    np.testing.assert_array_equal(vocabulary.seen, np.arange(4))


def test_synonyms_follow_the_name():
    plain = Vocabulary(**FIELDS)
    assert plain.synonyms == ((), (), (), ())
    assert plain.texts == (("cow",), ("sky",), ("cat",), ("road",))
    # As JSON gives them back, and classes may share one.
    listed = Vocabulary(**FIELDS, synonyms=[["beast"], [], ["kitty", "beast"], []])
    assert listed.texts == (("cow", "beast"), ("sky",), ("cat", "kitty", "beast"), ("road",))
    assert listed == Vocabulary(**dataclasses.asdict(listed))
    assert hash(listed) != hash(plain) and listed != plain
    assert Vocabulary(**FIELDS, synonyms=((),) * 4) == plain


def test_is_a_value():
    assert Vocabulary(**FIELDS) == Vocabulary(**FIELDS)
    assert hash(Vocabulary(**FIELDS)) == hash(Vocabulary(**FIELDS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Vocabulary(**FIELDS).names = ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("cow", "sky", "cat")}, r"different lengths: \[3, 4\]"),
        ({"names": ("cow", " ", "cat", "road")}, "Class 1 .* empty name"),
        ({"names": ("cow", "sky", "cow", "road")}, "the name 'cow' more than once"),
        ({"category_ids": (21, 187, 17, 21)}, "the category id 21 more than once"),
        ({"synonyms": (("calf",), ())}, r"different lengths: \[2, 4\]"),
        ({"synonyms": ((), (), ("kitty", " "), ())}, "Class 2 .*'cat', has an empty synonym"),
    ],
)
def test_bad_vocabularies_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**{**FIELDS, **change})
