"""What a configuration must pass before a rule names it: draws that each look for a way in which kernels go wrong.

Every draw holds outputs and states against float64, head by head, and asks for the same bits twice; so does the
problem's own shape, of which float64 sees two rows. The second time the memory is busy with another stream's writes:
what a kernel does not wait for comes too late. All runs in memory full of NaN: an element that nobody wrote is one, and
so is what comes of reading beside a tensor. Writes there are seen.

Of a step each number of a state must be one of those next to what float64 makes of it, the nearest unless a seed rounds
it, and of a pool, of buffers and of skipped rows nothing else may change.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from generated.arguments import MOST_STEPS
from generated.retention.fused_chunk_hopper import LONGEST
from tuning.oracle import buffered_reference, gradients_reference, segment_states, steps_reference, sweep_reference
from tuning.problems import (
    BUFFERED,
    GRADIENTS,
    HOPPER,
    SEED,
    STATE,
    STATES_SEGMENT,
    STEPS,
    WITH_STATES,
    Problem,
    StepInputs,
)
from tuning.timing import flush_buffer

# The largest relative error against float64 that is taken for rounding: a few units of each dtype.
ERROR_LIMITS = {"bfloat16": 1e-2, "float16": 1.3e-3, "float32": 1e-5}
# Of a state that only grows: the inputs' roundings cancel out in it, and those of a sum in 16 bits do not.
STEADY_LIMITS = {"bfloat16": 1e-3, "float16": 2e-4, "float32": 5e-6}
# Of the decay in float32, by which a head that forgets nothing may be off, a token: rounded once a chunk, or each time.
DECAY_ROUNDING, TOKEN_ROUNDING = 2.0**-28, 2.0**-24
LEAST_OUTPUT = 0.1  # of what a token adds to its own output: what a head's elements count at least
SIZES = {"bfloat16": 20, "float16": 2, "float32": 20}  # how many powers of two up and down the inputs may be
# A slow decay, none, one that forgets within a chunk, and one between: tokens of four heads begin where TMA reads, also
# where a head has half a multiple of 16 bytes.
RATES = (math.log1p(-(2.0**-5)), 0.0, -3.0, -0.25)
MARGIN = 2048  # bytes on either side of a tensor; a multiple of what tensors are aligned at
TOKENS = 333  # ragged for every chunk
WHOLE_TOKENS = 320  # whole chunks, of all lengths
# Slots of a draw's rows, of which two are skipped, and of the pool; of a buffered step's three more, by their counts.
STEP_ROWS, SLOTS = (3, -1, 0, 6), 6
BUFFERED_ROWS, BUFFERED_SLOTS = (3, -1, 0, 11, 5, 1, 8, 2, 4, 7), 11
ROWS_AT_ONCE = 4  # of a step's, before float64
# What seeds round up and down may differ by: so many standard deviations, of which none is over half a unit, and what
# float32's sums are off by, in units.
DEVIATIONS, SUM_SHARE = 5, 1e-3
TRAFFIC = 16  # times that the L2 cache is written over beside a draw's run: 0.8 ms on an H100


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
    turned: bool = False
    narrower: bool = False
    L: int = 0  # tokens a segment, where it is not the configuration's
    group: int = 1  # of a step, query heads a state
    only: tuple[str, ...] = ()  # options that a step alone has

    @property
    def order(self) -> dict[str, Any]:
        """The options of `Problem.run`, but for tensors."""
        order = {"reverse": self.reverse, "adjoint": self.adjoint, "turned": self.turned}
        return order | ({"L": self.L} if self.L else {}) | dict.fromkeys(self.only, True)


def draws(problem: Problem, config: Any) -> list[Draw]:
    """The draws of a problem: what its form knows nothing of (states, packed sequences) is left out."""
    if problem.form in STEPS:
        return step_draws(problem)
    segment = STATES_SEGMENT if problem.form == "chunk_states" else getattr(config, "L", 0)
    # More than two segments, where there are any: at the start of the third a state has decayed over one.
    tokens = 2 * segment + TOKENS if 0 < segment < problem.T else TOKENS
    size = SIZES[problem.dtype]
    found = [
        Draw("from the first token", (tokens,)),
        Draw("from the last token", (tokens,), reverse=True),
        *([] if problem.narrower() == problem else [Draw("narrower heads", (tokens,), narrower=True)]),
        *([] if problem.form == "chunk_states" else [Draw("one token", (1,))]),  # which has no second segment
        Draw("large numbers", (TOKENS,), log2_size=size),
        Draw("tiny numbers", (TOKENS,), log2_size=-size),
    ]
    states = problem.form in WITH_STATES
    if problem.form == HOPPER:  # without a partial chunk it is another kernel
        whole = tokens - TOKENS + WHOLE_TOKENS
        found += [
            Draw("whole chunks", (whole,)),
            Draw("whole chunks from the last token", (whole,), reverse=True),
            Draw("one chunk", (LONGEST,)),
            Draw("large numbers, whole chunks", (WHOLE_TOKENS,), log2_size=size),
            Draw("tiny numbers, whole chunks", (WHOLE_TOKENS,), log2_size=-size),
        ]
    if getattr(config, "scores", 0):  # of whole chunks, the gradient of k reads those of q's
        turned = (tokens // config.BT * config.BT,)
        found.append(Draw("scores turned", turned, reverse=True, turned=True))
        if states:
            found.append(Draw("scores turned, states", turned, states=True, adjoint=True, reverse=True, turned=True))
        found.append(Draw("scores of both, from the last token", (tokens,), reverse=True, turned=True))
    if states:
        found.append(Draw("states", (tokens,), states=True, steady=True))
    if problem.form != "chunk_states":
        packed = (1, 64, tokens, 63, 2)
        found.append(Draw("packed", packed, states=states, adjoint=states))
        found.append(Draw("packed, from the last token", packed, states=states, adjoint=states, reverse=True))
        if getattr(config, "scores", 0):
            both: dict[str, Any] = {"states": states, "adjoint": states, "turned": True}
            found.append(Draw("packed, scores of both", packed, **both))
            found.append(Draw("packed, scores of both, from the last token", packed, reverse=True, **both))
        if problem.form == HOPPER and tokens == TOKENS:  # uneven ones are cut all the same
            found.append(Draw("packed, cut", packed, L=LONGEST))
            found.append(Draw("packed, cut, from the last token", packed, reverse=True, L=LONGEST))
    # Heads that don't fill HOPPER's tiles have kernels of their own.
    if problem.form == HOPPER and problem.narrower() != problem:
        alike = [draw for draw in found if draw.name in ("whole chunks", "packed", "packed, cut", "scores turned")]
        found += [replace(draw, name=f"narrower heads, {draw.name}", narrower=True) for draw in alike]
    return found


def step_draws(problem: Problem) -> list[Draw]:
    """The draws of a step by rules: with buffers of one token, else of more too."""
    kind, is_narrow = STEPS[problem.form], problem.narrower() == problem
    size = min(SIZES[name] for name in (problem.dtype, _name(kind.dtype)))
    tokens = (1 if kind.is_buffered else 3,)
    found = [
        Draw("one token", (1,)),
        *([] if kind.is_buffered else [Draw("most tokens", (MOST_STEPS,))]),
        *([] if is_narrow else [Draw("narrower heads", tokens, narrower=True)]),
        Draw("large numbers", tokens, log2_size=size),
        Draw("tiny numbers", tokens, log2_size=-size),
        Draw("rows in their own slots", tokens, only=("in_rows",)),
        Draw("slots of 32 bits", tokens, only=("int32",)),
    ]
    if kind.is_buffered:
        return found
    return [
        *found,
        Draw("states after each token", (5,), only=("kept",)),
        Draw("grouped heads", (3,), group=3),
        Draw("grouped heads, states after each token", (3,), group=3, only=("kept",)),
    ]


def prove(problem: Problem, config: Any, extra: dict[str, Any], device: str) -> float:
    """The largest error of all draws; ArithmeticError names the draw that found a fault, and the fault."""
    worst = 0.0
    for number, draw in enumerate(draws(problem, config)):
        try:
            worst = max(worst, _examine(problem, config, extra, draw, torch.Generator(device).manual_seed(number)))
        except ArithmeticError as fault:
            raise ArithmeticError(f"{draw.name}: {fault}") from None
    return worst


def prove_whole(
    problem: Problem, config: Any, extra: dict[str, Any], full: tuple[Tensor, ...], *, apart: bool = True
) -> float:
    """The largest error at the problem's own shape, of the first row of the batch and of the last; or ArithmeticError.

    Programs of different rows do the same work, so each row must give the same bits in the next one's place: what is
    wrong in one alone is found without float64. `apart`: see `guarded_runs`.
    """
    if problem.form in STEPS:
        x = StepInputs.of(problem.form, full)
        kinds = [x, *([x.all_folding] if x.counts else [])]
        return max(_hold_step(problem, config, one.listed, extra, apart=apart, traffic=8 * TRAFFIC) for one in kinds)
    *tensors, rates = full
    once, again = guarded_runs(problem, config, full, [extra, extra], apart=apart, traffic=8 * TRAFFIC)
    if not same_bits(once, again):
        raise ArithmeticError("two runs on the same inputs differ at the full shape")
    ends = [0, -1][: problem.B]
    expected = reference(problem, (*(x[ends] for x in tensors), rates))
    got = [torch.unflatten(x, 0, (problem.B, -1))[ends].flatten(0, 1) for x in once]
    errors, limit = _errors(problem, got, expected), error_limit(problem.form, problem.dtype, problem.T)
    if not all(error < limit for error in errors):
        raise ArithmeticError(f"wrong result at the full shape: relative errors {errors}, allowed {limit:.1e}")
    if problem.B > 1:
        (moved,) = guarded_runs(problem, config, (*(x.roll(1, 0) for x in tensors), rates), [extra], apart=apart)
        if not same_bits(moved, [x.roll(len(x) // problem.B, 0) for x in once]):
            raise ArithmeticError("wrong result at the full shape: a row of the batch differs in the next one's place")
    return max(errors)


def limits_of(problem: Problem) -> list[float]:
    """The largest relative errors of a problem's results that are taken for rounding."""
    if kind := STEPS.get(problem.form):  # whose states have a dtype of their own
        outputs = [ERROR_LIMITS[problem.dtype]] * (1 + 2 * kind.is_buffered)
        return [*outputs, ERROR_LIMITS[_name(kind.dtype)]]
    return [ERROR_LIMITS[problem.dtype]] * (3 if problem.form == GRADIENTS else 1)


def error_limit(form: str, dtype: str, tokens: int) -> float:
    """The largest relative error, of sequences of so many tokens, that is taken for rounding."""
    by_token = form == "fused_recurrent" and dtype != "float32"  # which keeps it exact there
    return ERROR_LIMITS[dtype] + tokens * (TOKEN_ROUNDING if by_token else DECAY_ROUNDING)


def guarded_runs(
    problem: Problem,
    config: Any,
    inputs: Sequence[Tensor],
    orders: Sequence[dict[str, Any]],
    *,
    initial: Tensor | None = None,
    apart: bool = True,
    traffic: int = 0,
) -> list[list[Tensor]]:
    """The results of a run with each of some options, the last of a step, or from an initial state, the final one.

    ArithmeticError if an input was written to, or what lies beside a tensor. Without `apart` the inputs are not copied
    to where this is seen, which saves their memory. `traffic`: how often the L2 cache is written over beside each run
    but the first.
    """
    guard, runs = Guard(), list[list[Tensor]]()
    originals = [*inputs, *([] if initial is None else [initial])]
    given = [guard.copy(x) for x in originals] if apart else originals
    start = inputs[STATE] if problem.form in STEPS else initial
    for options in orders:
        final = [] if start is None else [guard.copy(torch.full_like(start, math.nan))]
        states = {"final_state": final[0]} if final else {}
        states |= {} if initial is None else {"initial_state": given[-1]}
        with guard, crowded_memory(inputs[0].device, traffic if runs else 0):
            results = problem.run(tuple(given[: len(inputs)]), config, **states, **options)
        runs.append([*results, *final])
    if not same_bits(given, originals):
        raise ArithmeticError("an input was written to")
    guard.check()
    return runs


@contextlib.contextmanager
def crowded_memory(device: torch.device, times: int) -> Iterator[None]:
    """From its beginning on another stream writes over the L2 cache so many times; on a CPU nothing does."""
    if device.type != "cuda" or not times:
        yield
        return
    here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for _ in range(times):
            flush_buffer().zero_()
    try:
        yield
    finally:
        here.wait_stream(beside)


def _examine(problem: Problem, config: Any, extra: dict[str, Any], draw: Draw, generator: torch.Generator) -> float:
    problem = problem.narrower() if draw.narrower else problem
    inputs, offsets, initial = inputs_of(problem, draw, generator)
    order = {"cu_seqlens": offsets, **draw.order, **extra}
    if problem.form in STEPS:
        return _hold_step(problem, config, inputs, order, unit=2.0 ** (3 * draw.log2_size))
    once, again = guarded_runs(problem, config, inputs, [order, order], initial=initial, traffic=TRAFFIC)
    limits = [ERROR_LIMITS[problem.dtype]] * len(once)
    if draw.steady:
        limits[-1] = STEADY_LIMITS[problem.dtype]
    errors = _errors(problem, once, _expected(problem, draw, inputs, offsets, initial), 2.0 ** (3 * draw.log2_size))
    if not all(error < limit for error, limit in zip(errors, limits, strict=True)):
        shown = ", ".join(f"{error:.1e} of {limit:.1e}" for error, limit in zip(errors, limits, strict=True))
        raise ArithmeticError(f"wrong result: relative errors {shown} allowed")
    if not same_bits(once, again):
        raise ArithmeticError("two runs on the same inputs differ")
    return max(errors)


def inputs_of(
    problem: Problem, draw: Draw, generator: torch.Generator
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """q, k, v (for gradients also do) and the decays, the offsets of packed sequences, and the initial states.

    Of a step, its inputs. On the device of the generator.
    """
    if problem.form in STEPS:
        return _step_inputs(problem, draw, generator), None, None
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


def _step_inputs(problem: Problem, draw: Draw, generator: torch.Generator) -> list[Tensor]:
    device, heads, (tokens,), kind = generator.device, len(RATES), draw.lengths, STEPS[problem.form]
    rows, pool = (BUFFERED_ROWS, BUFFERED_SLOTS) if kind.is_buffered else (STEP_ROWS, SLOTS)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator) * 2.0**draw.log2_size
        return x.to(problem.torch_dtype)

    q = normal(len(rows), tokens, draw.group * heads, problem.K)
    k, v = (normal(len(rows), tokens, heads, width) for width in (problem.K, problem.V))
    state = torch.randn(pool, heads, problem.K, problem.V, device=device, generator=generator)
    state = (state * 2.0 ** (2 * draw.log2_size)).to(kind.dtype)
    slots, seed = torch.tensor(rows, device=device), torch.tensor([SEED], device=device) if kind.is_seeded else None
    given = StepInputs(q, k, v, state, (), (), slots, seed, torch.tensor(RATES, device=device))
    if kind.is_buffered:
        lengths, folded = counts = _counts(draw, device)
        buffers = [normal(pool, 2 * BUFFERED, heads, width) for width in (problem.K, problem.V)]
        places = torch.arange(2 * BUFFERED, device=device)
        is_token = (places - folded[:, None]) % len(places) < (lengths - folded)[:, None]
        own = _slots_of(given, draw.order)
        has_slot = _has_slot(given, own)
        is_empty = torch.ones(pool, len(places), dtype=torch.bool, device=device)
        is_empty[own[has_slot]] = ~is_token[has_slot]
        nothing = [x.masked_fill(is_empty[:, :, None, None], math.nan) for x in buffers]
        given = replace(given, buffers=(*nothing,), counts=counts)
    return [*given.listed]


def _counts(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lengths and folded, of rows that just fold and just do not, that hold nothing and all, and that are skipped."""
    (tokens,) = draw.lengths
    held = [BUFFERED, 5, BUFFERED - tokens, 5, BUFFERED - tokens + 1, 0, 3, BUFFERED + 1, 2, -1]
    folded = [29 + 7 * n for n in range(len(held))]  # so that some lie over the buffers' ends
    folded[6] = folded[6] if "int32" in draw.only else 2**31 + 3
    folded[8] = -1
    first = torch.tensor(folded, device=device)
    return first + torch.tensor(held, device=device), first


def _hold_step(
    problem: Problem,
    config: Any,
    inputs: Sequence[Tensor],
    order: dict[str, Any],
    *,
    unit: float = 1.0,
    apart: bool = True,
    traffic: int = TRAFFIC,
) -> float:
    """The largest error of a step's outputs, of which and of whose states float64 sees every row; or ArithmeticError.

    `unit`: the size of what a token adds to its own output.
    """
    once, again = guarded_runs(problem, config, inputs, [order, order], apart=apart, traffic=traffic)
    if not same_bits(once, again):
        raise ArithmeticError("two runs on the same inputs differ")
    error, x = _step_error(problem, inputs, once, order, unit), StepInputs.of(problem.form, inputs)
    if x.seed is not None:  # by another seed, of whose bits the upper half alone is another
        others = replace(x, seed=x.seed + 2**32).listed
        (other,) = guarded_runs(problem, config, others, [order], apart=apart)
        if _is_stored(x, _slots_of(x, order)).any() and same_bits(once[1:], other[1:]):
            raise ArithmeticError("wrong result: two seeds give the same states")
        error = max(error, _step_error(problem, others, other, order, unit))
    return error


def _step_error(
    problem: Problem, inputs: Sequence[Tensor], results: Sequence[Tensor], order: dict[str, Any], unit: float
) -> float:
    x = StepInputs.of(problem.form, inputs)
    o, *others, final = results
    kept, buffers = ([], others) if x.counts else (others, [])
    slots = _slots_of(x, order)
    is_used, is_stored = _is_used(x, slots), _is_stored(x, slots)
    is_left = torch.ones(len(x.state), dtype=torch.bool, device=o.device)
    is_left[slots[is_stored]] = False
    if not same_bits([final[is_left]], [x.state[is_left]]):
        raise ArithmeticError("wrong result: the state of a slot that no row stores is another one")
    if o[~is_used].any() or not all(each[~is_used].isnan().all() for each in kept):
        raise ArithmeticError("wrong result: a row that is skipped has an output that is not 0, or a state")
    if not same_bits(buffers, _buffers_after(x, slots)):
        raise ArithmeticError("wrong result: buffers have something else than what they had and the new tokens")
    worst, grown, stored = 0.0, 0.0, 0
    limit, is_seeded = ERROR_LIMITS[problem.dtype], x.seed is not None
    for rows in torch.split(torch.where(is_used)[0], ROWS_AT_ONCE):
        expected, states, last = _steps_after(problem, x, slots, rows)
        error = head_error(o[rows], expected, 2, LEAST_OUTPUT * unit)
        if not error < limit:
            raise ArithmeticError(f"wrong result: relative error {error:.1e} of {limit:.1e} allowed")
        worst, which = max(worst, error), is_stored[rows]
        for got, right in ((final[slots[rows]][which], last[which]), *((each[rows], states) for each in kept)):
            grown += _growth(got, right, is_seeded=is_seeded)
            stored += got.numel()
    if is_seeded and stored and not abs(grown) < SUM_SHARE * stored + DEVIATIONS * 0.5 * math.sqrt(stored):
        raise ArithmeticError(f"wrong result: seeds change states by {grown / stored:.1e} units in the mean")
    return worst


def _slots_of(x: StepInputs, order: dict[str, Any]) -> Tensor:
    return torch.arange(len(x.q), device=x.q.device) if order.get("in_rows") else x.slots


def _has_slot(x: StepInputs, slots: Tensor) -> Tensor:
    return (slots >= 0) & (slots < len(x.state))


def _is_used(x: StepInputs, slots: Tensor) -> Tensor:
    """Which rows are not skipped."""
    is_used = _has_slot(x, slots)
    if x.counts:
        lengths, folded = x.counts
        is_used = is_used & (folded >= 0) & (lengths >= folded) & (lengths <= folded + BUFFERED)
    return is_used


def _is_stored(x: StepInputs, slots: Tensor) -> Tensor:
    """Which rows' states are stored: of a buffered step those with which the new tokens do not find room."""
    is_stored = _is_used(x, slots)
    if x.counts:
        lengths, folded = x.counts
        is_stored = is_stored & (lengths - folded + x.q.shape[1] > BUFFERED)
    return is_stored


def _buffers_after(x: StepInputs, slots: Tensor) -> list[Tensor]:
    """Of a buffered step what the buffers hold then: token p in row p % (2 L)."""
    found, is_used = [], _is_used(x, slots)
    for buffer, new in zip(x.buffers, (x.k, x.v), strict=False):
        places = (x.counts[0][:, None] + torch.arange(new.shape[1], device=new.device)) % (2 * BUFFERED)
        found.append(buffer.clone())
        found[-1][slots[is_used, None], places[is_used]] = new[is_used]
    return found


def _steps_after(problem: Problem, x: StepInputs, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What float64 makes of some rows: outputs, the states after each token, and those that are stored at the end."""
    start = x.state[slots[rows]]
    if x.counts:
        k_buffer, v_buffer = (each[slots[rows]] for each in x.buffers)
        lengths, folded = (each[rows] for each in x.counts)
        start = buffered_reference(start, k_buffer, v_buffer, lengths, folded, x.g_gamma)
    o, states = steps_reference(x.q[rows], x.k[rows], x.v[rows], start, x.g_gamma, problem.K**-0.5)
    return o, states, start if x.counts else states[:, -1]


def _growth(got: Tensor, exact: Tensor, *, is_seeded: bool) -> float:
    """By how many units of their last places states [..., K, V] are too large in all; near 0 of float32's error.

    ArithmeticError where one is off by more than one for a seed, half a one to the nearest, and what float32's sum is.
    """
    limits = torch.finfo(got.dtype)
    unit = limits.eps * torch.exp2(exact.abs().clamp(min=limits.tiny).log2().floor())
    off = got.double() - exact
    of_sums = ERROR_LIMITS["float32"] * exact.abs().amax((-2, -1), keepdim=True)
    allowed = (1.0 if is_seeded else 0.5) * unit + of_sums
    if not (off.abs() <= allowed).all():
        worst = float((off.abs() / allowed).max())
        raise ArithmeticError(f"wrong result: a state is off by {worst:.1e} of what rounding allows")
    return float((off * exact.sign() / unit.maximum(of_sums)).sum())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    if initial is None:
        return list(reference(problem, (*tensors, rates), reverse=draw.reverse))
    q, k, v = tensors
    scale = problem.K**-0.5
    # A gradient's state has undergone the decay of the token that it arrives at, and the scale.
    factor = scale * torch.exp(rates.double())[:, None, None] if draw.adjoint else 1.0
    start = initial.double() / factor
    o, final = sweep_reference(q, k, v, rates, scale, reverse=draw.reverse, initial_state=start)
    return [o, final * factor]


def reference(problem: Problem, inputs: tuple[Tensor, ...], *, reverse: bool = False) -> tuple[Tensor, ...]:
    """What float64 makes of a problem's inputs."""
    if problem.form in STEPS:
        x = StepInputs.of(problem.form, inputs)
        o, _, last = _steps_after(problem, x, x.slots, torch.arange(len(x.q), device=x.q.device))
        is_stored = _is_stored(x, x.slots)
        final = x.state.double().index_copy(0, x.slots[is_stored], last[is_stored])
        return o, *_buffers_after(x, x.slots), final
    q, k, v, *do, g_gamma = inputs
    if problem.form == "chunk_states":
        return (segment_states(k, v, g_gamma, STATES_SEGMENT, reverse=reverse),)
    if problem.form == GRADIENTS:
        return gradients_reference(q, k, v, do[0], g_gamma, problem.K**-0.5, reverse=reverse)
    return (sweep_reference(q, k, v, g_gamma, problem.K**-0.5, reverse=reverse)[0],)


def _errors(problem: Problem, got: Sequence[Tensor], expected: Sequence[Tensor], unit: float = 1.0) -> list[float]:
    """Of each result the largest relative error of a head; `unit`: the size of what a token adds to its own output."""
    # [B, T, H, V], or [B, segments - 1, H, K, V]; the others are states [N, H, K, V].
    outputs = 3 if problem.form == GRADIENTS else 1
    unit = 0.0 if problem.form == "chunk_states" else unit
    return [
        head_error(x, y, 2, LEAST_OUTPUT * unit) if number < outputs else head_error(x, y, 1)
        for number, (x, y) in enumerate(zip(got, expected, strict=True))
    ]


def head_error(got: Tensor, expected: Tensor, axis: int, least: float = 0.0) -> float:
    """The largest relative error of a head (of which `axis` counts) by its own norm; NaN if there is one.

    A head's elements count as no smaller than `least`, in the mean: the output of a few tokens may be near 0 by chance.
    """
    if got.shape != expected.shape:
        raise ArithmeticError(f"wrong result: shape {list(got.shape)}, not {list(expected.shape)}")
    others = [dim for dim in range(expected.dim()) if dim != axis]
    difference, size = (torch.linalg.vector_norm(x, dim=others) for x in (got - expected, expected))
    floor = least * math.sqrt(expected.numel() // expected.shape[axis])
    return float((difference / size.clamp(min=max(floor, 1e-300))).max())


def same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors are the same, NaN included."""
    return all(torch.equal(_bits(x), _bits(y)) for x, y in zip(some, others, strict=True))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


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
        changed = [(_bits(side) != _bits(torch.full_like(side, math.nan))).any() for side in sides]
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
