"""What holds for every test: no network, no hub, and, with `--shapes`, annotations checked at every call."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chat_server import Server

OFFLINE = Path(__file__).parent / "offline"

# The rooms whose functions take tensors, annotated without names that only a type checker imports.
SHAPED = ["nn", "processes", "objectives", "samplers", "codecs", "encoders", "backbones"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes", action="store_true", help="check annotations at run time (jaxtyping with beartype)"
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MPLBACKEND"] = "agg"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(OFFLINE), os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, str(OFFLINE))
    # A child interpreter has it already; elsewhere the distribution's own file of this name may be in the way.
    if not hasattr(sys.modules.get("sitecustomize"), "NetworkRefused"):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        assert not any(name.startswith("reverie") for name in sys.modules), (
            "reverie was imported before its hook"
        )
        install_import_hook([f"reverie.{room}" for room in SHAPED], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def fp32() -> Iterator[None]:
    """What a run does by itself where the processor has no bf16, so that figures are the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reverie.train.precision.cpu_has_bf16", lambda: False)
        yield


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("REVERIE_CHAT_KEY", raising=False)
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()
