"""Landscapes: every candidate of a search measured, so that a way of searching can be tried again without a GPU.

A landscape is a CSV file: a first line of JSON behind `#` that says what was measured where, then a row a candidate:
its knobs, what the compiled kernel needs, and its milliseconds, empty where it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from generated import configuration
from generated.configuration import kernel_registry
from generated.launch import has_aligned_rows
from tuning.compilation import ARCHS, Resources
from tuning.compile_pool import CompilePool
from tuning.measurement import Gpu, MeasurementError, Measurer, StartError, gpu_present
from tuning.problems import FORMS, Problem
from tuning.progress import SearchProgress
from tuning.rules import write_whole
from tuning.run import FOREVER, RunError, problems_for
from tuning.space import knob_values
from tuning.tuner import likely_first
from tuning.workloads import parse

DIRECTORY = Path(__file__).parent / "landscapes"
NEAR_BEST = 1.2  # what is at most so much slower than the fastest is timed again, in turns
AGAIN = 24
NEEDS = ("registers", "spills", "shared", "warps")


@dataclass(frozen=True)
class Candidate:
    """A configuration, what its kernel needs, and its milliseconds or None where it failed."""

    config: Any
    needs: Resources
    ms: float | None


@dataclass(frozen=True)
class Landscape:
    """All candidates of one problem on one GPU."""

    problem: Problem
    gpu: Gpu
    software: dict[str, str]
    source: str
    candidates: list[Candidate]

    @property
    def name(self) -> str:
        """What the problem is, in a file's name."""
        p = self.problem
        return f"{p.form}_{p.dtype}_B{p.B}_T{p.T}_H{p.H}_K{p.K}_V{p.V}"

    @property
    def best_ms(self) -> float:
        """The milliseconds of the fastest."""
        return min(c.ms for c in self.candidates if c.ms is not None)


def landscape(options: argparse.Namespace, console: Console) -> int:
    """Measure every candidate of the selected searches and write a file for each, until the budget is spent."""
    if not gpu_present():
        raise RunError(
            "a landscape is measured, and there is no GPU here; `python -m tuning simulate` reads the shipped"
        )
    deadline = time.monotonic() + min(options.budget or FOREVER, FOREVER)
    workloads = parse(options.workload)
    for workload in workloads:
        if not has_aligned_rows(workload.torch_dtype, workload.K, workload.V):
            raise RunError(f"{workload.name}: an odd K or V in {workload.dtype} always runs the defaults: no search is")
    measurer, failed = Measurer(), 0
    compilers = CompilePool(measurer.gpu.arch, options.workers, aside=True)
    with contextlib.closing(measurer), contextlib.closing(compilers) as pool:
        directory = Path(options.out) if options.out else DIRECTORY / configuration.slug(measurer.gpu.name)
        arch = ARCHS[measurer.gpu.arch]
        problems = problems_for(workloads, options.form, arch)
        searches = {problem: [problem.default(), *likely_first(problem, arch)] for problem in problems}
        searches = {problem: list(dict.fromkeys(configs)) for problem, configs in searches.items()}
        for problem, configs in searches.items():
            for config in configs:
                pool.submit(problem, config)
        with SearchProgress(console) as progress:
            for problem, configs in searches.items():
                try:
                    found = _measure(problem, configs, measurer, pool, deadline, progress)
                except StartError:
                    raise
                except MeasurementError as error:
                    failed += 1
                    console.print(escape(f"{problem}: nothing is written: {error}"), soft_wrap=True)
                    continue
                if found is None:
                    console.print(f"the budget of {options.budget:g} s is spent")
                    return 1
                path = write(directory, found)
                console.print(escape(f"{path}: {len(found.candidates)} candidates, best {found.best_ms:.4g} ms"))
    return int(failed > 0)


def _measure(
    problem: Problem, configs: list[Any], measurer: Measurer, pool: CompilePool, deadline: float, progress: Any
) -> Landscape | None:
    """Each candidate alone, then the fastest against each other; None at the deadline.

    MeasurementError where that cannot be done: where no candidate ran, or (StartError) their process does not.
    """
    found: dict[Any, Candidate] = {}
    for number, config in enumerate(configs, 1):
        if time.monotonic() > deadline:
            return None
        needs = pool.result(problem, config)
        progress(number, len(configs), problem)
        if isinstance(needs, str) or not needs.fits(ARCHS[measurer.gpu.arch]):
            continue
        found[config] = Candidate(config, needs, _alone(problem, config, measurer))
    times = {config: candidate.ms for config, candidate in found.items() if candidate.ms is not None}
    if not times:
        raise MeasurementError(f"none of {len(found)} candidates ran")
    limit = NEAR_BEST * min(times.values())
    fastest = [config for config in sorted(times, key=times.__getitem__) if times[config] <= limit]
    again = measurer.compare(problem, fastest[:AGAIN], {})
    for config, timing in zip(fastest, again, strict=False):
        found[config] = Candidate(config, found[config].needs, timing.ms)
    software = {"driver": measurer.gpu.driver} | {name: version(name) for name in ("triton", "torch")}
    source = kernel_registry()[problem.kernel].source
    return Landscape(problem, measurer.gpu, software, source, list(found.values()))


def _alone(problem: Problem, config: Any, measurer: Measurer) -> float | None:
    """The milliseconds of a candidate, None where it fails."""
    try:
        return measurer.measure(problem, config, float("inf"), {}).ms
    except StartError:  # which is no fault of the candidate
        raise
    except MeasurementError:
        return None


def write(directory: Path, found: Landscape) -> Path:
    """Write a landscape's file, whole or not at all."""
    knobs = list(knob_values(found.candidates[0].config))
    head = asdict(replace(found, candidates=[]))
    del head["candidates"], head["gpu"]["uuid"]  # of which machine it was is nobody's concern
    text = io.StringIO()
    text.write(f"# {json.dumps(head)}\n")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*knobs, *NEEDS, "ms"])
    for candidate in found.candidates:
        ms = "" if candidate.ms is None else f"{candidate.ms:.5g}"
        rows.writerow([*knob_values(candidate.config).values(), *(getattr(candidate.needs, n) for n in NEEDS), ms])
    path = directory / f"{found.name}.csv"
    write_whole(path, text.getvalue(), readable=read)
    return path


def read(path: Path) -> Landscape:
    """A landscape's file."""
    head, _, table = path.read_text(encoding="utf-8").partition("\n")
    about = json.loads(head.removeprefix("#"))
    problem = Problem(**about["problem"])
    config_type = FORMS[problem.form].config_type
    columns = table.partition("\n")[0].split(",")
    knobs = [field.name for field in fields(config_type) if field.name in columns]  # one that is younger has a default
    candidates = [
        Candidate(
            config_type(**{name: int(row[name]) for name in knobs}),
            Resources(**{name: int(row[name]) for name in NEEDS}),  # type: ignore[arg-type]
            float(row["ms"]) if row["ms"] else None,
        )
        for row in csv.DictReader(io.StringIO(table))
    ]
    return Landscape(problem, Gpu(**about["gpu"]), about["software"], about["source"], candidates)


def paths() -> dict[str, Path]:
    """The files that come with the package, by their paths below `DIRECTORY` without the ending."""
    found = sorted(DIRECTORY.rglob("*.csv"))
    return {path.relative_to(DIRECTORY).with_suffix("").as_posix(): path for path in found}


def shipped() -> list[Landscape]:
    """Those that come with the package."""
    return [read(path) for path in paths().values()]
