"""The command line for weights, from end to end on tiny models; mistakes end in one sentence."""

import codecs
import errno
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from concat_jax import convert
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier, mask_logits, normalize_images
from concat_jax.weights.disk import check_destination
from concat_jax.weights.model_folder import load_model
from concat_jax.weights.names.mask2former import detectron2
from concat_jax.weights.names.table import to_theirs
from concat_jax.weights.segmentors import segmentor_params_from_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 1, 1, 1), "width": 8},
    "width": 32,
    "num_queries": 5,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "ffn_width": 16,
    "decoder_ffn_width": 24,
}


def make_model(num_labels, **labels):
    backbone = transformers.ResNetConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[32, 64, 128, 256],
        embedding_size=8,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=5,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=24,
        **(labels or {"num_labels": num_labels}),
    )
    torch.manual_seed(0)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module")
def model():
    names = {0: "cat", 1: "sky-other-merged", 2: "dog"}
    return make_model(3, id2label=names, label2id={v: k for k, v in names.items()})


@pytest.fixture(scope="module")
def hf_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "mask2former-tiny-coco-panoptic"
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arrays(model):
    """The model under Detectron2's names, as tensors."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    params, _ = segmentor_params_from_hf(state, CONFIG)
    named = to_theirs(params, detectron2("resnet"))
    return {name: torch.from_numpy(array) for name, array in named.items()}


def run(*arguments):
    convert.main(["convert", *map(str, arguments)])


def error_of(*arguments):
    """The one sentence in which a mistake ends."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    message = error.value.code
    assert message.startswith("Error: ") and "\n" not in message and "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def folder(hf_folder, tmp_path_factory):
    """`hf_folder` converted."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    run(hf_folder, folder)
    return folder


def test_from_hugging_face(hf_folder, model, tmp_path, capsys):
    run(hf_folder, tmp_path / "model")
    printed = capsys.readouterr().out
    params, card = load_model(tmp_path / "model")
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    wanted, _ = segmentor_params_from_hf(state, CONFIG)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, wanted)))
    assert make_segmentor(card.segmentor) == make_segmentor(CONFIG)
    # The names are COCO's, and so are ids and flags.
    assert card.vocabulary.names == ("cat", "sky-other-merged", "dog")
    assert card.vocabulary.is_thing == (True, False, True) and card.knows_things
    assert card.vocabulary.category_ids == (17, 187, 18)
    assert (card.task, card.source) == ("panoptic", "mask2former-tiny-coco-panoptic")
    for line in ("backbone  ", "pixel decoder  ", "transformer decoder  ", "class head  "):
        assert f"{line} " in printed.replace("decoder loaded", "decoder   loaded")
    assert "newly initialised 0 arrays" in printed
    assert "Classes: 3, 2 of them things; from id2label" in printed
    assert f"Wrote {tmp_path / 'model'}." in printed


def test_back_to_hugging_face(hf_folder, folder, model, tmp_path):
    """transformers loads what we write, key by key, and gives the same outputs."""
    run(folder, tmp_path / "hf", "--to=hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    again, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    bookkeeping = {k for k in model.state_dict() if k.endswith(("tracked", "empty_weight"))}
    assert set(info["missing_keys"]) <= bookkeeping
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config.id2label == model.config.id2label
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = again.eval()(images), model(images)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == pytest.approx([0.485, 0.456, 0.406])
    # And once more to ours: nothing of the card is lost but where it came from.
    run(tmp_path / "hf", tmp_path / "ours")
    (params, card), (first, old) = load_model(tmp_path / "ours"), load_model(folder)
    assert (card.vocabulary, card.task) == (old.vocabulary, old.task)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, first)))


def test_converted_weights_give_the_same_outputs(folder, model):
    params, card = load_model(folder)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    images = np.array(normalize_images(images))

    def predict(params, images):
        output = make_segmentor(card.segmentor).apply({"params": params["segmentor"]}, images)
        head = LinearClassifier(len(card.vocabulary))
        logits = head.apply({"params": params["classifier"]}, output.queries[:, -1])
        return logits, mask_logits(output.mask_embeddings[:, -1], output.mask_features)

    # With loops as users' are: another rounding flips a bit of an attention mask.
    options = {"xla_cpu_use_fusion_emitters": True}
    logits, masks = jax.jit(predict, compiler_options=options)(params, images)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    for ours, reference in (
        (logits, theirs.class_queries_logits),
        (masks, theirs.masks_queries_logits),
    ):
        np.testing.assert_allclose(ours, reference, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("name", ["model_final.pth", "model_final.pkl"])
def test_from_detectron2(arrays, folder, tmp_path, capsys, name):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save({"model": arrays, "optimizer": {"state": {0: torch.ones(3)}}}, path)
    else:
        named = {k: v.numpy() for k, v in arrays.items()}
        path.write_bytes(pickle.dumps({"model": named, "__author__": "third_party"}))
    run(path, tmp_path / "model")
    printed = capsys.readouterr().out
    params, card = load_model(tmp_path / "model")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, load_model(folder)[0])))
    assert make_segmentor(card.segmentor) == make_segmentor(CONFIG)
    assert card.vocabulary.names == ("class_0", "class_1", "class_2")
    assert not card.knows_things and card.task == ""
    assert ("optimizer" if path.suffix == ".pth" else "__author__") in printed
    assert "pass --classes" in printed


def test_133_classes_without_names_are_cocos(arrays, tmp_path, capsys):
    head = "sem_seg_head.predictor.class_embed"
    many = {**arrays, f"{head}.weight": torch.ones(134, 32), f"{head}.bias": torch.ones(134)}
    many["new_fc.weight"], many["new_fc.bias"] = torch.ones(134, 32), torch.ones(134)
    torch.save({"model": many}, tmp_path / "pading.pth")
    run(tmp_path / "pading.pth", tmp_path / "model")
    printed = capsys.readouterr().out
    _, card = load_model(tmp_path / "model")
    assert len(card.vocabulary) == 133 and sum(card.vocabulary.is_thing) == 80
    assert card.vocabulary.names[:2] == ("person", "bicycle")
    assert all(card.vocabulary.is_seen) and card.knows_things and card.task == "panoptic"
    assert "133, 80 of them things; from COCO panoptic's" in printed
    assert "PADing's second stage" in printed and "new_fc.weight [134, 32]" in printed


def test_class_names_of_a_file(arrays, tmp_path):
    torch.save(arrays, tmp_path / "a.pth")
    classes = tmp_path / "classes.txt"
    classes.write_text("road\ncar\nsky\n")
    run(tmp_path / "a.pth", tmp_path / "model", f"--classes={classes}", "--task=semantic")
    _, card = load_model(tmp_path / "model")
    assert card.vocabulary.names == ("road", "car", "sky") and card.task == "semantic"
    # As --split=FILE of evaluation numbers and reads them, and as predict does.
    assert card.vocabulary.category_ids == (1, 2, 3) and all(card.vocabulary.is_seen)
    classes.write_text("road\nroad\nsky\n")
    message = error_of(tmp_path / "a.pth", tmp_path / "new", f"--classes={classes}")
    assert "names 'road' in line 1 and again in line 2" in message


def test_another_number_of_classes_needs_a_new_head(folder, tmp_path, capsys):
    classes = tmp_path / "classes.json"
    entries = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(5)]
    classes.write_text(json.dumps(entries))
    message = error_of(folder, tmp_path / "model", f"--classes={classes}")
    assert "names 5 classes, but the class head is for 3; pass --reinit_head" in message
    assert not (tmp_path / "model").exists()
    run(folder, tmp_path / "model", f"--classes={classes}", "--reinit_head")
    assert "newly initialised 2 arrays (198 numbers): classifier/" in capsys.readouterr().out
    params, card = load_model(tmp_path / "model")
    assert params["classifier"]["class_embed"]["kernel"].shape == (32, 6)
    assert len(card.vocabulary) == 5 and card.knows_things
    old, _ = load_model(folder)
    same = jax.tree.map(np.array_equal, params["segmentor"], old["segmentor"])
    assert all(jax.tree.leaves(same))


def test_backbone_of_imagenet(arrays, tmp_path, capsys):
    backbone = {k.removeprefix("backbone."): v for k, v in arrays.items() if "backbone" in k}
    torch.save(backbone, tmp_path / "R-50.pth")
    run(tmp_path / "R-50.pth", tmp_path / "model")
    params, card = load_model(tmp_path / "model")
    assert set(params) == {"segmentor"} and set(params["segmentor"]) == {"backbone"}
    assert card.vocabulary is None
    assert "there is no class head" in capsys.readouterr().out
    assert "a backbone alone" in error_of(tmp_path / "model", tmp_path / "hf", "--to=hf")
    assert "a backbone alone" in error_of(tmp_path / "model", tmp_path / "x", "--reinit_head")


def test_mistakes_end_in_one_sentence(arrays, hf_folder, folder, tmp_path):
    new = tmp_path / "new"
    assert "give a source and a destination" in error_of(folder)
    assert "no flag '--reinit_haed'; did you mean '--reinit_head'?" in error_of(
        folder, new, "--reinit_haed"
    )
    assert "--to is unknown: 'onnx'; there are orbax, hf." in error_of(folder, new, "--to=onnx")
    assert "--task is unknown: 'depth'; there are panoptic, " in error_of(
        folder, new, "--task=depth"
    )
    assert "no file or folder" in error_of(tmp_path / "absent", new)
    assert "neither model.json" in error_of(tmp_path, new)
    assert "is there already" in error_of(hf_folder, folder)
    under_file = folder / "model.json" / "new"
    assert f"model.json is a file and {under_file} below it" in error_of(folder, under_file)
    assert "There is no file of classes" in error_of(
        folder, new, f"--classes={tmp_path / 'absent'}"
    )
    assert "sizes stand in its config.json" in error_of(hf_folder / "model.safetensors", new)
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / "clip.pt")
    assert "unknown model (visual.proj)" in error_of(tmp_path / "clip.pt", new)
    broken = {k: v for k, v in arrays.items() if "decoder_norm.bias" not in k}
    torch.save(broken, tmp_path / "broken.pth")
    assert "lacks 1 array that" in error_of(tmp_path / "broken.pth", new)
    (tmp_path / "empty.pth").touch()
    assert "it is empty" in error_of(tmp_path / "empty.pth", new)
    assert not new.exists()


def test_preprocessing_other_than_ours_is_refused(hf_folder, tmp_path):
    other = tmp_path / "hf"
    other.mkdir()
    for path in hf_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    assert "image_mean [0.5, 0.5, 0.5]" in error_of(other, tmp_path / "new")
    (other / "model.safetensors").unlink()
    path.unlink()
    assert "holds no weights" in error_of(other, tmp_path / "new")


def copied(hf_folder, folder, **changes):
    """The Hugging Face folder with other entries of its config.json."""
    shutil.copytree(hf_folder, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_the_classes_of_the_flag_win_over_the_sources(hf_folder, tmp_path, capsys):
    odd = copied(hf_folder, tmp_path / "odd", id2label={"0": "a", "7": "b", "9": "c", "255": "d"})
    message = error_of(odd, tmp_path / "model")
    # Both remedies of the sentence are carried out.
    assert "pass --classes=FILE with 3 names, or --reinit_head for a new head of 4" in message
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    run(odd, tmp_path / "named", f"--classes={names}")
    assert load_model(tmp_path / "named")[1].vocabulary.names == ("x", "y", "z")
    run(odd, tmp_path / "new", "--reinit_head")
    params, card = load_model(tmp_path / "new")
    assert card.vocabulary.names == ("a", "b", "c", "d")
    assert params["classifier"]["class_embed"]["bias"].shape == (5,)
    names.write_text("x\ny\n")
    run(odd, tmp_path / "two", f"--classes={names}", "--reinit_head")
    assert load_model(tmp_path / "two")[1].vocabulary.names == ("x", "y")
    assert "numbers its classes 0, 7, 9, 255" in capsys.readouterr().out


@pytest.mark.parametrize(
    "id2label, names, note",
    [
        (
            {"0": "BACKGROUND", "1": "a", "255": "LESION"},
            "BACKGROUND a LESION",
            "0, 1, 255; they are",
        ),
        (
            {"1": "cat", "2": "dog", "3": "sky"},
            "cat dog sky",
            "1, 2, 3; they are taken in ascending",
        ),
        ({"0": "", "1": "dog", "2": "sky"}, "class_0 dog sky", "has no name for class_0"),
        ({str(i): n for i, n in enumerate("abcd")}, "a b c", "names 4 classes"),
    ],
)
def test_id2label_that_is_not_0_to_k(hf_folder, tmp_path, capsys, id2label, names, note):
    run(copied(hf_folder, tmp_path / "hf", id2label=id2label), tmp_path / "model")
    assert note in capsys.readouterr().out
    assert load_model(tmp_path / "model")[1].vocabulary.names == tuple(names.split())


@pytest.mark.parametrize(
    "prefix, source",
    [
        ("_orig_mod.", "hugging_face"),
        ("module.", "hugging_face"),
        ("model.", "hugging_face"),
        ("model.", "headless"),
        ("_orig_mod.module.", "headless"),
        ("model.", "detectron2"),
        ("_orig_mod.module.", "detectron2"),
        ("module.model.", "imagenet"),
    ],
)
def test_prefixes_are_taken_off(hf_folder, arrays, folder, tmp_path, capsys, prefix, source):
    if source in ("hugging_face", "headless"):
        path = copied(hf_folder, tmp_path / "source")
        state = safetensors.numpy.load_file(path / "model.safetensors")
        state = {
            prefix + k: v
            for k, v in state.items()
            if source == "hugging_face" or not k.startswith("class_predictor")
        }
        safetensors.numpy.save_file(state, path / "model.safetensors")
    else:
        path = tmp_path / "source.pth"
        part = "backbone." if source == "imagenet" else ""
        torch.save({prefix + k.removeprefix(part): v for k, v in arrays.items() if part in k}, path)
    run(path, tmp_path / "model")
    assert "was taken off the names of the file" in capsys.readouterr().out
    params, (wanted, _) = load_model(tmp_path / "model")[0], load_model(folder)
    if source in ("headless", "imagenet"):
        del wanted["classifier"]
    if source == "imagenet":
        wanted = {"segmentor": {"backbone": wanted["segmentor"]["backbone"]}}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, wanted)))


def test_the_size_of_the_networks_input_is_kept_both_ways(hf_folder, tmp_path, capsys):
    path = copied(hf_folder, tmp_path / "hf") / "preprocessor_config.json"
    size = {"shortest_edge": 480, "longest_edge": 640}
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": size}))
    run(tmp_path / "hf", tmp_path / "model")
    assert "a shorter side of 480 and a longer one of at most 640" in capsys.readouterr().out
    card = load_model(tmp_path / "model")[1]
    assert (card.short_side, card.long_side) == (480, 640)
    run(tmp_path / "model", tmp_path / "back", "--to=hf")
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["size"] == size


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", b"[]", "config.json holds a list; it must be a JSON object"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", gzip.compress(b"{}", mtime=0), "config.json is compressed with gzip"),
        ("config.json", b"\xff\xfe{\0}\0", "config.json is no text in UTF-8"),
        ("preprocessor_config.json", b"[]", "preprocessor_config.json holds a list"),
        ("model.safetensors", None, "model.safetensors cannot be read as weights: it is cut off"),
        ("model.safetensors", b"", "model.safetensors cannot be read as weights: it is empty"),
    ],
)
def test_damaged_folders(hf_folder, tmp_path, name, content, message):
    path = copied(hf_folder, tmp_path / "hf") / name
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    assert message in error_of(tmp_path / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_byte_order_mark_in_configs_and_classes(hf_folder, tmp_path):
    folder = copied(hf_folder, tmp_path / "hf")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    names = tmp_path / "names.txt"
    names.write_bytes(codecs.BOM_UTF8 + b"person\r\ndog\r\nsky\r\n")
    run(folder, tmp_path / "model", f"--classes={names}")
    assert load_model(tmp_path / "model")[1].vocabulary.names == ("person", "dog", "sky")


def test_what_is_exported_is_as_readable_as_any_new_file(folder, tmp_path):
    umask = os.umask(0o027)
    try:
        for to in ("hf", "orbax"):
            run(folder, tmp_path / to, f"--to={to}")
            modes = {p: p.stat().st_mode & 0o777 for p in (tmp_path / to).rglob("*")}
            assert all(mode == (0o750 if p.is_dir() else 0o640) for p, mode in modes.items()), modes
    finally:
        os.umask(umask)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rust_full(*_, **__):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")


def orbax_full(*_, **__):
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "a/0.0" in OCDBT: No space left on device')


@pytest.mark.parametrize(
    "to, place, writer",
    [
        ("hf", "safetensors.numpy.save_file", rust_full),
        ("hf", "concat_jax.core.files.write_json", full),
        ("orbax", "orbax.checkpoint.PyTreeCheckpointer.save", orbax_full),
        ("orbax", "orbax.checkpoint.PyTreeCheckpointer.save", full),
    ],
)
def test_a_full_disk(folder, tmp_path, monkeypatch, to, place, writer):
    hook = sys.excepthook
    monkeypatch.setattr(place, writer)
    message = error_of(folder, tmp_path / "new", f"--to={to}")
    assert "No space left on device" in message and str(tmp_path / "new") in message
    assert not list(tmp_path.iterdir()) and sys.excepthook is hook


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=9, free=1000))
    message = error_of(folder, tmp_path / "a" / "new")
    assert "it takes 0." in message and "has 0.0 MB left; make room" in message
    assert not list(tmp_path.iterdir())


def test_help_and_exit_code(tmp_path, capsys):
    run("--help")
    assert "--reinit_head" in capsys.readouterr().out.replace("[no]", "")
    command = [sys.executable, "-m", "concat_jax.convert", tmp_path / "absent", tmp_path / "new"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"Error: There is no file or folder {tmp_path / 'absent'}."
    )
    assert "Traceback" not in result.stderr


def test_a_training_run_and_the_source_itself_are_never_overwritten(tmp_path):
    """--overwrite is for models; a run of days has a config.json, too."""
    run = tmp_path / "run"
    (run / "con" / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training run, which --overwrite leaves alone"):
        check_destination(run, overwrite=True)
    for destination in (run, tmp_path):
        with pytest.raises(SystemExit, match="would be lost; name another folder"):
            convert.main(["convert", str(run), str(destination), "--overwrite"])
    assert (run / "con" / "checkpoints").is_dir()
