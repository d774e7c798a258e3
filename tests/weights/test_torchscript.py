"""TorchScript archives: the numbers of `torch.jit.load`, and nothing of a hostile one is ever run."""

import io
import os
import pickle
import pickletools
import random
import re
import struct
import sys
import zipfile

import pytest
import torch
from torch import nn

from reverie.weights import files, torchscript
from reverie.weights.convert import convert
from reverie.weights.files import ModelFileError

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
          "int8", "uint64", "uint32", "uint16", "uint8", "bool")  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.halves = nn.Parameter(torch.randn(3, 2).half())
        self.heads = 3
        self.big = 2**40
        self.sizes = [1, 2, 3]
        self.floats = [1.0, 2.0]
        self.tensors = [torch.ones(2), torch.zeros(2)]
        self.pair = (1, "a")
        self.table = {"a": torch.ones(1)}
        self.flags = [True]
        self.place = torch.device("cpu")

    def forward(self, x):
        y = self.norm(self.conv(x.to(self.place))) + self.heads + self.big + self.sizes[0] + self.floats[0]
        return y + self.tensors[0].sum() + self.pair[0] + self.table["a"] + len(self.flags)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.again = self.block
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
        self.tied = self.layers[0].weight
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.input_resolution = 224
        base = torch.arange(12.0).reshape(3, 4)
        self.register_buffer("base", base)
        self.register_buffer("view", base.t()[1:, :2])
        self.register_buffer("repeated", torch.ones(1).expand(5))
        self.register_buffer("empty", torch.ones(0, 3))
        self.register_buffer("nhwc", torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last))
        self.register_buffer("fleeting", torch.ones(1), persistent=False)
        self.plain = torch.ones(3)
        for name in DTYPES:
            self.register_buffer(f"of_{name}", torch.tensor([0.0, 1.0, 1.0]).to(getattr(torch, name)))

    def forward(self, x):
        x = self.again(x) + self.input_resolution + self.base.sum() + self.view.sum() + self.plain.sum()
        return x + self.layers(torch.ones(2)).sum() + self.tied.sum()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("script") / "model.pt"
    torch.jit.script(Model().eval()).save(path)
    return path


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )  # fmt: skip


def test_a_script_gives_what_torch_loads(script, tmp_path):
    done = convert(script, tmp_path / "model.safetensors")
    found, expected = files.read(done.path), torch.jit.load(script).state_dict()
    # Only code/ says that `plain` is no buffer.
    assert found.keys() - expected.keys() == {"plain"}
    assert expected.keys() <= found.keys()
    assert all(same(found[name], value) for name, value in expected.items())
    assert {f"of_{name}" for name in DTYPES} <= found.keys()
    assert {"input_resolution", "block.heads", "block.tensors", "block.table", "block.place", "code/"} <= set(
        done.left_out
    )
    assert not {"training", "block.training"} & set(done.left_out)
    assert done.tensors == len(found)


def test_a_trace_gives_what_torch_loads(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).half().eval()
    torch.jit.trace(model, torch.ones(4, 2).half()).save(tmp_path / "trace.pt")
    with (tmp_path / "trace.pt").open("rb") as file:
        found = torchscript.load(file, os.stat(tmp_path / "trace.pt").st_size)
    tensors = {name: value for name, value in found.items() if value is not None}
    assert tensors.keys() == model.state_dict().keys()
    assert all(same(tensors[name], value) for name, value in model.state_dict().items())


def test_views_share_the_bytes_of_their_storage(script):
    with script.open("rb") as file:
        found = torchscript.load(file, script.stat().st_size)
    assert found["base"].untyped_storage().data_ptr() == found["view"].untyped_storage().data_ptr()
    assert found["block.halves"].data_ptr() == found["again.halves"].data_ptr()


def test_the_program_is_not_read(script, tmp_path):
    """With other bytes in its place, and in constants.pkl, the weights are the same."""
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(script) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            read = torchscript.is_read(entry.filename)
            new.writestr(entry.filename, old.read(entry) if read else b"\xffno program")
    found = [torchscript.load(path.open("rb"), path.stat().st_size) for path in (script, other)]
    assert found[0].keys() == found[1].keys()
    assert all(value is None or same(value, found[1][name]) for name, value in found[0].items())


def test_a_foreign_byte_order_is_turned(script, tmp_path):
    other = tmp_path / "other.pt"
    widths = {}
    with zipfile.ZipFile(script) as old, zipfile.ZipFile(other, "w") as new:
        operations = list(pickletools.genops(old.read("model/data.pkl")))
        memo, kind, last = {}, None, None
        for operation, argument, _ in operations:  # what width each storage has
            if operation.name == "GLOBAL":
                last = argument
            elif operation.name == "BINPUT":
                memo[argument] = last
            elif operation.name == "BINGET":
                last = memo[argument]
            elif operation.name == "BINUNICODE":
                last = argument
            if isinstance(last, str) and last.startswith("torch ") and last.endswith("Storage"):
                kind = torchscript.STORAGES[last[6:-7]].itemsize
            elif kind and isinstance(last, str) and last.isdigit():
                widths[last], kind = kind, None
        for entry in old.infolist():
            content, name = old.read(entry), entry.filename.removeprefix("model/")
            if name.startswith("data/"):
                width = widths[name[5:]]
                content = b"".join(content[i : i + width][::-1] for i in range(0, len(content), width))
            new.writestr(entry.filename, b"big" if name == "byteorder" else content)
    assert sys.byteorder == "little"
    found = [torchscript.load(path.open("rb"), path.stat().st_size) for path in (script, other)]
    assert all(value is None or same(value, found[1][name]) for name, value in found[0].items())


# ---------------------------------------------------------------- strangers


def word(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", count=4, kind="FloatStorage", first="storage"):
    return b"(" + text(first) + word("torch", kind) + text(key) + text("cuda:0") + number(count) + b"tQ"


def tensor(shape=(4,), strides=(1,), offset=0, held=None, rest=b"\x89ccollections\nOrderedDict\n)R"):
    parts = (storage() if held is None else held) + number(offset) + numbers(shape) + numbers(strides) + rest
    return word("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tR"


def module(**attributes):
    state = b"".join(text(name) + value for name, value in attributes.items())
    return word("__torch__", "M") + b")\x81}(" + state + b"ub"


def archive(tree, data=b"\0" * 16, more=None, pickled=None, packed=zipfile.ZIP_STORED):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + tree + b"." if pickled is None else pickled)
        file.writestr("x/data/0", data, packed)
        file.writestr("x/code/__torch__.py", b"raise SystemExit")
        for name, content in (more or {}).items():
            file.writestr(name, content)
    return made


def test_the_assembled_archive_is_good_but_for_what_a_test_changes():
    made = archive(
        module(a=tensor(), b=module(c=tensor((2, 2), (2, 1))), n=number(3)), struct.pack("<4f", 1, 2, 3, 4)
    )
    found = torchscript.load(made, len(made.getvalue()))
    assert found["a"].tolist() == [1, 2, 3, 4]
    assert found["b.c"].tolist() == [[1, 2], [3, 4]]
    assert found["n"] is None


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def bomb(count):
    inner = module(a=tensor())
    for level in range(count):
        inner = word("__torch__", "M") + b")\x81}(" + text("l") + inner + b"q" + bytes([level])
        inner += text("r") + b"h" + bytes([level]) + b"ub"
    return inner


def own_parent():
    return word("__torch__", "M") + b")\x81q\0}(" + text("a") + b"h\0" + text("t") + tensor() + b"ub"


WORDS = [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("__builtin__", "exec"),
         ("torch", "load"), ("torch.jit", "load"), ("torch.jit._pickle", "build_tensor_from_id"), ("torch", "Tensor"),
         ("torch.jit._pickle", "torch"), ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_parameter"),
         ("torch._utils", "_import_dotted_name"), ("collections", "OrderedDict.__init__"), ("torch", "os.Storage"),
         ("__torch__x", "M"), ("torch.storage", "FloatStorage"), ("numpy", "ndarray"),
         ("copyreg", "_reconstructor")]  # fmt: skip
INTS, A_CLASS = word("torch.jit._pickle", "build_intlist"), word("__torch__", "M")
HELD = "hold each other without end"
CODE = "holds code or objects, not weights alone"
BAD = {
    **{f"the word {' '.join(names)}": (module(a=word(*names)), "holds code or objects") for names in WORDS},
    "a payload": (module(a=pickle.dumps(Evil(), 2)[2:-1]), rf"{CODE} \(posix.system\)"),
    "a call of a list": (module(a=INTS + b"(" + word("os", "system") + b"tR"), "os.system"),
    "a list of a word": (module(a=INTS + b"(" + A_CLASS + b"tR"), "damaged"),
    "a module that is called": (module(a=word("torch", "FloatStorage") + b"(tR"), "damaged"),
    "a module built of arguments": (word("__torch__", "M") + b"(K\1t\x81", "damaged"),
    "a word that is built": (word("torch", "device") + b"}b", "damaged"),
    "a module built twice": (module(a=tensor()) + b"}b", "damaged"),
    "an opcode of older pickles": (b"(" + text("a") + b"ios\nsystem\n", "damaged"),
    "an extension": (b"\x82\1", "damaged"),
    "a word from the stack": (text("os") + text("system") + b"\x93", "damaged"),
    "nothing on the stack": (b"a", "damaged"),
    "no mark": (b"t", "damaged"),
    "an odd dictionary": (b"}(" + text("a") + b"u", "damaged"),
    "a tuple as a key": (b"})K\1s", "damaged"),
    "a memo of nothing": (b"h\5", "damaged"),
    "a text longer than the file": (b"X\xff\xff\xff\xff", "damaged"),
    "an endless word": (b"c" + b"a" * 10**5, "damaged"),
    "a number of many digits": (b"\x8a\xff" + b"\1" * 255, "damaged"),
    "two trees": (module() + module(), "damaged"),
    "no module": (tensor(), "holds no module"),
    "another folder's data": (module(a=tensor(held=storage("../x"))), "no data for the storage '../x'"),
    "another path": (module(a=tensor(held=storage("/etc/passwd"))), "no data for the storage"),
    "data that are not there": (module(a=tensor(held=storage("1"))), "no data for the storage '1'"),
    "too many elements": (module(a=tensor(held=storage(count=5))), "another size than its data"),
    "too few elements": (module(a=tensor(held=storage(count=3))), "another size than its data"),
    "as many as the world has": (module(a=tensor(held=storage(count=2**62))), "another size than its data"),
    "another width": (module(a=tensor(held=storage(kind="HalfStorage"))), "another size than its data"),
    "fewer than none": (module(a=tensor(held=storage(count=-4))), "another size than its data"),
    "complex numbers": (module(a=tensor(held=storage(kind="ComplexFloatStorage", count=2))), "quantised or complex"),
    "no storage": (module(a=tensor(held=b"K\1")), "damaged"),
    "something else stored": (module(a=tensor(held=storage(first="module"))), "damaged"),
    "hooks": (module(a=tensor(rest=b"\x89}(K\1K\2u")), "damaged"),
    "a shape outside": (module(a=tensor((5,))), "reaches outside the storage 0"),
    "a stride outside": (module(a=tensor((2, 2), (3, 1))), "reaches outside the storage 0"),
    "an offset outside": (module(a=tensor((2,), offset=3)), "reaches outside the storage 0"),
    "an offset of nothing outside": (module(a=tensor((0,), offset=5)), "reaches outside the storage 0"),
    "an offset before": (module(a=tensor(offset=-1)), "no tensor can have"),
    "a stride backwards": (module(a=tensor((2,), (-1,))), "no tensor can have"),
    "fewer sides than none": (module(a=tensor((-4,))), "no tensor can have"),
    "a side of 2**62": (module(a=tensor((2**62,), (0,))), "no tensor can have"),
    "nine dimensions": (module(a=tensor((1,) * 9, (1,) * 9)), "no tensor can have"),
    "more strides": (module(a=tensor((4,), (1, 1))), "damaged"),
    "one number as many": (module(a=tensor((10**9,), (0,))), "four times as large"),
    "2**128 numbers": (module(a=tensor((2**32,) * 4, (0,) * 4)), "four times as large"),
    "a path that is there twice": (module(**{"a.b": tensor(), "a": module(b=tensor())}), "names 'a.b' twice"),
    "an attribute without a name": (word("__torch__", "M") + b")\x81}(K\1" + tensor() + b"ub", "without a name"),
    "a module inside itself": (own_parent(), HELD),
    "a memo bomb": (bomb(60), HELD),
    "many steps": (b"N" * 2_000_001, "says more than any"),
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize("case", BAD)
def test_a_hostile_tree_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, reason = BAD[case]
    made = archive(tree)
    with pytest.raises(torchscript.Refused, match=reason):
        torchscript.load(made, len(made.getvalue()))
    assert not list(tmp_path.iterdir())


@pytest.mark.hostile
def test_deep_nesting_is_read_or_refused_and_let_go_without_a_crash():
    nested = module(a=tensor(), deep=b"]" * 200_000 + b"a" * 199_999)
    made = archive(nested)
    assert torchscript.load(made, len(made.getvalue()))["deep"] is None
    tower = tensor()
    objects = (word("__torch__", "M") + b")\x81") * 30_000 + b"b" * 29_999
    made = archive(module(a=tower, deep=objects))
    assert torchscript.load(made, len(made.getvalue()))["deep"] is None
    modules = (word("__torch__", "M") + b")\x81}" + text("a")) * 1000 + tower + b"sb" * 1000
    made = archive(modules)
    with pytest.raises(torchscript.Refused, match=HELD):
        torchscript.load(made, len(made.getvalue()))


@pytest.mark.hostile
def test_a_changed_tree_is_refused_in_our_words_or_read(script):
    with zipfile.ZipFile(script) as file:
        parts = {e.filename: file.read(e) for e in file.infolist() if torchscript.is_read(e.filename)}
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        tree = bytearray(parts["model/data.pkl"])
        place = draw.randrange(len(tree))
        tree[place : place + draw.randrange(3)] = draw.choices(
            b"()t]}aeubR\x81QqhNKXc.\0\xff", k=draw.randrange(3)
        )
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as file:
            for name, content in (parts | {"model/data.pkl": tree}).items():
                file.writestr(name, bytes(content))
        try:
            torchscript.load(made, len(made.getvalue()))
        except torchscript.Refused:
            refused += 1
    assert refused > 200


@pytest.mark.hostile
def test_words_of_the_file_stay_words():
    """Nothing is imported for the classes that a file names."""
    before = set(sys.modules)
    tree = (
        word("__torch__.antigravity", "M")
        + b")\x81}("
        + text("a")
        + tensor()
        + text("b")
        + word("__torch__.os", "system")
    )
    made = archive(tree + b"ub")
    found = torchscript.load(made, len(made.getvalue()))
    assert found.keys() == {"a", "b", "code/"}
    assert set(sys.modules) == before


@pytest.mark.hostile
def test_hostile_zip_files_are_refused(tmp_path):
    good = module(a=tensor())
    large = module(a=tensor(held=storage(count=250_000)))
    large = archive(large, bytes(10**6), packed=zipfile.ZIP_DEFLATED).getvalue()
    encrypted = bytearray(archive(good).getvalue())
    position = encrypted.index(b"PK\x01\x02", encrypted.index(b"PK\x01\x02") + 1)
    encrypted[position + 8] |= 1
    spoiled = bytearray(archive(good).getvalue())
    spoiled[spoiled.index(b"x/data/0") + 10] ^= 1
    liar = bytearray(archive(module(a=tensor((9,), (1,), held=storage(count=2**30 - 4)))).getvalue())
    position = liar.index(b"PK\x01\x02", liar.index(b"PK\x01\x02") + 1)
    liar[position + 20 : position + 28] = struct.pack("<II", 2**32 - 16, 2**32 - 16)
    cases = {
        "compressed": (large, "never does"),
        "encrypted": (bytes(encrypted), "never does"),
        "spoiled": (bytes(spoiled), "damaged"),
        "lying about its size": (bytes(liar), "never does"),
        "of a strange order": (archive(good, more={"x/byteorder": b"middle"}).getvalue(), "byte order"),
        "of a long order": (archive(good, more={"x/byteorder": b"little" * 100}).getvalue(), "byte order"),
        "without a tree": (archive(good, pickled=b"").getvalue(), "damaged"),
        "of two trees": (archive(good, more={"y/data.pkl": b""}).getvalue(), "without one data.pkl"),
        "of a large tree": (archive(good, pickled=bytes(2**24 + 1)).getvalue(), "larger than any"),
    }
    for name, (content, reason) in cases.items():
        made = io.BytesIO(content)
        with pytest.raises((torchscript.Refused, zipfile.BadZipFile, ValueError)) as caught:
            torchscript.load(made, len(content))
        if caught.type is torchscript.Refused:
            assert re.search(reason, str(caught.value)), name
        if name in (
            "compressed",
            "lying about its size",
            "spoiled",
            "of two trees",
        ):  # the latter without a child
            (tmp_path / "x.pt").write_bytes(content)
            with pytest.raises(ModelFileError, match=reason):
                convert(tmp_path / "x.pt", tmp_path / "x.safetensors")


@pytest.mark.hostile
@pytest.mark.parametrize("case", ["a payload", "a memo bomb"])
def test_the_refusal_comes_out_of_the_child_as_one_sentence(case, tmp_path):
    tree, reason = BAD[case]
    (tmp_path / "x.pt").write_bytes(archive(tree).getvalue())
    with pytest.raises(ModelFileError, match=rf"cannot convert 'x.pt': .*{reason}[^.]*\.[^.]*\.?$"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.hostile
def test_the_tensors_together_are_no_larger_than_four_times_the_file(tmp_path):
    many = module(**{f"t{i}": tensor((2000,), (0,), held=storage()) for i in range(100)})
    (tmp_path / "x.pt").write_bytes(archive(many).getvalue())
    with pytest.raises(ModelFileError, match="more than four times"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
