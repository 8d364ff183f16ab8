"""Segmentors by the `kind` of a config."""

from collections.abc import Mapping
from typing import Any

from concat_jax.core.config import check_choice, check_type
from concat_jax.models import eomt, fcclip, mask2former
from concat_jax.models.segmentor_output import DTYPES

# By the `kind` of a config: its fields with their defaults, and what makes a segmentor of all.
SEGMENTORS = {
    "mask2former": (mask2former.DEFAULTS, mask2former.make_mask2former),
    "eomt": (eomt.DEFAULTS, eomt.make_eomt),
    "fcclip": (fcclip.DEFAULTS, fcclip.make_fcclip),
}


def segmentor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a segmentor's config; the absent ones are the defaults of its kind.

    Raises ValueError for an unknown key (the nearest valid one is named), kind or dtype, or a size
    that cannot be.
    """
    kind = config.get("kind", mask2former.DEFAULTS["kind"])
    check_choice(kind, SEGMENTORS, "The segmentor's kind is")
    defaults, _ = SEGMENTORS[kind]
    for key in config:
        check_choice(key, defaults, "The segmentor config has no key")
        where, default = f"The segmentor config's {key}", defaults[key]
        check_type(config[key], type(default), where, default)
    settings = {**defaults, **config}
    check_choice(settings["dtype"], DTYPES, "Segmentor dtype is")
    return settings


def make_segmentor(config: Mapping[str, Any]) -> mask2former.Segmentor | eomt.EoMT:
    """A segmentor from a nested mapping, see `segmentor_settings`; ValueError if it cannot be."""
    settings = segmentor_settings(config)
    return SEGMENTORS[settings["kind"]][1](settings)
