"""The inputs and weights of the golden files, made again from seeds, and the files themselves.

What the references say of them is in the npz files, which `python -m tests.golden.make` writes.
`np.random.RandomState` draws the same numbers in every version of numpy (NEP 19).
"""

import json
import pathlib
import random
import zlib

import numpy as np

from concat_jax.models.backbones.swin import SWIN_VARIANTS
from concat_jax.text.tokenizer import WordTokenizer

FOLDER = pathlib.Path(__file__).parent


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest number."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# Weights: a file holds names and shapes of the reference's state dict, which give the numbers.


def pack_text(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpack_text(array: np.ndarray):
    return json.loads(array.tobytes())


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that hide no mistake: norms off one, biases, statistics and tables off zero."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_weight = name.endswith("weight")
    if name.endswith("logit_scale"):
        noise = np.full(shape, 3.0)
    elif name.endswith("running_var"):
        noise = 1 + 0.2 * np.clip(noise, -2, 2)
    elif len(shape) == 1 and is_weight:
        noise = 1 + 0.1 * noise
    elif "sampling_offsets.weight" in name or "attention_weights.weight" in name:
        noise = 0.05 * noise
    elif "relative_position_bias_table" in name:
        noise = 0.5 * noise
    elif len(shape) > 1 and is_weight and "embed" not in name.split(".")[-2]:
        noise = noise * np.prod(shape[1:]) ** -0.5
    elif name == "void_embedding.weight":
        noise = -noise  # some queries of the golden cases are objects then
    elif name.endswith(("gamma", "positional_embedding")):
        noise = 0.3 * noise
    elif len(shape) == 1:
        noise = 0.1 * noise
    return noise.astype(np.float32)


def draw_weights(layout: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: draw_weight(name, tuple(shape)) for name, shape in layout.items()}


# Mask2Formers of the published widths, with fewer layers and blocks than published.

NUM_CLASSES = 7
_HEADS = {"num_encoder_layers": 1, "num_decoder_layers": 3}
SWIN_T = {**SWIN_VARIANTS["tiny"], "stage_sizes": (2, 1, 1, 1)}
MASK2FORMERS = {
    "mask2former_r50": {"backbone": {"kind": "resnet", "stage_sizes": (1, 1, 1, 1)}, **_HEADS},
    "mask2former_swin_t": {"backbone": {"kind": "swin", **SWIN_T}, **_HEADS},
}
# The second is a multiple of no stride.
MASK2FORMER_SIZES = {"mask2former_r50": (64, 96), "mask2former_swin_t": (58, 75)}


def mask2former_images(name: str) -> np.ndarray:
    """[2, H, W, 3] uint8."""
    size = MASK2FORMER_SIZES[name]
    return np.random.RandomState(2).randint(0, 256, (2, *size, 3)).astype(np.uint8)


def mask2former_slices(class_logits, masks, mask_features, queries) -> dict[str, np.ndarray]:
    """What a file keeps of the outputs of all L prediction sets: slices, and moments of the whole.

    Args:
      class_logits: [B, L, N, K + 1].
      masks: [B, L, N, h, w].
      mask_features: [B, h, w, D].
      queries: [B, N, D], the last set's.
    """
    kept = {
        "class_logits": (class_logits, np.s_[:, :, ::5]),
        "masks": (masks, np.s_[:, :, ::9, ::3, ::4]),
        "mask_features": (mask_features, np.s_[:, ::4, ::5, ::8]),
        "queries": (queries, np.s_[:, ::9, ::8]),
    }
    found = {}
    for key, (array, slices) in kept.items():
        array = np.asarray(array)
        found[key] = array[slices]
        found[f"{key}_moments"] = np.asarray([array.mean(), array.std()], np.float32)
    return found


# CLIP of ViT-B/16's widths, with two layers a tower, a small picture and few words.

CLIP = {
    "model_type": "clip",
    "projection_dim": 512,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "image_size": 96,
        "patch_size": 16,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 998,
        "eos_token_id": 999,
    },
}


def clip_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [3, 96, 96, 3] that differ in more than noise, tokens [4, 77] of unequal length."""
    rng = np.random.RandomState(1)
    images = rng.normal(size=(3, 96, 96, 3)) + rng.normal(size=(3, 1, 1, 3))
    images += rng.normal(size=(3, 1, 1, 3)) * np.linspace(-2, 2, 96)[:, None, None]
    tokens = rng.randint(1, 998, (4, 77)).astype(np.int32)
    for row, end in enumerate((2, 9, 40, 76)):
        tokens[row, end:] = 999
    return images.astype(np.float32), tokens


# FC-CLIP on its two families of towers: small ones, and as published with fewer queries and layers.

_FCCLIP_SMALL = dict(width=32, num_queries=10, num_heads=4, num_encoder_layers=1, ffn_width=40)
_FCCLIP_SMALL |= dict(num_decoder_layers=3, decoder_ffn_width=48, image_size=64, text_depth=1)
_FCCLIP_FULL = dict(width=256, num_queries=20, num_heads=8, num_encoder_layers=6, ffn_width=1024)
_FCCLIP_FULL |= dict(num_decoder_layers=9, decoder_ffn_width=2048)
_R50 = dict(tower="resnet", stages=(3, 4, 6, 3), channels=64, image_size=224, embed_dim=1024)
_LARGE = dict(tower="convnext", stages=(3, 3, 27, 3), channels=192, image_size=320, embed_dim=768)
FCCLIPS = {
    "fcclip_resnet": dict(
        tower="resnet", stages=(1, 2, 1, 1), channels=16, embed_dim=16, text_width=64
    )
    | _FCCLIP_SMALL,
    "fcclip_convnext": dict(
        tower="convnext", stages=(1, 1, 2, 1), channels=8, embed_dim=16, text_width=64
    )
    | _FCCLIP_SMALL,
    "fcclip_r50": _R50 | dict(text_width=512, text_depth=12) | _FCCLIP_FULL,
    "fcclip_convnext_large": _LARGE | dict(text_width=768, text_depth=16) | _FCCLIP_FULL,
}
FCCLIP_SIZES = {
    "fcclip_resnet": [(64, 96), (128, 64)],
    "fcclip_convnext": [(64, 96), (128, 64)],
    "fcclip_r50": [(224, 224), (256, 320), (384, 256)],
    # With these random weights the maps of the last two are void throughout.
    "fcclip_convnext_large": [(224, 224), (256, 320), (384, 256)],
}
# Synonyms stand after commas, as in FC-CLIP's files. Two classes of the second were trained on.
FCCLIP_TRAINED = ["person,child,girl", "traffic light", "sky,clouds", "grass"]
FCCLIP_ASKED = ["girl,woman", "sky,cloud", "red balloon", "ground,soil,dirt", "sea", "big wall"]
FCCLIP_IS_THING = [True, True, True, False, False, False]
# The 14 prompts of FC-CLIP are in `templates.json`; their words besides the names'.
FCCLIP_WORDS = "a photo of this is there in the scene small medium large"
CONTEXT = 16
# Share of its mask that a segment must own: random networks give ten masks for one place.
FCCLIP_OVERLAP = 0.02


def fcclip_tokenizer() -> WordTokenizer:
    return WordTokenizer.of_texts([FCCLIP_WORDS, *FCCLIP_TRAINED, *FCCLIP_ASKED], CONTEXT)


def fcclip_image(size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 of coarse blocks and fine noise."""
    rng = np.random.RandomState(size[0] + size[1])
    blocks = rng.randint(0, 256, (size[0] // 32, size[1] // 32, 3))
    noise = rng.randint(-40, 40, (*size, 3))
    return (blocks.repeat(32, axis=0).repeat(32, axis=1) + noise).clip(0, 255).astype(np.uint8)


def fcclip_clip_images(side: int) -> np.ndarray:
    """[2, side, side, 3] float32."""
    rng = np.random.RandomState(3)
    return (rng.normal(size=(2, side, side, 3)) + rng.normal(size=(2, 1, 1, 3))).astype(np.float32)


# Texts for CLIP's tokenizer.

HARD_TEXTS = [
    "",
    " ",
    "\n\t  \r\n",
    "a photo of a cat",
    "A Photo  of\ta CAT.",
    "it's they're I've we'll I'd don't O'Neill 's",
    "&amp; &lt;b&gt; &#39;x&#39; &eacute; &nbsp;",
    "naïve café Ångström ÀÉÎÕÜ ß İstanbul ﬁ ① Ⅷ",
    "cafe\u0301 n\u0303 \u1e9b\u0323",  # combining marks
    "你好世界 熊貓 こんにちは カタカナ 한국어 ไทย العربية עברית हिन्दी",
    "😀👍🏽👩‍👩‍👧‍👦🇫🇷 ✨ ™ €",
    "3.14 1,000,000 ２０２４ ½ x²",
    "snake_case kebab-case a/b\\c #tag @user http://x.y/z?q=1&r=2",
    "zero\u200bwidth nbsp\u00a0space ideographic\u3000space line\u2028sep",
    "control \x00 \x07 \x1b[0m \x7f \ufffd \ufeff",
    "<|startoftext|> literal <|endoftext|> tokens",
    "a<|endoftext|>b",
    "<|ENDOFTEXT|>",
    "!!! ... ??? ((())) --- '''",
    "supercalifragilisticexpialidocious" * 20,
    "word " * 200,
    "😀" * 100,
    "a" * 5000,
]


def random_texts(count: int) -> list[str]:
    """Texts of many scripts."""
    rng = random.Random(0)
    ranges = [
        (0x20, 0x7E),
        (0x20, 0x7E),
        (0xA0, 0x17F),
        (0x300, 0x36F),
        (0x370, 0x5FF),
        (0x600, 0xDFF),
        (0x1E00, 0x206F),
        (0x2100, 0x27BF),
        (0x3000, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xF900, 0xFFFD),
        (0x1F300, 0x1FAFF),
        (0x0, 0x1F),
    ]
    pieces = ["'s", "'LL", "&amp;", "  ", "<|endoftext|>", "the", "Photo", "dog-like", "1st"]

    def text() -> str:
        mix = rng.sample(ranges, rng.randint(1, 3))
        out = []
        for _ in range(rng.randint(0, 60)):
            kind = rng.random()
            if kind < 0.15:
                out.append(" ")
            elif kind < 0.25:
                out.append(rng.choice(pieces))
            else:
                out.append(chr(rng.randint(*rng.choice(mix))))
        return "".join(out)

    return [text() for _ in range(count)]


# Post-processing.


def blobs(rng, num_queries: int, height: int, width: int) -> np.ndarray:
    """[N, h, w] smooth logits with real regions, so that overlap and stuff rules all fire."""
    y, x = np.mgrid[0:height, 0:width]
    centre = rng.uniform(0, 1, (num_queries, 2)) * (height, width)
    radius = rng.uniform(0.15, 0.4, num_queries) * height
    distance = np.hypot(
        y - centre[:, 0, None, None], (x - centre[:, 1, None, None]) * height / width
    )
    logits = (radius[:, None, None] - distance) * rng.uniform(0.3, 3, (num_queries, 1, 1))
    return (logits + rng.normal(0, 0.3, logits.shape)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def peaked_probs(rng, batch: int, num_queries: int, num_classes: int) -> np.ndarray:
    """[B, N, K + 1] probabilities with a peak, no-object (last) included."""
    logits = rng.normal(0, 1, (batch, num_queries, num_classes + 1))
    best = rng.randint(0, num_classes + 1, (batch, num_queries))
    peak = rng.uniform(2, 7, (batch, num_queries, 1))
    np.put_along_axis(logits, best[..., None], peak, axis=-1)
    return softmax(logits)


KEEP_RULES = ("score", "objectness")
PANOPTIC_SIZES = ((37, 50), (12, 16), (9, 10))
PANOPTIC_IS_THING = np.array([True, False, True, False, False])
PANOPTIC_IS_SEEN = np.array([True, True, False, False, True])
# Sides of the square logits that transformers' post-processing gets.
TRANSFORMERS_SIDES = (96, 24)


def panoptic_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Mask logits [16, 10, 12, 16] and probabilities [16, 10, 6]."""
    rng = np.random.RandomState(37)
    masks = np.stack([blobs(rng, 10, 12, 16) for _ in range(16)])
    return masks, peaked_probs(rng, 16, 10, 5)


def kept_queries(probs: np.ndarray, rule: str):
    """Of one image, probs [N, K + 1]: labels, weights in the competition for pixels, what stays."""
    labels = probs[:, :-1].argmax(-1)
    if rule == "score":
        weights = probs.max(-1)
        return labels, weights, (probs.argmax(-1) != probs.shape[-1] - 1) & (weights > 0.8)
    weights = 1 - probs[:, -1]
    return labels, weights, weights > 0.5


def transformers_inputs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits [1, 100, side, side], class logits [1, 100, 9] with a dozen objects."""
    rng = np.random.RandomState(side)
    logits = blobs(rng, 100, side, side)[None]
    class_logits = np.zeros((1, 100, 9), np.float32)
    best = np.where(rng.uniform(size=100) < 0.12, rng.randint(0, 8, 100), 8)
    class_logits[0, np.arange(100), best] = 25
    return logits, class_logits


# The criterion, on 2 images of 3 prediction sets with 7 queries and 5 classes.

CRITERION_COUNTS = {"padded": (2, 4), "full": (5, 5)}
CRITERION_CLASSES = 5
CRITERION_POINTS = 96


def criterion_inputs(counts: tuple[int, ...]):
    """Class logits, mask embeddings, mask features; id maps of segments and void; labels."""
    rng = np.random.RandomState(0)
    batch, sets, queries, width = 2, 3, 7, 8
    predictions = (
        rng.normal(size=(batch, sets, queries, CRITERION_CLASSES + 1)).astype(np.float32),
        rng.normal(size=(batch, sets, queries, width)).astype(np.float32),
        rng.normal(size=(batch, 10, 14, width)).astype(np.float32),
    )
    ids = np.zeros((batch, 40, 56), np.uint8)
    labels = np.full((batch, max(counts)), -1, np.int32)
    for b, count in enumerate(counts):
        blocks = rng.randint(0, count + 1, (5, 7))
        blocks.flat[: count + 1] = np.arange(count + 1)  # each at least once
        ids[b] = blocks.repeat(8, axis=0).repeat(8, axis=1)
        labels[b, :count] = rng.randint(0, CRITERION_CLASSES, count)
    return predictions, ids, labels


def criterion_draws(counts: tuple[int, ...]) -> list[np.ndarray]:
    """Random points as our criterion asks for them: for the matching [B, P, 2], for the losses."""
    rng = np.random.RandomState(1)
    # Three times as many candidates as points, and the quarter of the points that is uniform.
    chosen = 3 * CRITERION_POINTS + CRITERION_POINTS // 4
    shapes = ((2, CRITERION_POINTS, 2), (2, chosen, 2))
    return [rng.random_sample(shape).astype(np.float32) for shape in shapes]
