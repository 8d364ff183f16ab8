"""Class names of data sets in the words a caption would use: explicit tables, no rules.

A name that is in no table of `readable_names.json` is left as it is, so nobody's own names change
under his hands. Cleaning can be turned off (`clean=False` of `concat_jax.text.prompts`).

COCO panoptic's raw names are those that no caption holds: "-merged" and "-other" mark how COCO
joined and divided classes, "-stuff" sets apart from things; a material goes before its noun. PADing
feeds the raw names to CLIP: turn cleaning off to compare with it. COCO-Stuff's names, which the
merged classes were made of, are by the same reading. Pascal VOC and Pascal Context write names
without their blank, with one more, or misspelt; of ADE20K's 847 one is spelt as no caption would.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from concat_jax.core.files import read_json

# By data set; where two hold a name they say the same of it.
READABLE_NAMES: Mapping[str, Mapping[str, str]] = read_json(
    Path(__file__).with_name("readable_names.json")
)
_READABLE = {name: text for table in READABLE_NAMES.values() for name, text in table.items()}


def clean_name(name: str) -> str:
    """`name` as a caption would say it: by `READABLE_NAMES`, else unchanged."""
    return _READABLE.get(name, name)
