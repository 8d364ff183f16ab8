"""The benchmark of the input pipeline: what it measures is there, and the table says what it is."""

import dataclasses
import importlib.util

import pytest

from concat_jax.benchmarking import input_pipeline
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement, in_turns


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="pip install -r requirements-data.txt brings TFDS",
)
def test_measures_every_variant_once_a_round(shared_data):
    case = Case("input_pipeline", 32, 32, batch=2, num_images=3)
    case = dataclasses.replace(case, source=str(shared_data / "coco_panoptic_mini"))
    works = input_pipeline.works(case, part="val2017")
    results = in_turns(works, 2, input_pipeline.CLOCK)
    assert {len(result.seconds) for result in results.values()} == {2}
    assert all(0 < value < 10 for result in results.values() for value in result.seconds[:1])
    images = {name: int(result.outputs["images"]) for name, result in results.items()}
    assert images.pop(input_pipeline.PREPARED) == 4 * input_pipeline.PASSES
    assert set(images.values()) == {4}  # two batches
    text = input_pipeline.table(case, results)
    assert "Large-scale jitter to 32" in text


def test_table_by_hand():
    def measured(*milliseconds):
        return Measurement(tuple(x / 500 for x in milliseconds), outputs={"images": 2})

    results = {
        input_pipeline.RAW: measured(1, 2, 1.5),
        input_pipeline.FOLDER: measured(3, 4, 2),
        input_pipeline.PREPARED: measured(2, 2, 2),
    }
    table = input_pipeline.table(Case("input_pipeline", 1024, 1024), results)
    assert "| JPEG to array, nothing else | 667 | 1.50 (1.00 to 2.00) | 1.00 |" in table
    # Round by round: 1/3, 2/4, 1.5/2.
    assert "| batches from the folder | 333 | 3.00 (2.00 to 4.00) | 0.50 |" in table
