"""`python -m tuning bench`: the forms over the workloads, against the floor, the default configuration and fla."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import statistics
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import generated
from generated.configuration import ConfigurationWarning, active_rules, defaults_only
from tuning.measurement import describe_gpu, gpu_present
from tuning.oracle import gradients_reference, relative_error, retnet_rates, sweep_reference
from tuning.proof import error_limit
from tuning.rules import check_writable, write_whole
from tuning.run import RunError
from tuning.timing import time_calls
from tuning.workloads import Workload, parse

FORMS = ("fused_chunk", "chunk", "parallel", "fused_recurrent", "naive", "auto")
PEER = "fla"
DEVICE = "cuda"
BUDGET_MS = 300.0
ROUNDS = 5
WIDTH = 120
HALF = f"{{:>11}} {'±':>7} {'floor':>6} {'vs fla':>7}"
HEAD = f"{'form':15} {'':8} {HALF.format('fwd ms')} {HALF.format('fwd+bwd ms')} {'extra MiB':>10} {'error':>8}"

Context = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Times:
    """A call's median milliseconds, the distance between its quartiles, and the time that an H100 cannot beat."""

    ms: float
    spread: float
    samples: int
    floor_ms: float


@dataclass(frozen=True)
class Row:
    """One variant of a form at one workload.

    The errors are relative, of o, dq, dk and dv; the memory is the peak above the inputs; the speed-ups, of the tuned
    variant alone, are fla's medians over its own: forward, and forward + backward.
    """

    workload: str
    shape: str
    form: str
    variant: str
    forward: Times
    both: Times
    speedups: list[float]
    extra_mib: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why there are no figures of a variant."""

    workload: str
    shape: str
    form: str
    variant: str
    failure: str


def bench(options: argparse.Namespace, console: Console) -> int:
    """Time what the options select, and print every row when it is measured; 1 if nothing could be."""
    workloads = [replace(w, dtype=options.dtype or w.dtype) for w in parse(options.workload)]
    if not gpu_present():
        raise RunError(
            "bench times kernels on a GPU, and this machine shows none; `python -m tuning run` can model one"
        )
    path = Path(options.json).resolve() if options.json else None
    if path:
        check_writable(path)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    gpu = describe_gpu()
    peer, functions = ("left out", {}) if options.no_fla else _fla()
    rules = [rule.status == "active" for rule in active_rules(gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs)]
    say(f"{gpu.name}, driver {gpu.driver}, torch {torch.__version__}, triton {version('triton')}, fla {peer}")
    say(f"{sum(rules)} of {len(rules)} rules in use; medians and quartile distances, L2 flushed before each call")
    machine = {"gpu": asdict(gpu), "torch": torch.__version__, "triton": version("triton"), "fla": peer}
    rows: list[Row | Failure] = []
    for workload in workloads:
        say(f"\n{workload.name}: {workload.shape}\n{HEAD}")
        for found in _measure(workload, options.form or FORMS, functions, with_default=not options.no_default):
            rows += found
            say("\n".join(map(line, found)))
            if path:
                write_whole(path, json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1))
    say(f"\n{summary(rows)}")
    return int(not any(isinstance(row, Row) for row in rows))


def _fla() -> tuple[str, dict[str, Callable[..., Any]]]:
    """The version of fla, or why there is none, and its operators by form."""
    try:
        retention = importlib.import_module("fla.ops.retention")
        naive = importlib.import_module("fla.ops.retention.naive").naive_retention
        found = version("fla-core")
    except ImportError:
        return "not installed", {}
    except Exception as error:  # noqa: BLE001 - whatever ails the peer, the run goes on
        return f"does not import ({_in_a_line(error)})", {}
    functions = {form: getattr(retention, f"{form}_retention", None) for form in FORMS}
    functions["naive"] = lambda q, k, v: (naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None)
    return found, {form: function for form, function in functions.items() if function is not None}


def _measure(
    workload: Workload, forms: Sequence[str], peers: dict[str, Callable[..., Any]], *, with_default: bool
) -> Iterator[list[Row | Failure]]:
    """The rows of one form after the other."""
    try:
        inputs = make_inputs(workload, DEVICE)
        expected = reference(*inputs)
    except RuntimeError as error:  # too large, or an earlier failure has broken the GPU's context
        yield [Failure(workload.name, workload.shape, "every form", "", _in_a_line(error))]
        return
    for form in forms:
        own = generated.retention if form == "auto" else getattr(generated, f"{form}_retention")
        contenders = [Contender("tuned", own, inputs, expected, form=form)]
        if with_default and form not in ("naive", "auto"):
            contenders.append(Contender("default", own, inputs, expected, defaults_only, form))
        if form in peers:
            contenders.append(Contender(PEER, peers[form], inputs, expected))
        race(contenders)
        peer = next((c for c in contenders if c.variant == PEER and not c.failure), None)
        yield [c.row(workload, form, peer if c.variant == "tuned" else None) for c in contenders]


def make_inputs(workload: Workload, device: str) -> tuple[Tensor, ...]:
    """Random q, k, v and do."""
    generator = torch.Generator(device).manual_seed(0)
    widths = (workload.K, workload.K, workload.V, workload.V)
    shape = (workload.B, workload.T, workload.H)
    normal = (torch.randn(*shape, width, device=device, generator=generator) for width in widths)
    return tuple(x.to(workload.torch_dtype) for x in normal)


def reference(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    """o, dq, dk and dv in float64, of the first row of the batch and the heads of `_sample`."""
    rates, scale = retnet_rates(q.shape[2])[_heads(q)].to(q.device), q.shape[3] ** -0.5
    q, k, v, do = map(_sample, (q, k, v, do))
    o, _ = sweep_reference(q, k, v, rates, scale)
    dq, dk, dv = gradients_reference(q, k, v, do, rates, scale)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def errors_of(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The relative errors of whole results against the `reference`."""
    return {name: relative_error(_sample(result), expected[name]) for name, result in results.items()}


def _sample(x: Tensor) -> Tensor:
    return x.detach()[:1, :, _heads(x)]


def _heads(x: Tensor) -> list[int]:
    """The first, the middle and the last: decays differ most between them."""
    return sorted({0, x.shape[2] // 2, x.shape[2] - 1})


class Contender:
    """One variant of a form at one workload, and its times so far; `failure` says why it is out of the race."""

    def __init__(
        self,
        variant: str,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        expected: dict[str, Tensor],
        context: Context = contextlib.nullcontext,
        form: str = "",
    ) -> None:
        self.variant, self.form, self.context, self.failure = variant, form, context, ""
        self._function, self._inputs, self._expected = function, inputs, expected
        self._leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        self._calls: tuple[Callable[[], object], ...] = (self._forward, self._both)
        self._samples: list[int] = []  # of each call in a turn
        self._times: tuple[list[float], ...] = ([], [])
        self._errors: dict[str, float] = {}
        self._extra_mib = 0.0

    def prepare(self) -> None:
        """Compile, hold the results against the reference, and decide how many calls a turn has.

        ArithmeticError where a result of our own is wrong: a peer's error is printed beside its times.
        """
        results = dict(zip(("o", "dq", "dk", "dv"), self._both(), strict=True))
        self._errors = errors_of(results, self._expected)
        del results
        q = self._inputs[0]
        limit = error_limit(self.form, str(q.dtype).removeprefix("torch."), q.shape[1])
        if self.variant != PEER and not all(error <= limit for error in self._errors.values()):
            shown = ", ".join(f"{name} {error:.1e}" for name, error in self._errors.items())
            raise ArithmeticError(f"wrong result: relative errors {shown}; allowed: {limit:.1e}")
        estimates = [time_calls(call, 2)[1] for call in self._calls]
        self._samples = [max(1, min(50, int(BUDGET_MS / (ms + 0.05))) // ROUNDS) for ms in estimates]
        self._extra_mib = _extra_mib(self._both)

    def turn(self) -> None:
        """Time some calls of each kind, after one that finds the configurations again and fills the queue."""
        for call, samples, times in zip(self._calls, self._samples, self._times, strict=True):
            times += time_calls(call, samples + 1)[1:]

    def row(self, workload: Workload, form: str, peer: Contender | None) -> Row | Failure:
        """What was found, and how many times as fast as the peer that is."""
        where = (workload.name, workload.shape, form, self.variant)
        if self.failure:
            return Failure(*where, self.failure)
        forward, both = (
            Times(ms, _spread(times), len(times), workload.floor_ms(backward=backward))
            for ms, times, backward in zip(self._medians(), self._times, (False, True), strict=True)
        )
        speedups = [theirs / own for theirs, own in zip(peer._medians(), self._medians(), strict=True)] if peer else []
        return Row(*where, forward, both, speedups, self._extra_mib, self._errors)

    def _medians(self) -> list[float]:
        return [statistics.median(times) for times in self._times]

    def _forward(self) -> Tensor:
        with torch.no_grad():
            o: Tensor = self._function(*self._inputs[:3])[0]
        return o

    def _both(self) -> tuple[Tensor, ...]:
        o: Tensor = self._function(*self._leaves)[0]
        return o, *torch.autograd.grad(o, self._leaves, self._inputs[3])


def race(contenders: list[Contender]) -> None:
    """Prepare all, then time them in turns, the order rotating; one that raises is out."""
    for number in range(ROUNDS + 1):
        for i in range(len(contenders)):
            contender = contenders[(i + number) % len(contenders)]
            if contender.failure:
                continue
            try:
                # Which rules are in use is said above the rows.
                with warnings.catch_warnings(), contender.context():
                    warnings.simplefilter("ignore", ConfigurationWarning)
                    contender.turn() if number else contender.prepare()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                contender.failure = _in_a_line(error)


def _extra_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def _spread(times: list[float]) -> float:
    quartiles = statistics.quantiles(times, n=4)
    return quartiles[2] - quartiles[0]


def _in_a_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def line(row: Row | Failure) -> str:
    """A row below HEAD."""
    head = f"{row.form:15} {row.variant:8}"
    if isinstance(row, Failure):
        return f"{head} failed: {row.failure}"[:WIDTH]
    speedups = [f"{speedup:.2f}x" for speedup in row.speedups] or ["", ""]
    halves = [
        f"{times.ms:11.3f} {times.spread:7.3f} {times.floor_ms / times.ms:6.0%} {speedup:>7}"
        for times, speedup in zip((row.forward, row.both), speedups, strict=True)
    ]
    worst = max(row.errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
    return f"{head} {' '.join(halves)} {row.extra_mib:10.0f} {worst:8.1e}"


def summary(rows: list[Row | Failure]) -> str:
    """The geometric means of the speed-ups."""
    pairs = [row.speedups for row in rows if isinstance(row, Row) and row.speedups]
    if not pairs:
        return "no row to compare with fla"
    forward, both = map(statistics.geometric_mean, zip(*pairs, strict=True))
    count = f"{len(pairs)} row{'s' if len(pairs) > 1 else ''}"
    return f"vs fla, geometric mean of {count}: {forward:.2f}x forward, {both:.2f}x forward + backward"
