"""The tuning run: compile, check, race, compare finalists, prove the winner; one search a kernel and shape."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from generated.known_bad import known_bad
from generated.retention.chunk import WHOLE
from tuning.compilation import ARCHS, Arch, Resources
from tuning.compile_pool import Compiled, CompilePool, same_kernel
from tuning.coverage import assign
from tuning.funnel import Funnel
from tuning.journal import FRESH, POLL_SECONDS, PROVE, RACE, Claim, Journal, Outcome, RaceClaim
from tuning.judges import Judge
from tuning.measurement import MeasurementError, StartError, Timing
from tuning.model import MEASURED, predict
from tuning.problems import GRADIENTS, HOPPER, SEGMENTED, Problem, same_launch
from tuning.samplers import EXHAUSTIVE, INFORMED, Candidates
from tuning.search import MAX_SPILLS, Effort, Search, constraints
from tuning.space import Sifted, knob_values, launched
from tuning.winners import HELD, MODEL_NOISE, SHARED, Found, Winner, is_faster

NEIGHBOUR_SEGMENTS = (WHOLE, 512, 256)
# Which runs the others' kernels too, or starts from their winners.
AFTER = {"chunk": ("chunk_states", "fused_chunk"), HOPPER: ("chunk_states",), GRADIENTS: ("fused_chunk",)}
CLEARLY_SLOWER = 1.15  # than the best so far: no more than a few calls are spent on such a candidate
BUILD_UP = 0.25  # of the budget, where there is one, may pass before anything is measured
MEASURING_SECONDS = 0.015  # of a candidate, at least: an H100 that waits for nobody takes 0.02
BACKLOG = 2  # candidates a compiler that may wait: with more, no further search is started
LOOK_SECONDS = 0.5  # between two looks at the clock while all wait for the compiler
AHEAD = 6  # candidates that are handed over while one is being measured
AT_ONCE = 4  # searches of a worker that is not the only one
CONTENDERS = 3  # of each race, which a fresh process times again


class Tuner:
    """Tunes many problems at once: while one is timed, the others' candidates compile.

    incumbents(problem) gives the configurations that earlier files hold for it; they race from the start.
    progress(done, total, problem, phase, standing) is told after every step. The journal remembers what earlier runs
    measured. sampler: one of tuning.samplers.SAMPLERS. earlier: what rules say, also of earlier kernels.
    Afterwards `winners` holds what was found and proven, `unfinished` says how many searches the deadline or
    Ctrl-C ended, and `interrupted` whether it was Ctrl-C.
    """

    def __init__(
        self,
        judge: Judge,
        pool: CompilePool,
        arch: Arch,
        effort: Effort,
        deadline: float,
        incumbents: Callable[[Problem], list[Any]],
        progress: Callable[[int, int, Problem, str, str], None],
        journal: Journal | None = None,
        *,
        sampler: str = INFORMED,
        earlier: dict[Problem, Any] | None = None,
    ) -> None:
        self.sampler, self.earlier = sampler, earlier or {}
        self.judge, self.pool, self.arch, self.effort, self.deadline = judge, pool, arch, effort, deadline
        self.incumbents, self.progress, self.journal = incumbents, progress, journal
        self.funnel = Funnel()
        self.found: dict[Problem, Found] = {}
        self.ranked: dict[Problem, list[Winner]] = {}
        self.winners: dict[Problem, Winner] = {}
        self.unfinished = self._complete = 0
        self.interrupted = False
        self.measured: dict[Any, Outcome] = {}  # by compiled code and what else makes a launch
        self._proofs: dict[Any, Outcome] = {}
        self._extras: dict[Problem, dict[str, Any]] = {}
        self._listed: dict[Problem, tuple[Sifted, Candidates]] = {}
        self._for_proofs: dict[Problem, list[Future[Compiled]]] = {}  # what these launch, of searches that have ended
        self._search_began = 0.0, 0.0  # and for how long the judge had been busy by then

    def run(self, problems: list[Problem]) -> None:
        """Search for every problem; what is found by the deadline, or by Ctrl-C, is kept in `ranked`."""
        tasks: list[_Task] = []
        problems = spread(sorted(problems, key=_compiling_cost, reverse=True), self.journal.rank if self.journal else 0)
        try:
            waiting = list(problems)
            if not self.judge.modelled:
                with self._phase("compile"):
                    self._build_up(waiting, tasks)
            self._search_began = time.monotonic(), self.judge.busy
            with self._phase("search"):
                self._search(waiting, tasks, len(problems))
        except (KeyboardInterrupt, StartError) as end:
            self._interrupt(end)
            for task in tasks:
                self._keep(task)
        self.unfinished = len(problems) - self._complete
        self.pool.forget_waiting()

    def conclude(self) -> None:
        """Race the best again in a fresh process, let shapes share configurations, and prove what is chosen."""
        if not self.interrupted and not self.judge.modelled:
            self._compile_what_is_proved()
            self._confirm()
            with self._interruptible():
                self._share()
        self.prove()
        if self.journal:
            self.journal.sync()

    def _share(self) -> None:
        """Put in front of each problem's ranking what others of the same kernel use too, where it is as good."""
        kernels: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.ranked:
            kernels.setdefault((problem.form, problem.dtype), []).append(problem)
        for problems in kernels.values():
            found = {problem: self.found[problem] for problem in problems}
            first = {problem: self.ranked[problem][0] for problem in problems}
            raced = {problem: own.raced_against(first[problem].config) for problem, own in found.items()}
            # What seems to be faster than the first, but not beyond the noise, counts as no faster.
            shared = assign(
                {p: {c: max(timing.ms, first[p].ms) for c, timing in own.items()} for p, own in raced.items()},
                {problem: own.default for problem, own in found.items()},
                tolerance=SHARED,
                in_use={problem: winner.config for problem, winner in first.items()},
            )
            for problem, config in shared.items():
                others = [winner for winner in self.ranked[problem] if winner.config != config]
                self.ranked[problem] = [found[problem].winner(config, modelled=False), *others]

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the time that passes within, and what of it the judge was busy, to the phase's."""
        started, busy = time.monotonic(), self.judge.busy
        try:
            yield
        finally:
            self.funnel.spend(name, time.monotonic() - started, self.judge.busy - busy)

    def _build_up(self, waiting: list[Problem], tasks: list[_Task]) -> None:
        """Start every search that need not wait for another, and compile what each begins with.

        So that the GPU can be kept busy from its first candidate on. What the others are going to begin with is
        guessed, unless other workers may be at them first; and so is what comes next, of the slowest kernels first,
        until what is left to be compiled takes no longer than what is left to be measured.
        """
        began, guesses, problems = time.monotonic(), list[Future[Compiled]](), list(waiting)
        depth = 1 + self.effort.first + self.effort.ahead
        further = ((p, c) for p in problems for c in self.listed(p)[1].configs[depth : self.effort.compiled])
        shared = self.journal is not None and self.journal.shared
        guessed = set(waiting) if shared else set()
        unlisted = iter([problem for problem in waiting if problem not in guessed])
        while time.monotonic() < began + BUILD_UP * (self.deadline - began):
            if self._start(waiting, tasks):
                tasks[-1].ask()
            elif (problem := next(unlisted, None)) is not None:
                self.listed(problem)
            elif self.pool.outstanding() >= self.pool.workers:
                asked = sum(len(task.batch) for task in tasks) + len(guesses)
                self.progress(max(0, asked - self.pool.outstanding()), asked, tasks[-1].problem, "compiling", "")
                time.sleep(POLL_SECONDS)
            elif problem := next((problem for problem in waiting if problem not in guessed), None):
                guessed.add(problem)
                guesses += [self.pool.submit(problem, config) for config in self.listed(problem)[1].configs[:depth]]
            elif not shared and self._compiler_is_late(len(problems), time.monotonic() - began):
                if (likely := next(further, None)) is None:
                    return
                guesses.append(self.pool.submit(*likely))
            else:
                return

    def _compiler_is_late(self, searches: int, seconds: float) -> bool:
        """Whether the GPU would be done with all searches before the compiler, as fast as in the seconds so far."""
        compiled = self.pool.submitted - self.pool.outstanding()
        left = max(0, searches * self.effort.compiled - compiled)
        return left * seconds > searches * self.effort.measurements * MEASURING_SECONDS * compiled

    def listed(self, problem: Problem) -> tuple[Sifted, Candidates]:
        """What a search is over, all but what is known to crash; made once, because it takes a tenth of a second."""
        if problem not in self._listed:
            kept = [*self.incumbents(problem), problem.default()]
            sifted, crashes = self._sift(problem, kept), self.crashes(problem)
            candidates = [config for config in sifted.candidates if config not in crashes]
            self._listed[problem] = sifted, Candidates(problem, candidates, self.arch, kept=kept)
        return self._listed[problem]

    def _sift(self, problem: Problem, kept: list[Any]) -> Sifted:
        """What is worth compiling; to a model only what may replace what is kept."""
        sifted = problem.sift(self.arch)
        if not self.judge.modelled:
            return sifted
        promised = promising(problem, sifted.candidates, kept, self.arch)
        candidates = [config for config in sifted.candidates if config in kept or config in promised]
        dropped = Counter({"too little promised": len(sifted.candidates) - len(candidates)})
        return Sifted(candidates, sifted.dropped + dropped)

    def _search(self, waiting: list[Problem], tasks: list[_Task], searches: int) -> None:
        """Measure one candidate after another.

        The next are chosen, written down and handed over while the GPU is at one, so that it need not wait for anybody.
        """
        under_way = deque[_Measuring | _Race]()  # handed over, in this order
        upcoming: _Measuring | None = None  # written down
        try:
            while tasks or waiting:
                started = self._start(waiting, tasks)
                chosen = None if upcoming else self._choose(tasks, under_way)
                if chosen:
                    upcoming = chosen[0].prepare(*chosen[1:], behind=under_way[-1] if under_way else None)
                if upcoming and not any(map(upcoming.hinges_on, under_way)):
                    if upcoming.launch():
                        under_way.append(upcoming)
                    upcoming = None
                ended = bool(under_way) and (upcoming is not None or not chosen or len(under_way) > AHEAD)
                if ended:
                    under_way[0].end()
                    self._say_searching(under_way.popleft().found, tasks, waiting, searches)
                finished = self._end_finished(tasks, under_way)
                self._compile_for_proofs(tasks)
                if not (chosen or started or ended or finished or self._prove_early()):
                    self._wait(tasks)
        finally:
            for candidate in (upcoming, *under_way):
                if candidate:
                    candidate.abandon()

    def _start(self, waiting: list[Problem], tasks: list[_Task]) -> bool:
        """Start the next search where the compiler has room for it, or where there is no time to compile anyhow.

        Not one on which an unfinished one has something to say. Beside other workers, few at once, first those that
        none is at: what the others finish need not be compiled.
        """
        if not waiting:
            return False
        late = self.seconds_left() == 0
        if not late and self.pool.outstanding() >= BACKLOG * self.pool.workers:
            return False
        pending = {*waiting, *(task.problem for task in tasks)}
        ready = [p for p in waiting if not any(replace(p, form=form) in pending for form in AFTER.get(p.form, ()))]
        if self.journal and self.journal.shared:
            ready = [] if len(tasks) >= AT_ONCE else sorted(ready, key=self.journal.elsewhere(ready).__contains__)
        for problem in ready[:1]:
            waiting.remove(problem)
            tasks.append(_Task(self, problem))
            self._tell_others(tasks)
        return bool(ready)

    def _choose(self, tasks: list[_Task], under_way: Collection[_Measuring | _Race]) -> tuple[_Task, Any, bool] | None:
        """What to measure next, and whether only because the GPU would wait for the compiler otherwise.

        Of a search of which a candidate is under way, whose time may change what is promising, something only where
        the GPU would wait.
        """
        if self.seconds_left() == 0:
            for task in tasks:
                task.cut_short |= not task.finished  # by others
                task.finished = True
            return None
        others = _idle(tasks, under_way)
        others.sort(key=lambda task: _compiling_cost(task.problem), reverse=True)
        for task in others:
            if (config := task.choose()) is not None:
                return task, config, False
        if self.judge.modelled or len(under_way) > 1:
            return None
        going_on = [task for task in tasks if task.search.results and not task.finished and task.awaited is None]
        for task in going_on:  # first what is going to be measured anyhow
            if task not in others and (config := task.choose_beside()) is not None:
                return task, config, False
        for task in going_on:
            if task in others and (config := task.search.spare()) is not None:
                return task, config, True
        return None

    def _end_finished(self, tasks: list[_Task], under_way: deque[_Measuring | _Race]) -> bool:
        """Have what a finished search found raced, behind what is under way; one that was raced is over."""
        moved = False
        for task in [task for task in _idle(tasks, under_way) if task.finished]:
            if not task.kept:
                self._complete += not task.cut_short
                task.found.cut_short = task.cut_short
                task.to_be_raced = self._keep(task)
            if task.to_be_raced:
                race = self._race(task.found, self.effort.finalists, RACE, under_way)
                if race is None:
                    continue
                task.to_be_raced = False
                if race.answer:
                    under_way.append(race)
                else:
                    race.end()
            else:
                tasks.remove(task)
                self._tell_others(tasks)
            moved = True
        return moved

    def _compile_for_proofs(self, tasks: list[_Task]) -> None:
        """Where a compiler is free, let it have what the proof of an ended search launches."""
        if self.judge.modelled or self.pool.outstanding() >= self.pool.workers:
            return
        searched = {task.problem for task in tasks}
        ended = (problem for problem in self.ranked if problem not in searched and problem not in self._for_proofs)
        if (problem := next(ended, None)) is not None:
            self._for_proofs[problem] = self._compile_variants(self.ranked[problem][0])

    def _prove_early(self) -> bool:
        """Prove what a search that is over found, while the GPU waits for the compiler; whether there was one."""
        for problem, compiled in self._for_proofs.items():
            if problem.form in SEGMENTED or not all(future.done() for future in compiled):
                continue  # of two passes, the first one's proof comes first
            winner = self.ranked[problem][0]
            if self._key(winner) not in self._proofs and self._can_prove(winner):
                self._proof(winner)
                return True
        return False

    def _can_prove(self, winner: Winner) -> bool:
        """Whether all that a proof launches is compiled, and no other worker is at it."""
        problem = winner.problem
        if self.journal and self.journal.is_held(problem, self._final_extra(problem), PROVE):
            return False
        return all(future.done() for future in self._compile_variants(winner)) and not self._unfit(winner)

    def _compile_variants(self, winner: Winner) -> list[Future[Compiled]]:
        """Let the compiler have what a proof launches: the process with the GPU then only loads it."""
        problem, config, extra = winner.problem, winner.config, self._expected_extra(winner.problem)
        launches = problem.proof_launches(config)
        return [self.pool.submit(own, config, variant=variant, extra=extra) for own, variant in launches]

    def _wait(self, tasks: list[_Task]) -> None:
        """Until something more is compiled, or another worker may have ended what is waited for."""
        began = time.monotonic()
        compiling = [future for task in tasks for future in task.compiling()]
        compiling += [future for launches in self._for_proofs.values() for future in launches if not future.done()]
        others = any(task.awaited or task.finished for task in tasks)
        seconds = POLL_SECONDS if others or not compiling else LOOK_SECONDS
        if compiling:
            wait(compiling, seconds, FIRST_COMPLETED)
        else:
            time.sleep(seconds)
        self.funnel.waited += time.monotonic() - began

    def _tell_others(self, tasks: list[_Task]) -> None:
        if self.journal:
            self.journal.go_to([task.problem for task in tasks])

    def _say_searching(self, found: Found, tasks: list[_Task], waiting: list[Problem], problems: int) -> None:
        left = sum(task.search.left for task in tasks) + len(waiting) * self.effort.measurements
        total = problems * self.effort.measurements
        self.progress(max(0, total - left), total, found.problem, "searching", self._standing(found))

    def _others_last(self, problems: list[Problem], step: str) -> Iterator[Problem]:
        """All of them, those last that other workers race or prove when it is their turn."""
        left, extra = list(problems), self._final_extra if step == PROVE else self.extra
        while left:
            free = (p for p in left if not (self.journal and self.journal.is_held(p, extra(p), step)))
            problem = next(free, left[0])
            left.remove(problem)
            yield problem

    def _idle_share(self) -> float:
        """The part of the search so far in which nothing was measured."""
        began, busy = self._search_began
        return max(0.0, 1 - (self.judge.busy - busy) / max(time.monotonic() - began, 1e-9))

    def _standing(self, found: Found) -> str:
        """How far a search is: the best so far, against the default."""
        best = min((timing.ms for timing in found.timings.values()), default=None)
        default = found.timings.get(found.default)
        waited = "" if self.judge.modelled else f", GPU waited {self._idle_share():.0%}"
        against = f" of {default.ms:.3g}" if default else ""
        return "" if best is None else f"best {best:.3g}{against} ms{waited}"

    def seconds_left(self) -> float | None:
        """Until the deadline, which counts from the first result on; None before."""
        return max(0.0, self.deadline - time.monotonic()) if self.funnel.timed + self.funnel.remembered else None

    def _keep(self, task: _Task) -> bool:
        """Whether the search's result counts: not where what is in use was not tried; it could have been better."""
        task.kept = True
        if not task.found.in_use <= task.tried:
            return False
        self.found[task.problem] = task.found
        self.rank(task.found, self.effort.finalists)
        return bool(task.found.timings)

    def _race(
        self, found: Found, count: int, step: str, under_way: Collection[_Measuring | _Race] = ()
    ) -> _Race | None:
        """Have the fastest timed against each other, but where that was done; None where that must wait.

        For another worker, which holds it; or for what is under way: for a candidate of one of their kernels, which may
        crash, or for all, where it would not be known after a kill which of the two was launched.
        """
        extra, crashes = self.extra(found.problem), self.crashes(found.problem)
        configs = found.contenders(count) + (self._shareable(found) if step == FRESH else [])
        configs = [config for config in dict.fromkeys(configs) if config not in crashes]
        candidates = [other for other in under_way if isinstance(other, _Measuring)]
        if any(candidate.is_of_a_kernel(found.problem, configs) for candidate in candidates):
            return None
        race = _Race(self, found, count, step, configs)
        if self.journal:
            if under_way and not self.journal.marks:
                return None
            claim = self.journal.claim_race(found.problem, configs, extra, step=step)
            if claim is None:
                return None
            if isinstance(claim, dict):
                race.known = claim
                return race
            race.claim, race.configs = claim, claim.configs
        race.launch()
        return race

    def _shareable(self, found: Found) -> list[Any]:
        """What other shapes of the kernel use, and what seems as fast here: raced too, so that they may share it."""
        kernel = (found.problem.form, found.problem.dtype)
        firsts = dict.fromkeys(
            ranked[0].config for one, ranked in self.ranked.items() if (one.form, one.dtype) == kernel
        )
        limit = (1 + 2 * SHARED) * min(timing.ms for timing in found.timings.values())
        return [config for config in firsts if config in found.timings and found.timings[config].ms <= limit]

    def rank(self, found: Found, count: int) -> None:
        """Order what was found by its times, the incumbent first where it is not beaten."""
        ranked = found.winners(found.contenders(count), modelled=self.judge.modelled)
        if ranked:
            self.ranked[found.problem] = ranked

    def _confirm(self) -> None:
        """Race the best of each problem again in a fresh process; Ctrl-C leaves the rest as it is."""
        with self._interruptible(), self._phase("confirm"):
            self.judge.renew()
            raced = [problem for problem, found in self.found.items() if found.timings]
            for number, problem in enumerate(self._others_last(raced, FRESH), 1):
                while (race := self._race(self.found[problem], CONTENDERS, FRESH)) is None:
                    time.sleep(POLL_SECONDS)
                self.funnel.confirmed += race.end()
                self.progress(number, len(raced), problem, "confirming", "")

    def prove(self) -> None:
        """Prove each problem's best configuration, or the next best that can be; only proven ones become winners.

        Ctrl-C ends it, and those that were proven by then stay.
        """
        with self._interruptible(), self._phase("prove"):
            self._prove_all()

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C, or a GPU that is gone, ends what is within, and nothing else."""
        try:
            yield
        except (KeyboardInterrupt, StartError) as end:
            self._interrupt(end)

    def _interrupt(self, end: BaseException) -> None:
        self.interrupted = True
        if isinstance(end, StartError):
            self.funnel.fail(str(end))

    def _compile_what_is_proved(self) -> None:
        for ranked in self.ranked.values():
            self._compile_variants(ranked[0])

    def _prove_all(self) -> None:
        self._compile_what_is_proved()
        done = 0
        for late in (False, True):  # what is in segments is proved with the states pass that is going to be used
            problems = [problem for problem in self.ranked if (problem.form in SEGMENTED) == late]
            for problem in self._others_last(problems, PROVE):
                winner = self._proven(self.ranked[problem])
                done += 1
                self.progress(done, len(self.ranked), problem, "proving", "")
                if winner is not None:
                    self.winners[problem] = winner
                    self._count(winner)

    def _count(self, winner: Winner) -> None:
        self.funnel.proven += 1
        if incumbents := self.found[winner.problem].incumbents:
            self.funnel.compared += 1
            self.funnel.flipped += winner.config not in incumbents

    def _proven(self, ranked: list[Winner]) -> Winner | None:
        """The first that passes its proof, with the error that this found."""
        for number, winner in enumerate(ranked):
            reason = self.crashes(winner.problem).get(winner.config) or self._unfit(winner)
            proof = Outcome(None, reason) if reason else self._proof(winner)
            if not proof.reason:
                # What failed in its proof is no time to be held against.
                best_ms = min(one.ms for one in ranked[number:]) if number else winner.best_ms
                return replace(winner, error=proof.ms, best_ms=best_ms)
            self.funnel.reject(winner.problem, winner.config, proof.reason)
        return None

    def _proof(self, winner: Winner) -> Outcome:
        problem, extra = winner.problem, self._final_extra(winner.problem)

        def prove() -> Outcome:
            try:
                return Outcome(self.judge.prove(problem, winner.config, extra))
            except StartError:
                raise
            except MeasurementError as failure:
                return Outcome(None, str(failure))

        if self._key(winner) not in self._proofs:
            launch = partial(self.journal.launch, problem, winner.config, extra) if self.journal else None
            self._proofs[self._key(winner)] = launch(prove, step=PROVE, needs=winner.needs) if launch else prove()
        return self._proofs[self._key(winner)]

    def _key(self, winner: Winner) -> Any:
        """What is proved: a configuration with what it is going to be run with."""
        return winner.problem, winner.config, *self._final_extra(winner.problem).values()

    def crashes(self, problem: Problem) -> dict[Any, str]:
        """Which configurations of a problem's kernel have ended a measuring process, at any shape, and how."""
        return self.journal.crashes(problem) if self.journal else {}

    def _unfit(self, winner: Winner) -> str | None:
        """Why a variant of the launch can't run."""
        problem, config, extra = winner.problem, winner.config, self._final_extra(winner.problem)
        for own, variant in problem.proof_launches(config):
            needs = self.pool.result(own, config, variant=variant, extra=extra)
            why = needs if isinstance(needs, str) else needs.excess(self.arch)
            if why:
                return f"{variant}{f', K={own.K} V={own.V}' if own != problem else ''}: {why}"
        return None

    def neighbours(self, problem: Problem) -> list[Any]:
        """What won where the work is alike: with an earlier kernel, with fused_chunk's, at the nearest other shape."""
        here, elsewhere = list[Any](), list[Any]()
        for known in ({one: winners[0].config for one, winners in self.ranked.items()}, self.earlier):
            kernel = (problem.form, problem.dtype)
            far = {one: distance(one, problem) for one in known if (one.form, one.dtype) == kernel}
            here += [known[one] for one in far if not far[one]]
            elsewhere += [known[one] for one in sorted(far, key=far.__getitem__) if far[one]][:1]
        return [*here, *self._related(problem), *elsewhere]

    def _related(self, problem: Problem) -> Iterator[Any]:
        """For the gradients in one launch fused_chunk's winners, for chunk the same at several segment lengths."""
        ranked = self.ranked.get(replace(problem, form="fused_chunk"), [])[:2]
        if problem.form == GRADIENTS:
            yield from (winner.config for winner in ranked)
        if problem.form == "chunk":
            tiles = [knob_values(winner.config) for winner in ranked]
            yield from (type(problem.default())(L=L, **tile) for L in NEIGHBOUR_SEGMENTS for tile in tiles)

    def extra(self, problem: Problem) -> dict[str, Any]:
        """What a sweep is run with beside its own configuration, from its search's beginning on."""
        if problem not in self._extras:
            self._extras[problem] = self._expected_extra(problem)
        return self._extras[problem]

    def _expected_extra(self, problem: Problem) -> dict[str, Any]:
        """The same as it is going to be written if what is best now can be proven."""
        ranked = self.ranked.get(_states_problem(problem)) if problem.form in SEGMENTED else None
        return {"states_config": ranked[0].config} if ranked else {}

    def _final_extra(self, problem: Problem) -> dict[str, Any]:
        """The same as it is going to be written: proven, or nothing."""
        best = self.winners.get(_states_problem(problem)) if problem.form in SEGMENTED else None
        return {"states_config": best.config} if best else {}


def distance(one: Problem, other: Problem) -> float:
    """How unlike the work of two problems is: by how many doublings K, V, B * H and T differ."""
    sizes = [(p.K, p.V, p.B * p.H, p.T) for p in (one, other)]
    return sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True))


def spread(problems: list[Problem], rank: int) -> list[Problem]:
    """Where the worker of a rank begins, so that any number of them begin far apart: 0, 1/2, 1/4, 3/4, 1/8 ..."""
    bits = f"{rank:b}"
    start = len(problems) * int(bits[::-1], 2) // (1 << len(bits))
    return problems[start:] + problems[:start]


def _compiling_cost(problem: Problem) -> int:
    """How long its candidates are compiled, by rank: the slowest searches come first, so as not to be waited for."""
    return problem.K


def _idle(tasks: list[_Task], under_way: Collection[_Measuring | _Race]) -> list[_Task]:
    """Those of which nothing is under way."""
    return [task for task in tasks if all(task.found is not measuring.found for measuring in under_way)]


def _states_problem(problem: Problem) -> Problem:
    return replace(problem, form="chunk_states")


def likely_first(problem: Problem, arch: Arch) -> list[Any]:
    """The configurations worth compiling for a problem, none known bad, those that the model likes best first."""
    return sorted(problem.sift(arch).candidates, key=lambda config: predict(problem, config, arch))


def promising(problem: Problem, candidates: list[Any], kept: list[Any], arch: Arch) -> list[Any]:
    """Those that a model has beat what is kept, before anything is compiled: also by the figures that were measured.

    Of these alone the landscapes tell how far they can be trusted.
    """
    for one in (arch, ARCHS[MEASURED]):
        held = min(predict(problem, config, one) for config in kept)
        candidates = [c for c in candidates if is_faster(predict(problem, c, one), held, MODEL_NOISE)]
    return candidates


class _Task:
    """One problem's search, a batch of candidates at a time."""

    def __init__(self, tuner: Tuner, problem: Problem) -> None:
        self.tuner, self.problem = tuner, problem
        sifted, candidates = tuner.listed(problem)
        tuner.funnel.enumerated += sifted.enumerated
        tuner.funnel.dropped.update(sifted.dropped)
        self.crashes = tuner.crashes(problem)
        self.default = problem.default()
        incumbents = tuner.incumbents(problem)
        # To a model, compiling is measuring: looking ahead would tell it nothing.
        effort, max_spills = (replace(tuner.effort, ahead=0), 0) if tuner.judge.modelled else (tuner.effort, MAX_SPILLS)
        if tuner.sampler == EXHAUSTIVE:
            left = len(candidates.configs) - effort.first
            effort = replace(effort, rounds=-(-max(0, left) // effort.per_round))
        self.search = Search(candidates, effort, name=tuner.sampler, max_spills=max_spills)
        noise = MODEL_NOISE if tuner.judge.modelled else HELD
        self.found = Found(problem, self.default, set(incumbents), noise=noise)
        self.tried: set[Any] = set()
        self.finished = self.cut_short = False
        self.kept = self.to_be_raced = False  # once it is finished
        self.batch: list[tuple[Any, Future[Compiled]]] = []  # of the round, what was not taken from the compiler yet
        self.awaited: Any | None = None  # another worker is at it
        self._take_in()

    def compiling(self) -> list[Future[Compiled]]:
        """What the compiler is still at, or has not begun."""
        return [future for _, future in self.batch if not future.done()]

    def choose(self) -> Any | None:
        """The next to be measured; None where the search is over, or waits for the compiler or another worker."""
        while not self.finished:
            self._take_compiled()
            if self.awaited is not None:
                return self._free_again()
            if (config := self.search.next()) is not None:
                return config
            if self.search.left and self.search.waits:
                return None
            self._take_in()
            self.ask()
        return None

    def choose_beside(self) -> Any | None:
        """The next while one is under way, whose time is not known yet; nothing more is compiled for it."""
        self._take_compiled()
        return self.search.next()

    def prepare(self, config: Any, spare: bool, *, behind: _Measuring | _Race | None) -> _Measuring | None:
        """Write down what is going to be launched, behind what is being measured; None where that is of no use.

        It is known already, or another worker is at it.
        """
        journal, extra = self.tuner.journal, self.tuner.extra(self.problem)
        if outcome := self._known(config, extra) or self._crashed(config):
            self.tell(config, outcome)
            return None
        claim = None
        if journal:
            needs = self.found.needs[config]
            limits = constraints(needs, self.tuner.arch)
            before = behind.claim if behind else None
            claim = journal.claim(
                self.problem, config, extra, needs=needs, constraints=limits, spare=spare, behind=before
            )
            if claim is None:
                self.awaited = config
                return None
        return _Measuring(self, config, claim, spare)

    def _crashed(self, config: Any) -> Outcome | None:
        """What another search, since it was compiled, has found to crash."""
        reason = self.tuner.crashes(self.problem).get(config)
        return Outcome(None, reason) if reason else None

    def found_since(self, config: Any) -> Outcome | None:
        """What has come, since it was prepared, of another candidate of the same code."""
        if same := self.tuner.measured.get(self.code(config)):
            self.tuner.funnel.same_code += 1
        return same or self._crashed(config)

    def tell(self, config: Any, outcome: Outcome) -> None:
        """Take what came of one that was chosen."""
        self.search.tell(config, outcome.ms)
        self._learn(config, outcome)

    def _free_again(self) -> Any | None:
        """What another worker was at, to be measured after all: it was given up; None where it was not."""
        journal, extra, config = self.tuner.journal, self.tuner.extra(self.problem), self.awaited
        assert journal is not None
        outcome = journal.outcomes(self.problem, extra).get(config)
        if outcome is None and journal.is_measured(self.problem, config, extra):
            return None
        self.awaited = None
        if outcome is None:
            return config
        self.tuner.funnel.remembered += 1
        self.tell(config, outcome)
        return self.choose()

    def _take_in(self) -> None:
        """What was measured elsewhere, before or right now, counts as measured; and a race there ends the search."""
        journal, extra = self.tuner.journal, self.tuner.extra(self.problem)
        if journal is None or self.finished:
            return
        self.crashes = self.tuner.crashes(self.problem)
        for config, outcome in journal.outcomes(self.problem, extra).items():
            whole = outcome.ms is None or outcome.needs is not None
            if whole and config not in self.tried and not self._evidence(config):
                self._take_outcome(config, outcome)
        raced = self.found.in_use <= self.tried and journal.raced(self.problem, extra, RACE)
        self.finished = bool(raced)

    def _take_outcome(self, config: Any, outcome: Outcome) -> None:
        if not self.search.take(config, outcome.ms, outcome.needs, free=outcome.spare):
            return
        if outcome.needs:
            self.found.needs[config] = outcome.needs
        self.tuner.funnel.remembered += 1
        self._learn(config, outcome)

    def _take_compiled(self) -> None:
        """What has come out of the compiler, in the order in which it was asked for."""
        pool, extra = self.tuner.pool, self.tuner.extra(self.problem)
        # Asked for again: where the compiler died, it is at it once more.
        batch = [(c, pool.submit(self.problem, c, extra=extra) if f.done() else f) for c, f in self.batch]
        done: list[Any] = []
        self.batch = []
        for config, future in batch:
            if future.done():
                done.append(config)
            else:
                self.batch.append((config, future))
        for config in done:
            if config not in self.tried:  # elsewhere, by now
                self._compiled(config, pool.result(self.problem, config, extra=extra))

    def ask(self) -> None:
        """Compile the next round's, with what was found elsewhere since the last before the rest."""
        if self.finished:
            return
        self.search.enqueue(self.tuner.neighbours(self.problem))
        pool, extra = self.tuner.pool, self.tuner.extra(self.problem)
        asked = self.search.ask(lambda: self.tuner.seconds_left() == 0)
        self.batch += [(config, pool.submit(self.problem, config, extra=extra)) for config in asked]
        self.finished = self.search.finished
        self.tuner.funnel.stopped += self.search.stopped

    def _compiled(self, config: Any, needs: Resources | str) -> None:
        """Take what the compiler says."""
        funnel = self.tuner.funnel
        evidence = self._evidence(config)  # of an incumbent, or since its search began
        funnel.compiled += not evidence
        reason = self.search.compiled(config, evidence or needs)
        if isinstance(needs, str) or reason:
            self.tried.add(config)
            count = funnel.reject if evidence else lambda problem, config, reason: funnel.fail(reason)
            count(self.problem, config, str(reason))
        else:
            self.found.needs[config] = needs
            funnel.clean += 1

    def _known(self, config: Any, extra: dict[str, Any]) -> Outcome | None:
        """What earlier runs, other workers or another candidate of the same code have found."""
        journal, funnel = self.tuner.journal, self.tuner.funnel
        outcome = journal and journal.remembered(self.problem, config, extra)
        same = self.tuner.measured.get(self.code(config))
        funnel.remembered += outcome is not None
        funnel.same_code += outcome is None and same is not None
        return outcome or same

    def _evidence(self, config: Any) -> str | None:
        """Why a configuration must not be launched."""
        evidence = known_bad(self.problem.form, config, self.tuner.arch.name)
        return f"known bad: {evidence}" if evidence else self.crashes.get(config)

    def _learn(self, config: Any, outcome: Outcome) -> None:
        """Keep what came of a configuration, here or elsewhere."""
        self.tried.add(config)
        self.tuner.measured[self.code(config)] = outcome
        if outcome.ms is None:
            self.tuner.funnel.reject(self.problem, config, outcome.reason)
        else:
            self.found.timings[config] = Timing.recalled(outcome.ms, outcome.figures)
        self.found.trials = len(self.search.results)

    def code(self, config: Any) -> Any:
        """What makes a launch, of this search or another: the compiled code, where it is known, and its arguments."""
        needs = self.found.needs.get(config)
        problem, same = same_launch(self.problem, config)
        return (problem, needs, *launched(same)) if needs and needs.digest else (self.problem, config)


@dataclass
class _Measuring:
    """A candidate that is written down: it is launched, and then ended or abandoned, or else withdrawn."""

    task: _Task
    config: Any
    claim: Claim | None
    spare: bool
    answer: Callable[[], Timing] | None = None

    @property
    def found(self) -> Found:
        """What its search has found."""
        return self.task.found

    def hinges_on(self, other: _Measuring | _Race) -> bool:
        """Whether it can only be launched when that one has ended: it may be known then what comes of it.

        Or it would not be known, after a kill, which of the two was being measured.
        """
        if self.claim and self.claim.trial is not None and not self.claim.mark:
            return True
        if isinstance(other, _Race):
            return False
        is_alike = self.is_of_a_kernel(other.task.problem, [other.config])
        return is_alike or self.task.code(self.config) == other.task.code(other.config)

    def is_of_a_kernel(self, problem: Problem, configs: Iterable[Any]) -> bool:
        """Whether one of some configurations of a problem compiles to the same kernel."""
        own = same_kernel(self.task.problem, self.config)
        return any(same_kernel(problem, config) == own for config in configs)

    def launch(self) -> bool:
        """Have it measured after what is under way; False where it is withdrawn, because it is known by now."""
        task, tuner = self.task, self.task.tuner
        if outcome := task.found_since(self.config):
            self.withdraw()
            task.tell(self.config, outcome)
            return False
        limit = CLEARLY_SLOWER * min(task.search.results.values(), default=float("inf"))
        needs, extra = task.found.needs[self.config], tuner.extra(task.problem)
        try:
            mark = self.claim.mark if self.claim else None
            self.answer = tuner.judge.begin(task.problem, self.config, needs, limit, extra, mark)
        except BaseException:  # it may have been launched
            self.abandon()
            raise
        return True

    def withdraw(self) -> None:
        """Count it as not tried."""
        if self.claim:
            self.claim.settle(None)
            self.claim = None

    def end(self) -> None:
        """Wait for its times, write them down and let its search learn from them."""
        assert self.answer is not None
        try:
            timing = self.answer()
            outcome = Outcome(timing.ms, figures=timing.figures, spare=self.spare)
        except StartError:
            raise
        except MeasurementError as error:
            outcome = Outcome(None, str(error), spare=self.spare)
        if self.claim:
            self.claim.settle(outcome)
            self.claim = None
        funnel = self.task.tuner.funnel
        funnel.timed += outcome.ms is not None
        funnel.spare += self.spare and outcome.ms is not None
        self.task.tell(self.config, outcome)

    def abandon(self) -> None:
        """End its process, where it may have been launched, and count it as not tried."""
        try:
            self.task.tuner.judge.renew()
        finally:
            self.withdraw()


@dataclass
class _Race:
    """What a search found, against each other: launched, and then ended or abandoned; or known."""

    tuner: Tuner
    found: Found
    count: int  # how many are ranked by it
    step: str
    configs: list[Any]
    claim: RaceClaim | None = None
    answer: Callable[[], list[Timing]] | None = None
    known: dict[Any, Outcome] = field(default_factory=dict)

    def launch(self) -> None:
        """Have it held after what is under way."""
        problem, extra = self.found.problem, self.tuner.extra(self.found.problem)
        try:
            for config in self.configs:  # what others have measured is not compiled here yet
                self.tuner.pool.result(problem, config, extra=extra)
            mark = self.claim.mark if self.claim else None
            self.answer = self.tuner.judge.begin_rank(problem, self.configs, extra, mark)
        except BaseException:  # it may have been launched
            self.abandon()
            raise

    def end(self) -> int:
        """Wait for the times, write them down and rank by them; how many there are."""
        if self.answer:
            busy, outcomes = self.tuner.judge.busy, self._outcomes(self.answer)
            # A later run holds it again where the search was cut short; but not if it crashes.
            whole = all(outcome.ms is not None for outcome in outcomes)
            self._settle(None if self.found.cut_short and whole else outcomes)
            self.known = {c: o for c, o in zip(self.configs, outcomes, strict=True) if o.ms is not None}
            if self.step == RACE:
                self.tuner.funnel.spend("race", *[self.tuner.judge.busy - busy] * 2)
        times = {c: Timing.recalled(o.ms or 0.0, o.figures) for c, o in self.known.items() if c in self.found.timings}
        self.found.take(list(times), list(times.values()), first=self.step == RACE)
        self.tuner.rank(self.found, self.count)
        if self.step == RACE:
            self.tuner.funnel.raced += len(times)
        return len(times)

    def abandon(self) -> None:
        """End its process, where it may have been launched, and count it as not held."""
        try:
            self.tuner.judge.renew()
        finally:
            self._settle(None)

    def _outcomes(self, answer: Callable[[], list[Timing]]) -> list[Outcome]:
        try:
            return [Outcome(timing.ms, figures=timing.figures) for timing in answer()]
        except StartError:
            self._settle(None)
            raise
        except MeasurementError as error:
            self.tuner.funnel.fail(str(error))
            return [Outcome(None, str(error))] * len(self.configs)
        except BaseException:
            self.abandon()
            raise

    def _settle(self, outcomes: list[Outcome] | None) -> None:
        if self.claim:
            self.claim.settle(outcomes)
            self.claim = None
