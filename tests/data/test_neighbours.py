"""Approximate search: near the exact answer, kept in the user's cache, and only where faiss is."""

import pytest
import torch

from reverie.data import neighbours
from reverie.errors import InputError


def clustered(n: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(50, 16, generator=draw)
    rows = centres[torch.randint(50, (n,), generator=draw)] + 0.3 * torch.randn(n, 16, generator=draw)
    return torch.nn.functional.normalize(rows, dim=1)


def test_lists_find_what_exact_search_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vectors = clustered(3000)
    lists = neighbours.kept(vectors.half(), "name")
    scores, rows = lists.topk(vectors[:50], 10)
    true = (vectors[:50] @ vectors.T).topk(10).indices
    found = (rows[:, :, None] == true[:, None]).any(1).double().mean()
    assert found >= 0.9
    assert lists.recall >= neighbours.RECALL
    torch.testing.assert_close(scores, (vectors[:50, None] * vectors[rows]).sum(-1), atol=2e-3, rtol=0)
    again = neighbours.kept(vectors.half(), "name")
    assert torch.equal(again.topk(vectors[:50], 10)[1], rows)
    other = neighbours.kept(vectors[:2000].half(), "name")  # of another folder: built anew
    assert other.index.ntotal == 2000


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"reverie\[index\]"):
        neighbours.build(clustered(1000))


def test_few_vectors_need_no_lists():
    pytest.importorskip("faiss")
    with pytest.raises(InputError, match="exactly"):
        neighbours.build(clustered(10))
