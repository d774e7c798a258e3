"""The remapping engine: one table, both directions, bit-equal; nothing below full coverage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.weights.files import ModelFileError, expectation
from reverie.weights.remap import Rule, apply, invert, matching

TABLE = (
    Rule("embed.{p}", "stem.{p}"),
    Rule(tuple(f"layers.{{i}}.{name}.{{p}}" for name in "qkv"), "blocks.{i}.qkv.{p}"),
    Rule("layers.{i}.gate.weight", ("blocks.{i}.up.weight", "blocks.{i}.gate.weight")),
    Rule("layers.{i}.conv1d.weight", "blocks.{i}.linear.weight", rearrange="a b -> b a"),
    Rule(
        "patch.weight", "patch.weight", rearrange="d c p q -> d (c p q)", axes=(("c", 3), ("p", 2), ("q", 2))
    ),
    Rule("scale", "log_scale", rearrange=" -> 1"),
)


def theirs(depth: int, width: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> torch.Tensor:  # any bit pattern, NaNs and infinities among them
        count = int(torch.tensor(shape).prod()) * dtype.itemsize
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=draw).view(dtype).reshape(shape)

    tensors = {"embed.weight": bits(width, width), "embed.bias": bits(width), "scale": bits(1).reshape(())}
    tensors["patch.weight"] = bits(width, 3, 2, 2)
    for i in range(depth):
        for name in "qkv":
            tensors |= {
                f"layers.{i}.{name}.weight": bits(width, width),
                f"layers.{i}.{name}.bias": bits(width),
            }
        tensors[f"layers.{i}.gate.weight"] = bits(2 * width, width)
        tensors[f"layers.{i}.conv1d.weight"] = bits(width, 2 * width)
    return tensors


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def plain(x: torch.Tensor) -> bytes:
        return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[key].shape == b[key].shape and a[key].dtype == b[key].dtype and plain(a[key]) == plain(b[key])
        for key in a
    )


@settings(max_examples=60, deadline=None, database=None)
@given(
    depth=st.integers(0, 12),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_there_and_back_is_bit_equal(depth, width, dtype, seed):
    tensors = theirs(depth, width, dtype, seed)
    ours = apply(TABLE, tensors)
    assert same_bits(apply(invert(TABLE), ours), tensors)
    assert same_bits(apply(TABLE, apply(invert(TABLE), ours)), ours)
    assert invert(invert(TABLE)) == TABLE


def test_values_land_where_the_table_says():
    ours = apply(TABLE, theirs(2, 3, torch.float32, 0))
    given_ = theirs(2, 3, torch.float32, 0)
    joined = torch.cat([given_[f"layers.1.{name}.weight"] for name in "qkv"])
    assert torch.equal(ours["blocks.1.qkv.weight"].nan_to_num(), joined.nan_to_num())
    up, gate = given_["layers.1.gate.weight"].split(3)
    assert torch.equal(ours["blocks.1.up.weight"].nan_to_num(), up.nan_to_num())
    assert torch.equal(ours["blocks.1.gate.weight"].nan_to_num(), gate.nan_to_num())
    assert ours["blocks.0.linear.weight"].shape == (6, 3)
    assert ours["patch.weight"].shape == (3, 12)
    assert ours["log_scale"].shape == (1,)


def test_refusal_lists_missing_unexpected_and_mis_shaped():
    tensors = theirs(2, 3, torch.float32, 0)
    expected = dict(expectation(apply(TABLE, tensors)))
    expected["stem.weight"] = ((3, 4), "float")
    expected["extra.weight"] = ((3,), "float")
    tensors["os.system"] = torch.ones(1)
    with pytest.raises(ModelFileError) as caught:
        apply(TABLE, tensors, expected=expected, what="pytorch folder")
    message = str(caught.value)
    assert message.startswith("pytorch folder does not fit")
    assert "1 missing (extra.weight)" in message
    assert "1 unexpected (os.system)" in message
    assert "stem.weight is 3 x 3 float and should be 3 x 4 float" in message


def test_unclaimed_tensors_are_refused_without_expectations_too():
    with pytest.raises(ModelFileError, match=r"1 unexpected \(position_ids\)"):
        apply(TABLE, {"position_ids": torch.arange(3)})
    assert apply(TABLE, {"a.position_ids": torch.arange(3)}, ignore=("{x}.position_ids",)) == {}
    assert matching(("{x}.position_ids",), ["a.position_ids", "a.b.position_ids"]) == {"a.position_ids"}


def test_a_part_of_a_join_that_is_absent_is_named():
    tensors = theirs(1, 2, torch.float32, 0)
    del tensors["layers.0.k.bias"]
    with pytest.raises(ModelFileError, match=r"lacks 1 .*layers\.0\.k\.bias"):
        apply(TABLE, tensors)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("scale", torch.ones(2)),
        ("patch.weight", torch.ones(3, 12)),
        ("patch.weight", torch.ones(3, 3, 4, 4)),
        ("layers.0.gate.weight", torch.ones(3, 2)),
        ("layers.0.gate.weight", torch.tensor(1.0)),
        ("layers.0.q.weight", torch.ones(2, 5)),
        ("layers.0.q.weight", torch.ones(2, 2, dtype=torch.float16)),
    ],
)
def test_shapes_that_no_rule_fits_are_our_error(name, tensor):
    tensors = theirs(1, 2, torch.float32, 0)
    tensors[name] = tensor
    with pytest.raises(ModelFileError):
        apply(TABLE, tensors)


def test_a_wrong_table_is_our_own_fault():
    with pytest.raises(AssertionError, match="placeholders"):
        Rule("a.{i}", "b.{j}")
    with pytest.raises(AssertionError, match="neither"):
        Rule(("a", "b"), ("c", "d"))
    with pytest.raises(AssertionError, match="2 rules claim"):
        apply((Rule("a.{i}", "b.{i}"), Rule("a.x", "c.x")), {"a.x": torch.ones(1)})
    with pytest.raises(AssertionError, match="two rules make"):
        apply((Rule("a", "c"), Rule("b", "c")), {"a": torch.ones(1), "b": torch.ones(1)})
