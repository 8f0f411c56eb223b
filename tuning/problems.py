"""The problems that configurations are tried on: one kernel of one form, with inputs of one shape.

Every kernel runs the same mathematics, a sweep (see generated/retention/operators.py), so a problem is told by the
sweep's own widths and direction: the gradients of q and k sweep with K and V exchanged, those of k and v backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generated.retention import auto, chunk, fused_chunk, fused_recurrent, parallel
from tuning.space import SPACES, Space
from tuning.workloads import Workload

FAMILY = "retention"
STATES_SEGMENT = 256  # the segment length at which the pass that stores states is timed


@dataclass(frozen=True)
class Form:
    """One form as the tuner sees it: its configurations and how to run a sweep with one."""

    config_type: type[Any]
    default: Callable[[torch.dtype, int, int], Any]
    sweep: Callable[..., Tensor]


def _chunk_states_sweep(role: str, q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor, scale: float, **options: Any) -> Tensor:
    """The pass of chunk that stores states, alone; returns them, [B * segments, H, K, V]."""
    B, T, H, K = k.shape
    hs = k.new_empty(chunk.segment_slots(k, None, STATES_SEGMENT), H, K, v.shape[3])
    config = options["config"]
    chunk.launch_chunk_states(k, v, hs, g_gamma, scale, STATES_SEGMENT, config, reverse=options["reverse"])
    return hs


FORMS = {
    "fused_chunk": Form(fused_chunk.FusedChunkConfig, fused_chunk.default_config, fused_chunk.fused_chunk_sweep),
    "chunk_states": Form(chunk.ChunkStatesConfig, chunk.default_states_config, _chunk_states_sweep),
    "chunk": Form(chunk.ChunkConfig, chunk.default_config, chunk.chunk_sweep),
    "parallel": Form(parallel.ParallelConfig, parallel.default_config, parallel.parallel_sweep),
    "fused_recurrent": Form(
        fused_recurrent.FusedRecurrentConfig, fused_recurrent.default_config, fused_recurrent.fused_recurrent_sweep
    ),
}
ROLES = {
    "fused_chunk": ("fwd", "dq", "dk", "dv"),
    "chunk_states": ("fwd", "dq"),
    "chunk": ("fwd", "dq", "dk", "dv"),
    "parallel": ("fwd", "dq", "dk", "dv"),
    "fused_recurrent": ("fwd", "dq", "dk", "dv"),
}
FORM_KERNEL = auto.KERNEL


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape: B, T, H, and the sweep's own K and V."""

    form: str
    role: str
    dtype: str
    B: int
    T: int
    H: int
    K: int
    V: int

    @property
    def kernel(self) -> str:
        """The kernel's name in configuration files."""
        return f"{FAMILY}_chunk_states" if self.form == "chunk_states" else f"{FAMILY}_{self.form}_{self.role}"

    @property
    def reverse(self) -> bool:
        return self.role in ("dk", "dv")

    @property
    def space(self) -> Space:
        return SPACES[self.form]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def default(self) -> Any:
        return FORMS[self.form].default(self.torch_dtype, self.K, self.V)

    def inputs(self, device: str, seed: int = 0) -> tuple[Tensor, ...]:
        """Random q, k, v and RetNet's decays; of shapes only on the meta device."""
        shapes = [(self.B, self.T, self.H, width) for width in (self.K, self.K, self.V)]
        if device == "meta":
            q, k, v = (torch.empty(shape, device="meta", dtype=self.torch_dtype) for shape in shapes)
            return q, k, v, torch.empty(self.H, device="meta")
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v = (torch.randn(s, device=device, generator=generator).to(self.torch_dtype) for s in shapes)
        decays = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.H, dtype=torch.float64)))
        return q, k, v, decays.to(device=device, dtype=torch.float32)

    def run(self, inputs: tuple[Tensor, ...], config: Any, **options: Any) -> Tensor:
        """Launch the kernel or kernels with a configuration (or, for the chunk form, with two)."""
        states: dict[str, Any] = {"initial_state": None, "final_state": None, "cu_seqlens": None, "adjoint": False}
        states.update(options)
        return FORMS[self.form].sweep(
            self.role, *inputs, self.K**-0.5, reverse=self.reverse, chunk_size=None, config=config, **states
        )


def problems_of(workload: Workload, form: str) -> list[Problem]:
    """The problems of one form at one workload, one a kernel."""
    problems = []
    for role in ROLES[form]:
        K, V = (workload.V, workload.K) if role in ("dq", "dk") else (workload.K, workload.V)
        problem = Problem(form, role, workload.dtype, workload.B, workload.T, workload.H, K, V)
        if not (form == "chunk_states" and role == "dq" and workload.K == workload.V):
            problems.append(problem)
    return problems
