"""`python -m tuning record`: run a program and write down the shapes that it gives the kernels."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tuning.rules import check_writable, write_whole
from tuning.run import RunError
from tuning.workloads import Workload, WorkloadError, parse

VARIABLE = "RETGEN_RECORD"  # read by generated/launch.py


def record(options: argparse.Namespace, console: Console) -> int:
    """Run the program, write what it used, and return the program's exit status (1 if it used nothing)."""
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    path = Path(options.out)
    if not program:
        raise RunError("nothing to run: python -m tuning record -- python train.py")
    if path.suffix not in (".yaml", ".yml"):
        raise RunError(f"--out {path}: must end in .yaml or .yml")
    if path.exists():
        raise RunError(f"{path} is there already: give another file with --out")
    check_writable(path)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "shapes"
        try:
            status = _run(program, os.environ | {VARIABLE: str(lines)})
        except OSError as error:
            raise RunError(f"{program[0]} cannot be run: {error.strerror}") from error
        found = workloads(lines.read_text(encoding="utf-8").splitlines() if lines.exists() else [])
    if not found:
        console.print("no kernel was launched, so that no shape was seen; on the CPU PyTorch code runs in their place")
        return status or 1
    shapes = {_name(w): {axis: getattr(w, axis) for axis in "BTHKV"} | {"dtype": w.dtype} for w in found}
    write_whole(path, yaml.safe_dump({"recorded": shapes}, sort_keys=False))
    console.print(_table(found))
    console.print(escape(f"wrote {path}; python -m tuning run --workload {path} tunes for it"), soft_wrap=True)
    return status


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


def workloads(lines: list[str]) -> list[Workload]:
    """The shapes in the order in which they were first seen; a gradient's sweep, K and V exchanged, is no other one."""
    seen: dict[object, Workload] = {}
    for workload in (found for line in dict.fromkeys(lines) for found in _parsed(line)):
        widths = frozenset((workload.K, workload.V))
        seen.setdefault((workload.B, workload.T, workload.H, widths, workload.dtype), workload)
    return list(seen.values())


def _parsed(line: str) -> list[Workload]:
    """The line's workload; none where it is one that no tuner takes, or was not written to its end."""
    try:
        return parse([line])
    except WorkloadError:
        return []


def _name(workload: Workload) -> str:
    return "_".join([*(f"{axis}{getattr(workload, axis)}" for axis in "BTHKV"), workload.dtype])


def _table(found: list[Workload]) -> Table:
    table = Table(*"BTHKV", "dtype")
    for workload in found:
        table.add_row(*(str(getattr(workload, axis)) for axis in "BTHKV"), workload.dtype)
    return table
