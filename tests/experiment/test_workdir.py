"""Which configs may go on in a workdir, and what is noted of a change."""

import codecs
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import ml_collections
import pytest

from concat_jax.experiment import workdir as module
from concat_jax.experiment.workdir import (
    ORIGIN_NAME,
    check_origins,
    claim_workdir,
    note_origin,
    read_result,
)
from concat_jax.experiment.workdir_lock import LOCK_NAME


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(
            seed=0,
            tensorboard=True,
            stages=("con", "cat"),
            mesh=dict(devices=0),
            bank=dict(images_per_shard=1024),
            data=dict(
                kind="folder",
                root="a",
                split_file="s",
                num_threads=4,
                on_bad_example="raise",
                side=64,
            ),
            model=dict(width=32, num_heads=4, decoder_heads=4),
            eval=dict(settings=dict(gamma=0.0)),
            train=dict(
                con=dict(steps=4, batch_size=8, log_every=1, save_every=0, takes=dict(clip="init")),
                cat=dict(steps=4, batch_size=8, log_every=1, save_every=0, takes={}),
            ),
        )
    )
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return made


def claim(workdir, made=None, *, write=True, data="photos"):
    claim_workdir(workdir, made or config(), write=write, data_identity=lambda: data)


def written(workdir):
    return json.loads((workdir / "config.json").read_text())


def changes(workdir):
    lines = (workdir / "changes.jsonl").read_text().splitlines()
    return [json.loads(line)["changes"] for line in lines]


@pytest.fixture
def trained(tmp_path):
    """A workdir whose stage con has a checkpoint, and cat has none."""
    claim(tmp_path)
    (tmp_path / "con/checkpoints/2").mkdir(parents=True)
    return tmp_path


CORRECTIONS = {
    "data__on_bad_example": "skip",
    "train__con__batch_size": 16,
    "data__num_threads": 2,
    "seed": 1,
    "model__num_heads": 8,
    "data__root": "b",
}


def test_before_anything_is_trained_all_may_change(tmp_path, capsys):
    claim(tmp_path)
    assert not (tmp_path / "changes.jsonl").exists() and capsys.readouterr().out == ""
    claim(tmp_path, config(**CORRECTIONS), data="other photos")
    now = written(tmp_path)
    assert (now["train.con.batch_size"], now["seed"], now["data.on_bad_example"]) == (16, 1, "skip")
    (noted,) = changes(tmp_path)
    assert set(noted) == {key.replace("__", ".") for key in CORRECTIONS}
    assert noted["train.con.batch_size"] == [8, 16]
    printed = capsys.readouterr().out
    assert f"config.train.con.batch_size was 8 in {tmp_path} and is 16 from now on." in printed
    claim(tmp_path, config(**CORRECTIONS), data="other photos")
    assert len(changes(tmp_path)) == 1  # once


FREE = {
    "data__num_threads": 2,
    "data__on_bad_example": "skip",
    "tensorboard": False,
    "mesh__devices": 2,
    "train__con__log_every": 5,
    "train__con__save_every": 2,
    "train__cat__batch_size": 16,  # of a stage that has learnt nothing yet
}


@pytest.mark.parametrize("key", FREE)
def test_what_changes_nothing_that_was_learnt_is_noted(trained, key):
    made = config(**{key: FREE[key]})
    claim(trained, made)
    name = key.replace("__", ".")
    assert [list(noted) for noted in changes(trained)] == [[name]]
    assert written(trained)[name] == FREE[key]


@pytest.mark.parametrize(
    "key", ["train__con__batch_size", "train__con__steps", "seed", "data__side"]
)
def test_what_was_learnt_from_is_refused(trained, key):
    before = {p: p.read_bytes() for p in trained.rglob("*.json")}
    name = key.replace("__", ".")
    message = rf"made with config\.{name} = \d+, now it is 77; use another workdir"
    if name.startswith("train.con."):
        message += rf" .*, or delete {trained / 'con'} to"
    with pytest.raises(ValueError, match=message):
        claim(trained, config(**{key: 77, "data__num_threads": 1}))
    assert {p: p.read_bytes() for p in trained.rglob("*.json*")} == before


def test_a_stage_that_the_config_has_no_more_stays_as_it_was_made(trained):
    without = config()
    del without.train.con
    claim(trained, without)
    assert written(trained)["train.con.batch_size"] == 8
    with pytest.raises(ValueError, match=r"made with config\.train\.con\.batch_size = 8"):
        claim(trained, config(train__con__batch_size=77))


def test_heads_that_no_checkpoint_tells_are_refused(trained):
    with pytest.raises(ValueError, match=r"config\.model\.decoder_heads = 4, now it is 8"):
        claim(trained, config(model__decoder_heads=8))


def test_what_a_command_says_anew_is_not_noted(trained):
    before = written(trained)
    claim(trained, config(eval__settings__gamma=1.0, stages=("con",), model__width=64))
    assert written(trained) == before and not (trained / "changes.jsonl").exists()


def test_the_same_data_may_lie_elsewhere(trained):
    claim(trained, config(data__root="moved", data__kind="tfds", bank__images_per_shard=8))
    moved = {"data.kind": ["folder", "tfds"], "data.root": ["a", "moved"]}
    assert changes(trained) == [{"bank.images_per_shard": [1024, 8]} | moved]
    with pytest.raises(ValueError, match="config.data.root = 'moved', now it is 'c'"):
        claim(trained, config(data__root="c", data__kind="tfds"), data="other photos")


def test_workdirs_without_a_fingerprint_get_one(trained):
    (trained / "data.json").write_text("{")
    with pytest.raises(ValueError, match="config.data.root = 'a', now it is 'moved'"):
        claim(trained, config(data__root="moved"))
    (trained / "data.json").unlink()
    claim(trained)
    claim(trained, config(data__root="moved"))
    assert written(trained)["data.root"] == "moved"


def test_reading_writes_nothing(trained):
    before = written(trained)
    claim(trained, config(data__num_threads=2), write=False)
    assert written(trained) == before and not (trained / "changes.jsonl").exists()


def test_removed_options_that_held_what_is_built_in_now_go_on(trained):
    path = trained / "config.json"
    gone = {"train.con.method.pooling_temperature": 0.1, "train.con.optimizer.accumulate": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **gone}))
    claim(trained)
    path.write_text(json.dumps({**json.loads(path.read_text()), "train.con.optimizer.b2": 0.98}))
    with pytest.raises(ValueError, match=r"made with config\.train\.con\.optimizer\.b2 = 0\.98"):
        claim(trained)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "w").write_text("")
    with pytest.raises(ValueError, match="w is a file; name a folder"):
        claim(tmp_path / "w")
    with pytest.raises(ValueError, match="is in .*w, which is a file; name a folder"):
        claim(tmp_path / "w" / "world_0")


def test_a_config_with_a_byte_order_mark_is_read(trained):
    path = trained / "config.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    claim(trained)


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_config_is_named_with_the_way_on(trained, content):
    (trained / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json .*; remove it to go on in this workdir"):
        claim(trained)
    (trained / "config.json").unlink()
    claim(trained)
    assert written(trained)["seed"] == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"config": {}}', b"\xff"])
def test_a_damaged_result_is_made_anew(tmp_path, content, capsys):
    path = tmp_path / "report.json"
    assert read_result(path, "config", "table") is None and capsys.readouterr().out == ""
    path.write_bytes(content)
    assert read_result(path, "config", "table") is None
    assert capsys.readouterr().out.endswith(". It is made anew.\n")
    report = {"config": {}, "table": ""}
    path.write_text(json.dumps(report))
    assert read_result(path, "config", "table") == report


def learn(workdir, name, *sources):
    shutil.rmtree(workdir / name, ignore_errors=True)
    note_origin(workdir, name, sources)
    (workdir / name / "checkpoints/2").mkdir(parents=True)


def test_what_learnt_from_an_earlier_version_of_a_stage_is_named(tmp_path):
    learn(tmp_path, "con", "init")
    learn(tmp_path, "cat", "con")
    learn(tmp_path, "finetune", "con", "cat")
    check_origins(tmp_path, ("con", "cat", "finetune"))
    shutil.rmtree(tmp_path / "cat")
    sentence = r", finetune learnt from an earlier version of stage cat; delete \S+/finetune, and"
    for _ in range(2):  # while it is gone, and when it is there anew
        check_origins(tmp_path, ("con", "cat"))
        with pytest.raises(ValueError, match=sentence):
            check_origins(tmp_path, ("con", "finetune"))
        learn(tmp_path, "cat", "con")
    shutil.rmtree(tmp_path / "finetune")
    learn(tmp_path, "finetune", "con", "cat")
    check_origins(tmp_path, ("finetune",))
    learn(tmp_path, "con")
    with pytest.raises(
        ValueError, match="cat, finetune learnt from an earlier version of stage con;"
    ):
        check_origins(tmp_path, ("finetune",))


@pytest.mark.parametrize("content", ["", '{"id": 5}', '{"takes": {}}', "[]"])
def test_a_damaged_origin_is_removed_and_the_run_goes_on(tmp_path, content):
    learn(tmp_path, "con", "init")
    learn(tmp_path, "cat", "con")
    path = tmp_path / "con" / ORIGIN_NAME
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} .*\. Remove it to go on: .* checkpoints stay"):
        check_origins(tmp_path, ("cat",))
    path.unlink()
    check_origins(tmp_path, ("con", "cat"))


def test_a_workdir_of_before_knows_no_versions(trained):
    (trained / "cat/checkpoints/2").mkdir(parents=True)
    check_origins(trained, ("con", "cat"))


# flock's as the workdir's own; the modules of the project would take seconds to import.
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
print("held", file=sys.stderr, flush=True)
file.flush()
time.sleep(60)
"""


def test_a_workdir_that_is_written_is_refused_until_its_process_is_gone(tmp_path):
    name = json.dumps({"host": "tpu-3", "pid": 17, "since": "noon"})
    path = tmp_path / LOCK_NAME
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), name], stderr=subprocess.PIPE
    ) as other:
        other.stderr.readline()
        while path.read_text() != name:
            pass
        by = f"The workdir {tmp_path} is being written by process 17 of host tpu-3 since noon; wait"
        with pytest.raises(ValueError, match=by):
            claim(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [LOCK_NAME]
        claim(tmp_path, write=False)  # reading disturbs nobody
        other.send_signal(signal.SIGKILL)
    claim(tmp_path)
    claim(tmp_path)  # and again by the same process
    held = json.loads(path.read_text())
    assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())


def test_a_workdir_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(ValueError, match="cannot be written: Is a directory; name another.$"):
        claim(tmp_path)
    (tmp_path / "report.json").touch()
    with pytest.raises(ValueError, match="name another. The report of the run that is finished"):
        claim(tmp_path)


def test_a_holder_that_has_not_said_who_it_is_yet(tmp_path, monkeypatch):
    with (tmp_path / LOCK_NAME).open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another process; wait"):
            claim(tmp_path)


def test_of_several_hosts_the_first_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    claim(tmp_path)
    assert not any(tmp_path.iterdir())
