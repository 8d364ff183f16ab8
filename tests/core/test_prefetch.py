"""The prefetcher: order, bounds, errors and a clean end, without clocks."""

import contextlib
import threading
import time
from concurrent import futures

import pytest

from concat_jax.core import stopping
from concat_jax.core.prefetch import prefetch, watched


def _threads():
    """The threads that are left; those that are ending get half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [t for t in threading.enumerate() if t.name.startswith("prefetch")]
        if not found:
            break
        time.sleep(0.001)
    return found


def test_steps_come_in_order_whichever_finishes_first():
    later_done = threading.Event()

    def batch(step):
        if step == 3:
            assert later_done.wait(30)  # step 3 cannot finish before step 4 has
        if step == 4:
            later_done.set()
        return step * 10

    assert list(prefetch(batch, 3, 5, depth=3, num_threads=2)) == [30, 40, 50, 60, 70]
    assert not _threads()


def test_works_ahead_while_the_consumer_holds_a_batch_but_no_further_than_depth():
    started, lock = [], threading.Lock()
    reached = threading.Semaphore(0)

    def batch(step):
        with lock:
            started.append(step)
        reached.release()
        return step

    batches = prefetch(batch, 0, None, depth=3, num_threads=8)
    for taken in range(1, 6):
        assert next(batches) == taken - 1
        # One batch is with the consumer and three are ahead of it: exactly one new one each time.
        for _ in range(4 if taken == 1 else 1):
            assert reached.acquire(timeout=30)
        assert not reached.acquire(blocking=False)
        assert sorted(started) == list(range(taken + 3))
    batches.close()
    assert not _threads()


def test_an_error_keeps_its_type_and_its_place():
    class Broken(Exception):
        pass

    error = Broken("step 2")

    def batch(step):
        if step == 2:
            raise error
        return step

    batches = prefetch(batch, 0, 10, depth=4, num_threads=2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(Broken) as caught:
        next(batches)
    assert caught.value is error
    assert not _threads()
    assert list(batches) == []


def test_closing_early_cancels_what_has_not_begun_and_waits_for_what_has(monkeypatch):
    entered, release, finished, started = threading.Event(), threading.Event(), [], []

    def batch(step):
        started.append(step)
        if step == 1:
            entered.set()
            assert release.wait(30)
            finished.append(step)
        return step

    wait = futures.wait

    def release_then_wait(begun):
        # Step 1 goes on only when the closing has begun, so that it cannot be a matter of luck
        # whether step 2 starts before it is cancelled.
        release.set()
        return wait(begun)

    monkeypatch.setattr(futures, "wait", release_then_wait)
    batches = prefetch(batch, 0, 100, depth=5, num_threads=1)
    assert next(batches) == 0
    assert entered.wait(30)
    batches.close()
    assert started == [0, 1] and finished == [1] and not _threads()


def test_a_consumer_that_leaves_its_loop_leaves_no_thread():
    for batch in prefetch(lambda step: step, 0, None, depth=2, num_threads=2):
        if batch == 3:
            break
    assert not _threads()


def test_closing_joins_no_thread(monkeypatch):
    """The garbage collector may close, where the lock is held by which threads end."""
    batches = prefetch(lambda step: step, 0, None, depth=2, num_threads=2)
    assert next(batches) == 0

    def join(*_):
        raise AssertionError("a thread was joined")

    monkeypatch.setattr(threading.Thread, "join", join)
    batches.close()
    assert not _threads()


def test_a_thread_of_its_own_may_close_it():
    """As the garbage collector does, in whichever thread it runs."""
    batches, closed = None, threading.Event()

    def batch(step):
        if step == 1:
            assert given.wait(30)
            with contextlib.suppress(ValueError):  # where the consumer is inside
                batches.close()
            closed.set()
        return step

    given = threading.Event()
    batches = prefetch(batch, 0, None, depth=2, num_threads=1)
    assert next(batches) == 0
    given.set()
    assert closed.wait(30) and not _threads()


def test_zero_steps_and_any_start():
    assert list(prefetch(lambda step: step, 7, 0)) == []
    assert list(prefetch(lambda step: step, 7, 1)) == [7]


def test_an_input_that_stalls_is_reported_again_and_again(capsys):
    come = threading.Event()

    def slow():
        yield "a"
        come.wait(30)
        yield "b"

    items = watched(slow(), "Stage con", 7, first=0.02)
    assert next(items) == "a"
    later = threading.Timer(0.2, come.set)
    later.start()
    assert list(items) == ["b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Stage con has waited 0 s for the batch of step 8."
    assert 2 <= len(lines) <= 4  # after 0.02, 0.04, 0.08 and 0.16 s


def test_watched_items_end_and_fail_as_they_would():
    assert list(watched((letter for letter in "abc"), "", 0)) == ["a", "b", "c"]
    closed = []

    def failing():
        try:
            yield 1
            raise OSError("gone")
        finally:
            closed.append(True)

    items = watched(failing(), "", 0)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)
    items = watched(failing(), "", 0)
    next(items)
    items.close()
    assert closed == [True, True]


def test_sigterm_ends_a_wait_that_may_never_end(monkeypatch):
    come = threading.Event()

    def stuck():
        yield 1
        come.wait(30)

    items = watched(stuck(), "", 0, first=0.02)
    assert next(items) == 1
    monkeypatch.setattr(stopping._state, "asked", True)
    assert list(items) == []
    come.set()
