"""Pickled checkpoints -> safetensors: the only place that calls `torch.load`, in a child process that can do no harm.

The file is sniffed first: a torch zip whose entries are stored uncompressed, or a bare pickle. The child then takes
away its own network, processes, imports by pickle, memory, time and the right to write anywhere but one draft file,
loads with `weights_only=True`, and writes plain tensors; the parent trusts the draft no more than any other file.
A TorchScript archive, as OpenAI's CLIP files are, goes the same way, but torch never sees it: `torchscript` reads it.
A pickled module, as DALL-E's autoencoder is, is read by the same small machine, to which its classes are words, and
gives the tensors that it holds by their dotted paths.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie import disk
from reverie.errors import InputError

SECONDS = 600
ENTRIES = 100_000
# Wrappers that trainers put around the weights, tried in this order.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
SPARE = 2**28  # bytes that loading may take beside a multiple of the file's size


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` wrote, and the names of what it left out: everything that is no tensor of the weights."""

    path: Path
    tensors: int
    left_out: tuple[str, ...]


def convert(source: str | Path, target: str | Path, *, seconds: float = SECONDS) -> Converted:
    """Convert a `.pt`, `.pth`, `.ckpt`, `.bin` or `.pkl` file into a new safetensors file.

    Of a folder with an encoder and a decoder, such as DALL-E's, both go into one file, under `encoder.` and `decoder.`.
    Of a TorchScript archive the tensors among the attributes of its modules are taken, by their dotted paths; its
    program is neither read nor run. Raises `InputError` in one sentence when the file is no such checkpoint, holds
    anything that only running code could load, or needs more than four times its size in memory.
    """
    from reverie.weights.files import ModelFileError, header, shorten

    source, target = Path(source).absolute(), Path(target).absolute()
    if target.suffix != ".safetensors":
        raise InputError(
            f"cannot convert into {shorten(target.name)}; give a name that ends in .safetensors."
        )
    if target.exists():
        raise InputError(f"{shorten(str(target))} exists already; delete it or give another name.")
    if not target.parent.is_dir():
        raise InputError(f"{shorten(str(target.parent))} is no folder; make it first.")
    parts = _halves(source) if source.is_dir() else {"": source}
    scripted = {part: _sniff(file) for part, file in parts.items()}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as folder:
        drafts = {part: Path(folder) / f"model{part}.safetensors" for part in parts}
        for part, file in parts.items():
            report = _confined(file, drafts[part], seconds, scripted=scripted[part])
            if "error" in report:
                raise ModelFileError(f"cannot convert {shorten(file.name)}: {report['error']}.")
            left_out += report["left_out"]
        whole = drafts.get("") or _joined(drafts, Path(folder) / "whole.safetensors")
        tensors = header(whole)
        disk.publish(whole, target)
    return Converted(path=target, tensors=len(tensors), left_out=tuple(left_out))


def _halves(folder: Path) -> dict[str, Path]:
    """The one encoder and the one decoder in a folder."""
    from reverie.weights.files import ModelFileError, shorten

    found = {}
    for part in ("encoder", "decoder"):
        files = sorted(folder.glob(f"{part}.p*"))
        if len(files) != 1:
            raise ModelFileError(
                f"{shorten(str(folder))} is a folder with {len(files)} files {part}.p*; give a file, or a folder with"
                " one encoder.pkl and one decoder.pkl."
            )
        found[part] = files[0]
    return found


def _joined(drafts: dict[str, Path], target: Path) -> Path:
    from reverie.weights import files

    tensors: dict[str, Any] = {}
    for part, draft in drafts.items():
        with files.Shards({draft: ""}) as shard:
            tensors |= {f"{part}.{name}": shard.read(name) for name in shard.entries}
    files.write(target, tensors, {"format": "pt"})
    return target


def _sniff(source: Path) -> bool:
    """Whether the file is a TorchScript archive; `ModelFileError` when it is nothing that can be converted."""
    from reverie.weights import torchscript
    from reverie.weights.files import ModelFileError, shorten

    name = shorten(source.name)
    if not source.is_file():
        raise ModelFileError(f"{shorten(str(source))} is no file; give a .pt, .pth, .ckpt or .bin file.")
    with source.open("rb") as file:
        first = file.read(9)
    if first[:1] == b"\x80":
        return False
    if first[8:] == b"{":
        raise ModelFileError(f"{name} is a safetensors file already and needs no converting.")
    if first[:4] != b"PK\x03\x04":
        raise ModelFileError(f"{name} is no checkpoint that torch.save wrote; nothing else is converted.")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RecursionError):
        raise ModelFileError(f"{name} is a damaged zip file; fetch it again.") from None
    names = [entry.filename for entry in entries]
    scripted = torchscript.is_script(names)
    if scripted:  # code/ lies there compressed, and is never read
        entries = [entry for entry in entries if torchscript.is_read(entry.filename)]
    size = source.stat().st_size
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    twice = len(set(names)) != len(names)
    if packed or twice or len(names) > ENTRIES or sum(entry.file_size for entry in entries) > size:
        raise ModelFileError(f"{name} is packed in a way that torch.save never does; it is refused.")
    if sum(each.endswith("data.pkl") for each in names) != 1:
        raise ModelFileError(f"{name} is a zip file without one data.pkl, so torch.save did not write it.")
    return scripted


def _confined(source: Path, draft: Path, seconds: float, *, scripted: bool) -> dict[str, Any]:
    """Run this file as a child and return its one line of JSON."""
    kind = "scripted" if scripted else "saved"
    package = str(Path(__file__).resolve().parents[2])
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if key in os.environ}
    # OMP and MKL: threads cost address space, which is limited.
    environment = {**kept, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-B", "-m", "reverie.weights.convert", str(source), str(draft), kind]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=draft.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {seconds:g} s"}
    try:
        report = json.loads(done.stdout)
        assert isinstance(report, dict)
        return report
    except (ValueError, AssertionError):
        # The child could not even say why: a limit or a signal ended it.
        return {"error": "loading it broke a limit of memory, time or disk"}


# ---------------------------------------------------------------- in the child


def _main(source: str, draft: str, kind: str) -> dict[str, Any]:
    size = os.stat(source).st_size
    _leave_network()  # first, while there is but one thread
    import torch

    from reverie.weights import torchscript  # before the doors close

    _limit(size)  # now, for an interpreter with torch takes gigabytes of address space on some machines
    _close_doors(Path(draft).parent)
    try:
        with open(source, "rb") as file:  # a file, not its name, from which torch would guess another format
            if kind == "scripted":
                loaded: Any = torchscript.load(file, size)
            else:
                try:
                    loaded = torch.load(file, map_location="cpu", weights_only=True)
                except Exception as error:
                    loaded = torchscript.load_module(file, size)
                    if not loaded:
                        return {"error": _reason(error)}
    except torchscript.Refused as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": _reason(error)}
    return _write(loaded, Path(draft), size)


def _write(loaded: Any, draft: Path, size: int) -> dict[str, Any]:
    """Write the tensors of what a file of `size` bytes held, or say why not."""
    import torch

    from reverie.weights import files

    tensors, left_out = _weights(loaded, torch.Tensor)
    if not tensors:
        return {"error": "it holds no tensors by name"}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in files.DTYPES.values():
            return {"error": f"the tensor {files.shorten(name)} is sparse, quantised or complex"}
        if tensor.device.type != "cpu":
            return {"error": f"the tensor {files.shorten(name)} holds no data"}
    # A tensor may be a view that repeats one number; written out it would be as large as its shape claims.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 4 * size:
        return {"error": "its tensors are more than four times as large as the file"}
    try:
        files.write(draft, tensors, {"format": "pt"})
    except InputError as error:
        return {"error": str(error).rstrip(".")}
    return {"left_out": left_out}


def _weights(loaded: Any, tensor_type: type) -> tuple[dict[str, Any], list[str]]:
    """The tensors by name inside a checkpoint's usual wrappers, and what lies beside them."""
    left_out: list[str] = []
    for _ in range(4):
        if not isinstance(loaded, dict):
            break
        inner = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            break
        left_out += [str(key) for key in loaded if key != inner]
        loaded = loaded[inner]
    if not isinstance(loaded, dict):
        return {}, left_out
    found = {
        key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, tensor_type)
    }
    left_out += [str(key)[:80] for key in loaded if key not in found]
    return found, left_out[:1000]


def _reason(error: Exception) -> str:
    """Our own words for what torch said, of which only an identifier is repeated."""
    text = str(error)
    refused = re.search(r"(?:GLOBAL|global|class|function) `?([\w.]{1,80})`?", text)
    if isinstance(error, MemoryError) or "alloc" in text.lower():
        return "it asks for far more memory than its size"
    if isinstance(error, PermissionError):
        return "loading it tried to do something that no weights need"
    if "Weights only load failed" in text or type(error).__name__ == "UnpicklingError":
        return f"it holds code or objects, not weights alone{f' ({refused[1]})' if refused else ''}"
    return "it is damaged or no checkpoint that torch.save wrote"


def _limit(size: int) -> None:
    if os.name != "posix":
        return
    import resource

    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        taken = 64 * 2**30  # no /proc: a system that maps whole shared caches into every process
    limits = (
        (resource.RLIMIT_AS, taken + 8 * size + SPARE),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 4 * size + SPARE),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _leave_network() -> None:
    """Enter an empty network namespace where the system lets us; `_close_doors` holds in any case."""
    if sys.platform != "linux":
        return
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network) != 0:
        libc.unshare(new_user | new_network)


def _close_doors(folder: Path) -> None:
    """An audit hook, which nothing can remove, refuses what loading weights never needs."""
    refused = re.compile(
        r"socket\.|subprocess\.|os\.(system|exec|fork|posix_spawn|spawn|startfile|remove|rename|rmdir|mkdir|link|symlink"
        r"|truncate|chmod|chown|kill|putenv|unsetenv)|pty\.|ctypes\.dlopen|shutil\.|pickle\.find_class|webbrowser\.|urllib\."
    )
    inside = str(folder.resolve()) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            changing = (flags or 0) & writes or (isinstance(mode, str) and set(mode) & set("wax+"))
            if changing and not (
                isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(inside)
            ):
                raise PermissionError(event)
        elif refused.match(event):
            own = all(
                not isinstance(part, str | bytes) or os.path.realpath(os.fsdecode(part)).startswith(inside)
                for part in arguments
            )
            if not (own and event in ("os.remove", "os.rename", "os.chmod")):
                raise PermissionError(event)

    sys.addaudithook(hook)


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
