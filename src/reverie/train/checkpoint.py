"""Checkpoints that exist completely or not at all.

A checkpoint is a folder `step-00000100` (the state after 100 updates) of safetensors and JSON files and a
`MANIFEST.json` with the size and SHA-256 of each. It is written under a temporary name, every file and the
folder are flushed to disk, then it is renamed and the parent flushed: whatever kills the process, the folder
is whole or absent. A checkpoint that is deleted is first renamed away, for the same reason. Nothing here is
ever pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.disk import flush, sha256
from reverie.errors import InputError

MANIFEST = "MANIFEST.json"


def _reached(point: str) -> None:
    """Called at every sub-step of a save, with its name; the tests kill the process here."""


# ---------------------------------------------------------------- folders


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Writes `folder/step-XXXXXXXX` with one safetensors file per entry of `tensors`, and `state.json`.

    Afterwards the newest `keep` checkpoints remain (None: all). A whole checkpoint of this step is left as it
    is. Raises InputError when the disk refuses; the checkpoints before are intact then.
    """
    final = folder / f"step-{step:08d}"
    if final.exists() and damage(final) is None:
        return final
    tmp = folder / f".tmp-{final.name}"
    try:
        if final.exists():
            _delete(final)
        folder.mkdir(parents=True, exist_ok=True)
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir()
        _reached("mkdir")
        for name, group in tensors.items():
            _write_tensors(tmp / f"{name}.safetensors", group)
            _reached(f"{name}.safetensors")
        _write_json(tmp / "state.json", state)
        _reached("state.json")
        files = sorted(tmp.iterdir())
        _write_json(
            tmp / MANIFEST,
            {"files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}},
        )
        _reached("manifest")
        flush(tmp)
        _reached("before rename")
        os.rename(tmp, final)
        _reached("after rename")
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise InputError(
            f"The checkpoint of step {step} could not be written to {folder} ({reason}); earlier ones are "
            f"intact: {'free some space' if full else 'mend that'} and start the same command again."
        ) from error
    if keep is not None:
        for old in [path for path in steps(folder) if path.name <= final.name][keep:]:
            _delete(old)
            _reached("old deleted")
    return final


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first, whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path` by its manifest, or None when it is whole."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if name != Path(name).name:
                return f"{MANIFEST} names {name!r}, which is no file of this folder"
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} has the wrong hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def latest(folder: Path, *, report: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint that passes its manifest, or None; `report` hears of damaged newer ones."""
    for path in steps(folder):
        reason = damage(path)
        if reason is None:
            return path
        report(f"{path} is damaged ({reason}) and is passed over")
    return None


def set_aside(folder: Path, *, after: Path) -> None:
    """Renames the checkpoints newer than `after`, which are damaged, to damaged-step-..., out of the way."""
    for path in steps(folder):
        if path.name > after.name:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(path, aside)


def clean(folder: Path) -> None:
    """Removes what a killed save or deletion left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint at `path`."""
    return json.loads((path / "state.json").read_text())


def _delete(path: Path) -> None:
    away = path.with_name(f".tmp-deleted-{path.name}")
    if away.exists():
        shutil.rmtree(away)
    os.rename(path, away)
    _reached("old renamed")
    shutil.rmtree(away)


# ---------------------------------------------------------------- tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied weights, the first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        assert isinstance(value, Tensor), (
            f"{name} of {type(model).__name__} is no tensor: {type(value).__name__}"
        )
        found.setdefault(id(value), (name, value))
    return {name: value.detach() for name, value in found.values()}


@torch.no_grad()
def restore(targets: Mapping[str, Tensor], path: Path) -> None:
    """Copies the tensors at `path` into `targets`, in place; InputError unless names and shapes agree."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(targets):
            missing, surplus = sorted(set(targets) - names), sorted(names - set(targets))
            raise InputError(
                f"{path} belongs to another model: it lacks {missing[:5]} and has {surplus[:5]} besides; "
                "resume with the model that wrote it, or train in a new folder."
            )
        for name, target in targets.items():
            value = file.get_tensor(name)
            if value.shape != target.shape or value.dtype != target.dtype:
                raise InputError(
                    f"{name} in {path} is {value.dtype} {tuple(value.shape)}, the model's is {target.dtype} "
                    f"{tuple(target.shape)}; resume with the model that wrote it, or train in a new folder."
                )
            target.copy_(value)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named "exp_avg/blocks.0.weight", and the rest, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    names = _names(model, optimizer)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{key}/{names[id(parameter)]}"] = value
    return tensors, scalars


@torch.no_grad()
def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, scalars: Mapping[str, Any]
) -> None:
    """Replaces the optimizer's state by that of `path` and `scalars`; hyperparameters stay as they are."""
    names = _names(model, optimizer)
    by_name = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    with safe_open(path, framework="pt") as file:
        entries = {key: file.get_tensor(key) for key in file.keys()} | dict(scalars)  # noqa: SIM118
    for entry, value in entries.items():
        key, name = entry.split("/", 1)
        if name not in by_name:
            raise InputError(
                f"{path} holds state for {name}, which this optimizer does not train; use a new folder."
            )
        parameter, group = by_name[name]
        if isinstance(value, Tensor) and (key != "step" or group.get("fused") or group.get("capturable")):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of the optimizer's groups, without those that schedule or machine change."""
    drop = {"params", "lr", "fused", "foreach"}
    return json.loads(
        json.dumps([{k: v for k, v in g.items() if k not in drop} for g in optimizer.param_groups])
    )


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) in names, "an optimizer's parameter is not one of its player's model"
    return names


# ---------------------------------------------------------------- files


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    storages: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        ready[name] = value.clone() if storage in storages else value  # the format refuses shared memory
        storages.add(storage)
    save_file(ready, path)
    flush(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    flush(path)
