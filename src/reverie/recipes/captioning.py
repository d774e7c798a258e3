"""Captions into the index of a folder, by a model of this machine or by a chat endpoint: `reverie caption FOLDER`.

Every caption carries who wrote it and in which style ("synthetic:long:blip-stickers"), beside those that are there.
What is written goes to a journal in FOLDER/.reverie/captions at once and from there into the index at the end, also
after a stop, a failure or a kill (then the next run does it), so that nothing is asked or paid for twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reverie import chat
from reverie.data.alone import exclusively
from reverie.data.importers import NO_CAPTION, import_folder
from reverie.data.index import FILE, Caption, Index, Item, language_of, lists_tags, style_of, synthetic
from reverie.data.journal import Journal
from reverie.data.preparing import Pool
from reverie.data.remote import address
from reverie.data.wording import JOIN
from reverie.errors import InputError
from reverie.media import MediaError, flatten
from reverie.progress import counting, say
from reverie.recipes.asked import Captioning, Chat, Telling
from reverie.recipes.parts import open_index
from reverie.recipes.writing import pictures, plain, tagged, written

PLACE = Path(".reverie") / "captions"
LONG = {"least": 12, "most": 36}  # tokens of a long caption, at least
ROW = 8  # so many failures one after another, and the endpoint is left alone
LONGEST = 4000  # characters of an answer that can be a caption
ALIKE = 12  # a text that packs better than this repeats itself
TAG = 60  # characters at most
MOST = {"short": 60, "long": 400, "tags": 120}  # tokens of an answer
TASKS = {
    "short": "Describe {it} in one short caption of at most 15 words. Answer with the caption alone.",
    "long": "Describe {it} in two to four plain sentences: what is there, colours and materials, where things are,"
    " the background, the light, the style, and text that can be read. Say only what can be seen. Answer with the"
    " description alone.",
    "tags": "Name what {it} shows in 5 to 15 short tags, separated by commas, the most important first. Answer with"
    " the tags alone.",
}
CLIP = "These are {n} frames of one clip, in order. "
MOVES = " Say also what moves, how, and what changes."
REFUSALS = re.compile(
    r"^\W*(?:(?:i'?m|i am)\s+(?:very\s+)?(?:sorry|unable|not able)|sorry(?=[,.!]|\s+(?:but|i)\b)"
    r"|i (?:can(?:no|')t|am unable to|won't)\b|as an ai\b|i apologi[sz]e|unfortunately,? i\b"
    r"|i do(?:n't| not) see (?:an?|any) (?:image|picture)|no image (?:was|is|has)"
    r"|抱歉|对不起|很抱歉|我无法|申し訳|죄송)",
    re.IGNORECASE,
)

BULLETS = re.compile(r"^(?:[\s\-*•#\"'“]|\d+[.)])+|[\s\"'”.]+$")  # around a tag

HOW, TELLING, VIA = Captioning(), Telling(), Chat()

Parts = Iterator[tuple[dict[str, str], dict[str, str], dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """What a run did: files that got a caption, that had one, why others have none, and what is left to be done."""

    source: str
    written: int
    had: int
    failed: dict[str, str]
    left: int
    requests: int = 0
    tokens: int = 0


@exclusively("reverie caption")
def caption(
    folder: str | Path,
    *,
    model: str = "blip-stickers",
    how: Captioning = HOW,
    telling: Telling = TELLING,
    via: Chat = VIA,
    pool: Pool | None = None,
    device: str | None = None,
) -> Captioned:
    """Writes captions of the files of `folder` into its index, which is made first if there is none.

    model: a shipped name or a folder, or as the endpoint `via` calls it. Files that came in without words, and only
    they, are accepted from now on. InputError: nothing to describe; the endpoint fails again and again.
    """
    index = _open(folder)
    source = synthetic(how.style, _name(model))
    todo, had = chosen(index, source, how)
    journal = _journal(index.folder, source, model, how, telling, via)
    failed: dict[str, str] = {}
    meter = chat.Meter(requests=via.budget, tokens=via.budget_tokens)
    waiting = [item for item in todo if journal.of(item) is None]
    say(f"{source}: {len(todo):,} files to describe, {had:,} have their caption")
    named = {item.file_name: item for item in todo}
    made = 0
    try:
        if waiting:
            for texts, bad, later in _parts(waiting, index, model, how, telling, via, meter, pool, device):
                journal.add(
                    (named[name], {"text": _finished(text, named[name], how, via)})
                    for name, text in texts.items()
                )
                failed |= bad | later
    finally:
        made = _settle(index, todo, journal, source)
    return Captioned(
        source=source, written=made, had=had, failed=failed, left=len(todo) - made - len(failed),
        requests=meter.requests, tokens=meter.tokens,
    )  # fmt: skip


def _open(folder: str | Path) -> Index:
    folder = Path(folder)
    if address(str(folder)) is None and folder.is_dir() and not (folder / FILE).exists():
        return import_folder(folder, need_captions=False)
    index = open_index(folder)
    index.refuse_remote()
    return index


def _name(model: str) -> str:
    return plain(Path(model).resolve().name if Path(model).exists() else model) or "model"


def chosen(index: Index, source: str, how: Captioning) -> tuple[list[Item], int]:
    """The files that are to get a caption of `source`, and how many have one. InputError: no file is there at all."""
    usable = [
        item
        for item in index
        if (item.reject is None or item.reject.startswith(NO_CAPTION)) and how.split in (None, item.split)
    ]
    if not usable:
        raise InputError(
            f"{index.folder} has no file to describe: `reverie data check` lists what is there and why it was left out."
        )
    have = {item.file_name for item in usable if any(c.source == source for c in item.captions)}
    if how.missing:
        have |= {item.file_name for item in usable if item.captions}
    todo = [item for item in usable if how.again or item.file_name not in have]
    return todo, len(usable) - len(todo)


def _journal(folder: Path, source: str, model: str, how: Captioning, telling: Telling, via: Chat) -> Journal:
    """What has been written as it is asked for now, in no other way."""
    asked = {
        "source": source, "model": model, "telling": dataclasses.asdict(telling), "endpoint": via.endpoint,
        "side": via.side, "style": how.style, "trigger": how.trigger, "hints": how.hints, "frames": how.frames,
        "tags": how.tags,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Journal(folder / PLACE / f"{digest}.jsonl")


def _settle(index: Index, todo: Sequence[Item], journal: Journal, source: str) -> int:
    """From the journal into the index; how many files."""
    rows = {item.file_name: row["text"] for item in todo if (row := journal.of(item)) is not None}
    if not rows:
        return 0
    after = []
    for item in index:
        if (text := rows.get(item.file_name)) is not None:
            others = tuple(c for c in item.captions if c.source != source)
            new = Caption(text=text, source=source, language=language_of(text))
            reject = None if (item.reject or "").startswith(NO_CAPTION) else item.reject
            item = dataclasses.replace(item, captions=(*others, new), reject=reject)
        after.append(item)
    Index(index.folder, after, extra=index.extra).write()
    journal.remove()
    return len(rows)


def _parts(
    items: Sequence[Item],
    index: Index,
    model: str,
    how: Captioning,
    telling: Telling,
    via: Chat,
    meter: chat.Meter,
    pool: Pool | None,
    device: str | None,
) -> Parts:
    if via.endpoint is not None:
        return asked(items, index, model=model, how=how, prompt=telling.prompt, via=via, meter=meter)
    if how.style == "tags":
        words = vocabulary(index)
        return tagged(items, index, model=model, words=words, count=how.tags, pool=pool, device=device)
    if how.style == "long":
        telling = dataclasses.replace(telling, **{k: max(getattr(telling, k), v) for k, v in LONG.items()})
    return written(items, index, model=model, telling=telling, frames=how.frames, pool=pool, device=device)


def vocabulary(index: Index) -> list[str]:
    """The labels and tags of a folder's files. InputError: they have none."""
    found = sorted({word for item in index if item.reject is None for word in known(item)})
    if not found:
        raise InputError(
            f"no file of {index.folder} has a label or tags to choose among: let an endpoint write tags, or import"
            " some."
        )
    return found


def known(item: Item) -> list[str]:
    """A file's label and tags, as people gave them."""
    words = [item.label or ""]
    for caption in item.captions:
        if lists_tags(caption.source) and style_of(caption.source) is None:
            words += caption.text.split(",")
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def _finished(text: str, item: Item, how: Captioning, via: Chat) -> str:
    """With what it is to begin with, and with what is known, if no endpoint was told."""
    text = plain(text)
    join = JOIN.get(language_of(text), ", ")
    if how.hints and via.endpoint is None:
        missing = [word for word in known(item) if word.casefold() not in text.casefold()]
        text = join.join([text, *missing])
    trigger = plain(how.trigger)
    if trigger and not text.casefold().startswith(trigger.casefold()):
        text = f"{trigger}{join}{text}"
    return text


# ---------------------------------------------------------------- an endpoint


def asked(
    items: Sequence[Item],
    index: Index,
    *,
    model: str,
    how: Captioning,
    prompt: str | None,
    via: Chat,
    meter: chat.Meter,
) -> Parts:
    """As `writing.written`, by an endpoint, several at a time.

    When the budget is spent the rest is left. InputError: `ROW` failures one after another; what was answered until
    then has been given out.
    """
    assert via.endpoint is not None
    endpoint = chat.Endpoint(
        base=via.endpoint,
        model=model,
        key=via.key,
        timeout=via.timeout,
        cache=index.folder / PLACE / "answers.jsonl",
    )
    stop = threading.Event()

    def answer(item: Item) -> str:
        shown = pictures(index.media(item), how.frames)
        said = chat.ask(
            endpoint,
            [chat.message(task(item, len(shown), how, prompt), pictures=[_sent(p, via.side) for p in shown])],
            most=MOST[how.style],
            wait=stop.wait,
            tell=say,
            good=lambda text: fault(text, how.style) is None,
            meter=meter,
        )
        if (why := fault(said, how.style)) is not None:
            raise InputError(why)
        return tidy(said, how.style)

    row, why = 0, ""
    for item, future in _several(items, answer, via.concurrency, stop, label="asking"):
        try:
            text = future.result()
        except chat.Spent as error:
            if not stop.is_set():
                say(f"{error} The same command goes on later.")
            stop.set()
        except MediaError as error:
            yield {}, {item.file_name: error.reason}, {}
        except InputError as error:
            row, why = row + 1, str(error)
            yield {}, {}, {item.file_name: why}
            if row >= ROW:
                stop.set()
        else:
            row = 0
            yield {item.file_name: text}, {}, {}
    if row >= ROW:
        raise InputError(
            f"the last {row} files failed one after another, at last because: {why} What was written before stays;"
            " the same command goes on."
        )


def _several(
    items: Sequence[Item], do: Callable[[Item], str], at_once: int, stop: threading.Event, *, label: str
) -> Iterator[tuple[Item, Future[str]]]:
    """`do` of each item in threads, as they end; after `stop` no more are begun, and those under way are waited for."""
    waiting: dict[Future[str], Item] = {}
    rest = iter(items)
    done = 0
    with ThreadPoolExecutor(at_once) as threads, counting(label) as show:
        try:
            while True:
                while not stop.is_set() and len(waiting) < at_once and (item := next(rest, None)) is not None:
                    waiting[threads.submit(do, item)] = item
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    show(done := done + 1, len(items))
                    yield waiting.pop(future), future
        finally:
            stop.set()  # so that nobody waits for a further try


def task(item: Item, frames: int, how: Captioning, prompt: str | None = None) -> str:
    """What the endpoint is asked for: a user's own words, or those of the style."""
    own = (
        prompt
        if prompt is not None
        else TASKS[how.style].format(it="this picture" if frames == 1 else "the clip")
    )
    if frames > 1:
        own = CLIP.format(n=frames) + own + (MOVES if prompt is None else "")
    words = known(item) if how.hints else []
    return f"{own} Known about it: {'; '.join(map(plain, words))}." if words else own


def _sent(picture: Image.Image, side: int) -> bytes:
    """The bytes of a JPEG, on white, no side longer than `side`."""
    small = Image.fromarray(flatten(np.asarray(picture.convert("RGBA"))))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(file := io.BytesIO(), format="JPEG", quality=90)
    return file.getvalue()


def tidy(said: str, style: str) -> str:
    """An answer without what was put around it: quotation marks, fences, a heading, bullets."""
    text = re.sub(r"^```\w*\n|\n?```$", "", said.strip()).strip()
    text = re.sub(r"^(?:caption|description|tags|标题|描述)\s*[:：]\s*", "", text, flags=re.IGNORECASE)
    if style == "tags":
        text = text.strip("[]() ")
        words = [BULLETS.sub("", word) for word in re.split(r"[,，、;；\n]", text)]
        return ", ".join(dict.fromkeys(plain(word) for word in words if plain(word)))
    return plain(text.strip().strip('"“”').strip())


def fault(said: str, style: str) -> str | None:
    """Why an answer cannot be a caption; None: it can."""
    text = tidy(said, style)
    shown = f"the answer {text[:60]!r}"
    if not re.search(r"\w", text):
        return "the answer holds no word."
    if REFUSALS.match(text):
        return f"{shown} is a refusal."
    if len(text) > LONGEST:
        return f"the answer has {len(text):,} characters, which is no caption."
    if len(text) > 200 and len(text.encode()) > ALIKE * len(zlib.compress(text.encode())):
        return f"{shown}... repeats itself."
    if re.match(r"<(?:!doctype|html|\?xml)|\{\s*\"", text, re.IGNORECASE) or "\ufffd" in text:
        return f"{shown} is not plain text."
    if style == "tags" and any(len(tag) > TAG for tag in text.split(", ")):
        return f"{shown} holds a tag of more than {TAG} characters."
    return None
