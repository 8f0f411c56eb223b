"""Running a step in place, or many, and holding them against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Problem, assert_matches, errors, solve
from torch import Tensor


def run_step(
    step: Callable[..., Tensor], problem: Problem, lengths: list[int] | None = None, **options: Any
) -> dict[str, Tensor]:
    """The outputs and the last state of steps of so many tokens, or of one of all."""
    assert problem.h0 is not None
    state = problem.h0.clone()
    options = {"scale": problem.scale, "g_gamma": problem.g_gamma, **options}
    parts = zip(*(x.split(lengths or x.shape[1], 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    outputs = [step(*part, state, **options) for part in parts]
    return {"o": torch.cat(outputs, 1), "final_state": state}


def assert_steps_match(
    step: Callable[..., Tensor], problem: Problem, lengths: list[int] | None = None, **options: Any
) -> None:
    """Fail unless steps match the oracle, the state to float32's accuracy whatever the inputs' dtype."""
    got = run_step(step, problem, lengths, **options)
    assert_matches(got, problem)
    assert errors(got["final_state"], solve(problem)["final_state"])[0] < 1e-5
