"""200 randomly damaged copies of real COCO images: each ends in one sentence or is skipped."""

import collections

import numpy as np
import pytest

from tests.data_pipelines import damage

NUM_COPIES = 200


@pytest.mark.slow
def test_no_damage_of_200_passes_in_silence(shared_data, tmp_path):
    source = shared_data / "coco_panoptic_mini"
    kinds = list(damage.DAMAGES)
    sentences = collections.Counter()
    for number in range(NUM_COPIES):
        rng = np.random.default_rng([11, number])
        # Every kind a few times, in no order.
        kind = kinds[rng.permutation(len(kinds))[0]] if number >= len(kinds) else kinds[number]
        world = damage.copy_world(source, tmp_path / str(number), "val2017", "coco_panoptic_119_14")
        names = damage.DAMAGES[kind](world, rng)
        try:
            sentence = damage.check(world, names)
        except BaseException as error:
            raise AssertionError(f"Copy {number}, {kind}, {names}") from error
        sentences[kind] += 1
        print(f"{number} {kind}: {sentence.replace(str(tmp_path), '')[:160]}")
    assert sentences.total() == NUM_COPIES
