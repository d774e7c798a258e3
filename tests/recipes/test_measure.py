"""The measurements from end to end, on a small corpus and generators of known worth; and the judge's training."""

import dataclasses
import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reverie
from reverie.backbones.video_dit import VideoDitConfig
from reverie.codecs.bpe import Bpe
from reverie.data.index import Caption, Index, Item
from reverie.encoders.resnet import ResnetConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.pictures import to_signal
from reverie.recipes import judge, measure_clip
from reverie.recipes import measure_generators as measure
from reverie.systems.classifier import Classifier, ClassifierConfig
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.sora import Sora, SoraConfig

SIDE, FRAMES = 32, 4
NAMES = [f"thing {i}" for i in range(12)]


def drawing(name: str, source: str, frame: int = 0) -> np.ndarray:
    """Each thing has its own pattern of 16 blocks, each vendor its own tint; a frame later all of it has moved."""
    seed = NAMES.index(name)
    blocks = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, (4, 4, 3)) * 200
    tint = {"fluent-3d": 0, "fluent-anim": 0, "twemoji": 30, "openmoji": 50}[source]
    return np.roll(np.kron(blocks + tint, np.ones((8, 8, 1))), frame, axis=1).astype(np.uint8)


def signal(name: str, frames: int) -> torch.Tensor:
    video = np.stack([drawing(name, "fluent-anim", frame) for frame in range(frames)])
    return torch.from_numpy(video).float().permute(3, 0, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    items = []
    for source, frames in (("fluent-3d", 1), ("fluent-anim", FRAMES), ("twemoji", 1), ("openmoji", 1)):
        (folder / source).mkdir()
        for i, name in enumerate(NAMES):
            file = f"{source}/{i}.png"
            pages = [Image.fromarray(drawing(name, source, frame)) for frame in range(frames)]
            moving = {"save_all": True, "append_images": pages[1:], "duration": 100} if frames > 1 else {}
            pages[0].save(folder / file, **moving)
            data = (folder / file).read_bytes()
            split = "test" if source in ("twemoji", "openmoji") else "val" if i >= 10 else "train"
            items.append(
                Item(
                    file_name=file,
                    hash=hashlib.sha256(data).hexdigest(),
                    bytes=len(data),
                    width=SIDE,
                    height=SIDE,
                    frames=frames,
                    fps=10.0 if frames > 1 else 0.0,
                    split=split,
                    captions=(Caption(text=name, source="label"),),
                    label=name,
                    source=source,
                    scores={"skin_tone": 0.0},
                )
            )
    Index(folder, items).write()
    return folder


class Fake:
    """Stands for Sora. `draws(name, frames, seed)` is what it makes of a prompt."""

    config = SimpleNamespace(size=(SIDE, SIDE), fps=10.0, frames=FRAMES, steps=1, guidance=1.0)

    def __init__(self, draws):
        self.draws = draws

    def to(self, device):
        return self

    def size_of(self, frames):
        return self.config.size

    def generate_video(self, prompts, *, frames, seed, **options):
        return torch.stack([self.draws(name, frames, s) for name, s in zip(prompts, seed, strict=True)])

    def generate_image(self, prompts, *, seed, **options):
        return self.generate_video(prompts, frames=1, seed=seed)[:, :, 0]


class Knows:
    """A judge that knows every thing by heart."""

    def to(self, device):
        return self

    def classify(self, images, names):
        return -torch.cdist(images.flatten(1), torch.stack([signal(name, 1) for name in names]).flatten(1))

    def embed_image(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)


def noise(name, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, frames, SIDE, SIDE, generator=generator).clamp(-1, 1)


def near(name, frames, seed):
    return signal(name, frames) + 0.1 * noise(name, frames, seed)


@pytest.fixture
def serve(monkeypatch):
    """`serve(generator)`: what `reverie.load` gives for the generator's name and for the judge's."""

    def put(draws):
        table = {"painter": Fake(draws), "a/knows": Knows()}
        monkeypatch.setattr(reverie, "load", lambda name, **_: table[name])

    return put


ASK = measure.Draws(count=10, varied=4, seeds=3, batch=4)


def test_copies_are_right_and_shown_to_be_copies(corpus, tmp_path, serve):
    serve(lambda name, frames, seed: signal(name, frames))
    done = measure.pictures(corpus, tmp_path, model="painter", judges=("a/knows",), ask=ASK)
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    assert numbers["pick"]["knows"]["generator"]["top1"] == 1
    assert numbers["pick"]["knows"]["real"]["top1"] == 1
    assert numbers["diversity"]["pixels"]["ratio"] == 0
    assert numbers["nearest"]["pixels"]["nearer"] == 1
    assert (
        numbers["nearest"]["pixels"]["samples"]["95%"]
        < 1e-6
        < 0.1
        < numbers["nearest"]["pixels"]["held_out"]["5%"]
    )
    assert numbers["nearest"]["pixels"]["file"][0][0] == "fluent-3d/0.png"
    far = numbers["frechet"]["knows"]
    assert far["generator"]["samples"] == far["held_out"]["samples"] == 2  # as many as are held out
    assert numbers["drawn"]["seconds"] > 0
    assert numbers["drawn"]["prompts"] == NAMES[:10]
    assert "100.0%" in str(done)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == f"# {done.title}"
    assert table[2] == f"| {' | '.join(done.columns)} |"
    assert len(table) == 4 + len(done.rows)
    for sheet in ("samples.png", "real.png", "variety.png", "nearest.png", "distances.png"):
        assert Image.open(tmp_path / sheet).width > 100


def test_noise_is_chance_and_new(corpus, tmp_path, serve):
    serve(noise)
    measure.pictures(corpus, tmp_path, model="painter", judges=("a/knows",), ask=ASK)
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    assert numbers["pick"]["knows"]["generator"]["top1"] <= 0.5
    assert numbers["pick"]["knows"]["real"]["top1"] == 1
    assert numbers["diversity"]["pixels"]["ratio"] == pytest.approx(1, abs=0.05)
    assert numbers["nearest"]["pixels"]["nearer"] < 0.5


def test_unseen_labels_are_asked_for_by_their_split(corpus, tmp_path, serve):
    serve(near)
    measure.pictures(corpus, tmp_path, model="painter", judges=("a/knows",), split="val", ask=ASK)
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    assert set(numbers["names"]) == set(NAMES[10:])
    assert numbers["pick"]["knows"]["generator"]["ways"] == 2
    assert 0 < numbers["diversity"]["pixels"]["ratio"] < 0.3


def test_clips_move_and_are_judged_frame_by_frame(corpus, tmp_path, serve):
    """A clip that stands still is right in its first frame, is no copy, and does not move."""
    serve(lambda name, frames, seed: signal(name, 1).expand(-1, frames, -1, -1))
    measure.clips(corpus, tmp_path / "still", model="painter", judges=("a/knows",), ask=ASK)
    still = json.loads((tmp_path / "still" / "numbers.json").read_text())["numbers"]
    assert set(still["frames"]["motion"]["generator"]) == {0}
    assert min(still["frames"]["motion"]["real"]) > 0.01
    assert still["pick"]["knows"]["generator"]["top1"] == 1
    assert still["nearest"]["pixels"]["samples"]["5%"] > 0.1
    serve(lambda name, frames, seed: signal(name, frames))
    measure.clips(corpus, tmp_path / "copy", model="painter", judges=("a/knows",), ask=ASK)
    copy = json.loads((tmp_path / "copy" / "numbers.json").read_text())["numbers"]
    assert copy["frames"]["motion"]["generator"] == pytest.approx(copy["frames"]["motion"]["real"], rel=1e-5)
    for name in ("flicker", "consistency knows"):
        assert copy["frames"][name]["generator"] == pytest.approx(copy["frames"][name]["real"], rel=1e-3)
    assert set(still["frames"]["flicker"]["generator"]) == {0}
    assert still["frames"]["consistency knows"]["generator"] == pytest.approx([1.0] * 10, rel=1e-4)
    assert copy["nearest"]["pixels"]["samples"]["95%"] < 1e-6
    assert Image.open(tmp_path / "copy" / "samples.webp").n_frames == FRAMES


@pytest.mark.parametrize(("frames", "kind"), [(1, None), (12, None), (12, "occlusion")])
def test_a_painter_of_the_world_is_read_back(frames, kind, tmp_path, serve):
    from reverie.data.world import World

    truth = World(8, size=(SIDE * 2, SIDE * 2), frames=frames, kind=kind, first=measure.UNSEEN)
    answers = {}
    for i in range(8):
        example = truth[i]
        answers[example.captions[0].text] = example.pixels[:, :3].transpose(0, 1).float() / 127.5 - 1
    serve(lambda name, frames, seed: answers[name])
    Fake.config.size = (SIDE * 2, SIDE * 2)
    try:
        done = measure.world(tmp_path, model="painter", frames=frames, kind=kind, ask=measure.Draws(count=8))
    finally:
        Fake.config.size = (SIDE, SIDE)
    assert done.numbers["generator"] == done.numbers["real"]
    assert done.numbers["generator"]["all"]["right"] >= 7 / 8
    assert done.numbers["other_scenes"]["all"]["right"] <= 1 / 8
    assert ("motion" in done.numbers["generator"]) == (frames > 1)
    assert ("permanence" in done.numbers["generator"]) == (kind == "occlusion")


class Reads:
    """A CLIP that knows every thing by heart, from its file and from its name; `mixed` are two that it mixes up."""

    def __init__(self, mixed=()):
        self.mixed = dict(zip(mixed, reversed(mixed), strict=True))

    def to(self, device):
        return self

    def scale(self):
        return torch.tensor([20.0])

    config = "by heart"

    def state_dict(self):
        return {"nothing": torch.zeros(1)}

    def prepare(self, paths):
        return torch.stack([torch.from_numpy(to_signal(path, size=SIDE)) for path in paths])

    def embed_image(self, images):
        return self.vectors(images)

    def embed_text(self, texts):
        names = [re.search(r"thing \d+", text)[0] for text in texts]
        return self.vectors(torch.stack([signal(self.mixed.get(name, name), 1)[:, 0] for name in names]))

    def vectors(self, images):
        flat = images.flatten(1)
        return torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def test_a_clip_that_mixes_two_names_up_is_told_so(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(reverie, "load", lambda name, **_: Reads(("thing 3", "thing 5")))
    done = measure_clip.zero_shot(corpus, tmp_path, model="reads", ensemble="simple")
    assert list(done.numbers) == ["twemoji", "openmoji"]  # what no training sees, each by itself
    for source, found in done.numbers.items():
        assert found["top1"] == pytest.approx(10 / 12)
        pairs = {(pair["right"], pair["given"]) for pair in found["confusion"]["pairs"]}
        assert pairs == {("thing 3", "thing 5"), ("thing 5", "thing 3")}
        assert found["calibration"]["before"]["accuracy"] == pytest.approx(10 / 12)
        table = (tmp_path / f"classes-{source}.md").read_text().splitlines()
        assert table[4] == "| thing 3 | 1 | 0.0% | 0.0% | thing 5 (1) |"
        assert Image.open(tmp_path / f"confusions-{source}.png").width > 400
        assert Image.open(tmp_path / f"reliability-{source}.png").width > 400
    together = measure_clip.zero_shot(corpus, tmp_path / "all", model="reads", sources=())
    assert together.numbers["all"]["images"] == 36


def test_a_file_that_cannot_be_read_is_left_out_and_listed(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reverie, "load", lambda name, **_: Reads())
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "data" / "twemoji" / "4.png").write_bytes(b"no picture")
    (tmp_path / "data" / "twemoji" / "7.png").unlink()
    done = measure_clip.zero_shot(tmp_path / "data", tmp_path / "out", model="reads", sources=("twemoji",))
    found = done.numbers["twemoji"]
    assert found["images"] == found["ways"] == 10
    assert found["top1"] == 1
    assert [file for file, _ in found["bad"]] == ["twemoji/4.png", "twemoji/7.png"]
    assert all(reason for _, reason in found["bad"])
    assert "2 pictures cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "confusions-twemoji.png").exists()  # nothing is confused


def test_captions_and_pictures_find_each_other(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(reverie, "load", lambda name, **_: Reads(("thing 3", "thing 5")))
    done = measure_clip.retrieve(corpus, tmp_path, model="reads", sources=("twemoji",))
    for way in ("image_to_text", "text_to_image"):
        assert done.numbers[way]["recall@1"] == pytest.approx(10 / 12)
        assert done.numbers[way]["recall@10_chance"] == pytest.approx(10 / 12)
    assert done.numbers["text_to_image"]["first"][3][0] == 5
    assert (
        Image.open(tmp_path / "pictures-by-text.png").size
        == Image.open(tmp_path / "texts-by-picture.png").size
    )


def test_a_probe_learns_from_train_what_it_names_in_test(corpus, tmp_path, monkeypatch):
    """What the text tower mixes up the features do not."""
    monkeypatch.setattr(reverie, "load", lambda name, **_: Reads(("thing 3", "thing 5")))
    done = measure_clip.probe(corpus, tmp_path, model="reads", shots=(1, 2), draws=2)
    assert done.numbers["names"] == sorted(NAMES[:10])  # the others are not in train
    assert done.numbers["examples"] == 10
    assert done.numbers["probe"]["images"] == 20
    assert done.numbers["probe"]["top1"] == 1
    assert done.numbers["zero_shot"]["top1"] == pytest.approx(8 / 10)
    assert [each["right"] for each in done.numbers["few_shot"]] == [[1, 1]]  # there is one example of each
    assert len(measure_clip.probe(corpus, tmp_path, model="reads", count=4).numbers["names"]) == 4
    with pytest.raises(InputError, match="split is train"):
        measure_clip.probe(corpus, tmp_path, model="reads", split="train")
    with pytest.raises(InputError, match=r"0 labels .* both splits train and test"):
        measure_clip.probe(corpus, tmp_path, model="reads", sources=("twemoji",))


def test_a_folder_without_labels_is_told_what_was_looked_for(corpus, tmp_path):
    index = Index.read(corpus)
    bare = [dataclasses.replace(item, label=None, captions=()) for item in index]
    Index(tmp_path, bare).write()
    for measured, what in ((measure_clip.zero_shot, "label"), (measure_clip.probe, "label"),
                           (measure_clip.retrieve, "caption")):  # fmt: skip
        with pytest.raises(InputError, match=f"has a {what}.*looked for .*class-named folders"):
            measured(tmp_path, tmp_path / "out")


def test_mistakes_get_one_sentence(corpus, tmp_path, serve):
    serve(near)
    ask = {"model": "painter", "judges": ("a/knows",), "ask": ASK}
    with pytest.raises(InputError, match="0 labelled pictures by 'noto' in 'train'"):
        measure.pictures(corpus, tmp_path, source="noto", **ask)
    with pytest.raises(InputError, match="does not move"):
        measure.clips(corpus, tmp_path, frames=1, **ask)
    with pytest.raises(InputError, match="cannot generate image"):
        measure.pictures(corpus, tmp_path, model="a/knows", judges=("a/knows",))
    reverie.load("a/knows").embed_text = None
    with pytest.raises(InputError, match="labels are by: fluent-3d, openmoji, twemoji"):
        measure_clip.zero_shot(corpus, tmp_path, model="a/knows", sources=("noto",))
    with pytest.raises(InputError, match="no captions in 'fr'"):
        measure.world(tmp_path, model="painter", language="fr", ask=measure.Draws(count=1))


def test_random_small_models_from_end_to_end(corpus, tmp_path):
    """The real systems, through their files: the numbers are those of guessing, and everything is written."""
    tokenizer = Bpe.train(NAMES, vocab=600)
    torch.manual_seed(0)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=32, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=SIDE, patch=16, width=32, depth=1, heads=1)
    reverie.save(Clip(ClipConfig(image=image, text=text, width=16), tokenizer), tmp_path / "clip")
    backbone = VideoDitConfig(
        channels=3, patch=(1, 16), bottleneck=16, width=32, depth=1, heads=1, context_width=32
    )
    size = (SIDE, SIDE)
    reverie.save(
        Sora(SoraConfig(backbone=backbone, text=text, size=size, steps=1), tokenizer), tmp_path / "sora"
    )
    small = ClassifierConfig(
        names=tuple(NAMES), size=SIDE, image=ResnetConfig(widths=(8, 16), depths=(0,)), width=8
    )
    reverie.save(Classifier(small), tmp_path / "judge")
    judges = (str(tmp_path / "clip"), str(tmp_path / "judge"))
    model = str(tmp_path / "sora")
    ask = measure.Draws(count=6, varied=2, seeds=2, batch=4, steps=1)
    done = measure.pictures(corpus, tmp_path / "pictures", model=model, judges=judges, ask=ask)
    assert done.numbers["pick"].keys() == {"clip", "judge"}
    assert done.numbers["drawn"]["steps"] == 1
    done = measure.clips(corpus, tmp_path / "clips", model=model, judges=judges, frames=FRAMES, ask=ask)
    assert len(done.numbers["frames"]["motion"]["generator"]) == 6
    assert len(done.numbers["frames"]["clip_score clip"]["generator"]) == 6
    assert "clip_score judge" not in done.numbers["frames"]  # it reads no words
    assert {"clip", "judge"} == done.numbers["frechet"].keys()
    assert all(one["generator"]["distance"] > 0 for one in done.numbers["frechet"].values())
    done = measure.world(tmp_path / "world", model=model, ask=ask)
    assert done.numbers["generator"]["all"]["asked"] == 6
    done = measure_clip.zero_shot(corpus, tmp_path / "names", model=judges[0])
    assert done.numbers["twemoji"]["ways"] == done.numbers["openmoji"]["ways"] == 12
    assert len(done.rows) == 2
    assert (tmp_path / "names" / "confusions-twemoji.png").exists()


def test_the_judge_learns_from_two_hands_and_knows_a_third(corpus, tmp_path):
    index = Index.read(corpus)
    third = index.select(sources=("fluent-3d",))
    small = ClassifierConfig(
        names=tuple(NAMES), size=SIDE, image=ResnetConfig(widths=(16, 32), depths=(1,)), width=16
    )
    config = judge.JudgeRun(model=small, steps=25, batch=12, lr=5e-3, strength=0.3, ema=0.9)
    model = judge.fit(config, index.select(sources=("twemoji", "openmoji")), third, tmp_path)
    unseen = judge.measure(model, third)
    assert unseen["ways"] == unseen["samples"] == 12
    assert unseen["top1"] > 0.5  # guessing gives 0.08
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["unseen_top1"] == pytest.approx(unseen["top1"], abs=0.1)


def test_the_judge_of_stickers_never_sees_what_generators_train_on(corpus, tmp_path):
    index = Index.read(corpus)
    model = judge.stickers(corpus, tmp_path / "run", steps=1, batch=2)
    assert model.config.names == tuple(sorted(NAMES))
    only = tmp_path / "only"
    Index(only, [item for item in index if item.source == "fluent-3d"]).write()
    with pytest.raises(InputError, match="no labelled picture by twemoji or openmoji"):
        judge.stickers(only, tmp_path / "other")
