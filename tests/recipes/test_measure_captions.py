"""Captions, matches and answers from end to end: who tells the truth scores 1, who sees nothing what guessing gives."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import reverie as package
from reverie import cli
from reverie.data.importers import import_folder
from reverie.data.index import Caption, Index, Item
from reverie.data.world import scenes_of, write
from reverie.data.world_questions import question_set
from reverie.errors import InputError
from reverie.recipes import measure_captions, measure_clip
from reverie.recipes.asked import Telling
from reverie.recipes.measure_captions import still


def reverie(*words: object) -> int:
    return cli.main([str(word) for word in words])


def key(picture):
    return picture.convert("RGBA").tobytes()


class Fake:
    """What `reverie.load` gives: a system whose methods are the functions given."""

    def __init__(self, **methods):
        self.asked = []
        self.config = SimpleNamespace()
        for name, function in methods.items():
            setattr(self, name, function)

    def to(self, place):
        return self


@pytest.fixture
def serve(monkeypatch):
    def put(**systems):
        monkeypatch.setattr(package, "load", lambda name, **_: systems[str(name)])

    return put


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 scenes, of which nothing is held out, so that all are measured."""
    folder = tmp_path_factory.mktemp("scenes") / "world"
    write(folder, 40, size=(48, 48))
    return folder


def own_captions(folder):
    index = Index.read(folder)
    return {key(still(index.media(item))): item.captions[0].text for item in index}


def test_who_tells_the_truth_about_the_world_scores_one(world, tmp_path, serve, capsys):
    truth = own_captions(world)
    serve(truthful=Fake(caption=lambda pictures, **_: [truth[key(p)] for p in pictures]))
    asked = ["--model", "truthful", "--clip", "", "--split", "all", "--out", tmp_path / "out"]
    assert reverie("eval", "captions", world, *asked) == 0
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())["numbers"]
    found = numbers["world"]["captions"]
    assert found["all"]["right"] == 1
    for name in ("count", "shape", "colour", "relation"):
        assert found[name]["right"] == found[name]["said"] == 1
    assert "motion" not in found
    assert 0 < found["relation"]["scenes"] < found["colour"]["scenes"] == 40
    assert numbers["world"]["other"]["all"]["right"] < 0.2  # dealt to other scenes
    assert numbers["references"]["BLEU-4"]["all"] == pytest.approx(1)
    assert numbers["references"]["ROUGE-L"]["all"] == pytest.approx(1)
    assert numbers["references"]["CIDEr-D"]["other"] < numbers["references"]["CIDEr-D"]["all"]
    assert Image.open(tmp_path / "out" / "captions.png").width > 500
    assert "nothing wrong, nothing missing" in capsys.readouterr().out


def test_who_always_says_the_same_scores_what_it_scores_on_other_pictures(world, tmp_path, serve):
    serve(same=Fake(caption=lambda pictures, **_: ["a red circle"] * len(pictures)))
    done = measure_captions.captions(world, tmp_path, model="same", clip="", split="all")
    found = done.numbers["world"]
    for name in ("count", "shape", "colour"):
        assert found["captions"][name]["right"] == found["other"][name]["right"] < 0.7
    assert found["captions"]["relation"] == {
        "claimed": 0, "right": None, "right_interval": None, "scenes": found["captions"]["relation"]["scenes"],
        "said": 0, "said_interval": (0, 0),
    }  # fmt: skip
    assert found["captions"]["all"]["holds"].count(True) <= 1


@pytest.fixture(scope="module")
def stickers(tmp_path_factory):
    """Ten things by two hands, of which twemoji is never trained on; each knows other names of a thing."""
    folder, items = tmp_path_factory.mktemp("corpus"), []
    for hand, source in enumerate(("noto", "twemoji")):
        (folder / source).mkdir()
        for i in range(10):
            file = f"{source}/{i}.png"
            Image.new("RGBA", (8, 8), (20 * i, 100 * hand, 50, 255)).save(folder / file)
            told = [Caption(text=f"thing {i}", source="label"), Caption(text=f"东西{i}", source="label", language="zh"),
                    Caption(text=f"tag{i}, x", source="tags")]  # fmt: skip
            told += [Caption(text=f"the {i} of noto", source="alias")] * (source == "noto")
            items.append(
                Item(
                    file_name=file, hash=f"{hand}{i}" * 32, bytes=(folder / file).stat().st_size, width=8, height=8,
                    split="test" if hand else "train", captions=tuple(told), label=f"thing {i}", source=source,
                    scores={"skin_tone": float(i == 9)},
                )
            )  # fmt: skip
    Index(folder, items).write()
    return folder


def test_names_of_any_hand_count_and_tags_do_not(stickers, tmp_path, serve):
    wordings = ("a picture of Thing {}!", "the {} of noto", "tag{}", "thing {}0", "nothing")
    place = {key(still(stickers / "twemoji" / f"{i}.png")): i for i in range(10)}

    def caption(pictures, **_):
        return [wordings[place[key(p)] % 5].format(place[key(p)]) for p in pictures]

    serve(names=Fake(caption=caption))
    done = measure_captions.captions(stickers, tmp_path, model="names", clip="", batch=4)
    assert done.numbers["files"] == [f"twemoji/{i}.png" for i in range(9)]  # a skin tone is left out
    found = done.numbers["labels"]
    assert found["all"]["named"] == pytest.approx(4 / 9)
    assert found["all"]["other"] == 0
    assert [each["named"] for each in found["examples"]] == [i % 5 < 2 for i in range(9)]
    chinese = Fake(caption=lambda pictures, **_: [f"东西{place[key(p)]}" for p in pictures])
    serve(chinese=chinese)
    done = measure_captions.captions(stickers, tmp_path, model="chinese", clip="", language="zh")
    assert done.numbers["labels"]["all"]["named"] == 1
    done = measure_captions.captions(stickers, tmp_path, model="chinese", clip="")
    assert done.numbers["labels"]["all"]["named"] == 0


def test_a_clip_prefers_the_captions_of_their_own_pictures(stickers, tmp_path, serve):
    place = {key(still(stickers / "twemoji" / f"{i}.png")): i for i in range(10)}
    axes = torch.eye(10)
    clip = Fake(
        embed_image=lambda pictures: torch.stack([axes[place[key(p)]] for p in pictures]),
        prepare=None,
        embed_text=lambda texts: torch.stack([axes[int(next(c for c in t if c.isdigit()))] for t in texts]),
    )
    serve(names=Fake(caption=lambda pictures, **_: [f"thing {place[key(p)]}" for p in pictures]), judge=clip)
    done = measure_captions.captions(stickers, tmp_path, model="names", clip="judge")
    for what, top in (("CLIPScore", 2.5), ("RefCLIPScore", 2 * 2.5 / 3.5)):
        assert done.numbers["clip"][what]["all"] == pytest.approx(top)
        assert done.numbers["clip"][what]["other"] == 0


def test_answers_are_measured_by_kind_beside_the_best_blind_guess(world, tmp_path, serve):
    index = Index.read(world)
    asked = question_set(scenes_of(index), seed=0)
    file = {item.file_name: key(still(index.media(item))) for item in index}
    truth = {(file[name], q.text): q.answer for name, q in asked}
    seen = []

    def answer(pictures, questions, answers=None):
        seen.append(answers)
        return [truth[key(p), q].upper() for p, q in zip(pictures, questions, strict=True)]

    serve(
        knows=Fake(answer=answer),
        blind=Fake(answer=lambda pictures, questions, **_: ["Yes."] * len(questions)),
    )
    assert (
        reverie("eval", "answers", world, "--model", "knows", "--split", "all", "--out", tmp_path / "a") == 0
    )
    found = json.loads((tmp_path / "a" / "numbers.json").read_text())["numbers"]["kinds"]
    assert set(found) == {"colour", "shape", "count", "there", "relation", "background", "all"}
    assert all(own["right"] == 1 and own["prior"] < 0.7 for own in found.values())
    assert found["all"]["asked"] == len(asked)
    assert seen[0] is None
    ask = {"model": "blind", "split": "all", "kinds": ("there", "colour")}
    found = measure_captions.answers(world, tmp_path / "b", **ask).numbers["kinds"]
    assert found["there"]["right"] == pytest.approx(0.5, abs=0.1)
    assert found["there"]["right"] <= found["there"]["prior"]
    assert found["colour"]["right"] == 0
    seen.clear()
    measure_captions.answers(world, tmp_path / "c", model="knows", split="all", kinds=("there",), choose=True)
    assert seen[0] == ["no", "yes"]
    (tmp_path / "d").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="holds no scenes"):
        measure_captions.answers(tmp_path / "d", tmp_path / "e", model="knows")


# ---------------------------------------------------------------- on files


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (60 * i + 5, 0, 0)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    frames = [Image.new("RGB", (8, 8), (60 * i + 5, 0, 0)) for i in range(4)]
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], duration=99, lossless=True)
    return folder


def red(pictures):
    pictures = [p if isinstance(p, Image.Image) else Image.open(p) for p in pictures]
    return [p.convert("RGB").getpixel((4, 4))[0] // 60 for p in pictures]


def test_files_and_folders_are_described_and_bad_ones_named(files, serve, capsys):
    asked = []

    def caption(pictures, **how):
        asked.append(how)
        return [f"red {value}\n of seed {how['seed']}" for value in red(pictures)]

    serve(m=Fake(caption=caption))
    assert (
        reverie("caption", files, files / "1.png", "--model", "m", "--batch", 2, "--beams", 5, "--least", 2)
        == 0
    )
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{files}/{name}: red {value} of seed {seed}"
        for name, value, seed in (
            ("0.png", 0, 0),
            ("1.png", 1, 0),
            ("2.png", 2, 2),
            ("clip.webp", 2, 2),
            ("1.png", 1, 4),
        )
    ]
    assert err.startswith(f"left out: {files}/broken.png: ")
    assert asked[0] == {"sampling": "beam", "beams": 5, "least": 2, "most": 20, "p": 0.9, "seed": 0}
    words = ["--sampling", "nucleus", "--several", 2, "--prompt", "a picture of", "--seed", 4, "--json"]
    assert reverie("caption", files / "0.png", "--model", "m", *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == [
        {"path": f"{files}/0.png", "captions": ["red 0 of seed 4", "red 0 of seed 5"]}
    ]
    assert (asked[-1]["prompt"], asked[-1]["sampling"], asked[-1]["seed"]) == ("a picture of", "nucleus", 5)
    assert reverie("caption", files / "broken.png", "--model", "m") == 2


def test_texts_are_matched_and_questions_answered(files, serve, capsys):
    serve(
        m=Fake(
            match=lambda pictures, texts: torch.tensor([0.25 * len(t) for t in texts]),
            embed_image=lambda pictures: F.normalize(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), dim=-1),
            embed_text=lambda texts: torch.tensor([[1.0, 0.0] if t == "ab" else [-0.6, -0.8] for t in texts]),
        ),
        q=Fake(
            answer=lambda pictures, questions, answers=None: [
                f"{q} {red(pictures)[0]} {answers}" for q in questions
            ]
        ),
    )
    assert reverie("match", files / "1.png", "ab", "abc", "--model", "m") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["50.0%", "cosine", "1.000", "ab"]
    assert second.split() == [
        "75.0%",
        "cosine",
        "-0.600",
        "abc",
    ]  # of several vectors of a picture, the nearest
    assert reverie("match", files / "1.png", "ab", "--model", "m", "--json") == 0
    assert json.loads(capsys.readouterr().out)["texts"] == [{"text": "ab", "probability": 0.5, "cosine": 1.0}]
    assert reverie("ask", files / "2.png", "what?", "--model", "q", "--choices", "a", "b") == 0
    assert capsys.readouterr().out == "what? 2 ['a', 'b']\n"
    assert reverie("ask", files / "2.png", "what?", "who?", "--model", "q", "--json") == 0
    assert [own["answer"] for own in json.loads(capsys.readouterr().out)["answers"]] == [
        "what? 2 None",
        "who? 2 None",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("caption FILES --several 2", "several is 2 with sampling beam"),
        ("caption FILES --model dumb", "which cannot caption"),
        ("caption FILES/none.png --model m", "left out"),
        ("match FILES/none.png a --model m", "none.png"),
        ("match FILES/0.png --model m", "there is no text to compare"),
        ("ask FILES/0.png what --model m", "cannot answer"),
        ("eval captions FILES --model m --split tests", "there is no split 'tests'"),
        ("eval captions FILES --model m --sources noto", "of the sources and split asked for"),
        ("eval retrieval FILES --model m --rerank 0", "rerank is 0"),
        ("search FILES red --rerank m --plus blue --model c", "words, which alone"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, files, serve, capsys, monkeypatch):
    for i in range(3):
        (files / f"{i}.txt").write_text(f"red {i}")
    from reverie.recipes import search

    monkeypatch.setattr(search, "open_folder", lambda *_, **__: (SimpleNamespace(bad=[], folder=files), {}))
    monkeypatch.setattr(search, "search", lambda *_, **__: [[]])
    texts = {"embed_text": lambda texts: torch.ones(len(texts), 2)}
    serve(
        m=Fake(caption=lambda pictures, **_: ["a"] * len(pictures), match=lambda *_: torch.zeros(1)),
        dumb=Fake(), c=Fake(**texts), **{"blip-stickers": Fake(), "clip-stickers": Fake(**texts)},
    )  # fmt: skip
    assert reverie(*words.replace("FILES", str(files)).split()) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
    assert sentence in err[-1]


# ---------------------------------------------------------------- looking again


class Looks:
    """Its vectors know a picture's half alone, its match knows the picture; every call is written down."""

    def __init__(self, deep):
        self.config = SimpleNamespace(width=2)
        self.looks = []
        if deep:
            self.features = lambda pictures: torch.tensor([float(v) for v in red(pictures)])[:, None]
            self.tokens = lambda texts: torch.tensor([int(t.split()[-1]) for t in texts])
            self.matches = self._matches

    def to(self, place):
        return self

    def state_dict(self):
        return {}

    def prepare(self, images):
        return torch.tensor(red(images), dtype=torch.float)[:, None]

    def embed_image(self, images):
        return F.one_hot((images[:, 0] // 2).long(), 2).float()

    def embed_text(self, texts):
        return F.one_hot(torch.tensor([int(t.split()[-1]) // 2 for t in texts]), 2).float()

    def _matches(self, features, tokens):
        self.looks.append(len(tokens))
        fits = (features[:, 0] == tokens).float()
        return torch.stack([1 - fits, 3 * fits], dim=1)

    def match(self, pictures, texts):
        self.looks.append(len(texts))
        fits = torch.tensor(red(pictures)) == torch.tensor([int(t.split()[-1]) for t in texts])
        return torch.where(fits, 0.9, 0.1)


@pytest.mark.parametrize("deep", [True, False])
def test_looking_again_puts_right_what_vectors_cannot_tell(deep, tmp_path, serve):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i + 5, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red {i}")
    import_folder(folder, quiet=True)
    system = Looks(deep)
    serve(looks=system)
    done = measure_clip.retrieve(folder, tmp_path / "out", model="looks", rerank=2).numbers
    for way in ("image_to_text", "text_to_image"):
        assert done["before"][way]["recall@1"] == 0  # a tie earns nothing
        assert done[way]["recall@1"] == 1
        assert [own[0] for own in done[way]["first"]] == [0, 1, 2, 3]
    assert sum(system.looks) == 2 * 4 * 2
    plain = measure_clip.retrieve(folder, tmp_path / "out", model="looks").numbers
    assert plain["image_to_text"] == done["before"]["image_to_text"]
    assert "before" not in plain


def test_search_orders_what_it_found_by_a_second_look(files, tmp_path, serve, capsys):
    (files / "broken.png").unlink()
    serve(looks=Looks(False))
    assert reverie("search", files, "red 1", "--model", "looks", "--rerank", "looks", "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    # of the clip the frame that fits best by the vectors is looked at, its first: 0 and 1 are one to them
    assert lines == [f"0.900  {files}/1.png", f"0.100  {files}/0.png"]


def test_how_it_is_told_has_defaults_of_the_contract():
    assert Telling() == Telling(sampling="beam", prompt=None, beams=3, least=0, most=20, p=0.9, seed=0)
