"""The synthetic world: endless, seeded panoptic scenes and image-caption pairs, drawn on the spot.

It needs no download. Class names are compositional ("red striped balloon"), so an unseen class is
an unseen combination of attributes that seen classes show in other combinations. The presets are
data in `presets.py`:

  texture  16 things (4 colours x 4 textures, any shape) and 12 stuff (3 hues x 4 patterns).
  shape    harder: 20 things (4 colours x 5 shapes, any texture) and the same 12 stuff.
  opaque   harder: the looks of texture, with an invented word for each name, so that what unseen
           classes look like is known from captions alone.
  attributes
           harder: 64 things and 24 stuff in continuous attributes, which instances scatter about;
           also drawn anew (attributes_redrawn), with invented words (attributes_opaque), with 16
           things seen (attributes_few), and with finer stripes than any seen class has
           (attributes_beyond).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from concat_jax.core.batch import pad_table
from concat_jax.core.config import check_choice
from data_pipelines.epochs import epoch_order
from data_pipelines.sources.source import keep_rows
from data_pipelines.synthetic import render
from data_pipelines.synthetic.presets import PRESETS, WorldPreset

# Textures of 5 to 7 pixels and radii are for this scene size; others scale with it.
REFERENCE_SIZE = 64
SPLITS = ("train", "validation", "test")
# Least and most regions of a scene.
NUM_STUFF = (2, 4)
# A segment of fewer pixels of the 64 x 64 scene becomes void, as no texture can be told below; so
# does a thing of which a smaller share is visible.
MIN_AREA, MIN_VISIBLE = 40, 0.4
# Random magnification of a caption's crop, texture included.
ZOOM = (0.8, 1.25)
# Random streams are keyed (seed, stream, index): scenes take 0.., caption images these and up.
_CAPTION_STREAM = 16


def _require_at_least(value: int, least: int, what: str) -> int:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def _allowed(preset: WorldPreset, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the thing and of the stuff classes that may be drawn: seen, unseen or all."""
    check_choice(which, ("seen", "all", "unseen"), "There is no set of classes")
    vocabulary = preset.vocabulary
    chosen = {
        "seen": vocabulary.seen,
        "unseen": vocabulary.unseen,
        "all": np.arange(len(vocabulary), dtype=np.int32),
    }[which]
    things, stuff = chosen[chosen < len(preset.things)], chosen[chosen >= len(preset.things)]
    if not len(things) or not len(stuff):
        raise ValueError(
            f"The preset {preset.name!r} has no {which} thing or no {which} stuff class to draw; "
            "choose other classes."
        )
    return things, stuff


def caption(names: Sequence[str]) -> str:
    """One caption for class names: "a red striped balloon and a grey wavy ground"."""
    return " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)


class SyntheticWorld:
    """Panoptic scenes with things and stuff; scene i of a split is a pure function of its key.

    The key is (preset, image_size, seed, split, classes, i), and the same scene is drawn at any
    size; batch size plays no part: step s of batch size B holds scenes s * B to s * B + B - 1. With
    `num_train_images` these are places in epochs of so many scenes, each in an order of its own. A
    scene holds only classes that `classes` allows, so with "seen" not a pixel of an unseen class
    exists.
    """

    def __init__(
        self,
        *,
        preset: str | WorldPreset = "texture",
        image_size: int = 64,
        seed: int = 0,
        split: str = "train",
        batch_size: int = 8,
        classes: str = "seen",
        max_segments: int = 12,
        num_eval_images: int = 200,
        num_train_images: int = 0,
    ):
        if not isinstance(preset, WorldPreset):
            check_choice(preset, PRESETS, "There is no preset")
            preset = PRESETS[preset]
        self.preset = preset
        self.vocabulary = self.preset.vocabulary
        # Below 16 pixels a thing has a radius of 2 to 4 and no texture is left.
        self.image_size = _require_at_least(image_size, 16, "image_size")
        self.seed = _require_at_least(seed, 0, "seed")
        # One 32-bit word each keeps the keys (seed, stream, index) of different streams apart.
        if seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {seed}.")
        check_choice(split, SPLITS, "The synthetic world has no split")
        self.split = split
        self.batch_size = _require_at_least(batch_size, 1, "batch_size")
        self._things, self._stuff = _allowed(self.preset, classes)
        most = NUM_STUFF[1] + self.preset.num_things[1]
        if most > max_segments:
            raise ValueError(
                f"max_segments is {max_segments}, but a scene may hold {NUM_STUFF[1]} stuff and "
                f"{self.preset.num_things[1]} thing segments; raise it to {most}."
            )
        if max_segments > 255:
            raise ValueError(f"max_segments must be at most 255 for 8-bit ids, got {max_segments}.")
        self.max_segments = max_segments
        self.num_eval_images = _require_at_least(num_eval_images, 1, "num_eval_images")
        self._num_train_images = _require_at_least(num_train_images, 0, "num_train_images")
        self._scale = self.image_size / REFERENCE_SIZE

    def example(self, index: int) -> dict[str, np.ndarray]:
        """Scene `index` of the split: one row of a batch of `IMAGE_FIELDS`, [H, W] all valid.

        Segment ids are without gaps, source ids 1, 2, ...; image ids are unique over the splits.
        """
        stream = SPLITS.index(self.split)
        rng = np.random.default_rng([self.seed, stream, index])
        image, segment_ids, labels = self._draw(rng)
        things = np.array(self.vocabulary.is_thing)
        tables = {
            "segment_labels": labels,
            "segment_is_thing": things[labels],
            "segment_is_crowd": np.zeros(len(labels), bool),
            "segment_source_ids": np.arange(1, len(labels) + 1),
        }
        return {
            "image": image,
            "segment_ids": segment_ids,
            **{k: pad_table(column, k, self.max_segments) for k, column in tables.items()},
            "image_id": np.int64((stream << 40) + index),
            "image_size": np.array([self.image_size, self.image_size], np.int32),
        }

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [H, W, 3] uint8, segment ids [H, W] uint8 and labels [g], small segments voided."""
        # Stuff is merged by class in panoptic ground truth, so one class is one region.
        most = min(NUM_STUFF[1], len(self._stuff))
        fewest = min(NUM_STUFF[0], most)
        stuff = rng.permutation(self._stuff)[: rng.integers(fewest, most + 1)]
        num_things = rng.integers(self.preset.num_things[0], self.preset.num_things[1] + 1)
        things = rng.choice(self._things, num_things)
        labels = np.concatenate([stuff, things])
        entries = self.preset.classes
        image, owner, full_areas = render.paint_scene(
            rng,
            [entries[k].look(rng, False) for k in stuff],
            [entries[k].look(rng, True) for k in things],
            size=self.image_size,
            scale=self._scale,
            radius=self.preset.radius,
        )
        areas = np.bincount(owner.ravel(), minlength=len(labels) + 1)[1:]
        needed = np.full(len(labels), max(MIN_AREA * self._scale**2, 1.0))
        needed[len(stuff) :] = np.maximum(needed[len(stuff) :], MIN_VISIBLE * full_areas)
        kept = areas >= needed
        return image, keep_rows(owner, kept), labels[kept]

    def _scene_at(self, place: int) -> int:
        if not self._num_train_images:
            return place
        epoch, place = divmod(place, self._num_train_images)
        return int(epoch_order(self._num_train_images, self.seed, epoch)[place])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch `step`: the fields of `example` stacked on a leading batch axis [B, ...]."""
        first = step * self.batch_size
        examples = [self.example(self._scene_at(first + b)) for b in range(self.batch_size)]
        return {key: np.stack([e[key] for e in examples]) for key in examples[0]}

    def eval_examples(self, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
        """The first `num_eval_images` scenes one by one: `example` and "file_name" (str).

        Of `process_count` hosts, each draws every process_count-th scene from its index on.
        """
        for index in range(process_index, self.num_eval_images, process_count):
            yield self.example(index) | {"file_name": f"{self.split}_{index:06d}.png"}


def draw_scenes(count: int, *, preset: str = "texture", image_size: int = 64) -> list[np.ndarray]:
    """Images [H, W, 3] uint8 of seen and unseen classes, to try a model on: of the test part."""
    world = SyntheticWorld(preset=preset, image_size=image_size, split="test", classes="all")
    return [world.example(index)["image"] for index in range(count)]


class CaptionWorld:
    """Image-caption pairs that teach a small CLIP the words of a preset; its streams are its own.

    Pictures are rendered apart from all panoptic scenes and never cut out by a mask. A batch mixes

      crops   a picture of one class at native scale: a thing on a random ground, or a window filled
              with a stuff pattern. The caption is the class name.
      scenes  a whole small scene, captioned with the classes visible in it.

    As on the web, captions name seen and unseen classes alike; no picture comes with a mask.

    Args:
      image_size: size of the scenes that the CLIP is for; sets the native scale.
      crop_size: height and width h of all pictures. Scenes are averaged down to it, which needs
        image_size to be a multiple of it (equal: native scale).
      scene_ratio: share of scenes in every batch, in [0, 1], rounded to whole pictures.
    """

    def __init__(
        self,
        *,
        preset: str | WorldPreset = "texture",
        image_size: int = 64,
        seed: int = 0,
        split: str = "train",
        batch_size: int = 64,
        classes: str = "all",
        crop_size: int = 32,
        scene_ratio: float = 0.25,
    ):
        # The scene generator checks the arguments that both worlds share.
        self._scenes = SyntheticWorld(
            preset=preset, image_size=image_size, seed=seed, split=split, classes=classes
        )
        self.preset, self.vocabulary = self._scenes.preset, self._scenes.vocabulary
        self.batch_size = _require_at_least(batch_size, 1, "batch_size")
        self.crop_size = _require_at_least(crop_size, 8, "crop_size")
        if not 0.0 <= scene_ratio <= 1.0:
            raise ValueError(f"scene_ratio must lie in [0, 1], got {scene_ratio}.")
        self._num_scenes = round(scene_ratio * batch_size)
        if self._num_scenes and image_size % crop_size:
            raise ValueError(
                f"Scenes of {image_size} pixels cannot be averaged down to crop_size {crop_size}; "
                "make image_size a multiple of it or set scene_ratio to 0."
            )
        self._key = [self._scenes.seed, _CAPTION_STREAM + SPLITS.index(split)]
        self._labels = np.concatenate(_allowed(self.preset, classes))
        self._scale = image_size / REFERENCE_SIZE

    def batch(self, step: int) -> dict[str, np.ndarray | list[str]]:
        """Batch `step`, a pure function of (seed, split, step).

        image [B, h, w, 3] uint8; captions, a list of B strings; labels [B] int32, the class of a
        crop and -1 for a scene. Crops of K allowed classes hold each class floor or ceil of their
        number / K times, so up to K crops all differ.
        """
        rng = np.random.default_rng([*self._key, step])
        num_crops = self.batch_size - self._num_scenes
        rounds = 1 + num_crops // len(self._labels)
        crops = np.concatenate([rng.permutation(self._labels) for _ in range(rounds)])[:num_crops]
        labels = np.concatenate([crops, np.full(self._num_scenes, -1, np.int32)])
        labels = rng.permutation(labels)
        pairs = [self._scene(rng) if label < 0 else self._crop(rng, label) for label in labels]
        return {
            "image": np.stack([image for image, _ in pairs]),
            "captions": [text for _, text in pairs],
            "labels": labels,
        }

    def _crop(self, rng: np.random.Generator, label: int) -> tuple[np.ndarray, str]:
        """Picture [h, w, 3] uint8 of one class and its name."""
        entry, size = self.preset.classes[label], self.crop_size
        scale = self._scale * rng.uniform(*ZOOM)
        light, is_thing = render.light_direction(rng), label < len(self.preset.things)
        behind = [label]
        if is_thing:  # in front of any allowed ground, now and then of the border of two
            stuff = self._labels[self._labels >= len(self.preset.things)]
            behind = rng.permutation(stuff)[: 1 + (rng.random() < 0.3)]
        grounds = [self.preset.classes[k].look(rng, False) for k in behind]
        canvas, _ = render.paint_ground(rng, grounds, size, size, scale)
        if is_thing:
            x, y = (size * (0.5 + rng.uniform(-0.1, 0.1, 2))).tolist()
            look = entry.look(rng, True)
            radius = min(rng.uniform(*self.preset.radius) * scale, 0.5 * size)
            render.paint_thing(
                rng, canvas, look, centre=(x, y), radius=radius, scale=scale, light=light
            )
        return render.finish(rng, canvas, light), entry.name

    def _scene(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Picture [h, w, 3] uint8 of a scene and a caption that lists its visible classes."""
        image, _, labels = self._scenes._draw(rng)
        factor = len(image) // self.crop_size
        if factor > 1:
            blocks = image.reshape(self.crop_size, factor, self.crop_size, factor, 3)
            image = (blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)
        visible = rng.permutation(np.unique(labels))
        return image, caption([self.vocabulary.names[k] for k in visible])
