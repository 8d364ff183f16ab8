"""A bucket on this machine: an emulator of Cloud Storage, and the environment that leads to it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "RequestHandler", _with_generations(emulator.RequestHandler))
        patch.setattr("socketserver.TCPServer.request_queue_size", 128)
        with emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


def _with_generations(handler: type) -> type:
    """What TensorStore builds on and the emulator lacks: who read an old version does not write.

    https://cloud.google.com/storage/docs/request-preconditions
    """

    class Handler(handler):
        def _generation(self) -> str:
            """Of the object that is asked for; "0" where there is none."""
            url = urlsplit(self.path)
            found = re.search(r"/b/([^/]+)/o(?:/(.*))?$", url.path)
            name = found[2] or parse_qs(url.query).get("name", [""])[0]
            with contextlib.suppress(Exception):  # the emulator's own, for what is not there
                return self.storage.get_file_obj(found[1], unquote(name))["generation"]
            return "0"

        def _is_refused(self, condition: str, code: int) -> bool:
            wanted = parse_qs(urlsplit(self.path).query).get(condition)
            if not wanted or (wanted[0] == self._generation()) == (code == 412):
                return False
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

        def end_headers(self) -> None:
            if "alt=media" in self.path:
                self.send_header("X-Goog-Generation", self._generation())
            super().end_headers()

        def do_GET(self) -> Any:
            return self._is_refused("ifGenerationNotMatch", 304) or super().do_GET()

        def do_POST(self) -> Any:
            return self._is_refused("ifGenerationMatch", 412) or super().do_POST()

        def do_DELETE(self) -> Any:
            return self._is_refused("ifGenerationMatch", 412) or super().do_DELETE()

    return Handler
