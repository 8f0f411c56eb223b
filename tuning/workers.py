"""A worker for each GPU of this host, and one tuner at a time on each GPU."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tuning.storage import VARIABLE

COMMAND = [sys.executable, "-m", "tuning"]
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SESSION = "RETGEN_SESSION"  # what the workers of one run have in common


class GpuBusyError(Exception):
    """Another tuner measures on this GPU."""


@contextlib.contextmanager
def gpu_alone(name: str) -> Iterator[None]:
    """Be the only one to measure on a GPU, by its UUID; GpuBusyError where another does.

    The lock is a file in the temporary directory, for all users of the host, and ends with the process that holds it.
    """
    path = Path(tempfile.gettempdir()) / f"retgen-{name.replace('/', '-')}.lock"
    with contextlib.suppress(FileExistsError):
        made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o644)
        os.fchmod(made, 0o644)  # whatever the mask of the first user is
        os.close(made)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        others = "choose another GPU by CUDA_VISIBLE_DEVICES"
        raise GpuBusyError(f"another process measures on {name} ({path}): wait for it, or {others}") from None
    finally:
        os.close(handle)


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; CUDA is not initialised."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def chosen(devices: str | None) -> list[str]:
    """Of the visible GPUs those that `--devices` names, by position as torch counts or by UUID; ValueError if not."""
    there = visible()
    wanted = [name.strip() for name in devices.split(",")] if devices else [str(i) for i in range(len(there))]
    found = [there[int(name)] if name.isdecimal() and int(name) < len(there) else name for name in wanted]
    if missing := [name for name in found if name not in there]:
        visible_ones = f"not among the visible GPUs, {', '.join(there)}" if there else "no GPU is visible"
        raise ValueError(f"--devices {','.join(missing)}: {visible_ones}")
    return list(dict.fromkeys(found))


def without(arguments: list[str], *options: str) -> list[str]:
    """A command's arguments without those of some options, however these are written."""
    parser = ArgumentParser(add_help=False)
    for option in options:
        parser.add_argument(f"--{option}")
    return parser.parse_known_args(arguments)[1]


def run_all(
    arguments: list[str], devices: list[str], storage: str | None, compilers: int, say: Callable[[str], None]
) -> int:
    """Run the command once a GPU, as one tuning; Ctrl-C ends all in order. 0 where one did its work to the end."""
    shared = os.environ | {SESSION: f"session-{os.getpid()}-{os.urandom(8).hex()}", "PYTHONUNBUFFERED": "1"}
    shared |= {VARIABLE: storage} if storage else {}  # not on a command line, which every user sees
    each = str(max(1, compilers // len(devices)))
    children: list[subprocess.Popen[str]] = []
    told: list[int] = []

    def stop(signum: int, frame: object) -> None:
        if signum not in asked:
            return
        told.append(signum)
        for child in children:
            child.send_signal(signal.SIGINT if len(told) == 1 else signal.SIGKILL)

    asked = [number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN]  # by nohup, such as
    # Ctrl-C also where it is ignored: the workers would inherit that, and it is what ends them.
    previous = {number: signal.signal(number, stop) for number in {*asked, signal.SIGINT}}
    try:
        for device in devices:
            children.append(_start([*arguments, "--workers", each], shared | {"CUDA_VISIBLE_DEVICES": device}))
            if told:  # while it started, when nobody could tell it
                children[-1].send_signal(signal.SIGINT)
                break
        threads = [
            threading.Thread(target=_repeat, args=(child, f"gpu {device}", say), daemon=True)
            for child, device in zip(children, devices, strict=False)
        ]
        for thread in threads:
            thread.start()
        codes = [child.wait() for child in children]
        for thread in threads:
            thread.join()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()  # where starting the next has failed
    return 128 + told[0] if told else min(code if code >= 0 else 1 for code in codes)


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """In a session of its own: the terminal's Ctrl-C reaches it once, from its parent."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _repeat(child: subprocess.Popen[str], name: str, say: Callable[[str], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        say(f"[{name}] {line.rstrip()}")
    code = child.wait()
    if code < 0:
        say(f"[{name}] ended by signal {-code}: the others take its work")
