"""NVIDIA's compute-sanitizer finds nothing in what is shipped: no access astray, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
SCRIPT = Path(__file__).with_name("sanitized.py")
FOUND = 86  # the exit status by which the sanitizer tells of a finding
PARTS = 6  # of the configurations, each in a process of its own

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit"),
]


def sanitized(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script below the sanitizer, each tensor in an allocation of its own."""
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_is_planted_is_found() -> None:
    done = sanitized("memcheck", "--planted")
    assert done.returncode == FOUND
    assert "Invalid __global__ write of size 4 bytes" in done.stdout
    assert "planted_kernel" in done.stdout


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found_in_what_is_shipped(tool: str, part: int) -> None:
    done = sanitized(tool, "--part", str(part), str(PARTS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert ", 0 failed" in done.stdout
    assert "0 errors" in done.stdout
