"""BLIP on two tasks that need networks of their own: "Bootstrapping Language-Image Pre-training for Unified
Vision-Language Understanding and Generation" (Li et al. 2022, 2201.12086, figure 5, sections 5.3 and 5.4).

    answers     image --- Vit ----.                              statements   left  --- Vit ---.
                                  |                                           right --- Vit ---|
                question --- text, grounded in it --.                                          |
                                                    |            statement --- text, whose blocks read both
                answer   --- text, writing beside that                              |
                                                                                 no, yes

`BlipVqa` answers questions about a picture: by writing, or by choosing from a list. `BlipNlvr` says whether a
statement is true of two pictures (NLVR2): each block has a cross-attention for each of them, whose outputs are
averaged in the first blocks and merged by a linear layer in the later ones. Images are as in systems/blip.py.

In training the authors also drop whole blocks of the image tower for some pictures (stochastic depth, 0.1), which
these do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.codecs.pieces import Pieces, joined
from reverie.encoders.images import Images
from reverie.encoders.med import Med, MedBlock, MedConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.nn.attention import CrossAttention
from reverie.nn.linear import Linear
from reverie.samplers.autoregressive import Sampling, write
from reverie.systems.blip import BASE, Reading, ReadingConfig

AT_ONCE = 64  # texts whose logits stand in memory together
ONLY_READS, ONLY_WRITES = MedConfig(writes=False), MedConfig(understands=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlipVqaConfig(ReadingConfig):
    image: VitConfig = dataclasses.replace(BASE, size=480)
    text: MedConfig = ONLY_READS  # of questions
    answer: MedConfig = ONLY_WRITES  # reads what `text` makes of the question
    smoothing: float = 0.1  # of the likelihood of an answer, in the loss and where answers are chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlipNlvrConfig(ReadingConfig):
    text: MedConfig = ONLY_READS
    merges: int = 6  # the first block that merges what it reads of the two pictures by a linear layer


class Grounded(Reading):
    """Texts grounded in one picture, or in several."""

    def __init__(self, config: BlipVqaConfig | BlipNlvrConfig, tokenizer: Pieces | None):
        super().__init__(config, tokenizer)
        if not config.text.understands:
            raise InputError("the text network must understand: set understands in its config.")

    def _asked(self, tokens: Tensor, *pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Texts `b n` grounded in the features of their pictures -> features `b n d`, and which of them are real."""
        mask = tokens != self.config.text.pad
        first = torch.full_like(tokens[:, :1], self.config.text.ground)
        grounded = torch.cat([first, tokens[:, 1:]], dim=1)
        context: Any = pictures if len(pictures) > 1 else pictures[0]
        return self.text.features(grounded, mask=mask, context=context), mask


class BlipVqa(Grounded):
    """Answers to questions about pictures. `tokenizer` may be left out when only tokens are read."""

    config: BlipVqaConfig

    def __init__(self, config: BlipVqaConfig, tokenizer: Pieces | None = None):
        super().__init__(config, tokenizer)
        if not config.answer.writes or config.answer.context_width != config.text.width:
            raise InputError(
                f"the network of answers must write, and read questions of {config.text.width} channels, not"
                f" {config.answer.context_width}."
            )
        self.answers = Med(config.answer)

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted -log p(answer), summed over the answers and divided by the questions (blip_vqa.py).

        batch: `image b 3 h w`, `tokens b n` of the questions, `answers a m`, `question a`, which question each of them
        answers, and `weight a`. https://github.com/salesforce/BLIP/blob/main/models/blip_vqa.py
        """
        asked, mask = self._asked(batch["tokens"], self.see(batch["image"]))
        question = batch["question"]
        lost = self._surprise(batch["answers"], asked[question], mask[question])
        loss = (batch["weight"] * lost).sum() / len(batch["tokens"])
        return {"loss": loss}

    @torch.no_grad()
    def answer(
        self,
        images: Images,
        questions: Sequence[str] | Tensor,
        *,
        answers: Sequence[str] | None = None,
        sampling: Sampling = "beam",
        beams: int = 3,
        least: int = 0,
        most: int = 9,
        p: float = 0.9,
        top: int = 128,
        seed: int = 0,
    ) -> list[str]:
        """The answer to question i about picture i: written, with `least` to `most` tokens, the end among them.

        With `answers` it is the likeliest of these: of the `top` whose first token is the likeliest, as the authors
        choose. Answer i is drawn with `seed + i` (nucleus). Images: float `b 3 h w` in [-1, 1], or paths, or pictures;
        one picture serves all questions. InputError: other counts, no tokenizer, too long.
        """
        tokens = self.tokens(questions)
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer, so it cannot write: put its tokenizer.json there.")
        asked, mask = self._asked(tokens, self._one_each(images, tokens))
        if answers is not None:
            found = self.choose(asked, mask, self.tokens(answers), top=top)
            return [answers[i] for i in found.tolist()]
        config = self.config.answer
        if most >= config.length:
            raise InputError(f"most {most} is too long: this model writes up to {config.length - 1} tokens.")
        decoder = self.answers.writer(asked, context_mask=mask, most=most + 1)
        start = torch.full_like(tokens[:, :1], config.decode)
        rows = write(
            decoder, start, sampling=sampling, end=config.end, most=most, least=least, beams=beams, p=p,
            seeds=range(seed, seed + len(start)),
        )  # fmt: skip
        return [joined(text) for text in self.tokenizer.decode(rows)]

    @torch.no_grad()
    def choose(self, asked: Tensor, mask: Tensor, answers: Tensor, *, top: int) -> Tensor:
        """Questions as features `b n d`, real where `mask b n`, and tokens `a m` -> which answer is the likeliest, `b`.

        Of the `top` answers by the probability of their first token, that with the greatest (smoothed) likelihood.
        """
        if top < 1:
            raise InputError(f"top {top} leaves no answer to choose: give 1 or more.")
        start = torch.full_like(answers[:1, :1], self.config.answer.decode)
        found = []
        for at in range(len(asked)):
            context, seen = asked[at : at + 1], mask[at : at + 1]
            first = self.answers.logits(start, context=context, context_mask=seen)[0, 0]
            best = first[answers[:, 1]].topk(min(top, len(answers))).indices
            lost = [
                self._surprise(part, context.expand(len(part), -1, -1), seen.expand(len(part), -1))
                for part in answers[best].split(AT_ONCE)
            ]
            found.append(best[torch.cat(lost).argmin()])
        return torch.stack(found)

    def _surprise(self, answers: Tensor, asked: Tensor, mask: Tensor) -> Tensor:
        """-log p of each answer `a m` to its question, `a`; its first token only says where it begins."""
        config = self.config.answer
        first = torch.full_like(answers[:, :1], config.decode)
        tokens = torch.cat([first, answers[:, 1:]], dim=1)
        logits = self.answers.logits(tokens, context=asked, context_mask=mask)[:, :-1]
        lost = F.cross_entropy(
            rearrange(logits, "a m v -> (a m) v").float(),
            rearrange(tokens[:, 1:], "a m -> (a m)"),
            ignore_index=config.pad,
            label_smoothing=self.config.smoothing,
            reduction="none",
        )
        return reduce(lost, "(a m) -> a", "sum", a=len(answers))

    def _one_each(self, images: Images, tokens: Tensor) -> Tensor:
        features = self.features(images)
        if len(features) == 1:
            features = repeat(features, "1 n d -> b n d", b=len(tokens))
        if len(features) != len(tokens):
            raise InputError(
                f"there are {len(features)} pictures and {len(tokens)} questions: give as many of both, or one picture."
            )
        return features


class TwinCross(nn.Module):
    """`b n d` reads two contexts, by a cross-attention each; their outputs are averaged, or merged by a linear one."""

    def __init__(self, config: MedConfig, *, merges: bool):
        super().__init__()
        self.both = nn.ModuleList(
            CrossAttention(config.width, config.heads, context_width=config.context_width) for _ in range(2)
        )
        self.merge = Linear(2 * config.width, config.width) if merges else None
        for module in self.modules():  # BERT's initialisation
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, context: Sequence[Tensor], context_mask: None = None) -> Tensor:
        left, right = (cross(x, one) for cross, one in zip(self.both, context, strict=True))
        return (left + right) / 2 if self.merge is None else self.merge(torch.cat([left, right], dim=-1))


class BlipNlvr(Grounded):
    """Whether a statement is true of two pictures. `tokenizer` may be left out when only tokens are read."""

    config: BlipNlvrConfig

    def __init__(self, config: BlipNlvrConfig, tokenizer: Pieces | None = None):
        super().__init__(config, tokenizer)
        for i, block in enumerate(self.text.blocks):
            cast(Any, cast(MedBlock, block)).cross = TwinCross(config.text, merges=i >= config.merges)
        width = config.text.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def logits(self, left: Tensor, right: Tensor, tokens: Tensor) -> Tensor:
        """False and true, `b 2`, of pictures by their features `b n d` and statements by their tokens `b n`."""
        features, _ = self._asked(tokens, left, right)
        return self.head(features[:, 0])

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The cross-entropy of whether it is true. batch: `left`, `right b 3 h w`, `tokens b n`, `label b`, 0 or 1."""
        left, right = self.see(torch.cat([batch["left"], batch["right"]])).chunk(2)
        logits = self.logits(left, right, batch["tokens"])
        told = (logits.detach().argmax(-1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "told": told}

    @torch.no_grad()
    def compare(self, left: Images, right: Images, statements: Sequence[str] | Tensor) -> Tensor:
        """The probability `b` that statement i is true of the pictures left i and right i."""
        tokens, pair = self.tokens(statements), (self.features(left), self.features(right))
        counts = {len(tokens), *map(len, pair)}
        if len(counts) > 1:
            raise InputError(
                f"there are {len(pair[0])} left and {len(pair[1])} right pictures and {len(tokens)} statements: give as"
                " many of each."
            )
        return self.logits(*pair, tokens).float().softmax(-1)[:, 1]
