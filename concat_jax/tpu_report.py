"""Does a training step fit a TPU? The real compiler answers, without a TPU.

python -m concat_jax.tpu_report --config=configs/coco_zps.py --topology=v5e:4x4

Compiles the step of any stage (--stage) as the training loop runs it, with its optimizer, its
sharding and its state donated, from shapes alone, so no data and no weights are needed. Needs the
`libtpu` package of the installed JAX (`pip install "jax[tpu]"`) on Linux x86-64, and minutes of
compile time.
"""

from __future__ import annotations

import os
import time
import types
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from concat_jax.benchmarking.compile_report import (
    Report,
    compile_error,
    find_collectives,
    format_report,
    memory_of,
)
from concat_jax.core import cli
from concat_jax.core.batch import batch_shapes
from concat_jax.core.config import check_choice
from concat_jax.experiment.setup import Setup, make_setup
from concat_jax.models.segmentor import DEFAULTS
from concat_jax.stages.registry import learns_from
from concat_jax.stages.stage import MATCHING_PROJECTOR, TEXT
from concat_jax.training.optimizer import FROZEN, label_params, make_optimizer
from concat_jax.training.sharding import along_batch, mesh_of, replicated
from concat_jax.training.state import TrainState, jit_train_step

# What libtpu asks of its surroundings before it describes a topology it does not run on.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# Of CLIP's tokenizer, whose file need not be there.
CLIP_TOKENIZER = types.SimpleNamespace(vocab_size=49408, context_length=77, eot_id=49407)


def make_topology_mesh(topology: str) -> Mesh:
    """The training mesh over the chips of a topology that need not exist, such as "v5e:16x16".

    Raises ValueError if libtpu is not installed or does not know the topology.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            'The TPU compiler is not installed; run `pip install "jax[tpu]"` (Linux, x86-64).'
        ) from None
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"libtpu knows no topology {topology!r}; use one such as v5e:4x4 or v4:2x2x1. It says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return mesh_of(devices)


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


def abstract_step(setup: Setup, name: str, mesh: Mesh) -> tuple[Any, tuple[Any, Any, Any], int]:
    """The training step of a stage as the loop jits it, and shapes of its arguments.

    Returns the jitted step; (state, frozen, batch), trees of `jax.ShapeDtypeStruct` with shardings;
    and the bytes of the trained parameters' gradients. Raises ValueError for an unknown stage, or a
    batch that cannot be split over the chips.
    """
    check_choice(name, setup.stages, "--stage names no stage of the config:")
    settings, stage = setup.stages[name], setup.make_stage(name)
    if settings.batch_size % mesh.size:
        raise ValueError(
            f"The batch of {settings.batch_size} images cannot be split over {mesh.size} chips; "
            f"set config.train.{name}.batch_size to a multiple."
        )
    if stage.loss is None:
        raise ValueError(f"Stage {name!r} is in closed form: it has no step to compile.")
    networks, text = setup.networks_of(name), (len(setup.vocabulary), setup.networks.clip.embed_dim)

    def shapes(read: str) -> Any:
        if read == TEXT:
            return jax.ShapeDtypeStruct(text, np.float32)
        subtree = "projector" if read == MATCHING_PROJECTOR else read
        return jax.eval_shape(lambda: networks.init(subtree, jax.random.key(0)))

    params = {subtree: shapes(subtree) for subtree in stage.trains}
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(setup.optimizer(name), settings.steps, labels)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    gradient_bytes = sum(x.size * x.dtype.itemsize for x, label in pairs if label != FROZEN)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    fields = batch_shapes(stage.batch_fields, **batch_sizes(setup, name))
    batch = {field: jax.ShapeDtypeStruct(*of_field) for field, of_field in fields.items()}
    arguments = (state, {read: shapes(read) for read in stage.reads}, batch)
    shardings = (replicated(mesh), replicated(mesh), along_batch(mesh))
    placed = tuple(
        jax.tree.map(lambda x, s=s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)
        for tree, s in zip(arguments, shardings, strict=True)
    )
    step = jit_train_step(stage.loss, optimizer, setup.config.seed, mesh)
    return step, placed, gradient_bytes


def batch_sizes(setup: Setup, name: str) -> dict[str, int]:
    """Sizes of the dimensions of a stage's batches, by the letters of `core.batch`."""
    settings, networks, data = setup.stages[name], setup.networks, setup.config.data
    segmentor = {**DEFAULTS, **setup.config.model.segmentor}
    of_captions = learns_from(settings) == "captions"
    return {
        "B": settings.batch_size,
        "S": networks.clip.image_size if of_captions else data.image_size,
        "G": data.get("max_segments", 0),
        "C": networks.clip.embed_dim,
        "T": setup.tokenizer.context_length,
        "N": segmentor["num_queries"],
        "D": networks.query_width,
        "K": -(-len(setup.vocabulary) // settings.batch_size) * settings.batch_size,
        "M": settings.method.get("memory_per_class", 0),
    }


def make_report(config: ml_collections.ConfigDict, name: str, topology: str) -> Report:
    """Compile the step of stage `name` for a topology and read what the compiler says.

    Raises:
      ValueError: as `make_topology_mesh` and `abstract_step`, or the step does not fit a chip.
    """
    setup, mesh = setup_of(config), make_topology_mesh(topology)
    step, arguments, gradient_bytes = abstract_step(setup, name, mesh)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(compile_error(str(error), topology)) from error
    sizes = batch_sizes(setup, name)
    content = "images of {S} x {S}" if "image" in arguments[2] else "images' {N} vision queries"
    return Report(
        topology=topology,
        num_chips=mesh.size,
        batch_size=sizes["B"],
        content=content.format(**sizes),
        seconds=time.monotonic() - start,
        memory=memory_of(compiled),
        collectives=find_collectives(compiled.as_text()),
        gradient_bytes=gradient_bytes,
    )


def define_flags(flags: cli.Flags) -> None:
    flags.string("topology", "v5e:4x4", "Chips, as v5e:16x16 or v4:2x2x1.")
    flags.string("stage", "con", "Stage of the config.")


@cli.command(__doc__, define_flags, with_config=True, computes=False)
def main(given: cli.Flags) -> None:
    # The chips are described, never opened; everything that runs, runs here.
    jax.config.update("jax_platforms", "cpu")
    print(format_report(make_report(cli.config_of(given), given.stage, given.topology)))


if __name__ == "__main__":
    main()
