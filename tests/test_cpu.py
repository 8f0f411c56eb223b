"""The public functions on the CPU give what the formulas say, and take what fla's callers pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import FORMS, WITH_STATES, all_forms, forms_with_states, has_states, public
from oracle import (
    assert_matches,
    assert_same,
    by_blocks,
    check,
    compare,
    errors,
    make_problem,
    recurrence,
    retnet_rates,
    run,
    solve,
)
from torch import Tensor

import generated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


# The oracle itself


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [1, 200, 99]])
def test_the_oracles_two_formulas_agree(lengths: list[int] | None, reverse: bool) -> None:
    problem = make_problem(1, 300, 3, 5, 7, torch.float64, lengths=lengths, reverse=reverse)
    got, expected = (solve(problem, formula=formula) for formula in (by_blocks, recurrence))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


def test_the_oracle_is_the_sum_over_earlier_tokens() -> None:
    q, k, v = (torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in range(3))
    gamma = [1 - 2.0 ** (-5 - h) for h in range(3)]
    o, _ = recurrence(q, k, v, retnet_rates(3), 0.5, torch.zeros(2, 3, 4, 4, dtype=torch.float64), reverse=False)
    for b, i, h in [(0, 0, 0), (1, 5, 2), (0, 3, 1)]:
        terms = [gamma[h] ** (i - j) * (q[b, i, h] @ k[b, j, h]) * v[b, j, h] for j in range(i + 1)]
        torch.testing.assert_close(o[b, i, h], 0.5 * sum(terms), rtol=1e-12, atol=1e-12)


@all_dtypes
@pytest.mark.parametrize("wrong", ["nan", "one_row", "everything"])
def test_the_comparison_sees_what_is_wrong(wrong: str, dtype: torch.dtype) -> None:
    problem = make_problem(2, 300, 2, 16, 16, dtype)
    got = run(generated.chunk_retention, problem)
    assert all(one.passed for one in compare(got, problem))
    o = got["o"]
    if wrong == "nan":
        o[0, 0, 0, 0] = float("nan")
    elif wrong == "one_row":
        o[1, 100, 1] *= 1.1
    else:
        o *= 1.02
    assert [one.name for one in compare(got, problem) if not one.passed] == ["o"]


# Values and gradients


@all_forms
@all_dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 15, 3, 20, 33), (1, 64, 2, 3, 17), (2, 130, 2, 33, 64)], ids=str
)
def test_any_shape_gives_the_oracles_results(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(public(form), make_problem(*shape, dtype, states=has_states(form)))


@all_forms
@all_dtypes
@pytest.mark.parametrize("lengths", [[1], [1, 15, 64, 1, 19], [66, 130]], ids=str)
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_sequences_do_not_see_each_other(
    form: str, lengths: list[int], dtype: torch.dtype, offsets: torch.dtype
) -> None:
    problem = make_problem(1, sum(lengths), 2, 12, 7, dtype, lengths=lengths, states=has_states(form))
    check(public(form), replace(problem, cu_seqlens=problem.cu_seqlens.to(offsets)))


@all_forms
def test_packed_sequences_equal_the_same_sequences_in_a_batch(form: str) -> None:
    batch = make_problem(3, 50, 2, 8, 8, states=has_states(form))
    q, k, v, do = (x.flatten(0, 1)[None] for x in (batch.q, batch.k, batch.v, batch.do))
    packed = replace(batch, q=q, k=k, v=v, do=do, cu_seqlens=torch.arange(0, 151, 50))
    got, expected = run(public(form), packed), run(public(form), batch)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].reshape(value.shape), value, rtol=1e-5, atol=1e-5)


GROUPS = [(2, 2), (3, 4), (1, 8)]  # heads of k and v, and the query heads of each


@all_forms
@all_dtypes
@pytest.mark.parametrize(("H", "group"), GROUPS)
@pytest.mark.parametrize("shape", [(2, 15, 20, 33), (1, 64, 3, 17), (2, 130, 16, 16)], ids=str)
def test_query_heads_in_groups_share_keys_and_values(
    form: str, shape: tuple[int, ...], H: int, group: int, dtype: torch.dtype
) -> None:
    B, T, K, V = shape
    check(public(form), make_problem(B, T, H, K, V, dtype, group=group, states=has_states(form)))
    check(public(form), make_problem(B, T, H, K, V, dtype, group=group, states=False))


@all_forms
@all_dtypes
@pytest.mark.parametrize(("H", "group"), GROUPS)
def test_packed_sequences_may_have_groups(form: str, H: int, group: int, dtype: torch.dtype) -> None:
    lengths = [1, 15, 64, 1, 19]
    states = has_states(form)
    check(public(form), make_problem(1, sum(lengths), H, 12, 7, dtype, group=group, lengths=lengths, states=states))


@all_forms
@pytest.mark.parametrize(("H", "group"), GROUPS)
def test_groups_equal_keys_and_values_that_are_repeated(form: str, H: int, group: int) -> None:
    problem = make_problem(2, 70, H, 6, 5, group=group, states=has_states(form))

    def repeated(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        options["g_gamma"] = retnet_rates(H).float().repeat_interleave(group)
        if "initial_state" in options:
            options["initial_state"] = options["initial_state"].repeat_interleave(group, 1)
        o, final = public(form)(q, k, v, **options)
        return o, None if final is None else final[:, ::group]

    got, expected = run(public(form), problem), run(repeated, problem)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@forms_with_states
@pytest.mark.parametrize("given", ["nothing", "initial", "final"])
@pytest.mark.parametrize("lengths", [None, [69, 1]])
def test_states_of_groups_are_optional(form: str, given: str, lengths: list[int] | None) -> None:
    problem = make_problem(1, 70, 2, 6, 5, group=3, lengths=lengths)
    h0, dht = (problem.h0 if given == "initial" else None), (problem.dht if given == "final" else None)
    check(public(form), replace(problem, h0=h0, dht=dht))


@pytest.mark.parametrize("lengths", [None, [1, 65, 8]])
def test_groups_may_run_from_the_end(lengths: list[int] | None) -> None:
    check(public("fused_recurrent"), make_problem(1, 74, 2, 5, 7, group=2, lengths=lengths, reverse=True))


@all_forms
def test_groups_have_gradients_in_float64(form: str) -> None:
    problem = make_problem(1, 100, 2, 4, 4, torch.float64, group=2, states=has_states(form))
    assert_matches(run(public(form), replace(problem, g_gamma=retnet_rates(2))), problem, exact=1e-13)


@forms_with_states
@pytest.mark.parametrize("given", ["nothing", "initial", "final"])
def test_states_are_optional(form: str, given: str) -> None:
    problem = make_problem(2, 70, 2, 6, 5)
    h0, dht = (problem.h0 if given == "initial" else None), (problem.dht if given == "final" else None)
    check(public(form), replace(problem, h0=h0, dht=dht))


@all_forms
def test_own_scale_and_decays_are_used(form: str) -> None:
    rates = torch.tensor([-0.7, 0.0, -1e-9])
    check(public(form), make_problem(1, 70, 3, 8, 8, states=has_states(form), g_gamma=rates, scale=-1.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [1, 69, 4]])
def test_reverse_starts_at_the_last_token(lengths: list[int] | None, dtype: torch.dtype) -> None:
    check(public("fused_recurrent"), make_problem(1, 74, 2, 5, 7, dtype, lengths=lengths, reverse=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [30, 36]])
def test_states_may_have_values_first(reverse: bool, lengths: list[int] | None) -> None:
    def values_first(*args: Any, initial_state: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        o, final = generated.fused_recurrent_retention(
            *args, initial_state=initial_state.mT.contiguous(), state_v_first=True, **options
        )
        assert final.shape[2:] == (7, 5)
        assert final.is_contiguous()
        return o, final.mT

    check(values_first, make_problem(1, 66, 2, 5, 7, lengths=lengths, reverse=reverse))


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64, 4096])
def test_any_chunk_size_gives_the_same_results(chunk_size: int) -> None:
    problem = make_problem(1, 150, 2, 8, 8)
    check(generated.chunk_retention, problem, chunk_size=chunk_size)
    check(generated.retention, problem, chunk_size=chunk_size)
    check(generated.retention, problem, chunk_size=chunk_size, form="chunk")


@all_forms
def test_retention_takes_a_form_by_name(form: str) -> None:
    problem = make_problem(2, 70, 2, 6, 5, states=has_states(form))
    got = run(generated.retention, problem, form=form)
    assert_matches(got, problem)
    assert_same(got, run(public(form), problem))


@pytest.mark.parametrize("shape", [(1, 40, 128, 4, 4), (1, 70, 2, 256, 512), (1, 33, 2, 512, 256)], ids=str)
@all_forms
def test_many_and_wide_heads_are_right(form: str, shape: tuple[int, ...]) -> None:
    check(public(form), make_problem(*shape, states=has_states(form)))


@all_forms
def test_a_long_sequence_stays_accurate(form: str) -> None:
    problem = make_problem(1, 3000, 2, 16, 16, states=has_states(form))
    assert_matches(run(public(form), problem), problem, formula=by_blocks)


@forms_with_states
@pytest.mark.parametrize("states", [torch.float16, torch.bfloat16, torch.float64])
def test_an_initial_state_of_another_dtype_gets_a_gradient_of_its_own(form: str, states: torch.dtype) -> None:
    problem = make_problem(1, 20, 2, 4, 4)
    problem = replace(problem, h0=problem.h0.to(states))
    got = run(public(form), problem)
    assert got["dh0"].dtype == states
    assert got["final_state"].dtype == torch.float32
    error, _ = errors(got.pop("dh0"), solve(problem)["dh0"])
    assert error < max(1e-5, torch.finfo(states).eps)
    assert_matches(got, problem)


@forms_with_states
def test_float64_is_computed_in_float64(form: str) -> None:
    problem = make_problem(1, 100, 2, 4, 4, torch.float64)
    problem = replace(problem, g_gamma=retnet_rates(2))
    assert_matches(run(public(form), problem), problem, exact=1e-13)


@all_forms
def test_gradients_pass_gradcheck(form: str) -> None:
    problem = make_problem(1, 4, 2, 2, 1, torch.float64, states=has_states(form), g_gamma=retnet_rates(2))
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, problem.h0) if x is not None]

    def call(q: Tensor, k: Tensor, v: Tensor, *h0: Tensor) -> tuple[Tensor, ...]:
        if not h0:
            return public(form)(q, k, v, g_gamma=problem.g_gamma)[:1]
        return public(form)(q, k, v, None, *h0, True, g_gamma=problem.g_gamma)

    assert torch.autograd.gradcheck(call, leaves)


@forms_with_states
def test_a_gradient_may_come_through_the_final_state_alone(form: str) -> None:
    problem = make_problem(1, 30, 2, 4, 6)
    q, k, v, h0 = (x.requires_grad_() for x in (problem.q, problem.k, problem.v, problem.h0))
    _, final = public(form)(q, k, v, initial_state=h0, output_final_state=True)
    got = dict(zip(("dq", "dk", "dv", "dh0"), torch.autograd.grad(final, (q, k, v, h0), problem.dht), strict=True))
    expected = solve(replace(problem, do=torch.zeros_like(problem.do)))
    assert got["dq"].count_nonzero() == 0
    for name in ("dk", "dv", "dh0"):
        assert errors(got[name], expected[name])[0] < 1e-5


@all_forms
@pytest.mark.parametrize("names", ["q", "k", "v", "kv"])
def test_gradients_of_some_inputs_equal_those_of_all(form: str, names: str) -> None:
    problem = make_problem(1, 20, 2, 4, 6, states=False)
    leaves = {name: getattr(problem, name).clone().requires_grad_(name in names) for name in "qkv"}
    o, _ = public(form)(**leaves)
    o.backward(problem.do)
    expected = solve(problem)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)
        assert leaf.grad is None or errors(leaf.grad, expected[f"d{name}"])[0] < 1e-5


@all_forms
def test_a_second_run_gives_the_same_bits(form: str) -> None:
    problem = make_problem(2, 200, 2, 16, 20, states=has_states(form))
    assert_same(run(public(form), problem), run(public(form), problem))


@all_forms
def test_every_element_is_written(form: str, poisoned_memory: None) -> None:
    check(public(form), make_problem(2, 70, 2, 6, 5, states=has_states(form)))
    lengths = [1, 64, 5]
    check(public(form), make_problem(1, 70, 2, 6, 5, lengths=lengths, states=has_states(form)))


# Decays


@all_forms
def test_a_rank_with_its_own_groups_gets_its_part_of_the_whole(form: str) -> None:
    whole = make_problem(2, 40, 6, 4, 4, group=2, states=has_states(form))
    rank = [3, 4, 5]
    part = replace(whole.part([0, 1], rank), g_gamma=retnet_rates(6)[rank].float())
    got, expected = run(public(form), part), run(public(form), whole)
    for name, value in expected.items():
        axis = 1 if name in ("final_state", "dh0") else 2
        heads = value.unflatten(axis, (6, -1)).index_select(axis, torch.tensor(rank)).flatten(axis, axis + 1)
        torch.testing.assert_close(got[name], heads, rtol=1e-6, atol=1e-6)


@all_forms
def test_a_rank_with_its_own_heads_gets_its_part_of_the_whole(form: str) -> None:
    whole = make_problem(2, 40, 6, 4, 4, states=has_states(form))
    rank = [3, 4, 5]
    part = replace(whole.part([0, 1], rank), g_gamma=retnet_rates(6)[rank].float())
    got, expected = run(public(form), part), run(public(form), whole)
    for name, value in expected.items():
        heads = 1 if name in ("final_state", "dh0") else 2
        torch.testing.assert_close(got[name], value.index_select(heads, torch.tensor(rank)), rtol=1e-6, atol=1e-6)


def test_default_decays_are_those_of_float64_for_late_heads_too() -> None:
    """In float32, log(1 - 2^(-5-h)) is 0 from head 20 on."""
    H, T = 32, 2000
    ones = torch.ones(1, T, H, 1)
    _, final = generated.chunk_retention(ones, ones, ones, 1.0, None, True)
    _, final64 = generated.naive_retention(ones.double(), ones.double(), ones.double(), 1.0, None, True)
    gamma = 1 - 2.0 ** -(5 + torch.arange(H, dtype=torch.float64))
    expected = torch.stack([g ** torch.arange(T) for g in gamma]).sum(1)
    assert errors(final[0, :, :, 0], expected[:, None])[0] < 1e-6
    late = (T - final64[0, :, 0, 0])[20:]  # what the decay takes away, T (T - 1) / 2 * 2^(-5-h)
    torch.testing.assert_close(late, (T - expected)[20:], rtol=1e-4, atol=0)


# Layouts and conventions


def views(problem_shape: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The same values of q, k and v in layouts that callers have."""
    B, T, H, K, V = problem_shape
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(B, T, H * (2 * K + V), generator=generator)
    q, k, v = (x.unflatten(-1, (H, -1)) for x in packed.split([H * K, H * K, H * V], -1))
    heads_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    features_first = tuple(x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v))
    every_other = tuple(x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v))
    return {"packed": (q, k, v), "heads_first": heads_first, "features_first": features_first, "sliced": every_other}


@all_forms
@pytest.mark.parametrize("layout", ["packed", "heads_first", "features_first", "sliced"])
@pytest.mark.parametrize("shape", [(2, 33, 3, 4, 6), (2, 1, 3, 4, 6), (1, 5, 1, 1, 6)], ids=str)
def test_any_strides_give_the_same_results(form: str, layout: str, shape: tuple[int, ...]) -> None:
    q, k, v = views(shape)[layout]
    do = torch.randn(v.shape).transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o, _ = public(form)(*leaves)
        grads = torch.autograd.grad(o, leaves, do)
        results.append({"o": o.detach(), "dq": grads[0], "dk": grads[1], "dv": grads[2]})
    assert_same(*results)


@all_forms
def test_an_expanded_input_and_gradient_are_read_right(form: str) -> None:
    problem = make_problem(2, 20, 3, 4, 5, states=False)
    one_head = problem.k[:, :, :1].clone().requires_grad_()
    o, _ = public(form)(problem.q, one_head.expand(-1, -1, 3, -1), problem.v)
    o.sum().backward()  # the gradient that arrives is one number, expanded
    expected = solve(replace(problem, k=one_head.expand(-1, -1, 3, -1), do=torch.ones_like(problem.do)))
    assert errors(o.detach(), expected["o"])[0] < 1e-5
    assert errors(one_head.grad, expected["dk"].sum(2, keepdim=True))[0] < 1e-5


@forms_with_states
def test_a_strided_state_is_read_right(form: str) -> None:
    problem = make_problem(2, 20, 3, 4, 5)
    strided = replace(problem, h0=problem.h0.mT.contiguous().mT)
    assert_same(run(public(form), strided), run(public(form), problem))


@forms_with_states
def test_a_state_carried_across_a_split_gives_the_whole(form: str) -> None:
    problem = make_problem(2, 101, 2, 6, 5)
    function = public(form)

    def in_two_parts(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        o1, state = function(q[:, :37], k[:, :37], v[:, :37], initial_state=initial_state, output_final_state=True)
        o2, state = function(q[:, 37:], k[:, 37:], v[:, 37:], initial_state=state, output_final_state=True)
        return torch.cat([o1, o2], 1), state

    check(in_two_parts, problem)


@forms_with_states
def test_prefill_by_any_form_then_token_by_token_gives_the_whole(form: str) -> None:
    problem = make_problem(2, 20, 2, 6, 5, states=False)
    q, k, v = problem.q, problem.k, problem.v
    _, state = public(form)(q[:, :12], k[:, :12], v[:, :12], output_final_state=True)
    outputs = []
    for t in range(12, 20):
        step = slice(t, t + 1)
        o, state = generated.fused_recurrent_retention(
            q[:, step], k[:, step], v[:, step], initial_state=state, output_final_state=True
        )
        outputs.append(o)
    assert errors(torch.cat(outputs, 1), solve(problem)["o"][:, 12:])[0] < 1e-5


def test_an_initial_state_is_left_as_it_was() -> None:
    problem = make_problem(1, 20, 2, 6, 5)
    for form in WITH_STATES:
        h0 = problem.h0.clone()
        public(form)(problem.q, problem.k, problem.v, initial_state=h0, output_final_state=True)
        assert torch.equal(h0, problem.h0)


@pytest.mark.parametrize("lengths", [None, [1, 20, 9]])
@all_dtypes
@pytest.mark.parametrize("group", [1, 2])
def test_attentions_are_the_weights_of_the_values(lengths: list[int] | None, group: int, dtype: torch.dtype) -> None:
    problem = make_problem(1 if lengths else 2, 30, 3, 8, 8, dtype, group=group, lengths=lengths, states=False)
    o, attentions = generated.parallel_retention(
        problem.q, problem.k, problem.v, output_attentions=True, cu_seqlens=problem.cu_seqlens
    )
    assert attentions.shape == (problem.q.shape[0], 3 * group, 30, 30)
    assert attentions.dtype == dtype
    assert attentions.triu(1).count_nonzero() == 0
    sums = torch.einsum("bhij,bjhv->bihv", attentions.double(), problem.v.double().repeat_interleave(group, 2))
    assert_matches({"o": sums.to(dtype)}, problem)
    assert_matches({"o": o}, problem)


def test_attentions_leave_the_gradients_as_they_were() -> None:
    problem = make_problem(2, 30, 3, 8, 8, states=False)
    check(generated.parallel_retention, problem, output_attentions=True)
    assert generated.parallel_retention(problem.q, problem.k, problem.v)[1] is None


def test_positional_arguments_mean_what_they_mean_in_fla() -> None:
    problem = make_problem(2, 20, 2, 4, 5)
    q, k, v, h0 = problem.q, problem.k, problem.v, problem.h0
    expected = solve(replace(problem, scale=0.3))
    for form in ("naive", "chunk", "fused_chunk", "auto"):
        o, final = public(form)(q, k, v, 0.3, h0, True, None)
        assert errors(o, expected["o"])[0] < 1e-5
        assert errors(final, expected["final_state"])[0] < 1e-5
    o, final = generated.fused_recurrent_retention(q, k, v, 0.3, h0, True, False, False, None)
    assert errors(o, expected["o"])[0] < 1e-5
    o, final = generated.fused_recurrent_retention(q, k, v, 0.3, h0, True, True)
    assert errors(o, solve(replace(problem, scale=0.3, reverse=True))["o"])[0] < 1e-5
    o, attentions = generated.parallel_retention(q, k, v, 0.3, True)
    assert errors(o, solve(replace(problem, scale=0.3, h0=None, dht=None))["o"])[0] < 1e-5
    assert attentions.shape == (2, 2, 20, 20)


@all_forms
def test_an_integer_scale_is_a_number_too(form: str) -> None:
    problem = make_problem(1, 20, 2, 4, 5, states=False, scale=1)
    check(public(form), problem)


@forms_with_states
def test_no_final_state_unless_asked_for(form: str) -> None:
    problem = make_problem(1, 5, 2, 4, 5)
    assert public(form)(problem.q, problem.k, problem.v, initial_state=problem.h0)[1] is None


@all_forms
def test_a_default_device_elsewhere_does_no_harm(form: str) -> None:
    problem = make_problem(1, 70, 7, 4, 5, states=has_states(form))
    with torch.device("meta"):
        got = run(public(form), problem)
    assert_matches(got, problem)


@all_forms
def test_inference_mode_before_training_does_no_harm(form: str) -> None:
    problem = make_problem(1, 20, 11, 4, 5, states=has_states(form))  # a number of heads that no other test has
    with torch.inference_mode():
        public(form)(problem.q, problem.k, problem.v)
    check(public(form), problem)


# Speed


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", sorted({*FORMS} - {"naive"}))  # which is quadratic, being the definition
def test_forward_and_backward_end_within_two_seconds(form: str, one_thread: None) -> None:
    q, k, v = (torch.randn(2, 2048, 8, 64, requires_grad=True) for _ in range(3))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        public(form)(q, k, v)[0].sum().backward()
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] < 2:
            return
    pytest.fail(f"{form}: {seconds} s")


@all_forms
def test_float64_has_decays_in_float64(form: str) -> None:
    problem = make_problem(1, 300, 3, 4, 4, torch.float64, states=False)
    given = replace(problem, g_gamma=retnet_rates(3))
    assert_same(run(public(form), problem), run(public(form), given))
