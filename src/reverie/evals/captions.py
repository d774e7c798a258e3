"""How near captions come to what people wrote: BLEU, ROUGE-L, CIDEr-D, and by CLIP's features CLIPScore.

    bleu       1-gram to 4-gram precision, clipped, with a brevity penalty        Papineni and others 2002
    rouge_l    the longest common subsequence, F with beta 1.2                     Lin 2004, as COCO scores it
    cider_d    TF-IDF of 1-grams to 4-grams, clipped, times 10                      1411.5726
    clip_score  2.5 max(cos, 0), and with references RefCLIPScore                   2104.08718
    label_recall  whether a caption names the thing, by any name that it has

Each takes a caption an item and a list of references an item, and gives the score of all and of each. The numbers are
those of COCO's scorer on the same tokens (tests/evals/test_captions.py). `tokens` stands in for its tokenizer, a
Java program with which it has not been compared: lower case, no punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.errors import InputError

LONGEST = 4  # words of an n-gram
BETA = 1.2  # of ROUGE-L: how much more recall counts than precision
SPREAD = 6.0  # of CIDEr-D's penalty for another length, in words
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of all items together, and of each."""

    all: float
    each: tuple[float, ...]


def tokens(text: str) -> list[str]:
    """The words of a caption in lower case, without punctuation; of Chinese every character."""
    return _TOKEN.findall(text.lower())


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[int, Score]:
    """BLEU of 1-grams up to n-grams for n from 1 to 4; of several references the one nearest in length counts."""
    found, meant = _read(captions, references)
    each: dict[int, list[float]] = {n: [] for n in range(1, LONGEST + 1)}
    sums = _Matches.of([], [[]])
    for words, others in zip(found, meant, strict=True):
        own = _Matches.of(words, others)
        sums = sums.plus(own)
        for n, value in own.bleu().items():
            each[n].append(value)
    return {n: Score(all=value, each=tuple(each[n])) for n, value in sums.bleu().items()}


@dataclass(frozen=True)
class _Matches:
    """What BLEU counts of one item or of many: n-grams there and right, words there and meant."""

    there: tuple[int, ...]
    right: tuple[int, ...]
    length: int
    meant: int

    @classmethod
    def of(cls, words: Sequence[str], references: Sequence[Sequence[str]]) -> _Matches:
        there, right = [], []
        for n in range(1, LONGEST + 1):
            own = _grams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= _grams(reference, n)
            there.append(own.total())
            right.append((own & most).total())
        nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
        return cls(tuple(there), tuple(right), len(words), nearest)

    def plus(self, other: _Matches) -> _Matches:
        there, right = (
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in ((self.there, other.there), (self.right, other.right))
        )
        return _Matches(there, right, self.length + other.length, self.meant + other.meant)

    def bleu(self) -> dict[int, float]:
        """(prod_n right_n / there_n) ^ (1 / N) exp(min(0, 1 - meant / length)), kept from 0 / 0 as by COCO's scorer."""
        ratio = (self.length + 1e-15) / (self.meant + 1e-9)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, out = 1.0, {}
        for n, (right, there) in enumerate(zip(self.right, self.there, strict=True), 1):
            product *= (right + 1e-15) / (there + 1e-9)
            out[n] = product ** (1 / n) * penalty
        return out


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """(1 + b^2) P R / (R + b^2 P) of the longest common subsequence; the best P and the best R of all references."""
    each = []
    for words, others in zip(*_read(captions, references), strict=True):
        common = [_common(words, other) for other in others]
        precision = max(common) / max(len(words), 1)
        recall = max(c / max(len(other), 1) for c, other in zip(common, others, strict=True))
        down = recall + BETA**2 * precision
        each.append((1 + BETA**2) * precision * recall / down if precision and recall else 0.0)
    return _mean(each)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """CIDEr-D, in tens: 10 is a caption that is its only reference.

    How rare an n-gram is, is counted over the references of all items: so the score of an item depends on the others,
    and of a single one it is 0.
    """
    found, meant = _read(captions, references)
    seen: Counter[tuple[str, ...]] = Counter()
    for others in meant:
        seen.update({gram for other in others for n in range(1, LONGEST + 1) for gram in _grams(other, n)})
    total = math.log(len(meant))

    def weighed(words: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (total - math.log(max(seen[gram], 1))) for gram, count in _grams(words, n).items()}
            for n in range(1, LONGEST + 1)
        ]

    each = []
    for words, others in zip(found, meant, strict=True):
        own, value = weighed(words), 0.0
        for other in others:
            off = max(len(words) - 1, 0) - max(len(other) - 1, 0)
            near = math.exp(-(off**2) / (2 * SPREAD**2))
            value += near * sum(map(_alike, own, weighed(other))) / LONGEST
        each.append(10 * value / len(others))
    return _mean(each)


def _alike(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """The cosine of two sparse vectors, in which no n-gram of `own` counts more than it does in `other`."""
    both = math.hypot(*own.values()) * math.hypot(*other.values())
    dot = sum(min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other)
    return dot / both if both else 0.0


def clip_score(images: Tensor, captions: Tensor) -> Tensor:
    """CLIPScore `n` of embeddings `n d` of pictures and their captions: 2.5 max(cos, 0)."""
    return 2.5 * F.cosine_similarity(images, captions, dim=-1).clamp(min=0)


def ref_clip_score(images: Tensor, captions: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIPScore `n`: the harmonic mean of CLIPScore and the likeness to the nearest of the references `m d` each."""
    plain = clip_score(images, captions)
    nearest = torch.stack(
        [
            F.cosine_similarity(caption[None], own, dim=-1).max()
            for caption, own in zip(captions, references, strict=True)
        ]
    ).clamp(min=0)
    both = plain + nearest
    return torch.where(both > 0, 2 * plain * nearest / both.clamp(min=1e-12), torch.zeros_like(both))


def label_recall(captions: Sequence[str], names: Sequence[Sequence[str]]) -> Score:
    """Whether a caption contains a name of its thing: the words (`tokens`) of one of `names`, in a row."""
    found, meant = _read(captions, names)
    return _mean([
        float(any(_within(name, words) for name in own)) for words, own in zip(found, meant, strict=True)
    ])  # fmt: skip


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    n = len(part)
    return n > 0 and any(whole[i : i + n] == part for i in range(len(whole) - n + 1))


def _read(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    if len(captions) != len(references) or not len(captions):
        raise InputError(
            f"{len(captions)} captions and {len(references)} lists of references: give each caption its list."
        )
    for i, own in enumerate(references):
        if isinstance(own, str) or not own:
            raise InputError(f"the references of item {i} are {own!r}: give a list with at least one text.")
    return [tokens(text) for text in captions], [[tokens(text) for text in own] for own in references]


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _mean(each: list[float]) -> Score:
    return Score(all=sum(each) / len(each), each=tuple(each))
