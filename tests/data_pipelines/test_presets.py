"""The presets of the synthetic world: names, what is unseen of them, what a class looks like."""

import colorsys

import numpy as np
import pytest

from data_pipelines.datasets import make_datasets
from data_pipelines.synthetic import patterns
from data_pipelines.synthetic.attributes import DEVIATION, AttributeClass
from data_pipelines.synthetic.presets import PRESETS, WorldClass, WorldPreset
from data_pipelines.synthetic.world import CaptionWorld, SyntheticWorld


def test_a_look_is_that_of_the_class_and_the_rest_is_drawn():
    entry = WorldClass("x", True, colour="red", texture="striped")
    looks = [entry.look(np.random.default_rng(i), is_thing=True) for i in range(60)]
    assert {look.colour for look in looks} == {patterns.THING_COLOURS["red"]}
    assert {look.texture for look in looks} == {patterns.THING_TEXTURES["striped"]}
    assert {look.shape for look in looks} == set(patterns.SHAPES.values())
    ground = WorldClass("y", True, colour="mint", texture="brick")
    look = ground.look(np.random.default_rng(0), is_thing=False)
    assert look.shape is None and look.texture is patterns.STUFF_TEXTURES["brick"]


@pytest.mark.parametrize("preset", ["opaque", "shape", "texture"])
def test_label_space_counts_and_compositional_split(preset):
    chosen = PRESETS[preset]
    vocabulary = chosen.vocabulary
    assert sum(vocabulary.is_thing) >= 16
    assert len(vocabulary) - sum(vocabulary.is_thing) >= 12
    for side in (chosen.things, chosen.stuff):
        unseen = [entry for entry in side if not entry.is_seen]
        assert len(unseen) * 4 == len(side)
        for entry in unseen:
            for attribute in ("colour", "texture", "shape"):
                value = getattr(entry, attribute)
                seen_with = [e for e in side if e.is_seen and getattr(e, attribute) == value]
                assert len(seen_with) >= 2
    if preset == "opaque":
        words = {word for name in vocabulary.names for word in name.split()}
        assert len(words) == len(vocabulary)  # no name shares a word with another
    else:
        assert vocabulary.names[0].split()[0] == chosen.things[0].colour


@pytest.mark.parametrize(
    ("preset", "unseen"),
    [
        ("attributes", (20, 8)),
        ("attributes_redrawn", (20, 8)),
        ("attributes_opaque", (20, 8)),
        ("attributes_few", (48, 14)),
        ("attributes_beyond", (20, 8)),
    ],
)
def test_attribute_classes_are_apart_and_named_for_what_they_are(preset, unseen):
    chosen = PRESETS[preset]
    names = chosen.vocabulary.names
    assert len(set(names)) == len(names) == 88
    for side, count, wanted in zip((chosen.things, chosen.stuff), (64, 24), unseen, strict=True):
        points = np.array([entry.prototype for entry in side])
        hidden = np.array([not entry.is_seen for entry in side])
        assert len(side) == count and hidden.sum() == wanted
        apart = np.abs(points[:, None] - points)
        circle = np.array([True, False, True, False])[: points.shape[1]]
        apart = np.where(circle, np.minimum(apart, 1 - apart), apart)
        nearest = np.sort(np.linalg.norm(apart, axis=-1), axis=1)[:, 1]
        assert nearest.min() > 3 * DEVIATION  # instances mostly lie at their own name
        if preset == "attributes_beyond":  # no seen class has stripes as fine
            assert points[hidden, 1].min() >= points[~hidden, 1].max()
    words = {word for name in names for word in name.split()}
    assert (len(words) < 40) == (preset != "attributes_opaque")


def test_redrawn_classes_are_others_and_the_first_draw_stays():
    """Names and what is unseen; published tables are of the first draw."""
    first, redrawn = (PRESETS[name].vocabulary for name in ("attributes", "attributes_redrawn"))
    assert first.names[:2] == ("pink even upright tall egg", "cyan even level flat egg")
    assert first.unseen[:4].tolist() == [0, 5, 15, 18]
    assert len(set(first.names) & set(redrawn.names)) < 10
    assert first.unseen.tolist() != redrawn.unseen.tolist()


def test_instances_scatter_about_their_class():
    """In colour and stripes; what is the same for two classes is nuisance."""
    entry = AttributeClass("x", True, (0.0, 0.5, 0.25, 0.5))
    looks = [entry.look(np.random.default_rng(i), is_thing=True) for i in range(300)]
    hues = np.array([colorsys.rgb_to_hsv(*look.colour)[0] for look in looks])
    hues = (hues + 0.5) % 1 - 0.5  # about red
    assert abs(hues.mean()) < 0.02 and hues.std() == pytest.approx(DEVIATION, rel=0.15)
    values = np.array([colorsys.rgb_to_hsv(*look.colour)[2] for look in looks])
    assert values.std() > 0.1  # light


@pytest.mark.parametrize("preset", ["texture", "attributes_few"])
def test_a_world_to_choose_in_has_seen_classes_alone(preset):
    whole = PRESETS[preset]
    part = whole.leaving_out(4)
    seen = [whole.vocabulary.names[k] for k in whole.vocabulary.seen]
    assert list(part.vocabulary.names) == seen
    things = sum(whole.vocabulary.is_thing[k] for k in whole.vocabulary.seen)
    assert part.vocabulary.unseen.tolist() == [
        *range(0, things, 4),
        *range(things, len(seen), 4),
    ]
    data = dict(kind="synthetic", preset=preset, image_size=32, max_segments=10, left_out=4)
    data |= dict(eval_split="validation", num_eval_images=1, caption_scene_ratio=0.125)
    found = make_datasets(data, seed=0)
    assert found.vocabulary == part.vocabulary
    # The CLIP is that of the whole world, with all of its words.
    assert set(whole.vocabulary.names) <= set(found.caption_words)
    labels = next(found.train(64)([0]))["segment_labels"]
    assert set(labels.ravel()) - {-1} <= set(part.vocabulary.seen.tolist())


def test_opaque_names_are_a_matter_of_data():
    opaque = WorldPreset(
        name="opaque",
        things=(
            WorldClass("dax", True, colour="red", shape="star"),
            WorldClass("wug", False, texture="dotted", shape="heart"),
        ),
        stuff=(WorldClass("zib", True, colour="mint"), WorldClass("fep", False, texture="brick")),
    )
    world = SyntheticWorld(preset=opaque)
    labels = world.batch(0)["segment_labels"]
    assert set(labels[labels >= 0]) == {0, 2}
    assert "wug" in CaptionWorld(preset=opaque, scene_ratio=0.0, batch_size=4).batch(0)["captions"]
