"""A user's own label spaces, and every wrong one."""

import dataclasses
import json
import pathlib

import pytest

from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.labels import load_classes, load_label_space, parse_classes

VOCABULARY = {
    "name": "mine",
    "description": "",
    "source": "",
    "categories": [
        {"id": 7, "name": "cat", "synonyms": ["kitty", "tomcat"], "isthing": 1},
        {"id": 3, "name": "sky-other", "synonyms": [], "isthing": 0},
    ],
}

SPLIT = {
    "name": "pets",
    "description": "",
    "source": "",
    "categories": [
        {"id": 7, "name": "sky", "isthing": 0, "split": "seen"},
        {"id": 3, "name": "dog", "isthing": 1, "split": "unseen"},
        {"id": 5, "name": "cat", "isthing": 1, "split": "seen", "synonyms": ["kitty"]},
    ],
}


def write(tmp_path, content, name="mine.json"):
    path = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text if isinstance(content, bytes) else text.encode())
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_users_own_files(tmp_path, mark):
    path = write(tmp_path, mark + json.dumps(VOCABULARY))
    expected = Vocabulary(
        names=("cat", "sky-other"),
        is_thing=(True, False),
        is_seen=(False, False),
        category_ids=(7, 3),
        synonyms=(("kitty", "tomcat"), ()),
    )
    assert load_label_space(path) == load_label_space(str(path)) == expected
    pets = load_label_space(write(tmp_path, mark + json.dumps(SPLIT), "pets.json"))
    assert pets.names == ("sky", "dog", "cat") and pets.category_ids == (7, 3, 5)
    assert pets.is_thing == (False, True, True) and pets.unseen.tolist() == [1]
    assert pets.synonyms == ((), (), ("kitty",))
    names = load_label_space(write(tmp_path, f"{mark}cat, kitty ,tomcat\nsky\n\n", "a.txt"))
    assert names.texts == (("cat", "kitty", "tomcat"), ("sky",))
    assert names.category_ids == (1, 2) and names.unseen.tolist() == [0, 1]
    assert names.is_thing == (False, False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cat\nsky\ndog\nSky, heaven", "names 'Sky' in line 2 and again in line 4"),
        ("cat\n\nsky", "no name in line 2"),
        ("cat\n, kitty", "no name in line 2"),
        ("cat,, kitty", "empty synonym of 'cat' in line 1"),
        ("cat\nsky,", "empty synonym of 'sky' in line 2"),
        (" \n", "names no class"),
        ("", "names no class"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=f"mine.txt .*{sentence}"):
        load_label_space(write(tmp_path, text, "mine.txt"))


def _without(content, key):
    return {k: v for k, v in content.items() if k != key}


def _changed(content, **change):
    first, *others = content["categories"]
    return {**content, "categories": [{**first, **change}, *others]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ('{"name": NaN}', "NaN is no JSON number"),
        ([], "needs a non-empty list of 'categories'"),
        (3, "is a int and must be a JSON object"),
        (["cat"], "category 0 is a str"),
        ([{"id": 1}], "category 0 lacks the key 'name'"),
        ([{"name": "a", "is_thing": 1}], "unknown key 'is_thing'"),
        ([{"name": "a"}, {"name": "b", "isthing": 1}], "every class or none needs 'isthing'"),
        (_changed(VOCABULARY, isthing=None), "every class or none needs 'isthing'"),
        ({**VOCABULARY, "classes": []}, "unknown key 'classes'; it takes name, description"),
        ({**SPLIT, "unseen": [1]}, "unknown key 'unseen'"),
        (_without(VOCABULARY, "source"), "lacks the key 'source'"),
        ({**VOCABULARY, "categories": []}, "non-empty list"),
        ({**VOCABULARY, "categories": ["sky"]}, "category 0 is a str"),
        ({**VOCABULARY, "categories": [{"name": "cat"}]}, "category 0 lacks the key 'id'"),
        (
            {**SPLIT, "categories": [*SPLIT["categories"], {"id": 1, "name": "a", "isthing": 0}]},
            "category 3 lacks the key 'split'",
        ),
        (_changed(SPLIT, is_thing=1), "category 0 has the unknown key 'is_thing'"),
        (_changed(SPLIT, split="train"), "'split' is 'train'"),
        (_changed(SPLIT, isthing=2), "'isthing' is 2 and must be 0 or 1"),
        (_changed(SPLIT, isthing=None), "'isthing' is None and must be 0 or 1"),
        (_changed(VOCABULARY, isthing="yes"), "'isthing' is 'yes' and must be 0, 1 or null"),
        (_changed(VOCABULARY, id="7"), "category 0: 'id' is '7'"),
        (_changed(VOCABULARY, id=True), "category 0: 'id' is True"),
        (_changed(VOCABULARY, id=3), "not a label space: .*the category id 3 more than once"),
        (_changed(VOCABULARY, name=None), "'name' is None"),
        (_changed(VOCABULARY, name="sky-other"), "'sky-other' more than once"),
        (_changed(VOCABULARY, name=" "), "not a label space: Class 0 .* empty name"),
        (_changed(VOCABULARY, synonyms="kitty"), "'synonyms' is 'kitty' and must be a list"),
        (_changed(VOCABULARY, synonyms=[1]), "must be a list of strings"),
        (_changed(VOCABULARY, synonyms=[""]), "Class 0 .*'cat', has an empty synonym"),
        (
            {**SPLIT, "categories": SPLIT["categories"][1:2]},
            "every class unseen, so nothing is left to train on",
        ),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_label_space(write(tmp_path, content))
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="no file of classes 'ade20k'; .*ade20k_150, ade20k_8"):
        load_label_space("ade20k")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is no text in UTF-8"):
        load_label_space(tmp_path / "latin.txt")
    (tmp_path / "packed.json").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match="packed.json is compressed with gzip; unpack it first"):
        load_label_space(tmp_path / "packed.json")


def test_one_reader_of_lists_of_names(tmp_path):
    """Whatever the file is called, for --classes and --split alike."""
    for name in ("n.lst", "names", "n.txt"):
        found, knows_things = load_classes(write(tmp_path, "cat, kitty\r\nsky\r\n", name))
        assert found.texts == (("cat", "kitty"), ("sky",)) and found.category_ids == (1, 2)
        assert not knows_things
    categories = [{"name": "sky", "isthing": 0, "supercategory": "x", "color": [1, 2, 3]}]
    categories.append({"id": 9, "name": "cat", "isthing": 1})
    for name in ("n.json", "json"):
        found, knows_things = load_classes(write(tmp_path, categories, name))
        assert found == Vocabulary(("sky", "cat"), (False, True), (False, False), (1, 9))
        assert knows_things
    assert not load_classes("ade20k_847")[1] and load_classes("ade20k_150")[1]
    split = load_classes(write(tmp_path, SPLIT["categories"]))[0]
    assert split == load_label_space(write(tmp_path, SPLIT, "pets.json"))


TRAINING = Vocabulary(
    ("cat", "dog", "sky"), (True, True, False), (True, False, True), (17, 18, 187)
)


def test_a_text_file_of_known_names_has_their_flags_and_ids(tmp_path):
    path = write(tmp_path, "sky\n cat \n\n", "a.txt")
    found, knows_things = load_classes(path, TRAINING)
    assert found == Vocabulary(("sky", "cat"), (False, True), (False, False), (187, 17))
    assert knows_things
    path = write(tmp_path, "sky\nunicorn\n", "a.txt")
    assert load_classes(path, TRAINING) == load_classes(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a, , b", "Name 2 of the classes is empty"),
        (["a", " ", "b"], "Name 2 of the classes is empty"),
        ("a, A", "hold the name 'A' more than once"),
        ({"things": ["a"], "stuff": ["a"]}, "hold the name 'a' more than once"),
        ("; ", "hold no name"),
        ([], "hold no name"),
        ("a; b; c", "has several semicolons"),
        ("names.txt", "There is no file names.txt"),
        (pathlib.Path("names"), "There is no file names"),
        (
            "ade20k_510",
            "named 'ade20k_510'; did you mean 'ade20k_150'. .* asked for as 'ade20k_510;'",
        ),
        ("ADE20K-150", "did you mean 'ade20k_150'"),
        ("cityscapes", "did you mean 'cityscapes_19'"),
        ({"thing": ["a"]}, "no key 'thing'; did you mean 'things'"),
        ({"things": "cat"}, "hold 'cat' where a list of names belongs"),
        (["cat", 3], "where a list of names belongs"),
        (["ade20k_150"], "is a list of one class; .* give 'ade20k_150' itself"),
        (3, "hold 3 where a list of names belongs"),
    ],
)
def test_bad_names_are_named(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_classes(text, TRAINING)


def test_lines_are_as_commas_and_a_semicolon_is_for_a_command_line(tmp_path):
    for text in ("cat\nx y; dog\n", "cat,\n\n  x y; dog", "\ncat\n, x y;\ndog"):
        found, _ = parse_classes(text, TRAINING)
        assert found.names == ("cat", "x y", "dog") and found.is_thing == (True, True, False)
    with pytest.raises(ValueError, match="Name 2 of the classes is empty"):
        parse_classes("cat,,\ndog", TRAINING)
    with pytest.raises(ValueError, match="has a semicolon in line 1; write a class a line, or"):
        parse_classes(str(write(tmp_path, "cat; dog", "a.txt")), TRAINING)


def test_a_folder_is_no_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; name a file of classes"):
        parse_classes(str(tmp_path), TRAINING)


def test_names_are_things_then_stuff_and_seen_or_not(tmp_path):
    found, knows_things = parse_classes("cat, x y; dog", TRAINING)
    assert found.names == ("cat", "x y", "dog") and knows_things
    assert found.is_thing == (True, True, False) and found.is_seen == (True, False, False)
    assert found.category_ids == (1, 2, 3)
    # A list is of things, but for what is stuff in training.
    found, knows_things = parse_classes([" cat", "Sky", "unicorn"], TRAINING)
    assert found.names == ("cat", "Sky", "unicorn") and knows_things
    assert found.is_thing == (True, False, True)
    found, _ = parse_classes({"stuff": ["cat"], "things": ["sky", "unicorn"]}, TRAINING)
    assert found.names == ("sky", "unicorn", "cat") and found.is_thing == (True, True, False)
    # The remedy for a class that is named as a vocabulary nearly is.
    found, _ = parse_classes("ade20k_510;", TRAINING)
    assert found.names == ("ade20k_510",) and found.is_thing == (True,)
    # Names that are too long for a file's are names.
    assert len(parse_classes(", ".join(f"class {k}" for k in range(999)), TRAINING)[0]) == 999
    # A file's ids are kept, a split of it means training and says nothing here.
    found, _ = parse_classes(str(write(tmp_path, SPLIT)), TRAINING)
    assert found.category_ids == (7, 3, 5) and found.is_thing == (False, True, True)
    assert found.is_seen == (True, False, True) and found.synonyms[2] == ("kitty",)
    assert len(parse_classes("pascal_voc_20", TRAINING)[0]) == 20
    # By its name a vocabulary comes whole; a class is seen by any of its words, of either side.
    coco = load_classes("coco_panoptic_133")[0]
    coco = dataclasses.replace(coco, is_seen=(True,) * len(coco))
    found, knows_things = parse_classes("ade20k_150", coco)
    assert len(found) == 150 and knows_things and sum(found.is_thing) == 100
    seen = {name for name, flag in zip(found.names, found.is_seen, strict=True) if flag}
    assert {"bed", "sky", "sofa"} <= seen and not {"flag", "chandelier"} & seen
    assert "sofa" not in coco.names
    # Where nothing says which are things all are, as of linear heads.
    found, knows_things = parse_classes(str(write(tmp_path, "a\nsky", "a.txt")), TRAINING)
    assert found.is_thing == (True, True) and not knows_things
    with pytest.raises(ValueError, match="'cat' in line 1 and again in line 2"):
        parse_classes(str(write(tmp_path, "cat\ncat\nsky", "a.txt")), TRAINING)
