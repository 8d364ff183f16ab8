"""Orbax checkpoints of a stage, and the handing on of parameter subtrees between stages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path
from jax.sharding import Mesh

from concat_jax.core.files import (
    as_path,
    in_bucket,
    make_folder,
    read_json,
    remove_folder,
    system_reason,
    write_json,
)
from concat_jax.core.hosts import wait_for_hosts
from concat_jax.training.checksums import damage, write_checksums
from concat_jax.training.optimizer import path_name
from concat_jax.training.sharding import split_by_rule
from concat_jax.training.state import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another architecture, or cannot be written."""


PARAMS, OPTIMIZER = "params", "optimizer"
_SET_ASIDE = "damaged"
_COMMITTED = "commit_success.txt"  # Orbax's last file of a checkpoint in a bucket
_passed_over: set[tuple[Path, str]] = set()


def is_saved(workdir: Path, stage: str, step: int) -> bool:
    """Whether a stage's parameters of a step are there and undamaged."""
    return _is_whole(as_path(workdir).absolute() / stage / "checkpoints" / str(step), (PARAMS,))


class StageCheckpoints:
    """Checkpoints of one stage in `workdir/stage/checkpoints`, to be closed: a `with` block does.

    Parameters and optimizer state are separate items, so that a later stage, or a user, reads
    the parameters alone. A damaged checkpoint is passed over with a note, and moved to
    `workdir/stage/damaged` when the next one is saved; none is deleted.
    """

    def __init__(self, workdir: Path, stage: str, *, keep: int = 2):
        """Checkpoints of a stage of the workdir of a run: the last `keep`, and the best by hPQ.

        What is read is the last all the same: the best would be a choice by labels of unseen
        classes.
        """
        self.stage = stage
        self.path = as_path(workdir).absolute() / stage / "checkpoints"
        self._keep = keep
        self._saving: int | None = None
        self._hpq_path, self._hpq = self.path.parent / "hpq.json", {}

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's; its folder is made."""
        with contextlib.suppress(ValueError, AttributeError):  # none, or damaged: none is best then
            self._hpq |= {int(k): float(v) for k, v in read_json(self._hpq_path).items()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(self._keep, self._hpq),
            create=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(
            self.path,
            options=options,
            # Named handlers: a fresh process can then read the metadata before it restores.
            item_handlers={
                PARAMS: ocp.PyTreeCheckpointHandler(),
                OPTIMIZER: ocp.PyTreeCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, step: int, hpq: float | None = None) -> None:
        """Save asynchronously; an undamaged step that exists is left alone.

        Of the steps with an `hpq` the best is kept beside the last ones.

        Raises CheckpointError if this one, or the one before, cannot be written.
        """
        manager = self.manager
        if self._saving is None:
            self._make_room()
        with self._writing():
            manager.wait_until_finished()
            if step in manager.all_steps():
                return
            self._saving = step
            if hpq is not None and np.isfinite(hpq):
                self._hpq[step] = float(hpq)
                if jax.process_index() == 0:
                    write_json(self._hpq_path, self._hpq)
            optimizer = {"step": state.step, "opt_state": state.opt_state}
            items = {PARAMS: state.params, OPTIMIZER: optimizer}
            items = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
            manager.save(step, args=ocp.args.Composite(**items), force=True)

    def latest_step(self) -> int | None:
        """Step of the newest undamaged checkpoint, None without any.

        Raises CheckpointError if all are damaged: to start anew is not for a program to choose.
        """
        if self._saving is not None:
            with self._writing():
                self.manager.wait_until_finished()
        newest = self._newest()
        if newest is None and (steps := self._steps()):
            raise CheckpointError(
                f"All checkpoints of stage {self.stage!r} in {self.path} are damaged (steps "
                f"{', '.join(map(str, steps))}); move that folder elsewhere, and the same command "
                "trains the stage from its start."
            )
        return newest

    def restore(self, abstract: TrainState, mesh: Mesh) -> TrainState:
        """The newest state, on a mesh as `split_by_rule` says, whatever mesh saved it.

        Raises CheckpointError if it is of another architecture.
        """
        step = self.latest_step()
        self._check(step, abstract.params)
        target = _placed(abstract, mesh)
        optimizer = {"step": target.step, "opt_state": target.opt_state}
        restored = self._restore(
            step,
            "has the optimizer state of another optimizer config; use another workdir or restore "
            "the config it was made with",
            params=_restore_args(target.params),
            optimizer=_restore_args(optimizer),
        )
        return TrainState(params=restored["params"], **restored["optimizer"])

    def restore_params(self, abstract: Any, mesh: Mesh, *, step: int | None = None) -> Any:
        """Subtrees of the parameters of a step, by default of the newest; placed as by `restore`.

        Raises CheckpointError if there is none, or it is damaged or of another architecture.
        """
        steps = self._steps() if step is None else {step}.intersection(self._steps())
        if not steps:
            raise CheckpointError(
                f"{self.path} holds no checkpoint; run stage {self.stage!r} first."
            )
        step = max(steps)
        # An older one is no substitute: what other stages learnt fits the last.
        if wrong := damage(self.path / str(step), (PARAMS,)):
            raise CheckpointError(
                f"The checkpoint {self.path / str(step)} is damaged: {wrong}; train stage "
                f"{self.stage!r} again with the command that trained it, which goes on from "
                f"step {self.latest_step()}."
            )
        self._check(step, abstract)
        target = _placed(abstract, mesh)
        restored = self._restore(
            step,
            f"cannot be read; run stage {self.stage!r} again in another workdir",
            params=_restore_args(target, partial_restore=True),
        )
        return restored["params"]

    def _restore(self, step: int, otherwise: str, **items: ocp.args.PyTreeRestore) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"The checkpoint {self.path / str(step)} {otherwise}.") from error

    def _steps(self) -> list[int]:
        """Of all checkpoints, damaged ones too."""
        return sorted(int(path.name) for path in self._folders() if _is_committed(path))

    def _folders(self) -> list[Path]:
        """Called as checkpoints are; in a bucket it may be the half of one."""
        if not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if path.name.isdecimal()]

    def _newest(self) -> int | None:
        return next(filter(self._is_whole, reversed(self._steps())), None)

    def _is_whole(self, step: int) -> bool:
        return _is_whole(self.path / str(step), (PARAMS, OPTIMIZER))

    def _check(self, step: int, abstract: Any) -> None:
        """Name the first parameters of `abstract` that the checkpoint lacks or has otherwise."""
        with ocp.PyTreeCheckpointer() as reader:
            saved = reader.metadata(self.path / str(step) / PARAMS).item_metadata
        theirs, ours = _shapes(getattr(saved, "tree", saved)), _shapes(abstract)
        problems = []
        for name, shape in ours.items():
            if (found := theirs.get(name)) is None:
                problems.append(f"{name} is missing")
            elif found != shape:
                problems.append(f"{name} is {list(found)}, the config wants {list(shape)}")
        problems += [
            f"{name} is not in the config's model"
            for name in theirs
            if name.split("/")[0] in abstract and name not in ours
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"The checkpoint of stage {self.stage!r} at step {step} in {self.path} is of "
                f"another architecture: {'; '.join(problems[:3])}{more}; use the config it was "
                "made with, or another workdir."
            )

    def _make_room(self) -> None:
        """Take out of the way what a new save would meet: damaged steps, and halves of a kill."""
        if jax.process_index() == 0:
            self._remove_halves()
            for step in self._steps():
                if not self._is_whole(step):
                    aside = self.path.parent / _SET_ASIDE / f"{step}_{time.time_ns()}"
                    make_folder(aside.parent)
                    (self.path / str(step)).rename(aside)
                    print(f"The damaged checkpoint of step {step} is kept in {aside}.")
        wait_for_hosts(f"{self.path} has room")
        self.manager.reload()

    def _halves(self) -> list[Path]:
        if in_bucket(self.path):
            return [path for path in self._folders() if not _is_committed(path)]
        return sorted(self.path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))

    def _remove_halves(self) -> None:
        for half in self._halves():
            remove_folder(half)

    def _seal(self) -> None:
        # Orbax calls this when everything is written, before the folder gets its name.
        if jax.process_index() == 0:
            for half in self._halves():
                write_checksums(half)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax's errors, which come late and from its threads, as one sentence."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            step, self._saving = self._saving, None
            del self.manager  # it would raise the error again
            with contextlib.suppress(Exception):  # of a bucket out of reach; the next save does it
                if jax.process_index() == 0:
                    self._remove_halves()
            raise CheckpointError(
                f"The checkpoint {self.path / str(step)} could not be written "
                f"({system_reason(error)}); {self.what_is_saved()}"
            ) from error

    def what_is_saved(self) -> str:
        """The newest step, as the second half of a sentence; a save that goes on does not count."""
        try:
            step = self._newest()
        except Exception:
            if not in_bucket(self.path):
                raise
            return "what is saved is out of reach now, and the same command goes on from there."
        if step is None:
            return "no step is saved, and the same command starts the stage again."
        return f"step {step} is saved, and the same command goes on from there."

    def close(self) -> None:
        """Wait for pending saves; CheckpointError if one cannot be written."""
        if "manager" in self.__dict__:
            with self._writing():
                self.manager.wait_until_finished()
            self.manager.close()

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """A KeyboardInterrupt within the block is raised again, saying what is saved."""
        try:
            self.close()
        except CheckpointError:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"Stage {self.stage!r} was stopped; {self.what_is_saved()}"
            ) from error


@dataclasses.dataclass
class _LastAndBest:
    """Orbax's policy of what is kept: the last steps, and of those with an hPQ the best.

    Orbax can do this by itself, but does not start where one of its files of scores is damaged.
    """

    keep: int
    hpq: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(self.hpq.keys() & {*steps}, key=self.hpq.get, default=None)
        return [step in steps[-self.keep :] or step == best for step in steps]


def _is_committed(folder: Path) -> bool:
    """Whether a folder is not the half of a checkpoint; on a disk that has another name."""
    return (folder / _COMMITTED).is_file() if in_bucket(folder) else folder.is_dir()


def _is_whole(folder: Path, items: Sequence[str]) -> bool:
    if not _is_committed(folder):
        return False
    wrong = damage(folder, items)
    if wrong and (folder, wrong) not in _passed_over:
        _passed_over.add((folder, wrong))
        print(f"The checkpoint {folder} is damaged and passed over: {wrong}.", flush=True)
    return not wrong


def _restore_args(target: Any, **options):
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args, **options)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _placed(abstract: Any, mesh: Mesh) -> Any:
    shardings = split_by_rule(abstract, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
