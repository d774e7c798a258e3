"""Training codecs that make codes of pictures: DALL-E's autoencoder (codecs/dvae.py) and VQGAN (codecs/vq.py).

    dvae     any folder, or the procedural world, on a CPU           reverie train dvae-tiny FOLDER
    vqgan    the same with a learned codebook                        reverie train vqgan-tiny FOLDER
    paper    both at their papers' sizes                             reverie train dvae-paper FOLDER

Every draw is keyed by (seed, purpose, epoch, item) or by the step. On the way held-out pictures are encoded and drawn
again: how near they come (PSNR), and how much of the codebook is used. docs/systems/dalle.md has what was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import reverie
from reverie import rng
from reverie.backbones.discriminator import Discriminator, DiscriminatorConfig
from reverie.codecs.dvae import Dvae, DvaeConfig, gumbel, soft_choice, squeezed
from reverie.codecs.vq import MovingCodebook, VqConfig, VqVae, passed
from reverie.data.augment import on_white
from reverie.data.index import Index
from reverie.data.streaming import open_pixels
from reverie.errors import InputError
from reverie.evals.codebook import used
from reverie.evals.reconstruction import psnr
from reverie.objectives.adversarial import adaptive_weight, discriminator_hinge, generator_hinge
from reverie.objectives.discrete import commitment, from_uniform, logit_laplace
from reverie.objectives.perceptual import Features, perceptual, tiled
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import (
    averaged,
    digest,
    keep,
    load_clip,
    my_share,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
    seldom,
)
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import peers, team
from reverie.train.schedule import cosine

HELD = 64  # pictures that are drawn again on the way
COLUMNS = 8

Codec = Dvae | VqVae


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed:
    """How the choice of DALL-E's autoencoder hardens (2102.12092, appendix A.2)."""

    beta: float = 6.6  # weight of the divergence from the uniform distribution; divided by 3 stride^2
    ramp: int = 5000  # steps until it weighs so much
    last: float = 1 / 16  # the temperature that is reached, from 1 on
    cool: int = 150_000  # after so many steps
    least: float = (
        0.0  # the smallest scale b: what is flat would else be learnt ever more exactly, and nothing besides
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded:
    """What VQGAN pays for, and how its codebook moves."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0
    commitment: float = 0.25
    adversarial: float = 0.0  # of what pulls at the last layer as hard as all before; 0: no discriminator
    adversarial_from: int = 0
    decay: float = 0.99  # of the codebook's averages; 0: it learns by gradients
    patience: int = 100  # steps without being chosen, after which a vector begins anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: DvaeConfig | VqConfig
    learns: Relaxed | Coded
    clip: str = ""  # whose layers the perceptual loss compares
    discriminator: DiscriminatorConfig = DiscriminatorConfig(clips=False)
    steps: int
    batch: int
    size: int
    fit: str = "pad"
    streamed: bool = False
    lr: float
    floor: float = 0.02  # of the learning rate
    weight_decay: float = 0.0
    judge_lr: float = 2e-4
    ema: float = 0.995
    seed: int = 0
    data: str = ""


def dvae(
    data: Path, out: Path, *, vocab: int = 1024, width: int = 32, groups: int = 3, depth: int = 1, steps: int = 3000,
    batch: int = 32, size: int = 64, lr: float = 1e-3, beta: float = 3.0, least: float = 0.1, world: int = 0,
    sources: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> Dvae:  # fmt: skip
    """A small discrete autoencoder as DALL-E's, from random weights.

    Args:
        data: A folder that was imported, or one to import, or with world a new one for it.
        out: The run's folder; the model is written to its `model`.
        vocab: How many codes there are.
        width: Channels at full size, a multiple of 4; they double with each group.
        groups: Groups of blocks; each but the last halves the side.
        depth: Blocks of a group.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        size: Pixels a side, a multiple of the stride.
        lr: The highest learning rate.
        beta: Weight of the divergence of the choice from the uniform one.
        least: The smallest scale of the likelihood, which flat colours would else drive to nothing.
        world: Learn from so many pictures of the procedural world, drawn first if they are not there.
        sources: Learn from these sources of the index alone, with commas between them.
        seed: Another seed, another start and another order.
    """
    index = _pictures(data, world, sources, seed)
    config = CodecRun(
        model=DvaeConfig(vocab=vocab, width=width, groups=groups, depth=depth, begin=2 * width),
        learns=Relaxed(beta=beta, ramp=steps // 5, cool=steps * 3 // 4, least=least),
        steps=steps, batch=batch, size=size, lr=lr, seed=seed,
    )  # fmt: skip
    model = fit(config, index, out, engine=engine)
    assert isinstance(model, Dvae)
    return model


def vqgan(
    data: Path, out: Path, *, vocab: int = 1024, dim: int = 32, width: int = 32, levels: int = 3, steps: int = 3000,
    batch: int = 32, size: int = 64, lr: float = 1e-3, clip: str = "clip-stickers", l1: float = 0.5, l2: float = 2.0,
    perceptual: float = 0.1, adversarial: float = 0.0, adversarial_from: int = 0, decay: float = 0.99,
    patience: int = 100, world: int = 0, sources: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> VqVae:  # fmt: skip
    """A small autoencoder with a learned codebook, from random weights.

    Args:
        data: A folder that was imported, or one to import, or with world a new one for it.
        out: The run's folder; the model is written to its `model`.
        vocab: How many codes there are.
        dim: Numbers of a vector of the codebook.
        width: Channels at full size, a multiple of 8; twice as many below, four times at the bottom.
        levels: Sizes, each half the one above: 3 make a code of 4 x 4 pixels and 4 one of 8 x 8.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        size: Pixels a side, a multiple of the stride.
        lr: The highest learning rate.
        clip: The CLIP whose layers the perceptual loss compares: a shipped name or a folder.
        l1: Weight of the absolute difference of pixels.
        l2: Weight of the squared difference, which finds small things sooner.
        perceptual: Weight of the perceptual loss; 0 for none.
        adversarial: Weight of the discriminator, such as 0.8; 0 for none.
        adversarial_from: The first step of the discriminator, counted from 0.
        decay: Of the averages that the codebook follows; 0 lets it learn by gradients.
        patience: Steps without being chosen, after which a vector of the codebook begins anew.
        world: Learn from so many pictures of the procedural world, drawn first if they are not there.
        sources: Learn from these sources of the index alone, with commas between them.
        seed: Another seed, another start and another order.
    """
    if levels < 1:
        raise InputError(f"levels is {levels}: give 1 or more, such as 3.")
    index = _pictures(data, world, sources, seed)
    config = CodecRun(
        model=small_vq(width, levels, {"vocab": vocab, "dim": dim}),
        learns=Coded(
            l1=l1, l2=l2, perceptual=perceptual, adversarial=adversarial, adversarial_from=adversarial_from,
            decay=decay, patience=patience,
        ),
        clip=clip if perceptual else "", steps=steps, batch=batch, size=size, lr=lr, seed=seed,
    )  # fmt: skip
    model = fit(config, index, out, engine=engine)
    assert isinstance(model, VqVae)
    return model


def small_vq(width: int, levels: int, own: Mapping[str, Any]) -> VqConfig:
    """Of `vqgan`, whose other settings are `own`: width, twice and then four times as much below."""
    widths = tuple(width * min(2**i, 4) for i in range(levels))
    return VqConfig(
        vocab=own["vocab"], dim=own["dim"], channels=widths[-1], widths=widths, depth=1, groups=8, attention=0
    )


def paper_dvae(
    data: Path, out: Path, *, steps: int = 3_000_000, batch: int = 512, size: int = 256, lr: float = 1e-4,
    seed: int = 0, engine: Engine = ENGINE,
) -> Dvae:  # fmt: skip
    """DALL-E's autoencoder as in the paper (2102.12092, appendix A.2): 8,192 codes of 8 x 8 pixels. Not yet run by us.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        size: Pixels a side, a multiple of 8.
        lr: The highest learning rate.
        seed: Another seed, another start and another order.
    """
    config = CodecRun(
        model=DvaeConfig(), learns=Relaxed(), steps=steps, batch=batch, size=size, fit="crop", streamed=True, lr=lr,
        floor=0.0125, weight_decay=1e-4, ema=0.999, seed=seed,
    )  # fmt: skip
    model = fit(config, open_index(data), out, engine=engine)
    assert isinstance(model, Dvae)
    return model


def paper_vqgan(
    data: Path, out: Path, *, clip: str, steps: int = 750_000, batch: int = 12, size: int = 256, lr: float = 5.4e-5,
    seed: int = 0, engine: Engine = ENGINE,
) -> VqVae:  # fmt: skip
    """VQGAN as its authors train it on ImageNet: 1,024 codes of 16 x 16 pixels, by gradients. Not yet run by us.

    A CLIP stands where the authors compare layers of VGG. The discriminator begins at step 250,000.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP whose layers the perceptual loss compares: its name or folder.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        size: Pixels a side, a multiple of 16.
        lr: The learning rate.
        seed: Another seed, another start and another order.
    """
    config = CodecRun(
        model=VqConfig(),
        learns=Coded(adversarial=0.8, adversarial_from=250_000, decay=0.0),
        clip=clip, discriminator=DiscriminatorConfig(width=64, depth=3, clips=False), steps=steps, batch=batch,
        size=size, fit="crop", streamed=True, lr=lr, floor=1.0, judge_lr=lr, ema=0.999, seed=seed,
    )  # fmt: skip
    model = fit(config, open_index(data), out, engine=engine)
    assert isinstance(model, VqVae)
    return model


def _pictures(data: Path, world: int, sources: str, seed: int) -> Index:
    if world < 0:
        raise InputError(f"world is {world}: give the number of pictures to draw, or leave it out.")
    index = open_world(data, world, 0, seed=seed) if world else plain_stickers(open_index(data))
    return index.select(sources=sources.split(",")) if sources else index


def fit(config: CodecRun, index: Index, out: Path, *, engine: Engine = ENGINE) -> Codec:
    """Train, draw held-out pictures again on the way, save the averaged weights to `out/model`."""
    torch.manual_seed(rng.integer(config.seed, "weights"))
    learner = Learner(config)
    if engine.shard and learner.moving is not None:
        raise InputError(
            "shard and a codebook that follows its features do not go together: it would lie in parts. Leave --shard"
            " out: every process then holds the model."
        )
    if config.size < learner.codec.stride or config.size % learner.codec.stride:
        raise InputError(f"size {config.size} cannot be encoded: give a multiple of {learner.codec.stride}.")
    if config.batch < 1:
        raise InputError(f"batch is {config.batch}: give 1 or more.")
    learner = engine.place(learner)
    learns = config.learns
    plays = isinstance(learns, Coded) and learns.adversarial > 0
    if plays and engine.shard:
        raise InputError(
            "shard and adversarial do not go together: the discriminator is weighed at the decoder's last weight, "
            "which would lie in parts. Leave --shard out: every process then holds the model."
        )
    learner.features = _features(config, engine)
    judge = engine.place(Discriminator(config.discriminator)) if plays else None
    learner.judged_by(judge)
    schedule = partial(cosine, steps=config.steps, warmup=min(100, config.steps // 10), floor=config.floor)
    players = [
        Player(
            learner,
            optimizer=adamw(learner, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)),
            schedule=schedule,
            ema=Ema(learner, decay=config.ema),
            clip=1.0,
        )
    ]
    if judge is not None:
        assert isinstance(learns, Coded)
        players.append(
            Player(
                judge,
                optimizer=adamw(judge, lr=config.judge_lr, weight_decay=0.0, betas=(0.5, 0.9)),
                schedule=schedule,
                clip=1.0,
                loss=learner.judge_loss,
                name="discriminator",
                plays=lambda step: step >= learns.adversarial_from,
            )
        )
    source = Source(index.select(split="train", video=False), config)
    val = index.select(split="val", video=False)
    held = Source(val, config).evenly(HELD) if len(val) else None

    run = Run(out, dataclasses.replace(config, data=digest(source.index, source.good)))
    for step in train(players, source.batch, run=run, steps=config.steps, seed=config.seed,
                      save_every=max(config.steps // 12, 1), keep=1, prefetch=2, **engine.loop):  # fmt: skip
        if not step.skipped:
            learner.advance(config.seed, step.number)
        if step.number == 1:
            name_bad(run, source.pixels)
        if step.every(20):
            run.log(step.number, step.metrics)
        if held is not None and step.every(seldom(config.steps, 12)):
            with averaged(players[0]) as whole:
                drawn, numbers = redrawn(whole.codec, held)
            run.log(step.number, {f"val_{name}": value for name, value in numbers.items()})
            run.say(f"step {step.number}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
            save_pairs(held, drawn, run.sample_path(step.number))
            run.curves()
    with averaged(players[0]) as whole:
        keep(whole.codec, out / "model")
    return reverie.load(out / "model")


@torch.no_grad()
def redrawn(codec: Codec, images: Tensor, *, batch: int = 32) -> tuple[Tensor, dict[str, float]]:
    """Pictures `n 3 h w` encoded and decoded; their PSNR in dB, the usage and the perplexity of the codebook."""
    place = next(codec.parameters()).device
    codes = torch.cat([codec.encode(part.to(place)) for part in images.split(batch)])
    drawn = torch.cat([codec.decode(part) for part in codes.split(batch)]).clamp(-1, 1).cpu()
    return drawn, {"psnr": psnr(drawn, images).mean().item(), **used(codes.cpu(), codec.vocab)}


def save_pairs(true: Tensor, drawn: Tensor, path: Path) -> None:
    """Rows of pictures, each with what became of it below."""
    count = min(len(true), 4 * COLUMNS) // COLUMNS * COLUMNS or len(true)
    columns = min(COLUMNS, count)
    rows = torch.stack([rearrange(x[:count], "(r c) ... -> r c ...", c=columns) for x in (true, drawn)], 1)
    grid(to_bytes(rearrange(rows, "r two c d h w -> (r two c) d h w")), columns=columns).save(path)


def _features(config: CodecRun, engine: Engine) -> Features | None:
    if not config.clip:
        return None
    clip = load_clip(config.clip).to(engine.home)
    return tiled(clip.layers, clip.config.image.size)


class Learner(nn.Module):
    """A codec, what its codebook follows, and the losses of both.

    A batch has `image b 3 h w`, and for DALL-E's autoencoder `seeds`, from which the noise of each item is drawn, the
    `temperature` of the choice and the weight `beta` of its divergence; `step` counts from 0.
    """

    def __init__(self, config: CodecRun):
        super().__init__()
        self.config = config
        self.codec: Codec = (
            Dvae(config.model) if isinstance(config.model, DvaeConfig) else VqVae(config.model)
        )
        learns = config.learns
        follows = isinstance(learns, Coded) and learns.decay > 0
        self.moving = None
        if follows:
            assert isinstance(self.codec, VqVae)
            assert isinstance(learns, Coded)
            self.codec.codebook.requires_grad_(False)
            self.moving = MovingCodebook(
                self.codec.vocab, self.codec.config.dim, decay=learns.decay, patience=learns.patience
            )
        self.features: Features | None = None
        self._judge: list[Discriminator] = []
        self.fresh: tuple[Tensor, Tensor] | None = None  # what chose, and the codes, of this step

    def judged_by(self, judge: Discriminator | None) -> None:
        self._judge = [] if judge is None else [judge]  # in a list, so that its weights are not this module's

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._relaxed(batch) if isinstance(self.codec, Dvae) else self._coded(batch)

    def _relaxed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The negative evidence lower bound, in nats for each number of the picture."""
        codec, image = self.codec, batch["image"]
        assert isinstance(codec, Dvae)
        logits = codec.logits(image)
        noise = batch["noise"] if "noise" in batch else self._noise(batch["seeds"], logits)
        choice = soft_choice(logits.float(), noise, batch["temperature"])
        mean, scale = codec.draw(choice)
        assert isinstance(self.config.learns, Relaxed)
        likelihood = logit_laplace(
            squeezed(image), mean.float(), scale.float(), least=self.config.learns.least
        )
        apart = from_uniform(logits)
        loss = likelihood + batch["beta"] / (3 * codec.stride**2) * apart
        with torch.no_grad():
            error = F.mse_loss(codec.shown(mean), image)
        return {"loss": loss, "likelihood": likelihood.detach(), "kl": apart.detach(), "l2": error}

    @staticmethod
    def _noise(seeds: Tensor, like: Tensor) -> Tensor:
        return gumbel(like.shape[1:], [int(seed) for seed in seeds.tolist()], like.device)

    def _coded(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """L1, L2, perceptual, commitment, and what the discriminator holds against it, weighed at the last layer."""
        codec, learns, image = self.codec, self.config.learns, batch["image"]
        assert isinstance(codec, VqVae)
        assert isinstance(learns, Coded)
        features = codec.features(image).float()
        codes = codec.chosen(features)
        if self.moving is not None:
            self.fresh = rearrange(features.detach(), "b d h w -> (b h w) d"), codes.flatten()
        vectors = codec.vectors(codes)
        drawn = codec.draw(passed(features, vectors))
        l1, l2 = F.l1_loss(drawn, image), F.mse_loss(drawn, image)
        main = learns.l1 * l1 + learns.l2 * l2
        found = {"l1": l1, "l2": l2}
        if self.features is not None:
            found["perceptual"] = perceptual(drawn, image, self.features)
            main = main + learns.perceptual * found["perceptual"]
        found["commitment"] = commitment(
            features, vectors, beta=learns.commitment, learned=self.moving is None
        )
        loss = main + found["commitment"]
        if self._judge and batch["step"] >= learns.adversarial_from:
            logits = self._judge[0](drawn[:, :, None])
            found["fooled"] = torch.stack([generator_hinge(one) for one in logits]).mean()
            found["adaptive"] = adaptive_weight(main, found["fooled"], codec.decoder.out.weight)
            loss = loss + learns.adversarial * found["adaptive"] * found["fooled"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}

    def judge_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The hinge between the pictures and what the codec draws of them by now."""
        codec, (judge,) = self.codec, self._judge
        assert isinstance(codec, VqVae)
        with torch.no_grad():
            drawn = codec.draw(codec.vectors(codec.encode(batch["image"])))
        real, fake = judge(batch["image"][:, :, None])[0], judge(drawn[:, :, None])[0]
        told = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"loss": discriminator_hinge(real, fake), "told": told}

    @torch.no_grad()
    def advance(self, seed: int, step: int) -> None:
        """After a step: the codebook follows the features of all processes."""
        if self.moving is None or self.fresh is None:
            return
        assert isinstance(self.codec, VqVae)
        features, codes = (peers().gather(x) for x in self.fresh)
        self.moving.advance(self.codec.codebook.data, features, codes, rng.generator(seed, "revival", step))
        self.fresh = None


class Source:
    """Batches of pictures on white, and what a step draws for them."""

    def __init__(self, index: Index, config: CodecRun):
        self.index, self.config = index, config
        with team().in_turn():
            self.pixels = open_pixels(index, size=config.size, fit=config.fit, stream=config.streamed)
        self.good = self.pixels.good
        if not self.good:
            raise InputError(f"nothing usable in {index.folder}: run `reverie data check` to see why.")

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Of `step`, counted from 0."""
        config = self.config
        keys = [
            (epoch, self.good[place])
            for epoch, place in my_share(step, config.batch, len(self.good), config.seed)
        ]
        keys, bad = self.pixels.ready(keys, self.good)
        batch = {
            "image": on_white(torch.stack([self.pixels[i][0] for _, i in keys])),
            "step": step,
            "ids": [self.index[i].file_name for _, i in keys],
            "bad": bad,
        }
        if isinstance(config.learns, Relaxed):
            batch |= {
                "seeds": torch.tensor([rng.integer(config.seed, "choice", *key) % 2**62 for key in keys]),
                "temperature": annealed(1.0, config.learns.last, step, config.learns.cool),
                "beta": annealed(0.0, config.learns.beta, step, config.learns.ramp),
            }
        return batch

    def evenly(self, count: int) -> Tensor:
        """At most `count` pictures, spread over all: `n 3 h w`."""
        some = [
            self.good[i * len(self.good) // min(count, len(self.good))]
            for i in range(min(count, len(self.good)))
        ]
        return on_white(torch.stack([self.pixels[i][0] for i in some]))


def annealed(start: float, end: float, step: int, over: int) -> float:
    """From `start` to `end` along half a cosine in `over` steps."""
    done = min(step / over, 1.0) if over > 0 else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
