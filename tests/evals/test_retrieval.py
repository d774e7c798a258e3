"""Recall and search on embeddings whose answers are known, and against sorting everything."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.errors import InputError
from reverie.evals.retrieval import ranks, retrieval, search_topk


def same(images):
    return images


def axis(texts):
    """The text's number is its axis of twelve."""
    return torch.eye(12)[[int(text.split()[-1]) for text in texts]]


def test_perfect_retrieval_with_several_captions_for_each_image():
    captions = [["a 0", "the 0", "some 0"], ["a 1"], ["a 2", "the 2"]]
    result = retrieval(same, axis, torch.eye(12)[:3], captions, batch=2)
    for way in ("image_to_text", "text_to_image"):
        assert result[way]["recall@1"] == 1
        assert result[way]["recall@1_interval"] == (1, 1)
        assert result[way]["median_rank"] == 1
    assert (result["images"], result["texts"]) == (3, 6)


def test_each_way_counts_its_own_queries():
    """Image 0 has three captions of which one is right; image 1 has one, which is wrong."""
    captions = [["a 0", "a 5", "a 6"], ["a 7"]]
    images = torch.eye(12)[:2] + 0.1 * torch.eye(12)[[0, 5]]  # image 1 leans to "a 5" of image 0
    result = retrieval(same, axis, images, captions, ks=(1, 2))
    assert result["image_to_text"]["recall@1"] == 0.5  # any of its captions finds image 0
    # "a 0" finds image 0; "a 5" prefers image 1; "a 6" and "a 7" tie, which earns nothing at 1
    assert result["text_to_image"]["recall@1"] == 0.25
    assert result["text_to_image"]["recall@2"] == 1


@pytest.mark.parametrize(("k", "recall"), [(1, 1 / 11), (5, 5 / 11), (10, 10 / 11)])
def test_recall_counts_the_first_k(k, recall):
    """Query j has the right answer at place j + 1: all prefer image 0 to image 1 to image 2 and so on."""
    images = torch.linspace(1, 0.1, 11)[:, None]
    images = torch.cat([images, (1 - images**2).sqrt()], dim=1)
    captions = [[f"caption {i}"] for i in range(11)]
    result = retrieval(same, lambda texts: torch.tensor([[1.0, 0.0]]).repeat(len(texts), 1), images, captions)
    assert result["text_to_image"][f"recall@{k}"] == pytest.approx(recall)
    assert result["text_to_image"]["median_rank"] == 6
    assert result["image_to_text"][f"recall@{k}"] == 0  # to an image all texts are equal


def test_images_that_share_a_caption_all_answer_it():
    captions = [["a 0"], ["a 0"], ["a 1"]]
    images = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    result = retrieval(same, lambda texts: axis(texts)[:, :2], images, captions)
    assert result["text_to_image"]["recall@1"] == 1
    assert result["image_to_text"]["recall@1"] == 1


def test_equal_embeddings_earn_nothing():
    captions = [[f"caption {i}"] for i in range(20)]
    result = retrieval(same, lambda texts: torch.ones(len(texts), 3), torch.ones(20, 3), captions)
    for way in ("image_to_text", "text_to_image"):
        assert [result[way][f"recall@{k}"] for k in (1, 5, 10)] == [0, 0, 0]
        assert result[way]["median_rank"] == 20


def test_lengths_do_not_count():
    """Unit length makes each pair the best; by raw products the first image would win every query."""
    images = (torch.eye(12)[:4] + 0.1) * torch.tensor([[100.0], [1.0], [0.01], [7.0]])
    result = retrieval(same, lambda texts: 9 * axis(texts), images, [[f"a {i}"] for i in range(4)])
    assert result["text_to_image"]["recall@1"] == result["image_to_text"]["recall@1"] == 1


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_equal_counting_by_hand(data):
    """Small integers make ties common and products exact."""
    numbers = st.integers(-2, 2)
    width = 3
    rows = st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=9)
    queries = torch.tensor(data.draw(rows), dtype=torch.float)
    items = torch.tensor(data.draw(rows), dtype=torch.float)
    own = st.sets(st.integers(0, len(items) - 1), min_size=1)
    right = [sorted(data.draw(own)) for _ in queries]
    found = ranks(queries, items, right, block=data.draw(st.integers(1, 4)))
    for query, answers, rank in zip(queries, right, found.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query.tolist(), item, strict=True)) for item in items.tolist()]
        best = max(scores[i] for i in answers)
        assert rank == sum(scores[i] >= best for i in range(len(items)) if i not in answers)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_search_equals_sorting_everything_ties_included(data):
    seed, n, q = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 60)), data.draw(st.integers(1, 5))
    k, block = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (q, 3), generator=generator).float()
    items = torch.randint(-2, 3, (n, 3), generator=generator).float()
    scores, indices = search_topk(queries, items, k, block=block)
    expected, order = (queries @ items.T).sort(dim=1, descending=True, stable=True)
    assert scores.equal(expected[:, :k])
    assert indices.equal(order[:, :k])


def test_search_over_many_items():
    generator = torch.Generator().manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(20_000, 32, generator=generator), dim=1)
    queries = items[[5, 19_999, 7_000]]
    scores, indices = search_topk(queries, items, 50, block=3_000)
    assert indices[:, 0].tolist() == [5, 19_999, 7_000]
    expected, order = (queries @ items.T).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, expected[:, :50])
    assert (indices == order[:, :50]).double().mean() > 0.99  # equal but for rounding between block shapes


def test_search_reads_items_of_another_type():
    items = torch.eye(6, dtype=torch.float16)
    scores, indices = search_topk(torch.eye(6)[[4, 1]], items, 1, block=2)
    assert indices.tolist() == [[4], [1]]
    assert scores.dtype == torch.float32


def test_search_of_nothing_finds_nothing():
    scores, indices = search_topk(torch.ones(2, 3), torch.ones(0, 3), 5)
    assert scores.shape == indices.shape == (2, 0)
    assert search_topk(torch.ones(0, 3), torch.ones(4, 3), 2)[1].shape == (0, 2)


def test_mistakes_get_one_sentence():
    with pytest.raises(InputError, match="the same width"):
        search_topk(torch.ones(2, 3), torch.ones(5, 4), 1)
    with pytest.raises(InputError, match="k is 0"):
        search_topk(torch.ones(2, 3), torch.ones(5, 3), 0)
    for broken in (torch.tensor([[torch.nan, 1, 1]]), torch.tensor([[torch.inf, -torch.inf, 1]])):
        with pytest.raises(InputError, match="not numbers"):
            search_topk(torch.ones(2, 3), torch.cat([torch.ones(5, 3), broken]), 2)
    with pytest.raises(InputError, match="give each image its list"):
        retrieval(same, axis, torch.eye(12)[:2], [["a 0"]])
    with pytest.raises(InputError, match="captions of image 1 are \\[\\]"):
        retrieval(same, axis, torch.eye(12)[:2], [["a 0"], []])
    with pytest.raises(InputError, match="captions of image 0 are 'a 0'"):
        retrieval(same, axis, torch.eye(12)[:1], ["a 0"])
    with pytest.raises(InputError, match="not finite"):
        retrieval(same, axis, torch.full((1, 12), torch.nan), [["a 0"]])


def test_chance_is_what_random_orders_give():
    """Three images, of one, two and three captions: recall of the first k of all orders of the six texts."""
    captions = [["a"], ["b", "c"], ["d", "e", "f"]]
    vectors = {text: torch.eye(6)[i] for i, text in enumerate("abcdef")}
    found = retrieval(
        lambda some: some,
        lambda texts: torch.stack([vectors[t] for t in texts]),
        torch.eye(6)[[0, 1, 3]],
        captions,
    )
    own = [{0}, {1, 2}, {3, 4, 5}]
    for k in (1, 5):
        orders = list(itertools.permutations(range(6)))
        hits = sum(bool(mine & set(order[:k])) for order in orders for mine in own)
        assert found["image_to_text"][f"recall@{k}_chance"] == pytest.approx(hits / len(orders) / 3)
    assert found["image_to_text"]["recall@10_chance"] == 1
    assert found["text_to_image"]["recall@1_chance"] == pytest.approx(1 / 3)


def test_the_first_answers_are_those_of_the_search():
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(9, 4, generator=generator), dim=1)
    words = F.normalize(torch.randn(9, 4, generator=generator), dim=1)
    table = {str(i): words[i] for i in range(9)}
    found = retrieval(
        lambda some: some, lambda texts: torch.stack([table[t] for t in texts]), images,
        [[str(i)] for i in range(9)], shown=3, batch=2,
    )  # fmt: skip
    assert (
        found["image_to_text"]["first"] == (images @ words.T).argsort(dim=1, descending=True)[:, :3].tolist()
    )
    assert (
        found["text_to_image"]["first"] == (words @ images.T).argsort(dim=1, descending=True)[:, :3].tolist()
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_looking_again_orders_the_first_by_cosine_plus_look_and_leaves_the_others_behind(seed, rerank):
    """Against the authors' way: a matrix of -100, with cosine plus look where the cosine is among the first k."""
    generator = torch.Generator().manual_seed(seed)
    images, words = (F.normalize(torch.randn(n, 4, generator=generator), dim=-1) for n in (6, 7))
    look = 5 * torch.randn(6, 7, generator=generator)
    texts = [f"a {j}" for j in range(7)]
    captions = [[texts[i]] for i in range(5)] + [texts[5:]]
    found = retrieval(
        same, lambda some: words[[texts.index(text) for text in some]], images, captions, ks=(1, 3), shown=3, batch=2,
        again=lambda i, j: look[i, j], rerank=rerank,
    )  # fmt: skip
    cosine, owner = images @ words.T, [0, 1, 2, 3, 4, 5, 5]
    for way, plain, more in (("image_to_text", cosine, look), ("text_to_image", cosine.T, look.T)):
        whole = torch.full_like(plain, -100.0)
        place = plain.topk(min(rerank, plain.shape[1]), dim=1).indices
        whole.scatter_(1, place, (plain + more).gather(1, place))
        right = [[j for j in range(7) if owner[j] == i] for i in range(6)]
        right = right if way == "image_to_text" else [[own] for own in owner]
        for k in (1, 3):
            first = whole.argsort(dim=1, descending=True)[:, :k].tolist()
            hits = [bool({*own} & {*answers}) for own, answers in zip(first, right, strict=True)]
            if k <= rerank:  # beyond, the authors' order is any
                assert found[way][f"recall@{k}"] == pytest.approx(sum(hits) / len(hits))
        assert [own[:1] for own in found[way]["first"]] == whole.argmax(1, keepdim=True).tolist()
        rest = [
            [j for j in row if j not in own]
            for row, own in zip(found[way]["first"], place.tolist(), strict=True)
        ]
        for row, own in enumerate(rest):
            assert own == sorted(own, key=lambda j: -plain[row, j])
    plain = retrieval(
        same, lambda some: words[[texts.index(text) for text in some]], images, captions, ks=(1, 3), shown=3
    )
    assert found["before"] == {way: plain[way] for way in ("image_to_text", "text_to_image")}
    with pytest.raises(InputError, match="rerank is 0"):
        retrieval(same, axis, torch.eye(12)[:1], [["a 0"]], again=lambda i, j: look[i, j])
