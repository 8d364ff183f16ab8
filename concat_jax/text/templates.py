"""Prompt templates: the sets that the field compares under, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

# openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb, `imagenet_templates`, in its order:
# the ensemble of Radford et al. 2021, section 3.1.4.
_EIGHTY = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # The bare name: what a `WordTokenizer`, whose words are the names' own, can read.
        "name": ("{}",),
        "single": ("a photo of a {}.",),
        # `imagenet_select` of PADing and ZegFormer, so that numbers under their protocol compare.
        "eight": (
            "itap of a {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
            "A photo of a {} in the scene",
        ),
        "eighty": _EIGHTY,
    }
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; ValueError unless each has exactly one "{}" and there is one."""
    if isinstance(templates, str):
        raise ValueError(
            f"Templates are a sequence, for example TEMPLATES['single'], not {templates!r}."
        )
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
