import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from reverie.errors import InputError
from reverie.train import adamw, checkpoint

WEIGHTS = {"model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}}


def save(folder, step, keep=None, tensors=WEIGHTS):
    return checkpoint.save(folder, step, tensors=tensors, state={"step": step}, keep=keep)


def test_a_round_trip_in_open_formats(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["MANIFEST.json", "model.safetensors", "state.json"]
    assert checkpoint.damage(path) is None
    assert checkpoint.read_state(path) == {"step": 12}
    read = load_file(path / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS["model"].items())


def test_equal_states_make_equal_files(tmp_path):
    first, second = save(tmp_path / "one", 3), save(tmp_path / "two", 3)
    assert (first / "MANIFEST.json").read_bytes() == (second / "MANIFEST.json").read_bytes()


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000100", "step-00000010"]
    assert checkpoint.latest(tmp_path).name == "step-00000100"


def tear(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.safetensors", tear, "wrong size"),
        ("model.safetensors", flip, "wrong hash"),
        ("state.json", flip, "wrong hash"),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors is missing"),
        ("MANIFEST.json", lambda path: path.unlink(), "MANIFEST.json is missing"),
        ("MANIFEST.json", tear, "cannot be read"),
        ("MANIFEST.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("MANIFEST.json", lambda path: path.write_text('{"files": {"../x": {}}}'), "no file of this folder"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path, name, harm, reason):
    good = save(tmp_path, 1)
    bad = save(tmp_path, 2)
    file = bad / name
    if name == "MANIFEST.json" and harm is tear:
        file.write_text(file.read_text()[:-4])
    else:
        harm(file)
    assert reason in checkpoint.damage(bad)
    told = []
    assert checkpoint.latest(tmp_path, report=told.append) == good
    assert len(told) == 1
    assert "step-00000002" in told[0]
    checkpoint.set_aside(tmp_path, after=good)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["damaged-step-00000002", "step-00000001"]
    save(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path):
    flip(save(tmp_path, 5) / "model.safetensors")
    assert checkpoint.damage(save(tmp_path, 5)) is None


def test_a_damaged_newer_one_does_not_push_out_the_good_one(tmp_path):
    flip(save(tmp_path, 9) / "model.safetensors")
    save(tmp_path, 5, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000005"


def test_leftovers_are_cleaned(tmp_path):
    good = save(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".tmp-step-00000002")
    shutil.copytree(good, tmp_path / ".tmp-deleted-step-00000000")
    checkpoint.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.chaos
@pytest.mark.parametrize("target", ["save_file", "_write_json", "flush"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_old_ones_intact(tmp_path, monkeypatch, target, error):
    old = save(tmp_path, 1, keep=1)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, target, full)
    with pytest.raises(
        InputError, match=r"step 2 could not be written.*disk is full.*intact: free some space"
    ):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [old]
    assert checkpoint.damage(old) is None
    assert checkpoint.damage(save(tmp_path, 2, keep=1)) is None


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes by POSIX means")
def test_a_write_that_the_system_refuses(tmp_path):
    import resource

    old = save(tmp_path, 1)
    big = {"model": {"a": torch.zeros(1_000_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"step 2 could not be written.*File too large"):
            save(tmp_path, 2, tensors=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [old]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.out = nn.Linear(3, 4, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        whole = torch.randn(6, 3)
        self.top, self.bottom = nn.Parameter(whole[:3]), nn.Parameter(whole[3:])  # two views of one storage

    def forward(self, x):
        return self.out(self.body(x)).sum() + self.top.sum() + self.bottom.sum()


def trained(steps, seed):
    torch.manual_seed(seed)
    model = Tied()
    optimizer = adamw(model, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(torch.randn(2, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_model_and_optimizer_come_back_exactly(tmp_path):
    model, optimizer = trained(3, seed=0)
    tensors, scalars = checkpoint.optimizer_state(model, optimizer)
    parts = {"model": checkpoint.model_tensors(model), "optimizer": tensors}
    assert "out.weight" not in parts["model"]
    assert "table" not in parts["model"]
    assert "exp_avg_sq/body.bias" in tensors
    path = save(tmp_path, 3, tensors=parts)

    other, other_optimizer = trained(0, seed=1)
    checkpoint.restore(checkpoint.model_tensors(other), path, "model")
    checkpoint.restore_optimizer(other, other_optimizer, path, "optimizer", scalars)
    assert other.out.weight is other.words.weight
    for _ in range(2):
        for m, o in ((model, optimizer), (other, other_optimizer)):
            m(torch.ones(2, 3)).backward()
            o.step()
            o.zero_grad()
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.NAdam])
def test_other_optimizers_come_back_exactly(tmp_path, kind):
    arguments = {"lr": 1e-2, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 1e-2}

    def make(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        return model, kind(model.parameters(), **arguments)

    def go(model, optimizer):
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make(0)
    go(model, optimizer)
    tensors, scalars = checkpoint.optimizer_state(model, optimizer)
    path = save(tmp_path, 1, tensors={"model": checkpoint.model_tensors(model), "optimizer": tensors})
    scalars = json.loads(json.dumps(scalars))
    other, other_optimizer = make(1)
    checkpoint.restore(checkpoint.model_tensors(other), path, "model")
    checkpoint.restore_optimizer(other, other_optimizer, path, "optimizer", scalars)
    go(model, optimizer)
    go(other, other_optimizer)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (nn.Linear(3, 2, bias=False), "it lacks .* and has .*bias"),
        (nn.Linear(2, 2), r"weight .* is torch.float32 \(2, 3\), the model's is torch.float32 \(2, 2\)"),
        (nn.Linear(3, 2).double(), "the model's is torch.float64"),
    ],
)
def test_another_model_is_refused(tmp_path, other, reason):
    path = save(tmp_path, 1, tensors={"model": checkpoint.model_tensors(nn.Linear(3, 2))})
    with pytest.raises(InputError, match=reason):
        checkpoint.restore(checkpoint.model_tensors(other), path, "model")
