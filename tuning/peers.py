"""What `bench` holds retgen against, where it is installed: fla's operators, PyTorch's attention, a kernel in Helion.

PyTorch's attention computes something else, softmax and no decay, from the same tensors: what a user of attention pays.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """Another library's operators by form, from q, k and v to o and something else; or in `version` why there are none.

    `same`: they compute retention, so that they can be held against float64.
    """

    name: str
    version: str
    functions: dict[str, Function] = field(default_factory=dict)
    same: bool = True


def find(name: str) -> Peer:
    """A peer by its name in PEERS, as it is installed here."""
    try:
        return PEERS[name]()
    except ImportError:
        return Peer(name, "not installed")
    except Exception as error:  # noqa: BLE001 - whatever ails the peer, the run goes on
        return Peer(name, f"does not import ({in_a_line(error)})")


def in_a_line(error: Exception) -> str:
    """What an error is and says, in its first line."""
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def _fla() -> Peer:
    retention = importlib.import_module("fla.ops.retention")
    naive = importlib.import_module("fla.ops.retention.naive").naive_retention
    forms = ("chunk", "fused_chunk", "parallel", "fused_recurrent")
    functions = {form: getattr(retention, f"{form}_retention", None) for form in forms}
    functions["naive"] = lambda q, k, v: (_heads_second(naive, q, k, v), None)
    step = functions["fused_recurrent"]
    functions["step"] = step and partial(step, output_final_state=True)  # from an initial state, in float32
    found = {form: function for form, function in functions.items() if function is not None}
    return Peer("fla", version("fla-core"), found)


def _sdpa() -> Peer:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return _heads_second(partial(scaled_dot_product_attention, is_causal=True), q, k, v), None

    return Peer("sdpa", f"of torch {torch.__version__}", {"parallel": attend}, same=False)


def _helion() -> Peer:
    function = importlib.import_module("tuning.helion_retention").chunk_retention
    return Peer("helion", version("helion"), {"chunk": function})


def _heads_second(function: Function, *tensors: Tensor) -> Tensor:
    """Call what takes and gives [B, H, T, any]."""
    o: Tensor = function(*(x.transpose(1, 2) for x in tensors))
    return o.transpose(1, 2)


PEERS: dict[str, Callable[[], Peer]] = {"fla": _fla, "sdpa": _sdpa, "helion": _helion}
