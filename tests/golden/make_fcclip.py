"""What FC-CLIP's own modules say of the golden cases, on open_clip's own towers.

    python -m tests.golden.make_fcclip CHECKOUT [NAMES...]

CHECKOUT is a clone of github.com/bytedance/fc-clip (2b0bbe21 was used); open_clip_torch 2.24.0 and
timm 1.0.31 have to be installed beside requirements-reference.txt. What FC-CLIP takes of
detectron2 is written here, and what is only imported is an empty module.
"""

import collections
import enum
import functools
import importlib.abc
import importlib.machinery
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

from tests.golden import cases
from tests.golden.make import give_weights, to_torch


class Conv2d(torch.nn.Conv2d):
    """detectron2's, with a norm and an activation."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class ImageList:
    def __init__(self, tensor, image_sizes):
        self.tensor, self.image_sizes = tensor, image_sizes

    @staticmethod
    def from_tensors(images, divisor):
        sizes = [tuple(image.shape[-2:]) for image in images]
        assert all(side % divisor == 0 for size in sizes for side in size)
        return ImageList(torch.stack(images), sizes)


class Registry(dict):
    def __init__(self, name=""):
        super().__init__()

    def register(self):
        return lambda entry: self.setdefault(entry.__name__, entry)


def _resize(result, image_size, height, width):
    result = result[:, : image_size[0], : image_size[1]][None]
    return F.interpolate(result, size=(height, width), mode="bilinear", align_corners=False)[0]


GIVEN = {
    "Conv2d": Conv2d,
    "ImageList": ImageList,
    "Registry": Registry,
    "ShapeSpec": collections.namedtuple("ShapeSpec", ("channels", "stride")),
    "get_norm": lambda _, channels: torch.nn.GroupNorm(32, channels),
    "configurable": lambda function: function,
    "retry_if_cuda_oom": lambda function: function,
    "sem_seg_postprocess": _resize,
    "c2_xavier_fill": lambda module: None,
    "InterpolationMode": enum.Enum(
        "InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS"
    ),
}


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = Registry() if name.endswith("_REGISTRY") else type(name, (torch.nn.Module,), {})
        setattr(self, name, GIVEN.get(name, value))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("detectron2", "fvcore", "torchvision"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def prepare(checkout: str) -> None:
    """Makes FC-CLIP's modules importable, without what runs on import of the package."""
    sys.meta_path.insert(0, _Finder())
    package = types.ModuleType("fcclip")
    package.__path__ = [f"{checkout}/fcclip"]
    sys.modules["fcclip"] = package
    for name in ("modeling", "modeling.backbone"):
        module = sys.modules[f"fcclip.{name}"] = types.ModuleType(f"fcclip.{name}")
        module.__path__ = [f"{checkout}/fcclip/{name.replace('.', '/')}"]
    # The compiled operator, whose absence FC-CLIP answers with plain torch.
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("none")


def tower(config):
    """open_clip's CLIP of a golden config."""
    import timm
    from open_clip.model import CLIP

    text = dict(context_length=cases.CONTEXT, width=config["text_width"])
    text |= dict(heads=config["text_width"] // 64, layers=config["text_depth"])
    words = cases.fcclip_tokenizer().vocab_size
    text["vocab_size"] = words if config["text_depth"] == 1 else 49408
    if config["tower"] == "resnet":
        vision = dict(layers=config["stages"], width=config["channels"], head_width=64)
        vision["image_size"] = config["image_size"]
        return CLIP(config["embed_dim"], vision, text, quick_gelu=True)
    vision = dict(timm_model_name="convnext_base", timm_pool="", timm_proj="mlp")
    vision |= dict(image_size=config["image_size"])
    make, widths = timm.create_model, [config["channels"] * 2**k for k in range(4)]
    timm.create_model = functools.partial(make, depths=config["stages"], dims=widths)
    try:
        return CLIP(config["embed_dim"], vision, text)
    finally:
        timm.create_model = make


def model(name: str):
    """FC-CLIP of a golden config."""
    from fcclip.fcclip import FCCLIP
    from fcclip.modeling.backbone.clip import CLIP as Backbone
    from fcclip.modeling.meta_arch.fcclip_head import FCCLIPHead
    from fcclip.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
    from fcclip.modeling.transformer_decoder.fcclip_transformer_decoder import (
        MultiScaleMaskedTransformerDecoder,
    )

    config = cases.FCCLIPS[name]
    backbone = Backbone.__new__(Backbone)
    torch.nn.Module.__init__(backbone)
    backbone.clip_model = tower(config)
    is_resnet = config["tower"] == "resnet"
    backbone.model_name = "RN50" if is_resnet else "convnext_large_d_320"
    backbone.model_type = config["tower"]
    tokenizer = cases.fcclip_tokenizer()
    backbone.text_tokenizer = lambda texts: torch.from_numpy(tokenizer(texts)).long()
    factor, width = 4 if is_resnet else 1, config["width"]
    shapes = {
        f"res{k + 2}": GIVEN["ShapeSpec"](config["channels"] * factor * 2**k, 4 * 2**k)
        for k in range(4)
    }
    pixel_decoder = MSDeformAttnPixelDecoder(
        shapes,
        transformer_dropout=0.0,
        transformer_nheads=config["num_heads"],
        transformer_dim_feedforward=config["ffn_width"],
        transformer_enc_layers=config["num_encoder_layers"],
        conv_dim=width,
        mask_dim=width,
        norm="GN",
        transformer_in_features=["res3", "res4", "res5"],
        common_stride=4,
    )
    decoder = MultiScaleMaskedTransformerDecoder(
        width,
        num_classes=len(cases.FCCLIP_TRAINED),
        hidden_dim=width,
        num_queries=config["num_queries"],
        nheads=config["num_heads"],
        dim_feedforward=config["decoder_ffn_width"],
        dec_layers=config["num_decoder_layers"],
        pre_norm=False,
        mask_dim=width,
        enforce_input_project=False,
        clip_embedding_dim=config["embed_dim"],
    )
    head = FCCLIPHead(
        shapes,
        num_classes=len(cases.FCCLIP_TRAINED),
        pixel_decoder=pixel_decoder,
        transformer_predictor=decoder,
        transformer_in_feature="multi_scale_pixel_decoder",
    )
    things = {k: k for k, is_thing in enumerate(cases.FCCLIP_IS_THING) if is_thing}
    asked = types.SimpleNamespace(
        stuff_classes=cases.FCCLIP_ASKED, thing_dataset_id_to_contiguous_id=things
    )
    return FCCLIP(
        backbone=backbone,
        sem_seg_head=head,
        criterion=torch.nn.Identity(),
        num_queries=config["num_queries"],
        object_mask_threshold=0.0,
        overlap_threshold=cases.FCCLIP_OVERLAP,
        train_metadata=types.SimpleNamespace(stuff_classes=cases.FCCLIP_TRAINED),
        test_metadata=asked,
        size_divisibility=32,
        sem_seg_postprocess_before_inference=True,
        pixel_mean=[122.7709383, 116.7460125, 104.09373615],
        pixel_std=[68.5005327, 66.6321579, 70.32316305],
        semantic_on=True,
        panoptic_on=True,
        instance_on=False,
        test_topk_per_image=100,
        geometric_ensemble_alpha=0.4,
        geometric_ensemble_beta=0.8,
        ensemble_on_valid_mask=is_resnet,
    ).eval()


def fcclip(name: str) -> dict[str, np.ndarray]:
    """Embeddings of the towers, and of each image what the networks and the ensemble say."""
    config, reference = cases.FCCLIPS[name], model(name)
    made = give_weights(reference)
    clip = reference.backbone.clip_model
    kept: dict[str, np.ndarray] = {}

    def keep(key, function):
        def call(*args, **kwargs):
            kept[key] = result = function(*args, **kwargs)
            return result

        return call

    def probabilities(mask_cls, mask_pred):
        kept["probs"] = F.softmax(mask_cls, dim=-1)

    reference.sem_seg_head.forward = keep("outputs", reference.sem_seg_head.forward)
    backbone = reference.backbone
    backbone.visual_prediction_forward = keep("clip", backbone.visual_prediction_forward)
    reference.semantic_inference = probabilities
    with torch.no_grad():
        made["image"] = clip.encode_image(to_torch(cases.fcclip_clip_images(config["image_size"])))
        made["text"] = clip.encode_text(backbone.tokenize_text(cases.FCCLIP_ASKED[2:5]))
        for number, size in enumerate(cases.FCCLIP_SIZES[name]):
            image = to_torch(cases.fcclip_image(size)[None].astype(np.float32))[0]
            (found,) = reference([{"image": image}])
            masks = kept["outputs"]["pred_masks"][0]
            print(f"{name}: a mask logit is {float(masks.abs().min() / masks.abs().max()):.1e}")
            ids, segments = found["panoptic_seg"]
            made |= {
                f"masks_{number}": masks[::3, ::3, ::4],
                f"seen_logits_{number}": kept["outputs"]["pred_logits"][0],
                f"clip_{number}": kept["clip"][0],
                f"probs_{number}": kept["probs"],
                f"map_{number}": ids.to(torch.uint8),
                f"labels_{number}": torch.tensor([s["category_id"] for s in segments]),
            }
    return {key: np.asarray(value) for key, value in made.items()}


def main() -> None:
    checkout, *names = sys.argv[1:]
    prepare(checkout)
    for name in names or cases.FCCLIPS:
        path = cases.FOLDER / f"{name}.npz"
        np.savez_compressed(path, **fcclip(name))
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
