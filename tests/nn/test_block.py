"""Blocks: the modulated one begins as the identity, and one vector per item is the same vector for every frame."""

import pytest
import torch

from reverie.nn.block import Block, ModulatedBlock, modulate, pick
from reverie.nn.mlp import ACTIVATIONS, Mlp, QuickGELU
from reverie.nn.positions import grid, rotary


def awake(block):
    """A block whose zero-initialised layers have been given weights."""
    generator = torch.Generator().manual_seed(3)
    for layer in (block.modulation[1], block.cross.out):
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    return block


@pytest.fixture
def parts():
    torch.manual_seed(0)
    block = ModulatedBlock(12, 2, context_width=10)
    x, context = torch.randn(2, 8, 12), torch.randn(2, 5, 10)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    return block, x, context, mask


def test_a_new_modulated_block_is_the_identity(parts):
    block, x, context, mask = parts
    assert block(x, torch.randn(2, 4, 12), context, mask, rotary=rotary(grid(2, 2, 2), 6)).equal(x)


def test_yet_it_learns_from_the_first_step(parts):
    block, x, context, mask = parts
    block(x, torch.randn(2, 1, 12), context, mask).square().sum().backward()
    assert block.modulation[1].weight.grad.abs().sum() > 0
    assert block.cross.out.weight.grad.abs().sum() > 0


def test_one_vector_is_the_same_vector_for_every_frame(parts):
    block, x, context, mask = parts
    block, vector = awake(block), torch.randn(2, 1, 12)
    out = block(x, vector, context, mask)
    for frames in (2, 4, 8):
        torch.testing.assert_close(block(x, vector.expand(2, frames, 12), context, mask), out)


def test_a_vector_modulates_its_own_frame(parts):
    """Without attention between frames, the vector of one frame is felt in that frame alone."""
    block, x, context, mask = parts
    block = awake(block)
    torch.nn.init.zeros_(block.attention.out.weight)
    vector = torch.randn(2, 4, 12)
    other = vector.clone()
    other[:, 2] += 1
    changed = (block(x, vector, context, mask) - block(x, other, context, mask)).abs().sum((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_hidden_context_changes_nothing(parts):
    block, x, context, mask = parts
    block, vector = awake(block), torch.randn(2, 1, 12)
    out = block(x, vector, context, mask)
    torch.testing.assert_close(block(x, vector, context.masked_fill(~mask[..., None], 50.0), mask), out)
    assert not torch.allclose(block(x, vector, context, None), out, atol=1e-3)


def test_modulate():
    x = torch.tensor([[[2.0, 3.0]]])
    assert modulate(x, torch.tensor(1.0), torch.tensor(0.5)).equal(torch.tensor([[[4.0, 5.5]]]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_plain_block_is_two_residuals(activation):
    torch.manual_seed(0)
    block = Block(8, 2, hidden=16, activation=activation)
    x = torch.randn(2, 5, 8)
    middle = x + block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    for layer in (block.attention.out, block.mlp.down):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    assert block(x).equal(x)


def test_a_causal_block_does_not_see_what_follows():
    torch.manual_seed(0)
    block, x = Block(8, 2), torch.randn(2, 6, 8)
    torch.testing.assert_close(block(x[:, :4], causal=True), block(x, causal=True)[:, :4])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_one_position_is_that_of_the_whole(causal, masked):
    torch.manual_seed(0)
    block, x, at = Block(8, 2), torch.randn(3, 6, 8, requires_grad=True), torch.tensor([0, 5, 2])
    mask = torch.rand(3, 1, 6, 6) < 0.5 if masked else None
    if masked:
        mask = mask | torch.eye(6, dtype=torch.bool)
    whole, one = pick(block(x, mask=mask, causal=causal), at), block(x, mask=mask, causal=causal, at=at)
    torch.testing.assert_close(one, whole)
    wanted = (x, *block.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(one.square().sum(), wanted),
        torch.autograd.grad(whole.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_packed_is_each_alone(causal, single):
    torch.manual_seed(0)
    block, runs = Block(8, 2), [(2, 3), (1, 4), (3, 1)]
    items = [torch.randn(1, length, 8) for count, length in runs for _ in range(count)]
    packed = torch.cat([item[0] for item in items])
    if single:
        at = torch.tensor([0, 2, 3, 0, 0, 0])
        alone = [block(item, causal=causal)[0, place] for item, place in zip(items, at, strict=True)]
        out = block(packed, causal=causal, runs=runs, at=at)
        torch.testing.assert_close(out, torch.stack(alone), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            pick(block(packed, causal=causal, runs=runs), at, runs=runs), out, atol=1e-5, rtol=1e-5
        )
    else:
        alone = [block(item, causal=causal)[0] for item in items]
        torch.testing.assert_close(
            block(packed, causal=causal, runs=runs), torch.cat(alone), atol=1e-5, rtol=1e-5
        )


def test_quick_gelu_is_written_otherwise_but_is_the_same():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_name_are_all_near_gelu(activation):
    x = torch.linspace(-4, 4, 81)
    close = (ACTIVATIONS[activation]()(x) - torch.nn.functional.gelu(x)).abs().max()
    assert close < 0.03
    assert Mlp(4, 6, activation=activation)(torch.zeros(1, 2, 4)).shape == (1, 2, 4)
