"""What is asked twice is encoded once; what differs in anything is encoded anew."""

import json
import os
import warnings

import numpy as np
import pytest

from concat_jax.text.embeddings import embed_classes

TWO = ("a {}", "the {}")
NAMES = [("cat", "kitty"), ("sky-other-merged",), "dog"]


class LetterTokenizer:
    """A letter an id, padded with `pad`."""

    vocab_size, context_length, eot_id = 128, 24, 127

    def __init__(self, pad=0):
        self.pad = pad

    def lengths(self, texts):
        return np.array([2 + len(text) for text in texts])

    def __call__(self, texts):
        return np.array([[ord(c) for c in text.ljust(24, chr(self.pad))] for text in texts])


class Encoder:
    """Counts its calls; embeds a text by its letters' counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens):
        self.calls += 1
        return np.stack([(tokens == ord(letter)).sum(axis=1) + 0.5 for letter in "acdkst"], axis=1)


def embed(folder, encoder, **changes):
    given = dict(
        fingerprint="weights",
        tokenizer=LetterTokenizer(),
        names=NAMES,
        templates=TWO,
        clean=True,
        synonyms="mean",
    )
    given |= changes
    return embed_classes(encoder, folder=folder, **given)


@pytest.mark.parametrize("synonyms", ["mean", "max", "none"])
def test_a_hit_does_not_call_the_text_tower(tmp_path, synonyms):
    encoder, folder = Encoder(), tmp_path / "not" / "there yet"
    first = embed(folder, encoder, synonyms=synonyms)
    assert encoder.calls == 1
    again = embed(str(folder), encoder, synonyms=synonyms)
    assert encoder.calls == 1
    np.testing.assert_array_equal(again, first)
    plain = embed_classes(encoder, LetterTokenizer(), NAMES, TWO, synonyms=synonyms)
    np.testing.assert_array_equal(first, plain)
    assert again.dtype == np.float32
    (entry,) = folder.iterdir()  # nothing half-written is left
    assert sorted(path.name for path in entry.iterdir()) == ["00000.safetensors", "manifest.json"]
    assert json.loads((entry / "manifest.json").read_text())["templates"] == list(TWO)


@pytest.mark.parametrize(
    "changes",
    [
        dict(fingerprint="other weights"),
        dict(names=[("cat", "kitty"), ("sky-other-merged",), "cow"]),
        dict(names=[("cat", "tomcat"), ("sky-other-merged",), "dog"]),
        dict(names=[("kitty", "cat"), ("sky-other-merged",), "dog"]),
        dict(names=[("sky-other-merged",), ("cat", "kitty"), "dog"]),
        dict(names=[("cat", "kitty"), ("sky",), "dog"]),  # the same text, but another name
        dict(names=[("cat",), ("kitty", "sky-other-merged"), "dog"]),  # the same prompts
        dict(templates=TWO[::-1]),
        dict(templates=("a {}",)),
        dict(clean=False),
        dict(synonyms="max"),
        dict(synonyms="none"),
        dict(tokenizer=LetterTokenizer(pad=1)),
    ],
)
def test_any_change_is_a_miss(tmp_path, changes):
    encoder = Encoder()
    embed(tmp_path, encoder)
    embed(tmp_path, encoder, **changes)
    assert encoder.calls == 2
    embed(tmp_path, encoder)
    embed(tmp_path, encoder, **changes)
    assert encoder.calls == 2  # both are kept
    assert len(list(tmp_path.iterdir())) == 2


def test_no_folder_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = Encoder()
    np.testing.assert_array_equal(embed("", encoder), embed("", encoder))
    assert encoder.calls == 2
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_made_anew_wherever_it_is_damaged(tmp_path):
    encoder = Encoder()
    expected = embed(tmp_path, encoder)
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for content in (whole[:place], whole[:place] + b"\xff\xff" + whole[place + 2 :]):
            path.write_bytes(content)
            calls = encoder.calls
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                np.testing.assert_array_equal(embed(tmp_path, encoder), expected)
            assert encoder.calls == calls + 1
            (warning,) = caught
            assert "made anew" in str(warning.message) and path.name in str(warning.message)
    path.write_bytes(whole)
    np.testing.assert_array_equal(embed(tmp_path, encoder), expected)
    assert encoder.calls == calls + 1


def test_a_damaged_manifest_spoils_no_embeddings(tmp_path):
    encoder = Encoder()
    expected = embed(tmp_path, encoder)
    (path,) = tmp_path.glob("*/manifest.json")
    path.write_text("{")
    np.testing.assert_array_equal(embed(tmp_path, encoder), expected)
    assert encoder.calls == 1


def test_a_folder_that_cannot_be_written_is_said_and_no_more(tmp_path):
    encoder = Encoder()
    file = tmp_path / "file"
    file.touch()
    with pytest.warns(
        UserWarning, match=r"are not cached\. .*cannot be written: its folder is a file"
    ):
        embed(file, encoder)
    assert encoder.calls == 1


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def killed(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, Encoder())
    assert not list(tmp_path.glob("*/*.safetensors"))
    monkeypatch.undo()
    encoder = Encoder()
    embed(tmp_path, encoder)
    assert encoder.calls == 1


def test_bad_names_are_refused_before_the_cache_is_looked_at(tmp_path):
    with pytest.raises(ValueError, match="same text"):
        embed(tmp_path, Encoder(), names=["cat", "Cat"])


def test_rows_are_cut_to_the_longest_prompt_and_nothing_changes():
    """Of a causal tower; the width is a multiple of eight, so that few programs are compiled."""
    widths = []

    class Ended(LetterTokenizer):
        def __call__(self, texts):
            return super().__call__([f"{text}{chr(self.eot_id)}" for text in texts])

    def encode(tokens):  # what stands before the end alone counts, as in a causal tower
        widths.append(tokens.shape[1])
        before = np.cumsum(tokens == Ended.eot_id, axis=1) == 0
        letters = [((tokens == ord(x)) & before).sum(axis=1) + 0.5 for x in "acdkst"]
        return np.stack(letters, axis=1)

    cut = embed("", encode, tokenizer=Ended(), names=["cat", "dog"])
    also_long = embed("", encode, tokenizer=Ended(), names=["cat", "dog", "a d k s t cats"])
    assert widths == [8, 24]
    np.testing.assert_array_equal(cut, also_long[:2])
