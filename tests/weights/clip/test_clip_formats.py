"""One CLIP in every format that people have it in."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from concat_jax.core.arrays import fingerprint
from concat_jax.models.clip import make_clip
from concat_jax.weights.clip import clip_tokenizer_folder, read_clip

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5
SIZES = {"input_resolution", "context_length", "vocab_size"}


def encode(weights, inputs):
    """Embeddings by a CLIP of the fields that were read."""
    images, tokens = (value.numpy() for value in inputs)
    images, tokens = images.transpose(0, 2, 3, 1), tokens.astype(np.int32)
    return jax.jit(make_clip(weights.config).apply)({"params": weights.params}, images, tokens)


@pytest.mark.parametrize("how", ["trace", "script"])
def test_an_archive_of_openai_computes_what_its_program_does(
    clip_model, clip_inputs, tools, tmp_path, how
):
    path = tools.save_archive(clip_model, clip_inputs, tmp_path / "clip.pt", how)
    weights = read_clip(path)
    assert weights.config == tools.config
    assert (weights.kind, weights.assumed) == ("OpenAI", ())
    assert weights.source == str(path)
    with torch.no_grad():
        theirs = clip_model(*clip_inputs)
    image, text, scale = encode(weights, clip_inputs)
    np.testing.assert_allclose(image, theirs[0], atol=TOLERANCE)
    np.testing.assert_allclose(text, theirs[1], atol=TOLERANCE)
    assert np.abs(theirs[0]).max() > 0.1 < np.abs(theirs[1]).max()
    np.testing.assert_allclose(scale, np.exp(2.5), rtol=1e-6)
    # Scripting keeps plain attributes, here a mask a layer; tracing does not.
    ignored = {name.split(".")[-1] for name in weights.report.ignored}
    assert ignored == (SIZES if how == "trace" else SIZES | {"attn_mask"})


def test_the_same_numbers_in_every_format(
    clip_model, clip_state, clip_archive, clip_hf_folder, open_clip_file, tools, tmp_path
):
    state = {name: torch.from_numpy(value) for name, value in clip_state.items()}
    with_sizes, plain = tmp_path / "with_sizes.pt", tmp_path / "plain.pt"
    torch.save(clip_model.state_dict(), with_sizes)
    torch.save(state, plain)
    checkpoint = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, checkpoint)
    half = tmp_path / "half.safetensors"
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in clip_state.items()}, half)
    newer = tmp_path / "newer.safetensors"  # open_clip's class with a text tower of its own
    shared = ("visual.", "logit_scale")
    renamed = {k if k.startswith(shared) else f"text.{k}": v for k, v in clip_state.items()}
    mask = np.zeros((tools.config["context_length"],) * 2, np.float32)
    safetensors.numpy.save_file({**renamed, "text.attn_mask": mask}, newer)
    older = tmp_path / "older"  # a folder of transformers before 4.31
    older.mkdir()
    (older / "config.json").write_bytes((clip_hf_folder / "config.json").read_bytes())
    in_hf = {k: torch.from_numpy(v) for k, v in tools.as_hugging_face(clip_state).items()}
    positions = torch.arange(tools.config["context_length"])[None]
    torch.save(
        {**in_hf, "text_model.embeddings.position_ids": positions}, older / "pytorch_model.bin"
    )
    parts = tmp_path / "parts"  # weights over two files
    parts.mkdir()
    (parts / "config.json").write_bytes((clip_hf_folder / "config.json").read_bytes())
    index = {name: f"part{i % 2}.bin" for i, name in enumerate(in_hf)}
    for file in ("part0.bin", "part1.bin"):
        torch.save({k: v for k, v in in_hf.items() if index[k] == file}, parts / file)
    tools.write_json(parts / "pytorch_model.bin.index.json", {"weight_map": index})
    alone = tmp_path / "alone.safetensors"  # without its config.json
    alone.write_bytes((clip_hf_folder / "model.safetensors").read_bytes())

    everything = ("image_heads", "text_heads", "activation")
    end = tools.config["vocab_size"] - 1
    expected = {  # kind, activation, end of text, assumed
        clip_archive: ("OpenAI", "quick_gelu", None, ()),
        with_sizes: ("OpenAI", "quick_gelu", None, ()),
        plain: ("OpenAI", "quick_gelu", None, everything),
        checkpoint: ("open_clip", "gelu", None, everything),
        open_clip_file: ("open_clip", "gelu", None, everything),
        open_clip_file.parent: ("open_clip", "gelu", None, everything),
        half: ("open_clip", "gelu", None, everything),
        newer: ("open_clip", "gelu", None, everything),
        clip_hf_folder: ("Hugging Face", "quick_gelu", end, ()),
        clip_hf_folder / "model.safetensors": ("Hugging Face", "quick_gelu", end, ()),
        older: ("Hugging Face", "quick_gelu", end, ()),
        parts: ("Hugging Face", "quick_gelu", end, ()),
        alone: ("Hugging Face", "quick_gelu", None, everything),
    }
    fingerprints = set()
    for path, (kind, activation, eot_id, assumed) in expected.items():
        weights = read_clip(path)
        print(weights)
        assert weights.config == {**tools.config, "activation": activation, "eot_id": eot_id}
        assert (weights.kind, weights.assumed) == (kind, assumed), path
        for leaf in jax.tree.leaves(weights.params):
            assert leaf.dtype == np.float32 and leaf.flags.c_contiguous and leaf.flags.owndata
        fingerprints.add(fingerprint(weights.params))
    assert len(fingerprints) == 1


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "model._orig_mod.module."])
@pytest.mark.parametrize("is_hf", [False, True])
def test_what_stands_before_every_name_is_taken_off_and_said(
    clip_state, tools, tmp_path, prefix, is_hf
):
    state = tools.as_hugging_face(clip_state) if is_hf else clip_state
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, path)
    plain = fingerprint(read_clip(path).params)
    safetensors.numpy.save_file({f"{prefix}{k}": v for k, v in state.items()}, path)
    weights = read_clip(path)
    assert fingerprint(weights.params) == plain
    assert "was taken off the names of the file" in str(weights)


def test_a_folder_computes_what_transformers_does(clip_hf_model, clip_hf_folder, clip_inputs):
    images, tokens = clip_inputs
    with torch.no_grad():
        theirs = clip_hf_model(input_ids=tokens, pixel_values=images)
    image, text, _ = encode(read_clip(clip_hf_folder), clip_inputs)
    image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    np.testing.assert_allclose(image, theirs.image_embeds, atol=TOLERANCE)
    np.testing.assert_allclose(text, theirs.text_embeds, atol=TOLERANCE)


def test_the_line_that_says_what_was_loaded(clip_archive, open_clip_file, clip_hf_folder):
    count = sum(v.size for v in jax.tree.leaves(read_clip(clip_archive).params))
    line = str(read_clip(open_clip_file))
    assert line == (
        f"ViT of 192 x 2 on patches of 4 with text of 128 x 3 at 16 pixels from {open_clip_file} "
        f"(open_clip): {count:,} numbers in {14 + 16 * 5} arrays loaded, 0 entries ignored; "
        "assumed, since nothing beside the file tells: image_heads 3, text_heads 2, "
        "activation 'gelu'"
    )
    assert "(OpenAI)" in str(read_clip(clip_archive)) and "vocab_size" in str(
        read_clip(clip_archive)
    )
    assert "assumed" not in str(read_clip(clip_hf_folder))


def test_tokenizer_files_are_found_beside_the_weights(clip_hf_folder, open_clip_file, tmp_path):
    assert clip_tokenizer_folder(clip_hf_folder) is None
    file = tmp_path / "weights.safetensors"
    file.write_bytes(open_clip_file.read_bytes())
    (tmp_path / "vocab.json").write_text("{}")
    assert clip_tokenizer_folder(file) is None
    (tmp_path / "merges.txt").write_text("")
    assert clip_tokenizer_folder(file) == tmp_path
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert clip_tokenizer_folder(file) == clip_tokenizer_folder(tmp_path) == tmp_path
