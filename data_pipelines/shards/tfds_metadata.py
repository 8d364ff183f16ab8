"""What TensorFlow Datasets needs to know of a folder of shards, written by TensorFlow Datasets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.files import Identity, manifests


def is_tfds_installed() -> bool:
    """Whether `write_tfds_metadata` can work."""
    return all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorflow_datasets"))


def features(identity: Identity) -> Any:
    """The `tfds.features.FeaturesDict` of a record; the names are those of the loader's examples.

    `image` [H, W, 3] uint8 is decoded without EXIF rotation, which TensorFlow does not know;
    `segment_ids` [H, W, 1] is uint8 or uint16, and `segment_runs` the same map, see `id_runs`; the
    tables `segment_*` have one entry a segment.
    """
    import tensorflow_datasets as tfds

    dtype = np.uint8 if identity.id_bits == 8 else np.uint16
    label = tfds.features.ClassLabel(names=list(identity.vocabulary["names"]))
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), dtype=np.uint8),
            "segment_ids": tfds.features.Image(
                shape=(None, None, 1), dtype=dtype, encoding_format="png"
            ),
            "segment_runs": tfds.features.Text(),
            "segment_labels": tfds.features.Sequence(label),
            "segment_is_thing": tfds.features.Sequence(np.bool_),
            "segment_is_crowd": tfds.features.Sequence(np.bool_),
            "segment_source_ids": tfds.features.Sequence(np.int64),
            "image_id": tfds.features.Scalar(np.int64),
            "image_size": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            "file_name": tfds.features.Text(),
        }
    )


def write_tfds_metadata(folder: Path) -> None:
    """Writes `dataset_info.json` and its companions for the finished parts of a folder.

    `tfds.builder_from_directory(folder).as_dataset(split=PART)` then reads the shards.
    """
    import tensorflow_datasets as tfds

    finished = [(i, result) for i, result in manifests(folder) if result is not None]
    identity = finished[0][0]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=identity.dataset, filetype_suffix="tfrecord"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(identity),
        split_infos=[
            tfds.core.SplitInfo(
                name=part.part,
                shard_lengths=result["shard_lengths"],
                num_bytes=sum(result["shard_bytes"]),
                filename_template=template.replace(split=part.part),
            )
            for part, result in finished
        ],
        filename_template=template,
        check_data=False,
        description=(
            f"{identity.dataset}: images and id maps of segments, 0 void, row + 1 of the tables. "
            + " ".join(f"Of {p.part}, unseen classes: {p.unseen}." for p, _ in finished)
        ),
    )
