"""An experiment: a config's stages in order, each from where it stood, then evaluation."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
from etils.epath import Path

from concat_jax.core.config import check_choice
from concat_jax.core.files import FileError, as_path, write_json
from concat_jax.core.prefetch import in_threads
from concat_jax.core.progress import format_seconds
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation import calibration, report
from concat_jax.experiment import evidence, looks
from concat_jax.experiment.batches import check_clip_targets, query_bank, stage_batches
from concat_jax.experiment.class_embeddings import ClassEmbeddings
from concat_jax.experiment.copy_parameters import check_copies, copy_parameters
from concat_jax.experiment.elsewhere import Elsewhere
from concat_jax.experiment.model import write_labels
from concat_jax.experiment.parameters import INIT, Parameters, initial_path
from concat_jax.experiment.setup import make_setup
from concat_jax.experiment.workdir import (
    check_origins,
    claim_workdir,
    evaluation_settings,
    note_origin,
    read_result,
    trained_stages,
)
from concat_jax.inference.heads import TextHead
from concat_jax.inference.predictor import Predictor
from concat_jax.inference.programs import Network
from concat_jax.stages.stage import COMES_WITH, MATCHING_PROJECTOR, TEXT
from concat_jax.training.checkpoints import CheckpointError
from concat_jax.training.loop import LoopConfig, train_stage
from concat_jax.training.metrics import MetricWriter, Mirror
from concat_jax.training.sharding import (
    along_batch,
    check_batch_size,
    copy_to_host,
    inference_mesh,
    make_mesh,
)

if TYPE_CHECKING:
    from data_pipelines.datasets import Datasets

REPORT_KEYS = ("config", "results", "table")


class Experiment:
    """The stages of one config in one workdir."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        datasets: Datasets,
        *,
        trains: bool = True,
        mirror: Callable[[str], Mirror] | None = None,
    ):
        """With `trains` False nothing is written, and cached CLIP targets need not be there yet.

        `mirror` gives who is told of a stage's scalars besides, by its name.
        """
        self.setup = setup = make_setup(config, datasets)
        self.workdir, self.datasets = workdir, datasets
        self._mirror = mirror or (lambda name: None)
        self.elsewhere = Elsewhere(config)
        self.mesh = make_mesh(setup.mesh.devices, setup.mesh.fsdp)
        self.parameters = Parameters(setup, workdir, self.mesh)
        self.embeddings = ClassEmbeddings(
            config.text,
            setup.networks.clip,
            setup.tokenizer,
            lambda source: self.parameters.whole("clip", source),
        )
        self._check_order()
        for name in config.eval.stages:
            setup.check_predicts(name, "config.eval.stages")
        if trains:
            setup.check_files()
            if held_out := self.held_out():  # what is wrong with it shows now
                evidence.check_shows_both(held_out)
            check_origins(workdir, (*config.stages, *config.eval.stages))
            for name in config.stages:
                if not self.parameters.is_finished(name):
                    if setup.make_stage(name).loss is not None:
                        where = f"config.train.{name}.batch_size"
                        check_batch_size(setup.stages[name].batch_size, self.mesh, where)
                    check_clip_targets(self, name, with_weights=False)
        claim_workdir(workdir, config, write=trains, data_identity=datasets.identity)
        if trains and jax.process_index() == 0:
            write_labels(workdir, datasets)

    def _check_order(self) -> None:
        """Every subtree a stage takes must come from an earlier stage, of this run or before."""
        config, stages = self.setup.config, self.setup.stages
        before: list[str] = []
        for name in config.stages:
            # A mistake in a late stage's settings must not show after days of earlier ones.
            self.setup.optimizer(name)
            self.setup.make_stage(name)
            looks.check(self, name)
            if stages[name].oracle and self.datasets.oracle is None:
                raise ValueError(
                    f"config.train.{name}.oracle needs images that show unseen classes, and data "
                    f"of kind {config.data.kind!r} offers none for training."
                )
            for subtree, source in stages[name].sources.items():
                if source == INIT:
                    path = initial_path(config, subtree)
                    if subtree == "segmentor" and path is not None:
                        self.parameters.check_unseen(path)
                    continue
                check_choice(source, stages, f"config.train.{name}.takes.{subtree} names no stage:")
                if source not in before and not self.parameters.is_finished(source):
                    raise CheckpointError(
                        f"Stage {name!r} takes {subtree!r} from stage {source!r}, which has not "
                        f"finished in {self.workdir}; put {source!r} before {name!r} in "
                        "config.stages."
                    )
                given = self.setup.make_stage(source).trains
                if subtree in stages[name].takes and subtree not in given:
                    raise ValueError(
                        f"config.train.{name}.takes.{subtree} is {source!r}, a stage that trains "
                        f"{' and '.join(given)} alone; name one that trains {subtree!r}."
                    )
            if not self.parameters.is_finished(name):
                check_copies(self.setup, self.parameters, name)
            before.append(name)

    def run(self) -> dict:
        """Train what is not finished, evaluate, write `report.json`; returns the report."""
        start = time.monotonic()
        config, report_path = self.setup.config, self.workdir / "report.json"
        if self.datasets.identity and config.eval.stages and not trained_stages(self.workdir):
            self._read_evaluation_images()
        trained = {}
        for number, name in enumerate(config.stages, start=1):
            began = time.monotonic()
            print(f"\n[{number}/{len(config.stages)}]", end=" ")
            if self.parameters.is_finished(name):
                print(f"Stage {name}: already finished in {self.workdir}.")
            else:
                self.train(name)
                trained[name] = {"seconds": round(time.monotonic() - began, 1)}
        # Another model or other evaluation settings than the report's are looked at anew.
        shown = evaluation_settings(config)
        titles = {n: t for n, t in config.eval.stages.items() if self.parameters.is_finished(n)}
        check_origins(self.workdir, titles)
        if not trained and (saved := read_result(report_path, *REPORT_KEYS)):
            # A run of fewer stages may have left a report of fewer.
            if saved["config"] == shown and saved.get("stages_evaluated") == sorted(titles):
                print(f"This run is finished; its report is {report_path}.\n")
                print(saved["table"])
                return saved
        rules = config.eval.get("keep_rules", ()) or (self.setup.predict.keep_rule,)
        results = {
            f"{title}{f', rule {rule}' if len(rules) > 1 else ''}": self.evaluate(name, rule)
            for name, title in titles.items()
            for rule in rules
        }
        table = report.format_comparison(results) if results else "No stage is evaluated."
        elsewhere = {title: self.elsewhere.score(self, name) for name, title in titles.items()}
        if others := self.elsewhere.format(results, elsewhere):
            table += f"\n\n{others}"
        measured = self._evidence(titles)
        if measured:
            table += f"\n\n{evidence.format_evidence(measured)}"
        for title, summary in results.items():
            print(f"\n{title}\n{report.format_table(summary)}")
        print(f"\n{table}\n")
        seconds = time.monotonic() - start
        out = {"stages": trained, "results": results, "evidence": measured, "table": table}
        out |= {"elsewhere": elsewhere}
        out |= {"seconds": round(seconds, 1), "config": shown, "stages_evaluated": sorted(titles)}
        if config.get("init", {}).get("allow_unseen_weights", False):
            out["not_zero_shot"] = "config.init.allow_unseen_weights: the segmentor may know them"
        if jax.process_index() == 0:
            write_json(report_path, out)
        print(f"Done in {format_seconds(seconds)}; report: {report_path}")
        return out

    def _read_evaluation_images(self) -> None:
        """Once before the first stage: one at fault would end the run after the last."""
        print("Reading the images of the evaluation, to find faults before training.", flush=True)
        try:
            self.elsewhere.open(self)
            collections.deque(self.datasets.evaluation(), maxlen=0)
        except FileError as error:
            raise FileError(
                f"{error} It is of the evaluation; python -m data_pipelines.prepare checks all "
                "images of a data set."
            ) from error

    def _evidence(self, titles: Mapping[str, str]) -> dict[str, Any]:
        """Title to what no bias can fake of a stage; γ is chosen on the world's other split."""
        held_out = self.held_out()
        if held_out is None:
            return {}
        return {
            title: evidence.measure(
                self, name, held_out.evaluation(), self.datasets.evaluation(), self.workdir / name
            )
            for name, title in titles.items()
        }

    def held_out(self) -> Datasets | None:
        """The world of `config.eval.bias_split`; None where that names none.

        Raises ValueError if there is no such split, as other data than the synthetic world has
        none, and if it is the split that is scored.
        """
        from data_pipelines.datasets import make_datasets

        config = self.setup.config
        if not (split := config.eval.get("bias_split", "")):
            return None
        if config.data.kind != "synthetic":
            raise ValueError(
                f"config.eval.bias_split is {split!r}, a split of the synthetic world, which "
                f"config.data of kind {config.data.kind!r} has not; set config.eval.bias_split to "
                "''."
            )
        if split == config.data.eval_split:
            raise ValueError(
                "γ is chosen on other scenes than are scored, and config.eval.bias_split and "
                f"config.data.eval_split are both {split!r}; set config.eval.bias_split to another "
                "split, or to '' for scores without γ."
            )
        return make_datasets({**config.data, "eval_split": split}, seed=config.seed)

    def train(self, name: str) -> None:
        """Train one stage to its end."""
        setup, settings = self.setup, self.setup.stages[name]
        stage = setup.make_stage(name)
        check_clip_targets(self, name, with_weights=True)
        taken = {s: self.parameters.get(s, source) for s, source in settings.takes.items()}
        frozen = {
            read: self._read(read, settings.takes[COMES_WITH.get(read, read)])
            for read in stage.reads
        }
        if stage.start is None:
            # A subtree that a stage both takes and trains is a warm start.
            params = {s: taken.get(s) or self.parameters.fresh(s, name) for s in stage.trains}
            batches = stage_batches(self, name, frozen.get(TEXT))
        else:
            bank = query_bank(self, name, frozen[TEXT])
            params, batches = stage.start(bank, frozen), in_threads(bank.batch)
        for target, source in settings.copies.items():
            *stage_name, part = source.split(":")
            subtree = part.split("/")[0]
            given = {subtree: self.parameters.get(subtree, *stage_name)} if stage_name else taken
            params = copy_parameters(params, target, given, part)
        note_origin(self.workdir, name, settings.sources.values())
        trained = train_stage(
            name,
            stage,
            params=params,
            frozen=frozen,
            batches=lambda first, count: batches(range(first, first + count)),
            workdir=self.workdir,
            mesh=self.mesh,
            loop=LoopConfig(
                steps=settings.steps,
                seed=setup.config.seed,
                log_every=settings.log_every,
                save_every=settings.save_every,
                keep=settings.keep,
                max_skips=settings.max_skips,
                eval_every=settings.eval_every,
                profile=setup.profile if setup.profile.stage == name else None,
                tensorboard=setup.config.tensorboard,
                fusion_mb=setup.mesh.fusion_mb,
            ),
            optimizer=setup.optimizer(name),
            look=looks.look(self, name) if settings.eval_every else None,
            mirror=self._mirror(name),
        )
        for subtree, tree in trained.items():
            self.parameters.keep(subtree, name, tree)

    def _read(self, read: str, source: str) -> Any:
        if read == TEXT:
            return self.embeddings.get(source, self.setup.vocabulary)
        return self.parameters.get("projector" if read == MATCHING_PROJECTOR else read, source)

    def check_stage(self, name: str) -> None:
        """Refuse a stage that cannot be scored: of --stage, unfinished, or of mixed origin."""
        self.setup.check_predicts(name, "--stage")
        if not self.parameters.is_finished(name):
            raise ValueError(f"Stage {name!r} has not finished in {self.workdir}; train it first.")
        check_origins(self.workdir, (name,))

    def predictor(
        self, name: str, vocabulary: Vocabulary | None = None, **changes: Any
    ) -> Predictor:
        """What holds after stage `name`, on this host's devices alone.

        Args:
          vocabulary: the names; None takes those that the config evaluates by.
          **changes: fields of `PredictConfig`, instead of those of config.eval.settings.
        """
        setup = self.setup
        vocabulary = vocabulary or setup.eval_vocabulary
        sources = setup.holds_after(name)
        params = {s: self.parameters.whole(s, sources[s]) for s in ("segmentor", "projector")}
        text = self.embeddings.get(sources["clip"], vocabulary)
        training_text = None
        if vocabulary is not setup.vocabulary:
            training_text = self.embeddings.get(sources["clip"], setup.vocabulary)
        config = dataclasses.replace(setup.predict, **changes)
        mesh = inference_mesh(self.mesh, config.batch_size)
        params, text, training_text = copy_to_host((params, text, training_text), mesh)
        return Predictor(
            Network(params["segmentor"], setup.networks.segmentor),
            TextHead(params["projector"], text, None, training_text, setup.networks.projector),
            vocabulary,
            config,
            sharding=along_batch(mesh),
        )

    def sweep(
        self, name: str, examples: Iterable[Mapping], gammas: Iterable[float]
    ) -> calibration.Sweep:
        """What holds after a stage, scored at many γ, and how it names queries."""
        if self.setup.eval_vocabulary is not self.setup.vocabulary:
            raise ValueError(
                "gamma weighs the seen classes of the training data against the unseen ones; set "
                "config.data.eval_kind to '' to choose it."
            )
        if not len(self.setup.vocabulary.unseen):
            raise ValueError(
                f"gamma weighs seen classes against unseen ones, and all "
                f"{len(self.setup.vocabulary)} classes of the data are seen."
            )
        gammas = calibration.check_gammas(gammas)
        predictor = self.predictor(name, gamma=gammas, tasks=("panoptic", "queries"))
        return calibration.sweep(predictor, examples, name=name)

    def evaluate(self, name: str, keep_rule: str = "", *, num_extremes: int = 0) -> dict:
        """Score what holds after stage `name`; pictures and predictions go to its folder.

        `num_extremes` of the worst and of the best images are drawn besides the config's pictures.
        Under another keep rule than the config's they go to a folder of the rule in there.
        """
        config, folder = self.setup.config, self.workdir / name
        own_rule = self.setup.predict.keep_rule or TextHead.KEEP_RULE
        keep_rule = keep_rule or own_rule
        if keep_rule != own_rule:
            folder = folder / f"rule_{keep_rule}"
        predictor = self.predictor(name, keep_rule=keep_rule)
        writer = MetricWriter(folder, tensorboard=config.tensorboard, mirror=self._mirror(name))
        with contextlib.closing(writer):
            summary = looks.score(
                self,
                predictor,
                self.datasets.evaluation(jax.process_index(), jax.process_count()),
                writer,
                self.setup.stages[name].steps,
                folder,
                name=name,
                num_extremes=num_extremes,
                coco_folder=folder if config.eval.write_coco else None,
            )
        return summary | {"keep_rule": keep_rule}


def open_experiment(
    config: ml_collections.ConfigDict, workdir: str | Path, **options: Any
) -> Experiment:
    """The experiment of a config on its own data, shared by the hosts.

    `options` are of `Experiment`.
    """
    from data_pipelines.datasets import make_datasets

    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    datasets = make_datasets(config.data, seed=config.seed, **hosts)
    return Experiment(config, as_path(workdir), datasets, **options)


def run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    mirror: Callable[[str], Mirror] | None = None,
) -> dict:
    """Run a config in a workdir; returns the report. Errors are raised, as for any function."""
    return open_experiment(config, workdir, mirror=mirror).run()
