"""Training batches of a prepared data set by tf.data: read, parse, decode, augment and batch ahead.

Hosts share the records of each global batch, which is that of the folder loader whatever their
number: a run may go on with another number of hosts, or from the folder. The way of a record onto
the canvas is the loader's own, as is what training may see of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from concat_jax.core.batch import IMAGE_FIELDS, batch_shapes
from concat_jax.core.files import FileError
from data_pipelines.loader import Read, SegmentationLoader
from data_pipelines.prepared.files import tensorflow
from data_pipelines.prepared.source import PreparedSource

# Records read at once for each thread that decodes: an answer of a bucket takes 50 ms.
_READS = 4


def training_batches(
    loader: SegmentationLoader, steps: Sequence[int], batch_size: int
) -> Generator[Mapping[str, np.ndarray]]:
    """Yields what `loader.batch` gives for each of the steps, computed ahead.

    Args:
      loader: of a `PreparedSource`.
      batch_size: global.

    Raises FileError for a damaged record, at its step; none is passed over.
    """
    source: PreparedSource = loader.source
    tf, share = tensorflow("tensorflow"), len(loader.positions(0, batch_size))
    failures: list[Exception] = []

    def positions() -> Iterator[np.ndarray]:
        for step in steps:
            yield np.array(loader.positions(step, batch_size), np.int64)

    def payload(position: np.int64) -> bytes:
        return source.payload(loader.index_at(int(position)))

    def draw(positions: np.ndarray, payloads: np.ndarray) -> list[np.ndarray]:
        of = dict(zip(positions.tolist(), payloads.tolist(), strict=True))

        def read(position: int) -> Read:
            index = loader.index_at(position)
            image, ids = source.decode(index, of[position])
            return index, image, loader.without_unseen(index, ids)

        batch = loader.draw(of, read)
        return [batch[name] for name in IMAGE_FIELDS]

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        # TensorFlow makes an error of its own of any, and forgets the first one's kind.
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except Exception as error:
                failures.append(error)
                raise

        return call

    shapes = batch_shapes(IMAGE_FIELDS, G=loader.max_segments, C=0, S=0)
    types = [tf.as_dtype(shapes[name][1]) for name in IMAGE_FIELDS]
    threads = loader.num_threads
    data = tf.data.Dataset.from_generator(
        positions, output_signature=tf.TensorSpec([share], tf.int64)
    )
    data = data.unbatch().map(
        lambda position: (position, tf.numpy_function(noted(payload), [position], tf.string)),
        num_parallel_calls=_READS * threads,
        deterministic=True,
    )
    data = data.batch(share).map(
        lambda *rows: tf.numpy_function(noted(draw), rows, types),
        num_parallel_calls=2,
        deterministic=True,
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = _READS * threads + 2
    options.autotune.enabled = False
    iterator = data.prefetch(2).with_options(options).as_numpy_iterator()
    while True:
        try:
            values = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise failures[0] if failures else FileError(str(error)) from None
        yield dict(zip(IMAGE_FIELDS, values, strict=True))
