"""Stage 1 alone learns eight real images by heart."""

import json
import shutil

import pytest

from concat_jax import main
from configs import coco_zps

pytestmark = pytest.mark.slow

NUM_IMAGES = 8
UNSEEN_IDS = {21, 25, 33, 34, 41, 57, 87, 100, 145, 148, 149, 184, 187, 193}


@pytest.fixture
def eight_images(shared_data, tmp_path):
    """A COCO directory whose train and val parts are the same eight seen-only images."""
    source = shared_data / "coco_panoptic_mini"
    content = json.loads((source / "annotations/panoptic_train2017.json").read_text())
    allowed = [
        a
        for a in content["annotations"]
        if not UNSEEN_IDS & {s["category_id"] for s in a["segments_info"]}
    ]
    content["annotations"] = sorted(allowed, key=lambda a: a["image_id"])[:NUM_IMAGES]
    ids = {a["image_id"] for a in content["annotations"]}
    content["images"] = [i for i in content["images"] if i["id"] in ids]
    for part in ("train2017", "val2017"):
        folder = tmp_path / "coco/annotations" / f"panoptic_{part}"
        folder.mkdir(parents=True)
        (tmp_path / "coco" / part).mkdir()
        (folder.parent / f"panoptic_{part}.json").write_text(json.dumps(content))
        for annotation in content["annotations"]:
            shutil.copy(source / "annotations/panoptic_train2017" / annotation["file_name"], folder)
        for image in content["images"]:
            shutil.copy(source / "train2017" / image["file_name"], tmp_path / "coco" / part)
    return tmp_path / "coco"


def test_stage_1_overfits_eight_images(eight_images, tmp_path):
    config = coco_zps.get_config("mini")
    config.tensorboard = False
    config.mesh.devices = 1
    config.stages = ("clip", "con")
    config.eval.stages = {"con": "stage 1"}
    config.data.root = str(eight_images)
    config.data.augment = "none"
    config.data.image_size = config.data.eval_size = 256
    config.eval.settings.update(short_side=256, long_side=256)
    config.eval.keep_rules = ()
    config.model.segmentor.backbone.stem = "small"  # masks at half the resolution: small segments
    config.model.segmentor.num_queries = 40
    config.model.segmentor.num_points = 2
    config.loss.num_points = 784
    train = config.train.con
    train.steps, train.batch_size, train.log_every, train.save_every = 1000, 4, 50, 250
    train.optimizer = dict(
        learning_rate=1e-3, weight_decay=0.0, schedule="cosine", warmup_steps=50, clip_norm=1.0
    )
    # The little CLIP of the mini run knows nothing worth being pulled to.
    train.method = dict(backbone_multiplier=1.0, global_weight=0.0, instance_weight=0.0)
    report = main.run(config, str(tmp_path / "run"))
    pq = report["results"]["stage 1"]["all"]["pq"]
    assert pq > 60, report["table"]
