"""Near duplicates: the hash against its definition, planted copies found, different pictures spared."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.data.duplicates import find_copies, groups, hash_items, hashes_of, pairs_above, phash
from reverie.data.index import Index, Item
from reverie.data.stickers import sample_folder
from reverie.errors import InputError


def reference(grey: np.ndarray) -> np.ndarray:
    """The DCT-II by its double sum, and which of its 64 lowest coefficients are above their median."""
    low = np.zeros((8, 8))
    x = np.arange(32)
    for v in range(8):
        for u in range(8):
            wave = np.cos(np.pi * (2 * x[:, None] + 1) * v / 64) * np.cos(np.pi * (2 * x[None] + 1) * u / 64)
            low[v, u] = (grey * wave).sum()
    return (low > np.median(low)).reshape(-1)


@pytest.mark.parametrize("seed", range(8))
def test_the_hash_is_its_definition(seed):
    grey = np.random.default_rng(seed).integers(0, 256, (32, 32)).astype(float)
    assert np.array_equal(phash(grey), reference(grey))


def test_flat_pictures_have_one_hash_whatever_their_grey():
    assert len({phash(np.full((32, 32), value)).tobytes() for value in (1, 77.7, 200, 255)}) == 1


def item(name: str, *, width: int = 10, split: str = "train", frames: int = 1) -> Item:
    return Item(file_name=name, hash=name, bytes=1, width=width, height=10, split=split, frames=frames)


def test_planted_copies_are_found_and_different_pictures_spared(tmp_path):
    sample = Index.read(sample_folder())
    originals = [it for it in sample.select(video=False, sources=("fluent-3d",)) if it.label][:60]
    names = {}
    for i, it in enumerate(originals):
        with Image.open(sample.path(it)) as image:
            picture = Image.new("RGB", (128, 128), "white")
            picture.paste(
                image.convert("RGBA").resize((128, 128)), mask=image.convert("RGBA").resize((128, 128))
            )
        picture.save(tmp_path / f"{i}.png")
        if i % 3 == 0:
            picture.resize((61, 61)).save(tmp_path / f"copy-{i}.png")
        if i % 3 == 1:
            picture.save(tmp_path / f"copy-{i}.jpg", quality=50)
    for path in sorted(tmp_path.glob("*")):
        with Image.open(path) as image:
            names[path.name] = replace(item(path.name, width=image.width), height=image.height)
    items = list(names.values())
    hashes = hash_items(Index(tmp_path, items), items, quiet=True)
    found = find_copies(items, hashes=[hashes[it.file_name] for it in items], distance=6)
    pairs = {(copy.original.file_name, copy.item.file_name) for group in found for copy in group}
    planted = {(f"{i}.png", f"copy-{i}.{'jpg' if i % 3 else 'png'}") for i in range(60) if i % 3 < 2}
    assert planted <= pairs
    assert len(pairs - planted) <= 3  # of 1,770 pairs of different drawings


def test_clips_are_compared_frame_by_frame_and_never_with_pictures(tmp_path):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 40)) for _ in range(4)]

    def write(name: str, order: list[int], side: int = 40) -> None:
        own = [frames[i].resize((side, side)) for i in order]
        own[0].save(tmp_path / name, save_all=True, append_images=own[1:], duration=100, lossless=True)

    write("a.webp", [0, 1, 2, 3])
    write("same.webp", [0, 1, 2, 3], side=20)
    write("back.webp", [3, 2, 1, 0])
    frames[0].save(tmp_path / "still.webp", lossless=True)
    items = [item(n, frames=4) for n in ("a.webp", "back.webp", "same.webp")] + [item("still.webp")]
    hashes = hash_items(Index(tmp_path, items), items, quiet=True)
    assert hashes["a.webp"].shape == (4, 64)
    assert np.array_equal(hashes["still.webp"][0], hashes["a.webp"][0])
    (group,) = find_copies(items, hashes=[hashes[it.file_name] for it in items])
    assert [(c.original.file_name, c.item.file_name) for c in group] == [("a.webp", "same.webp")]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_pairs_are_those_of_the_whole_product(block):
    rows = torch.nn.functional.normalize(
        torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1
    )
    other = torch.nn.functional.normalize(
        torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), dim=1
    )
    near = rows @ rows.T >= 0.5
    want = [(i, j) for i in range(40) for j in range(i + 1, 40) if near[i, j]]
    assert sorted(pairs_above(rows, 0.5, block=block)) == want
    both = [(i, j) for i, j in want if other[i] @ other[j] >= 0.2]
    assert 0 < len(both) < len(want)
    assert sorted(pairs_above(rows, 0.5, also=other, also_least=0.2, block=block)) == both


def test_groups_are_what_pairs_connect():
    rng = np.random.default_rng(3)
    pairs = [tuple(map(int, pair)) for pair in rng.integers(0, 50, (30, 2)) if pair[0] != pair[1]]
    reach = np.eye(50, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(6):
        reach = reach @ reach
    want = {tuple(np.flatnonzero(row)) for row in reach if row.sum() > 1}
    assert {tuple(group) for group in groups(50, pairs)} == want
    assert groups(4, []) == []


def test_the_best_of_a_group_stays_and_a_leak_is_named():
    same = [np.ones((1, 64), bool)] * 4
    first, large, small = item("a", width=20), item("b", width=30), item("c", width=30)
    (group,) = find_copies([first, large, small], hashes=same[:3])
    assert {c.original.file_name for c in group} == {"b"}  # the largest, then the first
    assert not any(c.leak for c in group)
    held = item("d", width=5, split="test")
    (group,) = find_copies([first, large, small, held], hashes=same)
    assert {c.original.file_name for c in group} == {"d"}
    assert all(c.leak and "leak into training of split test" in str(c) for c in group)


def test_both_signs_must_agree_where_both_are_given():
    items = [item("a"), item("b")]
    same, apart = [np.ones((1, 64), bool)] * 2, [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    assert find_copies(items, hashes=same)
    assert not find_copies(items, hashes=same, embeddings=apart)
    assert find_copies(items, embeddings=[apart[0], apart[0]], cosine=1.0)


@pytest.mark.parametrize("wrong", [{"distance": -1}, {"distance": 32}, {"cosine": 0}, {"cosine": 1.1}])
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        find_copies([item("a")], hashes=[np.ones((1, 64), bool)], **wrong)


def test_resizing_and_jpeg_move_few_bits(tmp_path):
    cells = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    image = Image.fromarray(cells).resize((160, 200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.resize((70, 90)).save(buffer, "JPEG", quality=40)
    (tmp_path / "b.jpg").write_bytes(buffer.getvalue())
    assert (hashes_of(tmp_path / "a.png") ^ hashes_of(Path(tmp_path / "b.jpg"))).sum() <= 4
