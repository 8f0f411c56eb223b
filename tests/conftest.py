"""What all tests share: where GPU tests run, and where the interpreter's do."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import poisoned_memory as poison

from generated import configuration

# Triton reads TRITON_INTERPRET where it decorates a kernel: those tests have processes of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker also where pyproject.toml is not read, and compute on one thread.

    The tests' tensors are small: on a busy machine, threads that wait for each other are ten times slower than one.
    Ctrl-C is to end what the tests start, wherever they run.
    """
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("COLUMNS", None)  # of the terminal that the tests run in: tables are to be as wide as in a file
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, that no process is left alone with it; skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, to tests in other processes: what one test cached would otherwise be kept by its process."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what is allocated without a value with NaN during a test."""
    with poison():
        yield


@pytest.fixture
def measures_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Wait for the other tests that ask for this, in other processes of the same run: of all that measure, one may."""
    with (tmp_path_factory.getbasetemp().parent / "measures-alone.lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def only_this_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Configurations come from an empty directory, for a GPU that is pretended."""
    with monkeypatch.context() as patch:
        patch.setenv("RETGEN_CONFIG_DIR", str(tmp_path))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
        patch.setattr(configuration, "packaged_directory", lambda: tmp_path / "no package")
        patch.setattr(configuration, "identify", lambda device: configuration.Gpu("Pretended", "sm90"))
        yield tmp_path
    configuration.reload()
