"""Checkpoints that exist completely or not at all.

A checkpoint is a folder `step-00000100` (the state after 100 updates) of safetensors and JSON files and a
`MANIFEST.json` with the size and SHA-256 of each. It is written under a temporary name, every file and the
folder are flushed to disk, then it is renamed and the parent flushed: whatever kills the process, the folder
is whole or absent. A checkpoint that is deleted is first renamed away, for the same reason. Nothing here is
ever pickled.

A group of tensors, such as "model", is the file `model.safetensors`; those that several processes hold in parts
(FSDP2) are the folder `model`, a file for each process, written and read by torch.distributed.checkpoint (DCP). Any
number of processes reads either, so a run may go on with another number than it began with.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.disk import flush, sha256
from reverie.errors import InputError
from reverie.train import parallel
from reverie.train.parallel import Team

ALONE = Team()

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
    team: Team = ALONE,
) -> Path:
    """Writes `folder/step-XXXXXXXX`: each entry of `tensors`, and `state` as `state.json`.

    Afterwards the newest `keep` checkpoints remain (None: all). A whole checkpoint of this step is left as it
    is. All processes of `team` call it; the first writes all but the others' parts. Raises InputError on each of them
    when the disk refuses one; the checkpoints before are intact then.
    """
    final = folder / f"step-{step:08d}"
    tmp = folder / f".tmp-{final.name}"
    if team.hear(team.first and final.exists() and damage(final) is None)[0]:
        return final
    with _all_or_none(step, folder, tmp, team):
        if team.first:
            if final.exists():
                _delete(final)
            folder.mkdir(parents=True, exist_ok=True)
            if tmp.exists():
                shutil.rmtree(tmp)
            tmp.mkdir()
            _reached("mkdir")
    for name, group in tensors.items():
        with _all_or_none(step, folder, tmp, team):
            parts = {key: value for key, value in group.items() if parallel.in_parts(value)}
            if parts:
                parallel.write_parts(tmp / name, parts, team.group)
            if team.first:
                _write_tensors(
                    tmp / f"{name}.safetensors", {k: value for k, value in group.items() if k not in parts}
                )
                _reached(f"{name}.safetensors")
    with _all_or_none(step, folder, tmp, team):
        if team.first:
            _write_json(tmp / "state.json", state)
            _reached("state.json")
            files = sorted(path for path in tmp.rglob("*") if path.is_file())
            entries = {
                path.relative_to(tmp).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in files
            }
            _write_json(tmp / MANIFEST, {"files": entries})
            _reached("manifest")
            for inner in {path.parent for path in files} | {tmp}:
                flush(inner)
            _reached("before rename")
            os.rename(tmp, final)
            _reached("after rename")
            flush(folder)
    if keep is not None and team.first:
        for old in [path for path in steps(folder) if path.name <= final.name][keep:]:
            _delete(old)
            _reached("old deleted")
    return final


@contextmanager
def _all_or_none(step: int, folder: Path, tmp: Path, team: Team) -> Iterator[None]:
    """One part of a save: what fails in one process fails in all of them, and leaves nothing."""
    failure = ""
    cause: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or "os error 28" in str(error) or "No space left" in str(error)
        failure, cause = "the disk is full" if full else str(error), error
    failures = [reason for reason in team.hear(failure) if reason]
    if not failures:
        return
    if team.first:
        shutil.rmtree(tmp, ignore_errors=True)
    mend = "free some space" if failures[0] == "the disk is full" else "mend that"
    raise InputError(
        f"The checkpoint of step {step} could not be written to {folder} ({failures[0]}); earlier ones are "
        f"intact: {mend} and start the same command again."
    ) from cause


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first, whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path` by its manifest, or None when it is whole."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            inside = not {"", ".", ".."} & set(name.split("/")) and "\\" not in name and ":" not in name
            if not inside:
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


def model_tensors(model: nn.Module, *, detach: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied weights, the first name. Not detached: the model's own."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        assert isinstance(value, Tensor), (
            f"{name} of {type(model).__name__} is no tensor: {type(value).__name__}"
        )
        found.setdefault(id(value), (name, value))
    return {name: value.detach() if detach else value for name, value in found.values()}


@torch.no_grad()
def restore(targets: Mapping[str, Tensor], path: Path, group: str) -> None:
    """Copies the tensors of `group` in the checkpoint `path` into `targets`, in place, whichever way either is parted.

    InputError unless names, shapes and types agree.
    """
    found = _shapes(path, group)
    where = path / group
    if set(found) != set(targets):
        missing, surplus = sorted(set(targets) - set(found)), sorted(set(found) - set(targets))
        raise InputError(
            f"{where} belongs to another model: it lacks {missing[:5]} and has {surplus[:5]} besides; "
            "resume with the model that wrote it, or train in a new folder."
        )
    for name, target in targets.items():
        shape, dtype = found[name]
        if shape != target.shape or dtype != target.dtype:
            raise InputError(
                f"{name} in {where} is {dtype} {tuple(shape)}, the model's is {target.dtype} "
                f"{tuple(target.shape)}; resume with the model that wrote it, or train in a new folder."
            )
    _read(targets, path, group)


def _shapes(path: Path, group: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, whole shapes and types of a group."""
    found = {}
    with safe_open(path / f"{group}.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = torch.Size(part.get_shape())
            found[name] = (shape, (part[:0] if shape else file.get_tensor(name)).dtype)
    if (path / group).is_dir():
        found |= parallel.shapes_of_parts(path / group)
    return found


def _read(targets: Mapping[str, Tensor], path: Path, group: str) -> None:
    """Fills `targets`, each of which the group has."""
    left = dict(targets)
    with safe_open(path / f"{group}.safetensors", framework="pt") as file:
        for name in set(file.keys()) & set(left):
            parallel.fill(left.pop(name), file.get_tensor(name))
    if left:
        parallel.read_parts(path / group, left)


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
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, group: str, scalars: Mapping[str, Any]
) -> None:
    """Replaces the optimizer's state by `group` of the checkpoint `path` and `scalars`; hyperparameters stay."""
    names = _names(model, optimizer)
    by_name = {names[id(p)]: (p, own) for own in optimizer.param_groups for p in own["params"]}
    optimizer.state.clear()
    entries: dict[str, Any] = dict(scalars)
    for entry, (shape, dtype) in _shapes(path, group).items():
        key, name = entry.split("/", 1)
        if name in by_name:
            parameter, own = by_name[name]
            there = key != "step" or own.get("fused") or own.get("capturable")
            entries[entry] = (
                torch.empty_like(parameter, dtype=dtype)  # in parts where the parameter is
                if shape == parameter.shape and key != "step"
                else torch.empty(shape, dtype=dtype, device=parameter.device if there else "cpu")
            )
        else:
            entries[entry] = None
    for entry, value in entries.items():
        key, name = entry.split("/", 1)
        if name not in by_name:
            raise InputError(
                f"{path / group} holds state for {name}, which this optimizer does not train; use a new folder."
            )
        optimizer.state[by_name[name][0]][key] = value
    _read({entry: value for entry, value in entries.items() if isinstance(value, Tensor)}, path, group)


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
