"""Compile candidates in worker processes, each combination of kernel and shape-independent arguments once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

from tuning import forkserver
from tuning.compilation import ARCHS, Resources, compile_launch
from tuning.problems import PLAIN, Problem

COMPILE_SECONDS = 20
STUCK_SECONDS = 40  # a compiler that never comes back to Python does not hear the alarm: its process is ended


class CompilePool:
    """Workers that compile for one architecture, no candidate for longer than `seconds`, and the results so far."""

    def __init__(self, arch: str, workers: int | None = None, seconds: int = COMPILE_SECONDS) -> None:
        self._arch, self._seconds = arch, seconds
        self._futures: dict[Any, Future[Resources | str]] = {}
        self._count = workers or len(os.sched_getaffinity(0))
        self._pool = _executor(self._count)

    def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN) -> Future[Resources | str]:
        """Resources of the compiled kernel, or in words why there is none; `variant`: one of the problem's."""
        key = (*compile_key(problem, config), variant)
        if key not in self._futures or self._futures[key].cancelled():
            self._futures[key] = self._start(problem, config, variant)
        return self._futures[key]

    def result(
        self, problem: Problem, config: Any, *, variant: str = PLAIN, seconds: float | None = None
    ) -> Resources | str:
        """What `submit` promises, waited for; raises TimeoutError after so many seconds."""
        future = self.submit(problem, config, variant=variant)
        try:
            if not _ended(future, seconds):
                raise TimeoutError(f"no result within {seconds} s")
            return future.result()
        except BrokenExecutor:
            return self._alone(future, problem, config, variant)

    def forget_waiting(self) -> None:
        """Take back what no worker has begun."""
        for future in self._futures.values():
            future.cancel()

    def close(self) -> None:
        """End the workers, whatever they are at."""
        _end(self._pool)

    def _start(self, problem: Problem, config: Any, variant: str) -> Future[Resources | str]:
        with forkserver.uninterrupted():
            try:
                return self._pool.submit(_compile, problem, config, self._arch, variant, self._seconds)
            except BrokenExecutor:
                _end(self._pool)
                self._pool = _executor(self._count)
                return self._pool.submit(_compile, problem, config, self._arch, variant, self._seconds)

    def _alone(self, broken: Future[Resources | str], problem: Problem, config: Any, variant: str) -> Resources | str:
        """A worker died, of this candidate or of another's: once more, where it can take nothing else with it."""
        pool, outcome = _executor(1), Future[Resources | str]()
        try:
            outcome.set_result(pool.submit(_compile, problem, config, self._arch, variant, self._seconds).result())
        except BrokenExecutor:
            outcome.set_result("crash: the compiler died")
        finally:
            _end(pool)
        self._futures |= {key: outcome for key, future in self._futures.items() if future is broken}
        return outcome.result()


def compile_key(problem: Problem, config: Any) -> tuple[Problem, Any]:
    """What a compiled kernel depends on: not B, T and H, its arguments; but chunk has no states where L reaches T."""
    return replace(problem, B=1, H=1, T=problem.T if problem.form == "chunk" else 0), config


def _executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, forkserver.context(), initializer=_quiet)


def _ended(future: Future[Any], seconds: float | None) -> bool:
    return future in wait([future], seconds).done


def _end(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())  # shutdown forgets them
    for process in processes:  # first, so that none that is just starting misses what shutdown takes away
        process.kill()
        assert process.pid
        with contextlib.suppress(ProcessLookupError):  # one that is just starting has no group yet
            os.killpg(process.pid, signal.SIGKILL)  # the assembler too
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.join()


def _compile(problem: Problem, config: Any, arch: str, variant: str, seconds: int) -> Resources | str:
    try:
        with _time_limit(seconds):
            inputs, options = problem.inputs("meta"), problem.variants()[variant]
            # The launch that is tuned is the last one: chunk's pass over the states comes before it.
            return compile_launch(lambda: problem.run(inputs, config, **options), ARCHS[arch])[-1]
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and the search goes on
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        _end_children()
        raise TimeoutError(f"compiling took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _end_children() -> None:
    """End what a worker has started, such as the assembler and what that has started: all others of its group."""
    if os.getsid(0) == os.getpid() and multiprocessing.parent_process() is not None:
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        signal.signal(signal.SIGTERM, previous)


def _quiet() -> None:
    """Leave Ctrl-C to the parent, also for the assembler, and the compiler's remarks unsaid; end with the parent."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
