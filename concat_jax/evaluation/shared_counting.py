"""Counting over images by several processes, merged in order."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

# Images that a process takes at once: handing over is cheap, and progress shows.
CHUNK = 16


class Counts(Protocol):
    """Anything that sums up over images: the metrics of this folder."""

    def merge(self, other: Self) -> None:
        """Adds the counts of another one."""


def accumulate(
    total: Counts,
    score: Callable[[Sequence], Counts],
    jobs: Sequence,
    *,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merges score(chunk of jobs) into `total`, in the order of the chunks.

    The result is the same whatever the number of processes, and few chunks are under way at any
    time.

    Args:
      total: what is added to.
      score: chunk -> its counts. It and the jobs are pickled where there are several processes.
      jobs: one for each image.
      workers: processes; 1 works in this one.
      on_progress: called with (jobs done, jobs in all) after every chunk.

    Raises:
      ValueError: if a process dies; and whatever `score` raises.
    """
    done = 0
    chunks = (jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK))
    for size, counts in _in_order(score, chunks, min(workers, -(-len(jobs) // CHUNK))):
        total.merge(counts)
        done += size
        if on_progress:
            on_progress(done, len(jobs))


def _in_order(
    score: Callable[[Sequence], Counts], chunks: Iterator[Sequence], workers: int
) -> Iterator[tuple[int, Counts]]:
    if workers <= 1:
        for chunk in chunks:
            yield len(chunk), score(chunk)
        return
    # Spawned: the threads of a parent that has used JAX do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: collections.deque = collections.deque()
        try:
            for chunk in itertools.chain(chunks, [None] * 2 * workers):
                if chunk is not None:
                    pending.append((len(chunk), pool.submit(score, chunk)))
                if pending and (chunk is None or len(pending) > 2 * workers):
                    size, future = pending.popleft()
                    yield size, future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                "A process that scored images died, perhaps for want of memory; try --workers=1."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
