"""Compile candidates in worker processes, each combination of kernel and shape-independent arguments once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from tuning.compilation import ARCHS, Resources, compile_launch
from tuning.problems import WITH_STATES, Problem

COMPILE_SECONDS = 20


class CompilePool:
    """Workers that compile for one architecture, and the results so far."""

    def __init__(self, arch: str, workers: int | None = None) -> None:
        self._arch = arch
        self._futures: dict[Any, Future[Resources | str]] = {}
        count = workers or max(1, (os.cpu_count() or 2))
        self._pool = ProcessPoolExecutor(count, _context(), initializer=_quiet)

    def submit(self, problem: Problem, config: Any, *, with_states: bool = False) -> Future[Resources | str]:
        """Resources of the compiled kernel, or in words why there is none; `with_states`: with both states."""
        # B, T and H are arguments of the kernels, not part of them; chunk does without states where L reaches T.
        key = (replace(problem, B=1, H=1, T=problem.T if problem.form == "chunk" else 0), config, with_states)
        if key not in self._futures:
            self._futures[key] = self._pool.submit(_compile, problem, config, self._arch, with_states)
        return self._futures[key]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.kill()


def _context() -> Any:
    """Workers are forked from a server that has imported everything, and that never touches CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning.compile_pool", "tuning.measurement"])
    return context


def _compile(problem: Problem, config: Any, arch: str, with_states: bool) -> Resources | str:
    inputs, states = problem.inputs("meta"), {}
    if with_states and problem.form in WITH_STATES:
        shape = (problem.B, problem.H, problem.K, problem.V)
        states = {name: torch.empty(shape, device="meta") for name in ("initial_state", "final_state")}
    try:
        with _time_limit(COMPILE_SECONDS):
            # The launch that is tuned is the last one: chunk's pass over the states comes before it.
            return compile_launch(lambda: problem.run(inputs, config, **states), ARCHS[arch])[-1]
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and the search goes on
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"compiling took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _quiet() -> None:
    """Leave Ctrl-C to the parent, and the compiler's remarks unsaid."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open for the worker's life
