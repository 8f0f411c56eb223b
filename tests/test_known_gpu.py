"""Calls of fused_recurrent that are like one before and run straight, on a GPU."""

from __future__ import annotations

import importlib
import statistics
import timeit
from typing import Any

import pytest
import torch
from oracle import make_problem
from torch import Tensor

from generated import configuration, fused_recurrent_retention

fused_recurrent = importlib.import_module("generated.retention.fused_recurrent")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning"),  # this GPU need not be tuned
]


def few_tokens(T: int = 1, **options: Any) -> dict[str, Any]:
    """A call that generates text."""
    problem = make_problem(3, T, 4, 64, 96, torch.bfloat16, device="cuda")
    given = {"q": problem.q, "k": problem.k, "v": problem.v, "initial_state": problem.h0, "output_final_state": True}
    return given | options


RECURRENCES = {
    "states": {},
    "many tokens": {"T": 9},
    "no states": {"initial_state": None, "output_final_state": False},
    "final state alone": {"initial_state": None},
    "decays and scale": {"g_gamma": -torch.arange(4) / 8, "scale": 0.5},
}


@pytest.mark.parametrize("case", RECURRENCES)
def test_a_known_recurrence_runs_straight_and_gives_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = few_tokens(**RECURRENCES[case])
    if "g_gamma" in given:
        given["g_gamma"] = given["g_gamma"].cuda()
    configuration.clear_caches()
    o, h = fused_recurrent_retention(**given)
    monkeypatch.setattr(fused_recurrent, "OPERATOR", None)
    again = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    got, state = fused_recurrent_retention(**again)
    other, other_state = fused_recurrent_retention(**again)
    assert got.data_ptr() not in (o.data_ptr(), other.data_ptr())
    assert h is None or state.data_ptr() not in (h.data_ptr(), other_state.data_ptr())
    assert torch.equal(got, o)
    assert (state is None) == (h is None)
    assert h is None or torch.equal(state, h)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_a_recurrence_unlike_those_known_has_its_own_results(name: str) -> None:
    """With gradients, misaligned, or with strides."""
    given = few_tokens()
    configuration.clear_caches()
    with torch.no_grad():
        o, h = fused_recurrent_retention(**given)
    ((known,),) = fused_recurrent.KNOWN.kinds.values()
    assert known.launch is not None
    x = given[name]
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    others = [room[1:].view(x.shape).copy_(x), x.repeat_interleave(2, -1)[..., ::2], x.detach().requires_grad_()]
    for other in others:
        got, state = fused_recurrent_retention(**given | {name: other})
        torch.testing.assert_close(got, o, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(state, h, rtol=1e-5, atol=1e-5)
        assert got.requires_grad == other.requires_grad
    (got.float().sum() + state.sum()).backward()
    assert others[-1].grad.isfinite().all()
    turned = {"state_v_first": True, "initial_state": given["initial_state"].mT.contiguous()}
    for options in ({"reverse": True}, turned):
        got, state = fused_recurrent_retention(**given | options)  # of one token
        torch.testing.assert_close(got, o, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(state.mT if options is turned else state, h, rtol=1e-5, atol=1e-5)


def test_pytorchs_launcher_starts_it_with_the_bits_of_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is private, so that a release without it, or with another one, would only be slower: this says so."""
    given = few_tokens()
    configuration.clear_caches()
    for _ in range(2):
        o, h = fused_recurrent_retention(**given)
    ((known,),) = fused_recurrent.KNOWN.kinds.values()
    assert known.launch._start is not None
    monkeypatch.setattr(known.launch, "_start", None)
    got, state = fused_recurrent_retention(**given)
    assert torch.equal(got, o)
    assert torch.equal(state, h)


@pytest.mark.usefixtures("measures_alone")
def test_a_recurrence_of_one_token_takes_the_host_as_long_as_a_few_additions() -> None:
    """30 us, where an addition in place takes 5: hosts are not equally fast."""
    given, x = few_tokens(), torch.zeros(8, device="cuda")
    with torch.inference_mode():
        given = {name: y.clone() if isinstance(y, Tensor) else y for name, y in given.items()}
        recurrence_us, addition_us = (
            statistics.median(timeit.repeat(call, torch.cuda.synchronize, number=200, repeat=20)) / 200 * 1e6
            for call in (lambda: fused_recurrent_retention(**given), lambda: x.add_(1))
        )
    assert recurrence_us < max(30.0, 6 * addition_us)
