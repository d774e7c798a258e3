"""The house itself: who imports whom, what is depended on, what an import costs, and that no test goes online."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "reverie"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")[
    :-1
]

# Below these versions a CVE is known that concerns us (the file and the number stand in pyproject.toml).
FLOORS = {
    "torch": (2, 6),
    "pillow": (12, 3),
    "pyarrow": (17, 0),
    "diffusers": (0, 38),
    "ray": (2, 55),
    "transformers": (5, 0),
}
# Packages whose published versions carried malware, or that nothing may need (stale, copyleft, no CPU build).
BANNED = {
    "lightning",
    "pytorch-lightning",
    "litellm",
    "ultralytics",
    "albumentationsx",
    "decord",
    "torchvision",
}


def name_and_floor(requirement: str) -> tuple[str, tuple[int, ...]]:
    found = re.match(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?", requirement)
    assert found, requirement
    return found[1], tuple(int(part) for part in (found[2] or "").split(".") if part)


def locked(file: str) -> dict[str, list[str]]:
    """Name -> its pinned versions (one for each range of Python versions)."""
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE
    ):
        pins.setdefault(name, []).append(version)
    return pins


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print('MODULES', *sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


# ---------------------------------------------------------------- supply chain


def test_base_dependencies_are_few_and_above_their_cves():
    base = [name_and_floor(line) for line in PROJECT["project"]["dependencies"]]
    extras = [
        name_and_floor(line)
        for lines in PROJECT["project"]["optional-dependencies"].values()
        for line in lines
    ]
    assert len(base) <= 12
    floors = dict(base + extras)
    for name, floor in FLOORS.items():
        assert floors[name] >= floor, f"{name} needs at least {floor}"
    assert all(floor for name, floor in base), "every base dependency has a floor"


def test_a_system_is_there_without_the_compiler():
    """sympy comes with torch's compiler, whose import takes many times as long as drawing a picture."""
    assert "sympy" not in modules_after(
        "import reverie.systems.sora, reverie.systems.clip, reverie.systems.wan"
    )


def test_every_import_is_declared():
    """What the package imports is among its own dependencies, not merely there because something else needs it."""
    own = {"PIL": "pillow", "resvg_py": "resvg-py", "faiss": "faiss-cpu", "reverie": "reverie"}
    groups = PROJECT["project"]["optional-dependencies"]
    declared = {name_and_floor(line)[0] for line in PROJECT["project"]["dependencies"]}
    extras = {
        name_and_floor(line)[0]
        for name in ("video", "track", "stickers", "index", "remote", "ray", "interop")
        for line in groups[name]
    }
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    foreign = {own.get(name, name) for name in found - sys.stdlib_module_names} - {"reverie"}
    assert foreign <= declared | extras
    assert declared <= foreign, "a dependency that nothing imports"


@pytest.mark.parametrize("file", ["lock.txt", "lock-dev.txt"])
def test_lock_is_hashed_hostless_and_above_the_floors(file):
    text = (ROOT / "requirements" / file).read_text()
    assert "://" not in text
    assert "--index-url" not in text
    assert "--find-links" not in text
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 30
    assert all("--hash=sha256:" in entry for entry in entries)
    pins = locked(file)
    assert "torch" not in pins
    assert not pins.keys() & BANNED
    for name, floor in FLOORS.items():
        for version in pins.get(name, []):
            assert tuple(int(part) for part in version.split(".")[:2]) >= floor


def test_locks_agree_and_cover_every_dependency():
    base, dev = locked("lock.txt"), locked("lock-dev.txt")
    assert base.items() <= dev.items()
    wanted = {name_and_floor(line)[0] for line in PROJECT["project"]["dependencies"]} - {"torch"}
    assert wanted <= base.keys()
    extras = {
        name_and_floor(line)[0]
        for lines in PROJECT["project"]["optional-dependencies"].values()
        for line in lines
    }
    assert extras - {"reverie"} <= dev.keys()


def test_the_lock_holds_all_that_torch_needs():
    from importlib.metadata import requires, version

    pinned = (ROOT / "requirements" / "torch.txt").read_text().split("==")[1].strip()
    assert version("torch").split("+")[0] == pinned
    if "+cpu" in version("torch"):  # other builds bring their own pinned accelerator libraries
        needs = {
            re.match(r"[\w.-]+", line)[0].lower() for line in requires("torch") if "extra ==" not in line
        }
        assert needs <= locked("lock.txt").keys()


def test_no_registry_host_and_no_address_of_a_machine_is_in_the_set_up():
    for name in (
        "Makefile",
        "pyproject.toml",
        ".ci/run",
        "requirements/install",
        "requirements/lock",
        "requirements/sbom",
    ):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|--index-url|--extra-index-url|--find-links", text), name


def test_the_set_up_says_what_python_it_needs(tmp_path):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    done = subprocess.run(
        [tmp_path / "requirements" / "install", "requirements/lock.txt"],
        env=os.environ | {"PYTHON": "false"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Python 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


# ---------------------------------------------------------------- imports


def test_layers():
    """A contract that no file can break unseen: import-linter lists every module of the package."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_only_the_upper_floors_use_the_public_face():
    """The layers cannot see through `import reverie`, which leads to the catalogue."""
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in ("recipes", "__init__.py", "cli.py", "serve"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "reverie" not in [alias.name for alias in node.names], path
            elif isinstance(node, ast.ImportFrom) and node.module == "reverie":
                assert not {alias.name for alias in node.names} & {"load", "save", "catalog"}, path


def test_help_and_import_are_light():
    heavy = {"torch", "numpy", "matplotlib", "pyarrow", "PIL", "tokenizers", "safetensors", "av"}
    assert not modules_after("import reverie") & heavy
    assert not modules_after("import reverie.cli; reverie.cli.main(['--help'])") & (heavy | {"rich"})
    slow = heavy | {"rich", "typeguard", "asyncio", "unittest"}  # typeguard takes as long as all the rest
    every = (
        "from reverie.cli import COMMANDS, main; from reverie.catalog import RECIPES\n"
        "for name in (*COMMANDS, *(f'train {name}' for name in RECIPES)): main([*name.split(), '--help'])\n"
        "main(['train', 'clip-tiny', 'x', '--steps', 'many']); main(['train', 'none', 'x'])"
    )
    assert not modules_after(every) & slow


def test_nothing_speaks_to_the_network():
    """Nothing calls home. The sticker corpus is fetched by the package clients, which are programs of their own.

    chat.py alone may, since a person names the endpoint that it asks.
    """
    speaking = {
        "socket",
        "ssl",
        "http",
        "urllib.request",
        "ftplib",
        "smtplib",
        "requests",
        "httpx",
        "huggingface_hub",
    }
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            if path != SOURCE / "chat.py":
                assert not names & speaking, f"{path} imports {names & speaking}"


def test_randomness_is_keyed():
    """No draw from a global state: every generator is seeded through rng.py (design: one source of randomness)."""
    keyed = {"Generator", "PCG64", "Philox", "default_rng"}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "random" not in [alias.name for alias in node.names], f"{path} imports random"
            elif isinstance(node, ast.ImportFrom):
                assert node.module != "random" or [alias.name for alias in node.names] == ["Random"], (
                    f"{path}: random"
                )
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
                assert node.attr in keyed, f"{path} draws from numpy's global state: {ast.unparse(node)}"


# ---------------------------------------------------------------- no network


def test_tests_have_no_network():
    from sitecustomize import NetworkRefused

    with pytest.raises(NetworkRefused):
        socket.getaddrinfo("example.invalid", 80)
    with socket.socket() as tcp, pytest.raises(NetworkRefused):
        tcp.connect(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(NetworkRefused):
        udp.sendto(b"", ("192.0.2.1", 80))


def test_children_of_tests_have_no_network():
    done = subprocess.run(
        [sys.executable, "-c", "import socket; socket.getaddrinfo('example.invalid', 80)"],
        capture_output=True,
        text=True,
    )
    assert "NetworkRefused" in done.stderr


# ---------------------------------------------------------------- the papers of the house


def test_the_map_names_every_module():
    """ARCHITECTURE.md has one line for each module and names none that is gone."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE))
    present = {
        path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py"
    }
    assert listed == present, f"add {sorted(present - listed)}, remove {sorted(listed - present)}"


def test_links_between_our_papers_lead_somewhere():
    for paper in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", paper.read_text()):
            assert (paper.parent / target).exists(), f"{paper.name} points to {target}"


def prose(paper: Path) -> str:
    """What is no code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", paper.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(paper: Path) -> set[str]:
    """What GitHub calls the headings of a paper: in small letters, spaces as dashes, repeated ones numbered."""
    text = re.sub(r"^```.*?^```", "", paper.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?)[ #]*$", text, re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        twins = (name, *(f"{name}-{i}" for i in range(1, 100)))
        found.add(next(twin for twin in twins if twin not in found))
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def test_every_picture_and_every_anchor_of_the_docs_is_there():
    docs = ROOT / "docs"
    papers = [*ROOT.glob("*.md"), *docs.glob("*.md"), *(docs / "systems").glob("*.md")]
    assert len(papers) > 10
    missing, seen = [], 0
    for paper in papers:
        links = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)(?: \"[^\"]*\")?\)", prose(paper))
        links += re.findall(r"<img [^>]*src=\"(?!https?:)([^\"]+)\"", prose(paper))
        for link in links:
            name, _, anchor = link.partition("#")
            target = paper.parent / name if name else paper
            there = target.exists()
            if there and anchor and target.suffix == ".md":
                there, seen = anchor in anchors(target), seen + 1
            if not there:
                missing.append(f"{paper.relative_to(ROOT)}: {link}")
    assert seen, "no anchor was looked up"
    assert not missing, "\n".join(missing)


def test_commands_in_our_papers_exist():
    from reverie.cli import COMMANDS

    known = {*COMMANDS, *(name.partition(" ")[0] for name in COMMANDS)}
    for paper in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for first, second in re.findall(
            r"(?:^|`)reverie ([a-z]+)(?: ([a-z-]+))?", paper.read_text(), re.MULTILINE
        ):
            assert first in known, f"{paper.name}: reverie {first}"
            if first in ("data", "eval") and second:
                assert f"{first} {second}" in known, f"{paper.name}: reverie {first} {second}"


def test_the_shipped_weights_match_their_sums():
    from reverie.doctor import SHIPPED, SUMS, shipped

    findings = [*shipped()]
    assert findings
    assert not [finding for finding in findings if finding.state != "ok"]
    sealed = {line.split(maxsplit=1)[1] for line in (SHIPPED / SUMS).read_text().splitlines()}
    files = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*") if path.is_file()}
    assert sealed == files - {SUMS, "__init__.py"}
