"""Batches for training and examples for evaluation, from any source of images and segments.

The loader is random access: `batch(step)` is a pure function of (seed, step, process), computed by
threads, so a resumed run needs no iterator state.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, Literal

import numpy as np
from PIL import Image

from concat_jax.core.batch import FIELDS, SEGMENT_TABLES, id_dtype, pad_table
from concat_jax.core.config import check_choice
from concat_jax.core.files import FileError
from concat_jax.core.prefetch import prefetch
from data_pipelines import augment as geometry
from data_pipelines.buffers import Buffers
from data_pipelines.epochs import epoch_order
from data_pipelines.id_runs import keep_largest_segments
from data_pipelines.leak_test import check_no_leak
from data_pipelines.sources.source import (
    ImageRecord,
    Source,
    UnseenImages,
    keep_rows,
    treat_unseen,
)

logger = logging.getLogger(__name__)

# Last word of each generator's key, so that the streams of one seed differ. The epoch order is
# default_rng([seed, epoch]), which numpy treats as [seed, epoch, 0].
_JITTER_STREAM, _CAPTION_STREAM = 1, 2

# An index into the records, its image, and its id map [H, W].
Read = tuple[int, Image.Image | np.ndarray, np.ndarray]


class SegmentationLoader:
    """Training batches and evaluation examples of one source.

    `batch` and `caption_batch` draw from the training images, the [M] positions `training_indices`
    in `records`; `eval_examples` walks through every image of the part, whatever `unseen_images`
    says, because evaluation is over all classes.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        image_size: int,
        max_segments: int = 100,
        unseen_images: UnseenImages = "drop",
        on_bad_example: Literal["raise", "skip"] = "raise",
        augment: str = "lsj",
        scale_range: tuple[float, float] = (0.1, 2.0),
        num_eval_images: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 8,
    ):
        """Decides what training may use of the source; no image is read yet.

        Args:
          seed: >= 0; decides order, jitter and captions.
          max_segments: rows G of the tables, 1..65535. Of an image with more segments after the
            crop, the G largest stay and the others become void. 100 is the number of queries:
            more could not be matched.
          unseen_images: "drop", "void" or "keep"; see `source.treat_unseen`.
          on_bad_example: what a training image does that cannot be used: "raise" a FileError, or
            "skip": the next good image in the epoch's order takes its place, the file is logged
            once and counted in `skipped`. Evaluation always raises: a skipped image would change
            the metric in silence.
          augment, scale_range: see `augment.augment_example`.
          num_eval_images: evaluate on the first so many images by id; None takes all.
        """
        for name, value, least in (
            ("seed", seed, 0),
            ("image_size", image_size, 1),
            ("max_segments", max_segments, 1),
            ("num_eval_images", 1 if num_eval_images is None else num_eval_images, 1),
            ("num_threads", num_threads, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value} and must be at least {least}.")
        if max_segments > 65535:
            raise ValueError(f"max_segments is {max_segments}; id maps hold at most 65535.")
        check_choice(on_bad_example, ("raise", "skip"), "on_bad_example cannot be")
        check_choice(augment, geometry.KINDS, "augment cannot be")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range is {scale_range} and must be 0 < low <= high.")
        self.source, self.vocabulary, self.records = source, source.vocabulary, source.records
        self._training, self.training_indices = treat_unseen(source, unseen_images)
        if unseen_images != "keep":
            check_no_leak(self._training, self.training_indices)
        self.num_eval_images = min(num_eval_images or len(self.records), len(self.records))
        self._seed, self._size = seed, image_size
        self.max_segments, self._augment = max_segments, augment
        self._scale_range = scale_range
        self._zero_shot, self._skip = unseen_images != "keep", on_bad_example == "skip"
        self._process_index, self._process_count = process_index, process_count
        self._is_thing = np.array(self.vocabulary.is_thing)
        self.num_threads, self._buffers = num_threads, Buffers()
        self._pool = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
        self.skipped: set[str] = set()  # files of images that could not be used, so far
        self._lock = threading.Lock()

    def batch(self, step: int, batch_size: int) -> dict[str, np.ndarray]:
        """This process's share of the global batch of a step, a pure function of both.

        Every epoch visits each training image once, in an order of its own; the epochs follow one
        another without a gap. `batch_size` is global and a multiple of process_count; the global
        batch does not depend on how many processes share it. Segments that the crop removed have no
        row. Raises FileError if an image cannot be used (see on_bad_example), or none is left to
        train on.
        """
        return self.draw(self.positions(step, batch_size), self._usable_image)

    def draw(self, positions: Iterable[int], read: Callable[[int], Read]) -> dict[str, np.ndarray]:
        """The training batch of positions in the endless stream of epochs.

        `read` gives for a position the index of its record, the image and the id map, of which
        nothing unseen is left; it is called in threads.
        """
        positions = list(positions)
        # Examples are drawn where they stay: copying them together would cost as much as an id map.
        shape = (len(positions), self._size, self._size)
        images = self._buffers.empty((*shape, 3), np.uint8)
        id_maps = self._buffers.empty(shape, id_dtype(self.max_segments))
        id_maps[:] = 0
        examples = functools.partial(self._training_example, read)
        tables = list(self._pool.map(examples, positions, images, id_maps))
        rest = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
        return {"image": images, "segment_ids": id_maps, **rest}

    def caption_batch(self, step: int, batch_size: int, size: int) -> dict[str, Any]:
        """Image-caption pairs for a small CLIP of one's own, a pure function of the step.

        The picture is the crop of a seen segment's bounding box in a training image (a rectangle,
        never cut out along the mask), stretched to a square; the caption is its class's name. This
        process's share: [batch_size / process_count, size, size, 3] uint8, and a list of captions.
        """
        positions = self.positions(step, batch_size)
        if not len(self._caption_segments):
            raise FileError("There is no seen segment in any image that training may use.")
        load = functools.partial(self._caption_pair, size=size)
        images, captions = zip(*self._pool.map(load, positions), strict=True)
        return {"image": np.stack(images), "captions": list(captions)}

    def eval_examples(
        self, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, Any]]:
        """The images of the part by ascending id, at native size, decoded ahead in threads.

        Every host gets equally many examples, every process_count-th from its own on, so that they
        stay in step; where `is_padding` is True it is a copy of the last image without segments,
        not to be scored.
        """

        def example(step: int) -> dict[str, Any]:
            index = step * process_count + process_index
            if index < self.num_eval_images:
                return dict(self.eval_example(index), is_padding=np.bool_(False))
            last = self.eval_example(self.num_eval_images - 1)
            tables = {k: np.full_like(last[k], FIELDS[k].padding) for k in SEGMENT_TABLES}
            empty = np.zeros_like(last["segment_ids"])
            return {**last, **tables, "segment_ids": empty, "is_padding": np.bool_(True)}

        threads = self.num_threads
        number = -(-self.num_eval_images // process_count)
        yield from prefetch(example, 0, number, threads + 1, threads)

    def eval_example(self, index: int) -> dict[str, Any]:
        """The un-augmented example of records[index] at native size, without batch axis.

        `file_name` comes with it, and of instances that may hide each other `segment_masks`, the
        run lengths of the tables' first rows: what is scored, as the id map is not. No segment is
        ever left out: tables hold max_segments rows, or as many as the image has if more. Raises
        FileError if the image cannot be used, always.
        """
        record = self.records[index]
        image, segment_ids = self.source.read(record)
        length = max(self.max_segments, len(record.labels))
        segment_ids, rows = keep_largest_segments(segment_ids, length)
        masks = getattr(self.source, "masks", None)
        return {
            **({} if masks is None else {"segment_masks": [masks(record)[row] for row in rows]}),
            "image": np.array(image),
            "segment_ids": segment_ids,
            **self._tables(record, rows, segment_ids.shape, length),
            "file_name": record.file_name,
        }

    def positions(self, step: int, batch_size: int) -> range:
        """This process's positions of a step in the endless stream of epochs."""
        # The processes take consecutive slices of each global batch, the order in which jax
        # assembles process-local data into a global array.
        if step < 0 or batch_size < 1 or batch_size % self._process_count:
            raise ValueError(
                f"step {step} must not be negative and batch_size {batch_size} must be a positive "
                f"multiple of process_count {self._process_count}."
            )
        share = batch_size // self._process_count
        first = step * batch_size + self._process_index * share
        return range(first, first + share)

    def _training_example(
        self,
        read: Callable[[int], Read],
        position: int,
        canvas: np.ndarray,
        id_canvas: np.ndarray,
    ) -> dict[str, np.ndarray]:
        # Draws onto [S, S, 3] and void [S, S]; returns the tables.
        index, image, segment_ids = read(position)
        if self._zero_shot:
            # Of the whole image, not only what the crop leaves, and never skipped.
            check_no_leak(self._training, [index])
        record = self._training.records[index]
        _, placed, rows = geometry.augment_example(
            self._augment,
            np.random.default_rng([self._seed, position, _JITTER_STREAM]),
            image,
            segment_ids,
            self._size,
            scale_range=self._scale_range,
            max_segments=self.max_segments,
            canvas=canvas,
        )
        height, width = placed.shape
        id_canvas[:height, :width] = placed
        return self._tables(record, rows, placed.shape, self.max_segments)

    @functools.cached_property
    def _caption_segments(self) -> np.ndarray:
        # [M, 2]: position in records, row of its tables.
        is_seen = np.array(self.vocabulary.is_seen)
        pairs = [
            (index, row)
            for index in self.training_indices
            for row in np.flatnonzero(is_seen[self._training.records[index].labels])
        ]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def _caption_pair(self, position: int, *, size: int) -> tuple[np.ndarray, str]:
        (index, row), image, segment_ids = self._first_usable(
            self._caption_segments, position, _CAPTION_STREAM
        )
        mask = segment_ids == row + 1
        y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1)
        # Cropped first: `resize(box=...)` would mix in pixels from beyond the box.
        crop = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(crop), self.vocabulary.names[self._training.records[index].labels[row]]

    def index_at(self, position: int) -> int:
        """The record that a position in the endless stream of epochs shows, if it can be used."""
        if not len(self.training_indices):
            raise FileError(
                "No image is left for training without its unseen classes: nothing to train on."
            )
        epoch, place = divmod(position, len(self.training_indices))
        order = epoch_order(len(self.training_indices), self._seed, epoch)
        return int(self.training_indices[order[place]])

    def without_unseen(self, index: int, segment_ids: np.ndarray) -> np.ndarray:
        """The id map of a record of `source` as training may see it."""
        if self._training is self.source:
            return segment_ids
        is_seen = np.array(self.vocabulary.is_seen)
        return keep_rows(segment_ids, is_seen[self.records[index].labels])

    def _usable_image(self, position: int) -> Read:
        self.index_at(position)
        images = self.training_indices[:, None]
        (index,), image, segment_ids = self._first_usable(images, position)
        return index, image, segment_ids

    def _first_usable(
        self, choices: np.ndarray, position: int, *stream: int
    ) -> tuple[np.ndarray, Image.Image, np.ndarray]:
        # The choice at a position in the endless stream of epochs, or the first after it that can
        # be used, and what `read` gives for it. Choices [M, 1] are images; [M, 2] are segments of
        # them (their rows), which are passed over where others hide them.
        count = len(choices)
        epoch, start = divmod(position, count)
        order = epoch_order(count, self._seed, epoch, *stream)
        for k in range(count):
            choice = choices[order[(start + k) % count]]
            record = self._training.records[choice[0]]
            try:
                image, segment_ids = self._training.read(record)
                if len(choice) == 1 or (segment_ids == choice[1] + 1).any():
                    return choice, image, segment_ids
            except FileError as error:
                if not self._skip:
                    raise
                with self._lock:
                    is_new = record.file_name not in self.skipped
                    self.skipped.add(record.file_name)
                if is_new:
                    logger.warning("Skipped a training image: %s", error)
        raise FileError("Not one of the training images can be used.")

    def _tables(
        self, record: ImageRecord, rows: np.ndarray, image_size: tuple[int, int], length: int
    ) -> dict[str, np.ndarray]:
        # All fields that are not pixels.
        labels = record.labels[rows]
        tables = {
            "segment_labels": labels,
            "segment_is_thing": self._is_thing[labels],
            "segment_is_crowd": record.is_crowd[rows],
            "segment_source_ids": record.source_ids[rows],
        }
        return {
            "image_id": np.int64(record.image_id),
            "image_size": np.array(image_size, np.int32),
            **{name: pad_table(values, name, length) for name, values in tables.items()},
        }
