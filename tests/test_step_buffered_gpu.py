"""Steps whose last tokens lie in buffers, on a GPU: against the oracle, beside other steps, and in CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from buffered import BufferedServer, Buffers, assert_buffered_match, run_buffered, stored_alone
from oracle import errors, make_problem, solve
from serving import assert_served_as_alone
from steps import assert_unbiased
from torch import Tensor

from generated import configuration, retention_step, retention_step_buffered, retention_step_flush
from generated.retention import step_buffered, step_buffered_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning"),  # this GPU need not be tuned
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WIDTHS = [(8, 256, 512), (64, 128, 128), (3, 1, 1), (2, 20, 33), (4, 80, 80), (10, 256, 428), (2, 512, 512)]  # H, K, V
L = 4


def serving(B: int = 3, T: int = 1, H: int = 4, K: int = 64, V: int = 64, slots: int = 6) -> dict[str, Tensor]:
    """A call of rows of which the first folds what it has."""
    problem = make_problem(B, T, H, K, V, torch.bfloat16, device="cuda")
    buffers = [torch.randn(slots, 2 * L, H, width, device="cuda").bfloat16() for width in (K, V)]
    given = {"q": problem.q, "k": problem.k, "v": problem.v, "state": torch.randn(slots, H, K, V, device="cuda")}
    given |= {"k_buffer": buffers[0], "v_buffer": buffers[1], "lengths": torch.arange(B, device="cuda") + L}
    given["folded"] = torch.arange(B, device="cuda") * 2
    return {**given, "state_indices": torch.arange(B, device="cuda") * 2 % (slots - 1)}


def copy(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in given.items()}


WRITTEN = ("state", "k_buffer", "v_buffer")


@all_dtypes
@pytest.mark.parametrize(("H", "K", "V"), WIDTHS)
@pytest.mark.parametrize(("lengths", "most"), [([1] * 40, 16), ([1] * 9, 2), ([3, 1, 16, 2, 5, 16], 16)])
def test_steps_match_the_oracle(lengths: list[int], most: int, H: int, K: int, V: int, dtype: torch.dtype) -> None:
    problem = make_problem(3, sum(lengths), H, K, V, dtype, device="cuda")
    assert_buffered_match(retention_step_buffered, problem, lengths, most)


@all_dtypes
@pytest.mark.parametrize(("G", "H", "K", "V"), [(8, 8, 256, 512), (8, 1, 128, 128), (3, 2, 20, 33), (32, 1, 64, 64)])
def test_query_heads_share_the_state_of_their_group(G: int, H: int, K: int, V: int, dtype: torch.dtype) -> None:
    problem = make_problem(2, 24, H, K, V, dtype, device="cuda", group=G)
    assert_buffered_match(retention_step_buffered, problem, [1, 3, 1, 16, 2, 1], 16)


@all_dtypes
def test_thousands_of_steps_are_those_that_write_the_state_each_time(dtype: torch.dtype) -> None:
    problem = make_problem(2, 4000, 8, 32, 64, dtype, device="cuda")
    got = run_buffered(retention_step_buffered, problem, [1] * 4000, 16)
    state, parts = problem.h0.clone(), zip(*(x.split(1, 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    outputs = [retention_step(*part, state) for part in parts]
    assert errors(got["final_state"], state.double())[0] < 1e-5
    assert errors(got["o"], torch.cat(outputs, 1).double())[0] < (1e-6 if dtype == torch.float32 else 5e-3)


@all_dtypes
@pytest.mark.parametrize(("H", "K", "V"), [(8, 256, 512), (8, 20, 33)])
def test_a_fold_is_as_exact_as_float32(H: int, K: int, V: int, dtype: torch.dtype) -> None:
    rates = torch.tensor([-60.0, -3.0, -0.3, -0.2, -0.02, -0.01, -1e-9, 0.0], device="cuda")
    problem = make_problem(2, 16, H, K, V, dtype, device="cuda", g_gamma=rates)
    state = run_buffered(retention_step_buffered, problem, [1] * 16, 16)["final_state"]
    exact = solve(problem)["final_state"]
    assert all(errors(state[:, i], exact[:, i])[0] < 1e-6 for i in range(H))


def test_a_slow_decay_is_not_lost_beside_a_state_that_grows() -> None:
    """Where the decay's part is under half a unit of the state, and alone would be rounded away."""
    problem = make_problem(1, 4000, 1, 1, 24, device="cuda", g_gamma=torch.tensor([-(2.0**-26)], device="cuda"))
    problem = replace(problem, h0=problem.h0 * 4096)
    state = run_buffered(retention_step_buffered, problem, [16] * 250, 16)["final_state"]
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


def test_what_lies_in_rows_of_no_token_is_not_folded() -> None:
    """Also where it is NaN, which the weight 0 would not take away."""
    problem = make_problem(2, 3, 4, 64, 64, torch.bfloat16, device="cuda")
    state = run_buffered(retention_step_buffered, problem, [1] * 3, 16)["final_state"]  # the others of 32 rows are NaN
    assert errors(state, solve(problem)["final_state"])[0] < 1e-6


@pytest.mark.timeout(120)
@pytest.mark.parametrize("V", [6, 40])  # columns of one program, and of more
def test_ten_thousand_sequences_in_a_pool_are_as_if_each_were_alone(V: int) -> None:
    options = {"count": 10_000, "rows": 64, "device": "cuda", "V": V}
    assert_served_as_alone(retention_step_buffered, **options, kind=BufferedServer)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_stochastic_rounding_has_no_bias(half: torch.dtype) -> None:
    """But for what is under TF32's smallest number, 2^-136, which the product that folds tokens rounds away."""
    assert_unbiased(stored_alone(retention_step_buffered), half, device="cuda", seeds=400, smallest=2.0**-136)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 32])
def test_results_are_the_same_bits_each_time(B: int, half: torch.dtype) -> None:
    """Also where programs of one head begin long after others have ended."""
    problem = make_problem(B, 12, 8, 256, 512, torch.bfloat16, device="cuda")
    seed = None if half == torch.float32 else torch.tensor([3], device="cuda")
    found = [run_buffered(retention_step_buffered, problem, [1] * 8 + [4], 4, half, seed=seed) for _ in range(20)]
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


def test_the_gpu_does_what_the_cpu_does() -> None:
    given = serving()
    given["state_indices"][1] = -1
    host = {name: x.cpu().clone() for name, x in given.items()}
    o, expected = retention_step_buffered(**given), retention_step_buffered(**host)
    assert errors(o.cpu(), expected.double())[0] < 1e-2
    assert errors(given["state"].cpu(), host["state"].double())[0] < 1e-6
    assert torch.equal(given["state"][1:].cpu(), host["state"][1:])
    for name in ("k_buffer", "v_buffer"):
        assert torch.equal(given[name].cpu(), host[name])


@pytest.mark.parametrize("T", [1, 3])
def test_a_captured_step_goes_on_with_other_slots_and_counts(T: int) -> None:
    """The graph has the counting too; some of the tokens are taken back."""

    def step(given: dict[str, Tensor], accepted: Tensor) -> Tensor:
        o = retention_step_buffered(**given)
        lengths, folded = given["lengths"], given["folded"]
        folded.copy_(torch.where(lengths - folded + T > L, lengths, folded))
        lengths += accepted
        return o

    given, accepted = serving(T=T), torch.full((3,), T, device="cuda")
    step(copy(given), accepted)
    eager, graph = copy(given), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(given, accepted)
    counts = torch.arange(6, device="cuda") + 7
    lengths, folded = counts.clone(), counts.clone()
    for i in range(100):
        slots = torch.randperm(6, device="cuda")[:3]
        skipped = slots == i % 7
        for one in (given, eager):
            one["lengths"].copy_(lengths[slots])
            one["folded"].copy_(folded[slots])
            one["state_indices"].copy_(torch.where(skipped, -1, slots))
        accepted.copy_(torch.randint(0, T + 1, (3,), device="cuda"))
        for name in ("q", "k", "v"):
            eager[name].copy_(given[name].normal_())
        graph.replay()
        assert torch.equal(o, step(eager, accepted))
        for name in (*WRITTEN, "lengths", "folded"):
            assert torch.equal(given[name], eager[name])
        used = slots[~skipped]
        lengths[used], folded[used] = given["lengths"][~skipped], given["folded"][~skipped]
    assert (folded > counts).all()


def test_a_thousand_replays_are_the_sequence() -> None:
    problem = make_problem(2, 1000, 4, 64, 64, torch.float32, device="cuda")
    state = problem.h0.clone()
    buffers = Buffers(state, torch.float32, 16)
    token = [x[:, :1].clone() for x in (problem.q, problem.k, problem.v)]
    buffers.step(retention_step_buffered, *token, state=state)
    state.copy_(problem.h0)
    buffers.folded.copy_(buffers.lengths)
    lengths, folded = buffers.lengths, buffers.folded
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        o = retention_step_buffered(*token, state, buffers.k, buffers.v, lengths, folded)
        folded.copy_(torch.where(lengths - folded + 1 > 16, lengths, folded))
        lengths += 1
    for t in range(1000):
        for x, whole in zip(token, (problem.q, problem.k, problem.v), strict=True):
            x.copy_(whole[:, t : t + 1])
        graph.replay()
        outputs.append(o.clone())
    buffers.flush(state)
    assert errors(torch.cat(outputs, 1), solve(problem)["o"])[0] < 1e-5
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the one that inductor makes to begin with
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_write_in_place(mode: str) -> None:
    given = serving()
    eager, addresses = copy(given), [given[name].data_ptr() for name in WRITTEN]
    compiled = torch.compile(retention_step_buffered, fullgraph=True, mode=mode)
    with torch.no_grad():
        for slots in ([0, 2, 4], [5, -1, 1], [4, 3, 2], [1, 2, 3]):
            torch.compiler.cudagraph_mark_step_begin()
            for one in (given, eager):
                one["state_indices"].copy_(torch.tensor(slots))
            assert torch.equal(compiled(**given), retention_step_buffered(**eager))
            assert all(torch.equal(given[name], eager[name]) for name in WRITTEN)
    assert [given[name].data_ptr() for name in WRITTEN] == addresses


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_a_step_is_one_kernel_one_allocation_and_no_wait() -> None:
    given = serving()
    retention_step_buffered(**given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        retention_step_buffered(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        retention_step_buffered(**given)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "step" in event.name]
    assert len(kernels) <= 1


def test_other_lengths_batches_and_counts_compile_no_new_kernel() -> None:
    def call(B: int, T: int) -> None:
        given = serving(B=B, T=T, slots=7)
        retention_step_buffered(**given)
        names = (*WRITTEN, "lengths", "folded", "state_indices")
        retention_step_flush(**{name: given[name] for name in names})

    def compiled() -> int:
        return len(step_buffered_kernel.step_buffered_kernel.device_caches[torch.cuda.current_device()][0])

    call(1, 1)
    for T in (2, 4):  # there is one for each power of two of outputs
        call(1, T)
    before = compiled()
    for B, T in ((2, 1), (3, 4), (4, 3)):
        call(B, T)
    assert compiled() == before


def test_memory_is_that_of_the_output_alone() -> None:
    problem = make_problem(16, 1, 8, 256, 512, torch.bfloat16, device="cuda")
    buffers = Buffers(problem.h0, torch.bfloat16, 16)
    step = (retention_step_buffered, problem.q, problem.k, problem.v)
    buffers.step(*step, state=problem.h0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        buffers.step(*step, state=problem.h0)
    assert torch.cuda.max_memory_allocated() - before < 2**20  # the states are 64 MiB


def test_a_state_may_lie_anywhere() -> None:
    given = serving()
    expected = copy(given)
    o = retention_step_buffered(**expected)
    for name in WRITTEN:
        memory = torch.zeros(given[name].numel() + 1, dtype=given[name].dtype, device="cuda")
        given[name] = memory[1:].view_as(given[name]).copy_(given[name])
    assert errors(retention_step_buffered(**given), o.double())[0] < 1e-2
    assert errors(given["state"], expected["state"].double())[0] < 1e-6
    assert all(torch.equal(given[name], expected[name]) for name in WRITTEN[1:])


@pytest.mark.parametrize(("lengths", "folded"), [(9, 10), (9, 4), (1, -1)])
def test_the_debug_switch_finds_wrong_counts_on_the_device(lengths: int, folded: int) -> None:
    """In a process of its own: an assertion on the device ends the use of the GPU."""
    program = f"""
import torch, generated
q, state = torch.ones(3, 1, 2, 16, device="cuda"), torch.ones(3, 2, 16, 16, device="cuda")
k, v = (torch.ones(3, 8, 2, 16, device="cuda") for _ in range(2))
counts = [torch.tensor(x, device="cuda") for x in ([{lengths}, 0, 1], [{folded}, 0, 1])]
torch.cuda.synchronize()
generated.retention_step_buffered(q, q, q, state, k, v, *counts)
torch.cuda.synchronize()
"""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "RETGEN_CHECK_STATE_INDICES": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_seed_that_a_graph_would_keep_is_refused() -> None:
    given = serving()
    given["state"] = given["state"].bfloat16()
    retention_step_buffered(**copy(given), seed=1)
    with pytest.raises(ValueError, match="a CUDA graph would keep"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        retention_step_buffered(**given, seed=1)


def test_decays_are_exact_over_thousands_of_tokens() -> None:
    problem = make_problem(1, 4800, 8, 16, 16, torch.bfloat16, device="cuda")
    problem = replace(problem, k=problem.k * 0)
    got = run_buffered(retention_step_buffered, problem, [16] * 300, 16)
    assert errors(got["final_state"], solve(problem)["final_state"])[0] < 1e-5


# Calls like one before, which run straight


def make_known(given: dict[str, Tensor]) -> None:
    """Call once, and fail unless what calls of this kind come to is known then."""
    configuration.clear_caches()
    retention_step_buffered(**copy(given))
    ((known,),) = step_buffered.KNOWN.kinds.values()
    assert known.launch is not None


@pytest.mark.parametrize("case", ["plain", "out", "seed", "decays", "many tokens", "grouped"])
def test_a_known_call_runs_straight_and_gives_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = serving(T=3 if case == "many tokens" else 1)
    if case == "out":
        given["out"] = torch.full_like(given["v"], float("nan"))
    if case == "seed":
        given |= {"state": given["state"].bfloat16(), "seed": torch.tensor([7], device="cuda")}
    if case == "decays":
        given["g_gamma"] = -torch.arange(4, device="cuda") / 8
    if case == "grouped":
        given["q"] = torch.cat([given["q"], -given["q"]], 2)
    configuration.clear_caches()
    first, again = copy(given), copy(given)
    o = retention_step_buffered(**first)
    monkeypatch.setattr(step_buffered, "OPERATOR", None)
    assert torch.equal(retention_step_buffered(**again), o)
    assert all(torch.equal(first[name], again[name]) for name in WRITTEN)
    assert all(again[name]._version > 0 for name in WRITTEN)


@pytest.mark.parametrize("name", ["q", "v", "state", "lengths", "state_indices"])
def test_a_known_call_whose_tensors_are_not_aligned_gives_the_same(name: str) -> None:
    given = serving()
    make_known(given)
    wanted, moved = copy(given), copy(given)
    x = given[name]
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    moved[name] = room[1:].view(x.shape).copy_(x)
    assert moved[name].data_ptr() % 16
    o = retention_step_buffered(**wanted)
    torch.testing.assert_close(retention_step_buffered(**moved), o, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moved["state"], wanted["state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("one", "other"), [("folded", "lengths"), ("v_buffer", "k_buffer"), ("k_buffer", "state")])
def test_a_known_call_whose_tensors_begin_together_is_refused(one: str, other: str) -> None:
    given = serving()
    given["state"] = torch.randn(6, 4, 64, 64, device="cuda").bfloat16()
    make_known(given)
    given[one] = given[other].view(-1)[: given[one].numel()].view(given[one].shape)
    with pytest.raises(ValueError, match="are one memory"):
        retention_step_buffered(**given)
