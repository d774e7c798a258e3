"""Latents of a folder's pictures and clips, encoded once and kept beside them, as embeddings are.

    FOLDER/.reverie/latents-FINGERPRINT-HEIGHTxWIDTH-FRAMES-DTYPE/    *.safetensors: latents, and whose they are

They belong to a content (sha256) and to a codec: the fingerprint is of its weights and configuration. A file is fitted
into one size, on white; a picture is one frame, a clip `frames` frames, evenly spaced over it and repeated where it has
fewer. A part is whole or not at all, and memory-mapped where it is read.

Convention: `c g h w` for each file, as the codec's `encode` gives them of videos `b 3 f h w` in [-1, 1]: float32 keeps
exactly that, float16 and bfloat16 round it to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reverie.data.embeddings import PLACE, TYPES, Store, at_hand, torch_type
from reverie.data.index import Index
from reverie.data.pixels import CHANGED, Bad
from reverie.data.preparing import SHARE, Pool
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, Part, decode_array, pick, probe

if TYPE_CHECKING:
    from torch import Tensor


class Latents:
    """What is kept of a folder: `latents[content]` is `c g h w`, for each `content in latents`."""

    def __init__(self, store: Store, names: Sequence[str] = (), bad: Sequence[Bad] = ()) -> None:
        """names, bad: the files that were asked for and have latents, and those that have none."""
        self._store = store
        self.place, self.names, self.bad = store.place, tuple(names), tuple(bad)

    @classmethod
    def open(cls, index: Index, *, key: str, size: tuple[int, int], frames: int = 1) -> Latents:
        """Those of the items of an index, by the codec of this fingerprint, in the most exact type that is kept.

        `bad` are the items whose files cannot be read or were not what the index says when they were encoded.
        InputError: there are no latents, or not of every other item.
        """
        for dtype in reversed(TYPES):
            name = _name(key, size, frames, dtype)
            if not (index.folder / PLACE / name).is_dir():
                continue
            store = Store(index.folder, name, dtype, axes=4, quiet=True)
            found = store.contents()
            changed = {item.file_name for item in index if found.get(item.file_name, item.hash) != item.hash}
            none = [item for item in index if not store.knows(item.hash) and item.file_name not in changed]
            if none and store.where:
                raise InputError(
                    f"{len(none):,} files, such as {none[0].file_name}, have no latents in {store.place}: run `reverie "
                    "data encode` again."
                )
            if store.where:
                good = [item.file_name for item in index if item.hash in store.where]
                bad = [
                    Bad(item.file_name, store.bad.get(item.hash, CHANGED))
                    for item in index
                    if item.hash not in store.where
                ]
                return cls(store, good, bad)
        raise InputError(
            f"{index.folder} has no latents of this codec at {size[0]} x {size[1]} with {frames} frames: run `reverie "
            "data encode` first."
        )

    def __len__(self) -> int:
        return len(self._store.where)

    def __contains__(self, content: object) -> bool:
        return content in self._store.where

    def __getitem__(self, content: str) -> Tensor:
        from einops import rearrange

        return rearrange(self._store.rows_of(content), "g c h w -> c g h w")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The preparation: jobs are (content, file name); a file that can be read has a row for each latent frame.

    encode: videos `b 3 f h w` on the CPU -> latents `b c g h w`. stride: how many frames a latent frame stands for,
    after the first. batch: videos of one length that are encoded together.
    """

    media: Callable[[str], Path | Part]
    encode: Callable[[Tensor], Tensor]
    stride: int
    size: tuple[int, int]
    frames: int
    dtype: str
    batch: int = 16
    limits: Limits = LIMITS

    def load(self, job: tuple[str, str]) -> tuple[Tensor, list[float]]:
        """A video `3 f h w`, and the seconds at which its latent frames begin. MediaError: the file has none."""
        import torch
        from einops import rearrange

        from reverie.data.augment import on_white

        path = at_hand(self.media(job[1]), self.limits)
        found = probe(path, self.limits)
        frames = 1 if found.frames == 1 else self.frames
        pixels = torch.from_numpy(
            decode_array(path, size=self.size, frames=frames, fit="pad", limits=self.limits)
        )
        places = torch.linspace(0, len(pixels) - 1, frames).round().long()
        times = [i / found.fps if found.fps else 0.0 for i in pick(found.frames, frames)]
        seconds = [times[places[max(i, 0)]] for i in range(1 - self.stride, frames, self.stride)]
        return rearrange(
            on_white(rearrange(pixels[places], "f h w c -> f c h w")), "f c h w -> c f h w"
        ), seconds

    def make(self, loaded: Iterable[tuple[Tensor, list[float]]]) -> dict[str, Tensor]:
        """`vectors g c h w`, `seconds g`, and `lengths`: how many rows each file has."""
        import torch
        from einops import rearrange

        rows: dict[int, Tensor] = {}
        waiting: dict[int, list[tuple[int, Tensor]]] = {}  # by length
        seconds: list[float] = []
        lengths: list[int] = []

        def flush(group: list[tuple[int, Tensor]]) -> None:
            with torch.no_grad():
                latents = self.encode(torch.stack([video for _, video in group])).to(
                    "cpu", torch_type(self.dtype)
                )
            rows.update(zip((i for i, _ in group), rearrange(latents, "b c g h w -> b g c h w"), strict=True))
            group.clear()

        for i, (video, moments) in enumerate(loaded):
            group = waiting.setdefault(video.shape[1], [])
            group.append((i, video))
            seconds += moments
            lengths.append(len(moments))
            if len(group) == self.batch:
                flush(group)
        for group in waiting.values():
            if group:
                flush(group)
        return {
            "vectors": torch.cat([rows[i] for i in range(len(rows))]),
            "seconds": torch.tensor(seconds, dtype=torch.float32),
            "lengths": torch.tensor(lengths),
        }


def encode_folder(
    folder: str | Path,
    names: Sequence[str],
    *,
    key: str,
    start: Callable[[], Encoder],
    size: tuple[int, int],
    frames: int,
    dtype: str,
    share: int = SHARE,
    index: Index | None = None,
    pool: Pool | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> Latents:
    """The latents of the files `names` of a folder: those that are kept, and the others encoded now.

    key: the fingerprint of the codec. start: gives the encoder, of this folder, size, frames and dtype; plain where
    there is a pool (data/preparing.py). InputError: latents that dtype cannot hold, or the folder cannot be written to.
    """
    folder = Path(folder)
    store = Store(folder, _name(key, size, frames, dtype), dtype, axes=4, quiet=True)
    if not store.writable:
        raise InputError(f"{folder} cannot be written to, and that is where latents are kept.")
    contents, reasons = store.fill(
        names,
        start,
        present=None,
        index=index,
        share=share,
        workers=None,
        pool=pool,
        limits=limits,
        label="encoding",
        quiet=quiet,
    )
    if not store.writable:
        raise InputError(f"{folder} cannot be written to any more: make room, and run this again to go on.")
    bad = [
        Bad(name, reasons[name] if name in reasons else store.bad[contents[name]])
        for name in names
        if name in reasons or contents[name] not in store.where
    ]
    return Latents(store, [name for name in names if contents.get(name) in store.where], bad)


def _name(key: str, size: tuple[int, int], frames: int, dtype: str) -> str:
    return f"latents-{key}-{size[0]}x{size[1]}-{frames}-{dtype}"
