"""The loss of writing: against the formula, word by word."""

import pytest
import torch

from reverie.objectives.language import language_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_mean_over_real_words(smoothing):
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]]).bool()
    each = []
    for row in range(3):
        for place in range(1, 5):
            if mask[row, place]:
                log = logits[row, place - 1].log_softmax(0)
                each.append(-(1 - smoothing) * log[tokens[row, place]] - smoothing * log.mean())
    found = language_loss(logits, tokens, mask, smoothing=smoothing)
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_without_words_it_is_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = language_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
