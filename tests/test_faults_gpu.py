"""What a broken kernel does to a GPU, for real: the candidate alone is lost, and it is never launched again."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fakes import Pool

from tuning import measurement
from tuning.compilation import ARCHS
from tuning.journal import Journal
from tuning.measurement import MeasurementError, Measurer
from tuning.problems import Problem
from tuning.tuner import Effort, GpuJudge, Tuner

pytestmark = pytest.mark.gpu

BYTES = 1 << 46  # beyond what any GPU maps
DEADLINE = 6.0


@triton.jit
def touch_kernel(x, offset):  # noqa: ANN001, ANN201 - Triton reads annotations, and gives types itself
    tl.store(x + offset, 1.0)


@triton.jit
def wait_kernel(x):  # noqa: ANN001, ANN201 - as above
    while tl.atomic_add(x, 0.0) == 0.0:
        pass


class Planted(Problem):
    """A problem of which some tiles are broken: BT=32 writes astray, BT=64 never ends, BT=128 takes too much memory."""

    def run(self, inputs: tuple[torch.Tensor, ...], config: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        if config.BT == 32:
            touch_kernel[(1,)](torch.zeros(1, device="cuda"), BYTES // 4)
        elif config.BT == 64:
            wait_kernel[(1,)](torch.zeros(1, device="cuda"))
        elif config.BT == 128:
            torch.empty(1 << 42, device="cuda")
        return super().run(inputs, config, **options)


PLANTED = Planted("fused_chunk", "bfloat16", 1, 256, 2, 32, 32)
SOUND = replace(PLANTED.default(), BT=16)
BROKEN = {32: "illegal memory access", 64: "hangs", 128: "OutOfMemoryError"}


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurer]:
    with contextlib.closing(Measurer()) as made:
        made.measure(PLANTED, SOUND, math.inf, {})  # the first compiles
        monkeypatch.setitem(measurement.DEADLINES, "measure", DEADLINE)
        yield made


@pytest.mark.parametrize(("BT", "reason"), BROKEN.items())
def test_broken_candidate_is_an_error_and_the_next_is_measured(measurer: Measurer, BT: int, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(MeasurementError, match=reason):
        measurer.measure(PLANTED, replace(SOUND, BT=BT), math.inf, {})
    assert time.monotonic() - started < DEADLINE + 20
    timing = measurer.measure(PLANTED, SOUND, math.inf, {})
    assert 0 < timing.low <= timing.ms <= timing.high
    assert timing.error < 1e-2


class Launches(GpuJudge):
    """Counts what is launched."""

    def __init__(self, measurer: Measurer) -> None:
        super().__init__(measurer)
        self.tried: list[Any] = []

    def begin(self, problem: Problem, config: Any, *rest: Any) -> Any:
        self.tried.append(config)
        return super().begin(problem, config, *rest)


def test_what_broke_the_gpu_once_is_never_launched_again(measurer: Measurer, tmp_path: Path) -> None:
    def tune() -> tuple[Tuner, list[Any]]:
        judge = Launches(measurer)
        journal = Journal(tmp_path / "a.journal", {"gpu": "this machine"}, lambda message: None)
        pool: Any = Pool()
        arch = ARCHS[measurer.gpu.arch]
        effort = Effort(first=6, rounds=0, per_round=0, finalists=3)
        incumbents = [replace(SOUND, BT=BT) for BT in (32, 64, 16)]
        tuner = Tuner(judge, pool, arch, effort, math.inf, lambda problem: incumbents, lambda *progress: None, journal)
        tuner.run([PLANTED])
        tuner.conclude()
        return tuner, judge.tried

    first, tried = tune()
    assert {config.BT for config in tried} >= {16, 32, 64}
    assert any("illegal memory access" in line for line in first.funnel.rejected)
    assert any("hangs" in line for line in first.funnel.rejected)
    assert first.winners[PLANTED].config.BT == 16
    assert first.winners[PLANTED].error < 1e-2
    again, tried = tune()
    assert {config.BT for config in tried} <= {128}  # to be out of memory is not the candidate's fault
    assert again.winners[PLANTED].config.BT == 16
