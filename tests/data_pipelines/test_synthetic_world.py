"""The synthetic world: the batch contract, determinism, the seen-unseen wall and the drawing."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.synthetic import patterns, render
from data_pipelines.synthetic import world as worlds
from data_pipelines.synthetic.attributes import AttributeClass
from data_pipelines.synthetic.presets import PRESETS, WorldClass
from data_pipelines.synthetic.world import SPLITS, CaptionWorld, SyntheticWorld, caption
from tests.data_pipelines.coco_world import assert_equal


def test_pictures_are_valid_all_over_and_show_something():
    batch = SyntheticWorld(batch_size=3, max_segments=10, image_size=48).batch(2)
    assert (batch["image_size"] == 48).all() and batch["image"].std() > 20


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_ids_are_contiguous_and_match_the_tables(preset):
    world = SyntheticWorld(preset=preset, classes="all")
    is_thing = np.array([*world.vocabulary.is_thing, False])  # index -1 is padding
    for index in range(80):
        example = world.example(index)
        labels = example["segment_labels"]
        count = int((labels >= 0).sum())
        assert (labels[:count] >= 0).all() and (labels[count:] == -1).all()
        present = np.unique(example["segment_ids"])
        np.testing.assert_array_equal(present[present > 0], np.arange(1, count + 1))
        source_ids = example["segment_source_ids"]
        np.testing.assert_array_equal(source_ids[:count], np.arange(1, count + 1))
        assert (source_ids[count:] == 0).all()
        np.testing.assert_array_equal(example["segment_is_thing"], is_thing[labels])
        stuff = labels[:count][~example["segment_is_thing"][:count]]
        assert len(set(stuff)) == len(stuff), "stuff is merged by class"
        areas = np.bincount(example["segment_ids"].ravel(), minlength=count + 1)[1:]
        assert (areas >= 40).all()


def test_scene_depends_on_seed_split_and_index_only():
    world = SyntheticWorld(seed=5, batch_size=4)
    again, halves = SyntheticWorld(seed=5, batch_size=4), SyntheticWorld(seed=5, batch_size=2)
    batch = world.batch(1)
    again.batch(0)  # earlier calls must not move later ones
    assert_equal(batch, again.batch(1))
    parts = [halves.batch(2), halves.batch(3)]
    assert_equal(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})
    assert_equal(world.example(6), {k: v[2] for k, v in batch.items()})
    assert not np.array_equal(
        batch["image"], SyntheticWorld(seed=6, batch_size=4).batch(1)["image"]
    )


def test_splits_and_scenes_are_disjoint():
    worlds = [SyntheticWorld(split=s, classes="all") for s in SPLITS]
    images = {world.example(i)["image"].tobytes() for world in worlds for i in range(20)}
    ids = {int(world.example(i)["image_id"]) for world in worlds for i in range(20)}
    assert len(images) == len(ids) == 60
    captions = [CaptionWorld(split=s, scene_ratio=1.0, crop_size=64, batch_size=4) for s in SPLITS]
    pictures = {i.tobytes() for w in captions for i in w.batch(0)["image"]}
    assert len(pictures) == 12 and not pictures & images


def test_eval_examples_are_the_first_scenes():
    world = SyntheticWorld(split="validation", num_eval_images=3)
    examples = list(world.eval_examples())
    assert [e.pop("file_name") for e in examples] == [f"validation_00000{i}.png" for i in range(3)]
    for index, example in enumerate(examples):
        assert_equal(example, world.example(index))


def test_batches_of_so_many_scenes_show_each_once_an_epoch():
    """Each epoch in another order, and an epoch may end within a batch."""
    world = SyntheticWorld(num_train_images=10, batch_size=4)
    ids = np.concatenate([world.batch(step)["image_id"] for step in range(5)])
    first, second = ids[:10].tolist(), ids[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != sorted(first)
    far = world.batch(1 << 24)  # where another seed of a shared world begins
    assert set(far["image_id"].tolist()) < set(first)
    assert_equal(far, SyntheticWorld(num_train_images=10, batch_size=4).batch(1 << 24))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("classes", ["seen", "unseen", "all"])
def test_only_allowed_classes_are_drawn(preset, classes, monkeypatch):
    """What is asked for its look is painted, so that voided segments count too."""
    asked = set()
    for kind in (WorldClass, AttributeClass):
        look = kind.look

        def spy(entry, rng, is_thing, look=look):
            asked.add(entry.name)
            return look(entry, rng, is_thing)

        monkeypatch.setattr(kind, "look", spy)
    world = SyntheticWorld(preset=preset, classes=classes)
    labels = np.concatenate([world.example(i)["segment_labels"] for i in range(150)])
    wanted = {
        e.name for e in world.preset.classes if classes == "all" or e.is_seen == (classes == "seen")
    }
    assert asked <= wanted and len(asked) > 0.9 * len(wanted)
    names = {world.vocabulary.names[k] for k in labels if k >= 0}
    assert names <= asked and len(names) > 0.9 * len(wanted)


def test_small_and_hidden_segments_become_void(monkeypatch):
    owner = np.full((64, 64), 2, np.uint8)
    owner[0, :39] = 1  # stuff of 39 px: void
    owner[10, :40] = 3  # thing of 40 px of 101 px: under 40 % visible, void
    owner[20, :40] = 4  # thing of 40 px of 100 px: kept
    owner[30, :39] = 5  # thing of 39 px, all visible: void
    full_areas = np.array([101, 100, 39])
    image = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(render, "paint_scene", lambda *a, **k: (image, owner, full_areas))
    monkeypatch.setattr(worlds, "NUM_STUFF", (2, 2))
    preset = dataclasses.replace(PRESETS["texture"], num_things=(3, 3))
    world = SyntheticWorld(preset=preset, classes="all")
    example = world.example(0)
    expected = np.select([owner == 2, owner == 4], [1, 2], 0)
    np.testing.assert_array_equal(example["segment_ids"], expected)
    assert (example["segment_labels"] >= 0).sum() == 2
    np.testing.assert_array_equal(example["segment_is_thing"][:3], [False, True, False])
    # Twice the size has four times the area: 40 px are no longer enough.
    monkeypatch.setattr(
        render, "paint_scene", lambda *a, **k: (image, owner, np.array([40, 40, 39]))
    )
    large = SyntheticWorld(preset=preset, image_size=128)
    assert (large.example(0)["segment_labels"] >= 0).sum() == 1


def test_things_occlude_each_other_and_both_sides_stay_common():
    rng = np.random.default_rng(0)
    ground = WorldClass("ground", True, "grey", "smooth").look(rng, is_thing=False)
    thing = WorldClass("thing", True, "red", "striped", "round").look(rng, is_thing=True)
    hidden = 0
    for _ in range(100):
        _, owner, full = render.paint_scene(
            rng, [ground], [thing] * 3, size=64, scale=1.0, radius=(8.0, 15.0)
        )
        for number, area in enumerate(full):
            rows, columns = np.nonzero(owner == 2 + number)
            inside = len(rows) and min(rows.min(), columns.min()) > 0
            inside = inside and max(rows.max(), columns.max()) < 63
            hidden += bool(inside and len(rows) < 0.95 * area)
    assert 20 <= hidden <= 200


def test_same_scene_at_twice_the_resolution():
    small, large = SyntheticWorld(image_size=64), SyntheticWorld(image_size=128)
    for index in range(6):
        a, b = small.example(index), large.example(index)
        np.testing.assert_array_equal(a["segment_labels"], b["segment_labels"])
        halved = b["image"].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - a["image"]).mean() < 8
        assert (b["segment_ids"][::2, ::2] == a["segment_ids"]).mean() > 0.95


@pytest.mark.parametrize("name", sorted(patterns.SHAPES))
def test_shapes_are_distances_of_similar_size(name):
    step = 1 / 64
    axis = np.arange(-1.5, 1.5, step, dtype=np.float32)
    distance = patterns.SHAPES[name](axis[None, :], axis[:, None])
    inside = distance <= 0
    radius = np.hypot(axis[None, :], axis[:, None])
    # The least area makes a radius of 8 px a thing of more than 40 px with half of it hidden.
    assert 1.25 < inside.sum() * step**2 < np.pi
    assert radius[inside].max() <= 1.02
    # Edges are one pixel wide only where the gradient on the outline is about one.
    slope = np.hypot(*np.gradient(distance, step))[np.abs(distance) < 0.03]
    assert 0.7 < np.median(slope) < 1.2


def test_thing_textures_have_their_share_and_period():
    axis = np.arange(110, dtype=np.float32)
    u, v = axis[None, :], axis[:, None]
    fields = {
        name: np.broadcast_to(field(u, v), (110, 110))
        for name, field in patterns.THING_TEXTURES.items()
    }
    shares = {name: float(field.mean()) for name, field in fields.items()}
    assert shares["plain"] == 0.0
    assert shares["striped"] == pytest.approx(0.5, abs=0.02)
    assert shares["checkered"] == pytest.approx(0.5, abs=0.02)
    assert 0.15 < shares["dotted"] < 0.35
    for name in ("striped", "checkered", "dotted"):
        # Both tones are reached in full, and a row crosses from tone to tone every 2.5 to 3.5 px.
        assert fields[name].min() == 0.0 and fields[name].max() == 1.0
    crossings = np.abs(np.diff((fields["striped"][0] > 0.5).astype(int))).sum()
    assert 2.5 < 109 / crossings < 3.5


def test_stuff_has_lower_contrast_than_things():
    rng = np.random.default_rng(0)
    for texture in patterns.STUFF_TEXTURES:
        look = WorldClass("x", True, "grey", texture).look(rng, is_thing=False)
        tone = render.ground_tone(rng, look, 64, 64, 1.0)
        assert tone.shape == (64, 64) and tone.dtype == np.float32
        assert 0.7 < tone.min() and tone.max() < 1.1
        assert (tone.std() > 0.03) == (texture != "smooth")


def test_captions():
    assert caption(["red star balloon"]) == "a red star balloon"
    assert caption(["orange cat", "grey wavy ground"]) == "an orange cat and a grey wavy ground"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_caption_batches(preset):
    world = CaptionWorld(preset=preset, batch_size=40, scene_ratio=0.25)
    batch = world.batch(3)
    assert batch["image"].shape == (40, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert len(batch["captions"]) == 40 and batch["labels"].dtype == np.int32
    assert (batch["labels"] == -1).sum() == 10
    words = {word for name in world.vocabulary.names for word in name.split()} | {"a", "an", "and"}
    for text, label in zip(batch["captions"], batch["labels"], strict=True):
        assert set(text.split()) <= words
        if label >= 0:
            assert text == world.vocabulary.names[label]
        else:
            assert text.startswith(("a ", "an ")) and " and a" in text
    again = CaptionWorld(preset=preset, batch_size=40, scene_ratio=0.25).batch(3)
    np.testing.assert_array_equal(batch["image"], again["image"])
    assert batch["captions"] == again["captions"]
    assert not np.array_equal(batch["image"], world.batch(4)["image"])


def test_crops_hold_classes_evenly():
    num_classes = len(PRESETS["texture"].classes)
    few = CaptionWorld(batch_size=num_classes, scene_ratio=0.0).batch(0)["labels"]
    np.testing.assert_array_equal(np.sort(few), np.arange(num_classes))
    many = CaptionWorld(batch_size=2 * num_classes + 5, scene_ratio=0.0).batch(0)["labels"]
    counts = np.bincount(many, minlength=num_classes)
    assert set(counts) == {2, 3} and (counts == 3).sum() == 5
    small = CaptionWorld(batch_size=5, scene_ratio=0.0)
    labels = np.concatenate([small.batch(step)["labels"] for step in range(40)])
    assert set(labels) == set(range(num_classes))


def test_caption_world_of_seen_classes_names_no_unseen_one():
    world = CaptionWorld(batch_size=42, classes="seen", scene_ratio=0.5)
    unseen = {world.vocabulary.names[k] for k in world.vocabulary.unseen}
    text = " | ".join(world.batch(0)["captions"])
    assert not any(name in text for name in unseen)


def test_scene_captions_name_exactly_the_visible_classes(monkeypatch):
    world = CaptionWorld(batch_size=1, scene_ratio=1.0)
    names = world.vocabulary.names
    image = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)
    drawn = (image, np.zeros((64, 64), np.uint8), np.array([20, 3, 3]))
    monkeypatch.setattr(world._scenes, "_draw", lambda rng: drawn)
    batch = world.batch(0)
    assert set(batch["captions"][0].split(" and ")) == {f"a {names[20]}", f"a {names[3]}"}
    # 64 px to 32 px: each pixel is the rounded mean of a 2 x 2 block.
    mean = image[6:8, 10:12].astype(float).mean(axis=(0, 1))
    np.testing.assert_allclose(batch["image"][0, 3, 5], mean, atol=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "textures"}, "no preset 'textures'; did you mean 'texture'"),
        ({"split": "val"}, "no split 'val'; did you mean 'validation'"),
        ({"classes": "sen"}, "no set of classes 'sen'; did you mean 'seen'"),
        ({"image_size": 8}, "image_size must be an integer of at least 16, got 8"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**32}, "seed must be below 2"),
        ({"max_segments": 8}, "max_segments is 8, .* raise it to 9"),
        ({"max_segments": 300}, "at most 255"),
        ({"num_eval_images": 0}, "num_eval_images must be an integer of at least 1"),
        ({"num_train_images": -1}, "num_train_images must be an integer of at least 0"),
    ],
)
def test_bad_world_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticWorld(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 48}, "cannot be averaged down to crop_size 48"),
        ({"crop_size": 4}, "crop_size must be an integer of at least 8"),
        ({"scene_ratio": 1.5}, r"scene_ratio must lie in \[0, 1\], got 1.5"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"preset": "shapes"}, "no preset 'shapes'; did you mean 'shape'"),
    ],
)
def test_bad_caption_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CaptionWorld(**arguments)


def test_a_preset_without_classes_of_a_kind():
    good = PRESETS["texture"]
    no_unseen = dataclasses.replace(good, things=good.things[:1])
    with pytest.raises(ValueError, match="no unseen thing"):
        SyntheticWorld(preset=no_unseen, classes="unseen")
