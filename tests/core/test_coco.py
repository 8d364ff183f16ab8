"""COCO's files by one rule: what is read, and one sentence for each fault."""

import copy
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from concat_jax.core.coco import (
    check_categories,
    read_instances,
    read_panoptic,
    vocabulary_of,
)
from concat_jax.core.mask_codes import decode_rle, encode_rle
from concat_jax.core.vocabulary import Vocabulary

IMAGES = [
    {"id": 1, "file_name": "a.jpg", "height": 6, "width": 8},
    {"id": 2, "file_name": "sub/b\u202f\n.jpg", "height": 6, "width": 8},
]
PANOPTIC = {
    "images": IMAGES,
    "categories": [
        {"id": 17, "name": "cat", "isthing": 1},
        {"id": 187, "name": "sky", "isthing": 0},
    ],
    "annotations": [
        {
            "image_id": 1,
            "file_name": "a.png",
            "segments_info": [
                {"id": 7, "category_id": 17, "iscrowd": 1},
                {"id": 300, "category_id": 187},
            ],
        },
        {"image_id": 2, "file_name": "sub/b.png", "segments_info": []},
    ],
}
MASK = np.zeros((6, 8), bool)
MASK[1:4, 2:6] = True
INSTANCES = {
    "images": IMAGES,
    "categories": [{"id": 17, "name": "cat"}],
    "annotations": [
        {"id": 0, "image_id": 1, "category_id": 17, "segmentation": [[2, 1, 6, 1, 6, 4, 2, 4]]},
        {
            "id": 5,
            "image_id": 1,
            "category_id": 17,
            "iscrowd": 1,
            "area": 12,
            "segmentation": encode_rle(MASK),
        },
    ],
}


def write(folder, content, name="a.json"):
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def changed(content, edit):
    content = copy.deepcopy(content)
    edit(content)
    return content


def test_panoptic_files_are_read(tmp_path):
    file = read_panoptic(write(tmp_path, PANOPTIC))
    one = file.annotations[1]
    assert (one.ids, one.category_ids, one.is_crowd) == ((7, 300), (17, 187), (True, False))
    assert (
        file.images[2].file_name == "sub/b\u202f\n.jpg"
        and file.annotations[2].file_name == "sub/b.png"
    )
    vocabulary = vocabulary_of(file.path, file.categories)
    assert vocabulary == Vocabulary(("cat", "sky"), (True, False), (True, True), (17, 187))
    # A prediction may leave out what the ground truth says.
    bare = {"annotations": PANOPTIC["annotations"]}
    file = read_panoptic(write(tmp_path, bare), prediction=True)
    assert file.categories is None and not file.images and len(file.annotations) == 2
    with pytest.raises(ValueError, match="no list of 'categories'"):
        read_panoptic(file.path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_marks_are_no_fault_and_gzip_is_named(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PANOPTIC), encoding=encoding)
    assert len(read_panoptic(path).annotations) == 2
    path.write_bytes(gzip.compress(json.dumps(PANOPTIC).encode()))
    with pytest.raises(ValueError, match="a.json is compressed with gzip; unpack it first"):
        read_panoptic(path)


PANOPTIC_FAULTS = [
    (lambda c: c["categories"][0].pop("isthing"), r"'isthing' of category 17 \('cat'\) of .*missi"),
    (
        lambda c: c["categories"][0].update(isthing="1"),
        r"'isthing' of category 17 .* is '1'; .*0 o",
    ),
    (lambda c: c["categories"][0].update(isthing=2), "'isthing' .* is 2; it must be 0 or 1"),
    (lambda c: c["categories"][0].update(isthing=None), "'isthing' .* is None"),
    (lambda c: c["categories"][0].update(isthing=0.0), "'isthing' .* is 0.0"),
    (lambda c: c["categories"][0].update(id="17"), "'id' of category 0 .* is '17'"),
    (lambda c: c["categories"][0].update(name=3), "The 'name' of category 17"),
    (lambda c: c["categories"].append(c["categories"][0]), "category id 17 more than once"),
    (lambda c: c.update(categories={}), "has no list of 'categories'"),
    (lambda c: c["images"].append(c["images"][0]), "image id 1 more than once"),
    (lambda c: c["images"][0].update(height="6"), "'height' of image 1 .* is '6'"),
    (lambda c: c["images"][0].update(width=0), "'width' of image 1 .* number from 1 on"),
    (lambda c: c["images"][0].pop("file_name"), "'file_name' of image 1 .* missing"),
    (lambda c: c["images"][0].update(file_name="a\0.jpg"), r"'file_name' of image 1 .*a\\x00.jpg"),
    (lambda c: c["images"][0].update(id=1.5), "'id' of image 0 .* is 1.5"),
    (lambda c: c.pop("annotations"), "no list of 'annotations'"),
    (
        lambda c: c["annotations"][0].pop("segments_info"),
        "Annotation 0 .'a.png'. .* no list of 'segments_info'",
    ),
    (lambda c: c["annotations"].append(3), "Annotation 2 of .* is 3 and must be an object"),
    (lambda c: c["annotations"][1].update(image_id=1), "annotates the image 1 more than once"),
    (lambda c: c["annotations"][1].update(image_id=9), "image 9, which its 'images' lack"),
    (lambda c: c["annotations"][1].update(image_id="2"), "image '2', which its 'images' lack"),
    (lambda c: c["annotations"][1].update(image_id=True), "'image_id' .* is True"),
    (
        lambda c: c["annotations"][0]["segments_info"][0].update(id=0),
        "Segment 0 of annotation 0 .'a.png'. of .*a.json .*: 0 is void; number segments from 1",
    ),
    (lambda c: c["annotations"][0]["segments_info"][0].update(id=2**24), "ids end at 16777215"),
    (lambda c: c["annotations"][0]["segments_info"][0].update(id=7.0), "'id' of a segment .* 7.0"),
    (lambda c: c["annotations"][0]["segments_info"][0].update(id=300), "id 300 more than once"),
    (
        lambda c: c["annotations"][0]["segments_info"][0].update(category_id=5),
        "Segment 7 of annotation 0 .'a.png'. .* category 5, which the file does not list",
    ),
    (lambda c: c["annotations"][0]["segments_info"][0].update(iscrowd="no"), "'iscrowd' .* 'no'"),
]


@pytest.mark.parametrize(("edit", "message"), PANOPTIC_FAULTS)
def test_faults_of_panoptic_files_are_one_sentence(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message) as error:
        read_panoptic(write(tmp_path, changed(PANOPTIC, edit)))
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


def test_instance_files_are_read(tmp_path):
    file = read_instances(write(tmp_path, INSTANCES))
    first, second = file.annotations[1]
    assert (first.id, first.is_crowd, first.area) == (0, False, None)
    assert (second.id, second.is_crowd, second.area) == (5, True, 12)
    for one in (first, second):
        np.testing.assert_array_equal(decode_rle(one.rle), MASK)
    assert file.annotations[2] == [] and file.categories[17].is_thing is None


INSTANCE_FAULTS = [
    (lambda a: a.pop("segmentation"), "segmentation of annotation 0 of .* missing"),
    (lambda a: a.update(segmentation=[]), "annotation 0 of .* empty"),
    (lambda a: a.update(segmentation=[2.0, 1.0, 6.0, 1.0, 6.0, 4.0]), "flat list of numbers"),
    (lambda a: a.update(segmentation=[[2, 1, 6, 1]]), "at least three points"),
    (lambda a: a.update(segmentation=[[2, 1, 6, 1, 6, 4, 2]]), "x and y in turn"),
    (lambda a: a.update(segmentation=[[2, 1, "x", 1, 6, 4]]), "at least three points"),
    (lambda a: a.update(segmentation="polygon"), "neither a list of polygons nor run lengths"),
    (lambda a: a.update(segmentation={"size": [6, 8]}), "lacks 'counts'"),
    (lambda a: a.update(segmentation=encode_rle(MASK.T)), "8x6 .* its image 6x8"),
    (lambda a: a.update(segmentation={"size": [6, 8], "counts": [5, 5]}), "hold 10 pixels"),
    (lambda a: a.update(area="12"), "area of annotation 0 of .* is '12'"),
    (lambda a: a.update(area=-1), "area of annotation 0"),
]
OTHER_FAULTS = [
    (lambda a: a.update(id=5), "annotation id 5 more than once"),
    (lambda a: a.update(id="0"), "'id' of annotation 0 .* is '0'"),
    (lambda a: a.update(image_id="1"), "Annotation 0 of .* image '1', which 'images' lack"),
    (lambda a: a.pop("image_id"), "'image_id' of annotation 0 .* missing"),
    (lambda a: a.update(category_id=3), "category 3, which the file does not list"),
    (lambda a: a.update(iscrowd=2), "'iscrowd' of annotation 0"),
]


@pytest.mark.parametrize(("edit", "message"), INSTANCE_FAULTS + OTHER_FAULTS)
def test_faults_of_annotations_are_one_sentence(tmp_path, edit, message):
    path = write(tmp_path, changed(INSTANCES, lambda c: edit(c["annotations"][0])))
    with pytest.raises(ValueError, match=message) as error:
        read_instances(path)
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("edit", "message"), INSTANCE_FAULTS)
def test_annotations_with_a_bad_outline_can_be_left_out_and_told(tmp_path, edit, message):
    path = write(tmp_path, changed(INSTANCES, lambda c: edit(c["annotations"][0])))
    faults = []
    file = read_instances(path, on_fault=lambda image_id, error: faults.append((image_id, error)))
    assert [one.id for one in file.annotations[1]] == [5]
    ((image_id, error),) = faults
    assert image_id == 1
    with pytest.raises(ValueError, match=message):
        raise error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is a list, not a COCO"),
        ("5", "is one value, not a COCO"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON"),
    ],
)
def test_other_jsons_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    for read in (read_panoptic, read_instances):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.json")
        with pytest.raises(ValueError, match="none.json cannot be read"):
            read(tmp_path / "none.json")


def test_categories_of_another_label_space_are_refused(tmp_path):
    file = read_panoptic(write(tmp_path, PANOPTIC))
    own = vocabulary_of(file.path, file.categories)
    check_categories(file.path, file.categories, own)

    def refused(message, names=("cat", "sky"), things=(True, False), ids=(17, 187), **rules):
        other = Vocabulary(names, things, (True,) * len(names), ids)
        with pytest.raises(ValueError, match=message):
            check_categories(file.path, file.categories, other, **rules)

    refused("calls category 187 'sky', the label space 'fog'", names=("cat", "fog"))
    refused("'cat'. is a thing in .* and stuff in the label space", things=(False, False))
    refused("category 187 .'sky'., which is absent", ("cat",), (True,), (17,))
    refused("the label space 'fog'; make it so.", ("cat", "fog"), remedy="make it so")
    more = dict(names=("cat", "sky", "fog"), things=(True, False, False), ids=(17, 187, 3))
    refused("lacks category 3 .'fog'. of the label space", **more)
    refused("lacks category 1", ids=(1, 2), may_have_more=True, must_have_all=False)
    fewer = Vocabulary(("feline",), (True,), (True,), (17,))
    check_categories(file.path, file.categories, fewer, may_have_more=True, own_names=True)
    check_categories(
        file.path,
        file.categories,
        Vocabulary(
            **{"is_seen": (True,) * 3},
            names=more["names"],
            is_thing=more["things"],
            category_ids=more["ids"],
        ),
        must_have_all=False,
    )


def test_names_twice_are_no_label_space(tmp_path):
    file = read_panoptic(
        write(tmp_path, changed(PANOPTIC, lambda c: c["categories"][1].update(name="cat")))
    )
    with pytest.raises(ValueError, match="a.json are no label space: .*'cat' more than once"):
        vocabulary_of(file.path, file.categories)
    with pytest.raises(ValueError, match="give --split"):
        vocabulary_of(Path("a.json"), None)
