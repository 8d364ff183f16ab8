"""The golden files are what the references say now; without the references they stand for them."""

import numpy as np
import pytest

from tests.golden import cases, make


def assert_same(found, name):
    expected = cases.load(name)
    assert set(found) == set(expected)
    for key, array in found.items():
        assert np.shape(array) == expected[key].shape, key
        if np.issubdtype(expected[key].dtype, np.floating):
            assert cases.relative_error(array, expected[key]) < 1e-5, key
        else:
            np.testing.assert_array_equal(array, expected[key], err_msg=key)


@pytest.mark.parametrize("name", make.FILES)
def test_the_file_is_what_the_reference_says(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same(make.FILES[name](), name)


def test_the_file_of_tokens_is_what_the_reference_says(shared_data):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_same(make.tokens(shared_data), "tokens")
