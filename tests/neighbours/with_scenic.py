"""Tests beside google-research/scenic: skipped with the sentence that says what is missing."""

import pytest

from concat_jax.neighbours.scenic import scenic_folder, scenic_module


def need_scenic(*modules):
    """Skips the test or file unless Scenic is installed and these of its modules are importable."""
    try:
        scenic_folder()
        return [scenic_module(module) for module in modules]
    except ValueError as error:
        pytest.skip(str(error), allow_module_level=True)
