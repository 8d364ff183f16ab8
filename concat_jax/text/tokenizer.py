"""Text to token ids: CLIP's byte-pair encoding, and one id a word for closed small worlds."""

from __future__ import annotations

import abc
import gzip
import os
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers

from concat_jax.core.files import as_path, read_json, read_text

_START = "<|startoftext|>"
_END = "<|endoftext|>"

# What Hugging Face calls the files of a tokenizer: one with everything, or two with its tables.
TOKENIZER_NAME = "tokenizer.json"
VOCABULARY_NAMES = ("vocab.json", "merges.txt")

# openai/CLIP clip/simple_tokenizer.py: 49152 = 256 bytes, 256 bytes that end a word, and one token
# a merge, less the two special tokens, which come last.
_NUM_MERGES = 49152 - 256 - 2

# The split of transformers' CLIPTokenizer: contractions, runs of letters, single digits, runs of
# the rest.
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer(abc.ABC):
    """Texts to rows of ids: start, the text, end, padding.

    `eot_id`, the end, is the largest id a row can hold and its first occurrence ends the text, so
    both poolings of `CLIP.eot_id` (largest id, first occurrence) find it.
    """

    def __init__(self, context_length: int, *, start: int, end: int, padding: int):
        if context_length < 2:
            raise ValueError(
                f"{type(self).__name__}'s context_length {context_length} has no room for start "
                "and end."
            )
        self.context_length, self.eot_id, self.vocab_size = context_length, end, end + 1
        self._start, self._padding = start, padding

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """`texts` -> [M, context_length] int32."""
        rows = np.full((len(texts), self.context_length), self._padding, np.int32)
        for row, text, parts in zip(rows, texts, self._parts(texts), strict=True):
            ids = [self._start, *self._fit(parts, text), self.eot_id]
            row[: len(ids)] = ids
        return rows

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """[M] tokens of each text with its start and end, however many a row can hold."""
        return np.array([2 + len(parts) for parts in self._parts(texts)])

    @abc.abstractmethod
    def _parts(self, texts: Sequence[str]) -> list[list]:
        """Of each text what becomes a token each."""

    @abc.abstractmethod
    def _fit(self, parts: list, text: str) -> list[int]:
        """The ids of a text's parts, at most context_length - 2."""


def _byte_symbols() -> list[str]:
    """One printable character a byte, in the order of CLIP's ids (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def _read_merges(path: epath.Path) -> list[tuple[str, str]]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"CLIP's vocabulary is not at {str(path)!r}: set config.text.bpe_path to a copy of "
            "bpe_simple_vocab_16e6.txt.gz from github.com/openai/CLIP, or to the folder of a "
            "Hugging Face CLIP."
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(
            f"CLIP's vocabulary at {str(path)!r} (config.text.bpe_path) is unreadable: {error}."
        ) from error
    # The first line is a version; the file goes on beyond the merges that CLIP uses.
    merges = [tuple(line.split()) for line in text.split("\n")[1 : _NUM_MERGES + 1]]
    if len(merges) != _NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise ValueError(
            f"CLIP's vocabulary at {str(path)!r} (config.text.bpe_path) does not hold "
            f"{_NUM_MERGES} merges; take the original bpe_simple_vocab_16e6.txt.gz."
        )
    return merges


def has_clip_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether `make_clip_tokenizer` finds the files that it needs in a folder."""
    folder = as_path(folder)
    return (folder / TOKENIZER_NAME).is_file() or all(
        (folder / name).is_file() for name in VOCABULARY_NAMES
    )


def make_clip_tokenizer(path: str | os.PathLike[str], context_length: int = 77) -> ClipTokenizer:
    """CLIP's tokenizer from whichever files of it there are; ValueError if there is none.

    `path` is `bpe_simple_vocab_16e6.txt.gz` of github.com/openai/CLIP, Hugging Face's
    `tokenizer.json`, or a folder with it or, if not, with `vocab.json` and `merges.txt`.
    """
    path = as_path(path)
    if path.is_dir():
        if not has_clip_tokenizer(path):
            raise ValueError(
                f"The folder {str(path)!r} holds no tokenizer, neither {TOKENIZER_NAME} nor "
                f"{' with '.join(VOCABULARY_NAMES)}; copy one there, or set config.text.bpe_path "
                "to CLIP's bpe_simple_vocab_16e6.txt.gz."
            )
        if (path / TOKENIZER_NAME).is_file():
            path = path / TOKENIZER_NAME
    if path.is_dir():
        bpe = _from_vocabulary(path)
    elif path.suffix == ".json":
        try:
            bpe = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable {TOKENIZER_NAME}: {error}.") from error
    else:
        merges, symbols = _read_merges(path), _byte_symbols()
        tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges)]
        bpe = _bpe({token: i for i, token in enumerate([*tokens, _START, _END])}, merges)
    return ClipTokenizer(bpe, context_length, str(path))


def _from_vocabulary(folder: epath.Path) -> tokenizers.Tokenizer:
    vocabulary_path, merges_path = (folder / name for name in VOCABULARY_NAMES)
    vocabulary, lines = read_json(vocabulary_path), read_text(merges_path).split("\n")
    if not isinstance(vocabulary, dict) or not all(type(v) is int for v in vocabulary.values()):
        raise ValueError(f"{vocabulary_path} is no vocabulary: it must give an id for each token.")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{merges_path} holds a line that is not a pair of tokens.")
    try:
        return _bpe(vocabulary, merges)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"{vocabulary_path.name} and {merges_path.name} in {folder} do not belong together: "
            f"{error}."
        ) from error


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=_END,
        )
    )
    one_blank = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    # Written out in a text they are themselves, as in both originals. One that the vocabulary
    # lacks would be given a new id here; `ClipTokenizer` is to miss it.
    bpe.add_special_tokens([token for token in (_START, _END) if token in vocabulary])
    return bpe


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, Any]:
    """Writes what is long; returns the rest that `load_tokenizer` needs, for JSON."""
    about = {"kind": "words", "context_length": tokenizer.context_length}
    if isinstance(tokenizer, WordTokenizer):
        return {**about, "words": tokenizer.words}
    folder.mkdir()
    (folder / TOKENIZER_NAME).write_text(tokenizer.to_json(), encoding="utf-8")
    return {**about, "kind": "clip"}


def load_tokenizer(folder: epath.Path, about: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote; ValueError if a file or `about` is not usable."""
    try:
        kind, context_length = about["kind"], about["context_length"]
        if kind == "words":
            return WordTokenizer(about["words"], context_length)
    except (KeyError, TypeError) as error:
        raise ValueError(f"The tokenizer of {folder.parent} lacks {error}.") from error
    return make_clip_tokenizer(folder, context_length)


class ClipTokenizer(Tokenizer):
    """CLIP's lower-cased byte-level BPE; ids equal to those of transformers' `CLIPTokenizer`.

    Text is put into Unicode form C, white space runs become one blank, letters lower case. OpenAI's
    original also runs `ftfy` and resolves HTML entities first: "&amp;" is three tokens here, one
    there. A text too long loses its last words and keeps the end token. Rows are padded with the
    end token, as transformers does; OpenAI pads with 0, which the causal text tower cannot tell
    apart at the end token.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, context_length: int, source: str):
        start, end = bpe.token_to_id(_START), bpe.token_to_id(_END)
        if not isinstance(bpe.model, models.BPE) or start is None or end is None:
            raise ValueError(
                f"{source} is no tokenizer of CLIP: it must be a byte-pair encoding with the "
                f"tokens {_START} and {_END}."
            )
        if end != (largest := max(bpe.get_vocab().values())):
            raise ValueError(
                f"{source} is no tokenizer of CLIP: {_END} has the id {end} and must have the "
                f"largest, which is {largest}."
            )
        super().__init__(context_length, start=start, end=end, padding=end)
        bpe.no_truncation()
        bpe.no_padding()
        self._bpe = bpe

    def to_json(self) -> str:
        return self._bpe.to_str()

    def _parts(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._bpe.encode_batch(texts, add_special_tokens=False)]

    def _fit(self, parts: list[int], text: str) -> list[int]:
        return parts[: self.context_length - 2]


# Of the words that a message lists.
_SHOWN_WORDS = 30


class WordTokenizer(Tokenizer):
    """One id a word, for captions over a closed set of words.

    0 pads, 1 .. n are `words` in their order, n + 1 starts and n + 2 ends a text. Case and
    punctuation do not matter; the hyphen separates words. ValueError for a word that is none or
    occurs twice, and of a text for one that is not in the set, or more than fit.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self._ids: dict[str, int] = {}
        for word in words:
            if _words_of(word) != [word.lower()]:
                raise ValueError(f"WordTokenizer's words must be single words, not {word!r}.")
            if word.lower() in self._ids:
                raise ValueError(f"WordTokenizer's words hold {word!r} more than once.")
            self._ids[word.lower()] = 1 + len(self._ids)
        start = 1 + len(self._ids)
        super().__init__(context_length, start=start, end=start + 1, padding=0)

    @classmethod
    def of_texts(cls, texts: Sequence[str], context_length: int) -> Self:
        """The tokenizer of all words in some texts, sorted, whatever stands between them."""
        words = {word for text in texts for word in _words_of(text)}
        return cls(sorted(words), context_length)

    @property
    def words(self) -> list[str]:
        return list(self._ids)

    def _parts(self, texts: Sequence[str]) -> list[list[str]]:
        return [_words_of(text) for text in texts]

    def _fit(self, parts: list[str], text: str) -> list[int]:
        unknown = [word for word in parts if word not in self._ids]
        if unknown:
            known = ", ".join(self.words[:_SHOWN_WORDS])
            more = ", …" if len(self.words) > _SHOWN_WORDS else ""
            raise ValueError(
                f"The text tower was trained on {len(self.words)} words and does not know "
                f"{unknown[0]!r} of {text!r}; it knows {known}{more}."
            )
        if len(parts) > self.context_length - 2:
            raise ValueError(
                f"{text!r} has {len(parts)} words; WordTokenizer's context_length "
                f"{self.context_length} holds {self.context_length - 2}."
            )
        return [self._ids[word] for word in parts]


def _words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
