"""The measuring process without a GPU: how it starts and ends, and what it keeps from job to job."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tuning import process_exists
from torch import Tensor

from tuning import device, forkserver
from tuning.device import Gpu
from tuning.journal import is_verdict
from tuning.measurement import MeasurementError, Measurer, is_crash
from tuning.problems import Problem

TINY = Problem("fused_chunk", "float32", 1, 64, 2, 16, 16)

# What follows runs in children, which import it from here.


def serve_without_a_gpu(pipe: Connection, measure: Callable[..., Any] = lambda *job: None) -> None:
    """`device.serve` on a pretended GPU, on which the first kernel does what a test asks for, and others sleep."""
    device.describe_gpu = lambda: Gpu("Pretended", "sm90", 1, 1, "0")
    device._measure = measure
    device.JOBS["measure"] = sleep
    device.serve(pipe)


def sleep(problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> None:
    extra["file"].write_text(str(os.getpid()))
    time.sleep(1000)


def serve_a_broken_gpu(pipe: Connection) -> None:
    def fail(*job: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    serve_without_a_gpu(pipe, fail)


def tune(file: Path) -> None:
    device.serve = serve_without_a_gpu
    Measurer().measure(TINY, None, 1.0, {"file": file})


def wait_until(done: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return done()


def test_a_busy_measuring_process_ends_with_a_killed_tuner(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    tuner = forkserver.context().Process(target=tune, args=(file,))
    tuner.start()
    assert wait_until(lambda: file.exists() and file.read_text() != "")
    pid = int(file.read_text())
    assert process_exists(pid)
    tuner.kill()
    tuner.join()
    try:
        assert wait_until(lambda: not process_exists(pid), seconds=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def serve_at_once(pipe: Connection) -> None:
    device.describe_gpu = lambda: Gpu("Pretended", "sm90", 1, 1, "0")
    device._measure = lambda *job: None
    device.JOBS["measure"] = lambda *job: "measured"
    device.serve(pipe)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_measuring_process_that_ends_while_it_is_at_nothing_is_no_candidates_fault(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "serve", serve_at_once)
    with contextlib.closing(Measurer()) as measurer:
        for _ in range(2):
            os.kill(measurer._process.pid, number)
            assert wait_until(lambda: not measurer._process.is_alive())
            assert measurer.measure(TINY, None, 1.0, {}) == "measured"


def test_a_gpu_that_fails_before_any_candidate_is_no_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "serve", serve_a_broken_gpu)
    with pytest.raises(MeasurementError, match="does not start") as caught:
        Measurer()
    assert not is_verdict(str(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
        RuntimeError("Triton Error [CUDA]: invalid program counter"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        ArithmeticError("wrong result"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_what_ends_the_measuring_process_and_nothing_else_is_a_crash(error: Exception) -> None:
    def job() -> None:
        raise error

    answer = device._answer(job, [])
    assert is_crash(answer.value) is (answer.status == "sticky")


# What is kept


class OnCpu(Problem):
    """A problem whose results are right; some configurations write to inputs, to those of the run or to those kept."""

    def inputs(self, device: str, seed: int = 0) -> tuple[Tensor, ...]:
        return super().inputs("cpu", seed)

    def run(self, inputs: tuple[Tensor, ...], config: Any, **options: Any) -> tuple[Tensor, ...]:
        (o,) = device.reference(self, inputs, reverse=options.get("reverse", False))
        if config != "sound":
            (inputs if config == "writes" else device._inputs(KEPT).small)[0].zero_()
        return (o.float(),)


KEPT = OnCpu("fused_chunk", "float32", 1, 64, 2, 16, 16)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    device._kept.clear()
    yield
    device._kept.clear()


@pytest.mark.parametrize(("share", "count"), [(0.1, device.KEPT), (0.9, 1)])
def test_inputs_are_kept_of_the_problems_used_last_where_there_is_memory(
    share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_memory_share", lambda: share)
    problems = [replace(KEPT, T=16 + length) for length in range(device.KEPT + 1)]
    for problem in problems[:-1]:
        device._inputs(problem)
    first = device._inputs(problems[0])
    assert device._inputs(problems[0]) is first
    device._inputs(problems[-1])
    kept = [problems[-1]] if count == 1 else [*problems[2:-1], problems[0], problems[-1]]
    assert list(device._kept) == kept
    assert len(kept) == count


def test_a_job_is_done_again_without_what_is_kept_where_memory_is_short() -> None:
    def job() -> int:
        tried.append(len(device._kept))
        if tried[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5

    tried: list[int] = []
    device._kept[KEPT] = device._made(KEPT)
    assert device._answer(job, []).value == 5
    assert tried == [1, 0]


@pytest.mark.parametrize("fault", ["writes", "writes astray"])
def test_a_candidate_that_writes_to_inputs_spoils_none_that_comes_after(fault: str) -> None:
    answers = [device._answer(device._check, [KEPT, config, {}]) for config in ("sound", fault, "sound")]
    assert [answer.status for answer in answers] == ["ok", "error", "ok"]
    assert answers[1].value == "ArithmeticError: an input was written to"


def test_a_shape_without_room_for_guarded_inputs_is_proven_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def prove_whole(*job: object, apart: bool = True) -> float:
        tried.append(apart)
        if apart:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5

    monkeypatch.setattr(device, "prove_whole", prove_whole)
    monkeypatch.setattr(device, "prove", lambda *job: 0.25)
    assert device._prove(KEPT, "sound", {}) == 0.5
    assert tried == [True, False]
