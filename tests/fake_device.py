"""A measuring process that needs no GPU: it times by a formula, and breaks in the ways that a test asks for.

`main` is the tuner's command line over it. Environment variables tell it what to do: FAKE_LOG, a file to which every
launch is written before it happens; FAKE_FAULTS, a JSON object from a part of such a line to what happens then;
FAKE_UUID, the GPU's; FAKE_GPUS, how many there are; FAKE_HOST, a name for their UUIDs; FAKE_DISK, how many bytes a file
of the tuner's may grow to.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fakes import Pool, landscape, timing

from tuning import __main__, device, forkserver, measurement, workers
from tuning import run as run_module
from tuning.device import Answer, Gpu
from tuning.space import knob_values

HANG_SECONDS = 1.0
UUID = os.environ.get("FAKE_UUID") or ("FAKE_GPUS" in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES")) or ""
GPU = Gpu("Fake GPU", "sm90", 132, 80, "580.1", UUID)


def serve(pipe: Connection) -> None:
    """As `tuning.device.serve`, without a device."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pipe.send(Answer("ok", GPU))
    while True:
        try:
            job, problem, configs, *_, mark = pipe.recv()
        except EOFError:
            return
        if mark:
            mark.make()
        group = configs if isinstance(configs, list) else [configs]
        fault = next((fault for config in group if (fault := _launch(job, problem.form, config))), None)
        with contextlib.suppress(BrokenPipeError):  # the tuner was killed
            pipe.send(_answer(job, group, fault))
        if fault == "illegal access":
            os._exit(1)


def _launch(job: str, form: str, config: Any) -> str | None:
    line = " ".join([job, form, *(f"{name}={value}" for name, value in knob_values(config).items())])
    with Path(os.environ["FAKE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    faults: dict[str, str] = json.loads(os.environ.get("FAKE_FAULTS", "{}"))
    fault = next((fault for part, fault in faults.items() if part in line), None)
    if fault == "hang":
        time.sleep(1000)
    elif fault == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    elif fault is not None and fault.startswith("kill"):
        if fault == "kill device once" and Path(os.environ["FAKE_LOG"]).read_text().splitlines().count(line) > 1:
            return None
        tuner = int(os.environ["FAKE_TUNER"])
        victims = {"kill tuner": tuner, "kill server": os.getppid()}
        os.kill(victims.get(fault, os.getpid()), signal.SIGKILL)
        if fault == "kill tuner":
            os._exit(1)  # where it was forked from the tuner, it holds the other end of its own pipe
        time.sleep(0.2)  # a process that is killed leaves its pipes a moment later
    return fault


def _answer(job: str, group: list[Any], fault: str | None) -> Answer:
    if fault == "illegal access":
        return Answer("sticky", "AcceleratorError: CUDA error: an illegal memory access was encountered")
    if fault == "out of memory":
        return Answer("error", "OutOfMemoryError: CUDA out of memory")
    if job == "prove":
        return Answer("ok", 0.001, 0.0)
    times = [timing(landscape(config)) for config in group]
    return Answer("ok", times[0] if job == "measure" else times)


def run(variables: dict[str, str], arguments: list[str], output: str) -> None:
    """`main` in a process that was forked, and so has imported everything: its measuring process is forked too."""
    os.environ.update(variables)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    forkserver.context = lambda: multiprocessing.get_context("fork")
    sys.argv = ["tuning", *arguments]
    sys.exit(main())


def main() -> int:
    """`python -m tuning` with this process in the real one's place, and no compiler."""
    os.environ["FAKE_TUNER"] = str(os.getpid())
    device.serve = serve
    run_module.gpu_present = lambda: True  # type: ignore[attr-defined]
    run_module.CompilePool = Pool  # type: ignore[attr-defined,assignment,misc]
    measurement.DEADLINES |= dict.fromkeys(device.JOBS, HANG_SECONDS)
    if "FAKE_GPUS" in os.environ:
        there = [f"FAKE-{os.environ['FAKE_HOST']}-{number}" for number in range(int(os.environ["FAKE_GPUS"]))]
        workers.visible = lambda: [os.environ["CUDA_VISIBLE_DEVICES"]] if UUID else there
        workers.COMMAND = [sys.executable, "-c", "import fake_device, sys; sys.exit(fake_device.main())"]
    if "FAKE_DISK" not in os.environ:
        return __main__.main(sys.argv[1:])
    said = io.StringIO()  # which the test's file may have no room for either
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FAKE_DISK"]), resource.RLIM_INFINITY))
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return __main__.main(sys.argv[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(said.getvalue(), end="")
