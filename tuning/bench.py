"""`python -m tuning bench`: the forms over the workloads, against the floor, the default configuration and fla."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

import generated
from generated.configuration import defaults_only
from tuning.measurement import describe_gpu, gpu_present, time_calls
from tuning.workloads import Workload, parse

FORMS = ("fused_chunk", "chunk", "parallel", "fused_recurrent", "naive", "auto")
BUDGET_MS = 300.0


@dataclass(frozen=True)
class Row:
    """One form at one workload: median milliseconds and quartile spread; memory above the inputs, in MiB."""

    workload: str
    shape: str
    form: str
    variant: str
    forward_ms: float
    forward_spread: float
    both_ms: float
    both_spread: float
    peak_mb: float
    floor_forward_ms: float
    floor_both_ms: float


def bench(options: argparse.Namespace, console: Console) -> int:
    """Time what the options select and print a table."""
    if not gpu_present():
        console.print("bench times kernels on a GPU, and this machine shows none; `python -m tuning run` can model one")
        return 1
    gpu = describe_gpu()
    peer = None if options.no_fla else _fla()
    console.print(
        escape(
            f"{gpu.name}, driver {gpu.driver}, torch {torch.__version__}, triton {version('triton')}, "
            f"fla {peer.version if peer else 'not installed or left out'}; medians, L2 flushed before each call"
        )
    )
    jobs = [(w, f) for w in parse(options.workload) for f in (options.form or FORMS)]
    rows = [
        row for job in track(jobs, console=console) for row in _rows(*job, peer, with_default=not options.no_default)
    ]
    console.print(_table(rows))
    if options.json:
        found = {
            "gpu": asdict(gpu),
            "torch": torch.__version__,
            "triton": version("triton"),
            "fla": peer.version if peer else None,
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Peer:
    """fla's operators by form."""

    version: str
    functions: dict[str, Callable[..., Any]]


def _fla() -> Peer | None:
    try:
        retention = importlib.import_module("fla.ops.retention")
        naive = importlib.import_module("fla.ops.retention.naive").naive_retention
        found = version("fla-core")
    except (ImportError, PackageNotFoundError):
        return None
    forms = ("fused_chunk", "chunk", "parallel", "fused_recurrent")
    functions = {form: getattr(retention, f"{form}_retention") for form in forms}
    functions["naive"] = lambda q, k, v: (naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None)
    return Peer(found, functions)


def _rows(workload: Workload, form: str, peer: Peer | None, *, with_default: bool) -> list[Row]:
    own = generated.retention if form == "auto" else getattr(generated, f"{form}_retention")
    variants: list[tuple[str, Callable[..., Any], contextlib.AbstractContextManager[None]]] = []
    variants.append(("tuned", own, contextlib.nullcontext()))
    if with_default and form not in ("naive", "auto"):
        variants.append(("default", own, defaults_only()))
    if peer and form in peer.functions:
        variants.append(("fla", peer.functions[form], contextlib.nullcontext()))
    rows = []
    for variant, function, context in variants:
        with context:
            try:
                rows.append(_time(workload, form, variant, function))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return rows


def _time(workload: Workload, form: str, variant: str, function: Callable[..., Any]) -> Row:
    q, k, v, do = _inputs(workload)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            o: Tensor = function(q, k, v)[0]
        return o

    def both() -> object:
        return torch.autograd.grad(function(*inputs)[0], inputs, do)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward_times, both_times = _repeat(forward), _repeat(both)
    return Row(
        workload.name,
        workload.shape,
        form,
        variant,
        statistics.median(forward_times),
        _spread(forward_times),
        statistics.median(both_times),
        _spread(both_times),
        peak,
        workload.floor_ms(backward=False),
        workload.floor_ms(backward=True),
    )


def _inputs(workload: Workload) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    widths = (workload.K, workload.K, workload.V, workload.V)
    shape = (workload.B, workload.T, workload.H)
    return [torch.randn(*shape, w, device="cuda", generator=generator).to(workload.torch_dtype) for w in widths]


def _repeat(run: Callable[[], object]) -> list[float]:
    run()
    estimate = statistics.median(time_calls(run, 3))
    return time_calls(run, max(5, min(50, int(BUDGET_MS / (estimate + 0.05)))))


def _spread(times: list[float]) -> float:
    quartiles = statistics.quantiles(times, n=4)
    return quartiles[2] - quartiles[0]


def _table(rows: list[Row]) -> Table:
    table = Table("workload", "form", "", "fwd ms", "±", "fwd+bwd ms", "±", "floor fwd", "floor both", "extra MiB")
    for row in rows:
        table.add_row(
            row.workload,
            row.form,
            row.variant,
            f"{row.forward_ms:.3f}",
            f"{row.forward_spread:.3f}",
            f"{row.both_ms:.3f}",
            f"{row.both_spread:.3f}",
            f"{100 * row.floor_forward_ms / row.forward_ms:.0f} %",
            f"{100 * row.floor_both_ms / row.both_ms:.0f} %",
            f"{row.peak_mb:.0f}",
        )
    return table
