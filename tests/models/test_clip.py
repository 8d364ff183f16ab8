"""CLIP beside transformers' CLIPModel, and the properties of its parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from concat_jax.losses.alignment import contrastive_loss
from concat_jax.models.clip import interpolate_positions, make_clip
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.semantic_projector import unit
from concat_jax.weights.clip import read_clip
from tests.golden import cases

TINY = dict(
    embed_dim=12,
    image_size=16,
    patch_size=4,
    image_width=16,
    image_depth=1,
    image_heads=2,
    vocab_size=20,
    context_length=6,
    text_width=8,
    text_depth=1,
    text_heads=2,
    image_mlp_ratio=2.0,
    text_mlp_ratio=2.0,
)

# Small sizes that all differ, so that a swapped axis cannot fit by accident.
SMALL_HF = dict(
    projection_dim=24,
    vision_config=dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    text_config=dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=13,
        bos_token_id=97,
        eos_token_id=98,
    ),
)


def _apply(clip, variables, *inputs, method=None):
    return jax.jit(clip.apply, static_argnames="method")(variables, *inputs, method=method)


@pytest.fixture(scope="module")
def tiny():
    clip = make_clip(TINY)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16, 16, 3)), jnp.float32)
    tokens = jnp.asarray([[1, 2, 3, 19, 0, 0], [1, 4, 19, 0, 0, 0]] * 2 + [[1, 5, 6, 7, 8, 19]])
    variables = jax.jit(clip.init)(jax.random.key(0), images, tokens)
    return clip, variables, images, tokens


def _torch_clip(config: dict, seed: int = 0):
    """A CLIPModel whose every parameter, biases and norms too, is random and matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                continue
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
                parameter.copy_(torch.randn_like(parameter) * max(fan_in, 4) ** -0.5)
    return torch, model


def _compare(config: dict, tokens: np.ndarray, num_images: int, folder) -> dict[str, float]:
    """Largest absolute differences to transformers, through a saved folder, in float32."""
    torch, model = _torch_clip(config)
    model.save_pretrained(folder)
    weights = read_clip(folder)
    clip, params = make_clip(weights.config), weights.params

    side = clip.image_size
    rng = np.random.default_rng(1)
    # White noise alone averages out over a ViT's patches: a tint and a ramp tell pictures apart.
    images = rng.normal(size=(num_images, side, side, 3)) + rng.normal(size=(num_images, 1, 1, 3))
    images += rng.normal(size=(num_images, 1, 1, 3)) * np.linspace(-2, 2, side)[:, None, None]
    images = images.astype(np.float32)
    abstract = jax.eval_shape(clip.init, jax.random.key(0), images, tokens)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)

    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(tokens).long(),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        )
    image, text, scale = _apply(clip, {"params": params}, images, tokens)
    image, text = unit(image), unit(text)
    logits = scale * jnp.einsum("bc,mc->bm", image, text)
    differences = {
        "image": np.abs(image - theirs.image_embeds.numpy()).max(),
        "text": np.abs(text - theirs.text_embeds.numpy()).max(),
        "logits": np.abs(logits - theirs.logits_per_image.numpy()).max(),
    }
    # The comparison says nothing if every picture or text looks alike.
    assert np.std(theirs.logits_per_image.numpy(), axis=0).min() > 1e-2
    assert np.std(theirs.logits_per_image.numpy(), axis=1).min() > 1e-2
    return differences


def _tokens(rows: int, length: int, vocab_size: int, pad: int) -> np.ndarray:
    """Random ids with the end of text, the largest id, at a different place in each row."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, vocab_size - 2, (rows, length)).astype(np.int32)
    for row in range(rows):
        tokens[row, 2 + row % (length - 2) :] = pad
        tokens[row, 2 + row % (length - 2)] = vocab_size - 1
    return tokens


def test_says_what_transformers_said_at_the_published_widths(tmp_path):
    golden = cases.load("clip")
    weights = cases.draw_weights(cases.unpack_text(golden.pop("layout")))
    (tmp_path / "config.json").write_text(json.dumps(cases.CLIP))
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    ours = read_clip(tmp_path)
    images, tokens = cases.clip_inputs()
    image, text, scale = _apply(make_clip(ours.config), {"params": ours.params}, images, tokens)
    image, text = unit(image), unit(text)
    logits = scale * jnp.einsum("bc,mc->bm", image, text)
    for key, array in {"image": image, "text": text, "logits": logits}.items():
        assert cases.relative_error(array, golden[key]) < 1e-4, key
    # The comparison says nothing if every picture or text looks alike.
    assert min(golden["logits"].std(axis=axis).min() for axis in (0, 1)) > 1e-2


@pytest.mark.parametrize(
    "activation, eos", [("quick_gelu", "first occurrence"), ("gelu", "legacy argmax")]
)
def test_equals_transformers_at_small_size(activation, eos, tmp_path):
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALL_HF.items()}
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = activation
    pad = 98
    if eos == "legacy argmax":
        config["text_config"]["eos_token_id"] = 2
        pad = 0
    differences = _compare(config, _tokens(6, 13, 99, pad), 3, tmp_path)
    print(activation, eos, differences)
    assert max(differences.values()) < 1e-4


def test_output_shapes_and_types(tiny):
    clip, variables, images, tokens = tiny
    image, text, scale = _apply(clip, variables, images, tokens[:2])
    assert image.shape == (5, 12) and text.shape == (2, 12) and scale.shape == ()
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-6)
    half = make_clip({**TINY, "dtype": "bfloat16"})
    image_half, text_half, _ = _apply(half, variables, images, tokens[:2])
    assert image_half.dtype == text_half.dtype == jnp.float32
    assert 0 < np.abs(image_half - image).max() < 0.1 * np.abs(image).max()


def test_logit_scale_stops_at_one_hundred(tiny):
    clip, variables, images, tokens = tiny

    def scale_of(log_scale):
        params = {**variables["params"], "logit_scale": log_scale}
        return _apply(clip, {"params": params}, images, tokens)[2]

    value, gradient = jax.value_and_grad(scale_of)(jnp.asarray(7.0))
    np.testing.assert_allclose(value, 100.0, rtol=1e-6)
    assert gradient == 0.0
    value, gradient = jax.value_and_grad(scale_of)(jnp.asarray(1.0))
    np.testing.assert_allclose([value, gradient], [np.e, np.e], rtol=1e-6)


def test_text_is_pooled_at_its_end_in_both_conventions(tiny):
    clip, variables, _, tokens = tiny
    by_id = make_clip({**TINY, "eot_id": 19})
    expected = _apply(clip, variables, tokens, method="encode_text")
    np.testing.assert_array_equal(_apply(by_id, variables, tokens, method="encode_text"), expected)
    # What follows the end of text, another end included, must not matter: the tower is causal.
    tail = jnp.asarray([[1, 2, 3, 19, 19, 7]])
    for model in (clip, by_id):
        out = _apply(model, variables, tail, method="encode_text")
        np.testing.assert_allclose(out, expected[:1], atol=1e-6)
    # An end of text that is not the largest id is found by id only.
    other = make_clip({**TINY, "eot_id": 3})
    np.testing.assert_allclose(
        _apply(other, variables, jnp.asarray([[1, 2, 3, 19, 0, 0]]), method="encode_text"),
        _apply(other, variables, jnp.asarray([[1, 2, 3]]), method="encode_text"),
        atol=1e-6,
    )
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_short_token_rows_give_the_same_embedding(tiny):
    clip, variables, _, tokens = tiny
    np.testing.assert_allclose(
        _apply(clip, variables, tokens[:2, :4], method="encode_text"),
        _apply(clip, variables, tokens[:2], method="encode_text"),
        atol=1e-6,
    )


def test_positions_are_kept_at_native_size_and_interpolated_elsewhere():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + 16, 5)), jnp.float32)
    for method in ("bicubic", "bilinear"):
        np.testing.assert_array_equal(interpolate_positions(table, (4, 4), (4, 4), method), table)
        larger = interpolate_positions(table, (4, 4), (7, 3), method)
        assert larger.shape == (1 + 21, 5)
        np.testing.assert_array_equal(larger[0], table[0])
        flat = interpolate_positions(jnp.ones((17, 2)), (4, 4), (9, 2), method)
        np.testing.assert_allclose(flat, np.ones((19, 2)), atol=1e-6)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(7, 7), (2, 3)])
def test_position_interpolation_equals_torch(method, target):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1 + 16, 5)).astype(np.float32)
    grid = torch.from_numpy(table[1:].reshape(1, 4, 4, 5).transpose(0, 3, 1, 2).copy())
    theirs = torch.nn.functional.interpolate(grid, size=target, mode=method, antialias=True)
    theirs = theirs.numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    ours = interpolate_positions(jnp.asarray(table), (4, 4), target, method)[1:]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("sides", [(48, 48), (24, 40)])
def test_other_picture_sizes_are_a_model_of_that_size(sides, tmp_path):
    """Antialiased bicubic positions, as open_clip; transformers' own option is another filter.

    Its `interpolate_pos_encoding` is bicubic without antialiasing, whose kernel has a = -3/4
    where the antialiased one has -1/2: with positions of white noise, the worst there is, it must
    be near, not equal.
    """
    torch, model = _torch_clip(SMALL_HF)
    model.save_pretrained(tmp_path)
    weights = read_clip(tmp_path)
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, *sides, 3)).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    ours = _apply(
        make_clip(weights.config), {"params": weights.params}, images, method="encode_image"
    )

    def theirs() -> np.ndarray:
        with torch.no_grad():
            features = model.get_image_features(pixels, interpolate_pos_encoding=True)
        return getattr(features, "pooler_output", features).numpy()

    without_antialias = theirs()
    interpolate = torch.nn.functional.interpolate

    def antialiased(*args, **kwargs):
        return interpolate(*args, **kwargs, antialias=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "interpolate", antialiased)
        np.testing.assert_allclose(ours, theirs(), atol=1e-5)
    ours, other = unit(ours), unit(jnp.asarray(without_antialias))
    cosine = jnp.sum(ours * other, axis=-1)
    print(sides, "cosine to transformers' interpolation", cosine)
    assert cosine.min() > 0.95
    assert np.abs(ours - other).max() > 1e-3


@pytest.mark.parametrize("stem", ["patch", "conv", "resnet"])
def test_other_picture_sizes_run(tiny, stem):
    clip = make_clip({**TINY, "stem": stem})
    images = jnp.ones((2, 24, 8, 3))
    variables = jax.jit(clip.init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)), tiny[3])
    out = _apply(clip, variables, images, method="encode_image")
    assert out.shape == (2, 12) and np.isfinite(out).all()
    with pytest.raises(ValueError, match="divisible by the patch size 4"):
        _apply(clip, variables, jnp.ones((2, 18, 16, 3)), method="encode_image")


def test_pictures_of_a_batch_do_not_mix():
    clip = make_clip({**TINY, "stem": "conv"})
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)
    variables = jax.jit(clip.init)(jax.random.key(0), images, jnp.ones((1, 3), jnp.int32))
    whole = _apply(clip, variables, images, method="encode_image")
    alone = _apply(clip, variables, images[1:2], method="encode_image")
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv", "resnet"])
def test_one_step_decreases_the_contrastive_loss_and_gradients_are_finite(tiny, stem):
    clip, _, images, tokens = make_clip({**TINY, "stem": stem}), *tiny[1:]
    same = jnp.all(tokens[:, None] == tokens[None], axis=-1)

    def loss_of(params):
        return contrastive_loss(
            *_apply(clip, {"params": params}, images, tokens), same_caption=same
        ).mean()

    params = jax.jit(clip.init)(jax.random.key(1), images, tokens)["params"]
    step = jax.jit(jax.value_and_grad(loss_of))
    before, gradients = step(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path
    optimizer = optax.sgd(1e-2)
    updates, _ = optimizer.update(gradients, optimizer.init(params))
    after, _ = step(optax.apply_updates(params, updates))
    assert after < before - 1e-3


def test_wrong_token_shapes_are_refused(tiny):
    clip, variables, *_ = tiny
    with pytest.raises(ValueError, match="at most the context length 6"):
        _apply(clip, variables, jnp.ones((2, 7), jnp.int32), method="encode_text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_widht": 3}, "no field 'image_widht'; did you mean 'image_width'"),
        ({"stem": "hybrid"}, "stem is 'hybrid'; there are patch"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"position_interpolation": "nearest"}, "position_interpolation is 'nearest'"),
        ({"text_heads": 3}, "text_width 8 is not divisible by its 3 heads"),
        ({"image_size": 18}, "image_size 18 is not divisible by patch_size 4"),
        ({"dtype": "float3"}, "CLIP's dtype is 'float3', which is none of numbers; give float32"),
        ({"stem": "resnet", "image_size": 64, "patch_size": 32}, "power of two up to 16, not 32"),
        ({"stem": "conv", "image_size": 18, "patch_size": 6}, "power of two, not 6"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_clip({**TINY, **change})


def test_normalisation_is_clips():
    grey = np.full((1, 2, 2, 3), 255, np.uint8)
    # (1 - mean) / std of each channel, worked out by hand from OpenAI's constants.
    expected = [1.930336, 2.074884, 2.145897]
    np.testing.assert_allclose(normalize_clip_images(grey)[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(normalize_clip_images(0 * grey)[0, 0, 0, 0], -1.792263, rtol=1e-5)


def test_unit_is_finite_at_zero():
    np.testing.assert_allclose(unit(jnp.asarray([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 4)))
    assert np.isfinite(gradient).all()
