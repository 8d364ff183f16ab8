"""What lies in a bucket is what would lie on a disk; of a bucket that cannot be used it is said."""

import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from concat_jax.core import files
from concat_jax.core.coco_writers import StreamedJson
from concat_jax.core.files import FileError, as_path
from concat_jax.core.shard_store import ShardStore, StoreKind
from concat_jax.experiment import workdir_lock
from concat_jax.training import metrics
from concat_jax.training.checkpoints import StageCheckpoints
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState
from concat_jax.weights.disk import CARD_NAME, check_destination, new_folder
from tests.emulated_bucket import NAME, emulated_bucket


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield as_path(NAME)


@pytest.fixture
def folder(bucket, request):
    return bucket / request.node.name


def names(folder):
    return [path.relative_to(folder).as_posix() for path in files.files_below(folder)]


def test_files_and_folders(folder, tmp_path):
    assert not folder.exists() and names(folder) == []
    files.write_json(folder / "a/b.json", {"x": [1, float("nan")]})
    files.append_text(folder / "a/log", "1\n")
    files.append_text(folder / "a/log", "2\n")
    files.write_text(folder / "ab", "of another folder")
    assert files.read_json(folder / "a/b.json") == {"x": [1, None]}
    assert files.read_text(folder / "a/log") == "1\n2\n"
    assert (folder / "a").is_dir() and not (folder / "a").is_file()
    assert names(folder / "a") == ["b.json", "log"]
    with files.on_disk(folder / "a") as local:
        assert sorted(os.listdir(local)) == ["b.json", "log"]
    (folder / "a").rename(folder / "c")
    assert names(folder) == ["ab", "c/b.json", "c/log"]
    files.remove_folder(folder / "c")
    assert names(folder) == ["ab"]
    with pytest.raises(ValueError, match="no file can be appended to"):
        (folder / "ab").open("a")


def test_what_fails_on_the_way_leaves_nothing(folder):
    with pytest.raises(RuntimeError), files.replacing(folder / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not folder.exists()


def test_a_bucket_that_cannot_be_used(bucket):
    with pytest.raises(FileError, match=r"^There is no bucket gs://absent; make it"):
        as_path("gs://absent/a/b.json")
    with pytest.raises(FileError, match=r"/a cannot be read: No such file\.$"):
        files.read_json(bucket / "a")
    with pytest.raises(ValueError, match=r"s3://a/b is neither a path of this machine nor in a"):
        as_path("s3://a/b")


def test_what_cannot_be_told_is_no_absence(folder, monkeypatch):
    """A run that took a lost connection for an empty workdir would begin anew in it."""
    files.write_text(folder / "con/checkpoints/1/a", "")
    checkpoints = StageCheckpoints(folder, "con")

    async def lost(*args, **options):
        raise OSError("lost")

    monkeypatch.setattr("gcsfs.GCSFileSystem._call", lost)
    for ask in (
        *(folder.exists, folder.is_dir, folder.is_file, checkpoints.latest_step),
        *(lambda: list(folder.iterdir()), lambda: list(folder.glob("*/checkpoints/[0-9]*"))),
        *(lambda: files.files_below(folder), lambda: files.read_text(folder / "a")),
    ):
        with pytest.raises((OSError, FileError), match="lost"):
            ask()
    assert checkpoints.what_is_saved().startswith("what is saved is out of reach now")


def test_shards(folder):
    store = ShardStore(folder, StoreKind("squares", ("rows",), "start again"), {"format": 1})
    store.claim()
    assert store.missing(range(2)) == [0, 1]
    for index in range(2):
        store.write(index, {"rows": np.full((3, 2), index, np.float16)})
    np.testing.assert_array_equal(store.load(2)["rows"][:, 0], [0, 0, 0, 1, 1, 1])


def test_a_json_of_many_entries(folder):
    with StreamedJson(folder / "found.json", {"kind": "test"}, ["images"]) as written:
        for entry in range(3):
            written.append({"id": entry}, "images")
    images = [{"id": 0}, {"id": 1}, {"id": 2}]
    assert files.read_json(folder / "found.json") == {"kind": "test", "images": images}
    assert names(folder) == ["found.json"]


def test_metrics_are_appended_by_the_next_process(folder):
    for step in (1, 2):
        writer = metrics.MetricWriter(folder, tensorboard=False)
        writer.scalars(step, {"loss": float("nan")})
        writer.close()
    rows = files.read_text(folder / "metrics.jsonl").splitlines()
    assert [json.loads(row) for row in rows] == [{"step": k, "loss": None} for k in (1, 2)]


def state(step):
    params = {"head": {"kernel": jnp.asarray(np.random.default_rng(step).normal(size=(3, 5000)))}}
    made = TrainState.create(params, optax.adam(0.1))
    return TrainState(jnp.asarray(step), made.params, made.opt_state)


def restored(workdir):
    with StageCheckpoints(workdir, "con") as checkpoints:
        abstract = jax.eval_shape(lambda: state(0))
        return checkpoints.restore(abstract, make_mesh(devices=1))


def test_checkpoints(folder):
    saved = folder / "con/checkpoints"

    def save(*steps):
        with StageCheckpoints(folder, "con", keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(state(step), step)

    save(1, 2, 3)
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    jax.tree.map(np.testing.assert_array_equal, restored(folder), state(3))

    (saved / "3/commit_success.txt").unlink()  # as of a process that was killed amid a save
    jax.tree.map(np.testing.assert_array_equal, restored(folder), state(2))
    save(3)
    sizes = files.files_below(saved / "3/params")
    largest = max(sizes, key=sizes.get)
    largest.write_bytes(largest.read_bytes()[:-9])
    jax.tree.map(np.testing.assert_array_equal, restored(folder), state(2))
    save(3)
    jax.tree.map(np.testing.assert_array_equal, restored(folder), state(3))
    assert any(name.startswith("3_") for name in names(folder / "con/damaged"))


def test_a_model_appears_when_all_of_it_is_there(folder):
    def write(text, **options):
        with new_folder(folder, {}, **options) as local:
            (local / CARD_NAME).write_text(text)
            (local / "params").mkdir()
            (local / "params/a").write_text(text)

    write("one")
    with pytest.raises(ValueError, match="is there already"):
        check_destination(folder, overwrite=False)
    write("two", overwrite=True)
    assert names(folder) == [CARD_NAME, "params/a"]
    assert files.read_text(folder / "params/a") == "two"


def test_a_workdir_is_one_process_own(folder, monkeypatch):
    for name in ("_BEAT", "_SETTLED"):
        monkeypatch.setattr(workdir_lock, name, 0.05)
    monkeypatch.setattr(workdir_lock, "_SILENCE", 0.5)
    monkeypatch.setattr(workdir_lock.stopping, "at_exit", lambda let_go: kept.append(let_go))
    kept = []
    path = folder / workdir_lock.LOCK_NAME
    files.write_json(path, {"host": "tpu-3", "pid": 17, "since": "noon"})  # of one that was killed
    workdir_lock.lock_workdir.__wrapped__(folder)
    by = rf"{folder} is being written by process {os.getpid()} of host .* since .*; wait until"
    with pytest.raises(ValueError, match=by):
        workdir_lock.lock_workdir.__wrapped__(folder)
    kept.pop()()
    assert not path.exists() and not kept
    assert not any(thread.name == "lock" for thread in threading.enumerate())
