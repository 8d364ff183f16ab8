"""Token ids beside transformers' CLIPTokenizer, and the word tokenizer of small worlds."""

import gzip
import json

import numpy as np
import pytest
import tokenizers

from concat_jax.text.tokenizer import WordTokenizer, make_clip_tokenizer
from tests.golden import cases, make


@pytest.fixture(scope="module")
def bpe_path(shared_data):
    return shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def clip_tokenizer(bpe_path):
    return make_clip_tokenizer(bpe_path)


@pytest.fixture(scope="module")
def tables(bpe_path, tmp_path_factory):
    """Folder with vocab.json and merges.txt, made of OpenAI's file as its own code does."""
    pytest.importorskip("transformers")
    return make.clip_tables(bpe_path, tmp_path_factory.mktemp("clip_tables"))


@pytest.fixture(scope="module")
def reference(tables):
    """transformers' tokenizer of that folder."""
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(tables, local_files_only=True)


@pytest.fixture(scope="module")
def whole(reference, tmp_path_factory):
    """Folder with the tokenizer.json that transformers saves, and neither table."""
    folder = tmp_path_factory.mktemp("clip_whole")
    reference.save_pretrained(folder)
    assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()
    return folder


@pytest.fixture(scope="module")
def texts(shared_data):
    """Over 15,000: hard ones, random ones of many scripts, and class names in a template."""
    out = cases.HARD_TEXTS + cases.random_texts(10_000)
    for path in sorted((shared_data / "vocabularies").glob("*_with_prompt_eng.txt")):
        for line in path.read_text().split("\n"):
            out.append(line)
            out += [f"a photo of a {name}." for name in line.partition(":")[2].split(",")]
    assert len(out) > 15_000
    return out


@pytest.fixture(scope="module")
def expected(reference, texts):
    return make.clip_ids(reference, texts)


def test_ids_are_what_transformers_said(clip_tokenizer):
    golden = cases.load("tokens")
    np.testing.assert_array_equal(clip_tokenizer(cases.unpack_text(golden["texts"])), golden["ids"])


@pytest.mark.parametrize("files", ["bpe_path", "tables", "whole"])
def test_ids_equal_transformers(files, texts, expected, request):
    ours = make_clip_tokenizer(request.getfixturevalue(files))(texts)
    assert ours.dtype == np.int32
    different = [text for text, a, b in zip(texts, ours, expected, strict=True) if (a != b).any()]
    assert not different
    print(f"{files}: {len(texts)} texts, ids identical")


def test_a_file_as_the_hub_has_it(whole, texts, expected, tmp_path):
    """Its split knows no special tokens, and it pads and cuts; transformers reads it alike."""
    transformers = pytest.importorskip("transformers")
    content = json.loads((whole / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
    content["truncation"] = {
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text((whole / "tokenizer_config.json").read_text())
    theirs = make.clip_ids(transformers.CLIPTokenizer.from_pretrained(tmp_path), texts[:2000])
    np.testing.assert_array_equal(theirs, expected[:2000])
    ours = make_clip_tokenizer(tmp_path / "tokenizer.json")(texts[:2000])
    np.testing.assert_array_equal(ours, theirs)


def test_known_ids(clip_tokenizer):
    # As openai/CLIP's own tokenizer gives them.
    row = clip_tokenizer(["a photo of a cat"])[0]
    assert row[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (row[7:] == 49407).all() and row.shape == (77,)
    assert (clip_tokenizer.vocab_size, clip_tokenizer.context_length) == (49408, 77)
    assert clip_tokenizer.eot_id == 49407


def test_long_and_empty_texts_end(clip_tokenizer, bpe_path):
    rows = clip_tokenizer(["", "word " * 200])
    assert rows[0, :2].tolist() == [49406, 49407]
    assert rows[1, -1] == 49407 and (rows[1, 1:-1] == rows[1, 1]).all()
    short = make_clip_tokenizer(bpe_path, context_length=5)(["a photo of a cat"])
    assert short.tolist() == [[49406, 320, 1125, 539, 49407]]
    assert clip_tokenizer([]).shape == (0, 77)


def test_lengths_are_those_before_a_text_is_cut(clip_tokenizer, bpe_path):
    texts = ["", "a photo of a cat", "word " * 200]
    assert clip_tokenizer.lengths(texts).tolist() == [2, 7, 202]
    assert make_clip_tokenizer(bpe_path, 4).lengths(texts).tolist() == [2, 7, 202]
    words = WordTokenizer(["red", "ball"], 3)
    assert words.lengths(["", "Red ball, red!", "other"]).tolist() == [2, 5, 3]


def test_missing_and_wrong_files_name_the_setting(tmp_path, bpe_path):
    with pytest.raises(ValueError, match=r"not at .*nowhere.* config\.text\.bpe_path"):
        make_clip_tokenizer(tmp_path / "nowhere.gz")
    (tmp_path / "plain.txt").write_text("no gzip")
    with pytest.raises(ValueError, match=r"config\.text\.bpe_path\) is unreadable"):
        make_clip_tokenizer(tmp_path / "plain.txt")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"#version\na b\n"))
    with pytest.raises(ValueError, match="does not hold 48894 merges"):
        make_clip_tokenizer(tmp_path / "short.gz")
    with pytest.raises(ValueError, match="context_length 1 has no room"):
        make_clip_tokenizer(bpe_path, context_length=1)


def test_a_folder_without_a_tokenizer_is_answered_in_a_sentence(tmp_path, tables):
    message = (
        r"^The folder '.*' holds no tokenizer, neither tokenizer\.json nor vocab\.json with "
        r"merges\.txt; .* set config\.text\.bpe_path to CLIP's bpe_simple_vocab_16e6\.txt\.gz\.$"
    )
    with pytest.raises(ValueError, match=message):
        make_clip_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_bytes((tables / "vocab.json").read_bytes())
    with pytest.raises(ValueError, match=message):  # half of one is none
        make_clip_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a readable tokenizer\.json"),
        ({"vocab.json": "{", "merges.txt": ""}, r"vocab\.json is not valid JSON"),
        ({"vocab.json": '["a"]', "merges.txt": ""}, r"vocab\.json is no vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c"}, "not a pair of tokens"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "do not belong together"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "no tokenizer of CLIP: it must be"),
        (
            {"vocab.json": '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}', "merges.txt": ""},
            r"has the id 1 and must have the largest, which is 2\.",
        ),
    ],
)
def test_broken_tokenizers_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        make_clip_tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_token(tmp_path, tables, clip_tokenizer):
    for name in ("vocab.json", "merges.txt"):
        text = (tables / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (tmp_path / "own.json").write_text(clip_tokenizer.to_json(), encoding="utf-8-sig")
    for path in (tmp_path, tmp_path / "own.json"):
        found = make_clip_tokenizer(path)(["a photo of a cat"])
        assert found.tolist() == clip_tokenizer(["a photo of a cat"]).tolist()


def test_another_models_tokenizer_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="must be a byte-pair encoding with the tokens"):
        make_clip_tokenizer(tmp_path)


def test_words_by_hand():
    tokenizer = WordTokenizer(["red", "striped", "Ball", "and"], context_length=6)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (7, 6)
    rows = tokenizer(["Red, striped ball!", "red-ball", ""])
    assert rows.dtype == np.int32
    assert rows.tolist() == [[5, 1, 2, 3, 6, 0], [5, 1, 3, 6, 0, 0], [5, 6, 0, 0, 0, 0]]


def test_both_poolings_find_the_end_of_words():
    tokenizer = WordTokenizer([f"w{i}" for i in range(30)], context_length=8)
    rows = tokenizer(["w3", "w29 w29 w29", " ".join(f"w{i}" for i in range(6))])
    np.testing.assert_array_equal(rows.argmax(axis=1), [2, 4, 7])
    np.testing.assert_array_equal((rows == tokenizer.eot_id).argmax(axis=1), [2, 4, 7])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red", "a mauve ball"], "does not know 'a' of 'a mauve ball'"),
        (["red mauve"], "does not know 'mauve' of 'red mauve'"),
        (["red red red red"], "has 4 words; WordTokenizer's context_length 5 holds 3"),
    ],
)
def test_texts_outside_the_world_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(["red", "ball"], context_length=5)(texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["red", "Red"], "'Red' more than once"),
        (["red ball"], "single words, not 'red ball'"),
        (["!"], "single words, not '!'"),
    ],
)
def test_bad_word_lists_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words, context_length=5)


@pytest.mark.parametrize(
    "name",
    ["person (standing)", "door/window", "children's toy", "car, cars", "Zoë's café", "t-shirt"]
    + ["AC/DC", "snake_case", "no. 7", "人 walking"],
)
def test_a_tokenizer_of_texts_reads_all_of_them(name):
    tokenizer = WordTokenizer.of_texts([name, "a an and"], 8)
    (row,) = tokenizer([f"A {name}"])
    assert (row[1:] > 0).sum() >= 3 and row.max() == tokenizer.eot_id
