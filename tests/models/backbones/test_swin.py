"""Swin beside transformers' SwinBackbone, and its parts by hand.

Inside Mask2Former, at a size that needs padding everywhere: tests/models/test_segmentor.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.models.backbones import swin as swin_lib
from concat_jax.models.backbones.swin import SWIN_VARIANTS, Swin
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights import segmentors
from concat_jax.weights.names.mask2former import hugging_face
from concat_jax.weights.names.table import find, to_ours
from tests import tiny
from tests.golden.cases import relative_error

SMALL = {"stage_sizes": (2, 1, 2, 1), "width": 8, "num_heads": (1, 2, 2, 4), "window_size": 3}
CONFIG = {
    "backbone": {"kind": "swin", **SMALL},
    "width": 32,
    "num_queries": 5,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "ffn_width": 16,
    "decoder_ffn_width": 24,
}
NUM_CLASSES = 3
ENCODER = "model.pixel_level_module.encoder"


def hf_swin_config(fields):
    transformers = pytest.importorskip("transformers")
    return transformers.SwinConfig(
        embed_dim=fields["width"],
        depths=list(fields["stage_sizes"]),
        num_heads=list(fields["num_heads"]),
        window_size=fields.get("window_size", 7),
        patch_size=fields.get("patch_size", 4),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def randomize(model) -> None:
    """Weights that hide no error: norms off one, biases and position tables off zero."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "relative_position_bias_table" in name:
                tensor.copy_(noise)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * noise)
            elif ".swin." in name or name.startswith("swin."):
                tensor.copy_(noise * 1.5 * tensor[0].numel() ** -0.5)


def numpy_state(model, prefix=""):
    return {f"{prefix}{k}": v.numpy() for k, v in model.state_dict().items()}


def backbone_params(state, fields):
    """Our tree of a bare backbone from a state dict named as inside Mask2Former."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(Swin(**fields).init, jax.random.key(0), image)["params"]
    shapes = traverse_util.flatten_dict({"segmentor": {"backbone": shapes}}, sep="/")
    found = find(state, hugging_face({"kind": "swin"}))
    params, _ = to_ours(found, {path: value.shape for path, value in shapes.items()})
    return params["segmentor"]["backbone"]


@pytest.mark.parametrize(
    "size, fields",
    [
        ((96, 96), {}),  # maps of 24, 12, 6, 3: whole windows everywhere
        ((21, 34), {"window_size": 4, "patch_size": 2}),  # even window, last maps smaller than it
    ],
    ids=["whole", "smaller_than_window"],
)
def test_matches_transformers(size, fields):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {**SMALL, **fields}
    reference = transformers.SwinBackbone(hf_swin_config(fields)).eval()
    randomize(reference)
    params = backbone_params(numpy_state(reference, f"{ENCODER}."), fields)
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    ours = jax.jit(Swin(**fields).apply)({"params": params}, images)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).feature_maps
    assert len(ours) == len(theirs) == 4
    for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = relative_error(a, b.permute(0, 2, 3, 1))
        assert error < 1e-4, f"stage {stage}: {error:.1e}"


@pytest.fixture(scope="module")
def reference():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=hf_swin_config(SMALL),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=5,
        encoder_layers=1,
        # transformers counts the prediction from the learned queries as a layer.
        decoder_layers=3,
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=24,
        num_labels=NUM_CLASSES,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    randomize(model)
    return model


def test_round_trip_of_memory_and_file_is_exact(reference, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    memory = numpy_state(reference)
    reference.save_pretrained(tmp_path)
    file = safetensors.load_file(tmp_path / "model.safetensors")
    # Files of earlier versions hold the index table as well.
    index = f"{ENCODER}.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    file[index] = swin_lib.relative_position_index(3)

    params, report = segmentors.segmentor_params_from_hf(file, CONFIG)
    assert index in report.ignored
    weights = {k: v for k, v in file.items() if k not in report.ignored}
    assert report.num_parameters == sum(v.size for v in weights.values())
    back = segmentors.segmentor_params_to_hf(params, CONFIG)
    assert set(back) == set(weights)
    for name, array in back.items():
        np.testing.assert_array_equal(array, file[name], err_msg=name)

    from_memory, report = segmentors.segmentor_params_from_hf(memory, CONFIG)
    assert set(report.loaded.values()) == set(memory) - set(report.ignored)
    same = jax.tree.map(np.array_equal, params, from_memory)
    assert all(jax.tree.leaves(same))
    # Axes by hand: the patch projection, torch [out, in, h, w] against ours [h, w, in, out].
    name = f"{ENCODER}.embeddings.patch_embeddings.projection.weight"
    kernel = params["segmentor"]["backbone"]["patch_projection"]["kernel"]
    assert kernel[1, 2, 0, 7] == file[name][7, 0, 1, 2]


def test_transformers_reads_what_we_write(reference):
    torch = pytest.importorskip("torch")
    memory = numpy_state(reference)
    params, report = segmentors.segmentor_params_from_hf(memory, CONFIG)
    written = segmentors.segmentor_params_to_hf(params, CONFIG)
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in written.items()}
    again = type(reference).from_pretrained(None, config=reference.config, state_dict=state)
    for name, array in numpy_state(again).items():
        if name not in report.ignored:
            np.testing.assert_array_equal(array, memory[name], err_msg=name)


def test_weights_of_another_depth_are_refused(reference):
    backbone = {**CONFIG["backbone"], "stage_sizes": (2, 2, 2, 1)}
    with pytest.raises(ValueError, match=r"lacks \d+ arrays.*layers.1.blocks.1"):
        config = {**CONFIG, "backbone": backbone}
        segmentors.segmentor_params_from_hf(numpy_state(reference), config)


@pytest.mark.parametrize("variant, millions", [("tiny", 27.5), ("large", 195.2)])
def test_published_sizes(variant, millions):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = SWIN_VARIANTS[variant]
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(Swin(**fields).init, jax.random.key(0), image)["params"]
    ours = sum(x.size for x in jax.tree.leaves(params))
    with torch.device("meta"):
        model = transformers.SwinBackbone(hf_swin_config(fields))
    theirs = {k: v.numel() for k, v in model.named_parameters()}
    unused = [k for k in theirs if k.startswith("swin.layernorm.")]
    assert len(unused) == 2
    assert ours == sum(theirs.values()) - sum(theirs[k] for k in unused)
    assert ours / 1e6 == pytest.approx(millions, abs=0.1)


def test_shapes_at_full_size_in_bfloat16():
    image = jax.ShapeDtypeStruct((2, 1000, 1333, 3), jnp.float32)
    model = Swin(**SWIN_VARIANTS["base"], dtype=jnp.bfloat16, remat=True)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    sizes = [(250, 334), (125, 167), (63, 84), (32, 42)]
    assert [x.shape for x in outputs] == [(2, *s, 128 * 2**i) for i, s in enumerate(sizes)]
    assert {x.dtype for x in outputs} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_relative_position_index_by_hand():
    # Tokens (0,0) (0,1) (1,0) (1,1); a step of one row counts 3, of one column 1, no step is 4.
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    np.testing.assert_array_equal(swin_lib.relative_position_index(2), expected)


def test_windows_by_hand():
    features = jnp.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    windows = swin_lib.partition_windows(features, 2)
    assert windows.shape == (2, 2, 3, 4, 1)
    # Rows 2 and 3, columns 4 and 5 of the second picture.
    np.testing.assert_array_equal(windows[1, 1, 2, :, 0], 24 + np.asarray([16, 17, 22, 23]))
    np.testing.assert_array_equal(swin_lib.merge_windows(windows, 2), features)


@pytest.mark.parametrize("grid, window, shift", [((2, 3), 3, 1), ((1, 2), 4, 2)])
def test_shift_mask_blocks_what_was_not_adjacent(grid, window, shift):
    # Roll the true coordinates as the block does: within a window, two tokens may see each other
    # exactly if their distance in the picture is their distance in the window.
    height, width = grid[0] * window, grid[1] * window
    rows, columns = np.mgrid[:height, :width]
    true = np.stack([rows, columns], axis=-1)[None].astype(np.int32)
    rolled = np.roll(true, (-shift, -shift), axis=(1, 2))
    true_windows = np.asarray(swin_lib.partition_windows(jnp.asarray(rolled), window))[0]
    seen_windows = np.asarray(swin_lib.partition_windows(jnp.asarray(true), window))[0]

    def steps(windows):
        return windows[:, :, :, None] - windows[:, :, None, :]

    adjacent = (steps(true_windows) == steps(seen_windows)).all(-1)
    blocked = np.asarray(swin_lib.shifted_window_mask(grid, window, shift))
    np.testing.assert_array_equal(blocked, ~adjacent)
    assert blocked.any() and not blocked.all()


ONE_STAGE = {"stage_sizes": (2,), "width": 4, "num_heads": (2,), "window_size": 2, "patch_size": 2}


def one_stage_loss(params, images, **fields):
    (features,) = Swin(**ONE_STAGE, **fields).apply({"params": params}, images)
    return jnp.mean(features.astype(jnp.float32)[..., 0] ** 2)


@pytest.fixture(scope="module")
def one_stage_params():
    image = jax.ShapeDtypeStruct((1, 10, 8, 3), jnp.float32)
    shapes = jax.eval_shape(Swin(**ONE_STAGE).init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.5, size=x.shape), jnp.float32), shapes
    )


def test_gradients_reach_everything_and_remat_changes_none(one_stage_params):
    images = np.random.default_rng(0).normal(size=(2, 10, 8, 3)).astype(np.float32)
    plain, remat = (
        jax.jit(jax.grad(lambda p, r=r: one_stage_loss(p, images, remat=r)))(one_stage_params)
        for r in (False, True)
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(plain):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        # A constant added to all keys of a query cancels in its softmax.
        if not name.endswith("['key']['bias']"):
            assert np.abs(gradient).max() > 0, name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_bfloat16_stays_close(one_stage_params):
    images = np.random.default_rng(0).normal(size=(2, 10, 8, 3)).astype(np.float32)
    exact, half = (
        jax.jit(Swin(**ONE_STAGE, dtype=dtype).apply)({"params": one_stage_params}, images)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.bfloat16
    assert np.corrcoef(np.ravel(exact), np.ravel(half.astype(jnp.float32)))[0, 1] > 0.99


def test_sharded_batch_needs_no_gather(one_stage_params):
    images = jax.ShapeDtypeStruct((8, 10, 8, 3), jnp.float32)
    tiny.assert_nothing_is_gathered(one_stage_loss, one_stage_params, images)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stage_sizes": ()}, r"stage_sizes is \(\); give one to four"),
        ({"stage_sizes": (2, 0, 2, 2)}, r"stage_sizes is \(2, 0, 2, 2\); give one to four"),
        ({"num_heads": (1, 2)}, r"num_heads is \(1, 2\) but there are 4 stages"),
        ({"num_heads": (1, 2, 3, 4)}, "stage 3 has 32 channels, which 3 heads do not divide"),
        ({"window_size": 0}, "window_size is 0; give a number of 1 or more"),
    ],
)
def test_bad_fields(fields, message):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Swin(**{**SMALL, **fields}).init, jax.random.key(0), image)


def test_segmentor_config():
    # Lists as JSON brings them; remat is the outer one unless given.
    backbone = {"kind": "swin", **SMALL, "num_heads": [1, 2, 2, 4]}
    built = make_segmentor({**CONFIG, "backbone": backbone, "remat": True, "dtype": "bfloat16"})
    assert built.backbone == Swin(**SMALL, remat=True, dtype=jnp.bfloat16)
    own = make_segmentor({"backbone": {**backbone, "remat": False}, "remat": True})
    assert not own.backbone.remat
    with pytest.raises(ValueError, match="'swin' has no key 'windowsize'; did you mean 'window_s"):
        make_segmentor({"backbone": {**backbone, "windowsize": 7}})
