"""Cached gradients are the direct ones, for the memory of one chunk, in the loop as well."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie import rng
from reverie.errors import InputError
from reverie.objectives.contrastive import info_nce, sigmoid_loss
from reverie.train import Ema, Player, Run, adamw, checkpoint, schedule, train
from reverie.train.gradient_cache import cached


class Towers(nn.Module):
    """Two small towers with dropout, in all formats that a batch has: a tensor, tokens, a list."""

    def __init__(self, *, chunk: int = 0, dropout: float = 0.0, width: int = 32):
        super().__init__()
        self.chunk = chunk
        self.image = nn.Sequential(
            nn.Linear(12, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 8),
        )
        self.text = nn.Sequential(nn.Embedding(50, width), nn.Dropout(dropout), nn.Linear(width, 8))
        self.log_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.bias = nn.Parameter(torch.full((1,), -3.0))

    def embed(self, batch):
        assert len(batch["ids"]) == len(batch["image"])
        image, text = self.image(batch["image"]), self.text(batch["tokens"]).mean(1)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def loss(self, batch, *, kind="softmax"):
        vectors = cached(self.embed, batch, chunk=self.chunk)
        if kind == "softmax":
            return {"loss": info_nce(*vectors, self.log_scale.exp(), label=batch["label"])}
        return {"loss": sigmoid_loss(*vectors, self.log_scale.exp(), self.bias, label=batch["label"])}


def towers(**settings):
    torch.manual_seed(0)
    return Towers(**settings)


def batch_of(n, *key):
    g = rng.generator(1, *key)
    return {
        "image": torch.randn(n, 12, generator=g),
        "tokens": torch.randint(50, (n, 5), generator=g),
        "label": torch.randint(n, (n,), generator=g),
        "ids": list(range(n)),
    }


def double(batch):
    return batch | {"image": batch["image"].double()}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 5, 23, 24, 100])
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-12), (False, 2e-6)])
def test_the_loss_and_every_gradient_are_the_direct_ones(kind, chunk, wide, tolerance):
    direct, ours = towers(), towers(chunk=chunk)
    batch, losses = batch_of(24), []
    if wide:
        batch = double(batch)
    for model in (direct, ours):
        model.double() if wide else model
        losses.append(model.loss(batch, kind=kind)["loss"])
        losses[-1].backward()
    assert (losses[0] - losses[1]).abs() <= tolerance * losses[0].abs()
    for (name, one), other in zip(ours.named_parameters(), direct.parameters(), strict=True):
        if kind == "softmax" and name == "bias":
            assert one.grad is other.grad is None
            continue
        assert other.grad.norm() > 0, name
        assert (one.grad - other.grad).norm() <= tolerance * other.grad.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_and_autocast_are_the_same_in_both_passes(precision):
    """Beside chunks embedded with their graph, which draw the same numbers once."""
    batch, chunk, gradients = batch_of(24), 7, []
    for keep in (True, False):
        model = towers(dropout=0.4, chunk=chunk)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            if keep:
                parts = [
                    model.embed({k: v[i : i + chunk] for k, v in batch.items()}) for i in range(0, 24, chunk)
                ]
                a, b = (torch.cat(part) for part in zip(*parts, strict=True))
                loss = info_nce(a, b, model.log_scale.exp(), label=batch["label"])
            else:
                loss = model.loss(batch)["loss"]
        loss.backward()
        after = torch.rand(())
        gradients.append([loss, after, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6 if precision == "fp32" else 2e-2, atol=1e-6)


def test_a_tower_that_does_not_learn_is_left_alone():
    model = towers(chunk=5)
    model.image.requires_grad_(False)
    model.loss(batch_of(12))["loss"].backward()
    assert all(p.grad is None for p in model.image.parameters())
    assert all(p.grad is not None for p in model.text.parameters())


def test_memory_is_that_of_a_chunk():
    """What is allocated at the worst moment of forward and backward, by the profiler's account."""

    def peak(chunk):
        model, batch = towers(chunk=chunk, width=256), batch_of(1024)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as seen:
            # the loss of the first items alone: it is the towers' memory that is looked at
            a, b = cached(model.embed, batch, chunk=chunk)
            (a * b).sum().backward()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = worst = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            worst = max(worst, held)
        return worst

    assert peak(64) < peak(0) / 5


def test_what_no_chunk_can_be_is_refused():
    with pytest.raises(InputError, match="chunk is -1; give"):
        towers(chunk=-1).loss(batch_of(4))


# ---------------------------------------------------------------- in the loop


def run(folder, *, chunk, steps, total=6, precision="fp32", dropout=0.3):
    model = towers(chunk=chunk, dropout=dropout)
    player = Player(
        model,
        optimizer=adamw(model, lr=1e-2, weight_decay=0.1),
        schedule=partial(schedule.cosine, steps=total, warmup=2),
        ema=Ema(model, decay=0.9),
        clip=0.5,
    )
    log = Run(folder, {"chunk": chunk}, progress=False)
    log.curves = lambda: None
    losses = []
    for step in train(
        [player], lambda step, micro: batch_of(12, "batch", step, micro), run=log, steps=total, seed=3,
        accumulate=2, save_every=2, precision=precision, estimate=True, prefetch=1,
    ):  # fmt: skip
        losses.append((step.loss, step.grad_norm))
        if step.number == steps:
            break
    return model, player, losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_with_chunks_is_the_uninterrupted_one_bit_for_bit(tmp_path, precision):
    whole, player, losses = run(tmp_path / "whole", chunk=5, steps=6, precision=precision)
    run(tmp_path / "twice", chunk=5, steps=3, precision=precision)  # the third is not in a checkpoint
    again, resumed, later = run(tmp_path / "twice", chunk=5, steps=6, precision=precision)
    assert later == losses[2:]
    for one, other in (
        (checkpoint.model_tensors(again), checkpoint.model_tensors(whole)),
        (resumed.ema.average, player.ema.average),
    ):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_training_with_chunks_is_training_without(tmp_path):
    """Accumulated, clipped and averaged; without dropout, whose draws go by chunks."""
    direct, one, losses = run(tmp_path / "direct", chunk=0, steps=6, dropout=0.0)
    chunked, other, same = run(tmp_path / "chunked", chunk=5, steps=6, dropout=0.0)
    torch.testing.assert_close(torch.tensor(same), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for name, value in one.ema.average.items():
        torch.testing.assert_close(other.ema.average[name], value, rtol=1e-3, atol=1e-4)
    moved = direct.image[0].weight - towers().image[0].weight
    assert (chunked.image[0].weight - direct.image[0].weight).norm() < 1e-3 * moved.norm()
