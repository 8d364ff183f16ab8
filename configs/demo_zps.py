"""The demo: every stage of CONCAT on the synthetic world, from nothing, on a laptop's CPU.

    python -m concat_jax.main --config=configs/demo_zps.py --workdir=runs/demo

Needs no download. `--config=configs/demo_zps.py:smoke` runs every stage for a few steps.
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments


def get_config(arg: str = "") -> ConfigDict:
    """The demo's config; `arg` is "", "attributes", "smoke" or both, as "attributes,smoke"."""
    return with_arguments(recipe(), arg, attributes=attributes, smoke=smoke)


def recipe() -> ConfigDict:
    """What is trained."""
    config = ConfigDict()
    config.seed = 0
    config.tensorboard = False  # spares a laptop the import of TensorFlow
    config.profile = dict(stage="")  # of which a trace of some steps is written
    # 0: all devices. Parameters and optimizer state are split over `fsdp` of them; 1: not at all.
    config.mesh = dict(devices=0, fsdp=1)
    config.stages = ("clip", "con", "cat", "finetune", "control")

    config.data = dict(
        kind="synthetic",
        preset="texture",  # colour x texture; "shape" and "opaque" (invented names) are harder
        image_size=64,
        max_segments=10,  # 4 stuff regions and 5 things at most
        eval_split="test",  # choose settings on "validation", γ then on "test"
        num_eval_images=300,
        caption_scene_ratio=0.125,
    )
    config.text = dict(
        tokenizer="words",
        bpe_path="",
        context_length=48,
        templates="name",
        clean_names=False,
        synonyms="mean",  # the world's names have none
        cache="",
    )
    config.model = dict(
        clip=dict(
            embed_dim=64,
            image_size=32,
            patch_size=8,
            stem="resnet",  # learns from few small pictures; CLIP's own is "patch"
            image_width=64,
            image_depth=2,
            image_heads=4,
            text_width=64,
            text_depth=1,
            text_heads=4,
        ),
        segmentor=dict(
            backbone=dict(
                kind="resnet",
                stage_sizes=(1, 1, 1, 1),
                width=16,
                block="basic",
                norm="group",  # trained from scratch: there are no statistics to freeze
                stem="small",  # strides 2 to 16: a 64-pixel image has little to give away
            ),
            width=64,
            num_queries=16,
            num_encoder_layers=1,
            num_decoder_layers=3,
            num_heads=4,
            num_points=2,
            ffn_width=128,
            decoder_ffn_width=128,
            num_groups=8,
        ),
        projector=dict(hidden_width=128, num_layers=2),
        generator=dict(hidden_width=256, num_layers=2, noise_width=32),
    )
    config.loss = dict(num_points=196)  # 14²: a mask has 16² logits here
    config.crops = dict(margin=0.1, min_side=32.0, max_side=32.0, fill="mean")  # native scale

    # Clipped at 1: 0.01 is for finetuning pretrained backbones.
    schedule = dict(warmup_steps=100, schedule="cosine", clip_norm=1.0)
    config.train = dict(
        clip=dict(
            kind="pretrain_clip",
            takes={},
            steps=1000,
            batch_size=64,
            log_every=100,
            optimizer=dict(learning_rate=1e-3, weight_decay=0.05, **schedule),
            method=dict(erase_probability=0.7),
        ),
        con=dict(
            kind="con",
            takes=dict(clip="clip"),
            # There are no ImageNet weights here. The backbone starts from the trunk of the demo's
            # CLIP, which saw pictures and names of all classes, as CLIP backbones have.
            copies={"segmentor/backbone": "clip/vision_model/patch_embedding/trunk"},
            steps=2000,
            batch_size=8,
            log_every=100,
            save_every=500,
            optimizer=dict(learning_rate=1e-3, weight_decay=0.01, **schedule),
            # Here CLIP knows less than the segmentor learns; a strong pull would hold it back.
            method=dict(
                backbone_multiplier=1.0, global_weight=0.25, instance_weight=0.25, aligned_sets=1
            ),
        ),
        cat=dict(
            kind="cat",
            takes=dict(clip="clip", segmentor="con", projector="con"),
            steps=1000,
            batch_size=32,
            log_every=250,
            bank_images=2048,
            optimizer=dict(learning_rate=1e-3, weight_decay=0.0, **schedule),
            method=dict(),
        ),
        finetune=dict(
            kind="finetune",
            takes=dict(clip="clip", segmentor="con", projector="con", generator="cat"),
            steps=300,
            batch_size=32,
            log_every=100,
            bank_images=2048,
            # Few and gentle steps: the longer seen classes are fitted, the more they swallow.
            optimizer=dict(learning_rate=1e-4, weight_decay=0.01, **schedule),
            method=dict(pseudo_per_class=32, deviation=1.0),
        ),
    )
    config.train.control = dict(
        config.train.finetune.to_dict(),
        takes=dict(clip="clip", segmentor="con", projector="con"),
        method=dict(pseudo_per_class=0),
    )
    config.eval = dict(
        # stage -> its name in the table
        stages=dict(
            con="stage 1 (CON)",
            control="finetune without pseudo queries",
            finetune="full (CON + CAT + union finetune)",
        ),
        settings=dict(
            tasks=("panoptic",),  # "semantic" and "instance" too, if wanted
            batch_size=25,
        ),
        bias_split="validation",  # scenes that γ is chosen on, the bias between seen and unseen
        num_pictures=6,
        look_images=50,  # of them, at looks while training (eval_every of a stage)
        write_coco=False,
    )
    return config


def attributes(config: ConfigDict) -> None:
    """The world whose names are hard: continuous attributes, a CLIP that is trained for longer.

    The backbone starts from the trunk of a second CLIP, which saw pictures and names of seen
    classes alone: as ImageNet's weights it knows how to look, and nothing of unseen names.
    """
    config.data.preset = "attributes"
    # Scenes to train on, over and over, as real data are finite; 0: new ones without end. These
    # show a name of a thing about 110 times.
    config.data.num_train_images = 2500
    # Scenes of the query bank are others: queries of those that stage 1 has learnt by heart name
    # their class better than any of a new scene (stacking: Wolpert 1992).
    config.data.held_out_bank = True
    config.stages = ("trunk", *config.stages)
    config.train.clip.update(steps=5000)
    config.train.clip.optimizer.learning_rate = 2e-3
    config.train.trunk = dict(config.train.clip.to_dict(), steps=3000, captions="seen")
    config.train.con.copies = {
        "segmentor/backbone": "trunk:clip/vision_model/patch_embedding/trunk"
    }
    # Fewer end before seen names are learnt, which mixes what CON teaches with how soon.
    config.train.con.steps = 8000
    config.train.con.method.update(global_weight=0.0, instance_weight=4.0, aligned_sets=0)
    for stage in (config.train.finetune, config.train.control):
        stage.optimizer.learning_rate = 1e-3
        stage.method.con_weight = 1.0
    # Without pseudo queries more steps than 600 fit seen names alone and lose unseen ones.
    config.train.finetune.steps, config.train.control.steps = 1200, 600
    # About an eighth of the cross-entropy's weight, and wider than real classes are, as their means
    # are off: see docs/ablation.md.
    config.train.finetune.method.update(pseudo_per_class=1, unseen_weight=1.0, deviation=1.3)


def smoke(config: ConfigDict) -> None:
    """Every stage for a few steps."""
    config.data.num_eval_images = config.eval.settings.batch_size = config.eval.look_images = 8
    for stage in config.train.values():
        stage.update(steps=4, log_every=2)
        stage.optimizer.warmup_steps = 2
        if "bank_images" in stage:
            stage.bank_images = 64
    config.train.con.save_every = 2
