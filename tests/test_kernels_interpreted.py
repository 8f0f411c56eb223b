"""The Triton kernels under Triton's interpreter: a process for each form, because it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "interpreted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["parallel", "chunk", "fused_chunk", "fused_recurrent", "auto", "step", "step_buffered"]
)
def test_kernels_match_the_oracle_under_the_interpreter(form: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER), "--form", form]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
