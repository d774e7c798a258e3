"""What one step must predict leads where it shall; a student that does it has no loss."""

import torch

from reverie import rng
from reverie.objectives.distillation import one_step, step_loss
from reverie.processes.gaussian import Ddpm, Flow
from reverie.samplers.diffusion import euler


def test_the_target_leads_where_the_teacher_came():
    """Several steps of any teacher, and one Euler step with the target from the same place to the same place."""
    x = torch.randn(2, 3, 4, 4, generator=rng.generator(0, "x"), dtype=torch.float64)
    flow = Flow(shift=2.0).points(12)
    table = Ddpm().points(12, spacing="trailing")
    for points in (flow[:4], flow[3:7], flow[-4:], table[2:6], table[-3:]):
        after = euler(lambda x, point: torch.tanh(x) * (1 - point.sigma / 2), x, points)
        target = one_step(x, after, points[0], points[-1])
        once = euler(lambda x, point, target=target: target, x, (points[0], points[-1]))
        assert torch.allclose(once, after, atol=1e-9)
        assert step_loss(target, x, after, points[0], points[-1]) < 1e-18


def test_a_flow_is_judged_by_its_velocity():
    x, after, guess = torch.randn(3, 2, 3, 1, 4, 4, generator=rng.generator(0, "x"))
    now, then = Flow().points(4)[1:3]
    velocity = (x - guess) / now.t
    wanted = (x - after) / (now.t - then.t)
    assert torch.allclose(step_loss(guess, x, after, now, then), (velocity - wanted).square().mean())
    weight = torch.zeros(2, 1, 1, 1, 1)
    weight[0] = 1
    only = step_loss(guess[:1], x[:1], after[:1], now, then)
    assert torch.allclose(step_loss(guess, x, after, now, then, weight=weight), only)
