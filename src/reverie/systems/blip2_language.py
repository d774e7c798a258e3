"""BLIP-2, second stage: the Q-Former speaks through a frozen language model (Li et al. 2023, 2301.12597, section 3.3).

    image --- frozen tower --- norm --- Qformer: look --- projection --- as if they were words --\\
    text  --- embedding of words ----------------------------------------------------------------- frozen language model

A causal model (OPT, Qwen) learns to write the text after the queries. Of an encoder and a decoder (T5) the encoder gets
the queries and the first words of the text, and the decoder writes the rest. Only the Q-Former, the norm before it and
the projection learn; gradients pass through the language model to them.

Questions are asked in words: `answer` and `chat` put them into `question`, which the model goes on from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reverie.backbones.language import Language, LanguageConfig, start_of
from reverie.codecs.pieces import Pieces
from reverie.encoders.images import Images
from reverie.encoders.texts import strings
from reverie.errors import InputError
from reverie.nn.frozen import kept_elsewhere
from reverie.objectives.contrastive import ALONE, Peers
from reverie.objectives.language import language_loss
from reverie.samplers.autoregressive import Sampling, seeds_of, write
from reverie.systems.blip2 import AT_ONCE, Sight, SightConfig, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blip2LanguageConfig:
    sight: SightConfig = SightConfig()
    language: LanguageConfig = LanguageConfig()
    language_source: Source = Source()
    prompt: str = ""  # what a caption begins with unless asked otherwise
    question: str = "Question: {} Answer:"

    def sources(self) -> dict[str, Source]:
        """Where its frozen parts came from, by the name of the constructor's argument."""
        return {"image": self.sight.source, "language": self.language_source}


class Blip2Language(nn.Module):
    """The second stage; see the module. `tokenizer` is the language model's."""

    def __init__(
        self,
        config: Blip2LanguageConfig,
        tokenizer: Pieces | None = None,
        image: nn.Module | None = None,
        language: Language | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        if config.question.count("{}") != 1:
            raise InputError(f"the question {config.question!r:.60} must hold {{}} once, where it is asked.")
        self.sight = Sight(config.sight, image)
        self.language = Language(config.language) if language is None else language
        if language is not None:
            kept_elsewhere(self, "language")
        if tokenizer is not None:
            tokenizer.fits(vocab=self.language.vocab)
        self.projection = nn.Linear(config.sight.qformer.width, self.language.width)

    def spoken(self, features: Tensor) -> Tensor:
        """The tower's features `b m c` -> what the language model hears of a picture, `b q d`."""
        return self.projection(self.sight.qformer.look(features))

    # Text -------------------------------------------------------------------------------------------------------------

    def written(self, texts: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Texts that end, at most `length` tokens each -> tokens `b n` and which of them are real, `b n`."""
        end = self.config.language.end
        return self._padded([[*ids[: length - 1], end] for ids in self._ids(texts)], length)

    def prompts(self, texts: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Texts that are gone on from, as a tokenizer gives them, at most `length` tokens each."""
        return self._padded([ids[:length] for ids in self._ids(texts, whole=True)], length)

    def _padded(self, rows: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(rows), length), self.config.language.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, dtype=torch.long), True
        return tokens, mask

    def _ids(self, texts: Sequence[str], *, whole: bool = False) -> list[list[int]]:
        """Each text's tokens; `whole`: with the end token that the tokenizer of an encoder puts behind every text."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer (its folder held no tokenizer.json): put it there.")
        found = [self.tokenizer.encode([text])[0].tolist() for text in texts]
        if not (whole and self.language.pairs):
            ends = {self.tokenizer.end, self.config.language.end}
            found = [ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids for ids in found]
        if not self.language.pairs and not all(found) and self.tokenizer.start is None:
            found = [ids or [self.config.language.end] for ids in found]
        return found

    # Capabilities -----------------------------------------------------------------------------------------------------

    def caption(
        self,
        images: Images,
        *,
        sampling: Sampling = "beam",
        prompt: str | None = None,
        beams: int = 5,
        least: int = 0,
        most: int = 30,
        p: float = 0.9,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """What the language model writes of each picture after `prompt` (None: the model's own), which is not shown.

        From `least` to `most` new tokens; picture i draws by `seed + i`, or by its own of several
        seeds (nucleus). InputError: no tokenizer, another sampling, a length that cannot be written.
        """
        features = self.sight.all_features(images)
        prompt = self.config.prompt if prompt is None else prompt
        how: dict[str, Any] = {"beams": beams, "least": least, "most": most, "p": p, "seed": seed}
        return self._goes_on(features, [prompt] * len(features), sampling=sampling, **how)

    def answer(
        self,
        images: Images,
        questions: Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        sampling: Sampling = "beam",
        beams: int = 5,
        least: int = 0,
        most: int = 10,
        p: float = 0.9,
        seed: int = 0,
    ) -> list[str]:
        """The answer to question i about picture i; with `answers`, the likeliest of these.

        From `least` to `most` new tokens. InputError: other counts of pictures and questions, no tokenizer.
        """
        features, questions = self.sight.all_features(images), strings("questions", questions)
        if len(features) != len(questions):
            raise InputError(
                f"there are {len(features)} pictures and {len(questions)} questions: give as many of both."
            )
        asked = [self.config.question.replace("{}", question) for question in questions]
        if answers is not None:
            return self._likeliest(features, asked, strings("answers", answers))
        how: dict[str, Any] = {"beams": beams, "least": least, "most": most, "p": p, "seed": seed}
        return self._goes_on(features, asked, sampling=sampling, **how)

    def chat(self, image: Images, turns: Sequence[str], **how: Any) -> str:
        """The answer to the last of `turns` about one picture: question, answer, question, answer, ..., question.

        `image`: a tensor `1 3 h w`, or a list of one path or picture. `how`: as `answer` writes. InputError: an
        even number of turns, or more than one picture.
        """
        turns = strings("turns", turns)
        if len(turns) % 2 == 0:
            raise InputError("the last turn must be a question: turns go question, answer, ..., question.")
        before = [
            f"{self.config.question.replace('{}', question)} {answer.strip().rstrip('.')}. "
            for question, answer in zip(turns[:-1:2], turns[1::2], strict=True)
        ]
        features = self.sight.all_features(image)
        if len(features) != 1:
            raise InputError(f"a chat is about one picture, but there are {len(features)}: give one.")
        asked = "".join(before) + self.config.question.replace("{}", turns[-1])
        options: dict[str, Any] = {"sampling": "beam", "most": 10} | how
        return self._goes_on(features, [asked], **options)[0]

    @torch.no_grad()
    def _goes_on(
        self,
        features: Tensor,
        prompts: list[str],
        *,
        sampling: str,
        most: int,
        beams: int = 5,
        least: int = 0,
        p: float = 0.9,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """What is written after each picture and its prompt; those of one length together, so that none is padded."""
        rows, seeds = self._ids(prompts, whole=True), seeds_of(seed, len(prompts))
        found: dict[int, str] = {}
        for length in sorted({len(row) for row in rows}):
            alike = [i for i, row in enumerate(rows) if len(row) == length]
            for at in range(0, len(alike), AT_ONCE):
                part = alike[at : at + AT_ONCE]
                tokens = torch.tensor([rows[i] for i in part], dtype=torch.long, device=features.device)
                vectors = self.heard(features[part], tokens)
                writer, start = self.language.continued(vectors), start_of(vectors)
                ids = write(
                    writer, start, sampling=sampling, end=self.config.language.end, most=most, least=least,
                    beams=beams, p=p, seeds=[seeds[i] for i in part],
                )  # fmt: skip
                found |= dict(zip(part, self._decoded(ids), strict=True))
        return [found[i] for i in range(len(rows))]

    def heard(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Pictures by their features and prompts `b n` -> vectors `b q+n d` as the language model takes them."""
        spoken = self.spoken(features)
        return torch.cat([spoken, self.language.embed(tokens).to(spoken.dtype)], dim=1)

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        assert self.tokenizer is not None
        end, known = self.config.language.end, self.tokenizer.vocab  # models often have room for more tokens
        rows = [[i for i in (row[: row.index(end)] if end in row else row) if i < known] for row in ids]
        return [text.strip() for text in self.tokenizer.decode(rows)]

    @torch.no_grad()
    def _likeliest(self, features: Tensor, prompts: list[str], answers: list[str]) -> list[str]:
        """Of `answers` the one whose words are together the likeliest after each prompt."""
        first = 0 if self.language.pairs or self.tokenizer is None or self.tokenizer.start is None else 1
        texts = answers if self.language.pairs else [f" {answer}" for answer in answers]
        longest = max(len(ids) for ids in self._ids(texts)) + 1  # with the end
        tokens, mask = self.written(texts, length=longest)
        tokens, mask = tokens[:, first:].to(features.device), mask[:, first:].to(features.device)
        best = []
        for i, ids in enumerate(self._ids(prompts, whole=True)):
            vectors = self.heard(
                features[i : i + 1], torch.tensor([ids], dtype=torch.long, device=features.device)
            )
            logits = self.language.logits(vectors.expand(len(tokens), -1, -1), tokens)[:, :-1]
            chances = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            best.append(answers[int((chances * mask).sum(1).argmax())])
        return best

    # Training ---------------------------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any], *, peers: Peers = ALONE) -> dict[str, Tensor]:
        """The mean of -log p of the words of all processes, given the picture and those before them.

        A batch: `image b 3 h w` in [-1, 1], `tokens b n` and `mask b n` as `written` gives them; for an encoder and a
        decoder also `given b k` and `given_mask b k`, the first words, as `prompts` gives them.
        """
        vectors, tokens, mask = (
            self.spoken(self.sight.features(batch["image"])),
            batch["tokens"],
            batch["mask"],
        )
        heard = None
        if self.language.pairs:
            vectors = torch.cat([vectors, self.language.embed(batch["given"]).to(vectors.dtype)], dim=1)
            asks = batch["given_mask"].new_ones(len(tokens), self.config.sight.qformer.queries)
            heard = torch.cat([asks, batch["given_mask"]], dim=1)
        logits = self.language.logits(vectors, tokens, mask=heard)
        # The first word too is predicted, from the last query.
        targets, real = torch.cat([tokens[:, :1], tokens], 1), torch.cat([mask[:, :1], mask], 1)
        return {"loss": language_loss(logits, targets, real, peers=peers)}
