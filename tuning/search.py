"""Which candidates to try: Optuna proposes, and what it proposes is always a candidate that was not tried yet."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from tuning.space import knob_values

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Search:
    """A study over a finite list of configurations, the first ones given and the rest from Optuna's TPE.

    candidates: every configuration that may be tried. first: those to try before anything is known, best guess first.
    """

    def __init__(self, candidates: list[Any], first: list[Any], seed: int = 0) -> None:
        self._untried = {_key(config): config for config in [*first, *candidates]}
        self._queue = list(self._untried.values())[: len({_key(config) for config in first})]
        self._proposals: dict[tuple[int, ...], optuna.Trial] = {}
        self._distributions = _distributions(list(self._untried.values()))
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        self.study = optuna.create_study(sampler=sampler, direction="minimize")
        self.results: dict[Any, float] = {}

    def ask(self, count: int) -> list[Any]:
        """Up to `count` configurations to try next; none when all were tried."""
        return [self._next() for _ in range(min(count, len(self._untried)))]

    def tell(self, config: Any, ms: float | None) -> None:
        """The time of a configuration, or None where it failed."""
        if ms is not None:
            self.results[config] = ms
        trial = self._proposals.pop(_key(config), None)
        if trial is not None:
            self.study.tell(trial, ms, TrialState.COMPLETE if ms is not None else TrialState.FAIL)
            return
        if ms is not None:
            params, distributions = knob_values(config), self._distributions
            self.study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=ms))

    def best(self, count: int) -> list[Any]:
        """The fastest configurations so far, fastest first."""
        return sorted(self.results, key=lambda config: self.results[config])[:count]

    def _next(self) -> Any:
        if self._queue:
            return self._untried.pop(_key(self._queue.pop(0)))
        trial = self.study.ask(self._distributions)
        wanted = tuple(trial.params[name] for name in self._distributions)
        key = min(self._untried, key=lambda key: _distance(key, wanted))
        if key == wanted:
            self._proposals[key] = trial
        else:
            # The proposal was tried or is no candidate: its nearest neighbour stands in, and is added when told.
            self.study.tell(trial, state=TrialState.FAIL)
        return self._untried.pop(key)


def _key(config: Any) -> tuple[int, ...]:
    return tuple(knob_values(config).values())


def _distributions(configs: list[Any]) -> dict[str, BaseDistribution]:
    rows = [knob_values(config) for config in configs]
    return {name: CategoricalDistribution(sorted({row[name] for row in rows})) for name in rows[0]}


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(one, other, strict=True))
