"""Every config file with each of its arguments: it loads, its networks build, its rules fit."""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from concat_jax.core import config as configuration
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.ablation.rows import with_rows
from concat_jax.experiment.experiment import Experiment
from concat_jax.inference.images import Buckets
from concat_jax.inference.predictor import PredictConfig
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.stages.registry import STAGES
from concat_jax.stages.stage import COMES_WITH, TEXT, StageConfig
from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
    path_name,
)
from data_pipelines.datasets import KINDS as DATA_KINDS
from data_pipelines.datasets import make_datasets
from data_pipelines.sources.registry import DATASETS, label_space
from tests.tiny import no_data

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
ON_DISK = ("coco_zps", "coco_zps_inductive", "coco_stuff_zss", "coco_zsi_48_17", "ade20k_ovss")
ARGUMENTS = dict.fromkeys(ON_DISK, ("", "mini"))
ARGUMENTS["coco_zps"] = ("", "eight_devices", "mini")
ARGUMENTS["demo_zps"] = ("", "attributes", "attributes,smoke", "smoke")
ARGUMENTS |= {"coco_zps_eomt": ("", "mini"), "demo_eomt": ("", "smoke", "clip_encoder")}
CASES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]

VOCABULARY = Vocabulary(
    names=("cat", "dog", "sky", "sea"),
    is_thing=(True, True, False, False),
    is_seen=(True, False, True, False),
    category_ids=(1, 2, 3, 4),
)


def get_config(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def make_run(config, tmp_path):
    """The config's run on data that is not there."""
    data = no_data(VOCABULARY)
    return Experiment(config, tmp_path / "run", data)


def with_files(config, tmp_path):
    """The config with stand-ins for the files that it leaves to the user to give."""
    config.text.update(tokenizer="words", bpe_path="", templates="name")
    if any(stage.takes.get("clip") == "init" for stage in config.train.values()):
        weights = tmp_path / "model.safetensors"
        weights.touch()
        config.init.clip = str(weights)
    return config


@functools.cache
def abstract_subtree(networks, name):
    return jax.eval_shape(lambda: networks.init(name, jax.random.key(0)))


def abstract_params(networks, names):
    return {name: abstract_subtree(networks, name) for name in names}


def test_every_config_file_is_tested():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert files == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_argument_names_the_nearest(name):
    known = ARGUMENTS[name][-1]
    with pytest.raises(ValueError, match=f"no argument '{known}x'; did you mean '{known}'"):
        get_config(name, known + "x")


def test_eight_devices_take_the_recipe_in_parts(tmp_path):
    whole, parts = get_config("coco_zps").train.con, get_config("coco_zps", "eight_devices")
    con, count = parts.train.con, parts.train.con.optimizer.accumulate
    assert con.batch_size == 8 and con.batch_size * count == whole.batch_size
    for field in ("steps", "save_every"):
        assert con[field] == count * whole[field]
    con.steps -= 1
    with pytest.raises(ValueError, match=r"2 batches make .* set --config.train.con.steps=280700"):
        make_run(with_files(parts, tmp_path), tmp_path)
    con.optimizer.accumulate = 0
    with pytest.raises(ValueError, match="accumulate is 0 and must be at least 1"):
        make_run(parts, tmp_path)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_config_makes_its_stages_and_every_parameter_has_a_rule(name, argument, tmp_path):
    config = with_files(get_config(name, argument), tmp_path)
    assert config.data.kind in DATA_KINDS
    run = make_run(config, tmp_path)
    assert {run.setup.stages[stage].kind for stage in config.stages} <= set(STAGES)
    assert set(config.eval.stages) <= set(config.stages)
    for stage_name in config.stages:
        stage, settings = run.setup.make_stage(stage_name), run.setup.stages[stage_name]
        # What a stage reads must be handed to it.
        assert {COMES_WITH.get(r, r) for r in stage.reads} <= set(settings.takes), stage_name
        params = abstract_params(run.setup.networks, stage.trains)
        labels = label_params(params, stage.rules)  # raises for a parameter without a rule
        leaves = jax.tree_util.tree_leaves_with_path(labels)
        frozen = [path_name(path) for path, label in leaves if label == FROZEN]
        stay = ("segmentor/backbone/",) if run.setup.networks.segmentor.frozen else ()
        assert all("/frozen_" in parameter or parameter.startswith(stay) for parameter in frozen)
        optimizer = configuration.build(OptimizerConfig, settings.optimizer, stage_name)
        state = jax.eval_shape(make_optimizer(optimizer, settings.steps, labels).init, params)
        assert jax.tree.leaves(state)
        if settings.save_every:
            assert settings.save_every <= settings.steps


def test_the_full_size_segmentor_is_mask2former_r50():
    networks = make_networks(get_config("coco_zps").model.to_dict())
    params = abstract_params(networks, ("clip", "segmentor", "projector", "generator"))
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()
    }
    # Mask2Former R50 has 44.0 M parameters, its class head of 134 x 257 among them.
    assert 43.5e6 < sizes["segmentor"] < 44.5e6
    assert sizes["clip"] == 149_620_737  # OpenAI's ViT-B/16
    decoder = params["segmentor"]["transformer_decoder"]
    assert decoder["query_feature_embedding"].shape == (100, 256)
    assert sum(name.startswith("layer_") for name in decoder) == 9
    encoder = params["segmentor"]["pixel_decoder"]
    assert sum(name.startswith("layer_") for name in encoder) == 6


def test_the_full_size_con_loss_traces(tmp_path):
    """Shapes of the real training step: one image of 928² with 100 segments, 12,544 points."""
    config = with_files(get_config("coco_zps"), tmp_path)
    size, rows = config.data.image_size, config.data.max_segments
    run = make_run(config, tmp_path)
    assert (
        run.setup.context.loss == SegmentationLossConfig()
        and run.setup.context.loss.num_points == 12544
    )
    stage = run.setup.make_stage("con")
    batch = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
        "segment_ids": jax.ShapeDtypeStruct((1, size, size), jnp.uint8),
        "segment_labels": jax.ShapeDtypeStruct((1, rows), jnp.int32),
        "segment_is_crowd": jax.ShapeDtypeStruct((1, rows), jnp.bool_),
        "image_size": jax.ShapeDtypeStruct((1, 2), jnp.int32),
    }
    text = jax.ShapeDtypeStruct((len(VOCABULARY), run.setup.networks.clip.embed_dim), jnp.float32)
    params = abstract_params(run.setup.networks, stage.trains)
    frozen = {**abstract_params(run.setup.networks, set(stage.reads) - {TEXT}), TEXT: text}
    loss, metrics = jax.eval_shape(stage.loss, params, frozen, batch, jax.random.key(0))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert {"loss_class", "loss_mask", "loss_dice", "loss_global", "loss_instance"} <= set(metrics)


@pytest.mark.parametrize("name", ON_DISK)
def test_a_config_of_real_data_names_its_layout_and_label_space(name, tmp_path):
    data = get_config(name).data
    protocol = DATASETS[data.kind]
    assert (data.train_part, protocol.unseen_images) == (protocol.parts[0], data.unseen_images)
    vocabulary = label_space(data.kind, data.split_file)
    unseen = {"ade20k_ovss": 0, "coco_stuff_zss": 15, "coco_zsi_48_17": 17}.get(name, 14)
    assert len(vocabulary.unseen) == unseen
    evaluated = DATASETS[data.eval_kind or data.kind]
    assert data.eval_part == evaluated.parts[1]
    with pytest.raises(ValueError, match=r"set config\.data\.\w*root to a"):
        make_datasets(data, seed=0)
    # Neither generator nor classifier may learn an unseen name.
    methods = [get_config(name).train[stage].method for stage in ("cat", "finetune")]
    inductive = name in ("coco_zps_inductive", "ade20k_ovss")
    assert all(method.get("unseen_names", True) is not inductive for method in methods)


def test_an_unknown_key_in_a_section_names_the_nearest(tmp_path):
    config = get_config("demo_zps", "smoke")
    with config.unlocked():
        config.train.con.stepz = 3
    with pytest.raises(ValueError, match="config.train.con has no key 'stepz'.*'steps'"):
        make_run(config, tmp_path)
    config = get_config("demo_zps", "smoke")
    with config.unlocked():
        config.model.segmentor.num_query = 3
    with pytest.raises(ValueError, match="no key 'num_query'; did you mean 'num_queries'"):
        make_run(config, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_stage_without_settings_is_named(tmp_path):
    config = get_config("demo_zps", "smoke")
    config.stages = ("clip", "conn")
    with pytest.raises(ValueError, match="config.stages names no stage of 'conn'.*'con'"):
        make_run(config, tmp_path)


def test_missing_clip_weights_name_the_field_to_set(tmp_path):
    config = with_files(get_config("coco_zps"), tmp_path)
    config.init.clip = ""
    with pytest.raises(ValueError, match=r"No CLIP weights are configured: set config\.init\.clip"):
        make_run(config, tmp_path)
    config.init.clip = str(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"config\.init\.clip names .*absent.*not a file"):
        make_run(config, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_missing_vocabulary_names_the_field_to_set(tmp_path):
    config = with_files(get_config("coco_zps"), tmp_path)
    config.text.update(tokenizer="clip", bpe_path=str(tmp_path / "absent.gz"))
    with pytest.raises(ValueError, match=r"absent\.gz.*config\.text\.bpe_path"):
        make_run(config, tmp_path)


def test_stage_config_fields_are_what_configs_use():
    """A field that no config and no row of the ablation sets is one that nobody has run."""
    configs = [get_config(name, argument) for name, argument in CASES]
    used = set()
    for config in (*configs, with_rows(get_config("demo_zps"), seed=0)):
        for section in config.train.values():
            used |= set(section)
    assert used == {field for field in StageConfig.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "size", "resized"),
    [("coco_zps", (480, 640), (800, 1067)), ("coco_zps", (300, 640), (625, 1333))]
    + [("coco_zsi_48_17", (480, 640), (800, 1067)), ("coco_stuff_zss", (480, 640), (640, 853))],
)
def test_images_are_evaluated_at_the_sizes_of_the_protocol(name, size, resized, tmp_path):
    """detectron2's ResizeShortestEdge: 800 and at most 1333; of semantic maps 640 and 2560."""
    config = get_config(name).eval.settings.to_dict()
    buckets = PredictConfig(**config)
    assert Buckets(buckets.short_side, buckets.long_side).resized(*size) == resized


def test_clip_sees_no_pixel_of_an_unseen_class_of_coco_stuff():
    """They are void in its training images, and in those of no other config."""
    for name in ON_DISK:
        config = get_config(name)
        assert config.crops.get("hide_void", False) == (config.data.unseen_images == "void")
