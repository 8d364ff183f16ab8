"""Text embeddings on disk, one file for each combination of what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from concat_jax.text.prompts import ClassPrompts, Names, embed_prompts, make_prompts
from concat_jax.text.tokenizer import Tokenizer

# Part of every key: raised when the same prompts and weights come to other embeddings.
_FORMAT = 1
# What reading a cut, overwritten or foreign file raises.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def embedding_key(fingerprint: str, names: Names, prompts: ClassPrompts, tokens: np.ndarray) -> str:
    """What an embedding depends on, as one hash.

    Args:
      fingerprint: of the text tower: its weights, and its config where weights do not show it.
      names: as given to `cached_embed_classes`.
      prompts: made of them.
      tokens: [M, L] int32, of the prompts. They say which tokenizer made them better than its name.

    Returns:
      sha256 in hexadecimal.
    """
    content = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "names": [name if isinstance(name, str) else list(name) for name in names],
        "texts": prompts.texts,
        "templates": prompts.templates,
        "synonyms": prompts.synonyms,
        "tokens_shape": tokens.shape,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8"))
    digest.update(np.ascontiguousarray(tokens, np.dtype("<i4")).tobytes())
    return digest.hexdigest()


def cached_embed_classes(
    folder: str | os.PathLike[str],
    fingerprint: str,
    encode_text_fn: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    names: Names,
    templates: Sequence[str],
    *,
    clean: bool = True,
    synonyms: str = "mean",
    batch_size: int = 256,
) -> np.ndarray:
    """`embed_classes`, whose answer is read from `folder` if it was asked before.

    A file that cannot be read or written costs a warning and the time to embed again, never the
    run.

    Args:
      folder: of the cache, made where it is missing; "" is no cache.
      fingerprint: of the text tower, as `embedding_key` takes it.
      encode_text_fn, tokenizer, names, templates, clean, synonyms, batch_size: as `embed_classes`.

    Returns:
      As `embed_classes`.

    Raises:
      ValueError: as `embed_classes`.
    """
    prompts = make_prompts(names, templates, clean=clean, synonyms=synonyms)
    tokens = tokenizer(prompts.prompts())
    if not os.fspath(folder):
        return embed_prompts(encode_text_fn, tokens, prompts, batch_size)
    key = embedding_key(fingerprint, names, prompts, tokens)
    path = Path(folder) / f"{key}.npz"
    cached = _read(path, key, len(prompts.texts))
    if cached is not None:
        return cached
    embeddings = embed_prompts(encode_text_fn, tokens, prompts, batch_size)
    _write(path, key, embeddings)
    return embeddings


def _read(path: Path, key: str, num_classes: int) -> np.ndarray | None:
    """The embeddings of a file; None where there is none, or with a warning none to be used."""
    if not path.exists():
        return None
    try:
        # Opened here, for numpy leaves a file open that it cannot make sense of.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            stored, embeddings = str(arrays["key"]), arrays["embeddings"]
        if stored != key:
            raise ValueError("it is another key's")
        if embeddings.dtype != np.float32 or embeddings.ndim not in (2, 3):
            raise ValueError(f"it holds {embeddings.dtype} of shape {embeddings.shape}")
        if len(embeddings) != num_classes or not np.isfinite(embeddings).all():
            raise ValueError("its embeddings are not finite or not of these classes")
    except _DAMAGE as error:
        warnings.warn(
            f"The cached text embeddings {path} cannot be used ({error}); they are made anew.",
            stacklevel=3,
        )
        return None
    return embeddings


def _write(path: Path, key: str, embeddings: np.ndarray) -> None:
    """The file appears under its name complete or not at all, whoever else writes it as well."""
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                np.savez(file, key=key, embeddings=embeddings)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"The text embeddings are not cached: {path} cannot be written ({error}).",
            stacklevel=3,
        )
