"""Check and time configurations in a process of its own, which may crash or hang without harm to the tuner."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from tuning import device, forkserver
from tuning.device import OTHER, Answer, Gpu, Mark, describe_gpu
from tuning.problems import Problem
from tuning.timing import Timing
from tuning.workers import GpuBusyError, gpu_alone

# Seconds after which a job counts as hung: a candidate is timed in a fraction of one, a proof takes a few.
DEADLINES = {"start": 180.0, "measure": 30.0, "compare": 60.0, "prove": 120.0}
HANGS, DIED = "the kernel hangs", "the kernel crashed"
# By which whoever manages the machine ends processes; what a kernel does shows in others.
FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGTERM)
# Exit codes, and what they tell; 255 where the fork server, which knows, is gone too.
ENDED: dict[int | None, str] = {None: "whom nobody knows", 255: "whom nobody knows"}
ENDED |= {-number: number.name for number in FROM_OUTSIDE}
GOING_SECONDS = 30.0  # a process that has let go of its pipe may still hold the GPU
# Of CUDA's errors those that the machine makes, or whoever uses it too.
MACHINES = (
    "out of memory",
    "ALLOC_FAILED",
    "ECC",
    "NVLink",
    "MPS",
    "no CUDA-capable device",
    "lost",
    "unavailable",
)

__all__ = [
    "HANGS",
    "Gpu",
    "MeasurementError",
    "Measurer",
    "StartError",
    "Timing",
    "describe_gpu",
    "gpu_fields",
    "gpu_present",
    "is_crash",
]


class MeasurementError(Exception):
    """A configuration that could not be measured: it crashed, hung, gave wrong results or did not launch."""


class StartError(MeasurementError):
    """A measuring process that does not start, which is no candidate's fault."""


class _EndedError(MeasurementError):
    """A measuring process that somebody has ended, which is no candidate's fault either."""


@dataclass(eq=False)
class _Job:
    """What the process is asked for; `answer`, also for a process that died at it, when that is over."""

    content: tuple[Any, ...]
    sent: bool = False  # to the process that there is
    ended: bool = False  # was a process at it, or about to be, when somebody ended that
    answer: Answer | None = None


class Measurer:
    """A child process that owns the GPU; the parent never touches CUDA.

    Until it is closed, no other measures there: GpuBusyError where one does.

    `busy` is how many seconds the process was at jobs.
    """

    def __init__(self) -> None:
        self._context = forkserver.context()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._jobs = deque[_Job]()  # which the process is at, or is going to be: in this order
        self._since = 0.0  # when the first of them became the first
        self._marks = ""  # the file that they are made in
        self.busy = 0.0
        self._lock = contextlib.ExitStack()
        self.gpu = self._start()
        try:
            if self.gpu.uuid:
                self._lock.enter_context(gpu_alone(self.gpu.uuid))
        except GpuBusyError:
            self.renew()
            raise

    def begin(
        self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any], mark: Mark | None = None
    ) -> Callable[[], Timing]:
        """Check, then time, while the caller goes on; what is returned waits for the times, or raises.

        `stop_above_ms` ends the timing of a configuration that is clearly slower. What is asked for before that has
        ended follows it at once, in a new process if need be. `mark`: to be made when it is launched.
        """
        return partial(self._result, self._ask("measure", problem, config, stop_above_ms, extra, mark=mark))

    def measure(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
        """The same, waited for."""
        return self.begin(problem, config, stop_above_ms, extra)()

    def begin_compare(
        self, problem: Problem, configs: list[Any], extra: dict[str, Any], mark: Mark | None = None
    ) -> Callable[[], list[Timing]]:
        """Time several configurations in interleaved rounds, the order rotating; waited for as by `begin`."""
        return partial(self._result, self._ask("compare", problem, configs, extra, mark=mark))

    def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        """The same, waited for."""
        return self.begin_compare(problem, configs, extra)()

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float:
        """The largest error at the problem's full shape, with states and packed; raises if over the limit."""
        error: float = self._result(self._ask("prove", problem, config, extra))
        return error

    def close(self) -> None:
        """End the child, and let others measure."""
        self.renew()
        self._lock.close()

    def renew(self) -> None:
        """End the child, whatever it is at, and forget what it was asked for; the next call starts another."""
        self._jobs.clear()
        self._end()

    def _end(self) -> None:
        """End the child: what it has not answered is another's."""
        for job in self._jobs:
            job.sent = False
        if self._process is not None:
            process, self._process = self._process, None  # first: nothing is asked of one that is being ended
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # it has not come so far as to have a group
                os.killpg(process.pid, signal.SIGKILL)  # an assembler too
            process.join()

    def _start(self) -> Gpu:
        self._pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=device.serve, args=(theirs,), daemon=True)
        try:
            with forkserver.uninterrupted():
                process.start()
                self._process = process
            theirs.close()
            answer = self._hear(DEADLINES["start"], "it does not start", "while it started")
        except MeasurementError as error:
            raise StartError(str(error)) from None
        except BaseException:  # an answer that nobody waits for must not be taken for the next one's
            self._end()
            raise
        if answer.status != "ok":
            self._end()
            raise StartError(answer.value)
        gpu: Gpu = answer.value
        return gpu

    def _ask(self, *content: Any, mark: Mark | None = None) -> _Job:
        if mark:
            self._marks = mark.file
        elif self._marks:
            mark = Mark(self._marks, OTHER)
        job = _Job((*content, mark))
        if not self._jobs:
            self._since = time.monotonic()
        self._jobs.append(job)
        try:
            self._send()
        except BaseException:
            self.renew()
            raise
        return job

    def _send(self) -> None:
        """Give the process, or a new one, what it has not been given."""
        if self._process is not None and not any(job.sent for job in self._jobs) and not self._process.is_alive():
            self._end()  # it was at nothing
        if self._process is None:
            try:
                self._start()
            except StartError:
                self._start()  # once more: the GPU may just have been reset
            self._since = time.monotonic()
        assert self._pipe is not None
        for job in [job for job in self._jobs if not job.sent]:
            job.sent = True
            with contextlib.suppress(ConnectionError):  # whoever waits for the answer finds out
                self._pipe.send(job.content)

    def _result(self, job: _Job) -> Any:
        """The answer to a job, waited for, and to those before it."""
        try:
            while job.answer is None:
                self._send()
                self._receive()
        except BaseException:  # Ctrl-C: an answer to this job must not be taken for the next one's
            self.renew()
            raise
        if job.answer.status != "ok":
            raise MeasurementError(job.answer.value)
        return job.answer.value

    def _receive(self) -> None:
        """The answer to the first job, or what became of the process at it."""
        job = self._jobs[0]
        try:
            job.answer = self._hear(self._since + DEADLINES[job.content[0]] - time.monotonic(), HANGS, DIED)
            self.busy += job.answer.seconds  # it may have lain here for a while
        except _EndedError as error:
            if not job.ended:  # by another process, once more
                job.ended = True
                return
            job.answer = Answer("error", str(error))
        except MeasurementError as error:
            job.answer = Answer("error", str(error))
            self.busy += time.monotonic() - self._since
        self._jobs.popleft()
        self._since = time.monotonic()
        if job.answer.status == "sticky":
            self._end()

    def _hear(self, seconds: float, silence: str, death: str) -> Answer:
        """What the process says next; MeasurementError, and it is ended, where it says nothing."""
        assert self._pipe is not None
        try:
            if self._pipe.poll(max(0.0, seconds)):
                answer: Answer = self._pipe.recv()
                return answer
            reason = f"no answer from the measuring process: {silence}"
        except (EOFError, ConnectionError):
            self._process.join(GOING_SECONDS)
            code = self._process.exitcode
            if code in ENDED:
                self._end()
                raise _EndedError(f"the measuring process was ended from outside, by {ENDED[code]}") from None
            reason = f"the measuring process died: {death}"
        self._end()
        raise MeasurementError(reason)


def is_crash(reason: str) -> bool:
    """Whether this says that a candidate ended the measuring process: whatever did, but for what the machine does."""
    by_cuda = any(text in reason for text in device.STICKY) and not any(text in reason for text in MACHINES)
    return by_cuda or HANGS in reason or DIED in reason


def gpu_present() -> bool:
    """Whether there is a GPU, without initialising CUDA in this process."""
    if not torch.cuda.is_available():
        return False
    return bool(torch.cuda.device_count())


def gpu_fields(gpu: Gpu) -> dict[str, Any]:
    """The `device` entry of a configuration file."""
    return {name: value for name, value in asdict(gpu).items() if name not in ("driver", "uuid") and value}
