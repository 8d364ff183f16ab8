"""Backbones of ImageNet under torchvision's and Detectron2's names."""

import json

import jax
import numpy as np
import pytest

from concat_jax.models.backbones.resnet import ResNet
from concat_jax.models.backbones.swin import Swin
from concat_jax.weights.convert import load_source
from concat_jax.weights.segmentors import backbone_params_from_imagenet

torch = pytest.importorskip("torch")
SIZES, WIDTH = (1, 2, 1, 1), 8


def torchvision_resnet():
    """The modules of torchvision's ResNet (`models/resnet.py`), called as there."""
    nn = torch.nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(4 * width)
            self.relu = nn.ReLU()
            self.downsample = None
            if inputs != 4 * width or stride != 1:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                )

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.relu(self.bn2(self.conv2(y)))
            return self.relu(self.bn3(self.conv3(y)) + (self.downsample or nn.Identity())(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(WIDTH)
            inputs = WIDTH
            for stage, blocks in enumerate(SIZES):
                width = WIDTH * 2**stage
                layers = []
                for i in range(blocks):
                    layers.append(Bottleneck(inputs, width, 2 if stage and not i else 1))
                    inputs = 4 * width
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            self.fc = nn.Linear(inputs, 10)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
            outputs = []
            for stage in range(4):
                x = getattr(self, f"layer{stage + 1}")(x)
                outputs.append(x)
            return outputs

    torch.manual_seed(0)
    network = Network().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(1 + 0.2 * torch.rand(tensor.shape))
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * torch.randn(tensor.shape))
    return network


@pytest.fixture(scope="module")
def network():
    return torchvision_resnet()


@pytest.fixture(scope="module")
def arrays(network):
    return {k: v.numpy() for k, v in network.state_dict().items()}


def test_torchvision_features(network, arrays):
    params, config, report = backbone_params_from_imagenet(arrays)
    assert config == {
        "backbone": {
            "kind": "resnet",
            "stage_sizes": list(SIZES),
            "width": WIDTH,
            "block": "bottleneck",
        }
    }
    assert {"fc.weight", "fc.bias"} < set(report.ignored)
    assert all(k.startswith("fc.") or k.endswith("tracked") for k in report.ignored)
    assert set(params) == {"segmentor"} and set(params["segmentor"]) == {"backbone"}
    images = np.random.default_rng(0).normal(size=(1, 40, 56, 3)).astype(np.float32)
    fields = {k: v for k, v in config["backbone"].items() if k != "kind"}
    apply = jax.jit(ResNet(**fields).apply)
    ours = apply({"params": params["segmentor"]["backbone"]}, images)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4, err_msg=stage)


@pytest.mark.parametrize("kind", ["ResNet", "Swin"])
@pytest.mark.parametrize("around", ["ForImageClassification", "Model"])
def test_hugging_face_classifier(kind, around, tmp_path):
    """Of both kinds, with the classifier in front of the names and without it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 1])
    if kind == "Swin":
        sizes = dict(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[2] * 4, window_size=3)
        sizes |= dict(image_size=96)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}{around}")(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                low = 0.5 if name.endswith(("running_var", "norm.weight")) else -0.1
                tensor.copy_(low + 0.2 * torch.rand(tensor.shape))
    model.save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert source.kind == "a backbone trained on ImageNet"
    assert {f"output_norm_{k}" in str(source.report.new) for k in range(4)} == {kind == "Swin"}
    images = np.random.default_rng(0).normal(size=(1, 96, 96, 3)).astype(np.float32)
    fields = {k: v for k, v in source.card.segmentor["backbone"].items() if k != "kind"}
    backbone = {"ResNet": ResNet, "Swin": Swin}[kind](**fields)
    apply = jax.jit(backbone.apply)
    ours = apply({"params": source.params["segmentor"]["backbone"]}, images)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        theirs = model(pixels, output_hidden_states=True)
        if kind == "Swin":  # before the merging of patches, and not normalised: but for the last
            last = theirs.reshaped_hidden_states[-1].permute(0, 2, 3, 1)
            maps = {3: torch.nn.functional.layer_norm(last, last.shape[-1:], eps=1e-5)}
        else:
            maps = {k: theirs.hidden_states[k + 1].permute(0, 2, 3, 1) for k in range(4)}
    for stage, b in maps.items():
        np.testing.assert_allclose(ours[stage], b, rtol=1e-4, atol=1e-4, err_msg=str(stage))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"architecture": "resnet50", "pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}, ""),
        ({"architecture": "resnetblur50"}, "timm's 'resnetblur50', of which a plain resnet50"),
        ({"architecture": "swin_base"}, "timm's 'swin_base'"),
        ({"architecture": ["a"]}, r"timm's \['a'\]"),
        ({"architecture": "resnet34", "pretrained_cfg": {"mean": [0.5] * 3}}, r"has mean \[0.5, "),
        ({"model_type": "resnet", "downsample_in_bottleneck": True}, "downsample_in_bottleneck"),
        ({"model_type": "resnet"}, ""),
    ],
)
def test_a_classifiers_config(content, fault, arrays, tmp_path):
    """Of the same arrays others make something else."""
    torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(content))
    if fault:
        with pytest.raises(ValueError, match=f"config.json.*{fault}"):
            load_source(tmp_path)
    else:
        assert load_source(tmp_path).kind == "a backbone trained on ImageNet"


def detectron2_key(key):
    """What tools/convert-torchvision-to-d2.py makes of a name, part by part."""
    parts = key.split(".")
    names = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    names |= {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
    names |= {f"layer{i}": f"res{i + 1}" for i in (1, 2, 3, 4)}
    if "downsample" in parts:
        parts[2:4] = [".".join(parts[2:4])]
    if not parts[0].startswith("layer"):
        parts = ["stem", *parts]
    return ".".join(names.get(part, part) for part in parts)


def test_detectron2_names(arrays):
    converted = {detectron2_key(k): v for k, v in arrays.items()}
    assert {
        "stem.conv1.norm.running_mean",
        "stem.fc.weight",
        "res2.0.shortcut.norm.weight",
        "res3.1.conv2.norm.bias",
    } < set(converted)
    ours, config, report = backbone_params_from_imagenet(converted)
    theirs, other, _ = backbone_params_from_imagenet(arrays)
    assert config == other and "stem.fc.bias" in report.ignored
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def test_missing_extra_and_misshapen_keys_are_named(arrays):
    name = "layer2.1.bn3.running_var"
    with pytest.raises(ValueError, match=r"lacks 1 array .*layer2\.1\.bn3\.running_var"):
        backbone_params_from_imagenet({k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ValueError, match=r"no place for .*layer2\.1\.se\.weight"):
        backbone_params_from_imagenet({**arrays, "layer2.1.se.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(5,\), but the config needs \(64,\)"):
        backbone_params_from_imagenet({**arrays, name: np.zeros(5)})


def test_other_models_are_none():
    arrays = {"backbone.stem.conv2.weight": np.zeros(2), "visual.conv1.weight": np.zeros(2)}
    assert backbone_params_from_imagenet(arrays) is None


def test_msra_is_refused_by_name():
    keys = ("conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "res2_0_branch1_bn_b")
    arrays = {key: np.zeros(2) for key in keys}
    with pytest.raises(ValueError, match="MSRA.*BGR.*torchvision"):
        backbone_params_from_imagenet(arrays)


def swin_arrays():
    """A Swin classifier's names (microsoft/Swin-Transformer `models/swin_transformer.py`)."""
    rng = np.random.default_rng(0)
    shapes = {
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "patch_embed.proj.bias": (8,),
        "patch_embed.norm.weight": (8,),
        "patch_embed.norm.bias": (8,),
        "norm.weight": (64,),
        "norm.bias": (64,),
        "head.weight": (10, 64),
        "head.bias": (10,),
    }
    for stage in range(4):
        width = 8 * 2**stage
        block = f"layers.{stage}.blocks.0"
        shapes |= {
            f"{block}.norm1.weight": (width,),
            f"{block}.norm1.bias": (width,),
            f"{block}.attn.relative_position_bias_table": (25, 2),
            f"{block}.attn.relative_position_index": (9, 9),
            f"{block}.attn.qkv.weight": (3 * width, width),
            f"{block}.attn.qkv.bias": (3 * width,),
            f"{block}.attn.proj.weight": (width, width),
            f"{block}.attn.proj.bias": (width,),
            f"{block}.norm2.weight": (width,),
            f"{block}.norm2.bias": (width,),
            f"{block}.mlp.fc1.weight": (4 * width, width),
            f"{block}.mlp.fc1.bias": (4 * width,),
            f"{block}.mlp.fc2.weight": (width, 4 * width),
            f"{block}.mlp.fc2.bias": (width,),
        }
        if stage < 3:
            merging = f"layers.{stage}.downsample"
            shapes |= {
                f"{merging}.reduction.weight": (2 * width, 4 * width),
                f"{merging}.norm.weight": (4 * width,),
                f"{merging}.norm.bias": (4 * width,),
            }
    shapes["layers.0.blocks.0.attn_mask"] = (4, 9, 9)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_swin_classifier_has_no_output_norms():
    arrays = swin_arrays()
    params, config, report = backbone_params_from_imagenet(arrays)
    assert config["backbone"]["window_size"] == 3
    assert config["backbone"]["num_heads"] == [2, 2, 2, 2]
    backbone = params["segmentor"]["backbone"]
    assert len(report.new) == 8
    np.testing.assert_array_equal(backbone["output_norm_3"]["scale"], np.ones(64))
    np.testing.assert_array_equal(backbone["output_norm_0"]["bias"], np.zeros(8))
    np.testing.assert_array_equal(
        backbone["stage_1_block_0"]["attention"]["key"]["kernel"],
        arrays["layers.1.blocks.0.attn.qkv.weight"][16:32].T.astype(np.float32),
    )
    assert "head.weight" in report.ignored and "norm.weight" in report.ignored
    partial = {**arrays, "norm0.weight": np.ones(8)}
    with pytest.raises(ValueError, match="lacks 7 arrays .*norm0.bias"):
        backbone_params_from_imagenet(partial)
