"""Shards hold what the folder holds, survive a kill, and refuse what does not belong together."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines.loader import SegmentationLoader
from data_pipelines.shards import build as building
from data_pipelines.shards import files as shard_files
from data_pipelines.shards.source import ShardSource
from data_pipelines.sources.registry import open_source


def source_of(root, part="train2017"):
    return open_source("coco_panoptic_zps", root, part, root / "split.json")


def build(out, source, **options):
    defaults = dict(dataset="tiny", part="train2017", unseen="drop", num_shards=2, workers=1)
    return building.build_shards(out, source, **(defaults | options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_batches(left, right, steps=4):
    for step in range(steps):
        expected, found = left.batch(step, 3), right.batch(step, 3)
        assert expected.keys() == found.keys()
        for name in expected:
            assert expected[name].dtype == found[name].dtype
            np.testing.assert_array_equal(expected[name], found[name], err_msg=name)


# Shards hold what the folder holds.


@pytest.mark.parametrize("treatment", ["drop", "void", "keep"])
def test_batches_are_those_of_the_folder(tiny_panoptic, tmp_path, treatment):
    source = source_of(tiny_panoptic)
    report = build(tmp_path / "out", source, unseen=treatment)
    shards = ShardSource(tmp_path / "out", "train2017")
    count = {"drop": 4, "void": 5, "keep": 6}[treatment]
    assert report == building.BuildReport(0, 2, count, {})
    assert len(shards.records) == count and shards.unseen == treatment
    assert shards.vocabulary == source.vocabulary
    options = dict(seed=4, image_size=20, max_segments=5, num_threads=2)
    options |= dict(unseen_images=treatment)
    assert_same_batches(
        SegmentationLoader(source, **options), SegmentationLoader(shards, **options)
    )


def test_records_and_native_examples_are_those_of_the_folder(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    build(tmp_path, source, unseen="keep", num_shards=4)
    shards = ShardSource(tmp_path, "train2017")
    for expected, found in zip(source.records, shards.records, strict=True):
        for field in dataclasses.fields(expected):
            left, right = getattr(expected, field.name), getattr(found, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
        image, ids = source.read(expected)
        shard_image, shard_ids = shards.read(found)
        assert shard_image.mode == image.mode == "RGB" and shard_ids.dtype == np.uint8
        np.testing.assert_array_equal(np.array(image), np.array(shard_image))
        np.testing.assert_array_equal(ids, shard_ids)


def test_label_maps_are_packed_in_processes_as_well(tmp_path):
    split = {"name": "maps", "description": "", "source": ""}
    classes = (("sky", "seen"), ("road", "unseen"), ("dog", "seen"))
    split["categories"] = [
        {"id": i, "name": name, "isthing": 0, "split": s} for i, (name, s) in enumerate(classes)
    ]
    (tmp_path / "split.json").write_text(json.dumps(split))
    for folder in ("train2017", "stuffthingmaps/train2017"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(1, 4):
        rng = np.random.default_rng(number)
        for folder, shape, values in (("train2017", (9, 8, 3), 256), ("stuffthingmaps", (9, 8), 3)):
            pixels = rng.integers(0, values, shape, dtype=np.uint8)
            folder = tmp_path / folder.replace("stuffthingmaps", "stuffthingmaps/train2017")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    source = open_source("coco_stuff_zss", tmp_path, "train2017", tmp_path / "split.json")
    build(tmp_path / "out", source, unseen="void", num_shards=3, workers=2)
    options = dict(seed=4, image_size=8, unseen_images="void", num_threads=1)
    shards = ShardSource(tmp_path / "out", "train2017")
    assert [record.labels.tolist() for record in shards.records] == [[0, 2]] * 3
    assert_same_batches(
        SegmentationLoader(source, **options), SegmentationLoader(shards, **options)
    )


def test_exif_rotation_is_applied_and_many_segments_take_16_bits(tiny_panoptic, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (24, 16)).save(tmp_path / "3.jpg", exif=exif)

    class Many:
        vocabulary = source_of(tiny_panoptic).vocabulary
        records = [
            dataclasses.replace(
                source_of(tiny_panoptic).records[0],
                height=24,
                width=16,
                source_ids=np.arange(1, 301),
                labels=np.zeros(300, np.int32),
                is_crowd=np.zeros(300, bool),
            )
        ]

        images_folder = tmp_path

        def read(self, record):
            return None, np.arange(384, dtype=np.uint16).reshape(24, 16) % 301

    build(tmp_path / "out", Many(), num_shards=9)
    shards = ShardSource(tmp_path / "out", "train2017")
    image, ids = shards.read(shards.records[0])
    assert image.size == (16, 24)
    assert ids.dtype == np.uint16 and ids.max() == 300
    np.testing.assert_array_equal(ids, Many().read(None)[1])


def test_the_image_file_is_kept_byte_by_byte(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic), unseen="keep", num_shards=1)
    (shard,) = tmp_path.glob("*.tfrecord-00000-of-00001")
    for path in (tiny_panoptic / "train2017").iterdir():
        assert path.read_bytes() in shard.read_bytes()


def test_a_leak_in_the_shards_leaves_them_unfinished(tiny_panoptic, tmp_path, monkeypatch):
    source = source_of(tiny_panoptic)
    checks = []

    def fails_second_time(source, indices):
        checks.append(len(source.records))
        if len(checks) == 2:
            raise FileError("Image 8 leaks.")

    monkeypatch.setattr(building, "check_no_leak", fails_second_time)
    with pytest.raises(FileError, match="Image 8 leaks"):
        build(tmp_path, source)
    assert checks == [6, 4]  # all records of the source, then those of the shards
    with pytest.raises(FileError, match="not finished"):
        ShardSource(tmp_path, "train2017")


# Resuming, and refusing.


def test_finished_shards_stay_and_missing_ones_come_back_the_same(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    build(tmp_path, source, unseen="keep", num_shards=3)
    whole = contents(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    identity, _ = shard_files.read_manifest(tmp_path, "train2017")
    # Killed before the second shard had its name, and after the third had, but not its index.
    shard_files.shard_path(tmp_path, identity, 1).unlink()
    shard_files.index_path(tmp_path, identity, 1).unlink()
    shard_files.index_path(tmp_path, identity, 2).unlink()
    shard_files.write_manifest(tmp_path, identity, None)
    (tmp_path / "tiny-train2017.tfrecord-00001-of-00003.77.partial").write_bytes(b"half")
    with pytest.raises(FileError, match="not finished"):
        ShardSource(tmp_path, "train2017")
    report = build(tmp_path, source, unseen="keep", num_shards=None)
    assert (report.finished_before, report.written) == (1, 2)
    assert contents(tmp_path) == whole
    for name in ("tiny-train2017.tfrecord-00000-of-00003", "train2017-00000.index.safetensors"):
        assert (tmp_path / name).stat().st_mtime_ns == times[name]


def test_a_shard_that_fails_half_way_leaves_no_file_under_its_name(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    read = source.read

    def fails_at_the_last(record):
        if record.image_id == 12:
            raise KeyboardInterrupt
        return read(record)

    source.read = fails_at_the_last
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source, unseen="keep")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "tiny-train2017.tfrecord-00000-of-00002",
        "train2017-00000.index.safetensors",
        "train2017.manifest.json",
    ]


def test_a_truncated_shard_is_made_anew(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic))
    whole = contents(tmp_path)
    path = tmp_path / "tiny-train2017.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileError, match=f"{path.name} is damaged .*bytes instead of"):
        ShardSource(tmp_path, "train2017")
    assert build(tmp_path, source_of(tiny_panoptic)).written == 1
    assert contents(tmp_path) == whole


def test_a_damaged_record_is_named(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic), unseen="keep")
    path = tmp_path / "tiny-train2017.tfrecord-00001-of-00002"
    shards = ShardSource(tmp_path, "train2017")
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 1
    path.write_bytes(broken)
    bad = []
    for record in shards.records:
        try:
            shards.read(record)
        except FileError as error:
            bad.append(str(error))
    (sentence,) = bad
    assert "Record 1 (image 11) of" in sentence and str(path) in sentence
    path.unlink()
    with pytest.raises(FileError, match=path.name):
        shards.read(shards.records[-1])


def test_no_damage_to_an_index_passes(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic), num_shards=1)
    identity, _ = shard_files.read_manifest(tmp_path, "train2017")
    path = shard_files.index_path(tmp_path, identity, 0)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(FileError, match="index.safetensors|tfrecord"):
            shard_files.read_index(tmp_path, identity, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(unseen="void"), "unseen 'drop', now it is 'void'"),
        (dict(num_shards=3), "num_shards 2, now it is 3"),
        (dict(dataset="other"), "dataset 'tiny', now it is 'other'"),
    ],
)
def test_a_folder_of_other_shards_is_refused(tiny_panoptic, tmp_path, changes, sentence):
    build(tmp_path, source_of(tiny_panoptic))
    before = contents(tmp_path)
    with pytest.raises(FileError, match=sentence):
        build(tmp_path, source_of(tiny_panoptic), **changes)
    assert contents(tmp_path) == before


def test_other_annotations_or_another_split_are_refused(tiny_panoptic, tmp_path):
    out = tmp_path / "out"
    build(out, source_of(tiny_panoptic))
    json_path = tiny_panoptic / "annotations" / "panoptic_train2017.json"
    content = json.loads(json_path.read_text())
    content["annotations"][0]["segments_info"][0]["iscrowd"] = 1
    json_path.write_text(json.dumps(content))
    with pytest.raises(FileError, match="begun with other annotations"):
        build(out, source_of(tiny_panoptic))
    # A second part of the same data set may come in, but not with another split.
    build(out, source_of(tiny_panoptic, "val2017"), part="val2017", unseen="keep")
    split = json.loads((tiny_panoptic / "split.json").read_text())
    split["categories"][2]["split"] = "unseen"
    (tiny_panoptic / "split.json").write_text(json.dumps(split))
    with pytest.raises(FileError, match="begun with another split file"):
        build(out, source_of(tiny_panoptic, "val2017"), part="val2", unseen="keep")


def test_bad_images_stop_the_build_or_are_left_out_by_name(tiny_panoptic, tmp_path):
    (tiny_panoptic / "train2017" / "5.jpg").write_bytes(b"no picture")
    source = source_of(tiny_panoptic)
    with pytest.raises(FileError, match="5.jpg cannot be read as an image"):
        build(tmp_path / "out", source)
    report = build(tmp_path / "out", source, skip_bad=True)
    assert list(report.skipped) == ["5.jpg"] and report.images == 3
    shards = ShardSource(tmp_path / "out", "train2017")
    assert [record.image_id for record in shards.records] == [3, 11, 12]
    assert shards.skipped == report.skipped
    with pytest.raises(FileError, match="leave out 1 bad images, the first is 5.jpg"):
        build(tmp_path / "out", source)
    for name in ("3.jpg", "11.jpg", "12.jpg"):
        shutil.copy(tiny_panoptic / "train2017" / "5.jpg", tiny_panoptic / "train2017" / name)
    with pytest.raises(FileError, match="Not one of the 4 images"):
        build(tmp_path / "none", source, skip_bad=True)


def test_nothing_left_and_bad_arguments_are_one_sentence(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    source.records = source.records[3:4]  # the road alone
    with pytest.raises(FileError, match="no image is left"):
        build(tmp_path, source)
    for options in (dict(workers=0), dict(num_shards=0), dict(part="../train"), dict(dataset="")):
        with pytest.raises(ValueError, match="must be"):
            build(tmp_path, source_of(tiny_panoptic), **options)
    with pytest.raises(FileError, match="holds no shards of the part 'val2017'"):
        ShardSource(tmp_path, "val2017")
    (tmp_path / "val2017.manifest.json").write_text("{}")
    with pytest.raises(FileError, match="not a manifest of shards"):
        ShardSource(tmp_path, "val2017")


def test_several_processes_write_the_same_bytes(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    build(tmp_path / "one", source, unseen="void", num_shards=3)
    report = build(tmp_path / "two", source, unseen="void", num_shards=3, workers=2)
    assert report.written == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_kept_shards_hold_images_without_a_segment_and_training_leaves_them_out(
    tiny_panoptic, tmp_path
):
    """An evaluation has to see what a model finds there; nothing can be learnt from them."""
    path = tiny_panoptic / "annotations" / "panoptic_train2017.json"
    content = json.loads(path.read_text())
    empty = next(a for a in content["annotations"] if a["image_id"] == 5)
    empty["segments_info"] = []
    path.write_text(json.dumps(content))
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(
        tiny_panoptic / "annotations" / "panoptic_train2017" / "5.png"
    )
    for treatment, count in (("keep", 6), ("drop", 3), ("void", 4)):
        report = build(tmp_path / treatment, source_of(tiny_panoptic), unseen=treatment)
        assert report.images == count
    shards = ShardSource(tmp_path / "keep", "train2017")
    assert 5 in [record.image_id for record in shards.records]
    loader = SegmentationLoader(shards, seed=0, image_size=8, unseen_images="keep")
    assert 5 not in [shards.records[i].image_id for i in loader.training_indices]
    examples = loader.eval_examples()
    assert 5 in [int(example["image_id"]) for example in examples]
