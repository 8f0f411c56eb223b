"""What may be chosen for each kernel, and what is sorted out before anything is compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from tuning.compilation import Arch

MAX_REGISTERS = 300  # by the estimate below, which is rough: a little over the 255 that a thread has


@dataclass(frozen=True)
class Knob:
    """One field of a configuration and the values it may take."""

    name: str
    values: tuple[int, ...]


BT = Knob("BT", (16, 32, 64, 128))
BS = Knob("BS", (32, 64, 128))
BK = Knob("BK", (32, 64, 128))
BV = Knob("BV", (16, 32, 64, 128))
WIDE_BV = Knob("BV", (32, 64, 128, 256))
NARROW_BV = Knob("BV", (4, 8, 16, 32, 64))
SEGMENT = Knob("L", (128, 256, 512, 1024, 1 << 20))
WARPS = Knob("num_warps", (4, 8))
FEW_WARPS = Knob("num_warps", (1, 2, 4, 8))
STAGES = Knob("num_stages", (1, 2, 3))


@dataclass(frozen=True)
class Space:
    """A kernel's knobs, the constraints between them, and an estimate of what a program needs.

    registers(K, config) estimates registers a thread; shared(K, itemsize, config) bytes of shared memory a program.
    """

    knobs: tuple[Knob, ...]
    allowed: Callable[[Any], bool]
    registers: Callable[[int, Any], float]
    shared: Callable[[int, int, Any], float]

    def configurations(self, config_type: type[Any]) -> Iterable[Any]:
        """Every combination of the knobs that the configuration's own rules and the space's constraint allow."""
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            with contextlib.suppress(ValueError):
                config = config_type(**dict(zip((knob.name for knob in self.knobs), values, strict=True)))
                if self.allowed(config):
                    yield config

    def candidates(self, config_type: type[Any], K: int, V: int, T: int, itemsize: int, arch: Arch) -> list[Any]:
        """The configurations worth compiling for one problem."""
        width = _power_of_two(K)
        return [
            config
            for config in self.configurations(config_type)
            if _fits_problem(config, K, V, T)
            and self.registers(width, config) <= MAX_REGISTERS
            and self.shared(width, itemsize, config) <= arch.shared
        ]


def knob_values(config: Any) -> dict[str, int]:
    """The configuration as a mapping from knob to value."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _fits_problem(config: Any, K: int, V: int, T: int) -> bool:
    """Leave out tiles that are mostly padding."""
    limits = {"BT": T, "BS": T, "BK": K, "BV": V, "L": 1 << 20}
    return all(getattr(config, name, 0) <= max(16, _power_of_two(size)) for name, size in limits.items())


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _sweep_registers(K: int, c: Any) -> float:
    return float((1.5 * K * c.BV + c.BT * c.BV + c.BT * c.BT + (0 if c.BT >= 64 else K * c.BT)) / (32 * c.num_warps))


def _sweep_shared(K: int, itemsize: int, c: Any) -> float:
    return float(itemsize * ((2 * c.BT * K + c.BT * c.BV) * max(1, c.num_stages - 1) + K * c.BV))


def _states_registers(K: int, c: Any) -> float:
    return float((1.5 * c.BK * c.BV + 0.5 * c.BT * (c.BK + c.BV)) / (32 * c.num_warps))


def _states_shared(K: int, itemsize: int, c: Any) -> float:
    return float(itemsize * c.BT * (c.BK + c.BV) * max(1, c.num_stages - 1))


def _parallel_registers(K: int, c: Any) -> float:
    return float((c.BT * c.BV + 2 * c.BT * c.BS + (0 if c.BT >= 64 else K * c.BT)) / (32 * c.num_warps))


def _parallel_shared(K: int, itemsize: int, c: Any) -> float:
    return float(itemsize * (c.BT * K + (c.BS * K + c.BS * c.BV) * max(1, c.num_stages - 1)))


def _recurrent_registers(K: int, c: Any) -> float:
    return float((2 * K * c.BV + 2 * K) / (32 * c.num_warps))


FUSED_CHUNK = Space((BT, BV, WARPS, STAGES), lambda c: True, _sweep_registers, _sweep_shared)
SPACES = {
    "fused_chunk": FUSED_CHUNK,
    "fused_chunk_gradients": FUSED_CHUNK,
    "chunk": Space((SEGMENT, BT, BV, WARPS, STAGES), lambda c: True, _sweep_registers, _sweep_shared),
    "chunk_states": Space((BT, BK, BV, WARPS, STAGES), lambda c: c.BT >= 32, _states_registers, _states_shared),
    "parallel": Space(
        (BT, BS, WIDE_BV, WARPS, STAGES),
        lambda c: c.BT >= 64,
        _parallel_registers,
        _parallel_shared,
    ),
    "fused_recurrent": Space((NARROW_BV, FEW_WARPS), lambda c: True, _recurrent_registers, lambda K, itemsize, c: 0),
}
