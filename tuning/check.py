"""`python -m tuning check`: hold configuration files against the schema, the kernels and the installed compiler."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated import configuration
from generated.configuration import kernel_problem, kernel_registry
from generated.configuration_file import ConfigurationError, File, KernelRules, Rule, parse_file
from generated.known_bad import known_bad
from tuning import rules
from tuning.compilation import ARCHS, Arch, Resources
from tuning.compile_pool import CompilePool, compile_key
from tuning.coverage import AXES, Point, beyond, overlap
from tuning.problems import FORMS, PLAIN, Problem, problem_at
from tuning.proof import error_limit
from tuning.winners import NOISE

ROUNDING = 1e-3  # figures are written with four digits
TOLERANCE = 0.05  # what a rule may lose against the fastest at a point: what a tuner lets it, and some noise
VERIFY = "`python -m tuning verify` on the GPU tells"
TUNED = {Problem(form, "bfloat16", 1, 1, 1, 1, 1).kernel for form in FORMS}  # the kernels that rules are compiled for


@dataclass(frozen=True)
class Place:
    """A rule and where it stands."""

    kernel: str
    index: int
    rule: Rule

    def __str__(self) -> str:
        return f"kernels.{self.kernel}.rules[{self.index}]"


@dataclass(frozen=True)
class Launch:
    """One way in which a rule's kernel is launched, and the figures of the compiled kernel that the file has."""

    place: Place
    problem: Problem
    config: Any
    variant: str
    figures: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.place) if self.variant == PLAIN else f"{self.place}, {self.variant}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a launch: the resources, or in words why there are none."""

    launch: Launch
    needs: Resources | str


def check(options: argparse.Namespace, console: Console) -> int:
    """Check the files that are given, or all that imports read; 1 if anything is wrong with one."""
    paths = [Path(name) for name in options.file] or configuration.config_files()
    if not paths:
        console.print("no configuration file is in any of the places where imports look")
        return 0
    wrong = 0
    for path in paths:
        faults, changes, checked = _check_file(path, options, console)
        for line in faults:
            console.print(escape(f"  wrong: {line}"), soft_wrap=True, highlight=False)
        if changes:
            console.print(*changes)
        verdict = f"{len(faults)} wrong" if faults else "nothing wrong"
        console.print(escape(f"{path}: {checked}, {verdict}"), soft_wrap=True, highlight=False)
        wrong += len(faults)
    return int(wrong > 0)


def _check_file(path: Path, options: argparse.Namespace, console: Console) -> tuple[list[str], list[Any], str]:
    """What is wrong with a file, what the compiler does otherwise than when it was written, and what was looked at."""
    try:
        file = parse_file(path)
    except ConfigurationError as error:
        return [str(error).removeprefix(f"{path}: ")], [], "not read"
    problems = {kernel: kernel_problem(kernel, entry) for kernel, entry in file.kernels.items()}
    places = {kernel: _places(kernel, entry) for kernel, entry in file.kernels.items()}
    faults = [problem for problem in problems.values() if problem]
    faults += [fault for own in places.values() for fault in (*interval_faults(own), *figure_faults(own))]
    launches = [
        launch
        for kernel in places
        if kernel in TUNED and not problems[kernel]
        for place in places[kernel]
        for launch in launches_of(place)
    ]
    faults += bad_faults(launches, file.device.arch)
    checked = f"{sum(map(len, places.values()))} rules"
    if options.no_compile:
        return faults, [], checked
    if file.device.arch not in ARCHS:
        return faults, [], f"{checked}, not compiled: {file.device.arch} is none of {', '.join(ARCHS)}"
    with contextlib.closing(CompilePool(file.device.arch, options.workers)) as pool:
        results = list(_compile(pool, launches, console))
    for result in results:
        faults += [f"{result.launch}: {reason}" for reason in [_compile_fault(result, file.device.arch)] if reason]
    compiled = len({str(result.launch.place) for result in results})
    checked += f", {compiled} of them compiled for {file.device.arch} in {len(results)} launches"
    return faults, _changes(results, file), checked


def _changes(results: list[Compiled], file: File) -> list[Any]:
    """A table of what the compiler does otherwise than when the file was written, and what that means; or nothing."""
    table, tuned_with = Table("rule", "figure", "then", "now"), set()
    for result in results:
        for name, then, now in changed_figures(result, ARCHS[file.device.arch]):
            table.add_row(str(result.launch.place), name, str(then), str(now))
            tuned_with.add(result.launch.figures.get("triton", file.software["triton"]))
    versions = f"Triton {', '.join(sorted(tuned_with))}, here {version('triton')}"
    meaning = f"compiled otherwise than when tuned ({versions}): not proven with this Triton; {VERIFY}"
    return [table, escape(meaning)] if tuned_with else []


def _places(kernel: str, entry: KernelRules) -> list[Place]:
    return [Place(kernel, index, rule) for index, rule in enumerate(entry.rules)]


def interval_faults(places: list[Place]) -> list[str]:
    """Rules of one kernel that say two things of a shape, or reach farther from their points than a tuner lets them."""
    faults = []
    for one, other in itertools.combinations(places, 2):
        tuned = rules.points_of(one.rule) and rules.points_of(other.rule)  # who writes by hand may rely on the order
        differ = one.rule.proof == other.rule.proof and one.rule.use != other.rule.use
        if tuned and differ and overlap(one.rule.when, other.rule.when):
            faults.append(f"{other}.when covers shapes that {one} covers already; the first one wins")
    for place in places:
        when, points = place.rule.when, rules.points_of(place.rule)
        if points and (shape := beyond(when, points)):
            faults.append(f"{place}.when covers {rules.point_text(shape)}, which is beyond the reach of all its points")
        faults += [
            f"{place}.when does not hold the point {rules.point_text(point)}, at which its figures were found"
            for point in points
            if not when.matches(point.dtype, point.K, point.V, point.BH, point.T)
        ]
    return faults


def figure_faults(places: list[Place]) -> list[str]:
    """Rules whose own figures, at any of their points, speak against them."""
    return [
        f"{place}{where}: {fault}"
        for place in places
        for where, figures in figures_by_place(place.rule)
        for fault in _faults_of(figures, place)
    ]


def figures_by_place(rule: Rule) -> list[tuple[str, Mapping[str, Any]]]:
    """The figures of a rule's points, and where in the rule they stand."""
    return [("", rule.figures), *((f".also[{index}]", figures) for index, figures in enumerate(rule.also))]


def _faults_of(figures: Mapping[str, Any], place: Place) -> Iterator[str]:
    rule, point = place.rule, rules.point_in(figures, place.rule.when.dtype)
    limit = error_limit(place.kernel.removeprefix("retention_"), rule.when.dtype, point.T if point else 0)
    if (error := figures.get("error", 0.0)) > limit:
        yield f"its error is {error}, over the {limit:.0e} that is taken for rounding"
    if (ms := figures.get("ms", 0.0)) > (1 + NOISE) * (1 + ROUNDING) * (default := figures.get("default_ms", ms)):
        yield f"its {ms} ms are more than the default's {default}"
    # By the model what was in use, or the default, stays until something is far better.
    if rule.proof != "modelled" and rules.slowness(figures) > (1 + TOLERANCE) * (1 + ROUNDING):
        yield f"its {ms} ms are over {TOLERANCE:.0%} more than the {figures['best_ms']} of the fastest there"
    if rule.also and point is None:
        yield f"a rule of several points must name each, and its point is {figures.get('point')!r}"


def _compile(pool: CompilePool, launches: list[Launch], console: Console) -> Iterator[Compiled]:
    for launch in launches:
        pool.submit(launch.problem, launch.config, variant=launch.variant)
    with console.status("compiling") as status:
        for number, launch in enumerate(launches, 1):
            status.update(f"compiling launch {number} of {len(launches)}")
            yield Compiled(launch, pool.result(launch.problem, launch.config, variant=launch.variant))


def launches_of(place: Place) -> list[Launch]:
    """The launches that a rule is about, each compiled kernel once and in all its variants.

    They are at the rule's points, or in a rule that the tuner did not write at its upper bounds.
    """
    when, config_type = place.rule.when, kernel_registry()[place.kernel].config_type
    farthest = Point(when.dtype, *(getattr(when, axis)[1] for axis in AXES))
    found: dict[Any, Launch] = {}
    for point, figures in (rules.points_of(place.rule) or {farthest: place.rule.figures}).items():
        problem = problem_at(place.kernel, point.dtype, point.K, point.V, point.BH, point.T)
        if not problem.is_tuned:  # of so many tokens, a step goes by its default
            problem = replace(problem, T=when.T[0])
        config = config_type(**place.rule.use)
        for variant in problem.variants(config):
            key = compile_key(problem, config), variant
            found.setdefault(key, Launch(place, problem, config, variant, figures))
    return list(found.values())


def bad_faults(launches: list[Launch], arch: str) -> list[str]:
    """Rules that no tuner would launch, because the compiler gets them wrong."""
    found = [(launch.place, known_bad(launch.problem.form, launch.config, arch)) for launch in launches]
    return list(dict.fromkeys(f"{place} is known bad: {evidence}" for place, evidence in found if evidence))


def _compile_fault(result: Compiled, arch: str) -> str | None:
    if isinstance(result.needs, str):
        return f"does not compile: {result.needs}"
    excess = result.needs.excess(ARCHS[arch])
    return f"needs {excess}" if excess else None


def changed_figures(result: Compiled, arch: Arch) -> list[tuple[str, Any, Any]]:
    """Name, value in the file and value now, of the figures of the timed kernel that the file has otherwise.

    Where that has changed too, also how many programs a multiprocessor holds, by them.
    """
    if isinstance(result.needs, str) or result.launch.variant != PLAIN:
        return []
    figures = {name: result.launch.figures.get(name, getattr(result.needs, name)) for name in rules.NEEDS}
    pairs = [(name, then, getattr(result.needs, name)) for name, then in figures.items()]
    changed = [pair for pair in pairs if pair[1] != pair[2]]
    then, now = (needs.blocks_per_sm(arch) for needs in (replace(result.needs, **figures), result.needs))
    return [*changed, *([("programs a multiprocessor", then, now)] if then != now else [])]
