"""Start a part of one network from a part of another."""

from __future__ import annotations

import flax
import jax

from concat_jax.experiment.parameters import Parameters
from concat_jax.experiment.setup import Setup
from concat_jax.models.networks import Params
from concat_jax.stages.stage import INIT


def copy_parameters(params: Params, target: str, taken: Params, source: str) -> Params:
    """A new tree with what "subtree/module" `source` of `taken` has at the places of `target`.

    Raises ValueError if a part does not exist or a parameter has another shape.
    """
    old, new = _shared(params, target, taken, source)
    print(f"{target}: {len(new)} of {len(old)} parameters start from {source}.")
    merged = flax.traverse_util.flatten_dict(params, sep="/")
    merged |= {f"{target}/{name}": value for name, value in new.items()}
    return flax.traverse_util.unflatten_dict(merged, sep="/")


def check_copies(setup: Setup, parameters: Parameters, name: str) -> None:
    """Refuses a stage, by a ValueError, that is to copy what will not be there, or does not fit."""
    settings = setup.stages[name]

    def shapes(path: str, stage: str) -> Params:
        subtree = path.split("/")[0]
        given = (subtree,) if stage == INIT else stage and setup.make_stage(stage).trains
        return {subtree: parameters.abstract(subtree, stage)} if subtree in given else {}

    for target, source in settings.copies.items():
        *stages, part = source.split(":")
        giver = stages[0] if stages else settings.takes.get(part.split("/")[0], "")
        try:
            _shared(shapes(target, name), target, shapes(part, giver), part)
        except ValueError as error:
            raise ValueError(f"In config.train.{name}.copies: {error}") from error


def _shared(
    params: Params, target: str, taken: Params, source: str
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What lies at `target`, and what of it `source` gives, by name; ValueErrors as above.

    Arrays may be abstract.
    """

    def flat(tree: Params, prefix: str) -> dict[str, jax.Array]:
        leaves = flax.traverse_util.flatten_dict(tree, sep="/")
        part = {
            k.removeprefix(prefix + "/"): v for k, v in leaves.items() if k.startswith(prefix + "/")
        }
        if not part:
            raise ValueError(f"There are no parameters at {prefix!r} to start from or to fill.")
        return part

    old, new = flat(params, target), flat(taken, source)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        raise ValueError(
            f"{target} and {source} have no parameter in common, so nothing would be copied; the "
            "two must be of one architecture."
        )
    for name in shared:
        if old[name].shape != new[name].shape:
            raise ValueError(
                f"{target}/{name} has shape {old[name].shape} but {source}/{name} has "
                f"{new[name].shape}; the two must be of one architecture."
            )
    return old, {name: new[name] for name in shared}
