"""The full-size R50 in bfloat16 beside float32 with the same weights, on real images.

With fresh random weights neither argmax nor the sign of a mask logit means anything: classes are
told apart by hairs and logits crowd around zero. So the model first learns a few images, as far as
some hundred steps go, which gives margins such as a trained model has. Both figures are printed
(`-s`), those of the fresh weights too.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier, mask_logits, normalize_images

pytestmark = pytest.mark.slow

NUM_IMAGES, SIDE, STEPS = 3, 256, 200
SIZES = (SIDE, 512)
MAX_SEGMENTS = 16
MIN_AGREEMENT, MIN_IOU = 0.99, 0.98


def load_examples(root):
    """Images and id maps [B, H, W] in the larger size, labels [B, G], classes of the largest G."""
    folder = root / "coco_panoptic_mini"
    content = json.loads((folder / "annotations/panoptic_val2017.json").read_text())
    rows = {c["id"]: i for i, c in enumerate(content["categories"])}
    images, maps = [], []
    labels = np.full((NUM_IMAGES, MAX_SEGMENTS), -1, np.int32)
    size = (max(SIZES), max(SIZES))
    for b, annotation in enumerate(content["annotations"][:NUM_IMAGES]):
        name = annotation["file_name"]
        picture = Image.open(folder / "val2017" / name.replace(".png", ".jpg")).convert("RGB")
        images.append(np.asarray(picture.resize(size, Image.BILINEAR)))
        png = Image.open(folder / "annotations/panoptic_val2017" / name).convert("RGB")
        ids = np.asarray(png.resize(size, Image.NEAREST)).astype(np.int32) @ [1, 256, 65536]
        segments = sorted(annotation["segments_info"], key=lambda s: -s["area"])[:MAX_SEGMENTS]
        own = np.zeros(ids.shape, np.uint8)
        for g, segment in enumerate(segments):
            own[ids == segment["id"]] = g + 1
            labels[b, g] = rows[segment["category_id"]]
        maps.append(own)
    return np.stack(images), np.stack(maps), labels, len(rows)


def at_size(images, size):
    """[B, S, S, 3] uint8 resized and normalised."""
    pictures = [Image.fromarray(image).resize((size, size), Image.BILINEAR) for image in images]
    return normalize_images(np.stack([np.asarray(picture) for picture in pictures]))


def learn(params, classifier, images, ids, labels):
    """The parameters after some hundred steps on these images."""
    segmentor = make_segmentor({})
    config = SegmentationLossConfig(num_points=2048)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-4, 20, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def loss(params, rng):
        output = segmentor.apply({"params": params["segmentor"]}, images)
        logits = classifier.apply({"params": params["classifier"]}, output.queries)
        predictions = logits, output.mask_embeddings, output.mask_features
        terms = segmentation_loss(rng, *predictions, ids, labels, config)
        return terms.loss_class + terms.loss_mask + terms.loss_dice

    @jax.jit
    def step(params, state, rng):
        value, gradients = jax.value_and_grad(loss)(params, rng)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for i in range(STEPS):
        params, state, value = step(params, state, jax.random.key(i))
        if i % 20 == 0 or i == STEPS - 1:
            print(f"  step {i}: loss {float(value):.2f}", flush=True)
    return params


def compare(params, classifier, images) -> dict[str, float]:
    """Agreement of the final prediction set in both types, over all queries of all images."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        segmentor = make_segmentor({"dtype": dtype})

        @jax.jit
        def predict(params, image, segmentor=segmentor):
            output = segmentor.apply({"params": params["segmentor"]}, image)
            logits = classifier.apply({"params": params["classifier"]}, output.queries[:, -1])
            return logits, mask_logits(output.mask_embeddings[:, -1], output.mask_features)

        parts = [predict(params, image[None]) for image in images]
        found[dtype] = [np.concatenate(part) for part in zip(*jax.device_get(parts), strict=True)]
    (logits, masks), (half_logits, half_masks) = found["float32"], found["bfloat16"]
    a, b = masks > 0, half_masks > 0
    union = (a | b).sum((2, 3))
    iou = (a & b).sum((2, 3)) / np.maximum(union, 1)
    holds_segment = logits.argmax(-1) < logits.shape[-1] - 1
    ranked = np.sort(logits, axis=-1)
    return {
        "class agreement": float((logits.argmax(-1) == half_logits.argmax(-1)).mean()),
        "margin of the class": float(np.median(ranked[..., -1] - ranked[..., -2])),
        "class logit error": float(np.sqrt(np.mean((logits - half_logits) ** 2))),
        "IoU, all masks": float(iou[union > 0].mean()),
        "IoU, of segments": float(iou[holds_segment & (union > 0)].mean()),
        "IoU, pooled": float((a & b).sum() / (a | b).sum()),
        "queries with a segment": int(holds_segment.sum()),
        "mask logit error": float(np.linalg.norm(masks - half_masks) / np.linalg.norm(masks)),
    }


def test_bfloat16_predicts_what_float32_predicts(shared_data):
    images, maps, labels, num_classes = load_examples(shared_data)
    stride = max(SIZES) // SIDE
    ids = jnp.asarray(maps[:, stride // 2 :: stride, stride // 2 :: stride])
    classifier = LinearClassifier(num_classes)
    small = at_size(images, SIDE)
    params = {
        "segmentor": jax.jit(make_segmentor({}).init)(jax.random.key(0), small[:1])["params"],
        "classifier": classifier.init(jax.random.key(1), jnp.zeros((1, 256)))["params"],
    }
    results = {"fresh": compare(params, classifier, small)}
    params = learn(params, classifier, small, ids, jnp.asarray(labels))
    for size in SIZES:
        results[f"trained, {size}"] = compare(params, classifier, at_size(images, size))
    for name, result in results.items():
        print(f"\n{name}")
        for key, value in result.items():
            print(f"  {key:<24} {value:.4g}")
    for size in SIZES:
        result = results[f"trained, {size}"]
        assert result["class agreement"] >= MIN_AGREEMENT
        assert result["IoU, of segments"] > MIN_IOU
