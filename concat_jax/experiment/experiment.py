"""A whole run: the config's stages in order, each from where it stood, then evaluation."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from concat_jax.core import config as configuration
from concat_jax.core.arrays import fingerprint
from concat_jax.core.files import write_json
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import format_seconds
from concat_jax.core.runtime import light_compiler_options
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation import calibration, report
from concat_jax.evaluation.evaluate import PICTURES, evaluate
from concat_jax.experiment.batches import stage_batches
from concat_jax.experiment.class_embeddings import (
    check_names,
    check_text,
    embed_vocabulary,
    make_tokenizer,
)
from concat_jax.experiment.copy_parameters import copy_parameters
from concat_jax.experiment.initial import initial_params, initial_path
from concat_jax.experiment.workdir import claim_workdir, evaluation_settings, read_report
from concat_jax.inference.heads import TextHead
from concat_jax.inference.predictor import Network, PredictConfig, Predictor
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.generators import make_generator
from concat_jax.models.networks import Networks, Params, make_networks
from concat_jax.stages import con
from concat_jax.stages.bank_files import BankConfig
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.registry import make_stage
from concat_jax.stages.stage import (
    COMES_WITH,
    MATCHING_PROJECTOR,
    TEXT,
    Context,
    Stage,
    StageConfig,
)
from concat_jax.training.checkpoints import CheckpointError, StageCheckpoints, is_saved
from concat_jax.training.loop import LoopConfig, train_stage
from concat_jax.training.metrics import MetricWriter
from concat_jax.training.optimizer import OptimizerConfig
from concat_jax.training.sharding import (
    along_batch,
    copy_to_host,
    inference_mesh,
    make_mesh,
    replicated,
)

if TYPE_CHECKING:
    from data_pipelines.datasets import Datasets


class Run:
    """The stages of one config in one workdir."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        datasets: Datasets,
        *,
        trains: bool = True,
    ):
        """Args:
        config: as the files in `configs/` make it.
        workdir: gets a folder a stage, `config.json` and `report.json`.
        datasets: training, caption and evaluation data.
        trains: False where only the networks and what stages gave are wanted; then nothing is
          written, and cached CLIP targets need not be there yet.

        Raises:
          ValueError: for a config that cannot be run, before anything is written.
        """
        self.config, self.workdir, self.datasets = config, workdir, datasets
        self.vocabulary = datasets.vocabulary
        self.eval_vocabulary = datasets.eval_vocabulary or datasets.vocabulary
        self.stages = {
            name: configuration.build(StageConfig, section, f"config.train.{name}")
            for name, section in config.train.items()
        }
        for name in config.stages:
            configuration.check_choice(name, self.stages, "config.stages names no stage of")
        for name in config.eval.stages:
            configuration.check_choice(name, self.stages, "config.eval.stages names no stage of")
        side = datasets.eval_size
        settings = {"short_side": side, "long_side": side, **config.eval.settings}
        self.eval = configuration.build(PredictConfig, settings, "config.eval.settings")
        self.loss = configuration.build(SegmentationLossConfig, config.loss, "config.loss")
        self.crops = configuration.build(CropConfig, config.crops, "config.crops")
        self.bank = configuration.build(BankConfig, config.get("bank", {}), "config.bank")
        check_text(config.text)
        self.tokenizer = make_tokenizer(config, datasets.caption_words)
        for vocabulary in {self.vocabulary, self.eval_vocabulary}:
            check_names(config.text, self.tokenizer, vocabulary)
        model = config.model.to_dict()
        model["clip"] |= {
            "vocab_size": self.tokenizer.vocab_size,
            "context_length": self.tokenizer.context_length,
            "eot_id": self.tokenizer.eot_id,
        }
        self.networks: Networks = make_networks(model)
        self.context = Context(
            self.networks,
            self.vocabulary,
            self.loss,
            self.crops,
            has_clip_targets=bool(config.data.get("clip_targets", "")),
        )
        self.mesh: Mesh = make_mesh(config.mesh.fsdp, config.mesh.devices or None)
        self._given: dict[tuple[str, str], Params] = {}
        self._text: dict[tuple[str, Vocabulary], np.ndarray] = {}
        self._inference_mesh = inference_mesh(self.mesh, self.eval.batch_size)
        self._check_order()
        if trains:
            for name in config.stages:
                if not self.is_finished(name):
                    self._check_clip_targets(name, with_weights=False)
        claim_workdir(workdir, config, write=trains, data_identity=datasets.identity)

    def _check_order(self) -> None:
        """Every subtree a stage takes must come from an earlier stage, of this run or before."""
        before: list[str] = []
        for name in self.config.stages:
            # A mistake in a late stage's settings must not show after days of earlier ones.
            configuration.build(
                OptimizerConfig, self.stages[name].optimizer, f"config.train.{name}.optimizer"
            )
            self.make_stage(name)
            for subtree, source in self.stages[name].takes.items():
                if source == "init":
                    initial_path(self.config, subtree)
                    continue
                configuration.check_choice(
                    source, self.stages, f"config.train.{name}.takes.{subtree} names no stage:"
                )
                if source not in before and not self.is_finished(source):
                    raise CheckpointError(
                        f"Stage {name!r} takes {subtree!r} from stage {source!r}, which has not "
                        f"finished in {self.workdir}; put {source!r} before {name!r} in "
                        "config.stages."
                    )
            before.append(name)

    def is_finished(self, name: str) -> bool:
        """Whether the stage's last step is saved in the workdir, and undamaged."""
        return is_saved(self.workdir, name, self.stages[name].steps)

    def run(self) -> dict:
        """Train what is not finished, evaluate, write `report.json`; returns the report."""
        start = time.monotonic()
        report_path = self.workdir / "report.json"
        stages = {}
        for number, name in enumerate(self.config.stages, start=1):
            began = time.monotonic()
            print(f"\n[{number}/{len(self.config.stages)}]", end=" ")
            if self.is_finished(name):
                print(f"Stage {name}: already finished in {self.workdir}.")
            else:
                self.train(name)
                stages[name] = {"seconds": round(time.monotonic() - began, 1)}
        # Another model or other evaluation settings than the report's are looked at anew.
        shown = evaluation_settings(self.config)
        evaluated = {n: t for n, t in self.config.eval.stages.items() if self.is_finished(n)}
        if not stages and (saved := read_report(report_path)):
            # A run of fewer stages may have left a report of fewer.
            if saved["config"] == shown and set(saved["results"]) == set(evaluated.values()):
                print(f"This run is finished; its report is {report_path}.\n")
                print(saved["table"])
                return saved
        results = {}
        for name, title in evaluated.items():
            results[title] = self.evaluate(name)
        table = report.format_comparison(results) if results else "No stage is evaluated."
        for title, summary in results.items():
            print(f"\n{title}\n{report.format_table(summary)}")
        print(f"\n{table}\n")
        seconds = time.monotonic() - start
        out = {"stages": stages, "results": results, "table": table, "seconds": round(seconds, 1)}
        out["config"] = shown
        if jax.process_index() == 0:
            write_json(report_path, out)
        print(f"Done in {format_seconds(seconds)}; report: {report_path}")
        return out

    def train(self, name: str) -> None:
        """Train one stage to its end."""
        settings = self.stages[name]
        stage = self.make_stage(name)
        self._check_clip_targets(name, with_weights=True)
        taken = {s: self.give(s, source) for s, source in settings.takes.items()}
        # A subtree that a stage both takes and trains is a warm start.
        rng = jax.random.key(self.config.seed)
        params = {
            subtree: taken[subtree] if subtree in taken else self._init(subtree, rng, name)
            for subtree in stage.trains
        }
        for target, source in settings.copies.items():
            params = copy_parameters(params, target, taken, source)
        frozen = {read: self._read(read, name) for read in stage.reads}
        batch_fn = stage_batches(self, name, frozen.get(TEXT))
        trained = train_stage(
            name,
            stage,
            params=params,
            frozen=frozen,
            batches=lambda first, count: prefetch(batch_fn, first, count, depth=4, num_threads=1),
            workdir=self.workdir,
            mesh=self.mesh,
            loop=LoopConfig(
                steps=settings.steps,
                seed=self.config.seed,
                log_every=settings.log_every,
                save_every=settings.save_every,
                tensorboard=self.config.tensorboard,
            ),
            optimizer=configuration.build(
                OptimizerConfig, settings.optimizer, f"config.train.{name}.optimizer"
            ),
        )
        for subtree, tree in trained.items():
            self._given[subtree, name] = tree

    def _read(self, read: str, name: str) -> Any:
        # What stage `name` reads under the name `read`.
        source = self.stages[name].takes[COMES_WITH.get(read, read)]
        if read == TEXT:
            return self.text_embeddings(source)
        return self.give("projector" if read == MATCHING_PROJECTOR else read, source)

    def _init(self, subtree: str, rng: jax.Array, name: str) -> Params:
        index = [f.name for f in dataclasses.fields(Networks)].index(subtree)
        options = light_compiler_options()
        make = jax.jit(self.networks_of(name).init, static_argnums=0, compiler_options=options)
        return make(subtree, jax.random.fold_in(rng, index))

    def networks_of(self, name: str) -> Networks:
        """The networks of stage `name`; its generator is that of the stage that it takes it from.

        Raises:
          ValueError: if a generator that the stage names cannot be made.
        """
        source = self.stages[name].takes.get("generator", name) if name in self.stages else name
        fields = self.stages[source].generator if source in self.stages else {}
        if not fields:
            return self.networks
        where = f"config.train.{source}.generator"
        generator = make_generator(fields, self.networks.query_width, where)
        return dataclasses.replace(self.networks, generator=generator)

    def make_stage(self, name: str) -> Stage:
        """The parameters that stage `name` trains and reads, and its loss.

        Raises:
          ValueError: for settings that its kind does not have.
        """
        context = dataclasses.replace(self.context, networks=self.networks_of(name))
        return make_stage(name, self.stages[name], context)

    def give(self, subtree: str, source: str) -> Params:
        """Parameters that stage `source` gave: in memory, or from its last checkpoint."""
        if (subtree, source) not in self._given:
            networks = self.networks_of(source)
            abstract = jax.eval_shape(lambda: networks.init(subtree, jax.random.key(0)))
            if source == "init":
                fresh = functools.partial(
                    self._init, subtree, jax.random.key(self.config.seed), source
                )
                params = initial_params(self.config, subtree, self.networks, abstract, fresh)
                self._given[subtree, source] = jax.device_put(params, replicated(self.mesh))
                return self._given[subtree, source]
            checkpoints = StageCheckpoints(self.workdir, source)
            restored = checkpoints.restore_params(
                [subtree], {subtree: abstract}, replicated(self.mesh)
            )
            checkpoints.close()
            self._given[subtree, source] = restored[subtree]
        return self._given[subtree, source]

    def clip_target_identity(self, source: str) -> dict[str, Any]:
        """What CON's targets depend on besides the images: `weights`, `clip` and `crops`.

        Args:
          source: stage whose CLIP makes them, or "init".
        """
        weights = fingerprint(jax.device_get(self.give("clip", source)))
        return {"weights": weights, **con.target_identity(self.networks.clip, self.crops)}

    def _check_clip_targets(self, name: str, *, with_weights: bool) -> None:
        """Refuse cached targets that stage `name` must not learn from, before it compiles.

        Args:
          name: any stage; one that reads no cached targets passes.
          with_weights: also compare CLIP's parameters, which have to be read for that.
        """
        if not set(con.TARGET_FIELDS) <= set(self.make_stage(name).batch_fields):
            return
        if self.datasets.check_clip_targets is None:
            raise ValueError(
                f"Stage {name!r} is to learn from cached CLIP targets, and none are configured: "
                "set config.data.clip_targets to the folder that `python -m "
                "concat_jax.cache_clip_targets` filled, or "
                f"config.train.{name}.method.targets to 'online'."
            )
        source = self.clip_source(name)
        if source != "init" and not self.is_finished(source):
            raise ValueError(
                f"Stage {name!r} is to learn from cached targets of the CLIP of stage {source!r}, "
                f"which has not finished in {self.workdir}: train that stage alone "
                "(config.stages), then fill the cache with `python -m "
                "concat_jax.cache_clip_targets`."
            )
        if with_weights:
            expected = self.clip_target_identity(source)
        else:
            expected = con.target_identity(self.networks.clip, self.crops)
        self.datasets.check_clip_targets(expected)

    def clip_source(self, name: str) -> str:
        """The stage whose CLIP embeds the names for stage `name`."""
        return self.stages[name].takes["clip"]

    def text_embeddings(self, source: str, vocabulary: Vocabulary | None = None) -> np.ndarray:
        """Text embeddings of a vocabulary, by default training's, by the CLIP of stage `source`.

        Returns:
          [K, C] float32, or [K, S, C] where `config.text.synonyms` is "max".
        """
        vocabulary = vocabulary or self.vocabulary
        if (source, vocabulary) not in self._text:
            self._text[source, vocabulary] = embed_vocabulary(
                self.config.text,
                self.networks.clip,
                self.give("clip", source),
                self.tokenizer,
                vocabulary,
            )
        return self._text[source, vocabulary]

    def predictor(self, name: str, **changes: Any) -> Predictor:
        """The segmentor and projector that hold after stage `name`, on this host's devices alone.

        Args:
          name: of a finished stage.
          **changes: fields of `PredictConfig`, instead of those of config.eval.settings.
        """
        sources = {**self.stages[name].takes}
        sources |= {subtree: name for subtree in self.make_stage(name).trains}
        params = {s: self.give(s, sources[s]) for s in ("segmentor", "projector")}
        text = self.text_embeddings(self.clip_source(name), self.eval_vocabulary)
        training_text = None
        if self.eval_vocabulary is not self.vocabulary:
            training_text = self.text_embeddings(self.clip_source(name))
        params, text, training_text = copy_to_host(
            (params, text, training_text), self._inference_mesh
        )
        return Predictor(
            Network(params["segmentor"], self.networks.segmentor),
            TextHead(params["projector"], text, None, training_text, self.networks.projector),
            self.eval_vocabulary,
            dataclasses.replace(self.eval, **changes),
            sharding=along_batch(self._inference_mesh),
        )

    def sweep(
        self, name: str, examples: Iterable[Mapping], gammas: Iterable[float]
    ) -> dict[float, dict]:
        """Score what holds after stage `name` at many γ: `calibration.sweep` on the examples.

        Raises:
          ValueError: for a γ out of range, or if the config evaluates on another data set than it
            trains on.
        """
        if self.eval_vocabulary is not self.vocabulary:
            raise ValueError(
                "gamma weighs the seen classes of the training data against the unseen ones; set "
                "config.data.eval_kind to '' to choose it."
            )
        gammas = calibration.check_gammas(gammas)
        predictor = self.predictor(name, gamma=gammas, tasks=("panoptic",))
        return calibration.sweep(predictor, examples, name=name)

    def evaluate(self, name: str) -> dict:
        """Score the segmentor and projector that hold after stage `name`."""
        folder = self.workdir / name
        leads = jax.process_index() == 0  # shows pictures of the images that are its own
        num_pictures = self.config.eval.num_pictures
        summary = evaluate(
            self.predictor(name),
            self.datasets.evaluation(jax.process_index(), jax.process_count()),
            name=name,
            num_pictures=num_pictures,
            picture_folder=folder if leads else None,
            coco_folder=folder if self.config.eval.write_coco else None,
        )
        writer = MetricWriter(folder, tensorboard=self.config.tensorboard)
        step = self.stages[name].steps
        scalars = report.flatten_summary(summary)
        writer.scalars(step, {f"eval/{key}": value for key, value in scalars.items()})
        if leads and num_pictures and "panoptic" in self.eval.tasks:
            writer.images(step, {"eval/pictures": np.asarray(Image.open(folder / PICTURES))})
        writer.close()
        return summary
