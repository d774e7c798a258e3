import pytest
import torch

from reverie.evals.embedding_map import principal, seats, tsne


def clusters(count: int, each: int, width: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    middles = 4 * torch.randn(count, width, generator=draw)
    own = torch.arange(count).repeat_interleave(each)
    return middles[own] + 0.5 * torch.randn(count * each, width, generator=draw), own


def test_principal_axes_keep_distances_and_are_in_order():
    vectors, _ = clusters(3, 9, width=6)
    found = principal(vectors, 6)
    far, there = torch.cdist(found, found), torch.cdist(vectors.double(), vectors.double())
    torch.testing.assert_close(far, there, atol=1e-6, rtol=1e-6)
    assert (found.std(0).diff() <= 0).all()
    torch.testing.assert_close(found.mean(0), torch.zeros(6).double())
    assert principal(vectors[:2], 30).shape == (2, 30)


def test_what_is_together_stays_together():
    vectors, own = clusters(4, 40)
    page = tsne(vectors, perplexity=12)
    far = torch.cdist(page, page)
    within = far[own[:, None] == own].max()
    between = far[own[:, None] != own].min()
    assert between > within / 4
    assert (own[far.fill_diagonal_(torch.inf).argmin(1)] == own).all()


def test_one_input_has_one_map():
    vectors, _ = clusters(3, 20)
    assert torch.equal(tsne(vectors, steps=60), tsne(vectors, steps=60))
    assert not torch.equal(tsne(vectors, steps=60), tsne(vectors, steps=60, seed=1))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 40])
def test_few_and_equal_vectors_have_places(count):
    for vectors in (
        torch.ones(count, 8),
        torch.zeros(count, 8),
        torch.randn(count, 8, generator=torch.Generator().manual_seed(1)),
        1e18 * torch.randn(count, 3, generator=torch.Generator().manual_seed(1)),
        torch.ones(count, 1).half(),
    ):
        page = tsne(vectors, steps=300)
        assert page.shape == (count, 2)
        assert page.isfinite().all()
        taken = seats(page, 7, 7)
        assert len(set(taken)) == count
        assert all(0 <= column < 7 and 0 <= row < 7 for column, row in taken)


def test_scale_does_not_matter():
    vectors, own = clusters(3, 15)
    for scale in (1e-6, 1e6):
        far = torch.cdist(page := tsne(scale * vectors, perplexity=5), page)
        assert (own[far.fill_diagonal_(torch.inf).argmin(1)] == own).all()


def test_seats_are_the_nearest_that_are_free():
    page = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.4]])
    assert seats(page, 3, 3) == [(0, 0), (2, 2), (1, 0), (0, 1)]
    assert seats(torch.zeros(1, 2), 5, 3) == [(2, 1)]
    assert len(set(seats(torch.zeros(9, 2), 3, 3))) == 9
