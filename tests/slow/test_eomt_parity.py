"""EoMT of published sizes S and L beside transformers', both families: outputs, loss, gradients.

Random weights that hide no mistake. `-s` prints every error. The small variants run in the fast set
(tests/models/test_eomt.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.inference.panoptic import panoptic_inference
from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier, mask_logits
from concat_jax.weights.hugging_face_folder import segmentor_config_from_hf
from concat_jax.weights.segmentors import segmentor_params_from_hf
from tests.golden.cases import draw_weights
from tests.slow.test_reference_parity import (
    NUM_CLASSES,
    SharedDraws,
    random_images,
    random_segments,
    relative_error,
    to_torch,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SIZES = {
    "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, num_blocks=3),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_blocks=4),
}
GROUPS = ("backbone", "query_embedding", "mask_mlp", "upscales", "classifier")
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# Beside a border two queries may tie up to rounding.
MOST_TIES = 1e-4


def make_reference(family: str, size: str, side: int, in_training: bool):
    fields = dict(SIZES[size], image_size=side, num_labels=NUM_CLASSES)
    if family == "eomt":
        model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**fields))
    else:
        fields["intermediate_size"] = 4 * fields["hidden_size"]
        config = transformers.EomtDinov3Config(**fields)
        model = transformers.EomtDinov3ForUniversalSegmentation(config)
    own = {"attn_mask_probs", "criterion.empty_weight"}
    state = {key: value for key, value in model.state_dict().items() if key not in own}
    with torch.no_grad():
        for key, array in draw_weights({k: tuple(v.shape) for k, v in state.items()}).items():
            # Twenty-four branches at full strength leave nothing of the first ones' rounding.
            is_scale = "layer_scale" in key
            state[key].copy_(torch.from_numpy(0.1 + 0.05 * np.tanh(array) if is_scale else array))
        model.attn_mask_probs.fill_(float(in_training))
    model.train(in_training)
    if family == "eomt_dinov3":
        model.rope_embeddings.eval()  # which stretches positions in training
    return model


def make_ours(reference):
    config = segmentor_config_from_hf(reference.config.to_dict())
    arrays = {key: value.numpy() for key, value in reference.state_dict().items()}
    params, _ = segmentor_params_from_hf(arrays, config)
    return config, make_segmentor(config), LinearClassifier(NUM_CLASSES), params


@pytest.mark.parametrize("side", [256, 320, 640])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["eomt", "eomt_dinov3"])
def test_outputs_and_panoptic_maps(family, size, side):
    reference = make_reference(family, size, side, in_training=False)
    _, segmentor, classifier, params = make_ours(reference)
    images = random_images((side, side), batch=1, seed=side)

    @jax.jit
    def predict(params, images):
        output = segmentor.apply({"params": params["segmentor"]}, images)
        queries = output.queries[:, -1]
        logits = classifier.apply({"params": params["classifier"]}, queries)
        return logits, mask_logits(output.mask_embeddings[:, -1], output.mask_features)

    logits, masks = predict(params, images)
    with torch.no_grad():
        theirs = reference(to_torch(images))
    errors = [
        relative_error(logits, theirs.class_queries_logits),
        relative_error(masks, theirs.masks_queries_logits),
    ]
    is_thing = np.arange(NUM_CLASSES) < 80
    processor = transformers.EomtImageProcessorPil(
        size={"shortest_edge": side, "longest_edge": side}
    )
    # Random masks lie on each other, so that no segment owns most of its mask.
    their_map = processor.post_process_panoptic_segmentation(
        theirs,
        [(side, side)],
        threshold=0.0,
        overlap_mask_area_threshold=0.0,
        stuff_classes=np.flatnonzero(~is_thing).tolist(),
    )[0]
    ids, tables = panoptic_inference(
        masks,
        jax.nn.softmax(logits, axis=-1),
        jnp.asarray(is_thing),
        jnp.ones(NUM_CLASSES, bool),
        output_size=(side, side),
        keep_rule="score",
        score_threshold=0.0,
        overlap_threshold=0.0,
    )
    their_ids = their_map["segmentation"].numpy().astype(int) + 1
    pairs, counts = np.unique(
        np.stack([np.asarray(ids[0]).ravel(), their_ids.ravel()]), axis=1, return_counts=True
    )
    # Each of our segments is the one of theirs that it shares most pixels with.
    agreed = sum(counts[pairs[0] == own].max() for own in np.unique(pairs[0]))
    ties = 1 - agreed / their_ids.size
    names = f"{family} {size} {side}: class logits {errors[0]:.1e}, mask logits {errors[1]:.1e}"
    print(f"\n{names}, {len(their_map['segments_info'])} segments, {ties:.1e} of pixels differ")
    assert max(errors) < TOLERANCE
    assert len(np.unique(np.asarray(ids))) == len(np.unique(their_ids)) > 2
    assert ties < MOST_TIES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["eomt", "eomt_dinov3"])
def test_loss_and_gradients(family, size, monkeypatch):
    """A training step on two images of 256 x 256 with 5 and 9 segments, on the same points."""
    side, counts = 256, (5, 9)
    reference = make_reference(family, size, side, in_training=True)
    config, segmentor, classifier, params = make_ours(reference)
    sets, width = config["num_blocks"] + 1, segmentor.width
    images = random_images((side, side), batch=2, seed=3)
    ids, labels = random_segments((side, side), counts, seed=4)

    def criterion(class_logits, mask_embeddings, mask_features):
        return segmentation_loss(
            jax.random.key(0),
            class_logits,
            mask_embeddings,
            mask_features,
            jnp.asarray(ids),
            jnp.asarray(labels),
            SegmentationLossConfig(),
        )

    def loss(params, images, draws):
        rngs, progress = {"masks": jax.random.key(0)}, jnp.zeros(2)
        output = segmentor.apply({"params": params["segmentor"]}, images, None, progress, rngs=rngs)
        logits = classifier.apply({"params": params["classifier"]}, output.queries)
        terms = shared.call(draws, criterion, logits, output.mask_embeddings, output.mask_features)
        return terms.loss_class + terms.loss_mask + terms.loss_dice, terms.query_of_segment

    shared = SharedDraws(monkeypatch)
    abstract = [
        (2, sets, 200, NUM_CLASSES + 1),
        (2, sets, 200, width),
        (2, sets, side // 4, side // 4, width),
    ]
    shapes = shared.shapes(criterion, *(jax.ShapeDtypeStruct(s, np.float32) for s in abstract))
    rng = np.random.default_rng(5)
    draws = [rng.random(shape, np.float32) for shape in shapes]
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, query_of_segment), gradients = jax.device_get(gradient(params, images, draws))

    shared.give_to_reference(reference, draws, counts)
    theirs = reference(
        to_torch(images),
        mask_labels=[
            torch.from_numpy((ids[b] == np.arange(1, n + 1)[:, None, None]).astype(np.float32))
            for b, n in enumerate(counts)
        ],
        class_labels=[torch.from_numpy(labels[b, :n]).long() for b, n in enumerate(counts)],
    )
    theirs.loss.backward()
    for index, matching in enumerate(shared.matchings):
        for b, (queries, segments) in enumerate(matching):
            np.testing.assert_array_equal(query_of_segment[b, index, segments], queries)
    loss_error = abs(float(total) - theirs.loss.item()) / theirs.loss.item()
    print(f"\n{family} {size}: loss {float(total):.6f}, relative difference {loss_error:.1e}")
    grads = {
        key: value.grad.numpy() if value.grad is not None else np.zeros(value.shape, np.float32)
        for key, value in reference.state_dict(keep_vars=True).items()
    }
    expected, _ = segmentor_params_from_hf(grads, config)
    expected = traverse_util.flatten_dict(expected, sep="/")
    found = traverse_util.flatten_dict(gradients, sep="/")
    for group in GROUPS:
        paths = [path for path in expected if f"/{group}" in f"/{path}"]
        a, b = (
            np.concatenate([tree[path].ravel() for path in paths]) for tree in (found, expected)
        )
        overall = np.linalg.norm(a - b) / np.linalg.norm(b)
        worst = np.abs(a - b).max() / np.abs(b).max()
        print(
            f"  {group:<16} {a.size:12,} parameters: {overall:.1e} in the norm, {worst:.1e} at most"
        )
        assert overall < GRADIENT_TOLERANCE, group
    assert loss_error < TOLERANCE
