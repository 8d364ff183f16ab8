"""Class names to text embeddings: synonyms, prompts, and their ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from concat_jax.text.name_cleaning import clean_name
from concat_jax.text.templates import check_templates
from concat_jax.text.tokenizer import Tokenizer

SYNONYM_MODES = ("mean", "max", "none")

_SYNONYM_SEPARATOR = ", "

Names = Sequence[str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class ClassPrompts:
    """All that the text encoder is asked for K classes.

    Attributes:
      texts: of each class, one or more different texts; the first is its name's.
      templates: prompts with one "{}" each.
      synonyms: how the texts of a class become its embedding, one of `SYNONYM_MODES`.
    """

    texts: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    synonyms: str

    def prompts(self) -> list[str]:
        """Class by class, text by text, template by template."""
        return [
            template.replace("{}", text)
            for texts in self.texts
            for text in texts
            for template in self.templates
        ]


def make_prompts(
    names: Names, templates: Sequence[str], *, clean: bool = True, synonyms: str = "mean"
) -> ClassPrompts:
    """What `embed_classes` embeds; arguments and errors as there."""
    if synonyms not in SYNONYM_MODES:
        raise ValueError(f"Synonyms are {synonyms!r}; use one of {', '.join(SYNONYM_MODES)}.")
    if isinstance(names, str):
        raise ValueError(f"embed_classes takes a sequence of names; wrap {names!r} in a list.")
    texts = tuple(_texts(name, clean, synonyms) for name in names)
    if not texts:
        raise ValueError("embed_classes got no class names.")
    _check_different(names, texts, clean)
    return ClassPrompts(texts, check_templates(templates), synonyms)


def _texts(name: str | Sequence[str], clean: bool, synonyms: str) -> tuple[str, ...]:
    """The different texts of one class, the name's first."""
    given = [name] if isinstance(name, str) else list(name)
    if not given:
        raise ValueError("A class has no name.")
    if synonyms == "none":
        given = given[:1]
    parts = [part.strip() for text in given for part in text.split(_SYNONYM_SEPARATOR)]
    if not all(parts):
        raise ValueError(f"The class name {given[0]!r} is empty or holds an empty synonym.")
    if clean:
        parts = [clean_name(part) for part in parts]
    # A text that comes twice would count twice; tokenizers do not tell cases apart.
    different: dict[str, str] = {}
    for part in parts:
        different.setdefault(part.lower(), part)
    return tuple(different.values())


def _check_different(names: Names, texts: Sequence[Sequence[str]], clean: bool) -> None:
    """Refuses classes that a lower-casing tokenizer cannot tell apart."""
    first: dict[frozenset[str], str] = {}
    for given, parts in zip(names, texts, strict=True):
        name = given if isinstance(given, str) else given[0]
        read = frozenset(part.lower() for part in parts)
        if read in first:
            raise ValueError(
                f"The class names {first[read]!r} and {name!r} are the same text "
                f"{_SYNONYM_SEPARATOR.join(parts).lower()!r}; rename one"
                f"{' or pass clean=False' if clean else ''}."
            )
        first[read] = name


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embed_classes(
    encode_text_fn: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    names: Names,
    templates: Sequence[str],
    *,
    clean: bool = True,
    synonyms: str = "mean",
    batch_size: int = 256,
) -> np.ndarray:
    """Prompt ensemble of each class (Radford et al. 2021, section 3.1.4), as PADing averages it.

    A prompt's embedding is L2-normalised, the mean over the templates normalised again: that is a
    text's embedding. A class has one text or several, which `synonyms` joins.

    Args:
      encode_text_fn: tokens [batch_size, L] int32 -> [batch_size, C] float; always called with one
        shape, so that a jitted function compiles once.
      tokenizer: makes the tokens.
      names: K classes, each a name, or a name followed by its synonyms, as `Vocabulary.texts` has
        them. A name that lists synonyms itself, as "lamp, bulb", stands for all of them.
      templates: prompts with one "{}" each, for example `TEMPLATES["eight"]`.
      clean: pass every name and synonym through `clean_name`.
      synonyms: "mean", a class is the normalised mean of its texts; "max", every text is kept and
        the classifier takes the best; "none", the mean of the name's own texts, listed synonyms
        left out.
      batch_size: prompts a call; the last call is filled up with repeated prompts.

    Returns:
      [K, C] float32, L2-normalised; with "max" [K, S, C] with S the most texts of a class, where a
      class of fewer repeats its first text, which changes no maximum.

    Raises:
      ValueError: for no names or templates, an empty name, two classes that are one text, a
        template without a place for the name, an unknown way to join synonyms, or an embedding
        that is not finite.
    """
    prompts = make_prompts(names, templates, clean=clean, synonyms=synonyms)
    return embed_prompts(encode_text_fn, tokenizer(prompts.prompts()), prompts, batch_size)


def embed_prompts(
    encode_text_fn: Callable[[np.ndarray], np.ndarray],
    tokens: np.ndarray,
    prompts: ClassPrompts,
    batch_size: int,
) -> np.ndarray:
    """`embed_classes` of prompts that are tokens [M, L] int32 already, in their order."""
    embeddings = []
    for start in range(0, len(tokens), batch_size):
        chunk = np.arange(start, start + batch_size).clip(max=len(tokens) - 1)
        embeddings.append(np.asarray(encode_text_fn(tokens[chunk]), np.float64))
    by_prompt = _unit(np.concatenate(embeddings)[: len(tokens)])
    by_text = _unit(by_prompt.reshape(-1, len(prompts.templates), by_prompt.shape[-1]).mean(axis=1))
    ends = np.cumsum([len(texts) for texts in prompts.texts])
    rows = np.split(by_text, ends[:-1])
    if prompts.synonyms == "max":
        most = max(len(row) for row in rows)
        classes = np.stack([row[[*range(len(row)), *[0] * (most - len(row))]] for row in rows])
    else:
        classes = _unit(np.stack([row.mean(axis=0) for row in rows]))
    if not np.isfinite(classes).all():
        raise ValueError("The text encoder gave embeddings that are not finite; check its weights.")
    return classes.astype(np.float32)
