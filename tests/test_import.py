"""Importing `generated` is quick, does not touch the GPU, and needs torch, triton, yaml and the standard library alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 0.060
IMPORT = """
import json, sys, time
import torch, triton
before = {name.split(".")[0] for name in sys.modules}
started = time.perf_counter()
import generated
seconds = time.perf_counter() - started
after = {name.split(".")[0] for name in sys.modules}
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(after - before - sys.stdlib_module_names),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def import_once() -> dict[str, Any]:
    """Import the package in a fresh process; return what it cost and brought."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def test_import_takes_under_60_ms_beyond_torch_and_triton() -> None:
    # Other programs on the machine only ever add, so the quickest of a few tells what the import itself takes.
    seconds = [import_once()["seconds"] for _ in range(5)]
    assert min(seconds) < MOST_SECONDS, seconds


def test_import_brings_no_package_but_yaml() -> None:
    assert set(import_once()["modules"]) <= {"generated", "yaml", "_yaml"}


def test_import_does_not_initialise_cuda() -> None:
    assert import_once()["cuda"] is False
