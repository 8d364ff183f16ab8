"""What a stage is worth: scores that no bias can fake, and how sure they are."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils.epath import Path

from concat_jax.core.files import UNREADABLE, FileError, on_disk, replacing
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.bias_curve import (
    NamedQueries,
    accuracy_curve,
    curve_area,
    naming_curve,
)
from concat_jax.evaluation.bootstrap import Estimate, draw_samples, estimate, resampled
from concat_jax.evaluation.calibration import GAMMAS, Sweep, sides
from concat_jax.evaluation.report import markdown_table

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment
    from data_pipelines.datasets import Datasets

# Resampled sets of scenes; the ends of a 95 % interval then vary by a tenth of its width.
DRAWS = 1000
# Scores by name, in the order of a table: title and what it is.
SCORES = {
    "hpq": "hPQ",
    "hpq_at": "hPQ at γ",
    "pq_area": "area, PQ",
    "name_area": "area, names",
    "among_unseen": "unseen among unseen",
}


def save_sweep(found: Sweep, gamma: float, path: Path) -> None:
    """The counts of a sweep's images, its names, and the γ that was chosen for it elsewhere."""
    with replacing(path) as partial, partial.open("wb") as file:
        names = found.names._asdict() if found.names is not None else {}
        np.savez_compressed(file, counts=found.counts, gammas=found.gammas, gamma=gamma, **names)


def load_sweep(path: Path, vocabulary: Vocabulary) -> tuple[Sweep, float]:
    """What `save_sweep` wrote; FileError if it cannot be read."""
    try:
        with on_disk(path) as local, np.load(local, allow_pickle=False) as file:
            names = NamedQueries(*(file[field] for field in NamedQueries._fields))
            found = Sweep(vocabulary, tuple(file["gammas"].tolist()), file["counts"], names)
            return found, float(file["gamma"])
    except (*UNREADABLE, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def scores(
    sweeps: Sequence[Sweep], gammas: Sequence[float], *, draws: int = DRAWS
) -> dict[str, tuple[float, np.ndarray]]:
    """Each of `SCORES` of a model trained from several seeds, all scored on the same scenes.

    Returns its value and what resampled scenes and seeds make of it, [draws], the same draws
    whatever the model: two rows can be paired.
    """
    is_seen = np.asarray(sweeps[0].vocabulary.is_seen)

    def harmonic(counts: np.ndarray) -> np.ndarray:
        seen, unseen = sides(counts, is_seen)
        return 2 * seen * unseen / np.maximum(seen + unseen, 1e-9)

    def area(counts: np.ndarray) -> np.ndarray:  # [..., R, 4, K]
        return curve_area(*sides(counts, is_seen))

    plain = np.stack([found.at(0.0) for found in sweeps])
    chosen = np.stack([found.at(gamma) for found, gamma in zip(sweeps, gammas, strict=True)])
    curves = np.stack([np.moveaxis(found.counts, 0, 1) for found in sweeps])
    found = {
        "hpq": resampled(plain, harmonic, draws=draws),
        "hpq_at": resampled(chosen, harmonic, draws=draws),
        "pq_area": resampled(curves, area, draws=draws),
    }
    return found | _names(sweeps, is_seen, draws)


def _names(
    sweeps: Sequence[Sweep], is_seen: np.ndarray, draws: int
) -> dict[str, tuple[float, np.ndarray]]:
    seeds, scenes = draw_samples(len(sweeps), sweeps[0].counts.shape[1], draws)
    whole, drawn = [], []
    for one in sweeps:
        found = naming_curve(one.names, is_seen)
        whole.append((found.area, found.among_unseen))
        curves = [
            accuracy_curve(one.names, is_seen, part[:, one.names.images].astype(np.float64))
            for part in np.array_split(scenes, max(draws // 50, 1))
        ]
        areas = [curve_area(*curve) for curve in curves]
        among = [unseen[:, -1] for _, unseen in curves]
        drawn.append((np.concatenate(areas), np.concatenate(among)))
    means = np.mean(whole, axis=0)
    spread = np.einsum("snd,ds->nd", np.array(drawn), seeds)
    return {
        name: (float(means[i]), spread[i]) for i, name in enumerate(("name_area", "among_unseen"))
    }


def check_shows_both(held_out: Datasets) -> None:
    """Refuses, by a ValueError, images that no γ can be chosen on, as one side shows nowhere."""
    is_seen, shown = np.asarray(held_out.vocabulary.is_seen), set()
    for example in held_out.evaluation():
        labels = example["segment_labels"]
        shown |= {*is_seen[labels[labels >= 0]].tolist()}
        if len(shown) == 2:
            return
    raise ValueError(
        "The scenes of config.eval.bias_split that γ is chosen on do not show both seen and unseen "
        "classes; set config.data.num_eval_images (of the ablation, --scenes) to more."
    )


def measure(
    run: Experiment,
    name: str,
    held_out: Iterable[Mapping],
    test: Iterable[Mapping],
    folder: Path,
    gamma: float | None = None,
) -> dict[str, Any]:
    """Scores a stage on the test images, at γ or at that which is best for it on held-out images.

    Writes what was counted to `sweep.npz` in the folder; returns γ, the summaries of the test
    images without it and with it, and each of `SCORES` with its deviation over resampled images.
    """
    if gamma is None:
        gamma = run.sweep(name, held_out, GAMMAS).best()
    found = run.sweep(name, test, GAMMAS)
    save_sweep(found, gamma, folder / "sweep.npz")
    drawn = scores([found], [gamma])
    return {
        "gamma": gamma,
        "summary": found.summary(0.0),
        "calibrated": found.summary(gamma),
        "scores": {key: estimate(*values)._asdict() for key, values in drawn.items()},
    }


def format_evidence(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of title -> what `measure` returned: percent, ± deviation over scenes."""
    lines = []
    for title, found in rows.items():
        numbers = [Estimate(**found["scores"][key]).as_score() for key in SCORES]
        lines.append([title, *numbers, f"{found['gamma']:g}"])
    return markdown_table(["row", *SCORES.values(), "γ"], lines)
