"""How times are taken and judged: intervals, races that end early, rounds that rotate, and the log of clocks."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import ALL, PROBLEM, Judge, candidates, landscape, timing, tune

from generated.configuration_file import parse_file
from tuning import nvml, rules
from tuning.problems import Problem
from tuning.timing import FIRST, MEASURE_MS, MOST, Timing, interleaved, median_interval, race, timing_of
from tuning.winners import Found, beats, both

# Intervals


@pytest.mark.parametrize("count", [6, 9, 12, 24])
def test_interval_holds_the_median_of_skewed_times_in_at_least_19_of_20_series(count: int) -> None:
    random.seed(count)
    median = math.log(2.0)  # of an exponential distribution
    held = [low <= median <= high for low, high in (_series(count) for _ in range(2000))]
    assert statistics.mean(held) >= 0.94


def _series(count: int) -> tuple[float, float]:
    return median_interval([random.expovariate(1.0) for _ in range(count)])


def test_interval_narrows_with_more_times() -> None:
    random.seed(0)
    times = [random.gauss(1.0, 0.1) for _ in range(100)]
    widths = [high - low for low, high in (median_interval(times[:count]) for count in (6, 25, 100))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("times", [[2.0], [3.0, 1.0], [3.0, 1.0, 2.0]])
def test_interval_of_few_times_is_all_of_them(times: list[float]) -> None:
    assert median_interval(times) == (min(times), max(times))
    found = timing_of(times)
    assert (found.ms, found.repeats) == (statistics.median(times), len(times))


def test_timing_that_is_written_down_is_recalled() -> None:
    found = timing_of([1.0, 2.0, 4.0], error=0.001)
    assert Timing.recalled(found.ms, found.figures) == found
    assert Timing.recalled(2.0, {}).low == Timing.recalled(2.0, {}).high == 2.0
    assert "error" not in timing_of([1.0]).figures  # not a number is no figure


# Races


def sampler(times: Iterator[float]) -> Callable[[], list[float]]:
    """Gives the times, as many at once as a replay does."""
    return lambda: list(itertools.islice(times, FIRST))


def test_clearly_slower_candidate_gets_the_fewest_calls() -> None:
    assert len(race(sampler(itertools.cycle([2.0, 2.1])), stop_above_ms=1.5)) == FIRST


def test_candidate_that_may_be_faster_is_timed_on() -> None:
    assert len(race(sampler(itertools.cycle([1.0, 2.0, 1.4])), stop_above_ms=1.5)) > 2 * FIRST


def test_times_that_agree_end_a_race() -> None:
    assert len(race(sampler(itertools.cycle([0.1])), stop_above_ms=math.inf)) == 2 * FIRST


@pytest.mark.parametrize(("ms", "most"), [(0.01, MOST), (10.0, MEASURE_MS / 10.0 + FIRST)])
def test_race_is_bounded_in_calls_and_in_time(ms: float, most: float) -> None:
    times = sampler(ms * factor for factor in itertools.cycle([1.0, 1.9, 1.3, 1.6]))
    assert FIRST <= len(race(times, stop_above_ms=math.inf)) <= most


def test_each_round_begins_with_another_and_all_are_timed_as_often() -> None:
    order: list[str] = []

    def named(name: str) -> Callable[[], list[float]]:
        return lambda: [order.append(name) or 1.0] * FIRST

    times = interleaved([named(name) for name in "abc"], rounds=3, seconds=math.inf)
    assert [len(series) for series in times] == [3 * FIRST] * 3
    assert order == list("abcbcacab")


def test_race_that_was_disturbed_goes_on_until_its_medians_are_known() -> None:
    calm, disturbed = (itertools.chain(start, itertools.cycle([1.0])) for start in ([], [1.0, 2.0] * 12))
    few, many = (len(interleaved([sampler(times)], rounds=8, seconds=math.inf)[0]) for times in (calm, disturbed))
    assert few == 8 * FIRST
    assert 8 * FIRST < many < 32 * FIRST
    endless = sampler(itertools.cycle([1.0, 2.0]))
    assert len(interleaved([endless], rounds=8, seconds=math.inf)[0]) == 32 * FIRST


# Who wins


def test_challenger_beats_what_is_in_use_only_beyond_the_noise() -> None:
    holder = Timing(1.0, 0.99, 1.01, 0.01, 9)
    assert beats(Timing(0.97, 0.965, 0.98, 0.01, 9), holder)
    assert not beats(Timing(0.995, 0.994, 0.996, 0.001, 9), Timing(1.0, 0.999, 1.001, 0.001, 9))  # by too little
    assert not beats(Timing(0.97, 0.93, 1.0, 0.05, 9), holder)  # the intervals overlap


def test_two_races_count_only_where_they_agree() -> None:
    fast, slow = Timing(0.9, 0.89, 0.91, 0.01, 9), Timing(1.1, 1.09, 1.11, 0.01, 9)
    holder = Timing(1.0, 0.99, 1.01, 0.01, 9)
    assert beats(both(fast, fast), both(holder, holder))
    assert not beats(both(fast, slow), both(holder, holder))
    assert both(fast, slow).ms == pytest.approx(1.0)


def test_an_incumbent_that_the_default_beats_is_given_up_though_the_intervals_meet() -> None:
    class Noisy(Judge):
        """Every interval meets every other."""

        def rank(self, problem: Any, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            return [replace(timing(self.ms(config)), low=0.5, high=2.0) for config in configs]

    incumbent = next(c for c in candidates() if c != PROBLEM.default())
    judge = Noisy(lambda config: 1.0 if config == PROBLEM.default() else 1.04)
    (winner,) = tune(judge, incumbents=lambda problem: [incumbent]).winners.values()
    assert (winner.config, winner.ms, winner.default_ms, winner.best_ms) == (PROBLEM.default(), 1.0, 1.0, 1.0)


def test_what_lost_in_a_fresh_process_does_not_replace_the_incumbent() -> None:
    class Lucky(Judge):
        """Times one candidate as much faster, but only in the first process."""

        def rank(self, problem: Any, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            return [timing(self.ms(c) * (0.5 if c.BT == 64 and not self.renewed else 1.0)) for c in configs]

    judge = Lucky(lambda config: 1.0 + (config.BT == 64) * 0.1)
    incumbent = next(c for c in candidates() if c.BT == 32)
    tuner = tune(judge, incumbents=lambda problem: [incumbent])
    assert judge.renewed == 1
    assert tuner.funnel.confirmed > 1
    (winner,) = tuner.winners.values()
    assert winner.config == incumbent


def test_rules_that_change_are_counted_against_those_that_were_in_use() -> None:
    fast, slow = candidates()[:2]
    judge = Judge(lambda config: {fast: 1.0, slow: 2.0}.get(config, 3.0))
    first = tune(judge, incumbents=lambda problem: [slow]).funnel
    assert (first.compared, first.flipped) == (1, 1)
    second = tune(judge, incumbents=lambda problem: [fast]).funnel
    assert (second.compared, second.flipped) == (1, 0)
    assert tune(judge).funnel.compared == 0


def test_shapes_share_a_configuration_that_is_nearly_the_fastest_of_each(tmp_path: Path) -> None:
    shared, *own = candidates()[:3]
    problems = [replace(PROBLEM, T=T) for T in (1024, 2048)]
    fastest = dict(zip(problems, own, strict=True))

    class Shaped(Judge):
        """Each shape has a fastest of its own; one configuration is 1 % behind it at both."""

        def rank(self, problem: Any, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            return [timing(1.0 if c == fastest[problem] else 1.01 if c == shared else 2.0) for c in configs]

        def time(self, problem: Any, config: Any, *rest: Any) -> Timing:
            return self.rank(problem, [config], {})[0]

    winners = tune(Shaped(), problems=problems).winners
    assert [winner.config for winner in winners.values()] == [shared, shared]
    assert {winner.best_ms for winner in winners.values()} == {1.0}
    entries = [rules.entry_of(winner) for winner in winners.values()]
    rules.update(tmp_path / "a.yaml", entries, {"name": "Fake GPU", "arch": "sm90", "sms": 132, "memory_gb": 80}, None)
    (rule,) = parse_file(tmp_path / "a.yaml").kernels[PROBLEM.kernel].rules
    assert rule.when.T == (512, 4096)


def test_what_was_not_raced_does_not_win_by_that() -> None:
    configs = candidates()[:4]
    found = Found(None, configs[3], {configs[3]})  # type: ignore[arg-type]
    found.timings = {config: timing(ms) for config, ms in zip(configs, (1.0, 1.1, 1.2, 1.3), strict=True)}
    raced = [configs[0], configs[1], configs[3]]
    found.take(raced, [timing(1.25), timing(1.15), timing(1.3)], first=True)
    assert found.contenders(1)[0] == configs[1]


def test_shapes_share_nothing_that_was_in_no_race() -> None:
    """One lucky measurement at both shapes, of what is slower than what won at each."""
    others = [config for config in candidates() if config != PROBLEM.default()]
    lucky, *winners = others[8], others[0], others[4]
    shapes = dict(zip((PROBLEM, replace(PROBLEM, T=2048)), winners, strict=True))

    class Lucky(Judge):
        def truth(self, problem: Problem, config: Any) -> float:
            return {lucky: 1.08, shapes[problem]: 1.0}.get(config, 1.5)

        def time(self, problem: Problem, config: Any, *given: Any) -> Timing:
            return timing(1.006 if config == lucky else self.truth(problem, config))

        def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            return [timing(self.truth(problem, config)) for config in configs]

    tuner = tune(Lucky(), problems=list(shapes))
    assert {problem: winner.config for problem, winner in tuner.winners.items()} == shapes


def test_what_other_shapes_use_is_raced_where_it_seems_as_fast() -> None:
    first = next(config for config in candidates() if config != PROBLEM.default())
    other = replace(PROBLEM, T=2048)
    fast = candidates()[4:8]  # at the other shape, where three and the default are in a race
    raced: list[tuple[Problem, list[Any]]] = []

    class Watched(Judge):
        def time(self, problem: Problem, config: Any, *given: Any) -> Timing:
            ms = {first: 1.0} if problem == PROBLEM else {first: 1.009, **dict.fromkeys(fast, 1.004)}
            return timing(ms.get(config, 2.0))

        def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            raced.append((problem, configs))
            return [self.time(problem, config) for config in configs]

    tuner = tune(Watched(), problems=[PROBLEM, other], effort=replace(ALL, finalists=3))
    assert [first in configs for problem, configs in raced if problem == other] == [False, True]
    assert {winner.config for winner in tuner.winners.values()} == {first}


def test_phases_are_timed_and_the_idle_share_is_told() -> None:
    class Slow(Judge):
        def time(self, *arguments: Any) -> Timing:
            time.sleep(0.005)
            self.busy += 0.005
            return super().time(*arguments)

    funnel = tune(Slow(landscape)).funnel
    assert list(funnel.seconds) == ["compile", "race", "search", "confirm", "prove"]
    assert funnel.seconds["search"] >= funnel.busy["search"] > 0.1
    assert funnel.idle_share("search") == 1 - funnel.busy["search"] / funnel.seconds["search"]
    seconds, busy = (sum(of[phase] for phase in ("search", "confirm", "prove")) for of in (funnel.seconds, funnel.busy))
    assert 0 <= funnel.idle_share() == 1 - busy / seconds < 1


# Clocks


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> SimpleNamespace:
    """A driver's library that knows one GPU."""

    class NVMLError(Exception):
        pass

    def by_uuid(name: str) -> str:
        if name != "GPU-1234":
            raise NVMLError
        return name

    def refuse(handle: str) -> int:
        raise NVMLError

    known = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetClockInfo": lambda handle, which: 1980,
        "nvmlDeviceGetTemperature": lambda handle, which: 55,
        "nvmlDeviceGetPowerUsage": lambda handle: 350_000,
        "nvmlDeviceGetUtilizationRates": refuse,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 4,
        "nvmlClocksEventReasonSwPowerCap": 4,
    }
    library = SimpleNamespace(**{**known, **functions})
    monkeypatch.setattr(nvml, "pynvml", library)
    monkeypatch.setattr(nvml, "PERIOD_SECONDS", 0.01)
    return library


def test_clocks_temperature_and_power_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch)
    with nvml.logging("1234") as log:
        time.sleep(0.1)
    summary = log.summary()
    assert summary["clock_mhz"] == [1980.0, 1980.0, 1980.0]
    assert summary["power_w"] == [350.0, 350.0, 350.0]
    assert summary["throttled_by"] == ["power"]
    assert "load_percent" not in summary  # this GPU does not tell it


@pytest.mark.parametrize("uuid", ["", "5678"])
def test_nothing_is_logged_of_a_gpu_that_is_not_known(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    fake_nvml(monkeypatch)
    with nvml.logging(uuid) as log:
        time.sleep(0.03)
    assert log.summary() == {}


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise library.NVMLError

    library = fake_nvml(monkeypatch, nvmlInit=missing)
    with nvml.logging("1234") as log:
        pass
    assert log.summary() == {}
