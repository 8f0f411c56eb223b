"""Running buffered steps: the buffers of a pool, the counts of its sequences, and a server that has both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Problem, assert_matches, errors, solve
from serving import NAN, Server
from torch import Tensor

import generated

Step = Callable[..., Tensor]


class Buffers:
    """What lies beside a pool of states [slots, H, K, V]: what is of no token is NaN, and sequences begin anywhere."""

    def __init__(self, state: Tensor, dtype: torch.dtype, L: int) -> None:
        slots, H, K, V = state.shape
        self.L = L
        self.k, self.v = (state.new_full((slots, 2 * L, H, width), NAN, dtype=dtype) for width in (K, V))
        self.lengths = torch.arange(slots, device=state.device) * 5
        self.folded = self.lengths.clone()

    def step(
        self,
        step: Step,
        *inputs: Tensor,
        state: Tensor,
        state_indices: Tensor | None = None,
        accepted: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """One call, and the counts after it; default: all tokens stay."""
        T, slots = inputs[0].shape[1], torch.arange(len(inputs[0]), device=state.device)
        if state_indices is not None:
            slots = state_indices.long()
        lengths, folded = self.lengths[slots], self.folded[slots]
        o = step(*inputs, state, self.k, self.v, lengths, folded, state_indices=state_indices, **options)
        used = slots >= 0
        self.folded[slots[used]] = torch.where(lengths - folded + T > self.L, lengths, folded)[used]
        self.lengths[slots[used]] = (lengths + (T if accepted is None else accepted))[used]
        return o

    def flush(self, state: Tensor, **options: Any) -> None:
        """Have the state hold all tokens."""
        generated.retention_step_flush(state, self.k, self.v, self.lengths, self.folded, **options)
        self.folded.copy_(self.lengths)


def run_buffered(
    step: Step, problem: Problem, lengths: list[int], L: int, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """The outputs of steps of so many tokens, and the state, of the dtype, once all are folded."""
    assert problem.h0 is not None
    state = problem.h0.to(torch.float64 if problem.h0.dtype == torch.float64 else dtype, copy=True)
    buffers = Buffers(state, problem.q.dtype, L)
    options = {"g_gamma": problem.g_gamma, **options}
    parts = zip(*(x.split(lengths, 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    outputs = [buffers.step(step, *part, state=state, scale=problem.scale, **options) for part in parts]
    buffers.flush(state, **options)
    return {"o": torch.cat(outputs, 1), "final_state": state}


def assert_buffered_match(step: Step, problem: Problem, lengths: list[int], L: int, **options: Any) -> None:
    """Fail unless buffered steps match the oracle, the state to float32's accuracy whatever the inputs' dtype."""
    got = run_buffered(step, problem, lengths, L, **options)
    state = got.pop("final_state")
    assert_matches(got, problem)
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


def stored_alone(step: Step) -> Step:
    """A step that folds at once what it buffers, to see how the state is rounded."""

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, seed: int | None = None, **options: Any) -> Tensor:
        buffers = Buffers(state, q.dtype, 16)
        o = buffers.step(step, q, k, v, state=state, seed=seed, **options)
        buffers.flush(state, seed=seed, **options)
        return o

    return run


class BufferedServer(Server):
    """A server whose tokens lie in buffers: those that are not accepted need no state to go back to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buffers = Buffers(self.pool, self.pool.dtype, 16)

    def join(self, i: int) -> None:
        super().join(i)
        slot = self.slots[i]
        self.buffers.lengths[slot] = self.buffers.folded[slot] = self.draws.randrange(1000)

    def leave(self, i: int) -> None:
        slot, b = self.slots[i], self.buffers
        mine = torch.tensor([slot], device=self.pool.device)
        counts = (b.lengths[mine], b.folded[mine])
        generated.retention_step_flush(self.pool, b.k, b.v, *counts, state_indices=mine)
        super().leave(i)
        b.k[slot], b.v[slot] = NAN, NAN

    def call(self, step: Step, inputs: list[Tensor], slots: Tensor, accepted: Tensor) -> Tensor:
        return self.buffers.step(step, *inputs, state=self.pool, state_indices=slots, accepted=accepted)
