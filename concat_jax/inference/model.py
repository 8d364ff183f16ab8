"""A model in memory, to be asked by names: what a folder or a workdir holds becomes predictors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.config import build, check_choice
from concat_jax.core.files import ImageError, as_path
from concat_jax.core.prefetch import prefetch
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.clip_names import MaskNamer, read_clip_names
from concat_jax.inference.heads import ClipHead, EnsembleHead, LinearHead, TextHead, text_head_for
from concat_jax.inference.images import Picture, open_picture
from concat_jax.inference.inputs import source_names
from concat_jax.inference.predictor import PredictConfig, Prediction, Predictor, Prepared
from concat_jax.inference.programs import Network
from concat_jax.inference.result import Result, Results
from concat_jax.inference.text_tower import TextTower
from concat_jax.models.clip import cosine_scale
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import DTYPES
from concat_jax.text.tokenizer import Tokenizer, load_tokenizer
from concat_jax.weights.model_folder import TOKENIZER_NAME, ModelCard, load_model, text_modules
from data_pipelines.labels import Names, parse_classes

# Prompts that the text tower takes at once: few, since people ask for few names.
PROMPTS_AT_ONCE = 32
# Lists of names of which the embeddings are kept.
NAMES_KEPT = 16


class Model:
    """A segmentor with what names its queries, on its device.

        model = concat_jax.load("models/mine")
        result = model("photo.jpg", classes=["cat", "remote control", "sofa"])

    `vocabulary` has the names of its head or, where text names them, of training.
    """

    def __init__(
        self,
        params: Any,
        card: ModelCard,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "",
        clip: str | os.PathLike[str] = "",
    ):
        """`dtype` "" is the card's; `clip` is a CLIP's file or folder, see `read_clip_names`.

        Raises ValueError if nothing in the weights names segments, or text does and a CLIP is given
        besides.
        """
        if card.vocabulary is None:
            whose = f"The weights of {card.source}" if card.source else "These weights"
            raise ValueError(
                f"{whose} have no class head (a backbone alone?) and cannot name segments; convert "
                "a whole Mask2Former or EoMT, or give the workdir of a training run."
            )
        settings = dict(card.segmentor)
        if dtype:
            check_choice(dtype, DTYPES, "There is no dtype")
            settings["dtype"] = dtype
        self.card, self.vocabulary, self._notice = card, card.vocabulary, ""
        self.clip = None
        if not card.knows_things:
            # Stuff flags that nobody set would merge every class into one segment.
            things = (True,) * len(card.vocabulary)
            self.vocabulary = dataclasses.replace(card.vocabulary, is_thing=things)
            self._notice = (
                "The model does not say which classes are things: all are treated as things, so "
                "no segments of one class are merged."
            )
        self._programs: list[str] = []
        # Image by image by the same names: the text tower runs once.
        self._head_for = functools.lru_cache(maxsize=NAMES_KEPT)(self._embed)
        params = jax.device_put(params)
        self._network = Network(params["segmentor"], make_segmentor(settings))
        if card.text is None:
            self._head = LinearHead(params["classifier"])
            if clip:
                self.clip = read_clip_names(clip, settings.get("dtype", "float32"))
                self._namer = MaskNamer(self.clip.tower, self._head)
            return
        if clip:
            raise ValueError(
                f"{card.source or 'This model'} names by text already; leave out the CLIP {clip}, "
                "which is for models with a linear head."
            )
        _, projector = text_modules(card.text)
        head = params["projector"], params["training_text"], None, None, projector
        self._head = TextHead(*head)
        if card.text.ensemble is not None:
            seen, scale = jnp.asarray(card.vocabulary.is_seen), cosine_scale(params["text_tower"])
            self._head = EnsembleHead(*head, is_seen=seen, scale=scale, **card.text.ensemble)
        self._tower = TextTower.of_card(card.text, params["text_tower"], tokenizer)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "",
        clip: str | os.PathLike[str] = "",
    ) -> Model:
        """A model of a folder that `python -m concat_jax.convert` made.

        Raises:
          ValueError: as `load_model` and `Model`.
        """
        params, card = load_model(folder)
        tokenizer = None
        if card.text:
            tokenizer = load_tokenizer(as_path(folder) / TOKENIZER_NAME, card.text.tokenizer)
        return cls(params, card, tokenizer, dtype=dtype, clip=clip)

    @property
    def keep_rule(self) -> str:
        """The head's, where `PredictConfig` names none."""
        return self._head.KEEP_RULE

    @property
    def score_threshold(self) -> float:
        """The head's, where `PredictConfig` names none."""
        return self._head.SCORE_THRESHOLD

    @overload
    def __call__(
        self, images: Picture, classes: Names | Vocabulary | None = None, **settings: Any
    ) -> Result: ...

    @overload
    def __call__(
        self, images: Sequence[Picture], classes: Names | Vocabulary | None = None, **settings: Any
    ) -> Results: ...

    def __call__(self, images, classes=None, **settings):
        """Segments an image, or each of a list or tuple of them, by names.

        Args:
          images: paths, arrays [H, W], or [H, W, C] of 1, 3 or 4 channels, uint8 or uint16, or
            Pillow images. Files are turned as their EXIF data say, Pillow images are taken as they
            are.
          classes: see `labels.parse_classes`: ["cat", "sky"], {"things": ["cat"], "stuff":
            ["sky"]}, "cat; sky" or a file. None: the model's own. Other names compile nothing
            again, up to 32, then up to 64 and so on.
          settings: fields of `PredictConfig` besides those of other tasks, such as mask_threshold
            and gamma; batch_size is for lists.

        Raises ValueError for an image that cannot be read, for names that the model cannot tell
        apart and for settings that do not exist or are out of range.
        """
        if "tasks" in settings or isinstance(settings.get("gamma"), list | tuple):
            raise ValueError(
                "A call gives one panoptic result an image; for other tasks, or several values of "
                "gamma, use Model.predictor."
            )
        fields = {field.name for field in dataclasses.fields(PredictConfig)}
        fields -= {"tasks", "instance_threshold", "windows"}  # of other results than a call's
        for name in settings:
            check_choice(name, ("classes", *sorted(fields)), "A call has no argument")
        predictor = self.predictor(self.config(**settings), classes)
        for notice in predictor.notices:
            warnings.warn(notice, stacklevel=2)
        is_list = isinstance(images, list | tuple)
        pictures = images if is_list else [images]
        sources, results = _sources(pictures), {}
        for index, image, prediction in segment_all(predictor, pictures):
            own, found = pictures[index], prediction.panoptic
            path = as_path(own).absolute() if isinstance(own, str | os.PathLike) else None
            results[index] = Result(image, predictor.vocabulary, sources[index], found, path)
        in_order = Results(results[index] for index in range(len(pictures)))
        return in_order if is_list else in_order[0]

    def config(self, **settings: Any) -> PredictConfig:
        """How to predict, with the card's image size; ValueError for what is no setting."""
        own = {"short_side": self.card.short_side, "long_side": self.card.long_side}
        own["windows"] = self.card.windows and tuple(settings.get("tasks", ())) == ("semantic",)
        return build(PredictConfig, {**own, **settings}, "PredictConfig")

    def predictor(
        self,
        config: PredictConfig | None = None,
        classes: Names | Vocabulary | None = None,
    ) -> Predictor:
        """A predictor by the names that are asked for, see `__call__`.

        Raises ValueError if the head cannot read other names, or for names that the tokenizer
        cannot read or tell apart.
        """
        card, notices = self.card, []
        if isinstance(classes, Vocabulary):
            vocabulary = classes
        elif classes is None:
            vocabulary = self.vocabulary
            notices += [self._notice] if self._notice else []
        else:
            vocabulary, knows_things = parse_classes(classes, self.vocabulary)
            if not knows_things:
                notices += ["Which names are things is not said: all are taken as such."]
        head, namer = self._head, None
        if self.clip is not None and classes is not None:
            head, namer = self._head_for(vocabulary), self._namer
        elif vocabulary.names != self.vocabulary.names:
            if card.text is None:
                raise ValueError(
                    f"The head of {card.source or 'this model'} is linear and names its own "
                    f"{len(self.vocabulary)} classes alone; for others give a CLIP that names its "
                    "masks, --clip=FOLDER, or a model that was trained to read names, such as the "
                    "workdir of python -m concat_jax.main."
                )
            head = self._head_for(vocabulary)
        config = config or self.config()
        how = {"notices": notices, "programs_used": self._programs, "namer": namer}
        return Predictor(self._network, head, vocabulary, config, **how)

    def _embed(self, vocabulary: Vocabulary) -> TextHead | ClipHead:
        seen = np.asarray(vocabulary.is_seen)
        if self.clip is not None:
            text = self.clip.text.embed(vocabulary, batch_size=PROMPTS_AT_ONCE)
            return text_head_for(self.clip.head(self._head), text, None, seen)
        text = self._tower.embed(vocabulary, batch_size=PROMPTS_AT_ONCE)
        return text_head_for(self._head, text, np.asarray(self._head.text), seen)


def _sources(pictures: Sequence[Picture]) -> list[str]:
    """Names of the files, below the folder that all share; "image.png" for what is in memory."""
    are_files = [isinstance(picture, str | os.PathLike) for picture in pictures]
    files = [as_path(p) for p, is_file in zip(pictures, are_files, strict=True) if is_file]
    names = iter(source_names(files))
    return [next(names) if is_file else "image.png" for is_file in are_files]


def segment_all(
    predictor: Predictor,
    pictures: Sequence[Picture],
    failed: Callable[[int, ImageError], None] | None = None,
) -> Iterator[tuple[int, np.ndarray, Prediction]]:
    """Index, image [H, W, 3] uint8 and prediction of each picture, as batches fill up.

    Few are in memory at once: a thread reads what comes next. What cannot be read is raised, or
    passed over where `failed` is told.
    """

    def load(index: int) -> tuple[np.ndarray | ImageError, Prepared | None]:
        try:
            image = open_picture(pictures[index], f"Image {index + 1}")
            return image, predictor.prepare(image)
        except ImageError as error:
            return error, None

    def readable() -> Iterator[tuple[tuple[int, np.ndarray], Prepared]]:
        with contextlib.closing(prefetch(load, 0, len(pictures), 2, num_threads=1)) as read:
            for index, (image, prepared) in enumerate(read):
                if prepared is not None:
                    yield (index, image), prepared
                elif failed is None:
                    raise image
                else:
                    failed(index, image)

    with contextlib.closing(readable()) as items:
        for (index, image), prediction in predictor.stream(items):
            yield index, image, prediction
