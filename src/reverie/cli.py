"""The command line: `reverie COMMAND ...`, one plain typed function for each command, its flags read from it by tyro.

The overview (`reverie`, `reverie --help`) needs nothing but this file, and tyro is asked about the one command that
was named. Whatever is heavy (torch, pyarrow, matplotlib) is imported inside the command that uses it. A mistake of the
user (`InputError`) is one sentence on stderr and exit code 2, as is an unknown command or flag; Ctrl-C is 130.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from reverie.errors import InputError

# ---------------------------------------------------------------- data


def data_import(folder: Path, /, *, out: Path | None = None) -> None:
    """Read a folder of pictures and clips with their captions, and write its index.

    Knows sidecars (.txt, .caption, .json), metadata.jsonl, .csv and .parquet, class-named folders and webdataset tars.
    The media are never changed.

    Args:
        folder: The folder to read.
        out: Where metadata.parquet goes; the folder itself if not given.
    """
    from reverie.data.importers import import_folder

    index = import_folder(folder, out=out)
    print(index)


def data_stickers(folder: Path, /, *, sources: tuple[str, ...] = (), size: int = 256, jobs: int = 0) -> None:
    """Fetch the sticker corpus: 20,000 pictures and 2,000 animations with words in English and Chinese.

    Uses the npm and pip of this machine. Resumable: run it again after an interruption.

    Args:
        folder: Where the corpus goes.
        sources: Only these (all if not given).
        size: Larger pictures are shrunk to this many pixels a side.
        jobs: Drawings rasterised at a time; 0 takes one per processor.
    """
    from reverie.data.stickers import stickers, summary

    print(summary(stickers(folder, sources=sources or None, size=size, jobs=jobs or None)))


def data_world(
    folder: Path,
    /,
    *,
    count: int = 1000,
    size: tuple[int, int] = (64, 64),
    frames: int = 1,
    kind: str | None = None,
    fps: float = 12.0,
    seed: int = 0,
) -> None:
    """Draw the procedural world: captioned scenes of coloured shapes with exact truth.

    Args:
        folder: A new folder for the scenes.
        count: How many.
        size: Height and width in pixels.
        frames: 1 draws pictures, more draws clips.
        kind: Only one kind of scene, such as count, relation or motion.
        fps: Frames per second of the clips.
        seed: Another seed, another world.
    """
    from reverie.data.world import write

    index = write(folder, count, seed=seed, size=size, frames=frames, kind=kind, fps=fps)
    print(f"{len(index)} scenes in {folder}")


# ---------------------------------------------------------------- the rest


def doctor() -> int:
    """Say what machine this is, what is installed, what is missing and how to get it."""
    from reverie.doctor import examine

    problems = 0
    for finding in examine():
        print(finding, flush=True)
        problems += finding.state == "!!"
    print(f"\n{problems} problem{'s' * (problems != 1)} found." if problems else "\nAll is well.")
    return 1 if problems else 0


COMMANDS: dict[str, Callable[..., int | None]] = {
    "data import": data_import,
    "data stickers": data_stickers,
    "data world": data_world,
    "doctor": doctor,
}


# ---------------------------------------------------------------- from words to functions


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"reverie: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reverie: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:  # of tyro (help or a bad flag) or of a training run that was told to stop
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1


def entry() -> None:
    """The `reverie` command."""
    sys.exit(main())


def _run(words: list[str]) -> int:
    if words in (["--version"], ["version"]):
        from importlib.metadata import version

        print(f"reverie {version('reverie')}")
        return 0
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return _parse(COMMANDS[name], f"reverie {name}", words[count:])
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help"):
        print(_overview(group), file=sys.stdout if rest or not words else sys.stderr)
        return 0 if rest or not words else 2
    raise InputError(_unknown(group, rest[0]))


def _parse(function: Callable[..., int | None], prog: str, args: list[str]) -> int:
    import tyro

    return (
        tyro.cli(
            function, prog=prog, args=args, config=(tyro.conf.PositionalRequiredArgs, tyro.conf.DisallowNone)
        )
        or 0
    )


def _overview(group: str) -> str:
    """Every command of `group` ("" for all) with the first line of its docstring."""
    names = [name for name in COMMANDS if name.startswith(f"{group} " if group else "")]
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {_headline(COMMANDS[name])}" for name in names]
    return "\n".join(
        [
            f"usage: reverie {f'{group} ' if group else ''}COMMAND ...",
            "",
            "From a captioned folder to pictures and clips from words: CLIP, Sora and their parts.",
            "",
            *lines,
            "",
            "`reverie COMMAND --help` tells a command's flags; `reverie --version` the version.",
        ]
    )


def _headline(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _unknown(group: str, word: str) -> str:
    prefix = f"{group} " if group else ""
    close = get_close_matches(f"{prefix}{word}", COMMANDS, n=1)
    hint = f"did you mean `reverie {close[0]}`?" if close else "`reverie --help` lists the commands."
    return f"There is no command {prefix}{word!r}; {hint}"


if __name__ == "__main__":
    entry()
