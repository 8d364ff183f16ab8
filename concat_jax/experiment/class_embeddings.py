"""The names of a run's classes: the tokenizer that reads them and the embeddings they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.text_tower import TextTower, text_params
from concat_jax.models.clip import CLIP
from concat_jax.models.networks import Params
from concat_jax.text.prompts import SYNONYM_MODES, make_prompts, tokenize
from concat_jax.text.templates import find_templates
from concat_jax.text.tokenizer import Tokenizer, WordTokenizer, make_clip_tokenizer
from concat_jax.weights.clip import clip_tokenizer_folder


def check_text(text: ml_collections.ConfigDict) -> None:
    """Refuses a config's `text` section by a ValueError that names the nearest choice."""
    find_templates(text.templates)
    check_choice(text.synonyms, SYNONYM_MODES, "config.text.synonyms is")


def make_tokenizer(config: ml_collections.ConfigDict, caption_words: Sequence[str]) -> Tokenizer:
    """The tokenizer that a config asks for; ValueError if CLIP's vocabulary is nowhere."""
    text = config.text
    check_choice(text.tokenizer, ("words", "clip"), "config.text.tokenizer is")
    if text.tokenizer == "words":
        return WordTokenizer.of_texts(caption_words, text.context_length)
    # The folder that the weights are from has a tokenizer, too, if it is a whole one.
    weights = config.get("init", {}).get("clip", "")
    path = text.bpe_path or (clip_tokenizer_folder(weights) if weights else None)
    if not path:
        raise ValueError(
            "No vocabulary is configured, and none lies beside config.init.clip: set "
            "config.text.bpe_path to CLIP's BPE file (bpe_simple_vocab_16e6.txt.gz) or to a folder "
            "with CLIP's tokenizer."
        )
    return make_clip_tokenizer(path, text.context_length)


def check_names(
    text: ml_collections.ConfigDict, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    """Refuses, without a text tower, names that are empty, too long, or not to be told apart."""
    templates = find_templates(text.templates)
    prompts = make_prompts(
        vocabulary.texts, templates, clean=text.clean_names, synonyms=text.synonyms
    )
    tokenize(tokenizer, prompts)


class ClassEmbeddings:
    """Text embeddings of a run's vocabularies, each made once."""

    def __init__(
        self,
        text: ml_collections.ConfigDict,
        clip: CLIP,
        tokenizer: Tokenizer,
        clip_params: Callable[[str], Params],
    ):
        """`clip_params` gives the parameters of the CLIP of a source, a stage or "init"."""
        self._text, self._clip, self._tokenizer = text, clip, tokenizer
        self._clip_params = clip_params
        self._made: dict[tuple[str, Vocabulary], np.ndarray] = {}

    def get(self, source: str, vocabulary: Vocabulary) -> np.ndarray:
        """Embeddings of a vocabulary by the CLIP of `source`, see `TextTower.embed`."""
        if (source, vocabulary) not in self._made:
            params, text = text_params(self._clip_params(source)), self._text
            names = (text.templates, text.clean_names, text.synonyms)
            tower = TextTower(self._clip, params, self._tokenizer, *names)
            # Several hosts run the tower together: none may find its answer on a disk of its own.
            cache = text.cache if jax.process_count() == 1 else ""
            self._made[source, vocabulary] = tower.embed(vocabulary, cache=cache)
        return self._made[source, vocabulary]
