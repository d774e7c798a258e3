"""From words to the arguments of a function: its signature says which flags there are, its docstring what they mean.

A command is a plain typed function whose docstring has a section "Args". tyro parses the words and prints the help;
what it would say of a mistake in a box is said here in one sentence (`Command.mistake`). A recipe's signature is read
from its source (`outline`), so that no help and no wrong flag waits for torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from reverie.errors import InputError

if TYPE_CHECKING:
    from inspect import Parameter


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is known of a command before it runs: its name, its words of help, and its parameters.

    Parameters that are positional-only in the signature are positional on the command line, the others are flags. A
    parameter that is a dataclass stands for its fields, each a flag, explained in the dataclass's own "Args".
    """

    prog: str
    about: str
    told: Mapping[str, str]  # parameter -> its line under Args
    parameters: Sequence[Parameter]
    groups: Mapping[str, type] = field(default_factory=dict)  # parameter -> the dataclass that it is

    @staticmethod
    def of(prog: str, function: Callable[..., Any]) -> Command:
        about, told = read_doc(inspect.getdoc(function) or "")
        parameters: list[Parameter] = []
        groups: dict[str, type] = {}
        for part in inspect.signature(function, eval_str=True).parameters.values():
            if not is_dataclass(part.annotation):
                parameters.append(part)
                continue
            kind: Any = part.annotation
            groups[part.name], hints = kind, get_type_hints(kind)
            told |= read_doc(inspect.getdoc(kind) or "")[1]
            for one in fields(kind):
                default = part.empty if one.default is MISSING else one.default
                flag = inspect.Parameter(
                    one.name, part.KEYWORD_ONLY, default=default, annotation=hints[one.name]
                )
                parameters.append(flag)
        return Command(prog=prog, about=about, told=told, parameters=parameters, groups=groups)

    @staticmethod
    def of_recipe(prog: str, target: str, like: Command) -> Command:
        """A recipe `(data, out, *, settings, engine)`: its settings are flags, beside those that `like` has for all.

        The parameter `engine` stands for the latter."""
        parameters, doc = outline(target)
        about, told = read_doc(doc)
        shared = [part for part in like.parameters if part.name != "recipe"]
        known = {part.name for part in shared}
        flags = [part.replace(kind=part.KEYWORD_ONLY) for part in parameters if part.name not in known]
        return Command(
            prog=prog,
            about=about,
            told={name: like.told[name] for name in known if name in like.told} | told,
            parameters=[*shared[:2], *flags, *shared[2:]],
        )

    def parse(self, args: list[str]) -> dict[str, Any] | None:
        """The value of each parameter; None: help was asked for and has been printed. InputError: a mistake."""
        import tyro

        def given(**values: Any) -> dict[str, Any]:
            return values

        parts = [
            part.replace(kind=part.KEYWORD_ONLY, annotation=_for_tyro(part, self.told.get(part.name, "")))
            for part in self.parameters
        ]
        given.__signature__ = inspect.Signature(parts)  # type: ignore[attr-defined]
        given.__annotations__ = {part.name: part.annotation for part in parts}
        config = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
        helping = asks_for_help(args)
        try:
            with (
                nullcontext() if helping else redirect_stderr(StringIO())
            ):  # its box, for which we have a sentence
                words = ["--help"] if helping else args
                return tyro.cli(given, prog=self.prog, args=words, description=self.about, config=config)
        except SystemExit:
            if helping:
                return None
            raise InputError(self.mistake(args)) from None

    def call(self, function: Callable[..., int | None], given: dict[str, Any]) -> int | None:
        for name, kind in self.groups.items():
            given[name] = kind(**{one.name: given.pop(one.name) for one in fields(kind)})
        positional = [given.pop(part.name) for part in self.parameters if part.kind is part.POSITIONAL_ONLY]
        return function(*positional, **given)

    def mistake(self, args: list[str]) -> str:
        """The first thing that is wrong with words that tyro did not take, and what to do."""
        flags: dict[str, Parameter] = {}
        for part in self.parameters:
            if part.kind is part.KEYWORD_ONLY:
                flags[_flag(part)] = part
                if part.annotation is bool and not part.name.startswith("no_"):
                    flags[f"--no-{_flag(part)[2:]}"] = part
        places = [part for part in self.parameters if part.kind is part.POSITIONAL_ONLY]
        takes = " ".join(part.name.upper() for part in places) or "nothing"
        words, given = [*args], set()
        while words:
            word = words.pop(0)
            if not _is_flag(word):
                if not places:
                    much = f"so {word!r} is too much: put words with spaces in quotes, or see `{self.prog} --help`."
                    return f"`{self.prog}` takes {takes} besides flags, {much}"
                if wrong := _wrong(places[0].annotation, [word], places[0].name.upper()):
                    return wrong
                if places[0].annotation != list[str]:
                    del places[0]
                continue
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if name not in flags:
                near = did_you_mean(name, flags, "its flags are") if flags else "it has none."
                return f"`{self.prog}` has no flag {name}: {near}"
            kind = _plain(flags[name].annotation)
            if kind is bool and equals:
                ways = " or ".join(other for other in flags if flags[other] is flags[name])
                return f"{name} takes no value, but is given {value!r}: write {ways}."
            given.add(name)
            values = [value] if equals else []
            most = {
                bool: 0,
                tuple[int, int]: 2,
                tuple[str, ...]: len(words),
                tuple[int, ...]: len(words),
            }.get(kind, 1)
            while len(values) < most and words and not _is_flag(words[0]):
                values.append(words.pop(0))
            if wrong := _wrong(kind, values, name):
                return wrong
        for part in self.parameters:
            name = _flag(part) if part.kind is part.KEYWORD_ONLY else part.name.upper()
            absent = name not in given if part.kind is part.KEYWORD_ONLY else part in places
            if part.default is part.empty and part.annotation != list[str] and absent:
                told = self.told[part.name]
                return f"`{self.prog}` needs {name}: {told[0].lower()}{told[1:]}"
        return (
            f"`{self.prog}` cannot make sense of {' '.join(args)!r}: `{self.prog} --help` explains its flags."
        )


def restored(parameters: Iterable[Parameter], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Arguments that JSON has held, as their parameters have them. InputError: one is of another kind."""
    found: dict[str, Any] = {}
    for part in parameters:
        if part.name not in values:
            continue
        value, kind = values[part.name], _plain(part.annotation)
        several = get_origin(kind) is tuple
        one = get_args(kind)[0] if several else kind
        parts = value if several and isinstance(value, list) else [value]
        held: Any = {Path: str, float: (float, int)}.get(one, one)
        if value is None and kind is not part.annotation:
            found[part.name] = None
        elif isinstance(value, list) == several and all(
            isinstance(each, held) and isinstance(each, bool) == (one is bool) for each in parts
        ):
            found[part.name] = tuple(map(one, parts)) if several else one(value)
        else:
            raise InputError(
                f"{where} says that {part.name} is {value!r}, which it cannot be: mend that file."
            )
    return found


def outline(target: str) -> tuple[list[Parameter], str]:
    """Parameters and docstring of the function `module:name`, read from its source without importing it.

    A default or an annotation may use plain types and the module's own literals, nothing that it computes or imports.
    """
    import ast
    from importlib.util import find_spec

    module, _, name = target.partition(":")
    spec = find_spec(module)
    assert spec is not None, target
    assert spec.origin is not None, target
    known: dict[str, Any] = {kind.__name__: kind for kind in (Path, int, float, str, bool, tuple, list)}

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Name():
                return known[tree.id]
            case ast.Subscript():
                return value(tree.value)[value(tree.slice)]
            case ast.BinOp(op=ast.BitOr()):
                return value(tree.left) | value(tree.right)
            case ast.Tuple():
                return tuple(map(value, tree.elts))
        return ast.literal_eval(tree)

    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                known[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # computed
                continue
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            own = node.args
            defaults = [None] * len(own.args) + own.kw_defaults
            parameters = []
            for part, default in zip([*own.args, *own.kwonlyargs], defaults, strict=True):
                if part.arg == "engine":
                    continue
                assert part.annotation, f"{target}: {part.arg} has no type"
                kind = (
                    inspect.Parameter.KEYWORD_ONLY
                    if part in own.kwonlyargs
                    else inspect.Parameter.POSITIONAL_OR_KEYWORD
                )
                parameters.append(inspect.Parameter(
                    part.arg, kind, annotation=value(part.annotation),
                    default=inspect.Parameter.empty if default is None else value(default),
                ))  # fmt: skip
            return parameters, ast.get_docstring(node) or ""
    raise AssertionError(f"{target} is not there")


def read_doc(doc: str) -> tuple[str, dict[str, str]]:
    """What a docstring says before "Args:", and the text of each argument."""
    about, _, section = doc.partition("\nArgs:\n")
    told: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("     "):
            told[name] += f" {line.strip()}"
        elif line.startswith("    "):
            name, _, text = line.strip().partition(": ")
            told[name] = text
        else:
            break
    return about.rstrip(), told


def _for_tyro(part: Parameter, told: str) -> Any:
    """A parameter's type with its words of help. tyro looks into tuples and unions with typeguard, which takes it as
    long to import as all the rest takes; so tuples are told to it, and None comes first."""
    from typing import Annotated, Union

    from tyro.conf import FlagCreatePairsOff, Positional, arg
    from tyro.constructors import PrimitiveConstructorSpec

    kind: Any = _plain(part.annotation)
    if get_origin(kind) in (tuple, list):
        shape, part_of = get_origin(kind), get_args(kind)[0]
        several, metavar = kind != tuple[int, int], part_of.__name__.upper()
        metavar = f"[{metavar} ...]" if several else f"{metavar} {metavar}"
        kind = Annotated[object, PrimitiveConstructorSpec(
            nargs="*" if several else 2, metavar=metavar,
            instance_from_str=lambda words: shape(map(part_of, words)),
            is_instance=lambda it: it is None or isinstance(it, shape),
            str_from_instance=lambda it: [*map(str, it or ())],
        )]  # fmt: skip
    elif kind is not part.annotation:
        kind = Union[None, kind]  # noqa: UP007  (of this spelling tyro asks None first)
    if part.name.startswith("no_"):
        kind = Annotated[kind, FlagCreatePairsOff]  # there is no --no-no-model
    shown = part.default in (None, "", (), part.empty)
    kind = Annotated[kind, arg(help=told, help_behavior_hint="" if shown else None)]
    return Annotated[kind, Positional] if part.kind is part.POSITIONAL_ONLY else kind


def _plain(annotation: Any) -> Any:
    """The type without its `| None`."""
    if get_origin(annotation) is not UnionType:
        return annotation
    (kind,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    return kind


def _wrong(annotation: Any, values: list[str], name: str) -> str:
    """A sentence if words cannot be a value of that type, else nothing."""
    kind = _plain(annotation)
    if kind is bool or get_origin(kind) is list or kind == tuple[str, ...]:
        return ""
    wanted, number, count = {
        int: ("a whole number", int, 1),
        float: ("a number", float, 1),
        Path: ("a path", str, 1),
        tuple[int, int]: ("two whole numbers, such as 64 64", int, 2),
        tuple[int, ...]: ("whole numbers, such as 1 2 4", int, 1),
    }.get(kind, ("a value", str, 1))
    try:
        if [number(text) for text in values][count - 1 :]:
            return ""
    except ValueError:
        pass
    is_what = f"is {' '.join(values)!r}" if values else "has no value"
    return f"{name} {is_what}: give {wanted}."


def _flag(part: Parameter) -> str:
    return f"--{part.name.replace('_', '-')}"


def _is_flag(word: str) -> bool:
    """Whether a word names a flag, as `-3` does not."""
    return word.startswith("-") and not word[1:2].isdigit() and len(word) > 1


def asks_for_help(args: Sequence[str]) -> bool:
    return "-h" in args or "--help" in args


def did_you_mean(word: str, names: Iterable[str], otherwise: str) -> str:
    """The name that was probably meant, or all that there are."""
    close = nearest(word, names)
    return f"did you mean {close}?" if close else f"{otherwise} {', '.join(names)}."


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that a word is a slip of, if any: not one of another sense that shares some letters (count, out)."""
    from difflib import get_close_matches

    word, bare = word.lstrip("-"), {name.lstrip("-"): name for name in names}
    alike = [name for name in bare if name[:1] == word[:1]]
    close = get_close_matches(word, bare, n=1, cutoff=0.85) or get_close_matches(word, alike, n=1, cutoff=0.7)
    begun = [name for name in alike if len(name) > 2 and word.startswith(name)]  # output, for out
    return bare[[*close, *begun][0]] if close or begun else None
