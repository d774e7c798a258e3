"""Transformers over words and codes: causality, decoding one code at a time, and the paper's size."""

import pytest
import torch

from reverie.backbones.code_transformer import CausalCodes, CodeTransformerConfig, MaskedCodes, padded
from reverie.errors import InputError

SMALL = {
    "words": 50,
    "length": 5,
    "vocab": 12,
    "rows": 4,
    "columns": 3,
    "width": 32,
    "depth": 4,
    "heads": 2,
    "kernel": 3,
}


def asked(count=2):
    torch.manual_seed(0)
    return torch.randint(50, (count, 5)), torch.randint(12, (count, 12))


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_code_by_code_is_all_at_once(attention):
    network = CausalCodes(CodeTransformerConfig(**SMALL, attention=attention)).eval()
    tokens, codes = asked()
    with torch.no_grad():
        words, wanted = network(tokens, codes)
        writing = network.begin(tokens)
        found = [writing(codes[:, :0]), *(writing(codes[:, i : i + 1]) for i in range(11))]
        torch.testing.assert_close(torch.stack(found, 1), wanted, atol=1e-5, rtol=1e-4)
        several = network.begin(tokens)
        torch.testing.assert_close(several(codes[:, :7]), wanted[:, 7], atol=1e-5, rtol=1e-4)
        several.select(torch.tensor([1, 1, 0]))
        again = several(codes[[1, 1, 0], 7:8])
        torch.testing.assert_close(again, wanted[[1, 1, 0], 8], atol=1e-5, rtol=1e-4)
    assert words.shape == (2, 4, 50)


def test_nothing_sees_what_comes_later():
    network = CausalCodes(CodeTransformerConfig(**SMALL)).eval()
    tokens, codes = asked()
    with torch.no_grad():
        words, said = network(tokens, codes)
        for place in range(12):
            other = codes.clone()
            other[:, place:] = (other[:, place:] + 1) % 12
            same_words, changed = network(tokens, other)
            assert torch.equal(same_words, words)
            torch.testing.assert_close(changed[:, : place + 1], said[:, : place + 1])
        other = tokens.clone()
        other[:, 3] += 1
        assert torch.equal(network(other % 50, codes)[0][:, :3], words[:, :3])


def test_padding_is_a_token_of_its_own_at_each_position():
    tokens = torch.tensor([[7, 8, 9, 0, 0]])
    real = torch.tensor([[True, True, True, False, False]])
    assert padded(tokens, real, words=50).tolist() == [[7, 8, 9, 53, 54]]


def test_what_is_hidden_is_not_seen_and_all_else_is():
    network = MaskedCodes(CodeTransformerConfig(**SMALL)).eval()
    tokens, codes = asked(1)
    away = torch.zeros(1, 12, dtype=torch.bool)
    away[0, 4] = True
    with torch.no_grad():
        said = network(tokens, codes, away)
        other = codes.clone()
        other[0, 4] = (other[0, 4] + 1) % 12
        assert torch.equal(network(tokens, other, away), said)
        other[0, 11] = (other[0, 11] + 1) % 12
        assert not torch.allclose(network(tokens, other, away)[0, 4], said[0, 4])


def test_the_paper_s_size():
    config = CodeTransformerConfig()
    with torch.device("meta"):
        network = CausalCodes(config)
    d, words, codes = 3968, 16_384, 8192
    block = 12 * d * d + 13 * d  # four products with their biases, two norms
    entrance = (words + 256 + 256 + codes + 32 + 32) * d
    heads = (d + 1) * (words + codes) + 2 * d
    assert sum(p.numel() for p in network.parameters()) == 64 * block + entrance + heads == 12_292_833_024
    assert config.width // config.heads == 64


@pytest.mark.parametrize(
    ("wrong", "said"), [({"width": 33}, "width 33 is no multiple"), ({"kernel": 4}, "kernel 4 has no middle"),
                        ({"rows": 0}, "rows is 0"), ({"length": 1}, "no room")]
)  # fmt: skip
def test_sizes_that_cannot_be(wrong, said):
    with pytest.raises(InputError, match=said):
        CodeTransformerConfig(**SMALL | wrong)
