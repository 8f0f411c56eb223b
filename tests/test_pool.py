"""Prompts whose final states go to slots of a pool, on the CPU: results, bad input, and manners as an operator."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import errors, make_problem, solve
from pools import LAYOUTS, arguments_of, assert_states_go_to_slots
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from generated import chunk_retention, retention, retention_step

H, K, V, SLOTS = 2, 4, 5, 4
LENGTHS = [3, 1, 8]
OPERATOR = torch.ops.retgen.chunk_retention_to_pool.default
Change = Callable[[dict[str, Any]], Any]

either_name = pytest.mark.parametrize("function", [chunk_retention, retention])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start and leave without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def good(*, device: str = "cpu", group: int = 1, **options: Any) -> dict[str, Any]:
    """Packed prompts of which the second has no slot."""
    problem = make_problem(1, sum(LENGTHS), H, K, V, lengths=LENGTHS, group=group, states=False, device=device)
    pool, indices = torch.zeros(SLOTS, H, K, V, device=device), torch.tensor([3, -1, 1], device=device)
    return {**arguments_of(problem), "final_state": pool, "state_indices": indices, **options}


def copy(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


# Results


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [None, [30, 1, 69]])
@pytest.mark.parametrize("group", [1, 3])
def test_states_go_to_their_slots_alone(group: int, lengths: list[int] | None, layout: str, dtype: torch.dtype) -> None:
    problem = make_problem(3 if lengths is None else 1, 100, 2, 5, 7, group=group, lengths=lengths)
    options = {"dtype": dtype, "layout": layout}
    assert_states_go_to_slots(chunk_retention, problem, [3, -1, 0], **options)
    assert_states_go_to_slots(retention, problem, [2, 1, 3], index=torch.int32, chunk_size=16, **options)
    assert_states_go_to_slots(chunk_retention, replace(problem, h0=None), None, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_prompts_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    problem = make_problem(2, 20, 2, 5, 7, dtype)
    of_states = torch.float64 if dtype == torch.float64 else torch.float32
    assert_states_go_to_slots(chunk_retention, problem, [2, 0], dtype=of_states)


def test_a_prompt_in_parts_goes_on_from_its_slot() -> None:
    problem = make_problem(2, 40, 2, 5, 7)
    pool, slots = torch.zeros(4, 2, 5, 7), torch.tensor([3, 1])
    pool[slots] = problem.h0
    parts = zip(*(x.split((16, 20, 4), 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    *prompt, last = parts
    outputs = [
        chunk_retention(*part, initial_state=pool[slots], final_state=pool, state_indices=slots)[0] for part in prompt
    ]
    outputs.append(retention_step(*last, pool, state_indices=slots))
    expected = solve(problem)
    assert errors(torch.cat(outputs, 1), expected["o"])[0] < 1e-5
    assert errors(pool[slots], expected["final_state"])[0] < 1e-5


def test_autocast_computes_in_its_dtype_and_leaves_the_pool_its_own() -> None:
    given = good()
    lowered = copy(given) | {name: given[name].bfloat16() for name in "qkv"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = chunk_retention(**given)
    assert torch.equal(o, chunk_retention(**lowered)[0])
    assert torch.equal(given["final_state"], lowered["final_state"])


@pytest.mark.parametrize("output_final_state", [False, True])
def test_the_pool_is_the_final_state_that_is_returned(output_final_state: bool) -> None:
    given = good(output_final_state=output_final_state)
    assert chunk_retention(**given)[1] is given["final_state"]


@either_name
def test_a_call_like_one_before_that_has_a_pool_writes_to_it(function: Callable[..., Any]) -> None:
    q = torch.randn(1, 5, 2, 4)
    inputs = (q, q.clone(), q.clone())
    for _ in range(3):  # without a pool the second one is known
        function(*inputs)
    pool = torch.zeros(1, 2, 4, 4)
    function(*inputs, final_state=pool)
    assert torch.equal(pool, function(*inputs, output_final_state=True)[1])
    with pytest.raises(ValueError, match="state_indices is given without final_state"):
        function(*inputs, state_indices=torch.tensor([0]))


# Bad input


class NoSweep(TorchDispatchMode):
    """Fail where the operator starts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "retgen" not in str(func), f"{func} was called"
        return func(*args, **(kwargs or {}))


def put(**values: Any) -> Change:
    return lambda given: given.update(values)


def change(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda given: given.update({name: function(given[name])})


def share(name: str) -> Change:
    """The pool lies in a tensor's memory, which is made large enough."""

    def change(given: dict[str, Any]) -> None:
        memory = torch.zeros(SLOTS * H * K * V + given[name].numel())
        given["final_state"] = memory[: SLOTS * H * K * V].view(SLOTS, H, K, V)
        given[name] = memory[SLOTS * H * K * V - 1 :][: given[name].numel()].view_as(given[name])

    return change


def of_the_pool(given: dict[str, Any]) -> None:
    given["initial_state"] = given["final_state"][:3]


BAD = {
    "a_list": (put(final_state=[0.0]), TypeError, "final_state is a list", "must be a tensor [slots, H, K, V]"),
    "none": (put(final_state=None), ValueError, "state_indices is given without final_state"),
    "of_no_dimension": (put(final_state=torch.zeros(())), ValueError, "final_state is []", "[slots, H, K, V]"),
    "of_more_heads": (
        put(final_state=torch.zeros(SLOTS, 3, K, V)),
        ValueError,
        "final_state is [4, 3, 4, 5]; it must be [slots, H, K, V] = [4, 2, 4, 5]",
    ),
    "with_values_first": (change("final_state", lambda x: x.mT), ValueError, "final_state is [4, 2, 5, 4]"),
    "of_int": (change("final_state", Tensor.int), TypeError, "final_state is torch.int32", "torch.float32 or"),
    "of_double": (change("final_state", Tensor.double), TypeError, "final_state is torch.float64; for a q of torch.fl"),
    "elsewhere": (change("final_state", lambda x: x.to("meta")), ValueError, "final_state is on meta, q on cpu"),
    "in_another_order": (
        change("final_state", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ValueError,
        "final_state has the strides [40, 5, 10, 1]; [H, K, V] (or [H, V, K], given as its mT) must be contiguous",
    ),
    "whose_slots_are_one": (change("final_state", lambda x: x[:1].expand(4, -1, -1, -1)), ValueError, "not overlap"),
    "of_too_few_slots": (
        lambda given: given.update(final_state=given["final_state"][:2], state_indices=None),
        ValueError,
        "final_state has 2 slots for 3 sequences; without state_indices each needs one",
    ),
    "indices_in_a_list": (put(state_indices=[0, 1, 2]), TypeError, "state_indices is a list", "tensor [N] or None"),
    "indices_of_int16": (change("state_indices", Tensor.short), TypeError, "state_indices is torch.int16", "int32"),
    "indices_of_rows": (put(state_indices=torch.arange(1)), ValueError, "state_indices is [1]; it must be [N] = [3]"),
    "indices_elsewhere": (change("state_indices", lambda x: x.to("meta")), ValueError, "state_indices is on meta"),
    "chunk_size_48": (put(chunk_size=48), ValueError, "chunk_size is 48"),
    "initial_state_of_rows": (put(initial_state=torch.zeros(1, H, K, V)), ValueError, "initial_state is [1, 2, 4, 5]"),
    "initial_state_in_it": (of_the_pool, ValueError, "final_state shares memory with initial_state"),
    **{f"{name}_in_it": (share(name), ValueError, f"final_state shares memory with {name}") for name in "qkv"},
    **{
        f"{name}_to_train": (
            change(name, lambda x: torch.zeros(3, H, K, V, requires_grad=True) if x is None else x.requires_grad_()),
            ValueError,
            f"{name} requires grad, but what is done in place has no gradients; use torch.no_grad(), or output_final",
        )
        for name in ("q", "k", "v", "initial_state", "final_state")
    },
}
WRONG_SLOTS = [
    ([4, 0, 1], r"state_indices\[0\] is 4; it must be from 0 to 3, or -1"),
    ([0, -2, 1], "is -2"),
    ([2, -1, 2], "is 2 again"),
]


@either_name
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, function: Callable[..., Any]) -> None:
    given = good()
    spoil, error, *words = BAD[case]
    spoil(given)
    with pytest.raises(error) as caught, NoSweep():
        function(**given)
    for word in ("retention: ", *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


@pytest.mark.parametrize(("slots", "message"), WRONG_SLOTS)
@pytest.mark.parametrize("compiles", [False, True])
def test_wrong_slots_are_refused_on_the_cpu_before_anything_is_written(
    slots: list[int], message: str, compiles: bool
) -> None:
    given = good(state_indices=torch.tensor(slots))
    function = torch.compile(chunk_retention, backend="eager") if compiles else chunk_retention
    with pytest.raises(ValueError, match=message):
        function(**given)
    assert given["final_state"].count_nonzero() == 0


def test_a_pool_of_inference_mode_is_written_there_alone() -> None:
    with torch.inference_mode():
        given = good()
        chunk_retention(**given)
    with torch.no_grad(), pytest.raises(ValueError, match="final_state was made in inference mode"):
        chunk_retention(**given)


@pytest.mark.parametrize("form", ["naive", "parallel", "fused_chunk", "fused_recurrent"])
@pytest.mark.parametrize("name", ["final_state", "state_indices"])
def test_a_pool_is_refused_by_a_form_that_does_not_write_to_it(form: str, name: str) -> None:
    given = good()
    del given[{"final_state": "state_indices", "state_indices": "final_state"}[name]]
    with pytest.raises(ValueError, match=rf"^retention: {name} is given with form '{form}'; only the chunk form"):
        retention(**given, form=form)


@either_name
def test_what_requires_grad_is_taken_where_there_are_none(function: Callable[..., Any]) -> None:
    given = {name: x.requires_grad_() if name in ("q", "k", "v") else x for name, x in good().items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not function(**given)[0].requires_grad


# As an operator


def inputs_of(given: dict[str, Any]) -> tuple[Any, ...]:
    names = ("q", "k", "v", "g_gamma", "scale", "initial_state", "cu_seqlens", "chunk_size", "final_state")
    return *(given.get(name) for name in names), given["state_indices"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_it_passes_opcheck(group: int, dtype: torch.dtype) -> None:
    given = good(group=group)
    given["final_state"] = given["final_state"].to(dtype)
    torch.library.opcheck(OPERATOR, inputs_of(given))
    every = {"g_gamma": torch.tensor([-0.1, -0.2]), "scale": 0.3, "initial_state": torch.randn(3, H, K, V)}
    torch.library.opcheck(OPERATOR, inputs_of({**given, **every, "chunk_size": 16}))
    torch.library.opcheck(OPERATOR, inputs_of({**given, "state_indices": None}))


def test_it_tells_what_it_writes() -> None:
    assert [argument.name for argument in OPERATOR._schema.arguments if argument.is_write] == ["final_state"]
    given = good()
    version = given["final_state"]._version
    chunk_retention(**given)
    assert given["final_state"]._version > version


def test_the_operator_itself_refuses_a_gradient() -> None:
    given = good()
    given["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"chunk_retention_to_pool.*no gradients.*torch.no_grad"):
        OPERATOR(*inputs_of(given))


def test_a_gradient_of_what_was_before_is_refused() -> None:
    for call in (chunk_retention, torch.compile(chunk_retention, backend="aot_eager")):
        given = good()
        weight = torch.ones(K, V, requires_grad=True)
        loss = (given["final_state"] * weight).sum()  # keeps the pool for the gradient
        call(**given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_fake_results_look_like_real_ones() -> None:
    given = good(group=2)
    o, _ = chunk_retention(**given)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(x) for name, x in given.items() if isinstance(x, Tensor)}
        fake, pool = chunk_retention(**given | tensors)
    assert (fake.shape, fake.dtype, fake.stride()) == (o.shape, o.dtype, o.stride())
    assert pool is tensors["final_state"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_compiled_prompts_write_what_eager_ones_do(backend: str) -> None:
    given = good(group=2)
    eager = copy(given)

    def layer(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        o, pool = chunk_retention(q * 2, **options)
        return o + 1, pool * 2  # after the sweep

    expected = layer(**eager)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(**given), expected)
    torch.testing.assert_close(given, eager)


def test_compiled_prompts_neither_copy_the_pool_nor_write_it_back() -> None:
    given, pools = good(), torch.zeros(2, 7, H, K, V)
    del given["final_state"]

    def layer(pools: Tensor, **given: Any) -> Tensor:
        return chunk_retention(final_state=pools[1], **given)[0]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own
        _, codes = run_and_get_code(torch.compile(layer, fullgraph=True), pools, **given)
    (call,) = ["".join(code.partition("def call")[1:]) for code in codes]
    assert "chunk_retention_to_pool" in call
    assert not re.search(r"copy_|clone|empty_strided_cpu\(\(7,", call)


def test_prompts_with_other_slots_need_no_new_compilation() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_retention, fullgraph=True, backend=counter)
    given = good()
    eager = copy(given)
    for slots in ([3, -1, 0], [0, 1, 2], [-1, 2, -1]):
        new = {"state_indices": torch.tensor(slots)}
        torch.testing.assert_close(compiled(**{**given, **new})[0], chunk_retention(**{**eager, **new})[0])
    torch.testing.assert_close(given["final_state"], eager["final_state"])
    assert counter.frame_count == 1


def test_a_mode_sees_the_operator() -> None:
    with pytest.raises(AssertionError, match=r"chunk_retention_to_pool.* was called"), NoSweep():
        chunk_retention(**good())
