"""`python -m tuning compile`: compile ahead of time what a run would ask for, on a machine that need not have a GPU.

It is a rehearsal: the tuner itself, with the model's times in place of a GPU's. What a run asks for first does not
depend on times, and what it asks for later follows from them as far as the model is right. Searches do not end early
here and go on for longer, since a run whose times are others wants others; the variants of the launches that a run
proves are compiled of the best few, one of which it may find best.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from triton import knobs

from generated import configuration
from tuning import rules
from tuning.compilation import ARCHS, Arch, Resources
from tuning.compile_pool import CompilePool
from tuning.judges import ModelJudge
from tuning.problems import GRADIENTS, PLAIN, Problem
from tuning.progress import SearchProgress
from tuning.run import FOREVER, earlier_winners, incumbents_among, problems_for
from tuning.search import EFFORTS, Effort
from tuning.space import knob_values
from tuning.tuner import NEIGHBOUR_SEGMENTS, Tuner
from tuning.workloads import parse

FILTERS = ("known bad", "registers", "shared memory")
OUTCOMES = ("clean", "spills", "too large", "failed")
MORE_ROUNDS, MORE_AHEAD = 6, 8  # than a run, of whose candidates about one in ten is then missing
BEST = 4  # of each search: their variants, and their tiles in chunk's segments


class Rehearsal(ModelJudge):
    """The model in the place of a GPU: the tuner looks ahead and lets kernels spill as where it measures."""

    modelled = False


def precompile(options: argparse.Namespace, console: Console) -> int:
    """Fill Triton's cache with what a run is likely to want; 1 if nothing was compiled."""
    arch, started = ARCHS[options.arch], time.monotonic()
    problems, known = problems_for(parse(options.workload), options.form, arch), known_entries(arch)
    former = known_entries(arch, rules.former_entries)
    console.print(escape(f"for {arch.name}, into {cache_directory()}"), soft_wrap=True)
    deadline = started + min(options.budget or FOREVER, FOREVER)
    with contextlib.closing(CompilePool(arch.name, options.workers)) as pool:
        with SearchProgress(console) as progress:
            tuner = rehearse(pool, arch, EFFORTS[options.effort], problems, deadline, known, progress, former)
        console.print(_table(problems, pool, arch))
        compiled = [outcome.needs for _, outcome in pool.outcomes()]
    if tuner.unfinished or tuner.interrupted:
        cause = "stopped" if tuner.interrupted else f"the budget of {options.budget:g} s is spent"
        console.print(f"{cause}: {tuner.unfinished} of {len(problems)} searches did not end; another call goes on")
    console.print(f"took {time.monotonic() - started:.0f} s; what was compiled is not compiled again by this Triton")
    return 130 if tuner.interrupted else int(all(isinstance(needs, str) for needs in compiled))


def rehearse(
    pool: CompilePool,
    arch: Arch,
    effort: Effort,
    problems: list[Problem],
    deadline: float = FOREVER,
    known: Iterable[rules.Entry] = (),
    progress: Any = lambda *step: None,
    former: Iterable[rules.Entry] = (),
) -> Tuner:
    """Let the pool compile what a run would ask it for; `known` is what rules hold, `former` of earlier kernels too."""
    known = list(known)
    longer = replace(effort, rounds=effort.rounds + MORE_ROUNDS, ahead=effort.ahead + MORE_AHEAD, gain=0.0)

    # Roughly: what is left over is measured for nothing while the compiler is busy, and made up for.
    likely = len(problems) * (longer.measurements + 2 * longer.ahead)

    def say(done: int, total: int, problem: Problem, phase: str, standing: str) -> None:
        """Of what was compiled: the model's times are no news."""
        progress(pool.submitted - pool.outstanding(), max(pool.submitted, likely), problem)

    earlier = earlier_winners([*former, *known])
    tuner = Tuner(Rehearsal(arch), pool, arch, longer, deadline, incumbents_among(known), say, earlier=earlier)
    tuner.run(problems)
    if not tuner.unfinished:
        _wait_for_best(tuner, progress)
    return tuner


def _wait_for_best(tuner: Tuner, progress: Any) -> None:
    """Compile what else a run wants of the best few of each search: until the deadline, or Ctrl-C."""
    wanted = [
        (problem, config, own, variant)
        for problem, found in tuner.found.items()
        for config in dict.fromkeys([found.default, *found.incumbents, *_best(tuner, problem)])
        for own, variant in problem.proof_launches(config)
    ]
    wanted += [(problem, config, problem, PLAIN) for problem in tuner.found for config in _borrowed(tuner, problem)]
    for problem, config, own, variant in wanted:
        tuner.pool.submit(own, config, variant=variant, extra=tuner.extra(problem))
    with contextlib.suppress(TimeoutError, KeyboardInterrupt):
        for number, (problem, config, own, variant) in enumerate(wanted, 1):
            extra = tuner.extra(problem)
            tuner.pool.result(own, config, variant=variant, extra=extra, seconds=tuner.seconds_left())
            progress(number, len(wanted), problem, "compiling for proofs")


def _best(tuner: Tuner, problem: Problem) -> list[Any]:
    found = tuner.found.get(problem)
    return found.contenders(BEST) if found else []


def _borrowed(tuner: Tuner, problem: Problem) -> list[Any]:
    """Tiles of fused_chunk's best few, which the run starts from if they win: for chunk at its segment lengths."""
    tiles = _best(tuner, replace(problem, form="fused_chunk"))
    if problem.form == GRADIENTS:
        return tiles
    if problem.form == "chunk":
        kind = type(problem.default())
        return [kind(L=L, **knob_values(tile)) for L in NEIGHBOUR_SEGMENTS for tile in tiles]
    return []


def known_entries(arch: Arch, read: Callable[[Path], list[rules.Entry]] = rules.existing_entries) -> list[rules.Entry]:
    """What the files that imports read hold for GPUs of an architecture: what a run starts from."""
    paths = configuration.config_files()
    return [entry for path in paths if _is_for(path, arch) for entry in read(path)]


def _is_for(path: Path, arch: Arch) -> bool:
    with contextlib.suppress(configuration.ConfigurationError):
        return configuration.parse_file(path).device.arch == arch.name
    return False


def cache_directory() -> Path:
    """Where Triton keeps what it compiles: to be copied to the machine that has the GPU."""
    return Path(knobs.cache.dir)


def _outcome(needs: Resources | str, arch: Arch) -> str:
    if isinstance(needs, str):
        return "failed"
    if not needs.fits(arch):
        return "too large"
    return "spills" if needs.spills else "clean"


def _table(problems: Iterable[Problem], pool: CompilePool, arch: Arch) -> Table:
    """A row a kernel: what was dropped before compiling, and what came of the rest."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for problem in problems:
        sifted = problem.sift(arch)
        counts[problem.kernel].update(sifted.dropped, enumerated=sifted.enumerated)
    seconds = defaultdict[str, float](float)
    for problem, compiled in pool.outcomes():
        counts[problem.kernel].update(["compiled", _outcome(compiled.needs, arch)])
        seconds[problem.kernel] += compiled.seconds
    columns = ("enumerated", *FILTERS, "compiled", *OUTCOMES)
    table = Table("kernel", *columns, "core s")
    for kernel, count in counts.items():
        table.add_row(kernel, *(str(count[column]) for column in columns), f"{seconds[kernel]:.1f}")
    return table
