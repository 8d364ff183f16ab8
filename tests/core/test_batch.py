"""The batch contract, and that those who make batches keep it."""

import numpy as np
import pytest

from concat_jax.core.batch import (
    FIELDS,
    IMAGE_FIELDS,
    MEMORY_FIELDS,
    QUERY_FIELDS,
    SEGMENT_TABLES,
    batch_shapes,
    pad_table,
)
from concat_jax.stages.queries import QueryBank
from data_pipelines.synthetic.world import SyntheticWorld


def shapes_of(batch):
    return {name: (value.shape, value.dtype) for name, value in batch.items()}


def test_shapes_and_types_for_given_sizes():
    shapes = batch_shapes(["image", "clip_segment_targets"], B=2, S=8, G=3, C=5)
    assert shapes == {
        "image": ((2, 8, 8, 3), np.dtype("uint8")),
        "clip_segment_targets": ((2, 3, 5), np.dtype("float32")),
    }
    assert batch_shapes(["image_size"]) == {"image_size": ((2,), np.dtype("int32"))}


@pytest.mark.parametrize("rows, dtype", [(255, "uint8"), (256, "uint16")])
def test_ids_take_the_narrowest_type(rows, dtype):
    assert batch_shapes(["segment_ids"], S=4, G=rows)["segment_ids"] == ((4, 4), np.dtype(dtype))


def test_padding_has_the_type_of_its_field():
    assert SEGMENT_TABLES == tuple(name for name in FIELDS if name.startswith("segment_"))[1:]
    for field in FIELDS.values():
        assert np.array(field.padding, field.dtype) == field.padding
    padded = pad_table(np.array([4]), "segment_labels", 3)
    assert padded.tolist() == [4, -1, -1] and padded.dtype == np.int32


def test_the_synthetic_world_keeps_the_contract():
    batch = SyntheticWorld(batch_size=2, image_size=32, max_segments=12).batch(0)
    assert shapes_of(batch) == batch_shapes(IMAGE_FIELDS, B=2, S=32, G=12)
    for name in SEGMENT_TABLES:
        missing = batch["segment_labels"] < 0
        assert missing.any() and (batch[name][missing] == FIELDS[name].padding).all()


def test_the_query_bank_keeps_the_contract():
    queries, labels = np.zeros((3, 4, 5), np.float32), np.zeros((3, 4), np.int16)
    bank = QueryBank(queries, labels, batch_size=2, seed=0, memory_per_class=6, num_classes=3)
    expected = batch_shapes([*QUERY_FIELDS, *MEMORY_FIELDS], B=2, N=4, D=5, K=4, M=6)
    assert shapes_of(bank.batch(0)) == expected
