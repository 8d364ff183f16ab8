"""FC-CLIP beside its own modules, by golden files, from a file of theirs to a panoptic map."""

import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.model import Model
from concat_jax.inference.programs import run_segmentor
from concat_jax.inference.text_tower import embed_training_names
from concat_jax.models.semantic_projector import unit
from concat_jax.weights.class_names import Classes
from concat_jax.weights.convert import load_source
from concat_jax.weights.model_folder import load_model, save_model
from tests.golden import cases

torch = pytest.importorskip("torch")


def vocabulary(texts, is_thing=None, is_seen=None):
    names, *_ = zip(*(text.split(",") for text in texts), strict=False)
    count = len(texts)
    return Vocabulary(
        names=names,
        is_thing=tuple(is_thing or (True,) * count),
        is_seen=tuple(is_seen or (True,) * count),
        category_ids=tuple(range(1, count + 1)),
        synonyms=tuple(tuple(text.split(",")[1:]) for text in texts),
    )


TRAINED = Classes(vocabulary(cases.FCCLIP_TRAINED), True, "the test")
ASKED = vocabulary(
    cases.FCCLIP_ASKED, cases.FCCLIP_IS_THING, (True, True, False, False, False, False)
)


def published_file(name, folder, **changes):
    """What FC-CLIP saves, of the golden weights."""
    weights = cases.draw_weights(cases.unpack_text(cases.load(name)["layout"]))
    weights["criterion.empty_weight"] = np.ones(len(cases.FCCLIP_TRAINED) + 1, np.float32)
    path = folder / "fcclip_cocopan.pth"
    arrays = {key: torch.from_numpy(value) for key, value in (weights | changes).items()}
    torch.save({"model": arrays}, path)
    return path


def compare(name, folder, count=None):
    """Largest relative error of each output over the first images, or all."""
    golden, tokenizer = cases.load(name), cases.fcclip_tokenizer()
    source = load_source(published_file(name, folder), named=TRAINED)
    source = embed_training_names(source, tokenizer)
    save_model(folder / "model", source.params, source.card, tokenizer=tokenizer)
    model = Model(*load_model(folder / "model"), tokenizer)
    errors, is_void = {}, []
    for number, size in enumerate(cases.FCCLIP_SIZES[name][:count]):
        image = cases.fcclip_image(size)
        sides = dict(short_side=min(size), long_side=max(size))
        predictor = model.predictor(
            model.config(
                **sides, tasks=("panoptic", "queries"), overlap_threshold=cases.FCCLIP_OVERLAP
            ),
            ASKED,
        )
        network, head = predictor.networks
        # The very program that the predictor runs below.
        size = np.array([size], np.int32)
        how = dict(is_padded=False, canvas=predictor.buckets.canvas)
        logits, queries = run_segmentor(network, image[None], size, **how)
        classified = head.projector.apply(
            {"params": head.params}, queries.queries, head.text, method="predict"
        )
        count = len(ASKED)
        found = predictor(image)
        ours = {
            "masks": logits[0, ::3, : size[0, 0] // 4 : 3, : size[0, 1] // 4 : 4],
            "seen_logits": np.delete(classified[0], np.s_[count:-1], axis=1),
            "clip": queries.clip.embeddings[0],
            "probs": np.delete(found.queries.class_probs, np.s_[count:-1], axis=1),
        }
        # Where a mask has no place on the tower's map its embedding means nothing.
        seen = np.asarray(queries.clip.is_seen[0])
        golden[f"clip_{number}"] = golden[f"clip_{number}"][seen]
        ours["clip"] = ours["clip"][seen]
        for key, array in ours.items():
            error = cases.relative_error(array, golden[f"{key}_{number}"])
            errors[key] = max(errors.get(key, 0), error)
        ids = found.panoptic.id_map
        theirs = golden[f"map_{number}"]
        labels = np.array([s["label"] for s in found.panoptic.segments])
        # Ids are other numbers for the same segments.
        pairs = np.unique(np.stack([ids.ravel(), theirs.ravel()]), axis=1)
        assert len(pairs[0]) == len(set(pairs[0])) == len(set(pairs[1])), f"maps of {size}"
        is_void.append(not ids.any())
        assert (pairs[0] == 0).tolist() == (pairs[1] == 0).tolist()
        np.testing.assert_array_equal(labels, golden[f"labels_{number}"])
    assert not all(is_void), "no map says anything"
    return errors


# Each size is a program of its own to compile.
@pytest.mark.parametrize("name, count", [("fcclip_resnet", 2), ("fcclip_convnext", 1)])
def test_equals_fcclips_own_modules(name, count, tmp_path):
    errors = compare(name, tmp_path, count)
    assert max(errors.values()) < 1e-4, errors


def test_padding_changes_nothing_but_rounding(tmp_path):
    source = load_source(published_file("fcclip_resnet", tmp_path), named=TRAINED)
    model = Model(embed_training_names(source, cases.fcclip_tokenizer()).params, source.card)
    network = model._network
    image = cases.fcclip_image((64, 96))[None]
    padded = np.pad(image, ((0, 0), (0, 32), (0, 64), (0, 0)), constant_values=200)
    size = np.array([[64, 96]], np.int32)
    # The first is a program of the test above.
    logits, alone = run_segmentor(network, image, size, is_padded=False, canvas=(96, 96))
    wide, inside = run_segmentor(network, padded, size, is_padded=True, canvas=(96, 160))
    assert cases.relative_error(wide[:, :, :16, :24], logits[:, :, :16, :24]) < 1e-4
    assert cases.relative_error(inside.queries, alone.queries) < 1e-4
    np.testing.assert_array_equal(inside.clip.is_seen, alone.clip.is_seen)
    assert cases.relative_error(unit(inside.clip.embeddings), unit(alone.clip.embeddings)) < 1e-4


def test_files_that_are_no_such_fcclip(tmp_path):
    path = published_file("fcclip_resnet", tmp_path)
    with pytest.raises(ValueError, match="was trained on 4 classes, not COCO.s 133; pass"):
        load_source(path)
    # A file that does not tell how many: what is assumed is said.
    arrays = torch.load(path, weights_only=True)["model"]
    del arrays["criterion.empty_weight"]
    torch.save(arrays, path)
    for named in (None, TRAINED):
        source = load_source(path, TRAINED.vocabulary, named)
        assert source.num_trained == 4 and "these 4 is assumed" in " ".join(source.notes)
    path = published_file("fcclip_resnet", tmp_path, **{"criterion.empty_weight": np.float32([1])})
    with pytest.raises(ValueError, match=r"empty_weight has shape \(1,\), but is one number a"):
        load_source(path, named=TRAINED)
    grass = np.zeros((7, 7), np.float32)
    path = published_file("fcclip_resnet", tmp_path, **{"sem_seg_head.predictor.grass": grass})
    with pytest.raises(ValueError, match=r"also holds 1 array .*predictor\.grass"):
        load_source(path, named=TRAINED)
    vit = published_file("fcclip_resnet", tmp_path)
    arrays = torch.load(vit, weights_only=True)["model"]
    torch.save({k: v for k, v in arrays.items() if "attnpool.pos" not in k}, vit)
    with pytest.raises(ValueError, match="its CLIP has no convolutional image tower"):
        load_source(vit, named=TRAINED)
