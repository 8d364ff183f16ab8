"""A stage on further data sets, each with names of its own: `config.eval.elsewhere`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_collections

from concat_jax.core.config import build, check_choice
from concat_jax.evaluation.evaluate import evaluate
from concat_jax.evaluation.report import flatten_summary, markdown_table, number
from concat_jax.experiment.class_embeddings import check_names
from concat_jax.inference.predictor import TASKS

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment
    from data_pipelines.loader import SegmentationLoader

# Column to its name in `flatten_summary`.
COLUMNS = {"PQ": "pq", "mIoU": "miou", "AP": "ap"}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A section of `config.eval.elsewhere`.

    Attributes:
      kind, part, split_file: as `open_source` has them.
      root: of its files; "" leaves the data set out.
      tasks: what is scored; several make the networks run once.
    """

    kind: str
    part: str
    tasks: tuple[str, ...] = ("semantic",)
    root: str = ""
    split_file: str = ""

    def __post_init__(self):
        for task in self.tasks:
            check_choice(task, TASKS[:-1], f"config.eval.elsewhere of {self.kind} has no task")


class Elsewhere:
    """The data sets of a config that have a root, opened when they are first needed."""

    def __init__(self, config: ml_collections.ConfigDict):
        sections = config.eval.get("elsewhere", {})
        self._config, self._loaders = config, {}
        self.sets = {
            name: build(DataSet, section, f"config.eval.elsewhere.{name}")
            for name, section in sections.items()
        }
        self.without_root = tuple(name for name, one in self.sets.items() if not one.root)

    def open(self, run: Experiment) -> Mapping[str, SegmentationLoader]:
        """Each data set by name; errors as `open_source`, and for names that cannot be read."""
        from data_pipelines.datasets import evaluation_part

        for name, one in self.sets.items():
            if name in self._loaders or not one.root:
                continue
            where = dict(eval_kind=one.kind, eval_root=one.root, eval_split_file=one.split_file)
            data = {**self._config.data, **where, "eval_part": one.part}
            self._loaders[name] = evaluation_part(data, seed=self._config.seed)
            vocabulary = self._loaders[name].vocabulary
            check_names(self._config.text, run.setup.tokenizer, vocabulary)
        return self._loaders

    def score(self, run: Experiment, stage: str) -> dict[str, Any]:
        """Data set to the summary of `evaluate`; each vocabulary is embedded once."""
        hosts = jax.process_index(), jax.process_count()
        return {
            name: evaluate(
                run.predictor(stage, loader.vocabulary, tasks=self.sets[name].tasks, windows=False),
                loader.eval_examples(*hosts),
                name=f"{stage}, {name}",
            )
            for name, loader in self.open(run).items()
        }

    def format(self, own: Mapping[str, Mapping], found: Mapping[str, Mapping[str, Mapping]]) -> str:
        """One Markdown table, percent, data set by data set; "" where there are no others.

        Args:
          own: title to the summary of the config's own data set.
          found: title to what `score` gave.
        """
        if not any(found.values()):
            return ""
        data = self._config.data
        scored = [(data.get("eval_kind", "") or data.kind, *one) for one in own.items()]
        for name in dict.fromkeys(name for summaries in found.values() for name in summaries):
            scored += [(name, title, summaries[name]) for title, summaries in found.items()]
        lines = [
            [name, title, summary["classes"], summary["images"]]
            + [number(flatten_summary(summary).get(key)) for key in COLUMNS.values()]
            for name, title, summary in scored
        ]
        table = markdown_table(["data set", "run", "classes", "images", *COLUMNS], lines)
        missing = ", ".join(self.without_root)
        return table + (f"\n\nWithout a root, so not scored: {missing}." if missing else "")
