"""A json file that holds one long list, written entry by entry."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Self

import jax

from concat_jax.core.hosts import wait_for_hosts


class StreamedJson:
    """Base of writers whose json appears when it is complete. A context manager.

    Entries are streamed to `<json_path>.partial`, so memory does not grow with their number. The
    file gets its final name when the block ends and is removed when it raises: a json that exists
    is complete. Several hosts with one such writer each, of one path that all of them see, make one
    json: each streams entries of its own, and the first one puts them together.

    Attributes:
      json_path: of the json.
    """

    def __init__(self, json_path: str | os.PathLike, start: str = "["):
        """Opens the partial json; its folder is made.

        Args:
          json_path: of the json.
          start: of the file, up to and with the list's opening bracket.
        """
        self.json_path = pathlib.Path(json_path)
        self._host = jax.process_index()
        self._partial = self._partial_of(self._host)
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("w", encoding="utf-8")
        self._is_empty = True
        if self._host == 0:
            self._file.write(start)

    def _partial_of(self, host: int) -> pathlib.Path:
        return self.json_path.with_name(f"{self.json_path.name}.partial{host or ''}")

    def _append(self, entry: Mapping) -> None:
        self._file.write(("\n" if self._is_empty else ",\n") + json.dumps(entry))
        self._is_empty = False

    def _ending(self) -> str:
        """What follows the list's closing bracket."""
        return ""

    def close(self) -> pathlib.Path:
        """Finishes the json, gives it its final name and returns its path.

        Of several hosts, each must call it and waits until the json is there.
        """
        if self._host:
            self._file.close()
        wait_for_hosts(f"entries of {self.json_path}")
        if self._host == 0:
            for host in range(1, jax.process_count()):
                self._take_over(self._partial_of(host))
            self._file.write(f"\n]{self._ending()}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.json_path)
        wait_for_hosts(f"{self.json_path} is there")
        return self.json_path

    def _take_over(self, entries: pathlib.Path) -> None:
        if entries.stat().st_size:
            self._file.write("" if self._is_empty else ",")
            self._is_empty = False
            with entries.open(encoding="utf-8") as file:
                shutil.copyfileobj(file, self._file)
        entries.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self._file.close()
            self._partial.unlink()
