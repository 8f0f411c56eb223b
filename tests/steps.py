"""Running a step in place, or many, and holding them against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Problem, assert_matches, errors, retnet_rates, solve
from torch import Tensor

from generated import configuration, known
from generated.known import KnownLaunches
from generated.launch import Launch
from generated.retention import step as step_module

HEAD = """format: 1
device: {{arch: sm90, name: Pretended}}
software: {{triton: {triton}, torch: 2.11.0}}
tuned: 2026-11-23
kernels:
"""
RULE = """  {kernel}:
    source: {source}
    rules:
      - when: {{dtype: bfloat16, K: [33, 64], V: [65, 128], BH: [16, 64], T: [1, 2]}}
        use: {{BV: {BV}, num_warps: 8}}
        measured: {{ms: 1.0, default_ms: 1.0, error: 0.0, spills: 0, trials: 1}}
"""


def tokens_far_apart(T: int, heads: int) -> Tensor:
    """Ones [1, T, heads, 16] in float16, of which the last token lies 2^31 numbers behind the first."""
    far = 2**31 // (T - 1)
    memory = np.zeros((T - 1) * far + 16 * heads, dtype=np.float16)  # of which the system gives what is written to
    return torch.from_numpy(memory).as_strided((1, T, heads, 16), (16 * heads, far, 16, 1)).fill_(1.0)


def write_rules(path: Path, module: Any = step_module) -> dict[tuple[torch.dtype, bool], step_module.StepConfig]:
    """Write and read a file of a rule a kind of states, and say what each uses: tiles of another size."""
    kernels, registry = module.KERNELS, configuration.kernel_registry()
    configs = {kind: step_module.StepConfig(BV=8 << number, num_warps=8) for number, kind in enumerate(kernels)}
    rules = [RULE.format(kernel=k, source=registry[k].source, BV=configs[kind].BV) for kind, k in kernels.items()]
    path.write_text(HEAD.format(triton=configuration.TRITON) + "".join(rules))
    configuration.reload()
    return configs


def group_heads(problem: Problem, heads: int) -> tuple[Problem, dict[str, Tensor]]:
    """The problem with k, v and h0 of its first heads, repeated, and the arguments of a step whose queries share."""
    few = {name: getattr(problem, name)[:, :, :heads] for name in ("k", "v")}
    assert problem.h0 is not None
    repeats = problem.q.shape[2] // heads
    rates = retnet_rates(heads).to(few["k"].device, torch.float32) if problem.g_gamma is None else problem.g_gamma
    repeated = {name: x.repeat_interleave(repeats, 2) for name, x in few.items()}
    h0 = problem.h0[:, :heads].contiguous()
    whole = replace(problem, **repeated, h0=h0.repeat_interleave(repeats, 1), g_gamma=rates.repeat_interleave(repeats))
    return whole, {"q": problem.q, **few, "state": h0.clone(), "g_gamma": problem.g_gamma, "scale": problem.scale}


def assert_grouped_steps_match(step: Callable[..., Tensor], problem: Problem, heads: int, **options: Any) -> None:
    """Fail unless a step whose query heads share the states of fewer heads gives what it does with those repeated."""
    whole, grouped = group_heads(problem, heads)
    o = step(**grouped, **options)
    assert_matches({"o": o}, whole)
    repeats = problem.q.shape[2] // heads
    assert errors(grouped["state"].repeat_interleave(repeats, 1), solve(whole)["final_state"])[0] < 1e-5


@contextmanager
def in_pieces(way: str) -> Iterator[None]:
    """Let all states lie in "registers", or those of several outputs that are not kept go by in "pieces"."""
    with pytest.MonkeyPatch.context() as patch:
        wherever = lambda outputs, *_, are_kept=False: way == "pieces" and outputs > 1 and not are_kept  # noqa: E731
        patch.setattr(step_module, "goes_by_in_pieces", wherever)
        configuration.clear_caches()
        try:
            yield
        finally:
            configuration.clear_caches()


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


# States of 16 bits


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart the dtype's numbers are at x, of float64."""
    limits = torch.finfo(dtype)
    exponent = torch.log2(x.abs().clamp(min=limits.tiny)).floor()
    return limits.eps * torch.exp2(exponent)


def assert_rounded_once(
    step: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, units: float = 0.5, **options: Any
) -> None:
    """Fail unless a step from states of the dtype gives the oracle's outputs, and states within such units."""
    assert problem.h0 is not None
    problem = replace(problem, h0=problem.h0.to(dtype))
    kept = torch.empty(*problem.q.shape[:3], *problem.h0.shape[2:], dtype=dtype, device=problem.q.device)
    got = run_step(step, problem, states_out=kept, **options)
    assert_matches({"o": got["o"]}, problem)
    assert torch.equal(kept[:, -1], got["final_state"])
    for t in range(kept.shape[1]):
        part = replace(problem, **{name: getattr(problem, name)[:, : t + 1] for name in ("q", "k", "v", "do")})
        exact = solve(part)["final_state"]
        distance = (kept[:, t].double() - exact).abs()
        assert (distance <= units * spacing(exact, dtype) + 1e-5 * exact.abs().max()).all()


def as_on_a_gpu(calls: KnownLaunches, launch: Launch, o: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have the one kind of call that is known launched straight, as if the CPU were a GPU; return its launches."""
    launches: list[Any] = []
    straight = SimpleNamespace(straight=lambda tensors: launches.append(launch(*tensors)) or True)
    ((kind, (call,)),) = calls.kinds.items()
    makes = tuple(partial(torch.empty_like, o) for place in calls._results if place in call.absent)
    calls.kinds[kind] = (call._replace(launch=straight, makes=makes),)
    calls._latest.clear()
    monkeypatch.setattr(known, "current_device", lambda: call.device)
    return launches


def store(step: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, seed: int | Tensor | None) -> Tensor:
    """What a step stores, in states of a dtype, where they are x [B, H, K, V] of float32, whose rows must be equal."""
    k = torch.ones(len(x), 1, *x.shape[1:3], device=x.device)
    state = torch.zeros(x.shape, dtype=dtype, device=x.device)
    step(k * 0, k, x[:, None, :, 0], state, seed=seed)
    return state


def assert_unbiased(
    step: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu", seeds: int = 50, smallest: float = 0.0
) -> None:
    """Fail unless states of any size are rounded to one of the numbers next to them, in the mean to themselves.

    smallest: to multiples of this number they may be rounded beforehand.
    """
    limits, generator = torch.finfo(dtype), torch.Generator(device).manual_seed(0)
    normal = torch.randn(16, generator=generator, device=device)
    x = torch.cat([normal, normal * limits.tiny, normal * (limits.max / 8), normal * limits.tiny * limits.eps])
    x = x.expand(1, 1, 64, -1)
    unit = spacing(x.double(), dtype)
    errors = torch.stack([(store(step, x, dtype, seed).double() - x.double()) / unit for seed in range(seeds)])
    before = smallest / 2 / unit[0, 0, 0]  # in units of each number
    assert (errors.abs() < 1 + before).all()
    assert (errors.mean((0, 1, 2, 3)).abs() < 5 * 0.5 / (seeds * 64) ** 0.5 + before).all()  # of each of the numbers
    assert errors.mean().abs() < 5 * 0.5 / errors.numel() ** 0.5 + before.mean()


def assert_independent(step: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless rows, heads, tokens and numbers of a state are rounded by bits of their own, which the seed tells."""
    halfway = 1 + torch.finfo(dtype).eps / 2  # up or down, one as likely as the other
    x = torch.full((2, 2, 32, 32), halfway, device=device)

    def ups(seed: int) -> Tensor:
        zeros, kept = torch.zeros(2, 2, 2, 32, device=device), torch.empty(2, 2, 2, 32, 32, dtype=dtype, device=device)
        k, v = zeros.clone(), zeros.clone()
        k[:, 0], v[:, 0] = 1, x[:, :, 0]
        state = torch.zeros(2, 2, 32, 32, dtype=dtype, device=device)
        step(k, k, v, state, seed=seed, states_out=kept, g_gamma=torch.zeros(2, device=device))
        return kept.double() > x[:, None]

    first = ups(7)
    assert torch.equal(first, ups(7))
    found = [*first.flatten(0, 2), *ups(8).flatten(0, 2), *ups(7 + 2**32).flatten(0, 2)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert 0.4 < (one == other).double().mean() < 0.6
        for shift in range(1, 32):
            for axis in (0, 1):
                assert 0.4 < (one == one.roll(shift, axis)).double().mean() < 0.6
