"""Processes that are forked from a server which has imported everything, and which never touches CUDA."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


def context() -> Any:
    """Where such processes are started: a restart takes no second import. Ctrl-C is left to this process."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tuning.compile_pool", "tuning.measurement", "tuning.warm"])
    multiprocessing.resource_tracker.ensure_running()  # by the server's start it would be started, and unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server and its children inherit this
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return forkserver


def end_with_parent() -> None:
    """Have this process, and what it starts, ended when the one that asked for it is gone, whatever it is at then."""
    os.setsid()
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it Ctrl-C waits until the end: a process whose start is interrupted is known to nobody.

    So do other signals whose handlers call that of Ctrl-C, also where that one is ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # which Ctrl-C does not reach
        yield
        return
    held: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if callable(previous):
            for number, frame in held[:1]:
                previous(number, frame)
        elif any(number != signal.SIGINT for number, _ in held):
            raise KeyboardInterrupt
