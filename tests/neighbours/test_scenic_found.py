"""Scenic is found, or one sentence says what is there instead and which command mends it."""

import sys

import pytest

from concat_jax import scenic_main
from concat_jax.neighbours.matchers import make_matcher
from concat_jax.neighbours.scenic import scenic_folder


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A folder that is looked through first; no Scenic was imported before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "scenic"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def make_package(folder, *inner):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('was imported')")
    for name in inner:
        (folder / name).mkdir()


def test_the_package_of_the_index_is_told_from_scenic_without_being_imported(path):
    make_package(path / "scenic", "domains", "syntax")
    with pytest.raises(ValueError) as raised:
        make_matcher("scenic.greedy")
    assert str(path / "scenic" / "__init__.py") in str(raised.value)
    assert "pip uninstall --yes scenic" in str(raised.value)
    assert "pip install --no-deps -r requirements-scenic.txt" in str(raised.value)


def test_the_launcher_ends_in_that_sentence(path):
    make_package(path / "scenic")
    with pytest.raises(SystemExit, match="Error: `import scenic` finds .*another package"):
        scenic_main.main()


def test_scenic_itself_is_found(path):
    make_package(path / "scenic", "model_lib", "projects")
    assert scenic_folder() == path / "scenic"


def test_where_there_is_none_the_sentence_says_how_to_get_it(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path)])
    with pytest.raises(ValueError, match="not installed: pip install --no-deps -r requirements-sc"):
        make_matcher("scenic.hungarian_tpu")


def test_a_misspelt_matcher_needs_no_scenic():
    with pytest.raises(ValueError, match=r"did you mean 'scenic\.greedy'"):
        make_matcher("scenic.gredy")
