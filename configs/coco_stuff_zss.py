"""Zero-shot semantic segmentation on COCO-Stuff: 156 seen and 15 unseen classes, R50.

    python -m data_pipelines.prepare coco_stuff_zss --root=/path/to/coco --out=prepared/coco_stuff
    python -m concat_jax.main --config=configs/coco_stuff_zss.py --workdir=runs/coco_stuff \\
        --config.data.kind=tfds --config.data.root=prepared/coco_stuff \\
        --config.init.clip=/path/to/clip-vit-base-patch16 --config.init.segmentor=weights/r50

The folder has `train2017/`, `val2017/` and the label maps `stuffthingmaps/{train,val}2017/*.png`.
The first command is optional, with `--config.data.root=/path/to/coco` instead; but a run of it
reads all 123,287 maps first, to learn what they show.

The protocol is ZegFormer's: every image is trained on, and the pixels of unseen classes are void.
Batch, steps, weight decay and augmentation are PADing's. Each class of an image is one segment;
scores are mIoU of seen and unseen classes and their harmonic mean.

Hardware, time and score: not measured. To compare with (IoU seen, unseen, harmonic): PADing 40.6,
26.4, 32.0 (README of heshuting555/PADing).
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import coco_zps


def get_config(arg: str = "") -> ConfigDict:
    """The COCO-Stuff config; `arg` is "" or "mini"."""
    return with_arguments(recipe(), arg, mini=coco_zps.mini)


def recipe() -> ConfigDict:
    """What differs from `coco_zps.py`."""
    config = coco_zps.recipe()
    config.data.update(
        kind="coco_stuff_zss",
        split_file="coco_stuff_156_15",
        unseen_images="void",
        augment="semantic",
        image_size=640,
        scale_range=(0.5, 1.5),  # of the shorter side: 320 to 960
        eval_size=864,
    )
    config.crops.hide_void = True  # unseen classes are void here, and CLIP must not see them
    config.train.con.steps = 120_000
    config.train.con.optimizer.weight_decay = 1e-4
    config.train.cat.steps = 2_000
    config.train.cat.save_every = config.train.finetune.save_every = 1_000
    config.eval.settings.update(tasks=("semantic",), short_side=640, long_side=2560)  # PADing's
    config.eval.keep_rules = ()  # of panoptic maps
    return config
