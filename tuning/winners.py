"""What a search found: times that races make better known, and who wins by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuning.compilation import Resources
from tuning.problems import Problem
from tuning.timing import Timing

NOISE = 0.01  # between two races' times of one configuration
HELD = 0.02  # a challenger must beat what is in use by more than this
MODEL_NOISE = 0.7  # the same by a model: of the shipped landscapes' 18 choices none is then slower than the default
SHARED = 0.01  # what a point may lose against its fastest, so that neighbours share a rule


@dataclass(frozen=True)
class Winner:
    """What was found for one problem, with its proof.

    `timing` is that of the races, or of the only measurement; `best_ms` is of the fastest, where that is another.
    """

    problem: Problem
    config: Any
    timing: Timing
    default_ms: float | None
    error: float | None
    needs: Resources
    trials: int
    modelled: bool
    best_ms: float | None = None

    @property
    def ms(self) -> float:
        """The median milliseconds."""
        return self.timing.ms


@dataclass
class Found:
    """What a search found: times of its candidates, known better from race to race.

    What is in use, `incumbents` that rules name or else the default, stays unless it is beaten beyond the noise in
    every race, so that tuning again does not flip files; but not where the default was faster in the last one. Rules
    stay where there was no race, as after Ctrl-C.
    `last` are that race's times, with which a winner is written down.
    """

    problem: Problem
    default: Any
    incumbents: set[Any]
    timings: dict[Any, Timing] = field(default_factory=dict)
    needs: dict[Any, Resources] = field(default_factory=dict)
    raced: set[Any] = field(default_factory=set)
    last: dict[Any, Timing] = field(default_factory=dict)
    trials: int = 0
    cut_short: bool = False  # by the deadline: a later run goes on
    noise: float = HELD

    @property
    def in_use(self) -> set[Any]:
        """What would be used if nothing were found."""
        return self.incumbents or {self.default}

    def contenders(self, count: int) -> list[Any]:
        """The fastest, and whatever else was in use or is the default."""
        fastest = self._order()[:count]
        return fastest + [c for c in self.timings if (c in self.in_use or c == self.default) and c not in fastest]

    def raced_against(self, config: Any) -> dict[Any, Timing]:
        """The figures of what was raced, with this configuration; its own alone where it was not raced."""
        return {c: self.figures[c] for c in (self.raced if config in self.raced else {config})}

    def take(self, configs: list[Any], timings: list[Timing], *, first: bool) -> None:
        """Take the times of a race: in place of single measurements, or beside those of an earlier race."""
        for config, timing in zip(configs, timings, strict=True):
            self.timings[config] = timing if first else both(self.timings[config], timing)
        self.raced.update(configs)
        self.last = dict(zip(configs, timings, strict=True))

    def winner(self, config: Any, *, modelled: bool) -> Winner:
        """One of the configurations as the winner, not proven yet."""
        figures = self.figures
        default_ms = figures[self.default].ms if self.default in figures else None
        timing, needs = figures[config], self.needs[config]
        best_ms = min(known.ms for known in (timing, *(self.last or figures).values()))
        return Winner(self.problem, config, timing, default_ms, None, needs, self.trials, modelled, best_ms)

    @property
    def figures(self) -> dict[Any, Timing]:
        """The times of the last race, and what is known of what was not in it."""
        return self.timings | self.last

    def winners(self, configs: list[Any], *, modelled: bool) -> list[Winner]:
        """These configurations as winners, best first."""
        ranked = [self.winner(config, modelled=modelled) for config in self._order() if config in configs]
        # What no GPU has run is not recommended where it spills, not even the default; nor what hardly beats that.
        if modelled and ranked and ranked[0].needs.spills:
            return []
        return [winner for winner in ranked if not (modelled and winner.needs.spills)]

    def _order(self) -> list[Any]:
        # What was left out of the race is known less well: it is not to win by that.
        ordered = sorted(
            self.timings,
            key=lambda config: (self._is_slower(config), config not in self.raced, self.timings[config].ms),
        )
        held = next((config for config in ordered if config in self.in_use and not self._is_slower(config)), None)
        unraced = held in self.incumbents and held not in self.raced
        if held is not None and (unraced or not beats(self.timings[ordered[0]], self.timings[held], self.noise)):
            ordered.remove(held)
            ordered.insert(0, held)
        return ordered

    def _is_slower(self, config: Any) -> bool:
        """Whether it is slower than the default beyond the noise."""
        default = self.figures.get(self.default)
        return default is not None and self.figures[config].ms > (1 + NOISE) * default.ms


def beats(challenger: Timing, holder: Timing, noise: float = HELD) -> bool:
    """Whether it is faster beyond the noise: by more than such a share, and the two intervals lie apart."""
    return is_faster(challenger.ms, holder.ms, noise) and challenger.high < holder.low


def is_faster(ms: float, held_ms: float, noise: float) -> bool:
    """Whether it is less by more than such a share."""
    return ms < (1 - noise) * held_ms


def both(one: Timing, other: Timing) -> Timing:
    """Two races' times of one configuration: the mean, and an interval that holds both."""
    low, high = min(one.low, other.low), max(one.high, other.high)
    spread, error = max(one.spread, other.spread), one.error
    return Timing((one.ms + other.ms) / 2, low, high, spread, one.repeats + other.repeats, error)
