"""Zero-shot instance segmentation on COCO 2014: 48 seen and 17 unseen classes, R50.

    python -m concat_jax.main --config=configs/coco_zsi_48_17.py --workdir=runs/zsi \\
        --config.data.root=/path/to/coco2014 --config.init.clip=/path/to/clip-vit-base-patch16 \\
        --config.init.segmentor=weights/r50

The folder has `train2014/`, `val2014/` and `annotations/instances_{train,val}2014.json`, of COCO or
in `annotations/ZSIS/` those of ZSI (CVPR 2021). Images with an unseen object are not trained on;
COCO's other 15 classes are no segments.

`--config.data.kind=coco_zsi_65_15 --config.data.split_file=coco_instance_65_15` is the 65/15 split.
Batch, steps and crop are PADing's; its class vectors are word2vec's, here they are CLIP's.

Hardware, time and score: not measured. To compare with (AP at IoU 0.5, all classes competing; seen,
unseen, harmonic): PADing 53.1, 8.5, 14.65 (README of heshuting555/PADing, harmonic derived).
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import coco_zps


def get_config(arg: str = "") -> ConfigDict:
    """The COCO instance config; `arg` is "" or "mini"."""
    return with_arguments(recipe(), arg, mini=coco_zps.mini)


def recipe() -> ConfigDict:
    """What differs from `coco_zps.py`."""
    config = coco_zps.recipe()
    config.data.update(
        kind="coco_zsi_48_17",
        split_file="coco_instance_48_17",
        train_part="train2014",
        eval_part="val2014",
        image_size=960,
    )
    config.train.cat.steps = 4_000
    config.train.cat.save_every = 2_000
    config.eval.settings.tasks = ("instance",)
    config.eval.keep_rules = ()  # of panoptic maps
    return config
