"""Eight small images in COCO's panoptic layout, each of a colour for each segment."""

import json

import numpy as np
from PIL import Image

from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source

CATEGORIES = [
    {"id": 10, "name": "sky", "isthing": 0, "split": "seen"},
    {"id": 4, "name": "road", "isthing": 0, "split": "unseen"},
    {"id": 7, "name": "dog", "isthing": 1, "split": "seen"},
    {"id": 9, "name": "cat", "isthing": 1, "split": "seen"},
]
SKY, ROAD, DOG, CAT = 10, 4, 7, 9
# Images by id: (category, crowd, box as left, top, right, bottom); later ones are painted on top.
IMAGES = {
    11: [(SKY, 0, (0, 0, 40, 15)), (DOG, 0, (2, 10, 20, 28)), (CAT, 1, (24, 12, 38, 30))],
    12: [(SKY, 0, (0, 0, 40, 30)), (DOG, 0, (5, 5, 9, 9))],
    13: [(SKY, 0, (0, 0, 40, 20)), (ROAD, 0, (0, 20, 40, 30))],  # unseen
    14: [(CAT, 0, (0, 0, 20, 30)), (CAT, 0, (20, 0, 40, 30))],
    15: [(DOG, 0, (0, 0, 40, 10)), (ROAD, 1, (39, 29, 40, 30))],  # unseen only as one crowd pixel
    16: [(DOG, 0, (10, 10, 30, 20))],
    17: [(SKY, 0, (0, 0, 40, 30)), (CAT, 1, (1, 1, 3, 3)), (CAT, 0, (20, 20, 24, 24))],
    18: [(SKY, 0, (0, 0, 40, 15)), (CAT, 0, (0, 15, 40, 30))],
}
ALLOWED = {11, 12, 14, 16, 17, 18}


def segment_id(image_id, row):
    return image_id * 70_000 + row * 300 + 1  # uses all three bytes of the PNG's colour


def colour(segment_id):
    return np.array([segment_id % 251, segment_id // 251 % 241, segment_id % 239], np.uint8)


def make_world(folder, pngs="annotations", part="train2017"):
    """Writes the images above in COCO's layout; pictures are flat in a colour for each segment.

    They are PNG files under a .jpg name, so that colours come back exactly. Returns the annotation
    content, which `write_json` puts on disk again after a change.
    """
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir()
    png_folder = folder / pngs / f"panoptic_{part}"
    png_folder.mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES],
    }
    for image_id, segments in reversed(IMAGES.items()):
        ids = np.zeros((30, 40), np.int64)
        for row, (_, _, (left, top, right, bottom)) in enumerate(segments):
            ids[top:bottom, left:right] = segment_id(image_id, row)
        picture = np.zeros((30, 40, 3), np.uint8)
        for value in np.unique(ids[ids > 0]):
            picture[ids == value] = colour(value)
        Image.fromarray(picture).save(folder / part / f"{image_id}.jpg", format="PNG")
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(png_folder / f"{image_id}.png")
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": 30, "width": 40}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": segment_id(image_id, row), "category_id": category, "iscrowd": crowd}
                    for row, (category, crowd, _) in enumerate(segments)
                ],
            }
        )
    write_json(folder, content, part)
    split = {"name": "tiny", "description": "", "source": "", "categories": CATEGORIES}
    (folder / "split.json").write_text(json.dumps(split))
    return content


def write_json(folder, content, part="train2017"):
    (folder / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))


def load(folder, *, part="train2017", split_file=None, **options):
    split, rule = split_file or folder / "split.json", options.get("on_bad_example", "raise")
    source = open_source("coco_panoptic_zps", folder, part, split, on_bad_example=rule)
    defaults = dict(seed=3, image_size=32, max_segments=6, num_threads=2)
    return SegmentationLoader(source, **(defaults | options))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def source_of(root, part="train2017"):
    return open_source("coco_panoptic_zps", root, part, root / "split.json")
