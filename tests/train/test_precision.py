import pytest
import torch

from reverie.errors import InputError
from reverie.nn.linear import cpu_has_bf16
from reverie.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(precision, "native_bf16", lambda device: native)
    assert precision.resolve("auto", CPU) == expected
    assert precision.resolve("fp32", CPU) == "fp32"
    assert precision.resolve("bf16", CPU) == "bf16"


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match=r"fp16.*choose auto, fp32 or bf16"):
        precision.resolve("fp16", CPU)


def test_native_bf16_agrees_with_torch_on_this_processor(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", cpu_has_bf16)
    if torch.cpu._is_avx512_bf16_supported():
        assert precision.native_bf16(CPU)
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not precision.native_bf16(CPU)


def test_autocast_changes_products_and_nothing_else():
    x = torch.randn(4, 4)
    with precision.autocast("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
        assert x.dtype == torch.float32
    with precision.autocast("fp32", CPU):
        assert (x @ x).dtype == torch.float32
