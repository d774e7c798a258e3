"""The byte-pair codec: CLIP's known ids, round trips, determinism, files, the user's mistakes."""

import copy
import html
import json
import pickle
import subprocess
import sys

import ftfy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from reverie.codecs.bpe import Bpe, clean
from reverie.errors import InputError

CAPTIONS = [
    "a red rocket taking off",
    "红色的火箭起飞",
    "a small red ball moves left",
    "小红球向左移动",
    "two grinning cats; isn't it a party?",
    "café au lait, 3 croissants 🥐🥐",
] * 4


@pytest.fixture(scope="module")
def clip():
    return Bpe.clip()


@pytest.fixture(scope="module")
def own():
    return Bpe.train(CAPTIONS, vocab=640)


def test_clip_numbers_its_vocabulary_as_openai_does(clip):
    assert (clip.vocab, clip.start, clip.end, clip.pad) == (49_408, 49_406, 49_407, 0)
    assert clip.encode(["a photo of a cat"]).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert clip.encode(["Hello  World!"], length=6).tolist() == [[49406, 3306, 1002, 256, 49407, 0]]


def test_a_piece_of_one_byte_is_that_byte_marked_final(clip):
    marks = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    assert clip.encode(list(marks))[:, 1].tolist() == [256 + ord(mark) - ord("!") for mark in marks]


def test_without_a_length_the_longest_text_sets_it(clip):
    tokens = clip.encode(["cat", "a photo of a cat", ""])
    assert tokens.dtype == torch.long
    assert tokens.shape == (3, 7)
    assert tokens[0].tolist() == [49406, 2368, 49407, 0, 0, 0, 0]
    assert tokens[2].tolist() == [49406, 49407, 0, 0, 0, 0, 0]
    assert clip.encode([]).shape == (0, 2)
    assert clip.encode([], length=77).shape == (0, 77)


def test_a_text_too_long_keeps_its_first_tokens_and_the_end(clip):
    whole = clip.encode(["one two three four five"])
    cut = clip.encode(["one two three four five"], length=5)
    assert cut[0, :4].equal(whole[0, :4])
    assert cut[0, 4] == clip.end
    exact = clip.encode(["one two three four five"], length=7)
    assert exact.equal(whole)
    assert clip.encode(["one"], length=2).tolist() == [[clip.start, clip.end]]


@given(st.text(max_size=60))
@example("don’t stop — “now”")
@example("&amp;lt;b&amp;gt;")
@example("<|endoftext|> !<|endoftext|>")
def test_every_text_is_in_the_vocabulary_and_comes_back(own, text):
    tokens = own.encode([text])
    assert tokens.max() < own.vocab
    if "<|" not in text:
        assert own.decode(tokens)[0].replace(" ", "") == clean(text).replace(" ", "")


@given(st.text(st.characters(max_codepoint=127), max_size=40))
@example("a\tb\n\x1b[31mred\x7f")
@example("5 &gt; 3")
def test_the_short_cut_for_plain_text_changes_nothing(text):
    slow = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
    assert clean(text) == slow


def test_decode_stops_at_the_end_and_survives_broken_characters(clip):
    tokens = clip.encode(["a red rocket", "小红球"], length=20)
    assert clip.decode(tokens) == ["a red rocket", "小红球"]
    assert clip.decode(tokens.tolist()) == ["a red rocket", "小红球"]
    assert clip.decode([[clip.start, 320, clip.end, 2368]]) == ["a"]
    assert clip.decode([[256 + 0x80]])[0] == "�"  # a lone final byte that no character ends so


def test_special_tokens_in_a_text_are_read_as_clip_reads_them(clip):
    start, end = clip.start, clip.end
    assert clip.encode(["a<|endoftext|><|STARTOFTEXT|>b"]).tolist() == [[start, 320, end, start, 321, end]]
    swallowed = clip.encode(["!<|endoftext|>"]).tolist()[0]
    assert end not in swallowed[:-1]  # "!<|" is one piece


def test_a_trained_vocabulary_learns_words_and_han_characters(own):
    tokens = own.encode(["rocket", "火", "箭火"])
    assert tokens.ne(own.pad).sum(dim=1).tolist() == [3, 3, 4]
    assert own.encode(["火箭"])[0, 1] == own.encode(["红火"])[0, 2]  # a character is the same token anywhere
    assert own.vocab <= 640
    assert (own.start, own.end) == (own.vocab - 2, own.vocab - 1)
    assert own.decode(own.encode(["A Red ROCKET 起飞"])) == ["a red rocket 起 飞"]


def test_a_vocabulary_without_captions_is_the_bytes():
    bare = Bpe.train([], vocab=1000)
    assert bare.vocab == 514
    assert bare.encode(["ab"]).tolist() == [[512, 64, 256 + 65, 513]]


def test_training_stops_at_the_size_that_was_asked_for():
    assert Bpe.train(CAPTIONS, vocab=530).vocab == 530


def test_training_gives_the_same_vocabulary_in_every_process(own, tmp_path):
    own.write(tmp_path / "here.json")
    program = (
        "import sys, json; from reverie.codecs.bpe import Bpe;"
        "Bpe.train(json.loads(sys.argv[1]), vocab=640).write(sys.argv[2])"
    )
    there = tmp_path / "there.json"
    subprocess.run([sys.executable, "-c", program, json.dumps(CAPTIONS), str(there)], check=True)
    assert there.read_bytes() == (tmp_path / "here.json").read_bytes()


@pytest.mark.parametrize("name", ["clip", "own"])
def test_a_file_gives_back_the_same_codec(name, request, tmp_path):
    codec = request.getfixturevalue(name)
    codec.write(tmp_path / "tokenizer.json")
    again = Bpe.read(tmp_path / "tokenizer.json")
    texts = [*CAPTIONS[:6], "!<|endoftext|> a<|endoftext|>", "H̱ İ don’t", "x" * 300]
    assert (again.vocab, again.start, again.end) == (codec.vocab, codec.start, codec.end)
    assert again.encode(texts).equal(codec.encode(texts))
    again.write(tmp_path / "twice.json")
    assert (tmp_path / "twice.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_other_libraries_read_the_file(own, tmp_path):
    from tokenizers import Tokenizer

    own.write(tmp_path / "tokenizer.json")
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "A  red Rocket 起飞"
    assert other.encode(text).ids == own.encode([text]).tolist()[0]
    assert other.decode(other.encode(text).ids).strip() == "a red rocket 起 飞"


def test_copies_are_the_same_codec(own):
    texts = ["!<|endoftext|>", "a red rocket"]
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):  # noqa: S301 our own bytes
        assert again.encode(texts).equal(own.encode(texts))


def test_mistakes_get_one_sentence(clip, own, tmp_path):
    with pytest.raises(InputError, match="write \\[text\\]"):
        clip.encode("a cat")
    with pytest.raises(InputError, match="length 1 has no room"):
        clip.encode(["a cat"], length=1)
    with pytest.raises(InputError, match="train takes a list"):
        Bpe.train("a cat", vocab=600)
    with pytest.raises(InputError, match="at least 514"):
        Bpe.train(CAPTIONS, vocab=513)
    with pytest.raises(InputError, match="token 40000 is not among these"):
        own.decode([[own.start, 40_000]])
    with pytest.raises(InputError, match="no tokenizer at"):
        Bpe.read(tmp_path / "tokenizer.json")
    broken = tmp_path / "broken.json"
    for text in ("{", "[]", '{"model": {"type": "BPE"}}'):
        broken.write_text(text)
        with pytest.raises(InputError, match="not a byte-pair tokenizer"):
            Bpe.read(broken)
    own.write(broken)
    tree = json.loads(broken.read_text())
    tree["model"]["end_of_word_suffix"] = None
    broken.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="not byte pairs with the suffix"):
        Bpe.read(broken)


def test_importing_the_codec_does_not_import_the_tokenizer_library():
    program = "import sys, reverie.codecs.bpe; sys.exit('tokenizers' in sys.modules or 'ftfy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_merges_left_out_at_random_are_the_same_text():
    texts = ["a small red ball", "two blue cubes 红色的火箭"]
    bpe = Bpe.train(texts * 3, vocab=600)

    def encode(dropout, seed=0):
        seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        return bpe.encode(texts, dropout=dropout, generators=seeds)

    plain, none, some, all_ = bpe.encode(texts), encode(1e-12), encode(0.4), encode(1.0)
    assert torch.equal(none, plain)
    assert bpe.decode(some) == bpe.decode(plain) == bpe.decode(all_)
    lengths = [int((tokens[0] == bpe.end).int().argmax()) for tokens in (plain, some, all_)]
    assert lengths[0] < lengths[1] < lengths[2] == 1 + len("asmallredball")
    assert torch.equal(encode(0.4), some)
    assert not torch.equal(encode(0.4, seed=9)[:, : some.shape[1]], some)
