"""What may be chosen for each kernel: a class for each knob, a row of `SPACES` for each kernel.

To add a knob: a field of the configuration in the kernel's template (`optional_knob`, so that the rules that there are
stay valid), a class here, and its name in the kernel's row.

Combinations are built up knob by knob. Each knob gives its values at a problem after the knobs that come before it, so
that whatever comes out is valid: no combination is made in order to be refused. What a kernel would need is then
estimated in closed form, and what can't run well is sifted out before anything is compiled, with counts by filter.
Which kernels do a job, what is fused, is chosen among those that were tuned: `SWEEPS` and `GRADIENTS` at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

from generated.arguments import MOST_STEPS
from generated.known_bad import known_bad
from generated.launch import ALIGNMENT, FULL, blocks, padded
from generated.retention import fused_chunk_hopper as hopper
from generated.retention.chunk import WHOLE
from generated.retention.fused_chunk import WIDEST_PART, state_rows
from generated.retention.step import KERNELS as STEP_KERNELS
from generated.retention.step_buffered import KERNELS as BUFFERED_KERNELS
from generated.retention.step_buffered import pieces
from tuning.compilation import Arch, Resources

FLOAT = 4  # bytes of a number of the states, of which those in 16 bits are read in the same pieces
MAX_REGISTERS = 300  # by the estimates below, which are rough: a little over the 255 that a thread has
BASE_REGISTERS = 40  # of a thread, for addresses and loops
LONGEST = 1024  # of the other segments
SLACK = 2  # by which shared memory may be estimated too high where it is not known to the byte
ASYNCHRONOUS = {"sm90": 64, "sm100": 64}  # rows from which on a product reads shared memory while the program goes on


@dataclass(frozen=True)
class Place:
    """What a space depends on beside the kernel: the sweep's sizes, the bytes of an element, the architecture."""

    form: str
    T: int
    K: int
    V: int
    itemsize: int
    arch: Arch
    BH: int = 1

    @property
    def width(self) -> int:
        """K as a tile holds it."""
        return padded(self.K)


def knob_values(config: Any) -> dict[str, int]:
    """The configuration as a mapping from knob to value."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


# What a program needs


@dataclass(frozen=True)
class Needs:
    """Estimates: registers(K, config) a thread, K a power of two, and shared(place, config) elements a program."""

    registers: Callable[[int, Any], float]
    shared: Callable[[Place, Any], int]

    def estimate(self, place: Place, config: Any) -> Resources:
        """What the compiled kernel may be expected to need; what a limit on registers takes away is spilled."""
        wanted = int(min(255, BASE_REGISTERS + self.registers(place.width, config)))
        registers = min(wanted, getattr(config, "maxnreg", 0) or wanted)
        shared = place.itemsize * self.shared(place, config)
        return Resources(registers, 4 * (wanted - registers), shared, config.num_warps)


def _ahead(config: Any) -> int:
    """How many steps' loads lie in shared memory at once."""
    return int(max(1, config.num_stages - 1))


def _operands(place: Place, rows: int, config: Any) -> int:
    """The same of what a product takes from there: one more where it still reads when the next loads begin."""
    return int(config.num_stages) if rows >= ASYNCHRONOUS.get(place.arch.name, WHOLE) else _ahead(config)


# What Triton 3.6 and 3.7 allocate for 16-bit elements on sm90 where it is over half of what there is: by pointers to
# the byte, by descriptors but for the few bytes of their barriers. For others an estimate, which SLACK is for.


def _sweep_registers(K: int, c: Any) -> float:
    made = 0 if getattr(c, "scores", 0) else c.BT * c.BT
    if c.transposed:
        held = 1.5 * state_rows(K, c) * c.BV + 2 * c.BT * c.BV + 4 * made
    else:
        held = 1.5 * K * c.BV + c.BT * c.BV + made + (0 if c.BT >= 64 else K * c.BT)
    return float(held / (32 * c.num_warps))


def _sweep_shared(place: Place, c: Any) -> int:
    if c.transposed:  # the state stays in registers; all tiles are operands
        held = state_rows(place.width, c)
        rows = 2 * held + c.BV + (c.BT if getattr(c, "scores", 0) and c.num_stages > 1 else 0)
        sums = c.BT * c.BV if held < place.width else 0
        return int(c.BT * rows * c.num_stages + sums)
    rows = 2 * c.BT * place.width * _operands(place, c.BT, c)  # of q and k
    scores = c.BT * c.BT * _operands(place, c.BT, c) if getattr(c, "scores", 0) else 0
    return int(rows + scores + c.BT * c.BV * _ahead(c) + place.width * c.BV)


def _states_registers(K: int, c: Any) -> float:
    return float((1.5 * c.BK * c.BV + 0.5 * c.BT * (c.BK + c.BV)) / (32 * c.num_warps))


def _states_shared(place: Place, c: Any) -> int:
    return int(c.BT * (c.BK + c.BV) * _operands(place, c.BK, c))


def _parallel_registers(K: int, c: Any) -> float:
    return float((c.BT * c.BV + 2 * c.BT * c.BS + (0 if c.BT >= 64 else K * c.BT)) / (32 * c.num_warps))


def _parallel_shared(place: Place, c: Any) -> int:
    return int(c.BT * place.width + c.BS * (place.width + c.BV) * _operands(place, c.BT, c))


def _recurrent_registers(K: int, c: Any) -> float:
    return float((2 * K * c.BV + 2 * K) / (32 * c.num_warps))


def _buffered_registers(K: int, c: Any) -> float:
    BF, _ = pieces(K, c.BV, FLOAT)
    used = 3.5 * BF * (c.BV + MOST_STEPS) / (32 * c.num_warps)  # of one output, as compiled
    return float(min(used, 255 - BASE_REGISTERS))  # no piece is so large that it could not be tried


def _buffered_shared(place: Place, c: Any) -> int:
    BF, stages = pieces(place.K, c.BV, FLOAT)
    return int(BF * c.BV * stages * FLOAT // place.itemsize)


def _hopper_shared(place: Place, c: Any) -> int:
    columns = hopper.columns_at(place.K)
    slot = c.BT * (2 * padded(place.K) + columns + c.BT)
    sums = 2 * c.BT * columns if place.K > hopper.ROWS else 0
    weights = 2 * (2 * c.BT + (0 if c.scores else c.BT * c.BT))  # in float32, of tokens and of scores
    return int(c.num_stages * slot + 2 * c.BT * columns + sums + weights)  # outputs twice


SWEEP = Needs(_sweep_registers, _sweep_shared)
HOPPER = Needs(lambda K, c: hopper.AT_FIRST - BASE_REGISTERS, _hopper_shared)
STATES = Needs(_states_registers, _states_shared)
PARALLEL = Needs(_parallel_registers, _parallel_shared)
RECURRENT = Needs(_recurrent_registers, lambda place, c: 0)
BUFFERED = Needs(_buffered_registers, _buffered_shared)


# The knobs


@dataclass(frozen=True)
class Knob:
    """A field of a configuration; `in_the_code`: two launches whose compiled code is the same do not differ by it."""

    name: ClassVar[str]
    in_the_code: ClassVar[bool] = False

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """The values worth trying at a place, after the knobs before this one were `chosen` (its attributes)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Powers(Knob):
    """A knob whose values are the powers of two from `low` to `high`."""

    low: int
    high: int

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """All of them up to the knob's limit."""
        limit = min(self.high, self.limit(place, chosen))
        least = min(self.least(place), limit)  # what is smaller than the least still has a tile that fits it
        return [1 << bit for bit in range(least.bit_length() - 1, limit.bit_length())]

    def least(self, place: Place) -> int:
        """The least that makes sense at a place, unless the limit is less."""
        return self.low

    def limit(self, place: Place, chosen: Any) -> int:
        """The most that makes sense at a place, after what was chosen."""
        return self.high


def _roomy(low: int, place: Place) -> int:
    """As many rows of K as fit twice into shared memory, where those are fewer than `low`."""
    rows = place.arch.shared // (2 * place.width * place.itemsize)
    return min(low, 1 << (rows.bit_length() - 1))


class L(Powers):
    """Tokens a segment: the states at their starts are saved, so that all segments can run at once."""

    name = "L"

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """Those that cut the sequence, and one that does not: all that don't are the same launch."""
        return [*(length for length in super().values(place, chosen) if length < place.T), WHOLE]


class Segments(L):
    """The same for HOPPER, of which a multiprocessor holds one program."""

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """One that does not cut; where programs are fewer than two on each, those that make them one to four."""
        programs = place.BH * blocks(place.V, hopper.columns_at(place.K))
        few, most = FULL // 2, 2 * FULL
        lengths = super().values(place, chosen) if programs < FULL else [WHOLE]
        return [size for size in lengths if size == WHOLE or few <= programs * blocks(place.T, size) <= most]


class BT(Powers):
    """Tokens a chunk, a divisor of the segment."""

    name = "BT"

    def limit(self, place: Place, chosen: Any) -> int:
        """No more than the sequence, and than the segment where there are any."""
        return min(padded(place.T), getattr(chosen, "L", WHOLE))


class Queries(BT):
    """Queries a program, which holds their whole rows."""

    def least(self, place: Place) -> int:
        """So few that the keys of a step find room beside them."""
        return _roomy(self.low, place)


class BS(Powers):
    """Keys a step, a divisor of BT."""

    name = "BS"

    def limit(self, place: Place, chosen: Any) -> int:
        """No more than the queries."""
        return int(chosen.BT)

    def least(self, place: Place) -> int:
        """So few that they find room beside the queries."""
        return _roomy(self.low, place)


class BK(Powers):
    """Rows of the state a program."""

    name = "BK"

    def limit(self, place: Place, chosen: Any) -> int:
        """No more than there are."""
        return padded(place.K)


class BV(Powers):
    """Columns of the state, or of v, a program."""

    name = "BV"

    def limit(self, place: Place, chosen: Any) -> int:
        """No more than there are."""
        return padded(place.V)


class Warps(Powers):
    """Warps a program."""

    name = "num_warps"
    in_the_code = True


class TileWarps(Warps):
    """No more threads than a tile of a state has numbers: of two that hold one, one could read what the other wrote."""

    def limit(self, place: Place, chosen: Any) -> int:
        """One for each."""
        return padded(place.K) * int(chosen.BV) // 32


@dataclass(frozen=True)
class Transposed(Knob):
    """Whether the products have the state on their left.

    It then stays in registers, where an architecture can multiply from there what a group of four warps holds whole: 64
    columns. Elsewhere, and for float32, nothing is gained.
    """

    widest: int = WHOLE  # K of a kernel that can't take it in parts
    name = "transposed"
    in_the_code = True
    ARCHS = ("sm90",)

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """Not, and so where it may gain."""
        possible = place.arch.name in self.ARCHS and place.itemsize == 2 and place.width <= self.widest
        return (0, 1) if possible and 16 * chosen.num_warps <= chosen.BV else (0,)


class Scores(Knob):
    """Whether the chunks' scores are made by a launch before, or by the sweep."""

    name = "scores"
    FEWEST, MOST = 32, 64  # tokens a chunk: of those that the sweep multiplies itself, and of those that are stored

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """With the state transposed: of very few rows always by a launch, of many never."""
        if not chosen.transposed or chosen.BT > self.MOST:
            return (0,)
        return (0, 1) if chosen.BT >= self.FEWEST else (1,)


class HopperScores(Knob):
    """The same for HOPPER."""

    name = "scores"

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """By the sweep only where its groups can: of the longest chunks, and of whole rows of q and k."""
        return (0, 1) if chosen.BT == hopper.LONGEST and place.K <= hopper.ROWS else (1,)


class SaveStates(Knob):
    """Whether the outputs' sweep saves its states for dq's.

    That trades memory, which they take until the backward, for time, and no sweep alone can tell how much: a search
    leaves it at 0. A rule has 1 where somebody wrote it there, and until other tiles beat that rule's.
    """

    name = "save_states"
    in_the_code = True

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """Not."""
        return (0,)


@dataclass(frozen=True)
class Stages(Knob):
    """Steps whose loads are in flight at once; one more where the state leaves shared memory to them."""

    most: int
    name = "num_stages"
    in_the_code = True

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """From one, no load ahead, on."""
        return range(1, self.most + 1 + getattr(chosen, "transposed", 0))


@dataclass(frozen=True)
class Slots(Knob):
    """Chunks that lie in shared memory at once, one of which is being worked on."""

    most: int
    name = "num_stages"
    in_the_code = True

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """From two on: with one nothing is loaded ahead."""
        return range(2, self.most + 1)


@dataclass(frozen=True)
class RegisterLimit(Knob):
    """The most registers a thread may have (0: no limit): lets more programs share a multiprocessor, and may spill."""

    needs: Needs
    name = "maxnreg"
    in_the_code = True
    LIMITS = (168, 128)  # of 65,536 registers: three or four programs of 4 warps; of 8 warps the second lets in two
    LEAST_SHARE = 0.6  # of what is needed: with less, spills cost more than company gains

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """None, and those with which one more program fits than without, by the estimates.

        A state that lies in registers leaves nothing to save.
        """
        if getattr(chosen, "transposed", 0):
            return [0]
        free = self.needs.estimate(place, chosen)
        held, values = free.blocks_per_sm(place.arch), [0]
        for limit in self.LIMITS:
            limited = Resources(limit, 0, free.shared, free.warps).blocks_per_sm(place.arch)
            if limit >= self.LEAST_SHARE * free.registers and limited > held:
                held, values = limited, [*values, limit]
        return values


class Descriptors(Knob):
    """Whether tiles are read by tensor descriptors (the TMA unit's) or by pointers."""

    name = "descriptors"
    in_the_code = True

    def values(self, place: Place, chosen: Any) -> Iterable[int]:
        """Pointers, and from Hopper on descriptors where rows begin at multiples of 16 bytes."""
        aligned = all(width * place.itemsize % ALIGNMENT == 0 for width in (place.K, place.V))
        return (0, 1) if aligned and place.arch.target.arch >= 90 else (0,)


# The spaces


@dataclass(frozen=True)
class Sifted:
    """The candidates of one kernel at a place, and how many combinations each closed-form filter dropped."""

    candidates: list[Any]
    dropped: Counter[str]

    @property
    def enumerated(self) -> int:
        """How many combinations there were."""
        return len(self.candidates) + self.dropped.total()


@dataclass(frozen=True)
class Space:
    """A kernel's knobs in the order in which they are chosen, and an estimate of what a program needs."""

    knobs: tuple[Knob, ...]
    needs: Needs
    archs: tuple[str, ...] = ()  # the only ones that the kernel is written for, if there are such

    def is_for(self, arch: Arch) -> bool:
        """Whether the kernel is written for an architecture."""
        return not self.archs or arch.name in self.archs

    def combinations(self, place: Place) -> Iterator[dict[str, int]]:
        """Every valid combination of the knobs."""
        return _nested(self.knobs, place, {}) if self.is_for(place.arch) else iter(())

    def sift(self, config_type: type[Any], place: Place) -> Sifted:
        """The configurations worth compiling at a place."""
        kept, dropped = [], Counter[str]()
        for config in (config_type(**values) for values in self.combinations(place)):
            if reason := self._dropped_by(config, place):
                dropped[reason] += 1
            else:
                kept.append(config)
        return Sifted(kept, dropped)

    def _dropped_by(self, config: Any, place: Place) -> str | None:
        if known_bad(place.form, config, place.arch.name):
            return "known bad"
        if self.needs.registers(place.width, config) > MAX_REGISTERS:
            return "registers"
        slack = 1.0 if (place.itemsize, place.arch.name) == (2, "sm90") else SLACK
        if place.itemsize * self.needs.shared(place, config) > slack * place.arch.shared:
            return "shared memory"
        return None


def _nested(knobs: tuple[Knob, ...], place: Place, chosen: dict[str, int]) -> Iterator[dict[str, int]]:
    if not knobs:
        yield chosen
        return
    for value in knobs[0].values(place, SimpleNamespace(**chosen)):
        yield from _nested(knobs[1:], place, {**chosen, knobs[0].name: value})


TILES = (BT(16, 128), BV(16, 128), Warps(4, 8))
LAUNCH = (Stages(3), RegisterLimit(SWEEP), Descriptors())
SPACES = {
    "fused_chunk": Space((*TILES, Transposed(), Scores(), *LAUNCH), SWEEP),
    "fused_chunk_gradients": Space((*TILES, Transposed(WIDEST_PART), *LAUNCH), SWEEP),
    "chunk": Space((L(128, LONGEST), *TILES, Transposed(), Scores(), SaveStates(), *LAUNCH), SWEEP),
    "chunk_states": Space(
        (BT(32, 128), BK(32, 128), BV(16, 128), Warps(4, 8), Stages(3), RegisterLimit(STATES), Descriptors()), STATES
    ),
    "parallel": Space(
        (Queries(64, 128), BS(32, 128), BV(32, 256), Warps(4, 8), Stages(3), RegisterLimit(PARALLEL), Descriptors()),
        PARALLEL,
    ),
    "fused_recurrent": Space((BV(4, 64), Warps(1, 8)), RECURRENT),
    **dict.fromkeys(
        (kernel.removeprefix("retention_") for kernel in STEP_KERNELS.values()),
        Space((BV(8, 128), TileWarps(1, 8)), RECURRENT),
    ),
    **dict.fromkeys(
        (kernel.removeprefix("retention_") for kernel in BUFFERED_KERNELS.values()),
        Space((BV(8, 128), TileWarps(1, 8)), BUFFERED),
    ),
    "fused_chunk_hopper": Space(
        (BT(16, hopper.LONGEST), Slots(6), HopperScores(), Segments(256, WHOLE // 2)), HOPPER, archs=("sm90",)
    ),
}


def launched(config: Any) -> tuple[int, ...]:
    """What a launch depends on beside the compiled code: where both are equal, so is the time."""
    in_the_code = {knob.name for space in SPACES.values() for knob in space.knobs if knob.in_the_code}
    return tuple(value for name, value in knob_values(config).items() if name not in in_the_code)


# What is fused


@dataclass(frozen=True)
class Choice:
    """A knob between kernels: which of them do a job is chosen when each has been tuned.

    `values` are the ways, the first of them the default.
    """

    name: str
    values: tuple[str, ...]

    def choose(self, ms: Mapping[str, float], held: str | None, *, hold: float, noise: float) -> str:
        """The fastest way or the first of equals; but what is `held` now, or else the default, unless beaten by `hold`.

        Nor does it stay where it is slower than the default beyond the noise.
        """
        fastest = min(ms, key=lambda way: (ms[way], self.values.index(way)))
        holder = held if held is not None and held in ms else self.values[0]
        limit = min((1 + hold) * ms[fastest], (1 + noise) * ms.get(self.values[0], math.inf))
        return holder if holder in ms and ms[holder] <= limit else fastest


# A sweep in segments that run at once, one pass, token by token, or of all pairs.
SWEEPS = Choice("form", ("chunk", "fused_chunk", "fused_recurrent", "parallel"))
# Each gradient has a sweep, or all three share a launch.
GRADIENTS = Choice("form", ("sweeps", "fused_chunk"))
