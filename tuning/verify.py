"""`python -m tuning verify`: time a sample of the active rules again on this GPU, and say which are stale."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated.configuration import ActiveRule, active_rules, kernel_registry
from tuning import rules, space
from tuning.check import TUNED
from tuning.coverage import Point
from tuning.measurement import Gpu, MeasurementError, Measurer, StartError, Timing, gpu_present
from tuning.problems import FORM_KERNEL, GRADIENTS, GRADIENTS_FORM_KERNEL, HOPPER, PASSES, STEPS, Problem, problem_at
from tuning.run import FOREVER, RunError
from tuning.winners import beats
from tuning.workloads import builtin

SAMPLE = 12
TOLERANCE = 0.1
FRESH = "fresh"
CHOICES = {FORM_KERNEL: space.SWEEPS, GRADIENTS_FORM_KERNEL: space.GRADIENTS}  # rules that choose between kernels


@dataclass(frozen=True)
class Claim:
    """What a rule says of one of its points."""

    rule: ActiveRule
    point: Point
    figures: Mapping[str, Any]

    @property
    def problem(self) -> Problem:
        """The kernel at the shape that was timed: heads differ in how far they see, so B and H are not one number."""
        p = self.point
        problem = problem_at(self.rule.kernel, p.dtype, p.K, p.V, p.BH, p.T)
        B = self.figures.get("B") or _usual_batch(p)
        return replace(problem, B=int(B), H=p.BH // int(B)) if p.BH % int(B) == 0 else problem

    @property
    def config(self) -> Any:
        """What the rule uses."""
        return kernel_registry()[self.rule.kernel].config_type(**self.rule.use)

    def __str__(self) -> str:
        return f"{self.rule.kernel} {self.point.dtype} {rules.point_text(self.point)}"


@dataclass(frozen=True)
class Finding:
    """What became of a claim: times in milliseconds, where there are any, and what they say in words."""

    claim: Claim
    then_ms: float | None
    now_ms: float | None
    default_ms: float | None
    verdict: str
    reason: str = ""


def verify(options: argparse.Namespace, console: Console) -> int:
    """Time the sample and print a table; 1 if anything is stale."""
    if not gpu_present():
        raise RunError("verify times rules again, and there is no GPU here; `python -m tuning check` needs none")
    with contextlib.closing(Measurer()) as measurer:
        gpu = measurer.gpu
        found = active_rules(gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs)
        known = [rule for rule in found if rule.kernel in TUNED or rule.kernel in CHOICES]
        wanted = [rule for rule in known if (options.kernel or "") in rule.kernel]
        claims = claims_of(wanted)
        drawn = claims if options.all else draw(claims, options.sample, options.seed)
        console.print(escape(f"{len(drawn)} of {len(claims)} points of active rules, on {gpu.name}"), soft_wrap=True)
        active = [rule for rule in known if rule.status == "active"]
        findings, interrupted = _look_at(drawn, active, measurer, options, console)
    unused = [rule for rule in wanted if rule.status != "active" and _concerns(rule, gpu)]
    _report(console, findings, len(drawn) - len(findings), unused)
    stale = [finding.claim for finding in findings if finding.verdict != FRESH]
    if again := stale + [claim for rule in unused for claim in _points(rule)]:
        console.print(escape(f"tune them again with\n  {command(again)}"), soft_wrap=True)
    return 130 if interrupted else int(bool(stale or unused))


def _concerns(rule: ActiveRule, gpu: Gpu) -> bool:
    """Whether a rule that is not used is this GPU's own, or would be used if it were not for a compiler."""
    return rule.device == gpu.name or rule.status.startswith("known bad")


def claims_of(found: list[ActiveRule]) -> list[Claim]:
    """The points of active rules at which no other is used; in the order in which rules are tried."""
    active = [rule for rule in found if rule.status == "active"]
    first: dict[tuple[str, Point], Claim] = {}
    for claim in itertools.chain.from_iterable(map(_points, active)):
        user = _user(active, claim.rule.kernel, claim.point)
        if user and (user.path, user.use) == (claim.rule.path, claim.rule.use):  # rules of one use may overlap
            first.setdefault((user.kernel, claim.point), claim)
    return list(first.values())


def _user(active: list[ActiveRule], kernel: str, point: Point) -> ActiveRule | None:
    """The rule that a kernel goes by at a point, if there is one."""
    shape = (point.dtype, point.K, point.V, point.BH, point.T)
    return next((rule for rule in active if rule.kernel == kernel and rule.when.matches(*shape)), None)


def draw(claims: list[Claim], count: int, seed: int) -> list[Claim]:
    """So many claims, the same for the same seed, in their order."""
    chosen = random.Random(seed).sample(range(len(claims)), min(count, len(claims)))  # noqa: S311 - no secret
    return [claims[index] for index in sorted(chosen)]


def look(claim: Claim, measurer: Measurer, tolerance: float) -> Finding:
    """Check a claim's numerics and time it beside the default, in interleaved rounds."""
    problem, config, default = claim.problem, claim.config, claim.problem.default()
    then = _then(claim, measurer.gpu)
    try:
        measurer.measure(problem, config, 0.0, {})
        raced = [config, default] if config != default and _runs(problem, default, measurer) else [config]
        now, *others = measurer.compare(problem, raced, {})
    except StartError:  # which is no fault of the rule
        raise
    except MeasurementError as error:
        return _failed(claim, then, error)
    default_ms = others[0].ms if others else now.ms if config == default else None
    return Finding(claim, then, now.ms, default_ms, _verdict(now, others, then, tolerance))


def look_at_choice(claim: Claim, active: list[ActiveRule], measurer: Measurer, tolerance: float) -> Finding:
    """Time all that a choice is between, each with the configuration in use: stale where another is clearly faster."""
    choice, chosen = CHOICES[claim.rule.kernel], str(claim.rule.use["form"])
    then = _then(claim, measurer.gpu)
    times = dict[str, float]()
    for way in choice.values:
        problem, sweeps = _way(claim, way, active)
        rule = _user(active, problem.kernel, claim.point)
        config = replace(claim, rule=rule).config if rule else problem.default()
        try:
            times[way] = sweeps * measurer.measure(problem, config, math.inf, {}).ms
        except StartError:
            raise
        except MeasurementError as error:
            if way == chosen:
                return _failed(claim, then, error)
    best, now = min(times, key=times.__getitem__), times[chosen]
    is_beaten = now > (1 + tolerance) * times[best]
    verdict = f"slower than {best}" if is_beaten else _since_then(now, then, tolerance)
    return Finding(claim, then, now, times.get(choice.values[0]), verdict)


def _way(claim: Claim, way: str, active: list[ActiveRule]) -> tuple[Problem, int]:
    """What runs, and how often, for the sweep or the gradients of a claim's point."""
    if claim.rule.kernel == FORM_KERNEL:
        return replace(claim.problem, form=way), 1
    if way != "sweeps":
        return replace(claim.problem, form=GRADIENTS), 1
    by_hopper = replace(claim.problem, form=HOPPER)
    if _user(active, by_hopper.kernel, claim.point):
        return by_hopper, 3
    rule = _user(active, FORM_KERNEL, claim.point)
    return replace(claim.problem, form=str(rule.use["form"]) if rule else space.SWEEPS.values[0]), 3


def _failed(claim: Claim, then: float | None, error: MeasurementError) -> Finding:
    wrong = str(error).startswith(ArithmeticError.__name__)
    return Finding(claim, then, None, None, "wrong" if wrong else "does not run", str(error))


def command(claims: Iterable[Claim]) -> str:
    """What tunes the claims' shapes again, measured anew; all forms where one is to be chosen."""
    claims = list(claims)
    problems = [claim.problem for claim in claims]
    is_choice = any(claim.rule.kernel in CHOICES for claim in claims)
    forms = {} if is_choice else dict.fromkeys(PASSES.get(problem.form, problem.form) for problem in problems)
    shapes = dict.fromkeys(_workload(problem) for problem in problems)
    options = [*(f"--form {form}" for form in forms), *(f"--workload {shape}" for shape in shapes)]
    return " ".join(["python -m tuning run --fresh", *options])


def _points(rule: ActiveRule) -> list[Claim]:
    return [Claim(rule, point, figures) for point, figures in rules.points_of(rule).items()]


def _usual_batch(point: Point) -> int:
    """The B of the builtin workload that the point is of; 1 where it is of none."""
    return _batches().get((point.dtype, frozenset((point.K, point.V)), point.BH, point.T), 1)


@functools.cache
def _batches() -> dict[tuple[str, frozenset[int], int, int], int]:
    return {(w.dtype, frozenset((w.K, w.V)), w.B * w.H, w.T): w.B for w in builtin().values()}


def _then(claim: Claim, gpu: Gpu) -> float | None:
    """The claim's milliseconds, if they are this kind of GPU's."""
    is_its = claim.rule.proof == "measured" and claim.rule.device == gpu.name
    return claim.figures.get("ms") if is_its else None


def _look_at(
    claims: list[Claim],
    active: list[ActiveRule],
    measurer: Measurer,
    options: argparse.Namespace,
    console: Console,
) -> tuple[list[Finding], bool]:
    """What was found by the end of the budget or Ctrl-C, and whether it was that."""
    deadline = time.monotonic() + min(options.budget or FOREVER, FOREVER)
    findings: list[Finding] = []
    try:
        with console.status("timing") as status:
            for claim in itertools.takewhile(lambda _: time.monotonic() < deadline, claims):
                status.update(f"timing {len(findings) + 1} of {len(claims)}")
                if claim.rule.kernel in CHOICES:
                    findings.append(look_at_choice(claim, active, measurer, options.tolerance))
                else:
                    findings.append(look(claim, measurer, options.tolerance))
    except KeyboardInterrupt:
        return findings, True
    return findings, False


def _runs(problem: Problem, config: Any, measurer: Measurer) -> bool:
    try:
        measurer.measure(problem, config, 0.0, {})
    except StartError:
        raise
    except MeasurementError:
        return False
    return True


def _verdict(now: Timing, default: list[Timing], then: float | None, tolerance: float) -> str:
    if any(beats(timing, now) for timing in default):
        return "slower than the default"
    return _since_then(now.ms, then, tolerance)


def _since_then(now_ms: float, then_ms: float | None, tolerance: float) -> str:
    return "slower than it was" if then_ms and now_ms > (1 + tolerance) * then_ms else FRESH


def _workload(problem: Problem) -> str:
    K, V = problem.K, problem.V
    if problem.form not in STEPS:
        K, V = sorted((K, V))  # the tuner takes both sweeps of a workload
    dtype = "" if problem.dtype == "bfloat16" else f",dtype={problem.dtype}"
    return f"B={problem.B},T={problem.T},H={problem.H},K={K},V={V}{dtype}"


def _report(console: Console, findings: list[Finding], left: int, unused: list[ActiveRule]) -> None:
    if findings:
        console.print(_table(findings))
    for finding in findings:
        if finding.reason:
            console.print(escape(f"{finding.claim}: {finding.reason}"), soft_wrap=True)
    for path, status in dict.fromkeys((rule.path, rule.status) for rule in unused):
        console.print(escape(f"{path}: rules not used: {status}"), soft_wrap=True)
    if left:
        console.print(f"the budget or Ctrl-C left {left} unlooked at")
    counts = Counter(finding.verdict for finding in findings)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing was timed")


def _table(findings: list[Finding]) -> Table:
    table = Table("rule", "ms then", "ms now", "ratio", "default now", "verdict")
    for f in findings:
        ratio = f"{f.now_ms / f.then_ms:.2f}" if f.now_ms and f.then_ms else ""
        times = ["" if ms is None else f"{ms:.4g}" for ms in (f.then_ms, f.now_ms, f.default_ms)]
        table.add_row(str(f.claim), times[0], times[1], ratio, times[2], f.verdict)
    return table
