"""Pieces: layout, round trips, files, the clean rules, strangers' files, the user's mistakes."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.codecs import bpe
from reverie.codecs.bpe import Bpe
from reverie.codecs.pieces import CLEANS, Pieces, clean, read_tokenizer
from reverie.errors import InputError

CAPTIONS = [
    "a red rocket taking off",
    "红色的火箭起飞",
    "a small red ball moves left",
    "小红球向左移动",
    "two grinning cats; isn't it a party?",
    "café au lait, 3 croissants",
] * 8


@pytest.fixture(scope="module")
def own():
    return Pieces.train(CAPTIONS, vocab=90)


@pytest.fixture
def folder(own, tmp_path):
    own.write(tmp_path)
    return tmp_path


def change(path, **changes):
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | changes), encoding="utf-8")


def test_it_is_laid_out_as_siglips(own):
    assert (own.start, own.end, own.pad, own.side, own.clean) == (None, 1, 1, "right", "none")
    tokens = own.encode(["a red rocket", "", "☃"], length=16)
    assert tokens.dtype == torch.long
    assert tokens.shape == (3, 16)
    assert tokens[1].eq(1).all()
    assert 2 in tokens[2]  # unknown
    assert own.encode([], length=7).shape == (0, 7)
    assert own.encode([]).shape == (0, 1)
    assert own.vocab <= 90


def test_a_text_too_long_loses_its_last_tokens_but_not_the_end(own):
    whole = own.encode(["a red rocket taking off"])
    assert whole[0, -1] == own.end
    assert own.encode(["a red rocket taking off"], length=whole.shape[1]).equal(whole)
    cut = own.encode(["a red rocket taking off"], length=4)
    assert cut[0, :3].equal(whole[0, :3])
    assert cut[0, 3] == own.end
    assert own.encode(["a red rocket"], length=1).tolist() == [[own.end]]


def test_round_trip(own):
    assert own.decode(own.encode(["A Red   ROCKET!!", "红色 cat"], length=32)) == ["a red rocket", "红色 cat"]
    assert own.decode(own.encode(["a red rocket"]).tolist()) == ["a red rocket"]


@given(st.text(max_size=60))
def test_every_text_has_tokens_in_the_vocabulary(own, text):
    tokens = own.encode([text], length=24)
    assert tokens.shape == (1, 24)
    assert tokens.min() >= 0
    assert tokens.max() < own.vocab
    assert own.end in tokens


def test_case_marks_and_spaces_do_not_count(own):
    plain = own.encode(["a red rocket taking off"])
    for text in (
        "A RED ROCKET taking off",
        " a red\n rocket, taking\toff. ",
        "a (red) 'rocket' taking off!?",
    ):
        assert own.encode([text]).equal(plain)


def test_the_clean_rules():
    text = "  A_Red &amp;amp; “Cat”\n!! "
    assert clean(text, "none") == text
    assert clean(text, "siglip") == "ared ampamp “cat”"
    assert clean(text, "whitespace") == 'A_Red & "Cat" !!'
    assert clean(text, "lower") == 'a_red & "cat" !!'
    assert clean(text, "canonicalize") == "a red cat"


@pytest.mark.parametrize("rule", CLEANS)
def test_a_file_gives_back_the_same_codec(own, folder, tmp_path, rule):
    codec = Pieces.read(folder, clean=rule)
    codec.write(tmp_path / "again", length=64)
    again = read_tokenizer(tmp_path / "again")
    texts = ["A_Red &amp; cat!", "红色 “x”", "", "ΣΊΣΥΦΟΣ", "</s> a <unk>"]
    assert (again.vocab, again.start, again.end, again.pad, again.clean) == (codec.vocab, None, 1, 1, rule)
    assert again.encode(texts, length=20).equal(codec.encode(texts, length=20))


def test_training_gives_the_same_vocabulary_in_every_process(own, tmp_path):
    own.write(tmp_path / "here")
    program = (
        "import sys, json; from reverie.codecs.pieces import Pieces;"
        "Pieces.train(json.loads(sys.argv[1]), vocab=90).write(sys.argv[2])"
    )
    there = tmp_path / "there"
    subprocess.run([sys.executable, "-c", program, json.dumps(CAPTIONS), str(there)], check=True)
    assert (there / "tokenizer.json").read_bytes() == (tmp_path / "here/tokenizer.json").read_bytes()


def test_copies_are_the_same_codec(own):
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):  # noqa: S301 our own bytes
        assert again.encode(CAPTIONS[:6]).equal(own.encode(CAPTIONS[:6]))


def test_tokens_around_a_text_come_from_the_files(own, folder):
    change(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=False, bos_token="<pad>")
    plain = own.encode(["a red"])[0, :-1].tolist()
    begun = Pieces.read(folder)
    assert (begun.start, begun.end) == (0, None)
    assert begun.encode(["a red"]).tolist() == [[0, *plain]]
    change(folder / "tokenizer_config.json", padding_side="left")
    assert Pieces.read(folder).encode(["a red"], length=len(plain) + 3).tolist() == [[1, 1, 0, *plain]]


def test_what_a_siglip_tokenizer_is_without_being_said(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    (folder / "special_tokens_map.json").unlink()
    change(folder / "tokenizer.json", post_processor=None)
    codec = Pieces.read(folder)
    assert (codec.start, codec.end, codec.pad, codec.clean) == (None, 1, 1, "siglip")


def test_a_folder_is_read_by_what_lies_in_it(own, folder, tmp_path):
    assert isinstance(read_tokenizer(folder), Pieces)
    clip = Bpe.clip()
    (tmp_path / "clip").mkdir()
    clip.write(tmp_path / "clip/tokenizer.json")
    assert isinstance(read_tokenizer(tmp_path / "clip"), Bpe)
    model = json.loads((tmp_path / "clip/tokenizer.json").read_text(encoding="utf-8"))["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (old / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    again = read_tokenizer(old)
    texts = [*CAPTIONS[:6], "don’t <|endoftext|> &amp; 👩‍🚀 #version: 3"]
    assert (again.vocab, again.start, again.end) == (clip.vocab, clip.start, clip.end)
    assert again.encode(texts).equal(clip.encode(texts))


def test_mistakes_get_one_sentence(own, folder, tmp_path):
    for call, match in (
        (lambda: own.encode("a cat"), "write \\[text\\]"),
        (lambda: own.encode(["a cat"], length=0), "no room"),
        (lambda: own.decode([[40_000]]), "token 40000 is not among"),
        (lambda: Pieces.train("a cat", vocab=90), "takes a list"),
        (lambda: Pieces.train(CAPTIONS, vocab=3), "at least 16"),
        (lambda: Pieces.train([], vocab=90), "give others"),
        (lambda: Pieces.read(tmp_path / "nowhere.json"), "no tokenizer at"),
        (lambda: Pieces.read(folder, clean="soap"), "unknown clean rule"),
        (lambda: read_tokenizer(tmp_path / "nowhere"), "holds no tokenizer"),
        (lambda: own.fits(vocab=10), "take the tokenizer that it was trained with"),
        (lambda: own.fits(vocab=90, end=5), "take the tokenizer that it was trained with"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    own.fits(vocab=own.vocab)
    own.fits(vocab=32_000, end=1)


HOSTILE = {
    "not a table": "[]",
    "not JSON": "{",
    "deep": "[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "no model": "{}",
    "a model of another kind": '{"model": {"type": "WordLevel", "vocab": {}}}',
    "an empty unigram": '{"model": {"type": "Unigram", "vocab": []}}',
    "an unknown out of range": '{"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0]]}}',
    "scores that are no numbers": '{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}}',
    "merges of nothing": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}',
}


@pytest.mark.hostile
@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_files(tmp_path, name):
    content = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (Pieces.read, read_tokenizer):
        with pytest.raises(InputError) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 40}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 10_000}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 100}),
        ("normalizer", "Lowercase"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a" * 5000}, "behavior": "Removed", "invert": False}),
        ("pre_tokenizer", {"type": "Shell", "command": "true"}),
        ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": 3}),
    ],
)  # fmt: skip
def test_strangers_components(folder, place, part):
    change(folder / "tokenizer.json", **{place: part})
    with pytest.raises(InputError) as caught:
        Pieces.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "says",
    [
        {"pad_token": "no such piece"},
        {"pad_token": 3},
        {"pad_token": {"content": ["a"]}},
        {"clean": "rm -rf"},
        {"clean": ["none"]},
        {"add_eos_token": True, "eos_token": "no such piece"},
    ],
)
def test_strangers_neighbours(folder, says):
    change(folder / "tokenizer_config.json", **says)
    with pytest.raises(InputError):
        Pieces.read(folder)


@pytest.mark.hostile
def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(bpe, "MOST", 1000)
    for read in (Pieces.read, Bpe.read, read_tokenizer):
        with pytest.raises(InputError, match="more than the 1,000"):
            read(folder / "tokenizer.json")


@pytest.mark.hostile
@pytest.mark.parametrize("vocab", ["[]", "{", '{"a": "b"}', '{"a": 0}'])
def test_strangers_merges(tmp_path, vocab):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nc\n")
    with pytest.raises(InputError):
        read_tokenizer(tmp_path)


def test_importing_the_codec_does_not_import_the_tokenizer_library():
    program = (
        "import sys, reverie.codecs.pieces; sys.exit('tokenizers' in sys.modules or 'ftfy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_words_are_laid_out_as_berts(tmp_path):
    words = Pieces.train_words(CAPTIONS, vocab=90)
    assert (words.start, words.end, words.pad, words.vocab) == (2, 3, 0, 90)
    assert words.special == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[DEC]": 4, "[ENC]": 5}
    tokens = words.encode(["A red Ball moves left", "红色的小球", "cafe croissants"])
    assert tokens[:, 0].eq(2).all()
    assert (tokens == 3).sum(1).eq(1).all()
    assert words.decode(tokens) == ["a red ball moves left", "红 色 的 小 球", "cafe croissants"]
    assert words.encode(["☃"]).tolist() == [[2, 1, 3]]
    words.write(tmp_path)
    again = Pieces.read(tmp_path)
    assert torch.equal(again.encode(CAPTIONS), words.encode(CAPTIONS))
    assert again.special == words.special
    # Also what is written in the middle of a word, which a network may begin a text with.
    assert again.decode(torch.arange(6, 90)[:, None]) == words.decode(torch.arange(6, 90)[:, None])
    with pytest.raises(InputError, match="at least 16"):
        Pieces.train_words(CAPTIONS, vocab=9)


def test_a_vocabulary_of_words_is_the_same_in_every_process():
    """The library alone breaks ties in the order of a hash map, which a resumed run would not survive."""
    code = f"""from reverie.codecs.pieces import Pieces
print(Pieces.train_words({CAPTIONS[:6]}, vocab=90)._backend.to_str())"""
    found = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(4)}
    assert len(found) == 1
