"""Who says how fast a candidate is: the GPU, or a model of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tuning.compilation import Arch, Resources
from tuning.device import Mark
from tuning.measurement import Measurer
from tuning.model import predict
from tuning.problems import Problem
from tuning.timing import Timing


class Judge(Protocol):
    """Times candidates: on the GPU, or by the model."""

    modelled: bool

    @property
    def busy(self) -> float:
        """Seconds that it was at it."""

    def begin(
        self,
        problem: Problem,
        config: Any,
        needs: Resources,
        stop_above_ms: float,
        extra: dict[str, Any],
        mark: Mark | None,
    ) -> Callable[[], Timing]:
        """Begin to time, only roughly where over `stop_above_ms`; what is returned waits for the times.

        It raises MeasurementError for what does not run right. What is asked for meanwhile comes next. `mark`: as of a
        Measurer.
        """

    def begin_rank(
        self, problem: Problem, configs: list[Any], extra: dict[str, Any], mark: Mark | None
    ) -> Callable[[], list[Timing]]:
        """As `begin`, of several configurations, which that has seen or others of the same code, against each other."""

    def renew(self) -> None:
        """Go on in a fresh process, which owes nothing to what this one is at or has been through."""

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """The error at the full shape, or None where nothing runs; MeasurementError if it is too large."""


class GpuJudge:
    """Measures; every answer stands on a check against float64."""

    modelled = False

    def __init__(self, measurer: Measurer) -> None:
        self._measurer = measurer

    @property
    def busy(self) -> float:
        """Seconds that the measuring process was at jobs."""
        return self._measurer.busy

    def begin(
        self,
        problem: Problem,
        config: Any,
        needs: Resources,
        stop_above_ms: float,
        extra: dict[str, Any],
        mark: Mark | None,
    ) -> Callable[[], Timing]:
        """Times on the GPU, after a check against float64."""
        return self._measurer.begin(problem, config, stop_above_ms, extra, mark)

    def begin_rank(
        self, problem: Problem, configs: list[Any], extra: dict[str, Any], mark: Mark | None
    ) -> Callable[[], list[Timing]]:
        """Times in interleaved rounds."""
        return self._measurer.begin_compare(problem, configs, extra, mark)

    def renew(self) -> None:
        """End the measuring process: the next call starts another."""
        self._measurer.renew()

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """The error against float64 at the full shape."""
        return self._measurer.prove(problem, config, extra)


class ModelJudge:
    """Estimates, from the resources of the compiled kernel."""

    modelled = True
    busy = 0.0

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._times: dict[Any, Timing] = {}

    def begin(
        self,
        problem: Problem,
        config: Any,
        needs: Resources,
        stop_above_ms: float,
        extra: dict[str, Any],
        mark: Mark | None,
    ) -> Callable[[], Timing]:
        """Milliseconds by the model, which has no noise."""
        timing = self._times[problem, config] = self._timing(predict(problem, config, self._arch, needs))
        return lambda: timing

    def begin_rank(
        self, problem: Problem, configs: list[Any], extra: dict[str, Any], mark: Mark | None
    ) -> Callable[[], list[Timing]]:
        """The same once more, and by the closed form alone where another's code was the same."""
        timings = [
            self._times.get((problem, config)) or self._timing(predict(problem, config, self._arch))
            for config in configs
        ]
        return lambda: timings

    @staticmethod
    def _timing(ms: float) -> Timing:
        return Timing(ms, low=ms, high=ms, spread=0.0, repeats=1)

    def renew(self) -> None:
        """There is no process."""

    def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
        """Nothing runs, so nothing is proved."""
        return None
