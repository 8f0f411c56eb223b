"""`python -m tuning compile`: compile candidates ahead of time, on a machine that need not have a GPU."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from triton import knobs

from tuning.compilation import ARCHS, Arch, Resources
from tuning.compile_pool import CompilePool, compile_key
from tuning.problems import Problem
from tuning.run import FOREVER, SearchProgress, problems_for
from tuning.tuner import likely_first
from tuning.workloads import parse

OUTCOMES = ("clean", "spills", "too large", "failed")
LIKELY = 40  # candidates of each search that a quick run may well want: it tries half as many
Launch = tuple[Problem, Any]


def precompile(options: argparse.Namespace, console: Console) -> int:
    """Fill Triton's cache with the candidates that a run is likely to want, or with all; 1 if none was compiled."""
    arch, started = ARCHS[options.arch], time.monotonic()
    problems = problems_for(parse(options.workload), options.form)
    launches = candidates(problems, arch, options.effort)
    console.print(_sifted(problems, arch), soft_wrap=True)
    console.print(escape(f"{len(launches)} candidates for {arch.name}, into {cache_directory()}"), soft_wrap=True)
    deadline = started + min(options.budget or FOREVER, FOREVER)
    outcomes: Counter[tuple[str, str]] = Counter()
    with contextlib.closing(CompilePool(arch.name, options.workers)) as pool, SearchProgress(console) as progress:
        for number, (launch, needs) in enumerate(_compiled(pool, launches, deadline), 1):
            outcomes[launch[0].kernel, _outcome(needs, arch)] += 1
            progress(number, len(launches), launch[0])
    console.print(_table(outcomes))
    if (left := len(launches) - outcomes.total()) > 0:
        console.print(f"the budget of {options.budget:g} s is spent: {left} candidates are left for another call")
    console.print(f"took {time.monotonic() - started:.0f} s; what was compiled is not compiled again by this Triton")
    return int(not any(outcome in ("clean", "spills") for _, outcome in outcomes))


def _sifted(problems: Iterable[Problem], arch: Arch) -> str:
    """How many combinations there are, and what the closed-form filters leave of them."""
    found = [problem.sift(arch) for problem in problems]
    dropped: Counter[str] = sum((sifted.dropped for sifted in found), Counter())
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.most_common())
    left = sum(len(sifted.candidates) for sifted in found)
    return f"{sum(sifted.enumerated for sifted in found)} combinations{reasons}; {left} are left"


def cache_directory() -> Path:
    """Where Triton keeps what it compiles: to be copied to the machine that has the GPU."""
    return Path(knobs.cache.dir)


def candidates(problems: Iterable[Problem], arch: Arch, effort: str) -> list[Launch]:
    """What to compile, each kernel once: the default of each problem, and its likely candidates or all."""
    wanted: dict[Any, Launch] = {}
    for problem in problems:
        likely = likely_first(problem, arch)
        for config in [problem.default(), *(likely if effort == "full" else likely[:LIKELY])]:
            wanted.setdefault(compile_key(problem, config), (problem, config))
    return list(wanted.values())


def _compiled(pool: CompilePool, launches: list[Launch], deadline: float) -> Iterator[tuple[Launch, Resources | str]]:
    """What the compiler says of each launch, until the deadline."""
    for problem, config in launches:
        pool.submit(problem, config)
    for problem, config in launches:
        try:
            needs = pool.result(problem, config, seconds=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            pool.forget_waiting()
            return
        yield (problem, config), needs


def _outcome(needs: Resources | str, arch: Arch) -> str:
    if isinstance(needs, str):
        return "failed"
    if not needs.fits(arch):
        return "too large"
    return "spills" if needs.spills else "clean"


def _table(outcomes: Counter[tuple[str, str]]) -> Table:
    table = Table("kernel", "compiled", *OUTCOMES)
    for kernel in sorted({kernel for kernel, _ in outcomes}):
        counts = [outcomes[kernel, outcome] for outcome in OUTCOMES]
        table.add_row(kernel, *map(str, (sum(counts), *counts)))
    return table
