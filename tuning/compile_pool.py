"""Compile candidates in worker processes, each combination of kernel and shape-independent arguments once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triton import knobs

from generated.launch import blocks
from generated.retention import fused_chunk_hopper
from tuning import forkserver
from tuning.compilation import ARCHS, Resources, compile_launch
from tuning.problems import HOPPER, PLAIN, SEGMENTED, STEPS, Problem, same_launch
from tuning.space import LONGEST

COMPILE_SECONDS = 20
CACHED_BYTES = 1 << 18  # about what one compiled kernel takes in Triton's cache
NOTHING: Mapping[str, Any] = {}
STUCK = 2  # times that: a compiler that never comes back to Python does not hear the alarm, and its process is ended


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a candidate, or in words why there is nothing, and for how many seconds of a core."""

    needs: Resources | str
    seconds: float


def check_cache() -> None:
    """Raise OSError where nothing can be written to Triton's cache: every candidate would be compiled in vain."""
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(CACHED_BYTES))
    except OSError as error:
        remedy = "make room there, or set TRITON_CACHE_DIR to another folder"
        text = f"Triton's cache can't be written to: {error.strerror}; {remedy}"
        raise OSError(error.errno, text, str(folder)) from error


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


class CompilePool:
    """Workers that compile for one architecture, no candidate for longer than `seconds`, and the results so far.

    By default one a core. OSError where they could not write what they compile. `aside`: only what nobody else wants of
    a core is theirs, as it should be where a GPU waits for other processes.
    """

    def __init__(
        self, arch: str, workers: int | None = None, seconds: int = COMPILE_SECONDS, *, aside: bool = False
    ) -> None:
        check_cache()
        self._arch, self._seconds, self._aside = arch, seconds, aside
        self._futures: dict[Any, Future[Compiled]] = {}
        self._broken: set[Any] = set()  # at which the compiler has died once
        self._outstanding: set[Future[Compiled]] = set()
        self.workers = workers or cores()
        self._pool = _executor(self.workers, aside=self._aside)

    def submit(
        self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Mapping[str, Any] = NOTHING
    ) -> Future[Compiled]:
        """Let it be compiled, and know when it is; `variant`: one of the problem's; extra: what it is run with beside.

        Where the compiler has died, of this one or of another's, it begins once more; if it dies again, this one is
        compiled alone, and waited for.
        """
        key = (*compile_key(problem, config, extra), variant)
        future = self._futures.get(key)
        if future is None or future.cancelled():
            self._futures[key] = self._start(problem, config, variant, extra)
        elif _has_broken(future):
            again = key not in self._broken
            self._broken.add(key)
            self._futures[key] = (self._start if again else self._alone)(problem, config, variant, extra)
        return self._futures[key]

    def result(
        self,
        problem: Problem,
        config: Any,
        *,
        variant: str = PLAIN,
        extra: Mapping[str, Any] = NOTHING,
        seconds: float | None = None,
    ) -> Resources | str:
        """Resources of the compiled kernel, or in words why there is none; TimeoutError after so many seconds."""
        while True:
            future = self.submit(problem, config, variant=variant, extra=extra)
            if not _ended(future, seconds):
                raise TimeoutError(f"no result within {seconds} s")
            if not _has_broken(future):
                return future.result().needs

    def outcomes(self) -> Iterator[tuple[Problem, Compiled]]:
        """What has been compiled so far."""
        for (problem, *_), future in self._futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                yield problem, future.result()

    @property
    def submitted(self) -> int:
        """How many different candidates it was given."""
        return len(self._futures)

    def outstanding(self) -> int:
        """How many candidates the compiler is at or has not begun; to be asked by any thread."""
        return len(self._outstanding)

    def forget_waiting(self) -> None:
        """Take back what no worker has begun."""
        for future in self._futures.values():
            future.cancel()

    def close(self) -> None:
        """End the workers, whatever they are at."""
        _end(self._pool)

    def _start(self, problem: Problem, config: Any, variant: str, extra: Mapping[str, Any]) -> Future[Compiled]:
        job = problem, config, self._arch, variant, extra, self._seconds
        with forkserver.uninterrupted():
            try:
                future = self._pool.submit(_compile, *job)
            except BrokenExecutor:
                self._end_broken()
                future = self._pool.submit(_compile, *job)
        self._outstanding.add(future)
        future.add_done_callback(self._outstanding.discard)
        return future

    def _end_broken(self) -> None:
        """End what the other workers are at, and what a dead one had started, and have new ones."""
        if self._pool._broken:
            _end(self._pool)
            self._pool = _executor(self.workers, aside=self._aside)

    def _alone(self, problem: Problem, config: Any, variant: str, extra: Mapping[str, Any]) -> Future[Compiled]:
        """Compile where nothing else can be taken along."""
        self._end_broken()
        pool, outcome = _executor(1, aside=self._aside), Future[Compiled]()
        try:
            job = problem, config, self._arch, variant, extra, self._seconds
            outcome.set_result(pool.submit(_compile, *job).result())
        except BrokenExecutor:
            outcome.set_result(Compiled("crash: the compiler died", 0.0))
        finally:
            _end(pool)
        return outcome


def compile_key(problem: Problem, config: Any, extra: Mapping[str, Any] = NOTHING) -> tuple[Any, ...]:
    """What a compiled kernel depends on: what `same_kernel` says, and what runs beside it where anything does."""
    kernel, own = same_kernel(problem, config)
    return kernel, own, *(extra.values() if kernel.form == problem.form else ())


def same_kernel(problem: Problem, config: Any) -> tuple[Problem, Any]:
    """One problem and configuration for all that compile to one kernel, and one form for all that launch it.

    Its arguments are B, T, H and L, which is no shorter than a chunk; HOPPER's has a part of its own for a ragged T,
    and a buffered step's for more tokens than one.
    """
    problem, config = same_launch(problem, config)
    if problem.form in SEGMENTED and config.L < problem.T:
        config = replace(config, L=LONGEST)
    T = problem.T % fused_chunk_hopper.LONGEST if problem.form == HOPPER else 0
    if problem.form in STEPS and STEPS[problem.form].is_buffered:
        T = min(problem.T, 2)
    return replace(problem, B=1, T=T, H=1), config


def _executor(workers: int, *, aside: bool) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, forkserver.context(), initializer=_quiet, initargs=(aside,))


def _has_broken(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and isinstance(future.exception(), BrokenExecutor)


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


def _compile(
    problem: Problem, config: Any, arch: str, variant: str, extra: Mapping[str, Any], seconds: int
) -> Compiled:
    before = _core_seconds()
    needs = _needs(problem, config, arch, {**problem.variants(config)[variant], **extra}, seconds)
    return Compiled(needs, _core_seconds() - before)


def _core_seconds() -> float:
    """What this process and the assemblers that it ran have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _needs(problem: Problem, config: Any, arch: str, options: Mapping[str, Any], seconds: int) -> Resources | str:
    try:
        with _time_limit(seconds):
            if options.get("turned"):  # scores are, of whole chunks
                problem = replace(problem, T=blocks(problem.T, config.BT) * config.BT)
            inputs = problem.inputs("meta")
            launches = compile_launch(lambda: problem.run(inputs, config, **options), ARCHS[arch])
            # What is tuned comes after what makes the states or the scores; of the states themselves before their scan.
            return launches[0 if problem.form == "chunk_states" else -1]
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
    faulthandler.dump_traceback_later(STUCK * seconds, exit=True)
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


def _quiet(aside: bool) -> None:
    """Step aside for other processes, leave Ctrl-C to the parent, also for the assembler, and end with the parent.

    The compiler's remarks stay unsaid.
    """
    os.nice(10)
    forkserver.end_with_parent()
    if aside:  # by niceness alone, who wakes up waits for a millisecond and more until one who compiles makes room
        with contextlib.suppress(OSError):  # a container may refuse it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with contextlib.suppress(OSError):  # of a session's own share of the cores, which this kernel may not know
            Path("/proc/self/autogroup").write_text("19", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
