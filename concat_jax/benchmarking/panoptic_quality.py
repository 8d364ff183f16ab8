"""Panoptic quality of pairs of id maps: the official algorithm, ours, and decoding their PNGs.

All see the same maps in memory, as COCO's PNGs hold them: ids of 24 bits. Decoding is what scoring
files cannot do without, so it is the measure of whether the metric itself costs anything.
"""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import NUM_CLASSES, Case
from concat_jax.benchmarking.harness import Measurement, Work
from concat_jax.core.coco import read_panoptic
from concat_jax.core.mask_codes import ids_to_rgb, read_id_map
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.report import markdown_table

OFFICIAL, OURS = "official algorithm", "ours"
# Rows and columns that a prediction is the ground truth moved by.
SHIFT = (4, 8)


class Pair(NamedTuple):
    """One image's maps [H, W] uint32, 0 void, and what their ids are.

    `segments` are those of the truth, id -> {"label", "is_crowd", "area"}, areas as the official
    json brings them.
    """

    gt_ids: np.ndarray
    pred_ids: np.ndarray
    segments: dict[int, dict]
    pred_labels: dict[int, int]


def works(case: Case) -> dict[str, Work]:
    """The three, on pairs of drawn maps or of those of the COCO panoptic json `source`."""
    pairs = _read_pairs(Path(case.source), case.num_images) if case.source else _draw_pairs(case)
    truths = (segment["label"] for pair in pairs for segment in pair.segments.values())
    found = (label for pair in pairs for label in pair.pred_labels.values())
    num_classes = 1 + max([*truths, *found], default=0)
    pngs = [_encode(ids) for pair in pairs for ids in (pair.gt_ids, pair.pred_ids)]

    def official() -> dict[str, np.ndarray]:
        return {"counts": official_counts(pairs, num_classes)}

    def ours() -> dict[str, np.ndarray]:
        quality = PanopticQuality(num_classes)
        for pair in pairs:
            labels = {i: segment["label"] for i, segment in pair.segments.items()}
            crowd = {i: segment["is_crowd"] for i, segment in pair.segments.items()}
            quality.update(pair.gt_ids, labels, crowd, pair.pred_ids, pair.pred_labels)
        return {"counts": np.array([quality.iou_sum, quality.tp, quality.fp, quality.fn])}

    def decoding() -> dict[str, np.ndarray]:
        for png in pngs:
            rgba = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
            rgba.view("<u4")[..., 0] &= 0xFFFFFF
        return {}

    return {OFFICIAL: Work(official), OURS: Work(ours), "PNG decoding": Work(decoding)}


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """Milliseconds a pair, and how many times as fast as the official algorithm each is."""
    official, rows = results[OFFICIAL], []
    for name, result in results.items():
        rounds = np.divide(official.seconds, result.seconds)
        ratio = f"{official.median / result.median:.1f}"
        span = f" ({rounds.min():.1f} to {rounds.max():.1f})" if result is not official else ""
        rows.append([name, result.show(1000 / case.num_images, 2), ratio + span])
    counts = (np.asarray(results[name].outputs["counts"]) for name in (OFFICIAL, OURS))
    heads = ["variant", "ms a pair (fastest to slowest)", "times as fast (lowest to highest round)"]
    return (
        f"{markdown_table(heads, rows)}\n\n"
        f"Largest difference of counts and summed IoUs: {np.abs(np.subtract(*counts)).max():.1e}. "
        "They took turns in one process, on one core."
    )


def _draw_pairs(case: Case) -> list[Pair]:
    """Blobs with ids as COCO's, predictions moved, some of another class and some void."""
    maps, labels = cases.segments(dataclasses.replace(case, batch=case.num_images))
    rng = np.random.default_rng(3)
    pairs = []
    for rows, row_labels in zip(maps, labels, strict=True):
        ids = rng.choice(256**3 - 1, case.segments, replace=False) + 1
        gt_ids = np.append(0, ids)[rows].astype(np.uint32)
        label_of = dict(zip(ids.tolist(), row_labels.tolist(), strict=True))
        predicted = {
            i: label if rng.random() < 0.8 else int(rng.integers(NUM_CLASSES))
            for i, label in label_of.items()
        }
        pairs.append(_moved(gt_ids, label_of, {}, predicted))
    return pairs


def _read_pairs(json_path: Path, number: int) -> list[Pair]:
    """The first images of a COCO panoptic json, predictions moved.

    Raises:
      ValueError: if there are fewer.
    """
    file = read_panoptic(json_path)
    if len(file.annotations) < number:
        raise ValueError(
            f"{json_path} has {len(file.annotations)} images where {number} are wanted."
        )
    index_of = {category: k for k, category in enumerate(file.categories or ())}
    pairs = []
    for annotation in list(file.annotations.values())[:number]:
        gt_ids = read_id_map(json_path.with_suffix("") / annotation.file_name, json_path)
        classes = [index_of[category] for category in annotation.category_ids]
        labels = dict(zip(annotation.ids, classes, strict=True))
        crowd = dict(zip(annotation.ids, annotation.is_crowd, strict=True))
        pairs.append(_moved(gt_ids, labels, crowd, labels))
    return pairs


def _moved(gt_ids: np.ndarray, labels: dict, crowd: dict, predicted: dict) -> Pair:
    ids, areas = np.unique(gt_ids, return_counts=True)
    segments = {
        i: {"label": labels[i], "is_crowd": crowd.get(i, False), "area": area}
        for i, area in zip(ids.tolist(), areas.tolist(), strict=True)
        if i in labels
    }
    return Pair(
        gt_ids, np.roll(gt_ids, SHIFT, (0, 1)), segments, {i: predicted[i] for i in segments}
    )


def _encode(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(ids_to_rgb(ids)).save(buffer, "PNG")
    return buffer.getvalue()


def official_counts(pairs: Iterable[Pair], num_classes: int) -> np.ndarray:
    """Summed IoU, TP, FP and FN of every class, [4, K] float64, as panopticapi counts them."""
    counts = np.zeros((4, num_classes))
    for pair in pairs:
        ids, sizes = np.unique(pair.pred_ids, return_counts=True)
        areas = {int(i): int(size) for i, size in zip(ids, sizes, strict=True) if i}
        codes = pair.gt_ids.astype(np.uint64) * 256**3 + pair.pred_ids.astype(np.uint64)
        shared = defaultdict(int)
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            shared[int(code) // 256**3, int(code) % 256**3] = int(count)

        matched_gt, matched_pred = set(), set()
        for (gt, pred), intersection in list(shared.items()):
            if gt not in pair.segments or pred not in pair.pred_labels:
                continue
            truth = pair.segments[gt]
            if truth["is_crowd"] or truth["label"] != pair.pred_labels[pred]:
                continue
            iou = intersection / (areas[pred] + truth["area"] - intersection - shared[0, pred])
            if iou > 0.5:
                counts[:2, truth["label"]] += iou, 1
                matched_gt.add(gt)
                matched_pred.add(pred)

        crowd_of_label = {}
        for gt, truth in pair.segments.items():
            if gt not in matched_gt and truth["is_crowd"]:
                crowd_of_label[truth["label"]] = gt
            elif gt not in matched_gt:
                counts[3, truth["label"]] += 1
        for pred, label in pair.pred_labels.items():
            if pred in matched_pred:
                continue
            ignored = shared[0, pred]
            if label in crowd_of_label:
                ignored += shared[crowd_of_label[label], pred]
            if ignored / areas[pred] <= 0.5:
                counts[2, label] += 1
    return counts
