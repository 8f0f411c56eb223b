"""How many candidates came how far, and how long that took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tuning.problems import Problem
from tuning.space import knob_values

MEASURING = ("search", "confirm", "prove")  # and the races, within the search


@dataclass
class Funnel:
    """How many candidates came how far, how long each phase took, and for how long of it the judge was busy."""

    enumerated: int = 0
    compiled: int = 0
    clean: int = 0
    timed: int = 0
    remembered: int = 0
    same_code: int = 0
    raced: int = 0
    spare: int = 0  # of the timed, those that were while nothing else could be
    stopped: int = 0  # searches that ended because nothing better was expected
    confirmed: int = 0
    proven: int = 0
    compared: int = 0  # winners where a rule was in use before
    flipped: int = 0  # those of them that replace it
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0  # seconds of the search in which nothing that could be measured was compiled
    dropped: Counter[str] = field(default_factory=Counter)  # of the enumerated, by closed-form filter
    failures: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)  # of each kind of failure the first, in its own words
    rejected: list[str] = field(default_factory=list)

    def idle_share(self, *phases: str) -> float:
        """The part of these phases, or of all in which something is measured, in which nothing was."""
        seconds, busy = (
            sum(times.get(name, 0.0) for name in phases or MEASURING) for times in (self.seconds, self.busy)
        )
        return 1 - busy / seconds if seconds else 0.0

    def spend(self, phase: str, seconds: float, busy: float) -> None:
        """Add to the seconds of a phase, and to those of them in which the judge was busy."""
        for times, more in ((self.seconds, seconds), (self.busy, busy)):
            times[phase] = times.get(phase, 0.0) + more

    def fail(self, reason: str) -> None:
        """Count a candidate that came no further."""
        kind = _kind(reason)
        self.failures[kind] = self.failures.get(kind, 0) + 1
        self.examples.setdefault(kind, reason)

    def reject(self, problem: Problem, config: Any, reason: str) -> None:
        """Count a candidate that the GPU did not run right, and say which it was."""
        self.fail(reason)
        self.rejected.append(
            f"{problem.form} K={problem.K} V={problem.V} {problem.dtype} {knob_values(config)}: {reason}"
        )


def _kind(reason: str) -> str:
    return reason.split(":", 1)[0] if reason.split(":", 1)[0].isidentifier() else reason[:60]
