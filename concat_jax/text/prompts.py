"""Class names to prompts and their tokens, and every reason why names cannot be told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from concat_jax.core.config import check_choice
from concat_jax.core.files import read_json
from concat_jax.text.templates import check_templates
from concat_jax.text.tokenizer import Tokenizer

SYNONYM_MODES = ("mean", "max", "none")

_SYNONYM_SEPARATOR = ", "

Names = Sequence[str | Sequence[str]]

# Names of data sets in the words a caption would use, the same where two sets hold a name: explicit
# tables, no rules. COCO panoptic's are those that no caption holds: "-merged" and "-other" mark how
# COCO joined and divided classes, "-stuff" sets apart from things; a material goes before its noun.
# PADing feeds the raw names to CLIP: turn cleaning off to compare with it. COCO-Stuff's names,
# which the merged classes were made of, are by the same reading. Pascal VOC and Pascal Context
# write names without their blank, with one more, or misspelt; of ADE20K's 847 one is spelt as no
# caption would.
READABLE_NAMES: Mapping[str, Mapping[str, str]] = read_json(
    Path(__file__).with_name("readable_names.json")
)
_READABLE = {name: text for table in READABLE_NAMES.values() for name, text in table.items()}


@dataclasses.dataclass(frozen=True)
class ClassPrompts:
    """What the text encoder is asked for K classes: texts of each, the first its name's."""

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


def clean_name(name: str) -> str:
    """`name` by `READABLE_NAMES`; one that is in no table is left, so nobody's own names change."""
    return _READABLE.get(name, name)


def make_prompts(
    names: Names, templates: Sequence[str], *, clean: bool = True, synonyms: str = "mean"
) -> ClassPrompts:
    """What the text encoder is asked for K classes.

    Args:
      names: each a name, or a name followed by its synonyms, as `Vocabulary.texts` has them. A name
        that lists synonyms itself, as "lamp, bulb", stands for all of them.
      clean: pass every name and synonym through `clean_name`.
      synonyms: "mean", a class is the normalised mean of its texts; "max", every text is kept and
        the classifier takes the best; "none", listed synonyms are left out.

    Raises ValueError that lists all empty names, classes that are one text, or bad templates.
    """
    check_choice(synonyms, SYNONYM_MODES, "Synonyms are")
    given = [[name] if isinstance(name, str) else list(name) for name in names]
    if not given:
        raise ValueError("There are no class names.")
    if synonyms == "none":
        given = [texts[:1] for texts in given]
    parts = [
        [part.strip() for text in texts for part in text.split(_SYNONYM_SEPARATOR)]
        for texts in given
    ]
    empty = [i for i, texts in enumerate(parts) if not texts or not all(texts)]
    if empty:
        shown = _listed(f"number {i + 1} ({', '.join(map(repr, given[i]))})" for i in empty)
        raise ValueError(
            f"Class names must not be empty nor hold an empty synonym: {shown}; name these or "
            "leave them out."
        )
    texts = tuple(_different(clean_name(t) if clean else t for t in group) for group in parts)
    # Tokenizers do not tell cases apart.
    read = [frozenset(t.lower() for t in group) for group in texts]
    if same := _same(read):
        shown = _listed(
            f"{_listed((_short(given[i][0]) for i in group), ' and ')} "
            f"(all {_short(_SYNONYM_SEPARATOR.join(texts[group[0]]).lower())})"
            for group in same
        )
        raise ValueError(
            f"Class names that are the same text: {shown}; rename all but one"
            f"{', or set config.text.clean_names to False' if clean else ''}."
        )
    return ClassPrompts(texts, check_templates(templates), synonyms)


def tokenize(tokenizer: Tokenizer, prompts: ClassPrompts) -> np.ndarray:
    """The tokens of all prompts, [M, L] int32; ValueError that lists all names which are at fault.

    At fault is what the tokenizer reads nothing of, would cut, or makes another name's tokens of.
    """
    texts = [text for group in prompts.texts for text in group]
    blank = [t for t, n in zip(texts, tokenizer.lengths(texts), strict=True) if n <= 2]
    if blank:
        raise ValueError(
            f"The tokenizer reads nothing of class names: {_listed(map(_short, blank))}; rename "
            "them with letters or digits."
        )
    written = prompts.prompts()
    lengths = tokenizer.lengths(written).reshape(len(texts), -1)
    too_long = np.flatnonzero(lengths.max(axis=1) > tokenizer.context_length)
    if too_long.size:
        template = prompts.templates[lengths.max(axis=0).argmax()]
        shown = _listed(f"{_short(texts[i])} ({lengths[i].max()})" for i in too_long)
        raise ValueError(
            f"Class names take more than the {tokenizer.context_length} tokens that the text tower "
            f"reads, with the template {template!r}: {shown}; shorten the names or the template."
        )
    tokens = tokenizer(written)
    rows = iter(tokens.reshape(len(texts), -1))
    read = [frozenset(next(rows).tobytes() for _ in group) for group in prompts.texts]
    if same := _same(read):
        groups = ([_short(prompts.texts[i][0]) for i in group] for group in same)
        raise ValueError(
            "Class names that are the same to the tokenizer: "
            f"{_listed(_listed(group, ' and ') for group in groups)}; rename all but one."
        )
    return tokens


def _different(texts: Iterable[str]) -> tuple[str, ...]:
    # A text that comes twice would count twice.
    different: dict[str, str] = {}
    for text in texts:
        different.setdefault(text.lower(), text)
    return tuple(different.values())


def _same(read: Sequence[frozenset]) -> list[list[int]]:
    """Positions of classes of which the same is read, group by group."""
    groups: dict[frozenset, list[int]] = {}
    for i, content in enumerate(read):
        groups.setdefault(content, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    more = [f"{len(items) - 10} more"] if len(items) > 10 else []
    return separator.join([*items[:10], *more])
