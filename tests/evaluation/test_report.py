"""Tables and report files."""

import json
import math

import numpy as np
import pytest

from concat_jax.core.files import write_json
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation import report
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU

TABLE = """\
            PQ    SQ     RQ  SQ matched  n
------------------------------------------
all       47.8  56.7   55.6        85.0  3
things    26.7  40.0   33.3        80.0  2
stuff     90.0  90.0  100.0        90.0  1
------------------------------------------
seen      71.7  85.0   83.3        85.0  2
unseen     0.0   0.0    0.0           -  1
------------------------------------------
harmonic   0.0   0.0    0.0           -"""

COMPARISON = """\
                                   PQ                 SQ                 RQ
run                              seen  unseen    h  seen  unseen    h  seen  unseen    h
----------------------------------------------------------------------------------------
stage 1                          71.7     0.0  0.0  85.0     0.0  0.0  83.3     0.0  0.0
finetune without pseudo queries  47.8       -    -  56.7       -    -  55.6       -    -"""

CLASSES = """\
class                   PQ    SQ     RQ  TP  FP  FN
---------------------------------------------------
sky    stuff    seen  90.0  90.0  100.0   1   0   0
cat    thing    seen  53.3  80.0   66.7   2   1   1
cow    thing  unseen   0.0   0.0    0.0   0   0   4"""


SEMANTIC = """\
semantic
          mIoU  pixel acc  class acc  fwIoU  n
----------------------------------------------
all       46.7       66.7       62.5   51.1  2
----------------------------------------------
seen      60.0       75.0       75.0   60.0  1
unseen    33.3       50.0       50.0   33.3  1
----------------------------------------------
harmonic  42.9       60.0       60.0   42.9

class                 IoU   acc  pixels  predicted  correct
------------------------------------------------------------
cat    thing    seen  60.0  75.0       4          4        3
cow    thing  unseen  33.3  50.0       2          2        1"""

VOCABULARY = Vocabulary(("cat", "cow"), (True, True), (True, False), (1, 2))


def make_nested():
    """Semantic and instance summaries, of one image each."""
    semantic, instance = SemanticIoU(2), AveragePrecision(2)
    semantic.update(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0]))
    mask = encode_rle(np.ones((2, 2), bool))
    instance.update(1, [mask, mask], [0, 1], None, [mask], [0], [0.5])
    return {
        "semantic": semantic.summarize(VOCABULARY),
        "instance": instance.summarize(VOCABULARY),
    }


def make_summary(cow_is_seen=False):
    """cat matched twice, sky once, cow never, fog absent."""
    quality = PanopticQuality(4)
    quality.iou_sum[:] = [1.6, 0.9, 0.0, 0.0]
    quality.tp[:] = [2, 1, 0, 0]
    quality.fp[:] = [1, 0, 0, 0]
    quality.fn[:] = [1, 0, 4, 0]
    return quality.summarize(
        Vocabulary(
            names=("cat", "sky", "cow", "fog"),
            is_thing=(True, False, True, False),
            is_seen=(True, True, cow_is_seen, True),
            category_ids=(1, 2, 3, 4),
        )
    )


def test_table():
    assert report.format_table(make_summary()) == TABLE


def test_comparison_of_runs():
    runs = {"stage 1": make_summary(), "finetune without pseudo queries": make_summary(True)}
    assert report.format_comparison(runs) == COMPARISON


def test_confusion_of_seen_and_unseen():
    keys = ("right", "other_seen", "other_unseen", "unmatched")
    rows = {"seen": (3, 1, 0, 4), "unseen": (0, 0, 0, 0)}
    confusion = {group: dict(zip(keys, row, strict=True)) for group, row in rows.items()}
    summary = make_summary() | {"confusion": confusion}
    table, about, rows = report.format_table(summary).split("\n\n")
    assert table == TABLE and "IoU > 0.5" in about
    assert rows.splitlines()[2:] == [
        "| seen | 8 | 3 (37.5%) | 1 (12.5%) | 0 (0.0%) | 4 (50.0%) |",
        "| unseen | 0 | 0 (0.0%) | 0 (0.0%) | 0 (0.0%) | 0 (0.0%) |",
    ]


def test_classes_are_sorted_and_absent_ones_left_out():
    assert report.format_table(make_summary(), classes=True) == f"{TABLE}\n\n{CLASSES}"


def test_scalars_leave_out_what_was_not_measured():
    scalars = report.flatten_summary(make_summary())
    assert scalars["pq_seen"] == pytest.approx(71.6667, abs=1e-4)
    assert scalars["hpq"] == 0.0
    assert scalars["sq_matched_seen"] == pytest.approx(85)
    assert "sq_matched_unseen" not in scalars  # no unseen class was matched
    assert "hpq" not in report.flatten_summary(make_summary(cow_is_seen=True))


def test_report_file_is_strict_json(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_json(
        path,
        {
            "summary": make_summary(),
            "scalar": np.float32(0.5),
            "array": np.array([1, 2]),
            "flag": np.bool_(True),
            "bad": [math.nan, math.inf, np.nan],
            3: (1, "x"),
        },
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["bad"] == [None, None, None]
    assert content["summary"]["per_class"][3]["pq"] is None
    assert (content["scalar"], content["array"], content["flag"]) == (0.5, [1, 2], True)
    assert content["3"] == [1, "x"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"pq": 1.0})
    with pytest.raises(TypeError):
        write_json(path, {"pq": object()})
    assert json.loads(path.read_text()) == {"pq": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_every_metric_has_its_tables():
    nested = make_nested()
    text = report.format_table({"semantic": nested["semantic"]}, classes=True)
    assert text.split() == SEMANTIC.split()
    text = report.format_table({**make_summary(), **nested}, classes=True)
    panoptic, classes, semantic, _, instance, of_instances = text.split("\n\n")
    assert (panoptic, classes) == (TABLE, CLASSES)
    assert instance.splitlines()[0] == "instance"
    assert instance.splitlines()[3].split()[:3] == ["all", "50.0", "50.0"]
    assert of_instances.splitlines()[2].split() == "cat thing seen 100.0 100.0 100.0 1 1 1".split()


def test_bars_in_markdown_are_escaped():
    assert report.markdown_table(["run", "PQ"], [["a|b", "1"]]).endswith("| a\\|b | 1 |")


def test_runs_are_compared_by_what_they_have():
    blocks, heads, _, row = report.format_comparison(
        {"stage 1": {"semantic": make_nested()["semantic"]}}
    ).splitlines()
    assert blocks.split() == ["mIoU"] and heads.split() == ["run", "seen", "unseen", "h"]
    assert row.split()[2:] == ["60.0", "33.3", "42.9"]
    assert "AP50" in report.format_comparison({"x": make_nested()})


def test_scalars_of_other_metrics():
    scalars = report.flatten_summary(make_nested())
    assert scalars["hiou"] == pytest.approx(300 / 7)
    assert scalars["miou_unseen"] == pytest.approx(100 / 3)
    assert scalars["ap_seen"] == pytest.approx(100)
    assert (scalars["hap"], scalars["ap"]) == (0.0, pytest.approx(50))
    assert "pq" not in scalars
