"""CLIP from wherever people have it: Hugging Face, OpenAI, open_clip, Scenic. No torch, numpy.

What a file is, is told by its content. The sizes come from the config beside it, or from the shapes
where there is none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from concat_jax.core.files import as_path
from concat_jax.models.clip import CLIP, CLIP_VARIANTS, make_clip
from concat_jax.models.clip_images import CLIP_MEAN, CLIP_STD
from concat_jax.text.tokenizer import has_clip_tokenizer
from concat_jax.weights.clip_sizes import (
    clip_config_from_hf,
    clip_config_from_open_clip,
    heads_as_openai,
    sizes_from_shapes,
    variant_of,
)
from concat_jax.weights.files.readers import WeightsFile, read_weights
from concat_jax.weights.hugging_face_folder import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    WEIGHTS_NAMES,
    read_json_object,
    weights_in,
)
from concat_jax.weights.model_folder import Params, abstract_params
from concat_jax.weights.names import clip as names
from concat_jax.weights.names import scenic_clip
from concat_jax.weights.names.table import Found, find, to_ours
from concat_jax.weights.report import LoadingReport, name_keys, shapes_of
from concat_jax.weights.sizes import check_statistics

OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
OPEN_CLIP_WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What CLIP's own patch embedding consists of.
PATCH_STEM = {f"{names.VISION}/patch_embedding/projection/kernel"}
PROJECTION = "visual_projection/kernel"
# Fields that the tokenizer decides, not config.model.clip.
_TOKENIZER_FIELDS = ("vocab_size", "context_length")
# What no shape shows, by the image tower.
_SHAPELESS = {
    "vit": ("image_heads", "text_heads", "activation"),
    "resnet": ("text_heads", "activation"),
    "convnext": ("text_heads", "activation", "image_size"),
}


@dataclasses.dataclass(frozen=True)
class ClipWeights:
    """A CLIP that was read. `print` shows its size and what became of the file's arrays.

    Attributes:
      config: fields for `make_clip`; image_size is the resolution that the file was trained at.
      kind: what the source is, for a person to read.
      assumed: fields of `config` that nothing in or beside the source tells.
    """

    config: Mapping[str, Any]
    params: Params
    source: str
    kind: str
    assumed: tuple[str, ...]
    report: LoadingReport
    notes: tuple[str, ...]

    @property
    def embeds_images(self) -> bool:
        """False of an OWL-ViT: it lacks the projection to the joint space, which is NaN here."""
        return not self.report.new

    def __str__(self) -> str:
        config, ignored = self.config, self.report.ignored
        tower = f"ViT of {config['image_width']} x {config.get('image_depth')} on patches of "
        tower += f"{config['patch_size']}"
        if "image_tower" in config:
            stages = " + ".join(map(str, config["image_stages"]))
            tower = f"{config['image_tower']} of {config['image_width']} x ({stages})"
        text = f"{config['text_width']} x {config['text_depth']}"
        name = variant_of(config) or f"{tower} with text of {text}"
        parts = [
            f"{name} at {config['image_size']} pixels from {self.source} ({self.kind}): "
            f"{self.report.num_parameters:,} numbers in {len(self.report.loaded)} arrays loaded, "
            f"{len(ignored)} entries ignored" + (f" ({name_keys(ignored)})" if ignored else "")
        ]
        if self.assumed:
            fields = ", ".join(f"{field} {config[field]!r}" for field in self.assumed)
            parts.append(f"assumed, since nothing beside the file tells: {fields}")
        return "; ".join((*parts, *(note.rstrip(".") for note in self.notes)))


def read_clip(path: str | os.PathLike[str]) -> ClipWeights:
    """Read a CLIP whose image tower is a ViT, OpenAI's ResNet or a ConvNeXt; no file is run.

    It is a Hugging Face folder or the file of weights in it; an OpenAI `.pt` (TorchScript archive
    or state_dict); a file of open_clip, or its folder; Scenic's `.npy` of OpenAI's arrays, or a
    flax checkpoint of its CLIP or OWL-ViT with a ViT. A file without a config beside it is taken
    for what OpenAI made: heads 64 wide, and quick GELU unless it looks like open_clip's (a
    ConvNeXt; with a ViT safetensors, or a training checkpoint), whose default is GELU. What was so
    decided is in `ClipWeights.assumed`. Raises ValueError if it is missing, broken, no such CLIP,
    of an architecture that `CLIP` does not have, of other sizes than its config says, or holds
    values that are not finite.
    """
    path = as_path(path)
    file = _weights_file(path) if path.is_dir() else path
    content = read_weights(file)
    try:
        if scenic_clip.is_scenic(content.arrays):
            return _of_scenic(path, content)
        is_hf = any(name.startswith(("vision_model.", "text_model.")) for name in content.arrays)
        tower = names.tower_of(content.arrays)
        if not is_hf and tower == "vit" and "visual.conv1.weight" not in content.arrays:
            raise ValueError(f"it holds weights of another model ({name_keys(content.arrays)})")
        openai = names.OPENAI if tower == "vit" else names.conv_clip(tower)
        found = find(content.arrays, names.HUGGING_FACE if is_hf else openai)
        config, kind, assumed = _describe(file, content, found, is_hf)
        params, report = _params(found, config)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} cannot be read as a CLIP: {reason}.") from error
    return ClipWeights(config, params, str(path), kind, assumed, report, content.notes)


def _params(
    found: Found, config: Mapping[str, Any], lacking: tuple[str, ...] = ()
) -> tuple[Params, LoadingReport]:
    clip = make_clip(config)
    images = jax.ShapeDtypeStruct((1, clip.image_size, clip.image_size, 3), jnp.float32)
    wanted = abstract_params(clip, images, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    shapes = shapes_of(wanted)
    params, report = to_ours(found, {k: v for k, v in shapes.items() if k not in lacking})
    new = {path: shapes[path] for path in lacking}
    for path, shape in new.items():
        module, leaf = path.split("/")
        params[module] = {leaf: np.full(shape, np.nan, np.float32)}
    return params, dataclasses.replace(report, new=new)


def _of_scenic(path: Path, content: WeightsFile) -> ClipWeights:
    arrays, heads = scenic_clip.merge_heads(content.arrays)
    found = find(arrays, scenic_clip.naming(arrays))
    config = {**sizes_from_shapes(found.shapes(), found.naming), **heads}
    config |= {"activation": "quick_gelu", "eot_id": None}
    is_owl_vit = any(name.startswith(scenic_clip.OWL_VIT) for name in arrays)
    params, report = _params(found, config, (PROJECTION,) * is_owl_vit)
    kind = "Scenic's OWL-ViT" if is_owl_vit else "Scenic's CLIP"
    return ClipWeights(config, params, str(path), kind, (), report, content.notes)


def clip_of_arrays(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], Params, LoadingReport]:
    """Config, parameters and report of a CLIP inside another file, with a convolutional tower.

    What no shape shows is as published: quick GELU with a ResNet, GELU with a ConvNeXt, and heads
    64 wide. Raises ValueError as `read_clip`.
    """
    tower = names.tower_of(arrays)
    if tower == "vit":
        raise ValueError("its CLIP has no convolutional image tower (a ResNet or a ConvNeXt)")
    found = find(arrays, names.conv_clip(tower))
    config = heads_as_openai(sizes_from_shapes(found.shapes(), found.naming))
    config["activation"] = "gelu" if tower == "convnext" else "quick_gelu"
    return config, *_params(found, config)


def _weights_file(folder: Path) -> Path:
    config = folder / CONFIG_NAME
    is_hf = config.is_file() and read_json_object(config).get("model_type") == "clip"
    # Folders of open_clip's weights may hold a config.json and a model of another library, too.
    both = (WEIGHTS_NAMES, OPEN_CLIP_WEIGHTS_NAMES)
    return weights_in(folder, sum(both if is_hf else both[::-1], ()), "weights of a CLIP")


def _describe(
    file: Path, content: WeightsFile, found: Found, is_hf: bool
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Config, kind, and the fields of it that nothing tells."""
    preprocessor = file.parent / PREPROCESSOR_NAME
    if is_hf and preprocessor.is_file():
        needed = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "rescale_factor": 1 / 255}
        check_statistics(read_json_object(preprocessor), f"its {PREPROCESSOR_NAME}", needed)
    beside = file.parent / (CONFIG_NAME if is_hf else OPEN_CLIP_CONFIG_NAME)
    sizes = {}
    if not is_hf or not beside.is_file():
        sizes = {**sizes_from_shapes(found.shapes(), found.naming), "eot_id": None}
    if beside.is_file():
        try:
            described = read_json_object(beside)
            if is_hf:
                return clip_config_from_hf(described), "Hugging Face", ()
            return clip_config_from_open_clip(described, sizes), "open_clip", ()
        except ValueError as error:
            raise ValueError(f"of its {beside.name}, {error}") from error
    # open_clip's are safetensors, and checkpoints of training on several devices.
    is_open_clips = file.suffix == ".safetensors" or file.name in OPEN_CLIP_WEIGHTS_NAMES
    is_open_clips |= bool(content.other) or "module." in content.prefixes
    has_sizes = any(name in content.arrays for name in names.OPENAI_SIZES)  # as OpenAI's own have
    is_open_clips &= not (is_hf or content.is_script or has_sizes)
    is_open_clips |= sizes.get("image_tower") == "convnext"
    kind = "Hugging Face" if is_hf else "open_clip" if is_open_clips else "OpenAI"
    tower = sizes.get("image_tower", "vit")
    # OpenAI made no ConvNeXt, and open_clip no ResNet that people have.
    is_gelu = is_open_clips and tower != "resnet" or tower == "convnext"
    config = {**heads_as_openai(sizes), "activation": "gelu" if is_gelu else "quick_gelu"}
    return config, kind, () if has_sizes else _SHAPELESS[tower]


def clip_tokenizer_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a CLIP's file or folder, if tokenizer.json, or its two tables, are there."""
    path = as_path(path)
    folder = path if path.is_dir() else path.parent
    return folder if has_clip_tokenizer(folder) else None


def clip_params_for(weights: ClipWeights, abstract: Params, clip: CLIP) -> Params:
    """The parameters of `weights`, if they are those of the CLIP that is configured.

    `abstract` is the tree of shapes that it has; heads and activation, which no shape shows, are
    compared with `clip`'s. Raises ValueError if the sizes differ; the sentence names the fields of
    config.model.clip.
    """
    wanted_shapes = shapes_of(abstract)
    tower = weights.config.get("image_tower", "vit")
    if clip.image_tower != tower:
        raise ValueError(_misfit(weights, {"image_tower": (tower, clip.image_tower)}))
    stem = {name for name in wanted_shapes if "/patch_embedding/" in name}
    if tower == "vit" and stem != PATCH_STEM:
        raise ValueError(
            f"{weights.source} does not fit config.model.clip, whose stem is not CLIP's own; set "
            "config.model.clip.stem to 'patch'."
        )
    wanted = sizes_from_shapes(wanted_shapes) | {f: getattr(clip, f) for f in _SHAPELESS[tower]}
    given = weights.config
    different = {f: (given[f], mine) for f, mine in wanted.items() if given[f] != mine}
    if different:
        raise ValueError(_misfit(weights, different))
    if shapes_of(weights.params) != wanted_shapes:
        raise ValueError(
            f"{weights.source} and config.model.clip describe different layers; make "
            "config.model.clip fit the file."
        )
    return weights.params


def _misfit(weights: ClipWeights, different: Mapping[str, tuple[Any, Any]]) -> str:
    fields = ", ".join(f"{f} is {theirs!r} not {mine!r}" for f, (theirs, mine) in different.items())
    settings = {f: theirs for f, (theirs, _) in different.items() if f not in _TOKENIZER_FIELDS}
    remedies = []
    if settings:
        if variant := variant_of(weights.config):
            own = {f: v for f, v in settings.items() if f not in CLIP_VARIANTS[variant]}
            settings = {"variant": variant, **own}
        values = ", ".join(f"{field}={value!r}" for field, value in settings.items())
        remedies.append(f"set config.model.clip to have {values}")
    if set(different) & set(_TOKENIZER_FIELDS):
        remedies.append("give config.text the vocabulary and context_length of this CLIP")
    advice = " and ".join(remedies)
    if set(different) & set(weights.assumed):
        advice += (
            f", or put its {CONFIG_NAME} or {OPEN_CLIP_CONFIG_NAME} beside it, since nothing there "
            "tells which it is"
        )
    return f"{weights.source} does not fit config.model.clip: {fields}; {advice}."
