"""`python -m tuning check`: hold configuration files against the schema, the kernels and the installed compiler."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated import configuration
from generated.configuration import kernel_problem, kernel_registry
from generated.configuration_file import ConfigurationError, KernelRules, Rule, parse_file
from tuning import rules
from tuning.compilation import ARCHS, Resources
from tuning.compile_pool import CompilePool
from tuning.known_bad import known_bad
from tuning.problems import FORMS, Problem, problem_at
from tuning.proof import ERROR_LIMITS
from tuning.tuner import NOISE

TUNED = {Problem(form, "bfloat16", 1, 1, 1, 1, 1).kernel for form in FORMS}  # the kernels that rules are compiled for


@dataclass(frozen=True)
class Place:
    """A rule and where it stands."""

    kernel: str
    index: int
    rule: Rule

    def __str__(self) -> str:
        return f"kernels.{self.kernel}.rules[{self.index}]"


Launch = tuple[Place, Problem, Any]


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a rule: the resources, or in words why there are none."""

    place: Place
    needs: Resources | str


def check(options: argparse.Namespace, console: Console) -> int:
    """Check the files that are given, or all that imports read; 1 if anything is wrong with one."""
    paths = [Path(name) for name in options.file] or _all_files()
    if not paths:
        console.print("no configuration file is in any of the places where imports look")
        return 0
    wrong = 0
    for path in paths:
        faults, changes, checked = _check_file(path, options, console)
        for line in faults:
            console.print(escape(f"  wrong: {line}"), soft_wrap=True, highlight=False)
        if changes.row_count:
            console.print(changes)
            console.print(
                f"compiled otherwise than when tuned (here by Triton {version('triton')}): right, but times may differ"
            )
        verdict = f"{len(faults)} wrong" if faults else "nothing wrong"
        console.print(escape(f"{path}: {checked}, {verdict}"), soft_wrap=True, highlight=False)
        wrong += len(faults)
    return int(wrong > 0)


def _all_files() -> list[Path]:
    return [
        path
        for directory in configuration.config_directories()
        for pattern in ("*.yaml", "*.yml")
        for path in sorted(directory.glob(pattern))
        if not path.name.startswith(".")
    ]


def _check_file(path: Path, options: argparse.Namespace, console: Console) -> tuple[list[str], Table, str]:
    """What is wrong with a file, what the compiler does otherwise than when it was written, and what was looked at."""
    changes = Table("rule", "figure", "then", "now")
    try:
        file = parse_file(path)
    except ConfigurationError as error:
        return [str(error).removeprefix(f"{path}: ")], changes, "not read"
    problems = {kernel: kernel_problem(kernel, entry) for kernel, entry in file.kernels.items()}
    places = {kernel: _places(kernel, entry) for kernel, entry in file.kernels.items()}
    faults = [problem for problem in problems.values() if problem]
    faults += [fault for own in places.values() for fault in (*interval_faults(own), *figure_faults(own))]
    launches = [
        _launch(place) for kernel in places if kernel in TUNED and not problems[kernel] for place in places[kernel]
    ]
    faults += bad_faults(launches, file.device.arch)
    checked = f"{sum(map(len, places.values()))} rules"
    if options.no_compile:
        return faults, changes, checked
    if file.device.arch not in ARCHS:
        return faults, changes, f"{checked}, not compiled: {file.device.arch} is none of {', '.join(ARCHS)}"
    with contextlib.closing(CompilePool(file.device.arch, options.workers)) as pool:
        results = list(_compile(pool, launches, console))
    for result in results:
        faults += [f"{result.place}: {reason}" for reason in [_compile_fault(result, file.device.arch)] if reason]
        for name, then, now in changed_figures(result):
            changes.add_row(str(result.place), name, str(then), str(now))
    return faults, changes, f"{checked}, {len(results)} of them compiled for {file.device.arch}"


def _places(kernel: str, entry: KernelRules) -> list[Place]:
    return [Place(kernel, index, rule) for index, rule in enumerate(entry.rules)]


def interval_faults(places: list[Place]) -> list[str]:
    """Rules of one kernel that cover a shape twice, or that reach farther from their point than the tuner lets them."""
    faults = []
    for one, other in itertools.combinations(places, 2):
        tuned = rules.point_from(one.rule) and rules.point_from(other.rule)  # who writes by hand may rely on the order
        if tuned and one.rule.proof == other.rule.proof and rules.overlap(one.rule.when, other.rule.when):
            faults.append(f"{other}.when covers shapes that {one} covers already; the first one wins")
    for place in places:
        point = rules.point_from(place.rule)
        for axis, low, high in [] if point is None else rules.stretches(place.rule.when, point):
            faults.append(f"{place}.when.{axis} reaches beyond [{low}, {high}], as far as its point's figures hold")
        if point and not place.rule.when.matches(point.dtype, point.K, point.V, point.BH, point.T):
            faults.append(f"{place}.when does not hold the point at which its figures were found")
    return faults


def figure_faults(places: list[Place]) -> list[str]:
    """Rules whose own figures speak against them."""
    faults = []
    for place in places:
        figures, limit = place.rule.figures, ERROR_LIMITS[place.rule.when.dtype]
        if (error := figures.get("error", 0.0)) > limit:
            faults.append(f"{place}: its error is {error}, over the {limit:.0e} that is taken for rounding")
        if (ms := figures.get("ms", 0.0)) > (1 + NOISE) * (default := figures.get("default_ms", ms)):
            faults.append(f"{place}: its {ms} ms are more than the default's {default}")
    return faults


def _compile(pool: CompilePool, launches: list[Launch], console: Console) -> Iterator[Compiled]:
    for _, problem, config in launches:
        pool.submit(problem, config)
    with console.status("compiling") as status:
        for number, (place, problem, config) in enumerate(launches, 1):
            status.update(f"compiling rule {number} of {len(launches)}")
            yield Compiled(place, pool.result(problem, config))


def _launch(place: Place) -> Launch:
    """The launch that a rule is about: at its point, or in a rule that the tuner did not write at its upper bounds."""
    when, config_type = place.rule.when, kernel_registry()[place.kernel].config_type
    point = rules.point_from(place.rule) or rules.Point(when.dtype, *(getattr(when, axis)[1] for axis in rules.AXES))
    problem = problem_at(place.kernel, point.dtype, point.K, point.V, point.BH, point.T)
    return place, problem, config_type(**place.rule.use)


def bad_faults(launches: list[Launch], arch: str) -> list[str]:
    """Rules that no tuner would launch, because the compiler gets them wrong."""
    return [
        f"{place} is known bad: {evidence}"
        for place, problem, config in launches
        if (evidence := known_bad(problem.form, config, arch))
    ]


def _compile_fault(result: Compiled, arch: str) -> str | None:
    if isinstance(result.needs, str):
        return f"does not compile: {result.needs}"
    if not result.needs.fits(ARCHS[arch]):
        return f"needs {result.needs.shared} bytes of shared memory; {arch} has {ARCHS[arch].shared}"
    return None


def changed_figures(result: Compiled) -> list[tuple[str, Any, Any]]:
    """Name, value in the file and value now, of the figures of the compiled kernel that the file has otherwise."""
    if isinstance(result.needs, str):
        return []
    pairs = [(name, result.place.rule.figures.get(name), getattr(result.needs, name)) for name in rules.NEEDS]
    return [pair for pair in pairs if pair[1] is not None and pair[1] != pair[2]]
