"""Computes the batches of coming steps in threads while the current one is used."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

from concat_jax.core import stopping
from concat_jax.core.progress import Progress

T = TypeVar("T")
_NUMBERS = itertools.count()  # of the iterators
# What a stage trains on: the numbers of steps, of any order -> their batches, which are the same
# whenever asked, so that a resumed run begins at its step. Closing the generator stops what is
# computed ahead.
Batches = Callable[[Sequence[int]], Generator[T]]


def prefetch(
    batch_fn: Callable[[int], T],
    start_step: int,
    num_steps: int | None,
    depth: int = 2,
    num_threads: int = 2,
) -> Generator[T]:
    """Yields batch_fn(start_step), batch_fn(start_step + 1), ... in this order, computed ahead.

    `batch_fn` is a function of the step alone and is called from several threads, so there is no
    state to save: a resumed run starts at the step it resumes at. At most `depth` batches are
    computed or waiting, besides the one that the consumer holds; an exception is raised at its
    step, after all batches before it. Closing the iterator waits for what was begun, whose threads
    end then. Nothing is put on a device here.
    """
    steps = itertools.islice(itertools.count(start_step), num_steps)
    name = f"prefetch{next(_NUMBERS)}"
    pool = futures.ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    pending: collections.deque[futures.Future[T]] = collections.deque()
    try:
        for step in itertools.islice(steps, depth):
            pending.append(pool.submit(batch_fn, step))
        while pending:
            batch = pending.popleft().result()
            # Refilled before the yield: the threads work while the consumer does.
            for step in itertools.islice(steps, 1):
                pending.append(pool.submit(batch_fn, step))
            yield batch
    finally:
        # The last first, so that none begins meanwhile.
        begun = [future for future in reversed(pending) if not future.cancel()]
        # An iterator that nobody closed is closed by the garbage collector, in any thread: in one
        # of the pool, which would wait for itself, or where the lock is held by which threads end,
        # so that none may be joined.
        if not threading.current_thread().name.startswith(f"{name}_"):
            futures.wait(begun)
        pool.shutdown(wait=False)


def in_threads(batch_fn: Callable[[int], T]) -> Batches[T]:
    """`Batches` of a function of the step alone, computed ahead by one thread."""
    return lambda steps: prefetch(
        lambda i: batch_fn(steps[i]), 0, len(steps), depth=4, num_threads=1
    )


def watched(iterator: Iterator[T], name: str, done: int, first: float = 30.0) -> Iterator[T]:
    """What `iterator` yields; says so where the next item does not come for `first` seconds.

    And again after twice as long, and so on; `name` and `done`, the number of items before, head
    the line. Ends early where SIGTERM comes to a host that is alone while it waits.
    """
    pool = futures.ThreadPoolExecutor(1, thread_name_prefix="watched")
    end: Any = object()
    future = None
    try:
        for count in itertools.count(done):
            began, due = time.monotonic(), first
            future = pool.submit(next, iterator, end)
            while not futures.wait([future], timeout=min(1.0, due)).done:
                if stopping.ends_alone():
                    future = None
                    return
                if (waited := time.monotonic() - began) >= due:
                    print(f"{name} has waited {waited:.0f} s for the batch of step {count}.")
                    due *= 2
            if (item := future.result()) is end:
                return
            yield item
    finally:
        pool.shutdown(wait=False)
        if future:
            futures.wait([future])
            iterator.close()


def with_progress(name: str, result_of: Callable[[int], T], count: int) -> Iterator[T]:
    """Yields result_of(0) to result_of(count - 1), computed in threads; prints how far it is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(8, cores or 1)  # a disk may be far away
    progress = Progress(name, 0, count, every=5.0)
    results = prefetch(result_of, 0, count, depth=2 * workers, num_threads=workers)
    with contextlib.closing(results):
        for done, result in enumerate(results, start=1):
            yield result
            progress.tick(done)
