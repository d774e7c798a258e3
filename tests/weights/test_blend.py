"""Weights between two ends: the ends are the ends, the middle is the mean, strangers are refused."""

import pytest
import torch

import reverie
from reverie.codecs.bpe import Bpe
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.nn.lora import add_lora
from reverie.systems.clip import Clip, ClipConfig
from reverie.weights.blend import blend


def small(seed, *, words="red green blue", width=16):
    tokenizer = Bpe.train([words] * 3, vocab=600)
    torch.manual_seed(seed)
    text = TextConfig(vocab=600, length=8, width=16, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=16, patch=8, width=width, depth=1, heads=1)
    return Clip(ClipConfig(image=image, text=text, width=8), tokenizer)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_between_the_ends(share):
    start, tuned = small(0), small(1)
    found = blend(start, tuned, share=share).state_dict()
    one, other = start.state_dict(), tuned.state_dict()
    for name, value in found.items():
        if share in (0.0, 1.0):
            assert torch.equal(value, (one, other)[int(share)][name]), name
        else:
            torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * other[name], msg=name)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), small(0).state_dict().values(), strict=True))


def test_strangers_and_shares_that_are_none_are_refused():
    for other, share, told in (
        (small(1), 1.5, "share is 1.5"),
        (small(1, width=32), 0.5, "other shape"),
        (small(1, words="one two three"), 0.5, "vocabular"),
    ):
        with pytest.raises(InputError, match=told):
            blend(small(0), other, share=share)


def test_the_command_writes_the_middle(tmp_path, capsys):
    from reverie.cli import main

    for seed in (0, 1):
        reverie.save(small(seed), tmp_path / str(seed))
    words = ["blend", *(str(tmp_path / name) for name in ("0", "1", "middle")), "--share", "0.25"]
    assert main(words) == 0
    assert "middle" in capsys.readouterr().out
    middle, expected = reverie.load(tmp_path / "middle"), blend(small(0), small(1), share=0.25)
    for name, value in expected.state_dict().items():
        assert torch.equal(middle.state_dict()[name], value), name


def test_adapters_are_not_saved_as_a_model(tmp_path):
    model = small(0)
    add_lora(model, ["image.*"], rank=1)
    with pytest.raises(InputError, match="adapters"):
        reverie.save(model, tmp_path / "model")
