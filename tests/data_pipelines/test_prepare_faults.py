"""`python -m data_pipelines.prepare` on data at fault: each is found without writing anything."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import prepare as command


def run(*arguments):
    command.main(["prepare", *map(str, arguments)])


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
