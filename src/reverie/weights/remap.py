"""One remapping engine: a table of rules turns one naming of the same weights into another, and back.

A rule says source -> target. Placeholders in braces stand for one dotted segment and must agree on both sides
(`layers.{i}.fc1.{p}` -> `blocks.{i}.mlp.in.{p}`). Several sources and one target concatenate (three projections into
a fused one); one source and several targets split evenly; `zeros` says which pieces of the joined tensor
stand in no file and are zero (a bias that keys do not have); `copies` are one tensor under several names, which must be
equal, and is written under each of them again. A rule of one side alone is for a tensor that follows from the config:
where it has no targets its `value` must stand in the file, where it has no sources that becomes of it. `rearrange` is
an einops pattern from source to target pieces ("a b -> b a", "1 -> ", "d c p q -> d (c p q)") with the axis lengths in
`axes` that either direction needs. `invert` swaps the sides, so import and export are one table and a round trip is
bit-equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from reverie.weights.files import Expected, Family, ModelFileError, check, expectation

PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Rule:
    """One line of a table; see the module for its parts. `dim` is where pieces are joined or split."""

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    rearrange: str | None = None
    axes: tuple[tuple[str, int], ...] = ()
    dim: int = 0
    copies: bool = False
    zeros: tuple[int, ...] = ()
    value: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        one = (self.sources or self.targets) if self.value else min(self.sources, self.targets, key=len)
        assert len(one) == 1, f"{self} is neither one-to-many nor many-to-one"
        names = [sorted(PLACEHOLDER.findall(side)) for side in (*self.sources, *self.targets)]
        assert all(found == names[0] for found in names), (
            f"the placeholders of {self} differ between its sides"
        )
        assert len(set(names[0])) == len(names[0]), f"{self} repeats a placeholder"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


Table = Sequence[Rule]


def invert(table: Table) -> tuple[Rule, ...]:
    """The table of the way back."""
    return tuple(
        replace(rule, source=rule.target, target=rule.source, rearrange=_turn(rule.rearrange))
        for rule in table
    )


def within(table: Table, *, source: str = "", target: str = "") -> tuple[Rule, ...]:
    """The same rules for a part of something larger: what comes before the names of each side."""
    return tuple(
        replace(
            rule,
            source=tuple(f"{source}{name}" for name in rule.sources),
            target=tuple(f"{target}{name}" for name in rule.targets),
        )
        for rule in table
    )


def apply(
    table: Table,
    tensors: Mapping[str, Tensor],
    *,
    expected: Expected | None = None,
    ignore: Sequence[str] = (),
    what: str = "the checkpoint",
) -> dict[str, Tensor]:
    """The same weights under the table's target names.

    Every tensor must be claimed by a rule or match a pattern of `ignore`, every rule that is begun must find all its
    sources, and the result must cover `expected` exactly; otherwise `ModelFileError` lists what is missing, unexpected
    and mis-shaped.
    """
    groups, unexpected = grouped(table, tensors, ignore=ignore)
    made = computed(table)
    missing: list[str] = []
    for group in groups:
        absent = [source for source in group.sources if source not in tensors]
        if absent:
            missing += absent
            continue
        pieces = group.convert(tensors)
        assert not made.keys() & pieces.keys(), f"two rules make {min(made.keys() & pieces.keys())}"
        made |= pieces
    if missing:
        raise ModelFileError(
            f"{what} lacks {len(missing)} tensors whose companions it has ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}); fetch the whole checkpoint."
        )
    present = expectation({**made, **{name: tensors[name] for name in unexpected}})
    check(present, expectation(made) if expected is None else expected, what=what)
    return made


@dataclass(frozen=True)
class Group:
    """A rule with names in place of its placeholders: what is read together, and what it becomes."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def convert(self, tensors: Mapping[str, Tensor], *, filled: bool = True) -> dict[str, Tensor]:
        """The targets from the sources; if these are not `filled`, only their shapes count. Raises `ModelFileError`."""
        pieces = _convert(self.rule, {source: tensors[source] for source in self.sources}, filled)
        return dict(zip(self.targets, pieces, strict=True))


def grouped(
    table: Table, names: Iterable[str], *, ignore: Sequence[str] = ()
) -> tuple[list[Group], list[str]]:
    """The names by the rules that claim them, in the names' order; and the names that none claims or ignores."""
    names = list(names)
    exact: dict[str, list[int]] = {}
    patterns: list[tuple[int, re.Pattern[str]]] = []
    for number, rule in enumerate(table):
        for source in rule.sources:
            if "{" in source:
                patterns.append((number, _pattern(source)))
            else:
                exact.setdefault(source, []).append(number)
    ignored = matching(ignore, names)
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], Group] = {}
    unclaimed: list[str] = []
    for name in names:
        claims: list[tuple[int, tuple[tuple[str, str], ...]]] = [
            (number, ()) for number in exact.get(name, ())
        ]
        claims += (
            (number, tuple(sorted(found.groupdict().items())))
            for number, pattern in patterns
            if (found := pattern.fullmatch(name))
        )
        assert len(claims) <= 1, f"{len(claims)} rules claim {name}"
        if claims and claims[0] not in groups:
            rule, values = table[claims[0][0]], dict(claims[0][1])
            groups[claims[0]] = Group(
                rule,
                tuple(_fill(side, values) for side in rule.sources),
                tuple(_fill(side, values) for side in rule.targets),
            )
        elif not claims and name not in ignored:
            unclaimed.append(name)
    return list(groups.values()), unclaimed


def outlined(table: Table, tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], Family]]:
    """The shapes that `apply` would give of tensors that rules all claim: a rule at a time, nothing of it is kept."""
    groups, unclaimed = grouped(table, tensors)
    assert not unclaimed, f"no rule claims {unclaimed[:5]}"
    made = dict(expectation(computed(table)))
    for group in groups:
        made |= expectation(group.convert(tensors, filled=False))
    return made


def matching(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """Those of the names that fit one of the patterns, which have placeholders as the rules do."""
    exact = set(patterns)
    compiled = [_pattern(text) for text in patterns if "{" in text]
    return {name for name in names if name in exact or any(pattern.fullmatch(name) for pattern in compiled)}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in data type, shape and every value."""
    return a.dtype == b.dtype and a.shape == b.shape and (a.device.type == "meta" or torch.equal(a, b))


def computed(table: Table) -> dict[str, Tensor]:
    """What rules make of nothing."""
    return {rule.targets[0]: rule.value() for rule in table if rule.value is not None and rule.targets}


def _convert(rule: Rule, named: Mapping[str, Tensor], filled: bool) -> list[Tensor]:
    count, names, tensors = len(rule.targets), list(named), list(named.values())
    if rule.value is not None:
        known, found = rule.value(), tensors[0].float()
        if known.shape != found.shape or (filled and not torch.allclose(known.float(), found, atol=1e-3)):
            raise ModelFileError(
                f"{names[0]} does not hold what Reverie computes in its place, so numbers would differ: refused."
            )
        return []
    try:
        if rule.copies:
            if not all(same(tensor, tensors[0]) for tensor in tensors[1:]):
                raise ModelFileError(
                    f"{names[0]} and {len(names) - 1} others must be copies of one tensor, but differ; Reverie keeps"
                    " one, so these weights cannot be read."
                )
            tensors = tensors[:1] * count
        elif count > 1:
            size, parts = tensors[0].shape[rule.dim], count + len(rule.zeros)
            if size % parts:
                raise ModelFileError(f"{names[0]} has {size} rows, not a multiple of {parts}; check it.")
            pieces = tensors[0].tensor_split(parts, dim=rule.dim)
            if filled and any(pieces[i].any() for i in rule.zeros):
                raise ModelFileError(
                    f"{names[0]} is not zero in a part for which {', '.join(rule.targets)} have no room: refused."
                )
            tensors = [piece.contiguous() for i, piece in enumerate(pieces) if i not in rule.zeros]
        if rule.rearrange is not None:
            tensors = [
                rearrange(tensor, rule.rearrange, **dict(rule.axes)).contiguous() for tensor in tensors
            ]
        if len(rule.sources) == 1 or rule.copies:
            return tensors
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ModelFileError(
                f"{', '.join(names)} have different data types and cannot be joined; store them alike."
            )
        for i in rule.zeros:
            tensors = [*tensors[:i], torch.zeros_like(tensors[0]), *tensors[i:]]
        return [torch.cat(tensors, dim=rule.dim)]
    except (EinopsError, IndexError, RuntimeError):
        shapes = ", ".join(f"{name} is {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ModelFileError(
            f"{shapes}, which cannot become {', '.join(rule.targets)}; the checkpoint is of another architecture."
        ) from None


def _fill(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)


def _turn(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def _pattern(text: str) -> re.Pattern[str]:
    parts = PLACEHOLDER.split(text)
    return re.compile("".join(rf"(?P<{p}>[^.]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))
