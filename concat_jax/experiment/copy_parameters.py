"""Start a part of one network from a part of another."""

from __future__ import annotations

import flax
import jax

from concat_jax.models.networks import Params


def copy_parameters(params: Params, target: str, taken: Params, source: str) -> Params:
    """A new tree with what "subtree/module" `source` of `taken` has at the places of `target`.

    Raises ValueError if a part does not exist or a parameter has another shape.
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
    print(f"{target}: {len(shared)} of {len(old)} parameters start from {source}.")
    merged = flax.traverse_util.flatten_dict(params, sep="/")
    merged |= {f"{target}/{name}": new[name] for name in shared}
    return flax.traverse_util.unflatten_dict(merged, sep="/")
