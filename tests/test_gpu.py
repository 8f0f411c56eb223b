"""The Triton kernels on a GPU, in all three dtypes and at the training workloads, against the float64 oracle.

Nearly all the time goes into compiling about 300 kernels; with many cores, `-n 8` compiles eight at a time.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import FORMS, WITH_STATES, Function, all_forms, forms_with_states, has_states, public
from oracle import (
    Problem,
    assert_matches,
    assert_same,
    by_blocks,
    compare,
    errors,
    make_problem,
    poisoned_memory,
    retnet_rates,
    run,
    solve,
)
from torch import Tensor

from generated import configuration
from generated.retention import operators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning"),  # this GPU need not be tuned
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

WITH_KERNELS = tuple(form for form in FORMS if form != "naive")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
forms_with_kernels = pytest.mark.parametrize("form", WITH_KERNELS)
all_kernels = pytest.mark.parametrize("form", [*WITH_KERNELS, "segments"])

WORKLOADS = {  # B, T, H, K, V
    "retnet_1.3b": (8, 2048, 8, 256, 512),
    "wide_256": (8, 2048, 32, 256, 256),
    "lightning_128": (4, 4096, 64, 128, 128),
    "many_heads": (1, 8192, 96, 128, 128),
    "long": (2, 16384, 16, 128, 128),
    "short": (4, 2048, 16, 128, 128),
    "small": (8, 1024, 8, 64, 64),
    "retnet_3b": (4, 2048, 10, 256, 428),
    "retnet_7b_32k": (1, 32768, 16, 256, 512),
}
KINDS = ["plain", "packed", "grouped"]
GROUPS = [(2, 2), (3, 4), (1, 8)]  # heads of k and v, and the query heads of each
GEOMETRIC = [1024, 512, 256, 128, 64, 37, 11, 1]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Problem:
    return make_problem(*shape, dtype, device="cuda", **options)


def plain(T: int = 300, **options: Any) -> Problem:
    """A problem without states; the tests that are not about numbers share its kernels."""
    return on_gpu(2, T, 4, 64, 64, states=False, **options)


def packed(form: str, lengths: list[int] = GEOMETRIC) -> Problem:
    """Packed sequences with states; likewise shared."""
    return on_gpu(1, sum(lengths), 4, 128, 128, lengths=lengths, states=has_states(form))


def of_kind(kind: str, form: str, **options: Any) -> Problem:
    """One of KINDS; `options` are of those that are not packed."""
    return packed(form) if kind == "packed" else plain(**options, group=4 if kind == "grouped" else 1)


def check(function: Function, problem: Problem, **options: Any) -> None:
    assert_matches(run(function, problem, **options), problem, formula=by_blocks)


def check_part(function: Function, problem: Problem, heads: list[int]) -> None:
    """Run the whole problem; compare the first and the last row of the batch, and some heads."""
    rows = sorted({0, problem.q.shape[0] - 1})
    got = {name: x[rows][:, :, heads] for name, x in run(function, problem).items()}
    assert_matches(got, problem.part(rows, heads), formula=by_blocks)


# Numbers


@all_kernels
@all_dtypes
def test_any_length_gives_the_oracles_results(form: str, dtype: torch.dtype) -> None:
    for T in (1, 15, 63, 64, 65, 130, 257, 600):
        check(public(form), on_gpu(2, T, 3, 33, 20, dtype=dtype, states=has_states(form)))
    check(public(form), on_gpu(2, 257, 3, 34, 18, dtype=dtype, states=has_states(form)))


@all_kernels
@pytest.mark.parametrize(
    ("dtype", "K", "V"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 3, 300),
        (torch.bfloat16, 511, 129),
        (torch.float16, 255, 64),
        (torch.float16, 256, 428),
        (torch.float32, 256, 512),
        (torch.float32, 128, 128),
    ],
    ids=str,
)
def test_any_width_gives_the_oracles_results(form: str, dtype: torch.dtype, K: int, V: int) -> None:
    heads = max(2, 64 // K)  # a few numbers alone may all be badly rounded
    check(public(form), on_gpu(2, 330, heads, K, V, dtype=dtype, states=has_states(form)))


@all_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [GEOMETRIC, [1], [700, 1, 1, 64], [1] * 40], ids=["many", "one", "mixed", "ones"])
def test_packed_sequences_do_not_see_each_other(form: str, dtype: torch.dtype, lengths: list[int]) -> None:
    width = 128 if dtype == torch.bfloat16 else 33
    problem = on_gpu(1, sum(lengths), 4, width, width, dtype=dtype, lengths=lengths, states=has_states(form))
    check(public(form), problem)
    assert problem.cu_seqlens is not None
    assert_same(run(public(form), replace(problem, cu_seqlens=problem.cu_seqlens.int())), run(public(form), problem))


@all_kernels
@all_dtypes
@pytest.mark.parametrize(("H", "group"), GROUPS)
def test_query_heads_in_groups_share_keys_and_values(form: str, H: int, group: int, dtype: torch.dtype) -> None:
    for T, K, V in ((1, 64, 64), (65, 64, 64), (300, 33, 20), (257, 256, 128)):
        check(public(form), on_gpu(2, T, H, K, V, dtype=dtype, group=group, states=has_states(form)))
        check(public(form), on_gpu(2, T, H, K, V, dtype=dtype, group=group, states=False))


@all_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "group"), [*GROUPS, (2, 16)])
def test_packed_sequences_may_have_groups(form: str, H: int, group: int, dtype: torch.dtype) -> None:
    sizes, states = (1, sum(GEOMETRIC), H, 64, 128), has_states(form)
    check(public(form), on_gpu(*sizes, dtype=dtype, group=group, lengths=GEOMETRIC, states=states))


@forms_with_kernels
@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("name", ["retnet_1.3b", "lightning_128"])
def test_training_workloads_in_groups_give_the_oracles_results(form: str, name: str, group: int) -> None:
    B, T, HQ, K, V = WORKLOADS[name]
    problem, H = on_gpu(B, T, HQ // group, K, V, group=group, states=False), HQ // group
    rows, heads = [0, B - 1], sorted({0, H - 1})
    got = {
        name: x[rows].unflatten(2, (H, -1))[:, :, heads].flatten(2, 3) for name, x in run(public(form), problem).items()
    }
    assert_matches(got, problem.part(rows, heads), formula=by_blocks)


@pytest.mark.parametrize("form", ["parallel", "fused_recurrent"])
def test_keys_and_values_are_not_repeated_in_memory(form: str) -> None:
    problem = on_gpu(2, 1024, 2, 64, 64, group=16, states=False)
    with torch.no_grad():
        public(form)(problem.q, problem.k, problem.v)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o, _ = public(form)(problem.q, problem.k, problem.v)
        assert torch.cuda.max_memory_allocated() - before < o.nbytes + problem.k.nbytes


@pytest.fixture
def by_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that is launched within reads by tensor descriptors."""
    for name in ("chunk", "fused_chunk", "parallel"):
        form = importlib.import_module(f"generated.retention.{name}")
        with_descriptors = lambda *args, choose=form.choose_config: replace(choose(*args), descriptors=1)  # noqa: E731
        monkeypatch.setattr(form, "choose_config", with_descriptors)
    configuration.clear_caches()
    yield
    configuration.clear_caches()


@pytest.mark.parametrize("form", ["parallel", "chunk", "segments", "fused_chunk"])
@all_dtypes
def test_descriptors_give_the_oracles_results(form: str, dtype: torch.dtype, by_descriptors: None) -> None:
    states = has_states(form)
    for T, K, V in ((1, 64, 64), (65, 64, 64), (300, 40, 24), (300, 256, 128)):
        check(public(form), on_gpu(2, T, 3, K, V, dtype=dtype, states=states))
        check(public(form), on_gpu(2, T, 3, K, V, dtype=dtype, states=False))
    ragged = on_gpu(1, sum(GEOMETRIC), 4, 64, 64, dtype=dtype, lengths=GEOMETRIC, states=states)
    check(public(form), ragged)
    # What lies beside a sequence is not seen, whatever it is.
    alone, last = replace(ragged, q=ragged.q.clone(), k=ragged.k.clone(), v=ragged.v.clone()), GEOMETRIC[0]
    for x in (alone.q, alone.k, alone.v):
        x[:, last:] = torch.nan
    with torch.no_grad():
        expected, got = (public(form)(p.q, p.k, p.v, cu_seqlens=p.cu_seqlens)[0] for p in (ragged, alone))
    assert_same({"o": got[:, :last]}, {"o": expected[:, :last]})
    assert got[:, last:].isnan().all()


@pytest.mark.parametrize("form", ["parallel", "segments", "fused_chunk"])
def test_descriptors_are_made_anew_when_a_graph_is_replayed(form: str, by_descriptors: None) -> None:
    problem = packed(form)
    graph, results = captured(lambda: run(public(form), problem))
    expected = run(public(form), problem)
    for x in results.values():
        x.zero_()
    graph.replay()
    assert_same(results, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WORKLOADS)
@all_forms
def test_training_workloads_give_the_oracles_results(form: str, name: str, dtype: torch.dtype) -> None:
    B, T, H, K, V = WORKLOADS[name]
    if form == "naive" and T > 4096:
        pytest.skip("naive is quadratic")
    check_part(public(form), on_gpu(B, T, H, K, V, dtype=dtype, states=False), [0, H // 2, H - 1])


@forms_with_kernels
def test_the_first_workload_is_right_in_float32_too(form: str) -> None:
    B, T, H, K, V = WORKLOADS["retnet_1.3b"]
    check_part(public(form), on_gpu(B // 2, T, H, K, V, dtype=torch.float32, states=False), [0, H - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_any_chunk_size_gives_the_oracles_results(chunk_size: int, dtype: torch.dtype) -> None:
    check(public("chunk"), on_gpu(2, 330, 2, 64, 64, dtype=dtype), chunk_size=chunk_size)


def test_more_than_2_to_the_31_numbers_of_stored_states_are_addressed_right() -> None:
    T, H, D = 16 * 400, 96, 256
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    assert T // 16 * H * D * D > 2**31
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        o, _ = public("chunk")(q, k, v, chunk_size=16)
    heads = [0, H - 1]
    assert_matches({"o": o[:, :, heads]}, Problem(q, k, v, v).part([0], heads), formula=by_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_reverse_and_states_with_values_first_are_right(dtype: torch.dtype, reverse: bool) -> None:
    def values_first(*args: Any, initial_state: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        initial_state = initial_state.mT.contiguous()
        o, final = public("fused_recurrent")(*args, initial_state=initial_state, state_v_first=True, **options)
        return o, final.mT

    problem = on_gpu(2, 100, 2, 40, 70, dtype=dtype, reverse=reverse)
    check(public("fused_recurrent"), problem)
    check(values_first, problem)


@forms_with_kernels
def test_float32_is_exact_unless_the_user_lowered_it(form: str) -> None:
    """With "high" as exact as float16's mantissa, which is that of TF32, allows where it is cut off and not rounded."""
    problem = on_gpu(2, 300, 2, 64, 64, dtype=torch.float32, states=has_states(form))
    check(public(form), problem)
    torch.set_float32_matmul_precision("high")
    try:
        lowered = run(public(form), problem)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected, reference = solve(problem, formula=by_blocks), solve(problem, formula=by_blocks, operand=torch.float16)
    for name, x in lowered.items():
        assert errors(x, expected[name])[0] <= 4 * errors(reference[name], expected[name])[0] + 1e-5, name


@forms_with_kernels
def test_a_scale_may_be_a_whole_number(form: str) -> None:
    for scale in (1, 0.5, 2, 1.0):
        check(public(form), plain(100, scale=scale))


@forms_with_kernels
@pytest.mark.parametrize("H", [96, 128])
def test_many_heads_with_late_decays_are_right(form: str, H: int) -> None:
    check(public(form), on_gpu(1, 200, H, 64, 64, dtype=torch.float32, states=has_states(form)))


@forms_with_kernels
def test_blocks_that_have_decayed_away_may_be_skipped(form: str) -> None:
    rates = torch.tensor([-0.8, -0.1, -20.0, 0.0], device="cuda")
    check(public(form), plain(1000, g_gamma=rates))


def test_tensors_of_more_than_2_to_the_31_numbers_are_addressed_right() -> None:
    B, T, H, D = 9, 8192, 128, 256
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    last = Problem(q, k, v, v).part([B - 1], [0, H - 1])
    for form in ("chunk", "fused_chunk", "fused_recurrent", "parallel"):
        with torch.no_grad():
            o, _ = public(form)(q, k, v)
        assert_matches({"o": o[[B - 1]][:, :, [0, H - 1]]}, last, formula=by_blocks)
        del o


@forms_with_states
def test_a_state_carried_across_a_split_gives_the_whole(form: str) -> None:
    problem = on_gpu(2, 300, 4, 64, 64, dtype=torch.float32)

    def in_two_parts(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        function = public(form)
        o1, state = function(q[:, :70], k[:, :70], v[:, :70], initial_state=initial_state, output_final_state=True)
        o2, state = function(q[:, 70:], k[:, 70:], v[:, 70:], initial_state=state, output_final_state=True)
        return torch.cat([o1, o2], 1), state

    check(in_two_parts, problem)


@pytest.mark.parametrize("layout", ["packed", "heads_first"])
@forms_with_kernels
def test_any_strides_give_the_same_results(form: str, layout: str) -> None:
    B, T, H, D = 2, 300, 4, 64
    if layout == "packed":
        views = torch.randn(B, T, 3 * H * D, device="cuda").bfloat16().chunk(3, -1)
        q, k, v = (x.unflatten(-1, (H, D)) for x in views)
    else:
        q, k, v = (torch.randn(B, H, T, D, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    do = torch.randn(B, H, T, D, device="cuda").bfloat16().transpose(1, 2)
    found = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o, _ = public(form)(*leaves)
        grads = torch.autograd.grad(o, leaves, do)
        found.append({"o": o.detach(), "dq": grads[0], "dk": grads[1], "dv": grads[2]})
    assert_same(*found)


@forms_with_kernels
def test_tensors_that_are_not_aligned_are_read_right(form: str) -> None:
    """Triton compiles other kernels for pointers that are multiples of 16 bytes; a rank's own decays seldom are."""
    rates = retnet_rates(5).float().cuda()[1:]
    problem = plain(g_gamma=rates)
    check(public(form), replace(problem, g_gamma=rates.clone()))
    check(public(form), problem)
    shifted = [
        torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x).requires_grad_()
        for x in (problem.q, problem.k, problem.v)
    ]
    assert all(x.data_ptr() % 16 and x.is_contiguous() for x in shifted)
    o, _ = public(form)(*shifted, g_gamma=rates)
    dq, dk, dv = torch.autograd.grad(o, shifted, problem.do)
    assert_matches({"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}, problem, formula=by_blocks)


@pytest.mark.parametrize("lengths", [None, [100, 1, 99]])
def test_attentions_are_the_weights_of_the_values(lengths: list[int] | None) -> None:
    problem = on_gpu(1, 200, 4, 64, 64, lengths=lengths, states=False)
    o, attentions = public("parallel")(problem.q, problem.k, problem.v, None, True, problem.cu_seqlens)
    assert_matches({"o": o}, problem, formula=by_blocks)
    sums = torch.einsum("bhij,bjhv->bihv", attentions.double(), problem.v.double())
    assert_matches({"o": sums.bfloat16()}, problem, formula=by_blocks)


@all_forms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")  # naive's matrix products
def test_every_element_is_written(form: str, kind: str) -> None:
    problem = of_kind(kind, form)
    with poisoned_memory():
        assert torch.empty(2, device="cuda").isnan().all()
        got = run(public(form), problem)
    assert_matches(got, problem, formula=by_blocks)


@all_forms
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_gives_the_same_bits(form: str, kind: str) -> None:
    problem = of_kind(kind, form, T=2000)
    assert_same(run(public(form), problem), run(public(form), problem))


# Graphs, streams and launches


@all_forms
@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_call_waits_for_nothing(form: str, kind: str) -> None:
    problem = of_kind(kind, form)
    run(public(form), problem)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(public(form), problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """Warm a call up on a stream of its own, then capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@all_forms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_captured_call_gives_what_an_eager_call_gives(form: str, kind: str, backward: bool) -> None:
    """Also for inputs and offsets that are put into the captured tensors later."""
    lengths = GEOMETRIC[::-1]
    first, second = of_kind(kind, form), packed(form, lengths) if kind == "packed" else of_kind(kind, form, seed=1)
    held = replace(first, **{name: x.clone() for name, x in vars(first).items() if isinstance(x, Tensor)})

    def call() -> dict[str, Tensor]:
        if backward:
            return run(public(form), held)
        with torch.no_grad():
            options = {} if held.h0 is None else {"initial_state": held.h0, "output_final_state": True}
            o, final = public(form)(held.q, held.k, held.v, cu_seqlens=held.cu_seqlens, **options)
        return {"o": o} if final is None else {"o": o, "final_state": final}

    graph, results = captured(call)
    for problem in (first, second):
        for name, x in vars(problem).items():
            if isinstance(x, Tensor):
                getattr(held, name).copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        expected = run(public(form), problem)
        assert_same(results, {name: expected[name] for name in results})


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "sync" not in name.lower()]


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("kind", ["step", "packed_step", "first_step"])
@pytest.mark.parametrize("form", ["fused_recurrent", "auto"])
def test_one_token_is_one_kernel(form: str, kind: str) -> None:
    x = torch.ones(4, device="cuda")
    if len(kernels_of(lambda: x + 1)) != 1:
        pytest.skip("the profiler sees no kernels here")
    lengths = [1] * 8 if kind == "packed_step" else None
    problem = on_gpu(*((1, 8) if lengths else (8, 1)), 4, 128, 128, lengths=lengths)
    state = None if kind == "first_step" else problem.h0
    call = lambda: public(form)(problem.q, problem.k, problem.v, None, state, True, cu_seqlens=problem.cu_seqlens)  # noqa: E731
    with torch.no_grad():
        assert len(kernels_of(call)) == 1, kernels_of(call)


def compiled_kernels() -> int:
    """How many kernels Triton holds for this GPU."""
    modules = [importlib.import_module(f"generated.retention.{form}") for form in WITH_KERNELS]
    kernels = {id(x): x for module in modules for x in vars(module).values() if hasattr(x, "device_caches")}
    assert len(kernels) >= 4
    return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels.values())


@forms_with_kernels
def test_a_new_length_compiles_no_new_kernel(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "_levels", [])  # a rule may ask for other tiles at another length
    configuration.clear_caches()
    for T in (200, 2000):  # where chunk needs one launch, and where it needs two
        run(public(form), plain(T))
    before = compiled_kernels()
    for T in (199, 201, 208, 224, 1999, 2001, 2048):
        run(public(form), plain(T))
    assert compiled_kernels() == before
    configuration.clear_caches()


@all_forms
def test_a_call_on_another_stream_is_ordered_there(form: str) -> None:
    problem = plain(2000)
    expected = run(public(form), problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(public(form), problem)
    stream.synchronize()
    assert_same(got, expected)


# Known calls


forms_with_known_calls = pytest.mark.parametrize("form", ["parallel", "chunk", "fused_chunk", "auto"])


def through_the_operator(form: str) -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor, *, scale: None, cu_seqlens: None, g_gamma: Tensor | None) -> Any:
        operator = getattr(torch.ops.retgen, f"{form}_retention").default
        return operator(q, k, v, g_gamma, scale, None, False, cu_seqlens, False, False, None)

    return call


@pytest.fixture
def ways(form: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way a form's calls and their backwards went, by the defaults: by these all of them may be known."""
    found: list[str] = []
    owner = importlib.import_module("generated.retention" if form == "auto" else f"generated.retention.{form}")
    again, once_differentiable = owner.OPERATOR.again, operators._once_differentiable

    def watch_again(*arguments: Any) -> Tensor | None:
        o = again(*arguments)
        found.append("checked" if o is None else "straight")
        return o

    def watch_backward(operator: Function) -> Function:
        found.append("backward checked")
        return once_differentiable(operator)

    monkeypatch.setattr(owner.OPERATOR, "again", watch_again)
    monkeypatch.setattr(operators, "_once_differentiable", watch_backward)
    with configuration.defaults_only():
        yield found


def make_known(form: str, problem: Problem, ways: list[str]) -> dict[str, Tensor]:
    """Call twice: the second time the backward becomes known. Return what the operator gives."""
    expected = run(through_the_operator(form), problem)
    for _ in range(2):
        assert_same(run(public(form), problem), expected)
    ways.clear()
    return expected


@forms_with_known_calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decays", ["own", "given"])
def test_a_known_call_gives_the_operators_bits(form: str, dtype: torch.dtype, decays: str, ways: list[str]) -> None:
    rates = retnet_rates(4).float().cuda() if decays == "given" else None
    first, second = (plain(dtype=dtype, g_gamma=rates, seed=seed) for seed in (0, 1))
    make_known(form, first, ways)
    got = run(public(form), second)
    assert ways == ["straight"]
    assert_same(got, run(through_the_operator(form), second))
    tensors, options = (second.q, second.k, second.v), {"g_gamma": rates}
    once, again = (public(form)(*tensors, **options)[0] for _ in range(2))
    assert ways[-2:] == ["checked", "straight"]
    assert_same({"once": once, "again": again}, {"once": got["o"], "again": got["o"]})


@forms_with_known_calls
def test_a_known_call_on_another_stream_is_ordered_there(form: str, ways: list[str]) -> None:
    problem = plain()
    expected = make_known(form, problem, ways)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = replace(problem, v=torch.zeros_like(problem.v).copy_(problem.v))
        got = run(public(form), late)
    assert ways == ["straight"]
    stream.synchronize()
    assert_same(got, expected)


@forms_with_known_calls
def test_a_captured_known_call_is_replayed_for_other_inputs(form: str, ways: list[str]) -> None:
    first, second = plain(), plain(seed=1)
    expected = make_known(form, first, ways), run(through_the_operator(form), second)
    held = replace(first, **{name: getattr(first, name).clone() for name in ("q", "k", "v", "do")})
    ways.clear()
    graph, results = captured(lambda: run(public(form), held))
    assert ways == ["straight"] * 2
    for problem, found in zip((first, second, first), (*expected, expected[0]), strict=True):
        for name in ("q", "k", "v", "do"):
            getattr(held, name).copy_(getattr(problem, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, found)


def slice_at(offset: int, x: Tensor) -> Tensor:
    """A copy that begins so many elements behind an aligned address, as a slice of a larger tensor may."""
    return torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")[offset:].view_as(x).copy_(x)


@forms_with_known_calls
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_slice_at_an_odd_address_is_no_known_call(form: str, moved: int, ways: list[str]) -> None:
    problem = plain()
    make_known(form, problem, ways)
    for offset, way in ((1, ["checked", "backward checked"]), (8, ["straight"]), (3, ["checked", "backward checked"])):
        ways.clear()
        leaves = [problem.q, problem.k, problem.v]
        leaves[moved] = slice_at(offset, leaves[moved])
        leaves = [x.detach().requires_grad_() for x in leaves]
        o, _ = public(form)(*leaves)
        dq, dk, dv = torch.autograd.grad(o, leaves, problem.do)
        assert ways == way
        assert_matches({"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}, problem, formula=by_blocks)


@forms_with_known_calls
def test_a_gradient_at_an_odd_address_goes_the_long_way(form: str, ways: list[str]) -> None:
    problem = plain()
    expected = make_known(form, problem, ways)
    for offset, way in ((1, ["straight", "backward checked"]), (8, ["straight"])):
        ways.clear()
        assert_same(run(public(form), replace(problem, do=slice_at(offset, problem.do))), expected)
        assert ways == way


@forms_with_known_calls
@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_calls_on_two_gpus_are_each_known(form: str, ways: list[str]) -> None:
    first = plain()
    there = {name: x.to("cuda:1") for name, x in vars(first).items() if isinstance(x, Tensor)}
    problems = first, replace(first, **there)
    expected = [make_known(form, problem, ways) for problem in problems]
    for problem, found in zip(problems * 2, expected * 2, strict=True):
        assert_same(run(public(form), problem), found)
    assert ways == ["straight"] * 4
    assert torch.cuda.current_device() == 0


# PyTorch


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@all_forms
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_forms_equal_eager_ones(form: str, kind: str, nothing_compiled: None) -> None:
    problem = of_kind(kind, form)
    function = torch.compile(public(form), fullgraph=True, backend="aot_eager")
    assert_same(run(function, problem), run(public(form), problem))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the one that inductor makes to begin with
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_what_stands_around_a_form(mode: str, nothing_compiled: None) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        o, _ = public("chunk")(q * 2.0, k, v)
        return o * 0.5, None

    function = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):  # reduce-overhead captures at the second call and replays at the third
        problem = plain()
        torch.compiler.cudagraph_mark_step_begin()
        got = {name: x.clone() for name, x in run(function, problem).items()}
    assert_matches(got, problem, formula=by_blocks)


@all_forms
def test_autocast_computes_in_its_dtype(form: str) -> None:
    problem = on_gpu(2, 300, 4, 64, 64, dtype=torch.float32, states=False)
    lowered = {name: getattr(problem, name).bfloat16() for name in ("q", "k", "v", "do")}

    def under_autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return public(form)(*args, **options)

    got = run(under_autocast, replace(problem, do=lowered["do"]))
    expected = run(public(form), replace(problem, **lowered))
    assert got["o"].dtype == torch.bfloat16
    assert got["dq"].dtype == torch.float32
    assert_same({name: x.float() for name, x in got.items()}, {name: x.float() for name, x in expected.items()})


@pytest.mark.parametrize("kind", KINDS)
@all_forms
def test_every_operator_passes_opcheck(form: str, kind: str) -> None:
    problem = on_gpu(2, 40, 4, 64, 64, states=False) if kind == "plain" else packed(form, [30, 1, 9])
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    final = problem.h0 is not None
    operator = getattr(torch.ops.retgen, f"{form}_retention").default
    arguments = (q, k, v, None, None, problem.h0, final, problem.cu_seqlens, False, False, None)
    torch.library.opcheck(operator, arguments)


# Bad input


@pytest.mark.parametrize("form", ["parallel", "chunk", "fused_chunk", "fused_recurrent", "auto"])
def test_what_no_kernel_can_hold_is_refused(form: str) -> None:
    q, v = torch.randn(1, 20, 2, 513, device="cuda"), torch.randn(1, 20, 2, 16, device="cuda")
    with pytest.raises(ValueError, match=r"is 513 and .* on a GPU both are at most 512"):
        public(form)(q, q, v)
    with pytest.raises(TypeError, match="is float64, which is for the CPU"):
        public(form)(v.double(), v.double(), v.double())


def test_naive_takes_any_width_and_float64() -> None:
    check(public("naive"), on_gpu(1, 20, 2, 600, 700, dtype=torch.float32))
    problem = on_gpu(1, 20, 2, 5, 7, dtype=torch.float64, states=False)
    problem = replace(problem, g_gamma=torch.tensor([-0.03, -0.02], dtype=torch.float64, device="cuda"))
    assert all(one.error < 1e-12 for one in compare(run(public("naive"), problem), problem, formula=by_blocks))


@all_forms
def test_tensors_on_two_devices_are_refused(form: str) -> None:
    problem = plain(20)
    for name, x in {"k": problem.k.cpu(), "v": problem.v.cpu()}.items():
        with pytest.raises(ValueError, match=f"{name} is on cpu, q on cuda:0"):
            public(form)(**{"q": problem.q, "k": problem.k, "v": problem.v, name: x})
    with pytest.raises(ValueError, match="cu_seqlens is on cpu, q on cuda:0"):
        public(form)(problem.q[:1], problem.k[:1], problem.v[:1], cu_seqlens=torch.tensor([0, 20]))


@pytest.mark.parametrize("form", WITH_STATES)
def test_a_state_on_another_device_is_refused(form: str) -> None:
    problem = plain(20)
    with pytest.raises(ValueError, match="initial_state is on cpu, q on cuda:0"):
        public(form)(problem.q, problem.k, problem.v, initial_state=torch.zeros(2, 4, 64, 64))


def test_attentions_that_cannot_fit_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 1, device="cuda").expand(1, 1_000_000, 8, 1)
    with pytest.raises(ValueError, match=r"output_attentions=True needs .* GiB, but cuda:0 has .* GiB"):
        public("parallel")(q, q, q, output_attentions=True)


@pytest.mark.parametrize("offsets", [[1, 6, 12], [0, 8, 7, 12], [0, 6, 13]])
def test_the_debug_switch_finds_bad_offsets_on_the_device(offsets: list[int]) -> None:
    """In a process of its own: an assertion on the device ends the use of the GPU."""
    program = f"""
import torch, generated
q = torch.ones(1, 12, 2, 16, device="cuda")
torch.cuda.synchronize()
generated.arguments._check_cu_seqlens("f", q, torch.tensor({offsets}, device="cuda"))
torch.cuda.synchronize()
"""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "RETGEN_CHECK_CU_SEQLENS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
