"""The demo from end to end on tiny random models, and its page as a function of the results."""

import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import reverie
from reverie.codecs.bpe import Bpe
from reverie.data.index import Index
from reverie.data.stickers import sample_folder
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.recipes import demo as demo_module
from reverie.recipes import gallery
from reverie.recipes import sora as sora_recipe
from reverie.recipes.demo import Judge, demo, language_of
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.sora import Sora


@pytest.fixture(scope="module", autouse=True)
def sample(tmp_path_factory):
    """A fifth of the sample folder: the things that Twemoji has there, in every style."""
    whole, folder = Index.read(sample_folder()), tmp_path_factory.mktemp("sample")
    labels = {item.label for item in whole if item.source == "twemoji"}
    labels = {*sorted(labels)[:40], "penguin", "sailboat", "cat face", "butterfly"}
    items = [item for item in whole if item.label in labels]
    for item in items:
        (folder / item.file_name).parent.mkdir(exist_ok=True)
        shutil.copy(whole.path(item), folder / item.file_name)
    Index(folder, items).write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "sample_folder", lambda: folder)
        yield Index.read(folder)


@pytest.fixture(scope="module")
def models(sample, tmp_path_factory):
    """A CLIP and a Sora of a moment's size, random but not blank."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Bpe.train((c.text for item in sample for c in item.captions), vocab=1024)
    torch.manual_seed(0)
    config = ClipConfig(
        image=VitConfig(size=32, patch=16, width=32, depth=1, heads=1),
        text=TextConfig(vocab=tokenizer.vocab, length=16, width=32, depth=1, heads=1, end=tokenizer.end),
        width=32,
    )
    clip = Clip(config, tokenizer)
    shape = sora_recipe.shape(clip, size=32, sizes=(1, 32, 1))
    sora = Sora(shape, tokenizer)
    sora.text.load_state_dict(clip.text.state_dict())
    for parameter in sora.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return {"clip": reverie.save(clip, folder / "clip"), "sora": reverie.save(sora, folder / "sora")}


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "gallery"
    page = demo(out, steps=1, **models)
    assert page == out / "index.html"
    return out


@pytest.fixture(scope="module")
def results(made):
    return json.loads((made / "results.json").read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Tags with their attributes, and that each is closed in its turn."""

    VOID = ("meta", "img", "br", "source", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_demo_does_what_the_gallery_promises(results, sample):
    prompts = results["drawn"]["prompts"]
    assert len(prompts) >= 8
    assert {prompt["language"] for prompt in prompts} == {"en", "zh"}
    for prompt in prompts:
        scores = [drawing["score"] for drawing in prompt["drawings"]]
        assert len(scores) >= 2
        assert prompt["drawings"][prompt["best"]]["score"] == max(scores)
        assert len({drawing["seed"] for drawing in prompt["drawings"]}) == len(scores)
        assert all(1 <= drawing["rank"] <= drawing["of"] for drawing in prompt["drawings"])
    assert len(results["animated"]["clips"]) >= 3
    assert results["continued"]["clips"]
    assert {query["by"] for query in results["found"]["queries"]} == {"words", "picture"}
    assert {query["language"] for query in results["found"]["queries"] if query["by"] == "words"} == {
        "en",
        "zh",
    }
    assert {picture["source"] for picture in results["named"]["pictures"]} == {"twemoji"}
    assert results["named"]["ways"] == len({item.label for item in sample}) > 40
    assert all(results[part]["seconds"] > 0 for part in ("drawn", "animated", "continued", "found", "named"))


def test_a_continued_clip_begins_with_the_given_picture_of_a_clip_kept_from_training(results, made):
    for clip in results["continued"]["clips"]:
        assert clip["split"] == "val"
        with Image.open(made / clip["file"]) as moving, Image.open(made / clip["given"]["file"]) as given:
            assert moving.n_frames == clip["frames"] == 16
            first = np.asarray(moving.convert("RGB")).astype(int)
            small = np.asarray(given.convert("RGB").resize(moving.size, Image.Resampling.BOX)).astype(int)
            moving.seek(8)
            later = np.asarray(moving.convert("RGB")).astype(int)
        assert abs(first - small).mean() < 12
        assert abs(later - small).mean() > 24


def test_what_is_shown_was_found_and_is_not_what_was_asked_for(results):
    for query in results["found"]["queries"]:
        scores = [answer["score"] for answer in query["answers"]]
        assert scores == sorted(scores, reverse=True)
        files = [answer["file"] for answer in query["answers"]]
        assert len(set(files)) == len(files) == 8
        if query["by"] == "picture":
            assert query["picture"]["file"] not in files


def test_every_file_is_whole_and_the_page_names_each(results, made):
    text = (made / "index.html").read_text(encoding="utf-8")
    seen = Reader(text).seen
    shown = {
        attributes.get("src") or attributes["srcset"] for tag, attributes in seen if tag in ("img", "source")
    }
    kept = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert kept == shown | {"index.html", "results.json", "preview.png"}
    for name in kept - {"index.html", "results.json"}:
        with Image.open(made / name) as image:
            assert image.format == {"png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]
            image.load()
    assert all(attributes["alt"] for tag, attributes in seen if tag == "img")
    assert (made / "preview.png").stat().st_size <= gallery.PREVIEW_BYTES
    assert results["seconds"] > 0


def test_the_same_seed_makes_the_same_bytes_and_another_seed_does_not(
    models, made, results, tmp_path, monkeypatch
):
    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "peak_memory"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    def media(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.[pw][ne][gb]*")}

    again = demo(tmp_path / "again", steps=1, **models).parent
    assert media(again) == media(made)
    assert len(media(made)) > 80
    assert timeless(json.loads((again / "results.json").read_text(encoding="utf-8"))) == timeless(results)
    for name in ("DRAW", "ANIMATE", "CONTINUE"):
        monkeypatch.setattr(demo_module, name, getattr(demo_module, name)[:2])
    other = demo(again, seed=9, steps=1, **models).parent  # into a gallery that is there already
    drawn = [path for path in media(made) if path.name in ("00-0.png", "01-3.png", "animated-1.webp")]
    assert len(drawn) == 3
    assert all(media(other)[path] != media(made)[path] for path in drawn)


def test_progress_goes_to_stderr_and_the_path_is_the_last_line(models, tmp_path, capsys, monkeypatch):
    from reverie import cli

    monkeypatch.setattr("reverie.progress.EVERY", 0.0)
    for name in ("DRAW", "ANIMATE"):
        monkeypatch.setattr(demo_module, name, getattr(demo_module, name)[:2])
    flags = ("--clip", models["clip"], "--sora", models["sora"], "--steps", 2)
    assert cli.main(["demo", "--out", str(tmp_path / "gallery"), *map(str, flags)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "gallery" / "index.html")
    for name in ("loading", "drawing", "animating", "continuing a first frame", "finding", "naming"):
        assert re.search(rf"^{name}: done in [\d.]+ s$", err, re.MULTILINE), name
    assert re.search(r"^drawing \d+/\d+ · \d+ s left$", err, re.MULTILINE)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_written_over(tmp_path):
    for name in ("notes.txt", "index.html"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match="holds no gallery"):
            demo(folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"
        with pytest.raises(InputError, match="is a file"):
            demo(folder / name)


def test_steps_must_be_one_at_least(tmp_path):
    with pytest.raises(InputError, match="steps is 0"):
        demo(tmp_path / "gallery", steps=0)
    assert not (tmp_path / "gallery").exists()


def test_a_model_that_cannot_draw_is_refused(models, tmp_path):
    with pytest.raises(InputError, match="is a Clip, which cannot generate video"):
        demo(tmp_path / "gallery", clip=models["clip"], sora=models["clip"])


# --- the judge ------------------------------------------------------------------------------------------------------


def test_the_judges_score_is_the_mean_cosine_and_the_rank_counts_the_labels_before(models, sample):
    clip = reverie.load(models["clip"])
    judge = Judge(clip, sample)
    videos = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for words in ("rocket", "火箭", "teal owl"):
        language = "zh" if words == "火箭" else "en"
        phrases = demo_module.phrases(language)
        assert len(phrases) == 4
        labels = {
            c.text for item in sample for c in item.captions if (c.source, c.language) == ("label", language)
        }
        names = [words, *sorted(labels - {words})]
        with torch.no_grad():
            texts = clip.embed_text([phrase.format(name) for name in names for phrase in phrases])
            frames = torch.stack([clip.embed_image(video.transpose(0, 1)) for video in videos])
        vectors = torch.nn.functional.normalize(texts.reshape(len(names), 4, -1).mean(1), dim=-1)
        for scores, said in zip((frames @ vectors.T).mean(1).tolist(), judge(videos, words), strict=True):
            own, *others = scores
            assert said["score"] == pytest.approx(own, abs=1e-5)
            before = sum(other > own + 1e-5 for other in others)
            close = sum(abs(other - own) <= 1e-5 for other in others)
            assert before + 1 <= said["rank"] <= before + 1 + close
            assert said["of"] == len(names)


def test_a_blip_describes_what_it_never_saw_and_looks_again_at_what_was_drawn(results, sample, tmp_path):
    """One that names every other picture, and to which the last drawing of each prompt belongs."""
    told = [item for item in sample.select(video=False, sources=("twemoji",)) if item.label]
    labels = iter(enumerate(item.label for item in told))

    class Teller:
        def caption(self, media, *, prompt):
            return [f"{prompt} {label}" if i % 2 else "?" for i, label in (next(labels) for _ in media)]

        def match(self, pictures, texts):
            return torch.linspace(0, 1, len(pictures))

    (tmp_path / "sample").mkdir()
    pictures = [torch.zeros(len(prompt["drawings"]), 3, 8, 8) for prompt in results["drawn"]["prompts"]]
    run = demo_module._Run(tmp_path, sample, None, None, None, Teller(), 0, 1, None, drawn=pictures)
    part = demo_module._describe(run)
    assert part["images"] == len(told)
    assert part["named"] == pytest.approx(len(told) // 2 / len(told))
    assert {picture["named"] for picture in part["pictures"]} == {True, False}
    assert all(picture["named"] == (picture["label"] in picture["caption"]) for picture in part["pictures"])
    part["pictures"][0]["caption"] = "<b>bold</b>"
    page = gallery.page(results | {"described": part})
    assert "<b>bold</b>" not in page
    words = " ".join(Reader(page).words)
    same = sum(prompt["best"] == len(prompt["drawings"]) - 1 for prompt in results["drawn"]["prompts"])
    assert f"is the same in {same} of {len(results['drawn']['prompts'])}" in " ".join(words.split())
    assert "by three small models" in words
    without = {name: value for name, value in results.items() if name != "described"}
    assert "Described" in Reader(page).words
    assert "Described" not in Reader(gallery.page(without)).words


def test_the_language_of_words():
    assert [language_of(words) for words in ("rocket", "café", "火箭", "a 火箭")] == ["en", "en", "zh", "zh"]


# --- the page -------------------------------------------------------------------------------------------------------

EVIL = """</style><script>alert(1)</script><img src=x onerror=alert(2)>"' onload='x' &amp; {}"""


def test_every_text_of_the_page_is_escaped(results):
    def poison(value, key=""):
        if isinstance(value, dict):
            return {name: poison(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [poison(part, key) for part in value]
        return EVIL if isinstance(value, str) and key != "by" else value

    text = gallery.page(poison(results))
    reader = Reader(text)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "nav",
        "a",
        "main",
    }
    allowed |= {
        "section",
        "div",
        "article",
        "figure",
        "figcaption",
        "img",
        "picture",
        "source",
        "span",
        "b",
        "br",
    }
    assert {tag for tag, _ in reader.seen} <= allowed | {"svg", "rect", "footer", "dl", "dt", "dd"}
    assert not [name for _, attributes in reader.seen for name in attributes if name.startswith("on")]
    assert not [attributes for tag, attributes in reader.seen if "style" in attributes]
    links = {attributes["href"] for tag, attributes in reader.seen if "href" in attributes}
    assert links == {"#drawn", "#animated", "#continued", "#found", "#named", "#described", "results.json"}
    assert any(EVIL in words for words in reader.words)  # shown as it is, not lost


def test_the_page_needs_no_script_and_may_load_only_what_lies_beside_it(results):
    text = gallery.page(results)
    (policy,) = (
        attributes["content"] for tag, attributes in Reader(text).seen if attributes.get("http-equiv")
    )
    assert policy.startswith("default-src 'none'; img-src 'self' file:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "script" not in text
    assert "://" not in text


@pytest.mark.parametrize("noise", [False, True])
def test_the_contact_sheet_stays_small(noise):
    generator = np.random.default_rng(0)
    tiles = generator.integers(0, 256, (36, 64, 64, 3), dtype=np.uint8)
    if not noise:
        tiles[:] = tiles.mean(axis=(1, 2), keepdims=True).astype(np.uint8)
    rows = [gallery.Row(tiles=tiles[:12], titles=["a very long title that is cut"] * 12)]
    rows += [
        gallery.Row(tiles=part, titles=[gallery.title("火箭", "rocket")])
        for part in (tiles[12:24], tiles[24:])
    ]
    png = gallery.preview(rows)
    assert len(png) <= gallery.PREVIEW_BYTES
    with Image.open(io.BytesIO(png)) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1500
        assert (sheet.mode == "RGB") is not noise


def test_a_stage_shows_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with demo_module._stage("drawing", 2) as stage:
        stage.tick(1, 2)
        stage.tick(2, 2)
    err = capsys.readouterr().err
    assert "2/2" in err
    assert re.search(r"drawing: done in [\d.]+ s\n$", err)
    assert "drawing 2/2" not in err
