"""Mistakes on a command line end in one sentence that says what to do."""

import functools
import io
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from concat_jax.core import cli


def define_flags(flags):
    flags.string("root", "", "A folder.")
    flags.integer("size", 1, "A number.", 0)


def ended(arguments, command=lambda given, rest: None, *, capsys, **settings):
    """Exit code or sentence, and what was printed, of a call that ended the program."""
    with pytest.raises(SystemExit) as stop:
        cli.main("Doc.", define_flags, command, ["x", *arguments], computes=False, **settings)
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rot=a"], "Error: there is no flag '--rot'; did you mean '--root'?"),
        (["--bench=a"], "Error: there is no flag '--bench'; there are --help, --root, --size."),
        (["b"], "Error: unknown argument 'b'; flags look like --name=value."),
        (["--size=x"], "Error: flag --size=x: "),
        (["--size=-1"], "Error: flag --size=-1: "),
    ],
)
def test_mistakes_on_the_command_line(arguments, sentence, capsys):
    code, printed = ended(arguments, capsys=capsys)
    assert code.startswith(sentence) and "\n" not in code
    assert printed == ("", "")


def test_the_command_gets_its_flags_and_arguments():
    got = []
    cli.main(
        "Doc.",
        define_flags,
        lambda given, rest: got.append((given.root, given.size, rest)),
        ["x", "--size=3", "a", "--root=r", "b"],
        arguments="FILES",
        computes=False,
    )
    assert got == [("r", 3, ["a", "b"])]


def test_the_home_folder_is_put_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    got = []
    run = lambda given, rest: got.append((given.root, *rest))  # noqa: E731
    words = ["x", "--root=~/runs/a", "~x", "~/y"]
    cli.main("Doc.", define_flags, run, words, arguments="FILES", computes=False)
    assert got == [("/home/me/runs/a", "~x", "~/y")]


def test_commands_do_not_see_each_others_flags():
    cli.main("", lambda flags: flags.string("one", "", ""), lambda g, r: None, ["x", "--one=1"])
    with pytest.raises(SystemExit, match="no flag"):
        cli.main("", lambda flags: flags.string("two", "", ""), lambda g, r: None, ["x", "--one=1"])


@pytest.mark.parametrize("error", [ValueError, OSError, cli.UserStop])
def test_errors_end_in_one_line(error, capsys):
    def fail(given, rest):
        raise error("two\n  lines.")

    assert ended([], fail, capsys=capsys)[0] == "Error: two lines."


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 256. GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 160 bytes."),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    def command(given, rest):
        raise error

    code, _ = ended([], command, capsys=capsys)
    assert code.startswith(f"Error: There is not enough memory: {error}"[:50])
    assert "use smaller images or batches" in code


def test_bugs_are_not_hidden():
    def fail(given, rest):
        raise KeyError("k")

    with pytest.raises(KeyError):
        cli.main("", define_flags, fail, ["x"], computes=False)


def test_ctrl_c_ends_in_a_sentence_and_code_130(capsys):
    def stop(given, rest):
        raise KeyboardInterrupt

    code, printed = ended([], stop, interrupted="Half is written.", capsys=capsys)
    assert code == 130 and printed.err == "\nHalf is written.\n"

    def stop_with_words(given, rest):
        raise KeyboardInterrupt("Step 3 is saved.")

    assert ended([], stop_with_words, capsys=capsys)[1].err == "\nStep 3 is saved.\n"


def test_a_terminal_without_the_letter_shows_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    cli.main("", define_flags, lambda g, r: print("γ is 0", flush=True), ["x"], computes=False)
    assert raw.getvalue().strip() == b"? is 0"
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("file", "is_shown"),
    [
        ("a/orbax/b.py", False),
        ("Error writing 'x' in OCDBT database at local file 'y'", False),
        ("a/ours/b.py", True),
    ],
)
def test_errors_that_orbax_logs_before_it_raises_them_are_shown_once(file, is_shown, caplog):
    def command(given, rest):
        try:
            exec(compile("1 / 0", file, "exec"))
        except ZeroDivisionError:
            logging.getLogger("asyncio").exception("Task exception was never retrieved")
            logging.getLogger("asyncio").warning(file)

    cli.main("", define_flags, command, ["x"], computes=False)
    assert ("never retrieved" in caplog.text) == is_shown
    assert file in caplog.messages


def test_a_reader_that_goes_away_ends_the_command_quietly():
    code = "from concat_jax.core import cli\n"
    code += "cli.main('', lambda f: None, lambda g, r: print('x' * 99999, flush=True), ['x'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_ctrl_c_in_a_callback_that_cannot_raise_comes_again(capsys):
    class Garbage:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command(given, rest):
        Garbage()
        time.sleep(20)

    began = time.monotonic()
    # Started in a shell's background, a process ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    code, printed = ended([], command, capsys=capsys)
    signal.signal(signal.SIGINT, before)
    assert (code, printed.err) == (130, "\nStopped.\n") and time.monotonic() - began < 10


def test_sigterm_ends_in_a_sentence_and_code_75():
    code = """
import os, signal
from concat_jax.core import cli

cli.main(
    "",
    lambda flags: None,
    lambda given, rest: os.kill(os.getpid(), signal.SIGTERM),
    ["x"],
    with_config=True,
    computes=False,
    interrupted="Half is written.",
)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (75, b"", b"\nHalf is written.\n")


def test_the_second_ctrl_c_ends_at_once():
    code = """
import os, signal, time
from concat_jax.core import cli

def command(given, rest):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:  # what is pending takes long
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main("", lambda flags: None, command, ["x"], computes=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"\nStopped at once.\n")


def test_files_are_named_without_the_number_of_the_error(tmp_path, capsys):
    def fail(given, rest):
        (tmp_path / "absent").read_bytes()

    sentence = f"Error: {tmp_path / 'absent'}: No such file or directory."
    assert ended([], fail, capsys=capsys)[0] == sentence


def test_help_shows_doc_and_flags(capsys):
    cli.main("What it does.", define_flags, lambda g, r: 1, ["x", "--help"], computes=False)
    printed = capsys.readouterr().out
    assert printed.startswith("What it does.") and "--root" in printed


def test_hosts_that_cannot_be_found(monkeypatch):
    def initialize(**given):
        raise ValueError("Number of processes must be defined.")

    given = types.SimpleNamespace(distributed=True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    message = r"the other hosts \(Number of processes must be defined\): set JAX_COORDINATOR_ADDR"
    with pytest.raises(ValueError, match=message):
        cli.join_hosts(given)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match=r"invalid literal .*'two'.*JAX_PROCESS_ID on every host"):
        cli.join_hosts(given)


def test_hosts_are_told_by_the_environment(monkeypatch):
    told, joined = [], []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **numbers: told.append(numbers))
    monkeypatch.setattr(cli.stopping, "join", lambda *given: joined.append(given))
    for is_asked in (False, True):
        cli.join_hosts(types.SimpleNamespace(distributed=is_asked))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    cli.join_hosts(types.SimpleNamespace(distributed=True))
    assert [(given["num_processes"], given["process_id"]) for given in told] == [
        (None, None),
        (4, 0),
    ]
    assert len(joined) == 2
    assert not jax.config.jax_enable_preemption_service  # it would take SIGTERM for itself


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    train = dict(cat=dict(steps=3, method=dict()))
    model, data = dict(clip=dict()), dict(root="")
    return ConfigDict(dict(seed=0, stages=("cat",), train=train, model=model, data=data))
"""


@pytest.mark.parametrize(
    ("flag", "result"),
    [
        ("--config.train.cat.method.unseen_names=False", False),
        ("--config.train.cat.queries=images", "images"),
        ("--config.train.cat.steps=5", 5),
        ("--config.stages=clip,con", ("clip", "con")),
        ("--config.stages=con", ("con",)),
        ("--config.stages=('clip','con')", ("clip", "con")),
        ("--config.model.clip.variant=ViT-B/32", "ViT-B/32"),
        ("--config.sead=3", "Error: the config has no key 'sead'; did you mean 'seed'?"),
        ("--config.data.rot=x", "Error: config.data has no key 'rot'; did you mean 'root'?"),
        ("--config.model.clipp=x", "Error: config.model has no key 'clipp'; did you mean 'clip'?"),
        ("--config.train.cat.takez.clip=x", "Error: config.train.cat has no key 'takez'"),
        ("--config.train.cta.steps=5", "Error: config.train has no key 'cta'; see the config file"),
    ],
)
def test_a_flag_may_add_a_field_where_the_section_knows_its_fields(flag, result, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    found = []

    def command(given, rest):
        path = flag.split("=")[0].removeprefix("--config.").split(".")
        found.append(functools.reduce(lambda section, key: section[key], path, given.config))
        assert given.config.is_locked

    try:
        argv = ["x", f"--config={file}", flag]
        cli.main("", lambda flags: None, command, argv, with_config=True, computes=False)
    except SystemExit as stop:
        assert str(result) in stop.code
    else:
        assert found == [result]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A title\n\nSome text.\n", "Error: --config: .*/a.py is no file of Python: .*line 3"),
        ("seed = 0\n", r"Error: the file of --config has no get_config\(\); see configs/."),
    ],
)
def test_a_file_that_is_no_config_is_said(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # a file before it
    (tmp_path / "a.py").write_text(text)
    code, _ = ended([f"--config={tmp_path}/a.py"], capsys=capsys, with_config=True)
    assert re.match(message, code)


@pytest.mark.parametrize("given", [["--config=DIR/demo.py:smoke"], ["--config", "DIR/demo.py"]])
def test_a_config_file_that_is_not_there_names_its_neighbour(given, tmp_path, capsys):
    """absl's own words quote a module's name that nobody typed."""
    (tmp_path / "demos.py").write_text("")
    given = [word.replace("DIR", str(tmp_path)) for word in given]
    code, _ = ended(given, capsys=capsys, with_config=True)
    assert f"no config file '{tmp_path}/demo.py'; did you mean '{tmp_path}/demos.py'?" in code


@pytest.mark.parametrize("command", ["concat_jax.main", "data_pipelines.prepare"])
def test_ctrl_c_while_a_command_is_imported_is_a_word(command, tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "jax.py").write_text("raise KeyboardInterrupt")
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    arguments = [sys.executable, "-m", command]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stderr == "\nStopped.\n" and ended.returncode
