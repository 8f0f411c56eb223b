"""Turns what Jinja or Python raised into a message with the template's file, line and the lines around it."""

from __future__ import annotations

import traceback
from pathlib import Path

from jinja2 import TemplateNotFound, TemplateSyntaxError

from gen.errors import TemplateFaultError

_AROUND = 3
_MOST_CALLERS = 5


def template_fault(root: Path, template: str, error: Exception) -> TemplateFaultError:
    """Describe an error that `template`, or a file it imports, raised while it was loaded or rendered."""
    places = _places(root, error)
    if not places:
        return TemplateFaultError(f"{_label(root, template)}: {_message(root, error)}")
    (name, line), *callers = places
    text = f"{_label(root, name)}:{line}: {_message(root, error)}\n{excerpt(_read(root, name), line)}"
    for caller, number in callers[:_MOST_CALLERS]:
        text += f"\n  reached from {_label(root, caller)}:{number}\n{excerpt(_read(root, caller), number, around=0)}"
    return TemplateFaultError(text)


def python_fault(
    root: Path, output: str, body: str, traced: tuple[str, list[tuple[str, int] | None]], error: SyntaxError
) -> TemplateFaultError:
    """Describe emitted text that is not Python; `traced` is the text again, with each line's template line."""
    line = min(max(error.lineno or 1, 1), body.count("\n") + 1)
    emitted = f"  emitted as line {line} of {output} (before formatting):\n{excerpt(body, line)}"
    plain, origins = traced
    origin = origins[line - 1] if plain == body else None
    if origin is None:
        return TemplateFaultError(f"{output} is not valid Python: {error.msg}\n{emitted}")
    name, number = origin
    text = f"{_label(root, name)}:{number}: the emitted text is not valid Python: {error.msg}"
    return TemplateFaultError(f"{text}\n{excerpt(_read(root, name), number)}\n{emitted}")


def excerpt(text: str, line: int, around: int = _AROUND) -> str:
    """Return the numbered lines around `line` (from 1), which is marked with `>`."""
    lines = text.split("\n")
    first, last = max(line - around, 1), min(line + around, len(lines))
    shown = (f"  {'>' if n == line else ' '} {n:4} | {lines[n - 1]}".rstrip() for n in range(first, last + 1))
    return "\n".join(shown)


def _places(root: Path, error: Exception) -> list[tuple[str, int]]:
    """List template lines, innermost first: where the error is, then the lines that led there."""
    places: list[tuple[str, int]] = []
    if isinstance(error, TemplateSyntaxError) and error.name:
        places.append((error.name, error.lineno))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.lineno and path.is_relative_to(root):
            place = (path.relative_to(root).as_posix(), frame.lineno)
            places += [] if place in places else [place]
    return places


def _message(root: Path, error: Exception) -> str:
    if isinstance(error, TemplateNotFound):
        return f"{_label(root, str(error.name))} does not exist"
    return f"{error}" if str(error) else type(error).__name__


def _label(root: Path, name: str) -> str:
    return f"{root.name}/{name}"


def _read(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")
