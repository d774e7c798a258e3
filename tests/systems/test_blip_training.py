"""BLIP's training: its losses against a plain reference; what moves between the steps, and what does not."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from reverie.encoders.med import MedConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.systems.blip import Blip, BlipConfig
from reverie.systems.blip_training import BlipTraining

TEXT = MedConfig(
    vocab=40,
    length=8,
    width=16,
    depth=2,
    heads=2,
    hidden=32,
    context_width=24,
    start=2,
    end=3,
    decode=4,
    ground=5,
)
CONFIG = BlipConfig(
    image=VitConfig(
        size=16, patch=8, width=24, depth=1, heads=2, activation="gelu", norm_pre=False, stem_bias=True
    ),
    text=TEXT,
    width=12,
)
B = 6


def batch(seed=0, *, labels=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 40, (B, 8), generator=generator)
    tokens[:, 0] = 2
    for row in range(B):
        tokens[row, row % 4 + 3] = 3
        tokens[row, row % 4 + 4 :] = 0
    return {
        "image": torch.rand(B, 3, 16, 16, generator=generator) * 2 - 1,
        "tokens": tokens,
        "label": torch.arange(B) + 100 * seed if labels is None else labels,
        "draws": torch.rand(B, 2, generator=generator),
        "alpha": torch.tensor(0.4),
    }


def made(**how) -> BlipTraining:
    torch.manual_seed(0)
    return BlipTraining(Blip(CONFIG), **{"queue": 10, "smoothing": 0.1} | how)


def reference(training: BlipTraining, given: dict) -> dict:
    """The paper's losses, pair by pair, from the networks alone."""
    blip, slow = training.blip, training.slow
    tokens, temperature = given["tokens"], blip.temperature[0]
    mask = tokens != 0

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    features = blip.see(given["image"])
    image = unit(blip.image_projection(features[:, 0]))
    text = unit(blip.text_projection(blip.text.features(tokens, mask=mask)[:, 0]))
    slow_image = unit(slow.image_projection(slow.see(given["image"])[:, 0]))
    slow_text = unit(slow.text_projection(slow.text.features(tokens, mask=mask)[:, 0]))
    contrast, alike = 0, []
    for own, own_slow, others, queue in (
        (image, slow_image, slow_text, training.text_queue),
        (text, slow_text, slow_image, training.image_queue),
    ):
        columns = torch.cat([others, queue])
        labels = torch.cat([given["label"], training.label_queue])
        for i in range(B):
            logits, soft = columns @ own[i] / temperature, columns @ own_slow[i] / temperature
            right = (labels == given["label"][i]).float()
            target = 0.4 * soft.softmax(0) + 0.6 * right / right.sum()
            contrast = contrast - (target * logits.log_softmax(0)).sum() / (2 * B)
            alike.append(logits[:B])
    pairs = [(i, i, 1) for i in range(B)]
    for way in range(2):
        for i in range(B):
            weights = (alike[way * B + i].softmax(0) + 1e-4).masked_fill(
                given["label"] == given["label"][i], 0
            )
            edge = given["draws"][i, way] * weights.sum()
            j = int((weights.cumsum(0) <= edge).sum())
            pairs.append((i, j, 0) if way == 0 else (j, i, 0))
    logits = []
    for picture, words, _ in pairs:
        n = int(mask[words].sum())
        ids = torch.cat([torch.tensor([5]), tokens[words, 1:n]])[None]
        logits.append(blip.matching(blip.text.features(ids, context=features[picture : picture + 1])[0, 0]))
    matching = F.cross_entropy(torch.stack(logits), torch.tensor([right for *_, right in pairs]))
    each = []
    for i in range(B):
        n = int(mask[i].sum())
        ids = torch.cat([torch.tensor([4]), tokens[i, 1:n]])[None]
        log = blip.text.logits(ids, context=features[i : i + 1])[0].log_softmax(-1)
        each += [-0.9 * log[k - 1, ids[0, k]] - 0.1 * log[k - 1].mean() for k in range(1, n)]
    return {"contrast": contrast, "matching": matching, "writing": torch.stack(each).mean()}


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 3, 2])])
def test_the_losses_are_the_papers(labels):
    training = made()
    for step in range(2):  # so that the slow copies and the queue are others than at the start
        training.loss(batch(step + 1))
        with torch.no_grad():
            for p in training.blip.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        training.advance()
    given = batch(labels=labels)
    found, expected = training.loss(given), reference(training, given)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight_but_the_slow_copies():
    training = made()
    training.loss(batch())["loss"].backward()
    for name, parameter in training.named_parameters():
        assert (parameter.grad is None) == name.startswith("slow."), name


def test_between_the_steps_the_copies_follow_and_the_queue_turns():
    training = made(queue=10, momentum=0.9)
    before = {name: p.clone() for name, p in training.slow.named_parameters()}
    with torch.no_grad():
        for p in training.blip.parameters():
            p.add_(1)
    first = batch(1)
    training.loss(first)
    assert (training.label_queue == -1).all()  # the loss alone changes nothing
    training.advance()
    for name, parameter in training.slow.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.1)
        assert not parameter.requires_grad
    training.loss(batch(2))
    training.advance()
    assert training.label_queue.tolist() == [204, 205, 102, 103, 104, 105, 200, 201, 202, 203]
    assert training.place.item() == 2
    norms = training.image_queue.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(10))


def test_a_skipped_step_brings_nothing_to_the_queue():
    training = made()
    training.loss(batch(1))  # its step is skipped, so nobody advances
    training.loss(batch(2))
    training.advance()
    assert training.label_queue.tolist() == [200, 201, 202, 203, 204, 205, -1, -1, -1, -1]


def test_a_queue_smaller_than_the_batch_and_none():
    for size in (0, 4):
        training = made(queue=size)
        for seed in (1, 2):
            assert torch.isfinite(training.loss(batch(seed))["loss"])
            training.advance()
        assert training.label_queue.tolist() == [202, 203, 204, 205][:size]


def test_the_temperature_stays_within_its_bounds():
    training = made()
    with torch.no_grad():
        training.blip.temperature.fill_(0.9)
    training.loss(batch())
    training.advance()
    assert training.blip.temperature.item() == pytest.approx(0.5)


def test_one_that_only_reads_or_writes_learns_only_that():
    whole = made()
    expected = reference(whole, batch())
    for mode, losses in (("reads", {"contrast", "matching"}), ("writes", {"writing"})):
        part = made(**{"reads": False, "writes": False} | {mode: True})
        found = part.loss(batch())
        assert losses == found.keys() & expected.keys()
        for name in losses:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        part.advance()
        other = {"reads": {"understands": False}, "writes": {"writes": False}}[mode]
        lacking = Blip(dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **other)))
        with pytest.raises(InputError, match=r"this BLIP can learn to (read|write), and"):
            BlipTraining(lacking, queue=4)


def test_a_prompt_is_read_and_not_learnt():
    training = made(reads=False)
    given = batch()
    given["tokens"] = given["tokens"][:1].expand(B, -1)
    mask = given["tokens"] != 0
    logits = training.blip.writes(training.blip.see(given["image"]), given["tokens"])
    for first in (1, 3):
        each = [
            -0.9 * log[i, k - 1, given["tokens"][i, k]] - 0.1 * log[i, k - 1].mean()
            for log in (logits.log_softmax(-1),)
            for i in range(B)
            for k in range(first, int(mask[i].sum()))
        ]
        found = training.loss(given | {"given": torch.tensor(first)})
        torch.testing.assert_close(found["loss"], torch.stack(each).mean())
