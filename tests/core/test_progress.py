"""Lines of progress: when they are due, and what they say."""

import pytest

from concat_jax.core import progress
from concat_jax.core.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_how_far_how_fast_and_how_long(clock, capsys):
    shown = Progress("con", 100, 400, batch_size=8)
    clock[0] += 10
    assert shown.report(150, {"loss_mask": 0.25, "shards": 3}) == {"steps_per_second": 5.0}
    # 250 steps are left at 5 a second.
    assert capsys.readouterr().out == "       con 150/400  mask 0.250  shards 3  40/s  ETA 0:50\n"
    clock[0] += 10
    assert shown.report(160)["steps_per_second"] == 1.0
    # The last interval weighs 0.7: 2.2 a second.
    assert capsys.readouterr().out == "       con 160/400  8.0/s  ETA 1:49\n"
    shown.report(160)
    assert "0.0/s" in capsys.readouterr().out


def test_training_says_images_the_wait_for_data_and_mfu(clock, capsys):
    shown = Progress("con", 0, 4000, batch_size=16, unit="images", at_peak=0.1)
    clock[0] += 30
    shown.pause(10)  # spent on an evaluation, say
    speeds = shown.report(100, {"loss": 72.1}, waited=0.6)
    assert speeds == {
        "steps_per_second": 5.0,
        "images_per_second": 80.0,
        "data_wait": pytest.approx(0.03),
        "mfu": 0.5,
    }
    line = "       con  100/4000  loss 72.100  80 images/s  data wait 3%  MFU 50%  ETA 13:00\n"
    assert capsys.readouterr().out == line


def test_a_line_holds_as_many_terms_as_are_read_at_a_glance(clock, capsys):
    shown = Progress("con", 0, 4000, unit="images")
    clock[0] += 1
    shown.report(1, {f"loss_{name}": 123.456 for name in ("class", "dice", "mask", "a", "b", "c")})
    line = capsys.readouterr().out.rstrip()
    assert len(line) <= progress.WIDTH and "mask 123.456" in line and " c " not in line


def test_a_tick_prints_when_a_line_is_due_and_at_the_end(clock, capsys):
    shown = Progress("images", 0, 10, every=5)

    def lines(done, seconds):
        clock[0] += seconds
        shown.tick(done)
        return capsys.readouterr().out.count("\n")

    assert [lines(1, 1), lines(2, 4), lines(3, 4), lines(10, 0.5)] == [0, 1, 0, 1]


def test_nothing_done_has_no_time_left(clock, capsys):
    Progress("images", 0, 10).report(0)
    assert capsys.readouterr().out == "    images  0/10  0.0/s  ETA unknown\n"


def test_seconds_as_people_read_them():
    shown = [format_seconds(seconds) for seconds in (0, 59.6, 3599, 3723)]
    assert shown == ["0:00", "1:00", "59:59", "1:02:03"]
