"""How fast training batches are made, beside decoding the JPEGs alone, and where the time goes.

Seconds are those of the processor, not of the clock, so that they hold for one core whatever else
the machine does; what waits for a disk is not in them. All variants take turns, so that what slows
the machine down for a while slows all of them down.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import pathlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from data_pipelines import augment, placement
from data_pipelines.loader import SegmentationLoader
from data_pipelines.shards.build import build_shards
from data_pipelines.shards.source import ShardSource
from data_pipelines.sources.pictures import open_picture
from data_pipelines.sources.registry import open_source
from data_pipelines.sources.source import ImageRecord, Source

RAW = "JPEG to array, nothing else"
FOLDER, SHARDS = "batches from the folder", "batches from shards"
# Of the two parts of reading, which a shard does apart from each other.
_IMAGE, _MAP = "JPEG", "id map: PNG, look-up"
_RESAMPLE = "image: resize, crop, flip, pad"


def measure_input_speed(
    root: str | os.PathLike[str],
    *,
    part: str = "train2017",
    size: int = 1024,
    batch_size: int = 4,
    num_images: int = 100,
    rounds: int = 5,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a core that images cost, by variant and by part of the work.

    Args:
      root: a data set in COCO's panoptic layout.
      part: of it.
      size: side S of the training images, made by large-scale jitter.
      batch_size: images of a batch.
      num_images: the first so many by id are read in a round, shuffled, and some of them again to
        fill the last batch.
      rounds: timed, after one to warm up.

    Returns:
      `whole`, variant -> seconds an image in each round: `RAW`, `FOLDER`, `SHARDS`; and `parts`,
      part of the work -> likewise, of batches from the folder, one after the other.

    Raises:
      FileError: for a folder of another layout.
      ValueError: for a number out of range.
    """
    for name, value in (("num_images", num_images), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value} and must be at least 1.")
    # Of all of COCO, shards would take an hour to build.
    folder = copy.copy(open_source("coco_panoptic_zps", root, part))
    folder.records = folder.records[:num_images]
    options = dict(seed=0, image_size=size, unseen_images="keep", num_threads=1)
    steps = range(-(-len(folder.records) // batch_size))
    number = len(steps) * batch_size
    with tempfile.TemporaryDirectory() as temporary:
        build_shards(
            temporary,
            folder,
            dataset="coco_panoptic_zps",
            part=part,
            unseen="keep",
            num_shards=1,
            workers=1,
        )
        loaders = {
            FOLDER: SegmentationLoader(folder, **options),
            SHARDS: SegmentationLoader(ShardSource(temporary, part), **options),
        }
        batches = [loaders[FOLDER].batch(step, batch_size)["image_id"] for step in steps]
        of_id = {record.image_id: record for record in folder.records}
        records = [of_id[image_id] for ids in batches for image_id in ids.tolist()]
        paths = [folder.images_folder / record.file_name for record in records]
        calls: dict[str, Callable[[], None]] = {
            RAW: lambda: _decode(paths),
            **{
                name: functools.partial(_run, loader, steps, batch_size)
                for name, loader in loaders.items()
            },
        }
        whole: dict[str, list[float]] = {name: [] for name in calls}
        parts: dict[str, list[float]] = defaultdict(list)
        for round_ in range(rounds + 1):
            for name, call in calls.items():
                begin = time.process_time()
                call()
                if round_:
                    whole[name].append((time.process_time() - begin) / number)
            for name, seconds in _profile(folder, records, paths, size, batch_size).items():
                if round_:
                    parts[name].append(seconds / number)
    return {"whole": whole, "parts": dict(parts)}


def _decode(paths: list[pathlib.Path]) -> None:
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes()))
        # Pillow's `convert` copies what is RGB already.
        np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _run(loader: SegmentationLoader, steps: range, batch_size: int) -> None:
    for step in steps:
        loader.batch(step, batch_size)


def _profile(
    source: Source,
    records: list[ImageRecord],
    paths: list[pathlib.Path],
    size: int,
    batch_size: int,
) -> dict[str, float]:
    # What `SegmentationLoader.batch` does, one part after the other.
    seconds: dict[str, float] = defaultdict(float)
    canvases = np.empty((batch_size, size, size, 3), np.uint8)
    maps = np.zeros((batch_size, size, size), np.uint8)

    def timed(name: str, call: Callable, *args, **options):
        begin = time.thread_time()
        result = call(*args, **options)
        seconds[name] += time.thread_time() - begin
        return result

    for number, (record, path) in enumerate(zip(records, paths, strict=True)):
        timed(_IMAGE, open_picture, path)
        begin = time.thread_time()
        image, ids = source.read(record)
        seconds[_MAP] += time.thread_time() - begin
        rng = np.random.default_rng([0, number])
        where = augment.sample_jitter(rng, *ids.shape, size)
        canvas = canvases[number % batch_size]
        timed(_RESAMPLE, placement.place_image, np.asarray(image), where, size, canvas=canvas)
        ids, _ = timed("id map: the same, renumber", placement.place_segments, ids, where, 100)
        height, width = ids.shape
        timed("batch", np.copyto, maps[number % batch_size][:height, :width], ids)
    # A source reads both at once; what the image costs alone is known.
    seconds[_MAP] -= seconds[_IMAGE]
    return seconds


def to_markdown(measured: Mapping[str, Mapping[str, list[float]]], size: int) -> str:
    """What `measure_input_speed` returned as two tables."""
    raw = measured["whole"][RAW]
    lines = [
        f"Large-scale jitter to {size}, images a second of one core:",
        "",
        "| variant | images/s | ms an image (fastest to slowest round) | share of JPEG decoding |",
        "|---|---|---|---|",
    ]
    for name, seconds in measured["whole"].items():
        median = statistics.median(seconds)
        span = f"{1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f}"
        # Round by round, in which the machine is the same for both.
        share = statistics.median(ours / theirs for ours, theirs in zip(raw, seconds, strict=True))
        lines.append(f"| {name} | {1 / median:.0f} | {1e3 * median:.2f} ({span}) | {share:.2f} |")
    parts = {name: statistics.median(seconds) for name, seconds in measured["parts"].items()}
    total = sum(parts.values())
    lines += ["", "| part, from the folder | ms an image | share |", "|---|---|---|"]
    lines += [f"| {n} | {1e3 * s:.2f} | {100 * s / total:.0f} % |" for n, s in parts.items()]
    lines += ["", "Seconds are the processor's, in one thread; the files were in memory."]
    return "\n".join(lines) + "\n"
