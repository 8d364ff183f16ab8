"""Vocabulary files: those that ship, against their source where it is at hand, and a user's own."""

import dataclasses
import json

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.text.prompts import make_prompts
from concat_jax.text.templates import TEMPLATES
from data_pipelines.vocabulary_files import VOCABULARIES_FOLDER, load_vocabulary, with_synonyms
from data_pipelines.zero_shot_split import load_split

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
CONTENT = {
    "name": "mine",
    "description": "",
    "source": "",
    "categories": [
        {"id": 7, "name": "cat", "synonyms": ["kitty", "tomcat"], "isthing": 1},
        {"id": 3, "name": "sky-other", "synonyms": [], "isthing": None},
    ],
}


def test_every_shipped_file_is_tested():
    assert {path.stem for path in VOCABULARIES_FOLDER.iterdir()} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_and_make_prompts(name):
    count, things, _ = SHIPPED[name]
    vocabulary = load_vocabulary(name)
    assert len(vocabulary) == count
    assert sum(vocabulary.is_thing) == things
    assert len(vocabulary.seen) == 0 and len(vocabulary.unseen) == count
    assert any(vocabulary.synonyms)
    content = json.loads((VOCABULARIES_FOLDER / f"{name}.json").read_text())
    assert content["name"] == name and content["description"]
    assert "fc-clip" in content["source"] and "Apache-2.0" in content["source"]
    for words in vocabulary.texts:
        assert len(set(words)) == len(words)
        assert all(word == " ".join(word.split()) for word in words)
        assert not any("," in word for word in words[1:])
    for clean in (True, False):
        for synonyms in ("mean", "max", "none"):
            options = dict(clean=clean, synonyms=synonyms)
            prompts = make_prompts(vocabulary.texts, TEMPLATES["single"], **options)
            assert len(prompts.texts) == count


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_hold_what_their_source_holds(name, shared_data):
    """All words of a class in the source's order, and no other but the data set's own name."""
    text = (shared_data / "vocabularies" / SHIPPED[name][2]).read_text()
    rows = [line.split(":", 1) for line in text.split("\n")]
    rows = [(int(index), words.split(",")) for index, words in rows if words != "invalid_class_id"]
    if name == "pascal_voc_20":
        rows = rows[1:]
    vocabulary = load_vocabulary(name)
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
        own = name_.split(", ")
        if raw:
            assert [w for w in words if w != name_] == list(synonyms)
        else:
            assert own + list(synonyms) == words


def test_names_of_every_kind_of_source():
    panoptic, split = load_vocabulary("coco_panoptic_133"), load_split("coco_panoptic_119_14")
    for field in ("names", "is_thing", "category_ids"):
        assert getattr(panoptic, field) == getattr(split, field)
    tree = panoptic.names.index("tree-merged")
    assert panoptic.texts[tree] == ("tree-merged", "tree", "trees", "palm tree", "bushes")
    assert make_prompts(panoptic.texts, ["{}"]).texts[tree] == (
        "tree",
        "trees",
        "palm tree",
        "bushes",
    )
    cityscapes = load_vocabulary("cityscapes_19")
    assert cityscapes.index_of_category[26] == cityscapes.names.index("car") == 13
    ade = load_vocabulary("ade20k_847")
    bags = [name for name in ade.names if name.split(",")[0] == "bag"]
    assert bags == [
        "bag",
        "bag, traveling bag, travelling bag, grip, suitcase",
        "bag, handbag, pocketbook, purse",
    ]


def test_a_split_takes_the_synonyms_of_a_vocabulary():
    split = load_split("coco_panoptic_119_14")
    both = with_synonyms(split, load_vocabulary("coco_stuff_171"))
    assert dataclasses.replace(both, synonyms=()) == split
    assert both.synonyms[split.names.index("giraffe")] == ("giraffes",)
    assert both.synonyms[split.names.index("tree-merged")] == ()  # COCO-Stuff has "tree"
    np.testing.assert_array_equal(both.unseen, split.unseen)
    with pytest.raises(ValueError, match="None of the 133 classes, 'person' for one, is among"):
        with_synonyms(split, Vocabulary(("gnu",), (True,), (True,), (1,)))


def write(tmp_path, content, name="mine.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_a_users_own_file(tmp_path):
    expected = Vocabulary(
        names=("cat", "sky-other"),
        is_thing=(True, False),
        is_seen=(False, False),
        category_ids=(7, 3),
        synonyms=(("kitty", "tomcat"), ()),
    )
    path = write(tmp_path, CONTENT)
    assert load_vocabulary(path) == load_vocabulary(str(path)) == expected


def test_a_text_file(tmp_path):
    vocabulary = load_vocabulary(write(tmp_path, "\ufeffcat, kitty ,tomcat\nsky\n\n", "a.txt"))
    assert vocabulary.names == ("cat", "sky")
    assert vocabulary.synonyms == (("kitty", "tomcat"), ())
    assert vocabulary.category_ids == (1, 2)
    assert vocabulary.is_thing == vocabulary.is_seen == (False, False)


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
        load_vocabulary(write(tmp_path, text, "mine.txt"))


def _changed(**change):
    return {**CONTENT, "categories": [{**CONTENT["categories"][0], **change}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ([], "is a list and must be a JSON object"),
        ({**CONTENT, "classes": []}, "unknown key 'classes'; it takes name, description"),
        ({k: v for k, v in CONTENT.items() if k != "source"}, "lacks the key 'source'"),
        ({**CONTENT, "categories": []}, "non-empty list"),
        ({**CONTENT, "categories": [{"name": "cat"}]}, "category 0 lacks the key 'id'"),
        (_changed(id="7"), "category 0: 'id' is '7'"),
        (_changed(id=True), "category 0: 'id' is True"),
        (_changed(name=None), "'name' is None"),
        (_changed(synonyms="kitty"), "'synonyms' is 'kitty' and must be a list"),
        (_changed(synonyms=[1]), "must be a list of strings"),
        (_changed(isthing="yes"), "'isthing' is 'yes' and must be 0, 1 or null"),
        (_changed(name=" "), "not a label space: Class 0 .* empty name"),
        (_changed(synonyms=[""]), "not a label space: Class 0 .*'cat', has an empty synonym"),
        (
            {**CONTENT, "categories": CONTENT["categories"][:1] * 2},
            "not a label space: .*'cat' more than once",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=f"mine.json.*{sentence}"):
        load_vocabulary(write(tmp_path, content))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="'ade20k'; give a path or one of: ade20k_150, ade20k_847"):
        load_vocabulary("ade20k")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text"):
        load_vocabulary(tmp_path / "latin.txt")
