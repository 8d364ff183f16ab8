"""Scenic's CLIP and OWL-ViT: read from its files, and beside its own modules."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.models.clip import make_clip
from concat_jax.weights.clip import read_clip
from tests import tiny
from tests.neighbours.with_scenic import need_scenic
from tests.weights.clip.scenic_files import as_scenic, save

HEADS = {"image_heads": 3, "text_heads": 2}
SIZES = dict(embed_dim=24, image_size=16, patch_size=4, image_width=48, image_depth=2)
SIZES |= dict(vocab_size=50, context_length=9, text_width=32, text_depth=3)
CONFIG = SIZES | HEADS | dict(image_mlp_ratio=4.0, text_mlp_ratio=4.0, eot_id=None)
CONFIG["activation"] = "quick_gelu"


def params_of(config):
    clip = make_clip(config)
    images = jnp.zeros((1, config["image_size"], config["image_size"], 3))
    shapes = jax.eval_shape(clip.init, tiny.KEY, images, jnp.zeros((1, 2), int))
    return tiny.fill(shapes["params"], 0)


def as_owl_vit(arrays, *, is_old):
    """In an OWL-ViT: no projection, heads of its own, and in newer code other numbers of norms."""
    arrays = {f"backbone/clip/{k}": v for k, v in arrays.items() if k != "visual/proj/kernel"}
    if not is_old:
        for old, new in (("/ln_1/", "/ln_0/"), ("/ln_2/", "/ln_1/"), ("blocks.", "blocks_")):
            arrays = {name.replace(old, new): array for name, array in arrays.items()}
    heads = ("class_head/kernel", "obj_box_head/bias", "backbone/merged_class_token/bias")
    return arrays | {name: np.ones(3, np.float32) for name in heads}


@pytest.fixture(scope="module")
def params():
    return params_of(CONFIG)


def test_a_clip_comes_back_from_a_checkpoint(params, tmp_path):
    weights = read_clip(save(tmp_path / "checkpoint_3", as_scenic(params, **HEADS)))
    assert weights.config == CONFIG and weights.embeds_images
    tiny.assert_same(weights.params, params)
    assert "(Scenic's CLIP)" in str(weights) and "holds global_step; ignored" in str(weights)


@pytest.mark.parametrize("is_old", [True, False])
def test_an_owl_vits_towers_come_back_without_the_projection_of_images(params, is_old, tmp_path):
    arrays = as_owl_vit(as_scenic(params, **HEADS), is_old=is_old)
    path = tmp_path / "clip_vit_b32"
    if is_old:  # before optax
        tree = traverse_util.unflatten_dict(arrays, sep="/")
        save(path, {}, optimizer={"state": {"step": 1}, "target": tree})
    else:
        save(path, arrays)
    weights = read_clip(path)
    assert (
        not weights.embeds_images and np.isnan(weights.params["visual_projection"]["kernel"]).all()
    )
    assert list(weights.report.new) == ["visual_projection/kernel"]
    assert len(weights.report.ignored) == 3
    known = {name: tree for name, tree in params.items() if name != "visual_projection"}
    tiny.assert_same({name: weights.params[name] for name in known}, known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("visual/conv1/kernel"), "lacks visual/conv1/kernel"),
        (lambda a: a.update({"visual/new": np.ones(2)}), "visual/new"),
        (
            lambda a: a.update({"text/transformer/resblocks.1/attn/key/kernel": np.ones((32, 32))}),
            r"resblocks\.1/attn/key/kernel has shape \(32, 32\), where 3 axes",
        ),
        (lambda a: a.update({"visual/conv1/kernel": np.ones((4, 5, 3, 48))}), "square patches"),
    ],
)
def test_every_array_is_accounted_for(params, change, message, tmp_path):
    arrays = as_scenic(params, **HEADS)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        read_clip(save(tmp_path / "file", arrays))


def test_damaged_files_end_in_a_sentence(params, tmp_path):
    path = save(tmp_path / "file", as_scenic(params, **HEADS))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="file cannot be read as weights: it is cut off"):
        read_clip(path)
    with pytest.raises(ValueError, match="a checkpoint of flax that holds no params"):
        read_clip(save(path, {}, step=1))


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_dictionary_in_numpys_box_is_read_and_not_run(tmp_path, capsys):
    np.save(tmp_path / "evil.npy", {"a": np.ones(2), "b": Evil()}, allow_pickle=True)
    np.save(tmp_path / "array.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([np.ones(2), None], object), allow_pickle=True)
    for name, reason in (
        ("evil", r"it names builtins\.print, which weights have no need of"),
        ("array", "it holds one array and no names"),
        ("objects", "it holds one array and no names"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_clip(tmp_path / f"{name}.npy")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="an array holds objects"):
        (tmp_path / "nested.pkl").write_bytes(pickle.dumps(np.array(np.array([1, None]), object)))
        read_clip(tmp_path / "nested.pkl")


def test_scenics_own_file_of_openais_arrays(clip_state, clip_archive, tmp_path):
    np.save(tmp_path / "vit_b32.npy", clip_state, allow_pickle=True)
    tiny.assert_same(read_clip(tmp_path / "vit_b32.npy").params, read_clip(clip_archive).params)


@pytest.mark.parametrize("project", ["baselines.clip", "owl_vit.clip"])
def test_towers_compute_what_scenics_do(project, tmp_path):
    (layers,) = need_scenic(f"projects.{project}.layers")
    config = CONFIG | dict(image_width=192, text_width=128)  # heads of 64, as its own code has
    theirs = layers.CLIP(
        vocab_size=config["vocab_size"],
        embed_dim=config["embed_dim"],
        text_features=config["text_width"],
        text_num_layers=config["text_depth"],
        text_num_heads=config["text_heads"],
        vision_features=config["image_width"],
        vision_num_layers=config["image_depth"],
        vision_patch_size=config["patch_size"],
        vision_return_map=project == "owl_vit.clip",
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens = rng.integers(1, 49, (3, 9)).astype(np.int32)
    for row, end in enumerate((3, 5, 8)):
        tokens[row, end], tokens[row, end + 1 :] = 49, 0
    shapes = jax.eval_shape(theirs.init, tiny.KEY, images, tokens)["params"]
    variables = {"params": tiny.fill(shapes, 1)}
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    if project == "owl_vit.clip":
        flat = {f"backbone/clip/{name}": array for name, array in flat.items()}
    weights = read_clip(save(tmp_path / "checkpoint", flat))
    assert weights.config == config
    image, text = theirs.apply(variables, images, tokens, normalize=False)
    clip = make_clip(weights.config)
    own = {"params": weights.params}
    np.testing.assert_allclose(clip.apply(own, tokens, method="encode_text"), text, atol=1e-4)
    if weights.embeds_images:
        ours = clip.apply(own, images, method="encode_image")
    else:  # the class token is one of the tokens that OWL-ViT goes on with
        ours, image = clip.apply(own, images, method=lambda c, x: c.vision_model(x)), image[:, 0]
    np.testing.assert_allclose(ours, image, atol=1e-4)
    assert np.abs(image).max() > 0.5 < np.abs(text).max()
