"""Memory does not grow with the number of images that are scored."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from concat_jax.core.mask_codes import encode_rle
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, SEGMENTS, CLASSES = 480, 640, 15, 133


def pairs(number):
    """Ground truth and prediction: rectangles over void, the prediction moved."""
    for index in range(number):
        rng = np.random.default_rng(index)
        ids = np.zeros((HEIGHT, WIDTH), np.uint16)
        for segment in range(1, SEGMENTS + 1):
            top, left = rng.integers(0, HEIGHT - 40), rng.integers(0, WIDTH - 40)
            ids[top : top + rng.integers(20, 300), left : left + rng.integers(20, 300)] = segment
        labels = rng.integers(0, CLASSES, SEGMENTS)
        yield ids, labels, np.roll(ids, (3, 5), (0, 1)), rng.integers(0, CLASSES, SEGMENTS)


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_panoptic_quality_of_5000_images():
    quality, semantic = PanopticQuality(CLASSES), SemanticIoU(CLASSES)
    readings = []
    for index, (ids, labels, pred, pred_labels) in enumerate(pairs(5000)):
        quality.update(ids, labels, None, pred, labels if index % 2 else pred_labels)
        semantic.update(np.append(-1, labels)[ids], np.append(-1, pred_labels)[pred])
        if index % 500 == 499:
            gc.collect()
            readings.append(resident())
    assert quality.tp.sum() > 1000
    growth = max(readings) - readings[0]
    print(f"\nresident after 500 images {readings[0] / 1e6:.1f} MB, growth {growth / 1e6:.2f} MB")
    assert growth < 8e6


def test_average_precision_keeps_no_masks():
    """What stays of an image are some bytes a detection, whatever the size of its masks."""
    precision = AveragePrecision(CLASSES)
    tracemalloc.start()
    held = []
    detections = 0
    for index, (ids, labels, pred, pred_labels) in enumerate(pairs(200)):
        rows = np.unique(pred)[1:]
        masks = [encode_rle(pred == row) for row in rows]
        truth = np.unique(ids)[1:]
        precision.update(
            index,
            [encode_rle(ids == row) for row in truth],
            labels[truth - 1],
            None,
            masks,
            pred_labels[rows - 1],
            np.linspace(1, 0.1, len(rows)),
        )
        detections += len(rows)
        if index in (99, 199):
            gc.collect()
            held.append((tracemalloc.get_traced_memory()[0], detections))
    tracemalloc.stop()
    (before, few), (after, many) = held
    share = (after - before) / (many - few)
    print(f"\n{share:.0f} bytes a detection")
    assert share < 150
