"""Unit vectors, and the fingerprint of parameters."""

import jax.numpy as jnp
import numpy as np

from concat_jax.core.arrays import fingerprint, unit


def test_unit_vectors_by_hand():
    got = unit(np.array([[[3.0, 4.0], [0.0, 0.0]], [[0.0, -2.0], [1e-3, 0.0]]]))
    np.testing.assert_allclose(got, [[[0.6, 0.8], [0, 0]], [[0, -1], [1, 0]]])
    assert unit(np.ones((2, 3), np.float32)).dtype == np.float32


def test_the_fingerprint_is_of_names_shapes_types_and_numbers():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.float32(1)}
    mine = fingerprint(tree)
    assert mine == fingerprint({"c": jnp.float32(1), "a": {"b": jnp.arange(6.0)}})
    # As query banks and cached targets on people's disks have it.
    assert mine == "192447027e2a87d7a0f15fb44927c36b6f7db2f8eeacf892ee81de0366883230"
    for other in (
        {**tree, "c": np.float32(2)},
        {**tree, "a": {"b": tree["a"]["b"].reshape(2, 3)}},
        {**tree, "a": {"b": tree["a"]["b"].view(np.int32)}},
        {"c": tree["c"], "a": {"d": tree["a"]["b"]}},
    ):
        assert fingerprint(other) != mine
