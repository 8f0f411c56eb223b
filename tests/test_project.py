"""The project as a whole: linted, formatted, typed, pinned, and its README's commands are those that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tuning.compilation import ARCHS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str) -> None:
    """Run a module of this Python in the project's folder; fail with its output unless it succeeds."""
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"


def requirements() -> list[str]:
    """Every requirement that the project names, extras included."""
    project = PYPROJECT["project"]
    extras = (name for extra in project["optional-dependencies"].values() for name in extra)
    return [name for name in (*project["dependencies"], *extras) if not name.startswith(f"{project['name']}[")]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> set[str]:
    """The names that constraints.txt pins to one version."""
    return {normal(name) for name in re.findall(r"^([\w.-]+)==", CONSTRAINTS, re.MULTILINE)}


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    run("ruff", "format", "--no-cache", "--check", ".")


def test_mypy_finds_nothing() -> None:
    pytest.importorskip("mypy", reason="the test extra is not installed")
    run("mypy")


def test_generated_is_what_the_templates_give() -> None:
    run("gen", "build", "--check")


@pytest.mark.parametrize("requirement", requirements())
def test_constraints_pin_every_requirement(requirement: str) -> None:
    assert normal(re.split(r"[^\w.-]", requirement)[0]) in pinned()


def test_constraints_hold_one_version_a_line_and_no_local_build() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    odd = [line for line in lines if not re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', line)]
    assert not odd


@pytest.mark.parametrize("command", ["python3 bootstrap.py run", "python3 bootstrap.py test"])
def test_readme_gives_each_of_the_two_commands_in_a_block_of_its_own(command: str) -> None:
    assert f"```sh\n{command}\n```" in README


def test_readme_says_of_every_architecture_whether_it_ran() -> None:
    versions = README.partition("## Versions")[2].partition("\n## ")[0]
    assert [arch for arch in ARCHS if arch not in versions] == []


def test_ci_calls_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert "python3 bootstrap.py test " in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111 == 0o111
