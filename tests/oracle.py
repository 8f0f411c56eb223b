"""Retention in float64, written from the formulas, and how far a result may be from it.

    S_t = gamma S_{t-1} + k_t v_t^T      o_t = scale * q_t S_t      (with `reverse` from the last token to the first)

Where q has more heads than k and v, each of these is repeated for its group.

`recurrence` is that, token by token; `by_blocks` is the same sum a block of tokens at a time, for long sequences. Both
are differentiable, so autograd supplies every gradient. A result in a low precision may have twice the error of
`by_blocks` with its operands rounded to that precision, and the rounding of the result itself: no hand-picked bound.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
FLOAT32_ERROR = 1e-5
WORST_ROW = 10  # in float32, how much larger than the error of the whole the error of one row may be


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, and the gradients that arrive at its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    h0: Tensor | None = None
    dht: Tensor | None = None
    cu_seqlens: Tensor | None = None
    g_gamma: Tensor | None = None
    scale: float | None = None
    reverse: bool = False

    def part(self, rows: list[int], heads: list[int]) -> Problem:
        """The same for some rows of the batch and some heads of k and v, which know nothing of the others."""
        rates = retnet_rates(self.k.shape[2]).to(self.q.device) if self.g_gamma is None else self.g_gamma
        sequences = rows if self.cu_seqlens is None else slice(None)
        k, v = (x[rows][:, :, heads] for x in (self.k, self.v))
        group = range(self.q.shape[2] // self.k.shape[2])
        query_heads = [head * len(group) + i for head in heads for i in group]
        q, do = (x[rows][:, :, query_heads] for x in (self.q, self.do))
        h0, dht = (None if x is None else x[sequences][:, heads] for x in (self.h0, self.dht))
        return replace(self, q=q, k=k, v=v, do=do, h0=h0, dht=dht, g_gamma=rates[heads])


def retnet_rates(heads: int) -> Tensor:
    """The natural logarithms of gamma_h = 1 - 2^(-5-h), [H] in float64."""
    return torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64, device="cpu"))))


def make_problem(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    group: int = 1,
    lengths: list[int] | None = None,
    states: bool = True,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Normally distributed inputs; with `lengths` (which add up to T, and B is 1) of packed sequences.

    A `group` of query heads shares each of the H heads of k and v.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal: Callable[..., Tensor] = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    N = B if lengths is None else len(lengths)
    shapes = ((H * group, K), (H, K), (H, V), (H * group, V))
    q, k, v, do = (normal(B, T, *shape).to(dtype) for shape in shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h0, dht = (normal(N, H, K, V).to(wide) if states else None for _ in range(2))
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=device).cumsum(0)
    return Problem(q, k, v, do, h0, dht, cu_seqlens, **options)


# The formulas


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, scale: float, h0: Tensor, *, reverse: bool, operand: None = None
) -> tuple[Tensor, Tensor]:
    """Sequences of one length, token by token: o [B, T, H, V] and the last state [B, H, K, V]."""
    gamma = rates.exp()[:, None, None]
    state, outputs = h0, []
    for t in range(q.shape[1])[:: -1 if reverse else 1]:
        state = gamma * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs[:: -1 if reverse else 1], 1), state


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    scale: float,
    h0: Tensor,
    *,
    reverse: bool,
    operand: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by blocks of tokens; with `operand` every operand of a matrix product is rounded to that dtype."""
    low: Callable[[Tensor], Tensor] = lambda x: x if operand is None else x.to(operand).to(x.dtype)  # noqa: E731
    q, k, v = ((x.flip(1) if reverse else x).transpose(1, 2) for x in (q, k, v))
    rates = rates[:, None]
    state, outputs = h0, []
    for begin in range(0, q.shape[2], BLOCK):
        bq, bk, bv = (x[:, :, begin : begin + BLOCK] for x in (q, k, v))
        n = torch.arange(bq.shape[2], device=q.device, dtype=rates.dtype)
        weights = torch.exp((n[:, None] - n).clamp(min=0) * rates[..., None]).tril()
        from_start = torch.exp((n + 1) * rates)[..., None]
        to_end = torch.exp((len(n) - 1 - n) * rates)[..., None]
        scores = low(low(bq) @ low(bk).mT * weights.to(q.dtype))
        outputs.append(scale * (scores @ low(bv) + from_start.to(q.dtype) * (low(bq) @ low(state))))
        state = torch.exp(len(n) * rates)[..., None].to(q.dtype) * state + low(bk).mT @ low(bv * to_end.to(q.dtype))
    o = torch.cat(outputs, 2).transpose(1, 2)
    return o.flip(1) if reverse else o, state


Formula = Callable[..., tuple[Tensor, Tensor]]


def solve(problem: Problem, *, formula: Formula = recurrence, operand: torch.dtype | None = None) -> dict[str, Tensor]:
    """The outputs and all gradients by a formula: in float64, or in float32 with operands rounded to `operand`."""
    wide = torch.float64 if operand is None else torch.float32
    leaf: Callable[[Tensor], Tensor] = lambda x: x.detach().to(wide).clone().requires_grad_()  # noqa: E731
    q, k, v = leaf(problem.q), leaf(problem.k), leaf(problem.v)
    h0 = None if problem.h0 is None else leaf(problem.h0)
    K, V, H = q.shape[3], v.shape[3], k.shape[2]
    group = q.shape[2] // H
    rates = (retnet_rates(H) if problem.g_gamma is None else problem.g_gamma).to(q.device, torch.float64)
    scale = K**-0.5 if problem.scale is None else problem.scale
    outputs, finals = [], []
    with full_precision():
        for i, (row, tokens) in enumerate(_sequences(problem)):
            start = q.new_zeros(len(q[row]), H, K, V) if h0 is None else h0[row if problem.cu_seqlens is None else [i]]
            parts = q[row, tokens], *(x[row, tokens].repeat_interleave(group, 2) for x in (k, v))
            given = (rates.repeat_interleave(group), scale, start.repeat_interleave(group, 1))
            o, final = formula(*parts, *given, reverse=problem.reverse, operand=operand)
            outputs.append(o)
            finals.append(final[:, ::group])
        results = {"o": torch.cat(outputs, 1), "final_state": torch.cat(finals)}
        gradients = _gradients(results, {"q": q, "k": k, "v": v, "h0": h0}, problem)
    return {name: x.detach() for name, x in {**results, **gradients}.items()}


def _sequences(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """The rows and tokens of sequences that have one length."""
    if problem.cu_seqlens is None:
        yield slice(None), slice(None)
        return
    offsets = problem.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(offsets):
        yield slice(None), slice(begin, end)


def _gradients(results: dict[str, Tensor], leaves: dict[str, Tensor | None], problem: Problem) -> dict[str, Tensor]:
    loss = (results["o"].to(torch.float64) * problem.do).sum()
    if problem.dht is not None:
        loss = loss + (results["final_state"].to(torch.float64) * problem.dht).sum()
    wanted = {f"d{name}": leaf for name, leaf in leaves.items() if leaf is not None}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever the test has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


# What is tested


def run(function: Callable[..., Any], problem: Problem, **options: Any) -> dict[str, Tensor]:
    """The outputs and all gradients that a public function gives."""
    leaf: Callable[[Tensor], Tensor] = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
    q, k, v = leaf(problem.q), leaf(problem.k), leaf(problem.v)
    h0 = None if problem.h0 is None else leaf(problem.h0)
    options = {"scale": problem.scale, "cu_seqlens": problem.cu_seqlens, "g_gamma": problem.g_gamma, **options}
    if problem.h0 is not None:
        options["initial_state"] = h0
    if problem.dht is not None:
        options["output_final_state"] = True
    if problem.reverse:
        options["reverse"] = True
    o, final = function(q, k, v, **options)
    leaves = [x for x in (q, k, v, h0) if x is not None]
    results = (o, final) if problem.dht is not None else (o,)
    grads = torch.autograd.grad(results, leaves, (problem.do, problem.dht)[: len(results)])
    names = ("dq", "dk", "dv", "dh0")
    found = {"o": o.detach(), **dict(zip(names, grads, strict=False))}
    return found if problem.dht is None else {**found, "final_state": final.detach()}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what is allocated without a value with NaN, so that an element that nobody writes is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Comparison:
    """The errors of one result, and what is allowed: of the whole, and of the worst row (of K or V numbers)."""

    name: str
    error: float
    allowed: float
    row_error: float
    row_allowed: float

    @property
    def passed(self) -> bool:
        """Whether both are within what is allowed; NaN is not."""
        return self.error <= self.allowed and self.row_error <= self.row_allowed

    def __str__(self) -> str:
        whole = f"{self.name}: error {self.error:.2e} (allowed {self.allowed:.2e})"
        return f"{whole}, worst row {self.row_error:.2e} (allowed {self.row_allowed:.2e})"


def errors(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """||got - expected|| / ||expected||, and the difference's largest row over the root mean square of the rows."""
    assert got.shape == expected.shape, f"{list(got.shape)} for {list(expected.shape)}"
    rows = (got.to(torch.float64) - expected).norm(dim=-1)
    scale = expected.norm().clamp(min=1e-300)
    return float(rows.norm() / scale), float(rows.max() / scale * rows.numel() ** 0.5)


def compare(
    got: dict[str, Tensor], problem: Problem, *, formula: Formula = recurrence, exact: float = FLOAT32_ERROR
) -> list[Comparison]:
    """Hold results against the oracle: `exact` for float32 and float64, twice a reference's error for the others."""
    dtype = problem.q.dtype
    expected = solve(problem, formula=formula)
    if dtype in (torch.float32, torch.float64):
        return [
            Comparison(name, error, exact, row, WORST_ROW * exact)
            for name in got
            for error, row in [errors(got[name], expected[name])]
        ]
    reference = solve(problem, formula=by_blocks, operand=dtype)
    comparisons = []
    for name, result in got.items():
        error, row = errors(result, expected[name])
        reference_error, reference_row = errors(reference[name].to(result.dtype), expected[name])
        band, row_band = errors(expected[name].to(dtype), expected[name])
        allowed, row_allowed = 2 * reference_error + band, 2 * reference_row + row_band
        comparisons.append(Comparison(name, error, allowed, row, row_allowed))
    return comparisons


def assert_matches(got: dict[str, Tensor], problem: Problem, **options: Any) -> None:
    """Fail with every result's errors if one of them is too large."""
    comparisons = compare(got, problem, **options)
    assert all(one.passed for one in comparisons), "\n".join(map(str, comparisons))


def check(function: Callable[..., Any], problem: Problem, **options: Any) -> None:
    """Outputs and all gradients of a public function match the oracle."""
    assert_matches(run(function, problem, **options), problem)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless two runs agree to the last bit."""
    assert got.keys() == expected.keys()
    for name, result in got.items():
        torch.testing.assert_close(
            result, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
