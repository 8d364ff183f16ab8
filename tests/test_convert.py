"""The command line for weights, from end to end on tiny models; mistakes end in one sentence."""

import json
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from concat_jax import convert
from concat_jax.models.segmentor import (
    LinearClassifier,
    make_segmentor,
    mask_logits,
    normalize_images,
)
from concat_jax.weights.model_folder import load_model
from concat_jax.weights.names.detectron2 import segmentor_params_to_detectron2
from concat_jax.weights.names.hugging_face import segmentor_params_from_hf

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
    named = segmentor_params_to_detectron2(params, CONFIG)
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

    quick = {"xla_backend_optimization_level": 0}
    logits, masks = jax.jit(predict, compiler_options=quick)(params, images)
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
    assert "--to=onnx is unknown; use orbax or hf" in error_of(folder, new, "--to=onnx")
    assert "is not a local path" in error_of(folder, "gs://bucket/model")
    assert "--task=depth is unknown" in error_of(folder, new, "--task=depth")
    assert "no file or folder" in error_of(tmp_path / "absent", new)
    assert "neither model.json" in error_of(tmp_path, new)
    assert "is there already" in error_of(hf_folder, folder)
    assert "which is not a file" in error_of(folder, new, f"--classes={tmp_path / 'absent'}")
    assert "sizes stand in its config.json" in error_of(hf_folder / "model.safetensors", new)
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / "clip.pt")
    assert "unknown model (visual.proj)" in error_of(tmp_path / "clip.pt", new)
    broken = {k: v for k, v in arrays.items() if "decoder_norm.bias" not in k}
    torch.save(broken, tmp_path / "broken.pth")
    assert "lacks 1 arrays" in error_of(tmp_path / "broken.pth", new)
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
