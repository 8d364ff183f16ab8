"""One case by one implementation, in a process of its own.

A process each keeps one framework's threads, caches and memory out of the other's measurement.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.host_memory import keep_freed_memory


def main(argv: list[str]) -> None:
    """`worker.py JOB RESULT`: reads a job's json, writes the measurement's json and npz."""
    job = json.loads(Path(argv[1]).read_text())
    case = Case(**job["case"])
    model = Path(job["model"])
    if job["keep_memory"]:
        keep_freed_memory()
    if job["implementation"] == "ours":
        from concat_jax.benchmarking import ours

        result = ours.run(case, model, job["repeats"])
    else:
        from concat_jax.benchmarking import reference

        compiled = job["implementation"] == "torch.compile"
        result = reference.run(case, model, job["repeats"], compiled=compiled)
    folder = Path(argv[2])
    np.savez(folder.with_suffix(".npz"), **result.outputs)
    content = dataclasses.asdict(dataclasses.replace(result, outputs={}))
    folder.with_suffix(".json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv)
