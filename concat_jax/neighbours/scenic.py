"""Scenic (github.com/google-research/scenic), where it is installed: found, and its modules opened.

The package of that name on the index is the language Scenic, which has nothing to do with it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

INSTALL = "pip install --no-deps -r requirements-scenic.txt"


def scenic_folder() -> Path:
    """Where google-research/scenic lies; ValueError with the command if it is not installed."""
    spec = importlib.util.find_spec("scenic")
    if spec is None:
        raise ValueError(f"Scenic is not installed: {INSTALL}.")
    for folder in map(Path, spec.submodule_search_locations or ()):
        if (folder / "model_lib").is_dir():
            return folder
    raise ValueError(
        f"`import scenic` finds {spec.origin}, which is another package of that name (the index's "
        f"is a language for scenarios): pip uninstall --yes scenic, then {INSTALL}."
    )


def scenic_module(name: str) -> Any:
    """The module `scenic.NAME`; ValueError, with what it lacks, if it cannot be imported."""
    scenic_folder()
    try:
        return importlib.import_module(f"scenic.{name}")
    except ImportError as error:
        raise ValueError(
            f"scenic.{name} cannot be imported beside JAX {jax.__version__}: {error} "
            f"({INSTALL} brings what can be; docs/scenic.md says what cannot)."
        ) from error


def scenic_file(name: str) -> Any:
    """The module `scenic.NAME`, without what its package imports before it.

    Scenic's matchers come with the one by Sinkhorn, whose OTT needs a JAX of 2023.
    """
    package, _, _ = f"scenic.{name}".rpartition(".")
    if package in sys.modules:
        return scenic_module(name)
    with _bare_package(package, scenic_folder().joinpath(*package.split(".")[1:])):
        return scenic_module(name)


@contextlib.contextmanager
def _bare_package(name: str, folder: Path) -> Iterator[None]:
    """For a while a package is its folder alone; afterwards nothing of it counts as imported."""
    importlib.import_module(name.rpartition(".")[0])
    bare = types.ModuleType(name)
    bare.__path__ = [str(folder)]
    sys.modules[name] = bare
    try:
        yield
    finally:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
