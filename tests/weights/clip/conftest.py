"""One small CLIP of random numbers, in the formats that people have CLIP in."""

import copy
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# All sizes differ, and heads are 64 wide as in OpenAI's.
EMBED, SIDE, PATCH, VISION, TEXT, VOCABULARY, CONTEXT = 24, 16, 4, 192, 128, 50, 9
DEPTHS = (2, 3)
CONFIG = dict(
    embed_dim=EMBED,
    image_size=SIDE,
    patch_size=PATCH,
    image_width=VISION,
    image_depth=DEPTHS[0],
    image_heads=3,
    image_mlp_ratio=4.0,
    vocab_size=VOCABULARY,
    context_length=CONTEXT,
    text_width=TEXT,
    text_depth=DEPTHS[1],
    text_heads=2,
    text_mlp_ratio=4.0,
    activation="quick_gelu",
    eot_id=None,
)


class QuickGELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(torch.nn.Module):
    """Parameters named as in OpenAI's archives; the mask is an attribute, as there."""

    def __init__(self, width, heads, mask):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("c_fc", torch.nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", torch.nn.Linear(4 * width, width))
        self.attn_mask = mask

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(torch.nn.Module):
    def __init__(self, width, depth, mask):
        super().__init__()
        blocks = [Block(width, width // 64, mask) for _ in range(depth)]
        self.resblocks = torch.nn.Sequential(*blocks)

    def forward(self, x):
        return self.resblocks(x)


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, VISION, PATCH, PATCH, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(VISION))
        positions = 1 + (SIDE // PATCH) ** 2
        self.positional_embedding = torch.nn.Parameter(torch.zeros(positions, VISION))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(VISION), torch.nn.LayerNorm(VISION)
        self.transformer = Transformer(VISION, DEPTHS[0], torch.zeros(positions, positions))
        self.proj = torch.nn.Parameter(torch.zeros(VISION, EMBED))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenAIClip(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        mask = torch.full((CONTEXT, CONTEXT), -1e9).triu(1)
        self.transformer = Transformer(TEXT, DEPTHS[1], mask)
        self.token_embedding = torch.nn.Embedding(VOCABULARY, TEXT)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(CONTEXT, TEXT))
        self.ln_final = torch.nn.LayerNorm(TEXT)
        self.text_projection = torch.nn.Parameter(torch.zeros(TEXT, EMBED))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
        sizes = dict(input_resolution=SIDE, context_length=CONTEXT, vocab_size=VOCABULARY)
        for name, size in sizes.items():
            self.register_buffer(name, torch.tensor(size))

    def forward(self, images, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        x = x[torch.arange(x.shape[0]), tokens.argmax(dim=-1)] @ self.text_projection
        return self.visual(images), x


@pytest.fixture(scope="session")
def clip_inputs():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    tokens = rng.integers(1, VOCABULARY - 1, (3, CONTEXT))
    tokens[np.arange(3), [3, 5, 8]] = VOCABULARY - 1
    return torch.from_numpy(images), torch.from_numpy(tokens)


@pytest.fixture(scope="session")
def clip_model():
    """Random numbers that float16 holds exactly, in every parameter."""
    torch.manual_seed(0)
    model = OpenAIClip().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            if name == "logit_scale":
                continue
            if ".ln_" in f".{name}" and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            else:
                noise = noise * (value[0].numel() if value.ndim > 1 else 100) ** -0.5
            value.copy_(noise.half().float())
    return model


@pytest.fixture(scope="session")
def clip_state(clip_model):
    """OpenAI's name -> float32 array."""
    state = {name: value.numpy().copy() for name, value in clip_model.state_dict().items()}
    return {name: value for name, value in state.items() if value.dtype == np.float32}


def as_hugging_face(state):
    """OpenAI's names -> transformers'."""
    out = {}
    for name, value in state.items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        name = name.removeprefix("visual.")
        if name in ("proj", "text_projection"):
            out["visual_projection.weight" if name == "proj" else f"{name}.weight"] = value.T
            continue
        if "attn.in_proj_" in name:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                key = name.replace("transformer.resblocks", "encoder.layers")
                key = key.replace("attn.in_proj_", f"self_attn.{part}_proj.")
                out[f"{tower}.{key}"] = third
            continue
        for theirs, hf in (
            ("transformer.resblocks", "encoder.layers"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("ln_pre", "pre_layrnorm"),
            ("ln_post", "post_layernorm"),
            ("ln_final", "final_layer_norm"),
            ("conv1", "embeddings.patch_embedding"),
            ("class_embedding", "embeddings.class_embedding"),
            ("positional_embedding", "embeddings.position_embedding.weight"),
            ("token_embedding", "embeddings.token_embedding"),
        ):
            name = name.replace(theirs, hf)
        out[name if name == "logit_scale" else f"{tower}.{name}"] = value
    return {name: np.array(value, order="C") for name, value in out.items()}


@pytest.fixture(scope="session")
def clip_hf_model(clip_state):
    """The same CLIP in transformers."""
    config = transformers.CLIPConfig(
        projection_dim=EMBED,
        vision_config=dict(
            hidden_size=VISION, intermediate_size=4 * VISION, num_hidden_layers=DEPTHS[0],
            num_attention_heads=3, image_size=SIDE, patch_size=PATCH,
        ),
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=TEXT, intermediate_size=4 * TEXT,
            num_hidden_layers=DEPTHS[1], num_attention_heads=2, max_position_embeddings=CONTEXT,
            bos_token_id=0, eos_token_id=VOCABULARY - 1,
        ),
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    state = {name: torch.from_numpy(value) for name, value in as_hugging_face(clip_state).items()}
    model.load_state_dict(state, strict=True)
    return model


def save_archive(model, inputs, path, how):
    """A TorchScript archive in float16, but for the norms and the scale, as OpenAI's are."""
    model = copy.deepcopy(model)  # whose numbers are the archive's own
    script = torch.jit.trace(model, inputs) if how == "trace" else torch.jit.script(model)
    for name, module in script.named_modules():
        if not name.split(".")[-1].startswith("ln_"):
            for key, value in module.named_parameters(recurse=False):
                if key != "logit_scale":
                    value.data = value.data.half()
    script.save(str(path))
    return path


@pytest.fixture(scope="session")
def clip_archive(clip_model, clip_inputs, tmp_path_factory):
    """TorchScript, as OpenAI published it."""
    folder = tmp_path_factory.mktemp("openai")
    return save_archive(clip_model, clip_inputs, folder / "clip.pt", "trace")


@pytest.fixture(scope="session")
def clip_hf_folder(clip_hf_model, tmp_path_factory):
    """Of save_pretrained; no tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "clip"
    clip_hf_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_file(clip_state, tmp_path_factory):
    """Safetensors without a config beside it."""
    path = tmp_path_factory.mktemp("open_clip") / "open_clip_model.safetensors"
    safetensors.numpy.save_file(clip_state, path)
    return path


def abstract_of(clip):
    """Shapes of a CLIP's parameters."""
    side = clip.image_size
    return jax.eval_shape(
        clip.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros((1, 4), jnp.int32)
    )["params"]


@pytest.fixture(scope="session")
def tools():
    """What tests make files and sizes with."""
    return types.SimpleNamespace(
        config=CONFIG,
        save_archive=save_archive,
        as_hugging_face=as_hugging_face,
        abstract_of=abstract_of,
        write_json=lambda path, content: path.write_text(json.dumps(content)),
    )
