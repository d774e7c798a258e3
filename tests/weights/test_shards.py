"""Weights into a built system tensor by tensor: the same system, in less, and never more memory than it takes."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from reverie.backbones.wan import WanDit, WanDitConfig
from reverie.errors import InputError
from reverie.nn.quantised import Int8Linear
from reverie.weights import files, remap, shards, wan_diffusers

SMALL = WanDitConfig(channels=2, width=24, hidden=40, depth=2, heads=2, context_width=12, clock=8)


def filled(system, weights, **options):
    with files.Shards(weights) as opened:
        shards.fill(system, opened, **options)


def drawn(config):
    torch.manual_seed(0)
    system = WanDit(config).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.uniform_(-0.1, 0.1)
    return system


def written(system, folder, *, parts, prefix="", own=False):
    """The files of a system, in parts as public models come; and the table."""
    table = None if own else wan_diffusers.table(dataclasses.asdict(system.config), ours="")
    tensors = system.state_dict() if own else remap.apply(remap.invert(table), system.state_dict())
    names, weights = list(tensors), {}
    for part in range(parts):
        path = folder / f"part-{part}.safetensors"
        # Tensors that become one lie in different files.
        files.write(path, {name: tensors[name] for name in names[part::parts]})
        weights[path] = prefix
    if prefix:
        table = wan_diffusers.table(dataclasses.asdict(system.config), theirs=prefix, ours="")
    return weights, table


def outputs(system):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 2, 2, 4, 4, generator=g), torch.randn(1, 5, 12, generator=g)
    with torch.no_grad():
        return system(x, torch.tensor([0.3]), context)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_filled_is_loaded(own, parts, tmp_path):
    theirs = drawn(SMALL)
    weights, table = written(theirs, tmp_path, parts=parts, own=own, prefix="" if own else "transformer.")
    ours = WanDit(SMALL).eval()
    filled(ours, weights, table=table)
    wanted = theirs.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(outputs(ours), outputs(theirs))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_layers_narrow_and_the_rest_stays(stored, tmp_path):
    theirs = drawn(SMALL)
    weights, table = written(theirs.to(stored), tmp_path, parts=2)
    ours = WanDit(SMALL).eval()
    filled(ours, weights, table=table, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in ours.state_dict().items()}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {
        f"{name}.weight" for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {dtypes[name] for name in dtypes.keys() - narrow} == {torch.float32}
    wanted = theirs.state_dict()
    assert all(
        torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in ours.state_dict().items()
    )
    exact = outputs(theirs.float())
    assert ((outputs(ours) - exact).norm() / exact.norm()) < 0.01


def test_eight_bits_are_those_of_each_layer(tmp_path):
    theirs = drawn(SMALL)
    weights, table = written(theirs, tmp_path, parts=3)
    ours = WanDit(SMALL).eval()
    filled(ours, weights, table=table, dtype=torch.bfloat16, quantise="int8")
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, Int8Linear)}
    assert len(layers) == SMALL.depth * 7
    for name, layer in layers.items():
        wanted = Int8Linear.of(theirs.get_submodule(name))
        assert torch.equal(layer.weight, wanted.weight)
        assert torch.equal(layer.scale, wanted.scale)
        assert torch.equal(layer.bias, wanted.bias)
    assert ours.embed.weight.dtype == torch.bfloat16
    exact = outputs(theirs)
    assert 0 < ((outputs(ours) - exact).norm() / exact.norm()) < 0.02


def test_what_the_files_must_hold_is_known_a_rule_at_a_time(tmp_path):
    system = drawn(SMALL)
    _, table = written(system, tmp_path, parts=1)
    back = remap.invert(table)
    wanted = files.expectation(remap.apply(back, system.state_dict()))
    assert remap.outlined(back, system.state_dict()) == wanted


def test_computed_tensors_and_what_is_refused(tmp_path):
    theirs = drawn(SMALL)
    weights, _ = written(theirs, tmp_path, parts=1, own=True)
    path = next(iter(weights))
    tensors = files.read(path)
    table = tensors.pop("table")
    files.write(path, tensors | {"mask": torch.full((2, 2), float("-inf"))})
    ours = WanDit(SMALL)
    rules = (*(remap.Rule(name, name) for name in tensors), remap.Rule((), "table", value=lambda: table + 1))
    filled(ours, weights, ignored={"mask"}, table=rules)
    assert torch.equal(ours.table, table + 1)
    with pytest.raises(InputError, match="int4"):
        filled(ours, weights, quantise="int4")
    with pytest.raises(InputError, match="float64"):
        filled(ours, weights, dtype=torch.float64)
    tensors["embed.bias"][0] = float("nan")
    files.write(path, tensors | {"table": table})
    with pytest.raises(files.ModelFileError, match="NaN"):
        filled(ours, weights)


CHILD = """
import json, sys
from pathlib import Path
import torch
from reverie.backbones.wan import WanDit, WanDitConfig
from reverie.weights import files, shards, wan_diffusers

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

config, paths, dtype, quantise = json.loads(sys.argv[1])
config = WanDitConfig(**config)
torch.nn.init.uniform_ = torch.nn.init.kaiming_uniform_ = lambda tensor, *a, **k: tensor  # as a folder is loaded
system = WanDit(config)
before = peak()
weights = dict.fromkeys(map(Path, paths), "")
table = wan_diffusers.table(vars(config), ours="")
with files.Shards(weights) as opened:
    shards.fill(system, opened, table=table, dtype=getattr(torch, dtype), quantise=quantise)
print(json.dumps([before, peak()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_is_the_narrow_model_and_a_tensor(tmp_path):
    config = WanDitConfig(width=768, hidden=3072, depth=6, heads=6, context_width=512)
    system = drawn(config)
    weights, _ = written(system, tmp_path, parts=4)
    sizes = {name: parameter.numel() for name, parameter in system.named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    whole, largest = sum(sizes.values()), max(sizes.values())  # the time projection: 14 MB in float32
    assert 4 * whole > 200e6
    for dtype, quantise, wanted in (
        ("bfloat16", None, 2 * whole),
        ("bfloat16", "int8", blocks + 2 * (whole - blocks)),
    ):
        said = json.dumps([dataclasses.asdict(config), list(map(str, weights)), dtype, quantise])
        child = subprocess.run(
            [sys.executable, "-c", CHILD, said], capture_output=True, text=True, check=True, timeout=120
        )
        before, after = json.loads(child.stdout)
        # Beside it a tensor as it is read, checked for NaN and made narrow, and pages that are not yet given back.
        assert 0.9 * wanted < after - before < wanted + 4 * 4 * largest, (dtype, quantise)
