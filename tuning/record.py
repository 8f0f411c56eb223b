"""`python -m tuning record`: run a program and write down the shapes that it gives the kernels."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated.launch import has_aligned_rows
from tuning.problems import STEP_FORMS, problems_of
from tuning.rules import check_writable, write_whole
from tuning.run import RunError
from tuning.workloads import Workload, WorkloadError, parse_shape, read

VARIABLE = "RETGEN_RECORD"  # read by generated/launch.py


def record(options: argparse.Namespace, console: Console) -> int:
    """Run the program, write what it used, and return the program's exit status (1 if it used nothing)."""
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    path = Path(options.out)
    if not program:
        raise RunError("nothing to run: python -m tuning record -- python train.py")
    if path.suffix not in (".yaml", ".yml"):
        raise RunError(f"--out {path}: must end in .yaml or .yml")
    if path.exists() and not options.append:
        raise RunError(f"{path} is there already: give another file with --out, or --append")
    check_writable(path)
    known = read(path) if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "shapes"
        try:
            status = _run(program, os.environ | {VARIABLE: str(lines)})
        except OSError as error:
            raise RunError(f"{program[0]} cannot be run: {error.strerror}") from error
        found, refused = shapes(lines.read_text(encoding="utf-8").splitlines() if lines.exists() else [])
    for reason in refused:
        console.print(escape(f"not for tuning: {reason}"), soft_wrap=True)
    if not found:
        console.print("no shape was seen that can be tuned: the program ran no operator of generated, or none of those")
        return status or 1
    console.print(_table(found))
    _write(path, found, known, console)
    return status


def _write(path: Path, found: dict[Workload, int], known: list[Workload], console: Console) -> None:
    """Write what can be tuned and is not known, below what the file holds; all else of it stays."""
    held = {_key(workload) for workload in known}
    new = {one: longest for one, longest in found.items() if not _why_not(one) and _key(one) not in held}
    if not new:
        console.print(escape(f"nothing to write to {path}: what can be tuned is there, or there is nothing"))
        return
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n" if known else ""
    names = (f"recorded{number}".removesuffix("1") for number in count(1))
    group = next(name for name in names if f"\n{name}:" not in f"\n{before}")
    lines = [f"{group}:", *(_line(workload, longest) for workload, longest in new.items())]
    write_whole(path, before + "\n".join(lines) + "\n", readable=read)
    console.print(escape(f"wrote {path}; python -m tuning run --workload {path} tunes for it"), soft_wrap=True)


def _line(workload: Workload, longest: int) -> str:
    axes = ("B", "T", "H", "K", "V", "dtype", *(["form"] if workload.form else []))
    shape = ", ".join(f"{axis}: {getattr(workload, axis)}" for axis in axes)
    note = f"  # packed: T is the mean length, the longest is {longest}" if longest > workload.T else ""
    return f"  {_name(workload)}: {{{shape}}}{note}"


def _why_not(workload: Workload) -> str:
    """Why no rule is made for it, or nothing."""
    if not has_aligned_rows(workload.torch_dtype, workload.K, workload.V):
        return "odd K or V in 16 bits: runs the defaults, is not tuned"
    problems = [p for part in STEP_FORMS.get(workload.form, ()) for p in problems_of(workload, part)]
    if problems and not any(problem.is_tuned for problem in problems):
        return "several tokens: runs the default, is not tuned"
    return ""


def _run(program: list[str], environment: dict[str, str]) -> int:
    """Run it to its own end: Ctrl-C reaches it without us, and a request to end is passed on."""
    process = subprocess.Popen(program, env=environment)
    handlers: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status  # as a shell says that a signal ended it


def shapes(lines: list[str]) -> tuple[dict[Workload, int], list[str]]:
    """The shapes in the order in which they were first seen, each with its longest sequence, and why others are none.

    T is the mean of packed sequences, by which rules are chosen. A gradient's sweep, K and V exchanged, is not another.
    """
    seen: dict[object, tuple[Workload, int]] = {}
    refused = []
    for line in dict.fromkeys(lines):
        text, whole, longest = line.partition(",longest=")
        if not whole or not longest.isdecimal():  # the program was ended while it wrote
            continue
        try:
            workload = parse_shape(text)
        except WorkloadError as error:
            refused.append(str(error))
            continue
        first, most = seen.get(_key(workload), (workload, 0))
        seen[_key(workload)] = first, max(most, int(longest))
    return dict(seen.values()), refused


def _key(workload: Workload) -> object:
    both = (workload.K, workload.V)
    widths = both if workload.form else frozenset(both)
    return workload.B, workload.T, workload.H, widths, workload.dtype, workload.form


def _name(workload: Workload) -> str:
    sizes = (f"{axis}{getattr(workload, axis)}" for axis in "BTHKV")
    return "_".join(filter(None, [*sizes, workload.dtype, workload.form]))


def _table(found: dict[Workload, int]) -> Table:
    table = Table(*"BTHKV", "dtype", "")
    for workload, longest in found.items():
        notes = [why] if (why := _why_not(workload)) else []
        notes += [f"{workload.form} alone"] if workload.form else []
        notes += [f"packed: mean T, longest {longest}"] if longest > workload.T else []
        table.add_row(*(str(getattr(workload, axis)) for axis in "BTHKV"), workload.dtype, "; ".join(notes))
    return table
