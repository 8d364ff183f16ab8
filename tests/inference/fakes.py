"""A segmentor and a head that answer with a known picture, without weights."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.inference.heads import ClassScores
from concat_jax.inference.programs import Network
from concat_jax.models.segmentor_output import SegmentorOutput, normalize_images

# Pixels of images: void, and one bright channel for each of three queries.
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class FakeSegmentor:
    """Query n is where channel n of the image is bright. Programs that are traced are listed."""

    traced: list[tuple[tuple[int, ...], bool]] = dataclasses.field(default_factory=list)
    stride: int = 2
    normalize = staticmethod(normalize_images)

    def apply(self, variables, images, image_size):
        self.traced.append((images.shape, image_size is not None))
        features = images[:, :: self.stride, :: self.stride] * 8.0
        embeddings = jnp.broadcast_to(2 * jnp.eye(3) - 1, (len(images), 1, 3, 3))
        return SegmentorOutput(embeddings, embeddings, features)


@flax.struct.dataclass
class FakeHead:
    """The probabilities [N, K+1] that it is given."""

    probs: Any
    KEEP_RULE: ClassVar[str] = "objectness"
    SCORE_THRESHOLD: ClassVar[float] = 0.8

    @property
    def num_classes(self) -> int:
        return self.probs.shape[-1] - 1

    def __call__(self, queries: jax.Array) -> ClassScores:
        probs = jnp.broadcast_to(self.probs, (len(queries), *self.probs.shape))
        return ClassScores(probs, 1.0 - probs[..., -1])


def network(traced=None) -> Network:
    return Network({}, FakeSegmentor([] if traced is None else traced))


def example(number: int, ids: np.ndarray, labels) -> dict:
    """The example of an id map whose segment n is where query n - 1 is."""
    return {
        "image": COLOURS[ids],
        "segment_ids": ids,
        "segment_labels": np.asarray(labels),
        "segment_is_crowd": np.zeros(len(labels), bool),
        "image_id": number,
        "file_name": f"{number}.png",
    }
