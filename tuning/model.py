"""A closed-form estimate of a configuration's time: to rank candidates before compiling, and where there is no GPU.

A launch is `programs` that each take `steps`; a multiprocessor holds `blocks` of them at once, so the launch takes
waves = programs / (blocks * multiprocessors), rounded up. A step of all blocks on one multiprocessor takes the longest
of

    its FLOPs / the multiprocessor's share of the matrix rate,
    its bytes / the multiprocessor's share of twice the memory rate (neighbours share operands in L2),
    the latency of a step's dependent chain, which pipelining by stages hides in part.

The figures are an H100's, measured (3.0 TB/s copy, 745 TFLOP/s); other architectures' are three quarters of their
datasheets'. It ranks; it is not a promise of milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from generated.launch import blocks, padded
from generated.retention import fused_chunk, fused_chunk_hopper
from tuning.compilation import Arch, Resources
from tuning.problems import BUFFERED, GRADIENTS, HOPPER, SEGMENTED, STATES_SEGMENT, STEPS, Problem

STEP_LATENCY_MS = 1.2e-3
TOKEN_LATENCY_MS = 0.5e-3
LAUNCH_MS = 3e-3
MEASURED = "sm90"  # the architecture whose figures are, and on which the landscapes hold the model


@dataclass(frozen=True)
class Rates:
    """A GPU's multiprocessors, and its memory bytes and matrix FLOPs (16-bit) a millisecond."""

    sms: int
    bytes_per_ms: float
    flops_per_ms: float


RATES = {
    "sm80": Rates(108, 1.5e9, 234e9),
    "sm86": Rates(84, 0.7e9, 107e9),
    "sm89": Rates(128, 0.75e9, 124e9),
    "sm90": Rates(132, 3.0e9, 745e9),
    "sm100": Rates(148, 6.0e9, 1690e9),
    "sm120": Rates(170, 1.3e9, 157e9),
}


@dataclass(frozen=True)
class Work:
    """What a launch does: programs, steps of each, and a step's FLOPs, bytes and latency in milliseconds."""

    programs: int
    steps: float
    flops: float
    bytes: float
    latency: float


def predict(problem: Problem, config: Any, arch: Arch, needs: Resources | None = None) -> float:
    """Estimated milliseconds; before compilation (no `needs`) resources come from the space's estimates."""
    rates, work = RATES[arch.name], _work(problem, config)
    needs = needs or estimate(problem, config, arch)
    blocks = max(1, needs.blocks_per_sm(arch))
    waves = -(-work.programs // (blocks * rates.sms))
    resident = min(blocks, -(-work.programs // rates.sms))
    slowdown = 1.0 if problem.dtype != "float32" else 6.0  # three TF32 products at half the rate
    step = max(
        resident * work.flops * slowdown * rates.sms / rates.flops_per_ms,
        resident * work.bytes * rates.sms / (2 * rates.bytes_per_ms),
        work.latency,
    )
    parts = _parts(problem, config)
    in_segments = problem.form in SEGMENTED and config.L < problem.T
    launches = parts + 2 * in_segments + (problem.form == "chunk_states") + getattr(config, "scores", 0)
    spilled = 1 + needs.spills / 256  # every spilled word goes through memory and back
    return (
        spilled * waves * work.steps * step
        + launches * LAUNCH_MS
        + (_states_traffic(problem, config) + _scores_traffic(problem, config) + _sums_traffic(problem, parts))
        / rates.bytes_per_ms
    )


def estimate(problem: Problem, config: Any, arch: Arch) -> Resources:
    """What a program will need, by the space's formulas."""
    return problem.space.needs.estimate(problem.place(arch), config)


def _work(problem: Problem, config: Any) -> Work:
    K, V, T, size = problem.K, problem.V, problem.T, problem.torch_dtype.itemsize
    rows = problem.B * problem.H
    if problem.form == "fused_recurrent":
        programs = blocks(V, config.BV) * rows
        latency = TOKEN_LATENCY_MS * (1 + K * config.BV / (32 * config.num_warps) / 64)
        return Work(programs, T, 0.0, size * (2 * K + config.BV), latency)
    if problem.form in STEPS:
        programs = blocks(V, config.BV) * rows
        latency = T * TOKEN_LATENCY_MS * (1 + K * config.BV / (32 * config.num_warps) / 64)
        kind = STEPS[problem.form]
        passes = 1 if kind.is_buffered else 2  # read, and written at each step, and shared with no neighbour
        state = passes * K * config.BV * kind.dtype.itemsize
        held = kind.is_buffered * BUFFERED // 2 * size * (K + config.BV)  # in the mean
        return Work(programs, 1.0, 0.0, 2 * state + held + T * size * (2 * K + config.BV), latency)
    hidden = STEP_LATENCY_MS * (1.0 if config.num_stages == 1 else 0.7)
    if problem.form == "chunk_states":
        length = min(T, STATES_SEGMENT)
        programs = blocks(V, config.BV) * blocks(K, config.BK) * blocks(T, length) * rows
        flops = 2.0 * config.BT * config.BK * config.BV
        return Work(programs, length / config.BT, flops, size * config.BT * (config.BK + config.BV), hidden)
    if problem.form == "parallel":
        programs = blocks(V, config.BV) * blocks(T, config.BT) * rows
        flops = 2.0 * config.BT * config.BS * (K + config.BV)
        return Work(programs, max(1.0, T / 2 / config.BS), flops, size * config.BS * (K + config.BV), hidden)
    length = min(T, getattr(config, "L", T))
    sweeps = 3 if problem.form == GRADIENTS else 1
    BK, BV = _state_tile(problem, config)
    programs = sweeps * blocks(V, BV) * blocks(T, length) * rows
    scored = BV if getattr(config, "scores", 0) else BK + BV
    flops = 2.0 * config.BT * (config.BT * scored + 2 * BK * BV)
    steps = _parts(problem, config) * length / config.BT
    return Work(programs, steps, flops, size * config.BT * (2 * BK + 2 * BV), 1.5 * hidden)


def _state_tile(problem: Problem, config: Any) -> tuple[int, int]:
    """Rows and columns of the state that a program of a sweep in chunks has."""
    if problem.form == HOPPER:
        return padded(problem.K), fused_chunk_hopper.columns_at(problem.K)
    return fused_chunk.state_rows(problem.K, config), config.BV


def _states_traffic(problem: Problem, config: Any) -> float:
    """Bytes of the segments' states, which a scan reads and writes anew, and of k and v, read for them once more."""
    L = STATES_SEGMENT if problem.form == "chunk_states" else getattr(config, "L", problem.T)
    if problem.form not in (*SEGMENTED, "chunk_states") or L >= problem.T:
        return 0.0
    rows, size = problem.B * problem.H, problem.torch_dtype.itemsize
    stored = rows * (problem.T / L) * problem.K * problem.V * 4
    if problem.form == "chunk_states":
        return float(3 * stored)
    return float(4 * stored + rows * problem.T * (problem.K + problem.V) * size)


def _scores_traffic(problem: Problem, config: Any) -> float:
    """Bytes of q and k, read again for the chunks' scores, and of these, written once and read by each block of v."""
    if not getattr(config, "scores", 0):
        return 0.0
    _, BV = _state_tile(problem, config)
    stored = config.BT * (1 + blocks(problem.V, BV))
    return float(problem.B * problem.H * problem.T * (2 * problem.K + stored) * problem.torch_dtype.itemsize)


def _sums_traffic(problem: Problem, parts: int) -> float:
    """Bytes of the float32 sums that each part of K but the last leaves to the next."""
    return float(2 * 4 * (parts - 1) * problem.B * problem.H * problem.T * problem.V)


def _parts(problem: Problem, config: Any) -> int:
    """How many launches, one after the other, share K between them."""
    if not getattr(config, "transposed", 0):
        return 1
    BK, _ = _state_tile(problem, config)
    return blocks(problem.K, BK)
