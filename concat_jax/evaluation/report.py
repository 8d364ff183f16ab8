"""Evaluation results as text: terminal tables, Markdown tables, report.json, scalars for a log."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

GROUPS = ("all", "things", "stuff", "seen", "unseen")
METRICS = ("pq", "sq", "rq")
_COMPARED = [(metric, group) for metric in METRICS for group in ("seen", "unseen", "harmonic")]


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


def _summary_rows(summary: Mapping) -> tuple[list[str], list[list[str]]]:
    rows = [
        [group, *(_number(summary[group][m]) for m in METRICS), _number(summary[group]["n"])]
        for group in GROUPS
    ]
    rows.append(["harmonic", *(_number(summary["harmonic"][m]) for m in METRICS), ""])
    return ["", "PQ", "SQ", "RQ", "n"], rows


def format_table(summary: Mapping, *, markdown: bool = False) -> str:
    """One run as a table: rows all, things, stuff, seen, unseen, harmonic; columns PQ SQ RQ n.

    Args:
      summary: of `PanopticQuality.summarize`; percent. n is the number of classes in the mean.
      markdown: a Markdown table instead of plain text.

    Returns:
      Lines without a trailing newline.
    """
    header, rows = _summary_rows(summary)
    return markdown_table(header, rows) if markdown else _grid([header], rows, rules=(3, 5))


def format_comparison(runs: Mapping[str, Mapping], *, markdown: bool = False) -> str:
    """Several runs as rows, for an ablation.

    Args:
      runs: name of the run (for example "stage 1") to its summary, in the order to print.
      markdown: a Markdown table instead of plain text.

    Returns:
      Columns PQ, SQ and RQ, each for seen, unseen and their harmonic mean (h).

    Raises:
      ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("format_comparison got no run; pass at least one name and its summary.")
    rows = [
        [name, *(_number(summary[group][metric]) for metric, group in _COMPARED)]
        for name, summary in runs.items()
    ]
    if markdown:
        columns = [
            f"h{metric.upper()}" if group == "harmonic" else f"{metric.upper()} {group}"
            for metric, group in _COMPARED
        ]
        return markdown_table(["run", *columns], rows)
    blocks = [metric.upper() if group == "seen" else "" for metric, group in _COMPARED]
    groups = ["h" if group == "harmonic" else group for _, group in _COMPARED]
    return _grid([["", *blocks], ["run", *groups]], rows)


def format_classes(summary: Mapping, *, unseen_only: bool = False, markdown: bool = False) -> str:
    """One row a class that occurs, best PQ first, with the counts that SQ alone hides.

    A class never found has SQ 0 in the means; its row shows why (TP 0).

    Args:
      summary: of `PanopticQuality.summarize`.
      unseen_only: leave the seen classes out.
      markdown: a Markdown table instead of plain text.
    """
    chosen = [
        row
        for row in summary["per_class"]
        if row["tp"] + row["fp"] + row["fn"] > 0 and not (unseen_only and row["is_seen"])
    ]
    chosen.sort(key=lambda row: (-row["pq"], row["name"]))
    header = ["class", "", "", "PQ", "SQ", "RQ", "TP", "FP", "FN"]
    rows = [
        [
            row["name"],
            "thing" if row["is_thing"] else "stuff",
            "seen" if row["is_seen"] else "unseen",
            *(_number(row[key]) for key in (*METRICS, "tp", "fp", "fn")),
        ]
        for row in chosen
    ]
    return markdown_table(header, rows) if markdown else _grid([header], rows)


def flatten_summary(summary: Mapping) -> dict[str, float]:
    """A summary as scalars for a metric writer: pq, pq_seen, pq_unseen, ..., hpq, hsq, hrq.

    Quantities that were not measured (NaN) are left out.
    """
    scalars = {}
    for group in GROUPS:
        for metric in (*METRICS, "sq_matched"):
            scalars[metric if group == "all" else f"{metric}_{group}"] = summary[group][metric]
    for metric in METRICS:
        scalars[f"h{metric}"] = summary["harmonic"][metric]
    return {name: float(value) for name, value in scalars.items() if math.isfinite(value)}


def _jsonable(value):
    """Plain Python with null for NaN and infinities, which strict JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(path: str | os.PathLike, report: Mapping) -> None:
    """Writes a report as strict, indented JSON; the file appears whole or not at all.

    Args:
      path: of the file; its folder is created.
      report: nested mappings, sequences, strings, numbers, numpy scalars and arrays.

    Raises:
      TypeError: if the report holds something JSON has no form for.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_jsonable(report), indent=1, allow_nan=False)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
