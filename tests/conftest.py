"""Shared fixtures: eight fake CPU devices, and the development data where it is at hand."""

import os
import pathlib

import jax
import pytest

# Sharding tests need several devices; every other test uses the first one and does not notice.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder with real COCO panoptic images, golden cases and vocabularies.

    Set CONCAT_JAX_TEST_DATA to point elsewhere than `../shared/data` beside the repository.
    """
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("CONCAT_JAX_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"development data is not at {path}; set CONCAT_JAX_TEST_DATA to its folder")
    return path
