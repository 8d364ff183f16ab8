"""OpenAI's CLIPs beside transformers' CLIPModel, at their true sizes and with random weights.

Through a saved folder, as a user has it, which for ViT-L/14 is 1.7 GB on disk and 8 GB of memory.
`-s` prints every error. The small variants run in the fast set (tests/models/test_clip.py).
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.clip import CLIP_VARIANTS, make_clip
from concat_jax.models.semantic_projector import unit
from concat_jax.weights.clip import read_clip
from concat_jax.weights.clip_sizes import variant_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

# Of the largest number of the reference's output.
TOLERANCE = 1e-4
IMAGES, TEXTS = 2, 4


def hf_config(variant: str):
    """transformers' config of a published CLIP."""
    fields = dict(CLIP_VARIANTS[variant])
    return transformers.CLIPConfig(
        projection_dim=fields["embed_dim"],
        vision_config=dict(
            hidden_size=fields["image_width"],
            intermediate_size=4 * fields["image_width"],
            num_hidden_layers=fields["image_depth"],
            num_attention_heads=fields["image_heads"],
            image_size=fields["image_size"],
            patch_size=fields["patch_size"],
        ),
        text_config=dict(
            hidden_size=fields["text_width"],
            intermediate_size=4 * fields["text_width"],
            num_hidden_layers=fields["text_depth"],
            num_attention_heads=fields["text_heads"],
        ),
    )


def randomize(model) -> None:
    """Every parameter random, so that none is at a value that hides where it goes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(3.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
                parameter.normal_(0, max(fan_in, 4) ** -0.5)


def inputs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that differ in more than noise, and texts that end at different places."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(IMAGES, side, side, 3)) + rng.normal(size=(IMAGES, 1, 1, 3))
    images += rng.normal(size=(IMAGES, 1, 1, 3)) * np.linspace(-2, 2, side)[:, None, None]
    tokens = rng.integers(1, 49406, (TEXTS, 77)).astype(np.int32)
    for row, end in enumerate((2, 9, 40, 76)):
        tokens[row, end:] = 49407
    return images.astype(np.float32), tokens


@pytest.mark.parametrize("variant", [v for v in CLIP_VARIANTS if v.startswith("ViT")])
def test_equals_transformers(variant, tmp_path):
    model = transformers.CLIPModel(hf_config(variant)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    images, tokens = inputs(CLIP_VARIANTS[variant]["image_size"])
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels)
    theirs = {
        "image embeddings": out.image_embeds.numpy(),
        "text embeddings": out.text_embeds.numpy(),
        "logits": out.logits_per_image.numpy(),
    }
    del model, out
    gc.collect()

    weights = read_clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # pytest would keep the gigabytes for three runs
    assert variant_of(weights.config) == variant
    clip = make_clip({"variant": variant, "eot_id": 49407})
    assert clip == make_clip(weights.config)
    image, text, scale = jax.jit(clip.apply)({"params": weights.params}, images, tokens)
    image, text = unit(image), unit(text)
    logits = scale * jnp.einsum("bc,mc->bm", image, text)
    ours = {"image embeddings": image, "text embeddings": text, "logits": logits}

    print(f"\n{weights}")
    for name, expected in theirs.items():
        # The comparison says nothing if every picture or text looks alike.
        assert np.std(expected, axis=0).max() > 1e-2
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        print(f"  {variant:<13}{name:<17}relative error {error:.1e}")
        assert error < TOLERANCE
