"""A causal autoencoder of pictures and clips: Wan 2.1's network (2503.20314, section 4.1) in any size.

Space is halved between stages and time in those that are asked to. A frame sees itself and the frames before it, never
one after it: convolutions look back two frames, norms and attention at no other frame at all, and the first frame goes
through every change of time alone. So a picture is encoded exactly as the first frame of a clip, and a clip may come in
chunks: what the convolutions look back at is kept from one chunk to the next, and the result is that of the whole clip.
Frames 1, 2-5, 6-9, ... become one latent frame each where time is halved twice.

Inside, frames lie one after the other in the batch, `(f b) c h w`, channels last in memory, so that looking back is a
slice: a convolution over three frames is the sum of three over one, and frames that are not there cost nothing.
Latents are normalised per channel; the constants travel with the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError

# Positions (frames x height x width) that are worth computing together: more of them only take more memory.
TOGETHER = 2**14
# What the convolutions look back at, by module: frames `b c h w`, the latest last. A module that is not in it has
# seen nothing yet. None instead of the dictionary: all frames come at once, and nothing is kept.
Past = dict[nn.Module, list[Tensor]]
Span = tuple[int, int, tuple[int, int]]  # begin, end, places shared with the tile before and the one after


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVaeConfig:
    channels: int = 16  # of the latents
    widths: tuple[int, ...] = (32, 64, 128)  # one per stage; space is halved between stages
    temporal: tuple[bool, ...] = (True, True)  # which of the halvings halve time as well
    blocks: int = 1  # residual blocks of a stage; the decoder has one more
    patch: int = 2  # patch x patch pixels are folded into channels first, which is cheap

    def __post_init__(self) -> None:
        if not self.widths or len(self.temporal) != len(self.widths) - 1:
            raise InputError(
                f"{len(self.widths)} widths have {len(self.widths) - 1} halvings between them, but temporal says of "
                f"{len(self.temporal)} whether they halve time: give one for each."
            )
        if any(width < 2 or width % 2 for width in self.widths):
            raise InputError(f"widths are {self.widths}: each must be even.")
        if min(self.channels, self.blocks, self.patch) < 1:
            raise InputError(
                f"channels {self.channels}, blocks {self.blocks} and patch {self.patch} must be 1 or more."
            )

    @property
    def stride(self) -> tuple[int, int]:
        """(time, space)."""
        return 2 ** sum(self.temporal), self.patch * 2 ** len(self.temporal)


WAN = VideoVaeConfig(widths=(96, 192, 384, 384), temporal=(False, True, True), blocks=2, patch=1)


# ---------------------------------------------------------------- bricks: `(f b) c h w`, channels last


class Conv(nn.Module):
    """A convolution over `time` frames, the present one and those before, and `side` x `side` pixels of each.

    It begins as one of pictures: only the present frame counts. Variances pass it unchanged and no bias is there yet,
    or after some layers nothing but biases would be left of a signal (docs/log.md). With `pairs`, frames after the
    first come in twos, and a two costs four convolutions of pictures instead of six: Winograd's F(2, 3) (1509.09308),
    along time.
    """

    def __init__(self, width: int, out: int, *, time: int = 3, side: int = 3, pairs: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(time, out, side, side, width))  # the present frame last
        self.bias = nn.Parameter(torch.empty(out))
        self.pairs = pairs
        bound = math.sqrt(3 / (side * side * width))
        nn.init.uniform_(self.weight[-1], -bound, bound)
        nn.init.zeros_(self.bias)

    def tap(self, x: Tensor, back: int, **options) -> Tensor:
        """What the frames `x` give to the frames that come `back` frames later."""
        return _convolve(x, self.weight[-1 - back], None if back else self.bias, **options)

    def forward(self, x: Tensor, b: int, past: Past | None = None) -> Tensor:
        before = past.get(self, []) if past is not None else []
        reach = len(self.weight) - 1
        # Smaller frames gain less than the sums of weights cost.
        if self.pairs and len(x) > b and b * x.shape[2] * x.shape[3] >= 256:
            y = self._paired([*before, *x.split(b)], len(before))
        else:
            y = self.tap(x, 0)
            for back in range(1, reach + 1):
                # Of frames before this chunk.
                for j in range(max(back - len(before), 0), min(back, len(x) // b)):
                    y[j * b : (j + 1) * b].add_(self.tap(before[j - back], back))
                if len(x) > back * b:
                    y[back * b :].add_(self.tap(x[: -back * b], back))
        if past is not None and reach:
            past[self] = [*before, *_last(x, b, reach)][-reach:]
        return y

    def _paired(self, frames: list[Tensor], at: int) -> Tensor:
        """`frames[at:]` convolved, those before them in view."""
        found = []
        if at == 0:
            found.append(self.tap(frames[0], 0))
            at = 1
        assert (len(frames) - at) % 2 == 0, "a frame has no second one"
        first, _, third = self.weight
        even = (first + third) / 2
        weights = first, even + self.weight[1] / 2, even - self.weight[1] / 2, third
        for i in range(at, len(frames), 2):
            one = frames[i - 2] if i > 1 else torch.zeros_like(frames[0])
            found.append(self._two([one, *frames[i - 1 : i + 2]], weights))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _two(self, frames: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The two last of four frames convolved."""
        b, _, h, w = frames[0].shape
        if torch.is_grad_enabled():
            return torch.cat(self._band(frames, weights, 0, h))
        y = rearrange(frames[0].new_empty(2 * b, h, w, len(self.bias)), "n h w c -> n c h w")
        rows = max(TOGETHER // 4 // (b * w), 1)  # a band at a time: sums and products stay small
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            y[:b, :, top:bottom], y[b:, :, top:bottom] = self._band(frames, weights, top, bottom)
        return y

    def _band(
        self, frames: list[Tensor], weights: Sequence[Tensor], top: int, bottom: int
    ) -> tuple[Tensor, Tensor]:
        """`_two` in some rows."""
        reach, height = self.weight.shape[2] // 2, frames[0].shape[2]
        above, below = max(top - reach, 0), min(bottom + reach, height)
        beyond = 0, 0, above - (top - reach), bottom + reach - below  # rows of nothing
        one, two, three, four = (frame[:, :, above:below] for frame in frames)

        def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return _convolve(F.pad(x, beyond) if any(beyond) else x, weight, bias, padding=(0, reach))

        both = convolved(two + three, weights[1], self.bias)
        other = convolved(three - two, weights[2])
        later = both - other
        earlier = both.add_(other)
        later.sub_(convolved(two - four, weights[3]))
        earlier.add_(convolved(one - three, weights[0]))
        return earlier, later


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    options.setdefault("padding", weight.shape[1] // 2)
    return F.conv2d(x, rearrange(weight, "o p q c -> o c p q"), bias, **options)


class Norm(nn.Module):
    """Each position's channels to a root mean square of one, scaled; then SiLU, if asked for."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *, silu: bool = True, own: bool = False) -> Tensor:
        """`own`: x may be overwritten, where no gradient is asked for."""
        scale = rearrange(self.scale, "c -> c 1 1") * math.sqrt(len(self.scale))
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        if torch.is_grad_enabled():
            y = (x / length * scale).to(x.dtype)
            return F.silu(y) if silu else y
        y = x.div_(length) if own else torch.div(x, length).to(x.dtype)
        y.mul_(scale)
        return F.silu(y, inplace=True) if silu else y


class Residual(nn.Module):
    def __init__(self, width: int, out: int, *, pairs: bool = False):
        super().__init__()
        self.norm1 = Norm(width)
        self.conv1 = Conv(width, out, pairs=pairs)
        self.norm2 = Norm(out)
        self.conv2 = Conv(out, out, pairs=pairs)
        nn.init.zeros_(self.conv2.weight)  # a block begins as its shortcut
        nn.init.zeros_(self.conv2.bias)
        self.shortcut = Conv(width, out, time=1, side=1) if width != out else None

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        y = self.conv1(self.norm1(x), b, past)
        y = self.conv2(self.norm2(y, own=True), b, past)
        return y.add_(x if self.shortcut is None else self.shortcut(x, b))


class Attention(nn.Module):
    """The positions of a frame among themselves, one head; it begins as nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = Norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        y = rearrange(self.norm(x, silu=False), "n c h w -> n 1 (h w) c")
        y = F.scaled_dot_product_attention(*self.qkv(y).chunk(3, dim=-1))
        y = rearrange(self.out(y), "n 1 (h w) c -> n c h w", h=x.shape[2])
        return x + y


class Down(nn.Module):
    """Half the height and width; with `time`, two frames after the first become one."""

    def __init__(self, width: int, *, time: bool):
        super().__init__()
        self.space = Conv(width, width, time=1)
        self.time = Conv(width, width, side=1) if time else None

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        # A place sees itself and what is right of and below it: a row and a column more than asked for, cut off.
        x = self.space.tap(x, 0, stride=2, padding=2)[:, :, 1:, 1:]
        if self.time is None:
            return x
        before = past.get(self, []) if past is not None else []
        if past is not None:
            past[self] = _last(x, b, 1)
        first, seen = ([], torch.cat([*before, x])) if before else ([x[:b]], x)
        steps = (len(seen) // b - 1) // 2
        if not steps:
            return x
        frames = rearrange(seen, "(f b) c h w -> f b c h w", b=b)
        taps = [rearrange(frames[2 - back :: 2][:steps], "f b c h w -> (f b) c h w") for back in range(3)]
        y = self.time.tap(taps[0], 0)
        for back in (1, 2):
            y.add_(self.time.tap(taps[back], back))
        return torch.cat([*first, y]) if first else y


class Up(nn.Module):
    """Twice the height and width, half the channels; with `time`, every frame but the first becomes two."""

    def __init__(self, width: int, *, time: bool):
        super().__init__()
        self.space = Conv(width, width // 2, time=1)
        self.time = Conv(width, 2 * width, side=1) if time else None
        if self.time is not None:  # frames are doubled at the start
            bound = math.sqrt(3 / width)
            half = torch.empty(width, 1, 1, width).uniform_(-bound, bound)
            with torch.no_grad():
                self.time.weight[-1] = torch.cat([half, half])

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        if self.time is not None:
            begun = past is not None and self in past
            if past is not None:
                past[self] = []
            first, rest = ([], x) if begun else ([x[:b]], x[b:])
            if len(rest):
                y = rearrange(self.time(rest, b, past), "n c h w -> n h w c")
                y = rearrange(y, "(f b) h w (two c) -> (f two b) h w c", two=2, b=b)
                y = rearrange(y, "n h w c -> n c h w")
                x = torch.cat([*first, y]) if first else y
        return self.doubled(x)

    def doubled(self, x: Tensor) -> Tensor:
        """Every pixel drawn as 2 x 2, then the convolution, as four of 2 x 2 before the drawing.

        Of three neighbouring pixels of the larger picture two are the same one of the smaller: where the even ones of
        the larger look, their weights are (first, second + third), where the odd ones look (first + second, third).
        """
        h, w = x.shape[2:]
        kernel = self.space.weight[0]  # o p q c
        rows = torch.stack(
            [kernel[:, 0], kernel[:, 1] + kernel[:, 2], kernel[:, 0] + kernel[:, 1], kernel[:, 2]]
        )
        rows = rearrange(rows, "(y p) o q c -> y o p q c", p=2)
        both = torch.stack(
            [
                rows[..., 0, :],
                rows[..., 1, :] + rows[..., 2, :],
                rows[..., 0, :] + rows[..., 1, :],
                rows[..., 2, :],
            ]
        )
        kernels = rearrange(both, "(x q) y o p c -> (y x o) c p q", q=2)
        kernels = kernels.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernels, repeat(self.space.bias, "o -> (four o)", four=4), padding=1)
        parts = rearrange(y, "n (y x o) h w -> n y x o h w", y=2, x=2)
        if torch.is_grad_enabled():
            drawn = torch.stack([parts[:, i, j, :, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)])
            drawn = rearrange(drawn, "(y x) n o h w -> n (h y) (w x) o", y=2)
            return rearrange(drawn, "n h w o -> n o h w")
        drawn = x.new_empty(len(x), 2 * h, 2 * w, parts.shape[3])
        for i in (0, 1):
            for j in (0, 1):
                drawn[:, i::2, j::2] = rearrange(
                    parts[:, i, j, :, i : i + h, j : j + w], "n o h w -> n h w o"
                )
        return rearrange(drawn, "n h w o -> n o h w")


def _last(x: Tensor, b: int, count: int) -> list[Tensor]:
    """The last frames, at most `count`, which keep no more of the memory of `x` than themselves."""
    frames = list(x[-count * b :].split(b))
    return [frame.clone() for frame in frames] if len(x) > len(frames) * b else frames


# ---------------------------------------------------------------- the two halves


class Stage(nn.Module):
    """Residual blocks, then half or twice the size, if there is another stage.

    `pairs`: a latent frame after the first stands for an even number of frames here.
    """

    def __init__(self, width: int, out: int, *, blocks: int, change: Down | Up | None, pairs: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Residual(width if i == 0 else out, out, pairs=pairs) for i in range(blocks)
        )
        self.change = change
        self.pairs = pairs

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        x = self.refined([x], b, past)
        return x if self.change is None else self.change(x, b, past)

    def refined(self, held: list[Tensor], b: int, past: Past | None) -> Tensor:
        """The blocks alone; what is held is let go as soon as it is used."""
        x = held.pop()
        for block in self.blocks:
            x = block(x, b, past)
        return x

    def parts(self, x: Tensor, b: int, past: Past | None) -> list[Tensor]:
        """The frames in as many parts as pay off, two frames or a multiple each and the first apart where they pair."""
        if past is None:
            return [x]
        first = self.pairs and self.blocks[0].conv1 not in past
        rest = _parts(x[b:] if first else x, b, 2 if self.pairs else 1)
        return [x[:b], *rest] if first else rest


def _parts(x: Tensor, b: int, unit: int, *, growth: int = 1) -> list[Tensor]:
    """`unit` frames or a multiple each: more only as long as together they, or what they grow into, are small."""
    most = TOGETHER // (growth * b * x.shape[2] * x.shape[3])
    return list(x.split(max(most // unit, 1) * unit * b)) if len(x) else []


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.before = Residual(width, width)
        self.attention = Attention(width)
        self.after = Residual(width, width)

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        return self.after(self.attention(self.before(x, b, past), b, past), b, past)


class Encoder(nn.Module):
    """Frames with folded pixels -> mean and log variance, twice the channels."""

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        widths = (config.widths[0], *config.widths)
        self.stem = Conv(3 * config.patch**2, widths[0], pairs=any(config.temporal))
        self.stages = nn.ModuleList(
            Stage(
                width, out, blocks=config.blocks,
                change=Down(out, time=config.temporal[i]) if i < len(config.temporal) else None,
                pairs=any(config.temporal[i:]),
            )
            for i, (width, out) in enumerate(pairwise(widths))
        )  # fmt: skip
        self.middle = Middle(widths[-1])
        self.norm = Norm(widths[-1])
        self.head = Conv(widths[-1], 2 * config.channels)
        self.out = Conv(2 * config.channels, 2 * config.channels, time=1, side=1)
        with (
            torch.no_grad()
        ):  # latents begin with little noise: first the decoder learns to draw, then to guess
            self.out.weight[..., config.channels :, :, :, :].mul_(0.1)
            self.out.bias[config.channels :] = -6

    def forward(self, x: Tensor, b: int, past: Past | None) -> Tensor:
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            parts = stage.parts(x, b, past)
            del x
            done = []
            while parts:
                part = parts.pop(0)
                done.append(stage(self.stem(part, b, past) if i == 0 else part, b, past))
            x = done[0] if len(done) == 1 else torch.cat(done)
        x = self.middle(x, b, past)
        return self.out(self.head(self.norm(x), b, past), b)


class Decoder(nn.Module):
    """Raw latents -> frames with folded pixels, some at a time."""

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        outs = config.widths[::-1]
        widths = (outs[0], *(width // 2 for width in outs[:-1]))
        self.enter = Conv(config.channels, config.channels, time=1, side=1)
        self.stem = Conv(config.channels, outs[0])
        self.middle = Middle(outs[0])
        temporal = config.temporal[::-1]
        self.stages = nn.ModuleList(
            Stage(
                width, out, blocks=config.blocks + 1,
                change=Up(out, time=temporal[i]) if i < len(temporal) else None,
                pairs=any(temporal[:i]),
            )
            for i, (width, out) in enumerate(zip(widths, outs, strict=True))
        )  # fmt: skip
        self.norm = Norm(outs[-1])
        self.head = Conv(outs[-1], 3 * config.patch**2, pairs=any(temporal))

    def forward(self, x: Tensor, b: int, past: Past | None) -> Iterator[Tensor]:
        x = self.stem(self.enter(x, b), b, past)
        yield from self._grown([self.middle(x, b, past)], b, past, 0)

    def _grown(self, held: list[Tensor], b: int, past: Past | None, i: int) -> Iterator[Tensor]:
        """Depth first: what a few frames grow into is finished before the next ones begin."""
        stage = self.stages[i]
        assert isinstance(stage, Stage)
        parts = stage.parts(held.pop(), b, past)
        while parts:
            x = stage.refined([parts.pop(0)], b, past)
            if stage.change is None:
                yield self.head(self.norm(x, own=True), b, past)
                continue
            time = stage.change.time is not None  # whose frames become two each
            unit = 2 if stage.pairs and not time else 1
            few = [x] if past is None else _parts(x, b, unit, growth=8 if time else 4)
            del x
            while few:
                yield from self._grown([stage.change(few.pop(0), b, past)], b, past, i + 1)


# ---------------------------------------------------------------- the whole


class VideoVae(nn.Module):
    """`encode`: `b 3 f h w` in [-1, 1] -> normalised latents `b c g h/s w/s`, g = 1 + (f - 1) / t; `decode` back.

    `chunk` is how many latent frames are computed together (by default as many as pay off): it changes how much memory
    is taken, not the result, but for rounding. `tile` is the side in pixels of the squares that large frames are
    computed in, each with all its frames; neighbours share `overlap` pixels (by default a quarter), blended there.
    """

    mean: Tensor  # of the raw latents, per channel
    std: Tensor

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def stride(self) -> tuple[int, int]:
        """(time, space)."""
        return self.config.stride

    # A signal and its latents ---------------------------------------------------------------------------------------

    def encode(
        self, video: Tensor, *, chunk: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        return self._normal(self.posterior(video, chunk=chunk, tile=tile, overlap=overlap)[0])

    def decode(
        self,
        latents: Tensor,
        *,
        chunk: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        return self.draw(self._raw(latents), chunk=chunk, tile=tile, overlap=overlap)

    def posterior(
        self, video: Tensor, *, chunk: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents."""
        self._check(video)
        frames, (time, space) = video.shape[2], self.stride
        latent = 1 + (frames - 1) // time

        def run(part: Tensor) -> Iterator[Tensor]:
            positions = 4 * time * part[:, 0, 0].numel() // self.config.patch**2
            size = self._chunk(chunk, positions)
            cuts = [0, *(1 + time * (g - 1) for g in range(size, latent, size)), frames]
            yield from self._encoded((part[:, :, a:z] for a, z in pairwise(cuts)), keep=frames > 1)

        cut = self._tiles(video.shape[3] // space, video.shape[4] // space, tile, overlap)
        shape = 2 * self.channels, latent, video.shape[3] // space, video.shape[4] // space
        mean, log_variance = _assembled(video, shape, run, cut, into=space, out=1).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def draw(
        self, raw: Tensor, *, chunk: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """Raw latents -> video."""
        latent, h, w = raw.shape[2:]
        time, space = self.stride

        def run(part: Tensor) -> Iterator[Tensor]:
            pieces = part.split(self._chunk(chunk, part[:, 0, 0].numel()), dim=2)
            yield from self._decoded(pieces, keep=latent > 1)

        shape = 3, 1 + (latent - 1) * time, h * space, w * space
        return _assembled(raw, shape, run, self._tiles(h, w, tile, overlap), into=1, out=space)

    # The same for signals that come and go in pieces ----------------------------------------------------------------

    def encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The latents of a clip whose frames come in pieces `b 3 f h w` of any lengths, as soon as they are filled."""
        for raw in self._encoded(self._filling(pieces)):
            yield self._normal(raw[:, : self.channels])

    def decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The frames of a clip whose latents come in pieces `b c g h w` of any lengths, as soon as they are drawn."""
        yield from self._decoded(self._raw(piece) for piece in pieces)

    def _encoded(self, pieces: Iterable[Tensor], *, keep: bool = True) -> Iterator[Tensor]:
        past: Past | None = {} if keep else None
        p = self.config.patch
        for piece in pieces:
            b = len(piece)
            x = rearrange(piece, "b c f (h p) (w q) -> (f b) h w (c q p)", p=p, q=p).contiguous()
            x = self.encoder(rearrange(x, "n h w c -> n c h w"), b, past)
            yield rearrange(x, "(f b) c h w -> b c f h w", b=b)

    def _decoded(self, pieces: Iterable[Tensor], *, keep: bool = True) -> Iterator[Tensor]:
        past: Past | None = {} if keep else None
        p = self.config.patch
        for piece in pieces:
            b = len(piece)
            x = rearrange(piece, "b c f h w -> (f b) h w c").contiguous()
            for y in self.decoder(rearrange(x, "n h w c -> n c h w"), b, past):
                yield rearrange(y, "(f b) (c q p) h w -> b c f (h p) (w q)", b=b, p=p, q=p)

    def _filling(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        rest: list[Tensor] = []
        need, time = 1, self.stride[0]
        for piece in pieces:
            rest = [torch.cat([*rest, piece], dim=2)]
            count = rest[0].shape[2]
            if count >= need:
                end = need + (count - need) // time * time
                self._check(rest[0][:, :, : self.whole(end)], frames=1)
                yield rest[0][:, :, :end]
                rest, need = [rest[0][:, :, end:]], time
        if rest and rest[0].shape[2]:
            raise InputError(
                f"{rest[0].shape[2]} frames are left at the end that do not fill a latent frame of {time}: "
                "repeat the last one until they do."
            )

    def _chunk(self, chunk: int | None, positions: int) -> int:
        """Latent frames to compute together where one of them has so many positions."""
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}: give the latent frames to compute together, 1 or more.")
        if chunk is not None:
            return chunk
        return 2**30 if torch.is_grad_enabled() else max(4 * TOGETHER // positions, 1)

    def _tiles(self, h: int, w: int, tile: int | None, overlap: int | None) -> list[list[Span]]:
        """Where tiles begin and end in latents of h x w, and the weights of their places: down and across."""
        if tile is None:
            if overlap is not None:
                raise InputError(f"overlap {overlap} was given without tile: give the tiles' side as well.")
            return [[(0, h, (0, 0))], [(0, w, (0, 0))]]
        space = self.stride[1]
        overlap = tile // space // 4 * space if overlap is None else overlap
        if tile < space or tile % space or overlap < 0 or overlap % space or 2 * overlap > tile:
            raise InputError(
                f"tiles of {tile} pixels with {overlap} in common cannot be cut: give multiples of {space}, and at "
                "most half of a tile in common."
            )
        return [_spans(n, tile // space, overlap // space) for n in (h, w)]

    def _normal(self, raw: Tensor) -> Tensor:
        wide = "c -> 1 c 1 1 1"
        return (raw - rearrange(self.mean, wide)) / rearrange(self.std, wide)

    def _raw(self, latents: Tensor) -> Tensor:
        _check_axes(latents, self.channels, "latents")
        wide = "c -> 1 c 1 1 1"
        return latents * rearrange(self.std, wide) + rearrange(self.mean, wide)

    def _check(self, video: Tensor, frames: int | None = None) -> None:
        _check_axes(video, 3, "a video")
        frames = frames or video.shape[2]
        (time, space), (h, w) = self.stride, video.shape[3:]
        if frames != self.whole(frames):
            raise InputError(
                f"{frames} frames do not fill latent frames: give 1 and some times {time}, such as "
                f"{self.whole(frames)}."
            )
        if h % space or w % space:
            raise InputError(f"frames of {h} x {w} cannot be encoded: both must be multiples of {space}.")

    # Shapes ---------------------------------------------------------------------------------------------------------

    def whole(self, frames: int) -> int:
        """The least number of frames, at least `frames`, that fills its latent frames: 1, 5, 9, ..."""
        time = self.config.stride[0]
        return 1 + time * -(-(frames - 1) // time)

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        time, space = self.config.stride
        return self.config.channels, 1 + -(-(frames - 1) // time), size[0] // space, size[1] // space

    def latent_mask(self, mask: Tensor) -> Tensor:
        """`b f` -> `b g`, for clips that fill their latent frames: True where every frame that one stands for is.

        So is a mask of pixels, `b f h w`, where all that a latent stands for is True.
        """
        time, side = self.config.stride
        if mask.ndim == 4:
            mask = rearrange(mask, "b f (h q) (w r) -> b f h w (q r)", q=side, r=side).all(-1)
        rest = rearrange(mask[:, 1:], "b (g time) ... -> b g time ...", time=time).all(2)
        return torch.cat([mask[:, :1], rest], dim=1)

    # Training -------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Tensor], *, kl: float = 1e-4) -> dict[str, Tensor]:
        """L1, plus a small KL to a standard normal. `video b 3 f h w`, `noise` like the latents."""
        mean, log_variance = self.posterior(batch["video"])
        raw = mean + batch["noise"] * (0.5 * log_variance).exp()
        l1 = F.l1_loss(self.draw(raw), batch["video"])
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + kl * divergence, "l1": l1, "kl": divergence}


def _check_axes(x: Tensor, channels: int, what: str) -> None:
    """InputError: no floats `b c f h w`. Unnoticed, other axes would pass where they can be stretched."""
    if x.ndim != 5 or x.shape[1] != channels or not len(x) or 0 in x.shape[3:] or not x.is_floating_point():
        raise InputError(
            f"{what} of shape {tuple(x.shape)} and {x.dtype} cannot be taken: give floats `b {channels} f h w`."
        )


def _spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of one axis, each with how many places it shares with the one before and the one after."""
    starts = range(0, max(size - overlap, 1), tile - overlap)
    return [
        (at, min(at + tile, size), (overlap if at else 0, overlap if at != starts[-1] else 0))
        for at in starts
    ]


def _weights(span: Span, scale: int, like: Tensor) -> Tensor:
    """How much a tile counts at each of its places; where two tiles meet, together one."""
    begin, end, shared = span
    before, after = (n * scale for n in shared)
    weight = like.new_ones((end - begin) * scale)
    if before:
        weight[:before] = (torch.arange(before).to(weight) + 0.5) / before
    if after:
        weight[-after:] = 1 - (torch.arange(after).to(weight) + 0.5) / after
    return weight


def _assembled(
    x: Tensor,
    shape: tuple[int, ...],
    run: Callable[[Tensor], Iterator[Tensor]],
    cut: list[list[Span]],
    *,
    into: int,
    out: int,
) -> Tensor:
    """`run` on the tiles of `x`, whose pieces follow each other in time, put together to `b` x `shape`.

    A place of the latents, in which the tiles are counted, has a side of `into` in x and of `out` in the result.
    """
    rows, columns = cut
    alone = len(rows) == len(columns) == 1
    if alone and torch.is_grad_enabled():
        found = list(run(x))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)
    whole = x.new_empty(len(x), *shape) if alone else x.new_zeros(len(x), *shape)
    # Items that are large by themselves gain nothing from being computed together.
    most = len(x) if torch.is_grad_enabled() else max(TOGETHER // x[0, 0, 0].numel(), 1)
    for some, items in zip(whole.split(most), x.split(most), strict=True):
        for row in rows:
            for column in columns:
                tile = items[..., row[0] * into : row[1] * into, column[0] * into : column[1] * into]
                place = some[..., row[0] * out : row[1] * out, column[0] * out : column[1] * out]
                at = 0
                for piece in run(tile):
                    target = place[:, :, at : at + piece.shape[2]]
                    if alone:
                        target.copy_(piece)
                    else:
                        piece = piece * rearrange(_weights(row, out, x), "h -> h 1")
                        target.add_(piece * _weights(column, out, x))
                    at += piece.shape[2]
    return whole
