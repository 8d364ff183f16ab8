"""Files of instance and semantic predictions."""

import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.run_lengths import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.coco_results import InstanceWriter, SemanticWriter
from concat_jax.inference.instance import Instance

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (17, 187))
MASK = np.eye(3, dtype=bool)


def instance(label=0, score=0.123456789):
    return Instance(0, label, score, encode_rle(MASK))


def test_instances_are_what_pycocotools_loads(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    with InstanceWriter(tmp_path / "deep" / "results.json", VOCABULARY) as writer:
        writer.add(42, [instance(), instance(label=1, score=0.5)])
        writer.add(43, [])
        assert not writer.json_path.exists(), "a json that exists must be complete"
    entries = json.loads(writer.json_path.read_text())
    assert [(e["image_id"], e["category_id"], e["score"]) for e in entries] == [
        (42, 17, 0.123456789),
        (42, 187, 0.5),
    ]
    np.testing.assert_array_equal(coco_mask.decode(entries[0]["segmentation"]), MASK)
    assert [path.name for path in writer.json_path.parent.iterdir()] == ["results.json"]


def test_no_instance_at_all_is_an_empty_list(tmp_path):
    with InstanceWriter(tmp_path / "results.json", VOCABULARY) as writer:
        writer.add(1, [])
    assert json.loads(writer.json_path.read_text()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(instance(label=2), "class index 2"), (instance(score=float("nan")), "score nan")],
)
def test_wrong_instances_are_refused_and_no_file_is_left(tmp_path, wrong, message):
    with (
        pytest.raises(ValueError, match=message),
        InstanceWriter(tmp_path / "results.json", VOCABULARY) as writer,
    ):
        writer.add(1, [instance(), wrong])
    assert not list(tmp_path.iterdir())


def test_label_maps_hold_category_ids(tmp_path):
    writer = SemanticWriter(tmp_path / "maps", VOCABULARY)
    writer.add("folder/1.jpg", np.array([[0, 1], [-1, 0]]))
    image = Image.open(tmp_path / "maps" / "1.png")
    assert np.asarray(image).tolist() == [[17, 187], [255, 17]]
    with pytest.raises(ValueError, match="already written"):
        writer.add("1.png", np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="from 2 to 2"):
        writer.add("2.png", np.full((1, 1), 2))


def test_large_ids_take_two_bytes(tmp_path):
    vocabulary = Vocabulary(("a", "b"), (True, True), (True, True), (255, 3000))
    SemanticWriter(tmp_path, vocabulary).add("1.jpg", np.array([[0, 1, -1]]))
    assert np.asarray(Image.open(tmp_path / "1.png")).tolist() == [[255, 3000, 65535]]
    with pytest.raises(ValueError, match="16 bits"):
        SemanticWriter(tmp_path, Vocabulary(("a",), (True,), (True,), (70000,)))
