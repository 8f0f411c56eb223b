"""The Triton kernels under Triton's interpreter: processes for each form, because it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "interpreted"
PARTS = 3  # of a form's tests, so that no process takes minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["parallel", "chunk", "fused_chunk", "fused_recurrent", "auto", "step", "step_buffered"]
)
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_match_the_oracle_under_the_interpreter(part: int, form: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER), "--form", form]
    command += ["--part", str(part), str(PARTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
