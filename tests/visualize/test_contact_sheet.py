"""Contact sheets: pages fill up, keep proportions and say what is on them."""

import numpy as np
from PIL import Image

from concat_jax.visualize.contact_sheet import CELL, COLUMNS, GAP, ROWS, ContactSheet, _fit, page
from concat_jax.visualize.overlay import text_size


def test_pages_are_written_as_they_fill_up(tmp_path):
    red = Image.new("RGB", (640, 320), "red")
    with ContactSheet(tmp_path / "all.overlay.png") as sheet:
        for number in range(COLUMNS * ROWS + 1):
            assert len(list(tmp_path.iterdir())) == number // (COLUMNS * ROWS)
            sheet.add(red, f"{number}.png", "1 segment: cat")
    assert {f.name for f in tmp_path.iterdir()} == {"all.overlay.png", "all-2.overlay.png"}
    pixels = np.asarray(Image.open(tmp_path / "all.overlay.png"))
    assert (pixels == (255, 0, 0)).all(-1).sum() == COLUMNS * ROWS * CELL[0] * CELL[0] // 2
    assert Image.open(tmp_path / "all-2.overlay.png").width == CELL[0] + 2 * GAP
    assert red.size == (640, 320)


def test_one_picture_needs_no_page_nor_does_what_failed(tmp_path):
    with ContactSheet(tmp_path / "all.overlay.png") as sheet:
        sheet.add(Image.new("RGB", (9, 9)), "a", "b")
    try:
        with ContactSheet(tmp_path / "all.overlay.png") as sheet:
            sheet.add(Image.new("RGB", (9, 9)), "a", "b")
            sheet.add(Image.new("RGB", (9, 9)), "a", "b")
            raise KeyError
    except KeyError:
        pass
    assert not list(tmp_path.iterdir())


def test_cells_do_not_overlap_whatever_their_sizes_and_names():
    sizes = ((320, 10), (10, 240), (320, 240), (1, 1), (100, 100))
    cells = [(Image.new("RGB", size, "blue"), "name" * 40, "found" * 40) for size in sizes]
    pixels = np.asarray(page(cells))
    assert (pixels == (0, 0, 255)).all(-1).sum() == sum(w * h for w, h in sizes)
    assert (pixels[:, -GAP:] == 255).all() and (pixels[:GAP] == 255).all()
    assert _fit("short", 300) == "short"
    assert _fit("long " * 50, 300).endswith("...") and text_size(_fit("x" * 99, 300), 13)[0] <= 300
