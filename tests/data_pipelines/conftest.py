"""A tiny data set in COCO's panoptic layout, for tests that need a folder of their own."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data_pipelines.coco_world import make_world

CATEGORIES = [
    {"id": 10, "name": "sky", "isthing": 0, "split": "seen"},
    {"id": 4, "name": "road", "isthing": 0, "split": "unseen"},
    {"id": 7, "name": "dog", "isthing": 1, "split": "seen"},
    {"id": 9, "name": "cow", "isthing": 1, "split": "unseen"},
]
SKY, ROAD, DOG, COW = 10, 4, 7, 9
# Images by id: (category, crowd, columns from, to) of segments side by side in a width of 24.
TRAIN = {
    5: [(SKY, 0, 0, 24)],
    3: [(SKY, 0, 0, 8), (DOG, 0, 8, 16)],
    8: [(DOG, 0, 0, 8), (ROAD, 0, 8, 16), (SKY, 0, 16, 24)],
    9: [(ROAD, 1, 0, 24)],
    11: [(DOG, 1, 0, 12), (DOG, 0, 12, 20)],
    12: [(SKY, 0, 0, 24)],
}
VAL = {20: [(DOG, 0, 0, 9), (ROAD, 0, 9, 24)], 21: [(SKY, 0, 0, 24)]}


@pytest.fixture
def world(tmp_path):
    """A folder with the images of `coco_world`."""
    make_world(tmp_path)
    return tmp_path


def write_part(folder, part, images):
    """A part in COCO's layout; pictures are PNG files of noise under a .jpg name."""
    pngs = folder / "annotations" / f"panoptic_{part}"
    pngs.mkdir(parents=True)
    (folder / part).mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES],
    }
    for image_id, segments in images.items():
        ids = np.zeros((16, 24, 3), np.uint8)
        infos = []
        for row, (category, crowd, left, right) in enumerate(segments):
            ids[:, left:right] = (row + 1, image_id, 0)
            infos.append(
                {"id": row + 1 + 256 * image_id, "category_id": category, "iscrowd": crowd}
            )
        noise = np.random.default_rng(image_id).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / part / f"{image_id}.jpg", format="PNG")
        Image.fromarray(ids).save(pngs / f"{image_id}.png")
        size = {"height": 16, "width": 24}
        content["images"].append({"id": image_id, "file_name": f"{image_id}.jpg", **size})
        content["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
        )
    (folder / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))


@pytest.fixture
def tiny_panoptic(tmp_path_factory):
    """Folder with the parts train2017 and val2017 and the file split.json."""
    folder = tmp_path_factory.mktemp("tiny_panoptic")
    write_part(folder, "train2017", TRAIN)
    write_part(folder, "val2017", VAL)
    split = {"name": "tiny", "description": "", "source": "", "categories": CATEGORIES}
    (folder / "split.json").write_text(json.dumps(split))
    return folder
