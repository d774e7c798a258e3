"""BLIP-2: its losses against a plain reference, alone and in several processes; what is frozen stays so."""

import multiprocessing
import os
import socket

import pytest
import torch
from torch.nn import functional as F

from reverie.bridges.qformer import Qformer, QformerConfig
from reverie.codecs.pieces import Pieces
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import ALONE
from reverie.systems.blip2 import EVA_G, Blip2, Blip2Config, SightConfig
from reverie.train.parallel import processes

CAPTIONS = [
    "a red apple",
    "two blue cars",
    "one small dog",
    "a green tree",
    "the old house",
    "six black birds",
]
INNER = QformerConfig(
    queries=3,
    width=16,
    depth=2,
    heads=2,
    hidden=24,
    context_width=24,
    vocab=60,
    length=12,
    start=2,
    end=3,
    decode=4,
)
TOWER = VitConfig(
    size=16, patch=8, width=24, depth=2, heads=2, norm_pre=False, norm_post=False, stem_bias=True
)
CONFIG = Blip2Config(sight=SightConfig(image=TOWER, qformer=INNER, leave=1), width=8)
B = 6


def made(**how) -> Blip2:
    torch.manual_seed(0)
    blip2 = Blip2(CONFIG, **how).double()
    with torch.no_grad():
        for p in blip2.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        blip2.temperature.fill_(0.2)
    return blip2


def batch(part=slice(None), labels=None):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 60, (B, 8), generator=generator)
    tokens[:, 0] = 2
    for row in range(B):
        tokens[row, row % 4 + 3] = 3
        tokens[row, row % 4 + 4 :] = 0
    whole = {
        "image": torch.rand(B, 3, 16, 16, generator=generator).double() * 2 - 1,
        "tokens": tokens,
        "label": torch.tensor(labels or range(B)),
        "draws": torch.rand(B, 2, generator=generator),
    }
    return {name: value[part] for name, value in whole.items()}


def reference(blip2: Blip2, given: dict) -> dict[str, torch.Tensor]:
    """The paper's losses pair by pair, each from a pass of its own through the whole Q-Former."""
    qformer, tokens, label = blip2.sight.qformer, given["tokens"], given["label"]
    features = blip2.sight.features(given["image"])
    cosines = torch.zeros(B, B, dtype=torch.double)
    for i in range(B):
        asked = F.normalize(blip2.image_projection(qformer.look(features[i : i + 1])[0]), dim=-1)
        for j in range(B):
            text = tokens[j : j + 1, : int((tokens[j] != 0).sum())]
            word = F.normalize(blip2.text_projection(qformer.read(text)[0]), dim=-1)
            cosines[i, j] = (asked @ word).max()
    logits = cosines / blip2.temperature
    right = label[:, None] == label
    contrast = 0
    for table in (logits, logits.T):
        for i in range(B):
            target = 0.9 * right[i] / right[i].sum() + 0.1 / B
            contrast = contrast - (target * table[i].log_softmax(0)).sum() / (2 * B)

    def drawn(row, allowed, u):
        weights = (row.float().softmax(0) + 1e-4) * allowed
        edge = u * weights.sum()
        for j, weight in enumerate(weights):
            edge = edge - weight
            if edge < 0:
                return j
        raise AssertionError

    matching, words, count = 0, 0, 0
    for i in range(B):
        pairs = [(i, i, 1), (i, drawn(logits[i].detach(), ~right[i], given["draws"][i, 0]), 0)]
        pairs.append((drawn(logits[:, i].detach(), ~right[:, i], given["draws"][i, 1]), i, 0))
        for picture, text, answer in pairs:
            real = tokens[text : text + 1, : int((tokens[text] != 0).sum())]
            found = blip2.matching(qformer.both(real, features[picture : picture + 1])[0]).mean(0)
            matching = matching - found.float().log_softmax(0)[answer] / (3 * B)
        past = []
        qformer.look(features[i : i + 1], past=past)
        real = tokens[i, : int((tokens[i] != 0).sum())]
        begun = torch.cat([torch.tensor([4]), real[1:]])[None]
        chances = qformer.write(begun, past)[0].float().log_softmax(-1)
        for n in range(len(real) - 1):
            words = words - 0.9 * chances[n, real[n + 1]] - 0.1 * chances[n].mean()
            count += 1
    return {"contrast": contrast, "matching": matching, "writing": words / count}


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 4, 1]])
def test_the_losses_are_the_papers(labels):
    blip2, given = made(), batch(labels=labels)
    found, expected = blip2.loss(given), reference(blip2, given)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name
    assert found["loss"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(loss, [p for p in blip2.parameters() if p.requires_grad])
        for loss in (found["loss"], sum(expected.values()))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-5)


def test_what_is_frozen_learns_nothing_and_has_no_training_mode():
    blip2 = made().train()
    assert blip2.training
    assert not any(module.training for module in blip2.sight.image.modules())
    blip2.loss(batch())["loss"].backward()
    assert all(p.grad is None for p in blip2.sight.image.parameters())
    assert all(p.grad is not None for name, p in blip2.named_parameters() if "sight.image" not in name)


def test_the_last_blocks_of_a_tower_are_left_out():
    blip2 = made()
    features = blip2.sight.features(batch()["image"])
    with torch.no_grad():
        for p in blip2.sight.image.blocks[-1].parameters():
            p.zero_()
    assert torch.equal(blip2.sight.features(batch()["image"]), features)


def test_a_resnet_is_asked_too():
    tower = ClipResnetConfig(size=32, width=2, depths=(1, 1, 1, 1), heads=2, out=8)
    inner = QformerConfig(**{**INNER.__dict__, "context_width": 64})
    config = Blip2Config(sight=SightConfig(image=tower, qformer=inner), width=8)
    assert Blip2(config).embed_image(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 8)
    with pytest.raises(InputError, match="leave"):
        Blip2(Blip2Config(sight=SightConfig(image=tower, qformer=inner, leave=1), width=8))


@torch.no_grad()
def test_a_batch_is_its_items_and_samplings_differ_as_they_should():
    tokenizer = Pieces.train_words(CAPTIONS, vocab=60)
    blip2 = made(tokenizer=tokenizer).eval()
    images = batch()["image"]
    assert torch.allclose(blip2.match(images, CAPTIONS)[2:3], blip2.match(images[2:3], CAPTIONS[2:3]))
    together = blip2.caption(images, sampling="nucleus", most=5)
    assert len(together) == B
    assert together == blip2.caption(images, sampling="nucleus", most=5)
    assert blip2.caption(images, most=5)[1:2] == blip2.caption(images[1:2], most=5)
    assert blip2.caption(images, sampling="beam", beams=1, most=5) == blip2.caption(
        images, sampling="greedy", most=5
    )
    assert all(text.startswith("a red") for text in blip2.caption(images, prompt="a red", most=3))
    with pytest.raises(InputError, match="sampling"):
        blip2.caption(images, sampling="guess", most=5)
    with pytest.raises(InputError, match="6 pictures and 1 texts"):
        blip2.match(images, CAPTIONS[:1])


def test_the_papers_sizes():
    """Section 3.1: 188 million parameters that are trained. Section 3.4: ViT-g/14."""
    with torch.device("meta"):
        blip2 = Blip2(Blip2Config())
    trained = sum(p.numel() for p in blip2.parameters() if p.requires_grad)
    assert trained == 186_705_470
    assert abs(trained / 188e6 - 1) < 0.01  # the paper counts the pooler and heads of BERT that nothing uses
    assert sum(p.numel() for p in blip2.sight.image.parameters()) == 985_949_440
    with torch.device("meta"):
        assert isinstance(Vit(EVA_G), Vit)
        second = Qformer(QformerConfig(reads=False, writes=False))
    assert sum(p.numel() for p in second.parameters()) == 105_162_240


def gradients(blip2: Blip2, part: slice, peers) -> tuple[dict, list]:
    found = blip2.loss(batch(part), peers=peers)
    found["loss"].backward()
    kept = [p.grad for p in blip2.parameters() if p.requires_grad]
    return {name: value.detach() for name, value in found.items()}, kept


def one_of(rank: int, count: int, port: int, results) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "blip2", "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with processes() as peers:
        part = slice(rank * B // count, (rank + 1) * B // count)
        losses, grads = gradients(made(), part, peers)
        means = {name: peers.gather(value.reshape(1)).mean().item() for name, value in losses.items()}
        grads = [peers.gather(grad[None]).mean(0) for grad in grads]
        if rank == 0:
            results.put((means, [grad.numpy() for grad in grads]))


def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch():
    alone, grads = gradients(made(), slice(None), ALONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    group = [context.Process(target=one_of, args=(rank, 2, port, results)) for rank in range(2)]
    for process in group:
        process.start()
    means, theirs = results.get()
    for process in group:
        process.join()
        assert process.exitcode == 0
    for name, value in alone.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-6), name
    for ours, other in zip(grads, theirs, strict=True):
        assert torch.allclose(ours, torch.from_numpy(other), rtol=1e-6, atol=1e-9)
