"""The operators are good citizens of PyTorch: opcheck, fake tensors, torch.compile, autocast, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import FORMS, Function, all_forms, forms_with_states, has_states, public
from oracle import Problem, assert_matches, assert_same, errors, make_problem, run, solve
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import generated
from generated.retention import operators


def operator(form: str, suffix: str = "") -> Any:
    return getattr(torch.ops.retgen, f"{form}_retention{suffix}").default


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start and leave without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# opcheck

CASES = ["bare", "packed", "states", "packed_states", "strided", "everything", "grouped", "grouped_everything"]


def make_case(case: str, *, states: bool = True) -> Problem:
    """Inputs with some of the optional tensors."""
    is_full = case.endswith("everything")
    lengths = [3, 1, 8] if is_full or case in ("packed", "packed_states") else None
    with_states = states and (is_full or case in ("states", "packed_states"))
    group = 2 if case.startswith("grouped") else 1
    problem = make_problem(1 if lengths else 2, 12, 3, 4, 6, group=group, lengths=lengths, states=with_states)
    if case == "strided":
        swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        problem = replace(problem, **dict(zip("qkv", swapped, strict=True)))
    if is_full:
        problem = replace(problem, g_gamma=torch.tensor([-0.1, -0.2, -0.3]), scale=0.3)
    return problem


@all_forms
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_operator_passes_opcheck(form: str, case: str, requires_grad: bool) -> None:
    problem = make_case(case, states=has_states(form))
    q, k, v, h0 = (
        None if x is None else x.detach().requires_grad_(requires_grad)
        for x in (problem.q, problem.k, problem.v, problem.h0)
    )
    final = problem.dht is not None
    reverse = form == "fused_recurrent" and case == "packed"
    arguments = (q, k, v, problem.g_gamma, problem.scale, h0, final, problem.cu_seqlens, reverse, False, None)
    torch.library.opcheck(operator(form), arguments)


@all_forms
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arriving", ["both", "do", "dht"])
def test_every_backward_operator_passes_opcheck(form: str, case: str, arriving: str) -> None:
    problem = make_case(case, states=has_states(form))
    do = problem.do if arriving != "dht" else None
    dht = problem.dht if arriving != "do" else None
    inputs = (problem.q, problem.k, problem.v, problem.g_gamma, problem.scale, problem.h0)
    torch.library.opcheck(operator(form, "_backward"), (*inputs, do, dht, problem.cu_seqlens, False, False, None))


@pytest.mark.parametrize("reverse", [False, True])
def test_operators_with_values_first_pass_opcheck(reverse: bool) -> None:
    problem = make_case("states")
    h0, dht = problem.h0.mT.contiguous(), problem.dht.mT.contiguous()
    inputs = (problem.q, problem.k, problem.v, None, None)
    last = (None, reverse, True, None)
    torch.library.opcheck(operator("fused_recurrent"), (*inputs, h0.requires_grad_(), True, *last))
    torch.library.opcheck(operator("fused_recurrent", "_backward"), (*inputs, h0.detach(), problem.do, dht, *last))


@pytest.mark.parametrize("case", ["bare", "packed", "everything", "grouped", "grouped_everything"])
def test_the_attentions_operator_passes_opcheck(case: str) -> None:
    problem = make_case(case, states=False)
    arguments = (problem.q, problem.k, problem.g_gamma, problem.scale, problem.cu_seqlens)
    torch.library.opcheck(torch.ops.retgen.parallel_retention_attentions.default, arguments)


def test_no_operator_is_left_out_here() -> None:
    names = {name.removeprefix("retgen::") for name in torch._C._dispatch_get_all_op_names() if "retgen::" in name}
    ours = {f"{form}_retention{suffix}" for form in FORMS for suffix in ("", "_backward")}
    others = {"retention_step", "retention_step_buffered", "chunk_retention_to_pool"}  # tested where their forms are
    assert names == ours | {"parallel_retention_attentions"} | others


# Fake tensors


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_fake_results_look_like_real_ones(form: str, case: str, dtype: torch.dtype) -> None:
    problem = make_case(case, states=has_states(form))
    low = {name: getattr(problem, name).to(dtype) for name in ("q", "k", "v", "do")}
    problem = replace(problem, **low)
    real = run(public(form), problem)
    with FakeTensorMode() as mode:
        tensors = {name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}
        fake = run(public(form), replace(problem, **{name: mode.from_tensor(x) for name, x in tensors.items()}))
    assert fake.keys() == real.keys()
    for name, x in real.items():
        assert isinstance(fake[name], FakeTensor)
        assert (fake[name].shape, fake[name].dtype) == (x.shape, x.dtype), name
        assert fake[name].stride() == x.stride(), name


def test_fake_attentions_look_like_real_ones() -> None:
    q, k, v = (torch.randn(2, 7, H, 4, dtype=torch.bfloat16) for H in (6, 3, 3))
    real = generated.parallel_retention(q, k, v, output_attentions=True)[1]
    with FakeTensorMode() as mode:
        fake = generated.parallel_retention(*map(mode.from_tensor, (q, k, v)), output_attentions=True)[1]
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@all_forms
def test_meta_tensors_give_shapes(form: str) -> None:
    problem = make_problem(2, 10, 3, 4, 6, group=2, device="cpu", states=False)
    o, _ = public(form)(*(x.to("meta") for x in (problem.q, problem.k, problem.v)))
    assert (o.device.type, o.shape) == ("meta", (2, 10, 6, 6))


# torch.compile


def compiled(function: Function, backend: str = "aot_eager", **options: Any) -> Function:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@all_forms
@pytest.mark.parametrize("case", ["bare", "everything", "grouped", "grouped_everything"])
def test_compiled_forms_equal_eager_ones(form: str, case: str) -> None:
    problem = make_case(case, states=has_states(form))
    function = public(form)
    assert_same(run(compiled(function), problem), run(function, problem))


@all_forms
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_inductor_compiles_what_stands_around_a_form(form: str) -> None:
    problem = make_problem(2, 20, 2, 4, 6, states=False)

    def layer(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads_first = v.transpose(1, 2).contiguous().transpose(1, 2) + 0.0
        o, _ = public(form)(q * 2.0, torch.nn.functional.silu(k), heads_first)
        return torch.nn.functional.layer_norm(o, o.shape[-1:]), None

    got, expected = run(compiled(layer, "inductor"), problem), run(layer, problem)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@all_forms
@pytest.mark.parametrize("dynamic", ["marked", "automatic"])
def test_a_new_length_needs_no_new_compilation(form: str, dynamic: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(public(form), counter)
    lengths = [24, 100, 65, 64, 33, 2048] if dynamic == "automatic" else [100, 24, 65, 64, 33, 2048]
    for T in lengths:
        q, k, v = (torch.randn(1, T, 2, 4, requires_grad=True) for _ in range(3))
        if dynamic == "marked":
            for x in (q, k, v):
                torch._dynamo.mark_dynamic(x, 1)
        o, _ = function(q, k, v)
        o.sum().backward()
    assert counter.frame_count == (1 if dynamic == "marked" else 2)  # static first, then dynamic for good


@forms_with_states
def test_a_new_number_of_packed_sequences_needs_no_new_compilation(form: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(public(form), counter)
    for lengths in ([3, 20], [5, 5, 5], [70, 1, 2, 9], [40, 40]):
        problem = make_problem(1, sum(lengths), 2, 4, 4, lengths=lengths)
        assert_matches(run(function, problem), problem)
    assert counter.frame_count <= 3


@all_forms
def test_groups_of_another_length_need_no_new_compilation(form: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(public(form), counter)
    for T in (24, 100, 65, 64, 33):
        problem = make_problem(1, T, 2, 4, 4, group=3, states=False)
        assert_matches(run(function, problem), problem)
    assert counter.frame_count == 2  # static first, then dynamic for good


@all_forms
def test_a_new_scale_compiles(form: str) -> None:
    function = compiled(public(form))
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    for scale in (0.3, 0.4, 0.5):
        torch.testing.assert_close(function(q, k, v, scale)[0], public(form)(q, k, v, scale)[0])


def test_bad_input_is_refused_while_compiling() -> None:
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    with pytest.raises(Exception, match="chunk_retention: k is"):
        compiled(generated.chunk_retention)(q, k[:, :4], v)


def test_attentions_compile() -> None:
    q, k, v = (torch.randn(2, 9, 2, 4) for _ in range(3))
    function = compiled(lambda q, k, v: generated.parallel_retention(q, k, v, output_attentions=True))
    for got, expected in zip(function(q, k, v), generated.parallel_retention(q, k, v, None, True), strict=True):
        torch.testing.assert_close(got, expected)


@forms_with_states
def test_a_form_can_be_exported(form: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            return public(form)(q, k, v, initial_state=h0, output_final_state=True)

    problem = make_problem(1, 12, 2, 4, 6)
    tensors = (problem.q, problem.k, problem.v, problem.h0)
    program = torch.export.export(Layer(), tensors)
    for got, expected in zip(program.module()(*tensors), Layer()(*tensors), strict=True):
        torch.testing.assert_close(got, expected)


# Autocast


@all_forms
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("inputs", ["float32", "mixed"])
def test_autocast_computes_in_its_dtype(form: str, inputs: str, group: int) -> None:
    problem = make_problem(2, 70, 2, 8, 8, group=group, states=has_states(form))
    if inputs == "mixed":
        problem = replace(problem, q=problem.q.bfloat16(), k=problem.k.half())
    lowered = {name: getattr(problem, name).bfloat16() for name in ("q", "k", "v", "do")}
    problem = replace(problem, do=lowered["do"])

    def under_autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return public(form)(*args, **options)

    got, expected = run(under_autocast, problem), run(public(form), replace(problem, **lowered))
    assert got["o"].dtype == torch.bfloat16
    for name in ("q", "k", "v"):
        assert got[f"d{name}"].dtype == getattr(problem, name).dtype
    # To the bit: autocast changes the inputs' dtype, and nothing within the operator.
    assert_same({name: x.float() for name, x in got.items()}, {name: x.float() for name, x in expected.items()})


@all_forms
def test_autocast_compiles(form: str) -> None:
    problem = make_problem(1, 20, 2, 8, 8, states=False)

    def under_autocast(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return public(form)(q, k, v)

    problem = replace(problem, do=problem.do.bfloat16())
    assert_same(run(compiled(under_autocast), problem), run(under_autocast, problem))


def test_autocast_leaves_attentions_accurate() -> None:
    q, k, v = (torch.randn(2, 30, 2, 8).bfloat16() for _ in range(3))
    expected = generated.parallel_retention(q, k, v, output_attentions=True)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generated.parallel_retention(q, k, v, output_attentions=True)[1], expected)


def test_autocast_leaves_float64_as_it_is() -> None:
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generated.chunk_retention(q, k, v)[0].dtype == torch.float64


# Autograd


@forms_with_states
def test_without_grad_nothing_is_recorded(form: str) -> None:
    problem = make_problem(1, 12, 2, 4, 6)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.h0)]
    with torch.no_grad():
        o, final = public(form)(*leaves[:3], initial_state=leaves[3], output_final_state=True)
    assert o.grad_fn is None
    assert final.grad_fn is None
    assert not public(form)(problem.q, problem.k, problem.v)[0].requires_grad


@forms_with_states
@pytest.mark.parametrize("case", ["do_only", "dht_only", "both"])
def test_results_that_are_not_used_get_no_gradient(form: str, case: str) -> None:
    """The same under torch.compile, which fills what is missing with zeros."""
    problem = make_problem(2, 20, 2, 4, 6)
    zeros = {"do_only": {"dht": torch.zeros_like(problem.dht)}, "dht_only": {"do": torch.zeros_like(problem.do)}}
    expected = solve(replace(problem, **zeros.get(case, {})))

    def loss(q: Tensor, k: Tensor, v: Tensor, h0: Tensor) -> Tensor:
        o, final = public(form)(q, k, v, initial_state=h0, output_final_state=True)
        parts = {"do_only": [(o, problem.do)], "dht_only": [(final, problem.dht)]}
        return sum((x * gradient).sum() for x, gradient in parts.get(case, [(o, problem.do), (final, problem.dht)]))

    for function in (loss, compiled(loss)):
        leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.h0)]
        function(*leaves).backward()
        for name, leaf in zip(("dq", "dk", "dv", "dh0"), leaves, strict=True):
            if case == "dht_only" and name == "dq":
                assert leaf.grad.count_nonzero() == 0
            else:
                assert errors(leaf.grad, expected[name])[0] < 1e-5


@all_forms
@pytest.mark.parametrize("group", [1, 2])
def test_activation_checkpoints_give_the_same_gradients(form: str, group: int) -> None:
    problem = make_problem(1, 20, 2, 4, 6, group=group, states=has_states(form))

    def checkpointed(*args: Tensor, **options: Any) -> Any:
        return checkpoint(public(form), *args, **options, use_reentrant=False)

    assert_same(run(checkpointed, problem), run(public(form), problem))


@all_forms
@pytest.mark.parametrize("loss", [lambda o: o.square().sum(), lambda o: o.sum()], ids=["square", "linear"])
def test_a_second_derivative_is_refused(form: str, loss: Function) -> None:
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    o, _ = public(form)(q, q, q)
    (gradient,) = torch.autograd.grad(loss(o), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{form}_retention.*first derivatives only"):
        gradient.sum().backward()


@all_forms
def test_a_backward_can_run_twice(form: str) -> None:
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    loss = public(form)(q, q, q)[0].sum()
    first, second = (torch.autograd.grad(loss, q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@all_forms
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_batches_are_those_of_each(form: str, case: str) -> None:
    problem = make_case(case, states=has_states(form))
    states = {} if problem.h0 is None else {"initial_state": problem.h0, "output_final_state": True}
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    o, _ = public(form)(*leaves, cu_seqlens=problem.cu_seqlens, **states)
    do = torch.stack([problem.do, -2 * problem.do])
    got = torch.autograd.grad(o, leaves, do, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(o, leaves, x, retain_graph=True) for x in do]
    for x, expected in zip(got, zip(*each, strict=True), strict=True):
        assert torch.equal(x, torch.stack(expected))


@all_forms
def test_an_input_changed_after_the_call_is_noticed(form: str) -> None:
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    k2 = k * 1.0
    o, _ = public(form)(q, k2, v)
    k2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


# The shortcut: public functions call the operator where somebody may be looking, and else what it comes to


def names_of(form: str) -> list[str]:
    return [f"retgen::{form}_retention", f"retgen::{form}_retention_backward"]


def through_the_operator(form: str) -> Function:
    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        g_gamma: Tensor | None = None,
        reverse: bool = False,
        state_v_first: bool = False,
        chunk_size: int | None = None,
    ) -> Any:
        inputs = (q, k, v, g_gamma, scale, initial_state, output_final_state, cu_seqlens)
        return operator(form)(*inputs, reverse, state_v_first, chunk_size)

    return call


def is_ours(function: object) -> bool:
    return isinstance(function, OpOverload) and function.namespace == "retgen"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators of ours that are called from Python, which no mode, tensor or profiler has to see."""
    names: list[str] = []
    call = OpOverload.__call__

    def record(self: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        names.extend([self.name()] if is_ours(self) else [])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(OpOverload, "__call__", record)
    return names


def assert_same_as_through_the_operator(form: str, problem: Problem, called: list[str], **options: Any) -> None:
    """The results, gradients and strides agree, and only one of the two calls was the operator's."""
    got = run(public(form), problem, **options)
    assert called == []
    expected = run(through_the_operator(form), problem, **options)
    assert set(called) == set(names_of(form))
    assert_same(got, expected)
    assert {name: x.stride() for name, x in got.items()} == {name: x.stride() for name, x in expected.items()}


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_shortcut_gives_the_operators_bits(form: str, case: str, dtype: torch.dtype, called: list[str]) -> None:
    problem = make_case(case, states=has_states(form))
    problem = replace(problem, **{name: getattr(problem, name).to(dtype) for name in ("q", "k", "v", "do")})
    assert_same_as_through_the_operator(form, problem, called)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("fused_recurrent", {"reverse": True}),
        ("fused_recurrent", {"state_v_first": True}),
        ("fused_recurrent", {"reverse": True, "state_v_first": True}),
        ("chunk", {"chunk_size": 16}),
    ],
)
def test_the_shortcut_gives_the_operators_bits_with_a_forms_own_options(
    form: str, options: dict[str, Any], called: list[str]
) -> None:
    problem = make_problem(2, 50, 3, 4, 6)
    if "state_v_first" in options:
        problem = replace(problem, h0=problem.h0.mT.contiguous(), dht=problem.dht.mT.contiguous())
    assert_same_as_through_the_operator(form, problem, called, **options)


@all_forms
@pytest.mark.parametrize("recording", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_shortcut_gives_the_operators_bits_without_gradients(
    form: str, recording: Callable[[], Any], called: list[str]
) -> None:
    problem = make_case("bare")
    with recording():
        got, _ = public(form)(problem.q, problem.k, problem.v)
        assert called == []
        expected, _ = through_the_operator(form)(problem.q, problem.k, problem.v)
    assert names_of(form)[0] in called
    assert (got.requires_grad, got.is_inference()) == (expected.requires_grad, expected.is_inference())
    assert_same({"o": got}, {"o": expected})


def test_a_parameter_takes_the_shortcut(called: list[str]) -> None:
    q = torch.nn.Parameter(torch.randn(1, 5, 2, 4))
    generated.chunk_retention(q, q, q)[0].sum().backward()
    assert called == []


class DispatchWatch(TorchDispatchMode):
    """Sees the operators that kernels are found for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [func.name()] if is_ours(func) else []
        return func(*args, **(kwargs or {}))


class FunctionWatch(TorchFunctionMode):
    """Sees the functions that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [func.name()] if is_ours(func) else []
        return func(*args, **(kwargs or {}))


@all_forms
@pytest.mark.parametrize("case", ["bare", "everything"])
def test_a_dispatch_mode_sees_the_operators(form: str, case: str) -> None:
    problem = make_case(case, states=has_states(form))
    with DispatchWatch() as watch:
        got = run(public(form), problem)
    assert watch.seen == names_of(form)
    assert_same(got, run(public(form), problem))


@all_forms
@pytest.mark.parametrize("case", ["bare", "everything"])
def test_a_function_mode_sees_the_operator(form: str, case: str) -> None:
    """The backward operator is called within torch.autograd.grad, which is what the mode sees there."""
    problem = make_case(case, states=has_states(form))
    with FunctionWatch() as watch:
        got = run(public(form), problem)
    assert watch.seen == names_of(form)[:1]
    assert_same(got, run(public(form), problem))


@all_forms
def test_a_mode_that_comes_later_sees_the_backward_operator(form: str) -> None:
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    o, _ = public(form)(q, q, q)
    with DispatchWatch() as watch:
        o.sum().backward()
    assert watch.seen == names_of(form)[1:]


@all_forms
@pytest.mark.parametrize("profiler", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_a_profiler_sees_the_operators(form: str, profiler: Callable[[], Any]) -> None:
    problem = make_case("bare")
    with profiler() as profile:
        got = run(public(form), problem)
    assert {event.key for event in profile.key_averages()} >= {*names_of(form)}
    assert_same(got, run(public(form), problem))


@all_forms
def test_a_profiler_that_comes_later_sees_the_backward_operator(form: str) -> None:
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    o, _ = public(form)(q, q, q)
    with torch.profiler.profile() as profile:
        o.sum().backward()
    assert names_of(form)[1] in {event.key for event in profile.key_averages()}


class Watched(Tensor):
    """A tensor that sees the functions that it is given to."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += [func.name()] if is_ours(func) else []
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """A tensor without data of its own, which sees the operators that kernels are found for and keeps its results."""

    seen: list[str]

    def __new__(cls, inner: Tensor) -> Any:
        same = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **same)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += [func.name()] if is_ours(func) else []
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


@all_forms
@pytest.mark.parametrize("name", ["q", "k", "v", "g_gamma", "cu_seqlens"])
def test_a_subclass_sees_the_operator(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_case("everything", states=has_states(form))
    watched = getattr(problem, name).as_subclass(Watched)
    monkeypatch.setattr(Watched, "seen", [], raising=False)
    got = run(public(form), replace(problem, **{name: watched}))
    assert Watched.seen[0] == names_of(form)[0]
    assert type(got["o"]) is Watched
    assert_same({key: x.as_subclass(Tensor) for key, x in got.items()}, run(public(form), problem))


@all_forms
@pytest.mark.parametrize("case", ["bare", "strided", "states"])
def test_a_wrapper_sees_the_operators(form: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_case(case, states=has_states(form))
    monkeypatch.setattr(Wrapped, "seen", [], raising=False)
    wrapped = {name: Wrapped(x) for name, x in vars(problem).items() if isinstance(x, Tensor)}
    got = run(public(form), replace(problem, **wrapped))
    assert Wrapped.seen == names_of(form)
    assert_same({key: x.inner for key, x in got.items()}, run(public(form), problem))


@all_forms
def test_vmap_sees_the_operator(form: str, called: list[str]) -> None:
    rows = torch.randn(3, 1, 5, 2, 4)
    got = torch.func.vmap(lambda q: public(form)(q, q, q)[0])(rows)
    assert set(called) == {names_of(form)[0]}  # once for all rows, and then by PyTorch for each
    assert_same({"o": got}, {"o": torch.stack([public(form)(q, q, q)[0] for q in rows])})


def test_lazy_tensors_are_not_plain() -> None:
    is_plain = operators.is_plain
    x = torch.randn(3)
    assert is_plain((x, None, 0.5, torch.nn.Parameter(x)))
    assert not is_plain((x, torch._neg_view(x)))
    assert not is_plain((x, torch._efficientzerotensor(3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradient", [False, True])
def test_a_trace_records_the_operator(gradient: bool) -> None:
    x = torch.randn(1, 20, 2, 8, requires_grad=gradient)
    traced = torch.jit.trace(lambda q: generated.chunk_retention(q, q, q)[0], (x,), check_trace=False)
    assert "retgen::chunk_retention" in str(traced.graph)
    torch.testing.assert_close(traced(2 * x), generated.chunk_retention(2 * x, 2 * x, 2 * x)[0], rtol=0, atol=0)
