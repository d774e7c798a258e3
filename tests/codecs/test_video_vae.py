"""The video autoencoder: causal in time, exact in shape, its normalisation undone by decoding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reverie.codecs import video_vae
from reverie.codecs.video_vae import WAN, Conv, Down, Norm, Up, VideoVae, VideoVaeConfig
from reverie.errors import InputError

CONFIG = VideoVaeConfig(channels=4, widths=(8, 8, 16), temporal=(True, True))


STRIDES = {
    (4, 8): CONFIG,
    (1, 8): VideoVaeConfig(channels=4, widths=(8, 8, 16), temporal=(False, False)),
    (4, 4): VideoVaeConfig(channels=4, widths=(8, 16, 8), temporal=(True, True), patch=1),
    (2, 8): VideoVaeConfig(channels=4, widths=(4, 8, 8, 8), temporal=(False, False, True), patch=1, blocks=2),
    (2, 16): VideoVaeConfig(channels=4, widths=(8, 8, 8), temporal=(True, False), patch=4),
}


def awake(config: VideoVaeConfig) -> VideoVae:
    """Random weights, also where a new model has zeros."""
    torch.manual_seed(0)
    vae = VideoVae(config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    return awake(CONFIG)


def video(frames: int, b: int = 1, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


near = {"atol": 1e-5, "rtol": 1e-4}


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_shapes_and_back(vae, frames, size):
    x = video(frames, b=2, size=size)
    latents = vae.encode(x)
    assert tuple(latents.shape) == (2, *vae.latent_shape(frames, size))
    assert vae.decode(latents).shape == x.shape
    assert CONFIG.stride == (4, 8)


@torch.no_grad()
@pytest.mark.parametrize("frames", range(1, 12))
def test_a_duration_is_filled_to_whole_latent_frames(vae, frames):
    whole = vae.whole(frames)
    assert frames <= whole < frames + 4
    assert vae.latent_shape(frames, (8, 8)) == vae.latent_shape(whole, (8, 8))
    assert vae.encode(video(whole, size=(8, 8))).shape[2] == vae.latent_shape(frames, (8, 8))[1]
    assert vae.decode(torch.zeros(1, *vae.latent_shape(frames, (8, 8)))).shape[2] == whole


@torch.no_grad()
def test_the_latents_of_a_beginning_are_the_beginning_of_the_latents(vae):
    x = video(9)
    latents = vae.encode(x)
    for frames, latent_frames in ((1, 1), (5, 2)):  # a picture is encoded as the first frame of a clip
        torch.testing.assert_close(vae.encode(x[:, :, :frames]), latents[:, :, :latent_frames], **near)
    for frames, latent_frames in ((1, 1), (5, 2)):
        beginning = vae.decode(latents[:, :, :latent_frames])
        torch.testing.assert_close(beginning, vae.decode(latents)[:, :, :frames], **near)


def test_which_frames_a_latent_frame_sees(vae):
    """By gradient: latent frame g sees its own four frames and those before; a frame comes of its latent and before."""
    x = video(9).requires_grad_()
    for g in range(3):
        (felt,) = torch.autograd.grad((vae.encode(x)[:, :, g] ** 2).sum(), x)
        seen = felt.abs().sum((0, 1, 3, 4)) > 0
        assert not seen[4 * g + 1 :].any()
        assert seen[max(4 * g - 3, 0) : 4 * g + 1].all()
    latents = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    for i in range(9):
        (felt,) = torch.autograd.grad((vae.decode(latents)[:, :, i] ** 2).sum(), latents)
        seen = felt.abs().sum((0, 1, 3, 4)) > 0
        own = -(-i // 4)
        assert seen[own]
        assert not seen[own + 1 :].any()


@torch.no_grad()
def test_a_clip_is_encoded_alike_in_any_batch(vae):
    x = torch.cat([video(5, seed=seed) for seed in range(3)])
    for i in range(3):
        torch.testing.assert_close(vae.encode(x[i : i + 1])[0], vae.encode(x)[i], **near)


@torch.no_grad()
def test_normalised_latents_are_the_raw_ones_to_the_decoder():
    torch.manual_seed(0)
    vae, x = VideoVae(CONFIG).eval(), video(5)
    raw = vae.posterior(x)[0]
    assert vae.encode(x).equal(raw)  # before anything was measured
    before = vae.decode(raw)
    vae.mean.copy_(raw.mean((0, 2, 3, 4)))
    vae.std.copy_(raw.std((0, 2, 3, 4)))
    latents = vae.encode(x)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), **near)
    torch.testing.assert_close(vae.decode(latents), before, atol=1e-4, rtol=1e-3)
    assert {"mean", "std"} <= vae.state_dict().keys()  # they travel with the weights


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([0], [0]),
        ([0, 1, 2, 3, 4], [0, 1]),
        ([0, 1, 2, 3], [0]),
        ([5, 6, 7, 8], [2]),
        ([1, 2, 3, 4, 5], [1]),
        (range(9), [0, 1, 2]),
        ([], []),
    ],
)
def test_a_latent_frame_is_known_when_all_its_frames_are(vae, known, expected):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, list(known)] = True
    out = vae.latent_mask(mask)
    assert not out[0].any()
    assert out[1].nonzero().flatten().tolist() == expected
    assert vae.latent_mask(mask[:, :1]).equal(mask[:, :1])


@pytest.fixture(scope="module")
def trained() -> tuple[VideoVae, torch.Tensor, list[dict[str, float]]]:
    """After some steps on one clip: the autoencoder, the clip, what its loss said."""
    torch.manual_seed(0)
    vae = VideoVae(CONFIG)
    frames = torch.linspace(-0.8, 0.8, 5)[None, :, None, None]
    x = (frames * torch.tensor([1.0, -1.0, 0.5])[:, None, None, None]).expand(1, 3, 5, 16, 16).contiguous()
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    batch = {"video": x, "noise": torch.zeros(1, *vae.latent_shape(5, (16, 16)))}
    told = []
    for _ in range(60):
        loss = vae.loss(batch)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        told.append({key: value.item() for key, value in loss.items()})
    return vae.eval(), x, told


@torch.no_grad()
def test_it_learns_to_give_back_a_clip(trained):
    vae, x, told = trained
    assert told[-1]["l1"] < 0.25 * told[0]["l1"]
    assert told[-1]["kl"] > 0
    assert (vae.decode(vae.encode(x)) - x).abs().mean() < 0.25 * told[0]["l1"]


@torch.no_grad()
def test_the_loss_is_l1_and_a_little_kl(vae):
    x, noise = video(5), torch.randn(1, *vae.latent_shape(5, (16, 16)))
    mean, log_variance = vae.posterior(x)
    parts = vae.loss({"video": x, "noise": noise}, kl=0.5)
    one = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(one, torch.distributions.Normal(0, 1)).mean()
    torch.testing.assert_close(parts["kl"], divergence)
    torch.testing.assert_close(parts["l1"], (vae.draw(mean + noise * one.scale) - x).abs().mean())
    torch.testing.assert_close(parts["loss"], parts["l1"] + 0.5 * divergence)


# ---------------------------------------------------------------- bricks against what they stand for


def in_time(x: torch.Tensor, b: int) -> torch.Tensor:
    return x.unflatten(0, (-1, b)).permute(1, 2, 0, 3, 4)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("side", [1, 3])
def test_a_convolution_is_one_over_three_axes_that_looks_back(pairs, side):
    torch.manual_seed(0)
    conv = Conv(6, 4, side=side, pairs=pairs)
    torch.nn.init.normal_(conv.weight, std=0.1)
    x = torch.randn(7 * 2, 6, 16, 17).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = conv.weight.permute(1, 4, 0, 2, 3)
    wide = F.pad(in_time(x, 2), (side // 2,) * 4 + (2, 0))
    expected = F.conv3d(wide, weight, conv.bias)
    found = conv(x, 2)
    torch.testing.assert_close(in_time(found, 2), expected, atol=1e-5, rtol=1e-4)
    of = [x, conv.weight, conv.bias]
    towards = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * towards).sum(), of)
    ours = torch.autograd.grad((in_time(found, 2) * towards).sum(), of)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    past: dict = {}
    parts = [conv(part, 2, past) for part in (x[:2], x[2:6], x[6:])]
    torch.testing.assert_close(torch.cat(parts), found, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_up_is_a_convolution_of_doubled_pixels_and_down_one_of_every_second():
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, 6)
    up, down = Up(8, time=False), Down(8, time=False)
    expected = F.conv2d(
        F.interpolate(x, scale_factor=2), up.space.weight[0].permute(0, 3, 1, 2), up.space.bias, padding=1
    )
    torch.testing.assert_close(up(x, 1, None), expected, **near)
    with torch.enable_grad():
        torch.testing.assert_close(up(x, 1, None), expected, **near)
    x = torch.randn(3, 8, 6, 4)
    wide = F.pad(x, (0, 1, 0, 1))
    expected = F.conv2d(wide, down.space.weight[0].permute(0, 3, 1, 2), down.space.bias, stride=2)
    torch.testing.assert_close(down(x, 1, None), expected, **near)


@torch.no_grad()
def test_changes_of_time_leave_the_first_frame_alone():
    torch.manual_seed(0)
    x = torch.randn(7 * 2, 4, 4, 4)
    for change, frames in ((Down(4, time=True), 4), (Up(4, time=True), 13)):
        torch.nn.init.normal_(change.time.weight)
        found = change(x, 2, None)
        assert len(found) == 2 * frames
        torch.testing.assert_close(found[:2], change(x[:2], 2, None), **near)
        other = torch.cat([x[:2] + 1, x[2:]])
        assert change.time.weight.any()
        if isinstance(change, Up):  # no later frame knows the first
            torch.testing.assert_close(change(other, 2, None)[2:], found[2:], **near)


def test_a_norm_is_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    norm, x = Norm(6), torch.randn(2, 6, 3, 3) * 9
    torch.nn.init.normal_(norm.scale)
    plain = x / x.square().mean(1, keepdim=True).sqrt() * norm.scale[:, None, None]
    with torch.no_grad():
        without = norm(x), norm(x, silu=False), norm(x.clone(), own=True)
    for found, expected in zip(without, (F.silu(plain), plain, F.silu(plain)), strict=True):
        torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(norm(x), F.silu(plain), **near)


# ---------------------------------------------------------------- every stride, chunks, tiles


@torch.no_grad()
@pytest.mark.parametrize("stride", STRIDES)
def test_every_stride_gives_back_what_it_was_given(stride):
    time, space = stride
    vae = awake(STRIDES[stride])
    assert vae.stride == STRIDES[stride].stride == stride
    for frames in (1, 1 + time, 1 + 3 * time):
        x = video(frames, size=(space, 2 * space))
        latents = vae.encode(x)
        assert tuple(latents.shape) == (1, 4, 1 + (frames - 1) // time, 1, 2)
        assert vae.decode(latents).shape == x.shape


@pytest.mark.parametrize("stride", STRIDES)
def test_chunks_are_the_whole(stride):
    """The whole: with gradients, in one go, nothing kept."""
    time, space = stride
    vae = awake(STRIDES[stride])
    size = (max(4 * space, 32), max(3 * space, 32))
    x = video(1 + 5 * time, b=2, size=size)
    latents = vae.encode(x)
    frames = vae.decode(latents)
    assert frames.requires_grad
    with torch.no_grad():
        for chunk in (None, 1, 2, 4):
            for found, whole in (
                (vae.encode(x, chunk=chunk), latents),
                (vae.decode(latents.detach(), chunk=chunk), frames),
            ):
                assert (found - whole).abs().max() < 1e-5 * whole.abs().max()
        pieces = torch.cat(list(vae.encode_pieces(x.split([2, x.shape[2] - 3, 1], dim=2))), dim=2)
        assert (pieces - latents).abs().max() < 1e-5 * latents.abs().max()
        pieces = torch.cat(list(vae.decode_pieces(latents.split([1, 3, 2], dim=2))), dim=2)
        assert (pieces - frames).abs().max() < 1e-5 * frames.abs().max()


@torch.no_grad()
def test_pieces_come_as_soon_as_they_can(vae):
    came = 0

    def pieces():
        nonlocal came
        for frame in video(9).split(1, dim=2):
            came += 1
            yield frame

    when = [came for _ in vae.encode_pieces(pieces())]
    assert when == [1, 5, 9]
    drawn = vae.decode_pieces(iter([torch.randn(1, 4, 1, 2, 2), torch.randn(1, 4, 1, 2, 2)]))
    assert next(drawn).shape[2] == 1
    assert sum(piece.shape[2] for piece in drawn) == 4
    with pytest.raises(InputError, match="3 frames are left"):
        list(vae.encode_pieces([video(5), video(3)]))


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(9, 4, 2), (16, 4, 1), (7, 4, 0), (5, 8, 4), (12, 6, 3)]
)
def test_tiles_share_out_every_place_once(size, tile, overlap):
    spans = video_vae._spans(size, tile, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(end - begin <= tile for begin, end, _ in spans)
    for scale in (1, 8):
        total = torch.zeros(size * scale)
        for span in spans:
            total[span[0] * scale : span[1] * scale] += video_vae._weights(span, scale, total)
        torch.testing.assert_close(total, torch.ones_like(total))


@torch.no_grad()
def test_one_tile_is_the_whole(vae):
    x = video(5, b=2, size=(16, 24))
    assert vae.encode(x, tile=24).equal(vae.encode(x))
    latents = vae.encode(x)
    assert vae.decode(latents, tile=64, overlap=8).equal(vae.decode(latents))


@torch.no_grad()
def test_overlap_hides_the_seams_of_tiles(trained):
    """On what it has learnt: with nothing in common, the edges of tiles show; shared by half, they do not."""
    vae, x, _ = trained
    latents = vae.encode(x.repeat(1, 1, 1, 4, 4))
    whole = vae.decode(latents)

    def steps(overlap: int) -> list[float]:
        """How much pixels differ from their neighbours in the places where tiles of 32 begin."""
        off = vae.decode(latents, tile=32, overlap=overlap) - whole
        across = (off[..., 1:] - off[..., :-1]).abs().mean((0, 1, 2, 3))
        return [float(across[at - 1]) for at in range(32 - overlap, 64, 32 - overlap)]

    assert max(steps(16)) < 0.5 * max(steps(0))


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_no_more_is_computed_at_once_than_a_chunk_of_a_tile(vae, clip, monkeypatch):
    """However large and long: what convolutions are given, in numbers, and what is kept of a clip, in frames."""
    largest = 0
    convolve = video_vae._convolve

    def watched(x, *args, **options):
        nonlocal largest
        largest = max(largest, x.numel())
        return convolve(x, *args, **options)

    monkeypatch.setattr(video_vae, "_convolve", watched)
    monkeypatch.setattr(video_vae, "TOGETHER", 256)

    def most(frames: int, size: int, **options) -> int:
        nonlocal largest
        largest = 0
        x = video(frames, size=(size, size))
        vae.decode(vae.encode(x, **options), **options)
        return largest

    if clip:
        assert most(41, 32) == most(9, 32)
        assert most(41, 32, chunk=1) == most(9, 32, chunk=1)
    else:
        assert most(1, 128, tile=32) == most(1, 32) < most(1, 128)


def test_gradients_reach_every_weight_of_a_clip(vae):
    vae = awake(CONFIG)
    x = video(9, size=(32, 32))
    loss = vae.loss({"video": x, "noise": torch.randn(1, *vae.latent_shape(9, (32, 32)))})
    loss["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_wan_has_its_size():
    with torch.device("meta"):
        vae = VideoVae(WAN)
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert (vae.stride, vae.channels) == ((4, 8), 16)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda vae: vae.encode(video(4)), "4 frames do not fill"),
        (lambda vae: vae.encode(video(1, size=(12, 16))), "12 x 16"),
        (lambda vae: vae.encode(video(1), tile=20), "tiles of 20 pixels"),
        (lambda vae: vae.encode(video(1), tile=16, overlap=16), "16 in common"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 1, 2, 2), overlap=8), "without tile"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 1, 2, 2), chunk=0), "chunk is 0"),
        (lambda _: VideoVaeConfig(widths=(8, 8), temporal=()), "2 widths have 1 halvings"),
        (lambda _: VideoVaeConfig(widths=(7,), temporal=()), "must be even"),
        (lambda _: VideoVaeConfig(patch=0), "patch 0"),
    ],
)
def test_what_cannot_be_done_is_said(vae, call, said):
    with pytest.raises(InputError, match=said):
        call(vae)


@pytest.mark.parametrize("shape", [(1, 4, 1, 16, 16), (3, 1, 16, 16), (0, 3, 1, 16, 16), (1, 3, 1, 0, 16)])
def test_videos_and_latents_of_other_axes_are_refused(vae, shape):
    with pytest.raises(InputError, match=r"a video of shape .* give floats `b 3 f h w`"):
        vae.encode(torch.zeros(shape))
    with pytest.raises(InputError, match=r"floats"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    # Latents of a picture without frames would stretch over the channels.
    for latents in (torch.zeros(1, vae.channels, 4, 4), torch.zeros(1, vae.channels + 1, 1, 4, 4)):
        with pytest.raises(InputError, match=r"latents of shape"):
            vae.decode(latents)
