"""Prompts whose final states go to slots of a pool, on a GPU: bits that are otherwise returned, and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import errors, make_problem, solve
from pools import LAYOUTS, arguments_of, assert_states_go_to_slots
from torch import Tensor

from generated import chunk_retention, retention_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning"),  # this GPU need not be tuned
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

LENGTHS = [300, 1, 64, 659]
WIDTHS = [(8, 256, 512), (4, 128, 128), (3, 1, 1), (2, 20, 33), (2, 512, 64)]  # H, K, V


def prompts(**options: Any) -> dict[str, Any]:
    """Packed prompts, of which the second has no slot, and a pool of six."""
    problem = make_problem(1, 1024, 4, 64, 64, torch.bfloat16, lengths=LENGTHS, states=False, device="cuda")
    pool, indices = torch.zeros(6, 4, 64, 64, device="cuda"), torch.tensor([5, -1, 0, 2], device="cuda")
    return {**arguments_of(problem), "final_state": pool, "state_indices": indices, **options}


def copy(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "K", "V"), WIDTHS)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_states_go_to_their_slots_alone(
    chunk_size: int | None, group: int, H: int, K: int, V: int, dtype: torch.dtype
) -> None:
    packed = make_problem(1, 1024, H, K, V, torch.bfloat16, group=group, lengths=LENGTHS, device="cuda")
    batch = make_problem(3, 200, H, K, V, torch.bfloat16, group=group, device="cuda")
    options = {"dtype": dtype, "chunk_size": chunk_size}
    assert_states_go_to_slots(chunk_retention, packed, [4, -1, 0, 2], **options)
    assert_states_go_to_slots(chunk_retention, replace(packed, h0=None), [5, 3, -9, 2**40], **options)
    assert_states_go_to_slots(chunk_retention, batch, [1, 3, 0], index=torch.int32, **options)
    assert_states_go_to_slots(chunk_retention, batch, None, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_a_pool_may_lie_anywhere(chunk_size: int | None, layout: str, dtype: torch.dtype) -> None:
    problem = make_problem(1, 1024, 4, 64, 128, torch.bfloat16, lengths=LENGTHS, device="cuda")
    options = {"dtype": dtype, "layout": layout, "chunk_size": chunk_size}
    assert_states_go_to_slots(chunk_retention, problem, [4, -1, 0, 2], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_prompts_in_a_pool_go_on_by_steps(chunk_size: int | None, dtype: torch.dtype) -> None:
    problem = make_problem(2, 500, 4, 64, 64, dtype, device="cuda")
    pool, slots = torch.full((5, 4, 64, 64), torch.nan, device="cuda"), torch.tensor([3, 1], device="cuda")
    pool[slots] = problem.h0
    first, second, last = zip(*(x.split((256, 240, 4), 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    for part in (first, second):
        given = {"initial_state": pool[slots], "chunk_size": chunk_size}
        chunk_retention(*part, **given, final_state=pool, state_indices=slots)
    o = retention_step(*last, pool, state_indices=slots)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert errors(o, solve(problem)["o"][:, -4:])[0] < bound
    assert errors(pool[slots], solve(problem)["final_state"])[0] < bound
    assert pool[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("offset", [0, 1])
def test_indices_may_lie_anywhere(offset: int) -> None:
    given = prompts()
    expected = copy(given)
    o, _ = chunk_retention(**expected)
    memory = torch.empty(8, dtype=torch.int64, device="cuda")
    indices = memory[offset : offset + 4].copy_(given["state_indices"])
    assert torch.equal(chunk_retention(**given | {"state_indices": indices})[0], o)
    assert torch.equal(given["final_state"], expected["final_state"])


@pytest.mark.parametrize("chunk_size", [None, 64])
def test_captured_prompts_go_to_other_slots(chunk_size: int | None) -> None:
    given = prompts(chunk_size=chunk_size)
    eager = copy(given)
    chunk_retention(**copy(given))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = chunk_retention(**given)
    for slots in ([0, 2, 4, 5], [5, -1, 1, -1], [-1, -1, -1, -1], [4, 3, 9, 1]):
        for name in "qkv":
            given[name].normal_()
        given["state_indices"].copy_(torch.tensor(slots))
        eager |= copy({name: given[name] for name in ("q", "k", "v", "state_indices")})
        graph.replay()
        assert torch.equal(o, chunk_retention(**eager)[0])
        assert torch.equal(given["final_state"], eager["final_state"])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the one that inductor makes to begin with
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_prompts_write_in_place(mode: str) -> None:
    given = prompts()
    eager, address = copy(given), given["final_state"].data_ptr()

    def prefill(**given: Any) -> Tensor:
        return chunk_retention(**given)[0]

    compiled = torch.compile(prefill, fullgraph=True, mode=mode)
    with torch.no_grad():
        for slots in ([0, 2, 4, 5], [5, -1, 1, 0], [4, 3, 2, 1]):
            torch.compiler.cudagraph_mark_step_begin()
            for one in (given, eager):
                one["state_indices"].copy_(torch.tensor(slots))
            assert torch.equal(compiled(**given), prefill(**eager))
            assert torch.equal(given["final_state"], eager["final_state"])
    assert given["final_state"].data_ptr() == address


def test_prompts_wait_for_nothing_and_make_no_states_to_copy() -> None:
    given = prompts(chunk_size=64)
    bare = {name: x for name, x in given.items() if name not in ("final_state", "state_indices")}
    allocations = []
    for one in (given, {**bare, "output_final_state": True}):
        chunk_retention(**one)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            chunk_retention(**one)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert allocations[0] == allocations[1] - 1


def test_the_gpu_does_what_the_cpu_does() -> None:
    given = prompts()
    host = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    o, _ = chunk_retention(**given)
    expected, _ = chunk_retention(**host)
    assert errors(o.cpu(), expected.double())[0] < 1e-2
    assert errors(given["final_state"].cpu(), host["final_state"].double())[0] < 1e-2
    assert given["final_state"][[1, 3, 4]].count_nonzero() == 0
