"""The step in place, on the CPU: results, bad input, and its manners as an operator."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import errors, make_problem, solve
from serving import assert_served_as_alone
from steps import (
    assert_grouped_steps_match,
    assert_independent,
    assert_rounded_once,
    assert_steps_match,
    assert_unbiased,
    group_heads,
    run_step,
    write_rules,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from generated import arguments, configuration, fused_recurrent_retention, known, retention_step
from generated.configuration_file import use_problem
from generated.launch import blocks, padded
from generated.retention import step
from generated.retention.step import StepConfig, default_config, prepare_known

README = Path(__file__).resolve().parent.parent / "README.md"
B, T, H, K, V = 2, 3, 2, 4, 5
OPERATOR = torch.ops.retgen.retention_step.default
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start and leave without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def good(*, pool: bool = False, kept: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {name: torch.randn(B, T, H, D) for name, D in (("q", K), ("k", K), ("v", V))}
    given["state"] = torch.randn(4 if pool else B, H, K, V)
    if pool:
        given["state_indices"] = torch.tensor([3, -1])
    if kept:
        given |= {"states_out": torch.zeros(B, T, H, K, V), "out": torch.zeros(B, T, H, V)}
    return given


def copy(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}


def low(**given: Any) -> dict[str, Any]:
    """The same with states of 16 bits."""
    return given | {name: given[name].bfloat16() for name in ("state", "states_out") if name in given}


# Results


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1] * 9, [9], [1, 5, 3]])
def test_steps_are_the_sequence(lengths: list[int], dtype: torch.dtype) -> None:
    rates = torch.tensor([-0.7, 0.0, -1e-9])
    assert_steps_match(retention_step, make_problem(2, 9, 3, 5, 7, dtype, g_gamma=rates, scale=-1.5), lengths)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_use_their_slots_alone(index: torch.dtype) -> None:
    given = good(pool=True, kept=True)
    before = copy(given)
    given["state_indices"] = given["state_indices"].to(index)
    o = retention_step(**given)
    alone = before["state"][3:].clone()
    expected = retention_step(*(before[name][:1] for name in "qkv"), alone)
    torch.testing.assert_close(o[:1], expected)
    assert o is given["out"]
    assert o[1].count_nonzero() == given["states_out"][1].count_nonzero() == 0
    assert torch.equal(given["state"], torch.cat([before["state"][:3], alone]))
    assert torch.equal(given["states_out"][:1, -1], alone)


def test_a_prompts_final_state_goes_on() -> None:
    problem = make_problem(2, 12, 2, 5, 7)
    first, rest = zip(*(x.split(8, 1) for x in (problem.q, problem.k, problem.v)), strict=True)
    _, state = fused_recurrent_retention(*first, initial_state=problem.h0, output_final_state=True)
    o = retention_step(*rest, state)
    assert errors(o, solve(problem)["o"][:, 8:])[0] < 1e-5
    assert errors(state, solve(problem)["final_state"])[0] < 1e-5


def test_tokens_are_rolled_back_with_the_states_kept() -> None:
    problem = make_problem(2, 6, 2, 5, 7)
    q, k, v = problem.q, problem.k, problem.v
    state, kept = problem.h0.clone(), torch.empty(2, 4, 2, 5, 7)
    retention_step(q[:, :4], k[:, :4], v[:, :4].flip(0), state, states_out=kept)  # of four, none was right
    accepted = torch.tensor([0, 0])
    state.copy_(torch.where(accepted[:, None, None, None] > 0, kept[:, 0], problem.h0))
    retention_step(q[:, :4], k[:, :4], v[:, :4], state, states_out=kept)  # and now the first two
    state.copy_(kept[:, 1])
    o = retention_step(q[:, 2:], k[:, 2:], v[:, 2:], state)
    assert errors(o, solve(problem)["o"][:, 2:])[0] < 1e-5


@pytest.mark.parametrize(("rows", "V"), [(1, 6), (7, 40), (32, 6)])
def test_sequences_in_a_pool_are_as_if_each_were_alone(rows: int, V: int) -> None:
    assert_served_as_alone(retention_step, count=200, rows=rows, V=V, seed=rows)


halves = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)


@halves
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_states_of_16_bits_are_rounded_once(half: torch.dtype, dtype: torch.dtype) -> None:
    assert_rounded_once(retention_step, make_problem(2, 5, 3, 20, 33, dtype), half)
    assert_rounded_once(retention_step, make_problem(2, 5, 3, 20, 33, dtype), half, 1, seed=5)


@halves
def test_stochastic_rounding_has_no_bias(half: torch.dtype) -> None:
    assert_unbiased(retention_step, half)


@halves
def test_every_number_has_bits_of_its_own(half: torch.dtype) -> None:
    assert_independent(retention_step, half)


@pytest.mark.parametrize("seeded", [False, True])
def test_slow_decays_are_kept_in_the_mean_by_stochastic_rounding_alone(seeded: bool) -> None:
    q, state = torch.zeros(1, 1, 1, 64), torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    rate = torch.tensor([-(2.0**-12)])
    for i in range(1024):
        retention_step(q, q, q, state, g_gamma=rate, seed=i if seeded else None)
    kept = state.double().mean().item()
    assert kept == (pytest.approx(torch.exp(torch.tensor(-0.25)).item(), rel=1e-2) if seeded else 1)


def test_a_seed_may_be_a_tensor() -> None:
    given = low(**good(pool=True, kept=True))
    other = copy(given)
    retention_step(**given, seed=2**40)
    retention_step(**other, seed=torch.tensor([2**40]))
    torch.testing.assert_close(given, other, rtol=0, atol=0)


def test_a_state_of_inference_mode_is_written_there_alone() -> None:
    given = good()
    with torch.inference_mode():
        given["state"] = given["state"].clone()
    before = given["state"].clone()
    with torch.no_grad(), pytest.raises(ValueError, match="state was made in inference mode"):
        retention_step(**given)
    assert torch.equal(given["state"], before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("HQ", "H"), [(6, 1), (6, 2), (6, 6)])
def test_query_heads_share_the_state_of_their_group(HQ: int, H: int, dtype: torch.dtype) -> None:
    rates = None if dtype == torch.bfloat16 else -torch.arange(H) / 3
    problem = make_problem(2, 4, HQ, 5, 7, dtype, g_gamma=rates)
    assert_grouped_steps_match(retention_step, problem, H)
    assert_grouped_steps_match(retention_step, problem, H, out=torch.empty(2, 4, HQ, 7, dtype=dtype))


# Tiles


@pytest.mark.parametrize("BV", [0, 4, 24])
def test_tiles_are_powers_of_two_from_8(BV: int) -> None:
    with pytest.raises(ValueError, match="power of two of at least 8"):
        StepConfig(BV=BV, num_warps=4)


@pytest.mark.parametrize("kind", step.KERNELS, ids=str)
def test_rules_are_those_of_the_kind_of_states(
    kind: tuple[torch.dtype, bool], only_this_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(kernel: str, config_type: Any, default: Any, k: Tensor, v: Tensor, *_: Any) -> Any:
        (rows, tokens, heads, width), device = k.shape, torch.device("cuda", 0)
        shape = {"K": width, "V": v.shape[3], "BH": rows * heads, "T": tokens}
        return configuration.select_config(kernel, config_type, default, device=device, dtype=k.dtype, **shape)

    monkeypatch.setattr(step, "choose_config", choose)
    ruled = write_rules(only_this_directory / "a.yaml")[kind]
    dtype, is_seeded = kind
    state, seed = torch.empty(1, dtype=dtype), torch.empty(1) if is_seeded else None
    for tokens in (1, 2, 3):
        k, v = (torch.empty(8, tokens, 4, width, dtype=torch.bfloat16) for width in (64, 96))
        default = default_config(k.dtype, 64, 96, 32, tokens, dtype.itemsize)
        assert ruled != default
        assert step.config_for(k, k, v, state, seed, None) == (ruled if tokens < 3 else default)
        few, many = (k.repeat_interleave(G, 2) for G in (2, 32))
        in_pieces = step.config_for(many, k, v, state, seed, None)
        assert 32 / dtype.itemsize <= in_pieces.BV
        assert in_pieces != ruled
        for q, kept in ((few, None), (many, state)):
            assert step.config_for(q, k, v, state, seed, kept) == (ruled if tokens < 3 else default)


@pytest.mark.parametrize(
    ("B", "outputs", "stored", "is_kept", "expected"),
    [
        (256, 1, torch.float32, False, False),
        (256, 4, torch.float32, False, False),
        (256, 5, torch.float32, False, True),
        (256, 1, torch.bfloat16, False, False),
        (256, 2, torch.bfloat16, False, True),
        (256, 16, torch.bfloat16, True, False),
        (15, 16, torch.bfloat16, False, False),
        (16, 16, torch.bfloat16, False, True),
        (1, 17, torch.float32, False, True),
        (1, 17, torch.float32, True, False),
    ],
)
def test_states_go_by_in_pieces_where_it_is_faster(
    B: int, outputs: int, stored: torch.dtype, is_kept: bool, expected: bool
) -> None:
    assert step.goes_by_in_pieces(outputs, 128, 8 * B, stored.itemsize, are_kept=is_kept) is expected


def test_tokens_are_taken_back_as_the_readme_does() -> None:
    lines = re.search(
        r"^kept = pool\.new_empty.*?(?=^```)", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert lines is not None
    given, accepted = good(pool=True), torch.tensor([2, 9])
    pool, slots = given["state"], given["state_indices"]
    expected = pool.clone()
    retention_step(*(given[name][:1, :2] for name in "qkv"), expected, state_indices=slots[:1])
    x = {"q": given["q"], "k": given["k"], "v": given["v"], "B": B, "T": T, "H": H, "K": K, "V": V}
    exec(lines.group(), {**globals(), **x, "pool": pool, "slots": slots, "accepted": accepted})  # noqa: S102
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("outputs", [1, 2, 7, 8, 16, 33, 128, 1024])
def test_tiles_of_many_outputs_hold_them_in_blocks(outputs: int) -> None:
    BR = step.rows_of_outputs(outputs)
    assert BR & (BR - 1) == 0
    assert min(outputs, 64) <= BR <= min(64, 2 * outputs - 1)
    for V, BH, size in itertools.product((1, 80, 512), (1, 64, 4096), (2, 4)):
        config = step.default_config_in_pieces(128, V, outputs, BH, size)
        assert 32 // size <= config.BV <= min(256, padded(V))
        assert BR * config.BV / (32 * config.num_warps) <= 64  # numbers of sums a thread


def test_a_rule_with_tiles_that_no_random_bits_come_for_is_none() -> None:
    assert use_problem("use", {"BV": 8, "num_warps": 1}, StepConfig) is None
    assert "BV is 4; it must be a power of two of at least 8" in str(
        use_problem("use", {"BV": 4, "num_warps": 1}, StepConfig)
    )


@pytest.mark.parametrize("size", [2, 4])
def test_default_tiles_are_of_whole_sectors_and_fit_the_registers(size: int) -> None:
    sizes = ((1, 64, 80, 128, 256, 512), (1, 16, 64, 256, 428, 512), (1, 8, 64, 4096))
    for K, V, BH in itertools.product(*sizes):
        config = default_config(torch.bfloat16, K, V, BH, 1, size)
        assert 8 <= config.BV <= padded(V)
        assert 32 <= config.BV * size <= 128
        assert config.num_warps in (1, 2, 4, 8)
        numbers = padded(K) * config.BV / (32 * config.num_warps)
        assert numbers <= (64 if BH * padded(V) // config.BV > 1024 else 32)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("H", "K", "V"), [(8, 256, 512), (16, 128, 128), (8, 128, 256), (5, 512, 512), (64, 64, 64)])
def test_one_sequence_fills_a_large_gpu(H: int, K: int, V: int, size: int) -> None:
    """132 multiprocessors, if sectors allow it: without the parts of a sum in programs apart."""
    config = default_config(torch.bfloat16, K, V, H, 1, size)
    assert blocks(V, config.BV) * H >= min(132, V * size // 32 * H)


# Bad input


class NoStep(TorchDispatchMode):
    """Fail where the operator starts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "retgen" not in str(func), f"{func} was called"
        return func(*args, **(kwargs or {}))


def put(**values: Any) -> Change:
    return lambda given: given.update(values)


def put_low(**values: Any) -> Change:
    return lambda given: given.update(low(**given) | values)


def change(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda given: given.update({name: function(given[name])})


def share(name: str, other: str) -> Change:
    return lambda given: given.update({name: given[other].flatten()[: given[name].numel()].view_as(given[name])})


def group(heads: int, parts: str = "kvs", **values: Any) -> Change:
    """Four query heads, and so many others in parts of the rest."""

    def change(given: dict[str, Any]) -> None:
        sizes = {"q": 4, "k": heads if "k" in parts else 4, "v": heads if "v" in parts else 4}
        given.update({name: torch.randn(B, T, size, given[name].shape[3]) for name, size in sizes.items()})
        states = heads if "s" in parts else 4
        given["state"], given["states_out"] = torch.zeros(4, states, K, V), torch.zeros(B, T, states, K, V)
        given["out"] = torch.zeros(B, T, 4 if "o" in parts else heads, V)
        given.update(values)

    return change


def longer(given: dict[str, Any]) -> None:
    given.update({name: given[name][:, :1].expand(-1, 17, -1, -1) for name in "qkv"})


BAD = {
    "k_of_another_dtype": (change("k", Tensor.half), TypeError, "k is torch.float16, q is torch.float32"),
    "scale_is_0": (put(scale=0), ValueError, "scale is 0", "not 0"),
    "decays_of_more_heads": (put(g_gamma=torch.zeros(3)), ValueError, "g_gamma is [3]", "[H] = [2]"),
    "k_of_3_heads": (
        group(3),
        ValueError,
        "q has 4 heads, k has 3",
        "a multiple of the heads of k and v",
        "[2, 3, 4, 4]",
    ),
    "k_of_more_heads": (group(8), ValueError, "q has 4 heads, k has 8"),
    "v_of_the_queries_heads": (group(2, "k"), ValueError, "v has 4 heads, k has 2; k and v must share B, T and H"),
    "k_of_fewer_tokens": (
        change("k", lambda x: x[:, :2]),
        ValueError,
        "k is [2, 2, 2, 4], q is [2, 3, 2, 4]",
        "same B, T",
    ),
    "state_of_the_queries_heads": (
        group(2, "kv"),
        ValueError,
        "state is [4, 4, 4, 5]",
        "[slots, H, K, V] = [4, 2, 4, 5]",
    ),
    "decays_of_the_queries_heads": (
        group(2, "kvso", g_gamma=torch.zeros(4)),
        ValueError,
        "g_gamma is [4]",
        "[H] = [2]",
    ),
    "out_of_the_states_heads": (group(2, "kvs"), ValueError, "out is [2, 3, 2, 5]", "[B, T, HQ, V] = [2, 3, 4, 5]"),
    "17_tokens": (longer, ValueError, "T is 17", "at most 16 tokens: split them over calls"),
    "no_state": (put(state=None), TypeError, "state is a NoneType", "must be a tensor [slots, H, K, V]"),
    "state_of_two_dimensions": (change("state", lambda x: x[0, 0]), ValueError, "state is [4, 5]", "[slots, H, K, V]"),
    "state_with_values_first": (change("state", lambda x: x.mT), ValueError, "state is [4, 2, 5, 4]", "[4, 2, 4, 5]"),
    "state_of_no_dimension": (put(state=torch.zeros(())), ValueError, "state is []", "[slots, H, K, V]"),
    "state_of_int": (
        change("state", Tensor.int),
        TypeError,
        "state is torch.int32",
        "torch.float32 or torch.float16 or",
    ),
    "state_of_double": (change("state", Tensor.double), TypeError, "state is torch.float64; for a q of torch.float32"),
    "state_alone_of_half": (
        change("state", Tensor.half),
        TypeError,
        "states_out is torch.float32; for a state of torch.f",
    ),
    "seed_for_float32": (
        put(seed=0),
        ValueError,
        "seed is given for a state of torch.float32",
        "only float16 and bfloat16",
    ),
    "seed_is_a_float": (put_low(seed=1.0), TypeError, "seed is a float", "int, a tensor [1] of int64 or None"),
    "seed_is_a_bool": (put_low(seed=True), TypeError, "seed is a bool"),
    "seed_is_negative": (put_low(seed=-1), ValueError, "seed is -1; it must be from 0 to 2^63 - 1"),
    "seed_is_too_large": (put_low(seed=2**63), ValueError, f"seed is {2**63}"),
    "seed_of_int32": (put_low(seed=torch.ones(1).int()), ValueError, "seed is [1] of torch.int32", "[1] of int64"),
    "seeds_of_rows": (put_low(seed=torch.ones(2).long()), ValueError, "seed is [2] of torch.int64"),
    "seed_elsewhere": (put_low(seed=torch.ones(1).long().to("meta")), ValueError, "seed is on meta, state on cpu"),
    "state_elsewhere": (change("state", lambda x: x.to("meta")), ValueError, "state is on meta, q on cpu"),
    "state_in_another_order": (change("state", lambda x: x.mT.contiguous().mT), ValueError, "state has the strides"),
    "state_whose_slots_are_one": (change("state", lambda x: x[:1].expand(4, -1, -1, -1)), ValueError, "not overlap"),
    "indices_in_a_list": (put(state_indices=[0, 1]), TypeError, "state_indices is a list", "tensor [B] or None"),
    "indices_of_int16": (change("state_indices", Tensor.short), TypeError, "state_indices is torch.int16", "int32"),
    "indices_of_a_row_more": (put(state_indices=torch.arange(3)), ValueError, "state_indices is [3]", "[B] = [2]"),
    "indices_elsewhere": (change("state_indices", lambda x: x.to("meta")), ValueError, "state_indices is on meta"),
    "states_out_of_a_token": (change("states_out", lambda x: x[:, :1]), ValueError, "states_out is [2, 1, 2, 4, 5]"),
    "states_out_of_half": (change("states_out", Tensor.half), TypeError, "states_out is torch.float16"),
    "out_is_a_number": (put(out=0.0), TypeError, "out is a float", "must be a tensor [B, T, HQ, V]"),
    "out_is_flat": (change("out", lambda x: x.flatten(2)), ValueError, "out is [2, 3, 10]", "[2, 3, 2, 5]"),
    "out_of_half": (change("out", Tensor.half), TypeError, "out is torch.float16", "must be torch.float32"),
    "out_elsewhere": (change("out", lambda x: x.to("meta")), ValueError, "out is on meta, q on cpu"),
    "out_of_strides": (change("out", lambda x: x.mT.contiguous().mT), ValueError, "out has the strides", "contiguous"),
    "out_is_v": (share("out", "v"), ValueError, "out shares memory with v", "shares memory"),
    "out_in_state": (share("out", "state"), ValueError, "out shares memory with state"),
    "out_in_states_out": (share("out", "states_out"), ValueError, "out shares memory with states_out"),
    "state_in_states_out": (share("state", "states_out"), ValueError, "states_out shares memory with state"),
    **{
        f"{name}_to_train": (
            change(name, Tensor.requires_grad_),
            ValueError,
            f"{name} requires grad",
            "torch.no_grad()",
        )
        for name in ("q", "k", "v", "state", "states_out", "out")
    },
}
WRONG_SLOTS = [([4, 0], r"state_indices\[0\] is 4; it must be from 0 to 3"), ([0, -2], "is -2"), ([2, 2], "is 2 again")]


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, is_known: bool) -> None:
    given = good(pool=True, kept=True)
    spoil, error, *words = BAD[case]
    if is_known:
        for before in (given, low(**given)):
            retention_step(**copy(before))
    spoil(given)
    with pytest.raises(error) as caught, NoStep():
        retention_step(**given)
    for word in ("retention_step: ", *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


def test_a_state_of_more_rows_is_refused_without_indices() -> None:
    with pytest.raises(ValueError, match=r"state is \[3, 2, 4, 5\]; it must be \[B, H, K, V\] = \[2, 2, 4, 5\]"):
        retention_step(**{**good(), "state": torch.zeros(3, H, K, V)})


@pytest.mark.parametrize(("slots", "message"), WRONG_SLOTS)
@pytest.mark.parametrize("compiles", [False, True])
def test_wrong_slots_are_refused_on_the_cpu_before_anything_is_written(
    slots: list[int], message: str, compiles: bool
) -> None:
    given = {**good(pool=True), "state_indices": torch.tensor(slots)}
    before = given["state"].clone()
    step = torch.compile(retention_step, backend="eager") if compiles else retention_step
    with pytest.raises(ValueError, match=message):
        step(**given)
    assert torch.equal(given["state"], before)


def test_a_negative_seed_in_a_tensor_is_refused_on_the_cpu_before_anything_is_written() -> None:
    given = low(**good(pool=True, kept=True))
    retention_step(**given, seed=torch.tensor([0]))  # now such calls are known
    before = copy(given)
    for call in (retention_step, torch.compile(retention_step, backend="eager")):
        with pytest.raises(ValueError, match=r"retention_step: seed is -1; it must be from 0 to 2\^63 - 1"):
            call(**given, seed=torch.tensor([-1]))
    torch.testing.assert_close(given, before, rtol=0, atol=0)
    with FakeTensorMode() as mode:
        retention_step(**{name: mode.from_tensor(x) for name, x in given.items()}, seed=torch.tensor([-1]))


@pytest.mark.parametrize("slots", [[4, 0], [0, -2], [2, 2], [1, -1, -1, 1]])
def test_the_debug_switch_checks_slots_without_reading_them(slots: list[int]) -> None:
    """On a GPU these are assertions on the device; on the CPU they raise at once."""
    with pytest.raises(RuntimeError, match="f: state_indices must"):
        arguments._check_indices_on_device("f", 4, torch.tensor(slots))
    for allowed in ([3, -1, 0, -1], [0], [-1]):
        arguments._check_indices_on_device("f", 4, torch.tensor(allowed, dtype=torch.int32))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_good_input_is_taken(pool: bool, kept: bool) -> None:
    retention_step(**good(pool=pool, kept=kept))
    with torch.no_grad():
        retention_step(**{name: x if name in "state_indices" else x.requires_grad_() for name, x in good().items()})


def test_a_slot_of_layers_is_taken() -> None:
    given = good(pool=True)
    layers = torch.zeros(4, 3, H, K, V)
    retention_step(**{**given, "state": layers[:, 1]})
    assert layers[3, 1].count_nonzero() > 0
    layers[3, 1] = 0
    assert layers.count_nonzero() == 0


# Calls like one before, which are not checked again


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of functions whose arguments were checked since; nothing is known of any call to begin with."""
    configuration.clear_caches()
    names: list[str] = []
    monkeypatch.setattr(step, "check_step", lambda name, *rest: names.append(name) or arguments.check_step(name, *rest))
    return names


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_call_like_one_before_is_not_checked_again(pool: bool, kept: bool, checked: list[str]) -> None:
    given = good(pool=pool, kept=kept)
    others = [copy(given) for _ in range(3)]
    results = [(retention_step(**other).clone(), other) for other in others]
    assert len(checked) == 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert others[0]["state"]._version == others[1]["state"]._version > 0
    configuration.clear_caches()  # as where rules change
    retention_step(**given)
    assert len(checked) == 2


OTHER = {
    "another_scale": put(scale=2.0),
    "another_batch": lambda given: given.update({name: given[name][:1].clone() for name in (*"qkv", "state_indices")}),
    "another_dtype": lambda given: given.update({name: given[name].half() for name in "qkv"}),
    "another_pool": change("state", lambda x: torch.cat([x, x])),
    "other_strides": change("q", lambda x: x.mT.contiguous().mT),
    "another_index": change("state_indices", Tensor.int),
    "a_parameter": change("k", lambda x: torch.nn.Parameter(x, requires_grad=False)),
    "negated": change("q", Tensor._neg_view),
    "zeros_of_none": change("v", lambda x: torch._efficientzerotensor(x.shape)),
    "kept": put(states_out=torch.zeros(B, T, H, K, V)),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_call_unlike_those_before_is_checked(name: str, checked: list[str]) -> None:
    before, given = good(pool=True), good(pool=True)
    OTHER[name](given)
    first = {**given, "state": given["state"].clone()}
    expected = retention_step(**first)
    configuration.clear_caches()
    checked.clear()
    for _ in range(2):
        retention_step(**before)
    torch.testing.assert_close(retention_step(**given), expected, rtol=0, atol=0)
    assert torch.equal(given["state"], first["state"])
    assert len(checked) == 2


IN_TURN = {
    "values_of_another_width": lambda: {
        **good(pool=True),
        "v": torch.ones(B, T, H, 9),
        "state": torch.ones(4, H, K, 9),
    },
    "another_dtype": lambda: {**good(pool=True), **{name: good()[name].half() for name in "qkv"}},
    "a_state_of_16_bits": lambda: low(**good(pool=True)),
    "another_pool": lambda: {**good(pool=True), "state": torch.ones(7, H, K, V)},
    "fewer_heads": lambda: (
        {**good(pool=True), "k": torch.ones(B, T, 1, K), "v": torch.ones(B, T, 1, V)}
        | {"state": torch.ones(4, 1, K, V)}
    ),
}


def test_what_was_found_by_rules_that_changed_meanwhile_is_not_kept(
    checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, "prepare_known", lambda *call: configuration.clear_caches() or prepare_known(*call))
        retention_step(**good())
    assert not step.KNOWN.kinds
    for _ in range(3):
        retention_step(**good())
    assert len(checked) == 2


@pytest.mark.parametrize("name", IN_TURN)
def test_two_kinds_in_turn_are_checked_once_each(name: str, checked: list[str]) -> None:
    for _ in range(3):
        retention_step(**good(pool=True))
        retention_step(**IN_TURN[name]())
    assert len(checked) == 2


def copy_outside(given: dict[str, Any]) -> dict[str, Any]:
    with torch.inference_mode(False):
        return copy(given)


def test_what_was_made_in_inference_mode_is_not_taken_for_what_was_given_there(checked: list[str]) -> None:
    given = good()
    with torch.inference_mode():
        for _ in range(2):
            retention_step(**copy_outside(given))
        made_inside = copy(given)
    assert len(checked) == 1
    with torch.no_grad(), pytest.raises(ValueError, match="was made in inference mode"):
        retention_step(**made_inside)


@pytest.mark.usefixtures("checked")
def test_calls_on_pools_of_many_sizes_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    built, guard_of = [], known.guard_of
    monkeypatch.setattr(known, "guard_of", lambda tensors: built.append(1) or guard_of(tensors))
    for _ in range(3):
        for slots in range(4, 24):
            given = good(pool=True)
            given["state"] = given["state"].new_zeros(slots, *given["state"].shape[1:])
            retention_step(**given)
    assert len(built) == 20


def test_one_tensor_given_twice_is_checked_and_not_remembered(checked: list[str]) -> None:
    for _ in range(2):
        shared = good()
        for _ in range(2):
            retention_step(**shared | {"k": shared["q"]})
        retention_step(**good())
    assert len(checked) == 5  # what is no kind leaves that alone which is one


@pytest.mark.parametrize("case", ["autocast", "negated", "one_twice"])
def test_no_guard_is_built_where_nothing_is_remembered(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr("generated.known.guard_of", lambda tensors: built.append(len(tensors)))
    given = good()
    if case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            retention_step(**given)
    elif case == "negated":
        retention_step(**given | {"q": given["q"]._neg_view()})
    else:
        retention_step(**given | {"k": given["q"]})
    assert built == []


def test_modes_are_looked_at_anew(checked: list[str]) -> None:
    given = good(pool=True)
    with torch.no_grad():
        o = retention_step(**copy(given))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retention_step(**copy(given)).dtype == retention_step(**copy(given)).dtype == torch.bfloat16
        assert torch.equal(retention_step(**copy(given)), o)
        with pytest.raises(AssertionError, match="was called"), NoStep():
            retention_step(**given)
        given["q"].requires_grad_()
        for _ in range(2):
            retention_step(**given)
    with pytest.raises(ValueError, match="q requires grad"):
        retention_step(**given)
    with torch.inference_mode():
        state = torch.zeros(4, H, K, V)
        for _ in range(2):
            retention_step(**given | {"state": state})
    with torch.no_grad(), pytest.raises(ValueError, match="state was made in inference mode"):
        retention_step(**given | {"state": state})


def test_decays_on_the_cpu_are_looked_at_each_time() -> None:
    rates = torch.tensor([-0.1, -0.2])
    for _ in range(2):
        retention_step(**good(), g_gamma=rates)
    rates[1] = 0.1
    with pytest.raises(ValueError, match=r"g_gamma holds 0\.1"):
        retention_step(**good(), g_gamma=rates)


def test_with_the_debug_switch_all_calls_of_pools_are_checked(
    checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = good(pool=True)
    retention_step(**given)
    monkeypatch.setattr(arguments, "CHECKS_INDICES", True)
    retention_step(**given)
    assert len(checked) == 2


def test_without_pytorchs_guard_all_calls_are_checked(checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    given = good()
    for _ in range(3):
        retention_step(**given)
    assert len(checked) == 3


class Careless:
    """A guard that goes by nothing but one thing."""

    looks_at: Callable[[Tensor], Any]

    def __init__(self, *tensors: Tensor, dynamic_dims_sizes: Any, dynamic_dims_strides: Any) -> None:
        self.seen = [type(self).looks_at(x) for x in tensors]

    def check(self, *tensors: Tensor) -> bool:
        return [type(self).looks_at(x) for x in tensors] == self.seen


class Raising(Careless):
    """A guard that fails once it is asked."""

    def check(self, *tensors: Tensor) -> bool:
        raise NotImplementedError


def without_keywords(*tensors: Tensor) -> Careless:
    raise AssertionError(f"{len(tensors)} tensors came without sizes")


def careless(looks_at: Callable[[Tensor], Any], base: type[Careless] = Careless) -> type[Careless]:
    return type("TensorGuards", (base,), {"looks_at": staticmethod(looks_at)})


BROKEN = {
    "sizes": careless(lambda x: (x.stride(), x.dtype, x.requires_grad)),
    "strides": careless(lambda x: (x.shape, x.dtype, x.requires_grad)),
    "dtypes": careless(lambda x: (x.shape, x.stride(), x.requires_grad)),
    "gradients": careless(lambda x: (x.shape, x.stride(), x.dtype)),
    "clones": careless(id),
    "anything": careless(lambda _: None, Raising),
    "arguments": without_keywords,
    "being": property,
}


@pytest.fixture
def probed_anew() -> Iterator[None]:
    """What is known of PyTorch's guards is found out in a test, and forgotten with it."""
    known._guards_are_right.cache_clear()
    yield
    known._guards_are_right.cache_clear()


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("name", BROKEN)
def test_a_guard_that_is_wrong_is_not_trusted(name: str, checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch._C._dynamo.guards, "TensorGuards", BROKEN[name])
        for _ in range(2):
            retention_step(**good())
    retention_step(**good())  # what was found out holds for the process
    assert len(checked) == 3


@pytest.mark.usefixtures("probed_anew")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_guard_is_found_right_in_any_mode(mode: Callable[[], Any], checked: list[str]) -> None:
    with mode():
        for _ in range(2):
            retention_step(**good())
    assert len(checked) == 1


# As an operator


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_it_passes_opcheck(pool: bool, kept: bool) -> None:
    given = good(pool=pool, kept=True)
    tensors = (given["q"], given["k"], given["v"])
    last = (given["state"], given.get("state_indices"), None, given["states_out"] if kept else None, given["out"])
    torch.library.opcheck(OPERATOR, (*tensors, torch.tensor([-0.1, -0.2]), 0.3, *last))
    torch.library.opcheck(OPERATOR, (*tensors, None, None, *last))
    given = low(**given)
    last = (
        given["state"],
        given.get("state_indices"),
        torch.tensor([3]),
        given["states_out"] if kept else None,
        given["out"],
    )
    torch.library.opcheck(OPERATOR, (*tensors, None, None, *last))


def test_it_tells_what_it_writes() -> None:
    written = [argument.name for argument in OPERATOR._schema.arguments if argument.is_write]
    assert written == ["state", "states_out", "o"]


@pytest.mark.parametrize("where", ["pool", "layer_of_slots", "layer"])
def test_compiled_steps_neither_copy_the_pool_nor_write_it_back(where: str) -> None:
    given, pool = good(pool=True), torch.randn(2, 7, H, K, V)
    views = {"pool": lambda x: x[0], "layer_of_slots": lambda x: x.transpose(0, 1)[:, 1], "layer": lambda x: x[1]}
    pools = pool if where != "layer_of_slots" else pool.transpose(0, 1).contiguous().transpose(0, 1)
    del given["state"]

    def layer(x: Tensor, **given: Any) -> Tensor:
        return retention_step(state=views[where](x), **given)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own
        _, codes = run_and_get_code(torch.compile(layer, fullgraph=True), pools, **given)
    (call,) = ["".join(code.partition("def call")[1:]) for code in codes]
    assert "retention_step" in call
    assert not re.search(r"copy_|clone|empty_strided_cpu\(\(7,", call)


def test_compiled_steps_group_heads() -> None:
    _, given = group_heads(make_problem(2, 3, 6, 4, 5), 2)
    eager = copy(given)
    o = torch.compile(retention_step, fullgraph=True, backend="aot_eager")(**given)
    torch.testing.assert_close(o, retention_step(**eager))
    torch.testing.assert_close(given["state"], eager["state"])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_compiled_steps_write_what_eager_ones_do(pool: bool, kept: bool, backend: str) -> None:
    given = good(pool=pool, kept=kept)
    eager = copy(given)

    def layer(q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        o = retention_step(q * 2, **options)
        return o + 1, options["state"] * 2  # after the step

    expected = layer(**eager)
    got = torch.compile(layer, fullgraph=True, backend=backend)(**given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(given, eager)


def test_steps_with_other_slots_need_no_new_compilation() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(retention_step, fullgraph=True, backend=counter)
    given = good(pool=True)
    eager = copy(given)
    for slots in ([3, -1], [0, 1], [-1, 2]):
        new = {"state_indices": torch.tensor(slots)}
        torch.testing.assert_close(step(**{**given, **new}), retention_step(**{**eager, **new}))
    torch.testing.assert_close(given["state"], eager["state"])
    assert counter.frame_count == 1


def test_compiled_steps_take_seeds() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(retention_step, fullgraph=True, backend=counter)
    given = low(**good(pool=True))
    eager = copy(given)
    for seed in (3, 4, 5, 2**40):
        torch.testing.assert_close(step(**given, seed=seed), retention_step(**eager, seed=seed))
        assert torch.equal(given["state"], eager["state"])
    assert counter.frame_count <= 2  # the second time for any seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_look_like_real_ones(dtype: torch.dtype) -> None:
    given = good(pool=True, kept=True)
    given = {name: x.to(dtype) if name in ("q", "k", "v", "out") else x for name, x in given.items()}
    for options in (given, {name: x for name, x in given.items() if name != "out"}):
        real = retention_step(**copy(options))
        with FakeTensorMode() as mode:
            fake = retention_step(**{name: mode.from_tensor(x) for name, x in options.items()})
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_tensors_may_have_symbols_for_sizes() -> None:
    given = good(pool=True, kept=True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = {name: mode.from_tensor(x) for name, x in given.items()}
        for options in (fakes, {name: x for name, x in fakes.items() if name != "out"}):
            assert tuple(retention_step(**options).shape) == (B, T, H, V)
    assert isinstance(fakes["q"].shape[0], torch.SymInt)
    assert tuple(retention_step(**fakes).shape) == (B, T, H, V)  # where there is no mode


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_traced_step_is_the_step(tracing_mode: str) -> None:
    given = good(pool=True)
    eager = copy(given)

    def layer(q: Tensor, k: Tensor, v: Tensor, state: Tensor, state_indices: Tensor) -> Tensor:
        return retention_step(q, k, v, state, state_indices=state_indices)

    traced = make_fx(layer, tracing_mode=tracing_mode)(*copy(given).values())
    torch.testing.assert_close(traced(*given.values()), retention_step(**eager))
    torch.testing.assert_close(given["state"], eager["state"])


def test_meta_tensors_give_shapes() -> None:
    o = retention_step(**{name: x.to("meta") for name, x in good(pool=True, kept=True).items()})
    assert (o.device.type, o.shape) == ("meta", (B, T, H, V))


def test_autocast_computes_in_its_dtype() -> None:
    given = good()
    lowered = copy({name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in given.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = retention_step(**given)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, retention_step(**lowered))
    assert torch.equal(given["state"], lowered["state"])


def test_errors_tell_autocasts_dtype_from_the_callers() -> None:
    given = good(kept=True)
    wide = {name: given[name].double() for name in "qkv"}
    for changed, message in (
        ({}, "out is torch.float32; for a q of torch.bfloat16, as autocast makes it, it must be torch.bfloat16"),
        ({"state": given["state"].double()}, "state is torch.float64; for a q of torch.bfloat16, as autocast makes it"),
        (wide, "state is torch.float32; for a q of torch.float64 it must be"),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=message):
            retention_step(**given | changed)


def test_inference_mode_is_fine() -> None:
    with torch.inference_mode():
        assert retention_step(**good(pool=True, kept=True)).is_inference()


def test_the_operator_itself_refuses_a_gradient() -> None:
    given = good(kept=True)
    tensors = (given["q"].requires_grad_(), given["k"], given["v"], None, None)
    with pytest.raises(RuntimeError, match=r"retention_step.*no gradients.*torch.no_grad"):
        OPERATOR(*tensors, given["state"], None, None, None, given["out"])


def test_a_gradient_of_what_was_before_is_refused() -> None:
    for call in (retention_step, torch.compile(retention_step, backend="aot_eager")):
        given = good()
        weight = torch.ones(K, V, requires_grad=True)
        loss = (given["state"] * weight).sum()  # keeps the state for the gradient
        call(**given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_mode_sees_the_operator() -> None:
    with pytest.raises(AssertionError, match="was called"), NoStep():
        retention_step(**good())
    assert run_step(retention_step, make_problem(1, 2, 1, 2, 2))["o"].isfinite().all()
