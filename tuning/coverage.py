"""Few configurations for many shapes: which to use at each measured point, and the intervals around it that they hold.

Everything here is a pure function of what was measured.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from generated.configuration_file import When
from generated.launch import padded

REACH = 2.0  # a rule holds from half to twice the measured B * H and T
WIDTHS, AMOUNTS = ("K", "V"), ("BH", "T")
AXES = (*WIDTHS, *AMOUNTS)

Box = dict[str, tuple[int, int]]
Group = tuple["Point", ...]
P = TypeVar("P", bound=Hashable)
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, order=True)
class Point:
    """What was measured: a dtype and shape, as rules name them."""

    dtype: str
    K: int
    V: int
    BH: int
    T: int


@dataclass(frozen=True)
class Region:
    """Points that share a configuration, in order, and the intervals of their common rule."""

    points: Group
    box: Box


# Which configuration


def assign(
    times: Mapping[P, Mapping[C, float]],
    default: Mapping[P, C],
    *,
    tolerance: float,
    in_use: Mapping[P, C] | None = None,
) -> dict[P, C]:
    """Choose a configuration for each point of one kernel, with few different ones in all.

    `times` are the milliseconds of whatever ran right at a point; a point without any gets none. The choice is within
    the tolerance of the point's fastest, and not slower than the point's default where that ran. It is a greedy set
    cover: again and again the configuration that is good enough at most points that have none yet, among equals the
    one that is nearest to their fastest. Then each point takes the fastest of those chosen. What is `in_use` at all
    points stays if it is good enough at each and no more different ones, so that tuning twice does not flip a file.
    """
    good = {point: found for point, own in times.items() if (found := _good(own, default.get(point), tolerance))}
    chosen = _cover(good)
    assigned = {point: min((c for c in chosen if c in own), key=own.__getitem__) for point, own in good.items()}
    kept = {point: config for point, config in (in_use or {}).items() if config in good.get(point, {})}
    stays = len(kept) == len(good) and len(set(kept.values())) <= len(set(assigned.values()))
    return kept if stays else assigned


def _good(own: Mapping[C, float], default: C | None, tolerance: float) -> dict[C, float]:
    """The configurations that may be used at a point, with their times as multiples of the fastest."""
    finite = {config: ms for config, ms in own.items() if math.isfinite(ms)}
    best = min(finite.values(), default=0.0)
    limit = min((1 + tolerance) * best, finite.get(default, math.inf) if default is not None else math.inf)
    return {config: ms / best if best else 1.0 for config, ms in finite.items() if ms <= limit}


def _cover(good: Mapping[P, Mapping[C, float]]) -> list[C]:
    left, chosen = dict(good), []
    while left:
        covered: dict[C, list[float]] = {}
        for own in left.values():
            for config, slowness in own.items():
                covered.setdefault(config, []).append(slowness)
        chosen.append(min(covered, key=lambda config: (-len(covered[config]), sum(covered[config]))))
        left = {point: own for point, own in left.items() if chosen[-1] not in own}
    return chosen


# Where it holds


def regions(uses: Mapping[Point, Hashable], boxes: Mapping[Point, Box] | None = None) -> list[Region]:
    """Share out the shapes around the points of one kernel, of which each is used as the mapping says.

    A point's own box is the head sizes that pad to the same tile, and half to twice its B * H and T. Points of one use
    share a region, the hull of their boxes, if they pad to the same tiles (what fits one tile may spill or not fit in
    another), their boxes leave no part of the hull to itself and no other point lies between them. So every shape of a
    region is in some point's own box. Where regions of different uses would overlap they are cut halfway between their
    points, on the axis where these are farthest apart; those of one use may overlap. `boxes`: of points, in place of
    their own, and within these.
    """
    known = {point: box(point) for point in uses} | dict(boxes or {})
    groups: list[Group] = [(point,) for point in sorted(uses)]
    while pair := _nearest_pair(groups, uses, known):
        groups = [group for group in groups if group not in pair] + [tuple(sorted(pair[0] + pair[1]))]
    groups.sort()
    found = [_hull(known[point] for point in group) for group in groups]
    for i, j in itertools.combinations(range(len(groups)), 2):
        one, other = groups[i][0], groups[j][0]
        if one.dtype == other.dtype and uses[one] != uses[other] and _meet(found[i], found[j]):
            found[i], found[j] = _cut(groups[i], groups[j], found[i], found[j])
    return [Region(group, own) for group, own in zip(groups, found, strict=True)]


def box(point: Point) -> Box:
    """As far as what was measured at a point is taken to hold."""
    widths = {axis: _padding_alike(getattr(point, axis)) for axis in WIDTHS}
    return widths | {axis: _around(getattr(point, axis)) for axis in AMOUNTS}


def overlap(one: When, other: When) -> bool:
    """Whether there is a shape that both cover."""
    return one.dtype == other.dtype and _meet(_box_of(one), _box_of(other))


def beyond(when: When, points: Iterable[Point]) -> Point | None:
    """A shape that the rule covers and no point's own box holds, if there is one."""
    found = _gap(_box_of(when), [box(point) for point in points])
    return None if found is None else Point(when.dtype, *found)


def _gap(whole: Box, parts: list[Box]) -> tuple[int, ...] | None:
    """The first place of a box that is in none of its parts; what begins there begins at an edge on every axis."""
    edges = [
        sorted({low, *(edge for part in parts for edge in (part[axis][0], part[axis][1] + 1) if low < edge <= high)})
        for axis, (low, high) in whole.items()
    ]
    return next((place for place in itertools.product(*edges) if not any(_holds(part, place) for part in parts)), None)


def _holds(own: Box, place: tuple[int, ...]) -> bool:
    return all(own[axis][0] <= at <= own[axis][1] for axis, at in zip(AXES, place, strict=True))


def _nearest_pair(
    groups: list[Group], uses: Mapping[Point, Hashable], boxes: Mapping[Point, Box]
) -> tuple[Group, Group] | None:
    """The two groups that may be one and would make the smallest."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(groups, 2)
        if uses[one[0]] == uses[other[0]] and _may_join(one, other, groups, boxes)
    ]
    return min(pairs, key=lambda pair: (_size(pair[0] + pair[1]), pair), default=None)


def _may_join(one: Group, other: Group, groups: list[Group], boxes: Mapping[Point, Box]) -> bool:
    own = [boxes[point] for point in one + other]
    alike = one[0].dtype == other[0].dtype and all(own[0][axis] == own[-1][axis] for axis in WIDTHS)
    return alike and _gap(_hull(own), own) is None and _alone(one + other, groups)


def _alone(points: Group, groups: list[Group]) -> bool:
    """Whether no other group reaches into the hull of the points, so that a cut can part them."""
    hull = _hull(map(_spot, points))
    others = [group for group in groups if group[0].dtype == points[0].dtype and group[0] not in points]
    return not any(_meet(hull, _hull(map(_spot, group))) for group in others)


def _cut(one: Group, other: Group, first: Box, second: Box) -> tuple[Box, Box]:
    """Both boxes, cut so that each keeps its points and they do not overlap."""
    hulls = [_hull(map(_spot, group)) for group in (one, other)]

    def between(axis: str) -> tuple[int, int]:
        (low, high), (other_low, other_high) = (hull[axis] for hull in hulls)
        return (high, other_low) if high < other_low else (other_high, low)

    axis = max(AXES, key=lambda name: between(name)[1] / between(name)[0])
    low, high = between(axis)
    middle = math.isqrt(low * high)
    below, above = (1, middle), (middle + 1, sys.maxsize)
    own, others = (below, above) if hulls[0][axis][1] == low else (above, below)
    return _within(first, axis, *own), _within(second, axis, *others)


def _within(own: Box, axis: str, low: int, high: int) -> Box:
    return own | {axis: (max(own[axis][0], low), min(own[axis][1], high))}


def _hull(boxes: Iterable[Box]) -> Box:
    every = list(boxes)
    return {axis: (min(b[axis][0] for b in every), max(b[axis][1] for b in every)) for axis in AXES}


def _meet(one: Box, other: Box) -> bool:
    return all(max(one[axis][0], other[axis][0]) <= min(one[axis][1], other[axis][1]) for axis in AXES)


def _size(points: Group) -> float:
    return math.fsum(math.log(high / low) for low, high in _hull(map(_spot, points)).values())


def _spot(point: Point) -> Box:
    return {axis: (getattr(point, axis), getattr(point, axis)) for axis in AXES}


def _box_of(when: When) -> Box:
    return {axis: getattr(when, axis) for axis in AXES}


def _padding_alike(size: int) -> tuple[int, int]:
    top = padded(size)
    return 1 if padded(1) == top else top // 2 + 1, top


def _around(size: int) -> tuple[int, int]:
    return max(1, math.ceil(size / REACH)), int(size * REACH)
