"""How a task on pictures and clips of one's own is asked for: the flags that its commands share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reverie.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is None is the model's own.

    Args:
        model: A shipped name, or a folder that a run of Sora wrote.
        out: The folder that the file goes to.
        size: Height and width in pixels, cut to; the file's shape at the model's number of pixels if not given.
        every: Take one of so many frames of a clip; 1 takes all.
        seed: The same seed draws the same.
        steps: Sampling steps, 1 or more; the model's own number if not given.
        guidance: How strictly to follow the words: 1 as learnt, more is stricter. If not given, the model's own to edit
            and inpaint, else 1, since more leads away from the given frames.
        sampler: Such as euler, heun, dpmpp_2m or unipc; euler if not given.
        negative: What not to draw: guidance, unless it is 1, leads away from these words.
        fps: Frames per second of what comes out, 1 to 1000; as the clip has them, or the model's own, if not given.
        format: png, webp, gif, mp4, webm or jpg; without it png for pictures and webp for clips, both lossless.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """

    model: str = "sora-stickers"
    out: Path = Path("samples")
    size: tuple[int, int] | None = None
    every: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    negative: str | None = None
    fps: float | None = None
    format: str | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How captions are written.

    Args:
        sampling: beam weighs several wordings against each other, greedy takes the surest word, nucleus draws.
        prompt: What a caption begins with; the model's own if not given.
        beams: Wordings that are weighed.
        least: New tokens at least.
        most: New tokens at most.
        p: nucleus draws from the likeliest words that together have this probability.
        seed: The same seed draws the same; the others always say the same.
    """

    sampling: str = "beam"
    prompt: str | None = None
    beams: int = 3
    least: int = 0
    most: int = 20
    p: float = 0.9
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Which captions a folder gets.

    Args:
        style: short, long or tags. A model of this machine chooses tags among those that the folder's files have.
        trigger: What every caption begins with, such as the name of what will be taught with them.
        hints: What is known of a file, its label and tags, is told to the endpoint; a model of this machine has it
            added behind its caption.
        frames: Of a clip so many, evenly from first to last, are looked at and what they show is merged.
        tags: How many tags a model of this machine chooses.
        again: Write anew what this writer wrote in this style before.
        missing: Only files without any caption.
        split: Only train, val or test.
    """

    style: str = "short"
    trigger: str = ""
    hints: bool = False
    frames: int = 3
    tags: int = 5
    again: bool = False
    missing: bool = False
    split: str | None = None

    def __post_init__(self) -> None:
        if self.style not in ("short", "long", "tags"):
            raise InputError(f"style is {self.style!r:.40}: choose short, long or tags.")
        if self.split not in (None, "train", "val", "test"):
            raise InputError(f"split is {self.split!r:.40}: choose train, val or test, or leave it out.")
        for name in ("frames", "tags"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The endpoint that captions in place of a model of this machine. Its answers are kept, and not paid for twice.

    Args:
        endpoint: The address of a chat up to /v1 that takes pictures, such as http://localhost:8000/v1; without it
            nothing is sent.
        key: The environment variable that holds the endpoint's key, if it needs one.
        timeout: Seconds that an answer may take; it is asked for four times.
        concurrency: Requests at a time.
        budget: Requests at most; the same command goes on later.
        budget_tokens: Tokens at most, as the endpoint counts them.
        side: Pixels of the longer side of the pictures that are sent, at most.
    """

    endpoint: str | None = None
    key: str = "REVERIE_CHAT_KEY"
    timeout: float = 60.0
    concurrency: int = 4
    budget: int | None = None
    budget_tokens: int | None = None
    side: int = 768

    def __post_init__(self) -> None:
        for name in ("concurrency", "side"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more.")


@dataclass(frozen=True, kw_only=True)
class CapFilt:
    """How a bootstrap is carried out; it stands in OUT/config.json.

    Args:
        trusted: Whose captions are vouched for: patterns of caption sources, file sources or file names, such as
            sidecar:txt or photos/mine/*.
        start: The Blip to begin with in place of training one; the last one then goes on from it too.
        rounds: How often to do it all.
        judge: both weighs matching and likeness, on vouched-for captions that the filter did not learn from; match is
            the matching alone, as the paper has it, which takes far more data to be good.
        threshold: The least probability of a caption that is kept.
        sampling: nucleus draws captions; beam and greedy take likely ones, which teach less.
        p: nucleus draws from the likeliest words that together have this probability.
        most: Tokens of a caption at most.
        steps: Batches of each training from scratch.
        batch: Pictures of a step.
        lr: The highest learning rate of trainings from scratch.
        tune_steps: Batches of the captioner's and of the filter's training.
        tune_lr: Their highest learning rate.
        size: Pixels a side that pictures are seen at, a multiple of the patch.
        patch: Pixels a side of a patch.
        width: Channels, a multiple of 64.
        depth: Blocks of the image tower.
        strength: How strongly pictures are turned, cropped and tinted in training, 0 for not at all.
        queue: How many former pictures and texts a batch is also compared with.
        seed: Another seed, another start, another order and other captions.
    """

    trusted: tuple[str, ...] = ()
    start: str = ""
    rounds: int = 1
    judge: str = "both"
    threshold: float = 0.5
    sampling: str = "nucleus"
    p: float = 0.9
    most: int = 20
    steps: int = 1500
    batch: int = 64
    lr: float = 1e-3
    tune_steps: int = 300
    tune_lr: float = 2e-4
    size: int = 64
    patch: int = 16
    width: int = 192
    depth: int = 5
    strength: float = 0.5
    queue: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}: give 1 or more.")
        if self.judge not in ("both", "match"):
            raise InputError(f"judge is {self.judge!r:.40}: choose both or match.")
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold is {self.threshold:g}: give a probability above 0 and below 1.")
