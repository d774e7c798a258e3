"""Text <-> tokens by whole pieces: the vocabularies of SigLIP, SigLIP 2 and BERT, or one trained on your captions.

Papers: Kudo 2018 (1804.10959), unigram pieces; Zhai et al. 2023, SigLIP (2303.15343); Tschannen et al. 2025, SigLIP 2
(2502.14786). SigLIP has 32,000 unigram pieces, SigLIP 2 Gemma's 256,000 byte pairs with single bytes to fall back on.
Convention: `tokens..., end`, then `pad`, without a start token unless the files ask for one. Of SigLIP's vocabulary
the padding is the end token itself (1), of SigLIP 2's it is 0. What the tokenizer.json says of normalising and
splitting is followed; what public code does to a text before that is `clean`, one of CLEANS:

- "none": nothing, all is in the file.
- "siglip": transformers' SiglipTokenizer: lower case, no ASCII punctuation, one space between words.
- "canonicalize", "lower", "whitespace": open_clip's, by its names. Each repairs the text (ftfy) and unescapes HTML
  twice; "canonicalize" then does as "siglip", but makes a space of `_`.
"""

from __future__ import annotations

import html
import json
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reverie import disk
from reverie.codecs.bpe import FINAL, Bpe, file_text
from reverie.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLEANS = ("none", "siglip", "canonicalize", "lower", "whitespace")
CHINESE = "[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"
PUNCTUATION = str.maketrans("", "", string.punctuation)
# What a tokenizer.json may be made of. A stranger's regular expression (Split, Replace) may still be slow: the library
# gives up after a number of steps, which `_mistake` says.
PARTS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend",
                   "Precompiled", "BertNormalizer"},
    "pre_tokenizer": {"Metaspace", "Split", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "ByteLevel",
                      "BertPreTokenizer", "UnicodeScripts"},
    "post_processor": {"TemplateProcessing", "RobertaProcessing", "BertProcessing", "ByteLevel"},
}  # fmt: skip


class Pieces:
    """A text codec; make one with `Pieces.read(path)` or `Pieces.train(captions, vocab=...)`."""

    def __init__(
        self,
        backend: Tokenizer,
        *,
        before: Sequence[int],
        after: Sequence[int],
        pad: int,
        clean: str = "none",
        side: str = "right",
    ) -> None:
        """before, after: the tokens around every text. side: where the padding goes, "right" or "left"."""
        assert clean in CLEANS, clean
        assert side in ("left", "right"), side
        self._backend = backend  # normalises, splits and looks up; knows nothing of `before` and `after`
        self._before, self._after = list(before), list(after)
        self.vocab = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.start = self._before[0] if before else None
        self.end = self._after[-1] if after else None
        self.pad, self.clean, self.side = pad, clean, side

    @property
    def special(self) -> dict[str, int]:
        """The ids of tokens that stand for no text, by name."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def fits(self, *, vocab: int, end: int | None = None) -> None:
        """InputError: a text tower of `vocab` tokens, read at the token `end` if given, cannot read these."""
        if self.vocab > vocab or (end is not None and self.end != end):
            raise InputError(
                f"the tokenizer has {self.vocab} tokens with the end token {self.end}, but the text tower was made for "
                f"{vocab}{'' if end is None else f' and {end}'}: take the tokenizer that it was trained with."
            )

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab: int) -> Pieces:
        """A unigram vocabulary of at most `vocab` pieces, laid out as SigLIP's: padding 0, end 1, unknown 2.

        Its texts are in lower case and without ASCII punctuation. A character that no caption has is unknown.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if vocab < 16:
            raise InputError(f"a vocabulary of pieces needs at least 16, not {vocab}")
        if isinstance(captions, str):
            raise InputError(f"train takes a list of captions, not the text {captions[:40]!r}: write [text]")
        learner = Tokenizer(models.Unigram())
        learner.normalizer = normalizers.Sequence([normalizers.NFKC(), *_canonical()])
        learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        learner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
        specials = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        try:
            learner.train_from_iterator(captions, trainer)
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"no vocabulary of {vocab} pieces can be learnt from these captions ({error}): give more of them"
            ) from error
        # The library leaves pieces of equal score in the order of a hash map, and sums scores in that order too.
        found = json.loads(learner.to_str())["model"]["vocab"]
        pieces = [(name, round(score, 6)) for name, score in found if name not in specials]
        if not pieces:
            raise InputError("no vocabulary can be learnt from captions without a letter: give others")
        pieces.sort(key=lambda piece: (-piece[1], piece[0]))
        learner.model = models.Unigram([*((name, 0.0) for name in specials), *pieces], unk_id=2)
        learner.add_special_tokens(specials)
        return cls(learner, before=[], after=[1], pad=1)

    @classmethod
    def train_words(cls, captions: Iterable[str], *, vocab: int) -> Pieces:
        """A WordPiece vocabulary of at most `vocab`, laid out as BERT's (1810.04805): `[CLS] tokens... [SEP]`.

        Texts are in lower case and without accents; a Chinese character is a word of its own. A character that no
        caption has is unknown. The ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [DEC] 4, [ENC] 5.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]
        if vocab < 16:
            raise InputError(f"a vocabulary of pieces needs at least 16, not {vocab}")
        if isinstance(captions, str):
            raise InputError(f"train takes a list of captions, not the text {captions[:40]!r}: write [text]")
        learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learner.normalizer = normalizers.BertNormalizer()
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # Left to itself the library numbers the characters inside words in the order of a hash map, and of pairs that
        # are equally frequent it joins those of lower numbers; so they are numbered here.
        captions = list(captions)
        plain = {learner.normalizer.normalize_str(text) for text in captions}
        words = {word for text in plain for word, _ in learner.pre_tokenizer.pre_tokenize_str(text)}
        inside = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab, special_tokens=[*specials, *inside], show_progress=False
        )
        learner.train_from_iterator(captions, trainer)
        pieces = [name for name in learner.get_vocab() if name not in specials]
        if not pieces:
            raise InputError("no vocabulary can be learnt from captions without a letter: give others")
        ids = {name: i for i, name in enumerate([*specials, *sorted(pieces)])}
        made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
        made.decoder = decoders.WordPiece()
        made.add_special_tokens(specials)
        return cls(made, before=[2], after=[3], pad=0)

    @classmethod
    def read(cls, path: str | Path, *, clean: str | None = None) -> Pieces:
        """Read a `tokenizer.json` (or the folder that has one) with the tokenizer_config.json beside it, if any.

        clean: what is done to a text first, one of CLEANS; None takes what the files beside it say: the clean rule of
        an open_clip_config.json or of `write`, transformers' where the class is SiglipTokenizer, lower case for
        a SigLIP 2, otherwise "none". Raises InputError for files that are not a tokenizer of pieces.
        """
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        tree = _json(path)
        says = _neighbours(path.parent)
        backend, before, after = _backend(path, tree, says)
        return cls(
            backend,
            before=before,
            after=after,
            pad=_pad(path, backend, tree, says, after),
            clean=_rule(path, says) if clean is None else _known(clean),
            side="left" if says.get("padding_side") == "left" else "right",
        )

    def write(self, path: str | Path, *, length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, which transformers reads too.

        path: a folder, or the path of the tokenizer.json itself. length: how many tokens other libraries pad to.
        Others read the same ids, but skip the repairs of ftfy and HTML.
        """
        from tokenizers import Tokenizer, normalizers, processors

        path = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        copy = Tokenizer.from_str(self._backend.to_str())
        tree = json.loads(copy.to_str())
        if self.clean != "none":
            rules = _canonical() if self.clean in ("siglip", "canonicalize") else _plain(self.clean)
            tail = [copy.normalizer] if copy.normalizer is not None else []
            copy.normalizer = normalizers.Sequence([*rules, *tail])
        names = {i: name for name, i in copy.get_vocab(with_added_tokens=True).items()}
        around = [(names[i], i) for i in dict.fromkeys([*self._before, *self._after])]
        single = [*(names[i] for i in self._before), "$A", *(names[i] for i in self._after)]
        copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
        words: dict[str, str] = {"pad_token": names[self.pad]}
        if self.end is not None:
            words["eos_token"] = names[self.end]
        if self.start is not None:
            words["bos_token"] = names[self.start]
        if (unknown := _unknown(tree)) is not None:
            words["unk_token"] = unknown
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
        config |= {"padding_side": self.side, "clean": self.clean}
        if length is not None:
            config["model_max_length"] = length
        for name, text in {
            path.name: copy.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(words, indent=2, ensure_ascii=False),
        }.items():
            disk.write(path.parent / name, text)

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> Tensor:
        """Texts to tokens, int64 `b n`.

        n is `length`, or without it that of the longest text. A text that does not fit loses its last tokens,
        never the end token.
        """
        if isinstance(texts, str):
            raise InputError(f"encode takes a list of texts, not the text {texts[:40]!r}: write [text]")
        around = len(self._before) + len(self._after)
        if length is not None and length < max(around, 1):
            raise InputError(f"length {length} has no room for the {around} tokens around a text")
        rows = [ids if length is None else ids[: length - around] for ids in self._ids(texts)]
        rows = [[*self._before, *ids, *self._after] for ids in rows]
        if length is None:
            length = max(map(len, rows), default=around)
        tokens = torch.full((len(rows), length), self.pad, dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            start = length - len(ids) if self.side == "left" else 0
            row[start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        return tokens

    def decode(self, tokens: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Tokens `b n` to normalised texts, up to the end token; what is unknown is left out."""
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
        return [self._text(row) for row in rows]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ready = [clean(text, self.clean) for text in texts]
        try:
            return [row.ids for row in self._backend.encode_batch_fast(ready, add_special_tokens=False)]
        except BaseException as error:
            raise _mistake(error, "the tokenizer cannot read a text; its files are damaged") from None

    def _text(self, ids: list[int]) -> str:
        strange = [i for i in ids if not 0 <= i < self.vocab]
        if strange:
            raise InputError(
                f"token {strange[0]} is not among these {self.vocab}: decode with the codec that made it"
            )
        if self.pad != self.end:
            ids = [i for i in ids if i != self.pad]
        if self._before and ids[: len(self._before)] == self._before:
            ids = ids[len(self._before) :]
        if self.end is not None and self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._backend.decode(ids, skip_special_tokens=True).strip()


def read_tokenizer(folder: str | Path, *, clean: str | None = None) -> Bpe | Pieces:
    """The tokenizer of a folder: CLIP's byte pairs as Bpe, anything else as Pieces (`clean` is for these).

    CLIP's may also lie there as vocab.json and merges.txt alone, as in old folders. Raises InputError.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if path.is_file():
        model = _json(path).get("model")
        if isinstance(model, dict) and model.get("end_of_word_suffix") == FINAL:
            return Bpe.read(path)
        return Pieces.read(path, clean=clean)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Bpe.read_merges(folder)
    raise InputError(
        f"{folder} holds no tokenizer: it needs a tokenizer.json, or a vocab.json and a merges.txt"
    )


def clean(text: str, rule: str) -> str:
    """A text as public code hands it to the vocabulary, by one of CLEANS."""
    if rule == "none":
        return text
    if rule == "siglip":
        return re.sub(r"\s+", " ", text.lower().translate(PUNCTUATION)).strip()
    if not (
        text.isascii() and text.isprintable() and "&" not in text
    ):  # otherwise there is nothing to repair
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if rule == "canonicalize":
        text = text.replace("_", " ").translate(PUNCTUATION)
    text = " ".join(text.split())
    return text if rule == "whitespace" else " ".join(text.lower().split())


def joined(text: str) -> str:
    """A text of BERT's pieces as one writes it: no spaces beside Chinese characters, nor before and within marks."""
    text = re.sub(rf"(?<={CHINESE}) | (?={CHINESE})", "", text)
    text = re.sub(r" ([’']) (?=(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)
    return re.sub(r" (?=[,.:;!?%)\]}”])|(?<=[(\[{“]) ", "", text)


# --- files from strangers -------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({type(error).__name__}): give a tokenizer.json") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no table: give a tokenizer.json")
    return tree


def _neighbours(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer.json say of it: tokens by name, the class, the model, the clean rule."""
    says: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            says |= {key: value for key, value in _json(folder / name).items() if value is not None}
    if (folder / "config.json").is_file():
        says["model_type"] = _json(folder / "config.json").get("model_type")
    if (folder / "open_clip_config.json").is_file():
        tree: Any = _json(folder / "open_clip_config.json")
        for key in ("model_cfg", "text_cfg", "tokenizer_kwargs"):
            tree = tree.get(key) if isinstance(tree, dict) else None
        if isinstance(tree, dict) or "clean" not in says:
            says["clean"] = tree.get("clean", "whitespace") if isinstance(tree, dict) else "whitespace"
    return says


def _known(rule: Any) -> str:
    if rule not in CLEANS:
        raise InputError(f"unknown clean rule {rule!r}: use one of {', '.join(CLEANS)}")
    return str(rule)


def _rule(path: Path, says: dict[str, Any]) -> str:
    if "clean" in says:
        return _known(says["clean"])
    return "siglip" if says.get("tokenizer_class") in ("SiglipTokenizer", "SiglipTokenizerFast") else "none"


def _backend(
    path: Path, tree: dict[str, Any], says: dict[str, Any]
) -> tuple[Tokenizer, list[int], list[int]]:
    """The library's tokenizer without what it puts around a text; and that: the ids before and after."""
    from tokenizers import Tokenizer, normalizers

    model = tree.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in ("Unigram", "BPE", "WordPiece"):
        raise InputError(f"{path} has a model of the type {kind!r}, not Unigram, BPE or WordPiece")
    for place, allowed in PARTS.items():
        _refuse(path, place, tree.get(place), allowed)
    try:
        backend = Tokenizer.from_str(json.dumps(tree | {"padding": None, "truncation": None}))
        if _second(says) and "Lowercase" not in str(tree.get("normalizer")):
            rest = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        inside = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a").ids
        for text in (
            "",
            "a b",
            "É ﬁ 小猫 🙂 ا\u0301\x00",
        ):  # a damaged file fails now, not in the middle of a run
            backend.encode(text)
    except BaseException as error:
        raise _mistake(error, f"{path} is no tokenizer that can be read") from None
    at = next((i for i in range(len(whole)) if whole[i : i + len(inside)] == inside), 0) if inside else 0
    before, after = whole[:at], whole[at + len(inside) :]
    backend.post_processor = None
    ids = backend.get_vocab(with_added_tokens=True)
    if not ids:
        raise InputError(f"{path} holds no piece: give a tokenizer.json with its vocabulary")
    if str(says.get("tokenizer_class")).startswith("SiglipTokenizer"):
        before, after = [], [_id(path, ids, says, "eos_token", "</s>")]
    elif "add_bos_token" in says or "add_eos_token" in says:
        before = [_id(path, ids, says, "bos_token", "<bos>")] if says.get("add_bos_token") else []
        after = [_id(path, ids, says, "eos_token", "<eos>")] if says.get("add_eos_token") else []
    return backend, before, after


def _second(says: dict[str, Any]) -> bool:
    """Whether it is SigLIP 2's: it learnt from lower case, which most of its files do not say."""
    kind, model = str(says.get("tokenizer_class")), says.get("model_type")
    return kind.startswith("Siglip2") or (model in ("siglip", "siglip2") and kind.startswith("Gemma"))


def _pad(path: Path, backend: Tokenizer, tree: dict[str, Any], says: dict[str, Any], after: list[int]) -> int:
    ids = backend.get_vocab(with_added_tokens=True)
    kept = tree.get("padding")
    if "pad_token" not in says and isinstance(kept, dict) and kept.get("pad_id") in ids.values():
        return int(kept["pad_id"])
    siglip = str(says.get("tokenizer_class")).startswith("SiglipTokenizer")
    return _id(path, ids, says, "pad_token", "</s>" if siglip else "<pad>")


def _id(path: Path, ids: dict[str, int], says: dict[str, Any], key: str, usual: str) -> int:
    name = says.get(key, usual)
    name = name.get("content") if isinstance(name, dict) else name
    if not isinstance(name, str) or name not in ids:
        raise InputError(
            f"{path} has no piece {str(name)[:40]!r} to be its {key}: name it in the tokenizer_config.json beside it"
        )
    return ids[name]


def _refuse(path: Path, place: str, part: Any, allowed: set[str]) -> None:
    """InputError for a component that is not allowed, or that makes a text much longer than it was."""
    parts, growth = [part], 1
    for _ in range(64):
        if not parts:
            return
        part = parts.pop()
        if part is None:
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "Sequence":
            inner: Any = next(
                (part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part), []
            )
            parts += inner if isinstance(inner, list) else [inner]
            continue
        if kind not in allowed:
            raise InputError(
                f"{path} has a {place} of the type {str(kind)[:40]!r}, which is not one that is read"
            )
        growth *= max(1, len(str(part.get("content", ""))) if kind == "Replace" else 1)
        pattern = part.get("pattern")
        if growth > 64 or len(json.dumps(pattern)) > 4096 or len(str(part.get("prepend", ""))) > 64:
            raise InputError(f"{path} has a {place} that would make texts too long or too slow to read")
    if parts:
        raise InputError(f"{path} has a {place} of too many parts")


def _mistake(error: BaseException, sentence: str) -> BaseException:
    """An InputError; the library panics with a BaseException of its own. What ends the program stays what it is."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
        return error
    return InputError(f"{sentence} ({str(error)[:200]})")


def _unknown(tree: dict[str, Any]) -> str | None:
    model = tree["model"]
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _canonical() -> list[Any]:
    """Lower case, no ASCII punctuation, one space between words, as the library's normalizers."""
    from tokenizers import Regex, normalizers

    marks = "".join("\\" + mark for mark in string.punctuation)
    return [normalizers.Lowercase(), normalizers.Replace(Regex(f"[{marks}]"), ""), *_plain("whitespace")]


def _plain(rule: str) -> list[Any]:
    from tokenizers import Regex, normalizers

    lower = [normalizers.Lowercase()] if rule == "lower" else []
    return [*lower, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
