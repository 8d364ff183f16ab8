"""Names to text embeddings, by the text tower of a model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from concat_jax.core.arrays import fingerprint
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.clip import CLIP
from concat_jax.models.clip_images import l2_normalize
from concat_jax.text.embeddings import embed_classes
from concat_jax.text.templates import find_templates
from concat_jax.text.tokenizer import Tokenizer

# What of CLIP's parameters the text tower needs.
SUBTREES = ("text_model", "text_projection", "logit_scale")


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text tower with all that decides what it makes of a name.

    `params` are the `SUBTREES` of the module's; its image tower is not run.
    """

    clip: CLIP
    params: Any
    tokenizer: Tokenizer
    templates: str | tuple[str, ...]
    clean_names: bool
    synonyms: str

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
    return l2_normalize(clip.apply({"params": params}, tokens, method="encode_text"))
