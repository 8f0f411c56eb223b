"""NVIDIA's compute-sanitizer finds nothing in what is shipped, or in steps: no access astray, no race."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_hopper import needs_hopper

from generated import configuration
from tuning.problems import HOPPER

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
SCRIPT = Path(__file__).with_name("sanitized.py")
FOUND = 86  # the exit status by which the sanitizer tells of a finding
SECONDS = 500  # for one process, less than pytest gives a test
PARTS = 6  # of the configurations, each in a process of its own
WITHOUT = {"memcheck": "", "racecheck": HOPPER}  # see `test_racecheck_cannot_follow_groups_of_warps`
OURS = ("chunk", "parallel", "recurrent", "step")  # in the names of the kernels that it looks at

needs_sanitizer = pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit")


def test_every_kernel_is_looked_at() -> None:
    generated = Path(configuration.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in generated.rglob("*.py"))
    kernels = re.findall(r"jit\b[^@]*?\ndef (\w+)_kernel\(", text)
    assert len(kernels) >= 10
    assert "step" in kernels
    assert [name for name in kernels if not any(part in name for part in OURS)] == []


def sanitized(folder: Path, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script below the sanitizer with the packaged rules, each tensor in an allocation of its own.

    Triton's cache knows a kernel by its text, whatever name it is given: what is planted needs one of its own.
    """
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", str(FOUND)]
    for name in OURS:
        command += ["--kernel-name", f"kernel_substring={name}"]
    command += [sys.executable, str(SCRIPT), *arguments]
    places = {"RETGEN_CONFIG_DIR": str(folder), "XDG_CONFIG_HOME": str(folder)}
    if "--planted" in arguments:
        places["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment = {**os.environ, **places, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)


@pytest.mark.gpu
@pytest.mark.slow
@needs_sanitizer
@pytest.mark.parametrize("part", OURS)
def test_what_is_planted_is_found(part: str, tmp_path: Path) -> None:
    done = sanitized(tmp_path, "memcheck", "--planted", f"planted_{part}_kernel")
    assert done.returncode == FOUND
    assert "Invalid __global__ write of size 4 bytes" in done.stdout
    assert f"planted_{part}_kernel" in done.stdout


@pytest.mark.gpu
@pytest.mark.slow
@needs_sanitizer
@needs_hopper
def test_racecheck_cannot_follow_groups_of_warps(tmp_path: Path) -> None:
    """It finds races in a kernel that has none, where numbers are handed over as HOPPER's kernel hands them over.

    Once it does not, HOPPER is to be left in.
    """
    done = sanitized(tmp_path, "racecheck", "--handed")
    assert done.returncode == FOUND, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Race reported" in done.stdout


@pytest.mark.gpu
@pytest.mark.slow
@needs_sanitizer
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found_in_what_is_shipped(tool: str, part: int, tmp_path: Path) -> None:
    done = sanitized(tmp_path, tool, "--part", str(part), str(PARTS), "--without", WITHOUT[tool])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^[1-9]\d* configurations$", done.stdout, re.MULTILINE)
