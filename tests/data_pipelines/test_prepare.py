"""The command `prepare`: its counts, its leak test, and what it says of mistakes."""

import importlib.util
import io
import json
import re
import resource
import sys

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from data_pipelines import prepare as command
from data_pipelines.count_table import count_part, format_classes, format_parts
from data_pipelines.leak_test import check_no_leak
from data_pipelines.prepared import build as building
from data_pipelines.prepared.source import PreparedSource
from data_pipelines.sources.registry import open_source
from data_pipelines.sources.source import treat_unseen

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="pip install -r requirements-data.txt brings TFDS",
)


def source_of(root, part="train2017"):
    return open_source("coco_panoptic_zps", root, part, root / "split.json")


# Counts.


def test_counts_by_part_split_and_class(tiny_panoptic):
    drop = count_part(source_of(tiny_panoptic), "drop")
    assert (drop.images, drop.kept_images, drop.crowd) == (6, 4, 2)
    assert drop.class_segments.tolist() == [4, 2, 4, 0]  # sky, road, dog, cow
    assert drop.class_images.tolist() == [4, 2, 3, 0]
    assert drop.kept_segments.tolist() == [3, 0, 3, 0]
    void = count_part(source_of(tiny_panoptic), "void")
    assert void.kept_images == 5  # all but the one that is road alone
    assert void.kept_segments.tolist() == [4, 0, 4, 0]
    keep = count_part(source_of(tiny_panoptic), "keep")
    assert keep.kept_images == 6 and keep.kept_segments.tolist() == [4, 2, 4, 0]


def test_tables_are_aligned_and_name_the_unseen_classes(tiny_panoptic):
    vocabulary = source_of(tiny_panoptic).vocabulary
    counts = {
        "train2017": count_part(source_of(tiny_panoptic), "drop"),
        "val2017": count_part(source_of(tiny_panoptic, "val2017"), "keep"),
    }
    parts = format_parts(vocabulary, counts).splitlines()
    assert parts[1].split() == "train2017 6 10 8 2 2 drop: 4 6".split()
    assert parts[2].split() == "val2017 2 3 2 1 0 keep: 2 3".split()
    assert parts[3:] == [
        "train2017: 1 of 2 unseen classes occur: road.",
        "val2017: 1 of 2 unseen classes occur: road.",
    ]
    classes = [line.split() for line in format_classes(vocabulary, counts).splitlines()]
    assert [row[:3] for row in classes[1:]] == [
        ["sky", "seen", "stuff"],
        ["dog", "seen", "thing"],
        ["road", "unseen", "stuff"],
        ["cow", "unseen", "thing"],
    ]
    assert classes[3][3:] == ["2", "2", "0", "1", "1", "1"]
    widths = {len(line) for line in format_classes(vocabulary, counts).splitlines()}
    assert len(widths) == 1


# The leak test.


@pytest.mark.parametrize("treatment", ["drop", "void"])
def test_treated_sources_pass_the_leak_test(tiny_panoptic, treatment):
    check_no_leak(*treat_unseen(source_of(tiny_panoptic), treatment))


def test_a_leak_is_named_by_image_id(tiny_panoptic):
    source = source_of(tiny_panoptic)
    with pytest.raises(FileError, match=r"Image 8 \(8.jpg\).* 'road'.* 2 of 6 checked images do"):
        check_no_leak(source, range(6))
    # Crowd counts as well, and images that training does not use do not.
    with pytest.raises(FileError, match=r"Image 9 .* 1 of 2 "):
        check_no_leak(source, [0, 3])
    check_no_leak(source, [0, 1, 4, 5])
    check_no_leak(source, [])


@needs_tfds
def test_a_leak_stops_the_build_before_a_file_is_written(tiny_panoptic, tmp_path, monkeypatch):
    source = source_of(tiny_panoptic)
    monkeypatch.setattr(building, "treat_unseen", lambda s, _: (s, np.arange(len(s.records))))
    with pytest.raises(FileError, match="Image 8 "):
        building.build_part(
            tmp_path / "out", source, dataset="tiny", part="train2017", unseen="drop"
        )
    assert not (tmp_path / "out").exists()


# The command line.


def run(*arguments):
    command.main(["prepare", *map(str, arguments)])


@needs_tfds
def test_the_command_counts_and_then_writes_both_parts(tiny_panoptic, tmp_path, capsys):
    out = tmp_path / "prepared"
    # The folder's own split.json is found.
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017,val2017")
    with pytest.raises(SystemExit, match="--unseen=drop or void for training, keep for evaluation"):
        run(*flags)
    run(*flags[:2], "--part=train2017", "--unseen=drop")
    printed = capsys.readouterr().out
    assert "train2017: leak test passed, 4 images show no unseen class." in printed
    assert "1 of 2 unseen classes occur: road." in printed
    assert not out.exists()
    run(*flags[:2], "--part=train2017", "--unseen=drop", f"--out={out}")
    run(*flags[:2], "--part=val2017", "--unseen=keep", f"--out={out}")
    printed = capsys.readouterr().out
    assert f"train2017: 4 images in {out}, 0 bad images left out." in printed
    assert "val2017: no leak test" in printed
    assert len(PreparedSource(out, "train2017").records) == 4
    assert len(PreparedSource(out, "val2017").records) == 2
    run(*flags[:2], "--part=val2017", "--unseen=keep", f"--out={out}")
    assert "0 bad images left out, as it was there already." in capsys.readouterr().out


@needs_tfds
def test_bad_images_are_named_by_the_command(tiny_panoptic, tmp_path, capsys):
    (tiny_panoptic / "train2017" / "5.jpg").write_bytes(b"")
    flags = (
        *("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop"),
        f"--out={tmp_path / 'out'}",
    )
    with pytest.raises(SystemExit, match="^Error: .*5.jpg cannot be read as an image"):
        run(*flags)
    run(*flags, "--on_bad_example=skip")
    printed = capsys.readouterr().out
    assert f"Left out: {tiny_panoptic / 'train2017' / '5.jpg'} cannot be read" in printed
    assert "1 bad images left out." in printed


@needs_tfds
def test_bad_images_of_the_evaluation_part_are_never_left_out(tiny_panoptic, tmp_path):
    (tiny_panoptic / "val2017").rename(tiny_panoptic / "val")
    for path in (tiny_panoptic / "annotations").glob("*val2017*"):
        path.rename(path.with_name(path.name.replace("val2017", "val")))
    (tiny_panoptic / "val" / "20.jpg").write_bytes(b"")
    options = dict(parts=["val"], out=tmp_path, skip_bad=True)
    with pytest.raises(FileError, match="20.jpg cannot be read as an image"):
        command.prepare("panoptic_folder", tiny_panoptic, **options)


def test_what_skipping_leaves_is_counted(tiny_panoptic, capsys):
    """Where it leaves nothing to train on the check must not pass."""
    images = [*(tiny_panoptic / "train2017").iterdir()]
    for path in images:
        path.write_bytes(b"")
    part = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop")
    with pytest.raises(SystemExit, match="Not one of the images of train2017 that training would"):
        run(*part, "--on_bad_example=skip")
    assert capsys.readouterr().out.count("Left out: ") == len(images) == 6
    # A part of any name that is for evaluation is taken whole, or not at all.
    with pytest.raises(SystemExit, match="cannot be read as an image"):
        run(*part[:2], "--part=train2017", "--unseen=keep", "--on_bad_example=skip")


def test_a_root_that_is_no_folder_is_said_before_its_split(tmp_path):
    with pytest.raises(SystemExit, match=r"data set's folder .*none does not exist; panoptic_fol"):
        run("panoptic_folder", f"--root={tmp_path / 'none'}")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"data set's folder .*file is a file; panoptic_folder is"):
        run("panoptic_folder", f"--root={tmp_path / 'file'}")


def test_pngs_in_other_clothes(tiny_panoptic):
    """Capital suffixes are as good; a JPEG by a PNG's name is told from a file that is cut off."""
    pngs = tiny_panoptic / "annotations" / "panoptic_train2017"
    for path in pngs.iterdir():
        path.rename(path.with_suffix(".PNG"))
    _edit(
        tiny_panoptic,
        lambda content: [
            one.update(file_name=one["file_name"].replace(".png", ".PNG"))
            for one in content["annotations"]
        ],
    )
    part = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop")
    run(*part)
    path = min(pngs.iterdir())
    with Image.open(path) as image:
        image.load()
    image.save(path, "JPEG")
    with pytest.raises(SystemExit, match=f"{path.name} is a JPEG, which may change segment ids"):
        run(*part)


def test_one_file_of_two_spellings_is_named_twice(tiny_panoptic):
    def double(content):
        content["images"][1]["file_name"] = f"./{content['images'][0]['file_name']}"

    _edit(tiny_panoptic, double)
    with pytest.raises(SystemExit, match=r"names the file \d.jpg for 2 images"):
        run("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop")


def _edit(root, change, part="train2017"):
    path = root / "annotations" / f"panoptic_{part}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def empty_all(content):
    for annotation in content["annotations"]:
        annotation["segments_info"] = []


def all_crowd(content):
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1


def all_unseen(content):
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = 4


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        (empty_all, ("--unseen=drop",), "Not one of the 6 images of train2017 has a segment"),
        (empty_all, ("--unseen=keep",), "Not one of the 6 images of train2017 has a segment"),
        (
            all_crowd,
            ("--unseen=keep",),
            "segments of train2017 are crowd, so",
        ),
        (all_unseen, ("--unseen=drop",), "6 images of train2017 shows unseen classes, so none"),
        (all_unseen, ("--unseen=void",), "shows unseen classes alone, .* give another --split"),
        (lambda content: content.update(annotations=[]), ("--unseen=drop",), "annotates no image"),
        (lambda content: content.update(images=[]), ("--unseen=drop",), "lists none"),
    ],
)
def test_a_part_of_which_nothing_is_left_is_refused(tiny_panoptic, change, flags, sentence):
    _edit(tiny_panoptic, change)
    with pytest.raises(SystemExit, match=sentence):
        run("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", *flags)


def test_a_split_that_marks_no_class_seen_is_named(tiny_panoptic):
    split = json.loads((tiny_panoptic / "split.json").read_text())
    for category in split["categories"]:
        del category["split"]
    (tiny_panoptic / "split.json").write_text(json.dumps(split))
    with pytest.raises(SystemExit, match="The split marks no class seen, .* give each class a"):
        run("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop")


def _turn(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(path, "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_turn, "5.jpg is stored as 16x24 .* EXIF orientation turns it to 24x16"),
        (lambda path: Image.new("RGB", (24, 15)).save(path), "5.jpg is 15x24 .* says 16x24"),
        (lambda path: path.write_bytes(b""), "5.jpg cannot be read as an image: it is empty"),
        (lambda path: path.write_text("<html>"), "5.jpg cannot be read as an image: it is in no"),
        (lambda path: (path.unlink(), path.mkdir()), "5.jpg cannot be read as an image: it is a f"),
    ],
)
def test_files_of_another_size_or_kind_are_found_without_packing(
    tiny_panoptic, harm, sentence, capsys
):
    harm(tiny_panoptic / "train2017" / "5.jpg")
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=drop")
    with pytest.raises(SystemExit, match=sentence):
        run(*flags)
    capsys.readouterr()
    run(*flags, "--on_bad_example=skip")
    printed = capsys.readouterr().out
    assert re.search(f"Left out: .*{sentence}", printed)
    assert "train2017: 1 images cannot be used and are left out of training." in printed


def test_faults_of_annotations_are_found_without_packing(tiny_panoptic):
    png = tiny_panoptic / "annotations" / "panoptic_val2017" / "20.png"
    before = png.read_bytes()
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=val2017", "--unseen=keep")
    png.write_bytes(before[:-20])
    with pytest.raises(SystemExit, match=r"20\.png cannot be read as an image|20\.png is cut off"):
        run(*flags)
    ids = np.array(Image.open(io.BytesIO(before)))
    ids[0, 0] = 99
    Image.fromarray(ids).save(png)
    with pytest.raises(SystemExit, match=r"20\.png holds the segment id \d+, which .* lacks"):
        run(*flags)
    png.write_bytes(before)
    extra = {"id": 77, "category_id": 4, "area": 3, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    _edit(tiny_panoptic, lambda c: c["annotations"][0]["segments_info"].append(extra), "val2017")
    with pytest.raises(SystemExit, match="lists the segment id 77, which has no pixel in"):
        run(*flags)


def test_bad_outlines_are_counted(tmp_path, capsys):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "annotations").mkdir()
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 6} for i in (1, 2)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": s}
        for i, s in ((1, square), (2, None))
    ]
    for image in images:
        Image.new("RGB", (6, 4)).save(tmp_path / "train2014" / image["file_name"])
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    flags = ("coco_zsi_48_17", f"--root={tmp_path}", "--part=train2014", "--unseen=drop")
    with pytest.raises(SystemExit, match="segmentation of annotation 2 of .* it is missing"):
        run(*flags)
    run(*flags, "--on_bad_example=skip")
    assert "train2014: 1 images cannot be used and are left out" in capsys.readouterr().out


@needs_tfds
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_made(tiny_panoptic, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=keep")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(SystemExit, match="^Error: .*tfrecord.* cannot be written: .*File too"):
            run(*flags, f"--out={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())


@needs_tfds
def test_ctrl_c_is_one_sentence(tiny_panoptic, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_example", interrupted)
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=keep")
    with pytest.raises(SystemExit) as stop:
        run(*flags, f"--out={tmp_path / 'out'}")
    assert stop.value.code == 130
    assert "Stopped; finished parts are kept" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_writing_without_tensorflow_says_what_to_install(tiny_panoptic, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    flags = ("panoptic_folder", f"--root={tiny_panoptic}", "--part=train2017", "--unseen=keep")
    with pytest.raises(SystemExit, match="needs TensorFlow .*pip install -r requirements-data.txt"):
        run(*flags, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("coco_panoptic_zps",), "Error: give the data set's name and its folder"),
        ((), "the names are coco_panoptic_zps, "),
        (("coco_panoptc_zps", "--root=ROOT"), "did you mean 'coco_panoptic_zps'"),
        (("coco_panoptic_zps", "--rot=ROOT"), "no flag '--rot'; did you mean '--root'"),
        (("coco_panoptic_zps", "more", "--root=ROOT"), "give the data set's name"),
        (
            ("coco_panoptic_zps", "--root=ROOT", "--unseen=hide"),
            "--unseen=hide: value should be one of",
        ),
        (("coco_panoptic_zps", "--root=ROOT/none"), "none does not exist"),
        (("panoptic_folder", "--root=ROOT", "--part=test"), "test"),
        (
            ("coco_panoptic_zps", "--root=ROOT", "--part=train2017", "--split=ROOT/nosplit.json"),
            "nosplit.json",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tiny_panoptic, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        run(*(argument.replace("ROOT", str(tiny_panoptic)) for argument in arguments))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""


def test_the_mini_set_is_counted_as_it_should(shared_data, capsys):
    counts = command.prepare("coco_panoptic_zps", shared_data / "coco_panoptic_mini")
    train, val = counts["train2017"], counts["val2017"]
    assert (train.images, train.class_segments.sum(), train.kept_images) == (100, 1111, 31)
    assert (val.images, val.class_segments.sum(), val.kept_images) == (60, 622, 60)
    printed = capsys.readouterr().out
    assert "train2017: 13 of 14 unseen classes occur" in printed
    assert "val2017: 9 of 14 unseen classes occur" in printed
    assert "train2017: leak test passed, 31 images show no unseen class." in printed
