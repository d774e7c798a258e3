"""Blocks: the modulated one begins as the identity, and packed items are each alone."""

import pytest
import torch

from reverie.nn.attention import PackedContext
from reverie.nn.block import Block, ModulatedBlock, modulate, pick
from reverie.nn.mlp import ACTIVATIONS, Mlp, QuickGELU
from reverie.nn.positions import rotary


def awake(block):
    """A block whose zero-initialised layers have been given weights."""
    generator = torch.Generator().manual_seed(3)
    for layer in (block.modulation[1], block.cross.out):
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    return block


RUNS = ((2, 3), (1, 2))


@pytest.fixture
def parts():
    """A block, eight packed positions of two items of three and one of two, whose they are, and their words."""
    torch.manual_seed(0)
    block = ModulatedBlock(12, 2, context_width=10)
    x, context = torch.randn(8, 12), torch.randn(3, 5, 10)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True, False, True, False, False]])
    return block, x, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), context, mask


def test_a_new_modulated_block_is_the_identity(parts):
    block, x, rows, context, mask = parts
    turns = rotary(torch.arange(8)[:, None], 6)
    words = PackedContext.of(context, mask)
    assert block(x, torch.randn(3, 12), words, rows=rows, runs=RUNS, rotary=turns).equal(x)


def test_yet_it_learns_from_the_first_step(parts):
    block, x, rows, context, mask = parts
    block(
        x, torch.randn(3, 12), PackedContext.of(context, mask), rows=rows, runs=RUNS
    ).square().sum().backward()
    assert block.modulation[1].weight.grad.abs().sum() > 0
    assert block.cross.out.weight.grad.abs().sum() > 0


def test_a_packed_block_is_each_item_alone(parts):
    block, x, rows, context, mask = parts
    block, vector, turns = awake(block), torch.randn(3, 12), rotary(torch.rand(8, 1), 6)
    out = block(x, vector, PackedContext.of(context, mask), rows=rows, runs=RUNS, rotary=turns)
    for i in range(3):
        own = rows == i
        alone = block(
            x[own],
            vector[i : i + 1],
            PackedContext.of(context[i : i + 1, mask[i]], None),
            rows=torch.zeros(int(own.sum()), dtype=torch.long),
            runs=((1, int(own.sum())),),
            rotary=(turns[0][own], turns[1][own]),
        )
        torch.testing.assert_close(out[own], alone, atol=1e-5, rtol=1e-5)


def test_a_vector_modulates_its_own_rows(parts):
    """Without attention, a vector is felt where its row stands, as in a clip whose frames have times of their own."""
    block, x, _, context, mask = parts
    block = awake(block)
    torch.nn.init.zeros_(block.attention.out.weight)
    rows, vector = torch.tensor([0, 3, 0, 1, 2, 2, 1, 3]), torch.randn(4, 12)
    other = vector.clone()
    other[2] += 1
    words = PackedContext.of(context, mask)
    before, after = (block(x, one, words, rows=rows, runs=RUNS) for one in (vector, other))
    assert ((before - after).abs().sum(-1) > 1e-6).tolist() == (rows == 2).tolist()


def test_hidden_context_changes_nothing(parts):
    block, x, rows, context, mask = parts
    block, vector = awake(block), torch.randn(3, 12)

    def out(words):
        return block(x, vector, words, rows=rows, runs=RUNS)

    packed = out(PackedContext.of(context, mask))
    for filled in (context, context.masked_fill(~mask[..., None], 50.0)):
        padded = PackedContext(filled.flatten(0, 1), None, mask)
        torch.testing.assert_close(out(padded), packed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out(PackedContext.of(context, None)), packed, atol=1e-3)


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
