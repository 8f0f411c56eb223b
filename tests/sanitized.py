"""Launch every shipped configuration for GPUs like this one at small sizes, for NVIDIA's compute-sanitizer to look on.

    compute-sanitizer --tool memcheck python tests/sanitized.py
    compute-sanitizer --tool racecheck python tests/sanitized.py --part 0 8     an eighth of them
    compute-sanitizer --tool memcheck python tests/sanitized.py --planted NAME  what it must find
    compute-sanitizer --tool racecheck python tests/sanitized.py --handed       what it cannot follow

What is launched is what tuning/proof.py launches: ragged and packed sequences, states, both directions, large and tiny
numbers; once each, and not compared with anything: below the sanitizer every other kernel and allocation takes its time
too. Segments are as short as can be, which changes no kernel, and saves tens of thousands of tokens. Of steps it
is every configuration that may be tuned, and by the defaults those whose states go by in pieces, and flushes. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, beside which nothing is anybody's.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
import triton
import triton.language as tl

from generated.configuration import ActiveRule, active_rules
from generated.retention import step_buffered
from generated.retention.step import goes_by_in_pieces, step_update
from tuning.check import TUNED
from tuning.compilation import ARCHS
from tuning.compile_pool import same_kernel
from tuning.device import describe_gpu
from tuning.problems import STEPS, Problem
from tuning.proof import draws, inputs_of
from tuning.verify import Claim, claims_of

SHORT = 128  # tokens a segment: no fewer than the longest chunk of the pass for its states, which so stays as it is


def planted_kernel(x, size, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201 - Triton gives the arguments types
    o = tl.arange(0, BLOCK)
    tl.store(x + size + o, o)


def run_planted(name: str) -> None:
    """Launch what writes beside a tensor, by the name that is given."""
    triton.jit(planted_kernel, repr=lambda _: name)[(1,)](torch.zeros(512, dtype=torch.int32, device="cuda"), 512, 32)
    torch.cuda.synchronize()


def shipped() -> list[Claim]:
    """The points of the rules for GPUs of this architecture, one for all that compile to one kernel."""
    gpu = describe_gpu()
    files: dict[str | None, list[ActiveRule]] = {}
    for rule in active_rules(gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs):
        if rule.kernel in TUNED:
            files.setdefault(rule.device, []).append(rule)
    claims = map(shortened, itertools.chain.from_iterable(map(claims_of, files.values())))
    return list({same_kernel(claim.problem, claim.config): claim for claim in claims}.values())


def shortened(claim: Claim) -> Claim:
    """The claim with segments of a few chunks, where it has any."""
    if getattr(claim.config, "L", claim.problem.T) >= claim.problem.T:
        return claim
    return replace(claim, rule=replace(claim.rule, use={**claim.rule.use, "L": max(SHORT, claim.config.BT)}))


def steps(arch: str) -> list[tuple[Problem, Any]]:
    """Steps whose heads fill no tile, with each configuration: in float32, and where random bits round both others."""
    forms = [form for form, kind in STEPS.items() if kind.is_seeded or kind.dtype == torch.float32]
    problems = [Problem(form, "bfloat16", 1, 1, 1, 24, 72) for form in forms]
    return [(problem, config) for problem in problems for config in problem.sift(ARCHS[arch]).candidates]


def launch(whole: Problem, config: Any, device: str) -> int:
    """Launch all that a proof would; return how often. Inputs are made on the host, which takes no kernels."""
    found = draws(whole, config)
    for number, draw in enumerate(found):
        problem = whole.narrower() if draw.narrower else whole
        inputs, offsets, initial = inputs_of(problem, draw, torch.Generator().manual_seed(number))
        given = [None if x is None else x.to(device) for x in (*inputs, offsets, initial)]
        *tensors, offsets, initial = given
        states = {} if initial is None else {"initial_state": initial, "final_state": torch.empty_like(initial)}
        problem.run(tuple(tensors), config, cu_seqlens=offsets, **states, **draw.order)
    return len(found)


def launch_in_pieces(T: int, G: int, K: int, dtype: torch.dtype, device: str) -> None:
    """A step of so many tokens and queries a state, which are too many for registers; one row is skipped."""
    B, H, V = 64, 2, 72
    assert goes_by_in_pieces(T * G, V, B * H, dtype.itemsize)
    q, k, v = (torch.randn(B, T, heads, width).to(device) for heads, width in ((G * H, K), (H, K), (H, V)))
    state, slots = torch.randn(B, H, K, V).to(device, dtype), torch.arange(-1, B - 1, device=device)
    seed = None if dtype == torch.float32 else torch.tensor([1], device=device)
    rates, o = torch.full((H,), -0.1, device=device), torch.empty(B, T, G * H, V, device=device)
    step_update(q, k, v, rates, None, state, slots, seed, None, o)


def launch_buffered(T: int, dtype: torch.dtype, device: str) -> None:
    """Steps of so many tokens until all rows have folded but one, which is skipped, and a flush."""
    B, H, K, V, L = 3, 2, 24, 72, 16
    q, k, v = (torch.randn(B, T, heads, width).to(device) for heads, width in ((2 * H, K), (H, K), (H, V)))
    state = torch.randn(B, H, K, V).to(device, dtype)
    buffers = [torch.empty(B, 2 * L, H, width, device=device) for width in (K, V)]
    lengths, folded = torch.tensor([5, 0, 30], device=device), torch.tensor([5, 0, 30], device=device)
    given = {"state_indices": torch.tensor([2, -1, 0], device=device)}
    given["seed"] = None if dtype == torch.float32 else torch.tensor([1], device=device)
    rates, scale, o = torch.full((H,), -0.1, device=device), None, torch.empty(B, T, 2 * H, V, device=device)
    for _ in range(L // T + 1):
        tensors = (state, *buffers, lengths, folded, *given.values(), o)
        step_buffered.step_buffered_update(q, k, v, rates, scale, *tensors)
        folded, lengths = torch.where(lengths - folded + T > L, lengths, folded), lengths + T
    step_buffered.retention_step_flush(state, *buffers, lengths, folded, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Launch what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every Nth, from the Ith")
    parser.add_argument("--without", metavar="FORM", help="leave this form out")
    parser.add_argument("--planted", metavar="NAME", help="a kernel of this name that writes beside a tensor instead")
    parser.add_argument("--handed", action="store_true", help="numbers handed over in shared memory instead")
    options = parser.parse_args(argv)
    if options.planted:
        run_planted(options.planted)
        return 0
    if options.handed:
        importlib.import_module("handed_over").hand_over()
        return 0
    first, step = options.part
    every = [*((claim.problem, claim.config) for claim in shipped()), *steps(describe_gpu().arch)]
    every = [(problem, config) for problem, config in every if problem.form != options.without][first::step]
    for problem, config in every:
        begin = time.monotonic()
        launched = launch(problem, config, "cuda")
        torch.cuda.synchronize()
        print(f"{problem} {config}: launched {launched}, {time.monotonic() - begin:.1f} s", flush=True)
    print(f"{len(every)} configurations", flush=True)
    if first == 0:
        for T, dtype in itertools.product((1, 3, 5, 16), (torch.float32, torch.bfloat16)):
            for G, K in ((1 if T == 5 else 2 + 4 // T, 64), (17, 24)):
                launch_in_pieces(T, G, K, dtype, "cuda")
            launch_buffered(T, dtype, "cuda")
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
