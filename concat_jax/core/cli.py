"""The one command line: flags of a command's own, and one sentence for a user's mistake.

def define_flags(flags: cli.Flags) -> None:
  flags.string("output", "", "A folder.")

@cli.command(__doc__, define_flags)
def main(given: cli.Flags) -> None:
  print(given.output)

main(["program", "--output=folder"]), or main() for those of the process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging as native_logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from concat_jax.core import stopping
from concat_jax.core.config import check_choice, is_open
from concat_jax.core.files import as_path, in_bucket, is_of_bucket, nearest

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended: 128 + SIGINT
BROKEN_PIPE = 141  # the same of SIGPIPE
# Seconds until JAX takes a host that is silent for dead, and ends the others.
HEARTBEAT_TIMEOUT = 20


class Flags(flags.FlagValues):
    """The flags of one command, and after parsing their values as attributes.

    They are its own and not absl's global ones: importing one command defines none for another.
    """

    def string(self, name: str, default: str | None, about: str) -> None:
        flags.DEFINE_string(name, default, about, flag_values=self)

    def strings(self, name: str, default: Sequence[str], about: str) -> None:
        """Texts with commas between them."""
        flags.DEFINE_list(name, list(default), about, flag_values=self)

    def choice(self, name: str, default: str | None, choices: Sequence[str], about: str) -> None:
        flags.DEFINE_enum(name, default, list(choices), about, flag_values=self)

    def integer(
        self,
        name: str,
        default: int | None,
        about: str,
        low: int | None = None,
        high: int | None = None,
    ) -> None:
        """A whole number, from `low` to `high`."""
        flags.DEFINE_integer(name, default, about, low, high, flag_values=self)

    def number(self, name: str, default: float | None, about: str) -> None:
        flags.DEFINE_float(name, default, about, flag_values=self)

    def switch(self, name: str, about: str) -> None:
        """True where it is given."""
        flags.DEFINE_bool(name, False, about, flag_values=self)


def main(
    doc: str,
    define_flags: Callable[[Flags], None],
    command: Callable[[Flags, list[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    arguments: str = "",
    with_config: bool = False,
    computes: bool = True,
    interrupted: str = "Stopped.",
) -> None:
    """Parses a command line and runs its command; ends the program unless all went well.

    Args:
      doc: what `--help` prints above the flags.
      command: (flags, arguments) -> exit code; None is 0.
      arguments: how the usage calls arguments that are no flags; "" takes none.
      with_config: the command has --config, --workdir and --distributed; SIGTERM ends it as
        Ctrl-C does, with exit code `stopping.PREEMPTED`.
      computes: programs that it compiles are kept for the next time.
      interrupted: the sentence for Ctrl-C, where what was interrupted has none of its own.
    """
    argv = [_with_home(word) for word in (sys.argv if argv is None else argv)]
    for name in ("absl", "asyncio"):
        native_logging.getLogger(name).addFilter(_is_no_echo)
    sys.unraisablehook = _show_unraisable
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter shows a question mark; the command goes on.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")
    values = Flags()
    values.switch("help", "Show this help.")
    if with_config:
        _define_config(values, argv)
    define_flags(values)
    with ending_well(interrupted, preemptible=with_config):
        rest = _parse(values, argv)
        if values.help:
            print(f"{doc.strip()}\n\nFlags:\n{values.get_help()}")
            return
        if rest and not arguments:
            raise ValueError(f"unknown argument {rest[0]!r}; flags look like --name=value.")
        logging.set_verbosity(logging.ERROR)  # Orbax narrates, and warns of what it does not need
        if computes:
            from concat_jax.core.runtime import enable_compilation_cache, keep_freed_memory

            enable_compilation_cache()
            keep_freed_memory()
        code = command(values, rest)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def ending_well(interrupted: str, *, preemptible: bool) -> Iterator[None]:
    """Ends the program in a sentence on a user's mistake, Ctrl-C, or, if `preemptible`, SIGTERM."""
    catching = stopping.catching_sigterm if preemptible else contextlib.nullcontext
    try:
        with _first_interrupt_only(), catching(interrupted), one_sentence():
            yield
    except stopping.Terminated as stop:
        stopping.leave(stopping.PREEMPTED, str(stop))
    except KeyboardInterrupt as stop:
        sentence = str(stop) or interrupted
        stopping.fail_together(KeyboardInterrupt(sentence), INTERRUPTED)
        print(f"\n{sentence}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BaseException as error:
        stopping.fail_together(error)
        raise


def command(
    doc: str, define_flags: Callable[[Flags], None] = lambda flags: None, **settings: Any
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Makes the `main(argv)` of a command of a function of its flags; `settings` are of `main`.

    Where these have `arguments`, the function takes them as a list behind the flags.
    """

    def decorated(function: Callable[..., int | None]) -> Callable[..., None]:
        run = function if settings.get("arguments") else lambda given, rest: function(given)
        return functools.partial(main, doc, define_flags, run, **settings)

    return decorated


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with the text of a user's mistake on one line, instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        # Nobody reads on, as of `| head`; what is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):  # XLA's
            text = f"There is not enough memory: {text[:200]}; use smaller images or batches."
        elif not isinstance(error, ValueError | OSError | UserStop) and not is_of_bucket(error):
            raise
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            text = f"{os.fspath(error.filename)}: {error.strerror}."
        # On one line, and without what a terminal would obey.
        text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)
        sys.exit(f"Error: {text.strip()}")


@contextlib.contextmanager
def _first_interrupt_only() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once, in the main thread; the second one ends the program."""
    before = signal.getsignal(signal.SIGINT)
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or before in (signal.SIG_IGN, None):
        yield
        return

    signal.signal(signal.SIGINT, _first_interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _first_interrupt:
            signal.signal(signal.SIGINT, before)


def _first_interrupt(number: int, frame: Any) -> None:
    signal.signal(number, _second_interrupt)
    raise KeyboardInterrupt


def _second_interrupt(number: int, frame: Any) -> None:
    os.write(2, b"\nStopped at once.\n")
    os._exit(INTERRUPTED)


def _is_no_echo(record: native_logging.LogRecord) -> bool:
    """False for an error that Orbax's threads and tasks log, each in full, besides raising it.

    Of the arrays of a checkpoint, which TensorStore writes, each has one when a disk is full.
    """
    if record.levelno < native_logging.ERROR:
        return True
    text = record.pathname + record.getMessage()
    if record.exc_info:
        text += native_logging.Formatter().formatException(record.exc_info)
    return f"{os.sep}orbax{os.sep}" not in text and "in OCDBT database" not in text


class UserStop(RuntimeError):
    """The end of a command that is nobody's bug; its message is the sentence to show."""


def _show_unraisable(unraisable: Any) -> None:
    """Shows what no one can catch, but for TensorStore's writes that end after Orbax gave up.

    Ctrl-C that came in a callback of C code, as JAX has one for Python's garbage, comes again.
    """
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, _first_interrupt)
        again = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.05, signal.pthread_kill, again).start()
    elif not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _parse(values: Flags, argv: Sequence[str]) -> list[str]:
    """What is left of a command line without its flags; a typo's ValueError names the nearest."""
    _check_config_file(argv)
    try:
        rest = values(argv)[1:]
        _settle_overrides(values)
        return rest
    except flags.UnrecognizedFlagError as error:
        names = [f"--{name}" for name in values]
        check_choice(f"--{error.flagname}", names, "there is no flag")
        raise ValueError(str(error)) from error
    except SyntaxError as error:
        raise ValueError(f"--config: {error.filename} is no file of Python: {error}.") from error
    except (KeyError, AttributeError) as error:
        if "'get_config'" in str(error):
            raise ValueError("the file of --config has no get_config(); see configs/.") from error
        key = re.findall(r"\w+", str(error))[0]
        nearest = re.search(r'Did you mean "(\w+)"', str(error))
        hint = (
            f"; did you mean {nearest[1]!r}?" if nearest else "; see the config file for its keys."
        )
        found = re.search(rf"--?(config\.[\w.]+)\.{re.escape(key)}\b", " ".join(argv))
        where = found[1] if found else "the config"
        raise ValueError(f"{where} has no key {key!r}{hint}") from error
    except (flags.Error, ValueError, OSError) as error:
        # ml_collections quotes the whole traceback of a config file; its last line says it all.
        raise ValueError(re.split(r"\w+Error: ", str(error))[-1]) from error


def _with_home(word: str) -> str:
    """--flag=~/folder with the home folder, which shells put in only where a word begins with ~."""
    flag, equals, value = word.partition("=")
    is_home = flag.startswith("-") and value.startswith("~/")
    return flag + equals + os.path.expanduser(value) if is_home else word


def _check_config_file(argv: Sequence[str]) -> None:
    """Refuses --config=FILE where there is no such file, naming the nearest beside it."""
    given = [word.partition("=")[2] for word in argv if re.match("--?config=", word)]
    given += [word for flag, word in itertools.pairwise(argv) if flag in ("-config", "--config")]
    for path in (word.partition(":")[0] for word in given):
        if not os.path.isfile(path):
            beside = [str(file) for file in Path(path).parent.glob("[a-z]*.py")]
            check_choice(path, beside, "there is no config file")


def _settle_overrides(values: Flags) -> None:
    """Refuse flags for keys that a config file has not, but in sections that name what they take.

    Several words may be given as to any other flag, --config.stages=clip,con.

    Raises:
      ValueError: naming the nearest key.
    """
    flag = values["config"] if "config" in values else None
    if flag is None or flag.value is None:
        return
    before = flag.parser.parse(flag.config_filename)
    for path in flag.override_values:
        *sections, key = path.split(".")
        section = functools.reduce(lambda config, name: config[name], sections, before)
        if key not in section and not is_open(path):
            where = ".".join(["config", *sections]) if sections else "the config"
            check_choice(key, list(section), f"{where} has no key")
        given = functools.reduce(lambda config, name: config[name], sections, flag.value)
        match given[key]:
            case (str() as words,):
                given[key] = tuple(words.split(","))
    flag.value.lock()


def _define_config(values: Flags, argv: Sequence[str]) -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "File in configs/; --config.KEY=VALUE changes one of its values.",
        lock_config=False,
        accept_new_attributes=True,  # as far as `_settle_overrides` lets them pass
        flag_values=values,
        sys_argv=list(argv),
    )
    values.string("workdir", None, "Folder of the run; made if absent.")
    values.switch(
        "distributed",
        "Several hosts. TPU pods, SLURM, Open MPI and Kubernetes are recognised; elsewhere set "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host.",
    )


def config_of(given: Flags) -> ConfigDict:
    """The config of the flag --config; ValueError if it is not given."""
    if given.config is None:
        raise ValueError("give --config=configs/demo_zps.py or another file.")
    return given.config


def output_folder(given: Flags) -> Path:
    """The flag --output of a command that fills a folder; ValueError if that cannot be."""
    path = as_path(given.output)
    _check_folder(path, path)
    return path


def output_file(given: Flags) -> Path:
    """The flag --output of a command that writes a file; ValueError if its folder cannot be."""
    path = as_path(given.output)
    _check_folder(path.parent, path)
    return path


def _check_folder(folder: Path, output: Path) -> None:
    above = nearest(folder)
    where = f"--output={output}" + f": {above}" * (above != output)
    if above.is_file():
        raise ValueError(f"{where} is a file; name a folder.")
    if not in_bucket(folder) and not os.access(above, os.W_OK):
        raise ValueError(f"{where} cannot be written to; name another folder.")


def config_and_workdir(given: Flags) -> tuple[ConfigDict, Path]:
    """The flags --config and --workdir; ValueError for a missing one."""
    if given.config is None or not given.workdir:
        raise ValueError("give --config=configs/demo_zps.py (or another file) and --workdir=DIR.")
    return given.config, as_path(given.workdir)


def join_hosts(given: Flags) -> None:
    """Meets the other hosts if --distributed says so; ValueError if JAX cannot tell which."""
    if not given.distributed:
        return
    import jax

    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        # JAX reads the coordinator's address itself, but not these two.
        texts = (os.environ.get(name) for name in names)
        num_processes, process_id = (text and int(text) for text in texts)
        # JAX's own way to agree on a step would take SIGTERM away from `stopping`.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed does not find the other hosts ({str(error).rstrip('.')}): set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host."
        ) from error
    from jax._src.distributed import global_state  # its store of keys and values has no other name

    stopping.join(global_state.client, global_state.process_id, global_state.num_processes)
