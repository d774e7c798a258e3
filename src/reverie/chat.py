"""A client of chat endpoints that speak OpenAI's protocol, as servers of open models do too; with the standard library.

Nothing is sent anywhere unless an `Endpoint` is named, and then to that address alone: redirections are refused. A
message may carry pictures, which go along as data URLs. Answers are kept in a file, if one is named, and not asked for
again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
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
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}

Message = dict[str, Any]


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
        if self.timeout <= 0 or self.tries < 1:
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
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """The endpoint's answer, stripped. `most` tokens at most; `wait` pauses between tries.

    InputError: it cannot be reached, refuses, or does not answer with text.
    """
    asked = {
        "model": endpoint.model, "messages": list(messages), "temperature": temperature, "max_tokens": most
    }  # fmt: skip
    text = json.dumps(asked, sort_keys=True)
    key = hashlib.sha256(f"{endpoint.base.rstrip('/')}\n{text}".encode()).hexdigest()
    if endpoint.cache is not None and (found := _kept(endpoint.cache).get(key)) is not None:
        return found
    answer = _text(endpoint, _sent(endpoint, text.encode(), wait))
    if endpoint.cache is not None:
        _keep(endpoint.cache, key, answer)
    return answer


# Asking ------------------------------------------------------------------------------------------------------------


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key to another place."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _sent(endpoint: Endpoint, body: bytes, wait: Callable[[float], None]) -> bytes:
    """What came back, after as many tries as it needs."""
    address = f"{endpoint.base.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(endpoint.key, "").strip():
        headers["Authorization"] = f"Bearer {secret}"
    opener = urllib.request.build_opener(_Stay)
    for number in range(endpoint.tries):
        last, pause = number == endpoint.tries - 1, endpoint.pause * 2**number
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
                wait(_pause(error.headers.get("Retry-After"), pause))
            continue
        except (
            OSError,
            ValueError,
        ) as error:  # URLError, timeouts, broken connections, lines that are no HTTP
            reason = getattr(error, "reason", error)
            if last:
                slow = isinstance(reason, TimeoutError)
                why = f"did not answer within {endpoint.timeout:g} s" if slow else "cannot be reached"
                raise InputError(
                    f"{endpoint.base} {why}, tried {_times(number + 1)}: see whether the server runs."
                ) from None
            wait(pause)
            continue
        if len(found) > LARGEST:
            raise InputError(
                f"{endpoint.base} answers with more than {LARGEST:,} bytes: name another endpoint."
            )
        return found
    raise AssertionError("the last try returns or raises")


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
        if isinstance(said, str) and said.strip():
            return said.strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{endpoint.base} answers, but not as a chat endpoint does: name one that speaks OpenAI's protocol."
        ) from None
    raise InputError(f"{endpoint.base} gives an empty answer: ask otherwise, or take another model.")


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


def _kept(cache: Path) -> dict[str, str]:
    """Key -> answer; lines that are torn are left out."""
    found: dict[str, str] = {}
    try:
        lines = cache.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            if isinstance(entry["answer"], str):
                found[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _keep(cache: Path, key: str, answer: str) -> None:
    """One line more, written at once."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "answer": answer}) + "\n"
    with cache.open("ab") as file:
        if file.tell() and not _ends_a_line(cache):
            line = "\n" + line  # after a line that was torn
        file.write(line.encode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
