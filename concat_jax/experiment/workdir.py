"""What a workdir was made with, and whether a config may go on in it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import ml_collections
from etils.epath import Path

from concat_jax.core import config as configuration
from concat_jax.core.files import append_text, nearest, read_json, write_json
from concat_jax.experiment.workdir_lock import lock_workdir
from concat_jax.stages.stage import INIT
from concat_jax.training.checkpoints import StageCheckpoints

# Config keys that may differ when a run is started again in its workdir: they change what is
# shown or run next, not what was trained. The model is judged by the checkpoints themselves.
EVALUATION_KEYS = ("eval.", "model.", "data.eval_", "data.num_eval_images")
# Cached targets are those that the run would compute, up to augmentation.
FREE_KEYS = (
    *EVALUATION_KEYS,
    "stages",
    "tensorboard",
    "profile.",
    "mesh.",
    "text.cache",
    "data.clip_targets",
    "bank.images_per_shard",
    "data.num_threads",
    "data.on_bad_example",
)
# Keys of a stage that are about its files, or about what would otherwise end it.
LOGGING_KEYS = ("log_every", "save_every", "eval_every", "keep", "max_skips")
# Where the training data lies, and how.
DATA_KEYS = ("data.kind", "data.root", "data.split_file")
_SHOWN_CHANGES = 8
# In the folder of a stage: which training of it this is, and of those that it takes from.
ORIGIN_NAME = "origin.json"
# What a run writes at the top of its workdir, beside a folder a stage.
RUN_FILES = ("config.json", "data.json", "labels.json", "lock.json", "report.json")
# Keys of the model that change no parameter's shape, so that no checkpoint can tell them.
_SHAPELESS_KEYS = ("_heads", "num_groups", "activation", "position_interpolation")
# Options that are gone or need not be named, and the value that is built in: what was trained with
# it goes on.
REMOVED_KEYS = {
    "train.*.method.pooling_temperature": 0.1,
    "train.*.method.class_negatives": True,
    "train.*.method.class_contrast_weight": 0.0,
    "train.*.method.class_contrast_temperature": 0.1,
    "train.*.method.mmd_memory": False,
    "train.*.method.mmd_per_class": False,
    "train.*.method.unseen_per_class": 4,
    "train.*.method.spread_weight": 0.0,
    "train.*.method.memory_pseudo": False,
    "train.*.method.mmd_bandwidths": [2.0, 5.0, 10.0, 20.0, 40.0, 80.0],
    "train.*.optimizer.b2": 0.999,
    "train.*.optimizer.accumulate": 1,
}


def _is_built_in(key: str, value: Any) -> bool:
    patterns = REMOVED_KEYS.items()
    return any(fnmatchcase(key, pattern) and value == built_in for pattern, built_in in patterns)


def evaluation_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Dotted key to value of what decides a report besides the checkpoints, as JSON has it."""
    keys = configuration.flat(config).items()
    return json.loads(json.dumps({k: v for k, v in keys if k.startswith(EVALUATION_KEYS)}))


def claim_workdir(
    workdir: Path,
    config: ml_collections.ConfigDict,
    *,
    write: bool,
    data_identity: Callable[[], str] | None = None,
) -> None:
    """Makes a workdir that of a config, or refuses one in which something else was learnt.

    Before the first checkpoint any key may change; then only what changes nothing that was learnt,
    which includes where the data lies as long as it is the same. What changes is printed and noted
    in `changes.jsonl`, and `config.json` follows; nothing is written unless `write`. A stage that
    the config has no more stays as it was made. `data_identity` is the fingerprint of the training
    data, None where it is drawn. Raises ValueError naming the first key that must not differ, with
    both values, or if the workdir is a file, cannot be read, or is written by another process.
    """
    if (above := nearest(workdir)).is_file():
        below = f"is in {above}, which " if above != workdir else ""
        raise ValueError(f"The workdir {workdir} {below}is a file; name a folder.")
    path, data_path = workdir / "config.json", workdir / "data.json"
    write = write and jax.process_index() == 0
    mine = json.loads(json.dumps(configuration.flat(config)))
    theirs = _read_config(path) if path.exists() else mine
    theirs = {k: v for k, v in theirs.items() if k in mine or not _is_built_in(k, v)}
    changed = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
    trained = trained_stages(workdir)
    gone = trained - {*config.get("train", {})}
    changed = [k for k in changed if _stage_of(k) not in gone]
    if trained:
        for key in changed:
            if _is_free(key, trained):
                continue
            if key in DATA_KEYS and data_identity and _is_of_data(data_path, data_identity()):
                continue
            stage = _stage_of(key)
            anew = f", or delete {workdir / stage} to train it anew" if stage else ""
            raise ValueError(
                f"The workdir {workdir} was made with config.{key} = {theirs.get(key)!r}, now it "
                f"is {mine.get(key)!r}; use another workdir or the config it was made with{anew}."
            )
        # What is shown and run next is said by each command anew.
        changed = [key for key in changed if not key.startswith((*EVALUATION_KEYS, "stages"))]
    if not write:
        return
    lock_workdir(workdir.absolute())
    if changed:
        _note_changes(workdir, {key: [theirs.get(key), mine.get(key)] for key in changed})
    if changed or not path.exists():
        settled = {k: mine.get(k) if k in changed else v for k, v in {**mine, **theirs}.items()}
        write_json(path, {k: v for k, v in settled.items() if k in mine or k not in changed})
    if data_identity and (not trained or not data_path.exists()):
        write_json(data_path, {"training": data_identity()})


def note_origin(workdir: Path, name: str, sources: Iterable[str]) -> None:
    """Tells the training of a stage that begins, on what its sources are now, from all others."""
    if jax.process_index() == 0 and StageCheckpoints(workdir, name).latest_step() is None:
        takes = {source: _origin(workdir, source)["id"] for source in sources if source != INIT}
        write_json(workdir / name / ORIGIN_NAME, {"id": secrets.token_hex(8), "takes": takes})


def check_origins(workdir: Path, stages: Iterable[str]) -> None:
    """Refuses, by a ValueError, stages that learnt from one that is gone or was trained anew.

    Of stages of before, which have no origin, nothing is known, and they pass.
    """

    def trained_anew(name: str) -> str:
        for source, version in _origin(workdir, name)["takes"].items():
            known = _origin(workdir, source)["id"]
            anew = None not in (known, version) and known != version
            if found := source if anew else trained_anew(source):
                return found
        return ""

    names = sorted(path.parent.name for path in workdir.glob(f"*/{ORIGIN_NAME}"))
    stale = {name: source for name in names if (source := trained_anew(name))}
    if stale.keys() & set(stages):
        raise ValueError(
            f"In {workdir}, {', '.join(stale)} learnt from an earlier version of stage "
            f"{' and '.join(sorted({*stale.values()}))}; delete "
            f"{', '.join(str(workdir / name) for name in stale)}, and the command that trained "
            "them trains them on what there is now."
        )


def _origin(workdir: Path, stage: str) -> dict[str, Any]:
    """The id of a stage's training ("" if it is gone, None if not known), and of its sources'."""
    folder = workdir / stage
    if not any(folder.glob("checkpoints/[0-9]*")):
        return {"id": "", "takes": {}}
    if not (path := folder / ORIGIN_NAME).exists():
        return {"id": None, "takes": {}}
    try:
        content = read_json(path)
        if isinstance(content, dict) and "id" in content and isinstance(content.get("takes"), dict):
            return content
        reason = f"{path} does not say what it was written for."
    except ValueError as error:
        reason = str(error)
    raise ValueError(
        f"{reason} Remove it to go on: the stage's checkpoints stay, and what they learnt from is "
        "then not checked."
    )


def read_result(path: Path, *keys: str) -> dict[str, Any] | None:
    """A file of ours that has the keys; None if it is not there, or cannot be read, which is said.

    It is for what can be made anew.
    """
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if isinstance(content, dict) and {*keys} <= content.keys():
            return content
        reason = f"{path} does not hold {', '.join(keys)}."
    except ValueError as error:
        reason = str(error)
    print(f"{reason} It is made anew.")
    return None


def _stage_of(key: str) -> str:
    """Whose key of a config it is; "" of no stage's."""
    return key.split(".")[1] if key.startswith("train.") else ""


def _is_free(key: str, trained: Collection[str]) -> bool:
    if stage := _stage_of(key):
        return stage not in trained or key.split(".")[-1] in LOGGING_KEYS
    return key.startswith(FREE_KEYS) and not key.endswith(_SHAPELESS_KEYS)


def _is_of_data(path: Path, identity: str) -> bool:
    try:
        return read_json(path) == {"training": identity}
    except ValueError:
        return False


def trained_stages(workdir: Path) -> set[str]:
    """Those that have a checkpoint, of any step."""
    return {path.parent.parent.name for path in workdir.glob("*/checkpoints/[0-9]*")}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        if isinstance(content, dict):
            return content
        reason = f"{path} holds no JSON object."
    except ValueError as error:
        reason = str(error)
    raise ValueError(
        f"{reason.rstrip('.')}; remove it to go on in this workdir with the config given."
    )


def _note_changes(workdir: Path, changes: Mapping[str, list]) -> None:
    for key, (old, new) in list(changes.items())[:_SHOWN_CHANGES]:
        print(f"config.{key} was {old!r} in {workdir} and is {new!r} from now on.")
    if len(changes) > _SHOWN_CHANGES:
        more = len(changes) - _SHOWN_CHANGES
        print(f"{more} more keys differ; {workdir / 'changes.jsonl'} lists them.")
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": changes}
    append_text(workdir / "changes.jsonl", json.dumps(row) + "\n")
