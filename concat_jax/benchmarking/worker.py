"""One case by one implementation, in a process of its own.

A process each keeps one framework's threads, caches and memory out of the other's measurement.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.measure import Measurement
from concat_jax.core.runtime import keep_freed_memory


def main(argv: list[str]) -> None:
    """`worker.py JOB RESULT`: reads a job's json, writes the measurements' json and npz."""
    job = json.loads(Path(argv[1]).read_text())
    case = Case(**job["case"])
    model = Path(job["model"])
    if job["keep_memory"]:
        keep_freed_memory()
    results = _run(case, model, job)
    path = Path(argv[2])
    arrays = {
        f"{name}/{key}": value
        for name, result in results.items()
        for key, value in result.outputs.items()
    }
    np.savez(path.with_suffix(".npz"), **arrays)
    content = {
        name: dataclasses.asdict(dataclasses.replace(result, outputs={}))
        for name, result in results.items()
    }
    path.with_suffix(".json").write_text(json.dumps(content))


def _run(case: Case, model: Path, job: Mapping[str, Any]) -> dict[str, Measurement]:
    implementation, repeats = job["implementation"], job["repeats"]
    if implementation != "ours":
        from concat_jax.benchmarking import reference

        compiled = implementation == "torch.compile"
        return {implementation: reference.run(case, model, repeats, compiled=compiled)}
    if case.task == "alignment":
        from concat_jax.benchmarking import alignment

        return alignment.run(case, model, repeats)
    if case.task == "panoptic_quality":
        from concat_jax.benchmarking import panoptic_quality

        return panoptic_quality.run(case, job["inputs"], repeats)
    if case.task == "query_stages":
        from concat_jax.benchmarking import query_stages

        return query_stages.run(case, model, repeats)
    if case.task == "two_stage":
        from concat_jax.benchmarking import two_stage

        return two_stage.run(case, model, repeats, Path(job["inputs"]))
    from concat_jax.benchmarking import ours

    return {implementation: ours.run(case, model, repeats)}


if __name__ == "__main__":
    main(sys.argv)
