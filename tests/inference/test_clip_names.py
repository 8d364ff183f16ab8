"""Free names for a model that knows its own alone: CLIP on its masks, by hand and by command."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import concat_jax
from concat_jax import predict
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference import clip_names
from concat_jax.inference.clip_names import ImageTower, MaskNamer
from concat_jax.inference.heads import ClipHead, LinearHead
from concat_jax.inference.predictor import PredictConfig, Predictor, Prepared
from concat_jax.inference.programs import Network
from concat_jax.models.clip_images import cut_out, mask_windows, normalize_clip_images
from concat_jax.weights.model_folder import ModelCard, save_model
from tests import tiny

SIZE, ASKED = 64, Vocabulary(("cat", "sky", "tree"), (True,) * 3, (False,) * 3, (1, 2, 3))
NETWORKS = tiny.networks()
OWN = tiny.vocabulary()


@pytest.fixture(scope="module")
def params():
    """A segmentor, and a head that takes some of its queries for objects."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(32, len(OWN) + 1)).astype(np.float32) / 4
    bias = np.zeros(len(OWN) + 1, np.float32)
    bias[-1] = 1.5
    classifier = {"class_embed": {"kernel": kernel, "bias": bias}}
    return {"segmentor": tiny.params("segmentor", 0), "classifier": classifier}


def predictor(params, tasks, **settings):
    text = tiny.unit(np.random.default_rng(5).normal(size=(len(ASKED), 16)))
    head = ClipHead(LinearHead(params["classifier"]), jnp.asarray(text), None, jnp.float32(20))
    config = PredictConfig(tasks, short_side=SIZE, long_side=SIZE, batch_size=2, **settings)
    namer = MaskNamer(ImageTower(tiny.params("clip"), NETWORKS.clip), head.own)
    network = Network(params["segmentor"], NETWORKS.segmentor)
    return Predictor(network, head, ASKED, config, namer=namer)


@pytest.fixture(scope="module")
def images():
    """Two, the second padded on the right."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    pixels[1, :, 40:] = 0
    sizes = ((SIZE, SIZE), (SIZE, 40))
    return [Prepared(image, size, size) for image, size in zip(pixels, sizes, strict=True)]


def test_names_are_clips_and_whether_it_is_an_object_the_models(params, images, monkeypatch):
    """Beside CLIP run by hand, crop by crop; and in rounds of four, of which two overlap."""
    monkeypatch.setattr(clip_names, "MASKS_AT_ONCE", 4)
    ours = predictor(params, ("queries",))
    head = ours.networks[1]
    stride = NETWORKS.segmentor.stride

    @jax.jit
    def by_hand(image, size, logits, box):
        how = dict(stride=stride, size=16, image_size=size[None])
        crop = cut_out(image[None], logits[None, None], box[None, None], **how)
        clip = {"params": tiny.params("clip")}
        embedding = NETWORKS.clip.apply(clip, crop[:, 0], method="encode_image")[0]
        return jax.nn.softmax(20 * (embedding / jnp.linalg.norm(embedding)) @ head.text.T)

    num_named = 0
    for item, found in zip(images, ours.predict(images), strict=True):
        masks = found.queries.mask_logits
        for probs, logits in zip(found.queries.class_probs, masks, strict=True):
            np.testing.assert_allclose(probs.sum(), 1, atol=1e-5)
            if not (logits > 0).any():
                assert probs[-1] == 1
                continue
            rows, columns = np.nonzero(logits > 0)
            box = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
            size = np.array(item.image_size)
            expected = by_hand(item.image, size, logits, np.array(box, np.float32))
            np.testing.assert_allclose(probs[:-1] / (1 - probs[-1]), expected, atol=1e-4)
            num_named += 1
    assert num_named == 11  # of twelve: one mask has no pixel
    assert ours.namer.num_masks == num_named
    assert f"CLIP was shown {num_named} masks" in ours.namer.cost()


def test_masks_that_cannot_be_kept_are_not_shown_and_nothing_changes(params, images):
    of_all = [p.queries.class_probs[:, -1] for p in predictor(params, ("queries",)).predict(images)]
    loose = dict(mask_threshold=0.3, overlap_threshold=0.05)
    loose["objectness_threshold"] = float(1 - np.median(of_all))
    alone = predictor(params, ("panoptic",), **loose)
    everything = predictor(params, ("panoptic", "queries"), **loose)
    maps = [[p.panoptic for p in one.predict(images)] for one in (alone, everything)]
    for few, many in zip(*maps, strict=True):
        np.testing.assert_array_equal(few.id_map, many.id_map)
        assert few.segments == many.segments
    assert 0 < alone.namer.num_masks < everything.namer.num_masks


def test_windows_by_hand():
    masks = np.full((1, 3, 5, 6), -1.0, np.float32)
    masks[0, 0, 1:4, 2:4] = 1
    masks[0, 1, 4, 5] = 1
    windows = functools.partial(mask_windows, jnp.asarray(masks))
    assert windows().tolist() == [[[1, 2, 3, 2], [4, 5, 1, 1], [0, 0, 5, 6]]]
    assert windows(2.0, 2.0).tolist() == [[[1.5, 2, 2, 2], [3.5, 4.5, 2, 2], [-1, -1, 2, 2]]]


def test_crops_show_the_mask_alone_at_the_size_of_clip():
    """A box of 16 x 16 pixels is taken as it is: no resize, but for the half of it out of mask."""
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    logits = np.full((1, 1, 8, 8), -9.0, np.float32)
    logits[0, 0, 2:6, 1:3] = 9  # pixels 8 to 24, 4 to 12
    box = np.array([[[2, 1, 4, 4]]], np.float32)  # in logits: pixels 8 to 24, 4 to 20
    how = dict(stride=4, size=16, image_size=np.array([[32, 32]]))
    crops = jax.jit(functools.partial(cut_out, **how))(image, logits, box)
    expected = np.array(normalize_clip_images(image[:, 8:24, 4:20]))
    expected[:, :, 8:] = 0
    # Interpolated logits round the corners of a mask off, by one pixel here.
    expected[:, [[0], [-1]], [0, 7]] = 0
    np.testing.assert_allclose(crops[:, 0], expected, atol=1e-4)


@pytest.fixture(scope="module")
def folders(params, tmp_path_factory):
    """A converted model's, and a CLIP's."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("two_stage")
    sides = dict(short_side=SIZE, long_side=SIZE)
    card = ModelCard(tiny.MODEL["segmentor"], OWN, "panoptic", "tiny.pkl", True, **sides)
    save_model(folder / "m2f", params, card)
    return folder / "m2f", tiny.clip_folder(folder / "clip")


def test_a_command_and_python_name_by_clip_and_say_so(folders, tmp_path, capsys):
    m2f, clip = folders
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    flags = [f"--model={m2f}", f"--output={tmp_path / 'out'}", str(tmp_path / "photo.png")]
    how = dict(mask_threshold=0.3, overlap_threshold=0.05, objectness_threshold=0.1)
    flags += [f"--{name}={value}" for name, value in how.items()]
    predict.main(["predict", *flags, f"--clip={clip}", "--classes=red cat, sea"])
    printed = capsys.readouterr().out
    assert "Names by CLIP on each mask that may be an object: ViT of 16 x 1" in printed
    assert "CLIP was shown" in printed and "a mask took" in printed
    model = concat_jax.load(m2f, clip=clip)
    found = model(image, ["red cat", "sea"], **how)
    assert found.segments and {s.name for s in found.segments} <= {"red cat", "sea"}
    own = model(image)  # its own names are its own head's
    assert own.vocabulary == OWN

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            predict.main(["predict", *flags, *arguments])
        return str(stop.value)

    assert "is for names of one's own; give them, as --classes=" in refused(f"--clip={clip}")
    said = refused("--clip=nowhere", "--classes=cat")
    assert "nowhere" in said and "Traceback" not in said
    assert "model.json cannot be read as" in refused(
        f"--clip={m2f / 'model.json'}", "--classes=cat"
    )
    (clip / "merges.txt").rename(clip / "merges.bak")
    try:
        said = refused(f"--clip={clip}", "--classes=cat")
        assert "has no tokenizer beside it" in said and "bpe_simple_vocab" in said
    finally:
        (clip / "merges.bak").rename(clip / "merges.txt")
    flags[0] = "--model=demo"
    assert "names by text already" in refused(f"--clip={clip}", "--classes=cat")
