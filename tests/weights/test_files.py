"""R12: a hostile weight file is refused by its header, quickly, in little memory, and in our own words."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reverie.errors import InputError
from reverie.weights import files
from reverie.weights.files import ModelFileError

GOOD = {
    "blocks.0.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "blocks.0.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scale": torch.tensor(2.5),
    "ids": torch.tensor([[1, -2]], dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 7),
}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def twins() -> bytes:
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return raw(b"{" + one + b"," + one + b"}", bytes(4))


def many(count: int) -> bytes:
    return raw({f"t{i}": tensor([0], 0, 0) for i in range(count)})


DEEP = 200_000
# name -> (bytes of the file, a word of the reason)
HOSTILE = {
    "empty": (b"", "no safetensors"),
    "seven bytes": (b"1234567", "no safetensors"),
    "length 2^63": (raw({}, length=2**63), "claims a header"),
    "header over 100 MB": (raw({}, length=100 * 2**20 + 1), "claims a header"),
    "header longer than file": (raw({"a": tensor([1], 0, 4)}, bytes(4), length=5000), "claims a header"),
    "offsets beyond file": (raw({"a": tensor([1000], 0, 4000)}, bytes(4)), "should hold"),
    "overlap": (raw({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "overlap"),
    "hole": (raw({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)), "hole"),
    "hole at the start": (raw({"a": tensor([1], 4, 8)}, bytes(8)), "hole"),
    "shape mismatch": (raw({"a": tensor([3], 0, 4)}, bytes(4)), "do not agree"),
    "shape overflow": (raw({"a": tensor([2**40, 2**40], 0, 4)}, bytes(4)), "do not agree"),
    "shape of 400 digits": (raw({"a": tensor([10**400], 0, 4)}, bytes(4)), "no tensor can have"),
    "shape of 10,000 digits": (
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}', bytes(4)),
        "not valid JSON",
    ),
    "negative shape": (raw({"a": tensor([-1, -1], 0, 4)}, bytes(4)), "no tensor can have"),
    "negative offset": (raw({"a": tensor([1], -4, 0)}, bytes(4)), "no range"),
    "offsets reversed": (raw({"a": tensor([1], 4, 0)}, bytes(4)), "no range"),
    "bool as a size": (raw({"a": tensor([True], 0, 4)}, bytes(4)), "no tensor can have"),
    "float as a size": (raw({"a": tensor([1.0], 0, 4)}, bytes(4)), "no tensor can have"),
    "nine dimensions": (raw({"a": tensor([1] * 9, 0, 4)}, bytes(4)), "no tensor can have"),
    "duplicate key": (twins(), "twice"),
    "trailing bytes": (raw({"a": tensor([1], 0, 4)}, bytes(9)), "should hold"),
    "no tensors but bytes": (raw({}, bytes(4)), "should hold"),
    "200k-deep JSON": (raw(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "not valid JSON"),
    "200k-deep list": (raw(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), "not valid JSON"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "NaN in JSON": (raw(b'{"a": NaN}'), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (raw([]), "not a JSON object"),
    "a million empty tensors": (
        struct.pack("<Q", 60_000_000) + b"{" + b" " * 59_999_999,
        "claims a header",
    ),
    "100,001 tensors": (many(100_001), "more than 100,000"),
    "two million lists": (raw(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"), "JSON parts"),
    "path as a name": (raw({"../../etc/x": tensor([1], 0, 4)}, bytes(4)), "names a tensor"),
    "NUL in a name": (raw({"a\0b": tensor([1], 0, 4)}, bytes(4)), "names a tensor"),
    "surrogate in a name": (raw(b'{"\\ud800": {}}'), "names a tensor"),
    "newline after a name": (raw({"a\n": tensor([1], 0, 4)}, bytes(4)), "names a tensor"),
    "name of 10,000 letters": (raw({"a" * 10_000: tensor([1], 0, 4)}, bytes(4)), "names a tensor"),
    "unknown dtype": (raw({"a": tensor([1], 0, 4, "F7")}, bytes(4)), "data type"),
    "dtype a list": (raw({"a": tensor([1], 0, 4, ["F32"])}, bytes(4)), "data type"),
    "extra key": (raw({"a": tensor([1], 0, 4) | {"module": "os"}}, bytes(4)), "alone"),
    "entry a string": (raw({"a": "os.system"}), "alone"),
    "metadata a list": (raw({"__metadata__": []}), "metadata"),
    "metadata nested": (raw({"__metadata__": {"a": {"b": "c"}}}), "metadata"),
    "NaN weights": (raw({"a": tensor([2], 0, 8)}, struct.pack("<2f", 1, float("nan"))), "NaN"),
    "infinite weights": (raw({"a": tensor([1], 0, 8, "F64")}, struct.pack("<d", float("inf"))), "NaN"),
    "NaN in bf16": (raw({"a": tensor([1], 0, 2, "BF16")}, b"\xff\x7f"), "NaN"),
    "NaN in float8": (raw({"a": tensor([1], 0, 1, "F8_E4M3")}, b"\x7f"), "NaN"),
    "bool 2": (raw({"a": tensor([1], 0, 1, "BOOL")}, b"\x02"), "0 and 1"),
    "a zip": (b"PK\x03\x04" + bytes(100), "convert"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(100), "convert"),
}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length, tmp_path):
    text = json.dumps({"a": tensor([1], 0, 4)}).encode().ljust(length)
    (tmp_path / "m.safetensors").write_bytes(raw(text, struct.pack("<f", 2)))
    assert (tmp_path / "m.safetensors").read_bytes()[0] == 0x80
    with files.Shards({tmp_path / "m.safetensors": ""}) as weights:
        assert weights.read("a").item() == 2


def test_only_who_allows_it_reads_minus_infinity():
    assert files.load_json('{"a": -Infinity}', what="a file", infinite=True) == {"a": -math.inf}
    for word, infinite in (("-Infinity", False), ("Infinity", True), ("NaN", True)):
        with pytest.raises(files.ModelFileError, match="not valid JSON"):
            files.load_json(f'{{"a": {word}}}', what="a file", infinite=infinite)


@pytest.mark.hostile
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(case, tmp_path):
    content, reason = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ModelFileError, match=reason) as caught:
        files.read(path)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.endswith(".")
    assert len(message) < 500
    assert "\n" not in message
    message.encode()  # no lone surrogate reaches a terminal


@pytest.mark.hostile
def test_refusing_takes_little_memory(tmp_path):
    """The peak of a fresh process over all cases, against the peak of one that reads a good file."""
    for number, (content, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    fillers = {"strings": b'"ab",', "numbers": b"1000,", "lists": b"[],", "objects": b"{},"}
    for name, filler in fillers.items():  # headers just under the limit, of what costs Python most
        text = b'{"a":[' + filler * ((files.HEADER_BYTES - 100) // len(filler)) + b"1]}"
        (tmp_path / f"{name}.safetensors").write_bytes(raw(text))
    files.write(tmp_path / "good.st", GOOD)
    code = """
import resource, sys
from pathlib import Path
from reverie.weights import files
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
files.read(sys.argv[1] + "/good.st")
before = peak()
for path in Path(sys.argv[1]).glob("*.safetensors"):
    try:
        files.read(path)
    except files.ModelFileError:
        continue
    raise SystemExit(path.name)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


def test_round_trip_and_agreement_with_the_library(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    files.write(ours, GOOD, {"format": "pt"})
    save_file(GOOD, theirs)
    for read in (files.read(ours), files.read(theirs), load_file(ours)):
        assert read.keys() == GOOD.keys()
        for name, value in GOOD.items():
            assert read[name].dtype == value.dtype
            assert read[name].shape == value.shape
            assert torch.equal(read[name], value)


def test_views_and_ties_are_written_as_values(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    files.write(tmp_path / "x.safetensors", {"a": base, "b": base, "t": base.T, "e": torch.ones(1).expand(4)})
    read = files.read(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], base)
    assert torch.equal(read["b"], base)
    assert torch.equal(read["t"], base.T)
    assert torch.equal(read["e"], torch.ones(4))


def test_what_was_read_outlives_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.full((100_000,), 7.0)})
    read = files.read(path)
    os.truncate(path, 0)
    assert bool((read["a"] == 7).all())


def test_finite_can_be_waived(tmp_path):
    files.write(tmp_path / "x.safetensors", {"a": torch.tensor([float("nan")])})
    assert files.read(tmp_path / "x.safetensors", only_finite=False)["a"].isnan().all()


def test_expected_lists_what_is_wrong_before_anything_is_read(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    files.write(path, GOOD)
    expected = dict(files.expectation(GOOD))
    files.read(path, expected=expected)
    monkeypatch.setattr(torch, "empty", None)  # any allocation would now raise TypeError
    del expected["scale"]
    expected["blocks.0.weight"] = ((4, 3), "float")
    expected["ids"] = ((1, 2), "float")
    expected |= {f"lost.{i}": ((1,), "float") for i in range(9)}
    with pytest.raises(ModelFileError) as caught:
        files.read(path, expected=expected)
    message = str(caught.value)
    assert "9 missing (lost.0, lost.1, lost.2, lost.3, lost.4, and 4 more)" in message
    assert "1 unexpected (scale)" in message
    assert "2 mis-shaped" in message
    assert "blocks.0.weight is 3 x 4 float and should be 4 x 3 float" in message
    assert "ids is 1 x 2 integer and should be 1 x 2 float" in message


@pytest.mark.hostile
def test_an_adapter_of_rank_a_million_is_refused_by_its_header(tmp_path):
    """A sparse file: 40 GB by its size, nothing on the disk."""
    path = tmp_path / "lora.safetensors"
    size = 10**6 * 10_000 * 4
    path.write_bytes(raw({"lora.down": tensor([10**6, 10_000], 0, size)}))
    os.truncate(path, path.stat().st_size + size)
    start = time.process_time()
    with pytest.raises(ModelFileError, match="1 mis-shaped"):
        files.read(path, expected={"lora.down": ((8, 10_000), "float")})
    assert time.process_time() - start < 1


@pytest.mark.hostile
def test_what_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (
        tmp_path / "folder.safetensors",
        tmp_path / "pipe.safetensors",
        Path("/dev/zero"),
        tmp_path / "no",
    ):
        with pytest.raises(ModelFileError):
            files.read(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
def test_pickle_names_are_refused_unopened(suffix, tmp_path):
    with pytest.raises(ModelFileError, match="reverie convert"):
        files.read(tmp_path / f"x{suffix}")


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.ones(2)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError):
        files.write(path, {"a": torch.zeros(2)})
    assert torch.equal(files.read(path)["a"], torch.ones(2))
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_written_files_have_usual_rights(tmp_path):
    files.write(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bad_names_are_not_written(tmp_path):
    with pytest.raises(ModelFileError, match="names a tensor"):
        files.write(tmp_path / "x.safetensors", {"../a": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def _good_bytes() -> bytes:
    from safetensors.torch import save

    return save(GOOD, {"format": "pt"})


BYTES = _good_bytes()


@pytest.mark.hostile
@settings(max_examples=200, deadline=None, database=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.integers(0, len(BYTES))),
    more=st.binary(max_size=9),
)
def test_mutated_files_are_read_or_refused(edits, cut, more, tmp_path_factory):
    content = bytearray(BYTES)
    for position, value in edits:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(content[:cut]) + more)
    expected = files.expectation(GOOD)
    try:
        read = files.read(path, expected=expected)
    except ModelFileError:
        return
    assert files.expectation(read) == expected
    assert all(files.finite(value) for value in read.values())


WORDS = st.sampled_from(["F32", "F16", "BOOL", "I64", "X", 0, None, [], {}, -1, 2**63, 4, 8, True, 1.5, "a"])
ENTRY = st.dictionaries(
    st.sampled_from(["dtype", "shape", "data_offsets", "extra"]),
    st.one_of(WORDS, st.lists(WORDS, max_size=3)),
)


@pytest.mark.hostile
@settings(max_examples=200, deadline=None, database=None)
@given(
    header=st.one_of(
        st.dictionaries(st.text(max_size=6), st.one_of(ENTRY, WORDS), max_size=4),
        st.recursive(
            WORDS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
        ),
    ),
    data=st.binary(max_size=16),
)
def test_any_json_header_is_read_or_refused(header, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(raw(header, data))
    try:
        read = files.read(path)
    except ModelFileError:
        return
    assert sum(value.numel() * value.element_size() for value in read.values()) == len(data)


def test_the_error_is_the_users_to_mend():
    assert issubclass(ModelFileError, InputError)
