"""The step of stage 1 as one size grows: exponents, their table and figure."""

import numpy as np
import pytest

from concat_jax.benchmarking import scaling
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement
from tests import tiny

CASE = Case("scaling", recipe="configs/coco_zps.py:mini")


def measured(seconds, flops, traffic):
    return Measurement((seconds,), flops=flops, traffic_bytes=traffic)


@pytest.fixture
def results(monkeypatch):
    """Time grows by 2 to the power of half the batch's, FLOPs as it does, bytes not at all."""
    monkeypatch.setattr(scaling, "AXES", {"batch": ("train.con.batch_size", (0.5, 1, 2))})
    # Named in an order that is not the sizes'.
    return {f"batch {b}": measured(0.3 * b**0.5, 5e9 * b, 7e6) for b in (4, 16, 1)}


def test_an_exponent_is_a_slope_between_logarithms():
    sizes = np.array([1, 2, 4, 8])
    slope, error = scaling.exponent(sizes, 3 * sizes**1.5)
    assert slope == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-9)
    noise = np.exp(np.array([0.1, -0.1, -0.1, 0.1]))  # of no slope
    slope, error = scaling.exponent(sizes, 3 * sizes**1.5 * noise)
    # Residuals of 0.1 at four points that log(2) lies between: 0.1 sqrt(4 / 2 / 5) / log(2).
    assert slope == pytest.approx(1.5) and error == pytest.approx(0.0912, abs=1e-4)


def test_the_table_has_every_exponent(results):
    text = scaling.table(CASE, results)
    row = "| batch | 1, 4, 16 | 300, 600, 1200 | 0.50 ± 0.00 | 1.00 ± 0.00 | 0.00 ± 0.00 |"
    assert row in text


def test_the_figure_has_a_panel_a_size_with_lines_over_the_smallest(results):
    figure = scaling.figure(CASE, results)
    (axes,) = [axes for axes in figure.axes if axes.lines]
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_xlabel() == "batch"
    lines = {line.get_label(): line.get_xydata() for line in axes.lines[:3]}
    assert list(lines) == ["time, 0.50", "FLOPs, 1.00", "bytes, 0.00"]
    np.testing.assert_allclose(lines["time, 0.50"], [[1, 1], [4, 2], [16, 4]])
    np.testing.assert_allclose(axes.lines[3].get_xydata(), [[1, 1], [4, 4], [16, 16]])


def test_one_size_at_a_time_is_changed(monkeypatch):
    def sizes(config):
        assert config.train.con.method.max_segments == 0
        segmentor = config.model.segmentor
        con, data = config.train.con, config.data
        return con.batch_size, data.image_size, segmentor.num_queries, data.max_segments

    monkeypatch.setattr(scaling, "_step", sizes)
    works = scaling.works(CASE)
    assert [len({row[axis] for row in works.values()}) for axis in range(4)] == [4, 4, 4, 4]
    base = (4, 128, 32, 32)
    assert works["batch 4"] == works["side 128"] == works["queries 32"] == base
    assert works["batch 16"] == (16, 128, 32, 32) and works["side 192"] == (4, 192, 32, 32)
    assert works["queries 256"] == (4, 128, 256, 32) and works["segments 8"] == (4, 128, 32, 8)


def test_a_step_is_counted_and_runs(monkeypatch):
    config = scaling.load_config(CASE.recipe)
    config.model.update({name: dict(tiny.MODEL[name]) for name in ("clip", "projector")})
    config.model.segmentor = dict(tiny.MODEL["segmentor"])
    config.train.con.batch_size, config.data.image_size, config.data.max_segments = 2, 32, 3
    config.loss.num_points = 9
    random = lambda networks, name: tiny.params(name, of=networks)  # noqa: E731
    monkeypatch.setattr(scaling, "_params", random)
    work = scaling._step(config)
    assert work.flops > 1e6 and work.traffic_bytes > 1e6
    assert np.isfinite(work.call()["loss"])
