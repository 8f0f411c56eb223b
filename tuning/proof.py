"""What a configuration must pass before a rule names it: draws that each look for a way in which kernels go wrong.

Every draw holds outputs and states against float64, head by head, and asks for the same bits twice. It runs in memory
full of NaN: an element that nobody wrote is one, and so is what comes of reading beside a tensor. Writes there
are seen.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tuning.oracle import gradients_reference, segment_states, sweep_reference
from tuning.problems import GRADIENTS, STATES_SEGMENT, WITH_STATES, Problem

# The largest relative error against float64 that is taken for rounding: a few units of each dtype.
ERROR_LIMITS = {"bfloat16": 1e-2, "float16": 1.3e-3, "float32": 1e-5}
# Of a state that only grows: the inputs' roundings cancel out in it, and those of a sum in 16 bits do not.
STEADY_LIMITS = {"bfloat16": 1e-3, "float16": 2e-4, "float32": 5e-6}
SIZES = {"bfloat16": 20, "float16": 2, "float32": 20}  # how many powers of two up and down the inputs may be
RATES = (math.log1p(-(2.0**-5)), 0.0, -3.0)  # a slow decay, none, and one that forgets within a chunk
MARGIN = 2048  # bytes on either side of a tensor; a multiple of what tensors are aligned at
TOKENS = 333  # ragged for every chunk


@dataclass(frozen=True)
class Draw:
    """Inputs of one kind: rows of one length, or (more lengths than one) sequences packed into a row."""

    name: str
    lengths: tuple[int, ...] = ()
    log2_size: int = 0
    steady: bool = False
    states: bool = False
    reverse: bool = False
    adjoint: bool = False


def draws(problem: Problem, config: Any) -> list[Draw]:
    """The draws of a problem: what its form knows nothing of (states, packed sequences) is left out."""
    segment = STATES_SEGMENT if problem.form == "chunk_states" else getattr(config, "L", 0)
    tokens = segment + TOKENS if 0 < segment < problem.T else TOKENS  # more than a segment, where there is one
    size = SIZES[problem.dtype]
    found = [
        Draw("from the first token", (tokens,)),
        Draw("from the last token", (tokens,), reverse=True),
        Draw("one token", (1,)),
        Draw("large numbers", (TOKENS,), log2_size=size),
        Draw("tiny numbers", (TOKENS,), log2_size=-size),
    ]
    states = problem.form in WITH_STATES
    if states:
        found.append(Draw("states", (tokens,), states=True, steady=True))
    if problem.form != "chunk_states":
        packed = (1, 64, tokens, 63, 2)
        found.append(Draw("packed", packed, states=states, adjoint=states))
        found.append(Draw("packed, from the last token", packed, states=states, adjoint=states, reverse=True))
    return found


def prove(problem: Problem, config: Any, extra: dict[str, Any], device: str) -> float:
    """The largest error of all draws; ArithmeticError names the draw that found a fault, and the fault."""
    worst = 0.0
    for number, draw in enumerate(draws(problem, config)):
        try:
            worst = max(worst, _examine(problem, config, extra, draw, torch.Generator(device).manual_seed(number)))
        except ArithmeticError as fault:
            raise ArithmeticError(f"{draw.name}: {fault}") from None
    return worst


def _examine(problem: Problem, config: Any, extra: dict[str, Any], draw: Draw, generator: torch.Generator) -> float:
    guard = Guard()
    inputs, offsets, initial = _inputs(problem, draw, generator)
    guarded = [guard.copy(x) for x in inputs]
    state = None if initial is None else guard.copy(initial)

    def run() -> list[Tensor]:
        final = None if initial is None else guard.copy(torch.full_like(initial, math.nan))
        options = {"initial_state": state, "final_state": final} if final is not None else {}
        order = {"cu_seqlens": offsets, "reverse": draw.reverse, "adjoint": draw.adjoint}
        results = problem.run(tuple(guarded), config, **order, **options, **extra)
        return [*results, *([] if final is None else [final])]

    with guard:
        once, again = run(), run()
    expected = _expected(problem, draw, inputs, offsets, initial)
    limits = [ERROR_LIMITS[problem.dtype]] * len(once)
    if draw.steady:
        limits[-1] = STEADY_LIMITS[problem.dtype]
    errors = [_error(got, want) for got, want in zip(once, expected, strict=True)]
    if not all(error < limit for error, limit in zip(errors, limits, strict=True)):
        shown = ", ".join(f"{error:.1e} of {limit:.1e}" for error, limit in zip(errors, limits, strict=True))
        raise ArithmeticError(f"wrong result: relative errors {shown} allowed")
    if not all(torch.equal(_bytes(x), _bytes(y)) for x, y in zip(once, again, strict=True)):
        raise ArithmeticError("two runs on the same inputs differ")
    if not all(torch.equal(_bytes(x), _bytes(y)) for x, y in zip(guarded, inputs, strict=True)):
        raise ArithmeticError("an input was written to")
    guard.check()
    return max(errors)


def _inputs(
    problem: Problem, draw: Draw, generator: torch.Generator
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """q, k, v (for gradients also do), the decays, the offsets of packed sequences, and the initial states."""
    device, heads = generator.device, len(RATES)
    packed = len(draw.lengths) > 1
    rows, tokens = (1, sum(draw.lengths)) if packed else (2, draw.lengths[0])

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator)
        return x.abs() if draw.steady else x

    widths = (problem.K, problem.K, problem.V, *([problem.V] if problem.form == GRADIENTS else []))
    tensors = [normal(rows, tokens, heads, width) * 2.0**draw.log2_size for width in widths]
    rates = torch.tensor(RATES, device=device)
    initial = normal(len(draw.lengths) if packed else rows, heads, problem.K, problem.V) if draw.states else None
    offsets = torch.tensor((0, *draw.lengths), device=device).cumsum(0) if packed else None
    return [*(x.to(problem.torch_dtype) for x in tensors), rates], offsets, initial


def _expected(
    problem: Problem, draw: Draw, inputs: list[Tensor], offsets: Tensor | None, initial: Tensor | None
) -> list[Tensor]:
    *tensors, rates = inputs
    if offsets is None:
        return _reference(problem, draw, tensors, rates, initial)
    bounds = offsets.tolist()
    parts = [
        _reference(
            problem,
            draw,
            [x[:, begin:end] for x in tensors],
            rates,
            None if initial is None else initial[i : i + 1],
        )
        for i, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    results = [
        torch.cat(series, 1) for series in zip(*(part[: len(part) - draw.states] for part in parts), strict=True)
    ]
    return [*results, torch.cat([part[-1] for part in parts])] if draw.states else results


def _reference(
    problem: Problem, draw: Draw, tensors: list[Tensor], rates: Tensor, initial: Tensor | None
) -> list[Tensor]:
    scale, q, k, v = problem.K**-0.5, *tensors[:3]
    if problem.form == "chunk_states":
        return [segment_states(k, v, rates, STATES_SEGMENT, reverse=draw.reverse)]
    if problem.form == GRADIENTS:
        return list(gradients_reference(q, k, v, tensors[3], rates, scale, reverse=draw.reverse))
    # A gradient's state has undergone the decay of the token that it arrives at, and the scale.
    factor = scale * torch.exp(rates.double())[:, None, None] if draw.adjoint else 1.0
    start = None if initial is None else initial.double() / factor
    o, final = sweep_reference(q, k, v, rates, scale, reverse=draw.reverse, initial_state=start)
    return [o, final * factor] if draw.states else [o]


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a head of outputs [B, T, H, V] or states [N, H, K, V]; NaN if there is one."""
    if got.shape != expected.shape:
        raise ArithmeticError(f"wrong result: shape {list(got.shape)}, not {list(expected.shape)}")
    axis = 2 if expected.shape[2] == len(RATES) else 1
    difference, size = ((x.double().movedim(axis, 0).flatten(1).norm(dim=1)) for x in (got - expected, expected))
    errors = difference / size.clamp(min=1e-300)
    return float(errors.max() if not errors.isnan().any() else math.nan)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


class Guard(TorchFunctionMode):
    """Within it new tensors lie between margins and are full of NaN; `check` says whether a margin was written to.

    PyTorch's deterministic mode fills new memory too, but its first use imports the compiler, which takes seconds, and
    so does that of a dispatch mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._allocate(result) if func in EMPTY and result.is_contiguous() else result

    def copy(self, x: Tensor) -> Tensor:
        """The tensor again, between margins."""
        return self._allocate(x).copy_(x)

    def check(self) -> None:
        """Raise ArithmeticError if anything beside a tensor has changed."""
        sides = [side for buffer, margin in self._buffers for side in (buffer[:margin], buffer[-margin:])]
        changed = [(_bytes(side) != _bytes(torch.full_like(side, math.nan))).any() for side in sides]
        if torch.stack(changed).any():
            raise ArithmeticError("memory beside a tensor was written to")

    def _allocate(self, like: Tensor) -> Tensor:
        margin = MARGIN // like.element_size()
        if not like.is_floating_point():
            return like
        buffer = torch.full((like.numel() + 2 * margin,), math.nan, dtype=like.dtype, device=like.device)
        self._buffers.append((buffer, margin))
        return buffer[margin : margin + like.numel()].view(like.shape)


EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
