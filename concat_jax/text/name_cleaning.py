"""Class names of data sets in the words a caption would use: explicit tables, no rules.

A name that is in no table is left as it is, so nobody's own names change under his hands. Cleaning
can be turned off (`clean=False` of `concat_jax.text.prompts.embed_classes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# COCO panoptic's raw names that no caption holds, in the words a caption would. "-merged" and
# "-other" mark how COCO joined and divided classes, "-stuff" sets apart from things; a material
# goes before its noun. PADing feeds the raw names to CLIP: turn cleaning off to compare with it.
COCO_PANOPTIC_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "door-stuff": "door",
        "floor-wood": "wood floor",
        "mirror-stuff": "mirror",
        "playingfield": "playing field",
        "wall-brick": "brick wall",
        "wall-stone": "stone wall",
        "wall-tile": "tile wall",
        "wall-wood": "wood wall",
        "water-other": "water",
        "window-blind": "window blind",
        "window-other": "window",
        "tree-merged": "tree",
        "fence-merged": "fence",
        "ceiling-merged": "ceiling",
        "sky-other-merged": "sky",
        "cabinet-merged": "cabinet",
        "table-merged": "table",
        "floor-other-merged": "floor",
        "pavement-merged": "pavement",
        "mountain-merged": "mountain",
        "grass-merged": "grass",
        "dirt-merged": "dirt",
        "paper-merged": "paper",
        "food-other-merged": "food",
        "building-other-merged": "building",
        "rock-merged": "rock",
        "wall-other-merged": "wall",
        "rug-merged": "rug",
    }
)

# COCO-Stuff's names, which COCO panoptic's merged classes were made of, by the same reading.
COCO_STUFF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "ceiling-other": "ceiling",
        "ceiling-tile": "tile ceiling",
        "desk-stuff": "desk",
        "door-stuff": "door",
        "floor-marble": "marble floor",
        "floor-other": "floor",
        "floor-stone": "stone floor",
        "floor-tile": "tile floor",
        "floor-wood": "wood floor",
        "food-other": "food",
        "furniture-other": "furniture",
        "ground-other": "ground",
        "mirror-stuff": "mirror",
        "plant-other": "plant",
        "playingfield": "playing field",
        "sky-other": "sky",
        "solid-other": "solid",
        "structural-other": "structure",
        "textile-other": "textile",
        "wall-brick": "brick wall",
        "wall-concrete": "concrete wall",
        "wall-other": "wall",
        "wall-panel": "panel wall",
        "wall-stone": "stone wall",
        "wall-tile": "tile wall",
        "wall-wood": "wood wall",
        "water-other": "water",
        "waterdrops": "water drops",
        "window-blind": "window blind",
        "window-other": "window",
    }
)

# Names that Pascal VOC and Pascal Context write without their blank, with one more, or misspelt.
PASCAL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "casette recorder": "cassette recorder",
        "diningtable": "dining table",
        "fire place": "fireplace",
        "pottedplant": "potted plant",
        "tvmonitor": "tv monitor",
    }
)

# The one name of ADE20K's 847 that is spelt as no caption would.
ADE20K_NAMES: Mapping[str, str] = MappingProxyType({"check-in-desk": "check-in desk"})

# Where two tables hold a name they say the same of it.
READABLE_NAMES: Mapping[str, str] = MappingProxyType(
    {**COCO_PANOPTIC_NAMES, **COCO_STUFF_NAMES, **PASCAL_NAMES, **ADE20K_NAMES}
)


def clean_name(name: str) -> str:
    """`name` as a caption would say it: by `READABLE_NAMES`, else unchanged."""
    return READABLE_NAMES.get(name, name)
