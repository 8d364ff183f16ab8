"""The one training loop. It knows a stage's loss and parameter rules, and no stage by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from concat_jax.core import stopping
from concat_jax.core.batch import PROGRESS
from concat_jax.core.cli import UserStop
from concat_jax.core.files import as_path
from concat_jax.core.prefetch import watched
from concat_jax.core.progress import Progress
from concat_jax.core.runtime import FUSION_MB
from concat_jax.stages.stage import TEXT, Stage
from concat_jax.training.checkpoints import StageCheckpoints
from concat_jax.training.metrics import MetricWriter, Mirror
from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
    path_name,
)
from concat_jax.training.profile import FOLDER, ProfileConfig, StepTracer
from concat_jax.training.sharding import shard_batch, split_by_rule
from concat_jax.training.speed import Awaited, seconds_at_peak
from concat_jax.training.state import TrainState, jit_train_step

BatchFn = Callable[[int], Mapping[str, np.ndarray]]
# (steps done, trained subtrees, where it writes to) -> scores of what holds then.
Look = Callable[[int, Any, MetricWriter], Mapping[str, float]]


class NonFiniteLossError(UserStop):
    """The loss became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a stage is trained; `save_every` 0 saves the last step only.

    The loss is looked at every `log_every` steps, for the progress line, and never in between. The
    last `keep` checkpoints are kept, and the best by hPQ where `look` gives it. A step whose loss
    or gradient is not finite ends the run; where `max_skips` is more than 0 it changes nothing,
    until there are more than that in a row. `fusion_mb` as of `step_compiler_options`.
    """

    steps: int
    seed: int = 0
    log_every: int = 50
    save_every: int = 0
    eval_every: int = 0
    keep: int = 2
    max_skips: int = 0
    tensorboard: bool = True
    fusion_mb: int = FUSION_MB
    profile: ProfileConfig | None = None


def train_stage(
    name: str,
    stage: Stage,
    *,
    params: Any,
    frozen: Any,
    batches: Callable[[int, int], Any],
    workdir: Path,
    mesh: Mesh,
    loop: LoopConfig,
    optimizer: OptimizerConfig,
    look: Look | None = None,
    mirror: Mirror | None = None,
) -> Any:
    """Trains a stage to its last step, from its newest checkpoint if any; the trained subtrees.

    Args:
      name: of the stage; its files go to `workdir/name`.
      frozen: what the loss reads besides, subtrees and "text".
      batches: (first step, number of steps) -> generator of numpy batches, one a step, the same
        for the same step whenever asked.
      look: asked every `loop.eval_every` steps, on all hosts together.
      mirror: told of the scalars besides.

    Raises:
      NonFiniteLossError: naming the step, the images and the last checkpoint.
      CheckpointError: for a checkpoint of another architecture, or one that cannot be written.
      KeyboardInterrupt: for one while training, after saving what was begun, saying what is saved;
        and for SIGTERM in a block of `stopping.catching_sigterm`, after saving the state.
    """
    labels = label_params(params, stage.rules)
    transform = make_optimizer(optimizer, loop.steps, labels)
    checkpoints = StageCheckpoints(workdir, name, keep=loop.keep)
    abstract = jax.eval_shape(lambda p: TrainState.create(p, transform), params)
    resumed = checkpoints.latest_step()
    print_parameters(name, params, frozen, labels, resumed)
    if resumed is None:
        params = jax.device_put(params, split_by_rule(params, mesh))
        # Copied: the step donates its input, and the caller may still hold these arrays.
        make = jax.jit(
            lambda p: TrainState.create(p, transform), out_shardings=split_by_rule(abstract, mesh)
        )
        state = make(jax.tree.map(lambda x: x.copy(), params))
    else:
        state = checkpoints.restore(abstract, mesh)
    start = int(state.step)
    if start >= loop.steps:
        with checkpoints:
            if resumed is None:  # a stage in closed form
                checkpoints.save(state, start)
        print(f"{name}: finished at step {start}, nothing to train.")
        return state.params

    frozen = jax.device_put(frozen, split_by_rule(frozen, mesh))
    skips = loop.max_skips > 0
    options = {"skips": skips, "fusion_mb": loop.fusion_mb}
    step_fn = jit_train_step(stage.loss, transform, loop.seed, mesh, abstract, **options)
    writer = MetricWriter(as_path(workdir) / name, tensorboard=loop.tensorboard, mirror=mirror)
    looks = _Looks(checkpoints, loop.max_skips)
    progress: Progress | None = None
    iterator = watched(batches(start, loop.steps - start), f"Stage {name}", start)
    tracer = StepTracer(as_path(workdir) / name / FOLDER, loop.profile)
    awaited = Awaited(iterator)
    # Left in reverse: nothing is computed any more when pending saves are waited for.
    with (
        checkpoints,
        closing(writer),
        closing(iterator),
        closing(awaited),
        closing(tracer),
        stopping.between_steps(checkpoints.what_is_saved),
    ):
        done = start
        for step, batch in enumerate(awaited, start=start):
            if PROGRESS in stage.batch_fields:
                rows = len(next(iter(batch.values())))
                batch = {**batch, PROGRESS: np.full(rows, step / loop.steps, np.float32)}
            inputs = shard_batch({k: batch[k] for k in stage.batch_fields}, mesh)
            tracer.before(step - start)
            with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation(name, step_num=step):
                if progress is None:
                    best = seconds_at_peak(step_fn, (state, frozen, inputs), mesh.devices.flat)
                    if jax.process_count() > 1:  # which need not end compiling together
                        step_fn = step_fn.lower(state, frozen, inputs).compile()
                        stopping.meet_hosts(f"compiled {name}")
                state, metrics = step_fn(state, frozen, inputs)
                if progress is None:  # from here on: the program is compiled
                    rows = len(next(iter(inputs.values())))
                    progress = Progress(name, start, loop.steps, rows, unit="images", at_peak=best)
                    awaited.take_seconds()
            tracer.after(step - start, metrics)
            awaited.works_on(metrics)
            looks.pending.append((step, batch.get("image_id"), metrics))
            done = step + 1
            preempted = stopping.reached()
            ends = preempted or done == loop.steps
            saving = ends or (loop.save_every and done % loop.save_every == 0)
            if saving or done % loop.log_every == 0:
                means = looks.means()
                shown = {key: means[key] for key in ("loss", "accuracy") if key in means}
                speeds = progress.report(done, shown | means, waited=awaited.take_seconds())
                writer.scalars(done, means | speeds)
            scores: Mapping[str, float] = {}
            if look and done % loop.eval_every == 0 and not preempted:
                began = time.monotonic()
                try:
                    with stopping.elsewhere():
                        scores = look(done, state.params, writer)
                except KeyboardInterrupt:
                    if jax.process_count() == 1:  # of several, others may be past it
                        checkpoints.save(state, done)
                    raise
                progress.pause(time.monotonic() - began)
            if saving:
                checkpoints.save(state, done, scores.get("hpq"))
            if ends:
                break
        else:  # the next batch did not come, and SIGTERM did
            looks.means()
            if done > start:
                checkpoints.save(state, done)
    return state.params


class _Looks:
    """Metrics of the steps since the last look, left on the device; (step, image ids, metrics)."""

    def __init__(self, checkpoints: StageCheckpoints, max_skips: int):
        self.pending: list[tuple[int, Any, Any]] = []
        self._checkpoints, self._max_skips = checkpoints, max_skips
        self._skipped = self._in_a_row = 0

    def means(self) -> dict[str, float]:
        """Of the pending; raises on the first that is not finite and may not be left out."""
        rows = jax.device_get([metrics for _, _, metrics in self.pending])
        for (step, image_ids, _), row in zip(self.pending, rows, strict=True):
            skips = row.get("skipped", 0)
            self._skipped += int(skips)
            self._in_a_row = self._in_a_row + 1 if skips else 0
            bad = [key for key, value in row.items() if not np.isfinite(value)]
            if self._in_a_row > self._max_skips or (bad and not skips):
                raise NonFiniteLossError(self._sentence(step, image_ids, bad))
        self.pending.clear()
        sound = [row for row in rows if not row.pop("skipped", 0)]
        means = {key: float(np.mean([row[key] for row in sound])) for key in (sound or [{}])[0]}
        return means | ({"skipped": self._skipped} if self._skipped else {})

    def _sentence(self, step: int, image_ids: Any, bad: Sequence[str]) -> str:
        good, path = self._checkpoints.latest_step(), self._checkpoints.path
        where = f"step {good} in {path}" if good is not None else "none"
        ids = "unknown" if image_ids is None else ", ".join(str(i) for i in image_ids)
        row = f", {self._in_a_row} such steps in a row" * (self._in_a_row > 1)
        return (
            f"Stage {self._checkpoints.stage!r}: {', '.join(bad)} is not finite at step {step} "
            f"(images {ids}){row}; the last good checkpoint is {where}."
        )


def print_parameters(name: str, params: Any, frozen: Any, labels: Any, resumed: int | None) -> None:
    """Say which parameters a stage takes, trains and leaves frozen, by subtree and rule."""
    counts: dict[tuple[str, str], int] = {}
    for (path, leaf), label in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(labels), strict=True
    ):
        key = (path_name(path).split("/")[0], label)
        counts[key] = counts.get(key, 0) + leaf.size
    origin = "starts" if resumed is None else f"resumes at step {resumed}"
    print(f"Stage {name} {origin}")
    for (subtree, label), count in sorted(counts.items()):
        verb = "  frozen " if label == FROZEN else "  trained"
        print(f"{verb} {subtree:<10} {count:>12,} parameters  {'' if label == FROZEN else label}")
    for subtree, tree in sorted(frozen.items()):
        count = sum(x.size for x in jax.tree.leaves(tree))
        what = "embeddings" if subtree == TEXT else "parameters"
        print(f"  taken   {subtree:<10} {count:>12,} {what}, frozen")
