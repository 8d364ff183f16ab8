"""EoMT beside transformers' two, and the properties that no reference has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses.masks import few_point_logits, point_logits, sample_features
from concat_jax.models.eomt import BLACK, mask_rate
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier, mask_logits
from concat_jax.weights.names.table import find, to_ours, to_theirs
from concat_jax.weights.names.vit import hugging_face
from concat_jax.weights.report import shapes_of
from tests import tiny
from tests.golden.cases import draw_weights, relative_error

KEY = jax.random.key(0)
QUERIES, CLASSES = 5, 3
BACKBONE = dict(width=48, depth=3, num_heads=4, ffn_width=96, grid=4)
CONFIG = dict(kind="eomt", backbone=BACKBONE, num_queries=QUERIES, num_blocks=2)
ROTARY = {**BACKBONE, "positions": "rotary", "key_bias": False}
CONFIGS = {"eomt": CONFIG, "eomt_dinov3": {**CONFIG, "backbone": ROTARY}}
BUFFERS = {"attn_mask_probs", "criterion.empty_weight"}


def reference(family: str, in_training: bool):
    """transformers' model with weights that hide no mistake; masks as in training or none."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=64)
    sizes |= dict(num_blocks=2, num_queries=QUERIES, num_labels=CLASSES)
    if family == "eomt":
        config = transformers.EomtConfig(**sizes, mlp_ratio=2)
        model = transformers.EomtForUniversalSegmentation(config)
    else:
        config = transformers.EomtDinov3Config(**sizes, intermediate_size=96)
        model = transformers.EomtDinov3ForUniversalSegmentation(config)
    state = {k: v for k, v in model.state_dict().items() if k not in BUFFERS}
    with torch.no_grad():
        for name, array in draw_weights({k: tuple(v.shape) for k, v in state.items()}).items():
            state[name].copy_(torch.from_numpy(array))
        model.attn_mask_probs.fill_(float(in_training))
    model.train(in_training)
    if family == "eomt_dinov3":
        model.rope_embeddings.eval()  # which stretches positions in training
    return model


def predictions(model, images: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Class and mask logits of the reference's prediction sets."""
    torch = pytest.importorskip("torch")
    found, predict = [], type(model).predict

    def record(self, hidden):
        found.append(predict(self, hidden))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(model), "predict", record)
        model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return [(classes.numpy(), masks.numpy()) for masks, classes in found]


def abstract(config) -> dict:
    return jax.eval_shape(make_segmentor(config).init, KEY, np.zeros((1, 64, 64, 3)))["params"]


def apply(config, params, images, image_size=None, progress=None):
    def run(params, images):
        return make_segmentor(config).apply(
            {"params": params}, images, image_size, progress, rngs={"masks": KEY}
        )

    return jax.jit(run)(params, images)


def pictures(seed: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("family", "in_training"), [("eomt", False), ("eomt", True), ("eomt_dinov3", True)]
)
def test_equals_transformers_and_gives_its_arrays_back(family, in_training):
    model, config = reference(family, in_training), CONFIGS[family]
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    head = jax.eval_shape(LinearClassifier(CLASSES).init, KEY, np.zeros((1, 48)))["params"]
    naming = hugging_face(family)
    shapes = shapes_of({"segmentor": abstract(config), "classifier": head})
    params, report = to_ours(find(arrays, naming), shapes)
    assert set(report.ignored) == BUFFERS
    back = to_theirs(params, naming)
    assert back.keys() == arrays.keys() - BUFFERS
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name])

    images, progress = pictures(), np.zeros(2, np.float32) if in_training else None
    output = apply(config, params["segmentor"], images, progress=progress)
    classes = LinearClassifier(CLASSES).apply({"params": params["classifier"]}, output.queries)
    expected = predictions(model, images)
    assert output.queries.shape[1] == len(expected) == (3 if in_training else 1)
    for index, (their_classes, their_masks) in enumerate(expected):
        features = output.mask_features[:, index] if in_training else output.mask_features
        masks = mask_logits(output.mask_embeddings[:, index], features)
        assert relative_error(classes[:, index], their_classes) < 1e-5
        assert relative_error(masks, their_masks) < 1e-5
        assert their_masks.std(axis=1).mean() > 0.1  # queries differ


@pytest.mark.parametrize(
    ("total", "starts", "ends"),
    [
        (88_692, (14_782, 29_564, 44_346, 59_128), (29_564, 44_346, 59_128, 73_910)),  # COCO
        (19_902, (3_317, 8_292, 13_268), (6_634, 11_609, 16_585)),  # Cityscapes
    ],
)
def test_masks_go_block_by_block_at_the_references_steps(total, starts, ends):
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        steps = jnp.asarray([0, start, (start + end) / 2, end, total])
        rate = mask_rate(steps / total, index, len(starts))
        np.testing.assert_allclose(rate, [1, 1, 0.5**0.9, 0, 0], atol=2e-3)


def test_at_the_end_of_training_it_sees_what_inference_sees():
    params = tiny.fill(abstract(CONFIG), 0)
    images = pictures()
    alone = apply(CONFIG, params, images)
    ended, begun = (
        apply(CONFIG, params, images, progress=np.full(2, p, np.float32)) for p in (1.0, 0.0)
    )
    assert ended.queries.shape == (2, 3, QUERIES, 48) and alone.queries.shape[1] == 1
    assert ended.mask_features.shape == (2, 3, 16, 16, 48)
    np.testing.assert_allclose(ended.queries[:, -1], alone.queries[:, 0], atol=1e-4)
    np.testing.assert_allclose(ended.mask_features[:, -1], alone.mask_features, atol=1e-4)
    assert np.abs(begun.queries[:, -1] - alone.queries[:, 0]).max() > 1e-2


def test_padding_is_black_whatever_it_holds():
    params = tiny.fill(abstract(CONFIG), 0)
    images = pictures(size=(48, 64))
    sizes = np.array([[40, 64], [48, 20]], np.int32)
    black = images.copy()
    black[0, 40:], black[1, :, 20:] = BLACK, BLACK
    found = apply(CONFIG, params, images, sizes)
    expected = apply(CONFIG, params, black)
    np.testing.assert_allclose(found.queries, expected.queries, atol=1e-5)
    features = np.asarray(found.mask_features)
    np.testing.assert_allclose(features[0, :10], expected.mask_features[0, :10], atol=1e-5)
    assert not features[0, 10:].any() and not features[1, :, 5:].any() and features[1, :, :5].all()


def test_a_frozen_encoder_has_no_gradient_and_all_else_has():
    config = {**CONFIG, "frozen": True, "frozen_ffn_width": 32}
    model = make_segmentor(config)
    params = tiny.fill(abstract(config), 0)

    def loss(params, images):
        progress = jnp.full(2, 0.5)
        output = model.apply({"params": params}, images, None, progress, rngs={"masks": KEY})
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(output))

    gradient = jax.jit(jax.grad(loss))
    gradients = gradient(params, pictures())
    reached = {name.split("/")[0] for name in tiny.reached(gradients)}
    assert reached == params.keys() - {"backbone"}
    assert model.query_norm(params) is params["decoder_norm"]


def test_neither_remat_nor_a_loop_changes_a_gradient():
    params = tiny.fill(abstract(CONFIG), 0)

    def gradient(**how):
        model = make_segmentor({**CONFIG, **how})

        def loss(params):
            progress = jnp.full(2, 0.3)  # the first block masks some queries, the second all
            output = model.apply(
                {"params": params}, pictures(), None, progress, rngs={"masks": KEY}
            )
            return jnp.sum(jnp.sin(output.mask_features)) + jnp.sum(output.mask_embeddings**2)

        return jax.jit(jax.grad(loss))(params)

    # Of numbers up to 37.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4),
        gradient(remat=True, scan_layers=True),
        gradient(),
    )


@pytest.mark.parametrize("logits_at", [point_logits, few_point_logits])
def test_point_logits_of_features_of_each_set_are_those_of_each_set(logits_at):
    rng = np.random.default_rng(0)
    embeddings, features = rng.normal(size=(2, 3, 4, 8)), rng.normal(size=(2, 3, 6, 5, 8))
    points = rng.uniform(size=(2, 7, 2)).astype(np.float32)
    found = logits_at(jnp.asarray(embeddings), jnp.asarray(features), points)
    for index in range(3):
        sampled = sample_features(jnp.asarray(features[:, index]), points)
        expected = np.einsum("bnd,bpd->bnp", embeddings[:, index], sampled)
        np.testing.assert_allclose(found[:, index], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_qeries": 3}, "no key 'num_qeries'; did you mean 'num_queries'"),
        ({"kind": "eomd"}, "kind is 'eomd'; did you mean 'eomt'"),
        ({"backbone": {"variant": "dinov3-smal"}}, "did you mean 'dinov3-small'"),
        ({"backbone": {"widht": 48}}, "no key 'widht'; did you mean 'width'"),
        ({"backbone": {"activation": "relu"}}, "has no key 'activation'"),
        ({"backbone": {**BACKBONE, "num_heads": 5}}, "not divisible by 4 times its 5 heads"),
        ({"backbone": {**BACKBONE, "patch_size": 14}}, "patches of 14 pixels cannot be halved 2"),
        ({"num_blocks": 4}, "see 4 blocks of 3"),
        ({"backbone": {"kind": "clip", "variant": "RN50"}}, "image tower is a resnet"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_segmentor({**CONFIG, **change})
