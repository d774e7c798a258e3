"""The kernels for packed items on an accelerator: `pytest -m gpu tests/gpu` on a machine that has one."""

import pytest
import torch

from reverie.backbones.video_dit import VideoDit, VideoDitConfig
from reverie.nn import attention
from reverie.nn.attention import attend, attend_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernels_for_packed_items_are_the_definition(dtype):
    """In half precision flash attention for any lengths, in float32 that of jagged tensors; gradients included."""
    torch.manual_seed(0)
    queries, keys = (30, 57, 5, 128), (40, 1, 6, 77)
    q, k, v = (
        torch.randn(4, sum(n), 32, device="cuda", dtype=dtype, requires_grad=True)
        for n in (queries, keys, keys)
    )
    ends = tuple(torch.tensor([0, *lengths], device="cuda").cumsum(0) for lengths in (queries, keys))
    out = attend_packed(q, k, v, ends=ends, longest=(128, 77))
    parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    alone = torch.cat([attend(*(x[None].float() for x in part))[0] for part in parts], dim=1)
    ours = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(alone.square().sum(), (q, k, v))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), alone, atol=tolerance, rtol=tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            one.float(), other.float(), atol=tolerance * float(other.abs().max()), rtol=tolerance
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_packed_is_each_alone_on_a_gpu(precision, monkeypatch):
    torch.manual_seed(0)
    config = VideoDitConfig(
        patch=(1, 4), bottleneck=6, width=64, depth=2, heads=2, context_width=16, waves=2, head=5
    )
    model = VideoDit(config).cuda()
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2)
    x = [torch.randn(3, *shape, device="cuda") for shape in ((1, 8, 12), (3, 8, 4), (1, 12, 8), (2, 4, 12))]
    t = [torch.rand(len(one[0]), device="cuda") for one in x]
    mask = torch.arange(5, device="cuda") < torch.tensor([[3], [5], [1], [4]], device="cuda")
    text = torch.randn(4, 16, device="cuda"), torch.randn(4, 5, 16, device="cuda"), mask
    used = []
    kernel = attention.attend_packed
    monkeypatch.setattr(
        attention, "attend_packed", lambda *args, **how: used.append(1) or kernel(*args, **how)
    )
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        packed = model(x, t, *text)
        assert len(used) == 2 * config.depth  # to themselves and to their words
        alone = [model(x[i][None], t[i][None], *(part[i : i + 1] for part in text))[0] for i in range(4)]
    assert len(used) == 2 * config.depth
    loss = sum(out.float().square().sum() for out in packed)
    other = sum(out.float().square().sum() for out in alone)
    wanted = [p for name, p in model.named_parameters() if not name.startswith("null")]
    tolerance = TOLERANCE[precision]
    for one, two in zip(packed, alone, strict=True):
        assert (one - two).abs().max() <= tolerance * two.abs().max()
    for one, two in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(other, wanted), strict=True):
        assert (one - two).abs().max() <= 2 * tolerance * two.abs().max()
