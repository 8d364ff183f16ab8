"""Tables of measurements in markdown: implementations beside each other, and variants in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from concat_jax.benchmarking.harness import Measurement
from concat_jax.evaluation.report import markdown_table

Results = Mapping[str, Measurement | str]


def compared(cases: Sequence[tuple[str, Results]]) -> str:
    """Cases by ours and the reference, and how far their outputs agree.

    Args:
      cases: name, and implementation to its measurement, or to the reason why it has none.
    """
    heads = ["case", "by", "s (fastest to slowest)", "ratio", "memory, GB", "GFLOP", "compile, s"]
    rows, notes = [], []
    for name, results in cases:
        ours = results.get("ours")
        for by, result in results.items():
            if isinstance(result, str):
                rows.append([name, by, "failed", *[""] * 4])
                continue
            ratio = f"{result.median / ours.median:.2f}" if isinstance(ours, Measurement) else ""
            end = [_gigabytes(result), gigaflop(result), f"{result.compile:.0f}"]
            rows.append([name, by, result.show(), ratio, *end])
        notes += _agreement(name, {k: r for k, r in results.items() if not isinstance(r, str)})
    return "\n\n".join(
        ["Ratio: the implementation's time over ours, above 1 ours is faster."]
        + [markdown_table(heads, rows), *notes]
    )


def _agreement(name: str, results: Mapping[str, Measurement]) -> Iterator[str]:
    theirs = [by for by in results if by != "ours"]
    if "ours" not in results or not theirs:
        return
    ours, reference = results["ours"].outputs, results[theirs[0]].outputs
    logits = [key for key in ours if key.endswith("logits")]
    if logits:
        parts = [f"{key} {relative_difference(ours[key], reference[key]):.1e}" for key in logits]
        yield f"{name}: largest relative difference: {', '.join(parts)}."
    for key in set(ours) - set(logits):
        parts = [f"{by} {result.outputs[key].tolist()}" for by, result in results.items()]
        what = {"segments": "segments found", "loss": "loss at points of their own"}[key]
        yield f"{name}: {what}: {', '.join(parts)}."


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest number of theirs."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def in_turns(results: Mapping[str, Measurement]) -> str:
    """Variants of ours; ratios are to the first, so above 1 that one is better."""
    base_name, base = next(iter(results.items()))
    heads = ["variant", "s (fastest to slowest)", "ratio (lowest to highest of a round)", "GFLOP"]
    rows = []
    for name, result in results.items():
        rounds = np.divide(result.seconds, base.seconds)
        ratio = f"{result.median / base.median:.3f}"
        if name != base_name:
            ratio += f" ({rounds.min():.3f} to {rounds.max():.3f})"
        flops = f"{result.flops / base.flops:.2f}" if base.flops else ""
        end = [gigaflop(result), flops, _gigabytes(result), f"{result.compile:.0f}"]
        rows.append([name, result.show(), ratio, *end])
    return (
        f"{markdown_table([*heads, 'GFLOP ratio', 'temporaries, GB', 'compile, s'], rows)}\n\n"
        f"Ratio: the variant's time over that of {base_name!r}; they took turns in one process. "
        "FLOPs and temporaries by XLA's own account of the compiled programs."
    )


def gigaflop(result: Measurement) -> str:
    """Thousands of them in full, and fractions of one at small sizes."""
    number = result.flops / 1e9
    return f"{number:.{0 if number >= 100 else 3}f}" if number else "not counted"


def _gigabytes(result: Measurement) -> str:
    return f"{result.memory_bytes / 1e9:.2f}" if result.memory_bytes else "not measured"
