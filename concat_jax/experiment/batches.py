"""What each stage of a run learns from: captions, images, or the vision queries of a bank.

All hosts see a bank's folder, and hold the queries of a batch once they are extracted; each writes
its own shards, index modulo the number of hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from concat_jax.core.arrays import fingerprint
from concat_jax.core.batch import QUERY_TARGETS, TARGET_FIELDS
from concat_jax.core.config import check_choice, flat
from concat_jax.core.hosts import gathered, of_first_host, wait_for_hosts
from concat_jax.core.prefetch import Batches, in_threads
from concat_jax.core.progress import Progress
from concat_jax.core.runtime import light_compiler_options
from concat_jax.core.shard_store import ShardedRows, ShardStore, StoreKind
from concat_jax.stages import con
from concat_jax.stages.queries import (
    IMAGE_FIELDS,
    QueryBank,
    Targets,
    extract_queries,
    missing_classes,
    target_inputs,
)
from concat_jax.stages.registry import learns_from, method_of
from concat_jax.stages.stage import INIT
from concat_jax.training.sharding import shard_batch

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment

FORMAT = 1
DTYPES = ("float16", "float32")
LABEL_DTYPE = np.int16
KIND = StoreKind(
    "the query bank", ("queries", "labels"), "start again: it is extracted anew", "bank.json"
)
# Of the queries that hold a segment, by their place in the shard (image times N plus query).
TARGET_ARRAYS = ("target_places", "targets")

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """`config.bank`, how queries lie on disk.

    Attributes:
      dtype: "float16" halves the bank: a query leaves a LayerNorm, so its numbers are near 1 and
        move by a few ten-thousandths, where those of one class differ by tenths. bfloat16 would
        move them eight times as far.
      images_per_shard: rounded up to whole batches; a kill costs as many at most. A bank that was
        begun keeps its own.
    """

    dtype: str = "float32"
    images_per_shard: int = 1024

    def __post_init__(self):
        check_choice(self.dtype, DTYPES, "config.bank.dtype is")


def stage_batches(experiment: Experiment, name: str, text: np.ndarray | None) -> Batches[Batch]:
    """This host's rows of a stage's batches; only a query bank needs the text embeddings."""
    setup, settings = experiment.setup, experiment.setup.stages[name]
    source = learns_from(settings)
    if source == "images":
        return experiment.datasets.train(settings.batch_size)
    if source == "queries":
        return in_threads(query_bank(experiment, name, text).batch)
    pairs = experiment.datasets.captions(
        settings.batch_size, setup.networks.clip.image_size, settings.captions
    )

    def caption_batch(step: int) -> Mapping[str, np.ndarray]:
        batch = pairs(step)
        return {"image": batch["image"], "tokens": setup.tokenizer(batch["captions"])}

    return in_threads(caption_batch)


def clip_target_identity(experiment: Experiment, source: str | None) -> dict[str, Any]:
    """What CON's targets depend on besides the images: `weights`, `clip` and `crops`.

    Of the CLIP of `source`, a stage or "init"; None leaves the weights out.
    """
    context, weights = experiment.setup.context, {}
    if source is not None:
        params = jax.device_get(experiment.parameters.whole("clip", source))
        weights = {"weights": fingerprint(params)}
    return weights | con.target_identity(context.networks.clip, context.crops)


def check_clip_targets(experiment: Experiment, name: str, *, with_weights: bool) -> None:
    """Refuses cached targets that a stage must not learn from, before it compiles.

    CLIP's parameters have to be read for `with_weights`. Raises ValueError saying what to do.
    """
    setup = experiment.setup
    fields = set(setup.make_stage(name).batch_fields)
    of_bank = QUERY_TARGETS in fields and setup.context.has_clip_targets
    if not of_bank and not set(TARGET_FIELDS) <= fields:
        return
    check = experiment.datasets.check_clip_targets
    if check is None:
        raise ValueError(
            f"Stage {name!r} is to learn from cached CLIP targets, and none are configured: "
            "set config.data.clip_targets to the folder that `python -m "
            "concat_jax.cache_clip_targets` filled, or "
            f"config.train.{name}.method.targets to 'online'."
        )
    source = setup.stages[name].takes["clip"]
    if source != INIT and not experiment.parameters.is_finished(source):
        raise ValueError(
            f"Stage {name!r} is to learn from cached targets of the CLIP of stage {source!r}, "
            f"which has not finished in {experiment.workdir}: train that stage alone "
            "(config.stages), then fill the cache with `python -m "
            "concat_jax.cache_clip_targets`."
        )
    check(clip_target_identity(experiment, source if with_weights else None))


def query_bank(experiment: Experiment, name: str, text: np.ndarray) -> QueryBank:
    """The bank that a stage learns from, extracted into the folder of the stage of its segmentor.

    A bank belongs to the weights that made it; for an oracle it also shows unseen classes. Raises
    ValueError if the bank there is another, holds no seen class or is smaller than a batch.
    """
    setup, datasets = experiment.setup, experiment.datasets
    config, settings = setup.config, setup.stages[name]
    source = settings.takes["segmentor"]
    size = setup.stages[source].batch_size
    # The projector that stage 1 trained names the queries, whatever this stage starts from.
    params = {s: experiment.parameters.whole(s, source) for s in ("segmentor", "projector")}
    weights = fingerprint(jax.device_get(params))[:16]
    with_targets = QUERY_TARGETS in setup.make_stage(name).batch_fields
    num_batches = -(-settings.bank_images // size)
    num_images = num_batches * size
    model = flat(config.model).items()
    context, batches, kind = setup.context, datasets.bank, "query_bank"
    if settings.oracle:
        context = dataclasses.replace(context, vocabulary=setup.vocabulary.all_seen())
        batches, kind = datasets.oracle, "oracle_bank"
    fields, identity = IMAGE_FIELDS, {}
    if with_targets:
        kind += "_with_targets"
        extra_fields, reads = target_inputs(context)
        fields += extra_fields
        clip_source = settings.takes["clip"]
        params |= {read: experiment.parameters.whole(read, clip_source) for read in reads}
        identity = {"targets": clip_target_identity(experiment, clip_source)}
    extract_fn = jax.jit(
        functools.partial(extract_queries, context, with_targets=with_targets),
        compiler_options=light_compiler_options(),
    )
    rng = jax.random.key(config.seed)

    def extract(batch: Batch) -> Batch:
        inputs = shard_batch({name: batch[name] for name in fields}, experiment.mesh)
        with jax.set_mesh(experiment.mesh):
            found = extract_fn(params, text, inputs, rng)
        # A batch of queries is small, and so any host can write any shard.
        return gathered(found)

    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    bank = fill_bank(
        experiment.workdir / source / f"{kind}_{num_images}",
        {
            **identity,
            "kind": kind,
            "stage": source,
            "steps": setup.stages[source].steps,
            "images": num_images,
            "model": str(sorted(item for item in model if not item[0].startswith("generator"))),
            "weights": weights,
        },
        extract,
        batches(size),
        num_batches=num_batches,
        batch_size=size,
        config=setup.bank,
        with_targets=with_targets,
        **host,
    )
    warning = missing_classes(bank.labels, setup.vocabulary)
    if warning and jax.process_index() == 0:
        print(f"Warning: {warning}")
    return QueryBank(
        bank.queries,
        bank.labels,
        batch_size=settings.batch_size,
        seed=config.seed,
        memory_per_class=getattr(method_of(name, settings), "memory_per_class", 0),
        num_classes=len(setup.vocabulary),
        targets=bank.targets,
        **host,
    )


class Bank(NamedTuple):
    """Queries [M, N, D] of the config's dtype, labels [M, N] int16, and targets, if wanted."""

    queries: ShardedRows
    labels: np.ndarray
    targets: Targets | None


def fill_bank(
    folder: Path,
    identity: Mapping[str, Any],
    extract: Callable[[Batch], Batch],
    batches: Batches[Batch],
    *,
    num_batches: int,
    batch_size: int,
    config: BankConfig,
    with_targets: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Bank:
    """Opens the bank in `folder`, after extracting the shards that it lacks, on all hosts together.

    Args:
      folder: the same for all hosts; made if absent.
      identity: what the queries depend on; a bank with another identity is refused.
      extract: batch of images -> what `extract_queries` finds in the global batch, on every host.
        All hosts call it as often.
      num_batches: steps 0 .. num_batches - 1 make the bank.

    Row s·B + b is image b of step s. Queries and targets stay on disk, labels, 9 MB of COCO's, are
    read.

    Raises ValueError for another or a damaged bank, or a query not storable.
    """
    manifest = {"format": FORMAT, **identity, **dataclasses.asdict(config), "batch": batch_size}
    kind = KIND
    if with_targets:
        kind = dataclasses.replace(KIND, arrays=KIND.arrays + TARGET_ARRAYS)
    store = ShardStore(folder, kind, manifest, keeps=("images_per_shard",))
    store.claim(leads=process_index == 0)
    steps_per_shard = -(-store.manifest["images_per_shard"] // batch_size)
    steps = range(num_batches)
    shards = [steps[i : i + steps_per_shard] for i in range(0, num_batches, steps_per_shard)]
    missing = np.zeros(len(shards), bool)
    missing[store.missing(range(len(shards)))] = True
    # Extraction is one program of all hosts: they must agree on what there is to extract.
    todo = [int(index) for index in np.flatnonzero(of_first_host(missing))]
    if todo:
        if process_index == 0:
            print(
                f"Query bank {folder}: {len(shards) - len(todo)} of {len(shards)} shards are "
                f"finished, {len(todo)} to extract.",
                flush=True,
            )
        done = batch_size * (num_batches - sum(len(shards[index]) for index in todo))
        progress = Progress("queries", done, batch_size * num_batches)
        ahead = batches([step for index in todo for step in shards[index]])
        try:
            with contextlib.closing(ahead):
                for index in todo:
                    parts = []
                    for step in shards[index]:
                        part = _stored(extract(next(ahead)), config.dtype, step)
                        if index % process_count == process_index:
                            parts.append(part)
                        done += batch_size
                        if process_index == 0:
                            progress.tick(done)
                    if parts:
                        store.write(index, _shard(parts))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Stopped; what is finished of the query bank is kept, and the same command goes on."
            ) from None
        wait_for_hosts("query bank")
    opened = [store.open(index) for index in range(len(shards))]
    for index, shard in enumerate(opened):
        if shard["queries"].shape[:2] != shard["labels"].shape:
            raise store.damaged(index, "it does not hold a label for each query")
    labels = np.concatenate([shard["labels"] for shard in opened])
    targets = _targets(opened, labels.shape) if with_targets else None
    return Bank(ShardedRows([shard["queries"] for shard in opened]), labels, targets)


def _stored(batch: Batch, dtype: str, step: int) -> dict[str, np.ndarray]:
    queries = np.asarray(batch["queries"])
    if not np.isfinite(queries).all():
        raise ValueError(
            f"The segmentor gives vision queries that are not finite for batch {step} of the "
            "training images; train it again with a smaller learning rate."
        )
    with np.errstate(over="ignore"):
        stored = queries.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"A vision query holds {np.abs(queries).max():g}, too large for {dtype}; set "
            "config.bank.dtype to 'float32'."
        )
    found = {"queries": stored, "labels": np.asarray(batch["query_labels"]).astype(LABEL_DTYPE)}
    if QUERY_TARGETS in batch:
        # Half precision turns an embedding by less than 1e-7 in cosine.
        found[QUERY_TARGETS] = np.asarray(batch[QUERY_TARGETS]).astype(np.float16)
    return found


def _shard(parts: Sequence[Batch]) -> dict[str, np.ndarray]:
    """A shard's arrays; of the targets only those that there are."""
    shard = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if QUERY_TARGETS in shard:
        targets = shard.pop(QUERY_TARGETS).reshape(shard["labels"].size, -1)
        places = np.flatnonzero(targets.any(axis=1))
        shard |= {"target_places": places.astype(np.int32), "targets": targets[places]}
    return shard


def _targets(shards: Sequence[Batch], shape: tuple[int, int]) -> Targets:
    rows = np.full(shape[0] * shape[1], -1, np.int32)
    first = count = 0
    for shard in shards:
        places = shard["target_places"]
        rows[first + places] = np.arange(count, count + len(places))
        first, count = first + shard["labels"].size, count + len(places)
    return Targets(ShardedRows([shard["targets"] for shard in shards]), rows.reshape(shape))
