"""COCO's panoptic layout: files that are fine, and folders and files that are not."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines.datasets import make_datasets
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source
from tests.data_pipelines.coco_world import (
    assert_equal,
    load,
    make_world,
    segment_id,
    write_json,
)

# Layouts and pictures that are fine.


def test_png_folder_beside_annotations_and_an_empty_one_within(tmp_path):
    make_world(tmp_path / "a")
    make_world(tmp_path / "b", pngs=".")
    (tmp_path / "b" / "annotations" / "panoptic_train2017").mkdir()
    assert_equal(load(tmp_path / "a").batch(1, 4), load(tmp_path / "b").batch(1, 4))


def test_grey_palette_and_rotated_files_are_read(world):
    data = load(world)
    expected = data.source.read(data.records[0])[1]
    Image.open(world / "train2017" / "11.jpg").convert("L").save(
        world / "train2017" / "11.jpg", format="JPEG"
    )
    png = world / "annotations" / "panoptic_train2017" / "11.png"
    Image.open(png).quantize(16).save(png)
    assert Image.open(png).mode == "P"
    image, ids = data.source.read(data.records[0])
    assert image.mode == "RGB"
    np.testing.assert_array_equal(ids, expected)
    # EXIF orientation 6: stored on its side, shown upright at 30 x 40.
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(
        world / "train2017" / "12.jpg", format="PNG", exif=exif
    )
    image, _ = data.source.read(data.records[1])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))


# Folders and files that are not.


def _remove(path):
    if path.is_dir():
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("train2017", "images folder .*train2017 does not exist"),
        ("annotations/panoptic_train2017.json", "annotation file .*panoptic_train2017.json does"),
        ("annotations/panoptic_train2017", "folder .*/panoptic_train2017 with the panoptic PNGs"),
    ],
)
def test_missing_places_name_themselves_and_the_layout(world, place, message):
    _remove(world / place)
    with pytest.raises(FileError, match=message) as caught:
        load(world)
    assert "expected" in str(caught.value) and "*.png or panoptic_train2017/*.png" in str(
        caught.value
    )


def test_missing_root_and_part(world):
    with pytest.raises(FileError, match="folder .*nowhere does not exist; coco_pan.* is expected"):
        open_source("coco_panoptic_zps", world / "nowhere", "train2017")
    with pytest.raises(FileError, match="val2017 does not exist"):
        load(world, part="val2017")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("train2017/13.jpg", "names the file .*13.jpg, which is not on disk"),
        ("annotations/panoptic_train2017/16.png", "names the file .*16.png, which is not on disk"),
    ],
)
def test_missing_files(world, place, message, caplog):
    whole = len(load(world).records)
    (world / place).unlink()
    with pytest.raises(FileError, match=message) as caught:
        load(world)
    source = load(world, on_bad_example="skip").source
    assert len(source.records) == whole - 1 and source.skipped == 1
    assert str(caught.value) in caplog.text
    for path in (world / place).parent.iterdir():
        path.rename(path.with_suffix(".x"))
    (world / place).with_name("other.png").touch()
    with pytest.raises(FileError, match=", which is not on disk"):
        load(world, on_bad_example="skip")


def _change(path, value):
    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


def _duplicate(key):
    return lambda content: content[key].append(content[key][0])


# What else a JSON may lack or misuse is told by the tests of `core.coco`. Entry 0 of images and
# annotations is image 18.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_duplicate("annotations"), "annotates the image 18 more than once"),
        (_change(["annotations", 0, "segments_info", 1, "category_id"], 77), "category 77, which"),
        (_change(["annotations", 0, "segments_info", 1, "id"], 0), "'18.png'.* 0 is void; number"),
        (_change(["annotations", 0, "segments_info"], None), "no list of 'segments_info'"),
        (_change(["images", 1, "file_name"], "18.jpg"), "names the file 18.jpg for 2 images"),
        (_change(["annotations", 1, "file_name"], "18.png"), "names the file 18.png for 2 images"),
        (lambda content: content.update(images=[]), "annotates the image 18 and lists none"),
        (lambda content: content.update(annotations=[]), "annotates no image"),
        (_change(["images", 0, "id"], "beach"), "which its 'images' lack"),
        (_change(["categories", 0, "name"], "heaven"), "10 'heaven', the label space 'sky'"),
        (_change(["categories", 2, "isthing"], 0), "Category 7 .*stuff .* thing in the label"),
        (_change(["categories", 3], None), "which the file does not list"),
        (
            lambda content: content["categories"].append({"id": 1, "name": "x", "isthing": 0}),
            "category 1 .*'x'.*, which is absent in the label space",
        ),
    ],
)
def test_inconsistent_json(world, change, message):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    change(content)
    write_json(world, content)
    with pytest.raises(FileError, match=message) as caught:
        load(world)
    assert "panoptic_train2017.json" in str(caught.value)


def test_texts_with_the_same_digits_are_images_of_their_own(world):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    names = [entry["file_name"] for entry in content["images"]]
    for number, entry in enumerate(content["images"]):
        (one,) = (a for a in content["annotations"] if a["image_id"] == entry["id"])
        entry["id"] = one["image_id"] = f"city{number}_000000".replace(str(number), "x" * number)
    write_json(world, content)
    records = load(world).records
    assert [record.image_id for record in records] == list(range(1, len(names) + 1))
    assert sorted(record.file_name for record in records) == sorted(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "is not valid JSON"),
        (b"[]", "is a list, not a COCO panoptic json"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip"),
        (b'{"a": "caf\xe9"}', "is no text in UTF-8"),
    ],
)
def test_broken_json(world, content, message):
    path = world / "annotations" / "panoptic_train2017.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"panoptic_train2017.json {message}"):
        load(world)


def test_a_byte_order_mark_is_no_fault(world):
    path = world / "annotations" / "panoptic_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(world).records) == 8


def test_files_may_lie_in_folders_and_differ_in_their_extension_only(world):
    """As `file_name` of the JSON says, of images and of PNGs."""
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    before = load(world).batch(0, 6)
    pngs = world / "annotations" / "panoptic_train2017"
    for entry in content["images"]:
        camera = f"cam {entry['id'] % 2}/day"
        (annotation,) = (a for a in content["annotations"] if a["image_id"] == entry["id"])
        for folder, place, suffix in (
            (world / "train2017", entry, ".jpeg" if entry["id"] % 2 else ".jpg"),
            (pngs, annotation, ".png"),
        ):
            (folder / camera).mkdir(parents=True, exist_ok=True)
            name = f"{camera}/{entry['id'] // 2}{suffix}"
            (folder / place["file_name"]).rename(folder / name)
            place["file_name"] = name
    write_json(world, content)
    data = load(world)
    assert_equal(data.batch(0, 6), before)
    assert len({record.file_name for record in data.records}) == 8
    (pngs / data.records[3].png_name).unlink()
    with pytest.raises(FileError, match=f"{data.records[3].png_name}, which is not on disk"):
        load(world)


def test_images_without_annotation_are_left_out_with_a_warning(world, caplog):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 14]
    write_json(world, content)
    with caplog.at_level(logging.WARNING):
        data = load(world)
    assert 14 not in {r.image_id for r in data.records} and "1 images have no" in caplog.text


def _truncate_jpeg(world):
    path = world / "train2017" / "16.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_a_picture(world):
    (world / "train2017" / "16.jpg").write_text("<html>404</html>")


def _empty(world):
    (world / "train2017" / "16.jpg").write_bytes(b"")


def _vanish(world):
    (world / "train2017" / "16.jpg").unlink()


def _truncate_png(world):
    path = world / "annotations" / "panoptic_train2017" / "16.png"
    path.write_bytes(path.read_bytes()[:70])


def _repaint_png(world, edit, mode="RGB"):
    path = world / "annotations" / "panoptic_train2017" / "16.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(edit(pixels)).convert(mode).save(path)


def _foreign_id(world):
    def edit(pixels):
        pixels[0, 0] = [5, 1, 0]
        return pixels

    _repaint_png(world, edit)


def _absent_id(world):
    _repaint_png(world, np.zeros_like)


def _other_size(world):
    _repaint_png(world, lambda pixels: pixels[:20])


def _grey_png(world):
    _repaint_png(world, lambda pixels: pixels, mode="L")


def _turned(world):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (40, 30)).save(world / "train2017" / "16.jpg", exif=exif)


def _smaller(world):
    Image.new("RGB", (40, 15)).save(world / "train2017" / "16.jpg")


BAD_FILES = [
    (_truncate_jpeg, "16.jpg cannot be read as an image: .*truncated"),
    (_not_a_picture, "16.jpg cannot be read as an image"),
    (_empty, "16.jpg cannot be read as an image"),
    (_vanish, "16.jpg cannot be read as an image"),
    (_truncate_png, "16.png cannot be read as an image"),
    (_foreign_id, "16.png holds the segment id 261, which .*2017.json lacks"),
    (_absent_id, f"segment id {segment_id(16, 0)}, which has no pixel in .*16.png"),
    (_other_size, r"PNG .*16.png is 20x40 \(height x width\) and .*2017.json says 30x40"),
    (_grey_png, "16.png has the mode L; a panoptic PNG is RGB"),
    (_turned, "^The image .*16.jpg is stored as 30x40 .* EXIF orientation turns it to 40x30; save"),
    (_smaller, r"^The image .*16.jpg is 15x40 \(height x width\) and .*2017.json says 30x40; both"),
]


@pytest.mark.parametrize(("harm", "message"), BAD_FILES)
def test_bad_files_raise_in_training_and_evaluation(world, harm, message):
    data = load(world)
    harm(world)
    with pytest.raises(FileError, match=message):
        data.batch(0, 6)
    with pytest.raises(FileError, match=message):
        list(load(world).eval_examples() if harm is not _vanish else data.eval_examples())
    with pytest.raises(FileError, match=message):
        data.caption_batch(0, 13, 8)


@pytest.mark.parametrize(("harm", "message"), BAD_FILES)
def test_bad_files_are_replaced_by_the_next_of_the_epoch(world, harm, message, caplog):
    good = load(world, augment="none")
    data = load(world, augment="none", on_bad_example="skip")
    before = [good.batch(step, 6) for step in range(3)]
    assert not data.skipped
    harm(world)
    with caplog.at_level(logging.WARNING):
        after = [data.batch(step, 6) for step in range(3)]
    for old, new in zip(before, after, strict=True):
        where = old["image_id"].tolist().index(16)
        next_one = (where + 1) % 6
        for name in old:
            expected = old[name].copy()
            expected[where] = old[name][next_one]
            np.testing.assert_array_equal(new[name], expected)
    assert len(data.skipped) == 1
    assert len([r for r in caplog.records if "Skipped" in r.message]) == 1
    assert "16." in caplog.text
    # The same on a process that begins later, and evaluation does not skip.
    resumed = load(world, augment="none", on_bad_example="skip") if (harm is not _vanish) else data
    assert_equal(resumed.batch(2, 6), after[2])
    with pytest.raises(FileError, match=message):
        list(data.eval_examples())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_files_never_raise_anything_but_data_error(world):
    """Cuts and flipped bytes anywhere in an image or a PNG."""
    data = load(world)
    record = data.records[0]
    layout = data.source.layout
    jpeg, png = layout.images / record.file_name, layout.pngs / record.png_name
    picture = Image.open(jpeg).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 1
    picture.save(jpeg, format="JPEG", exif=exif)
    rng, refused = np.random.default_rng(0), 0
    for path in (jpeg, png):
        good = path.read_bytes()
        for _ in range(150):
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), 3):
                bad[place] = rng.integers(256)
            path.write_bytes(bad[: rng.integers(1, len(bad) + 1)] if rng.random() < 0.5 else bad)
            try:
                data.source.read(record)
            except FileError as error:
                refused += 1
                assert path.name in str(error)
        path.write_bytes(good)
    assert refused > 200


# Real images.


@pytest.fixture(scope="module")
def mini(shared_data):
    return shared_data / "coco_panoptic_mini"


@pytest.mark.parametrize("part", ["train2017", "val2017"])
def test_mini_pixel_counts_are_the_areas_of_the_json(mini, part):
    content = json.loads((mini / "annotations" / f"panoptic_{part}.json").read_text())
    areas = {
        (a["image_id"], s["id"]): (s["area"], s["category_id"], bool(s["iscrowd"]))
        for a in content["annotations"]
        for s in a["segments_info"]
    }
    source = open_source("coco_panoptic_zps", mini, part)
    data = SegmentationLoader(source, seed=0, image_size=64, num_threads=2)
    found = {}
    for example in data.eval_examples():
        counts = np.bincount(example["segment_ids"].ravel(), minlength=101)
        for g, source in enumerate(example["segment_source_ids"]):
            if source > 0:
                category = data.vocabulary.category_ids[example["segment_labels"][g]]
                crowd = bool(example["segment_is_crowd"][g])
                found[int(example["image_id"]), int(source)] = (counts[g + 1], category, crowd)
    assert found == areas


@pytest.mark.parametrize("has_crowd", [False, True])
def test_an_evaluation_part_without_a_segment_is_refused(world, has_crowd):
    path = world / "annotations" / "panoptic_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        segments = annotation["segments_info"]
        annotation["segments_info"] = [{**s, "iscrowd": 1} for s in segments] if has_crowd else []
    path.write_text(json.dumps(content))
    config = dict(kind="coco_panoptic_zps", root=str(world), split_file=str(world / "split.json"))
    config |= dict(train_part="x", eval_part="train2017", eval_size=32, num_eval_images=None)
    with pytest.raises(FileError, match="Not one image of the evaluation part 'train2017' has a"):
        make_datasets(config | dict(max_segments=4, num_threads=1, on_bad_example="raise"), seed=0)
