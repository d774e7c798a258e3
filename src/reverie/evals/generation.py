"""What a generator of pictures or clips is worth: is the thing asked for in it, does it vary, is it copied?

    pick       a judge names each sample among all the things asked for     right, varied samples: high
    diversity  how far samples of one prompt lie apart                      one picture a prompt: 0
    nearest    how far samples lie from the training set, beside pictures   copies: 0
               that were held out of it
    motion     how much neighbouring frames of a clip differ
    scenes     what the exact judge of the procedural world reads back

Samples are pictures `n 3 h w` or clips `n 3 f h w` in [-1, 1]. A space is a function from samples to vectors `n d`
whose Euclidean distance is the distance: `pixels`, or `features(embed_image)`. The evaluator is given functions,
`generate(prompts, seeds) -> samples`, `score(pictures, names) -> n k`, `embed_image(pictures) -> n d`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reverie import rng
from reverie.errors import InputError
from reverie.evals.interval import bootstrap
from reverie.evals.world_judge import ATTRIBUTES, judge
from reverie.evals.world_judge import score as agree
from reverie.scene import Description, Scene

Generate = Callable[[list[str], list[int]], Tensor]
Score = Callable[[Tensor, Sequence[str]], Tensor]
Space = Callable[[Tensor], Tensor]


def choose(names: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    """`count` of `names` (all, where there are fewer), drawn by `seed`, in alphabetical order."""
    unique = sorted(set(names))
    places = torch.randperm(len(unique), generator=rng.generator(seed, "choose"))[:count]
    return [unique[i] for i in sorted(places.tolist())]


@torch.no_grad()
def draw(
    generate: Generate,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, float]:
    """One sample for every prompt and seed, `batch` at a time, and the seconds that one sample took."""
    assert len(prompts) == len(seeds) > 0
    if batch < 1:
        raise InputError(f"batch is {batch}: draw at least one sample at a time.")
    samples, begin = [], time.perf_counter()
    for at in range(0, len(prompts), batch):
        some = generate(list(prompts[at : at + batch]), list(seeds[at : at + batch]))
        if not some.isfinite().all():
            raise InputError(f"samples {at} to {at + len(some) - 1} are not finite: the generator is broken.")
        samples.append(some.float().cpu())
        if progress:
            progress(min(at + batch, len(prompts)), len(prompts))
    return torch.cat(samples), (time.perf_counter() - begin) / len(prompts)


# ---------------------------------------------------------------- is the thing in it


@torch.no_grad()
def pick(
    samples: Tensor,
    wanted: Sequence[str],
    score: Score,
    *,
    names: Sequence[str] | None = None,
    batch: int = 64,
) -> dict[str, Any]:
    """How often the judge `score` picks the name `wanted[i]` of sample i out of `names` (the names wanted).

    The frames of a clip are scored one by one and their scores averaged. Returns JSON-ready `top1` and `top5` with
    95 % bootstrap intervals over samples, what guessing gives (`chance1`, `chance5`), `ways`, `samples`, and by
    sample the place of the right name (`place`, 1 is first) and the name `picked`. A name that ties with the right
    one counts as before it. Real pictures of the same names, scored so, are the ceiling of a judge.
    """
    names = sorted(set(wanted)) if names is None else list(names)
    if len(wanted) != len(samples) or not len(samples):
        raise InputError(
            f"{len(samples)} samples and {len(wanted)} names: give each sample the name it should have."
        )
    number = {name: i for i, name in enumerate(names)}
    if len(number) < len(names):
        raise InputError("a name occurs twice among the names to pick from: nothing tells the two apart.")
    missing = [name for name in wanted if name not in number]
    if missing:
        raise InputError(f"{missing[0]!r} is wanted but is none of the {len(names)} names to pick from.")
    scores = by_frame(samples, lambda pictures: score(pictures, names), batch=batch)
    if not scores.isfinite().all():
        raise InputError("some scores are not finite: the judge is broken.")
    right = scores.gather(1, torch.tensor([[number[name]] for name in wanted]))
    place = (scores >= right).sum(dim=1)
    top1, top5 = (place <= 1).double(), (place <= 5).double()
    return {
        "top1": top1.mean().item(),
        "top1_interval": bootstrap(top1),
        "top5": top5.mean().item(),
        "top5_interval": bootstrap(top5),
        "chance1": 1 / len(names),
        "chance5": min(5 / len(names), 1.0),
        "ways": len(names),
        "samples": len(samples),
        "place": place.tolist(),
        "picked": [names[i] for i in scores.argmax(dim=1).tolist()],
    }


@torch.no_grad()
def by_frame(samples: Tensor, function: Space, *, batch: int = 64) -> Tensor:
    """`function` of pictures, `n d`; of a clip the mean over its frames."""
    video = samples if samples.ndim == 5 else samples[:, :, None]
    pictures = rearrange(video, "n c f h w -> (n f) c h w")
    rows = torch.cat(
        [function(pictures[at : at + batch]).float().cpu() for at in range(0, len(pictures), batch)]
    )
    return rearrange(rows, "(n f) d -> n f d", f=video.shape[2]).mean(dim=1)


# ---------------------------------------------------------------- how far apart


def features(embed_image: Space, *, batch: int = 64) -> Space:
    """The space of an encoder's unit vectors, over clips of their mean: 0 the same, 1.41 unrelated, 2 opposite."""

    def space(samples: Tensor) -> Tensor:
        unit = by_frame(samples, lambda pictures: F.normalize(embed_image(pictures), dim=-1), batch=batch)
        return F.normalize(unit, dim=-1)

    return space


def pixels(samples: Tensor, *, frames: int = 4) -> Tensor:
    """The space of pixels; the distance is the root mean square difference, 0 to 2. Of a clip `frames` count."""
    if samples.ndim == 5:
        samples = samples[:, :, torch.linspace(0, samples.shape[2] - 1, frames).round().long()]
    flat = rearrange(samples.float(), "n ... -> n (...)")
    return flat / flat.shape[1] ** 0.5


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, `n d` and `m d` -> `n m`; exactly 0 between equals, which the usual product formula is not."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def spread(samples: Tensor, space: Space) -> float:
    """The mean distance of two different samples."""
    assert len(samples) > 1
    apart = distances(*[space(samples)] * 2)
    return (apart.sum() / (len(apart) * (len(apart) - 1))).item()


@torch.no_grad()
def diversity(samples: Tensor, space: Space) -> dict[str, Any]:
    """`p s 3 ...`, s samples of each of p prompts: the mean distance `within` a prompt and `between` prompts.

    `ratio` is within over between: 0 when each prompt has but one picture, 1 when the prompt does not matter.
    """
    p, s = samples.shape[:2]
    if p < 2 or s < 2:
        raise InputError(f"diversity of {p} prompts with {s} samples each: both must be at least 2.")
    vectors = space(rearrange(samples, "p s ... -> (p s) ..."))
    apart = rearrange(distances(vectors, vectors).double(), "(p s) (q r) -> p s q r", p=p, q=p)
    own = torch.stack([apart[i, :, i].sum() / (s * (s - 1)) for i in range(p)])
    between = (apart.sum() - own.sum() * s * (s - 1)) / (p * (p - 1) * s * s)
    return {
        "within": own.mean().item(),
        "within_interval": bootstrap(own),
        "between": between.item(),
        "ratio": (own.mean() / between).item() if between > 0 else None,
        "prompts": p,
        "seeds": s,
    }


# ---------------------------------------------------------------- copies


@torch.no_grad()
def nearest(samples: Tensor, training: Tensor, *, count: int = 3, block: int = 32) -> tuple[Tensor, Tensor]:
    """The `count` training items nearest to each sample, both as vectors of one space, `n d` and `m d`.

    Distances and indices, `n count`, the nearest first.
    """
    assert len(samples)
    assert len(training)
    found = [
        distances(samples[at : at + block], training).topk(min(count, len(training)), largest=False)
        for at in range(0, len(samples), block)
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def copied(samples: Tensor, held: Tensor) -> dict[str, Any]:
    """The distances of samples to their nearest training item (`n`) beside those of held-out real items (`m`).

    `nearer` is the probability that a sample lies nearer to the training set than a held-out item does: 0.5 for
    samples as new as these, 1 for copies. `below` is the share of samples nearer than 95 % of the held-out items.
    """
    marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    samples, held = samples.double(), held.double()
    sign = (held[None] > samples[:, None]).double() + (held[None] == samples[:, None]).double() / 2
    return {
        "nearer": sign.mean().item(),
        "below": (samples < held.quantile(0.05)).double().mean().item(),
        "samples": dict(
            zip(("5%", "25%", "50%", "75%", "95%"), samples.quantile(marks).tolist(), strict=True)
        ),
        "held_out": dict(zip(("5%", "25%", "50%", "75%", "95%"), held.quantile(marks).tolist(), strict=True)),
    }


# ---------------------------------------------------------------- clips


def motion(clips: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring frames, in units of the signal's range 2: `n 3 f h w` -> `n`."""
    if clips.ndim != 5 or clips.shape[2] < 2:
        raise InputError(f"motion needs clips `n 3 f h w` of two frames or more, not {tuple(clips.shape)}.")
    return (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean(dim=(1, 2, 3, 4)) / 2


# ---------------------------------------------------------------- the procedural world


def scenes(samples: Tensor, said: Sequence[Description | Scene]) -> dict[str, dict[str, Any]]:
    """For each attribute of the world the share of samples that show what was said of it, as the exact judge reads.

    Attribute -> `right`, its 95 % bootstrap interval, and how many texts said something of it (`asked`); "all" asks
    that everything said holds. Attributes that nothing was said of are left out.
    """
    if len(said) != len(samples):
        raise InputError(f"{len(samples)} samples and {len(said)} descriptions: give each sample its own.")
    rows = [agree(judge(sample), words) for sample, words in zip(samples, said, strict=True)]
    for row in rows:
        told = [holds for holds in row.values() if holds is not None]
        row["all"] = all(told) if told else None
    result = {}
    for name in (*ATTRIBUTES, "all"):
        holds = torch.tensor([row[name] for row in rows if row[name] is not None], dtype=torch.double)
        if len(holds):
            result[name] = {"right": holds.mean().item(), "interval": bootstrap(holds), "asked": len(holds)}
    return result
