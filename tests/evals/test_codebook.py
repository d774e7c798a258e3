"""Usage and perplexity on codes whose answer is known."""

import pytest
import torch

from reverie.evals.codebook import used


def test_usage_and_perplexity():
    assert used(torch.arange(8).repeat(3), 8) == {"usage": 1.0, "perplexity": pytest.approx(8)}
    assert used(torch.zeros(5, 2, dtype=torch.long), 8) == {"usage": 1 / 8, "perplexity": pytest.approx(1)}
    assert used(torch.tensor([0, 1]), 4)["perplexity"] == pytest.approx(2)
