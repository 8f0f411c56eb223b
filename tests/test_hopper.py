"""fused_chunk_hopper: what it runs and what it leaves to fused_chunk, what it needs, and on a Hopper its numbers."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import assert_matches, by_blocks, make_problem

from generated.configuration import kernel_registry
from generated.retention import auto
from generated.retention import fused_chunk_hopper as hopper
from generated.retention.fused_chunk_hopper import FusedChunkHopperConfig, fused_chunk_hopper_sweep
from tuning.compilation import ARCHS, compile_launch
from tuning.problems import HOPPER, Problem
from tuning.proof import draws
from tuning.workloads import builtin

SM90 = ARCHS["sm90"]
PROBLEM = Problem(HOPPER, "bfloat16", 8, 2048, 8, 256, 512)
PLAIN = dict.fromkeys(("initial_state", "final_state", "cu_seqlens", "chunk_size"))
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def inputs(T: int = 128, K: int = 256, V: int = 128, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return torch.empty(2, T, 3, K, dtype=dtype, device="meta"), torch.empty(2, T, 3, V, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, True),
        ({"V": 512, "dtype": torch.float16}, True),
        ({"T": 100}, False),
        ({"T": 96}, False),
        ({"K": 128}, False),
        ({"V": 192}, False),
        ({"V": 428}, False),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_it_runs_whole_chunks_of_its_own_sizes(changes: dict[str, Any], runs: bool) -> None:
    q, v = inputs(**changes)
    assert hopper.runs_here(q, v, None, None, None, None) is runs
    if not runs:
        with pytest.raises(ValueError, match="fused_chunk_retention"):
            fused_chunk_hopper_sweep(q, q, v, torch.empty(3), 1.0, reverse=False, adjoint=False, **PLAIN)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", PLAIN)
def test_it_runs_no_states_and_nothing_packed(given: str) -> None:
    q, v = inputs()
    something: Any = 64 if given == "chunk_size" else torch.empty(1, device="meta")
    assert not hopper.runs_here(q, v, **{**PLAIN, given: something})
    assert not hopper.runs_here(torch.empty(2, 128, 3, 256, dtype=q.dtype), torch.empty(2, 128, 3, 128), **PLAIN)


@pytest.mark.parametrize(
    ("T", "tuned", "form"),
    [(128, True, HOPPER), (128, False, "fused_chunk"), (100, True, "fused_chunk"), (8, True, "fused_recurrent")],
)
def test_auto_goes_back_to_fused_chunk_where_it_does_not_run_or_no_rule_holds(
    T: int, tuned: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    for name in auto.SWEEPS:
        monkeypatch.setitem(auto.SWEEPS, name, lambda *_, name=name, **__: used.append(name))
    monkeypatch.setattr(auto, "choose_config", lambda *_: auto.FormConfig(HOPPER))
    if tuned:
        monkeypatch.setattr(hopper, "choose_config", lambda *_: PROBLEM.default())
    q, v = inputs(T)
    auto.auto_sweep(q, q, v, torch.empty(3), 1.0, reverse=False, adjoint=False, **PLAIN)  # type: ignore[arg-type]
    assert used == [form]


def test_every_candidate_compiles_in_both_directions_without_spills_and_fits() -> None:
    candidates = PROBLEM.sift(SM90).candidates
    assert {PROBLEM.default(), FusedChunkHopperConfig(BT=32, num_stages=4)} <= set(candidates)
    largest = max(candidates, key=lambda config: (config.BT == 32, config.num_stages))
    meta = PROBLEM.inputs("meta")
    for config in (min(candidates, key=str), PROBLEM.default(), largest):
        estimate = PROBLEM.space.needs.estimate(PROBLEM.place(SM90), config)
        for options in PROBLEM.variants(config).values():
            scores, needs = compile_launch(functools.partial(PROBLEM.run, meta, config, **options), SM90)
            assert (needs.registers, needs.spills, needs.warps) == (hopper.AT_FIRST, 0, config.num_warps)
            assert needs.fits(SM90)
            assert 0 <= needs.shared - estimate.shared < 1024  # the barriers
            assert scores.spills == 0


def test_gluon_is_imported_when_the_kernel_first_runs() -> None:
    code = "import sys, generated; sys.exit('triton.experimental.gluon' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rules_know_the_kernel_by_its_text_and_that_of_the_scores() -> None:
    assert kernel_registry()["retention_fused_chunk_hopper"].source == hopper.kernel_hash()
    assert len(hopper.kernel_hash()) == 16


def test_it_is_proven_on_whole_chunks() -> None:
    found = draws(PROBLEM, PROBLEM.default())
    assert {draw.reverse for draw in found} == {False, True}
    assert all(length % hopper.LONGEST == 0 for draw in found for length in draw.lengths)
    assert not any(draw.states or draw.turned or draw.adjoint or len(draw.lengths) > 1 for draw in found)
    assert {w.name for w in builtin().values() if replace(PROBLEM, T=w.T, K=w.K, V=w.V).runs_whole} == {
        "retnet_1.3b",
        "wide_256",
        "retnet_7b_32k",
    }


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("BT", "stages"), [(64, 2), (32, 4), (16, 3)])
def test_outputs_on_a_gpu_are_the_oracles_and_the_same_bits_twice(BT: int, stages: int, dtype: torch.dtype) -> None:
    config = FusedChunkHopperConfig(BT, stages)
    problem = make_problem(2, 640, 5, 256, 256, dtype, device="cuda", states=False)
    rates = torch.log1p(-torch.exp2(-torch.arange(5, 10, dtype=torch.float64))).float().cuda()

    def sweep(*tensors: torch.Tensor, reverse: bool) -> torch.Tensor:
        return fused_chunk_hopper_sweep(
            *tensors,
            rates,
            0.0625,
            reverse=reverse,
            adjoint=False,
            config=config,
            **PLAIN,  # type: ignore[arg-type]
        )

    q, k, v, do = (x.detach() for x in (problem.q, problem.k, problem.v, problem.do))
    found = {
        "o": sweep(q, k, v, reverse=False),
        "dq": sweep(do, v, k, reverse=False),
        "dk": sweep(v, do, q, reverse=True),
        "dv": sweep(k, q, do, reverse=True),
    }
    assert_matches(found, problem, formula=by_blocks)
    assert torch.equal(found["o"], sweep(q, k, v, reverse=False))
