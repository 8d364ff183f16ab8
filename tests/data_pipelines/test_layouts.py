"""Data sets by name: each layout in its official tree, and what is said of one that is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines.datasets import KINDS, make_datasets, training_part
from data_pipelines.labels import load_label_space
from data_pipelines.prepared.build import build_part
from data_pipelines.sources.registry import DATASETS, label_space, open_source
from data_pipelines.sources.source import treat_unseen

RNG = np.random.default_rng(0)
NAMES = {"ade": "ADE_{part}_0000000{i}", "pascal": "2008_00000{i}"}


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (4, 6, 3), np.uint8)).save(path)


def label_map(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_maps(root, part, images, maps, suffix, values, stem):
    """Two images whose maps hold `values`: one row of them, repeated."""
    bits = np.uint8 if max(values) < 256 else np.uint16
    for i in (1, 2):
        name = stem.format(part=part, i=i)
        picture(root / images / f"{name}.jpg")
        label_map(root / maps / f"{name}{suffix}", np.tile(np.array(values, bits), (4, 1)))


# data set -> folders, suffix, names, a row of pixel values, the names of the classes there
MAPS = {
    "coco_stuff_zss": (
        ("{part}", "stuffthingmaps/{part}", ".png", "00000000000{i}"),
        (0, 0, 20, 171, 255, 181),
        ["person", "cow", "wall-concrete", "wood"],
    ),
    "ade20k_semantic": (
        ("images/{part}", "annotations/{part}", ".png", NAMES["ade"]),
        (0, 0, 1, 2, 150, 3),
        ["wall", "building", "sky", "flag"],
    ),
    "ade20k_847": (
        ("images_detectron2/{part}", "annotations_detectron2/{part}", ".tif", NAMES["ade"]),
        (0, 1, 846, 65535, 65535, 300),
        ["wall", "building", None, None],
    ),
    "pascal_context_59": (
        ("images/{part}", "annotations_ctx59/{part}", ".png", NAMES["pascal"]),
        (0, 58, 58, 255, 255, 5),
        ["aeroplane", "bicycle", None],
    ),
    "pascal_context_459": (
        ("images/{part}", "annotations_ctx459/{part}", ".tif", NAMES["pascal"]),
        (0, 458, 1, 65535, 2, 2),
        ["accordion", "aeroplane", "air conditioner", None],
    ),
    "pascal_voc": (
        ("JPEGImages", "SegmentationClass", ".png", NAMES["pascal"]),
        (0, 0, 255, 1, 20, 20),
        ["aeroplane", "tvmonitor"],
    ),
}


def write_map_dataset(dataset, root):
    (images, maps, suffix, stem), values, _ = MAPS[dataset]
    part = DATASETS[dataset].parts[1]
    write_maps(root, part, images.format(part=part), maps.format(part=part), suffix, values, stem)
    if dataset == "pascal_voc":
        listed = root / "ImageSets/Segmentation" / f"{part}.txt"
        listed.parent.mkdir(parents=True)
        listed.write_text("2008_000001\n")
    return part


@pytest.mark.parametrize("dataset", MAPS)
def test_label_maps_in_their_official_tree(dataset, tmp_path):
    part = write_map_dataset(dataset, tmp_path)
    source = open_source(dataset, tmp_path, part)
    _, values, names = MAPS[dataset]
    assert len(source.records) == (1 if dataset == "pascal_voc" else 2)
    found = [source.vocabulary.names[k] for k in source.records[0].labels]
    assert len(found) == len(names)
    assert all(name in (None, word) for name, word in zip(names, found, strict=True))
    image, ids = source.read(source.records[0])
    assert image.size == (6, 4) and ids.max() == len(names)
    # The same pixel values are the same rows, and void is void.
    rows = dict(zip(values, ids[0].tolist(), strict=True))
    assert ids[0].tolist() == [rows[value] for value in values]
    assert all(rows.get(value, 0) == 0 for value in (255, 65535))
    assert source.vocabulary.names == label_space(dataset).names
    assert not any(source.vocabulary.is_thing)


def test_background_of_pascal_voc_is_void_or_a_class(tmp_path):
    part = write_map_dataset("pascal_voc", tmp_path)
    source = open_source("pascal_voc", tmp_path, part, "pascal_voc_21")
    names = [source.vocabulary.names[k] for k in source.records[0].labels]
    assert names == ["background", "aeroplane", "tvmonitor"]


def test_coco_stuff_in_zegformers_place(tmp_path):
    write_maps(
        tmp_path, "", "train2017", "coco_stuff/annotations/train2017", ".png", (0, 20), "{i}"
    )
    for path in tmp_path.rglob("*.jpg"):
        Image.new("RGB", (2, 4)).save(path)
    source = open_source("coco_stuff_zss", tmp_path, "train2017")
    voided, positions = treat_unseen(source, DATASETS["coco_stuff_zss"].unseen_images)
    assert positions.tolist() == [0, 1] and voided.records[0].labels.tolist() == [0]
    np.testing.assert_array_equal(voided.read(voided.records[0])[1], [[1, 0]] * 4)


def write_panoptic(root, part, png_folder, json_path, ids, segments, categories, image_id=1):
    name = f"x_{image_id}"
    picture(root / part / f"{name}.jpg")
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[..., 0] = ids
    (root / png_folder).mkdir(parents=True)
    Image.fromarray(colours).save(root / png_folder / f"{name}.png")
    content = {
        "images": [{"id": name, "file_name": f"{name}.jpg", "height": 4, "width": 6}],
        "annotations": [{"image_id": name, "file_name": f"{name}.png", "segments_info": segments}],
        "categories": categories,
    }
    (root / json_path).parent.mkdir(parents=True, exist_ok=True)
    (root / json_path).write_text(json.dumps(content))


def write_ade(root):
    shipped = load_label_space("ade20k_150")
    categories = [  # the script's names are not those of the vocabulary, and ids begin at 0
        {"id": k, "name": f"{name} ", "isthing": int(thing)}
        for k, (name, thing) in enumerate(zip(shipped.names, shipped.is_thing, strict=True))
    ]
    ids = np.repeat([[0, 5, 5, 6, 6, 6]], 4, axis=0)
    segments = [
        {"id": 5, "category_id": 2, "iscrowd": 0},
        {"id": 7, "category_id": 3, "iscrowd": 0},  # painted over altogether
        {"id": 6, "category_id": 12, "iscrowd": 0},
    ]
    places = ("images/validation", "ade20k_panoptic_val", "ade20k_panoptic_val.json")
    write_panoptic(root, *places, ids, segments, categories)


def test_ade20k_panoptic_as_mask2former_makes_it(tmp_path):
    write_ade(tmp_path)
    source = open_source("ade20k_panoptic", tmp_path, "validation")
    (record,) = source.records
    assert record.image_id == 1 and source.vocabulary.category_ids == tuple(range(150))
    names = [source.vocabulary.names[k] for k in record.labels]
    assert names == ["sky", "floor", "person"]
    np.testing.assert_array_equal(source.read(record)[1][0], [0, 1, 1, 3, 3, 3])
    with pytest.raises(FileError, match="no part 'val'; give training or validation"):
        open_source("ade20k_panoptic", tmp_path, "val")


def write_zsi(root, name):
    picture(root / "train2014" / "a.jpg")
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    rows = [(1, 1, square), (2, 6, square), (3, 92, square)]  # person, bus, beyond any split
    content = {
        "images": [{"id": 3, "file_name": "a.jpg", "height": 4, "width": 6}],
        "annotations": [
            {"id": i, "image_id": 3, "category_id": c, "segmentation": s} for i, c, s in rows
        ],
        "categories": [
            {"id": 1, "name": "person"},
            {"id": 6, "name": "bus"},
            {"id": 92, "name": "banner"},
        ],
    }
    path = root / "annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["instances_train2014.json", "ZSIS/instances_train2014_seen_48_17.json"]
)
def test_zsi_from_the_official_file_and_from_its_own(tmp_path, name):
    write_zsi(tmp_path, name)
    source = open_source("coco_zsi_48_17", tmp_path, "train2014")
    labels = source.records[0].labels
    assert [source.vocabulary.names[k] for k in labels] == ["person", "bus"]
    assert [bool(source.vocabulary.is_seen[k]) for k in labels] == [True, False]
    assert treat_unseen(source, "drop")[1].tolist() == []
    if name.startswith("ZSIS"):
        with pytest.raises(FileError, match="instances_train2014.json"):  # the other split's
            open_source("coco_zsi_65_15", tmp_path, "train2014")


FOLDER = [
    {"id": 1, "name": "lawn", "isthing": 0},
    {"id": 2, "name": "ball", "isthing": 1},
    {"id": 9, "name": "gnome", "isthing": 1},
]


def write_folder(root, part="spring"):
    ids = np.repeat([[5, 5, 5, 6, 6, 6]], 4, axis=0)
    segments = [{"id": 5, "category_id": 1}, {"id": 6, "category_id": 2}]
    places = (part, f"panoptic_{part}", f"annotations/panoptic_{part}.json")
    write_panoptic(root, *places, ids, segments, FOLDER)
    split = {
        "name": "garden",
        "description": "",
        "source": "",
        "categories": [dict(c, split="unseen" if c["id"] == 9 else "seen") for c in FOLDER],
    }
    (root / "split.json").write_text(json.dumps(split))


def test_a_folder_of_ones_own_with_a_part_of_any_name(tmp_path):
    write_folder(tmp_path)
    source = open_source("panoptic_folder", tmp_path, "spring")
    assert source.vocabulary.names == ("lawn", "ball", "gnome")
    assert source.records[0].labels.tolist() == [0, 1]
    (tmp_path / "split.json").rename(tmp_path / "mine.json")
    again = open_source("panoptic_folder", tmp_path, "spring", tmp_path / "mine.json")
    assert again.vocabulary == source.vocabulary
    with pytest.raises(FileError, match=r"no split file .*split\.json.*; panoptic_folder is exp"):
        open_source("panoptic_folder", tmp_path, "spring")
    with pytest.raises(ValueError, match="no file of classes 'other.json'"):
        open_source("panoptic_folder", tmp_path, "spring", "other.json")
    with pytest.raises(FileError, match="calls category 1 'lawn', the label space 'person'"):
        open_source("panoptic_folder", tmp_path, "spring", "coco_panoptic_119_14")


# Wrong layouts.


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_wrong_layout_is_one_sentence_with_the_tree(dataset, tmp_path):
    part = DATASETS[dataset].parts[0]
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileError) as caught:
            open_source(dataset, root, part)
        message = str(caught.value)
        tree = DATASETS[dataset].tree.format(part=part)
        assert message.endswith(f"; {dataset} is expected as {root}/{{{tree}}}.")
        assert message.count("expected") == 1 and str(root) in message.split(";")[0]


def test_a_fault_within_the_right_layout_says_nothing_of_the_tree(tmp_path):
    part = write_map_dataset("ade20k_semantic", tmp_path)
    bad = tmp_path / "annotations" / part / "ADE_validation_00000001.png"
    label_map(bad, np.full((4, 6), 151, np.uint8))
    with pytest.raises(FileError, match="00000001.png holds the value 151") as caught:
        open_source("ade20k_semantic", tmp_path, part)
    assert "expected" not in str(caught.value)
    source = open_source("ade20k_semantic", tmp_path, part, on_bad_example="skip")
    assert [r.image_id for r in source.records] == [2]


def test_names_that_are_no_data_set_or_part(tmp_path):
    with pytest.raises(ValueError, match="s3://bucket/coco is neither a path of this machine"):
        open_source("coco_panoptic_zps", "s3://bucket/coco", "train2017")
    with pytest.raises(FileError, match="gs://bucket/coco is in a bucket, and folders of images"):
        open_source("coco_panoptic_zps", "gs://bucket/coco", "train2017")
    with pytest.raises(ValueError, match="no data set 'coco'; the names are .*coco_stuff_zss"):
        open_source("coco", tmp_path, "train2017")
    with pytest.raises(ValueError, match="no data set 'coco'"):
        label_space("coco")
    for part in ("", "../train2017", "a/b"):
        with pytest.raises(FileError, match="part .* must be a name such as train2017"):
            open_source("coco_panoptic_zps", tmp_path, part)


# What a config says.


def data_config(root, **changes):
    fields = dict(
        kind="panoptic_folder",
        root=str(root),
        train_part="spring",
        eval_part="spring",
        split_file="",
        eval_kind="",
        eval_root="",
        eval_split_file="",
        unseen_images="drop",
        on_bad_example="raise",
        image_size=8,
        scale_range=(0.5, 1.5),
        augment="lsj",
        eval_size=12,
        max_segments=3,
        num_eval_images=0,
        num_threads=1,
        synonyms="",
        clip_targets="",
    )
    return {**fields, **changes}


def test_every_layout_is_a_kind_of_data():
    assert set(KINDS) == {"synthetic", "tfds", *DATASETS}


def test_a_config_opens_its_folder(tmp_path):
    write_folder(tmp_path)
    data = make_datasets(data_config(tmp_path), seed=0)
    assert data.eval_vocabulary is None and set(data.caption_words) == {"lawn", "ball", "gnome"}
    assert next(data.train(2)([0]))["segment_labels"].shape == (2, 3)
    (native,) = data.evaluation()
    assert native["image"].shape == (4, 6, 3) and data.eval_size == 12
    assert training_part(data_config(tmp_path), seed=0).training_indices.tolist() == [0]


def test_a_config_evaluates_on_another_data_set(tmp_path):
    write_folder(tmp_path / "garden")
    write_ade(tmp_path / "ade")
    config = data_config(
        tmp_path / "garden",
        eval_kind="ade20k_panoptic",
        eval_root=str(tmp_path / "ade"),
        eval_part="validation",
    )
    data = make_datasets(config, seed=0)
    assert data.vocabulary.names == ("lawn", "ball", "gnome")
    assert len(data.eval_vocabulary) == 150 and len(data.eval_vocabulary.unseen) == 150
    assert {"lawn", "sky"} <= set(data.caption_words)
    (native,) = data.evaluation()
    assert data.eval_vocabulary.names[native["segment_labels"][0]] == "sky"
    with pytest.raises(ValueError, match="eval_kind is unknown: 'ade'"):
        make_datasets({**config, "eval_kind": "ade"}, seed=0)
    with pytest.raises(FileError, match=r"set config\.data\.eval_root to a ade20k_panoptic"):
        make_datasets({**config, "eval_root": ""}, seed=0)


TREATMENTS = ("drop", "void", "keep")


def prepared_config(root, treatment):
    pytest.importorskip("tensorflow_datasets", reason="pip install -r requirements-data.txt")
    source = open_source("panoptic_folder", root, "spring")
    out = root / f"prepared_{treatment}"
    build_part(out, source, dataset="panoptic_folder", part="spring", unseen=treatment)
    return data_config(out, kind="tfds")


@pytest.mark.parametrize("made", TREATMENTS)
def test_prepared_data_trains_as_it_was_made_and_whole_in_every_way(tmp_path, made):
    write_folder(tmp_path)
    config = prepared_config(tmp_path, made)
    for wanted in TREATMENTS:
        asked = {**config, "unseen_images": wanted}
        if made in ("keep", wanted):
            assert training_part(asked, seed=0).training_indices.tolist() == [0]
            continue
        with pytest.raises(FileError) as caught:
            training_part(asked, seed=0)
        assert str(caught.value) == (
            f"The part spring in {config['root']} was made with --unseen={made}, and "
            f"config.data.unseen_images asks for '{wanted}'; make it in another folder with "
            "`python -m data_pipelines.prepare panoptic_folder --root=... --part=spring "
            f"--unseen={wanted} --out=...`."
        )
    asked = {**config, "unseen_images": made}
    if made == "keep":
        make_datasets(asked, seed=0)
    else:
        with pytest.raises(FileError, match=f"--unseen={made}, and evaluation asks for 'keep'"):
            make_datasets(asked, seed=0)


def test_without_unseen_classes_every_treatment_is_the_same(tmp_path):
    write_folder(tmp_path)
    split = json.loads((tmp_path / "split.json").read_text())
    for category in split["categories"]:
        category["split"] = "seen"
    (tmp_path / "split.json").write_text(json.dumps(split))
    config = prepared_config(tmp_path, "drop")
    for wanted in TREATMENTS:
        make_datasets({**config, "unseen_images": wanted}, seed=0).train(1)
