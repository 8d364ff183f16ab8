"""Shards beside TensorFlow's readers, at real images, and under kills.

Figures are printed (`-s`).
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.loader import SegmentationLoader
from data_pipelines.shards import tfrecord
from data_pipelines.shards.source import ShardSource
from data_pipelines.sources.registry import open_source

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"train2017": 31, "val2017": 60}

linux_only = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="follows processes by /proc")


def start(images, out, *flags):
    command = [sys.executable, "-m", "data_pipelines.prepare", "coco_panoptic_zps"]
    command += [f"--root={images}", f"--out={out}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def images(shared_data):
    return shared_data / "coco_panoptic_mini"


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    """Folder with both parts, 24 shards each, made without interruption."""
    out = tmp_path_factory.mktemp("prepared")
    process = start(images, out, "--shards=24")
    printed = process.communicate()[0].decode()
    print(printed)
    assert process.returncode == 0
    return out


def test_batches_and_native_examples_are_those_of_the_folder(images, prepared):
    options = dict(seed=1, image_size=512, num_threads=2)
    for part, count in PARTS.items():
        source, shards = open_source("coco_panoptic_zps", images, part), ShardSource(prepared, part)
        assert len(shards.records) == count
        unseen = dict(unseen_images=shards.unseen)
        left = SegmentationLoader(source, **options, **unseen)
        right = SegmentationLoader(shards, **options, **unseen)
        seconds = [0.0, 0.0]
        for step in range(8):
            batches = []
            for k, loader in enumerate((left, right)):
                begin = time.perf_counter()
                batches.append(loader.batch(step, 8))
                seconds[k] += time.perf_counter() - begin
            for name, values in batches[0].items():
                np.testing.assert_array_equal(values, batches[1][name], err_msg=name)
        rates = [64 / s for s in seconds]
        print(f"{part}: images/s from the folder {rates[0]:.1f}, from shards {rates[1]:.1f}")
        for record in shards.records[::6]:
            i = [r.image_id for r in source.records].index(record.image_id)
            j = shards.records.index(record)
            expected, found = left.eval_example(i), right.eval_example(j)
            for name, values in expected.items():
                np.testing.assert_array_equal(values, found[name], err_msg=name)


def test_tfds_reads_every_record(prepared):
    """JPEGs to within what decoders differ by, everything else exactly."""
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(prepared))
    assert builder.info.full_name == "coco_panoptic_zps/1.0.0"
    for part, count in PARTS.items():
        assert builder.info.splits[part].num_examples == count
        shards = ShardSource(prepared, part)
        records = {record.image_id: record for record in shards.records}
        seen = set()
        # TensorFlow checks the CRC of every record.
        for example in builder.as_dataset(split=part).as_numpy_iterator():
            record = records[int(example["image_id"])]
            seen.add(record.image_id)
            image, ids = shards.read(record)
            assert example["file_name"].decode() == record.file_name
            assert example["image_size"].tolist() == [record.height, record.width]
            np.testing.assert_array_equal(example["segment_ids"][..., 0], ids)
            np.testing.assert_array_equal(example["segment_labels"], record.labels)
            np.testing.assert_array_equal(example["segment_is_crowd"], record.is_crowd)
            np.testing.assert_array_equal(example["segment_source_ids"], record.source_ids)
            is_thing = np.array(shards.vocabulary.is_thing)[record.labels]
            np.testing.assert_array_equal(example["segment_is_thing"], is_thing)
            difference = np.abs(example["image"].astype(int) - np.array(image))
            assert difference.mean() < 3
        assert seen == records.keys()
    name = builder.info.features["segment_labels"].feature.int2str(19)
    assert name == "cow"


def test_tensorflow_reads_any_example(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is the reference here")
    rng = np.random.default_rng(0)
    examples = [
        {"bytes": rng.bytes(70_000), "ints": [0, 1, 127, 128, 300, 2**31, 2**62], "none": []},
        {"bytes": b"", "ints": [-1, -(2**63)], "none": np.empty(0, np.int64)},
        {"bytes": "名".encode(), "ints": np.array([True, False]), "none": []},
    ]
    payloads = [tfrecord.encode_example(example) for example in examples]
    path = tmp_path / "file.tfrecord"
    path.write_bytes(b"".join(map(tfrecord.frame, payloads)))
    # TensorFlow checks both CRCs of every record.
    read = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    assert read == payloads
    for payload, example in zip(payloads, examples, strict=True):
        features = tf.train.Example.FromString(payload).features.feature
        assert features.keys() == example.keys()
        assert list(features["bytes"].bytes_list.value) == [example["bytes"]]
        assert list(features["ints"].int64_list.value) == [int(x) for x in example["ints"]]
        assert not features["none"].int64_list.value
    broken = bytearray(path.read_bytes())
    broken[tfrecord.HEADER + 40_000] ^= 1
    path.write_bytes(broken)
    with pytest.raises(tf.errors.DataLossError):
        list(tf.data.TFRecordDataset(str(path)))


def children(pid):
    """Processes below a process, by number."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in below] + [c for child in below for c in children(child)]


def wait(process, seconds):
    """Whether a process ends within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def finished_shards(folder):
    return {path.name for path in folder.glob("*.tfrecord-?????-of-?????")}


@linux_only
def test_a_kill_at_any_moment_leaves_whole_shards_only(images, prepared, tmp_path):
    expected = {path.name: path.read_bytes() for path in prepared.iterdir()}
    rng, kills, before = random.Random(0), 0, set()
    while True:
        process = start(images, tmp_path, "--shards=24")
        # Killed when some shards more are there, and a moment later that a dice decides.
        target = len(before) + rng.randrange(1, 9)
        while len(finished_shards(tmp_path)) < target and not wait(process, 0.01):
            pass
        workers = [os.pidfd_open(child) for child in children(process.pid)]
        if not wait(process, rng.random() * 0.1):
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        for worker in workers:
            ended, _, _ = select.select([worker], [], [], 60)
            assert ended, "a worker goes on without the command that started it"
            os.close(worker)
        found = finished_shards(tmp_path)
        for name in found:
            assert (tmp_path / name).read_bytes() == expected[name], name
        assert before <= found
        before = found
        if process.returncode == 0:
            break
    print(f"{kills} kills until {len(before)} shards were there")
    assert kills >= 3
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.keys() == expected.keys()
    for name in expected:
        assert left[name] == expected[name], name


@linux_only
def test_a_worker_that_is_killed_ends_the_command_in_a_sentence(images, tmp_path):
    process = start(images, tmp_path, "--shards=24")
    while not finished_shards(tmp_path):
        assert not wait(process, 0.01)
    # The last one: the first is multiprocessing's own helper.
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1
    assert "Error: A process that wrote shards was killed" in printed.splitlines()[-1]
    assert "Traceback" not in printed
