"""The published R50 settings take a real training step of stage 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.config import build
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import make_networks
from concat_jax.stages import con
from concat_jax.stages.stage import Context
from concat_jax.training.optimizer import FROZEN, OptimizerConfig, label_params, make_optimizer
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState, make_train_step
from configs import coco_zps
from data_pipelines.labels import load_label_space

pytestmark = pytest.mark.slow


def test_one_step_of_the_full_size_model():
    """R50, 6 encoder and 9 decoder layers, 100 queries, D 256, 12,544 points, at 512 x 512."""
    config = coco_zps.get_config()
    networks = make_networks(config.model.to_dict())
    vocabulary = load_label_space("coco_panoptic_119_14")
    # Without alignment: CLIP ViT-B/16 on 12 crops would be most of the time and is tested apart.
    settings = con.Config(global_weight=0.0, instance_weight=0.0)
    loss_config = build(SegmentationLossConfig, config.loss, "config.loss")
    assert loss_config.num_points == 12544
    stage = con.make_stage(Context(networks, vocabulary, loss_config), settings)
    params = {name: networks.init(name, jax.random.key(0)) for name in stage.trains}
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(
        build(OptimizerConfig, config.train.con.optimizer, "optimizer"), 10, labels
    )
    state = TrainState.create(params, optimizer)
    step = jax.jit(make_train_step(stage.loss, optimizer, 0, make_mesh(devices=1)))

    rng = np.random.default_rng(0)
    ids = np.repeat(np.repeat(rng.integers(0, 13, (1, 16, 16), np.uint8), 32, 1), 32, 2)
    batch = {
        "image": rng.integers(0, 255, (1, 512, 512, 3), np.uint8),
        "segment_ids": ids,
        "segment_labels": rng.choice(vocabulary.seen, (1, 12)).astype(np.int32),
        "segment_is_crowd": np.zeros((1, 12), bool),
    }
    text = jnp.asarray(rng.normal(size=(len(vocabulary), networks.clip.embed_dim)), jnp.float32)
    frozen = {"text": text / jnp.linalg.norm(text, axis=1, keepdims=True)}
    new_state, metrics = step(state, frozen, batch)
    assert all(np.isfinite(value) for value in metrics.values())
    queries = params["segmentor"]["transformer_decoder"]["query_feature_embedding"]
    assert queries.shape == (100, 256)

    is_frozen = jax.tree.map(lambda label: label == FROZEN, labels)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, new_state.params)
    pairs = list(zip(jax.tree.leaves(moved), jax.tree.leaves(is_frozen), strict=True))
    assert not any(m for m, f in pairs if f)
    assert np.mean([m for m, f in pairs if not f]) > 0.9
