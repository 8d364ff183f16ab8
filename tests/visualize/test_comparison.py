"""Comparison sheets."""

import numpy as np

from concat_jax.visualize import comparison
from tests.visualize.test_overlay import IS_SEEN, IS_THING, NAMES, two_segments


def test_sheet_holds_every_panel():
    image, ids, labels = two_segments()
    wide = np.full((100, 200, 3), 90, np.uint8)
    wide_ids = np.ones((100, 200), int)
    rows = [
        comparison.comparison_row(
            image, (ids, labels), (ids, labels), NAMES, IS_THING, IS_SEEN, caption="first"
        ),
        comparison.comparison_row(
            wide, (wide_ids, [0]), (wide_ids * 0, []), NAMES, IS_THING, IS_SEEN
        ),
    ]
    assert [p.size for p in rows[0].panels] == [(320, 320)] * 3
    assert [p.size for p in rows[1].panels] == [(600, 300)] * 3
    sheet = comparison.comparison_sheet(rows)
    assert sheet.width > 3 * 600
    assert sheet.height > 320 + 300
    pixels = np.asarray(sheet)
    assert (pixels.reshape(-1, 3) == (90, 90, 90)).all(-1).sum() == 600 * 300  # the plain image
    header = pixels[:40]
    assert (header < 100).any(), "headers are printed"
    assert (pixels[:, -5:] == 255).all(), "the margin stays white"
