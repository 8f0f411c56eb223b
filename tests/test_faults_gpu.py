"""What a broken kernel does to a GPU, for real: the candidate alone is lost, and it is never launched again."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fakes import Pool, module_at

from generated.retention import fused_chunk
from tuning import measurement
from tuning.compilation import ARCHS
from tuning.journal import Journal
from tuning.judges import GpuJudge
from tuning.measurement import MeasurementError, Measurer
from tuning.problems import Problem
from tuning.search import Effort
from tuning.tuner import Tuner

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
def measurer(monkeypatch: pytest.MonkeyPatch, measures_alone: None) -> Iterator[Measurer]:
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


# Faults in a kernel's text, as in interpreted/test_proof.py, compiled for the GPU


@dataclass(frozen=True)
class Mutant(Problem):
    """A problem whose sweep is that of a file with another text of fused_chunk."""

    path: str = ""

    def run(self, inputs: tuple[torch.Tensor, ...], config: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        given: dict[str, Any] = dict.fromkeys(("initial_state", "final_state", "cu_seqlens", "chunk_size"))
        given |= {"adjoint": False, "reverse": False} | options
        given.pop("turned", None)
        return (mutant_module(self.path).fused_chunk_sweep(*inputs, self.K**-0.5, config=config, **given),)


@functools.cache
def mutant_module(path: str) -> Any:
    """The module in a file."""
    return module_at(Path(path), "generated.retention.mutant")


OUTPUT, MASK = "o + i_r * H * V + p_o", "mask=m_t[:, None] & m_v[None, :]"
UPDATE = "b_h = product(tl.trans(b_k), b_v, b_h, TRANSPOSED, PRECISION)"
ADDED = ("(b_o * scale)", f"(b_o * scale + tl.load({OUTPUT}, {MASK}, other=0.0).to(tl.float32))")
# What is wrong: what stands in the text and what instead, as often as needed, and what the proof says.
MUTANTS: dict[str, tuple[list[tuple[str, str]], str]] = {
    # Two programs share the rows of each state, and add to the output what their rows give: right, one after the other.
    "race": (
        [
            ("i_p = tl.program_id(0)", "i_p = tl.program_id(0) // 2"),
            ("m_k = o_k < K", "m_k = (o_k < K) & (o_k % 2 == tl.program_id(0) % 2)"),
            ADDED,
            ("        blocks(V, config.BV) * sequences * H,", "        2 * blocks(V, config.BV) * sequences * H,"),
            ("o = empty_output(q, v)", "o = torch.zeros_like(v)"),
        ],
        "wrong result|two runs",
    ),
    "sum added to what nobody cleared": ([ADDED], "wrong result"),
    "state summed in 16 bits": (
        [(UPDATE, f"{UPDATE}\n        b_h = b_h.to(b_q.dtype).to(tl.float32)")],
        "states: wrong result",
    ),
    "store before the output": (
        [(UPDATE, f"{UPDATE}\n        tl.store(o - 1, 0.0, mask=i_p == 0)")],
        "beside a tensor",
    ),
    "rows after the second never written": ([("bos = i_n * T", "bos = i_n % 2 * T")], "wrong result at the full shape"),
}


def mutant(folder: Path, edits: list[tuple[str, str]]) -> Mutant:
    """A problem with more rows than a draw has, run by what the edits make of fused_chunk."""
    whole = Path(fused_chunk.__file__).read_text(encoding="utf-8").partition("\nregister_kernel(")[0]
    before, kernel, text = whole.partition("def fused_chunk_kernel(")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "mutant.py"
    path.write_text(before + kernel + text, encoding="utf-8")
    return Mutant("fused_chunk", "bfloat16", 4, 256, 8, 32, 32, str(path))


def test_text_without_a_fault_is_proven(measurer: Measurer, tmp_path: Path) -> None:
    assert 0 < measurer.prove(mutant(tmp_path, []), SOUND, {}) < 1e-2


@pytest.mark.parametrize("fault", MUTANTS)
def test_proof_finds_on_the_gpu(measurer: Measurer, tmp_path: Path, fault: str) -> None:
    edits, said = MUTANTS[fault]
    with pytest.raises(MeasurementError, match=said):
        measurer.prove(mutant(tmp_path, edits), SOUND, {})
