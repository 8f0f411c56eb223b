"""Check and time configurations in a process of its own, which may crash or hang without harm to the tuner."""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuning import forkserver
from tuning.oracle import gradients_reference, relative_error, segment_states, sweep_reference
from tuning.problems import GRADIENTS, STATES_SEGMENT, Problem
from tuning.proof import ERROR_LIMITS, prove

CHECK_TOKENS = 333  # ragged for every chunk and segment
FLUSH_BYTES = 128 * 2**20  # more than the L2 cache of any GPU
JOB_SECONDS = 60.0
COMPARE_SECONDS = 0.4
COMPARE_ROUNDS = 6
MEASURE_MS = 30.0
START_SECONDS = 180.0


@dataclass(frozen=True)
class Gpu:
    """The GPU that a measurement was made on."""

    name: str
    arch: str
    sms: int
    memory_gb: int
    driver: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one configuration: the median of `repeats`, and the error found before timing."""

    ms: float
    spread: float
    repeats: int
    error: float


class MeasurementError(Exception):
    """A configuration that could not be measured: it crashed, hung, gave wrong results or did not launch."""


class Measurer:
    """A child process that owns the GPU; the parent never touches CUDA."""

    def __init__(self) -> None:
        self._context = forkserver.context()
        self._process: Any = None
        self._pipe: Connection | None = None
        self.gpu = self._start()

    def measure(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
        """Check, then time; `stop_above_ms` ends the timing of a configuration that is clearly slower."""
        timing: Timing = self._call(("measure", problem, config, stop_above_ms, extra))
        return timing

    def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        """Time several configurations in interleaved rounds, the order rotating."""
        timings: list[Timing] = self._call(("compare", problem, configs, extra))
        return timings

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float:
        """The largest error at the problem's full shape, with states and packed; raises if over the limit."""
        error: float = self._call(("prove", problem, config, extra))
        return error

    def close(self) -> None:
        """End the child, whatever it is at; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> Gpu:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        with forkserver.uninterrupted():
            self._process.start()
        theirs.close()
        try:
            gpu: Gpu = self._receive(START_SECONDS, "it does not start")
        except MeasurementError:
            self.close()
            raise
        return gpu

    def _call(self, job: tuple[Any, ...]) -> Any:
        if self._process is None:
            self._start()
        return self._receive(JOB_SECONDS, "the kernel hangs", job)

    def _receive(self, seconds: float, silence: str, job: tuple[Any, ...] | None = None) -> Any:
        assert self._pipe is not None
        try:
            if job is not None:
                self._pipe.send(job)
            if not self._pipe.poll(seconds):
                self.close()
                raise MeasurementError(f"no answer from the measuring process within {seconds:.0f} s: {silence}")
            status, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise MeasurementError("the measuring process died: the kernel crashed") from None
        except KeyboardInterrupt:
            self.close()  # its answer to this job must not be taken for the next one's
            raise
        if status == "sticky":
            self.close()
        if status != "ok":
            raise MeasurementError(value)
        return value


def gpu_present() -> bool:
    """Whether there is a GPU, without initialising CUDA in this process."""
    if not torch.cuda.is_available():
        return False
    return bool(torch.cuda.device_count())


def _serve(pipe: Connection) -> None:
    """The child: answer jobs until the parent is gone, to which it leaves Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pipe.send(("ok", describe_gpu()))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        pipe.send(("error", _in_a_line(error)))
        return
    jobs: dict[str, Callable[..., Any]] = {"measure": _measure, "compare": _compare, "prove": _prove}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", jobs[name](*arguments)))
        except Exception as error:  # noqa: BLE001 - as above
            told = any(text in str(error) for text in ("CUDA error", "[CUDA]"))  # torch's words, and Triton's
            sticky = told or isinstance(error, torch.AcceleratorError)
            pipe.send(("sticky" if sticky else "error", _in_a_line(error)))
            if sticky:
                os._exit(1)


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def describe_gpu() -> Gpu:
    """Name, architecture, size and driver of the current GPU; initialises CUDA."""
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        arch=f"sm{properties.major}{properties.minor}",
        sms=properties.multi_processor_count,
        memory_gb=round(properties.total_memory / 2**30),
        driver=_driver_version(),
    )


def _driver_version() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), "unknown")


class _Inputs:
    """The last problem's inputs and references, kept because jobs come in runs of one problem."""

    problem: Problem | None = None
    inputs: tuple[Tensor, ...] = ()
    small: tuple[Tensor, ...] = ()
    expected: tuple[tuple[Tensor, ...], ...] = ()


def _prepare(problem: Problem) -> None:
    if _Inputs.problem == problem:
        return
    small = replace(problem, B=1, T=min(problem.T, CHECK_TOKENS), H=min(problem.H, 4))
    _Inputs.problem = None
    _Inputs.inputs = problem.inputs("cuda", seed=1)
    _Inputs.small = small.inputs("cuda", seed=int(time.time()))
    _Inputs.expected = tuple(_reference(small, _Inputs.small, reverse=reverse) for reverse in (False, True))
    _Inputs.problem = problem


def _reference(problem: Problem, inputs: tuple[Tensor, ...], *, reverse: bool = False) -> tuple[Tensor, ...]:
    q, k, v, *do, g_gamma = inputs
    if problem.form == "chunk_states":
        return (segment_states(k, v, g_gamma, STATES_SEGMENT, reverse=reverse),)
    if problem.form == GRADIENTS:
        return gradients_reference(q, k, v, do[0], g_gamma, problem.K**-0.5, reverse=reverse)
    return (sweep_reference(q, k, v, g_gamma, problem.K**-0.5, reverse=reverse)[0],)


def _check(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    """Compare both directions with float64 on memory full of NaN, and a second run to the bit with the first."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        runs = [problem.run(_Inputs.small, config, reverse=reverse, **extra) for reverse in (False, True, False)]
    finally:
        torch.use_deterministic_algorithms(False)
    errors = [e for got, expected in zip(runs[:2], _Inputs.expected, strict=True) for e in _errors(got, expected)]
    limit = ERROR_LIMITS[problem.dtype]
    if not all(error < limit for error in errors):
        raise ArithmeticError(f"wrong result: relative errors {errors}, allowed {limit:.0e}")
    if not all(torch.equal(one, other) for one, other in zip(runs[0], runs[2], strict=True)):
        raise ArithmeticError("two runs on the same inputs differ")
    return max(errors)


def _errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """The relative errors of results, of as many rows as are expected."""
    return [relative_error(x[: len(y)], y) for x, y in zip(got, expected, strict=True)]


def _measure(problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
    _prepare(problem)
    error = _check(problem, config, extra)

    def run() -> tuple[Tensor, ...]:
        return problem.run(_Inputs.inputs, config, **extra)

    run()
    estimate = time_calls(run, 2)[1]
    if estimate > stop_above_ms:
        return Timing(estimate, 0.0, 1, error)
    return _timing(time_calls(run, max(3, min(20, int(MEASURE_MS / (estimate + 0.1))))), error)


def _compare(problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
    _prepare(problem)
    runs = [partial(problem.run, _Inputs.inputs, config, **extra) for config in configs]
    times: list[list[float]] = [[] for _ in configs]
    started = time.monotonic()
    for round_number in range(COMPARE_ROUNDS):
        for i in range(len(runs)):
            i = (i + round_number) % len(runs)
            times[i] += time_calls(runs[i], 3)[1:]
        if time.monotonic() - started > COMPARE_SECONDS:
            break
    return [_timing(series, float("nan")) for series in times]


def _prove(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    """The largest error at the problem's own shape (its first row), and of the draws that a proof consists of."""
    _prepare(problem)
    row = (*(x[:1] for x in _Inputs.inputs[:-1]), _Inputs.inputs[-1])
    errors = _errors(problem.run(_Inputs.inputs, config, **extra), _reference(problem, row))
    worst = max(errors, key=lambda error: float("inf") if math.isnan(error) else error)
    if not worst < ERROR_LIMITS[problem.dtype]:
        raise ArithmeticError(f"wrong result at the full shape: relative error {worst:.2e}")
    return max(worst, prove(problem, config, extra, "cuda"))


_flush: Tensor | None = None


def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call by CUDA events, the L2 cache flushed before it."""
    global _flush
    if _flush is None:
        _flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    new_event: Callable[..., Any] = torch.cuda.Event
    events = [[new_event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        _flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _timing(times: list[float], error: float) -> Timing:
    quartiles = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), quartiles[2] - quartiles[0], len(times), error)


def gpu_fields(gpu: Gpu) -> dict[str, Any]:
    """The `device` entry of a configuration file."""
    return {name: value for name, value in asdict(gpu).items() if name != "driver"}
