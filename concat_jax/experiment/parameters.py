"""Parameters by the stage that gave them: checkpoints, model folders and CLIP's files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import ml_collections
from etils.epath import Path
from jax.sharding import Mesh

from concat_jax.core.batch import QUERY_TARGETS, TARGET_FIELDS
from concat_jax.core.config import check_choice
from concat_jax.core.files import as_path
from concat_jax.core.runtime import light_compiler_options
from concat_jax.experiment.setup import Setup
from concat_jax.models.networks import Networks, Params
from concat_jax.stages.stage import INIT
from concat_jax.training.checkpoints import StageCheckpoints, is_saved
from concat_jax.training.sharding import replicated, split_by_rule
from concat_jax.weights.clip import clip_params_for, read_clip
from concat_jax.weights.model_folder import load_card, segmentor_from_folder


class Parameters:
    """The parameters of one workdir, read when they are first asked for."""

    def __init__(self, setup: Setup, workdir: Path, mesh: Mesh):
        """`mesh`: on whose devices parameters lie, as `split_by_rule` says."""
        self._setup, self._workdir, self._mesh = setup, workdir, mesh
        self._given: dict[tuple[str, str], Params] = {}

    def is_finished(self, name: str) -> bool:
        """Whether a stage's last step is saved in the workdir, and undamaged."""
        return is_saved(self._workdir, name, self._setup.stages[name].steps)

    def get(self, subtree: str, source: str) -> Params:
        """A subtree as a stage, or `INIT` for a file of `config.init`, gave it.

        Raises ValueError if there is no checkpoint, or what is there does not fit the config.
        """
        if (subtree, source) not in self._given:
            abstract = self.abstract(subtree, source)
            if source == INIT:
                shardings = split_by_rule(abstract, self._mesh)
                params = jax.device_put(self._initial(subtree, abstract), shardings)
            else:
                checkpoints = StageCheckpoints(self._workdir, source)
                # Its own last step, as `is_finished` has it, whatever else lies beside it.
                step, wanted = self._setup.stages[source].steps, {subtree: abstract}
                params = checkpoints.restore_params(wanted, self._mesh, step=step)[subtree]
                checkpoints.close()
            self._given[subtree, source] = params
        return self._given[subtree, source]

    def abstract(self, subtree: str, source: str) -> Params:
        """Shapes of a subtree as a stage has it."""
        networks = self._setup.networks_of(source)
        return jax.eval_shape(lambda: networks.init(subtree, jax.random.key(0)))

    def whole(self, subtree: str, source: str) -> Params:
        """As `get`, on every device whole: for what runs outside of a training step."""
        return jax.device_put(self.get(subtree, source), replicated(self._mesh))

    def keep(self, subtree: str, source: str, params: Params) -> None:
        """Remembers what a stage has just given."""
        self._given[subtree, source] = params

    @contextlib.contextmanager
    def holding(self, source: str, given: Params) -> Iterator[None]:
        """Has a stage that is being trained give what it holds now, for a while."""
        for subtree, params in given.items():
            self.keep(subtree, source, params)
        try:
            yield
        finally:
            for subtree in given:
                del self._given[subtree, source]

    def fresh(self, subtree: str, name: str) -> Params:
        """Random parameters of a subtree as stage `name` has it; its key is the subtree's own."""
        index = [f.name for f in dataclasses.fields(Networks)].index(subtree)
        rng = jax.random.fold_in(jax.random.key(self._setup.config.seed), index)
        options = light_compiler_options()
        init = self._setup.networks_of(name).init
        return jax.jit(init, static_argnums=0, compiler_options=options)(subtree, rng)

    def check_unseen(self, path: Path) -> None:
        """Refuses a segmentor that was trained on classes that are to be unseen.

        A backbone's folder names no classes. Raises ValueError unless
        config.init.allow_unseen_weights says that the run is not zero-shot.
        """
        vocabulary, config = self._setup.vocabulary, self._setup.config
        hidden = {vocabulary.names[k].casefold() for k in vocabulary.unseen}
        trained_on = load_card(path).vocabulary
        shown = [trained_on.names[k] for k in trained_on.seen] if trained_on else []
        known = [name for name in shown if name.casefold() in hidden]
        if not known:
            return
        said = (
            f"{path} was trained on {len(known)} classes that this run calls unseen "
            f"({', '.join(known[:3])}{', …' if len(known) > 3 else ''})"
        )
        if not config.init.get("allow_unseen_weights", False):
            raise ValueError(
                f"{said}, so it would not be zero-shot; give a backbone alone, or "
                "--config.init.allow_unseen_weights=True, which the report will tell."
            )
        print(f"Warning: {said}: its scores of unseen classes are not zero-shot.")

    def _check_no_image_embeddings(self, path: Path) -> None:
        for name in self._setup.config.stages:
            stage = self._setup.make_stage(name)
            of_clip = {"clip", *TARGET_FIELDS, QUERY_TARGETS}
            uses = of_clip & {*stage.trains, *stage.reads, *stage.batch_fields}
            if uses and self._setup.stages[name].takes.get("clip") == INIT:
                raise ValueError(
                    f"config.init.clip is {path}, an OWL-ViT: its image tower has no projection to "
                    f"the joint space, and stage {name!r} embeds images; give a whole CLIP, or "
                    "leave out what learns from CLIP's images (of CON, set its global_weight and "
                    "instance_weight to 0)."
                )

    def _initial(self, subtree: str, abstract: Params) -> Params:
        config = self._setup.config
        path = initial_path(config, subtree)
        if subtree == "clip":
            weights = read_clip(path)
            print(f"CLIP: {weights}.")
            if not weights.embeds_images:
                self._check_no_image_embeddings(path)
            return clip_params_for(weights, abstract, self._setup.networks.clip)
        fresh = self.fresh(subtree, INIT)
        if path is None:
            print(
                "Warning: the segmentor starts from random numbers (config.init.segmentor is "
                "empty); the published recipe starts from ImageNet weights of the backbone."
            )
            return fresh
        self.check_unseen(path)
        params, loaded = segmentor_from_folder(path, config.model.segmentor, fresh)
        print(f"The segmentor starts from {path}: {loaded}")
        return params


def initial_path(config: ml_collections.ConfigDict, subtree: str) -> Path | None:
    """Where "clip" or "segmentor" is read from if no stage gives it; None for random numbers."""
    check_choice(subtree, ("clip", "segmentor"), "config.init cannot hold")
    path = config.get("init", {}).get(subtree, "")
    if subtree == "segmentor":
        if path:
            load_card(path)
        return as_path(path) if path else None
    if not path:
        raise ValueError(
            "No CLIP weights are configured: set config.init.clip to a Hugging Face folder, an "
            "OpenAI .pt or an open_clip file, or use a config that trains its own."
        )
    path = as_path(path)
    if not path.exists():
        raise ValueError(f"config.init.clip names {path}, which is not a file or folder.")
    return path
