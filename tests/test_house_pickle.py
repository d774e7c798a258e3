"""R11: no source of Reverie can run what a file says. One module may call `torch.load`; nothing may import pickle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "reverie"
CONVERTER = "weights/convert.py"
ALLOWED = {
    CONVERTER: {"uses torch.load"},
    # The names of our own dependencies, from the installed package's metadata, to see whether they can be imported.
    "doctor.py": {"imports what is computed: importlib.import_module(IMPORTS.get(need.name, need.name))"},
    # A literal table, as `test_recipes_are_named_in_a_literal_table` holds.
    "catalog.py": {"imports what is computed: import_module(module)"},
}

MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle",
    "yaml.unsafe_load", "torch.hub", "torch.package", "torch.jit", "imp", "runpy", "code", "pty",
}  # fmt: skip
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "pd.read_pickle",
    "builtins.eval", "builtins.exec", "torch.serialization.load", "torch.serialization.add_safe_globals",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
SWITCHES = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def full_name(node: ast.AST, aliases: dict[str, str]) -> str:
    """`t.load` -> "torch.load" after `import torch as t`; "" for what is no plain dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def findings(text: str) -> Iterator[str]:
    """What in a source could run what it was not written to run."""
    tree = ast.parse(text)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if alias.name in MODULES:
                    yield f"imports {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = name
                if node.module in MODULES or name in MODULES or name in CALLS:
                    yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := full_name(node, aliases)) in CALLS | MODULES:
            yield f"uses {name}"
        if isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            yield f"uses {node.id}"
        if isinstance(node, ast.Attribute) and node.attr == "__reduce__":
            yield "uses __reduce__"
        if isinstance(node, ast.Call):
            name = full_name(node.func, aliases)
            for keyword in node.keywords:
                wanted = SWITCHES.get(keyword.arg or "")
                # A value that is computed could be the forbidden one.
                harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value != wanted
                if wanted is not None and not harmless:
                    yield f"{name}({keyword.arg}={ast.unparse(keyword.value)})"
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if name.endswith("import_module") and not literal:
                yield f"imports what is computed: {ast.unparse(node)}"
            if name == "getattr" and (owner := full_name(node.args[0], aliases)) in (
                "torch",
                "os",
                "builtins",
            ):
                word = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                if word is None or f"{owner}.{word}" in CALLS | {f"builtins.{each}" for each in BUILTINS}:
                    yield f"reaches into a module: {ast.unparse(node)}"


FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_what_a_file_says(file):
    assert not set(findings((SOURCE / file).read_text())) - ALLOWED.get(file, set())


def test_recipes_are_named_in_a_literal_table():
    tree = ast.parse((SOURCE / "catalog.py").read_text())
    [table] = [
        node
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RECIPES"
    ]
    assert all(name.startswith("reverie.recipes.") for name in ast.literal_eval(table.value).values())


def test_the_one_load_is_weights_only():
    loads = [
        node
        for node in ast.walk(ast.parse((SOURCE / CONVERTER).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(loads) == 1
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in loads[0].keywords}[
        "weights_only"
    ] == "True"


BAD = [
    "import pickle",
    "import pickle as p",
    "from pickle import loads",
    "def f():\n    import dill",
    "import torch\ntorch.load('x')",
    "import torch as t\nt.load('x', weights_only=True)",
    "from torch import load",
    "from torch import load as fetch",
    "import torch\nf = torch.load",
    "import torch\ngetattr(torch, 'lo' + 'ad')('x')",
    "import torch\ngetattr(torch, 'load')('x')",
    "import torch\ntorch.save({}, 'x')",
    "import torch\ntorch.jit.load('x')",
    "from torch import jit",
    "from torch.hub import load",
    "import yaml\nyaml.load(text)",
    "from yaml import unsafe_load",
    "eval('1')",
    "f = exec",
    "__import__(name)",
    "import importlib\nimportlib.import_module(name)",
    "from importlib import import_module\nimport_module(f'reverie.{name}')",
    "import os\nos.system('x')",
    "from os import system",
    "import subprocess\nsubprocess.run('x', shell=True)",
    "import subprocess\nsubprocess.run('x', shell=flag)",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "x.load('x', weights_only=False)",
    "class A:\n    def f(self):\n        return self.__reduce__()",
]


@pytest.mark.parametrize("text", BAD)
def test_the_rule_sees_each_way(text):
    assert list(findings(text))


def test_the_rule_lets_honest_code_be():
    honest = """
import importlib, json, subprocess, torch
import numpy as np
model.eval()
json.load(open("x"))
re.compile("x")
subprocess.run(["x"], shell=False)
np.load("x", allow_pickle=False)
importlib.import_module("reverie.codecs")
getattr(system, "tokenizer", None)
import os
getattr(os, "O_BINARY", 0)
"""
    assert not list(findings(honest))
