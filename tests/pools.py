"""Final states that are written to slots of a pool, held against those that are returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Problem
from torch import Tensor

LAYOUTS = ("dense", "of_layers", "layers_first", "values_first", "of_one_more")


def make_pool(problem: Problem, slots: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A pool [slots, H, K, V] for a problem's states in memory of that layout, and all of it, NaN."""
    H, K, V = problem.k.shape[2], problem.k.shape[3], problem.v.shape[3]
    widths = (V, K) if layout == "values_first" else (K, V)
    memory = torch.full((3, slots, H, *widths), torch.nan, dtype=dtype, device=problem.q.device)
    views: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: memory[0],
        "of_layers": lambda: memory.view(slots, 3, H, K, V)[:, 1],
        "layers_first": lambda: memory.view(slots, 3, H, K, V).transpose(0, 1)[2],
        "values_first": lambda: memory[1].mT,
        "of_one_more": lambda: memory.flatten()[1 : 1 + slots * H * K * V].view(slots, H, K, V),
    }
    return views[layout](), memory


def arguments_of(problem: Problem, **options: Any) -> dict[str, Any]:
    """A public function's arguments for the problem's outputs and last states."""
    given = {name: getattr(problem, name) for name in ("q", "k", "v", "scale", "cu_seqlens", "g_gamma")}
    return {**given, "initial_state": problem.h0, **options}


def assert_states_go_to_slots(
    function: Callable[..., Any],
    problem: Problem,
    slots: list[int] | None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "dense",
    index: torch.dtype = torch.int64,
    **options: Any,
) -> None:
    """Fail unless a pool of a slot more than there are rows gets the bits that are returned, and nothing else does."""
    given = arguments_of(problem, **options)
    o, states = function(**given, output_final_state=True)
    pool, memory = make_pool(problem, len(states) + 1, layout, dtype)
    expected, written = memory.clone(), pool.clone()
    indices = None if slots is None else torch.tensor(slots, dtype=index, device=pool.device)
    got, final_state = function(**given, final_state=pool, state_indices=indices)
    assert final_state is pool
    assert torch.equal(got, o)
    for row, slot in enumerate(range(len(states)) if slots is None else slots):
        if 0 <= slot < len(pool):
            written[slot] = states[row].to(dtype)
    assert torch.equal(pool.nan_to_num(7), written.nan_to_num(7))
    assert memory.isnan().sum() == expected.isnan().sum() - (~written.isnan()).sum()
