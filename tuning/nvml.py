"""Clocks, temperature, power and load of a GPU while it is measured on, through NVML; nothing where there is none."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pynvml

PERIOD_SECONDS = 0.2


@dataclass
class Log:
    """What was read every fifth of a second, by name: `clock_mhz`, `temperature_c`, `power_w` and `load_percent`."""

    readings: dict[str, list[float]] = field(default_factory=dict)
    throttled: set[str] = field(default_factory=set)

    def summary(self) -> dict[str, Any]:
        """Least, median and most of each, and what slowed the clocks down; empty where nothing was read."""
        ranges = {name: [min(x), statistics.median(x), max(x)] for name, x in self.readings.items() if x}
        return {**ranges, "throttled_by": sorted(self.throttled)} if ranges else {}


# What lowers clocks beside having nothing to do and what applications asked for.
REASONS = {
    "power": ("nvmlClocksEventReasonSwPowerCap", "nvmlClocksThrottleReasonHwPowerBrakeSlowdown"),
    "temperature": ("nvmlClocksEventReasonSwThermalSlowdown", "nvmlClocksThrottleReasonHwThermalSlowdown"),
}


@contextlib.contextmanager
def logging(uuid: str) -> Iterator[Log]:
    """Read in a thread, until the end, what NVML tells of the GPU with this UUID."""
    log, ended = Log(), threading.Event()
    handle = _handle(uuid)
    if handle is None:
        yield log
        return
    thread = threading.Thread(target=_read_on, args=(handle, log, ended), daemon=True)
    thread.start()
    try:
        yield log
    finally:
        ended.set()
        thread.join()
        pynvml.nvmlShutdown()


def _handle(uuid: str) -> Any:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:
        pynvml.nvmlShutdown()
        return None


def _read_on(handle: Any, log: Log, ended: threading.Event) -> None:
    while not ended.wait(PERIOD_SECONDS):
        for name, value in _read(handle):
            log.readings.setdefault(name, []).append(value)
        log.throttled |= _reasons(handle)


def _read(handle: Any) -> Iterator[tuple[str, float]]:
    """Those that this GPU tells."""
    readers: dict[str, Callable[[], Any]] = {
        "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "load_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    for name, read in readers.items():
        with contextlib.suppress(pynvml.NVMLError):
            yield name, float(read())


def _reasons(handle: Any) -> set[str]:
    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError:
        return set()
    return {name for name, flags in REASONS.items() if any(bits & getattr(pynvml, flag, 0) for flag in flags)}
