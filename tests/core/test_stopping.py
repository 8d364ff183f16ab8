"""SIGTERM between steps and elsewhere, and what hosts tell one another; a dict is their store.

A server of our own stands for Cloud's.
"""

import http.server
import os
import signal
import threading
import time
import urllib.parse

import pytest

from concat_jax.core import stopping


class Store(dict):
    """As much of JAX's as is used."""

    key_value_set = dict.__setitem__

    def key_value_dir_get(self, folder):
        return [(key, text) for key, text in list(self.items()) if key.startswith(folder)]


class Gone:
    """A store whose host has ended."""

    def key_value_dir_get(self, folder):
        raise RuntimeError("UNAVAILABLE")


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def state(monkeypatch):
    monkeypatch.setattr(stopping, "_state", stopping._State())
    monkeypatch.setattr(stopping, "_ending", threading.Lock())
    monkeypatch.setattr(stopping, "_FAREWELL", 0.2)
    return stopping._state


@pytest.fixture
def ends(monkeypatch):
    """Exit codes that the process would have had."""
    codes = []

    def end(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(stopping.os, "_exit", end)
    return codes


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_steps_sigterm_is_ctrl_c_once():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(stopping.Terminated):
        with stopping.catching_sigterm("Stopped."):
            try:
                terminate()
                cleaned.append("not here")
            finally:
                terminate()  # the platform may insist; what is pending is finished first
                cleaned.append("here")
    assert cleaned == ["here"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_between_steps_sigterm_waits_for_the_end_of_the_step():
    done = []
    with pytest.raises(stopping.Terminated):
        with stopping.catching_sigterm("Stopped."):
            with stopping.between_steps(lambda: "step 1 is saved."):
                for step in range(5):
                    if step == 2:
                        terminate()
                    done.append(step)
                    if stopping.reached():
                        break
            done.append("not here")
    assert done == [0, 1, 2]


def test_sigterm_during_the_last_step_is_not_lost():
    with pytest.raises(stopping.Terminated):
        with stopping.catching_sigterm("Stopped."), stopping.between_steps(str):
            terminate()


@pytest.mark.parametrize("within", [True, False])
def test_what_cannot_be_interrupted_is_left(within, monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(stopping, "GRACE", 0.1)
    monkeypatch.setattr(stopping.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with stopping.catching_sigterm("Stopped."):
        stopping._state.raised = True  # Python's handler waits for C code, as it were
        stopping._state.saved = (lambda: "step 4 is saved.") if within else None
        terminate()
        assert ended.wait(10)
        stopping._state.saved = None
    assert codes == [75]
    said = "Stopped amid a step; step 4 is saved." if within else "Stopped."
    assert capfd.readouterr().err == f"\n{said}\n"


def test_hosts_agree_on_the_step_after_the_farthest(state):
    store = Store()
    state.hosts = stopping._Hosts(store, 0, 2)
    for _ in range(3):
        assert not stopping.reached()
    store["concat_jax/stop/1"] = "5"  # two steps ahead
    state.asked = True
    state.hosts.agree(time.monotonic() + 10)
    assert store["concat_jax/stop/0"] == "3"
    assert [stopping.reached() for _ in range(4)] == [False, False, True, False]


def test_no_step_begins_before_all_have_said_where_they_are(state):
    store = Store()
    state.hosts = stopping._Hosts(store, 1, 2)
    agreeing = threading.Thread(target=state.hosts.agree, args=(time.monotonic() + 20,))
    agreeing.start()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(stopping.reached()))
    while "concat_jax/stop/1" not in store:
        time.sleep(0.01)
    asking.start()
    asking.join(0.2)
    assert not answers
    store["concat_jax/stop/0"] = "0"
    agreeing.join()
    asking.join()
    assert answers == [True]


def test_hosts_meet(state):
    store = Store({"concat_jax/compiled cat/0": ""})
    state.hosts = stopping._Hosts(store, 1, 2)
    stopping.meet_hosts("compiled cat")
    meeting = threading.Thread(target=stopping.meet_hosts, args=("compiled con",))
    meeting.start()
    meeting.join(0.2)
    assert meeting.is_alive() and "concat_jax/compiled con/1" in store
    store["concat_jax/compiled con/0"] = ""
    meeting.join(10)
    assert not meeting.is_alive()


def test_a_host_that_fails_says_so_and_waits_until_the_others_have_heard(state, ends, capfd):
    store = Store({"concat_jax/left/0": ""})
    state.hosts = stopping._Hosts(store, 1, 2)
    with pytest.raises(Ended):
        stopping.fail_together(SystemExit("Error: image 7 is damaged."))
    assert ends == [1] and capfd.readouterr().err == "\nError: image 7 is damaged.\n"
    assert store["concat_jax/failed/1"] == "Error: image 7 is damaged."
    assert "concat_jax/left/1" in store


def test_a_bug_keeps_its_traceback(state, ends, capfd):
    state.hosts = stopping._Hosts(Store({"concat_jax/failed/0": ""}), 1, 2)
    with pytest.raises(Ended):
        stopping.fail_together(KeyError("name"))
    assert "KeyError: 'name'" in capfd.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_a_host_that_is_gone_is_called_so(state, ends, capfd, asked):
    state.asked = asked
    state.hosts = stopping._Hosts(Store(), 1, 2)
    with pytest.raises(Ended):
        stopping.fail_together(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed"))
    assert ends == [75 if asked else 1]
    assert capfd.readouterr().err.startswith("\nError: another host is gone, or cannot be reached;")


def test_the_others_hear_and_end(state, ends, monkeypatch, capfd):
    monkeypatch.setattr(stopping, "_POLL", 0.0)
    store = Store({"concat_jax/failed/1": "Error: image 7 is damaged."})
    state.hosts = stopping._Hosts(store, 0, 2)
    with pytest.raises(Ended):
        state.hosts.listen()
    assert ends == [1] and "concat_jax/left/0" in store
    assert capfd.readouterr().err == "\nHost 1 of 2 ended: Error: image 7 is damaged.\n"


def test_sigterm_of_another_host_is_ones_own(state, monkeypatch):
    monkeypatch.setattr(stopping, "_POLL", 0.0)
    state.hosts = stopping._Hosts(Store({"concat_jax/stop/1": "0"}), 0, 2)
    listener = threading.Thread(target=state.hosts.listen, daemon=True)
    monkeypatch.setattr(state.hosts, "agree", lambda end: None)
    with pytest.raises(stopping.Terminated):
        with stopping.catching_sigterm("Stopped."):
            listener.start()
            time.sleep(20)
    state.hosts._client = Gone()
    listener.join()


def test_alone_nobody_is_told():
    stopping.fail_together(ValueError("a"))


@pytest.fixture
def cloud(monkeypatch):
    """Questions that a server is asked, and the answers it gives, one after the other."""
    asked, answers = [], []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.headers["Metadata-Flavor"], urllib.parse.urlparse(self.path)))
            answer = answers.pop(0)
            self.send_response(200 if answer else 503)
            self.send_header("ETag", f"tag{len(answers)}")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://localhost:9")
        monkeypatch.setattr(stopping, "_AGAIN", 0.0)
        yield asked, answers
        server.shutdown()


def test_the_notice_is_sigterm(cloud, capsys):
    asked, answers = cloud
    answers += [b"FALSE", b"", b"FALSE", b"TRUE\n"]
    with pytest.raises(stopping.Terminated):
        with stopping.catching_sigterm("Stopped."):
            time.sleep(20)
    assert not answers and {flavor for flavor, _ in asked} == {"Google"}
    assert {url.path for _, url in asked} == {"/computeMetadata/v1/instance/preempted"}
    tags = [urllib.parse.parse_qs(url.query)["last_etag"] for _, url in asked]
    assert tags == [["0"], ["tag3"], ["tag3"], ["tag1"]]
    assert capsys.readouterr().out == "Cloud is taking this machine away.\n"


def test_elsewhere_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    before = threading.active_count()
    for product in ("", "ThinkPad"):
        monkeypatch.setattr(stopping, "_PRODUCT", tmp_path / "product_name")
        if product:
            (tmp_path / "product_name").write_text(product)
        stopping._heed_notice()
    assert threading.active_count() == before
