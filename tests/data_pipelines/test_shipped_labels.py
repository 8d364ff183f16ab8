"""The label spaces that ship, against their sources and the protocols."""

import dataclasses
import json

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.text.prompts import make_prompts
from concat_jax.text.templates import TEMPLATES
from data_pipelines.labels import FOLDERS, load_label_space, with_synonyms

SPLITS, VOCABULARIES = FOLDERS
# name -> classes, things, and the list it was made of
SHIPPED = {
    "coco_panoptic_133": (133, 80, "coco_panoptic_with_prompt_eng.txt"),
    "coco_stuff_171": (171, 80, "coco_stuff_with_prompt_eng.txt"),
    "ade20k_150": (150, 100, "ade20k_150_with_prompt_eng.txt"),
    "ade20k_847": (847, 0, "ade20k_847_with_prompt_eng.txt"),
    "pascal_context_59": (59, 0, "pascal_ctx_59_with_prompt_eng.txt"),
    "pascal_context_459": (459, 0, "pascal_ctx_459_with_prompt_eng.txt"),
    "pascal_voc_20": (20, 20, "pascal_voc_21_with_prompt_eng.txt"),
    "pascal_voc_21": (21, 20, "pascal_voc_21_with_prompt_eng.txt"),
    "cityscapes_19": (19, 8, "cityscapes_with_prompt_eng.txt"),
}
# name -> (things, stuff) of the seen and of the unseen classes
SHIPPED_SPLITS = {
    "coco_panoptic_119_14": ((73, 46), (7, 7)),
    "coco_panoptic_133_0": ((80, 53), (0, 0)),
    "coco_stuff_156_15": ((73, 83), (7, 8)),
    "coco_instance_48_17": ((48, 0), (17, 0)),
    "coco_instance_65_15": ((65, 0), (15, 0)),
}
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


def test_every_shipped_file_is_tested():
    assert {path.stem for path in VOCABULARIES.iterdir()} == set(SHIPPED)
    assert {path.stem for path in SPLITS.iterdir()} == set(SHIPPED_SPLITS)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_vocabularies_load_and_make_prompts(name):
    count, things, _ = SHIPPED[name]
    vocabulary = load_label_space(name)
    assert len(vocabulary) == len(vocabulary.unseen) == count
    assert sum(vocabulary.is_thing) == things and any(vocabulary.synonyms)
    content = json.loads((VOCABULARIES / f"{name}.json").read_text())
    assert content["name"] == name and content["description"]
    assert "fc-clip" in content["source"] and "Apache-2.0" in content["source"]
    for words in vocabulary.texts:
        assert len(set(words)) == len(words)
        assert all(word == " ".join(word.split()) for word in words)
        assert not any("," in word for word in words[1:])
    for clean, synonyms in ((True, "mean"), (False, "max"), (True, "none")):
        options = dict(clean=clean, synonyms=synonyms)
        prompts = make_prompts(vocabulary.texts, TEMPLATES["single"], **options)
        assert len(prompts.texts) == count


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_vocabularies_hold_what_their_source_holds(name, shared_data):
    """All words of a class in the source's order, and no other but the data set's own name."""
    text = (shared_data / "vocabularies" / SHIPPED[name][2]).read_text()
    rows = [line.split(":", 1) for line in text.split("\n")]
    rows = [(int(index), words.split(",")) for index, words in rows if words != "invalid_class_id"]
    if name == "pascal_voc_20":
        rows = rows[1:]
    vocabulary = load_label_space(name)
    assert len(rows) == len(vocabulary)
    raw = {}
    if name == "coco_panoptic_133":
        path = shared_data / "vocabularies" / "panoptic_coco_categories.json"
        raw = {category["id"]: category for category in json.loads(path.read_text())}
        assert vocabulary.category_ids == tuple(raw)
        assert vocabulary.names == tuple(category["name"] for category in raw.values())
        assert vocabulary.is_thing == tuple(bool(c["isthing"]) for c in raw.values())
    if name != "cityscapes_19":  # the source numbers these by training ids
        assert vocabulary.category_ids == tuple(index for index, _ in rows)
    for (_, words), name_, synonyms in zip(
        rows, vocabulary.names, vocabulary.synonyms, strict=True
    ):
        words = list(dict.fromkeys(word.strip() for word in words))
        if raw:
            assert [w for w in words if w != name_] == list(synonyms)
        else:
            assert name_.split(", ") + list(synonyms) == words


def test_names_of_every_kind_of_source():
    panoptic = load_label_space("coco_panoptic_133")
    split = load_label_space("coco_panoptic_119_14")
    for field in ("names", "is_thing", "category_ids"):
        assert getattr(panoptic, field) == getattr(split, field)
    tree = panoptic.names.index("tree-merged")
    words = ("tree", "trees", "palm tree", "bushes")
    assert panoptic.texts[tree] == ("tree-merged", *words)
    assert make_prompts(panoptic.texts, ["{}"]).texts[tree] == words
    cityscapes = load_label_space("cityscapes_19")
    assert cityscapes.index_of_category[26] == cityscapes.names.index("car") == 13
    ade = load_label_space("ade20k_847")
    bags = [name for name in ade.names if name.split(",")[0] == "bag"]
    assert bags == [
        "bag",
        "bag, traveling bag, travelling bag, grip, suitcase",
        "bag, handbag, pocketbook, purse",
    ]


@pytest.mark.parametrize("name", SHIPPED_SPLITS)
def test_shipped_splits_have_the_protocols_counts(name):
    vocabulary = load_label_space(name)
    pairs = zip((vocabulary.seen, vocabulary.unseen), SHIPPED_SPLITS[name], strict=True)
    for indices, (things, stuff) in pairs:
        flags = [vocabulary.is_thing[k] for k in indices]
        assert (sum(flags), len(flags) - sum(flags)) == (things, stuff)
    if name != "coco_panoptic_119_14":  # PADing's panoptic order is COCO's own
        assert vocabulary.is_seen == tuple(sorted(vocabulary.is_seen, reverse=True))
    content = json.loads((SPLITS / f"{name}.json").read_text())
    assert content["name"] == name and content["description"] and content["source"]


def test_the_panoptic_split_is_the_protocols():
    vocabulary = load_label_space("coco_panoptic_119_14")
    assert sum(vocabulary.is_thing) == 80
    assert sum(vocabulary.is_thing[k] for k in vocabulary.seen) == 73
    found = {vocabulary.names[k]: (vocabulary.category_ids[k], int(k)) for k in vocabulary.unseen}
    assert found == UNSEEN
    assert list(vocabulary.category_ids) == sorted(vocabulary.category_ids)
    assert vocabulary.names[0] == "person" and vocabulary.names[132] == "rug-merged"


def test_coco_stuff_has_the_protocols_pixel_values_and_order():
    vocabulary = load_label_space("coco_stuff_156_15")
    unseen = {vocabulary.names[k]: vocabulary.category_ids[k] for k in vocabulary.unseen}
    assert unseen == STUFF_UNSEEN and list(unseen) == list(STUFF_UNSEEN)
    assert vocabulary.unseen.tolist() == list(range(156, 171))
    values = [vocabulary.category_ids[k] for k in vocabulary.seen]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 181
    stuff = load_label_space("coco_stuff_171")
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
    vocabulary, panoptic = load_label_space(name), load_label_space("coco_panoptic_119_14")
    things = [i for i, t in zip(panoptic.category_ids, panoptic.is_thing, strict=True) if t]
    seen = seen or [i for i in things if i not in unseen]
    assert list(vocabulary.category_ids) == seen + unseen
    assert vocabulary.unseen.tolist() == list(range(len(seen), len(seen) + len(unseen)))
    for category, word in zip(vocabulary.category_ids, vocabulary.names, strict=True):
        assert panoptic.names[panoptic.index_of_category[category]] == word


def test_a_split_takes_the_synonyms_of_a_vocabulary():
    split = load_label_space("coco_panoptic_119_14")
    both = with_synonyms(split, load_label_space("coco_stuff_171"))
    assert dataclasses.replace(both, synonyms=()) == split
    assert both.synonyms[split.names.index("giraffe")] == ("giraffes",)
    assert both.synonyms[split.names.index("tree-merged")] == ()  # COCO-Stuff has "tree"
    np.testing.assert_array_equal(both.unseen, split.unseen)
    own = Vocabulary(("cat",), (True,), (True,), (1,), (("kitty",),))
    assert with_synonyms(own, dataclasses.replace(own, synonyms=((),))) == own
    with pytest.raises(ValueError, match="None of the 133 classes, 'person' for one, is among"):
        with_synonyms(split, Vocabulary(("gnu",), (True,), (True,), (1,)))
