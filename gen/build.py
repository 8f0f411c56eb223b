"""Text to files: compares what the templates give with an output directory, and writes what differs."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gen.errors import GenError
from gen.render import PROVENANCE

# Written by the tuner, or by Python itself: never read, compared or removed here.
_NOT_OURS = frozenset({"configs", "__pycache__"})


@dataclass(frozen=True)
class Drift:
    """How an output directory differs from the rendered files; paths are relative to it, with /."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    stale: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.missing or self.changed or self.stale)


def default_output() -> Path:
    """Return the directory of the committed output, beside this package."""
    return Path(__file__).resolve().parent.parent / "generated"


def compare(out: Path, files: Mapping[str, str]) -> Drift:
    """Compare the rendered files with the directory, byte for byte."""
    present = set(_python_files(out))
    wanted = sorted(files)
    return Drift(
        missing=tuple(name for name in wanted if name not in present),
        changed=tuple(n for n in wanted if n in present and (out / n).read_bytes() != files[n].encode()),
        stale=tuple(sorted(present - set(files))),
    )


def write(out: Path, files: Mapping[str, str], drift: Drift) -> None:
    """Write what is missing or changed and remove what is stale."""
    _refuse_foreign_directory(out)
    for name in (*drift.missing, *drift.changed):
        _replace(out / name, files[name].encode())
    for name in drift.stale:
        (out / name).unlink()
        _remove_if_empty((out / name).parent, out)


def describe(out: Path, files: Mapping[str, str], drift: Drift, command: str) -> str:
    """Explain a drift: a diff for each changed file, the other files' names, the causes and what to run."""
    named = sorted((*drift.missing, *drift.changed, *drift.stale))
    parts = [_diff(f"{out.name}/{name}", _present(out / name), files.get(name)) for name in named]
    parts += [f"missing: {name} (the templates give it, {out} lacks it)\n" for name in drift.missing]
    parts += [f"stale: {name} (no template gives it)\n" for name in drift.stale]
    return "".join(parts) + _causes(out, command)


def _present(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _causes(out: Path, command: str) -> str:
    return f"""
{out} is not what the templates give. Legitimate causes:
  * a template or the generator changed, and the output was not rebuilt;
  * a generated file was edited, added or removed by hand: make the change in the template instead;
  * another version of ruff or Jinja than constraints.txt pins (here: {_versions()}).
To put it right, run:
  {command}
"""


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("ruff", "jinja2"))


def _diff(name: str, present: bytes | None, wanted: str | None) -> str:
    before = (present or b"").decode("utf-8", errors="backslashreplace").splitlines(keepends=True)
    after = (wanted or "").splitlines(keepends=True)
    labels = (
        "/dev/null" if present is None else f"{name}\tpresent",
        "/dev/null" if wanted is None else f"{name}\tfrom the templates",
    )
    diff = list(difflib.unified_diff(before, after, *labels))
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff)


def _python_files(out: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(out):
        subfolders[:] = [name for name in subfolders if name not in _NOT_OURS]
        for name in names:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(out).as_posix()


def _refuse_foreign_directory(out: Path) -> None:
    """Keep `--out` from overwriting and removing somebody's own Python files."""
    if out == default_output() or _is_generated(out / "__init__.py"):
        return
    foreign = sorted(name for name in _python_files(out) if not _is_generated(out / name))
    if foreign:
        raise GenError(f"{out} holds Python files that are not generated, such as {foreign[0]}; name another directory")


def _is_generated(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PROVENANCE)) == PROVENANCE.encode()


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_if_empty(folder: Path, out: Path) -> None:
    """Remove a package that has no file left: Python would go on importing the empty folder."""
    if folder == out or any(entry.name != "__pycache__" for entry in folder.iterdir()):
        return
    shutil.rmtree(folder)
    _remove_if_empty(folder.parent, out)
