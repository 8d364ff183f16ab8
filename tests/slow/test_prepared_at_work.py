"""Prepared data at real images: batches, a stranger's reader, kills, and memory.

Figures are printed (`-s`).
"""

import contextlib
import importlib.util
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from concat_jax.core.files import FileError
from data_pipelines.loader import SegmentationLoader
from data_pipelines.prepared.pipeline import training_batches
from data_pipelines.prepared.source import PreparedSource
from data_pipelines.sources.registry import open_source

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="pip install -r requirements-data.txt brings TFDS",
)
pytestmark = [pytest.mark.slow, needs_tfds]

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"train2017": 31, "val2017": 60}
STARTS = 5


def start(images, out):
    command = [sys.executable, "-m", "data_pipelines.prepare", "coco_panoptic_zps"]
    command += [f"--root={images}", f"--out={out}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def images(shared_data):
    return shared_data / "coco_panoptic_mini"


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    process = start(images, out)
    print(process.communicate()[0].decode())
    assert process.returncode == 0
    return out


def test_batches_and_native_examples_are_those_of_the_folder(images, prepared):
    options = dict(seed=1, image_size=512, num_threads=2)
    for part, count in PARTS.items():
        source, written = (
            open_source("coco_panoptic_zps", images, part),
            PreparedSource(prepared, part),
        )
        assert len(written.records) == count
        unseen = dict(unseen_images=written.unseen)
        left = SegmentationLoader(source, **options, **unseen)
        right = SegmentationLoader(written, **options, **unseen)
        for step, found in enumerate(training_batches(right, range(8), 8)):
            for name, values in left.batch(step, 8).items():
                np.testing.assert_array_equal(values, found[name], err_msg=name)
        for record in written.records[::6]:
            i = [r.image_id for r in source.records].index(record.image_id)
            expected = left.eval_example(i)
            found = right.eval_example(written.records.index(record))
            for name, values in expected.items():
                np.testing.assert_array_equal(values, found[name], err_msg=name)


def test_tfds_reads_every_record(prepared):
    """JPEGs to within what decoders differ by, everything else exactly."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(prepared))
    for part, count in PARTS.items():
        assert builder.info.splits[part].num_examples == count
        written = PreparedSource(prepared, part)
        # TensorFlow checks the CRC of every record.
        examples = builder.as_dataset(split=part).as_numpy_iterator()
        for record, example in zip(written.records, examples, strict=True):
            image, ids = written.read(record)
            assert example["image_id"] == record.image_id
            np.testing.assert_array_equal(example["segment_ids"], ids)
            np.testing.assert_array_equal(example["segment_labels"], record.labels)
            assert np.abs(example["image"].astype(int) - np.array(image)).mean() < 3
    name = builder.info.features["segment_labels"].feature.int2str(19)
    assert name == "cow"


def test_a_kill_at_any_moment_leaves_whole_parts_only(images, prepared, tmp_path):
    begin = time.monotonic()
    whole = start(images, tmp_path / "timed")
    whole.communicate()
    seconds, rng, kills = time.monotonic() - begin, random.Random(0), 0
    out = tmp_path / "killed"
    for _ in range(STARTS):
        process = start(images, out)
        try:
            process.communicate(timeout=seconds * rng.uniform(0.6, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        for part in PARTS:
            with contextlib.suppress(FileError):  # it is not finished; else it is whole
                assert len(PreparedSource(out, part).records) == PARTS[part]
    assert start(images, out).wait() == 0
    print(f"{kills} kills in {STARTS} starts of {seconds:.0f} s")
    assert kills >= 2
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in prepared.iterdir())
    for part in PARTS:
        found, expected = PreparedSource(out, part), PreparedSource(prepared, part)
        for left, right in zip(found.records, expected.records, strict=True):
            for one, other in zip(found.read(left), expected.read(right), strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_memory_stays_flat_over_5000_steps(prepared):
    source = PreparedSource(prepared, "val2017")
    options = dict(seed=0, image_size=128, unseen_images="keep", num_threads=2)
    loader = SegmentationLoader(source, **options)
    peaks = []
    for step, _ in enumerate(training_batches(loader, range(5000), 2)):
        if step in (499, 4999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"peak after 500 steps {peaks[0] / 1024:.0f} MiB, after 5,000 {peaks[1] / 1024:.0f} MiB")
    assert peaks[1] < 1.03 * peaks[0]
