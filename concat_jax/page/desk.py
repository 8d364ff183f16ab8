"""Where visitors' requests arrive: what is too much is refused in a sentence, the rest takes turns.

One thread owns the model, so that twenty visitors need the memory of one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concat_jax.inference.model import Model
from concat_jax.inference.result import Result
from data_pipelines.synthetic.presets import PRESETS
from data_pipelines.synthetic.world import draw_scenes

# What Pillow may try: other formats start programs of their own or are no pictures of people's.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 25_000_000
MAX_MEGABYTES = 20
MAX_NAMES, MAX_LETTERS = 200, 80
TIME_LIMIT = 120.0  # seconds
NUM_SCENES, SCENE_SIDE = 6, 256


class Desk:
    """Answers requests one after the other.

    `scenes` are examples [H, W, 3] uint8 of the world that the model was trained on, none for a
    model of photographs.
    """

    def __init__(self, model: Model):
        self.model = model
        names = model.vocabulary.names
        known = [name for name, world in PRESETS.items() if world.vocabulary.names == names]
        self.scenes: list[np.ndarray] = []
        if known:
            self.scenes = draw_scenes(NUM_SCENES, preset=known[0], image_size=SCENE_SIDE)
        self._worker = ThreadPoolExecutor(max_workers=1)

    def close(self) -> None:
        """Answers no more; what waits is given up."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def ask(
        self,
        picture: str | int,
        things: str = "",
        stuff: str = "",
        *,
        answer: Callable[[Result], Any] = lambda result: result,
        time_limit: float = TIME_LIMIT,
        **settings: float,
    ) -> Any:
        """What `answer` makes of the result.

        Args:
          picture: path of an upload, or the number of a scene.
          things, stuff: names with commas or line ends between them, stuff behind a semicolon of
            the things as well; both empty, the model's own.
          time_limit: in seconds; what runs longer is given up, and the next one waits for it.
          settings: of the model's call.

        Raises ValueError with a sentence that names no path of this machine.
        """
        # As on a command line: what is behind a semicolon is stuff.
        things, _, ground = (things or "").partition(";")
        if ";" in ground:
            raise ValueError("The things have several semicolons; one ends the things.")
        classes = {"things": split_names(things), "stuff": split_names(f"{ground},{stuff or ''}")}
        count = len(classes["things"]) + len(classes["stuff"])
        if count > MAX_NAMES:
            raise ValueError(f"{count} names are too many for this page; give up to {MAX_NAMES}.")

        def work() -> Any:
            image = self.scenes[picture] if isinstance(picture, int) else picture
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return answer(self.model(image, classes if count else None, **settings))

        if isinstance(picture, str):
            check_upload(picture)
        elif not 0 <= picture < len(self.scenes):
            raise ValueError("There is no such example; take another, or drop a picture.")
        try:
            turn = self._worker.submit(work)
        except RuntimeError as error:
            raise ValueError("The page is being closed; start it again.") from error
        try:
            return turn.result(time_limit)
        except CancelledError as error:
            raise ValueError("The page is being closed; start it again.") from error
        except TimeoutError as error:
            turn.cancel()
            raise ValueError(
                f"This took more than {time_limit:g} seconds and was given up; make the picture "
                "smaller, or come back later."
            ) from error
        except ValueError as error:
            raise ValueError(_without_path(str(error), picture)) from error


def split_names(text: str | None) -> list[str]:
    """Names of a text, in its order; ValueError for one that is too long."""
    names = [" ".join(name.split()) for name in re.split(r"[,;\n]", text or "")]
    for name in names:
        if len(name) > MAX_LETTERS:
            raise ValueError(
                f"The name {name[:20]}… has {len(name)} letters; give up to {MAX_LETTERS}, with "
                "commas between names."
            )
    return [name for name in names if name]


def check_upload(path: str) -> None:
    """Raises ValueError for a file that is no picture or too large; decodes none of its pixels."""
    name = Path(path).name
    if not Path(path).is_file():
        raise ValueError(f"{name} is no longer here, where pictures stay an hour; drop it again.")
    size = Path(path).stat().st_size
    if size == 0:
        raise ValueError(f"{name} is empty; choose another file.")
    if size > MAX_MEGABYTES * 10**6:
        raise ValueError(
            f"{name} has {size / 10**6:.0f} megabytes where {MAX_MEGABYTES} are the limit; make it "
            "smaller."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its threshold is above ours
            with Image.open(path, formats=FORMATS) as image:
                is_large = image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        is_large = True
    except Exception as error:  # whatever a hostile file makes a decoder say
        kinds = ", ".join(FORMATS[:-1])
        raise ValueError(f"{name} is no picture: give {kinds} or {FORMATS[-1]}.") from error
    if is_large:
        raise ValueError(
            f"{name} has more than {MAX_PIXELS // 10**6} million pixels, the limit of this page; "
            "make it smaller."
        )


def _without_path(text: str, picture: str | int) -> str:
    return text.replace(str(picture), Path(picture).name) if isinstance(picture, str) else text
