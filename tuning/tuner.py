"""The tuning run: compile, check, race, compare finalists, prove the winner; one search a kernel and shape."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tuning.compilation import Arch, Resources
from tuning.compile_pool import CompilePool
from tuning.journal import Journal, Outcome
from tuning.known_bad import known_bad
from tuning.measurement import MeasurementError, Measurer
from tuning.model import predict
from tuning.problems import GRADIENTS, Problem
from tuning.search import Search
from tuning.space import knob_values

NEIGHBOUR_SEGMENTS = (1 << 20, 512, 256)
# Which runs the others' kernels too, or starts from their winners.
AFTER = {"chunk": ("chunk_states", "fused_chunk"), GRADIENTS: ("fused_chunk",)}
NOISE = 0.01  # a challenger must beat the incumbent and the default by more than this


@dataclass(frozen=True)
class Effort:
    """How many candidates to try: those the model likes best at first, then by Optuna in rounds."""

    first: int
    rounds: int
    per_round: int
    finalists: int


EFFORTS = {"quick": Effort(first=10, rounds=2, per_round=5, finalists=3), "full": Effort(24, 8, 8, 5)}


@dataclass(frozen=True)
class Winner:
    """What was found for one problem, with its proof."""

    problem: Problem
    config: Any
    ms: float
    default_ms: float | None
    error: float | None
    needs: Resources
    trials: int
    modelled: bool


@dataclass
class Funnel:
    """How many candidates came how far."""

    enumerated: int = 0
    compiled: int = 0
    clean: int = 0
    timed: int = 0
    remembered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Count a candidate that came no further."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def reject(self, problem: Problem, config: Any, reason: str) -> None:
        """Count a candidate that the GPU did not run right, and say which it was."""
        self.fail(_kind(reason))
        self.rejected.append(
            f"{problem.form} K={problem.K} V={problem.V} {problem.dtype} {knob_values(config)}: {reason}"
        )


class Judge(Protocol):
    """Times candidates: on the GPU, or by the model."""

    modelled: bool

    def time(
        self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: dict[str, Any]
    ) -> float:
        """Milliseconds, roughly where over `stop_above_ms`; MeasurementError for what does not run right."""

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]:
        """Milliseconds of several configurations, all of which `time` has seen, against each other."""

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """The error at the full shape, or None where nothing runs; MeasurementError if it is too large."""


class GpuJudge:
    """Measures; every answer stands on a check against float64."""

    modelled = False

    def __init__(self, measurer: Measurer) -> None:
        self._measurer = measurer

    def time(
        self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: dict[str, Any]
    ) -> float:
        """Milliseconds on the GPU, after a check against float64."""
        return self._measurer.measure(problem, config, stop_above_ms, extra).ms

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]:
        """Milliseconds in interleaved rounds."""
        return [timing.ms for timing in self._measurer.compare(problem, configs, extra)]

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """The error against float64 at the full shape."""
        return self._measurer.prove(problem, config, extra)


class ModelJudge:
    """Estimates, from the resources of the compiled kernel."""

    modelled = True

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._times: dict[Any, float] = {}

    def time(
        self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: dict[str, Any]
    ) -> float:
        """Milliseconds by the model."""
        ms = predict(problem, config, self._arch, needs)
        self._times[problem, config] = ms
        return ms

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]:
        """The same once more: a model has no noise."""
        return [self._times[problem, config] for config in configs]

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """Nothing runs, so nothing is proved."""
        return None


class Tuner:
    """Tunes many problems at once: while one is timed, the others' candidates compile.

    incumbents(problem) gives the configurations that earlier files hold for it; they race from the start.
    progress(done, total, problem) is told after every candidate. The journal remembers what earlier runs measured.
    Afterwards `winners` holds what was found and proven, `unfinished`
    says how many searches the deadline or Ctrl-C ended, and `interrupted` whether it was Ctrl-C.
    """

    def __init__(
        self,
        judge: Judge,
        pool: CompilePool,
        arch: Arch,
        effort: Effort,
        deadline: float,
        incumbents: Callable[[Problem], list[Any]],
        progress: Callable[[int, int, Problem], None],
        journal: Journal | None = None,
    ) -> None:
        self.judge, self.pool, self.arch, self.effort, self.deadline = judge, pool, arch, effort, deadline
        self.incumbents, self.progress, self.journal = incumbents, progress, journal
        self.funnel = Funnel()
        self.ranked: dict[Problem, list[Winner]] = {}
        self.winners: dict[Problem, Winner] = {}
        self.unfinished = self._complete = 0
        self.interrupted = False

    def run(self, problems: list[Problem]) -> None:
        """Search for every problem; what is found by the deadline, or by Ctrl-C, is kept in `ranked`."""
        tasks: list[_Task] = []
        try:
            self._search(problems, tasks)
        except KeyboardInterrupt:
            self.interrupted = True
            self.ranked |= {task.problem: found for task in tasks if (found := task.ranked(race=False))}
        self.unfinished = len(problems) - self._complete
        self.pool.forget_waiting()

    def _search(self, problems: list[Problem], tasks: list[_Task]) -> None:
        waiting, started = self._startable(problems, problems)
        tasks += started
        done, total = 0, len(problems) * (self.effort.first + self.effort.rounds * self.effort.per_round)
        while tasks:
            task = next((t for t in tasks if t.ready()), tasks[0])
            for _ in task.step():
                done += 1
                self.progress(min(done, total), total, task.problem)
            if task.finished:
                tasks.remove(task)
                done += task.left
                self._finish(task)
                waiting, started = self._startable(waiting, [*waiting, *(t.problem for t in tasks)])
                tasks += started

    def seconds_left(self) -> float | None:
        """Until the deadline, which counts from the first result on; None before."""
        return max(0.0, self.deadline - time.monotonic()) if self.funnel.timed + self.funnel.remembered else None

    def _finish(self, task: _Task) -> None:
        self._complete += not task.cut_short
        if found := task.ranked(race=True):
            self.ranked[task.problem] = found

    def prove(self) -> None:
        """Prove each problem's best configuration, or the next best that can be; only proven ones become winners.

        Ctrl-C ends it, and those that were proven by then stay.
        """
        try:
            for problem, ranked in self.ranked.items():
                for variant in problem.variants():
                    self.pool.submit(problem, ranked[0].config, variant=variant)
            for problem, ranked in self.ranked.items():
                winner = self._proven(problem, ranked)
                if winner is not None:
                    self.winners[problem] = winner
        except KeyboardInterrupt:
            self.interrupted = True

    def _proven(self, problem: Problem, ranked: list[Winner]) -> Winner | None:
        for winner in ranked:
            if reason := self._unfit(problem, winner.config):
                self.funnel.reject(problem, winner.config, reason)
                continue
            try:
                error = self.judge.prove(problem, winner.config, self.extra(problem))
            except MeasurementError as failure:
                self.funnel.reject(problem, winner.config, str(failure))
                continue
            return replace(winner, error=error)
        return None

    def _unfit(self, problem: Problem, config: Any) -> str | None:
        """Why a variant of the launch can't run. Workers compile them, so that the process with the GPU only loads."""
        for variant in problem.variants():
            needs = self.pool.result(problem, config, variant=variant)
            if isinstance(needs, str):
                return f"{variant}: {needs}"
            if not needs.fits(self.arch):
                return f"{variant}: {needs.shared} bytes of shared memory"
        return None

    def _startable(self, waiting: list[Problem], pending: list[Problem]) -> tuple[list[Problem], list[_Task]]:
        """A problem starts when that on whose results it builds has been tuned."""
        ready = [p for p in waiting if not any(replace(p, form=form) in pending for form in AFTER.get(p.form, ()))]
        return [p for p in waiting if p not in ready], [_Task(self, p) for p in ready]

    def neighbours(self, problem: Problem) -> list[Any]:
        """What won where the work is alike: fused_chunk's tiles, for chunk at several segment lengths."""
        if problem.form not in ("chunk", GRADIENTS):
            return []
        ranked = self.ranked.get(replace(problem, form="fused_chunk"), [])
        if problem.form == GRADIENTS:
            return [winner.config for winner in ranked[:2]]
        tiles = [knob_values(winner.config) for winner in ranked[:2]]
        return [type(problem.default())(L=L, **tile) for L in NEIGHBOUR_SEGMENTS for tile in tiles]

    def extra(self, problem: Problem) -> dict[str, Any]:
        """What a sweep is run with beside its own configuration."""
        if problem.form != "chunk":
            return {}
        states = _states_problem(problem)
        best = self.winners.get(states) or next(iter(self.ranked.get(states, [])), None)
        return {"states_config": best.config} if best else {}


def _states_problem(problem: Problem) -> Problem:
    return replace(problem, form="chunk_states")


def likely_first(problem: Problem, arch: Arch) -> list[Any]:
    """The configurations worth compiling for a problem, none known bad, those that the model likes best first."""
    itemsize = problem.torch_dtype.itemsize
    candidates = problem.space.candidates(type(problem.default()), problem.K, problem.V, problem.T, itemsize, arch)
    candidates = [config for config in candidates if not known_bad(problem.form, config, arch.name)]
    return sorted(candidates, key=lambda config: predict(problem, config, arch))


class _Task:
    """One problem's search, a batch of candidates at a time."""

    def __init__(self, tuner: Tuner, problem: Problem) -> None:
        self.tuner, self.problem = tuner, problem
        candidates = likely_first(problem, tuner.arch)
        tuner.funnel.enumerated += len(candidates)
        self.default = problem.default()
        incumbents = tuner.incumbents(problem)
        guesses = [*tuner.neighbours(problem), *candidates][: tuner.effort.first - 1]
        first = [*incumbents, self.default, *guesses]
        self.search = Search(candidates, first)
        self.rounds = tuner.effort.rounds
        self.left = tuner.effort.first + tuner.effort.rounds * tuner.effort.per_round
        self.needs: dict[Any, Resources] = {}
        self.kept = {self.default, *incumbents}
        self.in_use = set(incumbents) or {self.default}
        self.tried: set[Any] = set()
        self.finished = self.cut_short = False
        self._ask(len(incumbents) + tuner.effort.first)

    def ready(self) -> bool:
        return all(future.done() for _, future in self.batch)

    def step(self) -> Iterator[None]:
        """Time the batch as it comes out of the compiler, then ask for the next."""
        for config, _ in self.batch:
            needs = self._needs(config)
            if needs is None:
                self.finished = self.cut_short = True
                return
            self.search.tell(config, self._time(config, needs))
            self.tried.add(config)
            self.left -= 1
            yield
        self.finished = self.rounds == 0
        if not self.finished:
            self.rounds -= 1
            self._ask(self.tuner.effort.per_round)
            self.finished = not self.batch

    def _needs(self, config: Any) -> Resources | str | None:
        """What the compiler says, or None at the deadline."""
        seconds = self.tuner.seconds_left()
        if seconds == 0:
            return None
        try:
            return self.tuner.pool.result(self.problem, config, seconds=seconds)
        except TimeoutError:
            return None

    def ranked(self, *, race: bool) -> list[Winner]:
        """The fastest, the default and the incumbents, best first, after a race against each other if wanted.

        None where what is in use was not tried before the search was ended: it could have been better.
        """
        if not self.in_use <= self.tried:
            return []
        judge, extra = self.tuner.judge, self.tuner.extra(self.problem)
        finalists = self.search.best(self.tuner.effort.finalists)
        finalists += [config for config in self.kept if config in self.search.results and config not in finalists]
        times = {config: self.search.results[config] for config in finalists}
        if finalists and race:
            try:
                times = dict(zip(finalists, judge.rank(self.problem, finalists, extra), strict=True))
            except MeasurementError as error:
                self.tuner.funnel.fail(_kind(str(error)))
        default_ms, trials = times.get(self.default), len(self.search.results)
        # What is in use stays unless it is beaten beyond the noise.
        order = sorted(times, key=lambda config: times[config] * (1 - NOISE if config in self.in_use else 1))
        winners = [
            Winner(self.problem, c, times[c], default_ms, None, self.needs[c], trials, judge.modelled) for c in order
        ]
        # What no GPU has run is not recommended where it spills, not even the default.
        return [winner for winner in winners if not (winner.modelled and winner.needs.spills)]

    def _ask(self, count: int) -> None:
        self.batch: list[tuple[Any, Future[Resources | str]]] = [
            (config, self.tuner.pool.submit(self.problem, config)) for config in self.search.ask(count)
        ]

    def _time(self, config: Any, needs: Resources | str) -> float | None:
        funnel = self.tuner.funnel
        if evidence := known_bad(self.problem.form, config, self.tuner.arch.name):  # an incumbent may be
            funnel.reject(self.problem, config, f"known bad: {evidence}")
            return None
        funnel.compiled += 1
        if isinstance(needs, str):
            funnel.fail(_kind(needs))
            return None
        if not needs.fits(self.tuner.arch):
            funnel.fail("shared memory")
            return None
        if needs.spills and self.tuner.judge.modelled and config not in self.kept:
            funnel.fail("spills")
            return None
        funnel.clean += 1
        self.needs[config] = needs
        extra = self.tuner.extra(self.problem)
        outcome = self.tuner.journal and self.tuner.journal.remembered(self.problem, config, extra)
        if outcome:
            funnel.remembered += 1
        else:
            outcome = self._measure(config, needs)
            funnel.timed += outcome.ms is not None
        if outcome.ms is None:
            funnel.reject(self.problem, config, outcome.reason)
        return outcome.ms

    def _measure(self, config: Any, needs: Resources) -> Outcome:
        best = min(self.search.results.values(), default=float("inf"))
        journal, extra = self.tuner.journal, self.tuner.extra(self.problem)
        with journal.measuring(self.problem, config, extra) if journal else contextlib.nullcontext(_forget) as record:
            try:
                outcome = Outcome(self.tuner.judge.time(self.problem, config, needs, 1.6 * best, extra))
            except MeasurementError as error:
                outcome = Outcome(None, str(error))
            record(outcome)
        return outcome


def _forget(outcome: Outcome) -> None:
    """Takes what no journal is there to take."""


def _kind(reason: str) -> str:
    return reason.split(":", 1)[0] if reason.split(":", 1)[0].isidentifier() else reason[:60]


__all__ = ["EFFORTS", "Effort", "Funnel", "GpuJudge", "ModelJudge", "Tuner", "Winner", "knob_values"]
