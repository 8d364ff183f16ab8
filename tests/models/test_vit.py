"""Plain ViTs beside transformers' DINOv2 and DINOv3, through the files that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from concat_jax.models.ops import layers_in_turn
from concat_jax.models.vit import VIT_VARIANTS, ViT
from concat_jax.weights.names.table import find, to_ours
from concat_jax.weights.names.vit import as_segmentors, hugging_face
from concat_jax.weights.report import shapes_of
from tests import tiny
from tests.golden.cases import draw_weights, relative_error

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
OURS = dict(width=48, depth=3, num_heads=4)


def reference(family: str):
    """transformers' model with weights that hide no mistake."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if family == "dinov2":
        config = transformers.Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        own = dict(num_register_tokens=4, intermediate_size=80)
        config = transformers.DINOv3ViTConfig(**SIZES, **own)
        model = transformers.DINOv3ViTModel(config)
    state = {k: v for k, v in model.state_dict().items() if "inv_freq" not in k}
    with torch.no_grad():
        for name, array in draw_weights({k: tuple(v.shape) for k, v in state.items()}).items():
            state[name].copy_(torch.from_numpy(array))
    return model.eval()


def ours(family: str) -> ViT:
    own = dict(VIT_VARIANTS[f"{family}-small"], **OURS, scan_layers=True)
    own["ffn_width"] = {"dinov2": 192, "dinov3": 80}[family]
    if family == "dinov2":
        own["grid"] = 4
    return ViT(**own)


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_equals_transformers_at_its_own_and_at_other_sizes(family, tmp_path):
    model, vit = reference(family), ours(family)
    model.save_pretrained(tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    if family == "dinov2":
        arrays = as_segmentors(arrays)
    p = vit.patch_size
    abstract = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, p, p, 3), np.float32))
    shapes = shapes_of({"segmentor": {"backbone": abstract["params"]}})
    params, report = to_ours(find(arrays, hugging_face(family)), shapes)
    assert set(report.ignored) == {"embeddings.mask_token"}
    params = params["segmentor"]["backbone"]
    apply = jax.jit(vit.apply)
    torch = pytest.importorskip("torch")
    # Positions at their own size in one case; tables are resized, and rotations made, in the rest.
    for rows, columns in ((4, 4), (3, 5)) if family == "dinov2" else ((3, 5),):
        images = np.random.default_rng(0).normal(size=(2, rows * p, columns * p, 3))
        images = images.astype(np.float32)
        with torch.no_grad():
            theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        found = apply({"params": params}, images)
        assert relative_error(found, theirs.last_hidden_state) < 1e-5
        assert np.asarray(found).std(axis=1).mean() > 0.1  # tokens differ


def test_gradients_are_those_of_blocks_written_out(monkeypatch):
    """Also in a loop that computes its blocks anew backwards."""
    loops = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(layers_in_turn, "platform_dependent", loops)
    images = np.random.default_rng(0).normal(size=(1, 16, 24, 3)).astype(np.float32)
    fields = dict(width=16, depth=2, num_heads=2, ffn_width=24, patch_size=8, grid=3)
    shapes = jax.eval_shape(ViT(**fields).init, jax.random.key(0), images)["params"]
    params = tiny.fill(shapes, 0)

    def gradients(**how):
        vit = ViT(**fields, **how)
        loss = lambda p: jnp.sum(vit.apply({"params": p}, images)[:, :3] ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain = gradients()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        plain,
        gradients(scan_layers=True, remat=True),
    )


@pytest.mark.parametrize("variant", VIT_VARIANTS)
def test_published_sizes_and_their_numbers_of_parameters(variant):
    vit = ViT(**VIT_VARIANTS[variant])
    side = 4 * vit.patch_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    output, variables = jax.eval_shape(vit.init_with_output, jax.random.key(0), images)
    assert output.shape == (1, 5 + 16, vit.width)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    published = {"small": 22e6, "base": 86e6, "large": 304e6}[variant.split("-")[1]]
    assert abs(count / published - 1) < 0.03


def test_sides_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisible by its patch size 16"):
        jax.eval_shape(ViT().init, jax.random.key(0), np.zeros((1, 40, 32, 3)))
