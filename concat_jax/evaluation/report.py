"""Evaluation results as text: terminal tables, Markdown tables, scalars for a log."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

GROUPS = ("all", "things", "stuff", "seen", "unseen")


@dataclasses.dataclass(frozen=True)
class _Metric:
    """How a metric's summary is shown; columns map its keys to headings.

    `counts` are all 0 where a class does not occur; `rules` are groups that a rule goes before.
    """

    columns: Mapping[str, str]
    compared: Mapping[str, str]
    of_class: Mapping[str, str]
    counts: tuple[str, ...]
    rules: tuple[int, ...] = (1, 3)


# The panoptic summary is the outer one; the others lie in it under their names. SQ gives a class
# without a match 0, as the official tool and published numbers do, and "SQ matched" leaves it out.
# The harmonic mIoU is the field's hIoU; AR and recall50 are at 100 detections, TP at IoU 0.5.
_PANOPTIC = _Metric(
    {"pq": "PQ", "sq": "SQ", "rq": "RQ", "sq_matched": "SQ matched"},
    {"pq": "PQ", "sq": "SQ", "rq": "RQ"},
    {key: key.upper() for key in ("pq", "sq", "rq", "tp", "fp", "fn")},
    ("tp", "fp", "fn"),
    rules=(3, 5),
)
_NESTED = {
    "semantic": _Metric(
        dict(
            miou="mIoU",
            pixel_accuracy="pixel acc",
            mean_accuracy="class acc",
            frequency_weighted_iou="fwIoU",
        ),
        {"miou": "mIoU"},
        dict(
            iou="IoU", accuracy="acc", annotated="pixels", predicted="predicted", correct="correct"
        ),
        ("annotated", "predicted"),
    ),
    "instance": _Metric(
        dict(ap="AP", ap50="AP50", ap75="AP75", ap_small="small", ap_medium="medium")
        | dict(ap_large="large", ar="AR", recall50="recall50"),
        {"ap": "AP", "ap50": "AP50"},
        dict(ap="AP", ap50="AP50", recall50="recall50", instances="annotated")
        | dict(detections="detected", true_positives="TP"),
        ("instances", "detections"),
    ),
}


def _measured(summary: Mapping) -> list[tuple[str, _Metric, Mapping]]:
    """(name, metric, its summary) of what an evaluation measured."""
    found = [("", _PANOPTIC, summary)] if "all" in summary else []
    return found + [(n, metric, summary[n]) for n, metric in _NESTED.items() if n in summary]


def number(value: float | int | None) -> str:
    """One decimal; a dash for what was not measured (NaN or None)."""
    if value is None or not math.isfinite(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _grid(
    headers: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], rules: Sequence[int] = ()
) -> str:
    """Plain text columns, the first flush left, the others right; `rules` go before rows."""
    widths = [max(map(len, column)) for column in zip(*headers, *rows, strict=True)]

    def line(cells):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [*map(line, headers), rule]
    for number, row in enumerate(rows):
        lines += [rule] * (number in rules) + [line(row)]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column flush left and the others right; no trailing newline."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    # A bar inside a run's or a class's name would open another column.
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in lines
    )


def format_table(summary: Mapping, *, classes: bool = False) -> str:
    """The tables of every metric of an evaluation, percent; n counts the classes in the means.

    Args:
      classes: with a row for every class that occurs, best first. A class never found has SQ 0 in
        the means; its row shows why (TP 0).
    """
    parts = []
    for name, metric, inner in _measured(summary):
        rows = [
            [group, *(number(inner[group].get(key)) for key in metric.columns), count]
            for group in (*GROUPS, "harmonic")
            if group in inner
            for count in (number(inner[group]["n"]) if "n" in inner[group] else "",)
        ]
        table = _grid([["", *metric.columns.values(), "n"]], rows, metric.rules)
        parts.append(f"{name}\n{table}" if name else table)
        if "confusion" in inner:
            parts.append(_confusion_table(inner["confusion"]))
        if classes:
            parts.append(_class_table(metric, inner["per_class"]))
    return "\n\n".join(parts)


def _confusion_table(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """How many segments, and what share of those of their row, are found and named as what."""
    columns = ("right", "other_seen", "other_unseen", "unmatched")
    rows = []
    for group, counts in confusion.items():
        total = sum(counts.values())
        shares = (f"{counts[key]} ({100 * counts[key] / max(1, total):.1f}%)" for key in columns)
        rows.append([group, str(total), *shares])
    header = ["ground truth", "segments", *(key.replace("_", " ") for key in columns)]
    about = "What segments are named whose mask is found (IoU > 0.5), and those not found:"
    return f"{about}\n\n{markdown_table(header, rows)}"


def _class_table(metric: _Metric, rows: Sequence[Mapping]) -> str:
    score = next(iter(metric.of_class))

    def order(row: Mapping) -> tuple[float, str]:
        # A class that is only predicted has no AP and comes last.
        return -row[score] if math.isfinite(row[score]) else 1.0, row["name"]

    def kind(row: Mapping) -> tuple[str, str]:
        return "thing" if row["is_thing"] else "stuff", "seen" if row["is_seen"] else "unseen"

    cells = [
        [row["name"], *kind(row), *(number(row[key]) for key in metric.of_class)]
        for row in sorted(rows, key=order)
        if any(row[key] for key in metric.counts)
    ]
    return _grid([["class", "", "", *metric.of_class.values()]], cells)


def format_comparison(runs: Mapping[str, Mapping]) -> str:
    """Several runs as rows: each metric for seen, unseen and their harmonic mean (h).

    Args:
      runs: name to summary, in the order to print, at least one; all with the same metrics.
    """
    tables = []
    for name, metric, _ in _measured(next(iter(runs.values()))):
        groups = ("seen", "unseen", "harmonic")
        blocks = [cell for title in metric.compared.values() for cell in (title, "", "")]
        rows = [
            [
                run,
                *(
                    number((summary[name] if name else summary)[group][key])
                    for key in metric.compared
                    for group in groups
                ),
            ]
            for run, summary in runs.items()
        ]
        heads = ["run", *("seen", "unseen", "h") * len(metric.compared)]
        tables.append(_grid([["", *blocks], heads], rows))
    return "\n\n".join(tables)


def flatten_summary(summary: Mapping) -> dict[str, float]:
    """A summary as scalars for a metric writer: pq, pq_seen, pq_unseen, ..., hpq, hsq, hrq.

    Likewise miou, ..., hiou and ap, ap50, ..., hap, hap50 where they were measured. Quantities
    without a value (NaN) are left out.
    """
    scalars = {}
    for _, metric, inner in _measured(summary):
        for group in GROUPS:
            for key in metric.columns if group in inner else ():
                scalars[key if group == "all" else f"{key}_{group}"] = inner[group][key]
        for key in metric.compared:
            scalars[f"h{key.removeprefix('m')}"] = inner["harmonic"][key]
    return {name: float(value) for name, value in scalars.items() if math.isfinite(value)}
