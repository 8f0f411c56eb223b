"""What is seen while a search runs: two lines that fit a terminal, and lines now and then where there is none."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from types import SimpleNamespace

import pytest
from fakes import PROBLEM
from rich.console import Console

from tuning import progress as module
from tuning.progress import SearchProgress

ESCAPES = r"\x1b\[[0-9;?]*[A-Za-z]"
TESTS = Path(__file__).resolve().parent
LONGEST = replace(PROBLEM, form="fused_chunk_gradients", K=256, V=512)
STANDING = "best 0.0232 of 0.0301 ms, GPU waited 34%"

widths = pytest.mark.parametrize("width", [80, 120])


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(progress: SearchProgress, width: int) -> list[str]:
    """What the display shows on a terminal of that width."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    with console.capture() as shown:
        console.print(progress)
    return [line.rstrip() for line in re.sub(ESCAPES, "", shown.get()).splitlines()]


@widths
def test_two_lines_tell_all_of_the_longest_search_in_the_width_that_there_is(clock: Clock, width: int) -> None:
    progress = SearchProgress(Console(file=io.StringIO()), lambda: 12)
    with progress as update:
        clock.now += 83
        update(123, 432, LONGEST, "searching", STANDING)
    first, second = lines(progress, width)
    assert re.fullmatch(r"searching  (.+?)  123 of 432  1:23  about 3:29 left", first)
    assert first.count("━") + first.count("╸") + first.count("╺") == width - 46
    shape = " K=256 V=512" if width == 120 else ""
    assert second == f"fused_chunk_gradients{shape}: {STANDING}, 12 to compile"
    assert max(len(first), len(second)) <= width


def test_a_shape_that_fits_is_told(clock: Clock) -> None:
    progress = SearchProgress(Console(file=io.StringIO()))
    with progress as update:
        update(1, 48, replace(LONGEST, form="chunk"), "searching", STANDING)
    assert lines(progress, 80)[1] == f"chunk K=256 V=512: {STANDING}"


def test_before_the_first_step_the_compiler_is_what_is_waited_for(clock: Clock) -> None:
    progress = SearchProgress(Console(file=io.StringIO()), lambda: 7)
    clock.now += 13
    assert lines(progress, 80) == ["starting  0:13  7 to compile"]


@pytest.mark.parametrize(
    ("done", "seconds", "said"), [(1, 60.0, ""), (60, 0.5, ""), (60, 60.0, "about 6:12 left"), (432, 60.0, "0:00 left")]
)
def test_there_is_no_estimate_before_there_is_a_basis_for_one(
    clock: Clock, done: int, seconds: float, said: str
) -> None:
    progress = SearchProgress(Console(file=io.StringIO()))
    with progress as update:
        clock.now += seconds
        update(done, 432, PROBLEM, "searching", "")
    assert ("left" in lines(progress, 80)[0]) == bool(said)
    assert said in lines(progress, 80)[0]


def test_an_estimate_ends_with_the_budget_of_the_search(clock: Clock) -> None:
    progress = SearchProgress(Console(file=io.StringIO()), deadline=clock.now + 90)
    with progress as update:
        clock.now += 60
        update(60, 432, PROBLEM, "searching", "")
        assert "about 0:30 left" in lines(progress, 80)[0]
        update(1, 10, PROBLEM, "proving", "")
        clock.now += 60
        assert "about 9:00 left" in lines(progress, 80)[0]


def test_each_phase_has_its_own_time(clock: Clock) -> None:
    progress = SearchProgress(Console(file=io.StringIO()))
    with progress as update:
        clock.now += 100
        update(432, 432, PROBLEM, "searching", "")
        clock.now += 20
        update(1, 10, PROBLEM, "proving", "")
        clock.now += 5
    assert re.fullmatch(r"proving  .*1 of 10  0:05  about 0:45 left", lines(progress, 80)[0])


def test_without_a_terminal_a_line_comes_now_and_then(clock: Clock) -> None:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as shown, SearchProgress(console, lambda: 3) as update:
        for done in range(1, 43):
            clock.now += 0.5
            update(done, 432, PROBLEM, "searching", "best [1] ms")
    assert shown.get().splitlines() == [
        "searching: 21 of 432, 0:10; fused_chunk K=64 V=64: best [1] ms, 3 to compile",
        "searching: 42 of 432, 0:21, about 3:15 left; fused_chunk K=64 V=64: best [1] ms, 3 to compile",
    ]


@pytest.fixture
def terminal(tmp_path: Path, width: int) -> list[str]:
    """A run on the fake GPU, and what it wrote to a terminal of that width, without the escape sequences."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    own = {"FAKE_LOG": str(tmp_path / "launches"), "FAKE_FAULTS": json.dumps({}), "TERM": "xterm"}
    own |= {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-c", "import fake_device, sys; sys.exit(fake_device.main())", "run"]
    command += ["--workload", "B=8,T=1024,H=8,K=64,V=64", "--form", "fused_chunk", "--out", str(tmp_path / "a.yaml")]
    with subprocess.Popen(command, env=variables | own, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 65536):
                written += chunk
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return re.sub(ESCAPES, "", written.decode()).replace("\r", "\n").split("\n")


@widths
def test_a_run_in_a_terminal_shows_both_lines_whole(terminal: list[str], width: int) -> None:
    firsts = [line for line in terminal if re.match(r"(searching|confirming|proving)  ", line)]
    assert firsts
    assert all(re.search(r"  [━╸╺]{20,}  \d+ of \d+  \d:\d\d", line) for line in firsts)
    seconds = [line for line in terminal if re.match(r"fused_chunk(_gradients)? K=64 V=64", line)]
    assert any("best " in line and "GPU waited" in line for line in seconds)
    assert max(map(len, firsts + seconds)) <= width
