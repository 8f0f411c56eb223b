"""Steps whose last tokens lie in buffers, on the CPU: results, bad input, and their manners as operators."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from buffered import BufferedServer, Buffers, assert_buffered_match, run_buffered, stored_alone
from oracle import errors, make_problem, solve
from serving import assert_served_as_alone
from steps import assert_unbiased, group_heads, spacing, write_rules
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from generated import arguments, configuration, retention_step, retention_step_buffered, retention_step_flush
from generated.retention import step_buffered
from generated.retention.step import StepConfig
from generated.retention.step_buffered import config_for, default_config

B, T, H, K, V, L = 2, 2, 2, 4, 5, 3
OPERATOR = torch.ops.retgen.retention_step_buffered.default
README = Path(__file__).resolve().parent.parent / "README.md"
Change = Callable[[dict[str, Any]], Any]
halves = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start and leave without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def good(**values: Any) -> dict[str, Any]:
    """A call in a pool, of whose rows the first one folds and the second one is skipped."""
    given: dict[str, Any] = {name: torch.randn(B, T, H, D) for name, D in (("q", K), ("k", K), ("v", V))}
    given |= {"state": torch.randn(4, H, K, V), "state_indices": torch.tensor([3, -1]), "out": torch.zeros(B, T, H, V)}
    given |= {"k_buffer": torch.randn(4, 2 * L, H, K), "v_buffer": torch.randn(4, 2 * L, H, V)}
    return given | {"lengths": torch.tensor([9, 0]), "folded": torch.tensor([7, 0])} | values


def copy(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


WRITTEN = ("state", "k_buffer", "v_buffer", "out")
FLUSHED = ("state", "k_buffer", "v_buffer", "lengths", "folded", "state_indices")


# Results


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "most"), [([1] * 9, 4), ([1] * 9, 1), ([9], 9), ([1, 3, 3, 2], 3), ([1] * 9, 16)])
def test_steps_are_the_sequence(lengths: list[int], most: int, dtype: torch.dtype) -> None:
    rates = torch.tensor([-0.7, 0.0, -1e-9])
    problem = make_problem(2, 9, 3, 5, 7, dtype, g_gamma=rates, scale=-1.5)
    assert_buffered_match(retention_step_buffered, problem, lengths, most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("HQ", "heads"), [(6, 1), (6, 2)])
def test_query_heads_share_the_state_of_their_group(HQ: int, heads: int, dtype: torch.dtype) -> None:
    problem = make_problem(2, 7, heads, 5, 7, dtype, group=HQ // heads)
    assert_buffered_match(retention_step_buffered, problem, [1, 2, 1, 3], 3)


def test_the_state_is_written_every_lth_token_alone() -> None:
    problem = make_problem(1, 11, 2, 5, 7)
    state = problem.h0.clone()
    buffers, whole = Buffers(state, torch.float32, 4), problem.h0.clone()
    for t in range(11):
        before = state.clone()
        part = [x[:, t : t + 1] for x in (problem.q, problem.k, problem.v)]
        buffers.step(retention_step_buffered, *part, state=state)
        assert torch.equal(state, before) == (t not in (4, 8))
        if t in (4, 8):
            torch.testing.assert_close(state, whole)
        retention_step(*part, whole)


def test_rows_use_their_slots_alone() -> None:
    given = good()
    before = copy(given)
    o = retention_step_buffered(**given)
    alone = {name: x[3:] if name in WRITTEN[:3] else x[:1] for name, x in copy(before).items()}
    del alone["state_indices"]
    torch.testing.assert_close(o[:1], retention_step_buffered(**alone))
    assert o is given["out"]
    assert o[1].count_nonzero() == 0
    for name in WRITTEN[:3]:
        assert torch.equal(given[name], torch.cat([before[name][:3], alone[name]]))
    rows = torch.tensor([3, 4]) + 2 * L  # of tokens 9 and 10
    assert torch.equal(given["k_buffer"][3, rows % (2 * L)], before["k"][0])
    others = torch.tensor([0, 1, 2, 5])
    assert torch.equal(given["v_buffer"][3, others], before["v_buffer"][3, others])


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_any_of_a_calls_tokens_may_be_taken_back_also_where_it_folds(accepted: int) -> None:
    problem = make_problem(2, 9, 2, 5, 7)
    state, x = problem.h0.clone(), (problem.q, problem.k, problem.v)
    buffers = Buffers(state, torch.float32, 4)
    for t in range(3):
        buffers.step(retention_step_buffered, *(y[:, t : t + 1] for y in x), state=state)
    drafts = [torch.cat([y[:, 3 : 3 + accepted], y[:, accepted:3].flip(0)], 1) for y in x]
    buffers.step(retention_step_buffered, *drafts, state=state, accepted=torch.full((2,), accepted))
    assert (buffers.folded == torch.tensor([3, 8])).all()
    for t in range(3 + accepted, 9):
        o = buffers.step(retention_step_buffered, *(y[:, t : t + 1] for y in x), state=state)
        assert errors(o, solve(problem)["o"][:, t : t + 1])[0] < 1e-5
    buffers.flush(state)
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


@pytest.mark.parametrize("where", ["README", "docstring"])
def test_counts_go_on_as_is_written(where: str) -> None:
    """In slots of a pool, one row skipped, some tokens taken back: the lines are those that a caller copies."""
    text = README.read_text(encoding="utf-8") if where == "README" else str(retention_step_buffered.__doc__)
    lines = re.search(r"^ *n = lengths - folded\n.*\n *lengths \+= accepted", text, re.MULTILINE)
    assert lines is not None
    count = textwrap.dedent(lines.group())
    slots, T, L, state = torch.tensor([3, -1, 0]), 2, 3, torch.randn(4, H, K, V)
    lengths, folded, expected = torch.tensor([7, 0, 2]), torch.tensor([7, 0, 2]), state.clone()
    buffers = [torch.full((4, 2 * L, H, width), float("nan")) for width in (K, V)]
    for accepted in torch.randint(0, T + 1, (12, 3)):
        accepted[1] = 0
        inputs = [torch.randn(3, T, H, width) for width in (K, K, V)]
        kept = torch.empty(3, T, H, K, V)
        wanted = retention_step(*inputs, expected.clone(), state_indices=slots, states_out=kept)
        o = retention_step_buffered(*inputs, state, *buffers, lengths, folded, state_indices=slots)
        torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-4)
        for row in (0, 2):
            if accepted[row]:
                expected[slots[row]] = kept[row, accepted[row] - 1]
        exec(count, {"torch": torch}, dict(locals(), slots_of_rows=slots, state_indices=slots))  # noqa: S102
    retention_step_flush(state, *buffers, lengths, folded, state_indices=slots)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "V"), [(1, 6), (7, 40), (32, 6)])
def test_sequences_in_a_pool_are_as_if_each_were_alone(rows: int, V: int) -> None:
    assert_served_as_alone(retention_step_buffered, count=200, rows=rows, V=V, seed=rows, kind=BufferedServer)


@halves
def test_states_of_16_bits_are_rounded_where_they_are_folded_alone(half: torch.dtype) -> None:
    problem = make_problem(2, 12, 3, 20, 33)
    problem.h0.copy_(problem.h0.to(half))
    for seed, units in ((None, 0.5), (5, 1)):
        got = run_buffered(retention_step_buffered, problem, [1] * 12, 12, half, seed=seed)
        exact = solve(problem)["final_state"]
        assert errors(got["o"], solve(problem)["o"])[0] < 1e-5
        assert got["final_state"].dtype == half
        distance = (got["final_state"].double() - exact).abs()
        assert (distance <= units * spacing(exact, half) + 1e-5 * exact.abs().max()).all()


@halves
def test_stochastic_rounding_has_no_bias(half: torch.dtype) -> None:
    assert_unbiased(stored_alone(retention_step_buffered), half)


def test_a_skipped_row_is_neither_read_nor_counted() -> None:
    given = good(lengths=torch.tensor([9, -7]), folded=torch.tensor([7, 99]))
    given["q"][1] = given["k"][1] = given["v"][1] = torch.nan
    assert retention_step_buffered(**given).isfinite().all()
    retention_step_flush(**{name: given[name] for name in FLUSHED})


def test_a_flush_changes_nothing_where_nothing_is_buffered() -> None:
    given = {name: x for name, x in good(lengths=torch.tensor([9, 0])).items() if name in FLUSHED}
    given["folded"] = given["lengths"].clone()
    before = copy(given)
    assert retention_step_flush(**given) is None
    torch.testing.assert_close(given, before, rtol=0, atol=0)


# Bad input


class NoStep(TorchDispatchMode):
    """Fail where the operator starts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "retgen" not in str(func), f"{func} was called"
        return func(*args, **(kwargs or {}))


def put(**values: Any) -> Change:
    return lambda given: given.update(values)


def change(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda given: given.update({name: function(given[name])})


def in_the_state(given: dict[str, Any]) -> None:
    """The state lies at the beginning of a buffer."""
    given["state"] = given["v_buffer"].flatten()[: given["state"].numel()].view_as(given["state"])


BAD = {
    "k_of_another_dtype": (change("k", Tensor.half), TypeError, "k is torch.float16, q is torch.float32"),
    "decays_of_more_heads": (put(g_gamma=torch.zeros(3)), ValueError, "g_gamma is [3]"),
    "state_elsewhere": (change("state", lambda x: x.to("meta")), ValueError, "state is on meta, q on cpu"),
    "state_of_two_dimensions": (change("state", lambda x: x[0, 0]), ValueError, "state is [4, 5]"),
    "seed_for_float32": (put(seed=0), ValueError, "seed is given for a state of torch.float32"),
    "no_buffer": (put(k_buffer=None), TypeError, "k_buffer is a NoneType; it must be a tensor [slots, rows, H, K]"),
    "buffer_of_16_bits": (change("k_buffer", Tensor.half), TypeError, "k_buffer is torch.float16; for a q of"),
    "buffer_of_values_for_keys": (
        lambda given: given.update(k_buffer=given["v_buffer"]),
        ValueError,
        "k_buffer is [4, 6, 2, 5]; it must be [slots, rows, H, K] = [4, 6, 2, 4]",
    ),
    "buffers_of_other_rows": (
        change("v_buffer", lambda x: x[:, :4]),
        ValueError,
        "v_buffer is [4, 4, 2, 5]; it must be [slots, rows, H, V] = [4, 6, 2, 5]",
    ),
    "buffers_of_other_slots": (change("v_buffer", lambda x: x[:2]), ValueError, "v_buffer is [2, 6, 2, 5]"),
    "buffer_in_another_order": (
        change("v_buffer", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ValueError,
        "v_buffer has the strides [60, 5, 30, 1]; [rows, H, V] must be contiguous, and slots must not overlap",
    ),
    "buffers_of_odd_rows": (
        put(k_buffer=torch.ones(4, 5, H, K), v_buffer=torch.ones(4, 5, H, V)),
        ValueError,
        "the buffers have 5 rows; that must be an even number from 2 to 32",
    ),
    "buffers_of_34_rows": (
        put(k_buffer=torch.ones(4, 34, H, K), v_buffer=torch.ones(4, 34, H, V)),
        ValueError,
        "the buffers have 34 rows",
    ),
    "more_tokens_than_half_the_rows": (
        put(k_buffer=torch.ones(4, 2, H, K), v_buffer=torch.ones(4, 2, H, V)),
        ValueError,
        "T is 2; it must be at most 1, half of the buffers' 2 rows",
    ),
    "one_tensor_for_both_counts": (
        lambda given: given.update(folded=given["lengths"]),
        ValueError,
        "lengths and folded are one memory; each must have its own",
    ),
    "buffer_in_the_state": (in_the_state, ValueError, "state and v_buffer are one memory"),
    "lengths_in_a_list": (put(lengths=[9, 0]), TypeError, "lengths is a list; it must be a tensor [B]"),
    "lengths_of_int16": (change("lengths", Tensor.short), TypeError, "lengths is torch.int16", "int32 or int64"),
    "lengths_of_slots": (put(folded=torch.zeros(4).long()), ValueError, "folded is [4]; it must be [B] = [2]"),
    "lengths_elsewhere": (change("lengths", lambda x: x.to("meta")), ValueError, "lengths is on meta, q on cpu"),
    "buffer_to_train": (change("k_buffer", Tensor.requires_grad_), ValueError, "k_buffer requires grad"),
    "out_in_a_buffer": (
        lambda given: given.update(out=given["v_buffer"].flatten()[: B * T * H * V].view(B, T, H, V)),
        ValueError,
        "out shares memory with v_buffer",
    ),
    "counts_in_out": (
        lambda given: given.update(lengths=given["out"].view(torch.int32).view(-1)[:B]),
        ValueError,
        "out shares memory with lengths",
    ),
}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, is_known: bool) -> None:
    if is_known:
        for _ in range(2):
            retention_step_buffered(**good())
    given = good()
    spoil, error, *words = BAD[case]
    spoil(given)
    with pytest.raises(error) as caught, NoStep():
        retention_step_buffered(**given)
    for word in ("retention_step_buffered: ", *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


@pytest.mark.parametrize(
    "case", [name for name in BAD if "buffer" in name and "tokens" not in name and "out" not in name]
)
def test_bad_buffers_are_not_flushed(case: str) -> None:
    given = good()
    BAD[case][0](given)
    with pytest.raises((TypeError, ValueError), match="retention_step_flush: "), NoStep():
        retention_step_flush(**{name: given[name] for name in FLUSHED})


BAD_TO_FLUSH = {
    "lengths_of_slots": (put(lengths=torch.zeros(4).long()), "lengths is [4]; it must be [B] = [2]"),
    "folded_of_slots": (put(folded=torch.zeros(4).long()), "folded is [4]; it must be [B] = [2]"),
    "indices_of_a_row_more": (put(state_indices=torch.arange(3)), "state_indices is [3]; it must be [B] = [2]"),
    "counts_of_fewer_rows_without_indices": (put(state_indices=None), "lengths is [2]; it must be [B] = [4]"),
    "lengths_of_a_row_more_without_indices": (
        put(state_indices=None, lengths=torch.zeros(5).long(), folded=torch.zeros(4).long()),
        "lengths is [5]; it must be [B] = [4]",
    ),
    "folded_without_dimensions": (put(folded=torch.tensor(7)), "folded is []; it must be a tensor of 1 dimensions"),
    "no_state": (put(state=None), "state is a NoneType; it must be a tensor of 4 dimensions"),
    "keys_of_values": (
        lambda given: given.update(k_buffer=given["v_buffer"]),
        "k_buffer is [4, 6, 2, 5]; it must be [slots, rows, H, K] = [4, 6, 2, 4]",
    ),
    "values_of_keys": (
        lambda given: given.update(v_buffer=given["k_buffer"]),
        "v_buffer is [4, 6, 2, 4]; it must be [slots, rows, H, V] = [4, 6, 2, 5]",
    ),
    "values_of_16_bits": (
        change("v_buffer", Tensor.half),
        "v_buffer is torch.float16; for a k_buffer of torch.float32 it must be torch.float32",
    ),
    "folded_elsewhere": (change("folded", lambda x: x.to("meta")), "folded is on meta, k_buffer on cpu"),
    "decays_elsewhere": (put(g_gamma=torch.zeros(2, device="meta")), "g_gamma is on meta, k_buffer on cpu"),
}


@pytest.mark.parametrize("case", BAD_TO_FLUSH)
def test_a_flush_says_which_argument_is_wrong(case: str) -> None:
    given = {name: x for name, x in good().items() if name in FLUSHED}
    spoil, message = BAD_TO_FLUSH[case]
    spoil(given)
    with pytest.raises((TypeError, ValueError), match=re.escape(f"retention_step_flush: {message}")), NoStep():
        retention_step_flush(**given)


WRONG_COUNTS = [([9, 0], [10, 0]), ([9, 0], [5, 0]), ([1, 0], [-1, 0])]


@pytest.mark.parametrize(("lengths", "folded"), WRONG_COUNTS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_wrong_counts_are_refused_on_the_cpu_before_anything_is_written(
    lengths: list[int], folded: list[int], index: torch.dtype
) -> None:
    given = good(lengths=torch.tensor(lengths, dtype=index), folded=torch.tensor(folded, dtype=index))
    before = copy(given)
    message = rf"of row 0 lengths is {lengths[0]} and folded is {folded[0]}; lengths must be from folded to folded \+ 3"
    for call in (retention_step_buffered, torch.compile(retention_step_buffered, backend="eager")):
        with pytest.raises(ValueError, match=message):
            call(**given)
    with pytest.raises(ValueError, match=f"retention_step_flush: {message}"):
        retention_step_flush(**{name: given[name] for name in FLUSHED})
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_wrong_slots_are_not_flushed() -> None:
    given = good(state_indices=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"retention_step_flush: state_indices\[1\] is 4; it must be from 0 to 3"):
        retention_step_flush(**{name: given[name] for name in FLUSHED})


def test_a_negative_seed_in_a_tensor_is_refused_on_the_cpu_before_anything_is_written() -> None:
    given = good(state=torch.randn(4, H, K, V).bfloat16())
    before, seed = copy(given), torch.tensor([-1])
    with pytest.raises(ValueError, match=r"retention_step_buffered: seed is -1; it must be from 0 to 2\^63 - 1"):
        retention_step_buffered(**given, seed=seed)
    with pytest.raises(ValueError, match=r"retention_step_flush: seed is -1; it must be from 0 to 2\^63 - 1"):
        retention_step_flush(**{name: given[name] for name in FLUSHED}, seed=seed)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


@pytest.mark.parametrize(("lengths", "folded"), WRONG_COUNTS)
def test_the_debug_switch_checks_counts_without_reading_them(lengths: list[int], folded: list[int]) -> None:
    """On a GPU these are assertions on the device; on the CPU they raise at once."""
    counts = (torch.tensor(lengths), torch.tensor(folded))
    with pytest.raises(RuntimeError, match="f: lengths must be from folded to folded"):
        arguments._check_lengths_on_device("f", L, *counts, None)
    arguments._check_lengths_on_device("f", L, *counts, torch.tensor([-1, 0]))
    arguments._check_lengths_on_device("f", L, torch.tensor([9, 5]), torch.tensor([6, 5]), None)


def test_buffers_of_inference_mode_are_written_there_alone() -> None:
    given = good()
    with torch.inference_mode():
        given["v_buffer"] = given["v_buffer"].clone()
        retention_step_buffered(**given)
    with torch.no_grad(), pytest.raises(ValueError, match="v_buffer was made in inference mode"):
        retention_step_buffered(**given)


def test_a_slot_of_layers_is_taken() -> None:
    given = good()
    expected = copy(given)
    o = retention_step_buffered(**expected)
    layers = {name: torch.zeros(4, 3, *given[name].shape[1:]) for name in WRITTEN[:3]}
    for name, x in layers.items():
        x[:, 1] = given[name]
        given[name] = x[:, 1]
    assert torch.equal(retention_step_buffered(**given), o)
    for name, x in layers.items():
        assert torch.equal(x[:, 1], expected[name])
        assert x[:, ::2].count_nonzero() == 0


# As an operator


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_it_passes_opcheck(half: torch.dtype | None) -> None:
    given = good()
    state, seed = (given["state"], None) if half is None else (given["state"].to(half), torch.tensor([3]))
    buffers = tuple(given[name] for name in ("k_buffer", "v_buffer", "lengths", "folded"))
    for rates, indices in ((None, given["state_indices"]), (torch.tensor([-0.1, -0.2]), None)):
        places = (state, *buffers) if indices is not None else (state[:B], *(x[:B] for x in buffers))
        tensors = (given["q"], given["k"], given["v"])
        torch.library.opcheck(OPERATOR, (*tensors, rates, 0.3, *places, indices, seed, given["out"]))


def test_it_tells_what_it_writes() -> None:
    written = [argument.name for argument in OPERATOR._schema.arguments if argument.is_write]
    assert written == ["state", "k_buffer", "v_buffer", "o"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_compiled_steps_with_their_counts_write_what_eager_ones_do(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    def steps(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, folded: Tensor, **options: Any) -> tuple[Tensor, ...]:
        o = retention_step_buffered(q * 2, k, v, lengths=lengths, folded=folded, **options)
        folded.copy_(torch.where(lengths - folded + T > L, lengths, folded))
        lengths += T
        return o + 1, options["state"] * 2  # after the step

    given = good()
    eager, compiled = copy(given), torch.compile(steps, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(compiled(**given), steps(**eager))
            torch.testing.assert_close(given, eager)
        compiled = torch.compile(retention_step_flush, fullgraph=True, backend=backend)
        for one, flush in ((given, compiled), (eager, retention_step_flush)):
            flush(**{name: one[name] for name in FLUSHED})
    torch.testing.assert_close(given, eager)
    assert counter.frame_count == 1


def test_compiled_steps_take_seeds() -> None:
    given = good()
    given["state"] = given["state"].bfloat16()
    eager, step = copy(given), torch.compile(retention_step_buffered, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 2**40):
        torch.testing.assert_close(step(**given, seed=seed), retention_step_buffered(**eager, seed=seed))
        assert torch.equal(given["state"], eager["state"])


def test_fake_and_meta_results_look_like_real_ones() -> None:
    for given in (good(), {name: x for name, x in good().items() if name != "out"}):
        real = retention_step_buffered(**copy(given))
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = retention_step_buffered(**{name: mode.from_tensor(x) for name, x in given.items()})
        meta = retention_step_buffered(**{name: x.to("meta") for name, x in given.items()})
        for one in (fake, meta):
            assert (tuple(one.shape), one.dtype) == (tuple(real.shape), real.dtype)


def test_autocast_computes_in_its_dtype() -> None:
    given = good()
    names = ("q", "k", "v", "k_buffer", "v_buffer", "out")
    lowered = copy({name: x.bfloat16() if name in names else x for name, x in given.items()})
    given |= {name: lowered[name].clone() for name in names[3:]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = retention_step_buffered(**given)
    assert torch.equal(o, retention_step_buffered(**lowered))
    assert all(torch.equal(given[name], lowered[name]) for name in WRITTEN)


def test_errors_tell_autocasts_dtype_from_the_callers() -> None:
    message = "k_buffer is torch.float32; for a q of torch.bfloat16, as autocast makes it, it must be torch.bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=message):
        retention_step_buffered(**good(out=None))
    given = good(v_buffer=torch.ones(4, 2 * L, H, V).half())
    message = "v_buffer is torch.float16; for a k_buffer of torch.float32 it must be"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=message):
        retention_step_flush(**{name: given[name] for name in FLUSHED})


def test_the_operator_itself_refuses_a_gradient() -> None:
    given = good()
    tensors = (given["q"].requires_grad_(), given["k"], given["v"], None, None)
    places = [given[name] for name in ("state", "k_buffer", "v_buffer", "lengths", "folded")]
    with pytest.raises(RuntimeError, match=r"retention_step_buffered.*no gradients.*torch.no_grad"):
        OPERATOR(*tensors, *places, given["state_indices"], None, given["out"])


def test_grouped_heads_are_those_repeated() -> None:
    whole, grouped = group_heads(make_problem(2, 3, 6, 4, 5), 2)
    buffers = Buffers(grouped["state"], torch.float32, 4)
    o = buffers.step(retention_step_buffered, *(grouped.pop(name) for name in "qkv"), **grouped)
    assert errors(o, solve(whole)["o"])[0] < 1e-5


# Rules


@pytest.fixture
def ruled(only_this_directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[torch.dtype, bool], StepConfig]:
    """What rules, which hold for one and two tokens, say of each kind of states: of buffered steps those of one."""

    def choose(kernel: str, config_type: Any, default: Any, k: Tensor, v: Tensor, *_: Any) -> Any:
        (rows, tokens, heads, width), device = k.shape, torch.device("cuda", 0)
        shape = {"K": width, "V": v.shape[3], "BH": rows * heads, "T": tokens}
        return configuration.select_config(kernel, config_type, default, device=device, dtype=k.dtype, **shape)

    monkeypatch.setattr(step_buffered, "choose_config", choose)
    return write_rules(only_this_directory / "a.yaml", step_buffered)


def chosen(kind: tuple[torch.dtype, bool], tokens: int, group: int = 1, L: int = 16) -> tuple[StepConfig, StepConfig]:
    """What a call on such states runs with, and the default."""
    dtype, is_seeded = kind
    state, seed = torch.empty(1, dtype=dtype), torch.empty(1) if is_seeded else None
    k, v = (torch.empty(8, tokens, 4, width, dtype=torch.bfloat16) for width in (64, 96))
    default = default_config(k.dtype, 64, 96, 32, tokens, dtype.itemsize, group)
    return config_for(k, v, state, seed, group, L), default


@pytest.mark.parametrize("kind", step_buffered.KERNELS, ids=str)
def test_rules_are_those_of_the_kind_of_states(
    kind: tuple[torch.dtype, bool], ruled: dict[tuple[torch.dtype, bool], StepConfig]
) -> None:
    for tokens in (1, 2, 3):
        config, default = chosen(kind, tokens)
        assert ruled[kind] != default
        assert config == (ruled[kind] if tokens == 1 else default)


def test_groups_flushes_and_smaller_buffers_run_the_default(ruled: dict[tuple[torch.dtype, bool], StepConfig]) -> None:
    for tokens, group, L in ((1, 3, 16), (2, 2, 16), (0, 1, 16), (1, 1, 8)):
        config, default = chosen((torch.float32, False), tokens, group, L)
        assert config == default


def test_launches_are_found_anew_by_other_rules(only_this_directory: Path) -> None:
    step_buffered._launches["kind"] = "launch"
    configuration.reload()
    assert not step_buffered._launches


def test_rules_know_the_kernel_by_its_text_and_that_of_what_it_calls() -> None:
    registry = configuration.kernel_registry()
    sources = {registry[kernel].source for kernel in step_buffered.KERNELS.values()}
    assert len(sources) == 1
    assert sources != {registry["retention_step"].source}
