"""The tuning run: compile, check, race, compare finalists, prove the winner; one search a kernel and shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tuning.compilation import Arch, Resources
from tuning.compile_pool import CompilePool
from tuning.measurement import MeasurementError, Measurer
from tuning.model import predict
from tuning.problems import Problem
from tuning.search import Search
from tuning.space import knob_values

NEIGHBOUR_SEGMENTS = (1 << 20, 512, 256)
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
    spills: int
    trials: int
    modelled: bool


@dataclass
class Funnel:
    """How many candidates came how far."""

    enumerated: int = 0
    compiled: int = 0
    clean: int = 0
    timed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
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
    ) -> float: ...

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]: ...

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None: ...


class GpuJudge:
    """Measures; every answer stands on a check against float64."""

    modelled = False

    def __init__(self, measurer: Measurer) -> None:
        self._measurer = measurer

    def time(
        self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: dict[str, Any]
    ) -> float:
        return self._measurer.measure(problem, config, stop_above_ms, extra).ms

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]:
        return [timing.ms for timing in self._measurer.compare(problem, configs, extra)]

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
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
        ms = predict(problem, config, self._arch, needs)
        self._times[problem, config] = ms
        return ms

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[float]:
        return [self._times[problem, config] for config in configs]

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        return None


class Tuner:
    """Tunes many problems at once: while one is timed, the others' candidates compile.

    incumbents(problem) gives the configurations that earlier files hold for it; they race from the start.
    progress(done, total, problem) is told after every candidate.
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
    ) -> None:
        self.judge, self.pool, self.arch, self.effort, self.deadline = judge, pool, arch, effort, deadline
        self.incumbents, self.progress = incumbents, progress
        self.funnel = Funnel()
        self.ranked: dict[Problem, list[Winner]] = {}
        self.winners: dict[Problem, Winner] = {}

    def run(self, problems: list[Problem]) -> None:
        """Search for every problem; what is found by the deadline, or by Ctrl-C, is kept in `ranked`."""
        waiting = [p for p in problems if p.form == "chunk"]
        tasks = [_Task(self, p) for p in problems if p.form != "chunk"]
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
                waiting, started = self._startable(waiting, tasks)
                tasks += started

    def _finish(self, task: _Task) -> None:
        ranked = task.ranked()
        if ranked:
            self.ranked[task.problem] = ranked

    def prove(self) -> None:
        """Prove each problem's best configuration, or the next best that can be; only proven ones become winners."""
        for problem, ranked in self.ranked.items():
            self.pool.submit(problem, ranked[0].config, with_states=True)
        for problem, ranked in self.ranked.items():
            winner = self._proven(problem, ranked)
            if winner is not None:
                self.winners[problem] = winner

    def _proven(self, problem: Problem, ranked: list[Winner]) -> Winner | None:
        for winner in ranked:
            # Compiled by a worker, so that the process that owns the GPU only loads it.
            self.pool.submit(problem, winner.config, with_states=True).result()
            try:
                error = self.judge.prove(problem, winner.config, self.extra(problem))
            except MeasurementError as failure:
                self.funnel.reject(problem, winner.config, str(failure))
                continue
            return replace(winner, error=error)
        return None

    def _startable(self, waiting: list[Problem], tasks: list[_Task]) -> tuple[list[Problem], list[_Task]]:
        """The chunk form's problems start when the pass over its states, which they run too, has been tuned."""
        pending = {t.problem for t in tasks if t.problem.form == "chunk_states"}
        ready = [p for p in waiting if _states_problem(p) not in pending]
        return [p for p in waiting if p not in ready], [_Task(self, p) for p in ready]

    def neighbours(self, problem: Problem) -> list[Any]:
        """What won where the work is alike: for chunk, fused_chunk's tiles at several segment lengths."""
        if problem.form != "chunk":
            return []
        ranked = self.ranked.get(replace(problem, form="fused_chunk"), [])
        tiles = [knob_values(winner.config) for winner in ranked[:2]]
        return [type(problem.default())(L=L, **tile) for L in NEIGHBOUR_SEGMENTS for tile in tiles]

    def extra(self, problem: Problem) -> dict[str, Any]:
        """What a sweep is run with beside its own configuration."""
        ranked = self.ranked.get(_states_problem(problem)) if problem.form == "chunk" else None
        return {"states_config": ranked[0].config} if ranked else {}


def _states_problem(problem: Problem) -> Problem:
    return replace(problem, form="chunk_states")


class _Task:
    """One problem's search, a batch of candidates at a time."""

    def __init__(self, tuner: Tuner, problem: Problem) -> None:
        self.tuner, self.problem = tuner, problem
        itemsize = problem.torch_dtype.itemsize
        candidates = problem.space.candidates(
            type(problem.default()), problem.K, problem.V, problem.T, itemsize, tuner.arch
        )
        tuner.funnel.enumerated += len(candidates)
        candidates.sort(key=lambda config: predict(problem, config, tuner.arch))
        self.default = problem.default()
        incumbents = tuner.incumbents(problem)
        guesses = [*tuner.neighbours(problem), *candidates][: tuner.effort.first - 1]
        first = [self.default, *incumbents, *guesses]
        self.search = Search(candidates, first)
        self.rounds = tuner.effort.rounds
        self.left = tuner.effort.first + tuner.effort.rounds * tuner.effort.per_round
        self.needs: dict[Any, Resources] = {}
        self.kept = {self.default, *incumbents}
        self.finished = False
        self._ask(len(incumbents) + tuner.effort.first)

    def ready(self) -> bool:
        return all(future.done() for _, future in self.batch)

    def step(self) -> Iterator[None]:
        """Time the batch as it comes out of the compiler, then ask for the next."""
        for config, future in self.batch:
            if time.monotonic() > self.tuner.deadline and self.search.results:
                self.finished = True
                return
            self.search.tell(config, self._time(config, future))
            self.left -= 1
            yield
        self.finished = self.rounds == 0 or time.monotonic() > self.tuner.deadline
        if not self.finished:
            self.rounds -= 1
            self._ask(self.tuner.effort.per_round)
            self.finished = not self.batch

    def ranked(self) -> list[Winner]:
        """The finalists after a race against each other, the default and the incumbents among them, best first."""
        judge, extra = self.tuner.judge, self.tuner.extra(self.problem)
        finalists = self.search.best(self.tuner.effort.finalists)
        finalists += [config for config in self.kept if config in self.search.results and config not in finalists]
        try:
            times = dict(zip(finalists, judge.rank(self.problem, finalists, extra))) if finalists else {}
        except MeasurementError as error:
            self.tuner.funnel.fail(_kind(str(error)))
            times = {config: self.search.results[config] for config in finalists}
        default_ms, trials = times.get(self.default), len(self.search.results)
        # What is in use stays unless it is beaten beyond the noise.
        order = sorted(times, key=lambda config: times[config] * (1 - NOISE if config in self.kept else 1))
        return [
            Winner(self.problem, c, times[c], default_ms, None, self.needs[c].spills, trials, judge.modelled)
            for c in order
        ]

    def _ask(self, count: int) -> None:
        self.batch: list[tuple[Any, Future[Resources | str]]] = [
            (config, self.tuner.pool.submit(self.problem, config)) for config in self.search.ask(count)
        ]

    def _time(self, config: Any, future: Future[Resources | str]) -> float | None:
        funnel, needs = self.tuner.funnel, future.result()
        funnel.compiled += 1
        if isinstance(needs, str):
            funnel.fail(_kind(needs))
            return None
        if needs.shared > self.tuner.arch.shared:
            funnel.fail("shared memory")
            return None
        if needs.spills and self.tuner.judge.modelled and config not in self.kept:
            funnel.fail("spills")
            return None
        funnel.clean += 1
        self.needs[config] = needs
        best = min(self.search.results.values(), default=float("inf"))
        try:
            ms = self.tuner.judge.time(self.problem, config, needs, 1.6 * best, self.tuner.extra(self.problem))
        except MeasurementError as error:
            funnel.reject(self.problem, config, str(error))
            return None
        funnel.timed += 1
        return ms


def _kind(reason: str) -> str:
    return reason.split(":", 1)[0] if reason.split(":", 1)[0].isidentifier() else reason[:60]


__all__ = ["EFFORTS", "Effort", "Funnel", "GpuJudge", "ModelJudge", "Tuner", "Winner", "knob_values"]
