"""Names of results, and what they are kept apart from."""

import pytest
from PIL import Image

from concat_jax.core.files import FileError, refuse_inputs, write_png
from concat_jax.inference.images import OVERLAY_SUFFIX
from concat_jax.inference.outputs import result_files, result_names


def test_names_never_collide():
    names = result_names(["x/a.png", "x/a.jpg", "x/A.bmp", "x/a-2.png", "y/a.png", "b.v2.jpg"])
    assert names == ["x/a", "x/a-3", "x/A-4", "x/a-2", "y/a", "b.v2"]
    sheets = ["contact_sheet.png", "Contact_Sheet-2.jpg", "x/contact_sheet.png"]
    assert result_names(sheets) == ["contact_sheet_", "Contact_Sheet-2_", "x/contact_sheet"]
    assert result_names(["cam\\1.jpg", "cam/2.jpg"]) == ["cam/1", "cam/2"]
    assert result_names(["/a/b.jpg", "../c.jpg", "..jpg"]) == ["a/b", "c", "..jpg"]


def test_results_of_the_longest_names_are_written(tmp_path):
    names = result_names([f"{letter * 125}.png" for letter in "éü"] + ["é" * 120 + ".png"])
    assert len(set(names)) == 3
    for name in names:
        write_png(tmp_path / f"{name}{OVERLAY_SUFFIX}", Image.new("L", (1, 1)))
    write_png(tmp_path / ("m" * 251 + ".png"), Image.new("L", (1, 1)))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("task", "read"),
    [
        ("panoptic", "panoptic/x.png"),
        ("panoptic", "panoptic.json"),
        ("panoptic", "x.overlay.png"),
        ("semantic", "semantic/x.png"),
        ("instance", "instances.json"),
    ],
)
def test_inputs_are_not_written_over(tmp_path, task, read):
    files = list(result_files(tmp_path, task, ["x"]))
    refuse_inputs(files, [tmp_path / "x.png", tmp_path / "gt.json"])
    with pytest.raises(FileError, match=f"{read} is an input and would be written over; name"):
        refuse_inputs(files, [tmp_path / "d" / ".." / read])
