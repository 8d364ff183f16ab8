"""What is exported of a model: one function of an image, and the arrays that it is told by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from concat_jax.inference.heads import TextHead
from concat_jax.inference.images import SIDE_MULTIPLE
from concat_jax.inference.predictor import Predictor
from concat_jax.inference.programs import Network, look

# A side of a shape that is left open: how many names there are.
NAMES = "K"
# Position encodings are constants of the program: 0.4 GB of them at this size.
MAX_SIDE = 4096


class Spec(NamedTuple):
    """Shape of an array, `NAMES` where it is open, its dtype, and what it is, for people."""

    shape: tuple[int | str, ...]
    dtype: str
    about: str

    def struct(self, names: Any) -> jax.ShapeDtypeStruct:
        """As JAX writes it, with a number or a symbol in the place of `NAMES`."""
        shape = tuple(names if side == NAMES else side for side in self.shape)
        return jax.ShapeDtypeStruct(shape, self.dtype)


class Program(NamedTuple):
    """A function to export: `call(params, image)` or `call(params, image, text)`.

    Attributes:
      params: what becomes the weights of the artefact, text embeddings of given names included.
      call: gives its outputs by name.
      inputs, outputs: of `call`, without `params`, in order.
    """

    params: Any
    call: Callable[..., dict[str, jax.Array]]
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]


def make_program(predictor: Predictor, size: tuple[int, int], *, open_names: bool) -> Program:
    """What a predictor runs at one image size (height, width), nothing padded.

    With `open_names` those of a text model are an input; those of a linear head are its own. Raises
    ValueError as `check_size`; or names are to be an input where a class is several texts.
    """
    check_size(size)
    network, head = predictor.networks
    num_names = len(predictor.vocabulary)
    if head.num_classes > num_names:  # no other names will come to fill it up
        head = head.without_filling(num_names)
    takes_text = open_names and isinstance(head, TextHead)
    if takes_text and head.text.ndim != 2:
        raise ValueError("The model keeps the synonyms of a name apart; give --classes.")

    def call(params: Any, image: jax.Array, text: jax.Array | None = None) -> dict[str, jax.Array]:
        segmentor, named = params
        if text is not None:
            named = named.replace(text=text, training_text=named.text)
        logits, queries = look(Network(segmentor, network.module), image)
        scores = named(queries)
        return {"mask_logits": logits, **scores._asdict()}

    inputs = {"image": Spec((1, *size, 3), "uint8", "RGB, 0 to 255")}
    if takes_text:
        about = "text embedding of each name, of length 1"
        inputs["text"] = Spec((NAMES, head.text.shape[-1]), "float32", about)
    params = (network.params, head)
    shapes = jax.eval_shape(call, params, *(spec.struct(1) for spec in inputs.values()))
    abouts = {
        "mask_logits": "of each query, before the sigmoid",
        "class_probs": "of each query, one a name, the last no-object",
        "objectness": "of each query, probability that it holds a segment",
    }
    outputs = {name: Spec(shapes[name].shape, "float32", about) for name, about in abouts.items()}
    if takes_text:
        probs = outputs["class_probs"]
        outputs["class_probs"] = probs._replace(shape=(*probs.shape[:-1], f"{NAMES}+1"))
    return Program(params, call, inputs, outputs)


def check_size(size: tuple[int, int]) -> None:
    """Raise a ValueError, naming the nearest that can be, for sides the networks cannot take."""
    nearest = [
        min(max(1, math.floor(side / SIDE_MULTIPLE + 0.5)) * SIDE_MULTIPLE, MAX_SIDE)
        for side in size
    ]
    if list(size) != nearest:
        raise ValueError(
            f"--size={size[0]}x{size[1]}: both sides must be multiples of {SIDE_MULTIPLE} of at "
            f"most {MAX_SIDE}; give --size={nearest[0]}x{nearest[1]}."
        )


def deviation(
    program: Program, loaded: Callable[..., Mapping[str, Any]], block: int = 16
) -> dict[str, float]:
    """How far a loaded artefact is from its program on one image, at most, of each output.

    Of its largest absolute value, or of 1. The image has a random colour every `block` pixels, so
    that queries see regions in it.
    """
    rng = np.random.default_rng(0)
    _, height, width, _ = program.inputs["image"].shape
    coarse = rng.integers(0, 256, (1, height // block, width // block, 3), np.uint8)
    inputs = [coarse.repeat(block, axis=1).repeat(block, axis=2)]
    if "text" in program.inputs:
        inputs.append(np.asarray(program.params[1].text))
    wanted = jax.jit(program.call)(program.params, *inputs)
    found = loaded(*inputs)
    return {
        name: float(np.abs(value - found[name]).max() / max(1, np.abs(value).max()))
        for name, value in jax.device_get(wanted).items()
    }
