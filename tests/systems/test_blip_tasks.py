"""Answers and statements: the losses are their definitions, choosing is exhaustive search, pictures are told apart."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import reverie
from reverie.codecs.pieces import Pieces
from reverie.encoders.med import MedConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.systems.blip_tasks import BlipNlvr, BlipNlvrConfig, BlipVqa, BlipVqaConfig

QUESTIONS = ["what colour is the cat", "how many dogs are there on the mat", "where is it"]
ANSWERS = ["red", "two", "on the mat", "yellow cats", "a dog and a cat"]
PIECES = Pieces.train_words([*QUESTIONS, *ANSWERS], vocab=70)
IMAGE = VitConfig(
    size=16, patch=8, width=16, depth=1, heads=2, activation="gelu", stem_bias=True, norm_pre=False
)
TEXT = MedConfig(
    vocab=PIECES.vocab, length=16, width=24, depth=3, heads=2, hidden=40, context_width=16, start=2, end=3, decode=4,
    ground=5, writes=False,
)  # fmt: skip
ANSWER = dataclasses.replace(TEXT, understands=False, writes=True, context_width=24)


def shaken(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def vqa():
    return shaken(BlipVqa(BlipVqaConfig(image=IMAGE, text=TEXT, answer=ANSWER), PIECES))


@pytest.fixture
def nlvr():
    return shaken(BlipNlvr(BlipNlvrConfig(image=IMAGE, text=TEXT, merges=2), PIECES))


def images(count=3, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def likelihood(vqa, image, question, answer):
    """The smoothed log-likelihood of one answer, word after word."""
    asked, _ = vqa._asked(PIECES.encode([question]), vqa.see(image))
    tokens = [4, *PIECES.encode([answer])[0, 1:].tolist()]
    total = 0.0
    for at in range(1, len(tokens)):
        chances = vqa.answers.logits(torch.tensor([tokens[:at]]), context=asked)[0, -1].log_softmax(-1)
        total += 0.9 * chances[tokens[at]] + 0.1 * chances.mean()
    return total


@torch.no_grad()
def test_the_loss_is_the_weighted_likelihood_of_each_answer(vqa):
    question, weight = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.3, 0.7, 1.0, 0.5, 0.2])
    loss = vqa.loss({
        "image": images(), "tokens": PIECES.encode(QUESTIONS), "answers": PIECES.encode(ANSWERS),
        "question": question, "weight": weight,
    })["loss"]  # fmt: skip
    single = [
        likelihood(vqa, images()[i : i + 1], QUESTIONS[i], answer)
        for i, answer in zip(question.tolist(), ANSWERS, strict=True)
    ]
    assert torch.allclose(loss, -(weight * torch.stack(single)).sum() / 3, rtol=1e-5)


@torch.no_grad()
def test_the_chosen_answer_is_the_likeliest(vqa):
    found = vqa.answer(images(), QUESTIONS, answers=ANSWERS)
    for i, question in enumerate(QUESTIONS):
        scores = [likelihood(vqa, images()[i : i + 1], question, answer) for answer in ANSWERS]
        assert found[i] == ANSWERS[int(torch.stack(scores).argmax())]
    first = vqa.answer(images(), QUESTIONS, answers=ANSWERS, top=1)  # by the first token alone
    asked, mask = vqa._asked(PIECES.encode(QUESTIONS), vqa.see(images()))
    starts = PIECES.encode(ANSWERS)[:, 1]
    chances = vqa.answers.logits(torch.full((3, 1), 4), context=asked, context_mask=mask)[:, 0]
    assert first == [ANSWERS[i] for i in chances[:, starts].argmax(-1).tolist()]


@pytest.mark.parametrize("sampling", ["beam", "greedy", "nucleus"])
def test_answers_do_not_depend_on_their_neighbours(vqa, sampling):
    together = vqa.answer(images(), QUESTIONS, sampling=sampling)
    assert vqa.answer(images()[:1], QUESTIONS[:1], sampling=sampling) == together[:1]
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "white")]
    assert len(vqa.answer(pictures, QUESTIONS, sampling=sampling)) == 3
    assert len(vqa.answer(pictures[:1], QUESTIONS, sampling=sampling)) == 3  # one picture for all questions


def test_two_pictures_are_two(nlvr):
    left, right = images(seed=1), images(seed=2)
    found = nlvr.compare(left, right, QUESTIONS)
    assert found.shape == (3,)
    assert not torch.allclose(found, nlvr.compare(right, left, QUESTIONS))
    assert not torch.allclose(found, nlvr.compare(left, left, QUESTIONS))
    one = nlvr.compare(left[1:2], right[1:2], QUESTIONS[1:2])
    assert torch.allclose(one, found[1:2], atol=1e-6)
    label = torch.tensor([1, 0, 1])
    batch = {"left": left, "right": right, "tokens": PIECES.encode(QUESTIONS), "label": label}
    wanted = F.binary_cross_entropy(found, label.float())
    assert torch.allclose(nlvr.loss(batch)["loss"], wanted, rtol=1e-5)


def test_all_parameters_learn(vqa, nlvr):
    tokens = PIECES.encode(QUESTIONS)
    vqa.loss({
        "image": images(), "tokens": tokens, "answers": PIECES.encode(ANSWERS[:3]), "question": torch.arange(3),
        "weight": torch.ones(3),
    })["loss"].backward()  # fmt: skip
    nlvr.loss(
        {"left": images(), "right": images(seed=3), "tokens": tokens, "label": torch.tensor([0, 1, 0])}
    )["loss"].backward()
    for model in (vqa, nlvr):
        assert [name for name, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("which", ["vqa", "nlvr"])
def test_a_folder_gives_them_back(which, request, tmp_path):
    model = request.getfixturevalue(which)
    reverie.save(model, tmp_path)
    again = reverie.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_mistakes(vqa, nlvr):
    with pytest.raises(InputError, match="2 pictures and 3 questions"):
        vqa.answer(images(2), QUESTIONS)
    with pytest.raises(InputError, match=r"sampling is .search.: choose beam"):
        vqa.answer(images(), QUESTIONS, sampling="search")
    with pytest.raises(InputError, match="too long"):
        vqa.answer(images(), QUESTIONS, most=16)
    with pytest.raises(InputError, match="no answer"):
        vqa.answer(images(), QUESTIONS, answers=ANSWERS, top=0)
    with pytest.raises(InputError, match="3 left and 2 right"):
        nlvr.compare(images(), images(2), QUESTIONS)
    with pytest.raises(InputError, match="24 channels"):
        BlipVqa(BlipVqaConfig(image=IMAGE, text=TEXT, answer=dataclasses.replace(ANSWER, context_width=16)))
