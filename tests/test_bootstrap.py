"""The set-up program: it says what is wrong before it downloads anything, and removes nothing that it did not make."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    """The program as a module of its own."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(bootstrap: ModuleType, tmp_path: Path) -> Path:
    """A folder that the program noted as an environment of its own, in which nothing was installed yet."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    bootstrap.write_stamp(folder, made=str(folder))
    return folder


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=os.environ | variables, text=True, capture_output=True, check=False
    )


def test_an_old_python_gets_as_far_as_the_message_about_its_age() -> None:
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_help_explains_both_commands_and_shows_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "bootstrap.py run" in done.stdout
    assert "bootstrap.py test" in done.stdout


@pytest.mark.parametrize("budget", ["0", "-3", "long"])
def test_a_budget_that_is_no_number_of_seconds_is_refused(budget: str) -> None:
    done = run("run", f"--budget={budget}")
    assert done.returncode == 2
    assert repr(budget) in done.stderr


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    keep = tmp_path / "letter.txt"
    keep.write_text("dear", encoding="utf-8")
    done = run("run", "--venv", str(tmp_path))
    assert done.returncode == 1
    assert "did not make" in done.stderr
    assert keep.read_text(encoding="utf-8") == "dear"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "venv").touch()
    done = run("run", "--venv", str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "is a file" in done.stderr


def test_here_names_the_packages_that_are_missing(bootstrap: ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match="no_such_package"):
        bootstrap.running_python(["json", "no_such_package"])


def test_an_environment_made_to_its_end_is_used_again(bootstrap: ModuleType, made: Path) -> None:
    assert bootstrap.is_usable(made, bootstrap.read_stamp(made))


def test_a_moved_environment_is_made_anew(bootstrap: ModuleType, made: Path) -> None:
    moved = made.rename(made.with_name("elsewhere"))
    assert not bootstrap.is_usable(moved, bootstrap.read_stamp(moved))
    bootstrap.refuse_foreign(moved)


def test_an_environment_whose_python_is_gone_is_made_anew(bootstrap: ModuleType, made: Path) -> None:
    (made / "bin" / "python").unlink()
    (made / "bin" / "python").symlink_to(made / "no-such-python")
    assert not bootstrap.is_usable(made, bootstrap.read_stamp(made))


def test_an_environment_of_an_install_that_was_killed_is_made_anew(bootstrap: ModuleType, made: Path) -> None:
    bootstrap.write_stamp(made, installing=True)
    assert not bootstrap.is_usable(made, bootstrap.read_stamp(made))


def test_a_half_made_environment_is_made_anew(bootstrap: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    folder.mkdir()
    bootstrap.write_stamp(folder)
    bootstrap.refuse_foreign(folder)
    assert not bootstrap.is_usable(folder, bootstrap.read_stamp(folder))


def test_no_compiler_is_named_with_the_package_that_brings_one(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "apt install gcc" in bootstrap.compiler_problem()


def test_with_a_gpu_a_missing_compiler_stops_the_setup(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "compiler_problem", lambda: "no C compiler")
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    with pytest.raises(bootstrap.SetupError, match="no C compiler"):
        bootstrap.check_machine()


def test_a_failing_pip_shows_its_last_lines_and_a_hint(bootstrap: ModuleType, made: Path) -> None:
    says = "print('ERROR: No matching distribution found for torch==2.13.0'); raise SystemExit(1)"
    with pytest.raises(bootstrap.SetupError, match=r"(?s)installing failed.*torch==2\.13\.0.*another Python"):
        bootstrap._logged([sys.executable, "-c", says], made / "log", "installing")


def test_pips_own_settings_are_passed_on(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "file:///mirror")
    assert bootstrap.clean_variables()["PIP_INDEX_URL"] == "file:///mirror"


def test_run_installs_what_the_commands_of_the_readme_need(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras: list[str] = []

    def prepare(options: object, extra: str, uses: object) -> None:
        extras.extend(extra.split(","))
        raise bootstrap.SetupError("enough")

    monkeypatch.setattr(bootstrap, "check_machine", lambda: None)
    monkeypatch.setattr(bootstrap, "prepare", prepare)
    assert bootstrap.main(["run"]) == 1
    assert extras == ["plot", "samplers"]
