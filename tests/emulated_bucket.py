"""A bucket on this machine: an emulator of Cloud Storage, and the environment that leads to it."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Iterator

import pytest

NAME = "gs://bucket"


@contextlib.contextmanager
def emulated_bucket() -> Iterator[dict[str, str]]:
    """Serves the bucket `NAME` and yields the environment in which a process finds it."""
    if importlib.util.find_spec("gcsfs") is None:  # to be imported by the package alone
        pytest.skip("needs what is not installed: pip install -r requirements-buckets.txt")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    with emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
        yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
