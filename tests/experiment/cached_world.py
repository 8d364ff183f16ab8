"""A small world of noise images, a CLIP of random numbers, and caches of its targets."""

import json

import numpy as np
from PIL import Image

from concat_jax.experiment import clip_target_cache as filling
from concat_jax.models.networks import make_networks
from concat_jax.stages import con
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.training.sharding import make_mesh
from data_pipelines.clip_target_cache import ClipTargetCache
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source
from tests import tiny

NETWORKS = make_networks(tiny.model(clip=dict(image_depth=2, context_length=4, eot_id=None)))
CLIP, PARAMS = NETWORKS.clip, tiny.params("clip", 0, NETWORKS)
CROPS = CropConfig()
CATEGORIES = [
    {"id": 10, "name": "sky", "isthing": 0, "split": "seen"},
    {"id": 4, "name": "road", "isthing": 0, "split": "unseen"},
    {"id": 7, "name": "dog", "isthing": 1, "split": "seen"},
]
NUM_IMAGES = 11
IDENTITY = {"weights": "of the test", **con.target_identity(CLIP, CROPS)}


def make_world(folder):
    """Noise images in COCO's layout, of 1 to 12 segments that are stripes; id 4 holds a road."""
    rng = np.random.default_rng(0)
    for name in ("train2017", "annotations/panoptic_train2017"):
        (folder / name).mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    for image_id in range(1, 1 + NUM_IMAGES):
        height, width = (30, 40) if image_id % 2 else (44, 36)
        ids = np.zeros((height, width), np.uint8)
        edges = np.linspace(1, width, 1 + (image_id * 5) % 12 + 1).astype(int)
        for row, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            ids[row:, left:right] = 3 * row + 2
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = folder / "train2017" / f"{image_id}.jpg"
        Image.fromarray(picture).save(file, format="PNG")
        rgb = np.stack([ids, 0 * ids, 0 * ids], axis=-1)
        Image.fromarray(rgb).save(folder / "annotations" / "panoptic_train2017" / f"{image_id}.png")
        categories = [10, 7] if image_id != 4 else [10, 4]
        content["images"].append(
            {"id": image_id, "file_name": file.name, "height": height, "width": width}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": int(s), "category_id": categories[s % 2], "iscrowd": 0}
                    for s in np.unique(ids[ids > 0])
                ],
            }
        )
    content["categories"] = [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES]
    (folder / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    split = {"name": "tiny", "description": "", "source": "", "categories": CATEGORIES}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def load(root, **options):
    source = open_source("coco_panoptic_zps", root, "train2017", root / "split.json")
    defaults = dict(seed=0, image_size=48, max_segments=16, num_threads=2)
    return SegmentationLoader(source, **(defaults | {"unseen_images": "keep"} | options))


def fill(folder, data, devices=1, params=PARAMS, **options):
    options = {"images_per_shard": 3, "pictures_per_device": 16, **options}
    mesh = make_mesh(devices=devices)
    return filling.fill_cache(folder, data, CLIP, params, CROPS, IDENTITY, mesh=mesh, **options)


def targets_of(folder, data, identity=IDENTITY):
    """Everything in a cache, by (image id, segment id); 0 for the image itself."""
    cache, found = ClipTargetCache(folder, identity), {}
    for index in data.training_indices:
        record = data.records[index]
        one = cache.lookup(np.array([record.image_id]), record.source_ids[None])
        found[record.image_id, 0] = one["clip_image_target"][0]
        for segment, target in zip(record.source_ids, one["clip_segment_targets"][0], strict=True):
            found[record.image_id, int(segment)] = target
    return found


def largest_distance(left, right):
    assert left.keys() == right.keys()
    return max(1 - float(left[key] @ right[key]) for key in left)


def states(folder):
    """What changes if a file is written again."""
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.safetensors")}
