"""What a loading report says."""

from concat_jax.weights.report import LoadingReport


def test_groups_counts_and_names():
    shapes = {
        "segmentor/backbone/stem/kernel": (7, 7, 3, 8),
        "segmentor/backbone/stem/scale": (8,),
        "segmentor/pixel_decoder/a": (2, 3),
        "segmentor/transformer_decoder/b": (),
    }
    report = LoadingReport(
        loaded={path: path for path in shapes},
        shapes=shapes,
        new={"classifier/class_embed/bias": (4,)},
        ignored={"criterion.empty_weight": (4,)},
    )
    assert report.num_parameters == 7 * 7 * 3 * 8 + 8 + 6 + 1
    assert str(report).splitlines() == [
        "loaded 4 arrays (1,191 numbers), newly initialised 1 arrays (4 numbers), "
        "ignored 1 entries of the file",
        "  backbone            loaded 2 arrays (1,184 numbers)",
        "  pixel decoder       loaded 1 arrays (6 numbers)",
        "  transformer decoder loaded 1 arrays (1 numbers)",
        "  class head          loaded 0 arrays (0 numbers)",
        "                      newly initialised 1 arrays (4 numbers): "
        "classifier/class_embed/bias [4]",
        "  ignored             criterion.empty_weight [4]",
    ]


def test_long_lists_are_shortened():
    ignored = {f"generator.{i:02}": (i,) for i in range(40)}
    text = str(LoadingReport({}, {}, ignored=ignored))
    assert "generator.05 [5] and 34 more" in text
    assert "generator.06" not in text


def test_counters_and_tables_are_counted():
    ignored = {f"layer{i}.bn.num_batches_tracked": () for i in range(9)} | {"fc.bias": (10,)}
    line = str(LoadingReport({}, {}, ignored=ignored)).splitlines()[-1]
    assert line == "  ignored             fc.bias [10], 9 of *.num_batches_tracked"
