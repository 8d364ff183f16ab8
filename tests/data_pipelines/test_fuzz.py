"""Every kind of damage to a small data set ends in one sentence, or is skipped and counted."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data_pipelines import damage

SIZES = [(24, 32), (32, 24), (24, 32), (20, 28), (30, 30)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Five JPEGs of noise with four segments each, in the layout; each segment is a quarter."""
    folder, part = tmp_path_factory.mktemp("clean"), "val2017"
    rng = np.random.default_rng(0)
    pngs = folder / "annotations" / f"panoptic_{part}"
    pngs.mkdir(parents=True)
    (folder / part).mkdir()
    categories = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in (3, 5, 8)]
    content = {"images": [], "annotations": [], "categories": categories}
    for image_id, (height, width) in enumerate(SIZES, start=1):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / part / f"{image_id}.jpg", quality=90)
        rows = np.arange(height)[:, None] * 2 // height * 2 + np.arange(width) * 2 // width
        source_ids = rng.choice(2**24 - 1, 4, replace=False) + 1
        values = source_ids[rows]
        colours = np.stack([values % 256, values // 256 % 256, values // 65536], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save(pngs / f"{image_id}.png")
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": int(i), "category_id": int(rng.choice([3, 5, 8])), "iscrowd": 0}
                    for i in source_ids
                ],
            }
        )
    (folder / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))
    split = {"name": "fuzz", "description": "", "source": ""}
    split["categories"] = [dict(c, split="seen" if c["id"] < 8 else "unseen") for c in categories]
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def _copy(clean, tmp_path):
    return damage.copy_world(clean, tmp_path / "copy", "val2017", str(clean / "split.json"))


def test_the_undamaged_copy_loads(clean, tmp_path):
    loader = damage.load(_copy(clean, tmp_path), "raise")
    assert len(list(loader.eval_examples())) == 5
    assert sorted(int(loader.batch(step, 1)["image_id"][0]) for step in range(5)) == [1, 2, 3, 4, 5]


def test_a_fault_that_nobody_sees_fails_the_check(clean, tmp_path):
    with pytest.raises(AssertionError, match="passed in silence"):
        damage.check(_copy(clean, tmp_path), ["1.jpg"])


@pytest.mark.parametrize("kind", damage.DAMAGES)
@pytest.mark.parametrize("seed", range(3))
def test_damage_is_one_sentence_or_is_skipped(clean, tmp_path, kind, seed):
    world = _copy(clean, tmp_path)
    rng = np.random.default_rng([seed, len(kind)])
    damage.check(world, damage.DAMAGES[kind](world, rng))
