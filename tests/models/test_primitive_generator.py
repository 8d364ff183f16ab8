"""PADing's generator: sizes of the publication, real queries' scale, and who listens to whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.generators import PrimitiveGenerator, QueryGenerator
from concat_jax.models.networks import make_networks

SMALL = dict(num_primitives=5, num_layers=2, num_heads=2, ffn_width=12)
GENERATOR = PrimitiveGenerator(width=8, **SMALL)
TEXT = jax.random.normal(jax.random.key(0), (4, 6))
SCALE, BIAS = jnp.arange(1.0, 9.0), jnp.linspace(-1, 1, 8)
PARAMS = jax.jit(GENERATOR.init)(jax.random.key(1), TEXT, jax.random.key(2), SCALE, BIAS)
NOISELESS = PrimitiveGenerator(width=8, **SMALL, noise_scale=0.0, dropout_rate=0.0)


def networks_config(**generator):
    segmentor = dict(backbone=dict(kind="resnet", stage_sizes=(1, 1, 1, 1), width=8), width=32)
    return {
        "clip": dict(embed_dim=16, image_size=16, patch_size=8, image_width=16, image_depth=1)
        | dict(image_heads=2, text_width=16, text_depth=1, text_heads=2, vocab_size=12)
        | dict(context_length=5, eot_id=11),
        "segmentor": segmentor,
        "projector": dict(hidden_width=16),
        "generator": generator,
    }


def test_sizes_are_those_of_the_publication():
    """Generator, projection and primitives as in PADing's model, less what has no effect there.

    Self-attention over one token has queries and keys that nothing depends on (2 x 65,792 a layer),
    a bias of keys cancels in the softmax (256 a layer), and the last LayerNorm's 512 numbers are
    the real queries' here.
    """
    shapes = jax.eval_shape(
        lambda: PrimitiveGenerator(width=256).init(
            jax.random.key(0), jnp.zeros((1, 512)), jax.random.key(0), jnp.ones(256), jnp.ones(256)
        )
    )
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    paper = 131_328 + 102_400 + 3_160_832
    assert count == paper - 3 * (2 * 65_792 + 256) - 512


def test_output_is_normalised_then_scaled():
    queries = jax.jit(GENERATOR.apply)(PARAMS, TEXT, jax.random.key(3), SCALE, BIAS)
    assert queries.dtype == jnp.float32
    inner = (queries - BIAS) / SCALE
    np.testing.assert_allclose(inner.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(inner.std(axis=-1), 1, atol=1e-3)


@pytest.mark.parametrize(
    "generator",
    [
        PrimitiveGenerator(width=8, **SMALL, dropout_rate=0.0),
        PrimitiveGenerator(width=8, **SMALL, noise_scale=0.0, dropout_rate=0.3),
    ],
    ids=["noise", "dropout"],
)
def test_noise_and_dropout_spread_a_class_and_the_key_decides(generator):
    one_class = jnp.broadcast_to(TEXT[:1], (50, 6))
    apply = jax.jit(generator.apply)
    first, again, other = (
        np.asarray(apply(PARAMS, one_class, jax.random.key(key), SCALE, BIAS)) for key in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.std(first, axis=0).min() > 1e-2
    alike = jax.jit(NOISELESS.apply)(PARAMS, one_class, jax.random.key(3), SCALE, BIAS)
    np.testing.assert_allclose(alike - alike[:1], 0, atol=1e-5)


def test_tokens_do_not_see_each_other_and_any_leading_axes_do():
    apply = jax.jit(NOISELESS.apply)
    alone = apply(PARAMS, TEXT[2], jax.random.key(3), SCALE, BIAS)
    among = apply(PARAMS, TEXT.reshape(2, 2, 6), jax.random.key(3), SCALE, BIAS)
    assert among.shape == (2, 2, 8)
    np.testing.assert_allclose(alone, among[1, 0], atol=1e-5)
    assert np.abs(among[0, 0] - among[0, 1]).max() > 1e-2


def test_one_layer_by_hand():
    """Two primitives, one head, no noise: PADing's post-norm layer written out."""
    generator = PrimitiveGenerator(
        width=2, num_primitives=2, num_layers=1, num_heads=1, ffn_width=3,
        noise_scale=0.0, dropout_rate=0.0,
    )  # fmt: skip
    text, one, zero = jnp.array([0.6, -0.8, 0.0]), jnp.ones(2), jnp.zeros(2)
    shapes = generator.init(jax.random.key(0), text, jax.random.key(1), one, zero)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    tree = params["params"]

    def dense(x, name, of=tree["layer_0"]):
        return x @ of[name]["kernel"] + of[name].get("bias", 0)

    def norm(x, name=None):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        return (
            x
            if name is None
            else x * tree["layer_0"][name]["scale"] + tree["layer_0"][name]["bias"]
        )

    x = dense(np.asarray(text) * 3**0.5, "projection", tree)
    x = norm(x + dense(dense(x, "self_value"), "self_output"), "self_norm")
    primitives = tree["primitives"]
    logits = dense(primitives, "key") @ dense(x, "query") / 2**0.5
    weights = np.exp(logits) / np.exp(logits).sum()
    x = norm(x + dense(weights @ dense(primitives, "value"), "output"), "attention_norm")
    x = norm(x + dense(np.maximum(dense(x, "ffn_in"), 0), "ffn_out"), "ffn_norm")
    ours = generator.apply(params, text, jax.random.key(1), one, zero)
    np.testing.assert_allclose(ours, norm(x), atol=1e-3)


def test_gradients_reach_every_parameter():
    def loss(params):
        queries = GENERATOR.apply(params, TEXT, jax.random.key(3), SCALE, BIAS)
        return jnp.sum(jnp.sin(queries))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(PARAMS)):
        assert np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)


def test_the_config_chooses_the_generator():
    assert make_networks(networks_config(hidden_width=4)).generator == QueryGenerator(
        width=32, hidden_width=4
    )
    assert isinstance(
        make_networks(networks_config(kind="mlp", hidden_width=4)).generator, QueryGenerator
    )
    generator = make_networks(networks_config(kind="primitives", num_primitives=7)).generator
    assert generator == PrimitiveGenerator(width=32, num_primitives=7)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(kind="primitive"), "generator.kind is 'primitive'; did you mean 'primitives'"),
        (
            dict(kind="primitives", hidden_width=4),
            "no key 'hidden_width'; did you mean 'ffn_width'",
        ),
        (dict(hidden_width=4, num_primitives=4), "generator has no key 'num_primitives'"),
        (dict(hidden_width=4, width=4), "generator has no key 'width'"),
        (
            dict(kind="primitives", num_heads=5),
            "into 5 heads of the generator; change its num_heads",
        ),
    ],
)
def test_a_wrong_generator_is_refused_with_one_sentence(section, message):
    with pytest.raises(ValueError, match=message):
        make_networks(networks_config(**section))
