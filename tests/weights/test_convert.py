"""R11: outside pickles are loaded in one confined child or not at all; no payload ever runs."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

import reverie
from reverie.errors import InputError
from reverie.weights import files
from reverie.weights.convert import _write, convert
from reverie.weights.files import ModelFileError

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
}


class Payload:
    """Runs `touch canary` when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)


def poison(folder: Path, canary: Path) -> dict[str, Path]:
    """Every kind of file that a careless loader would run."""
    folder.mkdir()
    evil = Payload(canary)
    made = {name: folder / name for name in (
        "plain.pt", "legacy.pth", "tar.pt", "zip.safetensors",
        "objects.npy", "objects.pt", "script.pt", "deflated.pt",
    )}  # fmt: skip
    made["plain.pt"].write_bytes(pickle.dumps(evil))
    torch.save({"state_dict": {"a": [{"b": (torch.ones(1), {"c": evil})}]}}, made["zip.safetensors"])
    torch.save({"a": torch.ones(2), "b": evil}, made["legacy.pth"], _use_new_zipfile_serialization=False)
    numpy.save(made["objects.npy"], numpy.array([evil], dtype=object), allow_pickle=True)
    made["objects.pt"].write_bytes(made["objects.npy"].read_bytes())
    with tarfile.open(made["tar.pt"], "w") as archive:  # torch's oldest format, a tar with a tar inside
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as second:
            add(second, "pickle", pickle.dumps(evil))
        for name in ("sys_info", "pickle", "storages", "tensors"):
            add(archive, name, pickle.dumps(evil))
        add(archive, "nested.tar", inner.getvalue())
    with zipfile.ZipFile(made["script.pt"], "w") as archive:  # a TorchScript archive
        archive.writestr("script/data.pkl", pickle.dumps(evil, protocol=2))
        archive.writestr("script/code/__torch__.py", f"import os; os.system('touch {canary}')")
        archive.writestr("script/constants.pkl", pickle.dumps(evil, protocol=2))
    with zipfile.ZipFile(made["deflated.pt"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
        archive.writestr("archive/data/0", bytes(10**8))
    return made


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.mark.hostile
def test_no_payload_runs(tmp_path):
    canary = tmp_path / "canary"
    made = poison(tmp_path / "poison", canary)
    pickle.loads(made["plain.pt"].read_bytes())  # noqa: S301  # the payload is live
    assert canary.exists()
    canary.unlink()

    def refuse(path: Path) -> str:
        with pytest.raises(ModelFileError) as caught:
            convert(path, tmp_path / f"{path.name}.safetensors")
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(made, pool.map(refuse, made.values()), strict=True))
    for name in ("plain.pt", "legacy.pth", "zip.safetensors", "script.pt"):
        assert "holds code or objects, not weights alone" in said[name], said[name]
    assert "(posix.system)" in said["script.pt"]
    assert "packed in a way" in said["deflated.pt"]
    for name in ("tar.pt", "objects.npy", "objects.pt"):
        assert "no checkpoint that torch.save wrote" in said[name]
    for path in made.values():
        with pytest.raises(ModelFileError):
            files.read(path)
        with pytest.raises(ModelFileError):
            reverie.load(path)
        for poisoned in ("model.safetensors", "tokenizer.json", "config.json"):
            folder = tmp_path / "folder" / f"{path.name}-{poisoned}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"reverie": "0", "system": "clip", "config": {}}))
            files.write(folder / "model.safetensors", {"a": torch.ones(1)})
            (folder / poisoned).write_bytes(path.read_bytes())
            with pytest.raises(InputError) as caught:
                reverie.load(folder)
            assert poisoned in str(caught.value)
    assert not canary.exists()
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob(".convert-*"))


def test_checkpoints_are_converted_bit_for_bit(tmp_path):
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save(
        {"epoch": 3, "state_dict": {**WEIGHTS, "note": "hi"}, "optimizer": {"state": {}}},
        tmp_path / "wrapped.ckpt",
        _use_new_zipfile_serialization=False,
    )
    plain, wrapped = (
        convert(tmp_path / name, tmp_path / f"{name}.safetensors") for name in ("plain.pt", "wrapped.ckpt")
    )
    assert plain.left_out == ()
    assert wrapped.left_out == ("epoch", "optimizer", "note")
    for converted in (plain, wrapped):
        assert converted.tensors == len(WEIGHTS)
        read = files.read(converted.path, only_finite=False)
        assert read.keys() == WEIGHTS.keys()
        for name, value in WEIGHTS.items():
            assert torch.equal(
                read[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)
            )
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors") == [
        "plain.pt",
        "wrapped.ckpt",
    ]


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.ones(1).expand(10**9)}, "more than four times"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "no data"),
        ({"lr": 0.1}, "no tensors by name"),
        ([torch.ones(2)], "no tensors by name"),
        (torch.ones(2), "no tensors by name"),
        ({0: torch.ones(2)}, "no tensors by name"),
        ({"../../x": torch.ones(1)}, "names a tensor"),
    ],
)
def test_what_safetensors_cannot_say_is_refused(content, reason, tmp_path):
    assert reason in _write(content, tmp_path / "x.safetensors", 1000)["error"]
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_the_users_to_mend(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pt")
    files.write(tmp_path / "done.safetensors", {"a": torch.ones(1)})
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
    for source, target, reason in (
        ("x.pt", "x.pt2", "ends in .safetensors"),
        ("x.pt", "done.safetensors", "exists already"),
        ("x.pt", "no/x.safetensors", "is no folder"),
        ("no.pt", "x.safetensors", "is no file"),
        ("done.safetensors", "x.safetensors", "already and needs no"),
        ("text.pt", "x.safetensors", "nothing else is converted"),
        ("cut.pt", "x.safetensors", "damaged"),
    ):
        with pytest.raises(InputError, match=reason):
            convert(tmp_path / source, tmp_path / target)


def test_a_child_that_hangs_is_ended(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pt")
    with pytest.raises(ModelFileError, match=r"more than 0\.05 s"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors", seconds=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


DOORS = """
import os, socket, subprocess, sys, ctypes, urllib.request, pickle
from pathlib import Path
from reverie.weights import convert
folder, outside = Path(sys.argv[1]), Path(sys.argv[2])
lonely = convert._leave_network()
convert._close_doors(folder)
(folder / "draft").write_text("x")
os.replace(folder / "draft", folder / "final")
assert (folder / "final").read_text() == "x" and outside.joinpath("there").read_text() == "kept"
def attempts():
    yield lambda: socket.socket().connect(("127.0.0.1", 9))
    yield lambda: socket.getaddrinfo("localhost", 80)
    yield lambda: urllib.request.urlopen("http://127.0.0.1:9/")
    yield lambda: subprocess.run(["true"])
    yield lambda: os.system("true")
    yield lambda: os.execv("/bin/true", ["true"])
    yield lambda: os.posix_spawn("/bin/true", ["true"], {})
    yield lambda: os.fork()
    yield lambda: ctypes.CDLL("libc.so.6")
    yield lambda: (outside / "canary").write_text("x")
    yield lambda: open(outside / "there", "ab")
    yield lambda: os.open(outside / "canary", os.O_CREAT | os.O_WRONLY)
    yield lambda: os.remove(outside / "there")
    yield lambda: os.rename(folder / "final", outside / "canary")
    yield lambda: os.rename(outside / "there", folder / "there")
    yield lambda: (outside / "canary").mkdir()
    yield lambda: os.symlink(outside, folder / "link")
    yield lambda: os.truncate(outside / "there", 0)
    yield lambda: pickle.loads(b"cos\\ngetcwd\\n(tR.")
for number, attempt in enumerate(attempts()):
    try:
        attempt()
    except PermissionError:
        continue
    except Exception as error:
        raise SystemExit(f"attempt {number} failed for another reason: {error!r}")
    raise SystemExit(f"attempt {number} succeeded")
print("shut")
"""


@pytest.mark.hostile
def test_the_doors_of_the_child_are_shut(tmp_path):
    """What a flaw of torch.load would let a payload try, tried: every way is refused."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-c", DOORS, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "shut\n", done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["there"]
    assert (tmp_path / "out" / "there").read_text() == "kept"


@pytest.mark.hostile
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_the_memory_of_the_child_is_limited():
    code = """
from reverie.weights import convert
convert._limit(10**6)
try:
    bytearray(2**30)
except MemoryError:
    print("limited")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "limited\n", done.stderr
