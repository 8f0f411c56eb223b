"""The process that owns a GPU: it checks, times and proves configurations, and may crash or hang without harm.

It answers one job after another, until the process that started it is gone. A job that hurts the CUDA context ends it.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generated.configuration import memory_bandwidth
from tuning.oracle import gradients_reference, relative_error, segment_states, sweep_reference
from tuning.problems import GRADIENTS, STATES_SEGMENT, Problem
from tuning.proof import ERROR_LIMITS, Guard, prove
from tuning.timing import Replay, Timing, interleaved, race, timing_of, warm_up

CHECK_TOKENS = 333  # ragged for every chunk and segment
COMPARE_SECONDS = 0.4
COMPARE_ROUNDS = 8
FIRST = Problem("fused_chunk", "bfloat16", 1, 64, 1, 16, 16)  # measured before any job: it loads what all need
KEPT = 3  # problems whose inputs stay in memory: searches take turns
STICKY = ("CUDA error", "[CUDA]")  # in torch's words for what a context does not recover from, and in Triton's


@dataclass(frozen=True)
class Gpu:
    """The GPU that a measurement was made on; `uuid` tells it from others of its name."""

    name: str
    arch: str
    sms: int
    memory_gb: int
    driver: str
    uuid: str = ""
    bandwidth_gbs: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a job gave: a value, or in words why there is none; and how many seconds the process was at it."""

    status: str  # ok, error, or sticky: the process has ended itself
    value: Any
    seconds: float = 0.0


def describe_gpu() -> Gpu:
    """Name, architecture, size, driver and UUID of the current GPU; initialises CUDA."""
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        arch=f"sm{properties.major}{properties.minor}",
        sms=properties.multi_processor_count,
        memory_gb=round(properties.total_memory / 2**30),
        driver=_driver_version(),
        uuid=str(getattr(properties, "uuid", "")),
        bandwidth_gbs=memory_bandwidth(properties),
    )


def _driver_version() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), "unknown")


def serve(pipe: Connection) -> None:
    """Answer jobs until the parent is gone, to which Ctrl-C is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pipe.send(Answer("ok", describe_gpu()))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        pipe.send(Answer("error", _in_a_line(error)))
        return
    _answer(_measure, [FIRST, FIRST.default(), math.inf, {}])
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        answer = _answer(JOBS[name], arguments)
        pipe.send(answer)
        if answer.status == "sticky":
            os._exit(1)


def _answer(job: Callable[..., Any], arguments: list[Any]) -> Answer:
    started = time.monotonic()
    try:
        status, value = "ok", job(*arguments)
    except Exception as error:  # noqa: BLE001 - as above
        sticky = isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in STICKY)
        status, value = "sticky" if sticky else "error", _in_a_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            _inputs.cache_clear()
            Replay.release()
    return Answer(status, value, time.monotonic() - started)


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


@dataclass(frozen=True)
class _Inputs:
    """A problem's inputs, and those of a small one like it with what float64 makes of them, in both directions."""

    full: tuple[Tensor, ...]
    small: tuple[Tensor, ...]
    expected: tuple[tuple[Tensor, ...], ...]


@functools.lru_cache(maxsize=KEPT)
def _inputs(problem: Problem) -> _Inputs:
    alike = replace(problem, B=1, T=min(problem.T, CHECK_TOKENS), H=min(problem.H, 4))
    small = alike.inputs("cuda", seed=2)
    expected = tuple(reference(alike, small, reverse=reverse) for reverse in (False, True))
    return _Inputs(problem.inputs("cuda", seed=1), small, expected)


def reference(problem: Problem, inputs: tuple[Tensor, ...], *, reverse: bool = False) -> tuple[Tensor, ...]:
    """What float64 makes of a problem's inputs."""
    q, k, v, *do, g_gamma = inputs
    if problem.form == "chunk_states":
        return (segment_states(k, v, g_gamma, STATES_SEGMENT, reverse=reverse),)
    if problem.form == GRADIENTS:
        return gradients_reference(q, k, v, do[0], g_gamma, problem.K**-0.5, reverse=reverse)
    return (sweep_reference(q, k, v, g_gamma, problem.K**-0.5, reverse=reverse)[0],)


def _check(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    """Compare both directions with float64 in guarded memory, and a second run to the bit with the first."""
    inputs = _inputs(problem)
    with Guard() as guard:
        runs = [problem.run(inputs.small, config, reverse=reverse, **extra) for reverse in (False, True, False)]
    errors = [e for got, expected in zip(runs[:2], inputs.expected, strict=True) for e in _errors(got, expected)]
    limit = ERROR_LIMITS[problem.dtype]
    if not all(error < limit for error in errors):
        raise ArithmeticError(f"wrong result: relative errors {errors}, allowed {limit:.0e}")
    if not all(torch.equal(one, other) for one, other in zip(runs[0], runs[2], strict=True)):
        raise ArithmeticError("two runs on the same inputs differ")
    guard.check()
    return max(errors)


def _errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """The relative errors of results, of as many rows as are expected."""
    return [relative_error(x[: len(y)], y) for x, y in zip(got, expected, strict=True)]


def _replay(problem: Problem, config: Any, extra: dict[str, Any]) -> Replay:
    return Replay(lambda: problem.run(_inputs(problem).full, config, **extra))


def _measure(problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
    error = _check(problem, config, extra)
    replay = _replay(problem, config, extra)
    warm_up()
    return timing_of(race(replay.times, stop_above_ms), error)


def _compare(problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
    samples = [_replay(problem, config, extra).times for config in configs]
    warm_up()
    return [timing_of(times) for times in interleaved(samples, rounds=COMPARE_ROUNDS, seconds=COMPARE_SECONDS)]


def _prove(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    """The largest error at the problem's own shape (its first row), and of the draws that a proof consists of."""
    full = _inputs(problem).full
    row = (*(x[:1] for x in full[:-1]), full[-1])
    errors = _errors(problem.run(full, config, **extra), reference(problem, row))
    worst = max(errors, key=lambda error: float("inf") if math.isnan(error) else error)
    if not worst < ERROR_LIMITS[problem.dtype]:
        raise ArithmeticError(f"wrong result at the full shape: relative error {worst:.2e}")
    return max(worst, prove(problem, config, extra, "cuda"))


JOBS: dict[str, Callable[..., Any]] = {"measure": _measure, "compare": _compare, "prove": _prove}
