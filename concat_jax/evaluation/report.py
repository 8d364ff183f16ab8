"""Evaluation results as text: terminal tables, Markdown tables, scalars for a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

GROUPS = ("all", "things", "stuff", "seen", "unseen")
METRICS = ("pq", "sq", "rq")
# The panoptic summary has none of these keys of its own; each holds another metric's summary.
NESTED = ("semantic", "instance")
# Columns of the tables, by metric: key of the summary to heading.
_SEMANTIC = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel acc",
    "mean_accuracy": "class acc",
    "frequency_weighted_iou": "fwIoU",
}
_INSTANCE = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
    "ar": "AR",
    "recall50": "recall50",
}
_PANOPTIC = {"pq": "PQ", "sq": "SQ", "rq": "RQ", "sq_matched": "SQ matched"}


def _number(value: float | int | None) -> str:
    """One decimal; a dash for what was not measured (NaN or None)."""
    if value is None or not math.isfinite(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _grid(
    headers: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], rules: Sequence[int] = ()
) -> str:
    """Plain text columns under one or more header lines, the first flush left, the others right.

    `rules` are the row numbers that a thin rule goes before.
    """
    widths = [max(map(len, column)) for column in zip(*headers, *rows, strict=True)]

    def line(cells):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [*map(line, headers), rule]
    for number, row in enumerate(rows):
        if number in rules:
            lines.append(rule)
        lines.append(line(row))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column flush left and the others right; no trailing newline."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    # A bar inside a run's or a class's name would open another column.
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in lines
    )


def format_panoptic(summary: Mapping, *, markdown: bool = False) -> str:
    """A panoptic run as a table: rows all, things, stuff, seen, unseen, harmonic.

    Args:
      summary: of `PanopticQuality.summarize`; percent. SQ gives a class without a match 0, as the
        official tool and published numbers do, and "SQ matched" leaves it out. n is the number of
        classes in the means of PQ, SQ and RQ.

    Returns:
      Lines without a trailing newline.
    """
    return _groups_table(summary, _PANOPTIC, markdown=markdown, rules=(3, 5))


def format_semantic(summary: Mapping, *, markdown: bool = False) -> str:
    """A semantic run as a table: rows all, seen, unseen, harmonic.

    Args:
      summary: of `SemanticIoU.summarize`; percent. The harmonic mIoU is the field's hIoU.
    """
    return _groups_table(summary, _SEMANTIC, markdown=markdown, rules=(1, 3))


def format_instance(summary: Mapping, *, markdown: bool = False) -> str:
    """An instance run as a table: rows all, seen, unseen, harmonic.

    Args:
      summary: of `AveragePrecision.summarize`; percent, AR and recall50 at 100 detections.
    """
    return _groups_table(summary, _INSTANCE, markdown=markdown, rules=(1, 3))


def _groups_table(
    summary: Mapping, columns: Mapping[str, str], *, markdown: bool, rules: Sequence[int]
) -> str:
    header = ["", *columns.values(), "n"]
    rows = [
        [group, *(_number(summary[group].get(key)) for key in columns), n]
        for group in (*GROUPS, "harmonic")
        if group in summary
        for n in (_number(summary[group]["n"]) if "n" in summary[group] else "",)
    ]
    return markdown_table(header, rows) if markdown else _grid([header], rows, rules=rules)


def format_table(summary: Mapping, *, classes: bool = False, markdown: bool = False) -> str:
    """The tables of every metric that an evaluation measured.

    Args:
      summary: of `evaluate`: a panoptic summary, and others under the keys of `NESTED`, each if
        it was measured.

    Returns:
      Tables separated by empty lines; each but the panoptic one has its name above.
    """
    parts = []
    if "all" in summary:
        parts.append(format_panoptic(summary, markdown=markdown))
        if classes:
            parts.append(format_classes(summary, markdown=markdown))
    tables = {
        "semantic": (format_semantic, format_semantic_classes),
        "instance": (format_instance, format_instance_classes),
    }
    for name in NESTED:
        if name in summary:
            whole, of_classes = tables[name]
            parts.append(f"{name}\n{whole(summary[name], markdown=markdown)}")
            if classes:
                parts.append(of_classes(summary[name], markdown=markdown))
    return "\n\n".join(parts)


def format_comparison(runs: Mapping[str, Mapping], *, markdown: bool = False) -> str:
    """Several runs as rows, for an ablation.

    Args:
      runs: name of the run (for example "stage 1") to its summary, in the order to print; all
        with the same metrics.

    Returns:
      Columns PQ, SQ and RQ, each for seen, unseen and their harmonic mean (h); likewise mIoU, and
      AP and AP50, in tables of their own where they were measured.

    Raises:
      ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("format_comparison got no run; pass at least one name and its summary.")
    first = next(iter(runs.values()))
    tables = []
    if "all" in first:
        tables.append(_comparison(runs, {metric: metric.upper() for metric in METRICS}, markdown))
    for name, columns in (
        ("semantic", {"miou": "mIoU"}),
        ("instance", {"ap": "AP", "ap50": "AP50"}),
    ):
        if name in first:
            inner = {run: summary[name] for run, summary in runs.items()}
            tables.append(_comparison(inner, columns, markdown))
    return "\n\n".join(tables)


def _comparison(runs: Mapping[str, Mapping], columns: Mapping[str, str], markdown: bool) -> str:
    compared = [(metric, group) for metric in columns for group in ("seen", "unseen", "harmonic")]
    rows = [
        [name, *(_number(summary[group][metric]) for metric, group in compared)]
        for name, summary in runs.items()
    ]
    if markdown:
        headings = [
            f"h{columns[metric].removeprefix('m')}"
            if group == "harmonic"
            else f"{columns[metric]} {group}"
            for metric, group in compared
        ]
        return markdown_table(["run", *headings], rows)
    blocks = [columns[metric] if group == "seen" else "" for metric, group in compared]
    groups = ["h" if group == "harmonic" else group for _, group in compared]
    return _grid([["", *blocks], ["run", *groups]], rows)


def format_classes(summary: Mapping, *, unseen_only: bool = False, markdown: bool = False) -> str:
    """One row a class that occurs, best PQ first, with the counts that SQ alone hides.

    A class never found has SQ 0 in the means; its row shows why (TP 0).

    Args:
      summary: of `PanopticQuality.summarize`.
    """
    chosen = [
        row
        for row in summary["per_class"]
        if row["tp"] + row["fp"] + row["fn"] > 0 and not (unseen_only and row["is_seen"])
    ]
    chosen.sort(key=lambda row: (-row["pq"], row["name"]))
    columns = {key: key.upper() for key in (*METRICS, "tp", "fp", "fn")}
    return _classes_table(chosen, columns, markdown)


def format_semantic_classes(summary: Mapping, *, markdown: bool = False) -> str:
    """One row a class that occurs, best IoU first, with its pixels.

    Args:
      summary: of `SemanticIoU.summarize`.
    """
    chosen = [row for row in summary["per_class"] if row["annotated"] + row["predicted"] > 0]
    chosen.sort(key=lambda row: (-row["iou"], row["name"]))
    columns = {"iou": "IoU", "accuracy": "acc"}
    columns |= {"annotated": "pixels", "predicted": "predicted", "correct": "correct"}
    return _classes_table(chosen, columns, markdown)


def format_instance_classes(summary: Mapping, *, markdown: bool = False) -> str:
    """One row a class that occurs, best AP first, with its counts (TP at IoU 0.5).

    Args:
      summary: of `AveragePrecision.summarize`.
    """
    chosen = [row for row in summary["per_class"] if row["instances"] + row["detections"] > 0]
    # A class that is only predicted has no AP and comes last.
    chosen.sort(key=lambda row: (-row["ap"] if row["instances"] else 1.0, row["name"]))
    columns = {"ap": "AP", "ap50": "AP50", "recall50": "recall50"}
    columns |= {"instances": "annotated", "detections": "detected", "true_positives": "TP"}
    return _classes_table(chosen, columns, markdown)


def _classes_table(rows: Sequence[Mapping], columns: Mapping[str, str], markdown: bool) -> str:
    header = ["class", "", "", *columns.values()]
    cells = [
        [
            row["name"],
            "thing" if row["is_thing"] else "stuff",
            "seen" if row["is_seen"] else "unseen",
            *(_number(row[key]) for key in columns),
        ]
        for row in rows
    ]
    return markdown_table(header, cells) if markdown else _grid([header], cells)


def flatten_summary(summary: Mapping) -> dict[str, float]:
    """A summary as scalars for a metric writer: pq, pq_seen, pq_unseen, ..., hpq, hsq, hrq.

    Likewise miou, ..., hiou and ap, ap50, ..., hap, hap50 where they were measured. Quantities
    without a value (NaN) are left out.
    """
    scalars = {}

    def add(inner: Mapping, columns: Iterable[str], harmonic: Mapping[str, str]) -> None:
        for group in GROUPS:
            for metric in columns if group in inner else ():
                scalars[metric if group == "all" else f"{metric}_{group}"] = inner[group][metric]
        for metric, name in harmonic.items():
            scalars[name] = inner["harmonic"][metric]

    if "all" in summary:
        add(summary, _PANOPTIC, {metric: f"h{metric}" for metric in METRICS})
    if "semantic" in summary:
        add(summary["semantic"], _SEMANTIC, {"miou": "hiou"})
    if "instance" in summary:
        add(summary["instance"], _INSTANCE, {"ap": "hap", "ap50": "hap50"})
    return {name: float(value) for name, value in scalars.items() if math.isfinite(value)}
