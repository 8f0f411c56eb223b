"""Steps whose last tokens lie in buffers, the kernel run by the interpreter, give what the formulas say."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from buffered import BufferedServer, Buffers, assert_buffered_match, run_buffered, stored_alone
from oracle import errors, make_problem, solve
from serving import assert_served_as_alone
from steps import as_on_a_gpu, assert_unbiased, tokens_far_apart
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.forms("step_buffered")]

Step = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def step(function: Step) -> Step:
    """The public function, through the kernel; so is the flush."""
    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 3, 1, 1), (2, 2, 20, 33), (1, 1, 300, 20)])
@pytest.mark.parametrize(("lengths", "L"), [([1] * 9, 1), ([1] * 9, 4), ([1, 3, 3, 2], 3), ([16, 1, 15, 16, 2], 16)])
def test_any_shape_gives_the_oracles_results(
    step: Step, lengths: list[int], L: int, B: int, H: int, K: int, V: int, dtype: torch.dtype
) -> None:
    assert_buffered_match(step, make_problem(B, sum(lengths), H, K, V, dtype), lengths, L)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_decays_and_scale_are_used(step: Step, dtype: torch.dtype) -> None:
    rates = torch.tensor([-60.0, -0.7, 0.0, -1e-9])
    assert_buffered_match(step, make_problem(2, 6, 4, 8, 8, dtype, g_gamma=rates, scale=-1.5), [1] * 6, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("G", "H"), [(3, 1), (2, 2), (33, 1)])  # in one block of outputs, and in more
def test_query_heads_share_the_state_of_their_group(step: Step, G: int, H: int, dtype: torch.dtype) -> None:
    assert_buffered_match(step, make_problem(2, 9, H, 20, 33, dtype, group=G), [1, 1, 3, 1, 2, 1], 3)


@pytest.mark.parametrize("T", [3, 16])
def test_what_a_later_token_holds_changes_no_earlier_output(step: Step, T: int) -> None:
    """It may be taken back."""
    problem = make_problem(1, 2 * T, 2, 20, 33)
    outputs = []
    for fill in (None, torch.nan):
        state = problem.h0.clone()
        buffers = Buffers(state, torch.float32, 16)
        first, second = zip(*(getattr(problem, name).clone().split(T, 1) for name in "qkv"), strict=True)
        buffers.step(step, *first, state=state)
        for x in second if fill is not None else ():
            x[:, -1] = fill
        outputs.append(buffers.step(step, *second, state=state)[:, :-1])
    assert torch.equal(*outputs)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("T", [1, 3, 5, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_reaches_its_column_from_its_token_on(step: Step, value: float, T: int) -> None:
    outputs = []
    problem = make_problem(1, 2 * T, 2, 20, 33)
    for fill in (1.0, value):
        state = problem.h0.clone()
        buffers = Buffers(state, torch.float32, 16)
        problem.v[0, T + T // 2, 0, 7] = fill
        first, second = zip(*(getattr(problem, name).split(T, 1) for name in "qkv"), strict=True)
        buffers.step(step, *first, state=state)
        outputs.append(buffers.step(step, *second, state=state))
    expected, o = outputs
    reached = torch.zeros_like(o, dtype=torch.bool)
    reached[:, T // 2 :, 0, 7] = True
    assert torch.equal(o[~reached], expected[~reached])
    assert not o[reached].isfinite().any()


@pytest.mark.parametrize("T", [1, 2])
def test_a_launch_that_is_known_is_the_same(step: Step, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is kept on a GPU from the first call of its kind on."""
    module = importlib.import_module("generated.retention.step_buffered")
    problem = make_problem(3, T, 4, 5, 8)
    given = {"q": problem.q, "k": problem.k, "v": problem.v, "state": problem.h0}
    given |= {f"{name}_buffer": torch.randn(3, 6, 4, width) for name, width in (("k", 5), ("v", 8))}
    given |= {"lengths": torch.tensor([9, 4, 7]), "folded": torch.tensor([7, 1, 7])}
    given["state_indices"] = torch.tensor([2, -1, 0])
    first, second = ({name: x.clone() for name, x in given.items()} for _ in range(2))
    expected = step(**first)
    written = ("state", "k_buffer", "v_buffer")
    tensors = (*(second[name] for name in "qkv"), None, *(second[name] for name in (*written, "state_indices")), None)
    launches = as_on_a_gpu(module.KNOWN, module.prepare_step_buffered(*tensors), expected, monkeypatch)
    versions = {name: second[name]._version for name in written}
    assert torch.equal(step(**second), expected)
    assert len(launches) == 1
    for name in written:
        assert torch.equal(second[name], first[name])
        assert second[name]._version > versions[name]


def test_a_fold_is_as_exact_as_float32(step: Step) -> None:
    rates = torch.tensor([-60.0, -3.0, -0.3, -0.2, -0.02, -0.01, -1e-9, 0.0])
    problem = make_problem(2, 16, 8, 20, 33, g_gamma=rates)
    state = run_buffered(step, problem, [1] * 16, 16)["final_state"]
    exact = solve(problem)["final_state"]
    assert all(errors(state[:, i], exact[:, i])[0] < 1e-6 for i in range(8))


def test_a_slow_decay_is_not_lost_beside_a_state_that_grows(step: Step) -> None:
    """Where the decay's part is under half a unit of the state, and alone would be rounded away."""
    problem = make_problem(1, 600, 1, 1, 24, g_gamma=torch.tensor([-(2.0**-26)]))
    problem = replace(problem, h0=problem.h0 * 4096)
    state = run_buffered(step, problem, [2] * 300, 2)["final_state"]
    assert errors(state, solve(problem)["final_state"])[0] < 2e-6


def test_decays_are_exact_for_16_bits_too(step: Step) -> None:
    problem = make_problem(1, 400, 1, 1, 9, torch.float16, g_gamma=torch.tensor([-(2.0**-11) / 3]))
    problem.k.zero_()
    state = run_buffered(step, problem, [1] * 400, 16)["final_state"]
    assert errors(state, solve(problem)["final_state"])[0] < 2e-6


@pytest.mark.parametrize(("V", "count"), [(6, 20), (20, 8)])
def test_sequences_in_a_pool_are_as_if_each_were_alone(step: Step, V: int, count: int) -> None:
    assert_served_as_alone(step, count=count, rows=4, V=V, kind=BufferedServer)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_use_their_slots_alone(step: Step, index: torch.dtype) -> None:
    problem = make_problem(4, 3, 2, 5, 8)
    slots = torch.tensor([4, -1, 0, 3])
    used = slots >= 0
    memory = torch.randn(6, 2, 2, 5, 8)
    pool = memory[:, 1]
    pool[slots[used]] = problem.h0[used]
    before, buffers = memory.clone(), Buffers(pool, torch.float32, 4)
    buffers.lengths, buffers.folded = buffers.lengths.to(index), buffers.folded.to(index)
    wide = torch.stack([slots, slots + 99], 1).to(index)[:, 0]  # of any stride
    o = buffers.step(step, problem.q, problem.k, problem.v, state=pool, state_indices=wide)
    assert errors(o[used], solve(problem)["o"][used])[0] < 1e-5
    assert o[1].count_nonzero() == 0
    assert torch.equal(memory, before)  # nothing is folded yet
    assert buffers.k[[1, 2, 5]].isnan().all()
    assert buffers.v[[0, 3, 4]].isfinite().sum() == 3 * 3 * 2 * 8  # rows, tokens, heads, V
    buffers.flush(pool)
    assert errors(pool[slots[used]], solve(problem)["final_state"][used])[0] < 1e-5
    pool[slots[used]] = problem.h0[used]
    assert torch.equal(memory, before)  # nothing else was written


@pytest.mark.parametrize(("slot", "lengths", "folded"), [(2, 7, 5), (-3, 7, 5), (1, 5, 7), (1, 9, 4), (1, -2, -3)])
def test_a_row_without_slot_or_tokens_is_neither_read_nor_written(
    step: Step, slot: int, lengths: int, folded: int
) -> None:
    """As on a GPU, where nobody looks at the values."""
    module = importlib.import_module("generated.retention.step_buffered")
    x, memory = torch.full((1, 1, 1, 16), torch.nan), torch.ones(6, 1, 16, 16)
    o, k, v = torch.full_like(x, torch.nan), torch.ones(6, 8, 1, 16), torch.ones(6, 8, 1, 16)
    counts = (torch.tensor([lengths]), torch.tensor([folded]), torch.tensor([slot]))
    places = (memory[2:4], k[2:4], v[2:4])
    for most in (1, 0):  # a step, and a flush
        given = (*(x[:, :most] for _ in range(3)), torch.zeros(1), 1.0, *places, *counts, None, o[:, :most])
        module.step_buffered_update(*given)
    assert o.count_nonzero() == 0
    assert all((y == 1).all() for y in (memory, k, v))


@pytest.mark.parametrize("layout", ["fused", "heads_first", "broadcast"])
def test_inputs_may_have_any_strides(step: Step, layout: str) -> None:
    problem = make_problem(2, 3, 2, 8, 8)
    inputs = (problem.q, problem.k, problem.v)
    if layout == "fused":
        inputs = torch.cat(inputs, -1).chunk(3, -1)
    elif layout == "heads_first":
        inputs = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    else:
        inputs = tuple(x[:1, :, :1].expand(2, -1, 2, -1) for x in inputs)
    expected = [Buffers(problem.h0, torch.float32, 4) for _ in range(2)]
    found = [
        one.step(step, *given, state=problem.h0.clone())
        for one, given in zip(expected, (inputs, tuple(x.contiguous() for x in inputs)), strict=True)
    ]
    assert torch.equal(*found)
    assert torch.equal(expected[0].k.nan_to_num(7), expected[1].k.nan_to_num(7))


@pytest.mark.parametrize(("T", "G"), [(3, 2), (5, 1), (5, 2)])
def test_tokens_may_lie_as_far_apart_as_there_is_memory(step: Step, T: int, G: int) -> None:
    """The second call folds the first one's, and the flush its own."""
    q, k = (tokens_far_apart(T, heads) for heads in (G, 1))
    state, rates = torch.zeros(1, 1, 16, 16), torch.zeros(1)
    buffers = Buffers(state, k.dtype, T)
    for call in range(2):
        o = buffers.step(step, q, k, k, state=state, g_gamma=rates, scale=1.0)
        expected = 16.0 * torch.arange(call * T + 1, call * T + T + 1).half()
        assert torch.equal(o, expected.view(1, T, 1, 1).expand_as(o))
    buffers.flush(state, g_gamma=rates)
    assert torch.equal(state, torch.full_like(state, 2.0 * T))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_has_no_bias(step: Step, dtype: torch.dtype) -> None:
    assert_unbiased(stored_alone(step), dtype, seeds=20)


def test_a_seed_rounds_as_it_does_in_a_step(step: Step) -> None:
    problem = make_problem(2, 3, 2, 20, 33)
    steps = importlib.import_module("generated.retention.step")
    whole, folded = (problem.h0.to(torch.float16) for _ in range(2))
    for t in range(3):
        part = [x[:, t : t + 1].contiguous() for x in (problem.q, problem.k, problem.v)]
        before = folded.clone()
        steps.step_update(*part, None, None, whole, None, torch.tensor([t]), None, torch.empty_like(part[2]))
        stored_alone(step)(*part, folded, seed=torch.tensor([t]))
        assert torch.equal(folded, whole)
        assert not torch.equal(folded, before)


def test_other_tiles_are_right(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("generated.retention.step_buffered")
    for BV in (8, 64):
        monkeypatch.setattr(module, "default_config", lambda *_, BV=BV, **__: module.StepConfig(BV=BV, num_warps=1))
        importlib.import_module("generated.configuration").clear_caches()
        assert_buffered_match(step, make_problem(1, 5, 2, 5, 17), [1] * 5, 2)


def test_steps_and_buffered_steps_may_take_turns(step: Step) -> None:
    problem = make_problem(2, 6, 2, 5, 7)
    parts = [x.split(3, 1) for x in (problem.q, problem.k, problem.v)]
    state, buffers = problem.h0.clone(), Buffers(problem.h0, torch.float32, 4)
    first = buffers.step(step, *(x[0] for x in parts), state=state)
    buffers.flush(state)
    package = importlib.import_module("generated")
    o = torch.cat([first, package.retention_step(*(x[1] for x in parts), state)], 1)
    assert errors(o, solve(problem)["o"])[0] < 1e-5
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


def test_wider_heads_than_a_program_can_hold_are_refused(step: Step) -> None:
    q, v, state = torch.ones(1, 1, 1, 513), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 513, 1)
    with pytest.raises(ValueError, match="retention_step_buffered: K is 513 and V is 1; on a GPU both are at most 512"):
        Buffers(state, torch.float32, 4).step(step, q, q, v, state=state)
