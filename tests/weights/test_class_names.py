"""Names of classes, from wherever they come, and new heads."""

import codecs
import gzip
import json
import re

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.class_names import (
    classes_from_hf,
    default_classes,
    fresh_head,
    read_classes,
)
from concat_jax.weights.report import LoadingReport

KNOWN = Vocabulary(("cat", "dog", "sky"), (True, True, False), (True, False, True), (17, 18, 187))


def test_json_list(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(
        json.dumps([{"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}])
    )
    classes = read_classes(path)
    assert classes.vocabulary == Vocabulary(("cat", "sky"), (True, False), (True, True), (7, 9))
    assert classes.knows_things
    path.write_text(json.dumps([{"name": "cat"}, {"name": "sky"}]))
    classes = read_classes(path, KNOWN)
    assert classes.vocabulary.category_ids == (0, 1) and not classes.knows_things


def test_text_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky\n cat \n\n")
    classes = read_classes(path)
    assert classes.vocabulary.names == ("sky", "cat") and not classes.knows_things
    classes = read_classes(path, KNOWN)
    assert classes.knows_things
    assert classes.vocabulary.is_thing == (False, True)
    assert classes.vocabulary.category_ids == (187, 17)
    path.write_text("sky\nunicorn\n")
    assert not read_classes(path, KNOWN).knows_things


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names none"),
        ("[1]", "must be a list of"),
        ('{"names": []}', "must be a list of"),
        ("[]", 'needs a "name"'),
        ('[{"id": 1}]', 'needs a "name"'),
        ('[{"name": "a", "isthing": 2}]', "isthing"),
        ('[{"name": "a", "id": "x"}]', '"id" must'),
        ('[{"name": "a", "id": 1}, {"name": "b", "id": 1}]', "more than once"),
        ("[{", "not valid JSON"),
        (b"\xff\xfep\0e\0", "no text in UTF-8"),
        ("straße".encode("latin1"), "no text in UTF-8"),
        (gzip.compress(b"person", mtime=0), "compressed with gzip"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_classes(path)
    assert str(path) in str(error.value) and str(error.value).count(". ") == 0


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


@pytest.mark.parametrize("extra", [{"is_thing": [True]}, {"is_thing": 3}, {"is_thing": [1, 0]}])
def test_an_edited_config_of_ours(extra):
    with pytest.raises(ValueError, match="remove the entry or pass --classes"):
        classes_from_hf({"id2label": {"0": "a", "1": "b"}, "concat_jax": extra}, 2)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_marks_and_ends_of_lines(tmp_path, mark, end):
    path = tmp_path / "classes"
    path.write_bytes(mark + end.join((b"cat", b"dog", b"")))
    assert read_classes(path, KNOWN).vocabulary.names == ("cat", "dog")
    assert read_classes(path, KNOWN).vocabulary.category_ids == (17, 18)
    entries = (b"[", b'{"id": 9, "name": "cat", "isthing": 1}', b"]")
    path.write_bytes(mark + end.join(entries))
    assert read_classes(path).vocabulary == Vocabulary(("cat",), (True,), (True,), (9,))


def test_a_name_that_occurs_twice_gets_its_index():
    labels = {"id2label": {"0": "door", "1": "sky", "2": "door"}}
    assert classes_from_hf(labels, 3).vocabulary.names == ("door (0)", "sky", "door (2)")


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
