"""Parameters and buffers of TorchScript archives, whose programs are neither run nor looked at.

The format of `torch.jit.save`, in which OpenAI published CLIP: a zip archive of source code and of
one pickle, the tree of modules with their tensors. The pickle is read as any other pickle of
weights (see `restricted_pickle.py`); the classes that it names become holders of attributes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from concat_jax.weights.files.restricted_pickle import ScriptModule, as_array
from concat_jax.weights.files.torch_files import ZIP_START, TorchZip

# Of the attributes of all modules, counted once a path: far more than any network has, and few
# enough that modules which share modules which share modules come to an end.
MAX_ATTRIBUTES = 200_000


def is_torch_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a TorchScript archive; False for anything broken or of another format."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == ZIP_START and TorchZip(file).is_script
    except (ValueError, OSError):
        return False


def read_torch_script(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Tensors of a TorchScript archive, by the names of the module's `state_dict()`.

    Args:
        path: a file of `torch.jit.save`.

    Returns:
        name -> array in the file's own types. Tensors that are no parameters (buffers, plain
        attributes) are among them, since the archive does not tell them apart.

    Raises:
        ValueError: the file is broken, holds no tensors, or its pickle names something that neither
            weights nor TorchScript have need of; the sentence names the file.
    """
    arrays: dict[str, np.ndarray] = {}
    count = 0

    def visit(module: ScriptModule, prefix: str, above: tuple[int, ...]) -> None:
        nonlocal count
        if id(module) in above:
            raise ValueError(f"its module {prefix[:-1]} holds itself")
        for name, value in module.attributes.items():
            count += 1
            if count > MAX_ATTRIBUTES:
                raise ValueError(f"its modules have over {MAX_ATTRIBUTES:,} attributes")
            if isinstance(value, ScriptModule):
                visit(value, f"{prefix}{name}.", (*above, id(module)))
            elif (array := as_array(value)) is not None:
                arrays[prefix + name] = array

    try:
        with Path(path).open("rb") as file:
            root = TorchZip(file).content()
            if not isinstance(root, ScriptModule):
                raise ValueError("it holds no module")
            visit(root, "", ())
            if not arrays:
                raise ValueError("its modules hold no tensors")
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as weights: its modules nest too deep.") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}.") from error
    return arrays
