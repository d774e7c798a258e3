"""What a training step computes, moves and keeps, counted on tensors that have shapes alone (torch's device "meta").

The loss that trains is run forward and backward, and every operator that torch carries out is noted: its FLOPs (two for
a multiplication and an addition, by torch's own formulas), the bytes that it reads and writes, and what is alive at
that moment. So recompute, gradient caching, dropped patches and every system are counted as they are, by no formula
of their own. No memory is taken and no number computed, so a system of any size is counted in seconds on a laptop.

Two things happen on a GPU and not on shapes, and are put in their place: mixed precision, by the lists of torch's
autocast, and fused attention, which keeps no scores.

Conventions: bytes are what an operator that stands alone moves, each input read and each output written once, as in
eager mode. Views cost nothing. The causal half of attention counts in full, as is usual.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from reverie.objectives.contrastive import Peers

Kind = Literal["product", "attention", "memory"]

# torch.autocast on CUDA: what runs in half precision, and what in fp32 ("CUDA Ops that can autocast", torch.amp).
HALF = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention"),
}
FULL = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "exp", "log", "softplus", "pow"),
    *("norm", "cumsum", "mse_loss", "l1_loss"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# Reads only the rows that are asked for, or writes without reading.
_ROWS = ("embedding", "index", "gather", "index_select")
_FREE = ("empty", "new_empty", "detach", "lift_fresh")  # they touch no memory
_ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator on one size of tensors. `half`: its product is in bf16 or fp16."""

    name: str
    kind: Kind
    half: bool
    backward: bool
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Count:
    """A step on one device. Sizes in bytes; weights, their gradients and the batch itself are in none of them.

    `kept` is alive when backward begins; `peak` is the most at any time; `copies` are the weights in half precision,
    which are part of both. `sent` is what one process gives and takes in each collective of the loss.
    """

    ops: Counter[Op]
    kept: int
    peak: int
    copies: int
    sent: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return sum(op.flops * times for op, times in self.ops.items())

    @property
    def forward_flops(self) -> int:
        return sum(op.flops * times for op, times in self.ops.items() if not op.backward)

    @property
    def bytes(self) -> int:
        return sum(op.bytes * times for op, times in self.ops.items())

    def __add__(self, other: Count) -> Count:
        """One after the other; what is kept is freed in between."""
        both = Counter(self.ops)
        for op, times in other.ops.items():
            both[op] += times
        names = {*self.sent, *other.sent}
        return Count(
            ops=both,
            kept=max(self.kept, other.kept),
            peak=max(self.peak, other.peak),
            copies=max(self.copies, other.copies),
            sent={name: self.sent.get(name, 0) + other.sent.get(name, 0) for name in names},
        )

    def times(self, count: int) -> Count:
        """The same step so many times, one after the other."""
        ops = Counter({op: times * count for op, times in self.ops.items()})
        sent = {name: count * size for name, size in self.sent.items()}
        return Count(ops=ops, kept=self.kept, peak=self.peak, copies=self.copies, sent=sent)


def along(first: Count, second: Count, share: float) -> Count:
    """The step at `first` + share x (`second` - `first`), for what grows in proportion, such as chunks of a batch.

    Of an operator whose size grows, the first size may stand a negative number of times; the sums are right.
    """

    def between(a: float, b: float) -> int:
        return round(a + share * (b - a))

    ops: Counter[Op] = Counter()
    for op in {*first.ops, *second.ops}:
        ops[op] = between(first.ops[op], second.ops[op])
    return Count(
        ops=ops,
        kept=between(first.kept, second.kept),
        peak=between(first.peak, second.peak),
        copies=between(first.copies, second.copies),
        sent={
            name: between(first.sent.get(name, 0), second.sent.get(name, 0))
            for name in {*first.sent, *second.sent}
        },
    )


def count(
    model: nn.Module,
    loss: Callable[[Peers], Tensor],
    *,
    precision: str = "fp32",
    fused: bool = True,
    backward: bool = True,
    peers: int = 1,
) -> Count:
    """Runs `loss` of a model on "meta", and its gradient, and counts them.

    `precision`: fp32, tf32 (as fp32), or bf16 and fp16, mixed as torch.autocast mixes them. `fused`: attention keeps
    no scores (flash attention), otherwise it is products and a softmax, as before 2023. `peers`: the loss is that of
    one of so many processes with equal parts, whose collectives give tensors of the right shape and are noted.
    """
    assert precision in PRECISIONS, precision
    assert all(p.is_meta for p in model.parameters()), "the model has memory: build it on the device meta"
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    ledger = _Ledger(own=own)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: ledger.leave(p.grad))
        for p in model.parameters()
        if p.requires_grad
    ]
    half = DTYPES.get(precision)
    mixed = _Mixed(half, fused, ledger)
    sent: Counter[str] = Counter()
    try:
        with mixed, ledger:
            value = loss(_shapes_of(peers, sent))
            mixed.copies.clear()  # autocast forgets them where its context ends
            kept, copies = ledger.alive, ledger.copied
            if backward:
                ledger.backward = mixed.backward = True
                _run_backward(value)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return Count(ops=ledger.ops, kept=kept, peak=ledger.peak, copies=copies, sent=dict(sent))


def _run_backward(value: Tensor) -> None:
    """`value.backward()`, except that what a checkpoint computes again is under the mode above too."""
    _engine_run_backward(
        (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


# ---------------------------------------------------------------- the other processes


def _shapes_of(peers: int, sent: Counter[str]) -> Peers:
    """Processes that are not there: what they would send has a shape. `sent` takes the bytes of one process."""
    if peers == 1:
        return Peers()

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.size = len(x)
            sent["all-gather"] += (peers - 1) * _size(x)
            return x.new_empty(peers * len(x), *x.shape[1:])

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            sent["reduce-scatter"] += (peers - 1) * _size(gradient) // peers
            return gradient.new_empty(ctx.size, *gradient.shape[1:])

    def pass_on(x: Tensor) -> Tensor:
        sent["ring"] += _size(x)
        return torch.empty_like(x)

    return Peers(rank=0, count=peers, gather=Gather.apply, pass_on=pass_on)


# ---------------------------------------------------------------- the operators


def _size(x: Tensor) -> int:
    """Bytes that reading or writing `x` moves; of an expanded tensor what is really there."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _key(x: Any) -> Any:
    """All that the shape of an operator's result depends on."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.is_meta
    return tuple(map(_key, x)) if isinstance(x, list | tuple) else (type(x), x)


def _spec(out: Any) -> Any:
    if isinstance(out, Tensor):
        return tuple(out.shape), out.stride(), out.dtype
    return [_spec(x) for x in out]


def _made(spec: Any) -> Any:
    if isinstance(spec, list):
        return tuple(_made(one) for one in spec)
    shape, stride, dtype = spec
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class _Ledger(TorchDispatchMode):
    """Notes every operator, and which tensors are alive."""

    def __init__(self, *, own: set[int]):
        super().__init__()
        self.own = own  # storages of the model, which are not counted
        self.ops: Counter[Op] = Counter()
        self.known: dict[Any, tuple[Op | None, Any]] = {}
        self.sizes: dict[int, int] = {}
        self.marked: set[int] = set()
        self.alive = self.peak = self.copied = 0
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what an operator is made of on shapes is not what a GPU runs
            key = (func, self.backward, _key(args), _key(tuple(kwargs.items())))
            if key in self.known:  # stacks repeat their blocks
                op, spec = self.known[key]
                out = _made(spec)
                made = [x for x in ([out] if isinstance(out, Tensor) else out) if isinstance(x, Tensor)]
                for x in made:
                    self._born(x)
            else:
                out = func(*args, **kwargs)
                op = self._note(func, args, kwargs, out, key)
        if op is not None:
            self.ops[op] += 1
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, key: Any) -> Op | None:
        """What the operator costs; None: nothing. What only makes new tensors is remembered by its `key`."""
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in [*read, *made]):
            return None
        packet, name = func._overloadpacket, func._overloadpacket.__name__
        there = {x.untyped_storage()._cdata for x in read}
        for x in made:
            self._born(x)
        mutates = func._schema.is_mutable
        written = [x for x in made if mutates or x.untyped_storage()._cdata not in there]
        op = None
        if (written or mutates) and not name.startswith(_FREE):  # not a view
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
            if name in _ROWS:
                moved = sum(_size(x) for x in read[1:]) + 2 * sum(map(_size, written))
            else:
                moved = sum(map(_size, read)) + sum(map(_size, written))
            kind: Kind = "attention" if name in _ATTENTION else "product" if flops else "memory"
            half = bool(flops) and any(x.dtype in DTYPES.values() for x in read)
            op = Op(name=name, kind=kind, half=half, backward=self.backward, flops=int(flops), bytes=moved)
        flat = isinstance(out, Tensor) or (isinstance(out, tuple) and all(isinstance(x, Tensor) for x in out))
        if flat and not mutates and len(written) == len(made) and all(x.is_meta for x in made):
            self.known[key] = op, _spec(out)
        return op

    def _born(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if not x.is_meta or key in self.sizes or key in self.own:
            return
        self.sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        size = self.sizes.pop(key, 0)
        self.alive -= size
        if key in self.marked:
            self.marked.discard(key)
            self.copied -= size

    def mark_copy(self, x: Tensor) -> None:
        """`x` is a weight in half precision."""
        key = x.untyped_storage()._cdata
        if key in self.sizes and key not in self.marked:
            self.marked.add(key)
            self.copied += self.sizes[key]

    def leave(self, x: Tensor | None) -> None:
        """`x` is a weight's gradient, which is counted elsewhere."""
        if x is not None:
            self._died(x.untyped_storage()._cdata)


class _Mixed(TorchFunctionMode):
    """Mixed precision and fused attention in place of what shapes would take."""

    def __init__(self, half: torch.dtype | None, fused: bool, ledger: _Ledger):
        super().__init__()
        self.half, self.fused, self.ledger = half, fused, ledger
        self.copies: dict[int, Tensor] = {}
        self.backward = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.half is not None and (name in HALF or name in FULL):
            turn = self._narrow if name in HALF else self._widen
            args = tuple(turn(x) if isinstance(x, Tensor) else x for x in args)
            kwargs = {key: turn(x) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        if name == "scaled_dot_product_attention":
            with self:
                return _attend(self.fused, *args, **kwargs)
        return func(*args, **kwargs)

    def _narrow(self, x: Tensor) -> Tensor:
        if not x.is_meta or x.dtype != torch.float32:
            return x
        weight = x.is_leaf and x.requires_grad
        if weight and id(x) in self.copies:
            return self.copies[id(x)]
        narrow = x.to(self.half)
        if x.untyped_storage()._cdata in self.ledger.own:
            self.ledger.mark_copy(narrow)
        if weight and not self.backward and torch.is_grad_enabled():
            self.copies[id(x)] = narrow
        return narrow

    def _widen(self, x: Tensor) -> Tensor:
        return x.float() if x.is_meta and x.dtype in DTYPES.values() else x


def _attend(
    fused: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """`b heads n d` -> `b heads n d`, by the operator that a GPU has for it or by products."""
    if fused:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        return out
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None or is_causal:
        scores = scores + torch.empty(scores.shape[-2:], device=scores.device, dtype=scores.dtype)
    return F.softmax(scores, dim=-1) @ v


@contextmanager
def on_shapes() -> Iterator[None]:
    """Modules that are built within have shapes alone."""
    with torch.device("meta"):
        yield
