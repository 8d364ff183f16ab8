"""FC-CLIP at its published widths and depths beside its own modules, with random weights.

By golden files of `tests/golden/make_fcclip.py`, for 20 queries of 250; `-s` prints every error.
"""

import pytest

from tests.golden import cases

pytest.importorskip("torch")  # which the quick test's file wants, too

from tests.inference.test_fcclip import compare  # noqa: E402
from tests.models import test_clip_towers  # noqa: E402

pytestmark = pytest.mark.slow


FULL = [name for name, config in cases.FCCLIPS.items() if config["width"] == 256]


@pytest.mark.parametrize("name", FULL)
def test_equals_fcclips_own_modules(name, tmp_path):
    errors = compare(name, tmp_path)
    print(name, errors)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", FULL)
def test_towers_equal_open_clips(name, tmp_path):
    errors, _ = test_clip_towers.compare(name, tmp_path)
    print(name, errors)
    assert max(errors.values()) < 1e-4, errors
