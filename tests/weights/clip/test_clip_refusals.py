"""What is no CLIP, or a broken one, is answered in one sentence that names the file."""

import copy
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.models.clip import CLIP_VARIANTS, make_clip
from concat_jax.weights.clip import ClipWeights, clip_params_for, read_clip
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.files.torch_files import MAX_ATTRIBUTES

torch = pytest.importorskip("torch")

LAYER = "visual.transformer.resblocks.1.mlp.c_fc.bias"
HF_LAYER = "vision_model.encoder.layers.1.mlp.fc1.bias"


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_clip(path)
    sentence = str(caught.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert ". " not in sentence.replace(str(path), "")
    print(sentence)
    return sentence


@pytest.mark.parametrize("is_hf", [False, True])
def test_missing_extra_and_bad_values_are_named(clip_state, clip_hf_folder, tools, tmp_path, is_hf):
    state = tools.as_hugging_face(clip_state) if is_hf else clip_state
    name = HF_LAYER if is_hf else LAYER
    path = tmp_path / "weights.safetensors"
    if is_hf:
        (tmp_path / "config.json").write_bytes((clip_hf_folder / "config.json").read_bytes())

    def save(changed):
        safetensors.numpy.save_file(changed, path)

    save({k: v for k, v in state.items() if k != name})
    assert f"it lacks 1 array that the config needs ({name})" in refusal(path)
    save({**state, "logit_bias": np.zeros(()), "visual.head": np.zeros(3)})
    assert (
        "it also holds 2 arrays that the config has no place for (logit_bias, visual.head)"
        in refusal(path)
    )
    for value in (np.nan, np.inf):
        save({**state, name: np.full_like(state[name], value)})
        assert f"{name} holds a value that is not finite" in refusal(path)
    save({**state, name: state[name][:-1]})
    assert f"{name} has shape (767,), but the config needs (768,)" in refusal(path)


def test_a_config_of_another_size_than_the_weights(clip_hf_folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        (clip_hf_folder / "model.safetensors").read_bytes()
    )
    content = (clip_hf_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        content.replace('"hidden_size": 192', '"hidden_size": 96')
    )
    assert "has shape" in (sentence := refusal(tmp_path)) and "config needs" in sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "it has model_type 'siglip'"),
        ({"vision_config": {"hidden_act": "relu"}}, "towers have different activations"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "its vision_config has layer_norm_eps 1e-06"),
        ({"vision_config": {"num_channels": 4}}, "its vision_config has num_channels 4"),
        (
            {"vision_config": {"image_size": [16, 32]}},
            "image_size [16, 32]; it must be a whole",
        ),
        (
            {"vision_config": {"hidden_size": "wide"}},
            "its vision_config has hidden_size 'wide'",
        ),
        ({"text_config": {"eos_token_id": [1, 2]}}, "its text_config has eos_token_id [1, 2]"),
        ({"vision_config": {"num_attention_heads": 5}}, "not divisible by its 5 heads"),
    ],
)
def test_configs_of_what_clip_here_is_not(clip_hf_folder, tools, tmp_path, change, message):
    (tmp_path / "model.safetensors").write_bytes(
        (clip_hf_folder / "model.safetensors").read_bytes()
    )
    tools.write_json(tmp_path / "config.json", change)
    assert message in refusal(tmp_path)


def test_other_pixel_statistics_are_refused(clip_hf_folder, tools, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((clip_hf_folder / name).read_bytes())
    preprocessor = tmp_path / "preprocessor_config.json"
    tools.write_json(preprocessor, {"image_mean": [0.481, 0.458, 0.408], "do_resize": True})
    read_clip(tmp_path)
    tools.write_json(preprocessor, {"image_std": [0.5, 0.5, 0.5]})
    assert "its preprocessor_config.json has image_std [0.5, 0.5, 0.5], but" in refusal(tmp_path)


def test_half_a_resnet_and_other_models(clip_state, tmp_path):
    path = tmp_path / "weights.safetensors"
    resnet = {"visual.attnpool.positional_embedding": np.zeros((5, 8), np.float32)}
    safetensors.numpy.save_file({**clip_state, **resnet}, path)
    assert "it lacks visual.conv3.weight, which tells a size of the network" in refusal(path)
    safetensors.numpy.save_file({"backbone.conv1.weight": np.zeros(3)}, path)
    assert "it holds weights of another model (backbone.conv1.weight)" in refusal(path)
    wide = {**clip_state, "visual.conv1.weight": np.zeros((192, 4, 4, 4), np.float32)}
    safetensors.numpy.save_file(wide, path)
    assert "no convolution of square patches of RGB pictures" in refusal(path)
    oblong = {**clip_state, "visual.positional_embedding": np.zeros((13, 192), np.float32)}
    safetensors.numpy.save_file(oblong, path)
    assert "its 13 positions and patches of 48 numbers are no square pictures" in refusal(path)


def test_heads_that_nothing_tells_are_not_guessed(tools, tmp_path):
    """A width that is no multiple of OpenAI's heads."""
    model = {"text_projection": np.zeros((32, 8))}
    shapes = {
        "logit_scale": (), "visual.proj": (48, 8), "visual.class_embedding": (48,),
        "visual.conv1.weight": (48, 3, 4, 4), "visual.positional_embedding": (17, 48),
        "visual.ln_pre.weight": (48,), "visual.ln_pre.bias": (48,), "visual.ln_post.weight": (48,),
        "visual.ln_post.bias": (48,), "token_embedding.weight": (9, 32),
        "positional_embedding": (5, 32), "ln_final.weight": (32,), "ln_final.bias": (32,),
    }  # fmt: skip
    for tower, width in (("visual.transformer", 48), ("transformer", 32)):
        for name, shape in {
            "ln_1.weight": (width,), "ln_1.bias": (width,),
            "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (2 * width, width), "mlp.c_fc.bias": (2 * width,),
            "mlp.c_proj.weight": (width, 2 * width), "mlp.c_proj.bias": (width,),
        }.items():  # fmt: skip
            shapes[f"{tower}.resblocks.0.{name}"] = shape
    model |= {name: np.zeros(shape) for name, shape in shapes.items()}
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(model, path)
    assert "image tower is 48 wide" in refusal(path)


def test_folders_and_paths_that_hold_nothing(tmp_path):
    assert "There is no file" in refusal(tmp_path / "nowhere.pt")
    assert "holds no weights of a CLIP" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["archive", "open_clip"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99, 0.99999])
def test_truncated_files(clip_archive, open_clip_file, tmp_path, name, share):
    whole = (clip_archive if name == "archive" else open_clip_file).read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be read" in refusal(path)


def rewritten(archive, path, pickled):
    """The archive with another pickle in it."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_pickle = info.filename.endswith("/data.pkl")
            new.writestr(info.filename, pickled if is_pickle else old.read(info))
    return path


class Evil:
    def __reduce__(self):
        return eval, ("1 / 0",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_archive_that_names_anything_else_is_refused_and_not_run(
    clip_archive, tmp_path, protocol
):
    evil = rewritten(clip_archive, tmp_path / "evil.pt", pickle.dumps(Evil(), protocol))
    assert ".eval, which weights have no need of; nothing of it was run." in refusal(evil)
    whole_model = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), whole_model)
    assert "it names torch.nn.modules.linear.Linear" in refusal(whole_model)


MODULE = b"c__torch__.a.b\nM\n)\x81"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # A class of ours in another package's clothes, attributes set on the class, a bad state.
        (b"c__torch__x\nM\n)\x81", "it names __torch__x.M"),
        (b"ctorch.jit\nload\n)R", "it names torch.jit.load"),
        (b"c__torch__.a\nM\n}X\x01\x00\x00\x00aK\x01sb", "broken or cut off"),
        (MODULE + b"K\x01b", "a module's attributes have no names"),
        (MODULE + b"}K\x01K\x01sb", "a module's attributes have no names"),
        (MODULE, "its modules hold no tensors"),
        (b"}", "it holds no module"),
        # A module that is its own child.
        (
            MODULE + b"q\x00}X\x01\x00\x00\x00ah\x00sb",
            "its modules nest too deep, or hold themselves",
        ),
    ],
)
def test_modules_that_are_none(clip_archive, tmp_path, program, message):
    path = rewritten(clip_archive, tmp_path / "odd.pt", b"\x80\x02" + program + b".")
    assert message in refusal(path)


def test_modules_that_share_modules_without_end(clip_archive, tmp_path):
    """Thirty levels of two names for one module: a billion paths in a few bytes."""
    program = MODULE
    for level in range(30):
        two = b"".join(b"X\x01\x00\x00\x00" + name + b"h" + bytes([level]) for name in (b"a", b"b"))
        program += b"q" + bytes([level]) + b"0" + MODULE + b"}(" + two + b"ub"
    path = rewritten(clip_archive, tmp_path / "bomb.pt", b"\x80\x02" + program + b".")
    assert f"its modules have over {MAX_ATTRIBUTES:,} attributes" in refusal(path)


def test_modules_nest_only_so_deep(clip_archive, tmp_path):
    program = MODULE
    for _ in range(2000):
        program += b"q\x000" + MODULE + b"}X\x01\x00\x00\x00ah\x00sb"
    path = rewritten(clip_archive, tmp_path / "deep.pt", b"\x80\x02" + program + b".")
    assert "nest too deep" in refusal(path)


def test_an_archive_has_the_names_and_types_of_its_state_dict(tmp_path):
    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 2).half())
            self.register_buffer("count", torch.tensor(3))
            self.sizes, self.label, self.factors = [1, 2], "x", {"a": 1.5}
            self.optional = None

        def forward(self, x):
            return x * len(self.sizes) * self.factors["a"] + self.count + self.weight.sum()

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList([Part(), Part()])
            self.tied = self.parts[0]
            self.transposed = torch.nn.Parameter(torch.randn(4, 2).t())

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return self.tied(x)

    model = Whole()
    path = tmp_path / "script.pt"
    torch.jit.script(copy.deepcopy(model)).save(str(path))
    file = read_weights(path)
    arrays = file.arrays
    assert file.is_script
    assert set(arrays) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert arrays[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), err_msg=name)


def test_weights_of_another_tower_than_the_config():
    """Both ways; the remedy is the config of the weights."""
    towers = {name: {"image_tower": "vit", **CLIP_VARIANTS[name]} for name in ("RN50", "ViT-B/32")}
    for name, other in (("RN50", "ViT-B/32"), ("ViT-B/32", "RN50")):
        weights = ClipWeights(towers[name], {}, f"{name}.pt", "OpenAI", (), None, ())
        theirs, mine = (towers[which]["image_tower"] for which in (name, other))
        with pytest.raises(ValueError, match=rf"image_tower is '{theirs}' not '{mine}'; set conf"):
            clip_params_for(weights, {}, make_clip({"variant": other}))
