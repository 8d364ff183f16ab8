"""Label maps: values become classes, files are paired by name, and all ways they can be wrong."""

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.semantic_maps import SemanticMapSource, read_list

VOCABULARY = Vocabulary(
    names=("sky", "dog", "cat"),
    is_thing=(False, True, True),
    is_seen=(True, False, True),
    category_ids=(7, 2, 300),
)
RNG = np.random.default_rng(0)


def write(root, values, name="img_05", suffix=".png", mode=None):
    """A picture of noise and its map; values may be of 8 or 16 bits."""
    for folder in ("images", "maps"):
        (root / folder).mkdir(exist_ok=True)
    picture = RNG.integers(0, 256, (*values.shape, 3), np.uint8)
    Image.fromarray(picture).save(root / "images" / f"{name}.jpg", format="PNG")
    Image.fromarray(values).save(root / "maps" / f"{name}{suffix}")
    return picture


def load(root, **options):
    options = {"ignored": (0, 255), **options}
    return SemanticMapSource(root / "images", root / "maps", VOCABULARY, **options)


VALUES = np.array([[7, 7, 2, 0], [7, 0, 2, 255]], np.uint8)


def test_each_class_is_one_segment_and_none_is_a_thing(tmp_path):
    picture = write(tmp_path, VALUES)
    write(tmp_path, np.full((3, 5), 255, np.uint8), "img_1")
    source = load(tmp_path)
    empty, record = source.records
    assert (empty.image_id, record.image_id) == (1, 5) and len(empty.labels) == 0
    assert (record.height, record.width) == (2, 4)
    assert record.file_name == "img_05.jpg" and record.png_name == "img_05.png"
    assert record.labels.tolist() == [1, 0] and record.source_ids.tolist() == [3, 8]
    image, ids = source.read(record)
    np.testing.assert_array_equal(ids, [[2, 2, 1, 0], [2, 0, 1, 0]])
    np.testing.assert_array_equal(np.asarray(image), picture)
    assert source.vocabulary.is_thing == (False,) * 3
    assert source.vocabulary.is_seen == VOCABULARY.is_seen
    assert not source.read(empty)[1].any()
    again = pickle.loads(pickle.dumps(source))  # prepare hands it to other processes
    np.testing.assert_array_equal(again.read(record)[1], ids)


def test_maps_of_sixteen_bits_with_shifted_values(tmp_path):
    values = np.array([[299, 6, 65535], [1, 1, 299]], np.uint16)
    write(tmp_path, values, "ADE_val_00000003", ".tif")
    write(tmp_path, values, "ADE_val_00000004", ".png")
    source = load(tmp_path, offset=1, ignored=(65535,))
    for record, image_id in zip(source.records, (3, 4), strict=True):
        assert record.image_id == image_id
        assert record.labels.tolist() == [1, 0, 2]
        np.testing.assert_array_equal(source.read(record)[1], [[3, 2, 0], [1, 1, 3]])


def test_maps_of_one_bit(tmp_path):
    write(tmp_path, np.eye(3) > 0)
    source = load(tmp_path, offset=1)  # 1 is the class 2
    np.testing.assert_array_equal(source.read(source.records[0])[1], np.eye(3))


def test_a_palette_is_only_for_the_eye(tmp_path):
    write(tmp_path, VALUES)
    picture = Image.fromarray(VALUES, "P")
    picture.putpalette(RNG.integers(0, 256, 768, np.uint8).tolist())
    picture.save(tmp_path / "maps" / "img_05.png")
    np.testing.assert_array_equal(
        load(tmp_path).read(load(tmp_path).records[0])[1], [[2, 2, 1, 0], [2, 0, 1, 0]]
    )


def test_an_ignored_value_may_be_a_class_after_all(tmp_path):
    """Pascal VOC's background is void with 20 classes and a class with 21."""
    write(tmp_path, VALUES)
    assert load(tmp_path, ignored=(0, 2, 255)).records[0].labels.tolist() == [1, 0]


def test_a_list_chooses_images(tmp_path):
    for name in ("a1", "a2", "a3"):
        write(tmp_path, VALUES, name)
    (tmp_path / "train.txt").write_text("a3\n\na1 1\n")
    names = read_list(tmp_path / "train.txt")
    assert names == ["a3", "a1"]
    assert [r.image_id for r in load(tmp_path, stems=names).records] == [1, 3]
    with pytest.raises(FileError, match="no map a9.png"):
        load(tmp_path, stems=["a9"])
    source = load(tmp_path, stems=["a9", "a1"], on_bad_example="skip")
    assert [r.image_id for r in source.records] == [1] and source.skipped == 1
    # Suffixes are taken off; an image named twice is a slip.
    (tmp_path / "train.txt").write_text("a3.jpg\na1\n2007.5\n")
    assert read_list(tmp_path / "train.txt") == ["a3", "a1", "2007.5"]
    (tmp_path / "train.txt").write_text("a3\na1\na3.jpg\n")
    with pytest.raises(FileError, match="train.txt names a3 2 times"):
        read_list(tmp_path / "train.txt")
    with pytest.raises(FileError, match="val.txt cannot be read"):
        read_list(tmp_path / "val.txt")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(FileError, match="val.txt is empty"):
        read_list(tmp_path / "val.txt")


def test_images_without_a_map_are_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path, VALUES)
    write(tmp_path, VALUES, "img_06")
    (tmp_path / "maps" / "img_06.png").unlink()
    assert len(load(tmp_path).records) == 1 and "1 images have no map" in caplog.text


def test_the_zero_shot_rule_sees_the_scanned_classes(tmp_path):
    write(tmp_path, VALUES, "a1")
    write(tmp_path, np.full((4, 4), 7, np.uint8), "a2")
    write(tmp_path, np.full((4, 4), 2, np.uint8), "a3")
    options = dict(seed=0, image_size=8, max_segments=3, num_threads=1)
    source = load(tmp_path)
    drop = SegmentationLoader(source, unseen_images="drop", **options)
    void = SegmentationLoader(source, unseen_images="void", augment="none", **options)
    assert drop.training_indices.tolist() == [1] and void.training_indices.tolist() == [0, 1]
    batch = void.batch(0, 2)
    assert set(batch["segment_labels"].ravel().tolist()) == {0, -1}
    b = batch["image_id"].tolist().index(1)
    np.testing.assert_array_equal(
        batch["segment_ids"][b, :4, ::2], [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    )


def _unknown_value(root):
    write(root, np.full((2, 4), 9, np.uint8), "img_2")


def _colours(root):
    write(root, VALUES, "img_2")
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(root / "maps" / "img_2.png")


def _cut(root):
    write(root, RNG.choice([2, 7], (40, 40)).astype(np.uint8), "img_2")
    path = root / "maps" / "img_2.png"
    path.write_bytes(path.read_bytes()[:90])


def _empty(root):
    write(root, VALUES, "img_2")
    (root / "maps" / "img_2.png").write_bytes(b"")


def _lonely(root):
    write(root, VALUES, "img_2")
    (root / "images" / "img_2.jpg").unlink()


BAD_MAPS = [
    (_unknown_value, "img_2.png holds the value 9, which is neither a class nor one of"),
    (_colours, "img_2.png has the mode RGB; a label map has one channel"),
    (_cut, "img_2.png cannot be read as an image"),
    (_empty, "img_2.png cannot be read as an image"),
    (_lonely, "no image for the map .*img_2.png"),
]


@pytest.mark.parametrize(("harm", "message"), BAD_MAPS)
def test_bad_maps_are_refused_or_left_out_when_opened(tmp_path, harm, message, caplog):
    write(tmp_path, VALUES)
    harm(tmp_path)
    with pytest.raises(FileError, match=message):
        load(tmp_path)
    with caplog.at_level(logging.WARNING):
        source = load(tmp_path, on_bad_example="skip")
    assert [r.image_id for r in source.records] == [5] and source.skipped == 1
    assert "img_2.png" in caplog.text
    for path in (tmp_path / "maps").glob("img_05*"):
        path.write_bytes(b"")
    with pytest.raises(FileError, match="Not one map of .*maps can be used"):
        load(tmp_path, on_bad_example="skip")


def test_bad_folders_and_names(tmp_path):
    with pytest.raises(FileError, match="folder .*images does not exist"):
        load(tmp_path)
    write(tmp_path, VALUES)
    (tmp_path / "images" / "img_05.jpg").rename(tmp_path / "images" / "img_05.txt")
    with pytest.raises(FileError, match="images holds no file that ends in .jpg"):
        load(tmp_path)
    write(tmp_path, VALUES, "img_06")
    with pytest.raises(FileError, match="no image for the map .*img_05.png"):
        load(tmp_path)
    write(tmp_path, VALUES)
    write(tmp_path, VALUES, suffix=".tif")
    with pytest.raises(FileError, match="both img_05.png and img_05.tif"):
        load(tmp_path)
    (tmp_path / "maps" / "img_05.tif").unlink()
    # Names of the same digits, or of none, are images of their own.
    for name in ("jpg_5", "beach"):
        write(tmp_path, VALUES, name)
    records = load(tmp_path).records
    names = ["beach.jpg", "img_05.jpg", "img_06.jpg", "jpg_5.jpg"]
    assert [(record.image_id, record.file_name) for record in records] == [*enumerate(names, 1)]


def test_files_that_change_after_the_scan(tmp_path):
    write(tmp_path, VALUES)
    source = load(tmp_path)
    record = source.records[0]
    write(tmp_path, VALUES.T.copy())
    with pytest.raises(FileError, match="img_05.png is not what it was"):
        source.read(record)
    write(tmp_path, np.full((2, 4), 7, np.uint8))
    with pytest.raises(FileError, match="img_05.png is not what it was"):
        source.read(record)
    write(tmp_path, VALUES)
    Image.new("RGB", (5, 2)).save(tmp_path / "images" / "img_05.jpg")
    with pytest.raises(FileError, match="^The image .*img_05.jpg is 2x5 .*img_05.png says 2x4"):
        source.read(record)
