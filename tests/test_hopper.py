"""fused_chunk_hopper: what it runs and what it leaves to fused_chunk, what it needs, and on a Hopper its numbers."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from fakes import NEEDS, module_at, timing
from oracle import Problem as OracleProblem
from oracle import assert_matches, assert_same, by_blocks, make_problem, poisoned_memory, retnet_rates, run
from rich.console import Console

import generated
from generated import configuration, launch
from generated.configuration import kernel_registry, source_hash
from generated.retention import auto, fused_chunk
from generated.retention import fused_chunk_hopper as hopper
from generated.retention.chunk import WHOLE as UNCUT
from generated.retention.fused_chunk_hopper import FusedChunkHopperConfig, fused_chunk_hopper_sweep
from tuning import rules
from tuning import run as run_module
from tuning.compilation import ARCHS, compile_launch
from tuning.model import predict
from tuning.problems import GRADIENTS, HOPPER, Problem
from tuning.proof import draws, error_limit, prove
from tuning.rules import Entry, Point
from tuning.winners import Winner
from tuning.workloads import builtin

SM90 = ARCHS["sm90"]
PROBLEM = Problem(HOPPER, "bfloat16", 8, 2048, 8, 256, 512)
WIDE = replace(PROBLEM, K=512, V=256)  # of the gradients of q and k
PLAIN = dict.fromkeys(("initial_state", "final_state", "cu_seqlens", "chunk_size"))
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not hopper.is_hopper(torch.device("cuda")), reason="needs a Hopper GPU"
)


def inputs(
    T: int = 128, K: int = 256, V: int = 128, H: int = 3, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    return torch.empty(2, T, H, K, dtype=dtype, device="meta"), torch.empty(2, T, H, V, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, True),
        ({"V": 512, "dtype": torch.float16}, True),
        ({"K": 512}, True),
        ({"K": 512, "V": 192}, True),
        ({"K": 512, "V": 96}, True),
        ({"K": 384}, True),
        ({"K": 132}, False),  # of three heads tokens begin at half of 16 bytes
        ({"K": 132, "V": 68, "H": 4}, True),
        ({"K": 130, "V": 68, "H": 8}, False),
        ({"T": 100}, True),
        ({"T": 1}, True),
        ({"K": 128}, False),
        ({"V": 192}, True),
        ({"V": 428}, False),
        ({"V": 428, "H": 2}, True),
        ({"V": 430, "H": 8}, False),
        ({"dtype": torch.float32}, False),
        ({"V": 1024}, False),
    ],
    ids=str,
)
def test_it_runs_its_own_sizes(changes: dict[str, Any], runs: bool) -> None:
    q, v = inputs(**changes)
    assert hopper.runs_here(q, v, None, None, None, None) is runs
    if not runs:
        with pytest.raises(ValueError, match="fused_chunk_retention"):
            PROBLEM.run((q, q, v, torch.empty(3)), PROBLEM.default())


@pytest.mark.parametrize("given", PLAIN)
def test_it_runs_packed_sequences_and_no_states(given: str) -> None:
    q, v = inputs()
    something: Any = 64 if given == "chunk_size" else torch.empty(1, device="meta")
    assert hopper.runs_here(q, v, **{**PLAIN, given: something}) is (given == "cu_seqlens")
    assert not hopper.runs_here(*(torch.empty(2, 128, 3, width, dtype=q.dtype) for width in (256, 128)), **PLAIN)


def test_it_runs_no_groups() -> None:
    (q, v), (more_q, more_v) = inputs(), inputs(H=6)
    assert hopper.runs_here(more_q, more_v, **PLAIN)
    assert not hopper.runs_here(more_q, v, **PLAIN)
    assert not hopper.runs_here(q, more_v, **PLAIN)


@pytest.fixture
def rule(only_this_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of the form's for whatever is on the meta device, which passes for a Hopper GPU."""
    entries = []
    for point in (Point("bfloat16", 256, 128, 6, 128), Point("bfloat16", 512, 128, 6, 128)):
        figures: dict[str, Any] = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}
        figures["point"] = rules.point_text(point)
        entries.append(Entry(PROBLEM.kernel, point, {"BT": 32, "num_stages": 3}, "measured", figures))
    rules.write(only_this_directory / "a.yaml", rules.document(entries, {"name": "Pretended", "arch": "sm90"}, None))
    configuration.reload()
    select = configuration.select_config

    def on_gpu(*given: Any, device: torch.device, **shape: Any) -> Any:
        return select(*given, device=torch.device("cuda", 0), **shape)

    monkeypatch.setattr(launch, "select_config", on_gpu)
    monkeypatch.setattr(auto, "default_config", lambda *_: auto.FormConfig("chunk"))  # for however little work


RULE = FusedChunkHopperConfig(32, 3)
MADE = FusedChunkHopperConfig(64, 2, scores=0)


def test_its_rule_is_what_has_it_used_whatever_was_asked_before(rule: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, v), (longer, values) = inputs(), inputs(T=1024)
    for _ in range(2):
        assert hopper.tuned_config(q, v, **PLAIN) == RULE
        assert hopper.tuned_config(longer, values, **PLAIN) is None
    # Of packed sequences it goes by the mean: two rows of 128 tokens are as long as six sequences of 1024.
    assert hopper.tuned_config(longer, values, **PLAIN | {"cu_seqlens": torch.empty(3)}) is None
    packed = (x.view(1, -1, *x.shape[2:])[:, :256] for x in (longer, values))
    assert hopper.tuned_config(*packed, **PLAIN | {"cu_seqlens": torch.empty(3)}) == RULE
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert hopper.tuned_config(q, v, **PLAIN) is None


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, [HOPPER]),
        ({"T": 192}, [HOPPER]),
        ({"T": 100}, [HOPPER]),
        ({"T": 8}, ["fused_recurrent"]),
        ({"V": 256}, ["chunk"]),  # beyond the rule
        ({"initial_state": torch.empty(1)}, ["chunk"]),
        ({"final_state": torch.empty(1)}, ["chunk"]),
        ({"chunk_size": 64}, ["chunk"]),
        ({"cu_seqlens": torch.tensor([0, 100, 256])}, [HOPPER]),
        ({"cu_seqlens": torch.tensor([0, 16, 256, 512]), "T": 512}, ["chunk"]),  # beyond the rule, in the mean
        ({"scores": torch.empty(1)}, ["chunk"]),  # it reads none that others made
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_auto_runs_it_where_its_rule_holds_and_the_chosen_form_elsewhere(
    changes: dict[str, Any], used: list[str], rule: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    for name in auto.SWEEPS:
        monkeypatch.setitem(auto.SWEEPS, name, lambda *_, name=name, **__: found.append(name))

    def on_hopper(*_: Any, config: Any, **__: Any) -> None:
        assert config == RULE
        found.append(HOPPER)

    monkeypatch.setattr(auto, "fused_chunk_hopper_sweep", on_hopper)
    sizes = {name: changes[name] for name in changes if name in ("T", "V")}
    q, v = inputs(**sizes)
    given = PLAIN | {name: value for name, value in changes.items() if name not in sizes}
    auto.auto_sweep(q, q, v, torch.empty(3), 1.0, reverse=False, adjoint=False, **given)  # type: ignore[arg-type]
    assert found == used


@pytest.mark.parametrize(
    ("T", "reverse", "packed", "read"),
    [
        (128, False, False, [[1.0, 2.0], [1.0, 2.0]]),
        (128, True, False, [None, None]),
        (120, False, False, [[1.0], [2.0]]),
        (128, False, True, [[1.0], [2.0]]),
    ],
    ids=["whole", "reversed", "ragged", "packed"],
)
def test_the_scores_of_the_gradients_of_q_and_k_are_made_by_one_launch_and_the_same_of_whole_chunks(
    T: int, reverse: bool, packed: bool, read: list[Any], rule: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, swept = list[tuple[int, bool]](), list[tuple[int, bool, Any]]()

    def on_hopper(q: torch.Tensor, *_: Any, reverse: bool, scores: Any = None, **__: Any) -> torch.Tensor:
        swept.append((q.shape[3], reverse, scores if scores is None else scores.tolist()))
        return q

    def make_scores(_: Any, BT: int, *__: Any, of_both: bool) -> torch.Tensor:
        made.append((BT, of_both))
        return torch.tensor([1.0, 2.0])

    monkeypatch.setattr(auto, "fused_chunk_hopper_sweep", on_hopper)
    monkeypatch.setattr(fused_chunk, "make_scores", make_scores)
    monkeypatch.setitem(auto.SWEEPS, "chunk", lambda q, *_, **__: q)  # of dv
    q, v = inputs(T, K=128, V=512)
    offsets = torch.empty(3, device="meta") if packed else None
    order: dict[str, Any] = {"cu_seqlens": offsets, "reverse": reverse, "chunk_size": None}
    auto.auto_gradients(q, q, v, v, torch.empty(3), 1.0, h0=None, dht=None, dh0=None, **order)
    assert swept == [(512, reverse, read[0]), (512, not reverse, read[1])]
    assert made == ([] if reverse else [(RULE.BT, read[0] != read[1])])


@pytest.mark.parametrize(("T", "packed"), [(120, False), (128, True), (128, False)], ids=["ragged", "packed", "whole"])
def test_the_gradient_of_k_has_no_states_where_only_an_initial_one_is_given(
    T: int, packed: bool, rule: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = list[tuple[str, bool, Any]]()

    def sweep(name: str, q: torch.Tensor, *_: Any, reverse: bool, scores: Any = None, **__: Any) -> torch.Tensor:
        swept.append((name, reverse, scores))
        return q

    monkeypatch.setattr(auto, "fused_chunk_hopper_sweep", functools.partial(sweep, "hopper"))
    monkeypatch.setitem(auto.SWEEPS, "chunk", functools.partial(sweep, "chunk"))
    monkeypatch.delattr(fused_chunk, "make_scores")
    q, v = inputs(T, K=128, V=512)
    h0 = torch.empty(q.shape[0], q.shape[2], 128, 512, device="meta")
    offsets = torch.empty(3, device="meta") if packed else None
    order: dict[str, Any] = {"cu_seqlens": offsets, "reverse": False, "chunk_size": None}
    auto.auto_gradients(q, q, v, v, torch.empty(3), 1.0, h0=h0, dht=None, dh0=h0, **order)
    assert swept == [("chunk", False, None), ("chunk", True, None), ("hopper", True, None)]


@pytest.mark.parametrize(
    ("T", "packed", "reverse", "turned"),
    [(128, False, True, True), (128, False, False, False), (120, False, True, False), (128, True, True, False)],
)
def test_scores_are_turned_in_reverse_and_of_whole_chunks(T: int, packed: bool, reverse: bool, turned: bool) -> None:
    q, v = inputs(T, K=512, V=256)
    offsets = torch.empty(3, device="meta") if packed else None
    config = FusedChunkHopperConfig(BT=32, num_stages=2)
    (launch,) = hopper.output_launches(q, v, 1.0, config, cu_seqlens=offsets, reverse=reverse, scored=True).parts
    assert launch._constants["TURNED"] is turned


def test_the_gradients_share_nothing_where_scores_are_made(rule: None, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[tuple[Any, Any]] = []

    def on_hopper(q: torch.Tensor, *_: Any, config: Any, **given: Any) -> torch.Tensor:
        swept.append((config, given.get("scores")))
        return q

    monkeypatch.setattr(hopper, "choose_config", lambda *_: MADE)
    monkeypatch.setattr(auto, "fused_chunk_hopper_sweep", on_hopper)
    monkeypatch.delattr(fused_chunk, "make_scores")
    q, v = inputs(V=256)
    order: dict[str, Any] = {"cu_seqlens": None, "reverse": False, "chunk_size": None}
    auto.auto_gradients(q, q, v, v, torch.empty(3), 1.0, h0=None, dht=None, dh0=None, **order)
    assert swept == [(MADE, None)] * 3


def test_scores_are_made_of_the_longest_chunks_by_groups_with_all_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="64 tokens alone"):
        FusedChunkHopperConfig(32, 2, scores=0)
    monkeypatch.setattr(hopper, "choose_config", lambda *_: MADE)
    assert hopper.tuned_config(*inputs(), **PLAIN) == MADE
    assert hopper.tuned_config(*inputs(K=512), **PLAIN) is None
    with pytest.raises(ValueError, match="fused_chunk_retention"):
        WIDE.run(WIDE.inputs("meta"), MADE)
    assert [config for config in PROBLEM.sift(SM90).candidates if not config.scores] == [MADE] == [PROBLEM.default()]
    assert all(config.scores for config in WIDE.sift(SM90).candidates)


@pytest.mark.parametrize("reverse", [False, True])
def test_auto_has_its_calls_ready_and_gradients_that_share_scores(
    reverse: bool, rule: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[tuple[Any, int, bool, bool]] = []

    def output_launches(q: torch.Tensor, v: torch.Tensor, scale: float, config: Any, **given: Any) -> Any:
        swept.append((config, q.shape[3], given["reverse"], given.get("scored", False)))
        return ()

    monkeypatch.setattr(hopper, "output_launches", output_launches)
    q, v = inputs(K=512)
    ready = auto.auto_ready(q, v, 1.0, None, reverse, None)
    assert ready is not None
    of_v = RULE, 512, not reverse, False  # those of q and k, as wide as V, are another form's
    assert sorted(swept, key=lambda sweep: sweep != of_v) == [of_v, (RULE, 512, reverse, False)]
    swept.clear()
    q, v = inputs(K=128, V=512)
    ready = auto.auto_ready(q, v, 1.0, None, reverse, None)
    assert ready is not None
    assert swept == [(RULE, 512, reverse, not reverse), (RULE, 512, not reverse, not reverse)]
    share = ready.gradients.args[0]  # type: ignore[union-attr]
    assert share is None if reverse else share.func is fused_chunk.make_shared_scores


@pytest.mark.parametrize(
    ("problem", "stages"),
    [(PROBLEM, 5), (WIDE, 3), (replace(PROBLEM, V=428), 5), (replace(WIDE, K=428), 3), (replace(PROBLEM, K=132), 5)],
    ids=lambda given: f"{given.K} {given.V}" if isinstance(given, Problem) else "",
)
def test_every_candidate_compiles_in_both_directions_and_fits(problem: Problem, stages: int) -> None:
    candidates = problem.sift(SM90).candidates
    largest = max(candidates, key=lambda config: (config.BT == 32, config.num_stages))
    assert largest == FusedChunkHopperConfig(BT=32, num_stages=stages)
    assert problem.default() in candidates
    meta = problem.inputs("meta")
    read = replace(problem.default(), scores=1)
    whole = dict.fromkeys((min(candidates, key=str), problem.default(), read, largest))
    for config in (*whole, *(replace(one, L=256) for one in dict.fromkeys((problem.default(), largest)))):
        estimate = problem.space.needs.estimate(problem.place(SM90), config)
        digests, is_cut = set(), config.L < problem.T
        for name, options in problem.variants(config).items():
            *before, needs = compile_launch(functools.partial(problem.run, meta, config, **options), SM90)
            in_segments = "cut" in name or (is_cut and "tokens" not in options)
            assert (needs.registers, needs.warps) == (hopper.AT_FIRST, config.num_warps)
            # Triton 3.6 keeps a word of one variant in memory over the loop, for the partial chunk behind it; of narrow
            # heads 3.7 keeps up to four.
            most = 8 if in_segments and triton.__version__.startswith("3.6.") else 0
            assert needs.spills <= (most if hopper.are_whole(problem.K, problem.V) else 16)
            assert needs.fits(SM90)
            assert 0 <= needs.shared - estimate.shared < 1024  # the barriers
            assert [launch.spills for launch in before] == [0] * (2 * in_segments + config.scores)
            digests.add(needs.digest)
        # Whole chunks, ragged, packed, in segments too, and if scores are read, in reverse with those of forwards.
        assert len(digests) == 4 + is_cut + config.scores  # the direction is a number, but for what reads turned scores


@pytest.mark.parametrize("T", [1, 63, 65, 2048])
def test_what_is_ragged_has_a_kernel_of_its_own(T: int) -> None:
    q, _ = inputs(T)
    assert hopper.is_ragged(q, 64, None) is (T % 64 > 0)
    assert hopper.is_ragged(q, 64, torch.empty(2))


@pytest.mark.parametrize(
    ("T", "sequences", "L", "slots"),
    [(1024, None, 256, 8), (1000, None, 256, 8), (1000, None, 512, 4), (1000, None, 1024, 2), (1000, 3, 256, 6)],
)
def test_every_segment_has_programs_and_a_state(
    T: int, sequences: int | None, L: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []

    def run_states(launches: Any, k: torch.Tensor, v: torch.Tensor, hs: torch.Tensor, *_: Any) -> None:
        *_, length, step = launches.own._arguments[:5]
        made.append((hs, length, step))

    monkeypatch.setattr(hopper, "run_states", run_states)
    monkeypatch.setattr(hopper, "run_output", lambda launches, *given: (launches, given[-1]))
    q, v = inputs(T)
    config = replace(MADE, L=L)
    order: dict[str, Any] = PLAIN | {"reverse": True, "adjoint": False}
    order["cu_seqlens"] = None if sequences is None else torch.empty(sequences + 1, device="meta")
    launches, hs = fused_chunk_hopper_sweep(q, q, v, torch.empty(3), 1.0, config=config, **order)
    (sweep,) = launches.parts
    assert sweep._programs == slots * 3
    assert sweep._arguments[:6] == (1.0, T, 3, -1, *((sequences or 2, L) if L < T else (None, None)))
    assert (hs is not None) is (L < T)
    if hs is not None:
        assert made == [(hs, L, -1)]
        assert (hs.shape, hs.dtype) == ((slots, 3, 256, 128), torch.float32)
    prepared = hopper.fused_chunk_hopper_prepared(1.0, order["cu_seqlens"], q, v, config)
    assert (prepared is None) is (L < T)


@pytest.mark.parametrize(
    ("tokens", "sequences", "given", "L"),
    [
        (6144, None, 1024, 1024),
        (6144, 3, UNCUT, 2048),
        (12288, 3, 2048, 2048),
        (6144, 3, 1024, UNCUT),  # states would take more than v
        (6144, 6, UNCUT, 8192),
        (6144, 7, UNCUT, UNCUT),
        (6144, 2, UNCUT, 4096),
    ],
)
def test_packed_sequences_are_cut_as_chunks_are(
    tokens: int, sequences: int | None, given: int, L: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "choose_config", lambda *_: replace(RULE, L=given))
    q, v = inputs(tokens, K=512)
    offsets = None if sequences is None else torch.empty(sequences + 1)
    assert hopper.tuned_config(q, v, **PLAIN | {"cu_seqlens": offsets}) == replace(RULE, L=L)


@pytest.mark.parametrize("L", [0, 32, 96])
def test_a_segment_is_of_whole_chunks(L: int) -> None:
    with pytest.raises(ValueError, match="power of two from 64"):
        replace(RULE, L=L)


@pytest.mark.parametrize(
    ("B", "T", "lengths"),
    [
        (8, 2048, []),  # two programs on each multiprocessor
        (4, 2048, [512, 1024]),
        (2, 32768, [4096, 8192, 16384]),
        (1, 512, []),  # too short for that
        (1, 256, []),
    ],
)
def test_segments_are_so_many_that_they_fill_the_gpu(B: int, T: int, lengths: list[int]) -> None:
    problem = replace(PROBLEM, B=B, T=T)
    candidates = problem.sift(SM90).candidates
    assert sorted({config.L for config in candidates}) == [*lengths, UNCUT]
    if T == 32768:
        ms = [predict(problem, replace(problem.default(), L=L), SM90) for L in (8192, UNCUT)]
        assert ms[0] < ms[1]


def test_a_program_has_columns_of_each_group_or_of_both() -> None:
    assert [hopper.columns_at(K) for K in (132, 256, 260, 512)] == [128, 128, 64, 64]


def test_gluon_is_imported_when_the_kernel_first_runs() -> None:
    code = (
        "import sys, generated.retention.auto",
        "from generated.retention.fused_chunk_hopper import gluon_parts",
        "assert 'triton.experimental.gluon' not in sys.modules",
        "gluon_parts()",
        "assert 'triton.experimental.gluon' in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)


def test_rules_know_the_launches_by_the_texts_of_all_kernels() -> None:
    others = source_hash(*hopper.LAUNCHED)
    assert "fused_chunk_hopper_kernel" in hopper.KERNEL_TEXT
    found = [hopper.kernel_hash(hopper.KERNEL_TEXT, others), hopper.kernel_hash(hopper.KERNEL_TEXT + " ", others)]
    found.append(hopper.kernel_hash(hopper.KERNEL_TEXT, "another"))
    assert kernel_registry()[PROBLEM.kernel].source == found[0]
    assert len(set(found)) == 3
    assert {len(one) for one in found} == {16}


def won(form: str, ms: float, **changes: Any) -> Winner:
    problem = replace(PROBLEM, form=form, **changes)
    return Winner(problem, problem.default(), timing(ms), 9.0, 0.001, NEEDS, 9, modelled=False)


@pytest.mark.parametrize(
    ("ms", "others", "known", "used"),
    [
        (0.90, [1.0], [], True),
        (0.99, [1.0], [], False),
        (0.99, [1.0], [HOPPER], True),
        (1.02, [1.0], [HOPPER], True),
        (1.04, [1.0], [HOPPER], False),
        (0.90, [], [], False),
        (0.90, [], ["form"], True),
        (0.99, [], ["form"], False),
        (0.90, [1.0, 0.85], [], False),
    ],
)
def test_it_has_a_rule_where_it_is_faster_than_what_would_run_otherwise(
    ms: float, others: list[float], known: list[str], used: bool
) -> None:
    winner, point = won(HOPPER, ms), rules.point_of(PROBLEM)
    winners = [winner, *(won(form, other) for form, other in zip(("chunk", "parallel"), others, strict=False))]
    entries = [Entry(f"retention_{name}", point, {}, "measured", {"ms": 1.0}) for name in known]
    assert rules.without_use(winners, entries) == ([] if used else [winner])
    modelled = replace(winner, modelled=True)
    assert rules.without_use([modelled, *winners[1:]], entries) == [modelled]
    assert all(entry.use != {"form": HOPPER} for entry in rules.form_entries(winners))


@pytest.mark.parametrize(
    ("hopper_ms", "held_ms", "way"),
    [
        (None, None, "fused_chunk"),
        (0.9, None, "fused_chunk"),
        (0.4, None, "sweeps"),
        (None, 0.4, "sweeps"),
        (0.9, 0.4, "fused_chunk"),
    ],
)
def test_where_it_has_a_rule_three_sweeps_are_its_sweeps(
    hopper_ms: float | None, held_ms: float | None, way: str
) -> None:
    square = {"K": 256, "V": 256}
    winners = [won(form, ms, **square) for form, ms in (("chunk", 0.6), ("fused_chunk", 0.6), (GRADIENTS, 1.5))]
    point = rules.point_of(winners[0].problem)
    if hopper_ms is not None:
        winners.append(won(HOPPER, hopper_ms, **square))
    known = [] if held_ms is None else [Entry(PROBLEM.kernel, point, {}, "measured", {"ms": held_ms})]
    *_, gradients = rules.form_entries(winners, known)
    assert gradients.use == {"form": way}
    assert gradients.figures["default_ms"] == pytest.approx(3 * (0.4 if way == "sweeps" else 0.6))


def test_a_rule_that_is_of_no_use_any_more_leaves_its_file(tmp_path: Path) -> None:
    path, device = tmp_path / "a.yaml", {"name": "Pretended", "arch": "sm90"}
    entries = [rules.entry_of(won(HOPPER, 0.5, T=T)) for T in (2048, 16384)]
    rules.update(path, entries, device, None)
    rules.update(path, [], device, None, gone=[(entries[0].kernel, entries[0].point)])
    assert [entry.point.T for entry in rules.existing_entries(path)] == [16384]


def test_where_there_is_no_rule_to_write_no_file_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, winner = tmp_path / "a.yaml", won(HOPPER, 0.5)
    run_module._write(Console(), [winner], [winner], [], path, None, SM90)
    assert not path.exists()
    run_module._write(Console(), [winner], [], [], path, None, SM90)
    assert len(rules.existing_entries(path)) == 1
    run_module._write(Console(), [winner], [winner], [], path, None, SM90)
    assert rules.existing_entries(path) == []


@pytest.mark.parametrize("scores", [0, 1])
def test_it_is_proven_as_fused_chunk_is_without_states_and_on_whole_chunks(scores: int) -> None:
    found = draws(PROBLEM, FusedChunkHopperConfig(64, 2, scores=scores))
    assert not any(draw.states or draw.adjoint for draw in found)
    like = replace(PROBLEM, form="fused_chunk")
    wanted = {draw.name: replace(draw, states=False, adjoint=False) for draw in draws(like, like.default())}
    others = ("states",) if scores else ("states", "turned", "of both")
    shared = {name for name in wanted if not any(part in name for part in others)}
    assert {draw for draw in found if draw.name in wanted} == {wanted[name] for name in shared}
    whole = [draw for draw in found if draw.name not in wanted and not draw.L and not draw.narrower]
    assert {(draw.reverse, len(draw.lengths) > 1) for draw in found if draw.L} == {(False, True), (True, True)}
    narrower = {draw.name.removeprefix("narrower heads, ") for draw in found if draw.narrower}
    assert narrower == {
        "narrower heads",
        "whole chunks",
        "packed",
        "packed, cut",
        *(["scores turned"] if scores else []),
    }
    assert {draw.reverse for draw in whole} == {False, True}
    assert all(length % hopper.LONGEST == 0 for draw in whole for length in draw.lengths)
    assert not any(len(draw.lengths) > 1 for draw in whole)
    whole_forms = [w for w in builtin().values() if not w.form]
    assert {w.name for w in whole_forms if replace(PROBLEM, T=w.T, K=w.K, V=w.V).is_for_hopper} == {
        "retnet_1.3b",
        "wide_256",
        "retnet_3b",
        "retnet_7b_32k",
    }


LAST = ", from the last token"


@pytest.mark.parametrize("scores", [0, 1])
def test_its_proof_has_more_than_two_segments_where_there_are_any(scores: int) -> None:
    cut = draws(PROBLEM, FusedChunkHopperConfig(64, 2, scores=scores, L=256))
    longest = {draw.name: max(draw.lengths) for draw in cut}
    of_both = [f"{kind}scores of both{end}" for kind, end in (("", LAST), ("packed, ", ""), ("packed, ", LAST))]
    assert {name for name, tokens in longest.items() if tokens > 2 * 256} == {
        "from the first token",
        "from the last token",
        "whole chunks",
        "whole chunks from the last token",
        "narrower heads",
        "narrower heads, whole chunks",
        "narrower heads, packed",
        "packed",
        "packed, from the last token",
        *(["scores turned", "narrower heads, scores turned", *of_both] if scores else []),
    }
    assert longest["whole chunks"] % hopper.LONGEST == 0
    assert not any(draw.L for draw in cut)


KNOBS = [
    (256, (64, 2)),
    (256, (64, 2, 0)),
    (256, (32, 4)),
    (256, (16, 3)),
    (512, (32, 3)),
    (512, (32, 2)),
    (512, (16, 6)),
    (256, (64, 2, 1, 64)),
    (256, (64, 2, 0, 128)),
    (256, (32, 4, 1, 128)),
    (512, (32, 3, 1, 128)),
    (512, (16, 6, 1, 64)),
    (428, (32, 3)),  # heads that fill no tile, and begin at half of 16 bytes
    (428, (16, 6, 1, 64)),
    (132, (64, 2, 0)),
    (132, (32, 4, 1, 128)),
]
every_kernel = pytest.mark.parametrize(("K", "knobs"), KNOBS, ids=str)


def sweep_with(
    config: FusedChunkHopperConfig,
    problem: OracleProblem,
    *tensors: torch.Tensor,
    reverse: bool,
    scores: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The sweep over the sequences of a problem; K^-0.5 is the scale if none is given."""
    rates = retnet_rates(problem.q.shape[2]).float().cuda()
    given: dict[str, Any] = PLAIN | {"cu_seqlens": problem.cu_seqlens, "reverse": reverse, "adjoint": False}
    scale = tensors[0].shape[3] ** -0.5 if scale is None else scale
    return fused_chunk_hopper_sweep(*tensors, rates, scale, config=config, scores=scores, **given)


def all_results(
    config: FusedChunkHopperConfig, problem: OracleProblem, *, shared: bool = False
) -> dict[str, torch.Tensor]:
    """The output and the gradients by a sweep each; those of q and k with scores that they share, where they can."""
    q, k, v, do = (x.detach() for x in (problem.q, problem.k, problem.v, problem.do))
    rates, of_dq, of_dk = retnet_rates(q.shape[2]).float().cuda(), None, None
    if shared:
        made = fused_chunk.shared_scores(do, v, rates, config, cu_seqlens=problem.cu_seqlens, reverse=False)
        of_dq, of_dk = (given.get("scores") for given in made)
    sweep = functools.partial(sweep_with, config, problem)
    return {
        "o": sweep(q, k, v, reverse=False),
        "dq": sweep(do, v, k, reverse=False, scores=of_dq),
        "dk": sweep(v, do, q, reverse=True, scores=of_dk),
        "dv": sweep(k, q, do, reverse=True),
    }


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kernel
def test_outputs_on_a_gpu_are_the_oracles_and_the_same_bits_twice(
    K: int, knobs: tuple[int, ...], dtype: torch.dtype
) -> None:
    config = FusedChunkHopperConfig(*knobs)
    problem = make_problem(2, 640, 6, K, K, dtype, device="cuda", states=False)
    found = all_results(config, problem, shared=True)
    assert_matches(found, problem, formula=by_blocks)
    alone = all_results(config, problem)
    assert torch.equal(found["o"], alone["o"])
    assert_matches(alone, problem, formula=by_blocks)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("B", "T"), [(2, 1000), (3, 130), (2, 65), (3, 17), (2, 1)], ids=str)
@every_kernel
def test_ragged_outputs_and_gradients_on_a_gpu_are_the_oracles(K: int, knobs: tuple[int, ...], B: int, T: int) -> None:
    config = FusedChunkHopperConfig(*knobs)
    problem = make_problem(B, T, 6, K, K, torch.bfloat16, device="cuda", states=False)
    with poisoned_memory():
        found, again = all_results(config, problem, shared=True), all_results(config, problem)
    assert_matches(found, problem, formula=by_blocks)
    assert_same(again, found)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("L", [UNCUT, 128])
@pytest.mark.parametrize(
    ("K", "V"),
    [(256, 428), (428, 256), (264, 132), (132, 264), (260, 508), (508, 260), (252, 256), (512, 132)],
    ids=str,
)
def test_each_width_fills_its_tiles_or_not_by_itself(K: int, V: int, L: int) -> None:
    problem = make_problem(2, 300, 4, K, V, torch.bfloat16, device="cuda", states=False)
    configs = {wide: replace(hopper.default_config(torch.bfloat16, wide, K, 8, 300), L=L) for wide in (K, V)}
    q, k, v, do = (x.detach() for x in (problem.q, problem.k, problem.v, problem.do))
    with poisoned_memory():
        found = {
            "o": sweep_with(configs[K], problem, q, k, v, reverse=False),
            "dq": sweep_with(configs[V], problem, do, v, k, reverse=False, scale=K**-0.5),
            "dk": sweep_with(configs[V], problem, v, do, q, reverse=True, scale=K**-0.5),
            "dv": sweep_with(configs[K], problem, k, q, do, reverse=True),
        }
    assert_matches(found, problem, formula=by_blocks)


PACKED = ([1], [65, 1, 64, 128, 13, 200, 2, 63], [1, 1, 1], [640], [320, 320], [16, 15, 17, 500, 1])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
@every_kernel
def test_packed_outputs_and_gradients_on_a_gpu_are_the_oracles(
    K: int, knobs: tuple[int, ...], lengths: list[int], offsets: torch.dtype
) -> None:
    config = FusedChunkHopperConfig(*knobs)
    problem = make_problem(1, sum(lengths), 6, K, K, torch.bfloat16, device="cuda", lengths=lengths, states=False)
    assert problem.cu_seqlens is not None
    problem = replace(problem, cu_seqlens=problem.cu_seqlens.to(offsets))
    with poisoned_memory():
        found, again = all_results(config, problem), all_results(config, problem)
    assert_matches(found, problem, formula=by_blocks)
    assert_same(again, found)


def spreads(config: FusedChunkHopperConfig, K: int) -> list[str]:
    """Which results of a sequence change where those beside it are NaN, or of a head where the others are."""
    rows = make_problem(3, 100, 4, K, 256, torch.bfloat16, device="cuda", states=False)
    lengths = [70, 1, 64, 33, 133, 5]
    packed = make_problem(1, sum(lengths), 4, K, 256, torch.bfloat16, device="cuda", lengths=lengths, states=False)
    ends = [0, *itertools.accumulate(lengths)]
    in_rows = [(slice(i, i + 1), slice(None)) for i in range(3)]
    in_pack = [(slice(None), slice(begin, end)) for begin, end in itertools.pairwise(ends)]
    found = []
    for problem, places in ((rows, in_rows), (packed, in_pack)):
        tensors = [x.detach() for x in (problem.q, problem.k, problem.v)]
        for reverse, kept in itertools.product((False, True), (0, 1)):
            poisoned = [x.clone() for x in tensors]
            for x, place in itertools.product(poisoned, places[1 - kept :: 2]):
                x[place] = torch.nan
            clean = sweep_with(config, problem, *tensors, reverse=reverse)
            beside = sweep_with(config, problem, *poisoned, reverse=reverse)
            found += [f"{place} {reverse}" for place in places[kept::2] if not torch.equal(clean[place], beside[place])]
        for kept in (0, 1):
            poisoned = [x.clone() for x in tensors]
            for x in poisoned:
                x[:, :, 1 - kept :: 2] = torch.nan
            beside = sweep_with(config, problem, *poisoned, reverse=False)
            clean = sweep_with(config, problem, *tensors, reverse=False)
            if not torch.equal(clean[:, :, kept::2], beside[:, :, kept::2]):
                found.append(f"heads from {kept}")
    return found


@pytest.mark.gpu
@needs_hopper
@every_kernel
def test_what_lies_beside_a_sequence_does_not_reach_it(K: int, knobs: tuple[int, ...]) -> None:
    assert spreads(FusedChunkHopperConfig(*knobs), K) == []


@pytest.mark.gpu
@needs_hopper
@pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning")
@pytest.mark.parametrize(
    ("T", "V", "states", "lengths"),
    [
        (640, 512, False, None),
        (640, 256, False, None),
        (650, 512, False, None),
        (650, 256, False, None),
        (1280, 512, False, [700, 580]),
        (1280, 256, False, [1, 1279]),
        (640, 512, True, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("L", [UNCUT, 256])
def test_retention_and_its_gradients_by_a_rule_of_the_form_are_the_oracles(
    T: int, V: int, states: bool, lengths: list[int] | None, L: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 2 if lengths is None else 1
    problem = make_problem(rows, T, 5, 256, V, torch.bfloat16, device="cuda", states=states, lengths=lengths)
    entries = []
    for K, columns in {(256, V), (V, 256)}:
        point = Point("bfloat16", K, columns, 10, 640)
        figures: dict[str, Any] = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}
        figures["point"] = rules.point_text(point)
        use = vars(hopper.default_config(torch.bfloat16, K, columns, 10, 640)) | {"L": L}
        entries.append(Entry(PROBLEM.kernel, point, use, "measured", figures))
    device = {"name": torch.cuda.get_device_name(), "arch": "sm90"}
    rules.write(tmp_path / "a.yaml", rules.document(entries, device, None))
    monkeypatch.setenv("RETGEN_CONFIG_DIR", str(tmp_path))
    configuration.reload()
    try:
        q, v = problem.q.detach(), problem.v.detach()
        given = PLAIN | {"cu_seqlens": problem.cu_seqlens}
        assert hopper.tuned_config(q, v, **given) is not None
        assert_matches(run(generated.retention, problem), problem, formula=by_blocks)
    finally:
        monkeypatch.undo()
        configuration.reload()


@pytest.mark.gpu
@needs_hopper
def test_a_thread_without_a_context_describes_tensors() -> None:
    *tensors, rates = PROBLEM.inputs("cuda")
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.extend(PROBLEM.run((*tensors, rates), PROBLEM.default()))

    run()
    kept[0] = kept[0].clone()  # what it had is there for the thread, which so need not ask CUDA for memory
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(*kept)


WHOLE, SPLIT = (256, MADE), (512, FusedChunkHopperConfig(32, 3))
OF_STATE = "c_v + gl.arange(0, BV, layout=gl.SliceLayout(1, state_layout))"
SLOT, FIRST = "hs += (i_slot.to(gl.int64) * H + i_h)", "output_layout, 2))\n    slot = 0"
ARRIVED, DONE = "mbarrier.wait(rest_here.index(slot), phase)", "mbarrier.arrive(is_free.index(slot))"
# In segments: with scores that are made, or read, or with each half of K in a group.
CUT, CUT_READ, CUT_SPLIT = ((K, replace(config, L=128)) for K, config in (WHOLE, (256, replace(MADE, scores=1)), SPLIT))
# What is wrong: of which K and configuration, what stands in the kernel's text, and what instead.
FAULTS = {
    "stale state": (WHOLE, [("b_h1 *= b_dh", "b_h1 *= 1.0")]),
    "scores without a mask": (WHOLE, [("b_s *= b_ds", "b_s *= 1.0")]),
    "chunk's own tokens left out": (WHOLE, [("if PART == PARTS - 1:", "if PART == PARTS:")]),
    "outputs of the chunk before": (WHOLE, [("BV], o_s.index(i_t % 2))", "BV], o_s.index((i_t + 1) % 2))")]),
    "tiles that are waited for too late": (
        WHOLE,
        [(f"{ARRIVED}\n    if MADE", "if MADE"), (f"{DONE}\n", f"{ARRIVED}\n    {DONE}\n")],
    ),
    "sums of half of K left out": (SPLIT, [("b_o += sums_s.load(output_layout)", "b_o += 0.0")]),
    "scores of the other direction": (SPLIT, [("(n_chunks - 1 - i_t if TURNED else i_t)", "i_t")]),
    "outputs beside the sequence": (WHOLE, [("mask=m_o)", "mask=m_o | (o_r == T))")]),
    "outputs of a partial chunk left out": (WHOLE, [("if T % BT > 0:", "if T % BT > 1:")]),
    "scores of another slot": (SPLIT, [("bos // BT + i_n if IS_PART", "bos // BT if IS_PART")]),
    "another sequence's first token": (
        WHOLE,
        [
            (
                "if IS_VARLEN:\n            bos = tl.load(cu_seqlens + i_n)",
                "if IS_VARLEN:\n            bos = tl.load(cu_seqlens)",
            )
        ],
    ),
    "state of another slot": (CUT, [(SLOT, SLOT.replace("* H", "* 0"))]),
    "state of another head": (CUT, [(SLOT, SLOT.replace(" + i_h", ""))]),
    "state of the other half of K": (CUT_SPLIT, [("o_k = GROUP % PARTS * BK", "o_k = (1 - GROUP % PARTS) * BK")]),
    "state of the other group's columns": (CUT, [(OF_STATE, OF_STATE.replace("c_v", "(i_v * 2 + 1 - GROUP) * BV"))]),
    "state not loaded": (
        CUT,
        [("gl.load(hs + (o_k + HALF) * V + o_v, mask=m_h & (o_k < K - HALF), other=0.0)", "b_h0 * 0.0")],
    ),
    "first product by no state": (CUT, [(FIRST, FIRST.replace("2))", "2)) * 0.0"))]),
    "segment's end missed": (CUT, [("gl.minimum(T - i_s * L, L)", "gl.minimum(T - i_s * L, L - BT)")]),
    "segments from the first token": (CUT, [("gl.where(direction < 0, after, i_s * L)", "i_s * L")]),
    "scores of the first segment": (CUT_READ, [("after if TURNED else i_s * L", "after if TURNED else 0 * L")]),
    "scores of another sequence's segment": (CUT_READ, [("bos // BT + i_n if IS_VARLEN", "bos // BT if IS_VARLEN")]),
    "turned scores of the first segment": (CUT_READ, [("after if TURNED else i_s * L", "i_s * L")]),
}
NARROW, NARROW_CUT = ((428, FusedChunkHopperConfig(32, 3, L=L)) for L in (UNCUT, 128))
# Of heads that do not fill their tiles.
FAULTS |= {
    "columns of the next head": (NARROW, [("[rows, width + before]", "[rows, 2 * width]")]),
    "products with the head before": (NARROW, [("if before_k > 0:", "if before_k > UNIT:")]),
    "columns of the head before": (NARROW, [("(o_v >= 0) & (o_v < V) & (o_r >= 0)", "(o_v < V) & (o_r >= 0)")]),
    "columns of the head behind": (NARROW, [("(o_v >= 0) & (o_v < V) & (o_r >= 0)", "(o_v >= 0) & (o_r >= 0)")]),
    "last rows of the state": (NARROW_CUT, [("m_h & (o_k < K - HALF)", "m_h & (o_k < K - HALF - UNIT)")]),
    "rows of the state where no head begins": (NARROW_CUT, [("BK - before_k", "BK")]),
    "products of groups with the head before": ((132, MADE), [("if before_k > 0:", "if before_k > UNIT:")]),
    "columns where no head begins": (NARROW, [("* BV - columns_before(i_h, V, DESCRIPTORS)", "* BV")]),
}
READ = "gl.where(m_o, v_rows.load(row_layout), 0.0)", "v_rows.load(row_layout)"
# Of these nothing is seen but where what lies beside a sequence is not finite.
SPREADING = {
    "scores multiplied by 0": (WHOLE, [("gl.where(b_ds > 0.0, b_s, 0.0)", "b_s")]),
    "values multiplied by 0": (WHOLE, [READ]),
    "values multiplied by read zeros": (SPLIT, [READ]),
    "columns of the head before multiplied by 0": (
        NARROW,
        [
            (
                "gl.where(o_c < before, 0.0, x_s.load(layout))",
                "(x_s.load(layout) * (o_c >= before).to(gl.float32)).to(x_s.dtype)",
            )
        ],
    ),
}


def plant(folder: Path, edits: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the sweep run what changes make of its kernel's text."""
    text = hopper.SOURCE
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "mutant.py"
    path.write_text(text, encoding="utf-8")
    kernel = module_at(path, "generated.retention.mutant").fused_chunk_hopper_kernel
    _, *rest = hopper.gluon_parts()
    monkeypatch.setattr(hopper, "gluon_parts", lambda: (kernel, *rest))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_its_proof_finds_every_fault(fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (K, config), edits = FAULTS[fault] if fault else (WHOLE, [("b_h1 *= b_dh", "b_h1 = b_h1 * b_dh")])
    plant(tmp_path, edits, monkeypatch)
    problem = replace(PROBLEM, T=640, K=K, V=256 if K in (256, 512) else K)
    if fault is None:
        assert 0 < prove(problem, config, {}, "cuda") < error_limit(HOPPER, problem.dtype, problem.T)
        return
    with pytest.raises(ArithmeticError):
        prove(problem, config, {}, "cuda")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("fault", SPREADING)
def test_what_lies_beside_a_sequence_is_seen_where_a_kernel_multiplies_it_by_0(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (K, config), edits = SPREADING[fault]
    plant(tmp_path, edits, monkeypatch)
    assert spreads(config, K)
