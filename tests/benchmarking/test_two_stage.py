"""The two paths of the speed comparison: ours is what evaluation runs, and the other is right."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from concat_jax.benchmarking.cases import Case, letterbox, pictures
from concat_jax.benchmarking.two_stage import Paths
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.heads import TextHead
from concat_jax.inference.panoptic import Fate
from concat_jax.inference.predictor import PredictConfig, Predictor, Prepared
from concat_jax.inference.programs import Network
from concat_jax.models.networks import make_networks
from tests import tiny

SIZE, NUM_QUERIES, JOINT_WIDTH = 64, 6, 16
NETWORKS = make_networks(
    tiny.model(
        clip=dict(embed_dim=JOINT_WIDTH, text_width=8, text_heads=1),
        segmentor=dict(backbone=tiny.STRIDE_4, num_queries=NUM_QUERIES),
    )
)
VOCABULARY = Vocabulary(("cat", "sky", "tree"), (True, False, True), (True, True, False), (1, 2, 3))


def random_params(name):
    """Parameters of a network, made without compiling its initialisation."""
    shapes = jax.eval_shape(lambda key: NETWORKS.init(name, key), jax.random.key(0))
    rng = np.random.default_rng(len(name))

    def fill(path, leaf):
        values = rng.normal(0, 1 / np.sqrt(max(np.prod(leaf.shape[:-1]), 1)), leaf.shape)
        is_gain = jax.tree_util.keystr(path[-1:]) == "['scale']"
        return (values + is_gain).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def inputs():
    """Parameters, text, two images, the second padded on the right, and their sizes."""
    params = {name: random_params(name) for name in ("segmentor", "projector", "clip")}
    # Every query is an object.
    kernel, bias = np.zeros((32, 4), np.float32), np.array([0, 0, 0, -50], np.float32)
    params["classifier"] = {"class_embed": {"kernel": kernel, "bias": bias}}
    rng = np.random.default_rng(0)
    text = rng.normal(size=(len(VOCABULARY), JOINT_WIDTH)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    images = rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    images[1, :, 40:] = 0
    sizes = np.array([[[64, 64], [64, 40]], [[64, 64], [60, 38]]])  # valid areas and maps
    return params, text, images, *sizes


def make_paths():
    return Paths(NETWORKS, VOCABULARY, is_padded=True, output_size=(SIZE, SIZE))


def test_our_path_is_that_of_prediction(inputs):
    params, text, images, image_size, native_size = inputs
    ours = jax.jit(make_paths().ours)(*inputs)
    head = TextHead(params["projector"], text, None, None, NETWORKS.projector)
    network = Network(params["segmentor"], NETWORKS.segmentor)
    config = PredictConfig(short_side=SIZE, long_side=SIZE, batch_size=2)
    predictor = Predictor(network, head, VOCABULARY, config)
    pairs = zip(images, image_size.tolist(), native_size.tolist(), strict=True)
    theirs = predictor.predict(
        [Prepared(i, tuple(size), tuple(native)) for i, size, native in pairs]
    )
    for ids, prediction in zip(np.asarray(ours.segment_ids), theirs, strict=True):
        id_map = prediction.panoptic.id_map
        same = ids[: id_map.shape[0], : id_map.shape[1]] == id_map
        assert same.mean() > 0.999


def test_clip_names_as_many_masks_as_asked_for(inputs):
    """Of what it names them, see tests/inference/test_clip_names.py."""
    _, _, images, *_ = inputs
    paths = make_paths()

    def with_masks(*arguments):
        params, _, images, image_size, _ = arguments
        shown = paths.two_stage(*arguments, num_masks=3)
        return shown, paths.segment(params, images, image_size)[0]

    result, masks = jax.jit(with_masks)(*inputs)
    masks = np.asarray(masks)
    assert (np.sum(np.asarray(result.tables.fates) != Fate.NO_OBJECT, axis=1) == 3).all()
    # The right part of the second image is padding: masks have no pixel there.
    assert not (masks[1, :, :, 10:] > 0).any()
    assert (np.asarray(result.num_proposals) == (masks > 0).any(axis=(2, 3)).sum(axis=1)).all()


def test_letterbox_keeps_the_aspect():
    image = np.full((30, 60, 3), 200, np.uint8)
    canvas, valid = letterbox(image, (64, 96))
    assert valid == (48, 96)
    assert (canvas[:48] == 200).all() and not canvas[48:].any()
    assert letterbox(image.transpose(1, 0, 2), (64, 96))[1] == (64, 32)


def test_pictures_of_files_and_of_random_pixels(tmp_path):
    for name, shape, value in (("a.png", (30, 60, 3), 200), ("b.png", (64, 96, 3), 100)):
        Image.fromarray(np.full(shape, value, np.uint8)).save(tmp_path / name)
    case = Case("two_stage", 64, 96, batch=2, num_images=2)
    given = pictures(dataclasses.replace(case, files=sorted(map(str, tmp_path.iterdir()))))
    assert given.images.shape == (2, 64, 96, 3)
    assert given.image_size.tolist() == [[48, 96], [64, 96]]
    assert given.native_size.tolist() == [[30, 60], [64, 96]]
    random = pictures(case)
    assert random.images.shape == (2, 64, 96, 3) and random.images.std() > 10
    assert random.image_size.tolist() == random.native_size.tolist() == [[64, 96]] * 2


def test_images_must_fill_batches():
    with pytest.raises(ValueError, match="20 images do not fill batches of 3"):
        Case("two_stage", 64, 64, batch=3)
