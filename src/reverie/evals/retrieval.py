"""Retrieval between images and texts: recall at k both ways, and exact top-k search.

Protocol: Karpathy and Fei-Fei 2015 (1412.2306), as CLIP reports it. An image finds its captions when any one of them
is among the first k; every caption is a query of its own. Images that share a caption word for word all answer it. A
wrong answer that ties with the best right one counts as before it, so equal embeddings earn nothing.
The evaluator is given two functions, `embed_image(batch of images) -> b d` and `embed_text(list of str) -> b d`.

Re-ranking (BLIP, 2201.12086, as its authors evaluate): the first k answers by the embeddings are looked at again, each
beside the query, and ordered by cosine plus what that look says (the logit of a match); the others stay behind them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.errors import InputError
from reverie.evals.interval import bootstrap


@torch.no_grad()
def retrieval(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Tensor | Sequence[Any],
    captions: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    shown: int = 5,
    batch: int = 256,
    again: Callable[[list[int], list[int]], Tensor] | None = None,
    rerank: int = 0,
) -> dict[str, Any]:
    """Recall of `images` (anything that slices, n long) and their `captions` (one or more for each image).

    Returns JSON-ready `{"image_to_text": way, "text_to_image": way, "images": n, "texts": m}` where a way holds
    `recall@k`, its 95 % bootstrap interval `recall@k_interval` and what guessing gives `recall@k_chance` for each k,
    `median_rank` (1 is the best), and `first`: of each query the `shown` first answers, as indices.

    again: indices of images and of texts, i with i -> how well they belong together; with it the first `rerank` answers
    of each query are ordered anew, and the ways as they were stand under "before".
    """
    if len(captions) != len(images) or not len(images):
        raise InputError(
            f"{len(images)} images and {len(captions)} lists of captions: give each image its list"
        )
    for i, own in enumerate(captions):
        if isinstance(own, str) or not own:
            raise InputError(f"the captions of image {i} are {own!r}: give a list with at least one text")
    texts = [text for own in captions for text in own]
    owners: dict[str, set[int]] = defaultdict(set)  # text -> the images that have it
    places: dict[str, list[int]] = defaultdict(list)  # text -> where it stands among the texts
    for i, own in enumerate(captions):
        for text in own:
            owners[text].add(i)
    for j, text in enumerate(texts):
        places[text].append(j)
    image = torch.cat([_unit(embed_image(images[i : i + batch])) for i in range(0, len(images), batch)])
    words = torch.cat([_unit(embed_text(texts[j : j + batch])) for j in range(0, len(texts), batch)])
    right_texts = [sorted({j for caption in own for j in places[caption]}) for own in captions]
    right_images = [sorted(owners[caption]) for caption in texts]
    counts = {"images": len(images), "texts": len(texts)}
    plain = {
        "image_to_text": _way(image, words, right_texts, ks, shown, batch),
        "text_to_image": _way(words, image, right_images, ks, shown, batch),
    }
    if again is None:
        return plain | counts
    if rerank < 1:
        raise InputError(f"rerank is {rerank}: look at one answer again at least.")
    look = again

    def turned(texts: list[int], images: list[int]) -> Tensor:
        return look(images, texts)

    return {
        "image_to_text": _way(image, words, right_texts, ks, shown, batch, look, rerank),
        "text_to_image": _way(words, image, right_images, ks, shown, batch, turned, rerank),
        "before": plain,
        "rerank": rerank,
    } | counts


def ranks(queries: Tensor, items: Tensor, right: Sequence[Sequence[int]], *, block: int = 256) -> Tensor:
    """For each query (`q d`) how many wrong items (`n d`) come before its best right one: int64 `q`, 0 is the best.

    `right[i]` holds the indices of the items that answer query i, at least one.
    """
    assert len(right) == len(queries), (len(right), len(queries))
    found = [
        _ranks(queries[i : i + block] @ items.T, right[i : i + block], i)
        for i in range(0, len(queries), block)
    ]
    return torch.cat(found)


def _ranks(scores: Tensor, right: Sequence[Sequence[int]], first: int) -> Tensor:
    """Of the queries from number `first` on, by their scores `q n`."""
    if not scores.isfinite().all():
        raise InputError(
            f"some scores of queries {first} to {first + len(scores) - 1} are not finite: the model is"
            " broken, or was trained with too high a learning rate"
        )
    answers = torch.zeros_like(scores, dtype=torch.bool)
    for row, own in zip(answers, right, strict=True):
        row[list(own)] = True
    best = scores.masked_fill(~answers, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~answers).sum(dim=1).cpu()


@torch.no_grad()
def search_topk(queries: Tensor, items: Tensor, k: int, *, block: int = 16_384) -> tuple[Tensor, Tensor]:
    """The `min(k, n)` best of `items` (`n d`) for each of `queries` (`q d`): scores and indices `q k`, best first.

    Exact: what sorting all dot products gives, the lower index first among equals, in memory for `block` items at a
    time. Items may be of another dtype or on another device than the queries, which set where the work is done.
    """
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise InputError(
            f"queries of shape {list(queries.shape)} cannot search items of shape {list(items.shape)}:"
            " both need two axes and the same width"
        )
    if k < 1:
        raise InputError(f"k is {k}: ask for at least one result")
    scores = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    alike = items.dtype == queries.dtype and items.device == queries.device
    # one buffer for all blocks: fresh memory for each would cost ten times the conversion
    room = None if alike else queries.new_empty(min(block, len(items)), items.shape[1])
    for start in range(0, len(items), block):
        own = items[start : start + block]
        part = queries @ (own if room is None else room[: len(own)].copy_(own)).T
        place = _top(part, min(k, part.shape[1]))
        # the earlier items stand first, so a stable sort keeps the lower index first among equals
        scores, order = torch.cat([scores, part.gather(1, place)], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        indices = torch.cat([indices, place + start], dim=1).gather(1, order)
        scores, indices = scores[:, :k], indices[:, :k]
    return scores, indices


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices `q k` of the k largest in each row, best first, the lower index first among equals (topk picks any)."""
    least, place = scores.topk(k, dim=1)
    if least.isnan().any():  # topk puts NaN first, so none can hide
        raise InputError(
            "some scores are not numbers: the embeddings are broken; delete where they are kept (.reverie) and embed"
            " again"
        )
    least = least[:, -1:]
    if ((scores >= least).sum(dim=1) > k).any():  # more than k share the last place
        above, equal = scores > least, scores == least
        room = k - above.sum(dim=1, keepdim=True)
        place = (above | (equal & (equal.cumsum(dim=1) <= room))).nonzero()[:, 1].view(len(scores), k)
    place = place.sort(dim=1).values
    return place.gather(1, scores.gather(1, place).sort(dim=1, descending=True, stable=True).indices)


def _unit(embedding: Tensor) -> Tensor:
    return F.normalize(embedding.float(), dim=-1)


def _way(
    queries: Tensor, items: Tensor, right: Sequence[Sequence[int]], ks: Sequence[int], shown: int, batch: int,
    again: Callable[[list[int], list[int]], Tensor] | None = None, rerank: int = 0,
) -> dict[str, Any]:  # fmt: skip
    places, first = [], []
    for i in range(0, len(queries), batch):
        scores = queries[i : i + batch] @ items.T
        if again is not None:
            scores = _reranked(scores, i, again, rerank)
        places.append(_ranks(scores, right[i : i + batch], i))
        first.append(_top(scores, min(shown, scores.shape[1])).cpu())
    rank = torch.cat(places)
    answers = Counter(len(own) for own in right)
    result: dict[str, Any] = {}
    for k in ks:
        hit = (rank < k).double()
        missed = sum(
            times * math.comb(len(items) - own, k) / math.comb(len(items), k)
            for own, times in answers.items()
            if k <= len(items)
        )
        result |= {
            f"recall@{k}": hit.mean().item(),
            f"recall@{k}_interval": bootstrap(hit),
            f"recall@{k}_chance": 1 - missed / len(right),
        }
    return result | {"median_rank": rank.median().item() + 1, "first": torch.cat(first).tolist()}


def _reranked(
    scores: Tensor, first: int, again: Callable[[list[int], list[int]], Tensor], rerank: int
) -> Tensor:
    """Scores `q n` of the queries from number `first` on, with the `rerank` best of each looked at again: these gain
    what the look says, and stay before the others, which keep their order."""
    scores = scores.double()
    place = _top(scores, min(rerank, scores.shape[1]))
    seen = scores.gather(1, place)
    for row, own in enumerate(place.tolist()):
        seen[row] += again([first + row] * len(own), own).to(seen)
    others = scores - scores.amax(dim=1, keepdim=True) + seen.amin(dim=1, keepdim=True) - 1
    return others.scatter(1, place, seen)
