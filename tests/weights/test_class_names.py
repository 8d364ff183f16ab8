"""Names of classes, from wherever they come, and new heads."""

import re

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.class_names import (
    classes_from_hf,
    default_classes,
    fresh_head,
)
from concat_jax.weights.report import LoadingReport

KNOWN = Vocabulary(("cat", "dog", "sky"), (True, True, False), (True, False, True), (17, 18, 187))


def test_id2label():
    labels = {"id2label": {"0": "sky", "1": "dog"}}
    classes = classes_from_hf(labels, 2, KNOWN)
    assert classes.vocabulary == Vocabulary(("sky", "dog"), (False, True), (True, True), (187, 18))
    assert not classes_from_hf(labels, 2).knows_things
    with pytest.raises(ValueError, match="names 2 classes.*head has 3"):
        classes_from_hf(labels, 3)
    assert classes_from_hf({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, 2) is None
    assert classes_from_hf({}, 2) is None


@pytest.mark.parametrize(
    "labels, count, names, note",
    [
        ({"0": "BACKGROUND", "255": "LESION"}, 2, ("BACKGROUND", "LESION"), "numbers .* 0, 255; "),
        (
            {"1": "cat", "2": "dog"},
            2,
            ("cat", "dog"),
            "numbers its classes 1, 2; they are taken in",
        ),
        ({"10": "b", "9": "a"}, 2, ("a", "b"), "numbers its classes 9, 10; "),
        ({"-1": "void", "0": "cat"}, 2, ("void", "cat"), "numbers its classes -1, 0; "),
        ({"0": "", "1": "dog"}, 2, ("class_0", "dog"), "has no name for class_0"),
        ({"0": "cat", "1": " ", "2": None}, 3, ("cat", "class_1", "class_2"), "class_1, class_2"),
        ({"0": "a", "1": "b", "2": "unused"}, 2, ("a", "b"), "names 3 classes, .* has 2; .*unused"),
        (["sky", "dog"], 2, ("sky", "dog"), ""),
        ({"0": 7, "1": 8}, 2, ("7", "8"), ""),
        ({"1": "dog", "0": "sky"}, 2, ("sky", "dog"), ""),
    ],
)
def test_id2label_as_people_have_it(labels, count, names, note):
    classes = classes_from_hf({"id2label": labels}, count)
    assert classes.vocabulary.names == names
    assert re.search(note, " ".join(classes.notes)) if note else not classes.notes


@pytest.mark.parametrize(
    "labels, message",
    [
        (
            {"0": "a", "7": "b", "255": "c"},
            "names 3 .* head has 2; pass --classes=FILE with 2 names",
        ),
        ({"0": "a"}, "names 1 .* head has 2; pass .* --reinit_head for a new head of 1"),
        ({"cat": 0, "dog": 1}, "does not number its classes; pass --classes=FILE"),
        ({"0": "a", "1": ["b"]}, "holds what is no name; pass --classes=FILE"),
        ("cat", "does not number"),
        (3, "does not number"),
        ({"0": "a", "one": "b"}, "does not number"),
    ],
)
def test_id2label_that_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        classes_from_hf({"id2label": labels}, 2)


def test_a_new_head_may_have_any_number_of_names():
    classes = classes_from_hf({"id2label": {"0": "a", "7": "b", "255": "c"}}, None)
    assert classes.vocabulary.names == ("a", "b", "c")


FLAGS = {"is_thing": [True, False], "is_seen": [True, True]}


@pytest.mark.parametrize(
    "extra",
    [
        {"is_thing": [True]},
        {"is_thing": 3},
        {"is_thing": [1, 0]},
        {**FLAGS, "category_ids": [2.5, "x"]},
        {**FLAGS, "is_seen": ["no", "yes"], "category_ids": [1, 2]},
    ],
)
def test_an_edited_config_of_ours(extra):
    with pytest.raises(ValueError, match="remove the entry or pass --classes"):
        classes_from_hf({"id2label": {"0": "a", "1": "b"}, "concat_jax": extra}, 2)


def test_a_name_that_occurs_twice_gets_its_index():
    labels = {"id2label": {"0": "door", "1": "sky", "2": "door"}}
    classes = classes_from_hf(labels, 3)
    assert classes.vocabulary.names == ("door (0)", "sky", "door (2)")
    assert "several classes one name" in classes.notes[0]
    labels = {"id2label": {"0": "a", "1": "a (0)", "2": "a"}}
    assert classes_from_hf(labels, 3).vocabulary.names == ("a (0) (0)", "a (0)", "a (2)")


def test_default():
    classes = default_classes(3, KNOWN)
    assert classes.vocabulary.names == KNOWN.names and classes.knows_things
    assert all(classes.vocabulary.is_seen)
    classes = default_classes(2, KNOWN)
    assert classes.vocabulary.names == ("class_0", "class_1") and not classes.knows_things


def test_new_head():
    old = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
    params = {"segmentor": {"x": np.ones(2)}, "classifier": {"class_embed": old}}
    paths = [f"classifier/class_embed/{k}" for k in old]
    report = LoadingReport(
        loaded={"segmentor/x": "x", paths[0]: "c.weight", paths[1]: "c.bias"},
        shapes={"segmentor/x": (2,), paths[0]: (4, 3), paths[1]: (3,)},
    )
    made, told = fresh_head(params, report, 5, 4)
    head = made["classifier"]["class_embed"]
    assert head["kernel"].shape == (4, 6) and head["bias"].shape == (6,)
    assert np.abs(head["kernel"]).max() > 0
    assert made["segmentor"] is params["segmentor"]
    assert told.new == {paths[0]: (4, 6), paths[1]: (6,)}
    assert told.ignored == {"c.weight": (3, 4), "c.bias": (3,)}
    assert told.num_parameters == 2
    again, _ = fresh_head(params, report, 5, 4)
    np.testing.assert_array_equal(again["classifier"]["class_embed"]["kernel"], head["kernel"])
