"""Open-vocabulary segmentation: trained on all of COCO panoptic, evaluated by six lists of names.

    python -m concat_jax.main --config=configs/ade20k_ovss.py --workdir=runs/ovss \\
        --config.data.root=/path/to/coco --config.data.eval_root=/path/to/ADEChallengeData2016 \\
        --config.init.clip=/path/to/clip-vit-base-patch16 --config.init.segmentor=weights/r50

Nothing is trained on ADE20K, and its names are not known before the evaluation. `eval_root` has
what Mask2Former's `datasets/prepare_ade20k_pan_seg.py` makes. With

    --config.eval.elsewhere.a847.root=/path/to/ADE20K_2021_17_01 \\
    --config.eval.elsewhere.pc59.root=/path/to/pascal_ctx_d2 \\
    --config.eval.elsewhere.pc459.root=/path/to/pascal_ctx_d2 \\
    --config.eval.elsewhere.voc20.root=/path/to/VOCdevkit/VOC2012 \\
    --config.eval.elsewhere.voc21.root=/path/to/VOCdevkit/VOC2012

those are scored in the same run and come to one table; what has no root is left out
(`data_pipelines/sources/registry.py` tells the folders). `concat_jax.evaluate --config` with the
same flags and --stage=finetune scores a run that is finished.

Hardware, time and score: not measured. To compare with, on ADE20K (PQ, AP, mIoU): FC-CLIP with R50,
also trained on COCO panoptic, 17.9, 9.5, 23.3; with ConvNeXt-L 26.8, 16.8, 34.1 (README of
bytedance/fc-clip). Unlike those, no image encoder of CLIP runs at test time here.
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import coco_zps, coco_zps_inductive


def get_config(arg: str = "") -> ConfigDict:
    """The open-vocabulary config; `arg` is "" or "mini"."""
    return with_arguments(recipe(), arg, mini=coco_zps.mini)


def recipe() -> ConfigDict:
    """What differs from `coco_zps_inductive.py`."""
    config = coco_zps_inductive.recipe()
    config.data.update(
        split_file="coco_panoptic_133_0",  # all seen
        eval_kind="ade20k_panoptic",
        eval_part="validation",
    )
    config.train.con.steps = 368_750  # Mask2Former's 50 epochs of 118,287 images
    config.text.clean_names = True  # COCO's "tree-merged" must read as ADE20K's "tree"
    config.eval.settings.tasks = ("panoptic", "semantic", "instance")
    config.eval.stages = dict(
        con="stage 1 (CON)", finetune="full, open vocabulary (CON + CAT + union finetune)"
    )
    semantic = dict(part="validation", root="", split_file="", tasks=("semantic",))
    config.eval.elsewhere = dict(
        a847=dict(semantic, kind="ade20k_847"),
        pc59=dict(semantic, kind="pascal_context_59"),
        pc459=dict(semantic, kind="pascal_context_459"),
        voc20=dict(semantic, kind="pascal_voc", part="val"),
        # Background, which is void above, is a class with FC-CLIP's words for it.
        voc21=dict(semantic, kind="pascal_voc", part="val", split_file="pascal_voc_21"),
    )
    return config
