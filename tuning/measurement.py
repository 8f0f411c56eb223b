"""Check and time configurations in a process of its own, which may crash or hang without harm to the tuner."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from tuning import device, forkserver
from tuning.device import Gpu, describe_gpu
from tuning.problems import Problem
from tuning.timing import Timing
from tuning.workers import GpuBusyError, gpu_alone

# Seconds after which a job counts as hung: a candidate is timed in a fraction of one, a proof takes a few.
DEADLINES = {"start": 180.0, "measure": 30.0, "compare": 60.0, "prove": 120.0}
HANGS, DIED = "the kernel hangs", "the kernel crashed"
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


class Measurer:
    """A child process that owns the GPU; the parent never touches CUDA.

    Until it is closed, no other measures there: GpuBusyError where one does.

    `busy` is how many seconds the process was at jobs.
    """

    def __init__(self) -> None:
        self._context = forkserver.context()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._job, self._sent = "", 0.0  # the last, and when that was
        self.busy = 0.0
        self._lock = contextlib.ExitStack()
        self.gpu = self._start()
        try:
            if self.gpu.uuid:
                self._lock.enter_context(gpu_alone(self.gpu.uuid))
        except GpuBusyError:
            self.renew()
            raise

    def begin(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Callable[[], Timing]:
        """Check, then time, while the caller goes on; what is returned waits for the times, or raises.

        `stop_above_ms` ends the timing of a configuration that is clearly slower.
        """
        self._send(("measure", problem, config, stop_above_ms, extra))
        return self._receive

    def measure(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
        """The same, waited for."""
        return self.begin(problem, config, stop_above_ms, extra)()

    def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        """Time several configurations in interleaved rounds, the order rotating."""
        timings: list[Timing] = self._call(("compare", problem, configs, extra))
        return timings

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float:
        """The largest error at the problem's full shape, with states and packed; raises if over the limit."""
        error: float = self._call(("prove", problem, config, extra))
        return error

    def close(self) -> None:
        """End the child, and let others measure."""
        self.renew()
        self._lock.close()

    def renew(self) -> None:
        """End the child, whatever it is at; the next call starts another."""
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
            self._job, self._sent = "start", time.monotonic()
            gpu: Gpu = self._receive()
        except MeasurementError as error:
            self.renew()
            raise StartError(str(error)) from None
        except BaseException:  # an answer that nobody waits for must not be taken for the next one's
            self.renew()
            raise
        return gpu

    def _call(self, job: tuple[Any, ...]) -> Any:
        self._send(job)
        return self._receive()

    def _send(self, job: tuple[Any, ...]) -> None:
        if self._process is None:
            try:
                self._start()
            except StartError:
                self._start()  # once more: the GPU may just have been reset
        assert self._pipe is not None
        self._job, self._sent = job[0], time.monotonic()
        try:
            with contextlib.suppress(ConnectionError):  # whoever waits for the answer finds out
                self._pipe.send(job)
        except BaseException:
            self.renew()
            raise

    def _receive(self) -> Any:
        """The answer to what was sent last."""
        assert self._pipe is not None
        seconds, silence = DEADLINES[self._job], "it does not start" if self._job == "start" else HANGS
        answer = None
        try:
            if not self._pipe.poll(max(0.0, self._sent + seconds - time.monotonic())):
                self.renew()
                raise MeasurementError(f"no answer from the measuring process within {seconds:.0f} s: {silence}")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.renew()
            cause = "while it started" if self._job == "start" else DIED
            raise MeasurementError(f"the measuring process died: {cause}") from None
        except KeyboardInterrupt:
            self.renew()  # its answer to this job must not be taken for the next one's
            raise
        finally:
            # What has answered says for how long it was at it: the answer may have lain here for a while.
            if self._job != "start":
                self.busy += answer.seconds if answer else time.monotonic() - self._sent
        if answer.status == "sticky":
            self.renew()
        if answer.status != "ok":
            raise MeasurementError(answer.value)
        return answer.value


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
