"""Files as torch.save writes them, in both of its formats."""

import pytest

torch = pytest.importorskip("torch")

FORMATS = ("zip", "legacy")


def save(content, path, fmt="zip"):
    torch.save(content, path, _use_new_zipfile_serialization=fmt == "zip")
    return path
