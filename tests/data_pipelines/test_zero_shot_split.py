"""Split files: the shipped one against the protocol, and every way a file can be wrong."""

import copy
import json

import pytest

from data_pipelines.vocabulary_files import load_vocabulary
from data_pipelines.zero_shot_split import (
    load_label_space,
    load_split,
    make_split,
    split_vocabulary,
)

# PADing's split (CVPR 2023): COCO category id and contiguous index of the 14 unseen classes.
UNSEEN = {
    "cow": (21, 19),
    "giraffe": (25, 23),
    "suitcase": (33, 28),
    "frisbee": (34, 29),
    "skateboard": (41, 36),
    "carrot": (57, 51),
    "scissors": (87, 76),
    "cardboard": (100, 83),
    "playingfield": (145, 97),
    "river": (148, 99),
    "road": (149, 100),
    "tree-merged": (184, 116),
    "sky-other-merged": (187, 119),
    "grass-merged": (193, 125),
}

GOOD = {
    "name": "pets",
    "description": "",
    "source": "",
    "categories": [
        {"id": 7, "name": "sky", "isthing": 0, "split": "seen"},
        {"id": 3, "name": "dog", "isthing": 1, "split": "unseen"},
        {"id": 5, "name": "cat", "isthing": 1, "split": "seen"},
    ],
}


def test_shipped_split_is_the_protocols():
    vocabulary = load_split("coco_panoptic_119_14")
    assert len(vocabulary) == 133 and len(vocabulary.seen) == 119
    assert sum(vocabulary.is_thing) == 80
    assert sum(vocabulary.is_thing[k] for k in vocabulary.seen) == 73
    found = {vocabulary.names[k]: (vocabulary.category_ids[k], int(k)) for k in vocabulary.unseen}
    assert found == UNSEEN
    assert list(vocabulary.category_ids) == sorted(vocabulary.category_ids)
    assert vocabulary.names[0] == "person" and vocabulary.names[132] == "rug-merged"


def test_shipped_split_can_be_regenerated(shared_data):
    path = shared_data / "vocabularies" / "panoptic_coco_categories.json"
    categories = json.loads(path.read_text())
    ids = [category_id for category_id, _ in UNSEEN.values()]
    made = make_split(categories, ids, name="a", description="b", source="c")
    assert split_vocabulary(made) == load_split("coco_panoptic_119_14")


def test_order_of_the_file_is_the_order_of_the_classes(tmp_path):
    path = tmp_path / "pets.json"
    path.write_text(json.dumps(GOOD))
    vocabulary = load_split(path)
    assert vocabulary.names == ("sky", "dog", "cat")
    assert vocabulary.category_ids == (7, 3, 5)
    assert vocabulary.is_thing == (False, True, True)
    assert vocabulary.unseen.tolist() == [1]


def _with(path, value):
    """GOOD with one place changed, or removed where the value is None."""
    content = copy.deepcopy(GOOD)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_with(["unseen"], [1]), "has the unknown key 'unseen'"),
        (_with(["categories", 1, "is_thing"], 1), "category 1 has the unknown key 'is_thing'"),
        (_with(["source"], None), "lacks the key 'source'"),
        (_with(["categories", 2, "split"], None), "category 2 lacks the key 'split'"),
        (_with(["categories"], []), "non-empty list under 'categories'"),
        (_with(["categories", 0, "split"], "train"), "'split' is 'train'"),
        (_with(["categories", 0, "isthing"], 2), "'isthing' is 2"),
        (_with(["categories", 0, "id"], "7"), "'id' is '7'"),
        (_with(["categories", 0, "id"], True), "'id' is True"),
        (_with(["categories", 0, "name"], 4), "'name' is 4"),
        (_with(["categories", 0, "name"], "cat"), "the name 'cat' more than once"),
        (_with(["categories", 0, "id"], 3), "the category id 3 more than once"),
        (_with(["categories", 0], "sky"), "category 0 is a str"),
        ([], "is a list"),
    ],
)
def test_bad_content_is_one_sentence_with_the_file(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_split(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_all_unseen_leaves_nothing_to_train_on():
    content = copy.deepcopy(GOOD)
    for category in content["categories"]:
        category["split"] = "unseen"
    with pytest.raises(ValueError, match="every class unseen"):
        split_vocabulary(content)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="no split file 'nowhere'.*coco_panoptic_119_14"):
        load_split("nowhere")
    path = tmp_path / "broken.json"
    path.write_text('{"name": ')
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        load_split(path)


def test_make_split_refuses_an_unknown_unseen_id():
    with pytest.raises(ValueError, match="unseen id 99 is not among the 3 categories"):
        make_split(GOOD["categories"], [3, 99], name="x", description="", source="")


# PADing's lists, with the ids of its register_coco_*.py, in their order.

STUFF_UNSEEN = {
    "cow": 20,
    "giraffe": 24,
    "suitcase": 32,
    "frisbee": 33,
    "skateboard": 40,
    "carrot": 56,
    "scissors": 86,
    "cardboard": 99,
    "clouds": 105,
    "grass": 123,
    "playingfield": 144,
    "river": 147,
    "road": 148,
    "tree": 168,
    "wall-concrete": 171,
}
INSTANCE_48 = [1, 2, 3, 4, 8, 9, 15, 16, 19, 20, 24, 25, 27, 31, 35, 38, 42, 44, 50, 51, 52, 53]
INSTANCE_48 += [55, 56, 57, 59, 60, 62, 65, 72, 73, 75, 78, 79, 82, 84, 85, 86, 90, 7, 23, 33]
INSTANCE_48 += [34, 48, 54, 70, 74, 80]
INSTANCE_17 = [6, 18, 21, 22, 28, 32, 41, 47, 49, 61, 63, 76, 81, 87, 5, 17, 36]
INSTANCE_15 = [5, 7, 14, 17, 23, 33, 34, 36, 48, 54, 58, 70, 74, 80, 89]


def test_coco_stuff_has_the_protocols_pixel_values_and_order():
    vocabulary = load_split("coco_stuff_156_15")
    unseen = {vocabulary.names[k]: vocabulary.category_ids[k] for k in vocabulary.unseen}
    assert unseen == STUFF_UNSEEN and list(unseen) == list(STUFF_UNSEEN)
    assert vocabulary.unseen.tolist() == list(range(156, 171))
    values = [vocabulary.category_ids[k] for k in vocabulary.seen]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 181
    stuff = load_vocabulary("coco_stuff_171")
    assert {value + 1 for value in vocabulary.category_ids} == set(stuff.category_ids)
    # "building" is how the source of the synonyms reads COCO-Stuff's "building-other".
    assert set(vocabulary.names) ^ set(stuff.names) == {"building", "building-other"}


@pytest.mark.parametrize(
    ("name", "seen", "unseen"),
    [
        ("coco_instance_48_17", INSTANCE_48, INSTANCE_17),
        ("coco_instance_65_15", None, INSTANCE_15),
    ],
)
def test_instance_splits_have_the_protocols_ids_and_order(name, seen, unseen):
    vocabulary, panoptic = load_split(name), load_split("coco_panoptic_119_14")
    things = [i for i, t in zip(panoptic.category_ids, panoptic.is_thing, strict=True) if t]
    seen = seen or [i for i in things if i not in unseen]
    assert list(vocabulary.category_ids) == seen + unseen
    assert vocabulary.unseen.tolist() == list(range(len(seen), len(seen) + len(unseen)))
    for category, word in zip(vocabulary.category_ids, vocabulary.names, strict=True):
        assert panoptic.names[panoptic.index_of_category[category]] == word


def test_a_label_space_is_a_split_or_a_vocabulary(tmp_path):
    assert load_label_space("coco_panoptic_119_14") == load_split("coco_panoptic_119_14")
    assert load_label_space("ade20k_150") == load_vocabulary("ade20k_150")
    (tmp_path / "pets.json").write_text(json.dumps(GOOD))
    assert load_label_space(tmp_path / "pets.json").unseen.tolist() == [1]
    (tmp_path / "names.txt").write_text("cat\nsky\n")
    assert load_label_space(tmp_path / "names.txt").unseen.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no split or vocabulary 'none'; .*coco_stuff_156_15"):
        load_label_space("none")
