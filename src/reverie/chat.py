"""A client of chat endpoints that speak OpenAI's protocol, as servers of open models do too; with the standard library.

Nothing is sent anywhere unless an `Endpoint` is named, and then to that address alone: redirections are refused. A
message may carry pictures, which go along as data URLs. Answers are kept in a file, if one is named, and not asked for
again. They are a stranger's words: what would steer a terminal is taken out of them. Several threads may ask at once.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie.errors import InputError

LARGEST = 8 * 2**20  # bytes of an answer
LONGEST = 60.0  # seconds that a server may have us wait before the next try
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others next time
HEAD = '{"key": "'  # of a line that is kept
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}

STEERS = re.compile(  # escape sequences whole; other control characters, and those that turn the direction of writing
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])?|\x9b[0-?]*[ -/]*[@-~]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)

Message = dict[str, Any]


class Spent(InputError):
    """What may be asked has been asked."""


class Meter:
    """Counts what is sent and what it cost, of all threads.

    requests, tokens: how many at most, None for no end; the tokens are those that the server says it used, so that the
    request that goes beyond them is the last one.
    """

    def __init__(self, *, requests: int | None = None, tokens: int | None = None) -> None:
        for name, most in (("requests", requests), ("tokens", tokens)):
            if most is not None and most < 1:
                raise InputError(f"a budget of {most} {name} asks nothing: give 1 or more, or leave it out.")
        self.most_requests, self.most_tokens = requests, tokens
        self.requests = self.tokens = 0
        self._lock = threading.Lock()

    def send(self) -> None:
        """One request more. Spent: it would be one too many."""
        with self._lock:
            if self.most_requests is not None and self.requests >= self.most_requests:
                raise Spent(f"the budget of {self.most_requests:,} requests is spent.")
            if self.most_tokens is not None and self.tokens >= self.most_tokens:
                raise Spent(f"the budget of {self.most_tokens:,} tokens is spent ({self.tokens:,}).")
            self.requests += 1

    def paid(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and how patiently.

    base: the address up to /v1, such as http://localhost:8000/v1. model: as the server calls it. key: the environment
    variable that holds the key; no key is sent where it is empty. tries: at most so many requests; the pause between
    them begins with `pause` seconds and doubles. cache: the file that keeps the answers.
    """

    base: str
    model: str
    key: str = "REVERIE_CHAT_KEY"
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0
    cache: Path | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"{self.base!r} is no address of an endpoint: give one such as http://localhost:8000/v1."
            )
        if parts.username or parts.query or parts.fragment:
            raise InputError("the endpoint's address holds a password or a query: give it up to /v1 alone.")
        if not self.model.strip():
            raise InputError("say which model of the endpoint shall answer.")
        if not 0 < self.timeout < math.inf or self.tries < 1:
            raise InputError(
                f"{self.tries} tries of {self.timeout:g} s ask nothing: give 1 or more above 0 s."
            )


def message(text: str, *, role: str = "user", pictures: Sequence[Path | bytes] = ()) -> Message:
    """What is said by `role`, with pictures: files, or the bytes of files, PNG, JPEG, GIF or WebP."""
    if not pictures:
        return {"role": role, "content": text}
    shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
    return {"role": role, "content": [{"type": "text", "text": text}, *shown]}


def ask(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    temperature: float = 0.0,
    most: int = 512,
    wait: Callable[[float], Any] = time.sleep,
    tell: Callable[[str], None] = lambda text: None,
    good: Callable[[str], bool] = lambda answer: True,
    meter: Meter | None = None,
) -> str:
    """The endpoint's answer, stripped. `most` tokens at most; `wait` pauses between tries, of which `tell` is told.

    An answer that is not `good` is not kept. Spent: the `meter` allows no more. InputError: it cannot be reached,
    refuses, or does not answer with text; or the cache is another kind of file.
    refuses, or does not answer with text; or the cache is another kind of file.
    """
    asked = {
        "model": endpoint.model, "messages": list(messages), "temperature": temperature, "max_tokens": most
    }  # fmt: skip
    text = json.dumps(asked, sort_keys=True)
    key = hashlib.sha256(f"{endpoint.base.rstrip('/')}\n{text}".encode()).hexdigest()
    if endpoint.cache is not None and (found := _known(endpoint.cache).get(key)) is not None:
        return _clean(found)
    meter = meter or Meter()
    body = _sent(endpoint, text.encode(), wait, tell, meter)
    meter.paid(_cost(body))
    answer = _text(endpoint, body)
    if endpoint.cache is not None and good(answer):
        _keep(endpoint.cache, key, answer)
    return answer


# Asking ------------------------------------------------------------------------------------------------------------


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key to another place."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _sent(
    endpoint: Endpoint,
    body: bytes,
    wait: Callable[[float], Any],
    tell: Callable[[str], None],
    meter: Meter,
) -> bytes:
    """What came back, after as many tries as it needs."""
    address = f"{endpoint.base.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(endpoint.key, "").strip():
        headers["Authorization"] = f"Bearer {secret}"
    opener = urllib.request.build_opener(_Stay)
    for number in range(endpoint.tries):
        last, pause = number == endpoint.tries - 1, endpoint.pause * 2**number
        meter.send()
        request = urllib.request.Request(address, data=body, headers=headers)
        try:
            with opener.open(request, timeout=endpoint.timeout) as answer:
                found, length = answer.read(LARGEST + 1), answer.headers.get("Content-Length", "")
            if length.isdecimal() and len(found) < min(int(length), LARGEST):
                raise ConnectionError("cut short")
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in AGAIN or last:
                    raise InputError(_refusal(endpoint, error, number + 1)) from None
                why, pause = f"answers {error.code}", _pause(error.headers.get("Retry-After"), pause)
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = _broken(endpoint, error)
            if last:
                raise InputError(
                    f"{endpoint.base} {why}, tried {_times(number + 1)}: see whether the server runs."
                ) from None
        else:
            break
        tell(
            f"{endpoint.base} {why}: trying again in {pause:g} s, for the {number + 2}. time of {endpoint.tries}."
        )
        wait(pause)
    if len(found) > LARGEST:
        raise InputError(f"{endpoint.base} answers with more than {LARGEST:,} bytes: name another endpoint.")
    return found


def _broken(endpoint: Endpoint, error: Exception) -> str:
    """What befell a request that no status answered."""
    if isinstance(getattr(error, "reason", error), TimeoutError):
        return f"did not answer within {endpoint.timeout:g} s"
    if isinstance(error, urllib.error.URLError):  # before anything was answered
        return "cannot be reached"
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return "breaks off before its answer is whole"
    return "does not answer as a web server does"


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError, tries: int) -> str:
    """One sentence for an answer that is none."""
    where, code = endpoint.base, error.code
    if code in (401, 403):
        held = "the one in" if os.environ.get(endpoint.key, "").strip() else "none is in"
        return f"{where} refuses the key ({code}), {held} {endpoint.key}: set that variable."
    if code == 404:
        return (
            f"{where} has no chat or no model {endpoint.model!r} (404): see the address and the model's name."
        )
    if 300 <= code < 400:
        return f"{where} leads elsewhere ({code}), which is not followed: give the address where it leads."
    told = _message(error.read(LARGEST))
    if code == 429:
        return f"{where} takes no more requests (429), tried {_times(tries)}: wait, or name another endpoint."
    if code >= 500:
        return f"{where} fails ({code}), tried {_times(tries)}{told}: look at the server."
    return f"{where} refuses the request ({code}){told}: ask otherwise."


def _message(body: bytes) -> str:
    """What the server says of its error, in a few words."""
    try:
        found = json.loads(body)
        told = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
        return f", saying {' '.join(str(told).split())[:120]!r}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _pause(asked: str | None, usual: float) -> float:
    """As long as the server asks for in seconds, within reason."""
    try:
        seconds = float(asked or "")
    except ValueError:
        return usual
    return min(seconds, LONGEST) if math.isfinite(seconds) and seconds >= 0 else usual


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _text(endpoint: Endpoint, body: bytes) -> str:
    try:
        choice = json.loads(body)["choices"][0]
        said = choice["message"]["content"]
        if isinstance(said, list):
            said = "".join(part.get("text", "") for part in said)
        if isinstance(said, str) and (text := _clean(said)):
            return text
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{endpoint.base} answers, but not as a chat endpoint does: name one that speaks OpenAI's protocol."
        ) from None
    raise InputError(f"{endpoint.base} gives an empty answer: ask otherwise, or take another model.")


def _cost(body: bytes) -> int:
    """The tokens that the server says an answer took; 0 if it does not say."""
    try:
        return max(int(json.loads(body)["usage"]["total_tokens"]), 0)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def _clean(said: str) -> str:
    return STEERS.sub("", said).strip()


def _data_url(picture: Path | bytes) -> str:
    if isinstance(picture, bytes):
        content, name = picture, "the picture"
    else:
        try:
            content, name = picture.read_bytes(), str(picture)
        except OSError:
            raise InputError(f"{picture} cannot be read: name a picture that is there.") from None
    kind = next((kind for head, kind in KINDS.items() if content.startswith(head)), None)
    if kind is None or (kind == "webp" and content[8:12] != b"WEBP"):
        raise InputError(f"{name} is no PNG, JPEG, GIF or WebP: give one of these, which endpoints read.")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Answers that are kept: a JSON object a line, {"key", "answer"} ------------------------------------------------------


def unread(cache: Path) -> int:
    """How many lines of a cache hold no answer; they are skipped. InputError: it is no cache at all."""
    return _kept(cache)[1]


def _kept(cache: Path) -> tuple[dict[str, str], int]:
    """Key -> answer; and how many lines are torn or damaged, which are left out."""
    found: dict[str, str] = {}
    try:
        text = cache.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return found, 0
    except (IsADirectoryError, NotADirectoryError, PermissionError):
        raise InputError(f"{cache} cannot keep answers: name a file for them.") from None
    bad = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            entry = json.loads(line)
            key, answer = entry["key"], entry["answer"]
            if isinstance(key, str) and isinstance(answer, str):
                found[key] = answer
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        bad += 1
    if bad and not found and not (bad == 1 and text.startswith(HEAD[: len(text)])):
        raise InputError(f"{cache} holds no answer of an endpoint: name another file to keep them in.")
    return found, bad


_read: dict[Path, tuple[int, dict[str, str]]] = {}  # cache -> its bytes when it was read, and what it held
_lock = threading.Lock()  # of caches: one thread reads or writes at a time


def _known(cache: Path) -> dict[str, str]:
    """Key -> answer, read again only if somebody else wrote."""
    with _lock:
        size = cache.stat().st_size if cache.is_file() else -1
        if cache not in _read or _read[cache][0] != size:
            _read[cache] = size, _kept(cache)[0]
        return _read[cache][1]


def _keep(cache: Path, key: str, answer: str) -> None:
    """One line more, written at once."""
    line = json.dumps({"key": key, "answer": answer}) + "\n"
    with _lock:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("ab") as file:
            before = file.tell()
            if before and not _ends_a_line(cache):
                line = "\n" + line  # after a line that was torn
            file.write(line.encode())
        size, known = _read.get(cache, (0, {}))
        if max(size, 0) == before:  # nobody else wrote meanwhile
            known[key] = answer
            _read[cache] = before + len(line.encode()), known


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
