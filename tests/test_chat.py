"""The chat client against a server on this machine: what it sends, how it insists, and what it says when all fails."""

from __future__ import annotations

import base64
import io
import time

import pytest
from PIL import Image
from tests.chat_server import failed, said

from reverie import cli
from reverie.chat import Endpoint, ask, message, unread
from reverie.errors import InputError


def test_it_asks_as_openai_would_be_asked(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret ")
    endpoint = Endpoint(base=server.base + "/", model="small", key="MY_KEY")
    server.replies = [said("  a red rocket \n"), said([{"type": "text", "text": "in parts"}])]
    talk = [message("be brief", role="system"), message("rocket")]
    assert ask(endpoint, talk, temperature=0.5, most=9) == "a red rocket"
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "small", "temperature": 0.5, "max_tokens": 9,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "rocket"}],
    }  # fmt: skip
    assert ask(Endpoint(base=server.base, model="small"), talk) == "in parts"
    assert "Authorization" not in server.seen[1][1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_pictures_go_along_as_data_urls(server, tmp_path, kind):
    Image.new("RGB", (3, 2), "red").save(out := io.BytesIO(), kind)
    path = tmp_path / "any-name"
    path.write_bytes(out.getvalue())
    ask(Endpoint(base=server.base, model="m"), [message("what is it?", pictures=[path, out.getvalue()])])
    text, one, two = server.seen[0][2]["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is it?"}
    assert one == two
    head, _, content = one["image_url"]["url"].partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    assert base64.b64decode(content) == out.getvalue()


def test_it_tries_again_with_growing_pauses_and_as_long_as_it_is_told_to(server):
    waited, told = [], []
    endpoint = Endpoint(base=server.base, model="m", pause=0.5)
    server.replies = [failed(503), failed(429, **{"Retry-After": "7"}), failed(500), said("at last")]
    assert ask(endpoint, [message("x")], wait=waited.append, tell=told.append) == "at last"
    assert waited == [0.5, 7.0, 2.0]
    assert told[0] == f"{server.base} answers 503: trying again in 0.5 s, for the 2. time of 4."
    assert len(told) == 3
    waited.clear()
    server.replies = [
        failed(429, **{"Retry-After": "9999"}),
        failed(502, **{"Retry-After": "soon"}),
        said("now"),
    ]
    assert ask(endpoint, [message("x")], wait=waited.append) == "now"
    assert waited == [60.0, 1.0]
    server.replies = [(200, b"{", {"Content-Length": "999"}), said("whole")]  # cut short
    short = Endpoint(base=server.base, model="m", timeout=0.3)
    assert ask(short, [message("x")], wait=waited.append) == "whole"


def test_answers_are_kept_and_torn_lines_forgiven(server, tmp_path):
    cache = tmp_path / "deep" / "answers.jsonl"
    endpoint = Endpoint(base=server.base, model="m", cache=cache)
    server.replies = [said("one"), said("two"), said("three")]
    assert ask(endpoint, [message("a")]) == ask(endpoint, [message("a")]) == "one"
    assert ask(endpoint, [message("b")]) == "two"
    assert len(server.seen) == 2
    cache.write_bytes(cache.read_bytes()[:-9])  # the machine stopped while the second was written
    assert ask(endpoint, [message("a")]) == "one"
    assert ask(endpoint, [message("b")]) == "three"
    assert ask(endpoint, [message("b")]) == "three"
    other = Endpoint(base=server.base, model="other", cache=cache)
    assert ask(other, [message("a")]) == "hello"
    assert len(server.seen) == 4


def test_lines_that_are_damaged_are_counted_and_other_files_left_alone(server, tmp_path):
    cache = tmp_path / "answers.jsonl"
    endpoint = Endpoint(base=server.base, model="m", cache=cache)
    assert unread(cache) == 0
    ask(endpoint, [message("a")])
    with cache.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"key": ["x"], "answer": "y"}\n\n')
    assert unread(cache) == 3
    assert ask(endpoint, [message("a")]) == "hello"
    assert len(server.seen) == 1
    cache.write_text('{"key": "12')  # torn while the very first answer was written
    assert unread(cache) == 1
    for other in (b"my notes\n", b'{"name": 1}\n{"name": 2}\n', b"\x89PNG\r\n"):
        cache.write_bytes(other)
        for call in (lambda: unread(cache), lambda: ask(endpoint, [message("b")])):
            with pytest.raises(InputError, match=r"answers\.jsonl holds no answer of an endpoint"):
                call()
        assert cache.read_bytes() == other
    for place in (tmp_path, cache / "below"):
        with pytest.raises(InputError, match="cannot keep answers"):
            unread(place)
    assert len(server.seen) == 1


def test_what_would_steer_a_terminal_is_taken_out(server, tmp_path):
    wild = "\x1b[31ma \x1b]0;title\x07red\x1b(B\x08 \u202erocket\r\x9b2J\n\t\u706b\x1b"
    endpoint = Endpoint(base=server.base, model="m", cache=tmp_path / "kept")
    server.replies = [said(wild), said("\x1b[2J")]
    assert ask(endpoint, [message("x")]) == "a red rocket\n\t\u706b"
    lines = (tmp_path / "kept").read_text().replace("a red", "a \\u001b[1mred")
    (tmp_path / "kept").write_text(lines)
    assert ask(endpoint, [message("x")]) == "a red rocket\n\t\u706b"
    with pytest.raises(InputError, match="an empty answer"):
        ask(endpoint, [message("y")])


def test_every_failure_is_one_sentence(server, monkeypatch):
    endpoint = Endpoint(base=server.base, model="m", tries=2)

    def slow():
        time.sleep(0.5)
        return said("late")

    cases = [
        ([failed(401, "bad key")], "refuses the key (401), none is in REVERIE_CHAT_KEY"),
        ([failed(404)], "no chat or no model 'm' (404)"),
        ([failed(400, "context\n too long")], "(400), saying 'context too long'"),
        ([(302, b"", {"Location": "http://127.0.0.1:1/"})], "leads elsewhere (302)"),
        ([failed(429)] * 2, "takes no more requests (429), tried 2 times"),
        ([failed(500), failed(503, "busy")], "fails (503), tried 2 times, saying 'busy'"),
        (
            [(200, b"{", {"Content-Length": "999", "Connection": "close"})] * 2,
            "breaks off before its answer is",
        ),
        ([(200, b"9\r\n{", {"Transfer-Encoding": "chunked"})] * 2, "breaks off before its answer is whole"),
        ([(200, b"<html>", {})], "not as a chat endpoint does"),
        ([(200, b'{"choices": []}', {})], "not as a chat endpoint does"),
        ([said("  ")], "an empty answer"),
        ([said(None)], "an empty answer"),
    ]
    for replies, words in cases:
        server.replies = list(replies)
        with pytest.raises(InputError) as caught:
            ask(endpoint, [message("x")], wait=lambda seconds: None)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("REVERIE_CHAT_KEY", "wrong")
    server.replies = [failed(403)]
    with pytest.raises(InputError, match="the one in REVERIE_CHAT_KEY") as caught:
        ask(endpoint, [message("x")])
    assert "wrong" not in str(caught.value)
    server.replies = [slow]
    with pytest.raises(InputError, match=r"did not answer within 0\.1 s, tried once"):
        ask(Endpoint(base=server.base, model="m", timeout=0.1, tries=1), [message("x")])
    with pytest.raises(InputError, match="cannot be reached, tried 3 times"):
        ask(
            Endpoint(base="http://127.0.0.1:1/v1", model="m", tries=3),
            [message("x")],
            wait=lambda seconds: None,
        )


def test_what_cannot_be_asked_is_said_before_anything_is_sent(server, tmp_path):
    for wrong, words in (
        ({"base": "localhost:8000"}, "no address"),
        ({"base": "file:///etc/passwd"}, "no address"),
        ({"base": "http://me:secret@host/v1"}, "password or a query"),
        ({"model": " "}, "which model"),
        ({"tries": 0}, "0 tries"),
        ({"timeout": float("nan")}, "of nan s"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            Endpoint(**{"base": server.base, "model": "m"} | wrong)
        assert "secret" not in str(caught.value)
    (tmp_path / "text.png").write_text("no picture")
    for picture, words in ((tmp_path / "none.png", "cannot be read"), (tmp_path / "text.png", "is no PNG")):
        with pytest.raises(InputError, match=words):
            message("x", pictures=[picture])
    assert not server.seen


def test_the_command_expands_by_the_endpoint_that_is_named(server, tmp_path, capsys):
    server.replies = [said('"a red rocket, space,\n travel"')]
    words = [
        "expand",
        "rocket",
        "--endpoint",
        server.base,
        "--model",
        "m",
        "--cache",
        str(tmp_path / "kept.jsonl"),
    ]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == ["a red rocket, space, travel"] * 2
    ((path, _, body),) = server.seen
    system, wish = body["messages"]
    assert wish == {"role": "user", "content": "rocket"}
    assert "sticker" in system["content"]
    assert cli.main(["expand", "rocket", "--endpoint", server.base]) == 2
    assert cli.main(["expand", "rocket", "--model", "m"]) == 2
    capsys.readouterr()
    (tmp_path / "kept.jsonl").open("a").write("torn")
    assert cli.main([*words, "--timeout", "9"]) == 0
    assert "1 line of" in capsys.readouterr().err
    assert cli.main([*words, "--timeout", "0"]) == 2
    assert "4 tries of 0 s" in capsys.readouterr().err
    assert len(server.seen) == 1
