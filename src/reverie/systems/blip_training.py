"""How BLIP is trained (2201.12086, section 3.2): contrast, matching and writing, with equal weights.

    contrast  the vectors of pictures and texts against those that slow copies of the towers make, of this batch and of
              a queue of former ones; soft targets by the slow copies (ALBEF, 2107.07651, sections 3.2 and 3.3)
    matching  each pair, and with the hardest other text and picture that contrast finds
    writing   the text, word by word, beside its picture

A batch: `image b 3 h w` in [-1, 1], `tokens b n`, `label b` (items with equal labels are right for each other),
`draws b 2` uniform numbers that choose the hard negatives, `alpha` the weight of the soft targets; optionally
`written b m`, what is written if it is not the same as is read, `given`, how many of its first tokens are a prompt,
which is not learnt, and `strangers k n`, texts that belong to none of the pictures.

Fine-tuning for captions has only the last loss, for retrieval only the first two (appendix B).

Convention: `loss` changes nothing. Between the steps `advance` moves the slow copies and the queue, so that a step that
was skipped leaves no trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.objectives.contrastive import ALONE, Peers, distilled_info_nce
from reverie.objectives.language import language_loss
from reverie.objectives.matching import hard_negatives, matching_loss
from reverie.systems.blip import Blip

TEMPERATURES = (0.001, 0.5)  # the authors' bounds


class BlipTraining(nn.Module):
    """A Blip with what only its training needs.

    reads: whether it learns to compare and match. writes: whether it learns to write.
    queue: how many former vectors of each side are kept. momentum: of the slow copies. smoothing: of the words.
    far: whether hard negatives come from the batches of all processes, or of one's own (as the authors pre-train).
    """

    image_queue: Tensor
    text_queue: Tensor
    label_queue: Tensor
    place: Tensor

    def __init__(
        self,
        blip: Blip,
        *,
        reads: bool = True,
        writes: bool = True,
        queue: int = 57_600,
        momentum: float = 0.995,
        smoothing: float = 0.1,
        far: bool = True,
    ):
        super().__init__()
        text = blip.config.text
        if not (reads or writes) or (reads and not text.understands) or (writes and not text.writes):
            has = [name for name, there in (("read", text.understands), ("write", text.writes)) if there]
            raise InputError(
                f"this BLIP can learn to {' and '.join(has)}, and one of them must be asked for."
            )
        if queue < 0:
            raise InputError(
                f"queue is {queue}: give 0 for none, or the number of former vectors, such as 57600."
            )
        self.blip, self.momentum, self.smoothing, self.far = blip, momentum, smoothing, far
        self.reads, self.writes = reads, writes
        self.fresh: list[tuple[Tensor, Tensor, Tensor]] = []  # what this step's batches bring to the queue
        if not reads:
            return
        self.slow = Blip(dataclasses.replace(blip.config, text=dataclasses.replace(text, writes=False)))
        mine = dict(blip.named_parameters())
        for name, parameter in self.slow.named_parameters():
            parameter.data.copy_(mine[name].data)
        self.slow.requires_grad_(False)
        width = blip.config.width
        self.register_buffer("image_queue", F.normalize(torch.randn(queue, width), dim=-1))
        self.register_buffer("text_queue", F.normalize(torch.randn(queue, width), dim=-1))
        self.register_buffer("label_queue", torch.full((queue,), -1))  # noise is right for nobody
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def loss(self, batch: Mapping[str, Any], *, peers: Peers = ALONE) -> dict[str, Tensor]:
        """The losses of a batch (see the module), of several processes as `objectives.contrastive` says."""
        features = self.blip.see(batch["image"])
        found: dict[str, Tensor] = {}
        if self.reads:
            found |= self._reading(batch, features, peers)
        if self.writes:
            found["writing"] = self._writing(batch, features, peers)
        losses = [found[name] for name in ("contrast", "matching", "writing") if name in found]
        return {"loss": torch.stack(losses).sum()} | {name: value.detach() for name, value in found.items()}

    def _reading(self, batch: Mapping[str, Any], features: Tensor, peers: Peers) -> dict[str, Tensor]:
        blip, tokens, label = self.blip, batch["tokens"], batch["label"]
        image, text = blip.image_vector(features), blip.text_vector(tokens)
        strange = batch.get("strangers", tokens[:0])
        with torch.no_grad():
            slow_image = self.slow.image_vector(self.slow.see(batch["image"]))
            slow_text = self.slow.text_vector(tokens)
            images, texts, labels = peers.gather(slow_image), peers.gather(slow_text), peers.gather(label)
            self.fresh.append((images, texts, labels))
            right = label[:, None] == torch.cat([labels, self.label_queue])
            unknown = self.slow.text_vector(strange) if len(strange) else texts[:0]
            nobody = torch.zeros(len(label), len(strange), dtype=torch.bool, device=label.device)
        ask = {"temperature": blip.temperature.clamp(*TEMPERATURES), "alpha": batch["alpha"]}
        to_text, by_image = distilled_info_nce(
            image,
            torch.cat([texts, self.text_queue, unknown]),
            slow_image,
            right=torch.cat([right, nobody], 1),
            **ask,
        )
        to_image, by_text = distilled_info_nce(
            text, torch.cat([images, self.image_queue]), slow_text, right=right, **ask
        )

        others = peers if self.far else ALONE
        first = 0 if self.far else peers.rank * len(label)
        near = slice(first, first + len(label) * others.count)  # of the queue there are only vectors
        alike = torch.cat([by_image[:, near], by_image[:, right.shape[1] :]], 1)
        text_of, has_text = hard_negatives(
            alike, torch.cat([right[:, near], nobody], 1), batch["draws"][:, 0]
        )
        image_of, has_image = hard_negatives(by_text[:, near], right[:, near], batch["draws"][:, 1])
        own = self._as_long(tokens, others)
        all_features, all_tokens = others.gather(features), others.gather(own)
        all_tokens, strange = self._level(all_tokens, strange)
        own, _ = self._level(own, all_tokens)
        logits = blip.matches(
            torch.cat([features, features, all_features[image_of]]),
            torch.cat([own, torch.cat([all_tokens, strange])[text_of], own]),
        )
        belongs = torch.arange(len(logits), device=label.device) < len(label)
        real = torch.cat([torch.ones_like(has_text), has_text, has_image])
        nearest = by_image[:, near].argmax(1, keepdim=True)
        return {
            "contrast": (to_text + to_image) / 2,
            "matching": matching_loss(logits, belongs, real, peers=peers),
            "found": right[:, near]
            .gather(1, nearest)
            .float()
            .mean(),  # whose text contrast puts first in the batch
            "told": (logits.argmax(-1).bool() == belongs).float().mean(),  # pairs that matching tells right
        }

    def _writing(self, batch: Mapping[str, Any], features: Tensor, peers: Peers) -> Tensor:
        tokens = batch.get("written", batch["tokens"])
        mask = tokens != self.blip.config.text.pad
        if "given" in batch:
            mask = mask & (torch.arange(tokens.shape[1], device=tokens.device) >= batch["given"])
        logits = self.blip.writes(features, tokens)
        return language_loss(logits, tokens, mask, smoothing=self.smoothing, peers=peers)

    @torch.no_grad()
    def advance(self, batches: int = 1) -> None:
        """After a step of so many batches: the slow copies follow, its vectors take the oldest places of the queue."""
        if not self.reads:
            return
        mine = dict(self.blip.named_parameters())
        for name, slow in self.slow.named_parameters():
            own = mine[name]
            if hasattr(own, "full_tensor"):  # sharded, which what is frozen is not
                own = own.full_tensor()
            slow.lerp_(own, 1 - self.momentum)
        self.blip.temperature.clamp_(*TEMPERATURES)
        size = len(self.label_queue)
        for images, texts, labels in self.fresh[-batches:] if size else ():
            images, texts, labels = images[-size:], texts[-size:], labels[-size:]
            places = (self.place + torch.arange(len(labels), device=labels.device)) % size
            self.image_queue[places], self.text_queue[places] = (
                images.to(self.image_queue),
                texts.to(self.text_queue),
            )
            self.label_queue[places] = labels
            self.place += len(labels)
        self.place %= max(size, 1)
        self.fresh.clear()

    def _level(self, tokens: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Both padded to the longer."""
        pad, longest = self.blip.config.text.pad, max(tokens.shape[1], others.shape[1])
        return tuple(F.pad(x, (0, longest - x.shape[1]), value=pad) for x in (tokens, others))  # type: ignore[return-value]

    def _as_long(self, tokens: Tensor, peers: Peers) -> Tensor:
        """Padded to the longest of all processes."""
        if peers.count == 1 or tokens.is_meta:  # shapes alone (planning) are equally long
            return tokens
        longest = int(peers.gather(torch.tensor([tokens.shape[1]], device=tokens.device)).max())
        return F.pad(tokens, (0, longest - tokens.shape[1]), value=self.blip.config.text.pad)
