"""Bad input is refused before anything runs, by an error that names the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import FORMS, WITH_STATES, all_forms, public
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from generated import arguments

B, T, H, K, V = 2, 6, 3, 4, 5
Change = Callable[[dict[str, Any]], None]


class NoRetention(TorchDispatchMode):
    """Fail where one of this package's operators starts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "retgen" not in str(func), f"{func} was called"
        return func(*args, **(kwargs or {}))


def good(*, packed: bool = False) -> dict[str, Any]:
    rows, tokens = (1, B * T) if packed else (B, T)
    arguments: dict[str, Any] = {name: torch.randn(rows, tokens, H, D) for name, D in (("q", K), ("k", K), ("v", V))}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, T, B * T])
    return arguments


def assert_refused(form: str, given: dict[str, Any], error: type[Exception], *words: str) -> None:
    name = "retention" if form == "auto" else f"{form}_retention"
    with pytest.raises(error) as caught, NoRetention():
        public(form)(**given)
    for word in (f"{name}: ", *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value!s}"


def put(**values: Any) -> Change:
    return lambda given: given.update(values)


def change(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda given: given.update({name: function(given[name])})


def every(function: Callable[[Tensor], Any]) -> Change:
    return lambda given: given.update({name: function(given[name]) for name in "qkv"})


INPUTS = {
    "q_is_no_tensor": (put(q=None), TypeError, "q is a NoneType", "must be a tensor"),
    "v_is_a_list": (put(v=[1.0]), TypeError, "v is a list", "must be a tensor"),
    "q_without_heads": (change("q", lambda x: x[0]), ValueError, "q has 3 dimensions", "[6, 3, 4]", "[B, T, H, K]"),
    "v_of_five_dimensions": (change("v", lambda x: x[None]), ValueError, "v has 5 dimensions", "[B, T, H, V]"),
    "k_is_wider": (
        put(k=torch.randn(B, T, H, 7)),
        ValueError,
        "k is [2, 6, 3, 7]",
        "q is [2, 6, 3, 4]",
        "same B, T and K",
    ),
    "k_is_shorter": (change("k", lambda x: x[:, :5]), ValueError, "k is [2, 5, 3, 4]", "same B, T and K"),
    "k_of_more_heads": (
        put(k=torch.randn(B, T, 6, K)),
        ValueError,
        "q has 3 heads, k has 6",
        "q must have a multiple of",
    ),
    "k_of_heads_that_make_no_groups": (
        change("k", lambda x: x[:, :, :2]),
        ValueError,
        "q has 3 heads, k has 2; q must have a multiple of the heads of k and v",
        "(q: [2, 6, 3, 4], k: [2, 6, 2, 4])",
    ),
    "k_of_one_head_and_v_of_three": (
        change("k", lambda x: x[:, :, :1]),
        ValueError,
        "v has 3 heads, k has 1",
        "k and v must share",
    ),
    "v_of_fewer_heads": (change("v", lambda x: x[:, :, :2]), ValueError, "v has 2 heads, k has 3", "[2, 6, 2, 5]"),
    "v_of_fewer_tokens": (change("v", lambda x: x[:, :4]), ValueError, "v has 4 tokens, k has 6", "must share B, T"),
    "v_of_fewer_rows": (change("v", lambda x: x[:1]), ValueError, "v has 1 rows, k has 2", "must share B, T and H"),
    "k_of_another_dtype": (change("k", Tensor.half), TypeError, "k is torch.float16, q is torch.float32", "one dtype"),
    "v_of_another_dtype": (change("v", Tensor.double), TypeError, "v is torch.float64, q is torch.float32"),
    "k_elsewhere": (change("k", lambda x: x.to("meta")), ValueError, "k is on meta, q on cpu", "one device"),
    "v_elsewhere": (change("v", lambda x: x.to("meta")), ValueError, "v is on meta, q on cpu", "one device"),
    "integers": (every(Tensor.int), TypeError, "q is torch.int32", "must be float32, float16 or bfloat16"),
    "booleans": (every(Tensor.bool), TypeError, "q is torch.bool", "must be float32, float16 or bfloat16"),
    "complex": (every(lambda x: x.to(torch.complex64)), TypeError, "q is torch.complex64", "must be float32"),
    "float8": (every(lambda x: x.to(torch.float8_e4m3fn)), TypeError, "q is torch.float8_e4m3fn", "must be float32"),
    "no_tokens": (every(lambda x: x[:, :0]), ValueError, "q has T = 0", "[2, 0, 3, 4]", "at least 1"),
    "no_rows": (every(lambda x: x[:0]), ValueError, "q has B = 0", "at least 1"),
    "no_heads": (every(lambda x: x[:, :, :0]), ValueError, "q has H = 0", "at least 1"),
    "no_keys": (every(lambda x: x[..., :0]), ValueError, "q has K = 0", "[2, 6, 3, 0]", "at least 1"),
    "no_values": (change("v", lambda x: x[..., :0]), ValueError, "v has V = 0", "at least 1"),
    "scale_is_nan": (put(scale=float("nan")), ValueError, "scale is nan", "must be finite and not 0"),
    "scale_is_infinite": (put(scale=float("inf")), ValueError, "scale is inf", "must be finite"),
    "scale_is_beyond_float32": (put(scale=10**400), ValueError, "scale is 1000", "must be finite"),
    "scale_is_0": (put(scale=0), ValueError, "scale is 0", "not 0"),
    "scale_is_text": (put(scale="1"), TypeError, "scale is a str", "must be a number"),
    "scale_is_a_tensor": (put(scale=torch.ones(())), TypeError, "scale is a Tensor", "must be a number"),
    "decays_of_fewer_heads": (put(g_gamma=torch.zeros(2)), ValueError, "g_gamma is [2]", "[H] = [3]"),
    "decays_per_token": (put(g_gamma=torch.zeros(B, T, H)), ValueError, "g_gamma is [2, 6, 3]", "[H] = [3]"),
    "decays_are_integers": (put(g_gamma=torch.zeros(H).int()), TypeError, "g_gamma is torch.int32", "floating point"),
    "decays_are_a_list": (put(g_gamma=[0.0] * H), TypeError, "g_gamma is a list", "must be a tensor [H]"),
    "decays_elsewhere": (put(g_gamma=torch.zeros(H, device="meta")), ValueError, "g_gamma is on meta, q on cpu"),
    "decays_to_train": (put(g_gamma=torch.zeros(H, requires_grad=True)), ValueError, "g_gamma requires grad", "detach"),
}

PACKED = {
    "a_list": (put(cu_seqlens=[0, 6, 12]), TypeError, "cu_seqlens is a list", "must be a tensor [N + 1]"),
    "of_floats": (change("cu_seqlens", Tensor.float), TypeError, "cu_seqlens is torch.float32", "int32 or int64"),
    "of_int16": (change("cu_seqlens", Tensor.short), TypeError, "cu_seqlens is torch.int16", "int32 or int64"),
    "of_two_dimensions": (change("cu_seqlens", lambda x: x[None]), ValueError, "cu_seqlens is [1, 3]", "[N + 1]"),
    "of_no_sequence": (change("cu_seqlens", lambda x: x[:1]), ValueError, "cu_seqlens is [1]", "N of at least 1"),
    "with_a_batch": (every(lambda x: x.expand(2, -1, -1, -1)), ValueError, "B is 2 with cu_seqlens", "must be 1"),
    "elsewhere": (change("cu_seqlens", lambda x: x.to("meta")), ValueError, "cu_seqlens is on meta, q on cpu"),
    "late": (put(cu_seqlens=torch.tensor([1, 6, 12])), ValueError, "cu_seqlens starts at 1", "must start at 0"),
    "negative": (put(cu_seqlens=torch.tensor([-1, 6, 12])), ValueError, "cu_seqlens starts at -1", "start at 0"),
    "falling": (put(cu_seqlens=torch.tensor([0, 8, 7, 12])), ValueError, "cu_seqlens[2] is 7 after 8", "must increase"),
    "empty": (put(cu_seqlens=torch.tensor([0, 8, 8, 12])), ValueError, "cu_seqlens[2] is 8 after 8", "must increase"),
    "short": (put(cu_seqlens=torch.tensor([0, 6, 11])), ValueError, "cu_seqlens ends at 11", "must end at T = 12"),
    "long": (put(cu_seqlens=torch.tensor([0, 6, 13])), ValueError, "cu_seqlens ends at 13", "must end at T = 12"),
}

STATES = {
    "a_number": (0.0, TypeError, "initial_state is a float", "must be a tensor or None"),
    "of_fewer_sequences": (torch.zeros(1, H, K, V), ValueError, "initial_state is [1, 3, 4, 5]", "= [2, 3, 4, 5]"),
    "of_more_heads": (torch.zeros(B, 4, K, V), ValueError, "initial_state is [2, 4, 4, 5]", "[N, H, K, V]"),
    "values_first": (
        torch.zeros(B, H, V, K),
        ValueError,
        "initial_state is [2, 3, 5, 4]",
        "[N, H, K, V] = [2, 3, 4, 5]",
    ),
    "of_three_dimensions": (torch.zeros(H, K, V), ValueError, "initial_state is [3, 4, 5]", "[N, H, K, V]"),
    "of_integers": (torch.zeros(B, H, K, V).int(), TypeError, "initial_state is torch.int32", "floating point"),
    "elsewhere": (torch.zeros(B, H, K, V, device="meta"), ValueError, "initial_state is on meta, q on cpu"),
}

CHUNK_SIZES = {
    "0": (0, ValueError, "chunk_size is 0", "power of two"),
    "negative": (-16, ValueError, "chunk_size is -16", "power of two"),
    "48": (48, ValueError, "chunk_size is 48", "power of two"),
    "float": (64.0, TypeError, "chunk_size is 64.0", "must be an int"),
    "bool": (True, TypeError, "chunk_size is True", "must be an int"),
}


@all_forms
@pytest.mark.parametrize("case", INPUTS)
def test_bad_inputs_are_refused(form: str, case: str) -> None:
    given = good()
    spoil, error, *words = INPUTS[case]
    spoil(given)
    assert_refused(form, given, error, *words)


@all_forms
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bad_offsets_are_refused(form: str, case: str, offsets: torch.dtype) -> None:
    given = good(packed=True)
    spoil, error, *words = PACKED[case]
    spoil(given)
    if isinstance(given["cu_seqlens"], Tensor) and given["cu_seqlens"].dtype == torch.int64:
        given["cu_seqlens"] = given["cu_seqlens"].to(offsets)
    assert_refused(form, given, error, *words)


@pytest.mark.parametrize("form", WITH_STATES)
@pytest.mark.parametrize("case", STATES)
def test_bad_states_are_refused(form: str, case: str) -> None:
    state, error, *words = STATES[case]
    assert_refused(form, {**good(), "initial_state": state}, error, *words)


GROUPED = {
    "decays_of_query_heads": ({"g_gamma": torch.zeros(2 * H)}, "g_gamma is [6]", "[H] = [3]"),
    "states_of_query_heads": ({"initial_state": torch.zeros(B, 2 * H, K, V)}, "is [2, 6, 4, 5]", "= [2, 3, 4, 5]"),
}


@pytest.mark.parametrize("form", WITH_STATES)
@pytest.mark.parametrize("case", GROUPED)
def test_what_groups_share_is_of_the_heads_of_k_and_v(form: str, case: str) -> None:
    given, *words = GROUPED[case]
    assert_refused(form, {**good(), "q": torch.randn(B, T, 2 * H, K), **given}, ValueError, *words)


@pytest.mark.parametrize("form", WITH_STATES)
def test_a_state_a_row_is_refused_where_there_are_packed_sequences(form: str) -> None:
    given = {**good(packed=True), "initial_state": torch.zeros(1, H, K, V)}
    assert_refused(form, given, ValueError, "initial_state is [1, 3, 4, 5]", "= [2, 3, 4, 5]")


def test_a_state_with_keys_first_is_refused_where_values_come_first() -> None:
    given = {**good(), "initial_state": torch.zeros(B, H, K, V), "state_v_first": True}
    assert_refused("fused_recurrent", given, ValueError, "initial_state is [2, 3, 4, 5]", "[N, H, V, K] = [2, 3, 5, 4]")


@pytest.mark.parametrize("form", ["chunk", "auto"])
@pytest.mark.parametrize("case", CHUNK_SIZES)
def test_bad_chunk_sizes_are_refused(form: str, case: str) -> None:
    chunk_size, error, *words = CHUNK_SIZES[case]
    assert_refused(form, {**good(), "chunk_size": chunk_size}, error, *words)


@pytest.mark.parametrize("form", ["", "chunks", "Chunk", None, 3])
def test_an_unknown_form_is_refused(form: Any) -> None:
    words = (f"form is {form!r}", "must be one of auto, naive, parallel, chunk, fused_chunk")
    assert_refused("auto", {**good(), "form": form}, ValueError, *words)


@pytest.mark.parametrize("form", sorted({*FORMS} - {"chunk", "auto"}))
def test_a_chunk_size_is_refused_by_a_form_without_chunks(form: str) -> None:
    given = {**good(), "form": form, "chunk_size": 64}
    assert_refused("auto", given, ValueError, "chunk_size is 64", form, "only the chunk form")


@pytest.mark.parametrize("states", [{"initial_state": torch.zeros(B, H, K, V)}, {"output_final_state": True}])
def test_states_are_refused_by_the_parallel_form(states: dict[str, Any]) -> None:
    words = (next(iter(states)), "parallel form has no states")
    assert_refused("auto", {**good(), "form": "parallel", **states}, ValueError, *words)


def test_attentions_that_cannot_fit_are_refused_before_anything_is_allocated() -> None:
    q, k, v = (torch.empty(1, 1, 1, 1).expand(4, 2_000_000, 8, 1) for _ in range(3))
    words = ("output_attentions=True", "[4, 8, 2000000, 2000000]", "GiB", "shorter T")
    assert_refused("parallel", {"q": q, "k": k, "v": v, "output_attentions": True}, ValueError, *words)


@pytest.mark.parametrize("offsets", [[1, 6, 12], [0, 8, 7, 12], [0, 6, 13]])
def test_the_debug_switch_checks_offsets_without_reading_them(offsets: list[int]) -> None:
    """On a GPU these are assertions on the device; on the CPU they raise at once."""
    with pytest.raises(RuntimeError, match="chunk_retention: cu_seqlens must"):
        arguments._check_offsets_on_device("chunk_retention", 12, torch.tensor(offsets))
    arguments._check_offsets_on_device("chunk_retention", 12, torch.tensor([0, 6, 12]))


@all_forms
def test_good_input_is_taken(form: str) -> None:
    public(form)(**good())
    public(form)(**good(packed=True))


@all_forms
def test_float64_is_taken_on_the_cpu(form: str) -> None:
    given = {name: x.double() for name, x in good().items()}
    assert public(form)(**given)[0].dtype == torch.float64
