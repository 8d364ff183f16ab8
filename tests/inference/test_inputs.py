"""Every input is an image to take, passed over with a word, or failed; names and ids of images."""

import json
import os
import shlex
import unicodedata

import pytest
from PIL import Image

from concat_jax.inference.inputs import data_set_names, find_images, image_ids, source_names


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def told(inputs, folder):
    """Names taken, sentences of what is passed over and of failures, without the folder."""
    cut = [s.replace(f"{folder}/", "") for s in (*(s for s, _ in inputs.skipped), *inputs.failures)]
    number = len(inputs.skipped)
    names = [path.relative_to(folder).as_posix() for path in inputs.paths]
    return names, cut[:number], cut[number:]


def test_a_folder_with_everything_that_folders_have(tmp_path):
    folder = tmp_path / "img"
    for name in ("a.jpg", "b.JPG", "a.overlay.png", "sub/x.jpg", "sub/deep/y.png", "none/a.txt"):
        image(folder / name) if not name.endswith("txt") else (folder / "none").mkdir()
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
    (folder / "notes.txt").write_text("no image")
    for name in ("x.heic", "noext", ".DS_Store"):
        (folder / name).write_bytes(b"")
    os.symlink(folder / "a.jpg", folder / "c.jpg")
    os.symlink(folder / "gone.jpg", folder / "d.jpg")
    os.link(folder / "a.jpg", folder / "e.jpg")  # another name of one file: an image of its own
    inputs = find_images([str(folder)])
    names, skipped, failures = told(inputs, folder)
    assert names == ["a.jpg", "b.JPG", "e.jpg"]
    assert sorted(skipped) == [
        "._a.jpg is a file of macOS, no image.",
        f"{folder} holds 3 without an image's suffix (.heic, .txt, none); name those that are "
        "images.",
        "a.overlay.png is of an earlier run.",
        "c.jpg is the same file as a.jpg.",
        "sub is a folder; name it, or give '**/*.jpg' '**/*.png'.",
    ]
    assert failures == ["d.jpg is a link to nothing."]
    assert inputs.num_skipped == 8, "two of them in the folder"
    # The three numbers are all that lies there, but for what is hidden.
    assert len(names) + inputs.num_skipped + len(failures) == 12


def test_a_folder_that_another_argument_names_is_not_passed_over(tmp_path):
    for name in ("x.png", "sub/y.png", "sub/z.png"):
        image(tmp_path / name)
    for more in (["sub"], ["**/*.png"], ["sub/y.png", "sub/z.png"]):
        inputs = find_images([str(tmp_path), *(str(tmp_path / one) for one in more)])
        assert len(inputs.paths) == 3
        assert [s for s, _ in inputs.skipped if "is a folder" in s] == []
    inputs = find_images([str(tmp_path), str(tmp_path / "sub" / "y.png")])
    assert len(inputs.paths) == 2 and inputs.num_skipped == 1


def test_the_pattern_that_is_named_finds_what_was_passed_over(tmp_path):
    paths = [image(tmp_path / "of [1]" / name) for name in ("sub/x.PNG", "sub/deep/y.webp")]
    (sentence, number), *_ = find_images([str(tmp_path / "of [1]")]).skipped
    patterns = shlex.split(sentence.partition(" or give ")[2].rstrip("."))
    assert number == 2 and sorted(find_images(patterns).paths) == sorted(paths)


def test_globs_and_files_by_name(tmp_path):
    for name in ("a[1].png", "b.png", "b.overlay.png", "cam/c.png"):
        image(tmp_path / name)
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    names, skipped, failures = told(find_images([f"{tmp_path}/**/*.png"]), tmp_path)
    assert names == ["a[1].png", "b.png", "cam/c.png"]
    assert skipped == ["b.overlay.png is of an earlier run."]
    assert failures == ["link.png is a link to nothing."]
    names, skipped, failures = told(find_images([f"{tmp_path}/[b-c]*"]), tmp_path)
    assert names == ["b.png"] and not failures
    assert skipped == [
        "b.overlay.png is of an earlier run.",
        "cam is a folder; name it, or give '**/*.png'.",
    ]
    # What is named is taken, each file once.
    given = ["a[1].png", "b.overlay.png", "b.png", "b.png", "link.png"]
    names, skipped, failures = told(find_images([str(tmp_path / g) for g in given]), tmp_path)
    assert names == given[:3] and skipped == ["b.png is the same file as b.png."]
    assert failures == ["link.png is a link to nothing."]


def test_arguments_that_stand_for_nothing_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images.jpg").mkdir()
    given = [str(tmp_path / name) for name in ("empty", "*.png", "no.png", "images.jpg", "*.jpg")]
    paths, skipped, failures = told(find_images(given), tmp_path)
    assert (paths, skipped) == ([], [])
    assert failures == [
        f"{tmp_path / 'empty'} holds no image.".replace(f"{tmp_path}/", ""),
        "*.png matches no file.",
        "no.png does not exist.",
        "images.jpg holds no image.",
        "*.jpg matches no file.",
    ]


def test_names_keep_the_folders_that_tell_images_apart(tmp_path):
    paths = [tmp_path / name for name in ("cam1/1.jpg", "cam2/1.jpg", "3.jpg")]
    assert source_names(paths) == ["cam1/1.jpg", "cam2/1.jpg", "3.jpg"]
    assert source_names(paths[:1]) == ["1.jpg"]
    assert source_names([]) == []
    assert image_ids(["000000000139", "000000000285"]) == [139, 285]
    assert image_ids(["7", "007"]) == [1, 2]
    assert image_ids(["7", "b"]) == [1, 2]
    # Ids that no reader takes, as of a camera's date to the microsecond.
    assert image_ids(["20240101123045123456", "20240101123045123457"]) == [1, 2]


def test_a_data_set_names_and_numbers_its_images(tmp_path):
    def listed(*rows):
        images = [{"id": i, "file_name": n, "height": 2, "width": 2} for i, n in rows]
        (tmp_path / "gt.json").write_text(json.dumps({"images": images}))
        return tmp_path / "gt.json"

    paths = [tmp_path / "img" / name for name in ("apple.jpg", "cam1/1.jpg")]
    rows = (2, "apple.jpg"), (1, "zebra.jpg"), (9, "cam1/1.jpg"), (8, "cam2/1.jpg")
    assert data_set_names(paths, listed(*rows)) == (["apple.jpg", "cam1/1.jpg"], [2, 9])
    # As Windows writes them, and without an extension.
    others = (2, "apple"), (9, "cam1\\1.jpg")
    assert data_set_names(paths, listed(*others)) == (["apple", "cam1\\1.jpg"], [2, 9])
    written = [tmp_path / unicodedata.normalize("NFD", "é.jpg"), tmp_path / "we\\ird.jpg"]
    others = (2, unicodedata.normalize("NFC", "é.jpg")), (9, "we\\ird.jpg")
    assert data_set_names(written, listed(*others))[1] == [2, 9]
    with pytest.raises(ValueError, match=r"apple.jpg fits no image of .*gt.json.* leave --annot"):
        data_set_names(paths, listed(*rows[1:]))
    # "cam1/1.jpg" ends in "1.jpg" as well: the longest is meant.
    assert data_set_names(paths, listed(*rows, (7, "1.jpg")))[1] == [2, 9]
    with pytest.raises(ValueError, match=r"cam1/1.jpg fits 2 images of .*gt.json"):
        data_set_names(paths, listed(*rows, (7, "cam1/1")))
    with pytest.raises(ValueError, match=r"both fit the image 2"):
        data_set_names([paths[0], tmp_path / "other" / "apple.jpg"], listed(*rows))
    with pytest.raises(ValueError, match="no list of 'images'"):
        (tmp_path / "gt.json").write_text("{}")
        data_set_names(paths, tmp_path / "gt.json")
