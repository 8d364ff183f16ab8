"""The demo on EoMT: as `demo_zps.py`, with a plain ViT as the segmentor.

    python -m concat_jax.main --config=configs/demo_eomt.py --workdir=runs/demo_eomt

Needs no download. `--config=configs/demo_eomt.py:smoke` runs every stage for a few steps. The ViT
starts from random numbers, where the backbone of `demo_zps.py` starts from the trunk of the demo's
CLIP. With `:clip_encoder` the encoder is that CLIP's image tower,
frozen, and CON's targets are read off what it sees.
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments
from configs import demo_zps


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is "", "clip_encoder", "smoke" or both, as "clip_encoder,smoke"."""
    return with_arguments(recipe(), arg, clip_encoder=clip_encoder, smoke=demo_zps.smoke)


def recipe() -> ConfigDict:
    """What differs from `demo_zps.py`."""
    config = demo_zps.recipe()
    config.model.segmentor = dict(
        kind="eomt",
        backbone=dict(
            width=64, depth=6, num_heads=4, ffn_width=256, patch_size=8, num_registers=1, grid=8
        ),
        num_queries=16,
        num_blocks=3,
        num_upscales=1,  # two take twice the time and name no better
    )
    config.train.con.copies = {}
    return config


def clip_encoder(config: ConfigDict) -> None:
    """CLIP's own image tower as the encoder, frozen, with new blocks for the queries behind it."""
    config.model.segmentor.backbone = dict(kind="clip", **config.model.clip)
    config.model.segmentor.update(frozen=True, frozen_ffn_width=256)
    config.train.con.copies = {"segmentor/backbone": "clip/vision_model"}
    config.train.con.method.targets = "encoder"
