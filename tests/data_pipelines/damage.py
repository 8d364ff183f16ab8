"""Random damage to a data set in COCO's panoptic layout, one fault a copy, and what comes of it.

Each function of `DAMAGES` changes the files of a `World` in one way and returns the names of which
one must stand in the error's sentence.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source

# After which a case hangs, also on a machine that many processes share.
SECONDS = 600


@dataclasses.dataclass
class World:
    """One part of a copy: its folder, where the PNGs are, and the annotation file's content."""

    folder: Path
    part: str
    split_file: str
    content: dict

    @property
    def json_path(self) -> Path:
        return self.folder / "annotations" / f"panoptic_{self.part}.json"

    @property
    def pngs(self) -> Path:
        return self.folder / "annotations" / f"panoptic_{self.part}"

    @property
    def images(self) -> Path:
        return self.folder / self.part

    def write_json(self, text: str | bytes | None = None) -> None:
        text = json.dumps(self.content) if text is None else text
        self.json_path.write_bytes(text.encode() if isinstance(text, str) else text)

    def replace(self, path: Path, content: bytes) -> None:
        """Writes a file without writing through the link that stands there."""
        path.unlink()
        path.write_bytes(content)


def copy_world(source: Path, target: Path, part: str, split_file: str) -> World:
    """Links to every file of a part, and a copy of its annotation file."""
    for folder in (Path(part), Path("annotations") / f"panoptic_{part}"):
        (target / folder).mkdir(parents=True)
        for path in (source / folder).iterdir():
            os.symlink(path.resolve(), target / folder / path.name)
    content = json.loads((source / "annotations" / f"panoptic_{part}.json").read_bytes())
    world = World(target, part, split_file, content)
    world.write_json()
    return world


def _pick(world: World, rng: np.random.Generator, min_segments: int = 2):
    """(image entry, annotation) of a random image with so many segments."""
    images = {image["id"]: image for image in world.content["images"]}
    usable = [a for a in world.content["annotations"] if len(a["segments_info"]) >= min_segments]
    annotation = usable[rng.integers(len(usable))]
    return images[annotation["image_id"]], annotation


def _two_sizes(world: World, rng: np.random.Generator):
    """Two random images of different size with their annotations."""
    while True:
        (first, first_png), (second, second_png) = _pick(world, rng), _pick(world, rng)
        if (first["height"], first["width"]) != (second["height"], second["width"]):
            return first, first_png, second, second_png


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _path(world: World, rng: np.random.Generator, what: str) -> Path:
    image, annotation = _pick(world, rng)
    name = image["file_name"] if what == "image" else annotation["file_name"]
    return (world.images if what == "image" else world.pngs) / name


def truncated(what: str):
    def damage(world, rng):
        path = _path(world, rng, what)
        content = path.read_bytes()
        # One in three is cut close to its end.
        length = rng.integers(1, len(content)) if rng.uniform() < 0.67 else len(content) - 1
        world.replace(path, content[:length])
        return [path.name]

    return damage


def overwritten(what: str, make: Callable[[np.random.Generator], bytes]):
    def damage(world, rng):
        path = _path(world, rng, what)
        world.replace(path, make(rng))
        return [path.name]

    return damage


def resized(what: str):
    def damage(world, rng):
        path = _path(world, rng, what)
        picture = Image.open(path)
        size = (picture.width + int(rng.integers(1, 9)), picture.height)
        size = size if rng.uniform() < 0.5 else size[::-1]
        picture = picture.resize(size, Image.Resampling.NEAREST)
        world.replace(path, _encode(picture, "JPEG" if what == "image" else "PNG"))
        return [path.name]

    return damage


def repainted(world, rng):
    path = _path(world, rng, "png")
    pixels = np.array(Image.open(path).convert("RGB"))
    top, left = (int(rng.integers(0, n - 2)) for n in pixels.shape[:2])
    # Of a segment that no annotation has, or nothing but void.
    if rng.uniform() < 0.5:
        pixels[top : top + 2, left : left + 2] = rng.integers(1, 255, 3)
    else:
        pixels[:] = 0
    world.replace(path, _encode(Image.fromarray(pixels), "PNG"))
    return [path.name]


def of_mode(mode: str):
    def damage(world, rng):
        path = _path(world, rng, "png")
        picture = Image.open(path).convert("L")
        world.replace(path, _encode(picture.convert(mode), "PNG"))
        return [path.name]

    return damage


def lossy_png(world, rng):
    path = _path(world, rng, "png")
    world.replace(path, _encode(Image.open(path).convert("RGB"), "JPEG"))
    return [path.name]


def removed(what: str):
    def damage(world, rng):
        path = _path(world, rng, what)
        path.unlink()
        if rng.uniform() < 0.3:
            path.mkdir()
        return [path.name]

    return damage


def swapped_images(world, rng):
    first, _, second, _ = _two_sizes(world, rng)
    paths = [world.images / image["file_name"] for image in (first, second)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        world.replace(path, content)
    return [path.name for path in paths]


def swapped_pngs(world, rng):
    _, first, _, second = _two_sizes(world, rng)
    paths = [world.pngs / annotation["file_name"] for annotation in (first, second)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        world.replace(path, content)
    return [path.name for path in paths]


def swapped_image_and_png(world, rng):
    image, annotation = _pick(world, rng)
    paths = [world.images / image["file_name"], world.pngs / annotation["file_name"]]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        world.replace(path, content)
    return [path.name for path in paths]


def swapped_names(world, rng):
    first, first_png, second, second_png = _two_sizes(world, rng)
    pair = (first, second) if rng.uniform() < 0.5 else (first_png, second_png)
    names = [entry["file_name"] for entry in pair]
    pair[0]["file_name"], pair[1]["file_name"] = reversed(names)
    world.write_json()
    return names


def id_missing_in_json(world, rng):
    _, annotation = _pick(world, rng)
    segments = annotation["segments_info"]
    segments.pop(rng.integers(len(segments)))
    world.write_json()
    return [annotation["file_name"]]


def segment_without_pixels(world, rng):
    _, annotation = _pick(world, rng)
    segment = dict(annotation["segments_info"][0], id=int(rng.integers(1, 2**24)), area=0)
    annotation["segments_info"].append(segment)
    world.write_json()
    return [annotation["file_name"]]


def doubled(key: str):
    def damage(world, rng):
        entries = world.content[key]
        entries.append(dict(entries[rng.integers(len(entries))]))
        world.write_json()
        return [world.json_path.name]

    return damage


def doubled_segment(world, rng):
    _, annotation = _pick(world, rng)
    first, second = annotation["segments_info"][:2]
    second["id"] = first["id"]
    world.write_json()
    return [annotation["file_name"]]


def doubled_name(world, rng):
    first, _, second, _ = _two_sizes(world, rng)
    second["file_name"] = first["file_name"]
    world.write_json()
    return [first["file_name"]]


def dangling_image(world, rng):
    _, annotation = _pick(world, rng)
    annotation["image_id"] = 2**40
    world.write_json()
    return [str(2**40)]


def set_value(where: str, key: str, *values):
    """Sets a field of a random image, annotation, segment or category to one of the values."""

    def damage(world, rng):
        image, annotation = _pick(world, rng)
        segments, categories = annotation["segments_info"], world.content["categories"]
        entry = {
            "image": image,
            "annotation": annotation,
            "segment": segments[rng.integers(len(segments))],
            "category": categories[rng.integers(len(categories))],
            "file": world.content,
        }[where]
        names = [annotation["file_name"], image["file_name"], world.json_path.name]
        value = values[rng.integers(len(values))]
        if value is ...:
            entry.pop(key)
        else:
            entry[key] = value
            names.append(str(value))
        world.write_json()
        return names

    return damage


def json_text(change: Callable[[str, np.random.Generator], str | bytes]):
    def damage(world, rng):
        world.write_json(change(json.dumps(world.content), rng))
        return [world.json_path.name]

    return damage


_NAN = (float("nan"), float("inf"), float("-inf"))
_NOT_INTEGERS = ("7", 7.5, 1e400, None, [7], {"a": 7}, 2**70, -1)
_NOT_NAMES = (7, None, "", "a\nb.jpg", "a\0.jpg", "\ud800.jpg", "名前.jpg", "..", ["a.jpg"])

DAMAGES: dict[str, Callable[[World, np.random.Generator], list[str]]] = {
    "truncated JPEG": truncated("image"),
    "truncated PNG": truncated("png"),
    "empty image": overwritten("image", lambda rng: b""),
    "empty PNG": overwritten("png", lambda rng: b""),
    "image is a web page": overwritten("image", lambda rng: b"<html>404 Not Found</html>" * 9),
    "PNG is noise": overwritten("png", lambda rng: rng.bytes(2000)),
    "image of wrong size": resized("image"),
    "PNG of wrong size": resized("png"),
    "PNG painted over": repainted,
    "PNG of mode L": of_mode("L"),
    "PNG of mode 1": of_mode("1"),
    "PNG of mode I;16": of_mode("I;16"),
    "PNG is a JPEG": lossy_png,
    "image missing": removed("image"),
    "PNG missing": removed("png"),
    "images swapped": swapped_images,
    "PNGs swapped": swapped_pngs,
    "image and PNG swapped": swapped_image_and_png,
    "file names swapped": swapped_names,
    "id missing in JSON": id_missing_in_json,
    "segment without pixels": segment_without_pixels,
    "image id twice": doubled("images"),
    "annotation twice": doubled("annotations"),
    "category twice": doubled("categories"),
    "segment id twice": doubled_segment,
    "file name twice": doubled_name,
    "annotation of no image": dangling_image,
    "unknown category": set_value("segment", "category_id", 0, 999, *_NOT_INTEGERS),
    "segment id of wrong type": set_value("segment", "id", 0, 2**24, *_NOT_INTEGERS),
    "iscrowd of wrong type": set_value("segment", "iscrowd", "no", 2, *_NOT_INTEGERS),
    "NaN in a segment": set_value("segment", "area", *_NAN),
    "NaN in an image": set_value("image", "width", *_NAN),
    "NaN in a category": set_value("category", "id", *_NAN),
    "size of wrong type": set_value("image", "height", 0, *_NOT_INTEGERS),
    "negative size": set_value("image", "width", -640, -1),
    "wrong size in JSON": set_value("image", "height", 1, 9999),
    "image id of wrong type": set_value("image", "id", 7.5, None, [7], {}, "seven", -1, 2**70),
    "reference of wrong type": set_value("annotation", "image_id", 7.5, None, "seven", {}, -1),
    "strange image name": set_value("image", "file_name", *_NOT_NAMES),
    "strange PNG name": set_value("annotation", "file_name", *_NOT_NAMES),
    "strange category name": set_value("category", "name", "", "ﬁsh\u202e", None, 7, "\ud800"),
    "isthing of wrong type": set_value("category", "isthing", "yes", 2, None, [1]),
    "segments of wrong type": set_value("annotation", "segments_info", None, {}, "", 7, [7], [[]]),
    "key missing in an image": set_value("image", "height", ...),
    "name missing in an image": set_value("image", "file_name", ...),
    "key missing in an annotation": set_value("annotation", "segments_info", ...),
    "key missing in a segment": set_value("segment", "category_id", ...),
    "key missing in a category": set_value("category", "isthing", ...),
    "images of wrong type": set_value("file", "images", ..., None, [], {}, "images", [7], [None]),
    "annotations of wrong type": set_value("file", "annotations", ..., None, [], {}, [[]], ["a"]),
    "categories of wrong type": set_value("file", "categories", ..., None, [], {}, [7], [[]]),
    "truncated JSON": json_text(lambda text, rng: text[: rng.integers(0, len(text) - 1)]),
    "JSON of another kind": json_text(
        lambda text, rng: ["[]", "7", "null", '"a"'][rng.integers(4)]
    ),
    "JSON in another encoding": json_text(lambda text, rng: b"\xff\xfe" + text.encode("latin-1")),
    "JSON without an end": json_text(lambda text, rng: "[" * 100_000),
}


def load(world: World, on_bad_example: str) -> SegmentationLoader:
    """A loader that trains on every image."""
    source = open_source("coco_panoptic_zps", world.folder, world.part, world.split_file)
    return SegmentationLoader(
        source,
        seed=0,
        image_size=32,
        unseen_images="keep",
        on_bad_example=on_bad_example,
        num_threads=1,
    )


def check(world: World, names: list[str]) -> str:
    """Asserts that a damaged world ends in one sentence, or where asked for in skipped images.

    Returns:
      The sentence.
    """
    with time_limit(SECONDS):
        try:
            loader = load(world, "raise")
            for index in range(len(loader.records)):
                loader.eval_example(index)
        except FileError as error:
            sentence = str(error)
        else:
            raise AssertionError("The damage passed in silence.")
        assert "\n" not in sentence and sentence[-1] in ".?", sentence
        assert any(name in sentence for name in filter(None, names)), (names, sentence)
        sentence.encode()  # can be shown on any terminal
        try:
            loader = load(world, "skip")
        except FileError as error:
            assert str(error) == sentence
            return sentence
        ids = [int(loader.batch(step, 1)["image_id"][0]) for step in range(len(loader.records))]
        assert 1 <= len(loader.skipped) <= 2
        good = len(loader.records) - len(loader.skipped)
        assert len(set(ids)) == good
    return sentence


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fails what takes longer; main thread only."""

    def fail(*_):
        raise AssertionError(f"It hung for {seconds} seconds.")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
