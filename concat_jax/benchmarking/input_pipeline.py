"""How fast training batches are made, beside decoding the JPEGs alone.

Seconds are those of the processor, not of the clock, so that they hold for one core whatever else
the machine does; what waits for a disk is not in them.
"""

from __future__ import annotations

import copy
import io
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement, Work
from concat_jax.evaluation.report import markdown_table
from data_pipelines.loader import SegmentationLoader
from data_pipelines.prepared.build import build_part
from data_pipelines.prepared.pipeline import training_batches
from data_pipelines.prepared.source import PreparedSource
from data_pipelines.sources.registry import open_source

CLOCK = time.process_time
RAW = "JPEG to array, nothing else"
FOLDER, PREPARED = "batches from the folder", "batches from prepared data, by tf.data"
# A round of the latter is so many passes, as it begins with building the pipeline.
PASSES = 8
DATA_SET = "coco_panoptic_zps"


def works(case: Case, part: str = "train2017") -> dict[str, Work]:
    """Batches from a folder and from it prepared, and the JPEGs alone.

    The case's `source` is a folder in COCO's panoptic layout, `height` the side of the training
    images. The first `num_images` by id are read in a round: shuffled, and some again to fill the
    last batch.
    """
    # To prepare all of COCO would take an hour.
    folder = copy.copy(open_source(DATA_SET, case.source, part))
    folder.records = folder.records[: case.num_images]
    size, steps = case.height, range(-(-len(folder.records) // case.batch))
    options = dict(seed=0, image_size=size, unseen_images="keep", num_threads=1)
    out = tempfile.TemporaryDirectory()
    build_part(out.name, folder, dataset=DATA_SET, part=part, unseen="keep")
    from_folder = SegmentationLoader(folder, **options)
    prepared = SegmentationLoader(PreparedSource(out.name, part), **options)
    prepared.temporary_folder = out  # it goes when the loader goes
    batches = [from_folder.batch(step, case.batch)["image_id"] for step in steps]
    of_id = {record.image_id: record for record in folder.records}
    records = [of_id[image_id] for ids in batches for image_id in ids.tolist()]
    paths = [folder.images_folder / record.file_name for record in records]

    def decode() -> dict[str, Any]:
        for path in paths:
            image = Image.open(io.BytesIO(path.read_bytes()))
            # Pillow's `convert` copies what is RGB already.
            np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        return {"images": np.array(len(records))}

    def by_loader() -> dict[str, Any]:
        for step in steps:
            from_folder.batch(step, case.batch)
        return {"images": np.array(len(records))}

    def by_tf_data() -> dict[str, Any]:
        for _ in training_batches(prepared, [*steps] * PASSES, case.batch):
            pass
        return {"images": np.array(PASSES * len(records))}

    return {RAW: Work(decode), FOLDER: Work(by_loader), PREPARED: Work(by_tf_data)}


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """Images a second of a core."""
    number = {name: int(result.outputs["images"]) for name, result in results.items()}
    rows = []
    for name in (RAW, FOLDER, PREPARED):
        result = results[name]
        # Round by round, in which the machine is the same for both.
        shares = np.divide(results[RAW].seconds, result.seconds) * number[name] / number[RAW]
        rate = f"{number[name] / result.median:.0f}"
        shown = result.show(1000 / number[name], 2)
        rows.append([name, rate, shown, f"{statistics.median(shares):.2f}"])
    heads = ["variant", "images/s", "ms an image (fastest to slowest round)"]
    return "\n\n".join(
        [
            f"Large-scale jitter to {case.height}, images a second of one core:",
            markdown_table([*heads, "share of JPEG decoding"], rows),
            "Seconds are the processor's, in one thread; the files were in memory.",
        ]
    )
