"""Configurations that are never launched: known_bad.yaml, and what it says of one."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

Interval = tuple[float, float]


@dataclass(frozen=True)
class KnownBad:
    """An entry: what it is about, and what is known."""

    forms: tuple[str, ...]
    archs: tuple[str, ...]
    triton: tuple[tuple[int, ...], tuple[int, ...] | None]
    knobs: tuple[tuple[str, Interval], ...]
    evidence: str

    def covers(self, form: str, config: Any, arch: str, triton: str) -> bool:
        """Whether this is about a configuration of a form, compiled for an architecture by a version of Triton."""
        first, end = self.triton
        found = _numbers(triton)
        return (
            form in self.forms
            and arch in self.archs
            and first <= found
            and (end is None or found < end)
            and all(low <= getattr(config, name, low - 1) <= high for name, (low, high) in self.knobs)
        )


def known_bad(form: str, config: Any, arch: str, triton: str | None = None) -> str | None:
    """The evidence against a configuration, or None; by default for the Triton that is installed."""
    triton = triton or _installed()
    return next((entry.evidence for entry in entries() if entry.covers(form, config, arch, triton)), None)


@functools.cache
def _installed() -> str:
    return version("triton")


@functools.cache
def entries() -> tuple[KnownBad, ...]:
    """The list."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return tuple(_entry(**fields) for fields in yaml.safe_load(text))


def _entry(
    forms: list[str], archs: list[str], triton: dict[str, str | None], knobs: dict[str, list[int | None]], evidence: str
) -> KnownBad:
    first, end = triton["from"], triton["before"]
    limits = tuple((name, _interval(*bounds)) for name, bounds in knobs.items())
    versions = (_numbers(first or "0"), None if end is None else _numbers(end))
    return KnownBad(tuple(forms), tuple(archs), versions, limits, evidence)


def _interval(low: int | None, high: int | None) -> Interval:
    return (0 if low is None else low, float("inf") if high is None else high)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
