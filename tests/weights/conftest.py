"""Tiny Hugging Face Mask2Formers with weights that hide no mistake of layout."""

import pytest

NUM_CLASSES = 3


def make_hf_model(kind: str, num_classes: int = NUM_CLASSES):
    """A model on a backbone of the kind "resnet" or "swin"; width 32, 5 queries, 2 + 1 layers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if kind == "resnet":
        backbone = transformers.ResNetConfig(
            depths=[1, 2, 1, 1],
            hidden_sizes=[32, 64, 128, 256],
            embedding_size=8,
            out_features=stages,
        )
    else:
        backbone = transformers.SwinConfig(
            depths=[2, 1, 1, 1],
            embed_dim=8,
            num_heads=[1, 2, 4, 4],
            window_size=3,
            mlp_ratio=2.0,
            out_features=stages,
        )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=5,
        encoder_layers=1,
        decoder_layers=3,  # transformers counts the prediction from the learned queries
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=24,
        num_labels=num_classes,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim == 1 or "sampling_offsets" in name or "attention_weights" in name:
                tensor.copy_(0.05 * noise)
            else:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
    return model


# How our config calls the sizes of `make_hf_model`.
CONFIGS = {
    kind: {
        "backbone": backbone,
        "width": 32,
        "num_queries": 5,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "ffn_width": 16,
        "decoder_ffn_width": 24,
    }
    for kind, backbone in {
        "resnet": {"kind": "resnet", "stage_sizes": (1, 2, 1, 1), "width": 8},
        "swin": {
            "kind": "swin",
            "stage_sizes": (2, 1, 1, 1),
            "width": 8,
            "num_heads": (1, 2, 4, 4),
            "window_size": 3,
            "mlp_ratio": 2,
        },
    }.items()
}


@pytest.fixture(scope="session", params=["resnet", "swin"])
def kind(request):
    """Kind of the backbone."""
    return request.param


@pytest.fixture(scope="session")
def hf_models():
    """Kind of the backbone -> model."""
    return {name: make_hf_model(name) for name in CONFIGS}


@pytest.fixture(scope="session")
def hf_model(kind, hf_models):
    """The model on either backbone in turn."""
    return hf_models[kind]


@pytest.fixture(scope="session")
def config(kind):
    """Our config of `hf_model`."""
    return CONFIGS[kind]


@pytest.fixture(scope="session")
def hf_folder(hf_model, kind, tmp_path_factory):
    """Where `save_pretrained` put `hf_model`."""
    folder = tmp_path_factory.mktemp("hf") / f"mask2former-{kind}"
    hf_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_arrays(hf_folder):
    """Name in the file -> array of `hf_model`."""
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    return safetensors_numpy.load_file(hf_folder / "model.safetensors")
