"""The built wheel, installed into an empty environment, runs with no checkout in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIRST_CALL = """
import torch
from generated import chunk_retention

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, 100, 2, 32, device=device, requires_grad=True) for _ in range(3))
o, state = chunk_retention(q, k, v, output_final_state=True)
(o.sum() + state.sum()).backward()
assert o.shape == v.shape and state.shape == (1, 2, 32, 32)
assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    pytest.importorskip("hatchling", reason="the test extra is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    return next(folder.glob("retgen-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment, with what it asks for; return that environment's Python."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    options = ["--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder / "bin" / "python"


def run(python: Path, cwd: Path, *arguments: str) -> str:
    """Run the installed Python far from the checkout and without the user's configurations; return its output."""
    away = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RETGEN", "TRITON"))}
    away["XDG_CONFIG_HOME"] = str(cwd / "config")
    away["TRITON_CACHE_DIR"] = str(cwd / "cache")
    done = subprocess.run([python, *arguments], cwd=cwd, env=away, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """The wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tree(folder: str, pattern: str) -> dict[str, bytes]:
    """Files below a folder of the checkout, by their path from it."""
    base = ROOT / folder
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob(pattern) if path.is_file()}


def below(files: dict[str, bytes], prefix: str, suffix: str) -> dict[str, bytes]:
    """The wheel's files below a folder, by their path from it."""
    return {n.removeprefix(prefix): text for n, text in files.items() if n.startswith(prefix) and n.endswith(suffix)}


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}
    assert tops == {"gen", "generated", "tuning", "retgen-0.1.0.dist-info"}


def test_wheel_holds_the_trees_generated_files_configurations_and_templates(wheel: Path) -> None:
    files = contents(wheel)
    configurations = {n: t for n, t in tree("generated/configs", "*.yaml").items() if not n.endswith(".modelled.yaml")}
    assert below(files, "generated/configs/", ".yaml") == configurations
    assert below(files, "generated/", ".py") == tree("generated", "*.py")
    assert below(files, "gen/templates/", ".jinja") == tree("templates", "*.jinja")


def test_wheel_carries_the_license(wheel: Path) -> None:
    assert contents(wheel)["retgen-0.1.0.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
@pytest.mark.network
def test_operators_gen_and_tuning_run_from_the_installed_wheel(python: Path, tmp_path: Path) -> None:
    """One test, because the environment takes long to make."""
    run(python, tmp_path, "-W", "error", "-c", FIRST_CALL)
    where = run(python, tmp_path, "-c", "import generated; print(generated.__file__)").strip()
    assert Path(where).is_relative_to(python.parent.parent)

    assert "retention/chunk.py" in run(python, tmp_path, "-m", "gen", "list")
    run(python, tmp_path, "-m", "gen", "build", "--check")

    out = tmp_path / "rules.yaml"
    workload = ("--workload", "small", "--form", "fused_chunk")
    run(python, tmp_path, "-m", "tuning", "run", "--budget", "20", *workload, "--out", str(out))
    assert "retention_fused_chunk" in out.read_text(encoding="utf-8")
    read = f"from generated.configuration import parse_file; from pathlib import Path; parse_file(Path({str(out)!r}))"
    run(python, tmp_path, "-c", read)
