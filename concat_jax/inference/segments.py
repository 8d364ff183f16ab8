"""Panoptic results on the host: maps, segments, and a sentence on what the rules did."""

from __future__ import annotations

import dataclasses

import numpy as np

from concat_jax.inference.panoptic import Fate, SegmentTables


@dataclasses.dataclass(frozen=True)
class ImageSegments:
    """The panoptic result of one image on the host.

    Attributes:
      id_map: [h, w] int32, 0 void.
      segments: by ascending id: "id", "label" (class index), "score" (class probability), "area".
      fates: how many queries met each `Fate`, keyed by its lower-case name.
      best_keep_score: the highest keep score of all queries.
    """

    id_map: np.ndarray
    segments: list[dict]
    fates: dict[str, int]
    best_keep_score: float

    def labels_by_id(self) -> dict[int, int]:
        """Class index of every segment id, as `PanopticQuality.update` takes it."""
        return {segment["id"]: segment["label"] for segment in self.segments}

    def explain(self) -> str:
        """One sentence on what the rules did, which says what to change when nothing was found."""
        total = sum(self.fates.values())
        found = (
            f"{len(self.segments)} segments from {total} queries" if self.segments else "No segment"
        )
        reasons = {
            "merged": "merged into stuff of the same class",
            "no_object": "hold no object",
            "low_score": "under the score threshold",
            "no_pixels": "own no pixel of their mask",
            "overlapped": "covered by other segments",
        }
        parts = [f"{self.fates[k]} {text}" for k, text in reasons.items() if self.fates[k]]
        sentence = f"{found}; of {total} queries " + ", ".join(parts) if parts else found
        if self.segments:
            return sentence + "."
        hint = (
            "lower overlap_threshold or mask_threshold"
            if self.fates["no_pixels"] + self.fates["overlapped"]
            else 'lower score_threshold or use keep_rule="objectness"'
            if self.fates["low_score"]
            else "lower objectness_threshold, or check that trained weights were loaded"
        )
        return f"{sentence}; the best keep score is {self.best_keep_score:.2f}: {hint}."


def list_segments(id_map: np.ndarray, tables: SegmentTables) -> ImageSegments:
    """The segments of one image from its map [h, w] and its row [N] of the tables, on the host."""
    segments = [
        {
            "id": int(n) + 1,
            "label": int(tables.labels[n]),
            "score": float(tables.scores[n]),
            "area": int(tables.areas[n]),
        }
        for n in np.flatnonzero(tables.labels >= 0)
    ]
    counts = np.bincount(tables.fates, minlength=len(Fate))
    return ImageSegments(
        id_map=id_map,
        segments=segments,
        fates={fate.name.lower(): int(counts[fate]) for fate in Fate},
        best_keep_score=float(tables.keep_scores.max()),
    )
