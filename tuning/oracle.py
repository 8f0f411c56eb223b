"""A float64 reference of the sweep, written from the formulas and sharing no code with what it checks."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def sweep_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor,
    scale: float,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the final state [B, H, K, V] in float64, by blocks of tokens.

    o_t = scale * q_t S_t and S_t = gamma S_{t-1} + k_t v_t^T, from the last token to the first with `reverse`.
    """
    q, k, v = (x.flip(1) if reverse else x for x in (q, k, v))
    rate = g_gamma.double()[:, None]
    B, T, H, K = q.shape
    zeros = q.new_zeros(B, H, K, v.shape[3], dtype=torch.float64)
    state = zeros if initial_state is None else initial_state.double()
    outputs = []
    for begin in range(0, T, BLOCK):
        bq, bk, bv = (x[:, begin : begin + BLOCK].transpose(1, 2).double() for x in (q, k, v))
        n = torch.arange(bq.shape[2], device=q.device, dtype=torch.float64)
        gap = n[:, None] - n
        scores = (bq @ bk.mT) * torch.where(gap >= 0, torch.exp(gap.clamp(min=0) * rate[..., None]), 0.0)
        since = torch.exp((n + 1) * rate)[..., None]
        outputs.append(scale * (scores @ bv + since * (bq @ state)))
        left = torch.exp((len(n) - 1 - n) * rate)[..., None]
        state = torch.exp(len(n) * rate)[..., None] * state + (bk * left).mT @ bv
    o = torch.cat(outputs, 2).transpose(1, 2)
    return o.flip(1) if reverse else o, state


def steps_reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g_gamma: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, HQ, V] and the states after each token [B, T, H, K, V] in float64, token by token.

    q has HQ heads, of which those that share one of the H states are neighbours.
    """
    decay = torch.exp(g_gamma.double())[:, None, None]
    now, outputs, states = state.double(), [], []
    for b_q, b_k, b_v in zip(*(x.double().unbind(1) for x in (q, k, v)), strict=True):
        now = decay * now + b_k[..., None] * b_v[..., None, :]
        outputs.append(scale * (b_q.unflatten(1, (now.shape[1], -1)) @ now).flatten(1, 2))
        states.append(now)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def buffered_reference(
    state: Tensor, k_buffer: Tensor, v_buffer: Tensor, lengths: Tensor, folded: Tensor, g_gamma: Tensor
) -> Tensor:
    """The states [B, H, K, V] in float64 once they have the buffered tokens too, of which p lies in row p % (2 L)."""
    decay, rows = torch.exp(g_gamma.double())[:, None, None], torch.arange(len(state), device=state.device)
    now = state.double()
    for n in range(k_buffer.shape[1] // 2):
        b_k, b_v = (x[rows, (folded + n) % x.shape[1]].double() for x in (k_buffer, v_buffer))
        added = decay * now + b_k[..., None] * b_v[..., None, :]
        now = torch.where((folded + n < lengths)[:, None, None, None], added, now)
    return now


def gradients_reference(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, g_gamma: Tensor, scale: float, *, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in float64: sweeps with the arguments permuted, the last two in the other direction."""
    return (
        sweep_reference(do, v, k, g_gamma, scale, reverse=reverse)[0],
        sweep_reference(v, do, q, g_gamma, scale, reverse=not reverse)[0],
        sweep_reference(k, q, do, g_gamma, scale, reverse=not reverse)[0],
    )


def retnet_rates(heads: int) -> Tensor:
    """log(1 - 2^(-5-h)) for h < heads, [H] in float64."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64)))


def segment_states(k: Tensor, v: Tensor, g_gamma: Tensor, length: int, *, reverse: bool = False) -> Tensor:
    """The states at the starts of segments of `length` tokens but the first, [B, segments - 1, H, K, V] in float64."""
    k, v = (x.double().flip(1) if reverse else x.double() for x in (k, v))
    states = [k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])]
    for begin in range(0, k.shape[1] - length, length):
        segment = slice(begin, begin + length)
        zeros = torch.zeros_like(k[:, segment])
        states.append(sweep_reference(zeros, k[:, segment], v[:, segment], g_gamma, 1.0, initial_state=states[-1])[1])
    return torch.stack(states, 1)[:, 1:]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| (||got|| where zeros are expected); NaN anywhere gives NaN."""
    expected = expected.double()
    size = expected.norm()
    return float((got.double() - expected).norm() / torch.where(size > 0, size, 1.0))
