"""Every Triton kernel, run by the interpreter, gives what the formulas say: outputs, final states and all gradients."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from oracle import assert_matches, assert_same, check, errors, make_problem, run, solve
from pools import LAYOUTS, assert_states_go_to_slots
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy speaks up where a kernel computes infinities that it then masks.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16]
STATES = ("chunk", "fused_chunk", "fused_recurrent", "auto")
SHAPES = [  # B, T, H, K, V
    pytest.param((1, 1, 3, 1, 1), id="one_number"),
    pytest.param((2, 15, 1, 20, 33), id="less_than_a_chunk"),
    pytest.param((1, 63, 2, 3, 17), id="one_short_of_a_chunk"),
    pytest.param((1, 70, 2, 33, 20), id="a_chunk_and_a_bit"),
    pytest.param((1, 130, 1, 64, 17), id="two_chunks_and_a_bit"),
]
LENGTHS = [
    pytest.param([1, 15, 64, 1, 18], id="some_of_one_token"),
    pytest.param([1], id="one_token"),
    pytest.param([66, 31], id="two"),
]
Function = Callable[..., Any]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_gives_the_oracles_results(
    function: Function, form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(function, make_problem(*shape, dtype, states=form in STATES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_do_not_see_each_other(
    function: Function, form: str, lengths: list[int], dtype: torch.dtype
) -> None:
    check(function, make_problem(1, sum(lengths), 2, 20, 16, dtype, lengths=lengths, states=form in STATES))


GROUPS = [  # H, K, V, and the query heads of each
    pytest.param((2, 20, 12), 2, id="two_of_two"),
    pytest.param((2, 16, 16), 3, id="two_of_three"),
    pytest.param((1, 8, 16), 4, id="one_of_four"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "group"), GROUPS)
def test_query_heads_in_groups_share_keys_and_values(
    function: Function, form: str, sizes: tuple[int, int, int], group: int, dtype: torch.dtype
) -> None:
    states = form in STATES
    check(function, make_problem(2, 35, *sizes, dtype, group=group, states=states))
    check(function, make_problem(1, 32, *sizes, dtype, group=group, states=False))
    check(function, make_problem(1, 30, *sizes, dtype, group=group, lengths=[1, 25, 4], states=states))


@pytest.mark.forms(*STATES)
def test_states_of_groups_are_optional(function: Function) -> None:
    rates = torch.tensor([-0.3, -0.01])
    whole = make_problem(1, 34, 2, 16, 5, group=2, g_gamma=rates)
    check(function, replace(whole, h0=None, dht=None))
    check(function, replace(whole, h0=None))
    check(function, replace(whole, dht=None))


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [1, 50, 16, 33]])
@pytest.mark.parametrize("states", [False, True])
def test_groups_may_be_taken_in_segments(
    function: Function, states: bool, lengths: list[int] | None, dtype: torch.dtype
) -> None:
    check(function, make_problem(1, 100, 2, 16, 20, dtype, group=2, lengths=lengths, states=states), chunk_size=32)


@pytest.mark.forms("chunk")
@pytest.mark.parametrize(
    ("layout", "chunk_size", "group", "dtype"),
    [
        (layout, chunk_size, group, DTYPES[(LAYOUTS.index(layout) + (chunk_size is None) + group) % 2])
        for layout, chunk_size, group in itertools.product(LAYOUTS, [None, 32], [1, 2])
    ],
)
def test_states_go_to_their_slots_alone(
    function: Function, layout: str, chunk_size: int | None, group: int, dtype: torch.dtype
) -> None:
    options = {"dtype": dtype, "layout": layout, "chunk_size": chunk_size}
    packed = make_problem(1, 60, 2, 20, 17, group=group, lengths=[1, 40, 19])
    batch = make_problem(3, 35, 2, 16, 16, group=group)
    assert_states_go_to_slots(function, packed, [3, -1, 0], **options)
    assert_states_go_to_slots(function, replace(packed, h0=None), [4, 2, -9], **options)  # there are 4 slots
    assert_states_go_to_slots(function, batch, [1, 3, 0], index=torch.int32, **options)
    assert_states_go_to_slots(function, batch, None, **options)


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_wide_keys_go_to_their_slots_part_by_part(function: Function, chunk_size: int | None) -> None:
    problem = make_problem(1, 40, 1, 260, 16, group=2, lengths=[7, 33])
    assert_states_go_to_slots(function, problem, [2, 0], chunk_size=chunk_size)


@pytest.mark.forms("fused_recurrent")
@pytest.mark.parametrize("lengths", [None, [1, 15, 8]])
def test_groups_may_run_from_the_end_with_values_first(function: Function, lengths: list[int] | None) -> None:
    def values_first(*args: Any, initial_state: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, final = function(*args, initial_state=initial_state.mT, state_v_first=True, **options)
        return o, final.mT

    problem = make_problem(1, 24, 2, 5, 7, group=2, lengths=lengths, reverse=True)
    check(function, problem)
    check(values_first, problem)


@pytest.mark.forms(*STATES)
def test_states_are_optional(function: Function) -> None:
    whole = make_problem(1, 34, 2, 16, 5)
    check(function, replace(whole, h0=None, dht=None))
    check(function, replace(whole, h0=None))
    check(function, replace(whole, dht=None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_decays_and_scale_are_used(function: Function, form: str, dtype: torch.dtype) -> None:
    rates = torch.tensor([-0.7, 0.0, -1e-9])
    check(function, make_problem(1, 33, 3, 8, 8, dtype, states=form in STATES, g_gamma=rates, scale=-1.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_that_runs_out_within_a_chunk_gives_no_nan(function: Function, form: str, dtype: torch.dtype) -> None:
    rates = torch.tensor([-60.0, -20.0, -3.0])
    check(function, make_problem(1, 80, 3, 8, 8, dtype, states=form in STATES, g_gamma=rates))


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("tokens", [96, 100])
def test_a_segments_last_token_is_in_its_state_however_fast_the_decay(function: Function, tokens: int) -> None:
    rates = torch.tensor([-60.0, -23.0, -20.0])
    check(function, make_problem(1, tokens, 3, 8, 8, g_gamma=rates), chunk_size=32)
    check(function, make_problem(1, 96, 3, 8, 8, lengths=[32, 64], g_gamma=rates), chunk_size=32)


@pytest.mark.forms("fused_recurrent")
def test_a_slow_decay_is_not_lost_beside_a_state_that_grows(function: Function) -> None:
    """Where the decay's part is under half a unit of the state, and alone would be rounded away."""
    problem = make_problem(1, 1000, 1, 1, 24, g_gamma=torch.tensor([-(2.0**-23)]))
    problem = replace(problem, h0=problem.h0 * 4096, dht=problem.dht * 4096)
    got, expected = run(function, problem), solve(problem)
    assert max(errors(got[name], expected[name])[0] for name in ("final_state", "dh0")) < 2e-6


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("reverse", [False, True])
def test_what_decay_hides_from_a_segments_end_is_not_read(function: Function, reverse: bool) -> None:
    chunk = importlib.import_module("generated.retention.chunk")
    rates = torch.tensor([-3.0, 0.0])  # 2^-32 lies 7 tokens back
    k, v = (torch.randn(1, 128, 2, width) for width in (16, 32))
    config = chunk.ChunkStatesConfig(BT=16, BK=16, BV=32, num_warps=4, num_stages=1)

    def states(v: torch.Tensor) -> torch.Tensor:
        hs = chunk.segment_states(k, v, None, 64)
        chunk.run_states(chunk.states_launches(k, v, 1.0, 64, config, reverse=reverse), k, v, hs, rates, None)
        return hs[1]

    hidden, poisoned = states(v), v.clone()
    poisoned[:, 80:] = poisoned[:, :48] = torch.nan  # all but the last 16 tokens of the first segment, from either end
    seen = states(poisoned)
    assert torch.equal(seen[0], hidden[0])
    assert seen[1].isnan().any()


def test_offsets_may_be_int32_and_have_any_stride(function: Function, form: str) -> None:
    problem = make_problem(1, 20, 1, 8, 8, lengths=[3, 17], states=form in STATES)
    check(function, replace(problem, cu_seqlens=problem.cu_seqlens.int()))
    strided = torch.stack([problem.cu_seqlens, problem.cu_seqlens + 99], 1)[:, 0]
    assert not strided.is_contiguous()
    check(function, replace(problem, cu_seqlens=strided))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_are_right(function: Function, form: str, dtype: torch.dtype) -> None:
    check(function, make_problem(1, 19, 1, 130, 40, dtype, states=form in STATES))


@pytest.mark.forms("parallel", "chunk", "fused_chunk", "fused_recurrent")
def test_wider_heads_than_a_program_can_hold_are_refused(function: Function) -> None:
    q, v = torch.ones(1, 1, 1, 513), torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="K is 513 and V is 1; on a GPU both are at most 512"):
        function(q, q, v)


@pytest.mark.forms(*STATES)
def test_a_state_of_another_dtype_gets_a_gradient_of_its_own(function: Function) -> None:
    problem = make_problem(1, 9, 1, 4, 4)
    problem = replace(problem, h0=problem.h0.half())
    got = run(function, problem)
    assert got["dh0"].dtype == torch.float16
    assert errors(got.pop("dh0"), solve(problem)["dh0"])[0] < torch.finfo(torch.float16).eps
    assert_matches(got, problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_run_gives_the_same_bits(function: Function, form: str, dtype: torch.dtype) -> None:
    problem = make_problem(1, 40, 2, 16, 20, dtype, states=form in STATES)
    assert_same(run(function, problem), run(function, problem))


@pytest.mark.forms("fused_recurrent")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [1, 15, 8]])
def test_reverse_starts_at_the_last_token(function: Function, lengths: list[int] | None, dtype: torch.dtype) -> None:
    check(function, make_problem(1, 24, 2, 5, 7, dtype, lengths=lengths, reverse=True))


@pytest.mark.forms("fused_recurrent")
@pytest.mark.parametrize("reverse", [False, True])
def test_states_may_have_values_first(function: Function, reverse: bool) -> None:
    problem = make_problem(2, 9, 2, 5, 7, reverse=reverse)

    def values_first(*args: Any, initial_state: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, final = function(*args, initial_state=initial_state.mT, state_v_first=True, **options)
        assert final.shape == (2, 2, 7, 5)
        return o, final.mT

    check(values_first, problem)


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 128])
@pytest.mark.parametrize("lengths", [None, [1, 50, 16, 63]])
def test_any_chunk_size_gives_the_same_results(
    function: Function, lengths: list[int] | None, chunk_size: int, dtype: torch.dtype
) -> None:
    check(function, make_problem(1, 130, 1, 16, 20, dtype, lengths=lengths), chunk_size=chunk_size)


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize("states", [False, True])
def test_packed_sequences_much_longer_than_the_mean_are_cut(
    function: Function, states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = importlib.import_module("generated.retention.chunk")
    lengths = states_made(chunk, monkeypatch)
    check(function, make_problem(1, 976, 1, 16, 20, lengths=[5, 300, 600, 1, 40, 30], states=states))
    assert lengths == [256] * 3  # of the outputs, dq and dv: dk's sweep reads those of dv's


def states_made(chunk: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which is added, wherever states are made, the tokens of a segment."""
    run, lengths = chunk.run_states, list[int]()

    def run_states(launches: Any, *tensors: Any) -> None:
        lengths.append(launches.own._arguments[3])
        run(launches, *tensors)

    monkeypatch.setattr(chunk, "run_states", run_states)
    return lengths


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[tuple[int, int], Any], list[int]]:
    """A configuration of chunk for each K and V, to be changed, and the tokens a segment wherever states were made."""
    chunk = importlib.import_module("generated.retention.chunk")
    config = chunk.ChunkConfig(L=32, BT=16, BV=16, num_warps=4, num_stages=1)
    configs: dict[tuple[int, int], Any] = dict.fromkeys([(16, 20), (20, 16), (16, 16)], config)
    made = states_made(chunk, monkeypatch)
    monkeypatch.setattr(chunk, "default_config", lambda dtype, K, V, *_: configs[K, V])
    auto = importlib.import_module("generated.retention.auto")
    monkeypatch.setattr(auto, "default_config", lambda *_: auto.FormConfig("chunk"))
    return configs, made


def saving(configs: dict[tuple[int, int], Any]) -> None:
    """Let every sweep for outputs save its states."""
    configs.update({sizes: replace(config, save_states=1) for sizes, config in configs.items()})


SHARED = [  # V, lengths, what there is not, options
    (20, None, [], {}),
    (16, None, [], {}),
    (20, None, ["h0", "dht"], {}),
    (20, None, ["dht"], {}),
    (20, None, ["h0"], {}),
    (20, [5, 64, 1], [], {"chunk_size": 32}),
    (20, [5, 64, 1], ["h0", "dht"], {"chunk_size": 32}),
    (20, None, [], {"chunk_size": 64}),
]
SAVES = [(False, 1), (True, 1), (True, 2)]  # whether the outputs' are saved, and the query heads of each


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize(
    ("V", "lengths", "without", "options", "saves", "group", "dtype"),
    [(*case, *saves, DTYPES[(i + j) % 2]) for i, case in enumerate(SHARED) for j, saves in enumerate(SAVES)],
)
def test_dk_reads_the_states_of_dv_and_dq_those_that_the_outputs_saved(
    function: Function,
    segments: Any,
    V: int,
    lengths: list[int] | None,
    without: list[str],
    options: dict[str, int],
    saves: bool,
    group: int,
    dtype: torch.dtype,
) -> None:
    configs, made = segments
    if saves:
        saving(configs)
    problem = replace(make_problem(1, 70, 2, 16, V, dtype, group=group, lengths=lengths), **dict.fromkeys(without))
    got = run(function, problem, **options)
    assert_matches(got, problem)
    assert made == [options.get("chunk_size", 32)] * (2 if saves else 3)  # outputs', dq's, dv's
    assert_same(got, run(function, problem, **options))


@pytest.mark.forms("chunk", "auto")
def test_segments_of_two_lengths_share_no_states(function: Function, segments: Any) -> None:
    configs, made = segments
    configs[20, 16] = replace(configs[20, 16], L=64)
    saving(configs)
    check(function, make_problem(1, 100, 1, 16, 20))
    assert made == [32, 64, 32, 64]


@pytest.mark.forms("chunk", "auto")
@pytest.mark.parametrize("L", [64, 128])
def test_saved_states_are_not_read_after_another_rule(function: Function, segments: Any, L: int) -> None:
    configs, made = segments
    saving(configs)
    problem = make_problem(1, 100, 1, 16, 20)

    def change_rules(*args: Any, **options: Any) -> Any:
        results = function(*args, **options)
        configs.update({sizes: replace(config, L=L) for sizes, config in configs.items()})
        importlib.import_module("generated.configuration").clear_caches()
        return results

    check(change_rules, problem)
    assert made == ([32, 64, 64] if L == 64 else [32])


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("lengths", [None, [5, 64, 1, 30]])
def test_sweeps_from_the_end_share_states_too(form: str, function: Function, segments: Any, lengths: Any) -> None:
    configs, made = segments
    saving(configs)
    operator = importlib.import_module("generated.retention.chunk").OPERATOR

    def reversed_sweep(q: Any, k: Any, v: Any, **given: Any) -> Any:
        states = (given["initial_state"], given["output_final_state"], given["cu_seqlens"])
        return operator(q, k, v, given["g_gamma"], given["scale"], *states, given["reverse"], False, 32)

    check(reversed_sweep, make_problem(1, 100, 2, 16, 20, lengths=lengths, reverse=True))
    assert len(made) == 2


@pytest.mark.forms("chunk", "auto")
def test_autograd_has_the_saved_states(function: Function, segments: Any) -> None:
    configs, made = segments
    problem = make_problem(1, 100, 2, 16, 20)
    packed = []

    def saved(**options: Any) -> list[tuple[int, ...]]:
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
            check(function, problem, **options)
        return [tuple(x.shape) for x in packed if x.dim() == 4 and x.shape[0] == 4]

    assert saved() == []
    saving(configs)
    importlib.import_module("generated.configuration").clear_caches()
    made.clear()
    assert saved() == [(4, 2, 16, 20)]
    assert len(made) == 2
    plain = run(function, problem)
    made.clear()
    assert_same(run(functools.partial(checkpoint, function, use_reentrant=False), problem), plain)
    assert len(made) == 3  # the outputs' twice
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with torch.no_grad():
        assert function(*leaves)[0].grad_fn is None
    o, _ = function(*leaves)
    first, again = (torch.autograd.grad(o.square().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    (gradient, *_) = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"retention.*first derivatives only"):
        gradient.sum().backward()


@pytest.mark.forms("chunk", "auto")
def test_operators_make_states_again(function: Function, segments: Any) -> None:
    configs, made = segments
    saving(configs)
    problem = make_problem(1, 100, 1, 16, 20)
    with torch.profiler.profile():
        check(function, problem)
    assert len(made) == 3
    q = problem.q.requires_grad_()
    o, _ = function(q, problem.k, problem.v)
    with torch.profiler.profile():  # the operator's backward takes no states
        o.sum().backward()
    expected = torch.autograd.grad(function(q, problem.k, problem.v)[0].sum(), q)[0]
    assert errors(q.grad, expected.double())[0] < 1e-5
    made.clear()
    check(torch.compile(function, backend="aot_eager", fullgraph=True), problem)
    assert len(made) == 3


@pytest.mark.forms("auto")
@pytest.mark.parametrize("what", ["one launch", "parallel"])
def test_no_states_are_saved_that_nothing_reads(
    function: Function, segments: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, made = segments
    saving(configs)
    auto = importlib.import_module("generated.retention.auto")
    if what == "one launch":
        monkeypatch.setattr(auto, "default_gradients_config", lambda *_: auto.GradientsFormConfig("fused_chunk"))
    else:
        monkeypatch.setattr(auto, "default_config", lambda *sizes: auto.FormConfig("chunk" if sizes[1] == 16 else what))
    problem = make_problem(1, 100, 1, 16, 16 if what == "one launch" else 20, states=False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        check(function, problem)
    assert all(x.shape[0] != 4 for x in packed)
    assert len(made) == (1 if what == "one launch" else 2)


@pytest.mark.forms("chunk")
@pytest.mark.parametrize(
    "tiles",
    [
        {"L": 64, "BT": 16, "BV": 16},
        {"L": 32, "BT": 32, "BV": 64, "descriptors": 1},
        {"L": 32, "BT": 16, "BV": 32, "transposed": 1, "scores": 1},
    ],
)
def test_other_tiles_of_chunk_are_right(
    function: Function, tiles: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = importlib.import_module("generated.retention.chunk")
    config = chunk.ChunkConfig(**tiles, num_warps=4, num_stages=1)
    states = chunk.ChunkStatesConfig(16, 16, 32, num_warps=4, num_stages=1, descriptors=config.descriptors)
    monkeypatch.setattr(chunk, "choose_config", lambda kernel, *_: states if kernel.endswith("_states") else config)
    check(function, make_problem(1, 100, 1, 40, 36))
    check(function, make_problem(1, 100, 1, 40, 36, lengths=[33, 1, 66]))
    check(function, make_problem(1, 70, 2, 40, 36, group=2))


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize(
    "tiles",
    [
        {"BT": 16, "BV": 16},
        {"BT": 128, "BV": 64},
        {"BT": 16, "BV": 32, "descriptors": 1},
        {"BT": 32, "BV": 64, "transposed": 1},
        {"BT": 16, "BV": 32, "transposed": 1, "scores": 1, "descriptors": 1},
        {"BT": 32, "BV": 32, "scores": 1},
    ],
)
def test_other_tiles_of_fused_chunk_are_right(
    function: Function, tiles: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_chunk = importlib.import_module("generated.retention.fused_chunk")
    config = fused_chunk.FusedChunkConfig(**tiles, num_warps=4, num_stages=1)
    monkeypatch.setattr(fused_chunk, "choose_config", lambda *_: config)
    check(function, make_problem(1, 100, 1, 40, 36))
    check(function, make_problem(1, 100, 2, 36, 36, lengths=[33, 1, 66], states=False))
    check(function, make_problem(1, 70, 2, 40, 36, group=2))


@pytest.mark.forms("chunk", "fused_chunk", "auto")
@pytest.mark.parametrize(
    ("T", "K", "V", "lengths", "group", "states"),
    [
        (48, 24, 40, None, 1, False),
        (48, 24, 40, None, 2, True),
        (44, 24, 40, None, 1, True),
        (44, 24, 40, None, 2, False),
        (48, 24, 24, None, 1, False),
        (48, 24, 24, None, 2, True),
        (40, 24, 40, [17, 1, 22], 1, True),
        (40, 24, 40, [17, 1, 22], 2, False),
    ],
)
def test_scores_may_be_read_and_a_wide_k_taken_in_parts(
    function: Function,
    T: int,
    K: int,
    V: int,
    lengths: list[int] | None,
    group: int,
    states: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused_chunk = importlib.import_module("generated.retention.fused_chunk")
    chunk = importlib.import_module("generated.retention.chunk")
    made = []
    monkeypatch.setattr(fused_chunk, "WIDEST_PART", 16)
    monkeypatch.setattr(fused_chunk, "share_a_launch", lambda *_: False)
    make = fused_chunk.make_scores
    monkeypatch.setattr(fused_chunk, "make_scores", lambda *args, **of: made.append(1) or make(*args, **of))
    tiles = {"BT": 16, "BV": 32, "num_warps": 4, "num_stages": 1, "transposed": 1, "scores": 1}
    configs = {"chunk": chunk.ChunkConfig(L=32, **tiles), "fused_chunk": fused_chunk.FusedChunkConfig(**tiles)}
    for name, config in configs.items():
        monkeypatch.setattr(
            importlib.import_module(f"generated.retention.{name}"), "default_config", lambda *_, c=config: c
        )
    check(function, make_problem(1, T, 2, K, V, group=group, lengths=lengths, states=states))
    assert len(made) == 3  # the outputs', one for dq and dk, and dv's


@pytest.mark.forms("fused_recurrent")
@pytest.mark.parametrize("BV", [1, 64])
def test_other_tiles_of_fused_recurrent_are_right(function: Function, BV: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_recurrent = importlib.import_module("generated.retention.fused_recurrent")
    config = fused_recurrent.FusedRecurrentConfig(BV=BV, num_warps=1)
    monkeypatch.setattr(fused_recurrent, "choose_config", lambda *_: config)
    check(function, make_problem(1, 10, 1, 5, 7))


@pytest.mark.forms("parallel")
@pytest.mark.parametrize(
    "tiles",
    [{"BT": 64, "BS": 16, "BV": 16}, {"BT": 16, "BS": 16, "BV": 64}, {"BT": 32, "BS": 16, "BV": 32, "descriptors": 1}],
)
def test_other_tiles_of_parallel_are_right(
    function: Function, tiles: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = importlib.import_module("generated.retention.parallel")
    config = parallel.ParallelConfig(**tiles, num_warps=4, num_stages=1)
    monkeypatch.setattr(parallel, "choose_config", lambda *_: config)
    check(function, make_problem(1, 100, 2, 40, 36, states=False))
    check(function, make_problem(1, 100, 1, 40, 36, lengths=[33, 1, 66], states=False))
    check(function, make_problem(1, 70, 2, 40, 36, group=2, states=False))


@pytest.mark.forms("parallel")
@pytest.mark.parametrize("lengths", [None, [80, 1, 79]])
def test_blocks_that_have_decayed_away_may_be_skipped(function: Function, lengths: list[int] | None) -> None:
    rates = torch.tensor([-0.8, -0.4])  # under 2^-32 from 28 and 56 tokens on
    check(function, make_problem(1, 160, 2, 8, 8, lengths=lengths, states=False, g_gamma=rates))


@pytest.mark.forms("auto")
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_few_tokens_take_the_recurrence(function: Function, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = importlib.import_module("generated.retention.auto")
    used = []
    for form, sweep in list(auto.SWEEPS.items()):
        record = lambda *args, form=form, sweep=sweep, **options: used.append(form) or sweep(*args, **options)  # noqa: E731
        monkeypatch.setitem(auto.SWEEPS, form, record)
    check(function, make_problem(1, tokens, 1, 8, 8))
    assert set(used) == {"fused_recurrent" if tokens <= 8 else "chunk"}


@pytest.mark.forms("auto")
def test_a_rule_for_parallel_is_not_followed_where_states_are_wanted(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = importlib.import_module("generated.retention.auto")
    monkeypatch.setattr(auto, "choose_config", lambda *_: auto.FormConfig("parallel"))
    problem = make_problem(1, 20, 1, 8, 8)
    check(function, problem)
    check(function, replace(problem, dht=None))  # the sweep for dk alone has none
    check(function, replace(problem, h0=None, dht=None))


@pytest.mark.forms("fused_chunk", "chunk", "auto")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [40, 1, 29]])
def test_gradients_of_one_shape_share_a_launch(
    function: Function, lengths: list[int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_chunk = importlib.import_module("generated.retention.fused_chunk")
    auto = importlib.import_module("generated.retention.auto")
    launches = []

    class Recorded(fused_chunk.Launch):
        def __call__(self, *tensors: Any) -> None:
            launches.append(self._kernel)
            super().__call__(*tensors)

    monkeypatch.setattr(fused_chunk, "Launch", Recorded)
    monkeypatch.setattr(auto, "default_config", lambda *_: auto.FormConfig("chunk"))
    monkeypatch.setattr(auto, "default_gradients_config", lambda *_: auto.GradientsFormConfig("fused_chunk"))
    problem = make_problem(1, 70, 2, 24, 24, dtype, lengths=lengths, states=False)
    check(function, problem)
    assert launches == [fused_chunk.fused_chunk_kernel, fused_chunk.fused_chunk_gradients_kernel]


@pytest.mark.forms("fused_chunk")
def test_the_gradients_of_a_sweep_from_the_end_share_a_launch_too(function: Function) -> None:
    operators = importlib.import_module("generated.retention.operators")
    fused_chunk = importlib.import_module("generated.retention.fused_chunk")
    problem = make_problem(1, 45, 2, 8, 8, states=False)
    rates = torch.tensor([-0.3, -0.02])
    arguments = (problem.q, problem.k, problem.v, problem.do, rates, 0.5)
    options = dict.fromkeys(("h0", "dht", "dh0", "cu_seqlens", "chunk_size")) | {"reverse": True}
    together = fused_chunk.fused_chunk_gradients(*arguments, **options)
    apart = operators.sweep_gradients(fused_chunk.fused_chunk_sweep, *arguments, **options)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.forms("fused_chunk", "chunk", "auto")
@pytest.mark.parametrize("V", [8, 12])
def test_a_second_derivative_of_prepared_calls_is_refused(function: Function, V: int) -> None:
    problem = make_problem(1, 20, 1, 8, V, states=False)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    o, _ = function(*leaves)
    plain = torch.autograd.grad(o.square().sum(), leaves, retain_graph=True)
    first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
    for one, other in zip(first, plain, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(NotImplementedError, match=r"retention.*first derivatives only"):
        first[0].sum().backward()


@pytest.mark.forms("fused_chunk")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's own
def test_compiled_autograd_sees_operators_and_not_launches(function: Function) -> None:
    problem = make_problem(1, 20, 1, 8, 8, states=False)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    loss = function(*leaves)[0].square().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
        loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)
