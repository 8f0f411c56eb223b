"""The problems that configurations are tried on: one kernel of one form, with inputs of one shape.

Every kernel runs the same mathematics, a sweep (see generated/retention/operators.py), so a problem is told by the
sweep's own widths: the output and the gradient of v sweep with K and V, the gradients of q and k with the two
exchanged. Where the two are equal, one launch can run the gradients' three sweeps, which is a kernel of its own. The
direction is an argument of the kernels and changes no instruction: it is checked both ways and timed forwards.

A step is no sweep: its inputs hold states too, which it updates where they lie, in slots of a pool, and those of a
buffered step buffers too. Its rows fold in turn, as they do where each has begun at another time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generated.arguments import MOST_ROWS, MOST_STEPS
from generated.launch import padded
from generated.retention import (
    auto,
    chunk,
    fused_chunk,
    fused_chunk_hopper,
    fused_recurrent,
    parallel,
    step,
    step_buffered,
)
from tuning.compilation import Arch
from tuning.oracle import retnet_rates
from tuning.space import SPACES, Place, Sifted, Space
from tuning.workloads import Workload

FAMILY = "retention"
FREE_SLOTS = 3  # of a step's pool
SEED = 7
STATE = 3  # which of a step's inputs holds its states
BUFFERED = MOST_ROWS // 2  # tokens that a buffered step's buffers take
STATES_SEGMENT = 256  # the segment length at which the pass that stores states is timed


class Kind(NamedTuple):
    """What kernels of steps differ in: the states' dtype, whether a seed rounds them, whether tokens lie in buffers."""

    dtype: torch.dtype
    is_seeded: bool
    is_buffered: bool


STEPS = {
    kernel.removeprefix(f"{FAMILY}_"): Kind(dtype, is_seeded, module is step_buffered)
    for module in (step, step_buffered)
    for (dtype, is_seeded), kernel in module.KERNELS.items()
}
STEP_FORMS = {  # as the command line names them, and the kernels of each, of which the first has its name
    form: tuple(part for part, kind in STEPS.items() if kind.is_buffered is STEPS[form].is_buffered)
    for form in ("step", "step_buffered")
}


@dataclass(frozen=True)
class StepInputs:
    """A step's inputs by name; of a buffered one there are `buffers`, of k and v, and `counts`, lengths and folded."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    buffers: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    slots: Tensor
    seed: Tensor | None
    g_gamma: Tensor

    @classmethod
    def of(cls, form: str, inputs: Sequence[Tensor]) -> StepInputs:
        """Those of a step's form."""
        q, k, v, state, *others, g_gamma = inputs
        kind = STEPS[form]
        buffered, (slots, *seed) = others[: 4 * kind.is_buffered], others[4 * kind.is_buffered :]
        return cls(q, k, v, state, (*buffered[:2],), (*buffered[2:],), slots, seed[0] if seed else None, g_gamma)

    @property
    def listed(self) -> tuple[Tensor, ...]:
        """The inputs in their order."""
        seed = () if self.seed is None else (self.seed,)
        return self.q, self.k, self.v, self.state, *self.buffers, *self.counts, self.slots, *seed, self.g_gamma

    @property
    def all_folding(self) -> StepInputs:
        """The same where all that the buffers take lies in them."""
        return replace(self, counts=(self.counts[1] + BUFFERED, self.counts[1])) if self.counts else self


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


def _step(form: str, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """A step on a copy of the states in `final_state`, and of buffers, or where there is none on these; the results.

    Returned are outputs and buffers. `kept`: and the states after each token. `group`: so many query heads for each
    that there is. `in_rows`: rows have their numbers for slots. `int32`: slots and counts of so many bits.
    """
    *tensors, scale = inputs
    x, config = StepInputs.of(form, tensors), options["config"]
    q, state, buffers = x.q, x.state, x.buffers
    if (final_state := options["final_state"]) is not None:
        state, buffers = final_state.copy_(state), tuple(torch.empty_like(each).copy_(each) for each in buffers)
    if "group" in options:
        q = q.repeat_interleave(options["group"], 2)
    *counts, slots = [each.int() if "int32" in options else each for each in (*x.counts, x.slots)]
    pools = [pool[: len(q)] if "in_rows" in options else pool for pool in (state, *buffers)]
    tokens, indices = (q, x.k, x.v, x.g_gamma, scale), None if "in_rows" in options else slots
    o = x.v.new_empty(*q.shape[:3], x.v.shape[3])
    if buffers:
        (state, k_buffer, v_buffer), (lengths, folded) = pools, counts
        held = (state, k_buffer, v_buffer, lengths, folded)
        step_buffered.step_buffered_update(*tokens, *held, indices, x.seed, o, config)
        return o, *buffers
    kept = state.new_empty(*x.k.shape[:3], *state.shape[2:]) if "kept" in options else None
    step.step_update(*tokens, pools[0], indices, x.seed, kept, o, config)
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
        form: Form(
            step.StepConfig,
            partial((step_buffered if kind.is_buffered else step).default_config, size=kind.dtype.itemsize),
            partial(_step, form),
        )
        for form, kind in STEPS.items()
    },
}
WITH_STATES = ("chunk", "fused_chunk", "fused_recurrent")
PLAIN = "plain"  # the variant of a launch that is timed
GRADIENTS = "fused_chunk_gradients"
HOPPER = "fused_chunk_hopper"  # runs wide heads alone, without states of the caller's
SEGMENTED = ("chunk", HOPPER)  # where L is less than T they run chunk_states too
# No forms of their own, and the form that each is tuned with.
PASSES = {"chunk_states": "chunk", GRADIENTS: "fused_chunk"} | {
    part: form for form, parts in STEP_FORMS.items() for part in parts[1:]
}
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

        Of a step, see StepInputs, also states of more slots than rows. A buffered one's rows hold from one token up to
        all that buffers take: of 16 rows one.
        """
        widths = (self.K, self.K, self.V, *([self.V] if self.form == GRADIENTS else []))
        shapes = [(self.B, self.T, self.H, width) for width in widths]
        dtypes, slots, kind = [self.torch_dtype] * len(shapes), self.B + FREE_SLOTS, STEPS.get(self.form)
        if kind:
            shapes, dtypes = [*shapes, (slots, self.H, self.K, self.V)], [*dtypes, kind.dtype]
        if kind and kind.is_buffered:
            shapes += [(slots, 2 * BUFFERED, self.H, width) for width in (self.K, self.V)]
            dtypes += [self.torch_dtype] * 2
        if device == "meta":
            sizes = [*[self.B] * (2 * kind.is_buffered + 1), *[1] * kind.is_seeded] if kind else []
            numbers = [torch.empty(size, device="meta", dtype=torch.int64) for size in sizes]
            tensors = [torch.empty(shape, device="meta", dtype=of) for shape, of in zip(shapes, dtypes, strict=True)]
            return *tensors, *numbers, torch.empty(self.H, device="meta")
        generator = torch.Generator(device).manual_seed(seed)
        tensors = [
            torch.randn(s, device=device, generator=generator).to(of) for s, of in zip(shapes, dtypes, strict=True)
        ]
        if kind and kind.is_buffered:
            row = torch.randperm(self.B, device=device, generator=generator)
            held = (BUFFERED * (2 * row + 1) + 2 * self.B - 1) // (2 * self.B)
            tensors += [5 * row + held, 5 * row]
        if kind:
            tensors.append(torch.randperm(slots, device=device, generator=generator)[: self.B])
        if kind and kind.is_seeded:
            tensors.append(torch.full((1,), SEED, device=device))
        return *tensors, retnet_rates(self.H).to(device=device, dtype=torch.float32)

    def floor_ms(self, gpu: str) -> float | None:
        """The time that no kernel can beat, for whole forms on the GPU that it was measured for; None for others."""
        whole = Workload("", self.B, self.T, self.H, self.K, self.V, self.dtype)
        if "H100" not in gpu or self.form in PASSES.keys() - STEPS.keys():
            return None
        if kind := STEPS.get(self.form):
            return whole.step_floor_ms(kind.dtype.itemsize, is_written=not kind.is_buffered)
        return whole.floor_ms(backward=False)

    def variants(self, config: Any) -> dict[str, dict[str, Any]]:
        """The launches with a configuration that compile to kernels of their own: options of `run`, of shapes only."""
        shape, states = (self.B, self.H, self.K, self.V), {}
        if self.form in WITH_STATES:
            states = {name: torch.empty(shape, device="meta") for name in ("initial_state", "final_state")}
        found: dict[str, dict[str, Any]] = {PLAIN: {}}
        if self.form in STEPS:
            return found | self._step_variants()
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

    def _step_variants(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"in rows": {"in_rows": True}, "slots of 32 bits": {"int32": True}}
        if STEPS[self.form].is_buffered:
            return found
        grouped = {"group": 3, "alone": True}
        return found | {"grouped": grouped, "kept": {"kept": True}, "grouped, kept": {"kept": True, **grouped}}

    @property
    def is_tuned(self) -> bool:
        """Whether what runs goes by rules: of a step with several outputs not all do."""
        if kind := STEPS.get(self.form):
            if kind.is_buffered:
                return self.T == 1
            return not step.goes_by_in_pieces(self.T, self.V, self.B * self.H, kind.dtype.itemsize)
        return True

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
        others of so many tokens. `alone`: on one token and head, whose state lies in registers for groups too. `L`: in
        segments of this length.
        """
        given: dict[str, Any] = dict.fromkeys(("initial_state", "final_state", "cu_seqlens", "chunk_size"))
        given |= {"adjoint": False, "reverse": False, "config": config} | options
        if tokens := given.pop("tokens", None):
            inputs = replace(self, T=tokens).inputs(inputs[0].device.type)
        if given.pop("alone", False):
            inputs = replace(self, B=1, T=1, H=1).inputs(inputs[0].device.type)
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
    few tokens. None where the workload is for other forms alone.
    """
    w = workload
    if not w.is_for(PASSES.get(form, form)):
        return []
    if form in STEPS:
        return [Problem(form, w.dtype, w.B, w.T, w.H, w.K, w.V)] if w.T <= MOST_STEPS else []
    if form == GRADIENTS and not w.K == w.V <= fused_chunk.WIDEST_TOGETHER:
        return []
    widths = dict.fromkeys([(w.K, w.V), (w.V, w.K)])
    found = [Problem(form, w.dtype, w.B, w.T, w.H, K, V) for K, V in widths]
    return [problem for problem in found if form != HOPPER or problem.is_for_hopper]
