"""Retention as Helion would have it written: one sweep over chunks, whose tiles Helion's own autotuner chooses.

For `bench --against helion` alone, with Helion 1.4 or later. The first call of a shape tunes, for minutes; the variable
HELION_AUTOTUNE_EFFORT says how long (https://helionlang.com).
"""

from __future__ import annotations

import math
from typing import Any

import helion
import helion.language as hl
import torch
from torch import Tensor

from tuning.oracle import retnet_rates


@helion.kernel(static_shapes=True)  # type: ignore[untyped-decorator]
def sweep(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, scale: float, reverse: hl.constexpr) -> Tensor:
    """Retention of q, k [B, T, H, K] and v [B, T, H, V], heads decaying by 2 ** rates [H] a token; reverse: 0 or 1."""
    B, T, H, K = q.size()
    K = hl.specialize(K)
    BT = hl.register_block_size(16, 128)
    o = torch.empty_like(v)
    for tile_b, tile_h, tile_v in hl.tile([B, H, v.size(3)], block_size=[1, 1, None]):
        b, h = tile_b.begin, tile_h.begin
        rate = rates[h]
        b_h = hl.zeros([K, tile_v], dtype=torch.float32)
        for tile_t in hl.tile(T, block_size=BT):
            o_t = (tile_t.index - tile_t.begin).to(torch.float32)
            i_t = (T - 1) * reverse + (1 - 2 * reverse) * tile_t.index
            b_q, b_k, b_v = q[b, i_t, h, :], k[b, i_t, h, :], v[b, i_t, h, tile_v]
            distance = o_t[:, None] - o_t[None, :]
            b_s = hl.dot(b_q, b_k.T) * torch.where(distance >= 0, torch.exp2(distance * rate), 0.0)
            b_o = hl.dot(b_q, b_h.to(b_q.dtype)) * torch.exp2((o_t + 1) * rate)[:, None]
            b_o = hl.dot(b_s.to(b_v.dtype), b_v, acc=b_o)
            o[b, i_t, h, tile_v] = (b_o * scale).to(o.dtype)
            b_dk = torch.exp2((tile_t.block_size - 1 - o_t) * rate)
            b_h = b_h * torch.exp2(tile_t.block_size * rate)
            b_h = hl.dot(b_k.T, (b_v * b_dk[:, None]).to(b_v.dtype), acc=b_h)
    return o


class _Retention(torch.autograd.Function):
    """Each gradient is the sweep with its arguments permuted."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, rates)
        o: Tensor = sweep(q, k, v, rates, q.shape[3] ** -0.5, 0)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, rates = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        dq = sweep(do, v, k, rates, scale, 0)
        dk = sweep(v, do, q, rates, scale, 1)
        return dq, dk, sweep(k, q, do, rates, scale, 1), None


_rates: dict[tuple[int, torch.device], Tensor] = {}


def chunk_retention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """RetNet's retention of q, k [B, T, H, K] and v [B, T, H, V]: o [B, T, H, V], and no final state."""
    key = q.shape[2], q.device
    if key not in _rates:
        _rates[key] = (retnet_rates(q.shape[2]).double() / math.log(2)).float().to(q.device)
    o: Tensor = _Retention.apply(q, k, v, _rates[key])  # type: ignore[no-untyped-call]
    return o, None
