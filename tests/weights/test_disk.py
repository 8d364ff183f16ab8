"""Folders that a model is written to: what is replaced, and what is left alone."""

import os
from pathlib import Path

import pytest

from concat_jax.weights.disk import CONTENTS, check_apart, check_destination, new_folder


def fill(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("old")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("names", CONTENTS)
def test_a_folder_of_ours_is_replaced(names, tmp_path):
    fill(tmp_path / "model", names)
    with new_folder(tmp_path / "model", {}, overwrite=True) as new:
        (new / "model.json").write_text("new")
        (new / "params").mkdir()
    assert names_in(tmp_path / "model") == ["model.json", "params"]
    assert (tmp_path / "model" / "model.json").read_text() == "new"
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "names, fault",
    [
        (("config.json", "a.py"), "holds a.py, which is no part of a model"),
        (("model.json", "classes.txt"), "holds classes.txt, which is no part of a model"),
        (("config.json", "model.json", "params"), "holds config.json, which is no part"),
        (("config.json",), "holds config.json, which is no part"),  # of whatever program
        (("notes.txt",), r"holds no model \(model.json or config.json or export.json\)"),
    ],
)
def test_a_folder_that_holds_anything_else_is_left_alone(names, fault, tmp_path):
    fill(tmp_path, names)
    with pytest.raises(ValueError, match=fault), new_folder(tmp_path, {}, overwrite=True):
        pass
    assert names_in(tmp_path) == sorted(names)


def test_a_folder_of_a_mark_s_name_marks_nothing(tmp_path):
    (tmp_path / "model.json").mkdir()
    (tmp_path / "model.json" / "precious").touch()
    with pytest.raises(ValueError, match="holds no model"):
        check_destination(tmp_path, overwrite=True)


def test_an_empty_folder_is_filled_where_it_stands(tmp_path):
    """It may be a mount, which cannot be renamed, or the only one that may be written to."""
    before = os.stat(tmp_path).st_ino
    (tmp_path / ".x.1f.part").mkdir()  # of a run that was killed
    (tmp_path / "lost+found").mkdir()
    with new_folder(tmp_path, {}) as new:
        assert new.parent == tmp_path
        (new / "model.json").touch()
    assert os.stat(tmp_path).st_ino == before
    assert names_in(tmp_path) == [".x.1f.part", "lost+found", "model.json"]
    with pytest.raises(ValueError, match="is there already"):
        check_destination(tmp_path, overwrite=False)


def test_what_fails_on_the_way_leaves_the_old_one(tmp_path):
    fill(tmp_path, ["model.json", "params"])
    fault = pytest.raises(ValueError, match="^a fault$")
    with fault, new_folder(tmp_path, {}, overwrite=True) as new:
        (new / "model.json").write_text("new")
        raise ValueError("a fault")
    assert names_in(tmp_path) == ["model.json", "params"]
    assert (tmp_path / "model.json").read_text() == "old"


@pytest.mark.parametrize("is_there", [False, True])
def test_what_fails_at_the_last_step_leaves_the_old_one(is_there, tmp_path, monkeypatch):
    """As Ctrl-C between two renames does."""
    folder = tmp_path / "model"
    fill(folder, ["model.json", "params"] * is_there)
    rename, count = Path.rename, 0

    def interrupted(self, target):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.raises(KeyboardInterrupt), new_folder(folder, {}, overwrite=True) as new:
        fill(new, ["model.json", "params"])
        monkeypatch.setattr(Path, "rename", interrupted)
    assert names_in(folder) == ["model.json", "params"] * is_there
    assert not is_there or (folder / "model.json").read_text() == "old"
    assert names_in(tmp_path) == ["model"]


def test_a_folder_that_may_not_be_made_is_called_by_its_own_name(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    sentence = f"^{tmp_path}/new cannot be written: Permission denied; nothing of it was kept.$"
    with pytest.raises(OSError, match=sentence), new_folder(tmp_path / "new", {}):
        pass


def test_a_destination_does_not_take_what_is_read_with_it(tmp_path, monkeypatch):
    (tmp_path / "classes.txt").touch()
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, tmp_path / "classes.txt", "classes.txt"):
        with pytest.raises(ValueError, match=f"holds {source}, which would be lost"):
            check_apart(str(tmp_path), "", str(source))
    check_apart(str(tmp_path / "new"), "", str(tmp_path), "ade20k_150")
    check_apart(".", "", "ade20k_150", "cat, dog; sky")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_apart(str(tmp_path / "loop"), str(tmp_path / "a"))
