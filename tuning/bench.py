"""`python -m tuning bench`: the forms over the workloads, against the floor, the default configuration and peers.

Each call is timed in two ways: as a program makes it, with the host's share where the GPU waits for it ("ms"), and as
a CUDA graph, which leaves the GPU's work alone ("GPU ms"). Steps, which have no backward, are timed on states of each
dtype, in slots of a pool, against one read and one write of these; buffered ones, whose rows fold in turn, against one
read alone, and where all rows fold ("folding") against both.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import generated
from generated.configuration import ConfigurationWarning, active_rules, defaults_only
from tuning import bench_plots, plots
from tuning.measurement import describe_gpu, gpu_present
from tuning.oracle import (
    buffered_reference,
    gradients_reference,
    relative_error,
    retnet_rates,
    steps_reference,
    sweep_reference,
)
from tuning.peers import PEERS, Peer, find, in_a_line
from tuning.problems import STEP_FORMS, STEPS, StepInputs, problems_of
from tuning.proof import error_limit
from tuning.rules import check_writable, write_whole
from tuning.run import RunError
from tuning.timing import Replay, time_calls
from tuning.workers import gpu_alone
from tuning.workloads import Workload, parse

FORMS = ("fused_chunk", "chunk", "parallel", "fused_recurrent", "naive", "auto", *STEP_FORMS)
DEVICE = "cuda"
BUDGET_MS = 300.0
ROUNDS = 5
WIDTH = 128
FINE_MS = 0.1  # shorter times are told with one more digit
HALF = f"{{:>10}} {'±':>6} {'GPU ms':>7} {'floor':>5} {'x tuned':>7}"
HEAD = f"{'form':23} {'':8} {HALF.format('fwd ms')} {HALF.format('fwd+bwd ms')} {'MiB':>6} {'error':>7}"

Context = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Times:
    """A call's median milliseconds, the distance between its quartiles, and the time that an H100 cannot beat.

    `gpu_ms` is the median of the GPU's work alone, None where the call cannot be captured as a graph.
    """

    ms: float
    spread: float
    samples: int
    floor_ms: float
    gpu_ms: float | None = None

    @property
    def floor_share(self) -> float:
        """The part of the GPU's time, or of the call's where that is all that is known, that the floor is."""
        return self.floor_ms / (self.gpu_ms or self.ms)


@dataclass(frozen=True)
class Row:
    """One variant of a form at one workload: tuned, default or a peer's; `both` is None of what has no backward.

    The errors are relative, of o, dq, dk and dv; a peer that computes something else has none. The memory is the peak
    above the inputs. The speed-ups, which the tuned variant has none of, are its medians over the tuned ones: forward,
    and forward + backward.
    """

    workload: str
    shape: str
    form: str
    variant: str
    forward: Times
    both: Times | None
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

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if options.plot:
        plots.check_available()
    if options.figures and not options.plot:
        raise RunError("--from is for drawing: give --plot FOLDER too")
    figures = _read(options.figures) if options.figures else _time(options, say)
    timed = any("failure" not in row for row in figures["rows"])
    if options.plot and any(bench_plots.has_times(row) for row in figures["rows"]):
        for path in bench_plots.draw(figures, Path(options.plot)):
            say(f"wrote {path}")
    return int(not timed)


def _time(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """What --json writes, of all that the options select."""
    workloads = [replace(w, dtype=options.dtype or w.dtype) for w in parse(options.workload)]
    if not gpu_present():
        raise RunError(
            "bench times kernels on a GPU, and this machine shows none; `python -m tuning run` can model one"
        )
    path = Path(options.json).resolve() if options.json else None
    if path:
        check_writable(path)
    if not any(forms_for(workload, options.form) for workload in workloads):
        raise RunError("nothing to time: no form that was chosen is for any of these workloads")
    gpu, peers = describe_gpu(), [find(name) for name in options.against]
    software = {"torch": torch.__version__, "triton": version("triton")}
    versions = {peer.name: peer.version for peer in peers}
    rules = [rule.status == "active" for rule in active_rules(gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs)]
    beside = ", ".join(f"{name} {found}" for name, found in (software | versions).items())
    say(f"{gpu.name}, driver {gpu.driver}, {beside}")
    say(f"{sum(rules)} of {len(rules)} rules in use; medians and quartile distances, L2 flushed before each call")
    figures: dict[str, Any] = {"gpu": asdict(gpu), **software, "peers": versions}
    figures |= {"workloads": {workload.name: asdict(workload) for workload in workloads}, "rows": []}
    rows: list[Row | Failure] = []
    with gpu_alone(gpu.uuid) if gpu.uuid else contextlib.nullcontext():
        for workload in workloads:
            if not (forms := forms_for(workload, options.form)):
                continue
            say(f"\n{workload.name}: {workload.shape}\n{HEAD}")
            for found in _measure(workload, forms, peers, with_default=not options.no_default):
                rows += found
                say("\n".join(map(line, found)))
                figures["rows"] = [asdict(row) for row in rows]
                if path:
                    write_whole(path, json.dumps(figures, indent=1))
    say(f"\n{summary(rows)}")
    return figures


def _read(name: str) -> dict[str, Any]:
    """What --json has written; RunError for another file."""
    try:
        figures = json.loads(Path(name).read_text(encoding="utf-8"))
        bench_plots.check(figures)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"--from {name}: not a file of `python -m tuning bench --json FILE` ({error!r})") from error
    return dict(figures)


def forms_for(workload: Workload, wanted: Sequence[str] = ()) -> list[str]:
    """Of the forms that are wanted (of all) those that the workload is for, steps by each kind of state."""
    found = [form for form in wanted or FORMS if workload.is_for(form)]
    parts = [part for form in found for part in STEP_FORMS.get(form, (form,))]
    return [part for part in parts if part not in STEPS or problems_of(workload, part)]


def _measure(
    workload: Workload, forms: Sequence[str], peers: Sequence[Peer], *, with_default: bool
) -> Iterator[list[Row | Failure]]:
    """The rows of one form after the other."""
    try:
        inputs = make_inputs(workload, DEVICE)
        expected = reference(*inputs)
    except RuntimeError as error:  # too large, or an earlier failure has broken the GPU's context
        yield [Failure(workload.name, workload.shape, "every form", "", in_a_line(error))]
        return
    for form in forms:
        try:
            contenders = _steps(workload, form, peers) if form in STEPS else _sweeps(form, inputs, expected, peers)
        except RuntimeError as error:
            yield [Failure(workload.name, workload.shape, form, "", in_a_line(error))]
            continue
        contenders = [one for one in contenders if with_default or one.variant != "default"]
        race(contenders)
        tuned, *others = contenders
        yield [tuned.row(workload, form), *(other.row(workload, form, tuned) for other in others)]
        del contenders, tuned, others  # and with them their graphs, before the memory of all is given back
        Replay.release()


def _sweeps(
    form: str, inputs: tuple[Tensor, ...], expected: dict[str, Tensor], peers: Sequence[Peer]
) -> list[Contender]:
    own = generated.retention if form == "auto" else getattr(generated, f"{form}_retention")
    contenders = [Contender("tuned", own, inputs, expected, form=form)]
    if form not in ("naive", "auto"):
        contenders.append(Contender("default", own, inputs, expected, defaults_only, form))
    return contenders + [
        Contender(peer.name, peer.functions[form], inputs, expected if peer.same else {})
        for peer in peers
        if form in peer.functions
    ]


def _steps(workload: Workload, form: str, peers: Sequence[Peer]) -> list[Contender]:
    """Steps on states of their own each, in slots of a pool; a peer's on those of the rows alone."""
    (problem,) = problems_of(workload, form)
    given = StepInputs.of(form, problem.inputs(DEVICE))
    inputs, size = (given.q, given.k, given.v), given.state.element_size()
    floor_ms = workload.step_floor_ms(size, is_written=not given.counts)
    expected = _step_reference(given)
    contenders = [
        Contender(variant, _own_step(given), inputs, expected, context, form, floor_ms)
        for variant, context in (("tuned", contextlib.nullcontext), ("default", defaults_only))
    ]
    if given.counts:
        folding, floor_ms = given.all_folding, workload.step_floor_ms(size)
        others = inputs, _step_reference(folding), contextlib.nullcontext, form, floor_ms
        return [*contenders, Contender("folding", _own_step(folding), *others)]
    rows = given.state[given.slots]
    calls = {peer.name: partial(peer.functions[form], initial_state=rows) for peer in peers if form in peer.functions}
    return contenders + [
        Contender(name, call, inputs, expected, contextlib.nullcontext, form, floor_ms) for name, call in calls.items()
    ]


def _own_step(given: StepInputs) -> Callable[..., tuple[Tensor, None]]:
    """Our own, on a pool of its own."""
    state, buffers = given.state.clone(), [x.clone() for x in given.buffers]
    step = generated.retention_step_buffered if given.counts else generated.retention_step

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        o = step(q, k, v, state, *buffers, *given.counts, state_indices=given.slots, seed=given.seed)
        return o, None

    return call


def _step_reference(given: StepInputs) -> dict[str, Tensor]:
    """The outputs in float64, of the first row and the heads of `_sample`."""
    heads, slot = _heads(given.q), given.slots[:1]
    rates = retnet_rates(given.q.shape[2])[heads].to(given.q.device)
    start = given.state[slot][:, heads]
    if given.counts:
        (k_buffer, v_buffer), (lengths, folded) = (x[slot][:, :, heads] for x in given.buffers), given.counts
        start = buffered_reference(start, k_buffer, v_buffer, lengths[:1], folded[:1], rates)
    q, k, v = map(_sample, (given.q, given.k, given.v))
    return {"o": steps_reference(q, k, v, start, rates, q.shape[3] ** -0.5)[0]}


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
    """The relative errors of whole results against what the `reference` has of them."""
    return {name: relative_error(_sample(results[name]), right) for name, right in expected.items()}


def _sample(x: Tensor) -> Tensor:
    return x.detach()[:1, :, _heads(x)]


def _heads(x: Tensor) -> list[int]:
    """The first, the middle and the last: decays differ most between them."""
    return sorted({0, x.shape[2] // 2, x.shape[2] - 1})


class Contender:
    """One variant of a form at one workload, and its times so far; `failure` says why it is out of the race.

    step_floor_ms: of a step, which has no backward, the time that no kernel can beat.
    """

    def __init__(
        self,
        variant: str,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        expected: dict[str, Tensor],
        context: Context = contextlib.nullcontext,
        form: str = "",
        step_floor_ms: float = 0.0,
    ) -> None:
        self.variant, self.form, self.context, self.failure = variant, form, context, ""
        self._function, self._inputs, self._expected = function, inputs, expected
        self._leaves, self._step_floor_ms = self._new_leaves(), step_floor_ms
        self._calls: tuple[Callable[[], object], ...] = (
            (self._forward,) if step_floor_ms else (self._forward, self._both)
        )
        self._samples: list[int] = []  # of each call in a turn
        self._times: tuple[list[float], ...] = ([], [])
        self._replays: list[Replay | None] = []
        self._gpu_times: tuple[list[float], ...] = ([], [])
        self._errors: dict[str, float] = {}
        self._extra_mib = 0.0

    def prepare(self) -> None:
        """Compile, hold the results against the reference, and decide how many calls a turn has.

        ArithmeticError where a result of our own is wrong: a peer's error is printed beside its times.
        """
        found = (self._forward(),) if self._step_floor_ms else self._both()
        results = dict(zip(("o", "dq", "dk", "dv"), found, strict=False))
        self._errors = errors_of(results, self._expected)
        del found, results
        q = self._inputs[0]
        limit = error_limit(self.form, str(q.dtype).removeprefix("torch."), q.shape[1])
        if self.variant not in PEERS and not all(error <= limit for error in self._errors.values()):
            shown = ", ".join(f"{name} {error:.1e}" for name, error in self._errors.items())
            raise ArithmeticError(f"wrong result: relative errors {shown}; allowed: {limit:.1e}")
        estimates = [time_calls(call, 2)[1] for call in self._calls]
        self._samples = [max(1, min(50, int(BUDGET_MS / (ms + 0.05))) // ROUNDS) for ms in estimates]
        self._extra_mib = _extra_mib(self._calls[-1])
        # A graph is captured on a stream of its own, and autograd wants leaves to stay on the first that they came to.
        calls = (self._forward, lambda: self._both(self._new_leaves()))
        self._replays = [_replay(call) for call, _ in zip(calls, self._calls, strict=False)]

    def turn(self) -> None:
        """Time some calls of each kind, after one that finds the configurations again and fills the queue."""
        for call, samples, times in zip(self._calls, self._samples, self._times, strict=False):
            times += time_calls(call, samples + 1)[1:]
        for replay, times in zip(self._replays, self._gpu_times, strict=False):
            times += replay.times() if replay else []

    def row(self, workload: Workload, form: str, tuned: Contender | None = None) -> Row | Failure:
        """What was found, and how many times as long as the tuned variant that takes."""
        where = (workload.name, workload.shape, form, self.variant)
        if self.failure:
            return Failure(*where, self.failure)
        forward, both = (
            Times(
                statistics.median(times), _spread(times), len(times), floor_ms, statistics.median(gpu) if gpu else None
            )
            if times
            else None
            for times, gpu, floor_ms in zip(self._times, self._gpu_times, self._floors(workload), strict=True)
        )
        assert forward
        own, theirs = self._times, tuned._times if tuned and not tuned.failure else ()
        speedups = [statistics.median(a) / statistics.median(b) for a, b in zip(own, theirs, strict=False) if a and b]
        return Row(*where, forward, both, speedups, self._extra_mib, self._errors)

    def _floors(self, workload: Workload) -> tuple[float, float]:
        if self._step_floor_ms:
            return (self._step_floor_ms,) * 2
        return workload.floor_ms(backward=False), workload.floor_ms(backward=True)

    def _forward(self) -> Tensor:
        with torch.no_grad():
            o: Tensor = self._function(*self._inputs[:3])[0]
        return o

    def _both(self, leaves: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        leaves = leaves or self._leaves
        o: Tensor = self._function(*leaves)[0]
        return o, *torch.autograd.grad(o, leaves, self._inputs[3])

    def _new_leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self._inputs[:3]]


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
                contender.failure = in_a_line(error)


def _replay(call: Callable[[], object]) -> Replay | None:
    """The call as a graph; None where it cannot be one."""
    try:
        return Replay(call)
    except RuntimeError:  # it asks the GPU for something, or does what no graph can hold
        torch.cuda.synchronize()
        return None


def _extra_mib(call: Callable[[], object]) -> float:
    gc.collect()  # what the last workload left would be given back during the call
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def _spread(times: list[float]) -> float:
    quartiles = statistics.quantiles(times, n=4)
    return quartiles[2] - quartiles[0]


def line(row: Row | Failure) -> str:
    """A row below HEAD."""
    head = f"{row.form:23} {row.variant:8}"
    if isinstance(row, Failure):
        return f"{head} failed: {row.failure}"[:WIDTH]
    speedups = [f"{speedup:.2f}x" for speedup in row.speedups] + ["", ""]
    halves = [_half(*half) for half in zip((row.forward, row.both), speedups, strict=False)]
    worst = max(row.errors.values(), key=lambda error: math.inf if math.isnan(error) else error, default=None)
    return f"{head} {' '.join(halves)} {row.extra_mib:6.0f} {'' if worst is None else f'{worst:.1e}':>7}"


def _half(times: Times | None, speedup: str) -> str:
    if times is None:
        return " " * len(HALF.format(""))
    share = f"{times.floor_share:5.0%}"
    return f"{_ms(times.ms):>10} {times.spread:6.3f} {_ms(times.gpu_ms):>7} {share} {speedup:>7}"


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3f}" if ms >= FINE_MS else f"{ms:.4f}"


def summary(rows: Sequence[Row | Failure]) -> str:
    """Of each peer, how many times as long as retgen it takes: form by form, and its best form against our best."""
    timed = [row for row in rows if isinstance(row, Row) and row.both]
    halves = [bench_plots.best([asdict(row) for row in timed], half, "ms") for half in ("forward", "both")]
    lines = []
    for peer in dict.fromkeys(row.variant for row in timed if row.variant in PEERS):
        by_form = [row.speedups for row in timed if row.variant == peer and row.speedups]
        by_workload = [
            [half[workload][peer] / half[workload]["tuned"] for half in halves]
            for workload, variants in halves[0].items()
            if {peer, "tuned"} <= variants.keys()
        ]
        lines += [
            f"vs {peer}, {how} of {len(ratios)} {what}{'s' if len(ratios) > 1 else ''}: "
            f"{_means(ratios)}, at the least {min(map(min, ratios)):.2f}x"
            for how, what, ratios in (
                ("form by form, geometric mean", "row", by_form),
                ("best form against best form", "workload", by_workload),
            )
            if ratios
        ]
    steps: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row, Row) and not row.both and row.variant in PEERS:
            steps.setdefault(row.variant, []).extend(row.speedups)
    lines += [
        f"vs {peer}, steps, geometric mean of {len(ratios)}: {statistics.geometric_mean(ratios):.2f}x, at the least "
        f"{min(ratios):.2f}x"
        for peer, ratios in steps.items()
        if ratios
    ]
    return "\n".join(lines) or "no row to compare with another library"


def _means(ratios: Sequence[Sequence[float]]) -> str:
    forward, both = map(statistics.geometric_mean, zip(*ratios, strict=True))
    return f"{forward:.2f}x forward, {both:.2f}x forward + backward"
