"""Inductive zero-shot panoptic segmentation on COCO: unseen names are not known in training either.

    python -m concat_jax.main --config=configs/coco_zps_inductive.py --workdir=runs/inductive \\
        --config.data.root=/path/to/coco --config.init.clip=/path/to/clip-vit-base-patch16 \\
        --config.init.segmentor=weights/r50

As `coco_zps.py`, 119 seen and 14 unseen classes, but stages 2 and 3 generate queries of seen names
only; the 14 names arrive at test time. Stage 1 is the same, for it knows no unseen name anyway.

Hardware, time and score: not measured. To compare with: CONCAT (arXiv 2402.13697) reports this
setting apart. PADing does not have it: its classifier learns from the unseen names (seen 37.7 PQ,
unseen 14.4, harmonic 20.8, README of heshuting555/PADing).
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import coco_zps


def get_config(arg: str = "") -> ConfigDict:
    """The inductive config; `arg` is "" or "mini"."""
    return with_arguments(recipe(), arg, mini=coco_zps.mini)


def recipe() -> ConfigDict:
    """What differs from `coco_zps.py`."""
    config = coco_zps.recipe()
    config.train.cat.method.update(unseen_names=False)
    # Without unseen names, pseudo queries can only be of seen classes.
    config.train.finetune.method.update(pseudo_seen=True, unseen_names=False)
    config.eval.stages = dict(
        con="stage 1 (CON)", finetune="full, inductive (CON + CAT + union finetune)"
    )
    return config
