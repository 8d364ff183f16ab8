"""Our data and model under one of Scenic's own trainers."""

import jax
import numpy as np
import pytest

from concat_jax.experiment.setup import make_setup
from concat_jax.scenic_project.dataset import add_dataset
from concat_jax.scenic_project.model import segmentor_model
from configs import demo_zps
from data_pipelines.datasets import make_datasets
from tests import tiny
from tests.neighbours.with_scenic import need_scenic
from tests.weights.clip.scenic_files import as_scenic, save

trainer, train_utils = need_scenic("train_lib.classification_trainer", "train_lib.train_utils")
BATCH, NUM_EVAL = 8, 11  # of which the last batch holds three
SCENICS = dict(
    rng_seed=0,
    dataset_name="concat_jax",
    data_dtype_str="uint8",
    batch_size=BATCH,
    num_training_steps=2,
    log_eval_steps=2,
    optimizer_configs=dict(optimizer="adamw", weight_decay=0.01),
    lr_configs=dict(
        learning_rate_schedule="compound", factors="constant", base_learning_rate=0.003
    ),
    checkpoint=True,
    count_flops=False,
    xprof=False,
    debug_train=False,
    debug_eval=False,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The demo's, with tiny networks, a CLIP as Scenic has it, and Scenic's keys."""
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        config.model = {**tiny.MODEL, "clip": dict(tiny.MODEL["clip"], stem="patch")}
        for size in ("vocab_size", "context_length", "eot_id"):  # the tokenizer's
            del config.model.clip[size]
        config.data.num_eval_images, config.loss.num_points = NUM_EVAL, 32
        config.loss.matcher = "scenic.hungarian_tpu"
        config.update(SCENICS, dataset_configs=config.data.to_dict())
        networks = make_setup(config, make_datasets(config.data, seed=0)).networks
        heads = {"image_heads": networks.clip.image_heads, "text_heads": networks.clip.text_heads}
        arrays = as_scenic(tiny.params("clip", of=networks), **heads)
        path = tmp_path_factory.mktemp("clip") / "checkpoint_1"
        config.init = dict(clip=str(save(path, arrays)))
    return config


@pytest.fixture
def dataset(config):
    add_dataset()
    add_dataset()  # changes nothing
    return train_utils.get_dataset(config, jax.random.PRNGKey(0), num_local_shards=4)


def test_batches_are_as_scenics(config, dataset):
    first = next(dataset.train_iter)
    assert first["inputs"].shape == (4, 2, 64, 64, 3) and first["batch_mask"].all()
    ours = next(make_datasets(config.data, seed=0).train(BATCH)(range(1)))
    np.testing.assert_array_equal(first["inputs"].reshape(ours["image"].shape), ours["image"])
    labels = {name: x.reshape(BATCH, *x.shape[2:]) for name, x in first["label"].items()}
    tiny.assert_same(labels, {name: ours[name] for name in labels})
    masks = [next(dataset.valid_iter)["batch_mask"].sum() for _ in range(4)]
    assert masks == [8, 3, 8, 3], "all evaluation images, again and again"


def test_its_trainer_takes_steps_on_our_model(config, tmp_path):
    add_dataset()
    dataset = train_utils.get_dataset(config, jax.random.PRNGKey(0))
    written = []

    class Writer:
        def write_scalars(self, step, scalars):
            written.append((step, {name: float(value) for name, value in scalars.items()}))

        def flush(self):
            pass

    arguments = dict(rng=jax.random.PRNGKey(1), config=config, model_cls=segmentor_model())
    state, train, valid = trainer.train(
        **arguments, dataset=dataset, workdir=str(tmp_path), writer=Writer()
    )
    assert {"loss", "loss_mask", "loss_dice", "accuracy"} <= set(train)
    assert {"loss_mask", "loss_dice", "accuracy"} <= set(valid) and "loss" not in valid
    assert all(np.isfinite(list(summary.values())).all() for summary in (train, valid))
    norms = [row["l2_updates"] for _, row in written if "l2_updates" in row]
    assert norms and min(norms) > 0
    params = jax.device_get(jax.tree.map(lambda x: x[0], state.params))
    networks = make_setup(config, dataset.meta_data["labels"]).networks
    for name in ("segmentor", "projector"):
        ours = jax.eval_shape(lambda n=name: networks.init(n, jax.random.key(0)))
        assert jax.tree.map(np.shape, params[name]) == jax.tree.map(np.shape, ours)
    assert list(tmp_path.glob("checkpoint_2"))


def test_the_loss_is_that_of_our_stage(config, dataset):
    """One device, no key but the same: what Scenic's trainer minimises is CON's without CLIP."""
    model = segmentor_model()(config, dataset.meta_data)
    batch = next(dataset.train_iter)
    shards = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    setup = model.setup
    params = {name: tiny.params(name, of=setup.networks) for name in ("segmentor", "projector")}
    key = {"dropout": jax.random.PRNGKey(5)}

    def theirs(params):
        logits = model.flax_model.apply({"params": params}, shards["inputs"], train=True, rngs=key)
        return model.loss_function(logits, shards), logits["key"]

    loss, drawn = jax.jit(theirs)(params)
    setup.stages["con"].method.update(global_weight=0.0, instance_weight=0.0)
    stage = setup.make_stage("con")
    text = np.zeros((len(setup.vocabulary), model.flax_model.text.shape[-1]), np.float32)
    text[setup.vocabulary.seen] = model.flax_model.text
    ours, _ = jax.jit(stage.loss)(
        params, {"text": text}, {"image": shards["inputs"], **shards["label"]}, drawn
    )
    np.testing.assert_allclose(loss, ours, rtol=1e-5)
