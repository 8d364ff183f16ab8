"""Prompts to text embeddings, kept on disk for whoever asks for the same ones again."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from concat_jax.core.arrays import unit
from concat_jax.core.files import as_path
from concat_jax.core.shard_store import ShardStore, StoreError, StoreKind
from concat_jax.text.prompts import ClassPrompts, Names, make_prompts, tokenize
from concat_jax.text.tokenizer import Tokenizer

# Part of every manifest: raised when the same prompts and weights come to other embeddings.
_FORMAT = 2
# Rows of tokens are cut to a multiple of it: few widths, so that few programs are compiled.
_WIDTH = 8
_KIND = StoreKind("cached text embeddings", ("embeddings",), "start again: they are made anew")

EncodeText = Callable[[np.ndarray], np.ndarray]


def embed_classes(
    encode_text_fn: EncodeText,
    tokenizer: Tokenizer,
    names: Names,
    templates: Sequence[str],
    *,
    clean: bool = True,
    synonyms: str = "mean",
    batch_size: int = 256,
    folder: str | os.PathLike[str] = "",
    fingerprint: str = "",
) -> np.ndarray:
    """Prompt ensemble of each class (Radford et al. 2021, section 3.1.4), as PADing averages it.

    A prompt's embedding is L2-normalised, the mean over the templates normalised again: that is a
    text's embedding. A class has one text or several, which `synonyms` joins. With a folder, what
    was asked before is read from it; a file that cannot be read or written costs a warning and the
    time to embed again, never the run.

    Args:
      encode_text_fn: tokens [batch_size, L] int32 -> [batch_size, C] float, always of one shape, so
        that a jitted function compiles once; the last call is filled up.
      names, templates, clean, synonyms: as `make_prompts`.
      fingerprint: of the text tower: its weights, and its config where weights do not show it.

    Returns:
      [K, C] float32, L2-normalised; with "max" [K, S, C] with S the most texts of a class, where a
      class of fewer repeats its first text, which changes no maximum.

    Raises ValueError as `make_prompts` and `tokenize`, or for an embedding that is not finite.
    """
    prompts = make_prompts(names, templates, clean=clean, synonyms=synonyms)
    tokens = tokenize(tokenizer, prompts)
    # A causal tower's end token does not see what comes after it.
    needed = _WIDTH * -(-int((tokens == tokenizer.eot_id).argmax(axis=1).max() + 1) // _WIDTH)
    tokens = tokens[:, : max(needed, 1)]
    if not os.fspath(folder):
        return _embed(encode_text_fn, tokens, prompts, batch_size)
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "names": names,
        "texts": prompts.texts,
        "templates": prompts.templates,
        "synonyms": synonyms,
        # They say which tokenizer made them better than its name.
        "tokens": hashlib.sha256(np.ascontiguousarray(tokens, "<i4")).hexdigest(),
        "shape": tokens.shape,
    }
    key = ShardStore(Path(), _KIND, manifest).stamp
    store = ShardStore(as_path(folder) / key, _KIND, manifest)
    if not store.missing([0]):
        try:
            return np.array(store.open(0)["embeddings"])
        except StoreError as error:
            warnings.warn(f"Text embeddings are made anew. {error}", stacklevel=2)
    embeddings = _embed(encode_text_fn, tokens, prompts, batch_size)
    try:
        store.claim()
        store.write(0, {"embeddings": embeddings})
    except (OSError, ValueError) as error:
        warnings.warn(f"Text embeddings are not cached. {error}", stacklevel=2)
    return embeddings


def _embed(
    encode_text_fn: EncodeText, tokens: np.ndarray, prompts: ClassPrompts, batch_size: int
) -> np.ndarray:
    # Sums of a text's prompts, and no prompt's own embedding, stay: there may be 100,000.
    sums = None
    for start in range(0, len(tokens), batch_size):
        chunk = np.arange(start, min(start + batch_size, len(tokens)))
        rows = tokens[np.pad(chunk, (0, batch_size - len(chunk)), mode="edge")]
        by_prompt = unit(np.asarray(encode_text_fn(rows), np.float64))[: len(chunk)]
        if sums is None:
            sums = np.zeros((len(tokens) // len(prompts.templates), by_prompt.shape[-1]))
        np.add.at(sums, chunk // len(prompts.templates), by_prompt)
    by_text = unit(sums)
    ends = np.cumsum([len(texts) for texts in prompts.texts])
    rows = np.split(by_text, ends[:-1])
    if prompts.synonyms == "max":
        most = max(len(row) for row in rows)
        classes = np.stack([row[[*range(len(row)), *[0] * (most - len(row))]] for row in rows])
    else:
        classes = unit(np.stack([row.mean(axis=0) for row in rows]))
    if not np.isfinite(classes).all():
        raise ValueError("The text encoder gave embeddings that are not finite; check its weights.")
    return classes.astype(np.float32)
