"""What only an accelerator can show: `pytest -m gpu tests/gpu` on a machine that has one."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import reverie
from reverie.data.importers import import_folder
from reverie.errors import InputError
from reverie.recipes import clip, sora
from reverie.recipes.parts import home
from reverie.train import Player, adamw, estimate, memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def test_the_end_of_the_gpu_s_memory_is_one_sentence_with_a_remedy(monkeypatch):
    """First where it is foreseen, then where torch finds out."""
    model = torch.nn.Linear(1 << 12, 1 << 12, device="cuda")
    player = Player(
        model, optimizer=adamw(model, lr=1e-3), loss=lambda b: {"loss": model(b["x"]).square().mean()}
    )
    batch = {"x": torch.zeros(1, 1, device="cuda").expand(1 << 24, 1 << 12)}
    with pytest.raises(InputError, match=r"would need about .* are free: give --batch \d+"):
        estimate([player], [batch], steps=1, settings={"batch": 1 << 24})
    monkeypatch.setattr(memory, "available", lambda device, swap=False: None)
    with pytest.raises(InputError, match="did not suffice for one batch: take a smaller --batch"):
        estimate([player], [batch], steps=1, settings={"batch": 1 << 24})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures and two clips of one colour each."""
    place = tmp_path_factory.mktemp("data")
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 0, 90)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    for i in range(2):
        frames = [Image.new("RGB", (64, 64), (0, 10 * k, 90 * i)) for k in range(16)]
        frames[0].save(place / f"clip{i}.webp", save_all=True, append_images=frames[1:], duration=80)
        (place / f"clip{i}.txt").write_text(f"clip {i}")
    import_folder(place, val=0, quiet=True)
    return place


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A CLIP after twelve steps."""
    return clip.tiny(folder, tmp_path_factory.mktemp("clip") / "run", steps=12, batch=8).to(home())


@pytest.fixture(scope="module")
def drawing(folder, trained, tmp_path_factory):
    """A Sora after six steps, which reads with it."""
    place = tmp_path_factory.mktemp("sora")
    reverie.save(trained, place / "clip")
    out = place / "run"
    return sora.tiny(folder, out, clip=str(place / "clip"), steps=6, batch=4, clips=1).to(home())


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_clip_says_the_same_on_both_devices(trained):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    words = ["picture 1", "clip 0"]
    there = trained.embed_image(images), trained.embed_text(words)
    assert all(vectors.is_cuda for vectors in there)
    here = trained.to("cpu").embed_image(images), trained.embed_text(words)
    trained.to(home())
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=0)


def test_sora_draws_the_same_on_both_devices(drawing):
    there = drawing.generate_image(["picture 1"], seed=3, steps=4)
    moving = drawing.generate_video(["clip 0"], frames=8, seed=3, steps=4)
    assert there.is_cuda
    assert moving.isfinite().all()
    here = drawing.to("cpu").generate_image(["picture 1"], seed=3, steps=4)
    drawing.to(home())
    torch.testing.assert_close(there.cpu(), here, atol=1e-2, rtol=0)


def test_a_run_that_is_stopped_goes_on_to_the_same_losses(folder, tmp_path):
    """Kernels may add in another order, so the losses are near and not equal, as they are on a CPU."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    clip.tiny(folder, straight, steps=60, batch=8)
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from reverie.recipes import clip\n"
        "from reverie.train.log import Run\n"
        "log = Run.log\n"
        "def stopping(run, step, metrics):\n"
        "    log(run, step, metrics)\n"
        "    if step == 30: os.kill(os.getpid(), signal.SIGTERM)\n"
        "Run.log = stopping\n"
        "clip.tiny(Path(sys.argv[1]), Path(sys.argv[2]), steps=60, batch=8)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, folder, stopped]).returncode == 85
    clip.tiny(folder, stopped, steps=60, batch=8)
    assert losses(stopped) == pytest.approx(losses(straight), rel=0.1, abs=0.02)
