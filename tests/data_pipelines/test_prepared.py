"""Prepared data holds what the folder holds, trains the same, and is refused when it is damaged."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines.buffers import Buffers
from data_pipelines.loader import SegmentationLoader
from data_pipelines.prepared import build as building
from data_pipelines.prepared import files
from data_pipelines.prepared.pipeline import training_batches
from data_pipelines.prepared.source import PreparedSource
from tests.data_pipelines.coco_world import source_of

# TensorFlow is imported by what needs it, not by every process that collects tests.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="pip install -r requirements-data.txt brings TFDS",
)
OPTIONS = dict(seed=4, image_size=20, max_segments=5, num_threads=2)


def build(out, source, **options):
    defaults = dict(dataset="tiny", part="train2017", unseen="drop")
    return building.build_part(out, source, **(defaults | options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(expected, found):
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].dtype == found[name].dtype, name
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(building, "IMAGES_PER_FILE", 2)


# It holds what the folder holds.


@pytest.mark.parametrize("treatment", ["drop", "void", "keep"])
def test_batches_are_those_of_the_folder_from_any_step(
    tiny_panoptic, tmp_path, small_files, treatment
):
    source = source_of(tiny_panoptic)
    made, was_there = build(tmp_path, source, unseen=treatment)
    count = {"drop": 4, "void": 5, "keep": 6}[treatment]
    assert not was_there and sum(made.shard_lengths) == count and made.skipped == {}
    assert build(tmp_path, source, unseen=treatment) == (made, True)
    prepared = PreparedSource(tmp_path, "train2017")
    assert prepared.unseen == treatment and prepared.vocabulary == source.vocabulary
    options = dict(OPTIONS, unseen_images=treatment)
    folder = SegmentationLoader(source, **options)
    whole = [folder.batch(step, 4) for step in range(5)]
    # Shuffled by seed and epoch: no order of the files.
    assert len({tuple(b["image_id"].tolist()) for b in whole}) > 1
    for first in (0, 3):
        loader = SegmentationLoader(prepared, **options)
        batches = training_batches(loader, range(first, 5), 4)
        for expected, found in zip(whole[first:], batches, strict=True):
            assert_same(expected, found)
    # Two hosts are disjoint and together the global batch, and so its epochs.
    hosts = [
        training_batches(
            SegmentationLoader(prepared, process_index=i, process_count=2, **options), range(3), 4
        )
        for i in range(2)
    ]
    for expected, *shares in zip(whole[:3], *hosts, strict=True):
        assert_same(expected, {n: np.concatenate([s[n] for s in shares]) for n in expected})


def test_records_and_native_examples_are_those_of_the_folder(tiny_panoptic, tmp_path, small_files):
    # A JPEG as most are, one in colours of print, and one to be turned.
    pictures = tiny_panoptic / "train2017"
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(pictures / "3.jpg")
    Image.fromarray(noise, mode="CMYK").save(pictures / "8.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90 degrees
    turned = Image.fromarray(noise[..., :3].transpose(1, 0, 2))
    turned.save(pictures / "9.jpg", exif=exif)
    source = source_of(tiny_panoptic)
    build(tmp_path, source, unseen="keep")
    prepared = PreparedSource(tmp_path, "train2017")
    for expected, found in zip(source.records, prepared.records, strict=True):
        for field in dataclasses.fields(expected):
            left, right = getattr(expected, field.name), getattr(found, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
        image, ids = source.read(expected)
        its_image, its_ids = prepared.read(found)
        assert its_image.mode == image.mode == "RGB" and its_ids.dtype == np.uint8
        np.testing.assert_array_equal(np.array(image), np.array(its_image))
        np.testing.assert_array_equal(ids, its_ids)


def test_anybodys_program_reads_it(tiny_panoptic, tmp_path, small_files):
    import tensorflow_datasets as tfds

    source = source_of(tiny_panoptic)
    build(tmp_path, source, unseen="keep")
    build(tmp_path, source_of(tiny_panoptic, "val2017"), part="val2017", unseen="keep")
    builder = tfds.builder_from_directory(str(tmp_path))
    assert builder.info.full_name == "tiny/1.0.0" and "keep" in builder.info.description
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train2017": 6,
        "val2017": 2,
    }
    assert builder.info.features["segment_labels"].feature.names == list(source.vocabulary.names)
    examples = builder.as_dataset(split="train2017").as_numpy_iterator()
    for record, example in zip(source.records, examples, strict=True):
        image, ids = source.read(record)
        assert example["image_id"] == record.image_id
        assert example["file_name"].decode() == record.file_name
        assert example["image_size"].tolist() == [record.height, record.width]
        np.testing.assert_array_equal(example["image"], np.array(image))  # PNG: no decoders differ
        np.testing.assert_array_equal(example["segment_ids"], ids)
        np.testing.assert_array_equal(example["segment_labels"], record.labels)
        np.testing.assert_array_equal(example["segment_is_crowd"], record.is_crowd)
        np.testing.assert_array_equal(example["segment_source_ids"], record.source_ids)
        is_thing = np.array(source.vocabulary.is_thing)[record.labels]
        np.testing.assert_array_equal(example["segment_is_thing"], is_thing)


def test_images_of_many_segments_take_16_bits(tiny_panoptic, tmp_path):
    source = source_of(tiny_panoptic)
    rows = dict(source_ids=np.arange(1, 301), labels=np.zeros(300, np.int32))
    source.records = [dataclasses.replace(source.records[0], is_crowd=np.zeros(300, bool), **rows)]
    ids = np.arange(384, dtype=np.uint16).reshape(16, 24) % 301
    source.read = lambda record: (None, ids)
    build(tmp_path, source, unseen="keep")
    prepared = PreparedSource(tmp_path, "train2017")
    found = prepared.read(prepared.records[0])[1]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, ids)
    with pytest.raises(FileError, match="id maps of 8 bits, now 16 are needed"):
        build(tmp_path / "8", source_of(tiny_panoptic), unseen="keep")
        build(tmp_path / "8", source, part="val2017", unseen="keep")


def test_maps_of_16_bits_with_few_segments_take_8(tiny_panoptic, tmp_path):
    """As label maps and COCO's outlines are read."""
    source, read = source_of(tiny_panoptic), source_of(tiny_panoptic).read
    source.read = lambda record: (None, read(record)[1].astype(np.uint16))
    build(tmp_path, source, unseen="keep")
    prepared = PreparedSource(tmp_path, "train2017")
    for record in prepared.records:
        found = prepared.read(record)[1]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, read(record)[1])


def test_parts_that_are_written_at_once_are_both_listed(tiny_panoptic, tmp_path, monkeypatch):
    write = building._write

    def with_another_beside(*arguments):
        monkeypatch.setattr(building, "_write", write)
        other = source_of(tiny_panoptic, "val2017")
        build(tmp_path, other, part="val2017", unseen="keep")
        return write(*arguments)

    monkeypatch.setattr(building, "_write", with_another_beside)
    build(tmp_path, source_of(tiny_panoptic))
    assert set(files.read_prepared(tmp_path).parts) == {"train2017", "val2017"}


def test_images_without_a_segment_are_kept_for_evaluation_and_left_out_of_training(
    tiny_panoptic, tmp_path
):
    path = tiny_panoptic / "annotations" / "panoptic_train2017.json"
    content = json.loads(path.read_text())
    next(a for a in content["annotations"] if a["image_id"] == 5)["segments_info"] = []
    path.write_text(json.dumps(content))
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(
        tiny_panoptic / "annotations" / "panoptic_train2017" / "5.png"
    )
    for treatment, count in (("keep", 6), ("drop", 3), ("void", 4)):
        made, _ = build(tmp_path / treatment, source_of(tiny_panoptic), unseen=treatment)
        assert sum(made.shard_lengths) == count
    prepared = PreparedSource(tmp_path / "keep", "train2017")
    loader = SegmentationLoader(prepared, seed=0, image_size=8, unseen_images="keep")
    assert 5 not in [prepared.records[i].image_id for i in loader.training_indices]
    assert 5 in [int(example["image_id"]) for example in loader.eval_examples()]


# Memory of batches.


def test_memory_comes_back_only_when_nothing_refers_to_it():
    buffers = Buffers()
    first = buffers.empty((4, 3), np.int32)
    place, view = first.ctypes.data, first[1:]
    assert place % 64 == 0
    first[:] = 7
    del first
    assert buffers.empty((4, 3), np.int32).ctypes.data != place  # the view has it
    on_device = jax.device_put(view)  # shared, where it lies so that it can be
    del view
    again = [buffers.empty((2, 6), np.int32) for _ in range(3)]  # of the same size in bytes
    for array in again:
        array[:] = 1
    np.testing.assert_array_equal(on_device, 7)
    place = again[0].ctypes.data
    del array, again[0]
    assert buffers.empty((4, 3), np.int32).ctypes.data == place


# Unfinished, damaged, and what does not belong together.


def test_what_stops_half_way_leaves_no_file_of_the_part(tiny_panoptic, tmp_path, small_files):
    build(tmp_path, source_of(tiny_panoptic, "val2017"), part="val2017", unseen="keep")
    before, source = contents(tmp_path), source_of(tiny_panoptic)
    read = source.read

    def fails_at_the_last(record):
        if record.image_id == 12:
            raise KeyboardInterrupt
        return read(record)

    source.read = fails_at_the_last
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source, unseen="keep")
    assert contents(tmp_path) == before
    with pytest.raises(FileError, match=r"no finished part 'train2017' .* --part=train2017 --out="):
        PreparedSource(tmp_path, "train2017")
    # As a kill leaves it: files under their names, in no description.
    (tmp_path / "tiny-train2017.tfrecord-00000-of-00009").write_bytes(b"half")
    build(tmp_path, source_of(tiny_panoptic), unseen="keep")
    assert len(list(tmp_path.glob("tiny-train2017.tfrecord-*"))) == 3


def test_a_leak_in_what_was_written_leaves_it_unfinished(tiny_panoptic, tmp_path, monkeypatch):
    checks = []

    def fails_second_time(source, indices):
        checks.append(len(source.records))
        if len(checks) == 2:
            raise FileError("Image 8 leaks.")

    monkeypatch.setattr(building, "check_no_leak", fails_second_time)
    with pytest.raises(FileError, match="Image 8 leaks"):
        build(tmp_path, source_of(tiny_panoptic))
    assert checks == [6, 4]  # all records of the source, then those that were written
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_damaged_file_is_named_before_training(tiny_panoptic, tmp_path, small_files, damage):
    build(tmp_path, source_of(tiny_panoptic))
    path = tmp_path / "tiny-train2017.tfrecord-00001-of-00002"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-5], "missing": b"", "longer": whole + b"0"}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(FileError, match=f"{path.name} is damaged .*prepare the data again"):
        PreparedSource(tmp_path, "train2017")


def test_a_damaged_record_stops_training_at_its_step(tiny_panoptic, tmp_path, small_files):
    build(tmp_path, source_of(tiny_panoptic), unseen="keep")
    path = tmp_path / "tiny-train2017.tfrecord-00001-of-00003"
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 4] ^= 1
    path.write_bytes(broken)
    prepared = PreparedSource(tmp_path, "train2017")
    bad = []
    for record in prepared.records:
        try:
            prepared.read(record)
        except FileError as error:
            bad.append((record.image_id, str(error)))
    ((image_id, sentence),) = bad
    assert str(path) in sentence and "prepare the data again" in sentence
    loader = SegmentationLoader(prepared, **OPTIONS, unseen_images="keep")
    batches = training_batches(loader, range(6), 1)
    with pytest.raises(FileError) as caught:
        for found in batches:
            assert found["image_id"][0] != image_id
    assert str(caught.value) == sentence


def test_no_damage_to_the_tables_or_the_description_passes(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic))
    for name, stride in (("train2017.tables.npz", 23), ("metadata.json", 11)):
        path = tmp_path / name
        whole = path.read_bytes()
        expected = PreparedSource(tmp_path, "train2017").records
        for position in range(0, len(whole), stride):
            broken = bytearray(whole)
            broken[position] ^= 1
            path.write_bytes(broken)
            try:
                found = PreparedSource(tmp_path, "train2017").records
            except FileError as error:
                assert str(tmp_path) in str(error)
            else:  # a byte that nothing is read from, as a date in the zip's directory
                assert all(
                    np.array_equal(getattr(a, f.name), getattr(b, f.name))
                    for a, b in zip(expected, found, strict=True)
                    for f in dataclasses.fields(a)
                )
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(unseen="void"), "unseen 'drop', now it is 'void'"),
        (dict(dataset="other"), "dataset 'tiny', now it is 'other'"),
    ],
)
def test_a_folder_of_other_data_is_refused(tiny_panoptic, tmp_path, changes, sentence):
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
    with pytest.raises(FileError, match="made with other annotations or images"):
        build(out, source_of(tiny_panoptic))
    # A second part of the same data set may come in, but not with another split.
    build(out, source_of(tiny_panoptic, "val2017"), part="val2017", unseen="keep")
    split = json.loads((tiny_panoptic / "split.json").read_text())
    split["categories"][2]["split"] = "unseen"
    (tiny_panoptic / "split.json").write_text(json.dumps(split))
    with pytest.raises(FileError, match="made with another split file"):
        build(out, source_of(tiny_panoptic, "val2017"), part="val2", unseen="keep")


def test_bad_images_stop_the_build_or_are_left_out_by_name(tiny_panoptic, tmp_path):
    (tiny_panoptic / "train2017" / "5.jpg").write_bytes(b"no picture")
    source = source_of(tiny_panoptic)
    with pytest.raises(FileError, match="5.jpg cannot be read as an image"):
        build(tmp_path / "out", source)
    made, _ = build(tmp_path / "out", source, skip_bad=True)
    assert list(made.skipped) == ["5.jpg"] and sum(made.shard_lengths) == 3
    prepared = PreparedSource(tmp_path / "out", "train2017")
    assert [record.image_id for record in prepared.records] == [3, 11, 12]
    assert prepared.skipped == made.skipped
    with pytest.raises(FileError, match="leaves out 1 bad images, the first is 5.jpg"):
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
    for options in (dict(part="../train"), dict(dataset="")):
        with pytest.raises(ValueError, match="must be"):
            build(tmp_path, source_of(tiny_panoptic), **options)
    (tmp_path / files.INFO).write_text('{"name": "mnist", "splits": []}')
    with pytest.raises(FileError, match="`python -m data_pipelines.prepare` did not write"):
        PreparedSource(tmp_path, "train2017")


def test_the_checksum_of_a_place_is_that_of_its_payload(tiny_panoptic, tmp_path):
    build(tmp_path, source_of(tiny_panoptic))
    prepared = PreparedSource(tmp_path, "train2017")
    _, places = files.read_tables(files.tables_path(tmp_path, "train2017"))
    assert [zlib.crc32(prepared.payload(i)) for i in range(4)] == places[:, 3].tolist()


def test_the_folder_trains_without_tensorflow():
    program = (
        "import sys, data_pipelines.datasets, data_pipelines.prepare;"
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
