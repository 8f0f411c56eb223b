"""A judge that knows every time and a compiler that compiles nothing: the tuner's loop without a GPU."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuning.compilation import ARCHS, Resources
from tuning.device import Mark
from tuning.journal import Journal
from tuning.measurement import MeasurementError, Timing
from tuning.problems import PLAIN, Problem
from tuning.search import Effort
from tuning.tuner import Tuner, likely_first

SM90 = ARCHS["sm90"]
PROBLEM = Problem("fused_chunk", "bfloat16", 8, 1024, 8, 64, 64)
NEEDS = Resources(registers=64, spills=0, shared=8192, warps=4)
ALL = Effort(first=10, rounds=50, per_round=5, finalists=3)


def candidates(problem: Problem = PROBLEM) -> list[Any]:
    """All that may be tried."""
    return likely_first(problem, SM90)


def landscape(config: Any) -> float:
    """A time that is least at BT=32, BV=64, num_warps=8, num_stages=3, by pointers."""
    best = {"BT": 32, "BV": 64, "num_warps": 8, "num_stages": 3}
    steps = sum(abs(math.log2(getattr(config, name) / value)) for name, value in best.items() if hasattr(config, name))
    return 1.0 + steps + getattr(config, "descriptors", 0)


def steep(config: Any) -> float:
    """The same, so far apart that a model's choice may replace the default."""
    return float(100 ** landscape(config))


def timing(ms: float) -> Timing:
    """A time without noise."""
    return Timing(ms, low=ms, high=ms, spread=0.0, repeats=9, error=0.001)


def promise(patch: pytest.MonkeyPatch, ms: Callable[[Any], float]) -> None:
    """Have the model say these times before anything is compiled."""
    patch.setattr("tuning.tuner.predict", lambda problem, config, arch: ms(config))


class Judge:
    """Knows the times; may refuse to time or to prove some configurations, or end with Ctrl-C after some calls."""

    def __init__(
        self,
        ms: Callable[[Any], float] = landscape,
        *,
        broken: Callable[[Any], bool] = lambda config: False,
        unproven: Callable[[Any], bool] = lambda config: False,
        stop_after: float = math.inf,
        modelled: bool = False,
    ) -> None:
        self.ms, self.broken, self.unproven, self.stop_after, self.modelled = ms, broken, unproven, stop_after, modelled
        self.timed: list[Any] = []
        self.busy, self.renewed = 0.0, 0

    def begin(self, *job: Any) -> Callable[[], Timing]:
        *asked, mark = job
        return partial(self.launched, mark, self.time, *asked)

    def time(
        self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: dict[str, Any]
    ) -> Timing:
        if len(self.timed) >= self.stop_after:
            raise KeyboardInterrupt
        self.timed.append(config)
        if self.broken(config):
            raise MeasurementError("ArithmeticError: wrong result")
        return timing(self.ms(config))

    def begin_rank(self, *job: Any) -> Callable[[], list[Timing]]:
        *asked, mark = job
        return partial(self.launched, mark, self.rank, *asked)

    @staticmethod
    def launched(mark: Mark | None, run: Callable[..., Any], *asked: Any) -> Any:
        """As a measuring process does it."""
        if mark:
            mark.make()
        return run(*asked)

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        return [timing(self.ms(config)) for config in configs]

    def renew(self) -> None:
        self.renewed += 1

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        if self.unproven(config):
            raise MeasurementError("ArithmeticError: wrong result at the full shape")
        return 0.001


class Pool:
    """Compiles nothing: every candidate needs the same, or what a test says."""

    def __init__(
        self,
        arch: str = "sm90",
        workers: int | None = None,
        needs: Callable[..., Any] | None = None,
        *,
        aside: bool = False,
    ) -> None:
        self.workers = workers or 4
        self.needs = needs or (lambda problem, config, variant: NEEDS)

    def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.needs(problem, config, variant))
        return future

    def result(
        self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None, seconds: float | None = None
    ) -> Any:
        return self.needs(problem, config, variant)

    def outstanding(self) -> int:
        return 0

    @property
    def submitted(self) -> int:
        return 1 << 20  # a compiler that is never late

    def forget_waiting(self) -> None:
        pass

    def close(self) -> None:
        pass


def tune(
    judge: Judge,
    *,
    problems: list[Problem] | None = None,
    pool: Pool | None = None,
    effort: Effort = ALL,
    seconds: float = 100.0,
    incumbents: Callable[[Problem], list[Any]] = lambda problem: [],
    journal: Journal | None = None,
) -> Tuner:
    """Search and prove."""
    deadline = time.monotonic() + seconds
    compiler: Any = pool or Pool()
    tuner = Tuner(judge, compiler, SM90, effort, deadline, incumbents, lambda *progress: None, journal)
    tuner.run(problems or [PROBLEM])
    tuner.conclude()
    return tuner


def module_at(path: Path, name: str) -> ModuleType:
    """The module in a file, by a name of which imports know it from now on."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
