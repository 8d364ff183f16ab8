"""A model in memory, to be asked by names: what a folder or a workdir holds becomes predictors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.heads import LinearHead, TextHead, text_head_for
from concat_jax.inference.predictor import PredictConfig, Predictor
from concat_jax.inference.programs import Network
from concat_jax.inference.text_tower import TextTower
from concat_jax.models.segmentor import DTYPES, make_segmentor
from concat_jax.text.tokenizer import Tokenizer, load_tokenizer
from concat_jax.weights.model_folder import TOKENIZER_NAME, ModelCard, load_model, text_modules

# Prompts that the text tower takes at once: few, since people ask for few names.
PROMPTS_AT_ONCE = 32


class Model:
    """A segmentor with what names its queries, on its device.

        model = Model.from_folder("models/mine")
        predictor = model.predictor(classes=vocabulary)

    `vocabulary` has the names of its head or, where text names them, of training. `notice` is a
    sentence on what it cannot do as asked, or "".
    """

    def __init__(
        self, params: Any, card: ModelCard, tokenizer: Tokenizer | None = None, *, dtype: str = ""
    ):
        """`dtype` "" is the card's; ValueError if nothing in the weights names segments."""
        if card.vocabulary is None:
            whose = f"The weights of {card.source}" if card.source else "These weights"
            raise ValueError(
                f"{whose} have no class head (a backbone alone?) and cannot name segments; convert "
                "a whole Mask2Former, or give the workdir of a training run."
            )
        settings = dict(card.segmentor)
        if dtype:
            check_choice(dtype, DTYPES, "There is no dtype")
            settings["dtype"] = dtype
        self.card, self.vocabulary, self.notice = card, card.vocabulary, ""
        if not card.knows_things:
            # Stuff flags that nobody set would merge every class into one segment.
            things = (True,) * len(card.vocabulary)
            self.vocabulary = dataclasses.replace(card.vocabulary, is_thing=things)
            self.notice = (
                "The model does not say which classes are things: all are treated as things, so "
                "no segments of one class are merged."
            )
        params = jax.device_put(params)
        self._network = Network(params["segmentor"], make_segmentor(settings))
        if card.text is None:
            self._head = LinearHead(params["classifier"])
            return
        clip, projector = text_modules(card.text)
        text = params["training_text"]
        self._head = TextHead(params["projector"], text, None, None, projector)
        self._tower = TextTower(
            clip,
            params["text_tower"],
            tokenizer,
            card.text.templates,
            card.text.clean_names,
            card.text.synonyms,
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, dtype: str = "") -> Model:
        """A model of a folder that `python -m concat_jax.convert` made.

        Raises:
          ValueError: as `load_model` and `Model`.
        """
        params, card = load_model(folder)
        tokenizer = None
        if card.text:
            tokenizer = load_tokenizer(Path(folder) / TOKENIZER_NAME, card.text.tokenizer)
        return cls(params, card, tokenizer, dtype=dtype)

    def predictor(
        self, config: PredictConfig | None = None, classes: Vocabulary | None = None
    ) -> Predictor:
        """A predictor by the names that are asked for; None for the model's own.

        The image size is the card's unless the config says one. Raises ValueError if the head
        cannot read other names, or for names that the tokenizer cannot read or tell apart.
        """
        card = self.card
        config = config or PredictConfig(short_side=card.short_side, long_side=card.long_side)
        if classes is None or classes.names == self.vocabulary.names:
            vocabulary = classes or self.vocabulary
            return Predictor(self._network, self._head, vocabulary, config)
        if card.text is None:
            raise ValueError(
                f"The head of {card.source or 'this model'} is linear and names its own "
                f"{len(self.vocabulary)} classes alone; names of one's own need a model that was "
                "trained to read them, such as the workdir of python -m concat_jax.main."
            )
        text = self._tower.embed(classes, batch_size=PROMPTS_AT_ONCE)
        head = text_head_for(self._head, text, np.asarray(self._head.text))
        return Predictor(self._network, head, classes, config)
