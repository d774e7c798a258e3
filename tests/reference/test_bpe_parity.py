"""CLIP's ids against three others: the rules in plain Python (below), open_clip and transformers.

open_clip's tokenizer module is loaded by itself, so `pip install --no-deps open_clip_torch` is enough.
"""

import gzip
import html
import importlib.util
import json
import random
import unicodedata
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest

from reverie.codecs.bpe import Bpe, clean
from reverie.codecs.pieces import read_tokenizer

pytestmark = pytest.mark.reference
regex = pytest.importorskip("regex")


# --- CLIP's byte-pair encoding in plain Python, after openai/CLIP clip/simple_tokenizer.py ---


def byte_table():
    """Byte -> letter: printable Latin-1 bytes are themselves, the others U+0100 and up, in order."""
    own = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte) if byte in own else chr(next(others)) for byte in range(256)}


class PlainBpe:
    pieces = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self):
        packed = resources.files("reverie.codecs").joinpath("data/clip_merges.txt.gz").read_bytes()
        merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n") if line]
        self.letters = byte_table()
        # the order of the vocabulary: printable bytes first
        letters = sorted(self.letters.values())
        names = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
        names += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {name: i for i, name in enumerate(names)}
        self.rank = {merge: i for i, merge in enumerate(merges)}

    def clean(self, text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return regex.sub(r"\s+", " ", text).strip().lower()

    @cache  # noqa: B019 the oracle lives as long as the tests
    def merge(self, piece):
        """Join the pair of the lowest rank, everywhere from the left, until no pair has a rank."""
        if piece in ("<|startoftext|>", "<|endoftext|>"):
            return [piece]
        word = [self.letters[byte] for byte in piece.encode()]
        word[-1] += "</w>"
        while True:
            ranked = [(self.rank[pair], pair) for pair in pairwise(word) if pair in self.rank]
            if not ranked:
                return word
            _, (left, right) = min(ranked)
            joined, i = [], 0
            while i < len(word):
                if word[i : i + 2] == [left, right]:
                    joined.append(left + right)
                    i += 2
                else:
                    joined.append(word[i])
                    i += 1
            word = joined

    def encode(self, text):
        return [
            self.ids[name] for piece in self.pieces.findall(self.clean(text)) for name in self.merge(piece)
        ]


# --- strings ---

WORDS = (
    "a photo of the red rocket taking off grinning face isn't it's we'll they've I'd you're I'm don’t “quoted” café "
    "naïve Ångström ÉCOLE straße STRASSE İstanbul ΣΊΣΥΦΟΣ Москва Україна tiếng Việt 日本語 ひらがな カタカナ "
    "红色火箭起飞 小猫，在跑。 繁體中文 한국어 العربية עברית हिन्दी ไทย 😀 😀😃 👩‍🚀 👍🏽 🇩🇪 ❤️ 1️⃣ ☃ "
    "½ ² Ⅷ ⅷ １２３ ＡＢＣ 12345 3.14 1,000 &amp; &lt;b&gt; &amp;lt;i&amp;gt; &nbsp; &eacute; &#39;s &#x1F600; "
    "&bogus; schÃ¶n â€œmojibakeâ€\x9d __init__ a_b C++ #tag @name http://example.org/?q=1&r=2 --- ... !!! ?! '' ``` "
    "{} [] <> </w> \\ / | ~ ^ % $ € £ ¥ © ™ ﬁ ﬂ Ǆ ǅ ŉ ſ 'ſ K Å Ω H̱ ẖ é e\u0301 \u200b \u200d \ufeff \u00ad \u3000 "
    "\t \n \r\n \x85 \u2028 \x1b[31m \x00 \x07 supercalifragilisticexpialidocious " + "x" * 90
).split(" ")
SPANS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xE80), (0x1E00, 0x2000)]
SPANS += [(0x2000, 0x2800), (0x3000, 0x3200), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0xFF00, 0xFFF0)]
SPANS += [(0x1F300, 0x1FA00), (0x20000, 0x20200)]


def known(character):
    """Whether Python's Unicode table has it; those of regex and of the tokenizer library are newer, and differ."""
    return unicodedata.category(character) not in ("Cn", "Cs", "Co")


def strings(count):
    """Words of many scripts glued and spaced at random, and runs of random characters of up to three scripts."""
    draw = random.Random(0)
    yield from ["", " ", "!", "\n", "a" * 2000, "word " * 1000, "😀" * 300, "红色" * 500, *WORDS]
    cases = [str.lower, str.upper, str.title, str]
    for i in range(count):
        if i % 3:
            words = (
                draw.choice(cases)(draw.choice(WORDS)) + draw.choice(["", " ", " ", "  "]) for _ in range(6)
            )
            yield "".join(list(words)[: draw.randint(1, 6)])
        else:
            spans = draw.sample(SPANS, draw.randint(1, 3))
            characters = (chr(draw.randrange(*draw.choice(spans))) for _ in range(draw.randint(1, 24)))
            yield "".join(filter(known, characters))


@pytest.fixture(scope="module", params=[3_000, pytest.param(50_000, marks=pytest.mark.slow)])
def texts(request):
    return list(strings(request.param))


@pytest.fixture(scope="module")
def clip():
    return Bpe.clip()


def ids_of(codec, texts):
    return [codec.encode([text])[0].tolist() for text in texts]


def unequal(texts, ours, theirs):
    return [(text[:60], a[:20], b[:20]) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]


def test_plain_python(clip, texts):
    plain = PlainBpe()
    specials = ["<|startoftext|>", "<|endoftext|>", "<|ENDoftext|>", "<|endoftext|"]
    specials += ["|>", "!", "a", "'s", " ", "1", "_", "é"]
    draw = random.Random(1)
    texts = texts + ["".join(draw.choices(specials, k=draw.randint(1, 6))) for _ in range(1_000)]
    assert len(set(texts)) > 3_000
    theirs = [[clip.start, *plain.encode(text), clip.end] for text in texts]
    assert unequal(texts, ids_of(clip, texts), theirs)[:5] == []


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character(clip, stride):
    """Each character alone and between letters, digits and marks."""
    plain = PlainBpe()
    characters = ["\u0345", *filter(known, map(chr, range(0, 0x30000, stride)))]
    texts = [f"{c} a{c}b 1{c}2 !{c}?" for c in characters]
    theirs = [[clip.start, *plain.encode(text), clip.end] for text in texts]
    assert unequal(texts, ids_of(clip, texts), theirs)[:5] == []


def test_open_clip(clip, texts):
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("needs pip install --no-deps open_clip_torch")
    path = Path(found.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.SimpleTokenizer()
    assert clip.encode(texts, length=77).equal(theirs(texts, context_length=77))
    assert clip.encode(texts[:500], length=12).equal(theirs(texts[:500], context_length=12))
    for text in texts[200:500]:
        assert clip.decode(clip.encode([text])) == [theirs.decode(theirs.encode(text)).strip()]


def test_transformers(clip, texts, tmp_path):
    """On clean text: transformers neither repairs nor unescapes, composes again, and reads 's in one case."""
    transformers = pytest.importorskip("transformers")
    clip.write(tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = transformers.CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
    )
    ready = [text for text in map(clean, texts) if clean(text) == text == unicodedata.normalize("NFC", text)]
    ready = [text for text in ready if "'ſ" not in text]
    assert len(ready) > 0.9 * len(texts)
    assert unequal(ready, ids_of(clip, ready), theirs(ready)["input_ids"])[:5] == []


def test_files_that_transformers_wrote(clip, texts, tmp_path):
    """The ids are CLIP's, from its old files too; but its tokenizer.json reads 's in one case."""
    transformers = pytest.importorskip("transformers")
    clip.write(tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = transformers.CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
    )
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.backend_tokenizer.model.save(str(tmp_path / "theirs"))
    (tmp_path / "old").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "theirs" / name).rename(tmp_path / "old" / name)
    for folder in ("theirs", "old"):
        again = read_tokenizer(tmp_path / folder)
        assert isinstance(again, Bpe)
        ready = [text for text in texts if folder == "old" or "'ſ" not in clean(text)]
        assert len(ready) > 0.9 * len(texts)
        assert unequal(ready, ids_of(again, ready), ids_of(clip, ready))[:5] == []


def test_ftfy_is_needed():
    """Why ftfy is a dependency: without it a typographic apostrophe, or a full-width comma, has other ids."""
    clip = Bpe.clip()
    assert clip.encode(["don’t，go"]).equal(clip.encode(["don't,go"]))
    assert clean("don’t，go") != "don’t，go".lower()
