"""Zero-shot panoptic segmentation on COCO on EoMT-L, 640 x 640: 119 seen and 14 unseen classes.

    python -m concat_jax.convert /path/to/dinov3-vitl16-pretrain-lvd1689m weights/dinov3_l
    python -m concat_jax.main --config=configs/coco_zps_eomt.py --workdir=runs/coco_eomt \\
        --config.data.root=/path/to/coco --config.init.clip=/path/to/clip-vit-base-patch16 \\
        --config.init.segmentor=weights/dinov3_l

As `coco_zps.py`, on a DINOv3-L whose last four blocks see the queries. Size, batch and peak rate
are those of EoMT (arXiv 2503.19108: 16 images of 640 x 640, 12 epochs of COCO, here the same number
of steps); its layer-wise decay of the rate is not here, one multiplier of the backbone's is.
Hardware, time and score: not measured.
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import coco_zps


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is "" or "mini"."""
    return with_arguments(recipe(), arg, mini=mini)


def recipe() -> ConfigDict:
    """What differs from `coco_zps.py`."""
    config = coco_zps.recipe()
    config.data.update(image_size=640, eval_size=640)
    config.model.segmentor = dict(
        kind="eomt", backbone=dict(variant="dinov3-large"), scan_layers=True, remat=True
    )
    config.mesh.fusion_mb = 6
    config.train.con.update(steps=88_692)
    # Pictures are padded to a square.
    config.eval.settings.update(short_side=640, long_side=640)
    return config


def mini(config: ConfigDict) -> None:
    """Small networks and a CLIP of its own, a few steps a stage."""
    coco_zps.mini(config)
    config.model.segmentor = dict(
        kind="eomt",
        backbone=dict(width=64, depth=4, num_heads=4, ffn_width=128, num_registers=1, grid=8),
        num_queries=32,
        num_blocks=2,
    )
