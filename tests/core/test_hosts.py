"""Counts travel between hosts without losing a digit, and several hosts make one json."""

import json

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.core import coco_writers, hosts
from concat_jax.core.coco_writers import StreamedJson
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation import counts as counting
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU

VOCABULARY = Vocabulary(
    ("cat", "dog", "sky"), (True, True, False), (True, False, True), category_ids=(1, 2, 3)
)


def add_image(counts, seed):
    """Three segments, found with random noise in place and class; one crowd."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.repeat(rng.integers(0, 4, (5, 5)), 4, 0), 4, 1).astype(np.uint8)
    found = np.where(rng.random(truth.shape) < 0.8, truth, rng.integers(0, 4, truth.shape))
    labels, names = rng.integers(0, 3, 3), rng.integers(0, 3, 3)
    if isinstance(counts, PanopticQuality):
        counts.update(truth, labels, np.array([False, False, True]), found, names)
    elif isinstance(counts, SemanticIoU):
        counts.update(np.append(-1, labels)[truth], np.append(-1, names)[found])
    else:
        masks = [[encode_rle(m == i) for i in (1, 2, 3)] for m in (truth, found)]
        counts.update(seed, masks[0], labels, None, masks[1], names, rng.random(3))


KINDS = (PanopticQuality, SemanticIoU, AveragePrecision)


def sent(counts):
    """As another host receives it."""
    return counts.restored(safetensors.numpy.load(safetensors.numpy.save(counts.to_arrays())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [0, 1, 7])
def test_counts_arrive_as_they_were(kind, images):
    counts = kind(3)
    for seed in range(images):
        add_image(counts, seed)
    received = sent(counts).summarize(VOCABULARY)
    json.dumps(received)  # a report holds it
    # To the last bit, and NaN is equal to NaN here.
    np.testing.assert_equal(received, counts.summarize(VOCABULARY))


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_sum_to_the_counts_of_one(kind, monkeypatch):
    whole, shares = kind(3), [kind(3) for _ in range(3)]
    for seed in range(8):
        add_image(whole, seed)
        add_image(shares[seed % 3], seed)
    # The gathering itself is JAX's; two real processes do it in the slow tests.
    contents = [safetensors.numpy.save(share.to_arrays()) for share in shares]
    monkeypatch.setattr(counting.jax, "process_count", lambda: 3)
    monkeypatch.setattr(counting, "gathered_bytes", lambda content: contents)
    results = [share.over_hosts().summarize(VOCABULARY) for share in shares]
    np.testing.assert_equal(results[1], results[0])
    np.testing.assert_equal(results[2], results[0])
    expected = whole.summarize(VOCABULARY)
    assert results[0].keys() == expected.keys()
    for group in ("all", "seen", "unseen", "harmonic"):
        assert results[0][group] == pytest.approx(expected[group], rel=1e-12, nan_ok=True)


def test_one_host_gets_its_own_counts_back():
    counts = PanopticQuality(3)
    assert counts.over_hosts() is counts
    assert hosts.total_over_hosts(7) == 7
    np.testing.assert_array_equal(hosts.of_first_host(np.arange(3)), np.arange(3))
    assert hosts.gathered_bytes(b"abc") == [b"abc"]
    hosts.wait_for_hosts("nobody")


@pytest.mark.parametrize("sizes", [(2, 1, 3), (0, 2, 0), (0, 0, 0), (1, 0, 1)])
def test_hosts_make_one_json(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_writers, "wait_for_hosts", lambda what: None)
    monkeypatch.setattr(coco_writers.jax, "process_count", lambda: len(sizes))
    expected = [{"host": h, "number": n} for h, size in enumerate(sizes) for n in range(size)]
    for head, lists in ((None, ("",)), ({"a": [1]}, ("entries",)), ({}, ("entries", "more"))):
        path = tmp_path / "predictions.json"
        writers = []
        for host, size in enumerate(sizes):
            monkeypatch.setattr(coco_writers.jax, "process_index", lambda host=host: host)
            writers.append(StreamedJson(path, head, lists))
            for number in range(size):
                for key in lists:
                    writers[-1].append({"host": host, "number": number}, key)
        for host in reversed(range(len(sizes))):  # the first puts them together
            monkeypatch.setattr(coco_writers.jax, "process_index", lambda host=host: host)
            writers[host].close()
        content = json.loads(path.read_text())
        assert content == (expected if head is None else {**head, **dict.fromkeys(lists, expected)})
        assert list(tmp_path.iterdir()) == [path]
