"""How often questions about pictures are answered right.

    vqa_accuracy   ten people's answers, min(n / 3, 1)         VQA, Antol and others 2015 (1505.00468)
    exact          one right answer, as the world's questions have, beside what guessing gives

The first equals the public scorer of VQA v2 to the digit: its normal form of an answer (`vqa_form`) and its habit to
bring people's answers into a part of that form only, and only where they differ (tests/evals/test_answers.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from reverie.errors import InputError
from reverie.evals.interval import bootstrap
from reverie.scene import CHINESE, ENGLISH

# ---------------------------------------------------------------- VQA v2

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# A word that lacks one of its apostrophes gets it back.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)


@cache
def _whole() -> dict[str, str]:
    table = {}
    for word in _CONTRACTIONS:
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}  # as the public scorer has it


def vqa_form(text: str) -> str:
    """An answer as VQA compares it: no punctuation, no articles, digits for number words, whole contractions."""
    words = _without_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [_DIGITS.get(word, word) for word in words]
    return " ".join(_whole().get(word, word) for word in words if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    """A mark that stands beside a space is dropped, as all are where a comma parts digits; else it becomes a space."""
    out, digits = text, re.search(r"\d,\d", text)
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or digits else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over all sets of all but one of the references of min(1, how many of them agree / 3).

    InputError: no references.
    """
    if isinstance(references, str) or not references:
        raise InputError(
            f"the references are {references!r:.60}: give a list of people's answers, such as ten."
        )
    given = vqa_form(answer)
    if len(set(references)) > 1:
        references = [_without_marks(text) for text in references]
    agree = [text == given for text in references]
    total = sum(agree)
    return sum(min(1.0, (total - own) / 3) for own in agree) / len(agree)


def vqa(
    answers: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """`vqa_accuracy` of all answers, and of those of each kind: `accuracy`, its 95 % `interval`, how many (`asked`)."""
    _as_many(answers, references, kinds)
    each = [vqa_accuracy(answer, own) for answer, own in zip(answers, references, strict=True)]
    return {
        kind: _share([each[i] for i in places], "accuracy") for kind, places in _by(kinds, len(each)).items()
    }


# ---------------------------------------------------------------- one right answer


def exact(
    answers: Sequence[str], truths: Sequence[str], kinds: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """How many answers are right, of all and of each kind: `right`, its 95 % `interval`, how many (`asked`), `prior`.

    prior: what one gets who sees nothing, but knows how often each answer of a kind is right, and says the one that
    mostly is. Two words that mean the same to the world are the same answer, in English and Chinese (`world_form`).
    """
    _as_many(answers, truths, kinds)
    forms = [world_form(text) for text in truths]
    right = [float(world_form(text) == form) for text, form in zip(answers, forms, strict=True)]
    parts = _by(kinds, len(right))
    out = {kind: _share([right[i] for i in places], "right") for kind, places in parts.items()}
    known = {kind: Counter(forms[i] for i in places).most_common(1)[0][1] for kind, places in parts.items()}
    alone = [kind for kind in parts if kind != "all"] or ["all"]
    for kind in out:
        out[kind]["prior"] = known[kind] / out[kind]["asked"]
    out["all"]["prior"] = sum(known[kind] for kind in alone) / out["all"]["asked"]
    return out


_CHINESE_DIGITS = {word: str(i) for i, word in enumerate("零一二三四五六七八九")} | {"两": "2", "十": "10"}
_CHINESE_ANSWERS = {
    "没有": "no", "不是": "no", "否": "no", "没": "no", "不": "no", "有": "yes", "是": "yes", "是的": "yes",
    "移动": "moving", "旋转": "turning", "转动": "turning", "弹跳": "bouncing", "出现": "appearing",
    "消失": "vanishing", "合并": "merging", "静止": "staying still", "不动": "staying still",
}  # fmt: skip


@cache
def _phrases(chinese: bool) -> tuple[re.Pattern[str], dict[str, str]]:
    """What the world has several words for, longest first, and its own word for it."""
    meant: dict[str, str] = {}
    for kind, values in (CHINESE if chinese else ENGLISH).items():
        if kind in ("shape", "colour", "background", "direction"):
            for value, phrases in values.items():
                for phrase in phrases:
                    meant.setdefault(phrase, value)
                    meant.setdefault(phrase.removeprefix("to the "), value)
    if chinese:
        meant |= _CHINESE_ANSWERS
    known = "|".join(re.escape(phrase) for phrase in sorted(meant, key=len, reverse=True))
    return re.compile(known if chinese else rf"\b(?:{known})\b"), meant


def world_form(text: str) -> str:
    """An answer about the world as it is compared: `vqa_form`, and one word for each colour, shape and direction."""
    chinese = re.search(r"[\u4e00-\u9fff]", text) is not None
    if chinese:
        text = re.sub(r"[，。！？、\s]|的(?!$)|的$", "", text)
        if number := re.fullmatch(r"([零一二两三四五六七八九十]|\d+)[个颗枚只块]?", text):
            return _CHINESE_DIGITS.get(number[1], number[1])
    else:
        text = " ".join(_without_marks(text.strip()).lower().split())
    pattern, meant = _phrases(chinese)
    form = pattern.sub(lambda found: f" {meant[found[0]]} ", text)
    return " ".join(_DIGITS.get(word, word) for word in form.split() if word not in _ARTICLES)


# ---------------------------------------------------------------- what both need


def _as_many(answers: Sequence[str], truths: Sequence[Any], kinds: Sequence[str] | None) -> None:
    if not len(answers) or len(answers) != len(truths) or (kinds is not None and len(kinds) != len(answers)):
        raise InputError(
            f"{len(answers)} answers, {len(truths)} truths and {len(answers) if kinds is None else len(kinds)} kinds: "
            "give as many of each, one or more."
        )


def _by(kinds: Sequence[str] | None, count: int) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {"all": list(range(count))}
    for i, kind in enumerate(kinds or ()):
        parts.setdefault(kind, []).append(i)
    return parts


def _share(values: Sequence[float], name: str) -> dict[str, Any]:
    found = torch.tensor(values, dtype=torch.double)
    return {name: found.mean().item(), "interval": bootstrap(found), "asked": len(values)}
