from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from reverie.data.packing import Plan, bucketed, drawn_area, packed
from reverie.errors import InputError
from reverie.media import whole_patches
from reverie.rng import generator

SHAPES = [(1, h, w) for h in range(4, 17, 2) for w in range(4, 17, 2)] + [(8, 8, 8), (16, 6, 10)]


def mixed(n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    which = torch.randint(len(SHAPES), (n,), generator=generator(seed, "shapes"))
    return [SHAPES[i] for i in which.tolist()]


def tokens(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("n", [1, 7, 500, 3000])
@pytest.mark.parametrize("budget", [1024, 4096])
@pytest.mark.parametrize("how", ["packed", "bucketed"])
def test_every_sample_once_an_epoch_and_never_above_the_budget(n, budget, how):
    shapes = mixed(n)
    lengths = [tokens(shape) for shape in shapes]
    for epoch in range(2):
        if how == "packed":
            packs = packed(lengths, budget=budget, seed=1, epoch=epoch, window=256)
        else:
            packs = bucketed(shapes, lengths, budget=budget, seed=1, epoch=epoch)
            assert all(len({shapes[i] for i in pack}) == 1 for pack in packs)
        assert sorted(i for pack in packs for i in pack) == list(range(n))
        assert all(0 < sum(lengths[i] for i in pack) <= budget for pack in packs)


@pytest.mark.parametrize("budget", [1024, 2048, 8192])
def test_packs_of_mixed_sizes_waste_less_than_a_twentieth(budget):
    lengths = [tokens(shape) for shape in mixed(4000)]
    if budget == 1024:  # clips of 960 tokens fill such a pack alone: pictures only
        lengths = [min(length, 256) for length in lengths]
    plan = Plan(partial_packed(lengths, budget))
    for epoch in range(2):
        fill = plan.fill(epoch, lengths, budget=budget)
        assert fill.samples == 4000
        assert fill.tokens == sum(lengths)
        assert 0 <= fill.waste < 0.05
    assert fill.waste == pytest.approx(1 - fill.tokens / (fill.packs * budget))


def partial_packed(lengths, budget, seed=3):
    return partial(lambda epoch: packed(lengths, budget=budget, seed=seed, epoch=epoch))


def test_the_order_is_random_and_another_every_epoch():
    lengths = [tokens(shape) for shape in mixed(2000)]
    first, second = (packed(lengths, budget=2048, seed=0, epoch=epoch, window=512) for epoch in (0, 1))
    assert first != second
    assert first == packed(lengths, budget=2048, seed=0, epoch=0, window=512)
    assert first != packed(lengths, budget=2048, seed=1, epoch=0, window=512)
    places = torch.tensor([i for pack in first for i in pack]).float()
    after = torch.arange(len(places)).float()
    assert abs(torch.corrcoef(torch.stack([places, after]))[0, 1]) < 0.1
    # Long samples are not gathered at one end, as they would be were the packs of a window not shuffled.
    long = torch.tensor([max(lengths[i] for i in pack) > 600 for pack in first]).float()
    halves = long[: len(long) // 2].mean(), long[len(long) // 2 :].mean()
    assert abs(halves[0] - halves[1]) < 0.25


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_plan_is_the_same_for_any_number_of_processes(world):
    lengths = [tokens(shape) for shape in mixed(300)]
    whole = Plan(partial_packed(lengths, 2048), together=6)
    shared = [Plan(partial_packed(lengths, 2048), together=6) for _ in range(world)]
    for step in (5, 0, 1, 40):  # any step first: a run that resumes asks for a late one
        parts = [plan.step(step, rank=rank, world=world) for rank, plan in enumerate(shared)]
        assert [pack for part in parts for pack in part] == whole.step(step)


def test_the_steps_go_through_the_epochs_without_a_gap():
    lengths = [tokens(shape) for shape in mixed(200)]
    plan = Plan(partial_packed(lengths, 1024), together=4)
    counts = [len(plan.packs(epoch)) for epoch in range(3)]
    steps = sum(counts) // 4
    seen = Counter(key for step in range(steps) for pack in plan.step(step) for key in pack)
    assert set(seen.values()) == {1}
    assert {i for epoch, i in seen if epoch == 0} == set(range(200)) == {i for epoch, i in seen if epoch == 1}
    assert Plan(partial_packed(lengths, 1024), together=4).step(steps - 1) == plan.step(steps - 1)


def test_sizes_may_differ_from_epoch_to_epoch():
    shapes = [(200, 120), (64, 64), (90, 300), (256, 256)] * 100

    def lengths(epoch):
        areas = [drawn_area((64, 128), seed=0, epoch=epoch, sample=i) for i in range(len(shapes))]
        sizes = [
            whole_patches(*shape, patch=16, area=area) for shape, area in zip(shapes, areas, strict=True)
        ]
        return [h * w // 256 for h, w in sizes]

    plan = Plan(lambda epoch: packed(lengths(epoch), budget=256, seed=0, epoch=epoch))
    assert lengths(0) != lengths(1)
    for epoch in range(2):
        found = lengths(epoch)
        assert all(sum(found[i] for i in pack) <= 256 for pack in plan.packs(epoch))
        assert plan.fill(epoch, found, budget=256).waste < 0.05


def test_draws_depend_on_the_sample_alone_and_fill_their_range():
    areas = [drawn_area((32, 36), seed=0, epoch=e, sample=i) for e in range(4) for i in range(50)]
    assert set(areas) == {side**2 for side in range(32, 37)}


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: packed([5, 50], budget=20, seed=0, epoch=0), "sample 1 has 50 tokens, more than the 20"),
        (lambda: packed([], budget=20, seed=0, epoch=0), "no sample"),
        (lambda: packed([4, 0], budget=20, seed=0, epoch=0), "sample 1 has 0 tokens"),
        (lambda: Plan(lambda _: [[0]], together=4).step(0, world=3), "cannot be shared by 3"),
        (lambda: Plan(lambda _: [[0]], together=0), "a step of 0 packs"),
        (lambda: drawn_area((9, 4), seed=0, epoch=0, sample=0), "sides are 9 to 4"),
        (lambda: whole_patches(9, 9, patch=16, area=100), "no room for a patch of 16"),
    ],
)
def test_mistakes_are_named(ask, said):
    with pytest.raises(InputError, match=said):
        ask()


@pytest.mark.parametrize("patch", [8, 16, 20])
def test_whole_patches_keep_the_aspect_and_the_limit(patch):
    draws = torch.rand(400, 2, generator=generator(0, "sizes", patch))
    for height, width in (draws**3 * 3000 + 1).int().tolist():
        area = 40 * patch**2
        h, w = whole_patches(height, width, patch=patch, area=area)
        assert h % patch == w % patch == 0
        assert min(h, w) >= patch
        assert h * w <= area
        assert (w, h) == whole_patches(width, height, patch=patch, area=area)
        if 1 / 3 < height / width < 3:  # a longer one has few patches on its short side to round to
            scale = min((area / (height * width)) ** 0.5, 1)
            assert abs(h - height * scale) <= patch
            assert abs(w - width * scale) <= patch
    assert whole_patches(5 * patch, 7 * patch, patch=patch, area=10**6) == (5 * patch, 7 * patch)
    assert whole_patches(1, 10**7, patch=patch, area=40 * patch**2) == (patch, 40 * patch)
