"""The programs of a config from shapes alone: the training step of a stage, and its predictions."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from concat_jax.core.batch import batch_shapes
from concat_jax.core.config import check_choice
from concat_jax.experiment.setup import Setup, make_setup
from concat_jax.inference import programs
from concat_jax.inference.assign_pixels import PixelCounts
from concat_jax.inference.heads import TextHead
from concat_jax.inference.images import Buckets
from concat_jax.stages.registry import learns_from
from concat_jax.stages.stage import MATCHING_PROJECTOR, TEXT
from concat_jax.training.optimizer import FROZEN, label_params, make_optimizer
from concat_jax.training.sharding import (
    along_batch,
    check_batch_size,
    inference_mesh,
    replicated,
    split_by_rule,
)
from concat_jax.training.state import TrainState, jit_train_step

# Of CLIP's tokenizer, whose file need not be there.
CLIP_TOKENIZER = types.SimpleNamespace(vocab_size=49408, context_length=77, eot_id=49407)


class Program(NamedTuple):
    """What a jitted function is called with, as trees of `jax.ShapeDtypeStruct` with shardings.

    Attributes:
      batch_size: rows of a batch, over all devices of the mesh; `content` says what a row is.
      gradient_bytes: of the trained parameters' gradients, 0 where nothing is trained.
    """

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    batch_size: int
    content: str
    gradient_bytes: int = 0
    static: Mapping[str, Any] = types.MappingProxyType({})


def setup_of(config: ml_collections.ConfigDict) -> Setup:
    """What a config says, without its data, and without the file of CLIP's tokenizer.

    Raises:
      ValueError: as `make_setup`, or the label space lies in the data.
    """
    from data_pipelines.datasets import make_datasets
    from data_pipelines.sources.registry import DATASETS, label_space

    if config.data.kind not in DATASETS:
        labels = make_datasets(config.data, seed=config.seed)
    else:
        vocabulary = label_space(config.data.kind, config.data.split_file)
        labels = types.SimpleNamespace(
            vocabulary=vocabulary,
            eval_vocabulary=None,
            caption_words=vocabulary.names,
            eval_size=config.data.image_size,
        )
    tokenizer = CLIP_TOKENIZER if config.text.tokenizer == "clip" else None
    return make_setup(config, labels, tokenizer)


def training_program(setup: Setup, name: str, mesh: Mesh) -> Program:
    """The training step of a stage as the loop jits it, of (state, frozen, batch).

    Raises ValueError for an unknown stage, or a batch that cannot be split over the chips.
    """
    check_choice(name, setup.stages, "--stage names no stage of the config:")
    settings, stage = setup.stages[name], setup.make_stage(name)
    check_batch_size(settings.batch_size, mesh, f"config.train.{name}.batch_size")
    if stage.loss is None:
        raise ValueError(f"Stage {name!r} is in closed form: it has no step to compile.")
    shapes = functools.partial(parameter_shapes, setup, name)
    params = {subtree: shapes(subtree) for subtree in stage.trains}
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(setup.optimizer(name), settings.steps, labels)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    gradient_bytes = sum(x.size * x.dtype.itemsize for x, label in pairs if label != FROZEN)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    fields = batch_shapes(stage.batch_fields, **batch_sizes(setup, name))
    batch = {field: jax.ShapeDtypeStruct(*of_field) for field, of_field in fields.items()}
    arguments = (state, {read: shapes(read) for read in stage.reads}, batch)
    on_mesh = split_by_rule(arguments[:2], mesh)
    shardings = (*on_mesh, jax.tree.map(lambda _: along_batch(mesh), batch))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arguments, shardings
    )
    seed, fusion_mb = setup.config.seed, setup.mesh.fusion_mb
    step = jit_train_step(stage.loss, optimizer, seed, mesh, state, fusion_mb=fusion_mb)
    sizes = batch_sizes(setup, name)
    content = "images of {S} x {S}" if "image" in batch else "images' {N} vision queries"
    return Program(
        f"Training step of {name}",
        step,
        placed,
        mesh,
        sizes["B"],
        content.format(**sizes),
        gradient_bytes,
    )


def parameter_shapes(setup: Setup, name: str, read: str) -> Any:
    """Of what stage `name` reads or trains: a subtree of the networks, or its texts."""
    if read == TEXT:
        shape = (len(setup.vocabulary), setup.networks.clip.embed_dim)
        return jax.ShapeDtypeStruct(shape, np.float32)
    subtree = "projector" if read == MATCHING_PROJECTOR else read
    return jax.eval_shape(lambda: setup.networks_of(name).init(subtree, jax.random.key(0)))


def prediction_programs(setup: Setup, name: str, mesh: Mesh) -> list[Program]:
    """Those of a batch of a host's own pictures of the largest padded shape, as `Predictor`'s.

    Panoptic maps; what is compiled is what holds after stage `name`, or ValueError if that predicts
    nothing.
    """
    setup.check_predicts(name, "--stage")
    config, networks = setup.predict, setup.networks
    buckets = Buckets(config.short_side, config.long_side)
    mesh = inference_mesh(mesh, config.batch_size)
    shapes = functools.partial(parameter_shapes, setup, name)

    def place(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def rows(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        shape = (config.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=along_batch(mesh))

    def output_of(program: Program) -> Any:
        run = functools.partial(program.jitted, **program.static)
        return place(jax.eval_shape(run, *program.arguments), along_batch(mesh))

    def program(what: str, jitted: Any, *arguments: Any, **static: Any) -> Program:
        content = "images of at most {} x {}".format(*buckets.shapes[-1])
        called = f"{what} of {name}"
        return Program(called, jitted, arguments, mesh, config.batch_size, content, static=static)

    network = programs.Network(place(shapes("segmentor"), replicated(mesh)), networks.segmentor)
    projector, text = place((shapes("projector"), shapes(TEXT)), replicated(mesh))
    head = TextHead(projector, text, None, None, networks.projector)
    run = program(
        "Network",
        programs.run_segmentor,
        network,
        rows(*buckets.shapes[-1], 3, dtype=np.uint8),
        rows(2),
        is_padded=True,
        canvas=buckets.canvas,
    )
    logits, queries = output_of(run)
    of_names = np.zeros(head.num_classes, bool)
    thresholds = {f"{rule}_threshold": 0.5 for rule in ("score", "objectness")}
    named = program(
        "Names",
        programs.name_queries,
        *(head, queries, of_names, of_names, np.zeros(1, np.float32), thresholds),
        keep_rule=config.keep_rule or head.KEEP_RULE,
    )
    names = output_of(named)
    counts = PixelCounts(*[rows(logits.shape[1])] * 3)
    sizes = programs.Sizes(rows(2, dtype=np.float32), rows(2))
    tile = program(
        "Panoptic map",
        programs.panoptic_tile,
        *(logits, names.bids, counts, sizes, np.zeros(2, np.int32), config.mask_threshold),
        side=programs.TILE_SIDES[-1],
    )
    return [run, named, tile]


def batch_sizes(setup: Setup, name: str) -> dict[str, int]:
    """Sizes of the dimensions of a stage's batches, by the letters of `core.batch`."""
    settings, networks, data = setup.stages[name], setup.networks, setup.config.data
    of_captions = learns_from(settings) == "captions"
    return {
        "B": settings.batch_size,
        "S": networks.clip.image_size if of_captions else data.image_size,
        "G": data.get("max_segments", 0),
        "C": networks.clip.embed_dim,
        "T": setup.tokenizer.context_length,
        "N": networks.segmentor.num_queries,
        "D": networks.segmentor.width,
        "K": -(-len(setup.vocabulary) // settings.batch_size) * settings.batch_size,
        "M": settings.method.get("memory_per_class", 0),
    }
