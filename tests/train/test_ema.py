import pytest
import torch
from torch import nn

from reverie.train import Ema


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_the_average_follows_its_formula():
    model = nn.Linear(3, 2)
    fill(model, 1.0)
    ema = Ema(model, decay=0.9, warmup=False)
    fill(model, 2.0)
    ema.update(model)
    fill(model, 4.0)
    ema.update(model)
    expected = 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 3), expected))


def test_the_decay_warms_up():
    model = nn.Linear(1, 1)
    fill(model, 0.0)
    ema = Ema(model, decay=0.5)
    fill(model, 1.0)
    expected = 0.0
    for n in range(12):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        torch.testing.assert_close(ema.average["bias"], torch.tensor([expected]))


def test_a_bf16_model_is_averaged_in_fp32():
    model = nn.Linear(1, 1).bfloat16()
    fill(model, 1.0)
    ema = Ema(model, decay=0.999, warmup=False)
    fill(model, 1.0078125)  # the next bf16 number
    ema.update(model)
    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"].item(), 1 + 0.0078125 * 0.001, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_gives_the_weights_back_bit_for_bit_even_after_an_error(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5).requires_grad_(False)).to(dtype)
    ema = Ema(model, decay=0.5, warmup=False)
    assert set(ema.average) == {"0.weight", "0.bias"}
    with torch.no_grad():
        model[0].weight.mul_(1.7)
    ema.update(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate() -> None:
        torch.testing.assert_close(model[0].weight.float(), ema.average["0.weight"], rtol=1e-2, atol=0)
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert model[0].weight.requires_grad
        raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied(model):
        evaluate()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
