"""Zero-shot panoptic segmentation on COCO: 119 seen and 14 unseen classes, R50.

    python -m concat_jax.convert /path/to/R-50.pkl weights/r50
    python -m concat_jax.main --config=configs/coco_zps.py --workdir=runs/coco \\
        --config.data.root=/path/to/coco --config.init.clip=/path/to/clip-vit-base-patch16 \\
        --config.init.segmentor=weights/r50

`config.init.clip` is a Hugging Face folder, with the tokenizer in it; or an OpenAI `.pt` or a file
of open_clip, and then `--config.text.bpe_path=/path/to/bpe_simple_vocab_16e6.txt.gz`. Run

    python -m concat_jax.cache_clip_targets --config=configs/coco_zps.py \\
        (the same settings) --config.data.clip_targets=targets/

first, and train with `--config.data.clip_targets=targets/`, to compute CLIP's targets once and not
in every step.

The directory has COCO's official panoptic layout. Schedule, batch and crop are PADing's (16 images
of 928², 140,350 steps). Hardware, time and score: not measured.

`--config=configs/coco_zps.py:eight_devices` is for eight GPUs or TPU chips that hold one image of
stage 1 each: two batches of 8 make an update.

`--config=configs/coco_zps.py:mini` runs every stage for a few steps with small networks and a small
CLIP of its own, on a directory as small as a hundred images, to see that data and code fit
together. Its scores mean nothing.
"""

from ml_collections import ConfigDict

from concat_jax.core.config import with_arguments


def get_config(arg: str = "") -> ConfigDict:
    """The COCO config; `arg` is "", "eight_devices", "mini" or both, as "eight_devices,mini"."""
    return with_arguments(recipe(), arg, eight_devices=eight_devices, mini=mini)


def recipe() -> ConfigDict:
    """What is trained."""
    config = ConfigDict()
    config.seed = 0
    config.tensorboard = True
    config.profile = dict(stage="")  # of which a trace of some steps is written
    # 0: all devices. Parameters and optimizer state are split over `fsdp` of them; 1: not at all.
    # `fusion_mb` is what a fusion may fill of the vector memory of a v5e, for which less compiles
    # sooner and more runs faster (docs/performance.md).
    config.mesh = dict(devices=0, fsdp=1, fusion_mb=11)
    config.stages = ("con", "cat", "finetune")
    # Weights that start a subtree: CLIP's, of Hugging Face, OpenAI or open_clip; the segmentor's, a
    # folder that `python -m concat_jax.convert` made of ImageNet's or a Mask2Former's. The
    # published recipe starts from an ImageNet ResNet-50; "" is random numbers.
    # A segmentor that was trained on an unseen class is refused unless allow_unseen_weights is set.
    config.init = dict(clip="", segmentor="", allow_unseen_weights=False)

    config.data = dict(
        kind="coco_panoptic_zps",  # a name of data_pipelines/sources/registry.py
        root="",
        train_part="train2017",
        eval_part="val2017",
        split_file="coco_panoptic_119_14",
        eval_kind="",  # another data set to evaluate on, with its own classes; "": the same
        eval_root="",
        eval_split_file="",
        unseen_images="drop",  # PADing: an image with any unseen segment is not trained on
        on_bad_example="raise",
        image_size=928,
        scale_range=(0.1, 2.0),
        augment="lsj",  # "semantic" for label maps of classes, or "none"
        eval_size=1344,  # longer side of pictures of the query space
        max_segments=100,
        num_eval_images=0,  # all
        num_threads=16,
        synonyms="",  # vocabulary that gives classes more names, as "coco_panoptic_133"
        # Folder that `python -m concat_jax.cache_clip_targets` filled with CLIP's targets of
        # stage 1, which are then looked up; "" runs CLIP in every step.
        clip_targets="",
    )
    config.text = dict(
        tokenizer="clip",
        bpe_path="",  # CLIP's BPE file or a folder with a tokenizer; "": the one beside init.clip
        context_length=77,
        templates="eight",  # or "name", "single", "eighty", or a list of your own
        clean_names=False,  # PADing feeds COCO's raw names
        synonyms="mean",  # of classes that have some: "mean", "max" over them, or "none"
        cache="",  # folder that keeps text embeddings between runs; "" makes them anew
    )
    config.model = dict(
        # scan_layers: layers of equal shape run in a loop and are compiled once.
        clip=dict(variant="ViT-B/16", scan_layers=True),
        segmentor=dict(backbone=dict(kind="resnet"), width=256, scan_layers=True),  # R50
        projector=dict(hidden_width=512, num_layers=3),
        generator=dict(hidden_width=1024, num_layers=2, noise_width=256),
    )
    # Half the disk: 2.3 GB of queries at COCO's size, rounded far below a class's spread.
    config.bank = dict(dtype="float16", images_per_shard=1024)
    config.loss = dict(num_points=12544)
    config.crops = dict(
        margin=0.1,
        min_side=1.0,
        max_side=0.0,
        fill="mean",
        dtype="bfloat16",  # of CLIP's image tower
    )

    config.train = dict(
        con=dict(
            kind="con",
            takes=dict(clip="init", segmentor="init"),
            steps=140_350,
            batch_size=16,
            log_every=50,
            save_every=5000,
            keep=3,
            max_skips=20,
            eval_every=5000,  # a look at config.eval.look_images
            optimizer=dict(
                learning_rate=1e-4, weight_decay=0.05, decay_at=(0.9, 0.95), clip_norm=0.01
            ),
            method=dict(
                backbone_multiplier=0.1,
                # Online, CLIP looks at the 16 largest segments: COCO's images have eleven on
                # average, and the tables a hundred rows.
                max_segments=16,
                # COCO's small objects: cut out and made 224 pixels wide they are blur.
                min_area=32 * 32,
            ),
        ),
        cat=dict(
            kind="cat",
            takes=dict(clip="init", segmentor="con", projector="con"),
            steps=20_000,
            batch_size=16,
            log_every=100,
            save_every=5000,
            eval_every=5000,
            queries="bank",  # or "images": the segmentor runs in every step, on augmented images
            bank_images=44_912,  # every training image once
            optimizer=dict(
                learning_rate=5e-4, weight_decay=0.0, decay_at=(0.7, 0.925), clip_norm=1.0
            ),
            method=dict(),
        ),
        finetune=dict(
            kind="finetune",
            takes=dict(clip="init", segmentor="con", projector="con", generator="cat"),
            steps=10_000,
            batch_size=64,
            log_every=100,
            save_every=5000,
            eval_every=5000,
            queries="bank",
            bank_images=44_912,
            optimizer=dict(learning_rate=3e-4, weight_decay=0.05, schedule="cosine", clip_norm=1.0),
            method=dict(pseudo_per_class=8),
        ),
    )
    config.eval = dict(
        # stage -> its name in the table
        stages=dict(con="stage 1 (CON)", finetune="full (CON + CAT + union finetune)"),
        # Mask2Former's and PADing's sizes.
        settings=dict(batch_size=4, tasks=("panoptic",), short_side=800, long_side=1333),
        # Ours, and Mask2Former's on class scores, which PADing and CONCAT are scored by.
        keep_rules=("objectness", "score"),
        num_pictures=6,
        look_images=256,  # of them, the first, at looks while training: few, so their PQ is rough
        write_coco=True,
    )
    return config


def eight_devices(config: ConfigDict) -> None:
    """Stage 1 with two batches of 8 an update, as many updates and images as before."""
    con = config.train.con
    con.update(batch_size=8, steps=2 * con.steps, save_every=2 * con.save_every)
    con.optimizer.accumulate = 2


def mini(config: ConfigDict) -> None:
    """Small networks and a CLIP of its own, a few steps a stage."""
    steps = dict(steps=60, log_every=20)
    config.mesh.devices = 1
    config.stages = ("clip", *config.stages)
    config.init = dict(clip="")
    config.data.update(
        image_size=128, scale_range=(0.5, 1.5), eval_size=128, max_segments=32, num_threads=4
    )
    config.text.update(tokenizer="words", context_length=77, templates="name")
    clip = dict(embed_dim=64, image_size=32, patch_size=8, stem="conv")
    clip |= dict(image_width=64, image_depth=2, image_heads=4)
    clip |= dict(text_width=64, text_depth=1, text_heads=4)
    backbone = dict(kind="resnet", stage_sizes=(1, 1, 1, 1), width=16, block="basic", norm="group")
    decoders = dict(width=64, num_queries=32, num_encoder_layers=1, num_decoder_layers=3)
    decoders |= dict(num_heads=4, ffn_width=128, decoder_ffn_width=128, num_groups=8)
    config.model = dict(
        clip=clip,
        segmentor=dict(backbone=backbone, **decoders),
        projector=dict(hidden_width=128, num_layers=2),
        generator=dict(hidden_width=128, num_layers=2, noise_width=32),
    )
    config.eval.settings.update(short_side=128, long_side=128)
    config.loss.num_points = 256
    config.crops.dtype = "float32"
    adam = dict(learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0)
    config.train.clip = dict(kind="pretrain_clip", takes={}, batch_size=16, optimizer=adam, **steps)
    config.train.con.update(batch_size=4, save_every=30, **steps)
    config.train.con.takes = dict(clip="clip")
    config.train.con.optimizer.update(adam)
    config.train.con.method.update(backbone_multiplier=1.0, min_area=0)
    for name in ("cat", "finetune"):
        config.train[name].update(batch_size=8, save_every=0, bank_images=16, **steps)
        config.train[name].takes.clip = "clip"
