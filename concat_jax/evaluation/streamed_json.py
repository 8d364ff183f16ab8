"""A json file that holds one long list, written entry by entry."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Self


class StreamedJson:
    """Base of writers whose json appears when it is complete. A context manager.

    Entries are streamed to `<json_path>.partial`, so memory does not grow with their number. The
    file gets its final name when the block ends and is removed when it raises: a json that exists
    is complete.

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
        self._partial = self.json_path.with_name(self.json_path.name + ".partial")
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("w", encoding="utf-8")
        self._file.write(start)
        self._is_empty = True

    def _append(self, entry: Mapping) -> None:
        self._file.write(("\n" if self._is_empty else ",\n") + json.dumps(entry))
        self._is_empty = False

    def _ending(self) -> str:
        """What follows the list's closing bracket."""
        return ""

    def close(self) -> pathlib.Path:
        """Finishes the json, gives it its final name and returns its path."""
        self._file.write(f"\n]{self._ending()}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.json_path)
        return self.json_path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self._file.close()
            self._partial.unlink()
