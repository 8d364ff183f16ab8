"""Our data as one of Scenic's data sets, "concat_jax", for its trainers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import SEGMENT_TABLES
from concat_jax.neighbours.scenic import scenic_module
from data_pipelines.augment import resize_longest
from data_pipelines.datasets import make_datasets

NAME = "concat_jax"
LABEL_FIELDS = ("segment_ids", *SEGMENT_TABLES, "image_id", "image_size")
# A trainer asks as long as it likes.
_MANY = range(1 << 31)


def add_dataset() -> None:
    """Makes "concat_jax" known to `scenic.dataset_lib.datasets`; a second call changes nothing."""
    datasets = scenic_module("dataset_lib.datasets")
    if NAME not in datasets.DatasetRegistry.list():
        datasets.add_dataset(NAME)(get_dataset)


def get_dataset(
    *,
    batch_size: int,
    eval_batch_size: int,
    num_shards: int,
    dataset_configs: Mapping[str, Any],
    shuffle_seed: int | None = 0,
    **unused: Any,
) -> Any:
    """A `scenic.dataset_lib.dataset_utils.Dataset`, called as Scenic calls its builders.

    Batches are {"inputs": [n, b, S, S, 3] uint8 RGB, "label": {`LABEL_FIELDS` as in `core.batch`},
    "batch_mask": [n, b] float32}, n the shards. Training batches are augmented, never padded, and
    begin anew with every call; validation's are all evaluation images at the training size, again
    and again. `meta_data["labels"]` is our `Datasets`, for `segmentor_model`.

    Args:
      batch_size, eval_batch_size: of this host.
      dataset_configs: the `data` section of one of our configs, with its num_eval_images.
      unused: Scenic's rng, dtype_str and dataset_service_address, which have no say in ours.
    """
    utils, size = scenic_module("dataset_lib.dataset_utils"), dataset_configs["image_size"]
    if not (number := dataset_configs["num_eval_images"]):
        raise ValueError("Scenic asks how many images there are; set data.num_eval_images.")
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    data = make_datasets(dataset_configs, seed=shuffle_seed or 0, **hosts)

    def in_scenics_format(batch: Mapping[str, np.ndarray], *, train: bool) -> dict[str, Any]:
        labels = {field: batch[field] for field in LABEL_FIELDS}
        rows = batch_size if train else eval_batch_size
        padded = utils.maybe_pad_batch({"inputs": batch["image"], "label": labels}, train, rows)
        return utils.shard(padded, num_shards)

    def evaluation() -> Iterator[dict[str, np.ndarray]]:
        most = dataset_configs["max_segments"]
        while True:
            examples = data.evaluation(*hosts.values())
            fitted = (_with_rows(resize_longest(e, size), most) for e in examples)
            while rows := list(itertools.islice(fitted, eval_batch_size)):
                yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    training = data.train(batch_size * jax.process_count())(_MANY)
    return utils.Dataset(
        train_iter=map(functools.partial(in_scenics_format, train=True), training),
        valid_iter=map(functools.partial(in_scenics_format, train=False), evaluation()),
        meta_data={
            "input_shape": (-1, size, size, 3),
            "input_dtype": jnp.uint8,
            "num_classes": len(data.vocabulary),
            "num_eval_examples": number,
            "labels": data,
        },
    )


def _with_rows(example: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
    """The fields of a batch, with as many rows of segments as a training batch has."""
    ids = example["segment_ids"]
    fields = {name: np.asarray(example[name]) for name in ("image", *LABEL_FIELDS)}
    tables = {name: example[name][:number] for name in SEGMENT_TABLES}
    return {**fields, **tables, "segment_ids": np.where(ids > number, 0, ids).astype(ids.dtype)}
