"""A label space as data: names, thing or stuff, seen or unseen, and the data set's own ids."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """K classes in one label space; index k is what `segment_labels` hold.

    Attributes:
      is_seen: True where the training set may show the class's pixels.
      category_ids: of the data set's own annotation format (COCO ids are not contiguous).
      synonyms: other words for each class, which classes may share; () for none at all.

    Raises ValueError if lengths differ, a word is empty, or a name or an id occurs twice.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    is_seen: tuple[bool, ...]
    category_ids: tuple[int, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        # Lists, as JSON has them, become tuples: a vocabulary is a value.
        synonyms = tuple(tuple(words) for words in self.synonyms) or ((),) * len(self.names)
        object.__setattr__(self, "synonyms", synonyms)
        lengths = {len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"Vocabulary fields have different lengths: {sorted(lengths)}.")
        for index, name in enumerate(self.names):
            if not name.strip():
                raise ValueError(f"Class {index} of the vocabulary has an empty name.")
            if not all(word.strip() for word in self.synonyms[index]):
                raise ValueError(
                    f"Class {index} of the vocabulary, {name!r}, has an empty synonym."
                )
        for what, values in (("name", self.names), ("category id", self.category_ids)):
            doubles = sorted({v for v in values if values.count(v) > 1})
            if doubles:
                raise ValueError(f"The vocabulary holds the {what} {doubles[0]!r} more than once.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Each class's name followed by its synonyms, as `embed_classes` takes them."""
        return tuple((name, *words) for name, words in zip(self.names, self.synonyms, strict=True))

    def with_flags_of(self, known: Vocabulary) -> Vocabulary | None:
        """With the thing flags and ids of `known`; None where that lacks one of the names."""
        if not set(self.names) <= set(known.names):
            return None
        places = [known.names.index(name) for name in self.names]
        flags, ids = ([of[k] for k in places] for of in (known.is_thing, known.category_ids))
        return dataclasses.replace(self, is_thing=tuple(flags), category_ids=tuple(ids))

    def all_seen(self) -> Vocabulary:
        """Its classes, of which training may have shown any."""
        return dataclasses.replace(self, is_seen=(True,) * len(self))

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """Indices of the seen classes, [S] int32 ascending."""
        return np.flatnonzero(self.is_seen).astype(np.int32)

    @functools.cached_property
    def unseen(self) -> np.ndarray:
        """Indices of the unseen classes, [U] int32 ascending."""
        return np.flatnonzero(~np.asarray(self.is_seen)).astype(np.int32)

    @functools.cached_property
    def index_of_category(self) -> dict[int, int]:
        """Map from the data set's category id to the class index."""
        return {category: index for index, category in enumerate(self.category_ids)}
