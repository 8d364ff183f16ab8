"""The names that somebody asks for, as a command line or a file has them."""

from __future__ import annotations

import os

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.class_names import read_classes


def parse_classes(text: str, training: Vocabulary) -> tuple[Vocabulary, bool]:
    """A vocabulary from "red balloon, blue balloon; grey ground" (things; stuff), or from a file.

    A file has a name a line, or is a JSON list of {"name", "isthing"}. A name that is among
    `training` is seen or unseen as it was there; any other is unseen. Returns as well whether it is
    known which are things. Raises ValueError for a file that is not there, an empty name, or one
    that occurs twice.
    """
    if os.path.isfile(text):
        found = read_classes(text, training)
        names, is_thing = found.vocabulary.names, found.vocabulary.is_thing
        knows_things = found.knows_things
        if not knows_things:  # as of any model that does not say
            is_thing = (True,) * len(names)
    else:
        if text.endswith((".txt", ".json")):
            raise ValueError(f"There is no file {text}; give --classes=FILE or the names.")
        things, _, stuff = text.partition(";")
        if ";" in stuff:
            raise ValueError(f"--classes={text} has several semicolons; one ends the things.")
        parts = [_split(part) for part in (things, stuff)]
        names = tuple(name for part in parts for name in part)
        is_thing = (True,) * len(parts[0]) + (False,) * len(parts[1])
        knows_things = True
    if not names:
        raise ValueError(
            f"--classes={text} holds no name; give some, as --classes='cat, dog; sky'."
        )
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"Name {number} of --classes={text} is empty; take a comma out.")
        if name.casefold() in {other.casefold() for other in names[: number - 1]}:
            raise ValueError(f"--classes holds the name {name!r} more than once; take one out.")
    seen = {training.names[k].casefold() for k in training.seen}
    vocabulary = Vocabulary(
        names=names,
        is_thing=is_thing,
        is_seen=tuple(name.casefold() in seen for name in names),
        category_ids=tuple(range(1, len(names) + 1)),
    )
    return vocabulary, knows_things


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []
