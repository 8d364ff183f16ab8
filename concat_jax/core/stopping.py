"""How a command ends before its time: SIGTERM, and hosts that tell one another.

A machine that is taken away says so by SIGTERM, Cloud's with half a minute to go. Between the steps
of a training the state is saved then, by all hosts at one step; elsewhere SIGTERM is Ctrl-C. What
cannot be interrupted, as the compilation of a program, is left as it is after `GRACE` seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import http.client
import os
import pathlib
import re
import select
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

PREEMPTED = 75  # the exit code, EX_TEMPFAIL of sysexits.h: the same command may be tried again
GRACE = 25.0  # of the half minute that Cloud gives
_POLL = 0.5  # seconds until a host notices what another says
_FAREWELL = 4.0  # seconds that a host waits for the others to hear why it ends
# How libraries call a host that is gone: its connection is closed.
_LOST = re.compile(r"\bGloo|\bNCCL|coordination_service")
# Cloud's machines say that they are, and are told by a server that they are taken away:
# https://cloud.google.com/compute/docs/instances/create-use-spot. It answers when that changes.
_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_SERVER = "metadata.google.internal"
_QUESTION = "computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="
_AGAIN = 10.0  # seconds after a question that was not answered


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work; the message is the sentence to show."""


@dataclasses.dataclass
class _State:
    """Of this process: SIGTERM came, and was raised; between steps, what is saved; steps asked."""

    asked: bool = False
    raised: bool = False
    saved: Callable[[], str] | None = None
    count: int = 0
    agreed: int | None = None
    hosts: _Hosts | None = None


_state, _lock, _ending = _State(), threading.Lock(), threading.Lock()
_at_exit: list[Callable[[], object]] = []


@contextlib.contextmanager
def catching_sigterm(sentence: str) -> Iterator[None]:
    """In the block SIGTERM raises KeyboardInterrupt, or ends `between_steps`; main thread only.

    What leaves the block then is `Terminated`, with a sentence of its own or `sentence`. After
    `GRACE` seconds the process ends all the same.
    """
    _state.asked = _state.raised = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Written to at once, while a handler of Python's waits for C code to return.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _on_sigterm)
    watcher = threading.Thread(target=_watch, args=(reader, sentence), daemon=True)
    watcher.start()
    _heed_notice()
    try:
        yield
    except KeyboardInterrupt as stop:
        if not _state.asked:
            raise
        _state.asked = False
        raise Terminated(str(stop) or sentence) from stop
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join(1.0)


def _on_sigterm(number: int, frame: Any) -> None:
    _state.asked = True
    if _state.saved is None and not _state.raised:
        _state.raised = True
        raise KeyboardInterrupt


def _watch(reader: int, sentence: str) -> None:
    """Agrees with the other hosts when SIGTERM comes, and ends what has not ended in time."""
    end = None
    while select.select([reader], [], [], end and max(0.0, end - time.monotonic()))[0]:
        signals = os.read(reader, 64)
        if not signals:
            os.close(reader)
            return
        if signal.SIGTERM in signals and end is None:
            _state.asked, end = True, time.monotonic() + GRACE
            if _state.hosts:
                _state.hosts.agree(end)
    saved = _state.saved
    leave(PREEMPTED, f"Stopped amid a step; {saved()}" if saved else sentence)


def _heed_notice() -> None:
    """From now on Cloud's notice is SIGTERM, which not every container hands on to what it runs.

    Only on a machine of Cloud is a server asked; as in Cloud's libraries, GCE_METADATA_HOST in the
    environment names another.
    """
    server = os.environ.get("GCE_METADATA_HOST", "")
    if not server and _PRODUCT.exists() and _PRODUCT.read_bytes().startswith(b"Google"):
        server = _SERVER
    if server:
        threading.Thread(target=_await_notice, args=(server,), name="notice", daemon=True).start()


def _await_notice(server: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is no site
    etag = "0"  # of no answer: the first one comes at once
    while True:
        request = urllib.request.Request(
            f"http://{server}/{_QUESTION}{etag}", headers={"Metadata-Flavor": "Google"}
        )
        try:
            with opener.open(request, timeout=90) as answer:
                etag, preempted = answer.headers.get("ETag", "0"), answer.read().strip()
        except (OSError, http.client.HTTPException):
            time.sleep(_AGAIN)
            continue
        if preempted == b"TRUE":
            print("Cloud is taking this machine away.", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def ends_alone() -> bool:
    """Whether SIGTERM came, and there is no other host to agree with."""
    return _state.asked and not _state.hosts


@contextlib.contextmanager
def between_steps(saved: Callable[[], str]) -> Iterator[None]:
    """A block that asks `reached` after each step; SIGTERM raises KeyboardInterrupt at its end.

    `saved` says what is saved, as the second half of a sentence.
    """
    _state.saved = saved
    try:
        yield
    finally:
        _state.saved = None
    if _state.asked and not _state.raised:
        _state.raised = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Of `between_steps` a part that SIGTERM interrupts, unless there are hosts to agree with."""
    saved = _state.saved
    if not _state.hosts:
        _state.saved = None
    try:
        yield
    finally:
        _state.saved = saved


def reached() -> bool:
    """Whether to save and end now; every host asks after every step, and is told the same."""
    with _lock:
        _state.count += 1
        return _state.count == _state.agreed if _state.hosts else _state.asked


def leave(code: int, sentence: str) -> None:
    """Ends the process at once, whatever its threads do, with a sentence."""
    _ending.acquire()  # for good: there is one end, and one sentence
    _say(sentence)
    if _state.hosts:
        _state.hosts.part()
    _exit(code)


def at_exit(function: Callable[[], object]) -> None:
    """Has a function called when the process ends, at once as well; not when it is killed."""
    atexit.register(function)
    _at_exit.append(function)


def _exit(code: int) -> None:
    for function in _at_exit:
        function()
    os._exit(code)


def _say(sentence: str) -> None:
    print(f"\n{sentence}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def join(client: Any, index: int, count: int) -> None:
    """From now on this host tells the others how it ends, and ends with them.

    Args:
      client: JAX's, of the store of keys and values that all hosts share.
    """
    _state.hosts = _Hosts(client, index, count)
    threading.Thread(target=_state.hosts.listen, daemon=True).start()


def meet_hosts(what: str) -> None:
    """Returns when every host has called it with this `what`, which it does once.

    However long that takes: collectives give a late host up, those of a CPU after 30 s.
    """
    if _state.hosts:
        _state.hosts.meet(what)


def fail_together(error: BaseException, code: int = 1) -> None:
    """With other hosts, says why this one ends, ends them, and this process; else returns."""
    if not _state.hosts:
        return
    name = "" if isinstance(error, SystemExit | KeyboardInterrupt) else f"{type(error).__name__}: "
    text = " ".join(f"{name}{error}".split())
    if _LOST.search(text):
        name, code = "", PREEMPTED if _state.asked else code
        text = (
            "Error: another host is gone, or cannot be reached; started again on all hosts, the "
            f"same command goes on from what is saved. ({text[:200]})"
        )
    _ending.acquire()
    if name:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        _say(text)
    _state.hosts.fail(text)
    _exit(code)


class _Hosts:
    """What hosts tell one another, under keys "stop/2", "failed/2" and "left/2" of host 2.

    JAX tells of a dead host after long, and of one that raised not at all while others compute.
    """

    _FOLDER = "concat_jax/"

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        self._stops = False

    def _tell(self, what: str, text: str = "") -> None:
        self._client.key_value_set(f"{self._FOLDER}{what}/{self._index}", text)

    def _told(self, what: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{self._FOLDER}{what}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}

    def listen(self) -> None:
        """Until the end of the process, which it brings about where another host failed."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and JAX ends the process
            while True:
                time.sleep(_POLL)
                for host, text in self._told("failed").items():
                    if host != self._index:
                        leave(1, f"Host {host} of {self._count} ended: {text}")
                if not self._stops and self._told("stop"):
                    self._stops = True
                    os.kill(os.getpid(), signal.SIGTERM)

    def agree(self, end: float) -> None:
        """Has `reached` be true after the step that follows the last one that any host began."""
        self._stops = True
        with _lock:  # no host begins another step until all have said where they are
            self._tell("stop", str(_state.count))
            while len(counts := self._told("stop")) < self._count:
                if time.monotonic() > end:
                    return
                time.sleep(0.05)
            _state.agreed = 1 + max(map(int, counts.values()))

    def meet(self, what: str) -> None:
        """Returns when every host has told what this one tells; `listen` ends it if one fails."""
        self._tell(what)
        while len(self._told(what)) < self._count:
            time.sleep(0.05)

    def fail(self, text: str) -> None:
        """Ends the other hosts; returns when they have heard why."""
        with contextlib.suppress(RuntimeError):
            self._tell("failed", text)
            # Of hosts that fail all together the first, which keeps the store, is the last to go.
            self._wait(("left",) if self._index == 0 else ("left", "failed"))
            self._tell("left")

    def part(self) -> None:
        """Before the process ends; the first host, which keeps the store, waits for the others."""
        with contextlib.suppress(RuntimeError):
            self._tell("left")
            if self._index == 0:
                self._wait(("left",))

    def _wait(self, ways: tuple[str, ...]) -> None:
        end, others = time.monotonic() + _FAREWELL, {*range(self._count)} - {self._index}
        while others - {host for way in ways for host in self._told(way)}:
            if time.monotonic() > end:
                return
            time.sleep(0.05)
