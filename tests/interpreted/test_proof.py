"""The proof that a rule needs: right kernels pass it, and every way in which one may go wrong is found."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from generated.retention import fused_chunk
from tuning import problems, proof
from tuning.problems import FORMS, GRADIENTS, Problem

pytestmark = [  # NumPy speaks up where a kernel computes infinities that it then masks
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
]

SMALL = Problem("fused_chunk", "float16", 2, 1024, 3, 16, 24)
CONFIG = fused_chunk.FusedChunkConfig(BT=16, BV=16, num_warps=4, num_stages=1)
PARTS = {"fused_chunk": ("fused_chunk", GRADIENTS), "chunk": ("chunk_states", "chunk")}
STORE = "(b_o * scale).to(o.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])"
UPDATE = "b_h = tl.dot(tl.trans(b_k), b_v, b_h, input_precision=PRECISION)"
# What is wrong: the kernel's text, what stands there instead, and what the proof must say.
WRONG = "wrong result"
FAULTS = {
    "mask of one token too many": ("o_t[:, None] >= o_t[None, :]", "o_t[:, None] >= o_t[None, :] - 1", WRONG),
    "decay off by one between chunks": ("(o_t + LEAD) * b_g", "(o_t + LEAD + 1) * b_g", WRONG),
    "decay off by one within a chunk": (
        "(o_t[:, None] - o_t[None, :]) *",
        "(o_t[:, None] - o_t[None, :] + 1) *",
        WRONG,
    ),
    "missing scale": (STORE, STORE.replace(" * scale", ""), WRONG),
    "wrong factor of dh0": ("b_h *= scale", "b_h *= 1.0", WRONG),
    "wrong factor of dht": ("b_h /= scale", "b_h /= 1.0", WRONG),
    "last chunk stored without a mask": (STORE, STORE.replace("m_t[:, None] & ", ""), ""),
    "race of two sequences": ("(i_nh // H).to(tl.int64), i_nh % H", "(i_nh // H * 0).to(tl.int64), i_nh % H", WRONG),
    "store before the output": (UPDATE, f"{UPDATE}\n        tl.store(o - 1, 0.0, mask=i_p == 0)", "beside a tensor"),
    "store behind the state": ("tl.store(p_ht, b_h, mask=m_h)", "tl.store(p_ht, b_h, mask=m_h | (o_v >= V))", ""),
    "read beyond the sequence": ("m_t = i_t * BT + o_t < T", "m_t = i_t * BT + o_t < T + 1", ""),
    "last chunk never written": ("range(tl.cdiv(T, BT))", "range(T // BT)", WRONG),
    "stale state": ("b_h *= b_dh", "b_h *= 1.0", WRONG),
    "initial state left out": ("b_h += tl.load(p_h0, mask=m_h, other=0.0).to(tl.float32)", "b_h += 0.0", WRONG),
    "swapped heads": ("i_h * V + o_v[None, :]", "(H - 1 - i_h) * V + o_v[None, :]", WRONG),
    "state summed in 16 bits": (
        UPDATE,
        f"{UPDATE}\n        b_h = b_h.to(b_q.dtype).to(tl.float32)",
        "states: " + WRONG,
    ),
    "input written to": (UPDATE, f"{UPDATE}\n        tl.store(q, 1.0, mask=i_p == 0)", ""),
    "not the same twice": ("    return o\n", "    return o * (1 + 1e-3 * torch.rand(())).to(o.dtype)\n", "two runs"),
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module with another text in the place of fused_chunk."""

    def put(old: str, new: str) -> None:
        text = Path(fused_chunk.__file__).read_text(encoding="utf-8")
        assert old in text
        kept = [
            line for line in text.replace(old, new, 1).splitlines() if not line.startswith(("register_", "OPERATOR"))
        ]
        path = tmp_path / "broken.py"
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
        form = FORMS["fused_chunk"]
        monkeypatch.setitem(
            problems.FORMS, "fused_chunk", replace(form, run=_module(path, monkeypatch).fused_chunk_sweep)
        )

    return put


def _module(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = f"generated.retention.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(
    form: str, broken: Callable[[str, str], None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "TOKENS", 141)
    old, new, said = FAULTS[fault]
    broken(old, new)
    with pytest.raises(ArithmeticError) as caught:
        proof.prove(SMALL, CONFIG, {}, "cpu")
    assert said in str(caught.value)
    assert str(caught.value).split(":")[0] in {draw.name for draw in proof.draws(SMALL, CONFIG)}


@pytest.mark.forms("fused_chunk")
def test_the_same_module_without_a_fault_passes(form: str, broken: Callable[[str, str], None]) -> None:
    broken("b_h *= b_dh", "b_h = b_h * b_dh")
    assert 0 < proof.prove(SMALL, CONFIG, {}, "cpu") < proof.ERROR_LIMITS["float16"]


@pytest.mark.forms("parallel", "chunk", "fused_chunk", "fused_recurrent")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_right_kernels_pass(form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "TOKENS", 70)
    for part in PARTS.get(form, (form,)):
        problem = Problem(part, dtype, 2, 1024, 3, 16, 16 if part == GRADIENTS else 24)
        config = problem.default()
        if part == "chunk":
            config = replace(config, L=64, BT=16)
        assert 0 < proof.prove(problem, config, {}, "cpu") < proof.ERROR_LIMITS[dtype]


@pytest.mark.forms("chunk")
def test_segments_are_looked_at_where_there_are_any(form: str) -> None:
    problem = replace(SMALL, form="chunk", T=4096)
    for L, tokens in ((256, 256 + proof.TOKENS), (1 << 20, proof.TOKENS)):
        lengths = [draw.lengths for draw in proof.draws(problem, replace(problem.default(), L=L))]
        assert max(map(max, lengths)) == tokens


@pytest.mark.forms("fused_chunk")
def test_new_tensors_lie_between_margins_full_of_nan(form: str) -> None:
    guard = proof.Guard()
    with guard:
        made: list[Tensor] = [torch.empty(3, 5), torch.empty_like(torch.ones(4)), torch.ones(2).new_empty(7)]
    assert all(x.isnan().all() for x in made)
    guard.check()
    made[0].fill_(1.0)
    guard.check()
    beside: Any = made[1].as_strided((1,), (1,), made[1].storage_offset() + 4)
    beside.fill_(0.0)
    with pytest.raises(ArithmeticError, match="beside a tensor"):
        guard.check()
