"""Orbax checkpoints of a stage, and the handing on of parameter subtrees between stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from concat_jax.training.optimizer import path_name
from concat_jax.training.state import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing, unfinished or of another architecture."""


class StageCheckpoints:
    """Checkpoints of one stage in `workdir/stage/checkpoints`.

    Parameters and optimizer state are separate items, so that a later stage, or a user, reads
    the parameters alone.
    """

    def __init__(self, workdir: Path, stage: str, *, keep: int = 2):
        """Args:
        workdir: of the whole run.
        stage: name of the stage.
        keep: checkpoints kept.
        """
        self.stage = stage
        self.path = Path(workdir).absolute() / stage / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(
            self.path,
            options=options,
            # Named handlers: a fresh process can then read the metadata before it restores.
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(),
                "optimizer": ocp.PyTreeCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, step: int) -> None:
        """Save asynchronously; a step that exists is left alone."""
        if step not in self.manager.all_steps():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(state.params),
                    optimizer=ocp.args.PyTreeSave(
                        {"step": state.step, "opt_state": state.opt_state}
                    ),
                ),
                force=True,
            )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None without one."""
        return self.manager.latest_step()

    def restore(self, abstract: TrainState, sharding: Sharding) -> TrainState:
        """The newest state, placed as `sharding` says, whatever devices saved it.

        Args:
          abstract: shapes and types of the state.
          sharding: of every leaf.

        Raises:
          CheckpointError: if the checkpoint is of another architecture.
        """
        step = self.latest_step()
        self._check(step, abstract.params)
        target = _placed(abstract, sharding)
        optimizer = {"step": target.step, "opt_state": target.opt_state}
        try:
            restored = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_restore_args(target.params), optimizer=_restore_args(optimizer)
                ),
            )
        except ValueError as error:
            raise CheckpointError(
                f"The optimizer state of step {step} in {self.path} is that of another optimizer "
                f"config; use another workdir or restore the config it was made with."
            ) from error
        return TrainState(params=restored["params"], **restored["optimizer"])

    def restore_params(self, names: Sequence[str], abstract: Any, sharding: Sharding) -> Any:
        """Subtrees of the newest parameters.

        Args:
          names: of the subtrees.
          abstract: dict of their shapes and types.
          sharding: of every leaf.

        Raises:
          CheckpointError: if there is none, or it is of another architecture.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.path} holds no checkpoint; run stage {self.stage!r} first."
            )
        wanted = {name: abstract[name] for name in names}
        self._check(step, wanted)
        target = _placed(wanted, sharding)
        restored = self.manager.restore(
            step, args=ocp.args.Composite(params=_restore_args(target, partial_restore=True))
        )
        return restored["params"]

    def _check(self, step: int, abstract: Any) -> None:
        """Name the first parameters of `abstract` that the checkpoint lacks or has otherwise."""
        saved = self.manager.item_metadata(step)["params"]
        saved = getattr(saved, "tree", saved)
        shapes = {path_name(p): tuple(x.shape) for p, x in _leaves(saved)}
        problems = []
        for path, leaf in _leaves(abstract):
            name, shape = path_name(path), tuple(leaf.shape)
            if name not in shapes:
                problems.append(f"{name} is missing")
            elif shapes[name] != shape:
                problems.append(f"{name} is {list(shapes[name])}, the config wants {list(shape)}")
        subtrees = set(abstract)
        wanted = {path_name(path) for path, _ in _leaves(abstract)}
        problems += [
            f"{name} is not in the config's model"
            for name in shapes
            if name.split("/")[0] in subtrees and name not in wanted
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"The checkpoint of stage {self.stage!r} at step {step} in {self.path} is of "
                f"another architecture: {'; '.join(problems[:3])}{more}; use the config it was "
                "made with, or another workdir."
            )

    def close(self) -> None:
        """Wait for pending saves."""
        self.manager.wait_until_finished()
        self.manager.close()


def _restore_args(target: Any, **options):
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args, **options)


def _leaves(tree: Any):
    return jax.tree_util.tree_leaves_with_path(tree)


def _placed(abstract: Any, sharding: Sharding) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
