"""Several hosts: disjoint training data whose union is the epoch, equally many eval examples."""

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.batch import FIELDS, SEGMENT_TABLES
from concat_jax.core.prefetch import prefetch
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.augment import resize_longest
from data_pipelines.datasets import make_datasets
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.source import ImageRecord
from tests.data_pipelines.coco_world import assert_equal

NUM_IMAGES = 11


class Stripes:
    """Images of noise whose two halves are segments of two classes; a `Source` without a disk."""

    vocabulary = Vocabulary(("sky", "dog"), (False, True), (True, True), (1, 2))

    def __init__(self):
        rng = np.random.default_rng(0)
        self._pixels = rng.integers(0, 256, (NUM_IMAGES, 20, 30, 3), dtype=np.uint8)
        tables = (np.array([5, 6]), np.array([0, 1], np.int32), np.array([False, False]))
        self.records = [
            ImageRecord(100 + i, f"{i}.jpg", f"{i}.png", 20, 30, *tables) for i in range(NUM_IMAGES)
        ]

    def read(self, record):
        ids = np.ones((20, 30), np.uint8)
        ids[10:] = 2
        return Image.fromarray(self._pixels[record.image_id - 100]), ids


def _loader(**options):
    defaults = dict(seed=4, image_size=16, max_segments=3, num_threads=2)
    return SegmentationLoader(Stripes(), **(defaults | options))


@pytest.mark.parametrize("augment", ["lsj", "semantic"])
@pytest.mark.parametrize("process_count", [2, 3])
def test_hosts_share_a_global_batch_that_does_not_depend_on_their_number(augment, process_count):
    whole = _loader(augment=augment)
    hosts = [
        _loader(augment=augment, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for step in (0, 1, 5):
        shares = [host.batch(step, 6) for host in hosts]
        joined = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
        assert_equal(joined, whole.batch(step, 6))


@pytest.mark.parametrize(
    ("kind", "images", "expected"),
    [
        ("train", 0, range(40, 48)),
        ("train", 12, range(12)),  # of the fourth epoch
        ("bank", 12, range(56, 64)),  # the first batch of others is the third
        ("oracle", 12, range(56, 64)),
        ("captions", 0, None),
    ],
)
def test_hosts_share_a_batch_of_the_synthetic_world(kind, images, expected):
    config = dict(kind="synthetic", preset="texture", image_size=32, max_segments=10)
    config |= dict(eval_split="test", num_eval_images=1, caption_scene_ratio=0.25)
    config |= dict(num_train_images=images, held_out_bank=True) if images else {}

    def batch(*host):
        data = make_datasets(config, seed=3, process_index=host[0], process_count=host[1])
        if kind == "captions":
            return data.captions(8, 16)(5)
        return next(getattr(data, kind)(8)([5]))

    whole, shares = batch(0, 1), [batch(i, 2) for i in range(2)]
    assert_equal({k: np.concatenate([share[k] for share in shares]) for k in whole}, whole)
    if expected:
        assert set(whole["image_id"].tolist()) <= set(expected)


def test_seeds_of_a_world_share_the_scenes_that_its_bank_holds():
    config = dict(kind="synthetic", preset="texture", image_size=32, max_segments=10, world_seed=0)
    config |= dict(eval_split="test", num_eval_images=1, caption_scene_ratio=0.25)
    config |= dict(num_train_images=12, held_out_bank=True)
    ids = [
        next(make_datasets(config, seed=seed).bank(8)([0]))["image_id"].tolist() for seed in (1, 2)
    ]
    assert ids[0] == ids[1] == list(range(16, 24))
    with pytest.raises(ValueError, match="training scenes that end.*num_train_images=2500"):
        make_datasets(config | dict(num_train_images=0), seed=0)


def test_two_hosts_see_disjoint_data_whose_union_is_the_epoch():
    hosts = [_loader(process_index=i, process_count=2) for i in range(2)]
    # 11 steps of 2 images are two epochs of 11; one epoch ends within a step.
    steps = range(NUM_IMAGES)
    seen = [[int(host.batch(step, 2)["image_id"][0]) for step in steps] for host in hosts]
    stream = [image_id for pair in zip(*seen, strict=True) for image_id in pair]
    everything = list(range(100, 100 + NUM_IMAGES))
    assert sorted(stream[:NUM_IMAGES]) == sorted(stream[NUM_IMAGES:]) == everything
    first_epoch = [set(seen[0][:6]), set(seen[1][:5])]
    assert not first_epoch[0] & first_epoch[1]


@pytest.mark.parametrize("augment", ["lsj", "semantic", "none"])
def test_stopping_and_resuming_gives_the_same_batches(augment):
    options = dict(augment=augment, process_index=1, process_count=2)

    def batches(first, count, **ahead):
        loader = _loader(**options)
        return list(prefetch(lambda step: loader.batch(step, 6), first, count, **ahead))

    unbroken, before = batches(0, 6), batches(0, 3)
    # A new process: nothing is left of the first but the number of the step.
    after = batches(3, 3, depth=3, num_threads=2)
    for left, right in zip(unbroken, before + after, strict=True):
        assert_equal(left, right)


@pytest.mark.parametrize("process_count", [1, 2, 3, 4, 11, 13])
@pytest.mark.parametrize("num_eval_images", [None, 1, 7])
def test_every_host_evaluates_equally_many_examples(process_count, num_eval_images):
    loader = _loader(num_eval_images=num_eval_images)
    number = num_eval_images or NUM_IMAGES
    shares = [list(loader.eval_examples(i, process_count)) for i in range(process_count)]
    assert {len(share) for share in shares} == {-(-number // process_count)}
    scored = [int(e["image_id"]) for share in shares for e in share if not e["is_padding"]]
    assert sorted(scored) == list(range(100, 100 + number))  # each image once
    # Dealt out in turn, and in order of the ids.
    assert [int(e["image_id"]) for e in shares[0]] == list(range(100, 100 + number, process_count))


def test_padding_is_a_whole_example_without_segments():
    *_, last = _loader().eval_examples(1, 2)
    *_, real = _loader().eval_examples(0, 2)
    assert last["is_padding"] and not real["is_padding"]
    assert last.keys() == real.keys()
    for name, value in real.items():
        if name != "file_name":
            assert (last[name].shape, last[name].dtype) == (value.shape, value.dtype)
    assert not last["segment_ids"].any()
    for name in SEGMENT_TABLES:
        assert (last[name] == FIELDS[name].padding).all()
    fitted = resize_longest(last, 8)
    assert fitted["is_padding"] and fitted["image"].shape == (8, 8, 3)
