"""Captions into an index: whose they are, that nothing is lost or asked twice, and what no caption is."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from PIL import Image
from tests.chat_server import failed, said

import reverie
from reverie import cli
from reverie.data.alone import alone
from reverie.data.importers import import_folder
from reverie.data.index import Caption, Index
from reverie.errors import InputError
from reverie.recipes import captioning
from reverie.recipes.asked import Captioning, Chat, Telling
from reverie.recipes.captioning import caption, fault, tidy
from reverie.systems.blip import Blip, BlipConfig


@pytest.fixture
def folder(tmp_path):
    """Ten pictures without words and one with some."""
    place = tmp_path / "walls"
    place.mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16), (20 * i, 200 - 15 * i, 40)).save(place / f"{i}.png")
    (place / "3.txt").write_text("Grüße, 你好 🧱", encoding="utf-8")
    return place


def of(folder, source=None):
    return {
        i.file_name: [c.text for c in i.captions if source in (None, c.source)] for i in Index.read(folder)
    }


def via(server, **own):
    return Chat(endpoint=server.base, concurrency=own.pop("concurrency", 1), **own)


def chat(folder, server, how=captioning.HOW, prompt=None, **own):
    return caption(folder, model="eye", how=how, telling=Telling(prompt=prompt), via=via(server, **own))


def test_an_endpoint_describes_a_folder_that_was_never_imported(folder, server):
    for i in range(10):
        server.replies.append(said(f'"A wall, shade {i}."'))
    done = chat(folder, server, Captioning(trigger="mywall"))
    assert (done.written, done.had, done.left, done.requests) == (10, 0, 0, 10)
    own = of(folder, "synthetic:short:eye")
    assert own["0.png"] == ["mywall, A wall, shade 0."]
    assert of(folder)["3.png"][0] == "Grüße, 你好 🧱"
    sent = server.seen[0][2]["messages"][0]["content"]
    assert sent[0]["text"] == captioning.TASKS["short"].format(it="this picture")
    assert sent[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert chat(folder, server, Captioning(trigger="mywall")).had == 10
    assert len(server.seen) == 10
    assert all(item.reject is None for item in Index.read(folder))
    import_folder(folder, quiet=True)
    assert of(folder, "synthetic:short:eye") == own, "an import keeps what was written"


def test_files_rejected_for_want_of_words_are_accepted_with_them(folder, server):
    import_folder(folder, quiet=True)
    assert sum(item.reject is None for item in Index.read(folder)) == 1
    assert chat(folder, server).written == 10
    assert all(item.reject is None for item in Index.read(folder))


def test_a_budget_ends_a_run_and_the_next_goes_on(folder, server):
    first = chat(folder, server, budget=4)
    assert (first.written, first.left, first.requests) == (4, 6, 4)
    assert sum(bool(texts) for texts in of(folder, "synthetic:short:eye").values()) == 4
    second = chat(folder, server, budget=40)
    assert (second.written, second.had, second.left) == (6, 4, 0)
    assert len(server.seen) == 10
    costly = said("again")
    body = json.dumps(json.loads(costly[1]) | {"usage": {"total_tokens": 60}}).encode()
    server.replies += [(200, body, {})] * 10
    third = chat(folder, server, Captioning(style="long"), budget_tokens=100)
    assert (third.written, third.tokens) == (2, 120)


def test_an_endpoint_that_dies_loses_nothing(folder, server):
    server.replies += [said("one"), said("two")] + [failed(400, "no")] * 8
    with pytest.raises(InputError, match=r"the last 8 files failed.*refuses the request"):
        chat(folder, server)
    assert sorted(text for texts in of(folder, "synthetic:short:eye").values() for text in texts) == [
        "one",
        "two",
    ]
    assert chat(folder, server).written == 8


def test_nonsense_is_not_kept_and_is_asked_again(folder, server):
    server.replies += [said("I'm sorry, I can't help with that."), said("x " * 3000), said('{"a": 1}')]
    done = chat(folder, server)
    assert (done.written, len(done.failed), done.left) == (7, 3, 0)
    assert any("is a refusal" in why for why in done.failed.values())
    assert chat(folder, server).written == 3


def test_a_kill_between_answer_and_index_loses_nothing(folder, server, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(captioning, "_settle", lambda *args: 0)
        chat(folder, server)
    assert len(server.seen) == 10
    assert not any(of(folder, "synthetic:short:eye").values())
    assert chat(folder, server).written == 10
    assert len(server.seen) == 10


def test_several_requests_run_at_a_time_and_answers_find_their_files(folder, server):
    def slow():
        time.sleep(0.1)
        return said(f"number {len(server.seen)}")

    server.replies += [slow] * 10
    start = time.monotonic()
    done = chat(folder, server, concurrency=10)
    assert done.written == 10
    assert time.monotonic() - start < 5
    assert len({body["messages"][0]["content"][1]["image_url"]["url"] for _, _, body in server.seen}) == 10
    again = chat(folder, server, Captioning(again=True), concurrency=3)
    assert (again.written, len(server.seen)) == (10, 10), "the answers were kept"


def test_frames_of_a_clip_are_sent_together_and_hints_are_told(folder, server):
    first, *others = (Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(6))
    first.save(folder / "clip.webp", save_all=True, append_images=others, duration=160, lossless=True)
    (folder / "clip.json").write_text(json.dumps({"label": "sunrise", "tags": ["red", "dawn"]}))
    for png in folder.glob("*.png"):
        png.unlink()
    chat(folder, server, Captioning(style="long", hints=True))
    (content,) = [body["messages"][0]["content"] for _, _, body in server.seen]
    assert len(content) == 1 + 3
    assert content[0]["text"].startswith("These are 3 frames of one clip")
    assert "what moves" in content[0]["text"]
    assert content[0]["text"].endswith("Known about it: sunrise; red; dawn.")
    chat(folder, server, Captioning(style="long", again=True), prompt="Only the colours.")
    assert server.seen[-1][2]["messages"][0]["content"][0]["text"].endswith("Only the colours.")


def test_tags_come_out_as_tags(folder, server):
    server.replies += [said("1. wall\n2. Green paint\n- wall"), said("Tags: wall, stone, grey.")]
    chat(folder, server, Captioning(style="tags"), budget=2)
    found = [texts for texts in of(folder, "synthetic:tags:eye").values() if texts]
    assert found == [["wall, Green paint"], ["wall, stone, grey"]]


def test_two_runs_exclude_each_other(folder, server):
    code = (
        f"from reverie.data.alone import alone\nwith alone({str(folder)!r}, 'reverie caption'):\n"
        " print('in', flush=True)\n input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="is being changed by `reverie caption`"):
            chat(folder, server)
        other.communicate(b"\n")
    with alone(folder, "this test"):
        assert chat(folder, server).written == 10, "the same process may"


@pytest.fixture
def small(tmp_path, folder):
    from reverie.codecs.pieces import Pieces
    from reverie.recipes.blip import shape

    words = ["a red wall", "a green wall", "one, two, three"]
    tokenizer = Pieces.train_words(words * 20, vocab=200)
    config: BlipConfig = shape(tokenizer, size=16, patch=8, width=64, depth=2)
    reverie.save(Blip(config, tokenizer), tmp_path / "small")
    return tmp_path / "small"


def test_a_model_of_this_machine_writes_short_long_and_tags(folder, small, capsys):
    (folder / "3.json").write_text(json.dumps({"label": "green wall", "tags": ["wall", "red"]}))
    assert cli.main(["caption", str(folder), "--model", str(small)]) == 0
    assert "synthetic:short:small: 10 written, 0 there, 0 failed, 0 left" in capsys.readouterr().out
    assert cli.main(["caption", str(folder), "--model", str(small), "--style", "long", "--hints"]) == 0
    long = of(folder, "synthetic:long:small")
    assert all(len(texts[0].split()) > 3 for texts in long.values())
    assert "red" in long["3.png"][0]
    assert cli.main(["caption", str(folder), "--model", str(small), "--style", "tags", "--tags", "2"]) == 0
    tags = of(folder, "synthetic:tags:small")
    assert all(set(texts[0].split(", ")) <= {"green wall", "wall", "red"} for texts in tags.values())
    before = (folder / "metadata.parquet").read_bytes()
    assert cli.main(["caption", str(folder), "--model", str(small), "--show"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 10
    assert (folder / "metadata.parquet").read_bytes() == before


def test_captions_with_any_characters_survive_the_round_trip(folder, server):
    texts = [
        "<b>&amp;\"'</b>",
        "שלום עולם",
        "a\tb\nc",
        "👩‍👩‍👧 family",
        "e\u0301",
        "ไทย",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "a\x00b\x1b[31mred",
        "にほんご",
        "한국어",
    ]
    server.replies += [said(text) for text in texts]
    chat(folder, server)
    kept = [texts[0] for texts in of(folder, "synthetic:short:eye").values()]
    assert kept[1] == "שלום עולם"
    assert kept[2] == "a b c"
    assert kept[3:7] == ["👩‍👩‍👧 family", "e\u0301", "ไทย", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢"]
    assert kept[7] == "abred"
    languages = [
        c.language for i in Index.read(folder) for c in i.captions if c.source.startswith("synthetic")
    ]
    assert languages[-2:] == ["ja", "ko"]


@pytest.mark.parametrize(
    ("answer", "style", "why"),
    [
        ("...", "short", "no word"),
        ("As an AI language model, I cannot", "long", "refusal"),
        ("Sorry, but no.", "short", "refusal"),
        ("对不起，我无法查看图片。", "short", "refusal"),
        ("the same thing " * 100, "long", "repeats"),
        ("<html><body>502</body></html>", "short", "plain text"),
        ("word " * 2000 + "x", "long", "characters"),
        ("a whole sentence that goes on and on where a short list of tags had been asked for", "tags", "tag of more"),
    ],
)  # fmt: skip
def test_what_no_caption_is(answer, style, why):
    assert why in fault(answer, style)


@pytest.mark.parametrize(
    "answer", ["Sorry-looking dog on a wall", "A sign that reads 'I can't stop'", "2 < 3 on a board"]
)
def test_what_a_caption_may_be(answer):
    assert fault(answer, "short") is None
    assert tidy(answer, "short") == answer


def test_settings_that_make_no_sense_are_named(folder):
    with pytest.raises(InputError, match="style is 'loud'"):
        Captioning(style="loud")
    with pytest.raises(InputError, match="frames is 0"):
        dataclasses.replace(Captioning(), frames=0)
    with pytest.raises(InputError, match="budget of 0 requests"):
        caption(folder, model="eye", via=Chat(endpoint="http://127.0.0.1:1/v1", budget=0))
    assert Caption(text="x", source="y").language == "en"
