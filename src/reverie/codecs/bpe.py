"""Text <-> tokens by byte-level byte-pair encoding: CLIP's own vocabulary, or one trained on your captions.

Papers: Sennrich et al. 2016 (1508.07909); Radford et al. 2021, CLIP (2103.00020). The rules are those of
openai/CLIP: repair the text (ftfy), unescape HTML twice, collapse white space, lower-case, split into pieces,
write each piece as bytes, mark its last byte with `</w>`, merge. Convention: `start, tokens..., end`, then `pad`
(0, as in CLIP). The vocabulary is 256 bytes, 256 final bytes, one token per merge, start, end: it covers any text.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reverie import disk
from reverie.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
FINAL = "</w>"
MOST = 64 * 2**20  # bytes of a tokenizer's file; the largest public one, Gemma's, has 34 million
# CLIP's pieces: contractions, runs of letters, single digits, runs of anything else that is not white space.
# U+0345, a mark whose upper case is a letter, is in none: CLIP's pattern, which ignores case, never matches it.
CLIP_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
# The same, but Chinese has no spaces: each Han character is a piece, so a word has the same tokens anywhere.
HAN_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}|[\p{L}&&\P{Han}]+|\p{N}|[^\s\p{L}\p{N}\p{Han}]+"
# CLIP reads special tokens in a text as such, unless punctuation before them swallows their first characters.
SPECIAL = re.compile(r"(?:^|(?<=\s)|(?<=[^\W_]))((?:<\|startoftext\|>|<\|endoftext\|>)+)")


class Bpe:
    """A text codec; make one with `Bpe.clip()`, `Bpe.train(captions, vocab=...)` or `Bpe.read(path)`."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend  # splits and merges; `clean` normalises, `SPECIAL` finds the special tokens
        ids = backend.get_vocab()
        self._names = {i: name for name, i in ids.items()}
        self.vocab = max(self._names) + 1
        self.start, self.end, self.pad = ids[START], ids[END], 0

    def fits(self, *, vocab: int, end: int | None) -> None:
        """InputError: a text tower of `vocab` tokens, read at the token `end` if any, cannot read what this makes."""
        if self.vocab > vocab or end not in (None, self.end):
            raise InputError(
                f"the tokenizer has {self.vocab} tokens with the end token {self.end}, but the text tower was made for "
                f"{vocab} and {end}: take the tokenizer that it was trained with."
            )

    @classmethod
    def clip(cls) -> Bpe:
        """CLIP's own vocabulary: 49,408 tokens."""
        packed = resources.files("reverie.codecs").joinpath("data/clip_merges.txt.gz").read_bytes()
        lines = [line.split(" ") for line in gzip.decompress(packed).decode().splitlines()]
        return cls(_backend([(left, right) for left, right in lines], CLIP_PIECES))

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab: int) -> Bpe:
        """A vocabulary of at most `vocab` tokens from captions in any language; the same ones give the same one.

        It is smaller when no pair of tokens is left that occurs twice.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if vocab < 514:
            raise InputError(f"a vocabulary needs at least 514 tokens (bytes and specials), not {vocab}")
        if isinstance(captions, str):
            raise InputError(f"train takes a list of captions, not the text {captions[:40]!r}: write [text]")
        pieces = _pieces(HAN_PIECES)
        # The library numbers `</w>` tokens in the order of a hash map. One private character for each final
        # byte, all in the initial alphabet, makes the result the same in every process.
        letters = _byte_letters()
        finals = {letter: chr(0xE000 + i) for i, letter in enumerate(letters)}
        names = {final: letter + FINAL for letter, final in finals.items()}

        def lines() -> Iterable[str]:
            for caption in captions:
                words = [piece for piece, _ in pieces.pre_tokenize_str(clean(caption))]
                yield " ".join(word[:-1] + finals[word[-1]] for word in words)

        trainer = trainers.BpeTrainer(
            vocab_size=vocab - 2,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[*letters, *names],
        )
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        learner.train_from_iterator(lines(), trainer)
        merges = json.loads(learner.to_str())["model"]["merges"]
        named = [["".join(names.get(c, c) for c in side) for side in merge] for merge in merges]
        return cls(_backend([(left, right) for left, right in named], HAN_PIECES))

    @classmethod
    def read(cls, path: str | Path) -> Bpe:
        """Read a `tokenizer.json`, written by `write` or by another library for a CLIP."""
        from tokenizers import Tokenizer

        try:
            tree = json.loads(file_text(Path(path)))
            kind, suffix, vocab = (tree["model"][key] for key in ("type", "end_of_word_suffix", "vocab"))
            bare: dict[str, Any] = {
                "added_tokens": [],
                "normalizer": None,
                "padding": None,
                "truncation": None,
            }
            backend = Tokenizer.from_str(json.dumps(tree | bare))
            whole = isinstance(vocab, dict) and {START, END} <= vocab.keys()
        except InputError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"{path} is not a byte-pair tokenizer.json ({str(error)[:200]!r}): give one made for a CLIP"
            ) from error
        if kind != "BPE" or suffix != FINAL or not whole:
            raise InputError(
                f"{path} is a {kind} tokenizer, not byte pairs with the suffix {FINAL} and the tokens {START}"
                f" and {END}: give one made for a CLIP"
            )
        return cls(backend)

    @classmethod
    def read_merges(cls, folder: str | Path) -> Bpe:
        """Read a CLIP's `vocab.json` and `merges.txt`, as they lie in old folders of transformers."""
        from tokenizers import Tokenizer, models

        folder = Path(folder)
        lines = file_text(folder / "merges.txt").split("\n")
        pairs = [line.rstrip("\r").partition(" ") for line in lines if not line.startswith("#version")]
        merges = [(left, right) for left, _, right in pairs if left]
        try:
            vocab = json.loads(file_text(folder / "vocab.json"))
            whole = {START, END, *_byte_letters()} <= vocab.keys()
            backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=FINAL))
        except InputError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"the vocab.json and merges.txt in {folder} are not CLIP's ({str(error)[:200]!r}): take both from one"
                " public model"
            ) from error
        if not whole:
            raise InputError(
                f"the vocab.json in {folder} lacks the bytes or {START} and {END}: take a CLIP's"
            )
        backend.pre_tokenizer = _pieces(CLIP_PIECES)
        return cls(backend)

    def is_clip(self) -> bool:
        """Whether this is CLIP's own vocabulary."""
        return self.vocab == 49_408 and self._backend.get_vocab() == Bpe.clip()._backend.get_vocab()

    def write(self, path: str | Path, *, length: int | None = None) -> None:
        """Write a `tokenizer.json` that other libraries read too (they skip the ftfy and HTML repairs).

        length: how many tokens they cut to, said in a `tokenizer_config.json` beside it; not written if not given.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, normalizers

        copy = Tokenizer.from_str(self._backend.to_str())
        copy.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        copy.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (START, END)])
        disk.write(Path(path), copy.to_str(pretty=True))
        if length is not None:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "bos_token": START,
                "eos_token": END, "pad_token": END,
            }  # fmt: skip
            disk.write(Path(path).with_name("tokenizer_config.json"), json.dumps(config, indent=2) + "\n")

    def encode(
        self,
        texts: Sequence[str],
        *,
        length: int | None = None,
        dropout: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """Texts to tokens, int64 `b n`.

        n is `length`, or without it that of the longest text. A text that does not fit loses its last tokens,
        never the end token. With `dropout`, each merge is left out with that probability each time that it could be
        made (BPE-dropout, Provilkov et al. 2019, 1910.13267), by a generator for each text.
        """
        if isinstance(texts, str):
            raise InputError(f"encode takes a list of texts, not the text {texts[:40]!r}: write [text]")
        if length is not None and length < 2:
            raise InputError(f"length {length} has no room for the start and the end token: use 2 or more")
        if dropout:
            assert len(generators) == len(texts), "one generator for each text"
            found = [self._dropped(text, dropout, one) for text, one in zip(texts, generators, strict=True)]
        else:
            found = self._ids(texts)
        rows = [[self.start, *ids, self.end] for ids in found]
        if length is None:
            length = max(map(len, rows), default=2)
        tokens = torch.full((len(rows), length), self.pad, dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            ids = [*ids[: length - 1], self.end] if len(ids) > length else ids
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, tokens: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Tokens `b n` to cleaned texts, up to the first end token; a broken character becomes U+FFFD."""
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
        return [self._text(row) for row in rows]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [SPECIAL.split(clean(text)) for text in texts]  # every second part is a run of special tokens
        plain = [part for row in parts for part in row[::2]]
        encoded = iter(self._backend.encode_batch_fast(plain, add_special_tokens=False))
        rows = []
        for row in parts:
            ids: list[int] = []
            for i, part in enumerate(row):
                ids += self._special(part) if i % 2 else next(encoded).ids
            rows.append(ids)
        return rows

    def _dropped(self, text: str, dropout: float, generator: torch.Generator) -> list[int]:
        """The tokens of a text without specials, each merge left out with that probability at each turn."""
        ids = self._backend.get_vocab()
        found: list[int] = []
        for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(clean(text)):
            parts = [*word[:-1], word[-1] + FINAL]
            while len(parts) > 1:
                # Merges are numbered in their order, so the first is the one with the lowest token.
                pairs = [
                    (ids.get(a + b, self.vocab), i)
                    for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                ]
                draws = torch.rand(len(pairs), generator=generator).tolist()
                kept = [
                    pair
                    for pair, u in zip(pairs, draws, strict=True)
                    if pair[0] < self.vocab and u >= dropout
                ]
                if not kept:
                    break
                _, i = min(kept)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found += [ids[part] for part in parts]
        return found

    def _special(self, run: str) -> list[int]:
        return [self.start if name == START else self.end for name in re.findall(r"<\|\w+\|>", run)]

    def _text(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        unknown = [i for i in ids if i not in self._names]
        if unknown:
            raise InputError(
                f"token {unknown[0]} is not among these {self.vocab}: decode with the codec that made it"
            )
        names = [self._names[i] for i in ids if i != self.start]
        text = "".join(name.removesuffix(FINAL) + " " if name.endswith(FINAL) else name for name in names)
        bytes_of = {letter: byte for byte, letter in _byte_table().items()} | {" ": ord(" ")}
        return bytes(bytes_of[letter] for letter in text).decode("utf-8", errors="replace").strip()


def file_text(path: Path) -> str:
    """A tokenizer's file. InputError: there is none, or it is not text of a size that a tokenizer may have."""
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}: give the path of a tokenizer.json")
    if (size := path.stat().st_size) > MOST:
        raise InputError(f"{path} has {size:,} bytes, more than the {MOST:,} that a tokenizer may have")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give a tokenizer's file") from None


def clean(text: str) -> str:
    """The text as CLIP sees it: repaired, unescaped, one space between words, lower-case."""
    import ftfy

    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair: faster
        return " ".join(text.split()).lower()
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _byte_table() -> dict[int, str]:
    """Byte -> printable letter, GPT-2's table: printable Latin-1 is itself, the rest U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _byte_letters() -> list[str]:
    return list(_byte_table().values())


def _pieces(pattern: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _backend(merges: list[tuple[str, str]], pattern: str) -> Tokenizer:
    """The library's tokenizer with CLIP's numbering: bytes, final bytes, merges in order, start, end."""
    from tokenizers import Tokenizer, decoders, models, processors

    letters = _byte_letters()
    names = [
        *letters,
        *(letter + FINAL for letter in letters),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=FINAL))
    backend.pre_tokenizer = _pieces(pattern)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocab[START]), (END, vocab[END])]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(FINAL, " ")])
    return backend
