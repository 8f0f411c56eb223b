"""Which candidates to compile and which of those to measure: Optuna's ask and tell over a finite list.

A search goes in rounds. `ask` opens one and gives what to compile; `compiled` takes what the compiler says; `next`
gives what to measure, one by one; `tell` takes its time. More is compiled than measured, because the compiler's answer
tells much about a candidate and costs the GPU nothing: what a round leaves over competes in the next.

Every candidate that was asked for is a trial of the search's study: COMPLETE with its milliseconds, FAIL where it does
not run right, PRUNED where it does not compile, is too large or was never worth measuring. What it needs of a
multiprocessor lies in the trial as constraints, feasible up to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from tuning.compilation import TENSOR_MEMORY, Arch, Resources
from tuning.samplers import INFORMED, Candidates, Informed, sampler

MUCH = 10  # times the gain of what is compiled: what promises more is worth waiting for
LATE = 0.25  # of what a round has compiled: so few are not waited for, but for what is kept, and compete when they come
MAX_SPILLS = 1024  # bytes a thread; of the shipped landscapes' candidates within 1.5 of the best none has over 816

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Effort:
    """How much to try: so many measurements in the first round, then rounds of so many, and so many in the final race.

    ahead: how many more are compiled than are measured in the first round; the others use them up, but for what
    promises far more. gain: the search ends when none is expected to be faster than the best by more than this; 0 for
    never. Only the sampler `informed` looks ahead and expects. compiled: how many a search has had compiled when it
    ends, as counted in runs of all workloads; no more are compiled ahead.
    """

    first: int
    rounds: int
    per_round: int
    finalists: int
    ahead: int = 0
    gain: float = 0.0
    compiled: int = 0

    @property
    def measurements(self) -> int:
        """How many candidates a search measures at most, beside the incumbents."""
        return self.first + self.rounds * self.per_round


EFFORTS = {
    "quick": Effort(first=16, rounds=4, per_round=6, finalists=3, ahead=24, gain=0.0002, compiled=54),
    "full": Effort(first=24, rounds=5, per_round=8, finalists=5, ahead=24, gain=0.0002, compiled=54),
}


class Search:
    """A study over a finite list of configurations.

    candidates: what may be tried. What it keeps is in use now: tried first, one trial more for each beyond the first.
    max_spills: with more bytes spilled a thread, only what is kept is measured. `left` is how many measurements the
    budget still allows.
    """

    def __init__(
        self,
        candidates: Candidates,
        effort: Effort,
        *,
        name: str = INFORMED,
        max_spills: int = MAX_SPILLS,
        seed: int = 0,
    ) -> None:
        self._list, self._kept, self._effort, self._max_spills = candidates, candidates.kept, effort, max_spills
        self._queue = list(self._kept)
        self._first: set[Any] = set()  # asked for from the queue: measured as they come
        self._sampler = sampler(name, self._list, seed)
        self.study = optuna.create_study(sampler=self._sampler, direction="minimize")
        self._trials: dict[Any, Trial] = {}  # asked for and not told
        self._compiling: set[Any] = set()
        self._round: set[Any] = set()  # what it asked for last
        self._late = 0  # how many of that it does not wait for
        self._ready: list[Any] = []  # compiled and not measured, in the order in which they were asked for
        self.left = effort.measurements + max(0, len(self._kept) - 1)
        self._quota = 0
        self.results: dict[Any, float] = {}
        self._begun = False
        self.finished = self.stopped = False  # stopped: because nothing better is expected

    @property
    def measured(self) -> int:
        """How many candidates were told of."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)))

    def enqueue(self, configs: list[Any]) -> None:
        """Try these first of what is left, where they are on the list and not asked for yet."""
        open_ = {self._list.configs[number] for number in self._list.open(self.study)}
        self._queue += [c for c in dict.fromkeys(configs) if c in open_ and c not in self._queue]

    def ask(self, is_late: Callable[[], bool] = lambda: False) -> list[Any]:
        """What to compile for the next round; `finished` where there is neither that nor anything left to measure.

        Where it `is_late`, as it may be before a sampler has proposed a whole round, that is one.
        """
        a_round = self._effort.per_round if self.results else self._effort.first + max(0, len(self._kept) - 1)
        self.left = max(
            self.left, sum(config in self._kept for config in self._queue)
        )  # always tried, whatever is known
        self._quota = min(self.left, a_round or self.left)
        count = min(self._missing(), len(self._list.open(self.study)))
        self._begun = True
        self.finished = self.stopped or not self._quota or not (count or self._ready or self._compiling)
        if self.finished:
            self._prune(list(self._trials))
            return []
        asked: list[Any] = []
        while len(asked) < count and not (asked and is_late()):
            asked.append(self._propose())
        self._round, self._late = set(asked), int(LATE * len(asked))
        self._compiling.update(asked)
        return asked

    @property
    def waits(self) -> bool:
        """Whether it says no more until more is compiled."""
        is_over = self.stopped or not self._quota
        return self._lacks_much or bool(self._compiling and not is_over)

    @property
    def _lacks_much(self) -> bool:
        return len(self._compiling & self._round) > self._late or not self._compiling.isdisjoint(self._kept)

    def _missing(self) -> int:
        """How many a round compiles: at first all, and some ahead; then what promises MUCH more than others.

        Less than half of a round is left out: the compiler takes as long for few as for many.
        """
        there = len(self._ready) + len(self._compiling)
        if not isinstance(self._sampler, Informed):
            return max(0, self._quota - there)
        if not (self._begun and self.results):
            return max(0, self._quota + self._effort.ahead - there)
        open_, ready = self._list.open(self.study), self._numbers([*self._ready, *self._compiling])
        gains = self._sampler.gains(self.study, ready + open_)
        gains[: len(ready)] *= MUCH
        best = gains.argsort()[::-1][: self._quota]
        count = int((best >= len(ready)).sum())
        if 2 * count < self._quota <= len(ready):
            count = 0
        return max(count, min(len(self._queue), self._quota))

    def compiled(self, config: Any, needs: Resources | str) -> str | None:
        """Take what the compiler says of one that was asked for; why it is not going to be measured, or None."""
        self._compiling.discard(config)
        trial = self._trials[config]
        if isinstance(needs, str):
            self.study.tell(self._trials.pop(config), state=TrialState.PRUNED)
            return needs
        self._list.learn(config, needs)
        trial.set_user_attr("needs", asdict(needs))
        over = constraints(needs, self._list.arch, self._max_spills)
        for what, value in over.items():
            trial.set_constraint(what, value)
        reasons = [what for what, value in over.items() if value > 0 and (what != "spills" or config not in self._kept)]
        if reasons:
            self._prune([config])
            return reasons[0]
        self._ready.append(config)
        return None

    def next(self) -> Any | None:
        """What to measure now; None until more is compiled, and at the end of a round."""
        if not self._quota or not self._ready:
            return None
        config = next((config for config in self._ready if config in self._first), None)
        if config is None:
            config = None if self._lacks_much else self._most_promising()
        if config is not None:
            self._ready.remove(config)
            self._quota -= 1
            self.left -= 1
        return config

    def spare(self) -> Any | None:
        """One that was compiled and left over, to be measured while nothing else can be: it costs the search nothing.

        None where none is left that is expected to gain.
        """
        left_over = [config for config in self._ready if config not in self._first]
        if not self.results or not left_over or not isinstance(self._sampler, Informed):
            return None
        gains = self._sampler.gains(self.study, self._numbers(left_over))
        if gains.max() < math.log2(1 + self._effort.gain):
            return None
        config = left_over[int(gains.argmax())]
        self._ready.remove(config)
        return config

    def tell(self, config: Any, ms: float | None) -> None:
        """The time of a configuration, or None where it does not run right."""
        trial = self._trials.pop(config, None) or self._trial_of(config)
        self.study.tell(trial, ms, TrialState.FAIL if ms is None else TrialState.COMPLETE)
        if ms is not None:
            self.results[config] = ms

    def take(self, config: Any, ms: float | None, needs: Resources | None, *, free: bool = False) -> bool:
        """As `tell`, of what was measured elsewhere; False where not searched. It costs the budget unless free."""
        if config not in self._list.numbers:
            return False
        self._compiling.discard(config)
        for waiting in (self._queue, self._ready):
            if config in waiting:
                waiting.remove(config)
        if needs is not None:
            self._list.learn(config, needs)
        self.tell(config, ms)
        self.left = max(0, self.left - (not free))
        self._quota = min(self._quota, self.left)
        return True

    def _propose(self) -> Any:
        if self._queue:
            config = self._queue.pop(0)
            self._first.add(config)
            trial = self._trial_of(config)
        else:
            trial = self.study.ask(self._list.distributions)
            config = self._list.configs[self._list.number(trial.params)]
        self._trials[config] = trial
        return config

    def _trial_of(self, config: Any) -> Trial:
        self.study.enqueue_trial(self._list.params(self._list.numbers[config]))
        return self.study.ask(self._list.distributions)

    def _most_promising(self) -> Any | None:
        """The compiled candidate with the largest expected gain; None where none has any, or only what is late has."""
        if not isinstance(self._sampler, Informed):
            return self._ready[0]
        ready, late = self._numbers(self._ready), self._numbers(self._compiling)
        gains = self._sampler.gains(self.study, ready + late + self._list.open(self.study))
        if self.results and self.measured >= self._effort.first:
            gaining = gains >= math.log2(1 + self._effort.gain)
            self.stopped = not bool(gaining.any())  # or not any more, since another time is known
            if self.stopped or (not gaining[: len(ready)].any() and gaining[len(ready) :][: len(late)].any()):
                return None
        return self._ready[int(gains[: len(ready)].argmax())]

    def _numbers(self, configs: Iterable[Any]) -> list[int]:
        return [self._list.numbers[config] for config in configs]

    def _prune(self, configs: list[Any]) -> None:
        """These are not going to be measured."""
        for config in configs:
            self.study.tell(self._trials.pop(config), state=TrialState.PRUNED)


def constraints(needs: Resources, arch: Arch, max_spills: int = MAX_SPILLS) -> dict[str, float]:
    """By how much a candidate exceeds what it may need, as Optuna's constraints: feasible where none is above 0."""
    return {
        "shared memory": needs.shared - arch.shared,
        "tensor memory": needs.tensor_memory - TENSOR_MEMORY,
        "spills": needs.spills - max_spills,
    }
