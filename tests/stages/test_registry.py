"""A new stage is a module and a line, a new backbone is a class and a line; what is refused."""

import dataclasses
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core import cli
from concat_jax.core.batch import QUERY_FIELDS
from concat_jax.core.config import build
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import weighted_cross_entropy
from concat_jax.models.backbones import BACKBONES
from concat_jax.models.networks import make_networks
from concat_jax.stages.queries import IMAGE_FIELDS
from concat_jax.stages.registry import STAGES, learns_from, make_stage, method_of
from concat_jax.stages.stage import MATCHING_PROJECTOR, PLAIN_RULES, TEXT, Stage, StageConfig
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState, make_train_step
from tests import tiny


@dataclasses.dataclass(frozen=True)
class NamingConfig:
    """Constants of the new stage."""

    no_object_weight: float = 0.1


def make_naming(context, config):
    """The projector learns to name queries: one cross-entropy over all classes and no-object."""
    projector, num_classes = context.networks.projector, len(context.vocabulary)

    def loss(params, frozen, batch, rng):
        logits = projector.apply(
            {"params": params["projector"]}, batch["queries"], frozen[TEXT], method="predict"
        )
        weights = jnp.ones(num_classes + 1).at[-1].set(config.no_object_weight)
        labels = batch["query_labels"] % (num_classes + 1)  # -1 is the last
        losses, counted = weighted_cross_entropy(logits, labels, weights)
        value = losses.sum() / counted.sum()
        return value, {"loss": value}

    return Stage(("projector",), (TEXT,), loss, PLAIN_RULES, QUERY_FIELDS)


NAMING = types.SimpleNamespace(Config=NamingConfig, LEARNS_FROM="queries", make_stage=make_naming)


class Patches(nn.Module):
    """A new backbone: patches of 4 x 4 pixels, and averages of them."""

    width: int = 8
    dtype: type = np.float32
    stride = 4

    @nn.compact
    def __call__(self, images, image_size=None):
        maps = [nn.Conv(self.width, (4, 4), (4, 4), dtype=self.dtype, name="patches")(images)]
        for _ in range(3):
            maps.append(nn.avg_pool(maps[-1], (2, 2), (2, 2)))
        return maps


def settings(kind, **fields):
    takes = fields.pop("takes", dict(clip="clip", segmentor="con", projector="con"))
    fields = dict(steps=2, batch_size=2, bank_images=2, optimizer={}) | fields
    return StageConfig(kind=kind, takes=takes, **fields)


def step(stage, networks, batch):
    """(parameters before, after, loss) of one step of the loop's."""
    params = {name: tiny.params(name, of=networks) for name in stage.trains}
    subtree = {TEXT: None, MATCHING_PROJECTOR: "projector"}
    frozen = {
        name: tiny.text() if name == TEXT else tiny.params(subtree.get(name, name), 9, of=networks)
        for name in stage.reads
    }
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant"), 2, label_params(params, stage.rules)
    )
    run = jax.jit(
        make_train_step(stage.loss, optimizer, 0, make_mesh(devices=1)),
    )
    inputs = {field: batch[field] for field in stage.batch_fields}
    state, metrics = run(TrainState.create(params, optimizer), frozen, inputs)
    return params, jax.device_get(state.params), metrics["loss"]


def moved(before, after):
    return jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after))


@pytest.fixture
def naming(monkeypatch):
    monkeypatch.setitem(STAGES, "naming", NAMING)


def test_a_new_stage_is_one_module_and_one_line(naming):
    of = settings("naming", method=dict(no_object_weight=0.5))
    assert method_of("new", of) == NamingConfig(0.5) and learns_from(of) == "queries"
    stage = make_stage("new", of, tiny.context())
    before, after, loss = step(stage, tiny.networks(), tiny.query_batch())
    assert np.isfinite(loss) and set(after) == {"projector"} and all(moved(before, after))


def test_a_new_backbone_is_one_class_and_one_line(naming, monkeypatch):
    """Under the new stage with images in the loop, and trained by CON as far as shapes tell."""
    monkeypatch.setitem(BACKBONES, "patches", Patches)
    model = tiny.model(segmentor=dict(backbone=dict(kind="patches", width=6)))
    networks = make_networks(model)
    assert networks.segmentor.stride == 4 and networks.segmentor.backbone.width == 6
    context = dataclasses.replace(tiny.context(), networks=networks)
    of = settings("naming", queries="images")
    stage = make_stage("new", of, context)
    assert learns_from(of) == "images" and stage.batch_fields == IMAGE_FIELDS
    assert set(stage.reads) == {TEXT, "segmentor", MATCHING_PROJECTOR}
    before, after, loss = step(stage, networks, tiny.batch())
    assert np.isfinite(loss) and all(moved(before, after))

    con = make_stage("con", settings("con", takes=dict(clip="clip")), context)
    params = {name: tiny.params(name, of=networks) for name in con.trains}
    frozen = {TEXT: tiny.text(), "clip": tiny.params("clip")}
    gradient = jax.grad(con.loss, has_aux=True)
    shapes, _ = jax.eval_shape(gradient, params, frozen, tiny.batch(), tiny.KEY)
    assert shapes["segmentor"]["backbone"]["patches"]["kernel"].shape == (4, 4, 3, 6)

    model["segmentor"]["backbone"]["widht"] = 3
    with pytest.raises(ValueError, match="kind 'patches' has no key 'widht'; did you mean 'width'"):
        make_networks(model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(kind="cta"), "config.train.x.kind is unknown: 'cta'; did you mean 'cat'"),
        (dict(method=dict(cycle=1)), "config.train.x.method has no key 'cycle'.*'cycle_weight'"),
        (dict(queries="image"), "config.train.x.queries is 'image'; did you mean 'images'"),
        (
            dict(takes=dict(segmentor="con", clp="init")),
            "takes names no subtree: 'clp'; did you mean",
        ),
        (dict(takes=dict(clip="clip")), "learns from vision queries; say in .*takes.segmentor"),
        (dict(takes=dict(segmentor="con", projector="con")), "'x' reads 'clip'; say in config.tra"),
        (dict(takes=dict(clip="clip", segmentor="con")), "'x' reads 'projector'; say in config.tr"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        make_stage("x", settings(**dict(kind="cat") | changed), tiny.context())


INDUCTIVE_CONTROL = dict(unseen_names=False, pseudo_per_class=0)
ONE_CLASS = Vocabulary(("cat",), (True,), (True,), (1,))


@pytest.mark.parametrize(
    ("kind", "changed", "vocabulary", "count"),
    [
        ("cat", {}, ONE_CLASS, 1),
        ("finetune", {}, ONE_CLASS, 1),
        ("finetune", dict(method=dict(unseen_names=False)), None, 2),
        ("cat", dict(queries="images", method=dict(memory_per_class=2)), None, 2),
        ("cat", dict(oracle=True, queries="images"), None, 1),
        ("finetune", dict(oracle=True, method=INDUCTIVE_CONTROL), None, 2),
    ],
)
def test_every_flag_that_an_error_names_mends_it(kind, changed, vocabulary, count, tmp_path):
    """Through the command line, on a config file as a user writes one."""
    context = tiny.context()
    if vocabulary:
        context = dataclasses.replace(context, vocabulary=vocabulary)
    takes = dict(clip="clip", segmentor="con", projector="con", generator="cat")
    section = dict(kind=kind, takes=takes, steps=2, batch_size=2, optimizer={}, method={})
    section["bank_images"] = 2
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict(dict(train=dict(new={section | changed!r})))\n"
    )

    def run(*flags):
        def command(given, arguments):
            settings = build(StageConfig, given.config.train.new, "config.train.new")
            make_stage("new", settings, context)

        argv = ["x", f"--config={file}", *flags]
        cli.main("", lambda flags: None, command, argv, with_config=True, computes=False)

    with pytest.raises(SystemExit) as stop:
        run()
    parts = stop.value.code.split(", or ")
    remedies = [found for part in parts if (found := re.findall(r"--\S+=\w+", part))]
    assert len(remedies) == count
    for flags in remedies:
        run(*flags)
