"""Calls like one before run straight what that came to; who looks on, or passes other tensors, sees no difference."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import generated
from generated import configuration, known
from generated.retention import operators
from generated.retention.host import host_sweep

FORWARD, BACKWARD = (getattr(torch.ops.retgen, f"auto_retention{suffix}").default for suffix in ("", "_backward"))


class Calls:
    """What ran straight, by `retention` on the CPU as if that were a GPU: which sizes are launched is known before."""

    def __init__(self) -> None:
        self.straight: list[str] = []
        self.known = operators.KnownCalls()
        run = functools.partial(operators._differentiable, functools.partial(operators._forward, host_sweep), BACKWARD)
        self.prepared = operators._PreparedCalls(self.prepare, run, BACKWARD, self.known)
        self.operator = operators.Operator(FORWARD, {"cpu": self.prepared}, self.again)

    def prepare(
        self, q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, reverse: bool, chunk_size: int | None
    ) -> operators.Ready:
        order: dict[str, Any] = {"reverse": reverse, "chunk_size": chunk_size}

        def output(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            assert all(x.is_contiguous() for x in (q, k, v))
            states = {"initial_state": None, "final_state": None, "adjoint": False}
            return host_sweep(q, k, v, rates, scale, **states, **order, cu_seqlens=cu_seqlens)

        def gradients(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
            *tensors, cu_seqlens = tensors  # type: ignore[assignment]
            assert all(x.is_contiguous() for x in tensors)
            self.straight.append("backward")
            states = {"h0": None, "dht": None, "dh0": None}
            return operators.sweep_gradients(host_sweep, *tensors, scale, **states, **order, cu_seqlens=cu_seqlens)

        return operators.Ready(output, gradients)

    def again(self, *arguments: Any) -> Tensor | None:
        o = self.known.again(*arguments)
        self.straight += [] if o is None else ["forward"]
        return o


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(importlib.import_module("generated.retention"), "OPERATOR", found.operator)
    long_way = operators._ready_backward

    def not_straight(*arguments: Any) -> Any:
        gradients = long_way(*arguments)
        found.straight.pop()
        return gradients

    monkeypatch.setattr(operators, "_ready_backward", not_straight)
    return found


def inputs(dtype: torch.dtype = torch.float32, *, gradient: bool = True, T: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, T, 3, 8, dtype=dtype, requires_grad=gradient) for _ in range(3))
    return q, k, v


def results(call: Callable[..., Any], tensors: tuple[Tensor, ...], do: Tensor, **options: Any) -> dict[str, Tensor]:
    o, _ = call(*tensors, **options)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, tensors, do)), strict=True))


def through_the_operator(*tensors: Tensor, scale: float | None = None) -> Any:
    return FORWARD(*tensors, None, scale, None, False, None, False, False, None)


def make_known(calls: Calls, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Two calls with gradients: what the first was checked for, the second has a backward to be known by."""
    for _ in range(2):
        tensors = inputs(dtype)
        results(generated.retention, tensors, torch.randn_like(tensors[2]), **options)
    calls.straight.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_call_like_one_before_runs_straight_and_gives_the_operators_bits(
    calls: Calls, dtype: torch.dtype, scale: float | None
) -> None:
    make_known(calls, dtype, scale=scale)
    tensors = inputs(dtype)
    do = torch.randn_like(tensors[2])
    got = results(generated.retention, tensors, do, scale=scale)
    assert calls.straight == ["forward", "backward"]
    assert_same(got, results(through_the_operator, tensors, do, scale=scale))


def test_a_call_without_gradients_records_nothing(calls: Calls) -> None:
    for tensors, mode in ((inputs(gradient=False), torch.enable_grad), (inputs(), torch.no_grad)):
        with mode():
            first, second = (generated.retention(*tensors)[0] for _ in range(2))
        assert calls.straight.pop() == "forward"
        assert not second.requires_grad
        assert torch.equal(first, second)


def test_calls_of_grouped_heads_are_known_by_the_heads_of_k(calls: Calls) -> None:
    for heads in (4, 2, 1) * 4:
        calls.straight.clear()
        q, k, v = (torch.randn(1, 40, H, 8, requires_grad=True) for H in (4, heads, heads))
        do = torch.randn_like(q)
        got = results(generated.retention, (q, k, v), do)
        assert_same(got, results(through_the_operator, (q, k, v), do))
    assert calls.straight == ["forward", "backward"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_gradients_are_told_apart_by_who_wants_them(calls: Calls, at: int) -> None:
    make_known(calls)
    tensors = inputs(gradient=False)
    tensors[at].requires_grad_()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(generated.retention(*tensors)[0].sum(), tensors[at])
    (expected,) = torch.autograd.grad(through_the_operator(*tensors)[0].sum(), tensors[at])
    assert torch.equal(gradient, expected)
    assert "forward" in calls.straight


def bad_inputs() -> dict[str, tuple[Callable[..., Any], type[Exception], str]]:
    return {
        "no tensor": (lambda q, k, v: ((q, 5, v), {}), TypeError, "k is a int"),
        "none": (lambda q, k, v: ((q, k, None), {}), TypeError, "v is a NoneType"),
        "heads": (lambda q, k, v: ((q, k, v[:, :, :2]), {}), ValueError, "v has 2 heads"),
        "dtype": (lambda q, k, v: ((q, k.half(), v), {}), TypeError, "k is torch.float16"),
        "scale": (lambda q, k, v: ((q, k, v, float("nan")), {}), ValueError, "scale is nan"),
        "scale's class": (lambda q, k, v: ((q, k, v, [1]), {}), TypeError, "scale is a list"),
        "decay": (lambda q, k, v: ((q, k, v), {"g_gamma": torch.tensor([-0.1, -0.1, 0.5])}), ValueError, "holds 0.5"),
        "decay's shape": (lambda q, k, v: ((q, k, v), {"g_gamma": torch.zeros(2)}), ValueError, "g_gamma is"),
        "form": (lambda q, k, v: ((q, k, v), {"form": "other"}), ValueError, "form is 'other'"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_refused_after_good_input_too(calls: Calls, name: str) -> None:
    make_known(calls)
    make_known(calls, g_gamma=torch.tensor([-0.1, -0.1, -0.5]))
    change, error, message = bad_inputs()[name]
    arguments, options = change(*inputs())
    with pytest.raises(error, match=message):
        generated.retention(*arguments, **options)
    assert not calls.straight


class Watch(TorchDispatchMode):
    """Lets operators through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionWatch(TorchFunctionMode):
    """Lets functions through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


ONLOOKERS: list[Callable[[], AbstractContextManager[Any]]] = [Watch, FunctionWatch, torch.profiler.profile]


@pytest.mark.parametrize("onlooker", ONLOOKERS)
def test_whoever_looks_on_sees_the_operators(calls: Calls, onlooker: Callable[[], AbstractContextManager[Any]]) -> None:
    make_known(calls)
    tensors = inputs()
    with onlooker():
        o, _ = generated.retention(*tensors)
    assert not calls.straight
    o, _ = generated.retention(*tensors)
    with onlooker():
        o.backward(torch.ones_like(o))
    expected = (
        ["forward", "backward"] if onlooker is FunctionWatch else ["forward"]
    )  # which sees no more than backward()
    assert calls.straight == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_transforms_and_tangents_are_not_run_straight(calls: Calls) -> None:
    make_known(calls)
    q, k, v = inputs()
    torch.func.vmap(lambda x: generated.retention(x, k, v)[0])(torch.stack([q, q]))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        generated.retention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    assert not calls.straight


def test_tensors_that_are_not_dense_are_copied(calls: Calls) -> None:
    make_known(calls)
    q, k, v = inputs()
    strided = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    moved = torch.empty(q.numel() + 1).as_strided(q.shape, q.stride(), 1).copy_(q.detach()).requires_grad_()
    for tensors in ((q, strided, v), (moved, k, v)):
        got = results(generated.retention, tensors, torch.ones_like(v))
        assert_same(got, results(through_the_operator, tensors, torch.ones_like(v)))
    assert not calls.straight
    o, _ = generated.retention(q, k, v)
    o.sum().backward()  # whose gradient is one number
    assert calls.straight == ["forward"]
    assert q.grad is not None
    assert torch.equal(q.grad, torch.autograd.grad(through_the_operator(q, k, v)[0].sum(), q)[0])


def test_a_second_derivative_is_refused(calls: Calls) -> None:
    make_known(calls)
    q, k, v = inputs()
    (gradient,) = torch.autograd.grad(generated.retention(q, k, v)[0].square().sum(), q, create_graph=True)
    assert calls.straight == ["forward"]
    with pytest.raises(NotImplementedError, match=r"auto_retention.*first derivatives only"):
        gradient.sum().backward()


def test_an_input_changed_after_the_call_is_noticed(calls: Calls) -> None:
    make_known(calls)
    q, k, v = inputs()
    o, _ = generated.retention(q, k2 := k * 1.0, v)
    assert calls.straight == ["forward"]
    k2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_checkpoints_and_hooks_of_saved_tensors_give_the_same_gradients(calls: Calls) -> None:
    make_known(calls)
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    expected = results(through_the_operator, tensors, do)
    assert_same(results(functools.partial(checkpoint, generated.retention, use_reentrant=False), tensors, do), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.mT.contiguous(), lambda x: x.mT):
        assert_same(results(generated.retention, tensors, do), expected)
    assert calls.straight.count("forward") >= 2


def test_autocast_is_asked_each_time(calls: Calls) -> None:
    tensors = inputs(torch.bfloat16)
    dtypes = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16, torch.bfloat16, None, None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            dtypes.append(generated.retention(*tensors)[0].dtype)
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float16, torch.float16, *[torch.bfloat16] * 3]
    assert len(calls.straight) == 3  # of those whose dtype is autocast's, and of that without it


def test_decays_are_those_of_the_call(calls: Calls) -> None:
    tensors, rates = inputs(), [None, torch.tensor([-0.1, -0.2, -0.3]), None, torch.tensor([-0.5] * 3)]
    for rate in rates:
        expected = FORWARD(*tensors, rate, None, None, False, None, False, False, None)[0]
        assert torch.equal(generated.retention(*tensors, g_gamma=rate)[0], expected)
    assert calls.straight == ["forward"]  # values on the CPU are looked at each time


def test_what_is_known_is_forgotten_with_the_rules_and_not_kept_for_ever(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "CACHE_LIMIT", 4)
    for T in range(1, 10):
        generated.retention(*inputs(T=T))
    assert 0 < len(calls.known._kinds) <= 4
    for _ in range(2 * operators.MOST_ALIKE):
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1)[:1] for x in inputs()]
        generated.retention(*strided)
        generated.retention(*inputs(torch.float16))
        generated.retention(*inputs(torch.bfloat16))
    assert all(len(alike) <= operators.MOST_ALIKE for alike in calls.known._kinds.values())
    configuration.clear_caches()
    assert not any(calls.known._kinds.values())


def test_without_pytorchs_guard_nothing_is_known(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "guard_of", lambda _: None)
    make_known(calls)
    assert not any(calls.known._kinds.values())


def test_calls_that_are_never_run_straight_are_not_remembered_each_time(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    guard_of = operators.guard_of
    monkeypatch.setattr(operators, "guard_of", lambda tensors: (made.append(len(tensors)), guard_of(tensors))[1])
    q, k, v = inputs(gradient=False)
    moved = torch.empty(q.numel() + 1).as_strided(q.shape, q.stride(), 1)
    for _ in range(3):
        generated.retention(q, q, v)
        generated.retention(q, k, v, scale=1)
        generated.retention(moved, k, v)
        generated.retention(torch.nn.Parameter(q, requires_grad=False), k, v)
    assert len(made) == 3


def test_sizes_that_are_symbols_are_no_keys(calls: Calls) -> None:
    make_known(calls)
    tensors = [x.detach().expand(4, *x.shape) for x in inputs()]
    rows = torch.func.vmap(lambda *x: generated.retention(*x)[0])
    graph = make_fx(rows, tracing_mode="symbolic")(*tensors)
    assert not calls.straight
    assert_same({"o": graph(*tensors)}, {"o": rows(*tensors)})


def test_compiled_autograd_takes_a_known_calls_backward_as_a_whole(calls: Calls) -> None:
    make_known(calls)
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    o, _ = generated.retention(*tensors)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        o.backward(do)
    assert calls.straight == ["forward"]
    expected = results(through_the_operator, tensors, do)
    assert_same(
        {f"d{name}": x.grad for name, x in zip("qkv", tensors, strict=True)},
        {n: expected[n] for n in ("dq", "dk", "dv")},
    )


def test_precisions_in_turn_are_each_known(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = ["A"]
    monkeypatch.setattr(operators, "dot_precision", lambda _: precision[0])
    straight = []
    for precision[0] in "ABAAB":
        generated.retention(*inputs())
        straight.append(bool(calls.straight))
        calls.straight.clear()
    assert straight == [False, False, True, True, True]


@pytest.mark.parametrize("options", [(None, True, False, None), (None, False, False, 16)])
def test_what_the_operator_alone_can_be_told_is_not_run_by_the_public_function(
    calls: Calls, options: tuple[Any, ...]
) -> None:
    q, k, v = inputs(gradient=False)
    for _ in range(2):
        calls.operator(q, k, v, None, None, None, False, *options)
    o, _ = generated.retention(q, k, v)
    assert not calls.straight
    assert torch.equal(o, through_the_operator(q, k, v)[0])


def test_what_was_made_ready_by_rules_that_changed_meanwhile_is_not_kept(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_ready: list[int] = []

    def prepare(*arguments: Any) -> operators.Ready:
        made_ready.append(len(made_ready))
        if len(made_ready) == 1:
            configuration.clear_caches()
        return calls.prepare(*arguments)

    monkeypatch.setattr(calls.prepared, "_prepare", prepare)
    for _ in range(4):
        generated.retention(*inputs())
    assert len(made_ready) == 2
    assert calls.straight == ["forward"] * 2


def test_rules_that_change_while_a_call_runs_leave_it_unknown(calls: Calls) -> None:
    given = (*inputs(), None, None, None, False, None, False, False, None)
    ready = calls.prepare(given[0], given[2], 1.0, None, False, None)
    run = calls.prepared._prepared(ready, configuration.generation(), given)
    configuration.clear_caches()
    run(*given)
    assert not calls.known._kinds


def test_a_full_memory_keeps_what_a_call_of_a_known_kind_adds_to(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "CACHE_LIMIT", 2)
    for T in (4, 5):
        generated.retention(*inputs(T=T, gradient=False))
    generated.retention(*inputs(T=5))
    assert [len(alike) for alike in calls.known._kinds.values()] == [1, 2]
    generated.retention(*inputs(T=5, dtype=torch.float16))
    assert [kind[1] for kind in calls.known._kinds] == [torch.float16]


def test_gradients_at_odd_addresses_teach_nothing_and_are_asked_for_nothing(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_known(calls)
    made: list[int] = []
    guard_of = operators.guard_of
    monkeypatch.setattr(operators, "guard_of", lambda tensors: (made.append(len(tensors)), guard_of(tensors))[1])
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    moved = torch.empty(do.numel() + 1).as_strided(do.shape, do.stride(), 1).copy_(do)
    expected = results(through_the_operator, tensors, do)
    for gradient in (moved, moved, do, torch.ones(()).expand(do.shape), moved, do):
        got = results(generated.retention, tensors, gradient)
    assert_same(got, expected)
    assert not made
    assert calls.straight.count("backward") == 2


def test_inference_mode_is_told_apart_from_other_modes_without_gradients(calls: Calls) -> None:
    q, k, v = inputs(gradient=False)
    expected = through_the_operator(q, k, v)[0]
    for is_inference in (False, True, False, True):
        with torch.inference_mode() if is_inference else torch.no_grad():
            o, _ = generated.retention(q, k, v)
            made_there, _ = generated.retention(*(x.clone() for x in (q, k, v)))
        assert o.is_inference() == made_there.is_inference() == is_inference
        assert torch.equal(o, expected)
        assert torch.equal(made_there, expected)
    assert len(calls.straight) == 5  # all but the first of no_grad, and in inference mode of either kind of tensor


@pytest.mark.parametrize("at", [1, 2])
def test_keys_or_values_may_be_parameters(calls: Calls, at: int) -> None:
    make_known(calls)
    for times in range(3):
        tensors = [*inputs()]
        tensors[at] = torch.nn.Parameter(tensors[at].detach())
        do = torch.randn_like(tensors[2])
        got = results(generated.retention, tuple(tensors), do)
        assert calls.straight == [[], ["forward"], ["forward", "backward"]][times]
        assert_same(got, results(through_the_operator, tuple(tensors), do))
        calls.straight.clear()


def test_hooks_see_and_change_the_gradients(calls: Calls) -> None:
    make_known(calls)

    def hooked(call: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        tensors = [x.detach().requires_grad_() for x in given]
        seen: list[Tensor] = []
        tensors[0].register_hook(lambda x: x * 2)
        tensors[1].register_post_accumulate_grad_hook(lambda x: seen.append(x.grad))
        o = call(*tensors)[0]
        o.register_hook(lambda x: x * 3)
        o.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))
        o.backward(do)
        return [x.grad for x in tensors], seen  # type: ignore[misc]

    given = inputs()
    do = torch.randn_like(given[2])
    expected = hooked(through_the_operator)
    got = hooked(generated.retention)
    assert calls.straight == ["forward", "backward"]
    for pair in zip(expected, got, strict=True):
        assert [torch.equal(*both) for both in zip(*pair, strict=True)] == [True] * len(pair[0])


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomalies_are_detected(calls: Calls) -> None:
    make_known(calls)
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    with torch.autograd.detect_anomaly():
        assert_same(results(generated.retention, tensors, do), results(through_the_operator, tensors, do))
        assert calls.straight == ["forward", "backward"]
        with pytest.raises(RuntimeError, match="returned nan values"):
            results(generated.retention, tensors, torch.full_like(do, torch.nan))


def test_rules_may_be_read_again_between_forward_and_backward(calls: Calls) -> None:
    make_known(calls)
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    o, _ = generated.retention(*tensors)
    configuration.reload()
    got = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, tensors, do), strict=True))
    expected = results(through_the_operator, tensors, do)
    assert_same({"o": o.detach(), **got}, expected)
    assert not any(calls.known._kinds.values())
    assert_same(results(generated.retention, tensors, do), expected)


def test_threads_may_call_at_once_while_rules_change(calls: Calls) -> None:
    def run(thread: int) -> None:
        for i in range(20):
            tensors = inputs(torch.float32 if i % 2 else torch.float16, T=4 + (i + thread) % 3)
            do = torch.randn_like(tensors[2])
            assert_same(results(generated.retention, tensors, do), results(through_the_operator, tensors, do))
            if i == thread:
                configuration.clear_caches()

    with ThreadPoolExecutor(8) as threads:
        assert len([*threads.map(run, range(8))]) == 8
    assert "forward" in calls.straight


def test_gradients_in_batches_are_those_of_each(calls: Calls) -> None:
    make_known(calls)
    tensors = inputs()
    do = torch.randn(3, *tensors[2].shape)
    o, _ = generated.retention(*tensors)
    got = torch.autograd.grad(o, tensors, do, retain_graph=True, is_grads_batched=True)
    assert calls.straight == ["forward"]
    each = [torch.autograd.grad(o, tensors, x, retain_graph=True) for x in do]
    assert calls.straight == ["forward", *["backward"] * 3]
    assert all(torch.equal(x, torch.stack(y)) for x, y in zip(got, zip(*each, strict=True), strict=True))


OTHER_THAN_DEFAULT = {
    "initial_state": torch.zeros(1, 3, 8, 8),
    "output_final_state": True,
    "cu_seqlens": torch.tensor([0, 5, 20]),
    "chunk_size": 16,
    "form": "naive",
    "output_attentions": True,
    "final_state": torch.zeros(1, 3, 8, 8),
    "state_indices": torch.tensor([0]),
}


@pytest.mark.parametrize("module", ["", ".parallel", ".chunk", ".fused_chunk"])
def test_a_call_with_any_option_is_not_looked_up(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = importlib.import_module(f"generated.retention{module}")
    function = getattr(owner, f"{module[1:]}_retention".lstrip("_"))
    looked_up: list[tuple[Any, ...]] = []
    monkeypatch.setattr(owner.OPERATOR, "again", lambda *arguments: looked_up.append(arguments))
    tensors = [x[:1] for x in inputs()]
    known_by = {"q": tensors[0], "k": tensors[1], "v": tensors[2], "scale": 0.3, "g_gamma": torch.full((3,), -0.1)}
    for name in inspect.signature(function).parameters.keys() - known_by:
        pool = {"final_state": OTHER_THAN_DEFAULT["final_state"]} if name == "state_indices" else {}
        with torch.no_grad():
            function(**known_by, **pool, **{name: OTHER_THAN_DEFAULT[name]})
    assert not looked_up
    function(**known_by)
    assert looked_up == [tuple(known_by.values())]


@pytest.fixture
def probed_anew() -> Iterator[None]:
    """What is known of PyTorch is found out in a test, and forgotten with it."""
    probes = (known._guards_are_right, operators._known_gradient)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def fails(*_: Any) -> Any:
    raise TypeError("apply is another thing now")


WRONG_APPLIES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "raises": lambda _: fails,
    "records nothing": lambda function: lambda *x: function.forward(SimpleNamespace(), *x).detach(),
    "another's gradient": lambda _: lambda _, x: x * 2,
}


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("name", WRONG_APPLIES)
def test_functions_are_applied_as_pytorch_has_it_where_the_short_way_is_wrong(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_past_functorch", WRONG_APPLIES[name])
    make_known(calls)
    tensors = inputs()
    do = torch.randn_like(tensors[2])
    assert_same(results(generated.retention, tensors, do), results(through_the_operator, tensors, do))
    assert calls.straight == ["forward", "backward"]
    assert operators._known_gradient() == operators._KnownGradient.apply


@pytest.mark.usefixtures("probed_anew")
def test_the_short_way_to_apply_functions_is_taken_and_asked_for_once(calls: Calls) -> None:
    make_known(calls)
    make_known(calls, torch.float16)
    assert operators._known_gradient.cache_info().misses == 1
    assert operators._known_gradient() != operators._KnownGradient.apply


def careless(ignores: str) -> type:
    """A guard like PyTorch's own but for one thing that it takes though it should not."""
    autocast = torch.is_autocast_enabled

    class Careless:
        def __init__(self, *tensors: Tensor, dynamic_dims_sizes: Any, dynamic_dims_strides: Any) -> None:
            self.seen = self.of(tensors)

        def of(self, tensors: tuple[Tensor, ...]) -> list[Any]:
            asked = {
                "a tensor given twice": len({id(x) for x in tensors}) == len(tensors),
                "autocast": autocast("cpu"),
                "a mode": torch.is_inference_mode_enabled(),
            }
            for i, x in enumerate(tensors):
                asked |= {f"sizes {i}": x.shape, f"strides {i}": x.stride(), f"dtype {i}": x.dtype}
                asked |= {f"gradient {i}": x.requires_grad, f"class {i}": type(x), f"device {i}": x.device}
                asked |= {f"dispatch keys {i}": (x.is_inference(), x.is_neg())}
            return [value for name, value in asked.items() if not name.startswith(ignores)]

        def check(self, *tensors: Tensor) -> bool:
            return self.of(tensors) == self.seen

    return type("TensorGuards", (Careless,), {})


IGNORED = [
    "a tensor",
    "autocast",
    "a mode",
    "sizes 1",
    "strides 0",
    "dtype 1",
    "gradient",
    "class",
    "device",
    "dispatch",
]


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("ignores", ["nothing", *IGNORED])
def test_a_guard_that_takes_what_it_should_not_is_not_trusted(ignores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", careless(ignores))
    assert (known.guard_of([torch.zeros(2)]) is None) == (ignores != "nothing")


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("is_right_at_first", [False, True])
def test_a_guard_that_fails_leaves_calls_as_they_were(
    is_right_at_first: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_: Tensor, **__: Any) -> None:
            raise SystemError("guards are another thing now")

    if is_right_at_first:
        assert known.guard_of([torch.zeros(2)]) is not None
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Failing)
    make_known(calls)
    results(generated.retention, inputs(), torch.ones(2, 20, 3, 8))
    assert not calls.straight


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_guards_are_found_right_in_any_mode(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        assert known.guard_of([torch.zeros(2)]) is not None
