"""Pictures of a data set have the pixels that a prediction sees, whatever their file's mode."""

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from concat_jax.inference.images import read_image
from data_pipelines.sources.pictures import open_picture

DEEP = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
CLEAR = np.array([[[255, 0, 0, 255], [0, 9, 0, 0], [0, 0, 200, 255]]], np.uint8)


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (Image.fromarray(DEEP), {}, [[[v] * 3 for v in (0, 1, 128, 255)]]),
        (Image.fromarray(CLEAR), {}, [[[255, 0, 0], [255] * 3, [0, 0, 200]]]),
        (
            Image.fromarray(CLEAR[..., :3]),
            {"transparency": (0, 9, 0)},
            [[[255, 0, 0], [255] * 3, [0, 0, 200]]],
        ),
    ],
    ids=["16 bit", "alpha", "a colour that is clear"],
)
def test_a_picture_is_what_a_prediction_sees(tmp_path, picture, options, expected):
    picture.save(tmp_path / "a.png", **options)
    found = open_picture(tmp_path / "a.png")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, read_image(tmp_path / "a.png"))


def test_a_range_that_nobody_knows_is_refused(tmp_path):
    Image.fromarray(np.float32([[0.0, 0.5, 1.0]])).save(tmp_path / "a.tif")
    with pytest.raises(FileError, match=r"^\S+a.tif holds 32-bit floats of unknown range"):
        open_picture(tmp_path / "a.tif")
