"""The problems that configurations are tried on: one kernel of one form, with inputs of one shape.

Every kernel runs the same mathematics, a sweep (see generated/retention/operators.py), so a problem is told by the
sweep's own widths: the output and the gradient of v sweep with K and V, the gradients of q and k with the two
exchanged. Where the two are equal, one launch can run the gradients' three sweeps, which is a kernel of its own. The
direction is an argument of the kernels and changes no instruction: it is checked both ways and timed forwards.

A step is no sweep: its inputs hold states too, which it updates where they lie, in slots of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from generated.arguments import MOST_STEPS
from generated.launch import padded
from generated.retention import auto, chunk, fused_chunk, fused_chunk_hopper, fused_recurrent, parallel, step
from tuning.compilation import Arch
from tuning.oracle import retnet_rates
from tuning.space import SPACES, Place, Sifted, Space
from tuning.workloads import Workload

FAMILY = "retention"
STEPS = {
    kernel.removeprefix(f"{FAMILY}_"): kind for kind, kernel in step.KERNELS.items()
}  # state's dtype, seed or none
FREE_SLOTS = 3  # of a step's pool
SEED = 7
STATE = 3  # which of a step's inputs holds its states
STATES_SEGMENT = 256  # the segment length at which the pass that stores states is timed


@dataclass(frozen=True)
class Form:
    """One form as the tuner sees it: its configurations and how to run a sweep, or a pass, with one."""

    config_type: type[Any]
    default: Callable[[torch.dtype, int, int, int, int], Any]
    run: Callable[..., Tensor | tuple[Tensor, ...]]


def _chunk_states_sweep(q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor, scale: float, **options: Any) -> Tensor:
    """The pass of chunk that stores states, alone; returns all but the first segments', [B, segments - 1, H, K, V]."""
    hs = chunk.segment_states(k, v, None, STATES_SEGMENT)
    config = options["config"]
    launches = chunk.states_launches(k, v, scale, STATES_SEGMENT, config, reverse=options["reverse"])
    chunk.run_states(launches, k, v, hs, g_gamma, None)
    return hs.view(len(k), -1, *hs.shape[1:])[:, 1:]


def _fused_chunk_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, g_gamma: Tensor, scale: float, **options: Any
) -> tuple[Tensor, ...]:
    given = {name: options[name] for name in ("config", "cu_seqlens", "reverse", "chunk_size")}
    return fused_chunk.fused_chunk_gradients(q, k, v, do, g_gamma, scale, h0=None, dht=None, dh0=None, **given)


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slots: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, ...]:
    """A step on a copy of the states in `final_state`, or where there is none on these; returns the outputs.

    `kept`: and the states after each token. `group`: so many query heads for each that there is. `in_rows`: rows have
    their numbers for slots. `int32`: slots of so many bits.
    """
    *seed, g_gamma, scale = others
    if (final_state := options["final_state"]) is not None:
        state = final_state.copy_(state)
    if "group" in options:
        q = q.repeat_interleave(options["group"], 2)
    if "int32" in options:
        slots = slots.int()
    kept = state.new_empty(*k.shape[:3], *state.shape[2:]) if "kept" in options else None
    o = v.new_empty(*q.shape[:3], v.shape[3])
    in_rows, config = "in_rows" in options, options["config"]
    state, indices = (state[: len(q)], None) if in_rows else (state, slots)
    step.step_update(q, k, v, g_gamma, scale, state, indices, seed[0] if seed else None, kept, o, config)
    return (o,) if kept is None else (o, kept)


FORMS = {
    "fused_chunk": Form(fused_chunk.FusedChunkConfig, fused_chunk.default_config, fused_chunk.fused_chunk_sweep),
    "fused_chunk_gradients": Form(
        fused_chunk.FusedChunkGradientsConfig, fused_chunk.default_gradients_config, _fused_chunk_gradients
    ),
    "fused_chunk_hopper": Form(
        fused_chunk_hopper.FusedChunkHopperConfig,
        fused_chunk_hopper.default_config,
        fused_chunk_hopper.fused_chunk_hopper_sweep,
    ),
    "chunk_states": Form(chunk.ChunkStatesConfig, chunk.default_states_config, _chunk_states_sweep),
    "chunk": Form(chunk.ChunkConfig, chunk.default_config, chunk.chunk_sweep),
    "parallel": Form(parallel.ParallelConfig, parallel.default_config, parallel.parallel_sweep),
    "fused_recurrent": Form(
        fused_recurrent.FusedRecurrentConfig, fused_recurrent.default_config, fused_recurrent.fused_recurrent_sweep
    ),
    **{
        form: Form(step.StepConfig, partial(step.default_config, size=dtype.itemsize), _step)
        for form, (dtype, _) in STEPS.items()
    },
}
WITH_STATES = ("chunk", "fused_chunk", "fused_recurrent")
PLAIN = "plain"  # the variant of a launch that is timed
GRADIENTS = "fused_chunk_gradients"
HOPPER = "fused_chunk_hopper"  # runs wide heads alone, without states of the caller's
SEGMENTED = ("chunk", HOPPER)  # where L is less than T they run chunk_states too
# No forms of their own, and the form that each is tuned with.
PASSES = {"chunk_states": "chunk", GRADIENTS: "fused_chunk"} | {form: "step" for form in STEPS if form != "step"}
FORM_KERNEL, GRADIENTS_FORM_KERNEL, HOPPER_KERNEL = auto.KERNEL, auto.GRADIENTS_KERNEL, fused_chunk_hopper.KERNEL


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape: B, T, H, and the sweep's own K and V."""

    form: str
    dtype: str
    B: int
    T: int
    H: int
    K: int
    V: int

    @property
    def kernel(self) -> str:
        """The kernel's name in configuration files."""
        return f"{FAMILY}_{self.form}"

    @property
    def space(self) -> Space:
        """What may be chosen for the kernel."""
        return SPACES[self.form]

    def place(self, arch: Arch) -> Place:
        """What the space depends on, for an architecture."""
        return Place(self.form, self.T, self.K, self.V, self.torch_dtype.itemsize, arch, self.B * self.H)

    @property
    def is_for_hopper(self) -> bool:
        """Whether it is of the sizes that HOPPER is written for."""
        return fused_chunk_hopper.runs_at(self.torch_dtype.itemsize, self.H, self.K, self.V)

    def sift(self, arch: Arch) -> Sifted:
        """The configurations worth compiling for an architecture, and what the closed-form filters dropped."""
        return self.space.sift(FORMS[self.form].config_type, self.place(arch))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and the output."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def default(self) -> Any:
        """The configuration that is used where no rule holds."""
        return FORMS[self.form].default(self.torch_dtype, self.K, self.V, self.B * self.H, self.T)

    def inputs(self, device: str, seed: int = 0) -> tuple[Tensor, ...]:
        """Random q, k, v (for gradients also do) and RetNet's decays; of shapes only on the meta device.

        Of a step, before the decays, also states of more slots than rows, the rows' slots, and a seed if there is one.
        """
        widths = (self.K, self.K, self.V, *([self.V] if self.form == GRADIENTS else []))
        shapes = [(self.B, self.T, self.H, width) for width in widths]
        dtypes, slots = [self.torch_dtype] * len(shapes), self.B + FREE_SLOTS
        dtype, is_seeded = STEPS.get(self.form, (None, False))
        if dtype:
            shapes, dtypes = [*shapes, (slots, self.H, self.K, self.V)], [*dtypes, dtype]
        if device == "meta":
            numbers = [torch.empty(size, device="meta", dtype=torch.int64) for size in (self.B, 1)]
            tensors = [torch.empty(shape, device="meta", dtype=of) for shape, of in zip(shapes, dtypes, strict=True)]
            return *tensors, *numbers[: bool(dtype) + is_seeded], torch.empty(self.H, device="meta")
        generator = torch.Generator(device).manual_seed(seed)
        tensors = [
            torch.randn(s, device=device, generator=generator).to(of) for s, of in zip(shapes, dtypes, strict=True)
        ]
        if dtype:
            tensors.append(torch.randperm(slots, device=device, generator=generator)[: self.B])
        if is_seeded:
            tensors.append(torch.full((1,), SEED, device=device))
        return *tensors, retnet_rates(self.H).to(device=device, dtype=torch.float32)

    def floor_ms(self, gpu: str) -> float | None:
        """The time that no kernel can beat, for whole forms on the GPU that it was measured for; None for others."""
        whole = Workload("", self.B, self.T, self.H, self.K, self.V, self.dtype)
        if "H100" not in gpu or self.form in PASSES.keys() - STEPS.keys():
            return None
        return (
            whole.step_floor_ms(STEPS[self.form][0].itemsize) if self.form in STEPS else whole.floor_ms(backward=False)
        )

    def variants(self, config: Any) -> dict[str, dict[str, Any]]:
        """The launches with a configuration that compile to kernels of their own: options of `run`, of shapes only."""
        shape, states = (self.B, self.H, self.K, self.V), {}
        if self.form in WITH_STATES:
            states = {name: torch.empty(shape, device="meta") for name in ("initial_state", "final_state")}
        found: dict[str, dict[str, Any]] = {PLAIN: {}}
        if self.form in STEPS:
            found |= {"kept": {"kept": True}, "grouped": {"group": 3}, "grouped, kept": {"kept": True, "group": 3}}
            return found | {"in rows": {"in_rows": True}, "slots of 32 bits": {"int32": True}}
        if self.form == HOPPER:
            longest = fused_chunk_hopper.LONGEST
            found |= {"reversed": {"reverse": True}, "whole": {"tokens": longest}, "ragged": {"tokens": longest + 1}}
            if config.L < self.T:
                found |= {f"cut, {name}": {"tokens": 2 * config.L + n} for name, n in (("whole", 0), ("ragged", 1))}
        if states:
            found["states"] = states
        if self.form != "chunk_states":
            offsets = torch.empty(self.B + 1, dtype=torch.int64, device="meta")
            found["packed"] = {"cu_seqlens": offsets, "adjoint": bool(states), **states}
            if self.form == HOPPER and config.L >= self.T:  # as these are cut where they are uneven
                found["packed, cut"] = {"cu_seqlens": offsets, "tokens": 2 * longest, "L": longest}
        if getattr(config, "scores", 0):
            turned = {"reverse": True, "turned": True}
            found |= {"turned": turned, "turned, ragged": {**turned, "tokens": config.BT + 1}}
            found["turned, packed"] = {**found["packed"], **turned}
            if states:
                found["turned, states"] = {**turned, "adjoint": True, **states}
        return found

    def narrower(self) -> Problem:
        """Heads of the same tiles that fill them least of those that descriptors read: rules hold for these too."""
        least = fused_chunk_hopper.STEP if self.form == HOPPER else 8
        K, V = (
            min(size, least if padded(size) == padded(1) else padded(size) // 2 + least) for size in (self.K, self.V)
        )
        H = self.H + self.H % 2 if self.form == HOPPER else self.H  # whose tokens begin where TMA can read
        return replace(self, H=H, K=K, V=V)

    def proof_launches(self, config: Any) -> list[tuple[Problem, str]]:
        """What a proof launches: a problem and a variant of it each."""
        variants, narrower = self.variants(config), [PLAIN]
        if self.form == HOPPER:
            cut = "cut, " if config.L < self.T else ""
            narrower = [f"{cut}whole", f"{cut}ragged", "packed", "packed, cut", "turned"]
        launches = [(self, variant) for variant in variants]
        return list(
            dict.fromkeys([*launches, *((self.narrower(), variant) for variant in narrower if variant in variants)])
        )

    def run(self, inputs: tuple[Tensor, ...], config: Any, **options: Any) -> tuple[Tensor, ...]:
        """Launch the kernel or kernels with a configuration (or, for the chunk form, with two); the results.

        `turned`: if it reads scores, those that the gradients' sweeps are given, of q or in reverse of k. `tokens`: on
        others of so many tokens. `L`: in segments of this length.
        """
        given: dict[str, Any] = dict.fromkeys(("initial_state", "final_state", "cu_seqlens", "chunk_size"))
        given |= {"adjoint": False, "reverse": False, "config": config} | options
        if tokens := given.pop("tokens", None):
            inputs = replace(self, T=tokens).inputs(inputs[0].device.type)
        if L := given.pop("L", None):
            given["config"] = replace(given["config"], L=L)
        if given.pop("turned", False):
            (q, k, _, g_gamma), is_of_k = inputs, given["reverse"]
            of = (k, q) if is_of_k else (q, k)
            made = fused_chunk.shared_scores(
                *of, g_gamma, given["config"], cu_seqlens=given["cu_seqlens"], reverse=False
            )
            given |= made[is_of_k]
        results = FORMS[self.form].run(*inputs, self.K**-0.5, **given)
        return results if isinstance(results, tuple) else (results,)


def same_launch(problem: Problem, config: Any) -> tuple[Problem, Any]:
    """What is launched, by one name for all that come to it: chunk is fused_chunk where L reaches T."""
    if problem.form == "chunk" and config.L >= problem.T:
        return replace(problem, form="fused_chunk"), config.whole
    return problem, config


def problem_at(kernel: str, dtype: str, K: int, V: int, BH: int, T: int) -> Problem:
    """The problem of a kernel's name in configuration files at a point of a rule."""
    return Problem(kernel.removeprefix(f"{FAMILY}_"), dtype, 1, T, BH, K, V)


def problems_of(workload: Workload, form: str) -> list[Problem]:
    """The problems of one form at one workload: one, or two where K and V differ.

    None of gradients in one launch there or where they are wide, and of HOPPER only at its own sizes; of a step one, of
    few tokens. None where the workload is for another form alone.
    """
    w = workload
    if w.form not in ("", PASSES.get(form, form)):
        return []
    if form in STEPS:
        return [Problem(form, w.dtype, w.B, w.T, w.H, w.K, w.V)] if w.T <= MOST_STEPS else []
    if form == GRADIENTS and not w.K == w.V <= fused_chunk.WIDEST_TOGETHER:
        return []
    widths = dict.fromkeys([(w.K, w.V), (w.V, w.K)])
    found = [Problem(form, w.dtype, w.B, w.T, w.H, K, V) for K, V in widths]
    return [problem for problem in found if form != HOPPER or problem.is_for_hopper]
