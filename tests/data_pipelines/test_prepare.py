"""The command `prepare`: its counts, its leak test, and what it says of mistakes."""

import importlib.util
import resource
import sys

import numpy as np
import pytest

from concat_jax.core.files import FileError
from data_pipelines import prepare as command
from data_pipelines.count_table import count_part, format_classes, format_parts
from data_pipelines.leak_test import check_no_leak
from data_pipelines.prepared import build as building
from data_pipelines.prepared.source import PreparedSource
from data_pipelines.sources.source import treat_unseen
from tests.data_pipelines.coco_world import source_of

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="pip install -r requirements-data.txt brings TFDS",
)


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
@pytest.mark.parametrize(
    "part, out, sentence",
    [
        ("val2017,my-val", "out", "The part 'my-val' cannot be part of a file's name"),
        ("val2017", "s3://bucket/out", "neither a path of this machine nor in a bucket"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_counted(
    tiny_panoptic, capsys, monkeypatch, part, out, sentence
):
    monkeypatch.chdir(tiny_panoptic)
    flags = ("panoptic_folder", "--root=.", f"--part={part}", "--unseen=keep", f"--out={out}")
    with pytest.raises(SystemExit, match=sentence):
        run(*flags)
    assert not capsys.readouterr().out and not (tiny_panoptic / "out").exists()


@needs_tfds
def test_bad_images_of_the_evaluation_part_are_never_left_out(tiny_panoptic, tmp_path):
    (tiny_panoptic / "val2017").rename(tiny_panoptic / "val")
    for path in (tiny_panoptic / "annotations").glob("*val2017*"):
        path.rename(path.with_name(path.name.replace("val2017", "val")))
    (tiny_panoptic / "val" / "20.jpg").write_bytes(b"")
    options = dict(parts=["val"], out=tmp_path, skip_bad=True)
    with pytest.raises(FileError, match="20.jpg cannot be read as an image"):
        command.prepare("panoptic_folder", tiny_panoptic, **options)


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
