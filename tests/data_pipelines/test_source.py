"""What training may see of a source: the three treatments of unseen classes; numbers of images."""

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.leak_test import check_no_leak
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.source import ImageRecord, image_numbers, treat_unseen

VOCABULARY = Vocabulary(
    names=("sky", "road", "dog", "cat"),
    is_thing=(False, False, True, True),
    is_seen=(True, False, True, False),
    category_ids=(1, 2, 3, 4),
)
SKY, ROAD, DOG, CAT = range(4)
# Labels and crowd flags of the segments, which are stripes from left to right; 0 to the left.
IMAGES = {
    3: [(SKY, 0), (DOG, 0)],
    4: [(CAT, 0), (SKY, 0), (ROAD, 0), (DOG, 1)],
    5: [(ROAD, 0), (CAT, 1)],  # nothing of it is seen
    6: [(DOG, 0), (CAT, 1)],  # unseen only as crowd
    7: [],
}
STRIPE = 4


class Stripes:
    """A source without files; counts what is read."""

    def __init__(self):
        self.vocabulary, self.reads = VOCABULARY, []
        self.records = [
            ImageRecord(
                image_id=image_id,
                file_name=f"{image_id}.jpg",
                png_name="",
                height=8,
                width=STRIPE * 5,
                source_ids=np.arange(len(rows), dtype=np.int64) + 100 * image_id,
                labels=np.array([label for label, _ in rows], np.int32),
                is_crowd=np.array([crowd for _, crowd in rows], bool),
            )
            for image_id, rows in IMAGES.items()
        ]

    def read(self, record):
        self.reads.append(record.image_id)
        ids = np.zeros((8, STRIPE * 5), np.uint8)
        for row in range(len(record.labels)):
            ids[:, STRIPE * (row + 1) : STRIPE * (row + 2)] = row + 1
        return Image.fromarray(np.repeat(ids[..., None] * 40, 3, axis=2)), ids


def loader(source, **options):
    defaults = dict(seed=0, image_size=20, max_segments=5, num_threads=2)
    return SegmentationLoader(source, **(defaults | options))


def test_each_treatment_names_the_images_it_leaves():
    source = Stripes()
    found = {t: treat_unseen(source, t) for t in ("drop", "void", "keep")}
    assert {t: positions.tolist() for t, (_, positions) in found.items()} == {
        "drop": [0],
        "void": [0, 1, 3],
        "keep": [0, 1, 2, 3],  # an image without a segment teaches nothing
    }
    assert found["drop"][0] is source and found["keep"][0] is source
    assert not source.reads
    with pytest.raises(ValueError, match="unseen_images is 'hide'"):
        treat_unseen(source, "hide")


def test_void_removes_rows_and_pixels_and_nothing_else():
    source = Stripes()
    voided, _ = treat_unseen(source, "void")
    record = voided.records[1]
    assert record.labels.tolist() == [SKY, DOG] and record.source_ids.tolist() == [401, 403]
    assert record.is_crowd.tolist() == [False, True]
    image, ids = voided.read(record)
    original_image, original_ids = source.read(source.records[1])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(original_image))
    expected = np.array([0, 0, 1, 0, 2])  # stripes: void, cat, sky, road, dog
    np.testing.assert_array_equal(ids, np.broadcast_to(expected.repeat(STRIPE), (8, 20)))
    assert ids.dtype == original_ids.dtype
    assert voided.records[0] is source.records[0]
    np.testing.assert_array_equal(
        voided.read(voided.records[0])[1], source.read(source.records[0])[1]
    )
    assert len(voided.records[2].labels) == 0 and not voided.read(voided.records[2])[1].any()
    # The source itself is untouched: evaluation is over all classes.
    assert source.records[1].labels.tolist() == [CAT, SKY, ROAD, DOG]


def test_a_loader_that_voids_trains_on_seen_segments_and_evaluates_on_all():
    data = loader(Stripes(), unseen_images="void", augment="none")
    batch = data.batch(0, 3)
    assert sorted(batch["image_id"].tolist()) == [3, 4, 6]
    b = batch["image_id"].tolist().index(4)
    assert batch["segment_labels"][b].tolist() == [SKY, DOG, -1, -1, -1]
    assert batch["segment_source_ids"][b].tolist() == [401, 403, 0, 0, 0]
    assert sorted(np.unique(batch["segment_ids"][b])) == [0, 1, 2]
    assert not np.isin(batch["segment_labels"], [ROAD, CAT]).any()
    example = data.eval_example(1)
    assert example["segment_labels"].tolist() == [CAT, SKY, ROAD, DOG, -1]
    assert [e["image_id"] for e in data.eval_examples()] == list(IMAGES)


@pytest.mark.parametrize(("treatment", "pairs"), [("drop", 2), ("void", 5), ("keep", 5)])
def test_captions_name_seen_segments_only(treatment, pairs):
    data = loader(Stripes(), unseen_images=treatment)
    batch = data.caption_batch(0, pairs, 6)
    names = {"drop": ["dog", "sky"], "void": ["dog", "dog", "dog", "sky", "sky"]}
    assert sorted(batch["captions"]) == names.get(treatment, names["void"])
    assert (batch["image"] == batch["image"][:, :1, :1]).all()  # each box is one flat stripe


def test_captions_pass_over_segments_that_others_hide():
    class Hidden(Stripes):
        def read(self, record):
            image, ids = super().read(record)
            return image, np.where(ids == 2, 0, ids)  # row 1 has no pixel

    batch = loader(Hidden()).caption_batch(0, 2, 6)
    assert batch["captions"] == ["sky", "sky"]


def test_a_leak_stops_the_loader_before_the_first_step(monkeypatch):
    source = Stripes()
    check_no_leak(source, [0, 4])
    with pytest.raises(FileError, match=r"Image 5 .*'road'.*1 of 2 checked images"):
        check_no_leak(source, [0, 2])
    monkeypatch.setattr(
        "data_pipelines.loader.treat_unseen", lambda source, treatment: (source, np.arange(2))
    )
    with pytest.raises(FileError, match="Image 4 .*'cat'"):
        loader(source)
    loader(source, unseen_images="keep")


def test_numbers_of_images():
    assert image_numbers([0, 397133]) == [0, 397133]
    assert image_numbers(["ADE_val_00000017", "2007_000032", 3]) == [17, 2007000032, 3]
    assert image_numbers([]) == []


@pytest.mark.parametrize("image_id", ["a_18", "18b", "beach", "9" * 19, "9" * 5000, "²"])
def test_images_whose_texts_give_no_numbers_have_their_places(image_id):
    assert image_numbers([18, image_id, "x7"]) == [1, 2, 3]
