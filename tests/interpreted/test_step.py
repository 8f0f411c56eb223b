"""The step in place, its kernel run by the interpreter, gives what the formulas say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import errors, make_problem, solve
from serving import assert_served_as_alone
from steps import (
    as_on_a_gpu,
    assert_grouped_steps_match,
    assert_independent,
    assert_rounded_once,
    assert_steps_match,
    assert_unbiased,
    group_heads,
    in_pieces,
    run_step,
    spacing,
    store,
    tokens_far_apart,
)
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.forms("step")]

Step = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def step(function: Step) -> Step:
    """The public function, through the kernel."""
    return function


@pytest.fixture(params=["registers", "pieces"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """With states in registers, and in pieces where there are several outputs."""
    with in_pieces(request.param):
        yield


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 3, 1, 1), (2, 2, 20, 33), (1, 1, 130, 40)])
def test_any_shape_gives_the_oracles_results(
    step: Step, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype
) -> None:
    assert_steps_match(step, make_problem(B, T, H, K, V, dtype))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_decays_and_scale_are_used(step: Step, dtype: torch.dtype) -> None:
    rates = torch.tensor([-60.0, -0.7, 0.0, -1e-9])
    assert_steps_match(step, make_problem(2, 4, 4, 8, 8, dtype, g_gamma=rates, scale=-1.5))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_are_the_whole_sequence(step: Step, dtype: torch.dtype) -> None:
    assert_steps_match(step, make_problem(2, 60, 2, 5, 7, dtype), lengths=[1, 1, 16, 3, 1, 16, 2, 4, 16])


@pytest.mark.usefixtures("either")
def test_decays_are_exact_for_16_bits_too(step: Step) -> None:
    """A state that is kept for thousands of tokens is float32, whatever the dtype of these."""
    problem = make_problem(1, 1200, 1, 1, 9, torch.float16, g_gamma=torch.tensor([-(2.0**-11) / 3]))
    problem = replace(problem, k=problem.k * 0)  # nothing but decay
    state = run_step(step, problem, lengths=[16] * 75)["final_state"]
    assert (
        errors(state, solve(problem)["final_state"])[0] < 2e-6
    )  # rounding 1200 times by half a unit, not by as much more


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("stride", ["dense", "of_layers", "of_one_more"])
@pytest.mark.parametrize("way", ["registers", "pieces", "kept"])
def test_rows_use_their_slots_alone(step: Step, indices: torch.dtype, stride: str, way: str) -> None:
    problem = make_problem(4, 3, 2, 5, 8)
    memory = torch.randn(6, 3, 2, 5, 8)
    pool = {"dense": memory.flatten(0, 1)[:6], "of_layers": memory[:, 1], "of_one_more": memory.flatten()[1:481]}[
        stride
    ]
    pool = pool.view(6, 2, 5, 8)
    slots = torch.tensor([4, -1, 0, 3])
    pool[slots[slots >= 0]] = problem.h0[slots >= 0]
    before, states_out = memory.clone(), torch.full((4, 3, 2, 5, 8), 7.0)
    wide = torch.stack([slots, slots + 99], 1).to(indices)[:, 0]  # of any stride
    with in_pieces(way):
        kept = states_out if way == "kept" else None
        o = step(problem.q, problem.k, problem.v, pool, state_indices=wide, states_out=kept)
    expected = solve(problem)
    used = slots >= 0
    assert errors(o[used], expected["o"][used])[0] < 1e-5
    assert errors(pool[slots[used]], expected["final_state"][used])[0] < 1e-5
    assert way != "kept" or torch.equal(states_out[used][:, -1], pool[slots[used]])
    assert o[1].count_nonzero() == 0
    assert (states_out[1] == 7).all()
    pool[slots[used]] = problem.h0[used]
    assert torch.equal(memory, before)  # nothing else was written


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("V", "count"), [(6, 20), (20, 8)])
def test_sequences_in_a_pool_are_as_if_each_were_alone(step: Step, V: int, count: int) -> None:
    assert_served_as_alone(step, count=count, rows=4, V=V)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_launch_that_is_known_is_the_same(
    step: Step, kept: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is kept on a GPU from the first call of its kind on."""
    module = importlib.import_module("generated.retention.step")
    whole = make_problem(3, 2, 4, 5, 8)
    _, given = group_heads(whole, 2 if grouped else 4)
    del given["g_gamma"]
    given["state_indices"] = torch.tensor([2, -1, 0])
    if kept:
        given |= {"states_out": torch.zeros(3, 2, given["k"].shape[2], 5, 8), "out": torch.empty(3, 2, 4, 8)}
    first, second = ({name: None if x is None else x.clone() for name, x in given.items()} for _ in range(2))
    expected = step(**first)
    tensors = (*(second[name] for name in "qkv"), None, second["state"], second["state_indices"], None)
    launch = module.prepare_step(*tensors, given.get("states_out"), module.StepConfig(BV=8, num_warps=1))
    launches = as_on_a_gpu(module.KNOWN, launch, expected, monkeypatch)
    version = second["state"]._version
    assert torch.equal(step(**second), expected)
    assert len(launches) == 1
    assert second["state"]._version > version
    for name in ("state", "states_out"):
        assert name not in second or torch.equal(second[name], first[name])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("T", [2, 16])
def test_a_skipped_row_may_hold_anything(step: Step, T: int) -> None:
    q, state = torch.full((2, T, 1, 4), float("nan")), torch.full((1, 1, 4, 4), float("inf"))
    o = step(q, q, q, state, state_indices=torch.tensor([-1, -1]))
    assert o.count_nonzero() == 0
    assert state.isinf().all()


def test_states_are_kept_after_each_token(step: Step) -> None:
    problem = make_problem(2, 5, 2, 6, 9)
    states_out = torch.empty(2, 5, 2, 6, 9)
    got = run_step(step, problem, states_out=states_out)
    assert torch.equal(states_out[:, -1], got["final_state"])
    for t in range(5):
        part = {name: getattr(problem, name)[:, : t + 1] for name in ("q", "k", "v", "do")}
        assert errors(states_out[:, t], solve(replace(problem, **part))["final_state"])[0] < 1e-5


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("layout", ["fused", "heads_first", "last_strided", "broadcast"])
def test_inputs_may_have_any_strides(step: Step, layout: str) -> None:
    problem = make_problem(2, 3, 2, 8, 8)
    inputs = (problem.q, problem.k, problem.v)
    if layout == "fused":
        inputs = torch.cat(inputs, -1).chunk(3, -1)
    elif layout == "heads_first":
        inputs = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    elif layout == "last_strided":
        inputs = tuple(x.mT.contiguous().mT for x in inputs)
    else:
        inputs = tuple(x[:1, :, :1].expand(2, -1, 2, -1) for x in inputs)
    assert layout == "fused" or not any(x.is_contiguous() for x in inputs)
    assert_steps_match(step, replace(problem, **dict(zip("qkv", inputs, strict=True))))


def test_out_is_written_and_returned(step: Step) -> None:
    problem = make_problem(2, 3, 2, 5, 7)
    out = torch.empty(2, 3, 2, 7)
    assert step(problem.q, problem.k, problem.v, problem.h0.clone(), out=out) is out
    assert errors(out, solve(problem)["o"])[0] < 1e-5


@pytest.mark.parametrize("BV", [8, 64])
def test_other_tiles_are_right(step: Step, BV: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("generated.retention.step")
    monkeypatch.setattr(module, "choose_config", lambda *_: module.StepConfig(BV=BV, num_warps=1))
    assert_steps_match(step, make_problem(1, 3, 2, 5, 7))


def test_wider_heads_than_a_program_can_hold_are_refused(step: Step) -> None:
    q, v = torch.ones(1, 1, 1, 513), torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="retention_step: K is 513 and V is 1; on a GPU both are at most 512"):
        step(q, q, v, torch.zeros(1, 1, 513, 1))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("HQ", "H"), [(3, 1), (4, 2), (8, 8), (33, 1)])  # in one block of outputs, and in more
@pytest.mark.parametrize("T", [1, 3, 5])
def test_query_heads_share_the_state_of_their_group(step: Step, T: int, HQ: int, H: int, dtype: torch.dtype) -> None:
    problem = make_problem(2, T, HQ, 20, 33, dtype)
    assert_grouped_steps_match(step, problem, H)
    assert_grouped_steps_match(step, replace(problem, q=problem.q.transpose(1, 2).contiguous().transpose(1, 2)), H)


def test_grouped_heads_use_their_slots_alone(step: Step) -> None:
    _, given = group_heads(make_problem(3, 2, 6, 5, 8), 2)
    pool = torch.randn(5, 2, 5, 8)
    slots = torch.tensor([4, -1, 0])
    pool[slots[::2]] = given["state"][::2]
    kept, out, before = torch.zeros(3, 2, 2, 5, 8), torch.empty(3, 2, 6, 8), pool.clone()
    o = step(**given | {"state": pool}, state_indices=slots, states_out=kept, out=out)
    expected = step(**given, states_out=torch.empty_like(kept))
    assert o is out
    assert torch.equal(o[::2], expected[::2])
    assert o[1].count_nonzero() == kept[1].count_nonzero() == 0
    assert torch.equal(pool[slots[::2]], given["state"][::2])
    assert torch.equal(kept[::2, -1], given["state"][::2])
    assert torch.equal(pool[1:4], before[1:4])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 3, 1, 1), (2, 2, 20, 33), (1, 1, 130, 40)])
def test_states_of_16_bits_are_rounded_once(step: Step, B: int, H: int, K: int, V: int, dtype: torch.dtype) -> None:
    nearest = 0.5 if dtype == torch.float16 else 1  # the interpreter cuts off what bfloat16 has no bits for
    assert_rounded_once(step, make_problem(B, 3, H, K, V), dtype, nearest)
    assert_rounded_once(step, make_problem(B, 3, H, K, V), dtype, 1, seed=5)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_has_no_bias(step: Step, dtype: torch.dtype) -> None:
    assert_unbiased(step, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_has_bits_of_its_own(step: Step, dtype: torch.dtype) -> None:
    assert_independent(step, dtype)


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # of infinite states there are no outputs
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_leaves_alone_what_needs_none(step: Step, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps
    values = [0.0, 1.0, -3.0, limits.max, -limits.max, limits.tiny, -least, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(values).expand(1, 1, 16, -1)
    for seed in range(3):
        assert torch.equal(store(step, x, dtype, seed).float().nan_to_num(7), x.nan_to_num(7))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", HALVES)
def test_bits_go_with_the_slot_and_not_with_row_or_tiles(
    step: Step, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(3, 2, 2, 20, 33)
    slots = torch.tensor([3, 0, 2])
    expected = torch.zeros(4, 2, 20, 33, dtype=dtype)
    step(problem.q, problem.k, problem.v, expected, state_indices=slots, seed=1)
    module = importlib.import_module("generated.retention.step")
    for BV in (8, 16, 64):
        for default in ("default_config", "default_config_in_pieces"):
            monkeypatch.setattr(module, default, lambda *_, BV=BV, **__: module.StepConfig(BV=BV, num_warps=1))
        importlib.import_module("generated.configuration").clear_caches()
        pool = torch.zeros_like(expected)
        step(*(x.flip(0) for x in (problem.q, problem.k, problem.v)), pool, state_indices=slots.flip(0), seed=1)
        assert torch.equal(pool, expected)


def test_a_slow_decay_is_not_lost_beside_a_state_that_grows(step: Step) -> None:
    """Where the decay's part is under half a unit of the state, and alone would be rounded away."""
    problem = make_problem(1, 1008, 1, 1, 24, g_gamma=torch.tensor([-(2.0**-23)]))
    problem = replace(problem, h0=problem.h0 * 4096)
    state = run_step(step, problem, lengths=[16] * 63)["final_state"]
    assert errors(state, solve(problem)["final_state"])[0] < 2e-6


@pytest.mark.parametrize("rate", [-0.2, -0.3, -3.0, -8.0, -17.0])
def test_a_fast_decay_is_as_exact_as_a_slow_one(step: Step, rate: float) -> None:
    problem = make_problem(1, 1, 1, 3, 5, g_gamma=torch.tensor([rate]))
    problem = replace(problem, k=problem.k * 0)
    state = run_step(step, problem)["final_state"]
    assert errors(state, solve(problem)["final_state"])[0] < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_what_has_a_finite_number_nearest_to_it_never_becomes_infinite(step: Step, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    half = limits.max * limits.eps / 5  # of the distance to what would be the next number
    x = torch.tensor([limits.max + half, -limits.max - half], dtype=torch.float64).float().expand(1, 1, 16, -1)
    assert x.isfinite().all()
    for seed in range(8):
        assert torch.equal(store(step, x, dtype, seed).double(), x.sign() * limits.max)


def test_heads_may_lie_as_far_apart_as_there_is_memory(step: Step) -> None:
    """Their places are numbers of 64 bits: the third head's here is beyond 2^31."""
    module = importlib.import_module("generated.retention.step")
    far, k = 2**30, torch.ones(1, 1, 3, 16, dtype=torch.float16)
    memory = torch.from_numpy(np.zeros(2 * far + 64, dtype=np.float16))  # of which the system gives what is written to
    q = memory.as_strided((1, 1, 3, 16), (16, 16, far, 1))
    q.fill_(1.0)
    o, state = torch.empty_like(k), torch.zeros(1, 3, 16, 16)
    module.step_update(q, k, k, torch.zeros(3), 1.0, state, None, None, None, o)
    assert torch.equal(o, torch.full_like(o, 16.0))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("T", "G"), [(3, 2), (5, 1), (5, 2)])
def test_tokens_may_lie_as_far_apart_as_there_is_memory(step: Step, T: int, G: int) -> None:
    module = importlib.import_module("generated.retention.step")
    q, k = (tokens_far_apart(T, heads) for heads in (G, 1))
    o, state = torch.empty(1, T, G, 16, dtype=torch.float16), torch.zeros(1, 1, 16, 16)
    module.step_update(q, k, k, torch.zeros(1), 1.0, state, None, None, None, o)
    assert torch.equal(o, 16.0 * torch.arange(1, T + 1).half().view(1, T, 1, 1).expand_as(o))
    assert torch.equal(state, torch.full_like(state, float(T)))


@pytest.mark.parametrize("T", [3, 16])
@pytest.mark.parametrize("G", [1, 2])
def test_what_a_later_token_holds_changes_no_earlier_output(step: Step, T: int, G: int) -> None:
    problem = make_problem(1, T, 2 * G, 20, 33)
    _, given = group_heads(problem, 2)
    with in_pieces("pieces"):
        expected = step(**given | {"state": given["state"].clone()})
        for name in "qkv":
            given[name] = given[name].clone()
            given[name][:, -1] = torch.nan
        assert torch.equal(step(**given)[:, :-1], expected[:, :-1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("T", [3, 5, 16])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_reaches_its_column_from_its_token_on(
    step: Step, value: float, T: int, G: int
) -> None:
    _, given = group_heads(make_problem(1, T, 2 * G, 20, 33), 2)
    expected = step(**given | {"state": given["state"].clone()})
    given["v"] = given["v"].clone()
    given["v"][0, T // 2, 0, 7] = value
    o = step(**given)
    reached = torch.zeros_like(o, dtype=torch.bool)
    reached[:, T // 2 :, :G, 7] = True
    assert torch.equal(o[~reached], expected[~reached])
    assert not o[reached].isfinite().any()


@pytest.mark.parametrize("seed", [None, 5])
def test_states_of_16_bits_are_rounded_in_pieces_as_in_registers(step: Step, seed: int | None) -> None:
    """One token's by the same bits; those of several, whose sums are others, next to it at most, and seldom."""
    problem = make_problem(2, 3, 4, 130, 40, torch.float16)
    for tokens in (1, 3):
        _, given = group_heads(replace(problem, **{x: getattr(problem, x)[:, :tokens] for x in "qkv"}), 2)
        state = given.pop("state").half()
        alone, grouped = state.clone(), state.clone()
        with in_pieces("pieces"):
            step(**given, state=grouped, seed=seed)
        kept = torch.empty(2, tokens, 2, 130, 40, dtype=torch.float16)
        step(**given, state=alone, seed=seed, states_out=kept)
        apart = (alone.double() - grouped.double()).abs()
        assert (apart <= spacing(alone.double(), torch.float16)).all()
        assert (apart > 0).double().mean() <= (0 if tokens == 1 else 1e-3)


@pytest.mark.parametrize("slot", [2, 7, -3])
@pytest.mark.parametrize("way", ["registers", "pieces", "kept"])
def test_a_slot_that_there_is_not_is_neither_read_nor_written(step: Step, slot: int, way: str) -> None:
    """As on a GPU, where nobody looks at the values."""
    module = importlib.import_module("generated.retention.step")
    memory, x, q = torch.ones(9, 1, 16, 16), torch.ones(2, 1, 1, 16), torch.ones(2, 1, 3, 16)
    o, kept = torch.full_like(q, torch.nan), torch.zeros(2, 1, 1, 16, 16)
    indices = torch.tensor([slot, 1])
    with in_pieces(way):
        given = (torch.zeros(1), 1.0, memory[3:5], indices, None, kept if way == "kept" else None, o)
        module.step_update(q, x, x, *given)
    assert o[0].count_nonzero() == kept[0].count_nonzero() == 0
    assert torch.equal(o[1], torch.full_like(o[1], 32.0))
    assert torch.equal(memory[4], torch.full_like(memory[4], 2.0))
    assert torch.equal(memory[[0, 1, 2, 3, 5, 6, 7, 8]], torch.ones(8, 1, 16, 16))
