"""How long GPU work takes: events around graph replays, the L2 cache flushed, clocks warm, and how sure a median is."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 128 * 2**20  # as much as the largest L2 cache
CONFIDENCE = 0.95
FIRST, MOST = 3, 96  # calls of one measurement, at least and at most
MEASURE_MS = 60.0  # of GPU time for one measurement: compiling a candidate takes as long on sixteen cores
PRECISE = 0.004  # an interval so narrow, relative to the median, needs no more calls
STEADY = 0.01  # clocks are steady when two windows of work in a row take the same time but for this
SETTLED = 0.05  # an interval wider than that, relative to the median, tells of a disturbance
WINDOW = 40  # products in a window of warming up, some 10 ms
WARM_SECONDS = 2.0  # and no longer
COLD_SECONDS = 1.0  # a GPU that did nothing for so long has lowered its clocks


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one configuration: the median of `repeats`, the interval it lies in, and the error found before.

    `low` and `high` bound the median with 95 % confidence; `spread` is the distance between the quartiles; `error` is
    relative, against float64, NaN where it was not looked at.
    """

    ms: float
    low: float
    high: float
    spread: float
    repeats: int
    error: float = math.nan

    @property
    def figures(self) -> dict[str, float]:
        """What is written down beside the milliseconds."""
        found = {name: value for name, value in asdict(self).items() if name != "ms"}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    @classmethod
    def recalled(cls, ms: float, figures: Mapping[str, float]) -> Timing:
        """A timing that was written down; of one without figures nothing but the median is known."""
        low, high, spread = (figures.get(name, value) for name, value in (("low", ms), ("high", ms), ("spread", 0.0)))
        return cls(ms, low, high, spread, int(figures.get("repeats", 1)), figures.get("error", math.nan))


def timing_of(times: Sequence[float], error: float = math.nan) -> Timing:
    """What a series of times, in milliseconds, amounts to."""
    low, high = median_interval(times)
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return Timing(statistics.median(times), low, high, third - first, len(times), error)


def median_interval(times: Sequence[float]) -> tuple[float, float]:
    """The interval between two order statistics that holds the median with 95 % confidence; of few times, all.

    The number of times below the median is binomial, whatever their distribution (Conover, Practical Nonparametric
    Statistics, 3.2).
    """
    ordered = sorted(times)
    left_out = _left_out(len(ordered))
    return ordered[left_out], ordered[-1 - left_out]


@functools.cache
def _left_out(count: int) -> int:
    """How many times may be dropped at each end."""
    tails = itertools.accumulate(math.comb(count, i) for i in range(count // 2))
    rare = [tail for tail in tails if 2 * tail <= (1 - CONFIDENCE) * 2**count]
    return max(0, len(rare) - 1)


class Replay:
    """A call captured as a CUDA graph, a few times over, with the events that time it: nothing hangs on the host.

    `result` is what the call returned; its memory is written anew by every replay.
    """

    _anchor: Any = None  # a graph that is kept, so that the memory pool which all graphs share is kept

    def __init__(self, run: Callable[[], object]) -> None:
        run()  # compiles, and fills what is kept from call to call
        if Replay._anchor is None:
            Replay._anchor, _ = _captured(lambda: torch.zeros(1, device="cuda"), torch.cuda.graph_pool_handle())
        self._events = _events(FIRST, external=True)
        flush = flush_buffer()

        def timed() -> object:
            for begin, end in self._events:
                flush.zero_()
                begin.record()
                result = run()
                end.record()
            return result

        self._graph, self.result = _captured(timed, Replay._anchor.pool())

    @classmethod
    def release(cls) -> None:
        """Give back the memory that all graphs used, after the last of them is gone."""
        cls._anchor = None
        torch.cuda.empty_cache()

    def times(self) -> list[float]:
        """Milliseconds of each of the calls, the L2 cache flushed before it."""
        self._graph.replay()
        return _elapsed(self._events)


def _captured(run: Callable[[], object], pool: Any) -> tuple[torch.cuda.CUDAGraph, object]:
    """A call as a graph; not by torch.cuda.graph, which collects garbage first: that takes longer than all else."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):  # always one: memory that was freed on another is not used again
        graph.capture_begin(pool=pool)
        try:
            result = run()
        finally:
            graph.capture_end()
    return graph, result


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _events(count: int, **options: bool) -> list[tuple[Any, Any]]:
    new_event: Callable[..., Any] = torch.cuda.Event
    return [(new_event(enable_timing=True, **options), new_event(enable_timing=True, **options)) for _ in range(count)]


@functools.cache
def flush_buffer() -> Tensor:
    """What takes the place of all else in the L2 cache when it is written to."""
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


_last_use = -math.inf


def _elapsed(events: list[tuple[Any, Any]]) -> list[float]:
    global _last_use
    torch.cuda.synchronize()
    _last_use = time.monotonic()
    return [begin.elapsed_time(end) for begin, end in events]


def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call as a program makes it, with the host's share where the GPU waits for it."""
    events = _events(repeats)
    for begin, end in events:
        flush_buffer().zero_()
        begin.record()
        run()
        end.record()
    return _elapsed(events)


def race(sample: Callable[[], list[float]], stop_above_ms: float) -> list[float]:
    """Times of a call, as many as it takes: few where it is clearly slower than so much, or where they agree."""
    times = sample()
    while len(times) < MOST and sum(times) < MEASURE_MS:
        low, high = median_interval(times)
        if low > stop_above_ms or (len(times) >= 2 * FIRST and high - low < PRECISE * low):
            break
        times += sample()
    return times


def interleaved(samples: Sequence[Callable[[], list[float]]], *, rounds: int, seconds: float) -> list[list[float]]:
    """Times of several calls against each other: in rounds, each begun with another one, until one of the limits.

    They drift together, so that what is compared was measured under the same conditions. Where something disturbed a
    race, so that a median is not known well, it goes on for up to four times as long.
    """
    times: list[list[float]] = [[] for _ in samples]
    started = time.monotonic()
    for number in range(4 * rounds):
        for i in range(len(samples)):
            i = (i + number) % len(samples)
            times[i] += samples[i]()
        over = number + 1 >= rounds or time.monotonic() - started > seconds
        if over and number and (all(map(_is_settled, times)) or time.monotonic() - started > 4 * seconds):
            break
    return times


def _is_settled(times: list[float]) -> bool:
    low, high = median_interval(times)
    return high - low < SETTLED * low


def warm_up() -> float:
    """Work until the clocks are steady, if the GPU has idled; the seconds that this took."""
    global _last_use
    started = time.monotonic()
    if started - _last_use < COLD_SECONDS:
        return 0.0
    factors = torch.ones(2, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    before, now = math.inf, _window(factors)
    while abs(before - now) > STEADY * now and time.monotonic() - started < WARM_SECONDS:
        before, now = now, _window(factors)
    _last_use = time.monotonic()
    return _last_use - started


def _window(factors: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(WINDOW):
        torch.mm(*factors)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
