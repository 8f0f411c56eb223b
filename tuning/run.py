"""`python -m tuning run`: tune the workloads and write the configuration file."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import generated.configuration as configuration
from tuning import rules
from tuning.compilation import ARCHS, Arch
from tuning.compile_pool import CompilePool
from tuning.measurement import Gpu, MeasurementError, Measurer, gpu_fields, gpu_present
from tuning.problems import Problem, problems_of
from tuning.tuner import EFFORTS, GpuJudge, Judge, ModelJudge, Tuner, Winner
from tuning.workloads import Workload, parse

FOREVER = 10 * 365 * 86400.0
LINE_SECONDS = 10.0


def run(options: argparse.Namespace, console: Console) -> int:
    """Tune what the options select; write even after Ctrl-C what was found until then."""
    workloads = parse(options.workload)
    measurer = None if options.arch or not gpu_present() else Measurer()
    try:
        arch = _architecture(options.arch, measurer)
        path = _output(options.out, measurer, arch)
        judge: Judge = GpuJudge(measurer) if measurer else ModelJudge(arch)
        problems = _problems(workloads, options.form)
        _announce(console, measurer, arch, workloads, problems, path)
        winners, interrupted, tuner = _tune(options, console, judge, arch, problems, path)
        if not winners:
            console.print("nothing was found: no candidate was compiled and accepted in time; the defaults stay in use")
            return 130 if interrupted else 1
        entries = [rules.entry_of(winner) for winner in winners] + rules.form_entries(winners)
        merged = rules.merge(rules.existing_entries(path), entries)
        device: dict[str, Any] = gpu_fields(measurer.gpu) if measurer else {"arch": arch.name}
        rules.write(path, rules.document(merged, device, measurer.gpu.driver if measurer else None))
        _report(console, winners, tuner, path, interrupted)
        return 130 if interrupted else 0
    finally:
        if measurer:
            measurer.close()


def default_path(gpu: Gpu | None, arch: Arch) -> Path:
    """Where a file goes by default: into the package in a source checkout, else into the user directory."""
    packaged = configuration.packaged_directory()
    checkout = (packaged.parent.parent / "pyproject.toml").is_file()
    name = f"{configuration.slug(gpu.name)}.yaml" if gpu else f"{arch.name}.modelled.yaml"
    return (packaged if checkout else configuration.user_directory()) / name


def _architecture(name: str | None, measurer: Measurer | None) -> Arch:
    wanted = name or (measurer.gpu.arch if measurer else "sm90")
    if wanted not in ARCHS:
        raise MeasurementError(f"the architecture {wanted} is not known; known are {', '.join(ARCHS)}")
    return ARCHS[wanted]


def _output(out: str | None, measurer: Measurer | None, arch: Arch) -> Path:
    return Path(out) if out else default_path(measurer.gpu if measurer else None, arch)


def _problems(workloads: list[Workload], forms: list[str]) -> list[Problem]:
    """What to tune, the cheap and widely used first; the chunk form's states belong to chunk."""
    wanted = forms or ["fused_chunk", "chunk", "parallel", "fused_recurrent"]
    parts = [part for form in wanted for part in (("chunk_states", "chunk") if form == "chunk" else (form,))]
    return [problem for part in parts for workload in workloads for problem in problems_of(workload, part)]


def _announce(
    console: Console,
    measurer: Measurer | None,
    arch: Arch,
    workloads: list[Workload],
    problems: list[Problem],
    path: Path,
) -> None:
    how = (
        f"measuring on {measurer.gpu.name}" if measurer else f"no GPU used: modelling {arch.name} from compiled kernels"
    )
    names = ", ".join(workload.name for workload in workloads)
    console.print(escape(f"{how}\n{len(problems)} kernels at {len(workloads)} workloads ({names})\nrules go to {path}"))


def _tune(
    options: argparse.Namespace, console: Console, judge: Judge, arch: Arch, problems: list[Problem], path: Path
) -> tuple[list[Winner], bool, Tuner]:
    deadline = time.monotonic() + (options.budget or FOREVER)
    known = rules.existing_entries(path)

    def incumbents(problem: Problem) -> list[Any]:
        point = rules.point_of(problem)
        return [rules.config_from(entry) for entry in known if entry.kernel == problem.kernel and entry.point == point]

    pool = CompilePool(arch.name, options.workers)
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end keeps what was found, as Ctrl-C does
    with _Progress(console) as progress:
        tuner = Tuner(judge, pool, arch, EFFORTS[options.effort], deadline, incumbents, progress)
        try:
            tuner.run(problems)
        except KeyboardInterrupt:
            interrupted = True
        console.print(f"proving {len(tuner.ranked)} winners")
        try:
            tuner.prove()
        finally:
            pool.close()
    return list(tuner.winners.values()), interrupted, tuner


class _Progress:
    """A bar with an estimate on a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console) -> None:
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        self._bar = Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console)
        self._task = self._bar.add_task("candidates", total=None)
        self._console, self._started, self._said = console, time.monotonic(), 0.0

    def __enter__(self) -> Callable[[int, int, Problem], None]:
        if self._console.is_terminal:
            self._bar.start()
        return self._update

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _update(self, done: int, total: int, problem: Problem) -> None:
        what = f"{problem.form} K={problem.K} V={problem.V}"
        self._bar.update(self._task, completed=done, total=total, description=what)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said > LINE_SECONDS:
            self._said = now
            left = (now - self._started) * (total - done) / max(1, done)
            self._console.print(f"{done} of {total} candidates, about {left:.0f} s left; {what}")


def _report(console: Console, winners: list[Winner], tuner: Tuner, path: Path, interrupted: bool) -> None:
    table = Table("kernel", "shape", "configuration", "ms", "default ms", "error")
    for winner in winners:
        problem = winner.problem
        use = " ".join(f"{name}={value}" for name, value in rules.knob_values(winner.config).items())
        shape = f"B={problem.B} T={problem.T} H={problem.H} K={problem.K} V={problem.V}"
        default = "" if winner.default_ms is None else f"{winner.default_ms:.4g}"
        table.add_row(
            problem.kernel,
            shape,
            use,
            f"{winner.ms:.4g}",
            default,
            "" if winner.error is None else f"{winner.error:.1e}",
        )
    console.print(table)
    funnel = tuner.funnel
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(funnel.failures.items())) or "none"
    console.print(
        escape(
            f"{funnel.enumerated} candidates enumerated, {funnel.compiled} compiled, {funnel.clean} fit, {funnel.timed} "
            f"{'estimated' if tuner.judge.modelled else 'timed'}; dropped: {failures}"
        )
    )
    for line in funnel.rejected:
        console.print(escape(f"not used: {line}"), soft_wrap=True)
    state = "stopped early; kept" if interrupted else "wrote"
    console.print(escape(f"{state} {len(winners)} rules in {path}"))
