"""DALL-E and MaskGIT: what they learn from, what they draw, and what they refuse."""

import dataclasses
import warnings

import pytest
import torch

import reverie
from reverie import rng
from reverie.backbones.code_transformer import CodeTransformerConfig
from reverie.codecs.bpe import Bpe
from reverie.codecs.dvae import DvaeConfig
from reverie.codecs.vq import VqConfig
from reverie.errors import InputError
from reverie.samplers.autoregressive import draw_codes
from reverie.systems.dalle import Dalle, DalleConfig
from reverie.systems.maskgit import MaskGit, MaskGitConfig

BACKBONE = CodeTransformerConfig(
    words=600, length=8, vocab=32, rows=4, columns=4, width=32, depth=3, heads=2, kernel=3
)
DVAE = DvaeConfig(vocab=32, width=8, groups=2, depth=1, begin=8)
VQ = VqConfig(vocab=32, dim=4, channels=8, widths=(8, 8), depth=1, groups=4, attention=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Bpe.train(["a red ball", "a blue cube", "two green balls"] * 3, vocab=600)


@pytest.fixture(params=["dalle", "maskgit"])
def model(request, tokenizer):
    return build(request.param, tokenizer)


def build(name, tokenizer, **more):
    torch.manual_seed(0)
    config, system = (DalleConfig, Dalle) if name == "dalle" else (MaskGitConfig, MaskGit)
    codec = DVAE if name == "dalle" else VQ
    plain = {} if name == "dalle" else {"smoothing": 0.0}
    made = system(config(backbone=BACKBONE, codec=codec, **plain, **more), tokenizer)
    for parameter in made.backbone.parameters():  # so that codes differ
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def batch_of(model, count=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(32, (count, 4, 4), generator=generator),
        "tokens": model.read(["a red ball", "two green balls"] * (count // 2)),
        "order": torch.rand(count, 16, generator=generator),
        "uniform": torch.rand(count, generator=generator),
    }


def test_it_learns_one_batch_by_heart(model):
    batch = batch_of(model)
    model.train()
    begun = float(model.loss(batch)["loss"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.5 * begun
    assert all(p.grad is None for p in model.codec.parameters())


def test_the_losses_count_an_eighth_and_seven_eighths(tokenizer):
    model = build("dalle", tokenizer)
    found = model.loss(batch_of(model))
    wanted = found["words"] / 8 + found["codes"] * 7 / 8
    torch.testing.assert_close(found["loss"].detach(), wanted)


def test_words_beyond_the_end_are_not_learnt(tokenizer):
    model = build("dalle", tokenizer)
    batch = batch_of(model)
    silent = batch | {"tokens": model.silence(4)}
    assert float(model.loss(silent)["words"]) == 0
    assert float(model.loss(silent)["codes"]) > 0


def test_a_batch_is_its_items_and_a_seed_the_same_picture(model):
    prompts = ["a red ball", "a blue cube", "a red ball"]
    images = model.generate_image(prompts, seed=3, guidance=1.5)
    assert images.shape == (3, 3, *model.size)
    assert images.abs().max() <= 1
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(model.generate_image([prompt], seed=3 + i, guidance=1.5)[0], images[i])
    assert not torch.equal(images[0], images[2])


def test_the_upper_part_stays(model):
    given = torch.rand(3, 8, 8) * 2 - 1
    codes = model.encode(given[None])
    drawn = model.generate_image(["a red ball"] * 2, given=given, keep=4)
    wanted = model.decode(codes.flatten(1))  # what the codec keeps of it
    assert drawn.shape == (2, 3, 8, 8)
    again = model.generate_image(["a red ball"], given=given, keep=8)
    torch.testing.assert_close(again, wanted)


def test_saved_and_loaded_it_draws_the_same(model, tmp_path):
    again = reverie.load(reverie.save(model, tmp_path / "model"))
    images = model.generate_image(["a blue cube"], seed=5)
    torch.testing.assert_close(again.generate_image(["a blue cube"], seed=5), images)


def test_a_prompt_that_is_too_long_is_cut_and_shown_or_refused(model):
    long = "a red ball " * 9
    with pytest.warns(UserWarning, match="does not fit into 8, and ends after '.*ball"):
        model.generate_image([long])
    with pytest.raises(InputError, match="does not fit into 8: it would end after"):
        model.generate_image([long], too_long="refuse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate_image(["a red ball"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompts": "text"}, "give a list of prompts"),
        ({"prompts": []}, "nothing to draw"),
        ({"size": (9, 8)}, r"size \(9, 8\) cannot be drawn: this model draws 8 8 alone"),
        ({"seed": [1, 2]}, "does not go with 1 prompts"),
        ({"guidance": -1}, "guidance is -1"),
        ({"temperature": 0}, "temperature 0"),
        ({"given": torch.zeros(3, 16, 8)}, "a picture of 8 x 16 pixels was given"),
        ({"given": torch.zeros(3, 8, 8), "keep": 3}, "keep is 3: give pixels from 2 to 8, a multiple of 2"),
        ({"keep": 4}, "there is no picture to keep of"),
        ({"too_long": "no"}, "too_long is 'no'"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(model, asked, said):
    with pytest.raises(InputError, match=said):
        model.generate_image(**{"prompts": ["a red ball"]} | asked)


def test_a_codec_of_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="the codec has 33 codes and the network writes 32"):
        DalleConfig(backbone=BACKBONE, codec=dataclasses.replace(DVAE, vocab=33))


def test_without_words_guidance_changes_nothing(model):
    images = [model.generate_image(["a red ball"], guidance=g, seed=1) for g in (0.0, 0.0)]
    torch.testing.assert_close(*images)
    silent = model.silence(1)
    assert silent.min() >= BACKBONE.words


def test_codes_are_drawn_as_the_network_says():
    """A decoder whose odds are known; top-k and nucleus leave the others out."""
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])

    class Known:
        def __call__(self, codes):
            return odds.log().expand(len(codes), -1)

        def select(self, rows):
            raise AssertionError

    def shares(**more):
        start = torch.zeros(40, 0, dtype=torch.long)
        codes = draw_codes(
            Known(), start, count=200, generators=[rng.generator(i) for i in range(40)], **more
        )
        return torch.bincount(codes.flatten(), minlength=4) / codes.numel()

    assert (shares() - odds).abs().max() < 0.02
    assert (shares(top=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.02
    assert (shares(p=0.8) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.02
    assert shares(top=1).tolist() == [1, 0, 0, 0]
    assert shares(temperature=0.05)[0] > 0.99
    with pytest.raises(InputError, match="top 0"):
        shares(top=0)
