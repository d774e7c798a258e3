"""The tower of native sizes: a pack is its pictures one by one, and what is dropped is not computed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reverie.encoders.navit import SIZES, Navit, NavitConfig
from reverie.errors import InputError
from reverie.rng import generator

SMALL = NavitConfig(patch=4, area=24 * 24, width=32, depth=2, heads=2)
SHAPES = [(8, 12), (24, 24), (4, 4), (12, 8), (8, 12), (4, 40), (20, 16), (16, 20)]
near = {"atol": 2e-5, "rtol": 1e-4}


def tower(**changes) -> Navit:
    torch.manual_seed(0)
    navit = Navit(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():  # positions and norms that matter
        for name, parameter in navit.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return navit


def pictures(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn(3, h, w, generator=generator(seed, "p", i)) for i, (h, w) in enumerate(SHAPES)]


def some(images: list[torch.Tensor], share: float = 0.5) -> list[torch.Tensor]:
    """Which patches of each stay."""
    found = []
    for i, image in enumerate(images):
        n = image.shape[1] * image.shape[2] // 16
        found.append(torch.randperm(n, generator=generator(1, "k", i))[: math.ceil(n * share)].sort().values)
    return found


def gradients(navit: Navit, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    navit.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in navit.named_parameters()}


@pytest.mark.parametrize("positions", ["absolute", "fractional"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_pack_is_its_pictures_one_by_one_gradients_too(positions, dropped):
    navit, images = tower(positions=positions), pictures()
    keep = some(images) if dropped else None
    target = torch.randn(len(images), 32, generator=generator(0, "target"))
    packed = navit.embed(images, keep)
    together = gradients(navit, (packed * target).sum())
    alone = torch.cat([navit.embed([x], keep and [keep[i]]) for i, x in enumerate(images)])
    torch.testing.assert_close(packed, alone, **near)
    for name, gradient in gradients(navit, (alone * target).sum()).items():
        torch.testing.assert_close(together[name], gradient, atol=1e-4, rtol=1e-3)
        assert gradient.abs().sum() > 0, name
    features = navit(images, keep)
    for i, image in enumerate(images):
        assert len(features[i]) == (image[0].numel() // 16 if keep is None else len(keep[i]))
        torch.testing.assert_close(features[i], navit([image], keep and [keep[i]])[0], **near)


@torch.no_grad()
def test_the_order_in_the_pack_does_not_matter():
    navit, images = tower(), pictures()
    order = torch.randperm(len(images), generator=generator(0, "order")).tolist()
    torch.testing.assert_close(
        navit.embed([images[i] for i in order]), navit.embed(images)[torch.tensor(order)], **near
    )


@torch.no_grad()
def test_another_picture_in_the_pack_changes_nothing():
    navit, images = tower(), pictures()
    others = [*images[:3], torch.full_like(images[3], torch.nan), *images[4:]]
    seen, left = navit.embed(images), navit.embed(others)
    assert left[3].isnan().all()
    rest = [i for i in range(len(images)) if i != 3]
    torch.testing.assert_close(left[rest], seen[rest], **near)


def by_hand(navit: Navit, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's figure for one picture, by plain products: features and their vector."""
    w, c = navit.state_dict(), navit.config
    h, across, e = image.shape[1] // c.patch, image.shape[2] // c.patch, c.width // c.heads

    def norm(x, name, width=c.width, eps=c.eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * w[name + ".weight"]

    def mlp(x, name):
        return F.gelu(x @ w[name + ".up.weight"].T) @ w[name + ".down.weight"].T

    def heads(x):
        return rearrange(x, "n (heads e) -> heads n e", e=e)

    rows = [
        image[:, r * c.patch : (r + 1) * c.patch, k * c.patch : (k + 1) * c.patch].reshape(-1)
        for r in range(h)
        for k in range(across)
    ]
    x = torch.stack(rows) @ w["stem.weight"].T
    x = x + torch.stack([w["rows"][r] + w["columns"][k] for r in range(h) for k in range(across)])
    for i in range(c.depth):
        at = f"blocks.{i}."
        q, k, v = map(
            heads, (norm(x, at + "norm1") @ w[at + "attention.qkv.weight"].T).split(c.width, dim=-1)
        )
        q, k = (norm(part, f"{at}attention.norm_{n}", eps=1e-5) for part, n in ((q, "q"), (k, "k")))
        seen = (q @ k.transpose(1, 2) / math.sqrt(e)).softmax(-1) @ v
        x = x + rearrange(seen, "heads n e -> n (heads e)") @ w[at + "attention.out.weight"].T
        x = x + mlp(norm(x, at + "norm2"), at + "mlp")
    x = norm(x, "norm")
    q = heads(w["pooling.query"][None])
    k, v = (heads(x @ w[f"pooling.{name}.weight"].T) for name in "kv")
    pooled = (q @ k.transpose(1, 2) / math.sqrt(e)).softmax(-1) @ v
    pooled = rearrange(pooled, "heads 1 e -> (heads e)") @ w["pooling.out.weight"].T
    return x, pooled + mlp(norm(pooled, "pooling.norm"), "pooling.mlp")


@torch.no_grad()
def test_it_computes_what_the_paper_says():
    navit, images = tower().double(), [image.double() for image in pictures()]
    features, vectors = navit(images), navit.embed(images)
    for image, own, vector in zip(images, features, vectors, strict=True):
        expected, pooled = by_hand(navit, image)
        torch.testing.assert_close(own, expected, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(vector, pooled, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_dropped_patches_are_not_computed():
    navit = tower()
    images, keep = pictures(), some(pictures(), 0.25)
    holes = [image.clone() for image in images]
    for hole, kept in zip(holes, keep, strict=True):
        blocks = rearrange(hole, "c (h p) (w q) -> (h w) c p q", p=4, q=4)
        gone = torch.ones(len(blocks), dtype=torch.bool)
        gone[kept] = False
        filled = torch.where(rearrange(gone, "n -> n 1 1 1"), torch.nan, blocks)
        hole.copy_(rearrange(filled, "(h w) c p q -> c (h p) (w q)", h=hole.shape[1] // 4))
    torch.testing.assert_close(navit.embed(holes, keep), navit.embed(images, keep))

    def cost(images, keep=None):
        with FlopCounterMode(display=False) as counter:
            navit.embed(images, keep)
        return counter.get_total_flops()

    whole = [torch.randn(3, 24, 24) for _ in range(4)]
    quarter = [torch.arange(0, 36, 4)] * 4
    assert cost(whole, quarter) == cost([torch.randn(3, 12, 12) for _ in range(4)]) < cost(whole) / 3


@torch.no_grad()
def test_fractional_positions_read_the_table_evenly():
    navit = tower(positions="fractional")
    rows = len(navit.rows)
    torch.testing.assert_close(navit._side(navit.rows, rows), navit.rows)  # as many places as rows: absolute
    line = torch.linspace(0, 1, rows)[:, None].expand(rows, 32)
    places = navit._side(line, 3)[:, 0]
    middle = (torch.tensor([1 / 6, 1 / 2, 5 / 6]) * rows - 0.5) / (rows - 1)
    torch.testing.assert_close(places, middle)
    # A picture of twice the size has two patches where one was, and they stand about the same place.
    fine = navit._side(line, 6)[:, 0]
    torch.testing.assert_close(rearrange(fine, "(n two) -> n two", two=2).mean(1), places)


@pytest.mark.parametrize(("name", "millions"), [("S/16", 23.3), ("B/16", 92.3), ("L/16", 314.8)])
def test_the_sizes_have_the_parameters_that_their_shapes_say(name, millions):
    c = SIZES[name]
    with torch.device("meta"):
        navit = Navit(c)
    count = sum(parameter.numel() for parameter in navit.parameters())
    d, e = c.width, c.width // c.heads
    block = 12 * d * d + 2 * d + 2 * e  # without biases
    pool = 3 * d * d + 8 * d * d + 2 * d
    assert count == 3 * 16 * 16 * d + 2 * 196 * d + c.depth * block + d + pool
    assert not any("bias" in key for key, _ in navit.named_parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: tower().embed([torch.zeros(3, 6, 8)]), "8 x 6 pixels is not made of whole patches of 4"),
        (lambda: tower().embed([torch.zeros(3, 4, 160)]), "160 x 4 pixels is larger than the 576"),
        (lambda: tower(area=9), "no room for a patch of 4"),
        (lambda: tower(heads=5), "no multiple of the 5 heads"),
    ],
)
def test_mistakes_are_named(ask, said):
    with pytest.raises(InputError, match=said):
        ask()
