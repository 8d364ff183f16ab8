"""Prompt templates: the sets that the field compares under, and a user's own.

Of `templates.json`, "name" is the bare name, which a `WordTokenizer`, whose words are the names'
own, can read. "eight" is `imagenet_select` of PADing and ZegFormer, so that numbers under their
protocol compare. "fourteen" is ViLD's (Gu et al., arXiv 2104.13921), as FC-CLIP
(`fcclip/fcclip.py`) takes them. "eighty" is `imagenet_templates` of openai/CLIP
notebooks/Prompt_Engineering_for_ImageNet.ipynb in its order: the ensemble of Radford et al. 2021,
section 3.1.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from concat_jax.core.files import read_json

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    name: tuple(templates)
    for name, templates in read_json(Path(__file__).with_name("templates.json")).items()
}


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; ValueError unless each has exactly one "{}" and there is one."""
    if not templates:
        raise ValueError("There are no templates; give one or more, each with '{}' for the name.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                f"The template {template!r} must hold '{{}}' once, where the name goes."
            )
    return tuple(templates)


def find_templates(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The set of `TEMPLATES` of that name, one template (its "{}" tells), or a sequence of them."""
    if not isinstance(choice, str):
        return check_templates(choice)
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    if "{}" in choice:
        return check_templates([choice])
    raise ValueError(
        f"There is no template set {choice!r}; use one of {', '.join(TEMPLATES)}, or a list of "
        "templates with '{}' where the name goes."
    )
