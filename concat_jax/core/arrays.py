"""Small arrays that several rooms read alike: tables of segments."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Labels or crowd flags of segments: an array whose row g - 1 belongs to id g, or a map from id.
Table = np.ndarray | list | tuple | Mapping[int, int]


def table_rows(labels: Table) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and labels of a table, in its order.

    Args:
      labels: [G] ints, row g - 1 for id g, negative where there is no such segment; or a mapping
        from positive id to label.

    Returns:
      (ids [M] int64, labels [M] int64), padded rows left out.

    Raises:
      ValueError: if an array is not one-dimensional or a mapping holds id 0, which is void.
    """
    if isinstance(labels, Mapping):
        ids = np.fromiter(labels.keys(), np.int64, len(labels))
        values = np.fromiter(labels.values(), np.int64, len(labels))
        if (ids <= 0).any():
            raise ValueError(f"Segment ids must be positive, got {ids.min()}; 0 is void.")
    else:
        values = np.asarray(labels, np.int64)
        if values.ndim != 1:
            raise ValueError(f"A label table must be one-dimensional, got shape {values.shape}.")
        ids = np.arange(1, len(values) + 1)
    present = values >= 0
    return ids[present], values[present]
