"""The text tower: causal, and blind to all that follows the end token."""

import pytest
import torch

from reverie.encoders.text import Text, TextConfig

END = 49


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return Text(TextConfig(vocab=50, length=10, width=16, depth=2, heads=2, end=END)).eval()


TOKENS = torch.tensor([[48, 5, 6, END, 0, 0, 0, 0, 0, 0], [48, 7, 8, 9, 10, END, 0, 0, 0, 0]])


def test_the_first_end_token_ends(text):
    assert text.end_position(TOKENS).tolist() == [3, 5]
    twice = TOKENS.clone()
    twice[0, 4:] = END  # some tokenizers pad with it
    assert text.end_position(twice).tolist() == [3, 5]


@torch.no_grad()
def test_trimming_changes_nothing(text):
    short = text.trim(TOKENS)
    assert short.equal(TOKENS[:, :6])
    assert text.trim(short).equal(short)
    torch.testing.assert_close(text(short), text(TOKENS)[:, :6])
    torch.testing.assert_close(text.pool(text(short), short), text.pool(text(TOKENS), TOKENS))
    torch.testing.assert_close(text.pool(text(short), short)[1], text(short)[1, 5])


@torch.no_grad()
def test_what_follows_the_end_token_cannot_change_the_vector(text):
    vector = text.pool(text(TOKENS), TOKENS)
    other = TOKENS.clone()
    other[0, 4:], other[1, 6:] = torch.tensor([7, 8, 9, 10, 11, END]), 3
    torch.testing.assert_close(text.pool(text(other), other), vector)
    other[0, 1] = 20  # while each word before it does
    assert not torch.allclose(text.pool(text(other), other)[0], vector[0], atol=1e-3)
    torch.testing.assert_close(text.pool(text(other), other)[1], vector[1])


@torch.no_grad()
def test_a_text_s_features_do_not_depend_on_the_batch(text):
    both = text(TOKENS)
    for i in range(2):
        torch.testing.assert_close(text(TOKENS[i : i + 1])[0], both[i], atol=1e-5, rtol=1e-5)


def test_causality_by_gradient(text):
    for i in (0, 3, 9):
        x = text.embedding(TOKENS[:1]).detach().requires_grad_()
        hook = text.embedding.register_forward_hook(lambda module, args, out, x=x: x)
        try:
            (text(TOKENS[:1])[0, i] * torch.linspace(-1, 1, 16)).sum().backward()
        finally:
            hook.remove()
        assert (x.grad[0].abs().sum(-1) > 0).tolist() == [j <= i for j in range(10)]


@torch.no_grad()
def test_the_order_of_words_matters(text):
    swapped = TOKENS[:, [0, 2, 1, *range(3, 10)]]
    assert not torch.allclose(text.pool(text(swapped), swapped), text.pool(text(TOKENS), TOKENS), atol=1e-3)


@pytest.mark.parametrize(
    "kind", [{}, {"pool": "argmax"}, {"causal": False, "pool": "last"}, {"depth": 1}, {"depth": 0}]
)
def test_vectors_are_what_pooling_the_features_gives_gradients_too(kind):
    torch.manual_seed(0)
    text = Text(
        TextConfig(**{"vocab": 30, "length": 9, "width": 16, "depth": 3, "heads": 2, "end": 29} | kind)
    )
    text.double()
    tokens = torch.randint(1, 29, (7, 9))
    for row, place in zip(tokens, (8, 1, 4, 4, 2, 8, 1), strict=True):
        row[place], row[place + 1 :] = 29, 0
    found = []
    for vectors in (text.embed(tokens), text.pool(text(tokens), tokens)):
        text.zero_grad()
        (vectors * torch.arange(16)).square().sum().backward()
        found.append([vectors, *(p.grad.clone() for p in text.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)
