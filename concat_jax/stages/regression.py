"""Stage 2 in closed form: where the vision queries of a class lie, regressed on what CLIP knows.

Ours, beside CAT's generator. CON leaves pairs in the query bank: CLIP's embedding of an instance
and the vision query that holds it. The kernel regression of queries on those embeddings is read at
a name's text, moved by the gap between texts and images (Liang et al., arXiv 2203.02053). A ridge
regression of class means on texts needs no CLIP images; the means themselves, of an oracle's bank,
are the bound of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from concat_jax.core.arrays import unit
from concat_jax.core.batch import QUERY_FIELDS, QUERY_TARGETS
from concat_jax.core.config import Positive, check_choice
from concat_jax.models.generators import RegressionGenerator
from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages.queries import QueryBank
from concat_jax.stages.stage import PLAIN_RULES, TEXT, Context, Stage

LEARNS_FROM = "queries"
ON = ("images", "text", "means")


@dataclasses.dataclass(frozen=True)
class Config:
    """Constants of the regression, which are chosen among by leaving seen classes out.

    Attributes:
      on: "images" (kernel ridge on CLIP's embeddings of instances), "text" (ridge of class means
        on texts) or "means" (the class means, where the bank shows them).
      penalties: of the ridge, over the number of rows.
      sharpness: of the kernel exp(s (cos - 1)); higher is nearer to the nearest instances.
      folds: parts of the seen classes, each of which is left out once.
    """

    on: str = "images"
    penalties: tuple[Positive, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    sharpness: tuple[Positive, ...] = (2.0, 4.0, 8.0)
    folds: int = 4

    def __post_init__(self):
        check_choice(self.on, ON, "The regression's `on` is")
        if self.folds < 2:
            raise ValueError(
                f"The regression's folds is {self.folds} and must be at least 2, as each is "
                "predicted from the others."
            )


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Map [C, D] of centred rows x [M, C] to centred rows y [M, D]."""
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1])
    return np.linalg.solve(gram, x.T @ y / len(x))


def kernel(a: np.ndarray, b: np.ndarray, sharpness: float) -> np.ndarray:
    """exp(s (cos - 1)) [M, R] of unit rows a [M, C] and b [R, C]."""
    return np.exp(sharpness * (a @ b.T - 1.0))


def text_to_image(text: np.ndarray, images: np.ndarray, penalty: float = 0.3) -> dict[str, Any]:
    """The gap from texts [S, C] to mean image embeddings [S, C] of the same classes.

    A ridge that shrinks towards one scale for all directions: few classes say little of a matrix.
    """
    text_mean, image_mean = text.mean(axis=0), images.mean(axis=0)
    a, b = text - text_mean, images - image_mean
    scale = (a * b).sum() / max((a * a).sum(), 1e-12)
    rest = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (b - scale * a))
    return {
        "text_mean": text_mean,
        "text_map": scale * np.eye(a.shape[1]) + rest,
        "image_mean": image_mean,
    }


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Queries [M, D] of segments with class labels [M] and, for "images", CLIP's targets [M, C]."""

    queries: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None

    def of(self, classes: np.ndarray) -> _Pairs:
        rows = np.isin(self.labels, classes)
        targets = None if self.targets is None else self.targets[rows]
        return _Pairs(self.queries[rows], self.labels[rows], targets)

    def means(self, classes: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.stack([values[self.labels == k].mean(axis=0) for k in classes])


# So sharp a kernel answers a text with its own class alone.
_ALONE = 1e3
# Rows of a bank that a regression sees; its memory and time grow with them.
_MOST_PAIRS = 20_000


def _pairs(bank: QueryBank, rng: np.random.Generator, with_targets: bool) -> _Pairs:
    images, numbers = np.nonzero(np.asarray(bank.labels) >= 0)
    if with_targets:
        has_target = bank.targets.rows[images, numbers] >= 0
        images, numbers = images[has_target], numbers[has_target]
    chosen = np.sort(rng.permutation(len(images))[:_MOST_PAIRS])
    images, numbers = images[chosen], numbers[chosen]
    queries = bank.queries[images, numbers].astype(np.float64)
    targets = None
    if with_targets:
        values = bank.targets.values[bank.targets.rows[images, numbers]]
        targets = unit(values.astype(np.float64))
    return _Pairs(queries, np.asarray(bank.labels)[images, numbers].astype(int), targets)


def _fit_images(
    pairs: _Pairs, text: np.ndarray, penalty: float, sharpness: float, num_centres: int
) -> dict[str, np.ndarray]:
    classes = np.unique(pairs.labels)
    rows = np.linspace(0, len(pairs.labels) - 1, min(num_centres, len(pairs.labels))).astype(int)
    order = np.random.default_rng(0).permutation(len(pairs.labels))
    centres = pairs.targets[order[rows]]
    offset = pairs.queries.mean(axis=0)
    values = kernel(pairs.targets, centres, sharpness)
    gram = values.T @ values / len(values)
    # Nystrom's form of the kernel ridge: the penalty is on the function and not on the weights.
    system = gram + penalty * kernel(centres, centres, sharpness) + 1e-8 * np.eye(len(centres))
    weights = np.linalg.solve(system, values.T @ (pairs.queries - offset) / len(values))
    gap = text_to_image(text[classes], pairs.means(classes, pairs.targets))
    return {**gap, "centres": centres, "weights": weights, "offset": offset} | {
        "sharpness": np.asarray(sharpness)
    }


def _fit_text(pairs: _Pairs, text: np.ndarray, penalty: float) -> dict[str, np.ndarray]:
    classes = np.unique(pairs.labels)
    means = pairs.means(classes, pairs.queries)
    offset, text_mean = means.mean(axis=0), text[classes].mean(axis=0)
    linear = ridge(text[classes] - text_mean, means - offset, penalty)
    return {"offset": offset, "text_mean": text_mean, "linear": linear}


def _fit_means(pairs: _Pairs, text: np.ndarray) -> dict[str, np.ndarray]:
    classes = np.unique(pairs.labels)
    means = pairs.means(classes, pairs.queries)
    offset = means.mean(axis=0)
    values = kernel(text[classes], text[classes], _ALONE)
    weights = np.linalg.solve(values + 1e-6 * np.eye(len(classes)), means - offset)
    identity = {"text_map": np.eye(text.shape[1])}
    return identity | {
        "centres": text[classes],
        "weights": weights,
        "offset": offset,
        "sharpness": np.asarray(_ALONE),
    }


def predict(params: Mapping[str, np.ndarray], text: np.ndarray) -> np.ndarray:
    """`RegressionGenerator` in numpy: queries [S, D] of texts [S, C]."""
    zero = np.zeros(text.shape[1])
    moved = text - params.get("text_mean", zero)
    queries = params["offset"] + moved @ params.get("linear", np.zeros((text.shape[1], 1)))
    if "centres" in params:
        place = unit(params.get("image_mean", zero) + moved @ params["text_map"])
        queries = (
            queries + kernel(place, params["centres"], params["sharpness"]) @ params["weights"]
        )
    return queries


def choose(
    fit: Callable[..., dict[str, np.ndarray]], candidates, pairs: _Pairs, text, folds: int
) -> tuple[Any, float]:
    """The candidate whose predictions of left-out classes lie nearest to their means, and how far.

    The distance is in units of the classes' spread: the mean distance of a query to its mean.
    Raises ValueError where there are not two classes.
    """
    classes = np.unique(pairs.labels)
    if len(classes) < 2:
        raise ValueError(
            f"The regression's constants are chosen by leaving classes out, and it has queries of "
            f"{len(classes)} to learn from; extract more images (bank_images)."
        )
    means = pairs.means(classes, pairs.queries)
    row = np.searchsorted(classes, pairs.labels)
    spread = np.linalg.norm(pairs.queries - means[row], axis=1).mean()
    parts = np.array_split(np.random.default_rng(1).permutation(len(classes)), folds)
    found = []
    for candidate in candidates:
        errors = []
        for part in filter(len, parts):
            rest = np.setdiff1d(np.arange(len(classes)), part)
            params = fit(pairs.of(classes[rest]), text, *candidate)
            distance = predict(params, text[classes[part]]) - means[part]
            errors.append(np.linalg.norm(distance, axis=1))
        found.append(float(np.concatenate(errors).mean() / spread))
    best = int(np.argmin(found))
    return candidates[best], found[best]


def make_stage(context: Context, config: Config) -> Stage:
    """The regression as a `Stage` whose generator is fitted to a bank before its first step.

    Raises:
      ValueError: if the config's generator is another.
    """
    generator = context.networks.generator
    if not isinstance(generator, RegressionGenerator):
        raise ValueError(
            "A regression fits generators of kind 'regression'; set "
            "--config.train.STAGE.generator.kind=regression."
        )

    def start(bank: QueryBank, frozen: Mapping[str, Any]) -> dict[str, Any]:
        text = np.asarray(class_vectors(jnp.asarray(frozen[TEXT])), np.float64)
        pairs = _pairs(bank, np.random.default_rng(0), config.on == "images")
        if config.on == "means":
            params = _fit_means(pairs, text)
        else:
            fit, candidates = _fit_text, [(penalty,) for penalty in config.penalties]
            if config.on == "images":

                def fit(pairs, text, penalty, sharpness):
                    return _fit_images(pairs, text, penalty, sharpness, generator.num_centres)

                candidates = [(p, s) for p in config.penalties for s in config.sharpness]
            best, error = choose(fit, candidates, pairs, text, config.folds)
            names = ("penalty", "sharpness")[: len(best)]
            said = ", ".join(f"{n} {v:g}" for n, v in zip(names, best, strict=True))
            print(
                f"Regression on {config.on}: {said}; left-out classes are {error:.2f} spreads off."
            )
            params = fit(pairs, text, *best)
        return {"generator": generator.filled(params, text.shape[1])}

    fields = QUERY_FIELDS + ((QUERY_TARGETS,) if config.on == "images" else ())
    return Stage(("generator",), (TEXT,), None, PLAIN_RULES, fields, start)
