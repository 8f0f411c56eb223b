"""The process that owns a GPU: it checks, times and proves configurations, and may crash or hang without harm.

It answers one job after another, until the process that started it is gone. A job that hurts the CUDA context ends it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generated.configuration import memory_bandwidth
from generated.retention import fused_chunk_hopper
from tuning import forkserver
from tuning.oracle import relative_error
from tuning.problems import HOPPER, STEPS, Problem, StepInputs
from tuning.proof import WHOLE_TOKENS, guarded_runs, limits_of, prove, prove_whole, reference, same_bits
from tuning.space import LONGEST
from tuning.timing import Replay, Timing, interleaved, race, timing_of, warm_up

CHECK_TOKENS = 333  # ragged for every chunk, and after the longest segment
COMPARE_SECONDS = 0.4
COMPARE_ROUNDS = 8
FIRST = Problem("fused_chunk", "bfloat16", 1, 64, 1, 16, 16)  # measured before any job: it loads what all need
KEPT = 8  # problems whose inputs stay in memory: searches take turns
KEPT_SHARE = 0.25  # of the GPU's memory, above which fewer do
MARK_LENGTH = 20
OTHER = -1  # the mark of what has none of its own: a proof, or nothing yet
# In torch's words for what a context does not recover from, and in Triton's.
STICKY = ("AcceleratorError", "CUDA error", "[CUDA]")


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


class Mark(NamedTuple):
    """A file in which this process says what it is going to launch, and the number of that in the tuner's record.

    So that it is known which of several was launched last where the tuner is killed, or power is lost.
    """

    file: str
    trial: int

    def make(self) -> None:
        """Write it over the last, safely; where that fails the file is emptied, so that it says nothing wrong."""
        try:
            os.pwrite(_opened(self.file), mark_text(self.trial), 0)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.file, 0)


def mark_text(trial: int) -> bytes:
    """What stands in a mark's file: always as long, so that it needs no more room than at first."""
    return f"{trial:<{MARK_LENGTH}}".encode("ascii")


@functools.lru_cache(maxsize=1)
def _opened(file: str) -> int:
    return os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_DSYNC)


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
    forkserver.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started = _start()
    pipe.send(started)
    while started.status == "ok":
        try:
            name, *arguments, mark = pipe.recv()
        except EOFError:
            return
        if mark:
            mark.make()
        answer = _answer(JOBS[name], arguments)
        pipe.send(answer)
        if answer.status == "sticky":
            os._exit(1)


def _start() -> Answer:
    """The GPU, once a kernel has run on it; where none does, no candidate is to be blamed."""
    gpu = _answer(describe_gpu, [])
    if gpu.status != "ok":
        return gpu
    first = _answer(_measure, [FIRST, FIRST.default(), math.inf, {}])
    if first.status == "ok":
        return gpu
    sys.stderr.write(f"{first.value}\n")  # in the answer it would read like a candidate's
    return Answer("error", "the measuring process does not start: its first kernel, which is no candidate's, fails")


def _answer(job: Callable[..., Any], arguments: list[Any]) -> Answer:
    started = time.monotonic()
    try:
        status, value = "ok", _with_room(job, arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        sticky = any(text in f"{type(error).__name__}: {error}" for text in STICKY)
        status, value = "sticky" if sticky else "error", _in_a_line(error)
        if isinstance(error, ArithmeticError):  # what is wrong may have written to them
            _kept.clear()
    return Answer(status, value, time.monotonic() - started)


def _with_room(job: Callable[..., Any], arguments: list[Any]) -> Any:
    """Do a job, and once more without what is kept where there is not the memory for both."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return job(*arguments)
    _make_room()
    try:
        return job(*arguments)
    except torch.OutOfMemoryError:
        _make_room()
        raise


def _make_room() -> None:
    _kept.clear()
    Replay.release()


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


@dataclass(frozen=True)
class _Inputs:
    """A problem's inputs, and those of a small one like it with what float64 makes of them, in both directions."""

    full: tuple[Tensor, ...]
    small: tuple[Tensor, ...]
    expected: tuple[tuple[Tensor, ...], ...]


_kept: dict[Problem, _Inputs] = {}  # those that were used last come last


def _inputs(problem: Problem) -> _Inputs:
    kept = _kept.pop(problem, None)
    while kept is None and _kept and (len(_kept) >= KEPT or _memory_share() > KEPT_SHARE):
        del _kept[next(iter(_kept))]
    _kept[problem] = kept or _made(problem)
    return _kept[problem]


def _memory_share() -> float:
    """How much of the GPU's memory this process uses."""
    return float(torch.cuda.memory_allocated() / torch.cuda.get_device_properties(0).total_memory)


def _made(problem: Problem) -> _Inputs:
    tokens = CHECK_TOKENS + (LONGEST if problem.form == "chunk" else 0)
    tokens = min(problem.T, tokens)
    tokens -= tokens % 16 == 0  # ragged, however short the problem is
    if problem.form == HOPPER:  # whole chunks where the problem has
        tokens = min(problem.T, WHOLE_TOKENS + problem.T % fused_chunk_hopper.LONGEST)
    alike = replace(problem, B=1, T=tokens, H=min(problem.H, 4))
    small = alike.inputs("cuda", seed=2)
    if problem.form in STEPS:  # of which one row alone might not fold
        small = StepInputs.of(problem.form, small).all_folding.listed
    expected = tuple(reference(alike, small, reverse=reverse) for reverse in (False, True))
    return _Inputs(problem.inputs("cuda", seed=1), small, expected)


def _check(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    """Compare both directions with float64 in guarded memory, and a second run to the bit with the first."""
    inputs = _inputs(problem)
    # L is a number and not in the code: where the problem is cut, so is the small one.
    cut = {"L": fused_chunk_hopper.LONGEST} if problem.form == HOPPER and config.L < problem.T else {}
    orders = [{"reverse": reverse, **extra, **cut} for reverse in (False, True, False)]
    forwards, backwards, again = guarded_runs(problem, config, inputs.small, orders)
    results = zip((*forwards, *backwards), itertools.chain(*inputs.expected), strict=True)
    errors, limits = [relative_error(got, expected) for got, expected in results], 2 * limits_of(problem)
    if not all(error < limit for error, limit in zip(errors, limits, strict=True)):
        raise ArithmeticError(f"wrong result: relative errors {errors}, allowed {limits}")
    if not same_bits(forwards, again):
        raise ArithmeticError("two runs on the same inputs differ")
    return max(errors)


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
    """The largest error at the problem's own shape, and of the draws that a proof consists of."""
    return max(_prove_whole(problem, config, extra), prove(problem, config, extra, "cuda"))


def _prove_whole(problem: Problem, config: Any, extra: dict[str, Any]) -> float:
    if problem.form in STEPS:  # whose states are what many runs made of them
        _kept.pop(problem, None)
    try:
        return prove_whole(problem, config, extra, _inputs(problem).full)
    except torch.OutOfMemoryError:
        Replay.release()
    # Of a shape that fills the memory only what the kernel makes is guarded: its inputs have no room between margins.
    return prove_whole(problem, config, extra, _inputs(problem).full, apart=False)


JOBS: dict[str, Callable[..., Any]] = {"measure": _measure, "compare": _compare, "prove": _prove}
