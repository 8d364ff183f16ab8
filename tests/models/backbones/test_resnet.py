"""ResNet beside transformers' ResNetBackbone, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.models.backbones.resnet import FrozenBatchNorm, ResNet


def reference_backbone(block, width, stage_sizes):
    """A random ResNetBackbone of transformers and its weights under our names."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    expansion = 4 if block == "bottleneck" else 1
    config = transformers.ResNetConfig(
        depths=list(stage_sizes),
        hidden_sizes=[expansion * width * 2**i for i in range(4)],
        embedding_size=width,
        layer_type=block,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = transformers.ResNetBackbone(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("normalization.weight", "running_var")):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif name.endswith(("normalization.bias", "running_mean")):
                tensor.copy_(0.3 * noise)
    return model


# Bottlenecks at a whole size: tests/models/test_segmentor.py, at the published widths.
@pytest.mark.parametrize("block, size", [("bottleneck", (45, 70)), ("basic", (64, 96))])
def test_matches_transformers(block, size):
    torch = pytest.importorskip("torch")
    from concat_jax.weights.backbones import FORMATS
    from concat_jax.weights.names.table import Naming, columns, find, to_ours

    width, stage_sizes = 8, (1, 2, 1, 1)
    reference = reference_backbone(block, width, stage_sizes)
    state = {k: v.numpy() for k, v in reference.state_dict().items()}
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    model = ResNet(stage_sizes=stage_sizes, width=width, block=block)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(shapes, sep="/").items()}
    rows = columns(FORMATS["resnet"].table, "", "", "", "")[0]
    params, _ = to_ours(find(state, Naming(rows, "num_batches_tracked$")), shapes)

    ours = jax.jit(model.apply)({"params": params}, images)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).feature_maps
    for level, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        b = b.permute(0, 2, 3, 1).numpy()
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=f"level {level}")


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize("block, factor", [("bottleneck", 4), ("basic", 1)])
def test_shapes(stem, block, factor):
    model = ResNet((1, 1, 2, 1), width=8, block=block, norm="group", stem=stem, num_groups=4)
    image = jax.ShapeDtypeStruct((2, 65, 96, 3), jnp.float32)
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    divisor = 2 if stem == "small" else 4
    assert [x.shape for x in outputs] == [
        (2, -(-65 // (divisor * 2**i)), 96 // (divisor * 2**i), 8 * factor * 2**i) for i in range(4)
    ]


def test_resnet50_size():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(ResNet().init, jax.random.key(0), image)["params"]
    paths = jax.tree_util.tree_leaves_with_path(params)
    frozen = sum(x.size for path, x in paths if "frozen_" in jax.tree_util.keystr(path))
    trained = sum(x.size for _, x in paths) - frozen
    # torchvision: 25,557,032 parameters with 2,049,000 in the classifier and 53,120 in the norms'
    # affine maps; we also keep the two statistics of each channel.
    assert trained == 25_557_032 - 2_049_000 - 53_120
    assert frozen == 2 * 53_120


def test_frozen_batch_norm_by_hand_and_without_gradient():
    params = {
        "frozen_scale": jnp.asarray([2.0, 1.0]),
        "frozen_bias": jnp.asarray([1.0, 0.0]),
        "frozen_mean": jnp.asarray([3.0, -1.0]),
        "frozen_variance": jnp.asarray([4.0, 0.25]),
    }
    features = jnp.asarray([[[[5.0, 0.0]]]])
    norm = FrozenBatchNorm()
    output = norm.apply({"params": params}, features)
    np.testing.assert_allclose(output[0, 0, 0], [3.0, 2.0], rtol=1e-4)
    gradient = jax.grad(lambda p: norm.apply({"params": p}, features).sum())(params)
    assert all(not g.any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block": "bottle"}, "block is 'bottle'; did you mean 'bottleneck'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"stem": "depe"}, "stem is 'depe'"),
        ({"stage_sizes": (3, 0, 6, 3)}, r"stage_sizes is \(3, 0, 6, 3\); give one to four"),
        ({"stage_sizes": (2,) * 5}, r"stage_sizes is \(2, 2, 2, 2, 2\)"),
        ({"norm": "group", "width": 12, "num_groups": 8}, "width 12 .* num_groups 8"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**fields).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
