"""The whole segmentor beside transformers' Mask2Former, and the config that builds it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models import mask2former
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import (
    LinearClassifier,
    mask_logits,
    normalize_images,
)
from concat_jax.models.transformer_decoder import MultiHeadAttention, attention_block_mask
from concat_jax.weights import segmentors
from concat_jax.weights.names.mask2former import hugging_face
from tests import tiny
from tests.golden import cases
from tests.golden.cases import relative_error

NUM_CLASSES = cases.NUM_CLASSES
SMALL = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 2, 1, 1), "width": 8},
    "width": 64,
    "num_queries": 10,
    "num_encoder_layers": 2,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "num_points": 4,
    "ffn_width": 32,
    "decoder_ffn_width": 48,
}


def make_reference(config):
    """A Hugging Face Mask2Former of the same shape with random weights and norm statistics."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = {**mask2former.DEFAULTS, **config}
    backbone = settings["backbone"]
    width = backbone.get("width", 64)
    backbone_config = transformers.ResNetConfig(
        depths=list(backbone.get("stage_sizes", (3, 4, 6, 3))),
        hidden_sizes=[width * 4 * 2**i for i in range(4)],
        embedding_size=width,
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    hf_config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config,
        feature_size=settings["width"],
        mask_feature_size=settings["width"],
        hidden_dim=settings["width"],
        num_queries=settings["num_queries"],
        encoder_layers=settings["num_encoder_layers"],
        # transformers counts the prediction from the learned queries as a layer.
        decoder_layers=settings["num_decoder_layers"] + 1,
        num_attention_heads=settings["num_heads"],
        encoder_feedforward_dim=settings["ffn_width"],
        dim_feedforward=settings["decoder_ffn_width"],
        num_labels=NUM_CLASSES,
    )
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(hf_config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("normalization.weight") or name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif name.endswith(("normalization.bias", "running_mean")):
                tensor.copy_(0.1 * noise)
            elif "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                # Zero at initialisation, which would hide an error in their layout.
                tensor.copy_(0.05 * noise)
            elif name.endswith("norm.weight") or name.endswith("_1.1.weight"):
                tensor.copy_(1 + 0.1 * noise)
    return model


def predict(config, params, images):
    """Output, class logits and mask logits of every prediction set."""
    model, classifier = make_segmentor(config), LinearClassifier(NUM_CLASSES)

    def apply(params, images):
        output = model.apply({"params": params["segmentor"]}, images)
        logits = classifier.apply({"params": params["classifier"]}, output.queries)
        return output, logits, mask_logits(output.mask_embeddings, output.mask_features)

    return jax.jit(apply)(params, images)


@pytest.mark.parametrize("name", cases.MASK2FORMERS)
def test_says_what_transformers_said_at_the_published_widths(name):
    golden = cases.load(name)
    weights = cases.draw_weights(cases.unpack_text(golden.pop("layout")))
    params, _ = segmentors.segmentor_params_from_hf(weights, cases.MASK2FORMERS[name])
    images = normalize_images(cases.mask2former_images(name))
    output, class_logits, masks = predict(cases.MASK2FORMERS[name], params, images)
    found = cases.mask2former_slices(
        class_logits, masks, output.mask_features, output.queries[:, -1]
    )
    assert set(found) == set(golden)
    for key, array in found.items():
        error = relative_error(array, golden[key])
        assert error < 1e-4, f"{key}: {error:.1e}"
        # Otherwise all queries could be one and the test would not notice.
        assert key.endswith("_moments") or golden[key].std(axis=-2).mean() > 0.01, key


def test_matches_transformers_at_an_odd_size():
    size = (76, 100)
    torch = pytest.importorskip("torch")
    reference = make_reference(SMALL)
    state_dict = {k: v.numpy() for k, v in reference.state_dict().items()}
    params, _ = segmentors.segmentor_params_from_hf(state_dict, SMALL)
    images = np.random.default_rng(2).integers(0, 256, (2, *size, 3), np.uint8)
    normalised = np.array(normalize_images(images))
    output, class_logits, masks = predict(SMALL, params, normalised)
    with torch.no_grad():
        theirs = reference(
            torch.from_numpy(normalised).permute(0, 3, 1, 2), output_auxiliary_logits=True
        )

    num_sets = SMALL["num_decoder_layers"] + 1
    sets = [*theirs.auxiliary_logits, vars(theirs)]
    assert len(sets) == num_sets == masks.shape[1]
    for index, reference_set in enumerate(sets):
        error = relative_error(masks[:, index], reference_set["masks_queries_logits"])
        assert error < 1e-4, f"mask logits of prediction set {index}"
        error = relative_error(class_logits[:, index], reference_set["class_queries_logits"])
        assert error < 1e-4, f"class logits of prediction set {index}"
    decoder_norm = reference.model.transformer_module.decoder.layernorm
    with torch.no_grad():
        final_queries = decoder_norm(theirs.transformer_decoder_last_hidden_state)
    assert relative_error(output.queries[:, -1], final_queries) < 1e-4
    mask_features = theirs.pixel_decoder_last_hidden_state.permute(0, 2, 3, 1)
    assert relative_error(output.mask_features, mask_features) < 1e-4


TINY = {
    "backbone": {
        "kind": "resnet",
        "stage_sizes": (1, 1, 1, 1),
        "width": 4,
        "block": "basic",
        "norm": "group",
        "stem": "small",
    },
    "width": 8,
    "num_queries": 3,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "num_points": 2,
    "ffn_width": 8,
    "decoder_ffn_width": 8,
    "num_groups": 2,
}


@pytest.fixture(scope="module")
def tiny_params():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(make_segmentor(TINY).init, jax.random.key(0), images)["params"]
    # Random instead of initial values: those of the sampling offsets and attention weights are
    # zero, which cuts the gradient of everything before them.
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), jnp.float32), shapes
    )


def tiny_images(batch):
    images = np.random.default_rng(3).integers(0, 256, (batch, 64, 64, 3), np.uint8)
    return normalize_images(images)


def tiny_loss(config, params, images):
    output = make_segmentor(config).apply({"params": params}, images)
    masks = mask_logits(output.mask_embeddings, output.mask_features)
    return jnp.mean(masks**2) + jnp.mean(output.queries[..., 0] ** 2)


def tiny_gradient(params, **options):
    images = tiny_images(2)
    gradient = jax.grad(lambda p: tiny_loss({**TINY, **options}, p, images))
    return jax.jit(gradient)(params)


def test_gradients_are_finite_and_reach_everything(tiny_params):
    gradients = tiny_gradient(tiny_params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        # A constant added to all keys of a query cancels in its softmax.
        if not name.endswith("['key']['bias']"):
            assert np.abs(gradient).max() > 0, name


@pytest.mark.slow
def test_remat_changes_no_gradient(tiny_params):
    both = tiny_gradient(tiny_params, remat=True), tiny_gradient(tiny_params)
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_sharded_batch_needs_no_gather(tiny_params):
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    loss = functools.partial(tiny_loss, TINY)
    tiny.assert_nothing_is_gathered(loss, tiny_params, images)


def test_bfloat16_stays_close_and_predicts_in_float32(tiny_params):
    images = tiny_images(2)
    exact, half = (
        jax.jit(make_segmentor({**TINY, "dtype": dtype}).apply)({"params": tiny_params}, images)
        for dtype in ("float32", "bfloat16")
    )
    assert half.mask_features.dtype == jnp.bfloat16
    assert half.queries.dtype == half.mask_embeddings.dtype == jnp.float32
    masks = mask_logits(half.mask_embeddings, half.mask_features)
    assert masks.dtype == jnp.float32
    expected = mask_logits(exact.mask_embeddings, exact.mask_features)
    assert np.corrcoef(np.ravel(masks[:, 0]), np.ravel(expected[:, 0]))[0, 1] > 0.99


def test_block_mask_by_hand():
    # Logits of the first two queries are plus and minus the first channel, 1, -2, 3.
    features = jnp.asarray([[1.0, 1.0], [-2.0, 1.0], [3.0, 1.0]]).reshape(1, 1, 3, 2)
    embeddings = jnp.asarray([[[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]])
    blocked = attention_block_mask(embeddings, features)
    expected = [
        [False, True, False],
        [True, False, True],
        [False, False, False],  # blocks everything, so it attends everywhere
        [False, False, False],  # probability exactly one half is kept
    ]
    np.testing.assert_array_equal(blocked[0], expected)


def test_masked_attention_ignores_blocked_keys():
    attention = MultiHeadAttention(width=8, num_heads=2)
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(1, 2, 8)), rng.normal(size=(1, 5, 8))
    blocked = np.asarray([[[True, False, True, True, False], [False] * 5]])
    params = attention.init(jax.random.key(0), queries, keys, keys, blocked)
    full = attention.apply(params, queries, keys, keys, blocked)
    kept = attention.apply(params, queries, keys[:, [1, 4]], keys[:, [1, 4]])
    everywhere = attention.apply(params, queries, keys, keys)
    np.testing.assert_allclose(full[0, 0], kept[0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(full[0, 1], everywhere[0, 1], rtol=1e-5, atol=1e-6)


def test_normalize_images_and_mask_logits_by_hand():
    pixel = np.asarray([[124, 116, 0]], np.uint8)
    np.testing.assert_allclose(
        normalize_images(pixel)[0], [0.325 / 58.395, -0.28 / 57.12, -103.53 / 57.375], rtol=1e-4
    )
    embeddings = jnp.asarray([[1.0, 2.0], [0.0, -1.0]]).reshape(1, 1, 2, 2)
    features = jnp.asarray([3.0, 4.0]).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(mask_logits(embeddings, features)[0, 0, :, 0, 0], [11, -4])
    np.testing.assert_allclose(mask_logits(embeddings[:, 0], features)[0, :, 0, 0], [11, -4])


def test_full_size_shapes_and_parameter_count():
    model = make_segmentor({})
    images = jax.ShapeDtypeStruct((2, 1024, 1024, 3), jnp.float32)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert output.queries.shape == output.mask_embeddings.shape == (2, 10, 100, 256)
    assert output.mask_features.shape == (2, 256, 256, 256)
    masks = jax.eval_shape(mask_logits, output.mask_embeddings, output.mask_features)
    assert masks.shape == (2, 10, 100, 256, 256)
    ours = sum(x.size for x in jax.tree.leaves(variables))
    assert ours == 44_055_680
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        reference = make_reference({})
    weights = {
        k: v
        for k, v in reference.state_dict().items()
        if not k.startswith("class_predictor") and not re.search(hugging_face({}).ignored, k)
    }
    assert ours == sum(v.numel() for v in weights.values())


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_querys": 3}, "no key 'num_querys'; did you mean 'num_queries'"),
        ({"backbone": {"widht": 3}}, "'resnet' has no key 'widht'; did you mean 'width'"),
        ({"backbone": {"kind": "vgg"}}, "kind is 'vgg'; there are convnext, resnet"),
        ({"dtype": "float16"}, "dtype is 'float16'; did you mean 'bfloat16'"),
        ({"num_heads": 7}, "width 256 is not divisible by num_heads 7"),
        ({"kind": "fcclip", "num_heads": 7}, "width 256 is not divisible by num_heads 7"),
        ({"num_heads": 0}, "config's num_heads is 0 and must be at least 1"),
        ({"backbone": {"width": 0}}, "ResNet.width is 0 and must be at least 1"),
        ({"kind": "eomt", "backbone": {"num_heads": 0}}, "ViT.num_heads is 0 and must be at least"),
        ({"width": 24}, "width 24 is not divisible by num_groups 32"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        make_segmentor(config)
