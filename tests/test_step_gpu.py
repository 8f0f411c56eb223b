"""The step in place on a GPU, against the float64 oracle, and in CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import errors, make_problem, retnet_rates, solve
from serving import assert_served_as_alone
from steps import (
    assert_grouped_steps_match,
    assert_independent,
    assert_rounded_once,
    assert_steps_match,
    assert_unbiased,
    in_pieces,
    spacing,
    write_rules,
)
from torch import Tensor

from generated import configuration, retention_step
from generated.retention import step, step_kernel
from tuning.compilation import ARCHS
from tuning.problems import STEPS, Problem
from tuning.proof import prove, prove_whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning"),  # this GPU need not be tuned
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WIDTHS = [(8, 256, 512), (64, 128, 128), (3, 1, 1), (2, 20, 33), (4, 80, 80), (10, 256, 428), (2, 512, 512)]  # H, K, V


def serving(B: int = 3, T: int = 2, H: int = 4, K: int = 64, V: int = 64, slots: int = 6) -> dict[str, Tensor]:
    problem = make_problem(B, T, H, K, V, torch.bfloat16, device="cuda")
    pool = torch.randn(slots, H, K, V, device="cuda")
    indices = torch.arange(B, device="cuda") * 2 % (slots - 1)
    return {"q": problem.q, "k": problem.k, "v": problem.v, "state": pool, "state_indices": indices}


def copy(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in given.items()}


WRITTEN = ("state", "states_out", "out")


def everything() -> dict[str, Tensor]:
    """A call with all arguments that there are."""
    given = serving()
    given["state"] = given["state"].bfloat16()
    kept = torch.zeros(3, 2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    options = {"out": torch.zeros_like(given["v"]), "states_out": kept, "seed": torch.tensor([7], device="cuda")}
    return {**given, **options, "g_gamma": -torch.arange(4, device="cuda") / 8}


def fresh(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, and copies of what is written."""
    return given | {name: given[name].clone() for name in WRITTEN if name in given}


def make_known(given: dict[str, Tensor]) -> None:
    """Call twice, and fail unless what calls of this kind come to is known then, and of no other."""
    configuration.clear_caches()
    for _ in range(2):
        retention_step(**fresh(given))
    ((known,),) = step.KNOWN.kinds.values()
    assert known.launch is not None


@all_dtypes
@pytest.mark.parametrize("way", ["registers", "pieces"])
@pytest.mark.parametrize("T", [2, 3, 5, 16])
@pytest.mark.parametrize(("H", "K", "V"), WIDTHS)
def test_steps_of_several_tokens_match_the_oracle(H: int, K: int, V: int, T: int, way: str, dtype: torch.dtype) -> None:
    problem = make_problem(5, 3 * T, H, K, V, dtype, device="cuda")
    with in_pieces(way):
        assert_steps_match(retention_step, problem, lengths=[T] * 3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_states_of_16_bits_that_go_by_in_pieces_are_stored_as_those_in_registers(half: torch.dtype) -> None:
    """But for the order of sums: within a unit, and by the same random bits."""
    problem = make_problem(40, 6, 8, 64, 96, torch.bfloat16, device="cuda")
    for seed in (None, 5):
        states = [problem.h0.to(half) for _ in range(2)]
        for way, state in zip(("registers", "pieces"), states, strict=True):
            with in_pieces(way):
                kept = state.new_empty(40, 6, 8, 64, 96) if way == "registers" else None
                retention_step(problem.q, problem.k, problem.v, state, seed=seed, states_out=kept)
        one, two = (state.double() for state in states)
        assert ((one - two).abs() <= spacing(one, half) + 1e-6 * one.abs().max()).all()
        assert (one != two).double().mean() < 1e-2


@all_dtypes
@pytest.mark.parametrize("T", [1, 3, 16])
@pytest.mark.parametrize(("H", "K", "V"), WIDTHS)
@pytest.mark.parametrize("B", [1, 5])
def test_steps_match_the_oracle(B: int, H: int, K: int, V: int, T: int, dtype: torch.dtype) -> None:
    problem = make_problem(B, 3 * T, H, K, V, dtype, device="cuda")
    assert_steps_match(retention_step, problem, lengths=[T] * 3)
    assert_steps_match(retention_step, problem, lengths=[T] * 3, states_out=problem.h0.new_empty(B, T, H, K, V))


@all_dtypes
@pytest.mark.parametrize("way", ["registers", "pieces"])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize(
    ("HQ", "H", "K", "V"), [(64, 8, 256, 512), (8, 1, 128, 128), (6, 2, 20, 33), (64, 1, 64, 64), (65, 1, 64, 80)]
)
def test_query_heads_share_the_state_of_their_group(
    HQ: int, H: int, K: int, V: int, T: int, way: str, dtype: torch.dtype
) -> None:
    problem = make_problem(3, T, HQ, K, V, dtype, device="cuda")
    with in_pieces(way):
        assert_grouped_steps_match(retention_step, problem, H)


@all_dtypes
def test_decays_are_exact_over_thousands_of_tokens(dtype: torch.dtype) -> None:
    assert_steps_match(retention_step, make_problem(1, 4800, 8, 16, 16, dtype, device="cuda"), lengths=[16] * 300)


def test_a_million_steps_stay_as_exact_as_one() -> None:
    """A thousand tokens, a step each, a thousand times over: of a round float64 needs the decay and the sum alone."""
    problem = make_problem(1, 1000, 8, 32, 32, device="cuda")
    tokens = [x.split(1, 1) for x in (problem.q, problem.k, problem.v)]
    state, graph = problem.h0.clone(), torch.cuda.CUDAGraph()
    retention_step(*(x[0] for x in tokens), state.clone())
    with torch.cuda.graph(graph):
        for token in zip(*tokens, strict=True):
            retention_step(*token, state)
    added = solve(replace(problem, h0=torch.zeros_like(problem.h0)))["final_state"]
    decay = (1000 * retnet_rates(8)).exp().to(added)[:, None, None]
    expected = problem.h0.to(added)
    for _ in range(1000):
        graph.replay()
        expected = decay * expected + added
    assert errors(state, expected)[0] < 1e-5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("V", [6, 40])  # columns of one program, and of more
def test_ten_thousand_sequences_in_a_pool_are_as_if_each_were_alone(V: int) -> None:
    assert_served_as_alone(retention_step, count=10_000, rows=64, device="cuda", V=V)


@pytest.mark.parametrize("offset", [0, 1])
def test_indices_and_seeds_may_lie_anywhere(offset: int) -> None:
    """Not a multiple of 16 bytes: no other kernel is compiled for it."""
    given = serving()
    given["state"] = given["state"].bfloat16()
    expected = copy(given)
    o = retention_step(**expected, seed=7)
    before = kernels_compiled()
    memory, seeds = torch.empty(8, dtype=torch.int64, device="cuda"), torch.full((3,), 7, device="cuda")
    indices = memory[offset : offset + 3].copy_(given["state_indices"])
    assert torch.equal(retention_step(**given | {"state_indices": indices}, seed=seeds[offset : offset + 1]), o)
    assert torch.equal(given["state"], expected["state"])
    assert kernels_compiled() == before


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_seed_that_a_graph_would_keep_is_refused() -> None:
    given = serving()
    given["state"] = given["state"].bfloat16()
    retention_step(**copy(given), seed=1)
    with pytest.raises(ValueError, match="a CUDA graph would keep"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        retention_step(**given, seed=1)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "K", "V"), WIDTHS)
def test_states_of_16_bits_are_rounded_once(H: int, K: int, V: int, half: torch.dtype) -> None:
    problem = make_problem(2, 3, H, K, V, torch.bfloat16, device="cuda")
    assert_rounded_once(retention_step, problem, half)
    assert_rounded_once(retention_step, problem, half, 1, seed=5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_stochastic_rounding_has_no_bias(half: torch.dtype) -> None:
    assert_unbiased(retention_step, half, device="cuda", seeds=400)
    assert_independent(retention_step, half, device="cuda")


def test_a_captured_step_reads_its_seed_anew() -> None:
    given = serving()
    given |= {"state": given["state"].bfloat16(), "seed": torch.tensor([0], device="cuda")}
    retention_step(**copy(given))
    eager, graph = copy(given), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        retention_step(**given)
    for seed in (0, 1, 2**40):
        given["seed"].fill_(seed)
        graph.replay()
        retention_step(**{**eager, "seed": seed})
        assert torch.equal(given["state"], eager["state"])


def test_the_gpu_does_what_the_cpu_does() -> None:
    given = serving()
    given["state_indices"][1] = -1
    states_out = torch.zeros(3, 2, 4, 64, 64)
    host = {**{name: x.cpu().clone() for name, x in given.items()}, "states_out": states_out}
    given["states_out"] = states_out.cuda()
    o, expected = retention_step(**given), retention_step(**host)
    assert errors(o.cpu(), expected.double())[0] < 1e-2
    for name in ("state", "states_out"):
        assert errors(given[name].cpu(), host[name].double())[0] < 1e-6
    assert torch.equal(given["state"][[1, 2, 3, 5]].cpu(), host["state"][[1, 2, 3, 5]])


@pytest.mark.parametrize("offset", [0, 1])
def test_a_state_may_lie_anywhere(offset: int) -> None:
    memory = torch.zeros(6, 3, 4, 64, 64, device="cuda").flatten()
    layers = torch.cat([memory, memory[:8]])[offset : offset + memory.numel()].view(6, 3, 4, 64, 64)
    given = serving()
    layers[:, 1] = given["state"]
    expected = retention_step(**copy(given))
    o = retention_step(**{**given, "state": layers[:, 1]})
    torch.testing.assert_close(o, expected, rtol=1e-2, atol=1e-2)  # other loads, and sums in another order
    assert layers[:, 0].count_nonzero() == layers[:, 2].count_nonzero() == 0


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_bits_each_time(half: torch.dtype) -> None:
    problem = make_problem(1, 4, 8, 256, 512, torch.bfloat16, device="cuda")
    seed = None if half == torch.float32 else 3
    found = []
    for _ in range(20):
        state = problem.h0.to(half, copy=True)
        found.append((retention_step(problem.q, problem.k, problem.v, state, seed=seed), state))
    assert all(torch.equal(o, found[0][0]) and torch.equal(state, found[0][1]) for o, state in found)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_captured_step_goes_on_with_other_slots(is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = serving()
    make_known(given)
    if not is_known:
        step.KNOWN.kinds.clear()
    eager = copy(given)
    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patch, torch.cuda.graph(graph):
        if is_known:
            patch.setattr(step, "OPERATOR", None)
        o = retention_step(**given)
    for slots in ([0, 2, 4], [5, -1, 1], [-1, -1, -1], [4, 3, 2]):
        for name in ("q", "k", "v"):
            given[name].normal_()
        given["state_indices"].copy_(torch.tensor(slots))
        eager |= copy({name: given[name] for name in ("q", "k", "v", "state_indices")})
        graph.replay()
        assert torch.equal(o, retention_step(**eager))
        assert torch.equal(given["state"], eager["state"])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the one that inductor makes to begin with
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_write_in_place(mode: str) -> None:
    given = serving()
    eager, address = copy(given), given["state"].data_ptr()
    compiled = torch.compile(retention_step, fullgraph=True, mode=mode)
    with torch.no_grad():
        for slots in ([0, 2, 4], [5, -1, 1], [4, 3, 2], [1, 2, 3]):
            torch.compiler.cudagraph_mark_step_begin()
            for one in (given, eager):
                one["state_indices"].copy_(torch.tensor(slots))
            assert torch.equal(compiled(**given), retention_step(**eager))
            assert torch.equal(given["state"], eager["state"])
    assert given["state"].data_ptr() == address


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_one_kernel_one_allocation_and_no_wait(fused: bool) -> None:
    given = serving()
    if fused:  # as one projection gives them
        given |= dict(zip("qkv", torch.cat([given[name] for name in "qkv"], -1).chunk(3, -1), strict=True))
    retention_step(**given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        retention_step(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    kernels = kernels_of(lambda: torch.ones(4, device="cuda"))
    if len(kernels) != 1:
        pytest.skip("the profiler sees no kernels here")
    assert kernels_of(lambda: retention_step(**given)) == ["step_kernel"]


@pytest.mark.usefixtures("measures_alone")
@pytest.mark.parametrize("case", ["plain", "out", "pool", "grouped"])
def test_a_step_takes_the_host_as_long_as_a_few_additions(case: str) -> None:
    """15 us, where an addition in place takes 5: hosts are not equally fast."""
    problem = make_problem(1, 1, 8, 256, 512, torch.bfloat16, device="cuda")
    given = {"q": problem.q, "k": problem.k, "v": problem.v, "state": problem.h0}
    if case == "out":
        given["out"] = torch.empty_like(problem.v)
    if case == "pool":
        given |= {"state": problem.h0.repeat(4, 1, 1, 1), "state_indices": torch.tensor([2], device="cuda")}
    if case == "grouped":
        given |= {"k": problem.k[:, :, :1], "v": problem.v[:, :, :1], "state": problem.h0[:, :1]}
    with torch.inference_mode():
        given = copy(given)
        x = torch.zeros(8, device="cuda")
        step_us, addition_us = (
            min(timeit.repeat(call, torch.cuda.synchronize, number=200, repeat=20)) / 200 * 1e6  # others may be at work
            for call in (lambda: retention_step(**given), lambda: x.add_(1))
        )
    assert step_us < max(15.0, 3.5 * addition_us)


@pytest.mark.parametrize("case", ["plain", "pool", "everything", "grouped", "fused"])
def test_the_second_call_of_a_kind_goes_straight_to_the_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = everything() if case == "everything" else serving()
    if case == "plain":
        del given["state_indices"]
        given["state"] = given["state"][:3]
    if case == "grouped":
        given |= {name: given[name][:, :, :1].clone() for name in "kv"} | {"state": given["state"][:, :1].clone()}
    if case == "fused":  # as one projection gives them
        given |= dict(zip("qkv", torch.cat([given[name] for name in "qkv"], -1).chunk(3, -1), strict=True))
    configuration.clear_caches()
    expected = fresh(given)
    o = retention_step(**expected)
    make_known(given)
    monkeypatch.setattr(step, "OPERATOR", None)
    before = {name: given[name]._version for name in WRITTEN if name in given}
    assert torch.equal(retention_step(**given), o)
    for name, version in before.items():
        assert torch.equal(given[name], expected[name])
        assert given[name]._version > version


@pytest.mark.parametrize("name", [*"qkv", *WRITTEN, "state_indices", "seed", "g_gamma"])
def test_inputs_of_a_known_kind_may_lie_anywhere(name: str) -> None:
    """At an address for which Triton would compile another kernel: what is written is not copied for it."""
    given = everything()
    configuration.clear_caches()
    expected = fresh(given)
    o = retention_step(**expected)
    make_known(given)
    before = kernels_compiled()
    memory = torch.empty(given[name].numel() + 1, dtype=given[name].dtype, device="cuda")
    given[name] = memory[1:].view_as(given[name]).copy_(given[name])
    assert errors(retention_step(**given), o.double())[0] < 1e-2  # another kernel may sum in another order
    assert all(torch.equal(given[written], expected[written]) for written in ("state", "states_out"))
    if name not in (*WRITTEN, "g_gamma"):
        assert kernels_compiled() == before


@pytest.mark.parametrize("kind", step.KERNELS, ids=str)
@pytest.mark.parametrize("G", [1, 3, 24])
def test_calls_go_by_the_rules_of_their_kind_of_states(
    kind: tuple[torch.dtype, bool], G: int, only_this_directory: Path
) -> None:
    config = write_rules(only_this_directory / "a.yaml")[kind]
    dtype, is_seeded = kind
    problem = make_problem(8, 1, 4 * G, 64, 96, torch.bfloat16, device="cuda")
    k, v = problem.k[:, :, :4].contiguous(), problem.v[:, :, :4].contiguous()
    state = torch.randn(8, 4, 64, 96, device="cuda").to(dtype)
    seed = torch.ones(1, dtype=torch.int64, device="cuda") if is_seeded else None
    for _ in range(3):
        retention_step(problem.q, k, v, state, seed=seed)
    launches = [*step._launches.values(), *(known.launch for (known,) in step.KNOWN.kinds.values())]
    if G == 24:  # which go by in pieces, whose tiles have no rules
        config = step.default_config_in_pieces(256 // dtype.itemsize, 96, G, 32, dtype.itemsize)
    used = [(launch._constants["BV"], launch._options["num_warps"]) for launch in launches if launch]
    assert used == [(config.BV, config.num_warps)] * 2
    assert launches[0]._constants["BR"] == (32 if G == 24 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("form", STEPS)
def test_the_smallest_and_the_largest_tiles_that_are_tuned_are_proven(form: str) -> None:
    problem = Problem(form, "bfloat16", 5, 1, 6, 128, 72)
    candidates = [c for c in problem.sift(ARCHS["sm90"]).candidates if c.num_warps in (1, 8)]
    sizes = [config.BV for config in candidates]
    for config in [config for config in candidates if config.BV in (min(sizes), max(sizes))]:
        assert 0 < prove(problem, config, {}, "cuda") < 1e-2
        assert 0 < prove_whole(problem, config, {}, problem.inputs("cuda")) < 1e-2


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "sync" not in name.lower()]


def kernels_compiled() -> int:
    return len(step_kernel.step_kernel.device_caches[torch.cuda.current_device()][0])


def test_other_lengths_batches_and_strides_compile_no_new_kernel() -> None:
    config = step.StepConfig(BV=16, num_warps=4)

    def call(B: int, T: int, heads_first: bool) -> None:
        problem = make_problem(B, T, 4, 64, 64, torch.bfloat16, device="cuda")
        inputs = (problem.q, problem.k, problem.v)
        if heads_first:
            inputs = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
        o = torch.empty_like(problem.do)
        expected = solve(problem)["o"]  # from the state that is about to be overwritten
        step.step_update(*inputs, None, None, problem.h0, None, None, None, o, config)
        assert errors(o, expected)[0] < 1e-2

    call(1, 1, heads_first=False)
    before = kernels_compiled()
    for B, T in ((1, 2), (2, 1), (3, 16), (16, 16)):
        for heads_first in (False, True):
            call(B, T, heads_first)
    assert kernels_compiled() == before


@pytest.mark.parametrize("slots", [[6, 0, 1], [0, -2, 1], [2, 1, 2]])
def test_the_debug_switch_finds_wrong_slots_on_the_device(slots: list[int]) -> None:
    """In a process of its own: an assertion on the device ends the use of the GPU."""
    program = f"""
import torch, generated
q = torch.ones(3, 1, 2, 16, device="cuda")
torch.cuda.synchronize()
generated.arguments._check_indices("f", q, "B", 3, 6, torch.tensor({slots}, device="cuda"))
torch.cuda.synchronize()
"""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "RETGEN_CHECK_STATE_INDICES": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
