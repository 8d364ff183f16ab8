"""Names to text embeddings, by the text tower of a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np

from concat_jax.core.arrays import fingerprint
from concat_jax.core.files import as_path
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.clip import CLIP, make_clip
from concat_jax.models.semantic_projector import unit
from concat_jax.text.embeddings import embed_classes
from concat_jax.text.prompts import clean_name
from concat_jax.text.templates import find_templates
from concat_jax.text.tokenizer import Tokenizer, has_clip_tokenizer, make_clip_tokenizer
from concat_jax.weights.convert import Source
from concat_jax.weights.model_folder import TextCard

BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
PROMPTS_AT_ONCE = 64


def text_params(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What of CLIP's parameters its text tower needs, and the scale."""
    return {name: clip[name] for name in ("text_model", "text_projection", "logit_scale")}


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text tower with all that decides what it makes of a name.

    `params` are as `text_params` has them: the image tower is not run.
    """

    clip: CLIP
    params: Any
    tokenizer: Tokenizer
    templates: str | tuple[str, ...]
    clean_names: bool
    synonyms: str

    @classmethod
    def of_card(cls, card: TextCard, params: Any, tokenizer: Tokenizer) -> Self:
        """That of a model's folder."""
        how = card.templates, card.clean_names, card.synonyms
        return cls(make_clip(card.clip), params, tokenizer, *how)

    def embed(
        self, vocabulary: Vocabulary, *, cache: str = "", batch_size: int = 256
    ) -> np.ndarray:
        """Text embeddings [K, C] float32, L2-normalised; [K, S, C] where `synonyms` is "max".

        The folder `cache` keeps them between runs. Raises ValueError for names that the tokenizer
        cannot read or tell apart.
        """
        return embed_classes(
            functools.partial(_encode, self.clip, self.params),
            self.tokenizer,
            vocabulary.texts,
            find_templates(self.templates),
            clean=self.clean_names,
            synonyms=self.synonyms,
            batch_size=batch_size,
            folder=cache,
            # The module's fields, heads for one, are not all told by the weights.
            fingerprint=f"{fingerprint(self.params)} {self.clip}" if cache else "",
        )


# The parameters are an argument: as constants they would be compiled into the program.
@functools.partial(jax.jit, static_argnums=0)
def _encode(clip: CLIP, params: Any, tokens: jax.Array) -> jax.Array:
    return unit(clip.apply({"params": params}, tokens, method="encode_text"))


def find_clip_tokenizer(path: str, clip: CLIP) -> Tokenizer:
    """The tokenizer of a file, of a folder, or of what lies beside a file of weights.

    Raises ValueError if there is none, or it is of another CLIP.
    """
    place = as_path(path)
    folder = place if place.is_dir() else place.parent
    if (folder / BPE_NAME).is_file() and not has_clip_tokenizer(folder):
        place = folder / BPE_NAME
    elif has_clip_tokenizer(folder) and not place.name.endswith((".json", ".gz")):
        place = folder
    if not (has_clip_tokenizer(place) or place.name.endswith((".json", ".gz"))):
        raise ValueError(
            f"{path} has no tokenizer beside it, which its text tower needs; put {BPE_NAME} of "
            "github.com/openai/CLIP there, or the tokenizer.json of a Hugging Face CLIP (convert "
            "also takes --tokenizer=FILE)."
        )
    tokenizer = make_clip_tokenizer(place, clip.context_length)
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(
            f"The tokenizer {place} has {tokenizer.vocab_size} tokens where the text tower has "
            f"{clip.vocab_size}; give the one that it was trained with."
        )
    return tokenizer


def embed_training_names(source: Source, tokenizer: Tokenizer) -> Source:
    """A source with text for the classes it was trained on, which get their readable names."""
    card = source.card
    names = tuple(map(clean_name, card.vocabulary.names))
    synonyms = tuple(
        tuple(word for word in words if word != name)
        for name, words in zip(names, card.vocabulary.synonyms, strict=True)
    )
    vocabulary = dataclasses.replace(card.vocabulary, names=names, synonyms=synonyms)
    tower = TextTower.of_card(card.text, source.params["text_tower"], tokenizer)
    text = tower.embed(vocabulary, batch_size=PROMPTS_AT_ONCE)
    params = {**source.params, "training_text": text}
    return dataclasses.replace(
        source, params=params, card=dataclasses.replace(card, vocabulary=vocabulary)
    )
