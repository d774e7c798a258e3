"""The command line: help, mistakes, exit codes, and each command from end to end on small things."""

import dataclasses
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from reverie import catalog, cli, command, media, output
from reverie.errors import InputError
from reverie.train.engine import Engine


def reverie(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_overview_names_every_command(capsys):
    assert reverie("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert reverie() == 0
    assert capsys.readouterr().out == text


def test_a_group_has_its_own_overview(capsys):
    assert reverie("data", "--help") == 0
    text = capsys.readouterr().out
    assert "data import" in text
    assert "train" not in text
    assert reverie("data") == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_for_every_flag(name, capsys):
    assert reverie(*name.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert cli._headline(cli.COMMANDS[name]) in text
    known = command.Command.of(name, cli.COMMANDS[name])
    for parameter in known.parameters:
        assert known.told.get(parameter.name), f"{name}: {parameter.name} has no line in the docstring"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["frobnicate"], "reverie --help"),
        (["sampel"], "`reverie sample`"),
        (["data", "imprt"], "`reverie data import`"),
        (["video"], "`reverie --help`"),
    ],
)
def test_an_unknown_command_is_one_sentence(words, hint, capsys):
    assert reverie(*words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert hint in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("doctor --frobnicate", "`reverie doctor` has no flag --frobnicate: it has none."),
        ("sample a --frame 3", "`reverie sample` has no flag --frame: did you mean --frames?"),
        (
            "data check x --deep",
            "`reverie data check` has no flag --deep: its flags are --contents, --no-contents.",
        ),
        ("data import x --no-need-captons", "no flag --no-need-captons: did you mean --no-need-captions?"),
        ("sample a --boxes 3", "`reverie sample` has no flag --boxes: its flags are --model, --out"),
        ("inpaint a --boxes 3", "`reverie inpaint` has no flag --boxes: did you mean --box?"),
        ("sample a --count 3", "`reverie sample` has no flag --count: its flags are --model, --out"),
        ("sample a --frames many", "--frames is 'many': give a whole number."),
        ("sample a --frames=1.5", "--frames is '1.5': give a whole number."),
        ("sample a --guidance much --seed 3", "--guidance is 'much': give a number."),
        ("sample a --size 64", "--size is '64': give two whole numbers, such as 64 64."),
        ("sample a --size 64 high", "--size is '64 high': give two whole numbers, such as 64 64."),
        ("sample a --out", "--out has no value: give a path."),
        ("sample a --model --seed 1", "--model has no value: give a value."),
        ("data import x --need-captions=no", "is given 'no': write --need-captions or --no-need-captions."),
        ("data check", "`reverie data check` needs FOLDER: a folder that was imported."),
        ("data check a b", "`reverie data check` takes FOLDER besides flags, so 'b' is too much"),
        ("train", "`reverie train` needs RECIPE: which system, and how."),
        ("train clip-tny x", "There is no recipe 'clip-tny': did you mean clip-tiny?"),
        ("train --steps 3 clip-tiny x", "The recipe comes first, not --steps"),
        ("train clip-tiny", "`reverie train clip-tiny` needs DATA: a folder"),
        ("train clip-tiny x --steps ten", "--steps is 'ten': give a whole number."),
        (
            "train clip-tiny x --guidance 3",
            "`reverie train clip-tiny` has no flag --guidance: its flags are --out, --steps",
        ),
        ("train sora-world x", "`reverie train sora-world` needs --clip: the folder of a CLIP"),
    ],
)
def test_a_wrong_flag_or_value_is_one_sentence_with_the_value_and_what_to_do(words, sentence, capsys):
    assert reverie(*words.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("reverie: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_words_reach_the_command_as_they_were_meant(monkeypatch):
    given = []

    def command(
        folder: Path, words: str = "", /, *, size: tuple[int, int] | None = None, sources: tuple[str, ...] = ("a",),
        deep: bool = False, lr: float = 0.5, steps: int | None = None,
    ) -> None:  # fmt: skip
        """Take anything.

        Args:
            folder: A folder.
            words: Words.
            size: Two.
            sources: Any number.
            deep: Or not.
            lr: A number.
            steps: A whole number.
        """
        given.append((folder, words, size, sources, deep, lr, steps))

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert reverie("doctor", "x") == 0
    assert reverie("doctor", "x", "a red rocket", "--size", 3, -4, "--deep", "--lr=-1e-3", "--steps", 7) == 0
    assert reverie("doctor", "--sources", "b", "c", "--no-deep", "--lr", 2, "x", "y") == 0
    assert reverie("doctor", "x", "--sources", "--steps", -2) == 0
    assert reverie("doctor", "x", "--sources", "b", "c") == 0
    assert given == [
        (Path("x"), "", None, ("a",), False, 0.5, None),
        (Path("x"), "a red rocket", (3, -4), ("a",), True, -1e-3, 7),
        (Path("x"), "y", None, ("b", "c"), False, 2.0, None),
        (Path("x"), "", None, (), False, 0.5, -2),
        (Path("x"), "", None, ("b", "c"), False, 0.5, None),
    ]


def test_a_mistake_of_the_user_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert reverie("data", "import", tmp_path / "absent") == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert "absent" in err
    assert err.startswith("reverie: ")
    assert err.count("\n") == 1


def test_settings_that_no_file_can_have_are_one_sentence(tmp_path, capsys):
    world = tmp_path / "world"
    for fps in (0, 5000):
        assert reverie("data", "world", world, "--count", "1", "--frames", "8", "--fps", fps) == 2
    assert not world.exists()
    assert reverie("data", "world", world, "--count", "1") == 0
    assert reverie("data", "shrink", world, tmp_path / "small", "--quality", "1000") == 2
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (InputError("no"), 2),
        (FileExistsError(17, "File exists", "samples"), 2),
        (NotADirectoryError(20, "Not a directory", "file/samples"), 2),
        (MemoryError(), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(85), 85),
        (SystemExit(), 0),
        (SystemExit("x"), 1),
    ],
)
def test_exit_codes(monkeypatch, raised, code):
    def command() -> None:
        """Raise."""
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert reverie("doctor") == code


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def command() -> None:
        """Raise."""
        raise AssertionError("ours")

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    with pytest.raises(AssertionError, match="ours"):
        reverie("doctor")


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "reverie.cli"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr:
        assert not process.stderr.read()
    assert process.wait(60) == 141


# ---------------------------------------------------------------- commands from end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "world"
    assert reverie("data", "world", folder, "--count", 12, "--size", 32, 32) == 0
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP with small random weights, saved: what is measured with it is meaningless, but everything runs."""
    import torch

    import reverie as package
    from reverie.codecs.bpe import Bpe
    from reverie.recipes.clip import shape
    from reverie.systems.clip import Clip

    tokenizer = Bpe.train(["a red circle", "two blue squares", "a green star"], vocab=520)
    torch.manual_seed(0)
    config = shape(tokenizer.vocab, tokenizer.end, size=32, width=64, depth=2)
    return package.save(Clip(config, tokenizer), tmp_path_factory.mktemp("clip") / "clip")


def test_data_commands(world, tmp_path, capsys):
    assert reverie("data", "check", world, "--contents") == 0
    assert "12" in capsys.readouterr().out
    sheet = tmp_path / "sheets" / "sheet.png"
    assert reverie("data", "show", world, "--out", sheet, "--count", 4) == 0
    with Image.open(sheet) as image:
        assert image.width > 4 * 128


def test_import_reports_what_was_lost(tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red square")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "b.txt").write_text("nothing")
    assert reverie("data", "import", tmp_path) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out
    assert "b.png" in out


def test_what_data_embed_keeps_search_reads(world, clip_folder, tmp_path, capsys):
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns(".reverie"))
    assert reverie("data", "embed", folder, "--model", clip_folder) == 0
    assert "12 files" in capsys.readouterr().out
    (part,) = folder.glob(".reverie/embeddings-*/*.safetensors")
    before = part.stat().st_mtime_ns
    assert reverie("search", folder, "a red circle", "--model", clip_folder) == 0
    assert [part] == [*folder.glob(".reverie/embeddings-*/*.safetensors")]
    assert part.stat().st_mtime_ns == before


def test_several_workers_without_ray_are_refused_in_one_sentence(world, capsys, monkeypatch):
    monkeypatch.setattr("reverie.data.preparing.find_spec", lambda name: None)
    for name in ("score", "embed"):
        assert reverie("data", name, world, "--workers", 2) == 2
        assert "pip install 'reverie[ray]'" in capsys.readouterr().err


def test_search_by_words_and_by_picture(world, clip_folder, tmp_path, capsys):
    first = sorted(world.rglob("*.png"))[3]
    sheet = tmp_path / "found.png"
    assert (
        reverie("search", world, "--image", first, "--model", clip_folder, "--top", 3, "--sheet", sheet) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"1.000  {first}"
    assert len(lines) == 4
    assert sheet.exists()
    assert reverie("search", world, "a red circle", "--model", clip_folder, "--top", 5) == 0
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_search_leaves_unreadable_files_out(clip_folder, tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert reverie("search", tmp_path, "red", "--model", clip_folder) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "b.png" in err


@pytest.mark.parametrize(
    "words",
    [
        ["search", "FOLDER"],
        ["search", "FOLDER", "red", "--image", "x.png"],
        ["search", "FOLDER", "red", "--model", "no-such-model"],
        ["search", "EMPTY", "red"],
        ["sample", "a cat", "--model", "CLIP"],
        ["sample", "a cat", "--frames", "0"],
        ["sample", "a cat", " "],
        ["sample", "a cat", "--device", "abacus"],
        ["search", "FOLDER", "red", "--device", "meta"],
        ["eval", "zero-shot", "FOLDER", "--device", "xpu:7"],
        ["demo", "--out", "GALLERY", "--device", "cuda:99"],
        ["sample", "a cat", "--fps", "0"],
        ["sample", "a cat", "--fps", "-3", "--frames", "4"],
        ["sample"],
        ["train", "no-such-recipe", "FOLDER"],
        ["train", "clip-tiny", "EMPTY"],
        ["eval", "zero-shot", "FOLDER", "--sources", "nowhere", "--model", "CLIP"],
        ["eval", "zero-shot", "FOLDER", "--ensemble", "openia"],
        ["eval", "zero-shot", "FOLDER", "--ensemble", "simple", "--templates", "a {}"],
        ["sample", "a cat", "--precision", "fp8"],
        ["sample", "a cat", "--guidance", "2", "--sampler", "ddpm"],
        ["sample", "a cat", "--first-frame", "x.png", "--frames", "4"],
        ["eval", "retrieval", "FOLDER", "--language", "fr"],
        ["eval", "retrieval", "FOLDER", "--out", "CONFIG"],
        ["eval", "probe", "FOLDER"],
        ["eval", "probe", "FOLDER", "--shots", "two"],
        ["eval", "probe", "FOLDER", "--shots", "0"],
        ["data", "check", "EMPTY"],
        ["convert", "absent.pt", "out.safetensors"],
    ],
)
def test_mistakes_are_one_sentence(words, world, clip_folder, tmp_path, capsys):
    places = {"FOLDER": world, "EMPTY": tmp_path, "CLIP": clip_folder, "GALLERY": tmp_path / "gallery",
              "CONFIG": clip_folder / "config.json"}  # fmt: skip
    words = [places.get(word, word) for word in words]
    if words[0] == "search" and "--model" not in words:
        words += ["--model", clip_folder]
    assert reverie(*words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("reverie: ")
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class-named folders, imported: two colours, six pictures each."""
    folder = tmp_path_factory.mktemp("classes")
    for name, colour in (("a_red_circle", (220, 40, 40)), ("two blue squares", (40, 60, 220))):
        (folder / name).mkdir()
        for i in range(6):
            Image.new("RGB", (40 + i, 32), tuple(c + i for c in colour)).save(folder / name / f"{i}.png")
    assert reverie("data", "import", folder, "--val", 0.4) == 0
    return folder


def test_eval_retrieval(world, clip_folder, tmp_path, capsys):
    out = tmp_path / "scores" / "retrieval"
    assert reverie("eval", "retrieval", world, "--model", clip_folder, "--language", "en", "--out", out) == 0
    assert "recall at 10" in capsys.readouterr().out
    numbers = json.loads((out / "numbers.json").read_text())["numbers"]
    assert numbers["images"] == 12
    assert numbers["text_to_image"]["recall@10"] >= numbers["text_to_image"]["recall@1"]
    assert numbers["text_to_image"]["recall@1_chance"] == pytest.approx(1 / 12, abs=0.05)
    assert (out / "table.md").read_text().startswith("# ")
    for sheet in ("pictures-by-text.png", "texts-by-picture.png"):
        assert Image.open(out / sheet).width > 112 * 6


def test_eval_zero_shot_of_class_named_folders(classes, clip_folder, tmp_path, capsys):
    """Neither the sticker corpus nor its flags: the labels are the folders' names."""
    out = tmp_path / "names"
    flags = ["--model", clip_folder, "--out", out, "--ensemble", "simple"]
    assert reverie("eval", "zero-shot", classes, *flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    numbers = json.loads((out / "numbers.json").read_text())["numbers"]["all"]
    assert (numbers["images"], numbers["ways"]) == (12, 2)
    assert numbers["per_class"].keys() == {"a_red_circle", "two blue squares"}
    assert len(numbers["templates"]) == 7
    assert (out / "reliability-all.png").exists()
    assert "| a_red_circle | 6 |" in (out / "classes-all.md").read_text()


def test_eval_probe_of_class_named_folders(classes, clip_folder, tmp_path, capsys):
    out = tmp_path / "probe"
    assert reverie("eval", "probe", classes, "--model", clip_folder, "--out", out, "--shots", 1, 2, 99) == 0
    printed = capsys.readouterr().out
    assert all(
        row in printed for row in ("zero-shot", "1 a name", "2 a name", "linear probe on all", "guessing")
    )
    numbers = json.loads((out / "numbers.json").read_text())["numbers"]
    assert numbers["split"] == "val"
    assert numbers["probe"]["top1"] == 1  # two colours are two lumps of any features
    assert [found["shots"] for found in numbers["few_shot"]] == [1, 2, 99]
    assert numbers["few_shot"][-1]["examples"] == numbers["examples"]
    assert Image.open(out / "probe.png").width > 500


@pytest.mark.parametrize(
    ("words", "function", "asked"),
    [
        (
            ["pictures", "DATA", "--judges", "a", "--source", "noto"],
            "pictures",
            {"judges": ("a",), "source": "noto"},
        ),
        (["clips", "DATA", "--frames", 8, "--batch", 2], "clips", {"frames": 8, "batch": 2}),
        (
            ["world", "MODEL", "--kind", "count", "--language", "zh"],
            "world",
            {"model": "MODEL", "kind": "count"},
        ),
        (["zero-shot", "DATA", "--sources"], "zero_shot", {"sources": ()}),
        (["zero-shot", "DATA", "--ensemble", "simple"], "zero_shot", {"sources": None, "ensemble": "simple"}),
        (
            ["retrieval", "DATA", "--language", "zh"],
            "retrieve",
            {"language": "zh", "without": ("skin_tone",)},
        ),
        (["probe", "DATA", "--shots", 1, 4, "--count", 9], "probe", {"shots": (1, 4), "count": 9}),
    ],
)
def test_eval_asks_what_it_was_asked(words, function, asked, monkeypatch, tmp_path, capsys):
    from reverie.recipes import measure_clip
    from reverie.recipes import measure_generators as generators

    clips = function in ("zero_shot", "retrieve", "probe")
    measure = measure_clip if clips else generators
    real, seen = inspect.signature(getattr(measure, function)), {}

    def stand_in(*given, **named):
        arguments = real.bind(*given, **named).arguments
        ask = {} if clips else dataclasses.asdict(arguments.get("ask", generators.Draws()))
        seen.update(arguments | ask)
        return "a table"

    monkeypatch.setattr(measure, function, stand_in)
    counting = [] if clips else ["--count", 3, "--steps", 7, "--guidance", 2.5, "--seed", 5]
    assert reverie("eval", *words, *counting, "--out", tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["a table", "", str(tmp_path)]
    wanted = asked | ({"count": 3, "steps": 7, "guidance": 2.5, "seed": 5} if counting else {})
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["out"] == tmp_path


def test_convert(tmp_path, capsys):
    import torch

    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "old.pt")
    assert reverie("convert", tmp_path / "old.pt", tmp_path / "new.safetensors") == 0
    out = capsys.readouterr().out
    assert "1 tensors" in out
    assert "epoch" in out
    assert (tmp_path / "new.safetensors").exists()


def test_convert_from_library_to_library(tmp_path, capsys):
    import torch

    import reverie as library
    from reverie.encoders.text import TextConfig
    from reverie.encoders.vit import VitConfig
    from reverie.systems.clip import Clip, ClipConfig

    torch.manual_seed(0)
    config = ClipConfig(
        image=VitConfig(size=16, patch=8, width=16, depth=1, heads=2),
        text=TextConfig(vocab=600, length=9, width=16, depth=1, heads=2, end=599),
        width=8,
    )
    library.save(Clip(config), tmp_path / "ours")
    assert reverie("convert", tmp_path / "ours", tmp_path / "theirs", "--format", "open_clip") == 0
    assert (tmp_path / "theirs" / "open_clip_config.json").exists()
    assert reverie("convert", tmp_path / "theirs", tmp_path / "back", "--format", "transformers") == 0
    assert reverie("convert", tmp_path / "back", tmp_path / "again") == 0
    before, after = (library.load(tmp_path / name).state_dict() for name in ("ours", "again"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    for words, reason in (
        (
            (tmp_path / "ours", tmp_path / "x", "--format", "onnx"),
            "use one of reverie, transformers, open_clip",
        ),
        ((tmp_path / "ours", tmp_path / "x.safetensors"), "name a folder"),
        ((tmp_path / "ours", tmp_path / "theirs"), "exists already"),
        ((tmp_path / "ours", tmp_path / "ours"), "exists already"),
        ((tmp_path / "theirs" / "open_clip_model.safetensors", tmp_path / "x"), "config="),
        (
            (tmp_path / "theirs" / "open_clip_model.safetensors", tmp_path / "x", "--config", "B32"),
            "none of the names",
        ),
        ((tmp_path / "old.pt", tmp_path / "x", "--format", "reverie"), "pickle"),
    ):
        assert reverie("convert", *words) == 2
        assert reason in capsys.readouterr().err


class Painter:
    """Stands for Sora: paints the seed's grey, and remembers how it was asked."""

    config = SimpleNamespace(size=(64, 64), fps=12.0)

    def __init__(self):
        self.asked = []

    def state_dict(self):
        return {}

    def generate_image(self, prompts, *, seed=0, size=(64, 64), progress=None, **flags):
        """Flags as for `generate`."""
        return self.generate_video(prompts, frames=1, seed=seed, size=size, progress=progress, **flags)[
            :, :, 0
        ]

    def generate(self, *, steps, guidance, sampler, negative, interval, rescale, first_frame):
        """What can be asked for."""

    def generate_video(self, prompts, *, frames=16, seed=0, size=(64, 64), progress=None, **flags):
        import torch

        self.asked.append({"prompts": prompts, "frames": frames, "seed": seed, "size": size, **flags})
        progress(1, 1)
        ramp = torch.linspace(-1, 1, len(prompts) * frames).reshape(len(prompts), 1, frames, 1, 1)
        return ramp.expand(-1, 3, -1, *size)


@pytest.fixture
def painter(monkeypatch):
    from reverie.recipes import parts

    made = Painter()
    load = parts.capable
    monkeypatch.setattr(
        parts, "capable", lambda name, what, **more: made if name == "painter" else load(name, what, **more)
    )
    return made


def test_sample_with_a_real_model(clip_folder, tmp_path, capsys):
    """A Sora with small random weights draws noise, but of the size, length and number asked for."""
    import torch

    import reverie as package
    from reverie.recipes.sora import shape
    from reverie.systems.sora import Sora

    clip = package.load(clip_folder)
    sora = Sora(shape(clip, size=32, sizes=(2, 64, 1)), clip.tokenizer)
    with torch.no_grad():
        for number, weight in enumerate(sora.backbone.parameters()):
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    flags = ["--model", package.save(sora, tmp_path / "sora"), "--out", tmp_path, "--steps", 2]
    picture, moving = tmp_path / "000-a-red-circle.png", tmp_path / "001-a-red-circle.webp"
    assert reverie("sample", "a red circle", *flags, "--size", 32, 48) == 0
    assert reverie("sample", "a red circle", *flags, "--frames", 4, "--first-frame", picture) == 0
    capsys.readouterr()
    for flag, wrong, words in (("--guidance", "nan", "guidance"), ("--steps", 0, "steps is 0")):
        assert reverie("sample", "a red circle", *flags, flag, wrong) == 2
        out, err = capsys.readouterr()
        assert not out
        assert words in err
        assert err.count("\n") == 1
    for wrong, words in (
        ({"size": 32}, r"\(32, 32\)"),
        ({"steps": 1.5}, "whole"),
        ({"prompts": None}, "list"),
    ):
        with pytest.raises(InputError, match=words):
            sora.generate_image(**{"prompts": ["a circle"]} | wrong)
    with Image.open(picture) as image, Image.open(moving) as clip:
        assert image.size == (48, 32)
        assert clip.size == (32, 32)
        assert clip.n_frames == 4
        first, given = (
            np.asarray(each.convert("RGB"), dtype=int) for each in (clip, image.crop((8, 0, 40, 32)))
        )
        assert abs(first - given).max() <= 2


def test_sample_writes_a_picture_for_each_prompt(painter, tmp_path, capsys):
    flags = ["--model", "painter", "--out", tmp_path, "--size", 32, 48, "--steps", 5]
    assert reverie("sample", "a red rocket", "一只猫", *flags) == 0
    files = [tmp_path / "000-a-red-rocket.png", tmp_path / "001-一只猫.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in files]
    with Image.open(files[0]) as image:
        assert image.size == (48, 32)
    asked = {
        "prompts": ["a red rocket"],
        "frames": 1,
        "seed": 0,
        "size": (32, 48),
        "steps": 5,
    }
    assert painter.asked[0] == asked
    first = files[0].read_bytes()
    finer = ["--sampler", "unipc", "--negative", "a car", "--interval", 0.2, 0.8, "--rescale", 0.5]
    assert reverie("sample", "a red rocket", *flags, *finer) == 0
    extra = {"sampler": "unipc", "negative": "a car", "interval": (0.2, 0.8), "rescale": 0.5}
    assert painter.asked[-1] == asked | extra
    new = tmp_path / "002-a-red-rocket.png"  # nothing is written over
    assert capsys.readouterr().out.strip() == str(new)
    assert files[0].read_bytes() == first
    assert reverie("info", files[1], new) == 0
    told = capsys.readouterr().out
    assert "001-一只猫.png: png, 48 x 32" in told
    assert all(line in told for line in ("prompt   一只猫\n", "negative  a car\n"))
    assert reverie("info", files[0], "--json") == 0
    (what,) = json.loads(capsys.readouterr().out)
    assert what["made"] | {"reverie": "", "weights": ""} == {
        "prompt": "a red rocket", "seed": 0, "model": "painter", "weights": "", "steps": 5, "task": "sample",
        "asked": {"size": [32, 48]}, "reverie": "",
    }  # fmt: skip
    (tmp_path / "bad.png").write_text("no picture")  # a bad file keeps no other from being told of
    assert reverie("info", tmp_path / "bad.png", new) == 2
    told = capsys.readouterr()
    assert "002-a-red-rocket.png: png, 48 x 32" in told.out
    assert "1 of 2 files could not be read" in told.err
    painter.generate = lambda *, steps, guidance, sampler: None
    assert reverie("sample", "a red rocket", *flags, *finer) == 2
    assert "painter has no negative to choose: leave out --negative." in capsys.readouterr().err


def test_sample_writes_clips_from_a_first_frame(painter, clip_folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    words = [
        "sample",
        "up",
        "--model",
        "painter",
        "--out",
        tmp_path,
        "--frames",
        6,
        "--fps",
        10,
        "--size",
        32,
        32,
    ]
    words += ["--first-frame", tmp_path / "first.png", "--best-of", 3, "--judge", clip_folder]
    assert reverie(*words) == 0
    asked = painter.asked[0]
    assert asked["prompts"] == ["up"] * 3
    assert asked["first_frame"].shape == (3, 3, 32, 32)
    assert asked["first_frame"][0, :, 5, 5].tolist() == [1, -1, -1]
    with Image.open(tmp_path / "000-up.webp") as clip:
        assert clip.n_frames == 6
        clip.seek(1)
        clip.load()
        assert clip.info["duration"] == 100
    best = int(output.read(tmp_path / "000-up.webp").seed)
    assert best in (0, 1, 2)  # of the one that was kept
    for format in ("gif", "mp4", "webm", "png"):
        assert reverie(*words[:8], "--format", format) == 0
        (path,) = tmp_path.glob(f"*-up.{format}")
        assert media.probe(path).frames == 6
        assert output.read(path).prompt == "up"
    assert reverie("sample", "up", "--model", "painter", "--frames", 6, "--format", "jpg") == 2
    assert reverie("sample", "up", "--model", "painter", "--frames", 6, "--format", "avi") == 2


THINGS = '''
from pathlib import Path

SOURCES = ("a", "b")
seen = []

def thing(data: Path, out: Path, *, steps: int = 300, sources: tuple[str, ...] = (), first: str = SOURCES[0],
          engine=None) -> str:
    """Train a thing.

    Args:
        data: A folder of things.
        steps: How many steps
            it takes.
        sources: Of which kinds.
        first: Which comes first.
    """
    seen.append((data, out, steps, sources, first, engine.precision))
    return "a trained thing"
'''


def test_a_recipe_is_a_command_with_its_own_flags(monkeypatch, tmp_path, capsys):
    (tmp_path / "trained_things.py").write_text(THINGS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(catalog.RECIPES, "thing", "trained_things:thing")
    assert reverie("train", "thing", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Train a thing." in text
    assert "--steps INT How many steps it takes. (default: 300)" in text
    assert "--first STR Which comes first. (default: a)" in text
    assert reverie("train", "thing", "pets", "--stepz", 7) == 2
    assert "trained_things" not in sys.modules  # neither help nor a mistake waits for the recipe's imports
    assert reverie("train", "thing", "pets", "--steps", 7, "--sources", "a", "b") == 0
    assert (
        reverie("train", "thing", tmp_path, "--out", "elsewhere", "--first", "b", "--precision", "fp32") == 0
    )
    assert sys.modules.pop("trained_things").seen == [
        (Path("pets"), Path("runs/thing-pets"), 7, ("a", "b"), "a", "auto"),
        (tmp_path, Path("elsewhere"), 300, (), "b", "fp32"),
    ]
    told = json.loads(Path("elsewhere/command.json").read_text())
    assert (told["recipe"], told["data"]) == ("thing", str(tmp_path))
    flags = {field.name: field.default for field in dataclasses.fields(Engine) if field.name != "replay"}
    assert told["arguments"] == flags | {"steps": 300, "sources": [], "first": "b", "precision": "fp32"}


@pytest.mark.parametrize("name", catalog.RECIPES)
def test_every_flag_of_a_recipe_has_a_sentence_and_its_outline_is_its_signature(name, capsys):
    parameters, doc = command.outline(catalog.RECIPES[name])
    real = catalog.recipe(name)
    wanted = [part.replace() for part in inspect.signature(real, eval_str=True).parameters.values()]
    assert parameters == wanted[:-1]
    assert (wanted[-1].name, wanted[-1].default) == ("engine", Engine())  # the flags that all recipes have
    assert doc == inspect.getdoc(real)
    assert reverie("train", name, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    told = command.read_doc(doc)[1]
    assert list(told) == [part.name for part in parameters]
    for part in parameters[2:]:
        assert told[part.name].endswith(".")
        assert f"--{part.name.replace('_', '-')}" in text
        assert told[part.name] in text


def test_doctor_finds_what_is_wrong(monkeypatch, tmp_path, capsys):
    from reverie import doctor

    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"whole")
    right = hashlib.sha256(b"whole").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{right}  clip/model.safetensors\n{right}  clip/config.json\n")
    states = {finding.what: finding.state for finding in doctor.shipped(tmp_path)}
    assert states == {"shipped weights: clip/config.json is missing": "!!"}
    (tmp_path / "clip" / "config.json").write_bytes(b"broken")
    assert [finding.what for finding in doctor.shipped(tmp_path)] == [
        "shipped weights: clip/config.json is damaged"
    ]
    (tmp_path / "clip" / "config.json").write_bytes(b"whole")
    assert [finding.state for finding in doctor.shipped(tmp_path)] == ["ok"]

    needs = [
        doctor.Need(name="numpy", floor="9999.1", extra=None),
        doctor.Need(name="no-such-package", floor="1.0", extra="video"),
        doctor.Need(name="rich", floor="13.7", extra=None),
    ]
    monkeypatch.setattr(doctor, "requirements", lambda: needs)
    old, good, absent = doctor.installed()
    assert (old.state, good.state, absent.state) == ("!!", "ok", "--")
    assert old.remedy.endswith('-m pip install "numpy>=9999.1"')
    assert "extra video" in absent.what
    monkeypatch.setattr(doctor, "SHIPPED", tmp_path)
    assert reverie("doctor") == 1
    assert "numpy" in capsys.readouterr().out


def test_doctor_reads_our_requirements():
    from reverie.doctor import requirements

    needs = {(need.name, need.extra): need.floor for need in requirements()}
    assert needs["pillow", None] == "12.3"
    assert needs["av", "video"]
    assert ("av", None) not in needs
