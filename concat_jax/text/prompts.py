"""Class names to text embeddings: prompt templates, synonyms, and readable names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from concat_jax.text.tokenizer import Tokenizer

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
    }
)

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

_SYNONYM_SEPARATOR = ", "


def clean_name(name: str) -> str:
    """`name` as a caption would say it: by `COCO_PANOPTIC_NAMES`, else unchanged."""
    return COCO_PANOPTIC_NAMES.get(name, name)


def _synonyms(name: str, clean: bool) -> list[str]:
    parts = [part.strip() for part in name.split(_SYNONYM_SEPARATOR)]
    if not all(parts):
        raise ValueError(f"The class name {name!r} is empty or holds an empty synonym.")
    return [clean_name(part) for part in parts] if clean else parts


def _check_names(names: Sequence[str], clean: bool) -> list[list[str]]:
    """Synonyms of each name; refuses names that a lower-casing tokenizer cannot tell apart."""
    if isinstance(names, str):
        raise ValueError(f"embed_classes takes a sequence of names; wrap {names!r} in a list.")
    synonyms = [_synonyms(name, clean) for name in names]
    if not synonyms:
        raise ValueError("embed_classes got no class names.")
    first: dict[str, str] = {}
    for name, parts in zip(names, synonyms, strict=True):
        read = _SYNONYM_SEPARATOR.join(parts).lower()
        if read in first:
            raise ValueError(
                f"The class names {first[read]!r} and {name!r} are the same text {read!r}; "
                f"rename one{' or pass clean=False' if clean else ''}."
            )
        first[read] = name
    return synonyms


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str):
        raise ValueError(
            f"embed_classes takes a sequence of templates, for example TEMPLATES['single'], not "
            f"{templates!r}."
        )
    if not templates:
        raise ValueError("embed_classes got no templates.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"The template {template!r} must hold '{{}}' once, where the name goes."
            )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embed_classes(
    encode_text_fn: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    clean: bool = True,
    batch_size: int = 256,
) -> np.ndarray:
    """Prompt ensemble of each class (Radford et al. 2021, section 3.1.4), as PADing averages it.

    A prompt's embedding is L2-normalised, the mean over the templates normalised again. A name that
    lists synonyms, as in "lamp, bulb", is the normalised mean of its synonyms' embeddings.

    Args:
      encode_text_fn: tokens [batch_size, L] int32 -> [batch_size, C] float; always called with one
        shape, so that a jitted function compiles once.
      tokenizer: makes the tokens.
      names: K class names.
      templates: prompts with one "{}" each, for example `TEMPLATES["eight"]`.
      clean: pass every name and synonym through `clean_name`.
      batch_size: prompts a call; the last call is filled up with repeated prompts.

    Returns:
      [K, C] float32, L2-normalised.

    Raises:
      ValueError: for no names or templates, an empty name, two names that are one text, a template
        without a place for the name, or an embedding that is not finite.
    """
    synonyms = _check_names(names, clean)
    _check_templates(templates)
    texts = [part for parts in synonyms for part in parts]
    prompts = [template.replace("{}", text) for text in texts for template in templates]
    tokens = tokenizer(prompts)
    embeddings = []
    for start in range(0, len(tokens), batch_size):
        chunk = np.arange(start, start + batch_size).clip(max=len(tokens) - 1)
        embeddings.append(np.asarray(encode_text_fn(tokens[chunk]), np.float64))
    by_prompt = _unit(np.concatenate(embeddings)[: len(tokens)])
    by_text = _unit(by_prompt.reshape(len(texts), len(templates), -1).mean(axis=1))
    ends = np.cumsum([len(parts) for parts in synonyms])
    classes = np.stack([rows.mean(axis=0) for rows in np.split(by_text, ends[:-1])])
    if not np.isfinite(classes).all():
        raise ValueError("The text encoder gave embeddings that are not finite; check its weights.")
    return _unit(classes).astype(np.float32)
