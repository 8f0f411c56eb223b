"""How far a search is: two lines that keep up on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuning.problems import Problem

LINE_SECONDS = 10.0
BASIS_SHARE, BASIS_SECONDS = 0.05, 3.0  # of a phase, before what it took says what the rest will take


class SearchProgress:
    """Tells of each phase: how many candidates of how many, since when and for how long yet; below it the search.

    `compiling` counts what waits for the compiler; `deadline`, on the monotonic clock, is the searching phase's.
    """

    def __init__(
        self, console: Console, compiling: Callable[[], int] = lambda: 0, deadline: float = float("inf")
    ) -> None:
        self._console, self._compiling, self._deadline = console, compiling, deadline
        self._live = Live(self, console=console, refresh_per_second=4)
        self._phase = self._name = self._short_name = self._standing = ""
        self._done = self._total = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Callable[..., None]:
        if self._console.is_interactive:
            self._live.start()
        return self._update

    def __exit__(self, *error: object) -> None:
        if self._console.is_interactive:
            self._live.stop()

    def _update(self, done: int, total: int, problem: Problem, phase: str = "compiling", standing: str = "") -> None:
        now = time.monotonic()
        if self._phase and (phase != self._phase or done == 1):  # the first began when the display did
            self._began = now
        self._phase, self._done, self._total, self._standing = phase, min(done, total), total, standing
        self._name, self._short_name = f"{problem.form} K={problem.K} V={problem.V}", problem.form
        if not self._console.is_interactive and now - self._said > LINE_SECONDS:
            self._said = now
            times = ", ".join(filter(None, (self._count(), self._elapsed(), self._left())))
            self._console.print(escape(f"{phase}: {times}; {self._search(self._name)}"), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The two lines, for the width that there is."""
        if not self._phase:
            compiling = self._compiling()
            yield Text(f"starting  {self._elapsed()}" + (f"  {compiling} to compile" if compiling else ""))
            return
        words = [self._phase, self._count(), self._elapsed(), self._left()]
        line = Table.grid(padding=(0, 2))
        # A column that takes what is left would leave the others nothing.
        room = options.max_width - sum(len(word) + 2 for word in words)
        bar = ProgressBar(self._total, self._done, width=max(0, room))
        line.add_row(words[0], bar, *words[1:])
        yield line
        text = self._search(self._name)
        fits = len(text) <= options.max_width
        yield Text(text if fits else self._search(self._short_name), no_wrap=True, overflow="ellipsis")

    def _count(self) -> str:
        return f"{self._done} of {self._total}"

    def _search(self, name: str) -> str:
        """The search that was last heard of."""
        compiling = self._compiling()
        parts = (self._standing, f"{compiling} to compile" if compiling else "")
        return ": ".join(filter(None, (name, ", ".join(filter(None, parts)))))

    def _elapsed(self) -> str:
        return _clock(time.monotonic() - self._began)

    def _left(self) -> str:
        """An estimate, once there is a basis for one."""
        now = time.monotonic()
        passed, share = now - self._began, self._done / max(1, self._total)
        if share < BASIS_SHARE or passed < BASIS_SECONDS:
            return ""
        left = passed * (1 / share - 1)
        if self._phase == "searching":
            left = min(left, max(0.0, self._deadline - now))
        return f"about {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
