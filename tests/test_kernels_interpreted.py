"""The Triton kernels under Triton's interpreter: processes for each form, because it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "interpreted"
# Of how many processes each form's tests are, so that none takes minutes, nor most of its time to begin.
PARTS = {
    "chunk": 3,
    "fused_chunk": 2,
    "auto": 1,
    "step": 1,
    "step_buffered": 2,
    "fused_recurrent": 1,
    "parallel": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "part"), [(form, part) for form, parts in PARTS.items() for part in range(parts)])
def test_kernels_match_the_oracle_under_the_interpreter(form: str, part: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER), "--form", form]
    command += ["--part", str(part), str(PARTS[form])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
