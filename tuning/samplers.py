"""Optuna's samplers on a finite list of configurations, and one of our own that knows the kernels.

A knob is told to Optuna as the rank of its value among those on the list, an ordered integer. None of the samplers ever
proposes a configuration that is not on the list, or one a second time.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuning.compilation import Arch, Resources
from tuning.model import predict
from tuning.problems import Problem
from tuning.space import knob_values
from tuning.surrogate import Array, Belief, Surrogate

STARTUP = 4  # trials before Optuna's samplers begin to learn
INFORMED, EXHAUSTIVE = "informed", "brute-force"
OPTUNAS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(
        seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False
    ),
    EXHAUSTIVE: lambda seed: optuna.samplers.BruteForceSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
SAMPLERS = (INFORMED, *OPTUNAS)
NEEDED = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",)}


class SamplerError(Exception):
    """A sampler that cannot be used here; the message says what is missing."""


def check_available(name: str) -> None:
    """Raise SamplerError where a sampler's packages are not installed."""
    for package in NEEDED.get(name, ()):
        if importlib.util.find_spec(package) is None:
            raise SamplerError(
                f"--sampler {name} needs {package}, which is not installed: pip install 'retgen[samplers]'"
            )


class Candidates:
    """The finite list in numbers: for Optuna each knob's rank, for the surrogate features and the model's estimates.

    First what is `kept`, whether it is among the others or not; then these, those that the model likes best first.
    """

    def __init__(self, problem: Problem, configs: Iterable[Any], arch: Arch, *, kept: Iterable[Any] = ()) -> None:
        self.problem, self.arch, self.kept = problem, arch, list(dict.fromkeys(kept))
        estimates = {config: predict(problem, config, arch) for config in (*self.kept, *configs)}
        others = [config for config in estimates if config not in self.kept]
        self.configs = [*self.kept, *sorted(others, key=estimates.__getitem__)]
        self.numbers = {config: number for number, config in enumerate(self.configs)}
        rows = [knob_values(config) for config in self.configs]
        levels = {name: sorted({row[name] for row in rows}, key=_order) for name in rows[0]}
        self.distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) for name, values in levels.items()
        }
        self.ranks = np.array([[levels[name].index(row[name]) for name in levels] for row in rows], dtype=float)
        self._by_rank = {tuple(map(int, ranks)): number for number, ranks in enumerate(self.ranks)}
        self.features, self.learned = self._features(rows), 0
        self.estimates = np.log2([estimates[config] for config in self.configs])
        self._study: Study | None = None  # the one that was asked about last
        self._open: dict[int, None] = {}  # there, beside its first trials, of which there are so many:
        self._taken = 0

    def learn(self, config: Any, needs: Resources) -> None:
        """Estimate anew with what the compiler says that the kernel needs: registers, spills, occupancy."""
        self.learned += 1
        self.estimates[self.numbers[config]] = math.log2(predict(self.problem, config, self.arch, needs))

    def params(self, number: int) -> dict[str, int]:
        """A candidate as Optuna is told of it."""
        return dict(zip(self.distributions, map(int, self.ranks[number]), strict=True))

    def number(self, params: dict[str, Any]) -> int:
        """The candidate that a trial's params are."""
        return self._by_rank[tuple(params[name] for name in self.distributions)]

    def open(self, study: Study) -> list[int]:
        """Those that no trial has."""
        if self._study is not study:
            self._study, self._open, self._taken = study, dict.fromkeys(range(len(self.configs))), 0
        trials = study.get_trials(deepcopy=False)
        while self._taken < len(trials) and _is_whole(trials[self._taken], self):
            self._open.pop(self.number(trials[self._taken].params), None)
            self._taken += 1
        # Behind one that is being asked for, and has no params yet.
        taken = {self.number(trial.params) for trial in trials[self._taken :] if _is_whole(trial, self)}
        return [number for number in self._open if number not in taken]

    def nearest(self, params: dict[str, Any], numbers: list[int]) -> int:
        """Which of some candidates is the fewest steps of knobs away."""
        wanted = np.array([params[name] for name in self.distributions], dtype=float)
        return numbers[int(np.abs(self.ranks[numbers] - wanted).sum(1).argmin())]

    def _features(self, rows: list[dict[str, int]]) -> Array:
        """The knobs' ranks; a segment that holds the whole sequence is the same however long it is."""
        features: Array = self.ranks.copy()
        if "L" in self.distributions:
            lengths = [min(row["L"], self.problem.T) for row in rows]
            features[:, list(self.distributions).index("L")] = np.unique(lengths, return_inverse=True)[1]
        return features


class OnList(BaseSampler):
    """Another sampler, whose proposals off the list, or made before, become the nearest candidate still open."""

    def __init__(self, inner: BaseSampler, candidates: Candidates) -> None:
        self._inner, self._candidates = inner, candidates

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs, always: which of them the other sampler relates is its own affair."""
        return self._candidates.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The ranks of a candidate that no trial has."""
        inner, sample = self._inner, copy.copy(trial)
        params = dict(inner.sample_relative(study, sample, inner.infer_relative_search_space(study, sample)))
        for name, distribution in search_space.items():
            sample.params, sample.distributions = dict(params), {known: search_space[known] for known in params}
            if name not in params:
                single = distribution.single()
                params[name] = 0 if single else inner.sample_independent(study, sample, name, distribution)
        return self._candidates.params(self._candidates.nearest(params, self._candidates.open(study)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Not asked for: all knobs are related."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Hand on."""
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Hand on, but to brute force: all that it would do is to stop a study that is not asked and told."""
        if not isinstance(self._inner, optuna.samplers.BruteForceSampler):
            with warnings.catch_warnings():
                # CMA-ES goes without constraints, as it may: what exceeds them is pruned.
                warnings.filterwarnings("ignore", "Constraints have been set")
                self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Hand on."""
        self._inner.reseed_rng()


class Informed(BaseSampler):
    """Proposes the candidate with the largest expected gain.

    By the closed-form model, with the compiler's figures where a candidate is compiled, corrected by what was measured
    (tuning/surrogate.py). A trial that failed counts as slow as the slowest, so that its neighbours come later. Before
    anything is measured it goes by the model alone. There is no chance in it.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates, self._surrogate = candidates, Surrogate(candidates.features)
        self._belief: tuple[tuple[int, int], Belief] | None = None  # and of how many trials and compiled candidates

    def gains(self, study: Study, numbers: list[int]) -> Array:
        """By how many octaves each of some candidates is expected to beat the best so far."""
        belief = self._believe(study)
        gains = -self._candidates.estimates if belief is None else belief.gain
        return gains[numbers]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs."""
        return self._candidates.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The ranks of the most promising candidate that no trial has."""
        numbers = self._candidates.open(study)
        return self._candidates.params(numbers[int(self.gains(study, numbers).argmax())])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never: all knobs are related."""
        raise NotImplementedError(f"{param_name} is no knob of the list")

    def _believe(self, study: Study) -> Belief | None:
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        times = [trial.value for trial in trials if trial.value is not None]
        if not times:
            return None
        known = (len(trials), self._candidates.learned)
        if self._belief is None or self._belief[0] != known:
            log_ms = np.log2([trial.value or max(times) for trial in trials])
            measured = [self._candidates.number(trial.params) for trial in trials]
            times_of = dict(zip(measured, log_ms, strict=True))
            belief = self._surrogate.believe(self._candidates.estimates, times_of)
            self._belief = (known, belief)
        return self._belief[1]


def sampler(name: str, candidates: Candidates, seed: int) -> BaseSampler:
    """A sampler by its name on the command line; SamplerError where its packages are missing."""
    if name == INFORMED:
        return Informed(candidates)
    check_available(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # brute force, since 2023
        return OnList(OPTUNAS[name](seed), candidates)


def _order(value: int) -> float:
    """A limit of 0 is none, and the highest."""
    return value or math.inf


def _is_whole(trial: FrozenTrial, candidates: Candidates) -> bool:
    return len(trial.params) == len(candidates.distributions)
