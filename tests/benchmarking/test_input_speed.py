"""The benchmark of the input pipeline: what it measures is there, and the table says what it is."""

import pytest

from concat_jax.benchmarking import input_speed


def test_measures_every_variant_and_part_once_a_round(shared_data):
    measured = input_speed.measure_input_speed(
        shared_data / "coco_panoptic_mini",
        part="val2017",
        size=32,
        batch_size=2,
        num_images=3,
        rounds=2,
    )
    assert list(measured["whole"]) == [input_speed.RAW, input_speed.FOLDER, input_speed.SHARDS]
    assert len(measured["parts"]) == 5
    for seconds in [*measured["whole"].values(), *measured["parts"].values()]:
        assert len(seconds) == 2 and all(0 < value < 10 for value in seconds)


def test_table_by_hand():
    measured = {
        "whole": {
            input_speed.RAW: [0.002, 0.004, 0.003],
            input_speed.FOLDER: [0.006, 0.008, 0.004],
        },
        "parts": {"JPEG": [0.003], "rest": [0.001]},
    }
    table = input_speed.to_markdown(measured, 1024)
    assert "| JPEG to array, nothing else | 333 | 3.00 (2.00 to 4.00) | 1.00 |" in table
    assert "| batches from the folder | 167 | 6.00 (4.00 to 8.00) | 0.50 |" in table
    assert "| JPEG | 3.00 | 75 % |" in table and "jitter to 1024" in table


@pytest.mark.parametrize("change", [{"num_images": 0}, {"rounds": 0}], ids=str)
def test_bad_numbers(tmp_path, change):
    with pytest.raises(ValueError, match="is 0 and must be at least 1"):
        input_speed.measure_input_speed(tmp_path, **change)
