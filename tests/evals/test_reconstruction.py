"""PSNR and SSIM have their known values, SSIM is that of the paper written out, and a measurement adds up."""

from __future__ import annotations

import math

import pytest
import torch

from reverie.errors import InputError
from reverie.evals.reconstruction import (
    measure,
    motion_psnr,
    movement,
    psnr,
    rate,
    reduced,
    ssim,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 2 - 1


def ssim_written_out(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wang et al. 2004, equations 13 to 16, of two pictures `h w` in 0 to 255, window by window."""
    bell = [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    w = torch.tensor(bell, dtype=torch.double)
    w = w / w.sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (some[top : top + 11, left : left + 11] for some in (a, b))
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
            both = (w * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(sum(values) / len(values))


def test_psnr_is_what_its_formula_says():
    true = noise(3, 3, 8, 8) * 0.5
    levels = torch.tensor([1.0, 2.0, 10.0])  # of 255
    drawn = true + (levels * 2 / 255)[:, None, None, None]
    torch.testing.assert_close(psnr(drawn, true), 20 * (255 / levels.double()).log10())
    assert psnr(true, true).tolist() == [100.0] * 3


def test_a_clip_counts_frame_by_frame():
    true = noise(1, 3, 2, 8, 8) * 0.5
    drawn = true.clone()
    drawn[:, :, 1] += 0.2
    torch.testing.assert_close(psnr(drawn, true), torch.tensor([(100 + 20.0) / 2]).double())


@pytest.mark.parametrize("strength", [0.02, 0.3, 1.0])
def test_ssim_is_the_papers(strength):
    true = noise(2, 3, 14, 17)
    drawn = (true + strength * noise(2, 3, 14, 17, seed=1)).clamp(-1, 1)
    expected = [
        sum(ssim_written_out((a + 1) * 127.5, (b + 1) * 127.5) for a, b in zip(x, y, strict=True)) / 3
        for x, y in zip(drawn, true, strict=True)
    ]
    assert ssim(drawn, true).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(drawn[:, :, None], true[:, :, None]).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    true = noise(1, 3, 32, 40)
    drawn = (true + 0.3 * noise(1, 3, 32, 40, seed=1)).clamp(-1, 1)
    expected = metrics.structural_similarity(
        *((x[0].numpy() + 1) / 2 for x in (drawn, true)), data_range=1, channel_axis=0, gaussian_weights=True,
        sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(drawn, true).item() == pytest.approx(expected, abs=1e-10)
    other = metrics.peak_signal_noise_ratio(true[0].numpy(), drawn[0].numpy(), data_range=2)
    assert psnr(drawn, true).item() == pytest.approx(other)


def test_ssim_knows_its_ends():
    true = noise(1, 3, 16, 16)
    assert ssim(true, true).item() == pytest.approx(1)
    flat = torch.zeros(1, 3, 16, 16)
    c1 = 0.01**2  # grey levels 3/4 and 1/4: only their brightness differs
    expected = (2 * 0.75 * 0.25 + c1) / (0.75**2 + 0.25**2 + c1)
    assert ssim(flat + 0.5, flat - 0.5).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="10 x 16"):
        ssim(true[..., :10, :], true[..., :10, :])


def test_motion_sees_flicker_that_frames_hide():
    still = (noise(1, 3, 1, 16, 16) * 0.5).repeat(1, 1, 6, 1, 1)
    sign = torch.tensor([1, -1, 1, -1, 1, -1])[None, None, :, None, None]
    steady, flicker = still + 0.1, still + 0.1 * sign
    torch.testing.assert_close(psnr(steady, still), psnr(flicker, still))
    assert motion_psnr(steady, still).item() == 100
    assert motion_psnr(flicker, still).item() == pytest.approx(20.0)
    assert movement(still).item() == 0
    assert movement(flicker).item() == pytest.approx(0.2 * 127.5)


def test_the_rate_counts_bits():
    """Wan's shape: 17 frames of 64 x 64 become 5 x 8 x 8 x 16 numbers."""
    found = rate(5 * 8 * 8 * 16 / (17 * 64 * 64))
    assert found["bits"] == pytest.approx(16 * 5 * 1024 / (17 * 4096))
    assert found["smaller"] == pytest.approx(24 / found["bits"])


def test_a_measurement_adds_up():
    clips = [noise(2, 3, 3, 16, 16, seed=seed).float() for seed in range(3)]
    told = []
    found = measure(clips, lambda x: (x * 0.9, x[:, :, :, ::4, ::4]), progress=told.append)
    true = torch.cat(clips)
    assert found["count"] == 6
    assert told == [2, 4, 6]
    assert found["psnr"]["values"] == pytest.approx(psnr(true * 0.9, true).tolist())
    assert found["psnr"]["interval"][0] < found["psnr"]["mean"] < found["psnr"]["interval"][1]
    assert found["movement"] == pytest.approx(0.9, rel=1e-5)
    assert found["rate"] == {"numbers": 3 / 16, "bits": 3.0, "smaller": 8.0}
    assert "movement" not in measure([true[:, :, 0]], lambda x: (x, x))
    with pytest.raises(InputError, match="signals 2 to 3 come back not finite"):
        measure(clips, lambda x: (x / 0 if x is clips[1] else x, x))
    with pytest.raises(InputError, match="nothing to measure"):
        measure([], lambda x: (x, x))


def test_the_yardstick_has_as_many_numbers():
    x = noise(1, 3, 5, 32, 32).float()
    torch.testing.assert_close(reduced(x, 3.0), x, atol=1e-5, rtol=0)
    flat = torch.full((2, 3, 32, 32), 0.25)
    torch.testing.assert_close(reduced(flat, 0.25), flat)
    small = psnr(reduced(x, 0.1), x)
    assert small < psnr(reduced(x, 1.0), x) < 100
