"""The probe against Newton's method, and the searches on features whose answers are known."""

import pytest
import torch

from reverie.errors import InputError
from reverie.evals.probe import few_shot, fit, search


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def lumps(classes=4, each=12, width=6, spread=0.6, seed=0):
    """Points around one centre for each class."""
    labels = torch.arange(classes).repeat(each)
    return normal(classes, width, seed=9)[labels] + spread * normal(len(labels), width, seed=seed), labels


def newton(x, y, classes, strength):
    """The same minimum by Newton's method on the whole Hessian, backed off until the loss falls."""
    n, d = x.shape
    one_hot = torch.eye(classes, dtype=x.dtype)[y]

    def loss(parameters):
        weight, bias = parameters[: classes * d].view(classes, d), parameters[classes * d :]
        fitted = -((x @ weight.T + bias).log_softmax(1) * one_hot).sum()
        return strength * fitted + 0.5 * weight.square().sum()

    at = torch.zeros(classes * d + classes, dtype=x.dtype)
    for _ in range(25):
        slope = torch.autograd.functional.jacobian(loss, at)
        step = torch.linalg.pinv(torch.autograd.functional.hessian(loss, at), hermitian=True) @ slope
        size = 1.0
        while loss(at - size * step) > loss(at) and size > 1e-8:
            size /= 2
        at = at - size * step
    bias = at[classes * d :]
    return at[: classes * d].view(classes, d), bias - bias.mean()


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_the_fit_is_the_optimum(strength):
    x, y = lumps(classes=3, each=9, width=4, spread=1.5)
    found = fit(x, y, classes=3, strength=strength)
    weight, bias = newton(x, y, 3, strength)
    torch.testing.assert_close(found.weight, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bias, bias, atol=1e-4, rtol=0)
    torch.testing.assert_close(found(x), x @ weight.T + bias, atol=1e-3, rtol=0)
    assert found.slope < 1e-6


def test_another_start_ends_at_the_same_place():
    x, y = lumps(spread=2)
    cold = fit(x, y, classes=4, strength=1.0)
    warm = fit(x, y, classes=4, strength=1.0, start=fit(x, y, classes=4, strength=1e3))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-5, rtol=0)


def test_without_strength_the_answer_is_how_often_each_class_occurs():
    x = normal(40, 3)
    y = torch.tensor([0] * 30 + [1] * 10)
    found = fit(x, y, classes=2, strength=1e-9)
    assert found.weight.abs().max() < 1e-6
    torch.testing.assert_close(
        found(x).softmax(1).mean(0), torch.tensor([0.75, 0.25], dtype=torch.double), atol=1e-4, rtol=0
    )


def test_the_search_halves_the_interval_around_the_best():
    x, y = lumps(each=40, spread=1.5)
    strength, tried = search(x, y, classes=4)
    powers = [round(8 * torch.tensor(each["strength"]).log10().item()) for each in tried]
    assert {-48, -32, -16, 0, 16, 32, 48} <= set(powers)  # eighths of a decade
    assert len(powers) == len(set(powers)) <= 15
    best = max(tried, key=lambda each: (each["right"], -each["nll"]))
    assert strength == best["strength"]
    place = powers.index(round(8 * torch.tensor(strength).log10().item()))
    assert any(abs(powers[place] - other) == 1 for other in powers)


def test_a_class_of_one_example_is_not_given_up():
    """It cannot be validated on; naming everything after the other class is right there, but unlikely."""
    x = torch.tensor([[1.0, 0.01], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([0, 1, 1, 1, 1])
    strength, tried = search(x, y, classes=2)
    assert {each["right"] for each in tried} == {1}
    assert (fit(x, y, classes=2, strength=strength)(x).argmax(1) == y).all()


def test_the_search_does_not_look_at_what_it_validates_on():
    """With labels by chance a probe that had seen the validation part would name it; one that had not cannot."""
    y = torch.arange(2).repeat(100)
    _, tried = search(normal(200, 150), y, classes=2)
    assert all(each["right"] < 0.75 for each in tried)
    assert search(normal(2, 3), torch.tensor([0, 1]), classes=2) == (1.0, [])


def test_few_shot_draws_k_of_each_class_and_ends_with_all():
    x, y = lumps(each=6)
    x, y = x[:-1], y[:-1]  # the last class has five
    test_x, test_y = lumps(each=20, seed=5)
    found = few_shot(x, y, test_x, test_y, classes=4, shots=(2, 1, 8, 16), draws=3)
    assert [each["shots"] for each in found] == [1, 2, 8]  # 16 would be the same again
    assert [each["examples"] for each in found] == [4, 8, 23]
    assert [each["short"] for each in found] == [0, 0, 4]
    assert all(len(each["right"]) == 3 for each in found)
    one, _, whole = found
    assert len(set(one["right"])) > 1  # other draws, other examples
    assert whole["spread"] == pytest.approx(0, abs=1e-6)  # all of them each time
    probe = fit(x, y, classes=4, strength=whole["strength"])
    assert whole["mean"] == pytest.approx((probe(test_x).argmax(1) == test_y).double().mean().item())
    values = torch.tensor(one["right"])
    assert one["mean"] == pytest.approx(values.mean().item())
    assert one["spread"] == pytest.approx(((values - values.mean()) ** 2).sum().div(2).sqrt().item())
    assert few_shot(x, y, test_x, test_y, classes=4, shots=(1,), draws=3)[0] == one


def test_one_shot_strongly_regularised_ranks_by_the_examples():
    """To first order in the strength W = strength (x - m) and b = -W m, with m the mean: logits (x - m) (test - m)."""
    x, test = normal(5, 8), normal(50, 8, seed=1)
    probe = fit(x, torch.arange(5), classes=5, strength=1e-5)
    wanted = 1e-5 * (test - x.mean(0)) @ (x - x.mean(0)).T
    torch.testing.assert_close(
        probe(test) - probe(test).mean(1, keepdim=True),
        wanted - wanted.mean(1, keepdim=True),
        atol=1e-8,
        rtol=1e-3,
    )


def test_mistakes_are_one_sentence():
    x, y = lumps()
    for call in (
        lambda: fit(x, y, classes=3, strength=1.0),
        lambda: fit(x, y, classes=4, strength=0.0),
        lambda: fit(x[:3], y, classes=4, strength=1.0),
        lambda: fit(x * torch.nan, y, classes=4, strength=1.0),
        lambda: few_shot(x, y, x, y, classes=4, shots=(0,)),
        lambda: few_shot(x, y, x, y, classes=5),
        lambda: few_shot(x, y, x, y, classes=4, draws=0),
    ):
        with pytest.raises(InputError):
            call()
