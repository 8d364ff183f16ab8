"""The whole segmentor beside transformers' Mask2Former, and the config that builds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax import convert
from concat_jax.models import segmentor as segmentor_lib
from concat_jax.models.segmentor import make_segmentor, mask_logits, normalize_images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NUM_CLASSES = 7
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
# The published widths, with fewer layers and blocks.
REAL_WIDTHS = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 1, 1, 1)},
    "num_encoder_layers": 1,
    "num_decoder_layers": 3,
}


def make_reference(config):
    """A Hugging Face Mask2Former of the same shape with random weights and norm statistics."""
    settings = {**segmentor_lib.DEFAULTS, **config}
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


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), theirs.numpy().astype(np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    "config, size",
    [(SMALL, (96, 96)), (SMALL, (76, 100)), (REAL_WIDTHS, (128, 160))],
    ids=["small", "odd_size", "real_widths"],
)
def test_matches_transformers(config, size):
    reference = make_reference(config)
    state_dict = {k: v.numpy() for k, v in reference.state_dict().items()}
    params, _ = convert.segmentor_params_from_hf(state_dict, config)
    images = np.random.default_rng(2).integers(0, 256, (2, *size, 3), np.uint8)
    normalised = np.array(normalize_images(images))

    model = make_segmentor(config)
    classifier = segmentor_lib.LinearClassifier(NUM_CLASSES)

    @jax.jit
    def predict(params, images):
        output = model.apply({"params": params["segmentor"]}, images)
        logits = classifier.apply({"params": params["classifier"]}, output.queries)
        return output, logits, mask_logits(output.mask_embeddings, output.mask_features)

    output, class_logits, masks = predict(params, normalised)
    with torch.no_grad():
        theirs = reference(
            torch.from_numpy(normalised).permute(0, 3, 1, 2), output_auxiliary_logits=True
        )

    num_sets = config["num_decoder_layers"] + 1
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
