"""The readable names of the data sets: complete, and different from one another."""

import json

from concat_jax.text.prompts import READABLE_NAMES, clean_name
from data_pipelines.labels import load_label_space


def test_every_coco_panoptic_name_becomes_readable(shared_data):
    path = shared_data / "vocabularies" / "panoptic_coco_categories.json"
    raw = [category["name"] for category in json.loads(path.read_text())]
    assert len(raw) == 133
    assert set(READABLE_NAMES["coco_panoptic"]) <= set(raw)
    clean = [clean_name(name) for name in raw]
    assert len(set(clean)) == 133
    assert not any("-" in name or "merged" in name for name in clean)
    unchanged = {name for name in raw if clean_name(name) == name}
    assert len(unchanged) == 133 - len(READABLE_NAMES["coco_panoptic"])
    assert clean_name("a name of another data set-merged") == "a name of another data set-merged"


def test_every_coco_stuff_name_becomes_readable():
    names = load_label_space("coco_stuff_171").names
    clean = [clean_name(name) for name in names]
    assert len(set(clean)) == 171
    assert not any("-" in name for name in clean)
    assert {name for name in names if clean_name(name) != name} == set(READABLE_NAMES["coco_stuff"])
    assert clean_name("structural-other") == "structure"


def test_tables_hold_names_that_exist_and_agree_where_they_meet():
    pascal = [load_label_space(name).names for name in ("pascal_voc_21", "pascal_context_459")]
    assert set(READABLE_NAMES["pascal"]) <= {name for names in pascal for name in names}
    assert set(READABLE_NAMES["ade20k_847"]) <= set(load_label_space("ade20k_847").names)
    for table in READABLE_NAMES.values():
        assert all(clean_name(name) == readable for name, readable in table.items())
        assert all(clean_name(readable) == readable for readable in table.values())
