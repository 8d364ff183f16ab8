"""What the metrics share: counts by class, and their summary for seen and unseen classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import jax
import numpy as np
import safetensors.numpy

from concat_jax.core.hosts import gathered_bytes
from concat_jax.core.vocabulary import Vocabulary


class ClassCounts:
    """Base of accumulators over images of `num_classes` K classes, which start at zero."""

    # Attributes whose sum over two accumulators is that of all their images.
    _SUMS: ClassVar[tuple[str, ...]]

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def merge(self, other: Self) -> None:
        """Adds the counts of another accumulator of the same classes, as of another host."""
        for name in self._SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that was counted, to be sent elsewhere."""
        return {name: np.asarray(getattr(self, name)) for name in self._SUMS}

    def restored(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """An accumulator of this one's settings with the counts of `to_arrays` of another."""
        other = copy.copy(self)
        for name in self._SUMS:
            setattr(other, name, arrays[name])
        return other

    def over_hosts(self) -> Self:
        """Of all hosts together; every host must call it, as often as the others.

        They are added in the order of the hosts, so that all return the same to the last bit.
        """
        if jax.process_count() == 1:
            return self
        # As bytes: on its way through JAX, a float64 would lose half of its digits.
        contents = gathered_bytes(safetensors.numpy.save(self.to_arrays()))
        total, *others = (self.restored(safetensors.numpy.load(content)) for content in contents)
        for other in others:
            total.merge(other)
        return total

    def _summary(
        self,
        vocabulary: Vocabulary,
        of_group: Callable[[np.ndarray], dict],
        of_class: Callable[[int], dict],
        *,
        groups: Sequence[str] = ("all", "seen", "unseen"),
        harmonic: Sequence[str],
    ) -> dict:
        """A summary by group and class.

        Args:
          of_group: entries of a group, from its members [K] bool.
          groups: any of "all", "things", "stuff", "seen" and "unseen", with the last two.
          harmonic: which of a group's entries get a harmonic mean of seen and unseen.

        Returns:
          {group: its entries, "harmonic": {entry: float}, "per_class": K dicts with "name",
          "is_thing", "is_seen" and the entries of the class}.
        """
        if len(vocabulary) != self.num_classes:
            raise ValueError(
                f"The vocabulary has {len(vocabulary)} classes but {self.num_classes} were counted."
            )
        is_thing, is_seen = np.asarray(vocabulary.is_thing), np.asarray(vocabulary.is_seen)
        members = {
            "all": np.ones(self.num_classes, bool),
            "things": is_thing,
            "stuff": ~is_thing,
            "seen": is_seen,
            "unseen": ~is_seen,
        }
        summary: dict = {group: of_group(members[group]) for group in groups}
        seen, unseen = summary["seen"], summary["unseen"]
        summary["harmonic"] = {name: harmonic_mean(seen[name], unseen[name]) for name in harmonic}
        flags = zip(vocabulary.names, is_thing.tolist(), is_seen.tolist(), strict=True)
        summary["per_class"] = [
            {"name": name, "is_thing": thing, "is_seen": known, **of_class(k)}
            for k, (name, thing, known) in enumerate(flags)
        ]
        return summary


def mean_of_known(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def harmonic_mean(seen: float, unseen: float) -> float:
    """2su / (s + u), the zero-shot aggregate; 0 when s + u = 0, NaN when either is NaN."""
    total = seen + unseen
    return 2.0 * seen * unseen / total if total != 0 else 0.0
