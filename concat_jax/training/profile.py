"""A trace of some steps of a stage, for TensorBoard's profiler and for Perfetto."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Any

import jax
from etils.epath import Path

from concat_jax.core.config import Count
from concat_jax.core.files import replacing

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """`config.profile`: `steps` steps of `stage`, "" none, are traced.

    They begin `after` that many since the stage was started or resumed: the first one compiles.
    """

    stage: str = ""
    after: Count = 10
    steps: int = 5


class StepTracer:
    """Writes a trace of the steps of a `ProfileConfig`, None for none, into a folder.

    JAX writes `plugins/profile/TIME/HOST.xplane.pb` for TensorBoard, which every host does, and a
    `HOST.trace.json.gz` for ui.perfetto.dev beside it.
    """

    def __init__(self, folder: Path, config: ProfileConfig | None):
        self._folder, self._config = folder, config
        self._temporary: tempfile.TemporaryDirectory | None = None

    def before(self, number: int) -> None:
        """Of a step, the `number`-th of this process."""
        if self._config and number == self._config.after:
            self._temporary = tempfile.TemporaryDirectory()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of the readers' threads would crowd out the ops
            jax.profiler.start_trace(self._temporary.name, profiler_options=options)

    def after(self, number: int, result: Any) -> None:
        """Of a step, with the arrays that it computes."""
        if self._temporary and number == self._config.after + self._config.steps - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that has begun."""
        if not self._temporary:
            return
        with self._temporary as written:
            self._temporary = None
            jax.profiler.stop_trace()
            for source in filter(pathlib.Path.is_file, pathlib.Path(written).rglob("*")):
                with replacing(self._folder / source.relative_to(written)) as partial:
                    shutil.copyfile(source, partial)
        print(f"Wrote a trace of {self._config.steps} steps to {self._folder}.", flush=True)
