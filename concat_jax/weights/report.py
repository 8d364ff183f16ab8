"""What became of every array when weights were loaded: loaded, newly initialised or ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

Shape = tuple[int, ...]

# Parts of the model by how the paths of their parameters begin; what is none of these is "other".
GROUPS = {
    "backbone": "segmentor/backbone/",
    "pixel decoder": "segmentor/pixel_decoder/",
    "transformer decoder": "segmentor/transformer_decoder/",
    "upscaling": "segmentor/upscales_",
    "queries' heads": ("segmentor/mask_mlp_", "segmentor/query_embedding"),
    "class head": "classifier/",
}
# Torch's counters and index tables, of which there is one a layer: they are counted, not named.
BOOKKEEPING = ("num_batches_tracked", "relative_position_index", "attn_mask")
# Names printed a list: enough to see the pattern, and a report stays on one screen.
MAX_NAMED = 6
# Names in an error: enough to see the pattern, short enough to read.
MAX_KEYS_NAMED = 5


def name_keys(keys: Iterable[str], most: int = MAX_KEYS_NAMED) -> str:
    """The first keys in alphabetical order, and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def shapes_of(params: Mapping[str, Any]) -> dict[str, Shape]:
    """Path of an array, joined by "/", to its shape."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    return {path: tuple(np.shape(array)) for path, array in flat.items()}


@dataclasses.dataclass(frozen=True)
class LoadingReport:
    """What a conversion did with each array.

    Attributes:
      loaded: our path -> the source key it was filled from.
      shapes: our path -> shape, of what was loaded.
      new: our path -> shape, of what the source did not hold and was newly initialised.
      ignored: source key -> shape, of what was left out.
    """

    loaded: Mapping[str, str]
    shapes: Mapping[str, Shape]
    new: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, Shape] = dataclasses.field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Scalars loaded."""
        return sum(math.prod(self.shapes[path]) for path in self.loaded)

    def __str__(self) -> str:
        lines = [
            f"loaded {_count(self.shapes)}, newly initialised {_count(self.new)}, "
            f"ignored {len(self.ignored)} entries of the file"
        ]
        for group in (*GROUPS, "other"):
            loaded, new = (
                {path: shape for path, shape in shapes.items() if _group(path) == group}
                for shapes in (self.shapes, self.new)
            )
            if loaded or new:
                lines.append(f"  {group:<20}loaded {_count(loaded)}")
            if new:
                lines.append(f"  {'':<20}newly initialised {_count(new)}: {_names(new)}")
        if self.ignored:
            lines.append(f"  {'ignored':<20}{_ignored_names(self.ignored)}")
        return "\n".join(lines)


def _group(path: str) -> str:
    return next((group for group, prefix in GROUPS.items() if path.startswith(prefix)), "other")


def _count(shapes: Mapping[str, Shape]) -> str:
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return f"{len(shapes)} arrays ({numbers:,} numbers)"


def _names(shapes: Mapping[str, Shape]) -> str:
    return name_keys((f"{name} {list(shape)}" for name, shape in shapes.items()), MAX_NAMED)


def _ignored_names(shapes: Mapping[str, Shape]) -> str:
    others = {k: v for k, v in shapes.items() if k.split(".")[-1] not in BOOKKEEPING}
    parts = [_names(others)] if others else []
    for kind in BOOKKEEPING:
        if count := sum(name.split(".")[-1] == kind for name in shapes):
            parts.append(f"{count} of *.{kind}")
    return ", ".join(parts)
