"""Importing `generated` is quick, leaves the GPU alone, and needs only torch, triton, yaml and the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 0.060
YARDSTICK_SECONDS = 0.017  # to parse argparse's source, on a processor that imports the package in 41 ms
IMPORT = """
import argparse, ast, inspect, json, sys, time
import torch, triton
before = {name.split(".")[0] for name in sys.modules}
started = time.process_time()
import generated
seconds = time.process_time() - started
source = inspect.getsource(argparse)
started = time.process_time()
ast.parse(source)
yardstick = time.process_time() - started
after = {name.split(".")[0] for name in sys.modules}
print(json.dumps({
    "seconds": seconds,
    "yardstick": yardstick,
    "modules": sorted(after - before - sys.stdlib_module_names),
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    """Import the package in six fresh processes, the first of which compiles it to bytecode; what the others report."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    reports = [subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, check=True) for _ in range(6)]
    return [json.loads(report.stdout) for report in reports[1:]]


def test_import_takes_under_60_ms_beyond_torch_and_triton(imports: list[dict[str, Any]]) -> None:
    # Time of this process on the processor: an import waits for nothing, and the machine may have more to do.
    # What other programs take of the processor itself comes on top, so the least counts, as in timeit; where they never
    # leave it alone, a yardstick takes longer in proportion.
    seconds, yardstick = (min(report[name] for report in imports) for name in ("seconds", "yardstick"))
    assert seconds < MOST_SECONDS * max(1.0, yardstick / YARDSTICK_SECONDS)


def test_import_brings_no_package_but_yaml(imports: list[dict[str, Any]]) -> None:
    # Cython's two modules are what the C part of yaml is made with.
    brought = {name for name in imports[0]["modules"] if not name.startswith(("_cython_", "cython_runtime"))}
    assert brought <= {"generated", "yaml", "_yaml"}


def test_import_does_not_initialise_cuda(imports: list[dict[str, Any]]) -> None:
    assert not any(report["cuda"] for report in imports)
