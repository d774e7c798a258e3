"""Writing token by token gives what reading the whole text gives."""

import pytest
import torch

from reverie.encoders.med import Med, MedConfig
from reverie.errors import InputError

CONFIG = MedConfig(vocab=40, length=12, width=16, depth=3, heads=2, hidden=32, context_width=10)


def _parts(masked: bool = False):
    torch.manual_seed(0)
    med = Med(CONFIG).eval().double()
    for parameter in med.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    context = torch.randn(3, 5, 10, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]]) if masked else None
    return med, context, mask, torch.randint(6, 40, (3, 9))


@pytest.mark.parametrize("steps", [(9,), (1,) * 9, (4, 1, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_is_uncached(steps, masked):
    med, context, mask, tokens = _parts(masked)
    whole = med.logits(tokens, context=context, context_mask=mask)
    writer, at = med.writer(context, context_mask=mask, most=9), 0
    for n in steps:
        found = writer(tokens[:, at : at + n])
        at += n
        assert torch.allclose(found, whole[:, at - 1], atol=1e-10)


def test_any_order_of_rows():
    med, context, _, tokens = _parts()
    writer, owners = med.writer(context), torch.arange(3)
    writer(tokens[:, :2])
    at = 2
    for rows in ([0, 0, 1, 1, 2, 2], [5, 0, 3, 3, 2, 2, 1], [0, 1, 2, 3, 4, 5, 6], [6, 2], [1, 1, 0]):
        rows = torch.tensor(rows)
        writer.select(rows)
        owners, tokens = owners[rows], tokens[rows]
        found = writer(tokens[:, at : at + 1])
        at += 1
        whole = med.logits(tokens[:, :at], context=context[owners])[:, -1]
        assert torch.allclose(found, whole, atol=1e-10)


def test_several_texts_of_a_picture():
    med, context, _, _ = _parts()
    tokens = torch.randint(6, 40, (6, 3))
    whole = med.logits(tokens, context=context.repeat_interleave(2, 0))[:, -1]
    assert torch.allclose(med.writer(context, rows=2)(tokens), whole, atol=1e-10)


def test_no_more_tokens_than_positions():
    med, context, _, _ = _parts()
    with pytest.raises(InputError, match="13 tokens"):
        med.writer(context, most=13)
