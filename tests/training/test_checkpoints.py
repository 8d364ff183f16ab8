"""Damaged checkpoints are passed over and kept; what cannot be written is said in a sentence."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from concat_jax.training import checkpoints as module
from concat_jax.training.checkpoints import CheckpointError, StageCheckpoints, is_saved
from concat_jax.training.checksums import NAME, damage
from concat_jax.training.sharding import make_mesh, split_by_rule
from concat_jax.training.state import TrainState

SHAPE = (3, 5000)  # small arrays lie in the tree itself
ONE_DEVICE = make_mesh(devices=1)


def state(step):
    rng = np.random.default_rng(step)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=SHAPE), jnp.float32)}}
    made = TrainState.create(params, optax.adam(0.1))
    return TrainState(jnp.asarray(step), made.params, made.opt_state)


def abstract():
    return jax.eval_shape(lambda: state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    with StageCheckpoints(workdir, "con") as checkpoints:
        for step in (10, 20):
            checkpoints.save(state(step), step)
    return workdir


@pytest.fixture(params=["with sums", "as written before sums"])
def workdir(saved, tmp_path, request):
    copy = shutil.copytree(saved, tmp_path / "w")
    if request.param != "with sums":
        for path in copy.rglob(NAME):
            path.unlink()
    return copy


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def array_data(step):
    return largest(step / "params" / "ocdbt.process_0" / "d")


DAMAGES = {
    "an empty folder": (lambda step: empty(step), "params is missing"),
    "an item lost": (lambda step: shutil.rmtree(step / "params"), "params is missing"),
    "data lost": (lambda step: array_data(step).unlink(), "params"),
    "data cut": (lambda step: cut(array_data(step)), "params"),
    "_METADATA lost": (lambda step: (step / "params/_METADATA").unlink(), "params/_METADATA is mi"),
    "_METADATA cut": (lambda step: cut(step / "params/_METADATA"), "params/_METADATA "),
    "a name in _METADATA": (
        lambda step: (step / "params/_METADATA").write_text(
            (step / "params/_METADATA").read_text().replace("kernel", "kernal")
        ),
        "params/_METADATA ",
    ),
    "_METADATA empty": (lambda step: (step / "params/_METADATA").write_text("{}"), "params/_META"),
    "_sharding cut": (lambda step: cut(step / "params/_sharding"), "params/_sharding "),
    "manifest lost": (
        lambda step: (step / "params/manifest.ocdbt").unlink(),
        "params/manifest.ocdbt is missing",
    ),
    "manifest flipped": (
        lambda step: flip(step / "params/manifest.ocdbt"),
        "params/manifest.ocdbt ",
    ),
    "a tree flipped": (lambda step: flip(largest(step / "params/d")), "params/d/"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken(workdir, name, capsys):
    spoil, where = DAMAGES[name]
    step = workdir / "con/checkpoints/20"
    spoil(step)
    assert is_saved(workdir, "con", 10) and not is_saved(workdir, "con", 20)
    with StageCheckpoints(workdir, "con") as checkpoints:
        assert checkpoints.latest_step() == 10
        restored = checkpoints.restore(abstract(), ONE_DEVICE)
        jax.tree.map(np.testing.assert_array_equal, restored, state(10))
        refused = (
            rf"{step} is damaged: {where}.*; train stage 'con' again .* goes on from step 10\."
        )
        with pytest.raises(CheckpointError, match=refused):
            checkpoints.restore_params(abstract().params, ONE_DEVICE)
    printed = capsys.readouterr().out
    assert printed.startswith(f"The checkpoint {step} is damaged and passed over: {where}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("devices, fsdp", [(1, 1), (8, 1), (8, 4), (4, 2)])
def test_a_state_is_restored_onto_any_mesh(tmp_path, devices, fsdp):
    """Saved by eight devices, of which each holds an eighth."""
    eight, mesh = make_mesh(fsdp=8), make_mesh(devices, fsdp)
    given = jax.device_put(state(10), split_by_rule(abstract(), eight))
    with StageCheckpoints(tmp_path, "con") as checkpoints:
        checkpoints.save(given, 10)
        restored = checkpoints.restore(abstract(), mesh)
        params = checkpoints.restore_params(abstract().params, mesh)
    jax.tree.map(np.testing.assert_array_equal, restored, state(10))
    jax.tree.map(np.testing.assert_array_equal, params, state(10).params)
    for tree in (restored.params, restored.opt_state[0].mu, params):
        parts = tree["head"]["kernel"].addressable_shards
        assert len(parts) == devices
        assert {part.data.shape for part in parts} == {(3, SHAPE[1] // fsdp)}


def test_a_step_that_is_asked_for_is_read_whatever_is_newer(workdir, capsys):
    (workdir / "con" / "checkpoints" / "30").mkdir()
    with StageCheckpoints(workdir, "con") as checkpoints:
        params = checkpoints.restore_params(abstract().params, ONE_DEVICE, step=10)
        np.testing.assert_array_equal(params["head"]["kernel"], state(10).params["head"]["kernel"])
        with pytest.raises(CheckpointError, match="holds no checkpoint; run stage 'con' first"):
            checkpoints.restore_params(abstract().params, ONE_DEVICE, step=15)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("at", np.linspace(0.0, 0.99, 8))
def test_no_flipped_byte_becomes_another_number(saved, tmp_path, at):
    """What Orbax itself reads without a word: its array data carries no checksum."""
    workdir = shutil.copytree(saved, tmp_path / "w")
    flip(array_data(workdir / "con/checkpoints/20"), at)
    assert not is_saved(workdir, "con", 20)


def test_damage_of_the_optimizer_leaves_the_parameters(workdir):
    flip(workdir / "con/checkpoints/20/optimizer/manifest.ocdbt")
    assert is_saved(workdir, "con", 20)
    with StageCheckpoints(workdir, "con") as checkpoints:
        assert checkpoints.latest_step() == 10
        params = checkpoints.restore_params(abstract().params, ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, params, state(20).params)


def test_training_goes_on_and_nothing_is_deleted(workdir, capsys):
    step = workdir / "con/checkpoints/20"
    cut(array_data(step))
    content = {p.relative_to(step): p.read_bytes() for p in step.rglob("*") if p.is_file()}
    half = step.with_name("15.orbax-checkpoint-tmp")  # as a kill leaves it
    half.mkdir()
    with StageCheckpoints(workdir, "con") as checkpoints:
        assert checkpoints.latest_step() == 10
        checkpoints.save(state(20), 20)
    assert is_saved(workdir, "con", 20) and is_saved(workdir, "con", 10) and not half.exists()
    (aside,) = (workdir / "con/damaged").iterdir()
    kept = {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()}
    assert kept == content
    assert f"The damaged checkpoint of step 20 is kept in {aside}." in capsys.readouterr().out
    with StageCheckpoints(workdir, "con") as checkpoints:
        restored = checkpoints.restore(abstract(), ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, restored, state(20))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"params/_METADATA": 3}', '{"a/b": [1, 2]}']
)
def test_damaged_sums_are_damage(saved, tmp_path, text, capsys):
    workdir = shutil.copytree(saved, tmp_path / "w")
    (workdir / "con/checkpoints/20" / NAME).write_text(text)
    assert StageCheckpoints(workdir, "con").latest_step() == 10
    assert f"is damaged and passed over: {NAME} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
@pytest.mark.parametrize("spoil", ["lost", "garbage"])
def test_what_nothing_is_read_from_may_be_lost(saved, tmp_path, name, spoil):
    workdir = shutil.copytree(saved, tmp_path / "w")
    path = workdir / "con/checkpoints/20" / name
    path.unlink(missing_ok=True)
    if spoil == "garbage":
        path.write_bytes(b"gar{bage\xff")
    with StageCheckpoints(workdir, "con", keep=3) as checkpoints:
        restored = checkpoints.restore(abstract(), ONE_DEVICE)
        jax.tree.map(np.testing.assert_array_equal, restored, state(20))
        checkpoints.save(state(30), 30)
    assert [is_saved(workdir, "con", step) for step in (10, 20, 30)] == [True] * 3


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_what_may_not_be_read_is_passed_over(saved, tmp_path, what, capsys):
    workdir = shutil.copytree(saved, tmp_path / "w")
    step = workdir / "con/checkpoints/20"
    closed = array_data(step) if what == "a file" else step / "params/d"
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read anything")
    assert StageCheckpoints(workdir, "con").latest_step() == 10
    closed.chmod(0o700)
    assert "is damaged and passed over: params/" in capsys.readouterr().out


def test_without_an_undamaged_checkpoint_nothing_is_trained_anew(workdir):
    for step in (10, 20):
        (workdir / f"con/checkpoints/{step}/params/manifest.ocdbt").unlink()
    refused = (
        r"All checkpoints of stage 'con' in \S+ are damaged \(steps 10, 20\); move that folder"
    )
    with StageCheckpoints(workdir, "con") as checkpoints:
        with pytest.raises(CheckpointError, match=refused):
            checkpoints.latest_step()
        with pytest.raises(CheckpointError, match=refused):
            checkpoints.restore_params(abstract().params, ONE_DEVICE)


def test_reading_writes_nothing(saved, tmp_path):
    before = sorted(saved.rglob("*"))
    with StageCheckpoints(saved, "con") as checkpoints:
        checkpoints.restore_params(abstract().params, ONE_DEVICE)
    assert sorted(saved.rglob("*")) == before
    with StageCheckpoints(tmp_path, "cat") as checkpoints:
        assert checkpoints.latest_step() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(workdir, monkeypatch, late):
    """Orbax raises some errors at once and some from a thread, when the next save begins."""

    def full(*args, **kwargs):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "x": [OS error 28: No space left on device]'
        )

    monkeypatch.setattr(module, "write_checksums", full)
    before = sorted((workdir / "con").rglob("*"))
    expected = "checkpoints/30 could not be written .No space left on device.; step 20 is saved"
    with pytest.raises(CheckpointError, match=expected):
        with StageCheckpoints(workdir, "con", keep=3) as checkpoints:
            checkpoints.save(state(30), 30)
            if late:
                checkpoints.save(state(40), 40)
    assert sorted((workdir / "con").rglob("*")) == before


def test_ctrl_c_says_what_is_saved(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "w")
    with pytest.raises(KeyboardInterrupt) as stop:
        with StageCheckpoints(workdir, "con", keep=3) as checkpoints:
            checkpoints.save(state(30), 30)
            raise KeyboardInterrupt
    assert str(stop.value) == (
        "Stage 'con' was stopped; step 30 is saved, and the same command goes on from there."
    )
    assert is_saved(workdir, "con", 30)  # what had begun is finished first
    with pytest.raises(KeyboardInterrupt, match="no step is saved"):
        with StageCheckpoints(tmp_path, "cat"):
            raise KeyboardInterrupt


def test_the_best_by_hpq_is_kept_besides_the_last(tmp_path):
    def steps():
        return sorted(int(path.name) for path in (tmp_path / "con/checkpoints").iterdir())

    with StageCheckpoints(tmp_path, "con", keep=2) as checkpoints:
        for step, hpq in ((1, 20.0), (2, 31.5), (3, None), (4, float("nan")), (5, 30.0)):
            checkpoints.save(state(step), step, hpq)
    assert steps() == [2, 4, 5]
    with StageCheckpoints(tmp_path, "con", keep=2) as checkpoints:  # a process knows what was
        assert checkpoints.latest_step() == 5  # and goes on from the last
        checkpoints.save(state(6), 6, 31.0)
        checkpoints.save(state(7), 7, 32.0)
        checkpoints.save(state(8), 8)
    assert steps() == [7, 8]
    (tmp_path / "con/hpq.json").write_text("[damaged")
    with StageCheckpoints(tmp_path, "con", keep=1) as checkpoints:
        checkpoints.save(state(9), 9)
    assert steps() == [9]


def test_a_folder_that_may_not_be_listed_is_not_called_empty(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()

    def listdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", listdir)
    assert damage(tmp_path, ["params"]).endswith("cannot be read (Permission denied)")
