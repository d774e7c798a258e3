import numpy as np
from PIL import Image

from reverie.train import curves


def colours(path):
    with Image.open(path) as image:
        return image.size, {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}


def rgb(ink):
    return tuple(int(ink[i : i + 2], 16) for i in (1, 3, 5))


def rows(n, scale=1.0):
    return [{"step": s, "loss": scale / s, "lr": 0.1} for s in range(1, n)] + [{"step": n, "val": 1.0}]


def test_series_leave_out_what_is_null():
    assert curves.series([{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"step": 3, "a": 4}]) == {
        "a": ([1, 3], [2.0, 4.0])
    }


def test_losses_come_first_and_the_optimizer_last():
    assert curves.ordered(["lr", "val", "part_loss", "grad_norm", "loss", "acc"]) == [
        "loss", "part_loss", "acc", "val", "grad_norm", "lr",
    ]  # fmt: skip


def test_a_smoothed_series_keeps_a_constant_and_halves_noise():
    assert np.allclose(curves._smooth([3.0] * 500), 3.0)
    noise = np.random.default_rng(0).normal(size=2000)
    assert np.std(curves._smooth(list(noise))) < 0.5 * np.std(noise)


def test_a_sheet_has_a_panel_to_each_metric_and_a_colour_to_each_run(tmp_path):
    runs = {"one": rows(100), "two": rows(50, 2.0), "empty": []}
    assert curves.sheet(runs, tmp_path / "all.png") == ["loss", "val", "lr"]
    (width, height), seen = colours(tmp_path / "all.png")
    assert width > 2 * height, "three panels stand side by side"
    assert {rgb(ink) for ink in curves.INK[:3]} <= seen, "the legend names the run without a curve, too"
    assert rgb(curves.INK[3]) not in seen
    assert curves.sheet(runs, tmp_path / "one.png", metrics=["val"]) == ["val"]
    assert colours(tmp_path / "one.png")[0][0] < width / 2
    assert curves.sheet(runs, tmp_path / "none.png", metrics=["other"]) == []
    assert not (tmp_path / "none.png").exists()
