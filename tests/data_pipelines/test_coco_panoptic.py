"""The COCO panoptic layout and the loader: random access, the zero-shot rule, and bad folders."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from concat_jax.core import prefetch
from concat_jax.core.batch import IMAGE_FIELDS, batch_shapes
from concat_jax.core.files import FileError
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source

CATEGORIES = [
    {"id": 10, "name": "sky", "isthing": 0, "split": "seen"},
    {"id": 4, "name": "road", "isthing": 0, "split": "unseen"},
    {"id": 7, "name": "dog", "isthing": 1, "split": "seen"},
    {"id": 9, "name": "cat", "isthing": 1, "split": "seen"},
]
SKY, ROAD, DOG, CAT = 10, 4, 7, 9
# Images by id: (category, crowd, box as left, top, right, bottom); later ones are painted on top.
IMAGES = {
    11: [(SKY, 0, (0, 0, 40, 15)), (DOG, 0, (2, 10, 20, 28)), (CAT, 1, (24, 12, 38, 30))],
    12: [(SKY, 0, (0, 0, 40, 30)), (DOG, 0, (5, 5, 9, 9))],
    13: [(SKY, 0, (0, 0, 40, 20)), (ROAD, 0, (0, 20, 40, 30))],  # unseen
    14: [(CAT, 0, (0, 0, 20, 30)), (CAT, 0, (20, 0, 40, 30))],
    15: [(DOG, 0, (0, 0, 40, 10)), (ROAD, 1, (39, 29, 40, 30))],  # unseen only as one crowd pixel
    16: [(DOG, 0, (10, 10, 30, 20))],
    17: [(SKY, 0, (0, 0, 40, 30)), (CAT, 1, (1, 1, 3, 3)), (CAT, 0, (20, 20, 24, 24))],
    18: [(SKY, 0, (0, 0, 40, 15)), (CAT, 0, (0, 15, 40, 30))],
}
ALLOWED = {11, 12, 14, 16, 17, 18}


def _segment_id(image_id, row):
    return image_id * 70_000 + row * 300 + 1  # uses all three bytes of the PNG's colour


def _colour(segment_id):
    return np.array([segment_id % 251, segment_id // 251 % 241, segment_id % 239], np.uint8)


def make_world(folder, pngs="annotations", part="train2017"):
    """Writes the images above in COCO's layout; pictures are flat in a colour for each segment.

    They are PNG files under a .jpg name, so that colours come back exactly. Returns the annotation
    content, which `write_json` puts on disk again after a change.
    """
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir()
    png_folder = folder / pngs / f"panoptic_{part}"
    png_folder.mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES],
    }
    for image_id, segments in reversed(IMAGES.items()):
        ids = np.zeros((30, 40), np.int64)
        for row, (_, _, (left, top, right, bottom)) in enumerate(segments):
            ids[top:bottom, left:right] = _segment_id(image_id, row)
        picture = np.zeros((30, 40, 3), np.uint8)
        for value in np.unique(ids[ids > 0]):
            picture[ids == value] = _colour(value)
        Image.fromarray(picture).save(folder / part / f"{image_id}.jpg", format="PNG")
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(png_folder / f"{image_id}.png")
        content["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": 30, "width": 40}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": _segment_id(image_id, row), "category_id": category, "iscrowd": crowd}
                    for row, (category, crowd, _) in enumerate(segments)
                ],
            }
        )
    write_json(folder, content, part)
    split = {"name": "tiny", "description": "", "source": "", "categories": CATEGORIES}
    (folder / "split.json").write_text(json.dumps(split))
    return content


def write_json(folder, content, part="train2017"):
    (folder / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))


def load(folder, *, part="train2017", split_file=None, **options):
    source = open_source("coco_panoptic_zps", folder, part, split_file or folder / "split.json")
    defaults = dict(seed=3, image_size=32, max_segments=6, num_threads=2)
    return SegmentationLoader(source, **(defaults | options))


@pytest.fixture
def world(tmp_path):
    make_world(tmp_path)
    return tmp_path


def _assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# What a batch is.


def test_batches_keep_the_contract(world):
    for rows in (6, 256):
        batch = load(world, max_segments=rows).batch(0, 4)
        found = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert found == batch_shapes(IMAGE_FIELDS, B=4, S=32, G=rows)


def test_tables_match_the_pixels_under_jitter(world):
    data = load(world, scale_range=(0.5, 2.0))
    names = data.vocabulary.names
    rows_seen, checked = [], 0
    for step in range(25):
        batch = data.batch(step, 4)
        for b in range(4):
            image_id, ids = int(batch["image_id"][b]), batch["segment_ids"][b]
            source = batch["segment_source_ids"][b]
            n = (source > 0).sum()
            rows_seen.append(n)
            # Exactly the segments that still have pixels own a row, and rows lie in front.
            assert sorted(set(np.unique(ids)) - {0}) == list(range(1, n + 1))
            assert (source[n:] == 0).all() and (batch["segment_labels"][b, n:] == -1).all()
            assert not batch["segment_is_thing"][b, n:].any()
            assert not batch["segment_is_crowd"][b, n:].any()
            for g in range(n):
                row = (source[g] - 1 - image_id * 70_000) // 300
                category, crowd, _ = IMAGES[image_id][row]
                label = batch["segment_labels"][b, g]
                assert data.vocabulary.category_ids[label] == category
                assert batch["segment_is_thing"][b, g] == (names[label] in ("dog", "cat"))
                assert batch["segment_is_crowd"][b, g] == bool(crowd)
                # Away from borders, the picture has the colour that belongs to this segment's id.
                mask = ids == g + 1
                inner = mask.copy()
                inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = False
                for dy in (-2, -1, 0, 1, 2):
                    for dx in (-2, -1, 0, 1, 2):
                        inner &= np.roll(mask, (dy, dx), (0, 1))
                checked += inner.sum()
                assert (batch["image"][b][inner] == _colour(source[g])).all()
            height, width = batch["image_size"][b]
            assert (ids[height:] == 0).all() and (ids[:, width:] == 0).all()
            assert (batch["image"][b, height:] == 128).all()
            assert (batch["image"][b, :, width:] == 128).all()
    assert checked > 5000
    assert min(rows_seen) < 2 and max(rows_seen) == 3  # some crops did lose segments


def test_without_augmentation_the_whole_image_is_letterboxed(world):
    batch = load(world, augment="none", image_size=40).batch(0, 4)
    assert (batch["image_size"] == [30, 40]).all()
    for image_id, ids in zip(batch["image_id"], batch["segment_ids"], strict=True):
        for row, (_, _, (left, top, *_)) in enumerate(IMAGES[int(image_id)]):
            if not any(
                l <= left < r and t <= top < b for _, _, (l, t, r, b) in IMAGES[image_id][row + 1 :]
            ):
                assert ids[top, left] == row + 1


def test_of_too_many_segments_the_largest_stay(world):
    data = load(world, augment="none", image_size=40, max_segments=2)
    batch = data.batch(0, 6)
    b = batch["image_id"].tolist().index(17)  # sky, a cat of 4 pixels, a cat of 16
    assert batch["segment_source_ids"][b].tolist() == [_segment_id(17, 0), _segment_id(17, 2)]
    assert (batch["segment_ids"][b, 20:24, 20:24] == 2).all()
    assert (batch["segment_ids"][b, 1:3, 1:3] == 0).all()  # void, not given to a neighbour


# Random access.


def test_a_batch_does_not_depend_on_what_came_before(world):
    walked, jumped = load(world), load(world, num_threads=1)
    history = [walked.batch(step, 4) for step in range(7)]
    for step in (6, 2, 6):
        _assert_equal(jumped.batch(step, 4), history[step])
    _assert_equal(walked.batch(2, 4), history[2])
    ahead = list(
        prefetch.prefetch(lambda step: walked.batch(step, 4), 3, 4, depth=3, num_threads=3)
    )
    for step, batch in enumerate(ahead, start=3):
        _assert_equal(batch, history[step])


def test_seed_and_epoch_change_order_and_jitter(world):
    data = load(world)
    first, second = data.batch(0, 6), data.batch(1, 6)
    assert first["image_id"].tolist() != second["image_id"].tolist()
    assert load(world, seed=4).batch(0, 6)["image_id"].tolist() != first["image_id"].tolist()
    sizes = {tuple(size) for step in range(5) for size in data.batch(step, 6)["image_size"]}
    assert len(sizes) > 15  # the same image is not jittered the same way every epoch


def test_order_is_the_documented_generator(world):
    data = load(world)
    for epoch in (0, 1, 5):
        order = np.random.default_rng([3, epoch]).permutation(6)
        expected = np.array(sorted(ALLOWED))[order]
        assert data.batch(epoch, 6)["image_id"].tolist() == expected.tolist()


def test_every_epoch_visits_each_training_image_once_even_across_batches(world):
    data = load(world)  # 6 images: every other batch straddles two epochs
    stream = np.concatenate([data.batch(step, 4)["image_id"] for step in range(6)])
    for epoch in range(4):
        assert set(stream[epoch * 6 : epoch * 6 + 6].tolist()) == ALLOWED


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_the_global_batch(world, process_count):
    whole = load(world)
    shares = [
        load(world, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    for step in range(3):
        parts = [share.batch(step, 6) for share in shares]
        ids = [set(part["image_id"].tolist()) for part in parts]
        assert sum(len(i) for i in ids) == len(set.union(*ids)) == 6  # disjoint, union the epoch
        assert set.union(*ids) == ALLOWED
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _assert_equal(joined, whole.batch(step, 6))


# The zero-shot rule.


def test_images_with_an_unseen_segment_never_train(world):
    data = load(world)
    assert {data.records[i].image_id for i in data.training_indices} == ALLOWED
    for step in range(4):
        labels = data.batch(step, 6)["segment_labels"]
        assert not np.isin(labels, data.vocabulary.unseen).any()


def test_keep_trains_on_everything(world):
    data = load(world, unseen_images="keep")
    batch = data.batch(0, 8)
    assert set(batch["image_id"].tolist()) == set(IMAGES)
    assert (batch["segment_labels"] == 1).any()


def test_a_leak_is_refused_with_the_image(world):
    for on_bad_example in ("raise", "skip"):
        data = load(world, on_bad_example=on_bad_example)
        data.training_indices = np.arange(8)
        with pytest.raises(FileError, match="Image 1[35] .* is in training but holds .*'road'"):
            data.batch(0, 8)


def test_nothing_to_train_on(world):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    for annotation in content["annotations"]:
        annotation["segments_info"][0]["category_id"] = ROAD
    write_json(world, content)
    data = load(world)
    assert len(list(data.eval_examples())) == 8
    with pytest.raises(FileError, match="nothing to train on"):
        data.batch(0, 4)
    with pytest.raises(FileError, match="no seen segment"):
        data.caption_batch(0, 4, 8)


# Evaluation.


def test_eval_examples_are_all_images_as_they_are(tmp_path):
    make_world(tmp_path, part="val2017")
    data = load(tmp_path, part="val2017")
    examples = list(data.eval_examples())
    assert [e["image_id"] for e in examples] == sorted(IMAGES)  # unseen included
    assert [e["file_name"] for e in examples] == [f"{i}.jpg" for i in sorted(IMAGES)]
    first = examples[0]
    assert first["image"].shape == (30, 40, 3) and first["image_size"].tolist() == [30, 40]
    assert first["segment_ids"].dtype == np.uint8 and first["segment_ids"].shape == (30, 40)
    assert first["segment_labels"].tolist() == [0, 2, 3, -1, -1, -1]
    assert first["segment_is_crowd"].tolist() == [False, False, True, False, False, False]
    for row in range(3):
        mask = first["segment_ids"] == row + 1
        assert (first["image"][mask] == _colour(_segment_id(11, row))).all()
        assert mask.sum() == {0: 40 * 15 - 18 * 5 - 14 * 3, 1: 18 * 18, 2: 14 * 18}[row]


def test_eval_limit_and_no_segment_left_out(world):
    data = load(world, num_eval_images=2, max_segments=2)
    examples = list(data.eval_examples())
    assert [e["image_id"] for e in examples] == [11, 12] and data.num_eval_images == 2
    assert [len(e["segment_labels"]) for e in examples] == [3, 2]
    assert load(world, num_eval_images=99).num_eval_images == 8


# Captions.


def test_caption_pairs_are_boxes_of_seen_segments(world):
    data = load(world)
    total = sum(len(IMAGES[image_id]) for image_id in ALLOWED)
    batch = data.caption_batch(0, total, 16)
    assert batch["image"].shape == (total, 16, 16, 3) and batch["image"].dtype == np.uint8
    expected = sorted(
        {c["id"]: c["name"] for c in CATEGORIES}[category]
        for image_id in ALLOWED
        for category, *_ in IMAGES[image_id]
    )
    assert sorted(batch["captions"]) == expected  # one epoch: each segment once
    again = load(world, num_threads=1).caption_batch(0, total, 16)
    np.testing.assert_array_equal(again["image"], batch["image"])
    assert again["captions"] == batch["captions"]
    assert data.caption_batch(1, total, 16)["captions"] != batch["captions"]
    # The cat of image 14 fills its box; the dog on image 12's sky is a 4 x 4 box of its own.
    flat = {tuple(i[0, 0]) for i in batch["image"] if (i == i[0, 0]).all()}
    assert {tuple(_colour(_segment_id(14, 0))), tuple(_colour(_segment_id(12, 1)))} <= flat
    # The sky of image 12 is a rectangle with the dog left in it, not cut out.
    sky, dog = _colour(_segment_id(12, 0)), _colour(_segment_id(12, 1))
    large = data.caption_batch(0, total, 120)
    assert any(
        (i[0, 0] == sky).all() and (i[24:32, 18:24] == dog).all()
        for i, name in zip(large["image"], large["captions"], strict=True)
        if name == "sky"
    )


def test_captions_are_shared_among_processes(world):
    whole = load(world).caption_batch(2, 4, 8)
    parts = [load(world, process_index=i, process_count=2).caption_batch(2, 4, 8) for i in range(2)]
    assert parts[0]["captions"] + parts[1]["captions"] == whole["captions"]


# Layouts and pictures that are fine.


def test_png_folder_beside_annotations_and_an_empty_one_within(tmp_path):
    make_world(tmp_path / "a")
    make_world(tmp_path / "b", pngs=".")
    (tmp_path / "b" / "annotations" / "panoptic_train2017").mkdir()
    _assert_equal(load(tmp_path / "a").batch(1, 4), load(tmp_path / "b").batch(1, 4))


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
        ("train2017/13.jpg", "image .*13.jpg is in the JSON but not on disk"),
        ("annotations/panoptic_train2017/16.png", "panoptic PNG .*16.png is in the JSON but not"),
    ],
)
def test_missing_files(world, place, message):
    (world / place).unlink()
    with pytest.raises(FileError, match=message):
        load(world)


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
        (_change(["categories", 0, "name"], "heaven"), "category 10 'heaven', the split 'sky'"),
        (_change(["categories", 2, "isthing"], 0), "Category 7 .*stuff .* a thing in the split"),
        (_change(["categories", 3], None), "which the file does not list"),
        (
            lambda content: content["categories"].append({"id": 1, "name": "x", "isthing": 0}),
            "category 1 .*'x'.*, which is absent in the split",
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


def test_texts_with_the_same_digits_are_one_number(world):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    for entry, number in zip(content["images"], ("a_18", "b_18"), strict=False):
        (one,) = (a for a in content["annotations"] if a["image_id"] == entry["id"])
        entry["id"] = one["image_id"] = number
    write_json(world, content)
    with pytest.raises(FileError, match="two images with the number 18"):
        load(world)


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
    _assert_equal(data.batch(0, 6), before)
    assert len({record.file_name for record in data.records}) == 8
    (pngs / data.records[3].png_name).unlink()
    with pytest.raises(FileError, match=f"{data.records[3].png_name} is in the JSON but not on"):
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
    (_absent_id, f"segment id {_segment_id(16, 0)}, which has no pixel in .*16.png"),
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
    assert data.skipped == 0
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
    assert data.skipped == 1
    assert len([r for r in caplog.records if "Skipped" in r.message]) == 1
    assert "16." in caplog.text
    # The same on a process that begins later, and evaluation does not skip.
    resumed = load(world, augment="none", on_bad_example="skip") if (harm is not _vanish) else data
    _assert_equal(resumed.batch(2, 6), after[2])
    with pytest.raises(FileError, match=message):
        list(data.eval_examples())


def test_captions_skip_bad_files_as_well(world):
    data = load(world, on_bad_example="skip")
    _not_a_picture(world)
    batch = data.caption_batch(0, 13, 8)
    assert len(batch["captions"]) == 13 and data.skipped == 1


def test_skipping_ends_when_nothing_is_left(world):
    data = load(world, on_bad_example="skip")
    for image_id in IMAGES:
        (world / "train2017" / f"{image_id}.jpg").write_bytes(b"")
    with pytest.raises(FileError, match="Not one of the training images can be used"):
        data.batch(0, 4)
    assert data.skipped == 6


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"max_segments": 0}, "max_segments is 0"),
        ({"max_segments": 65536}, "max_segments is 65536"),
        ({"num_eval_images": 0}, "num_eval_images is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"augment": "lsi"}, "augment cannot be 'lsi'; did you mean 'lsj'"),
        ({"unseen_images": "hide"}, "unseen_images is 'hide'"),
        ({"on_bad_example": "ignore"}, "on_bad_example cannot be 'ignore'; did you mean"),
        ({"scale_range": (0, 1)}, "scale_range is"),
        ({"split_file": "none_such"}, "no split or vocabulary 'none_such'"),
    ],
)
def test_bad_arguments(world, options, message):
    with pytest.raises(ValueError, match=message):
        load(world, **options)


def test_bad_steps(world):
    data = load(world, process_count=2)
    with pytest.raises(ValueError, match="step -1"):
        data.batch(-1, 4)
    for batch_size in (0, 3):
        with pytest.raises(ValueError, match=f"batch_size {batch_size} must be a positive multip"):
            data.batch(0, batch_size)
    with pytest.raises(ValueError, match="batch_size 3"):
        data.caption_batch(0, 3, 8)


def test_import_brings_no_framework():
    code = (
        "import sys, data_pipelines.sources.coco_panoptic, data_pipelines.loader; "
        "print(sorted({'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Real images.


@pytest.fixture(scope="module")
def mini(shared_data):
    return shared_data / "coco_panoptic_mini"


def test_mini_epoch_holds_exactly_the_images_without_unseen_ids(mini):
    content = json.loads((mini / "annotations" / "panoptic_train2017.json").read_text())
    unseen = {21, 25, 33, 34, 41, 57, 87, 100, 145, 148, 149, 184, 187, 193}
    expected = {
        a["image_id"]
        for a in content["annotations"]
        if not unseen & {s["category_id"] for s in a["segments_info"]}
    }
    source = open_source("coco_panoptic_zps", mini, "train2017")
    data = SegmentationLoader(source, seed=1, image_size=64)
    batch = data.batch(0, 31)
    assert len(expected) == 31 and set(batch["image_id"].tolist()) == expected
    assert set(data.caption_batch(0, 31, 16)["captions"]) <= {
        data.vocabulary.names[k] for k in data.vocabulary.seen
    }


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
