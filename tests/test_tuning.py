"""The tuner's parts, without a GPU: the loop with a judge that knows the answer, search, rules, processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from fakes import NEEDS, PROBLEM, SM90, Judge, Pool, candidates, landscape, promise, steep, timing, tune

from generated import configuration
from generated.configuration_file import parse_file
from generated.retention.chunk import ChunkConfig
from generated.retention.step import goes_by_in_pieces
from tuning import compile_pool, device, forkserver, measurement, proof, rules
from tuning import run as run_module
from tuning.__main__ import main
from tuning.compilation import ARCHS, Resources
from tuning.compile_pool import CompilePool, compile_key
from tuning.coverage import Point
from tuning.funnel import Funnel
from tuning.measurement import Gpu, MeasurementError, Measurer
from tuning.model import RATES, predict
from tuning.problems import FORMS, GRADIENTS, HOPPER, PLAIN, STEP_FORMS, STEPS, Problem, StepInputs, problems_of
from tuning.rules import Entry
from tuning.search import EFFORTS, Effort
from tuning.space import knob_values
from tuning.tuner import AHEAD, Tuner, likely_first
from tuning.winners import HELD, MODEL_NOISE, NOISE, Winner
from tuning.workloads import WorkloadError, builtin, parse

# The loop


def test_the_best_of_a_known_landscape_is_found() -> None:
    judge = Judge()
    winner = tune(judge).winners[PROBLEM]
    assert winner.config == min(candidates(), key=landscape)
    assert (winner.ms, winner.default_ms, winner.error) == (1.0, landscape(PROBLEM.default()), 0.001)
    assert len(judge.timed) == len(set(judge.timed)) == len({*candidates(), PROBLEM.default()})


def test_a_good_one_is_found_with_little_effort() -> None:
    winner = tune(Judge(), effort=Effort(10, 4, 5, 3)).winners[PROBLEM]
    assert winner.ms <= sorted(map(landscape, candidates()))[6]


def test_candidates_that_cannot_be_measured_are_named_and_never_win() -> None:
    tuner = tune(Judge(broken=lambda config: config.BT == 32))
    assert tuner.winners[PROBLEM].config.BT != 32
    broken = [config for config in {*candidates(), PROBLEM.default()} if config.BT == 32]
    assert len(tuner.funnel.rejected) == tuner.funnel.failures["ArithmeticError"] == len(broken)
    assert all("'BT': 32" in line and "wrong result" in line for line in tuner.funnel.rejected)


def test_nothing_wins_where_nothing_can_be_measured() -> None:
    tuner = tune(Judge(broken=lambda config: True))
    assert tuner.winners == {}


def test_next_best_wins_where_the_best_cannot_be_proven() -> None:
    best, second = sorted(candidates(), key=landscape)[:2]
    tuner = tune(Judge(lambda c: landscape(c) + (c == second) * 1e-9, unproven=lambda config: config == best))
    assert tuner.winners[PROBLEM].ms == pytest.approx(landscape(second))
    assert [line for line in tuner.funnel.rejected if "at the full shape" in line]


@pytest.mark.parametrize("which", ["states", "packed"])
@pytest.mark.parametrize("needs", [replace(NEEDS, shared=SM90.shared + 1), "CompilationError: no"], ids=["large", "no"])
def test_what_does_not_fit_with_states_or_packed_does_not_win(which: str, needs: Resources | str) -> None:
    best = min(candidates(), key=landscape)
    pool = Pool(needs=lambda problem, config, variant: needs if (variant, config) == (which, best) else NEEDS)
    tuner = tune(Judge(), pool=pool)
    assert tuner.winners[PROBLEM].config != best
    assert [line for line in tuner.funnel.rejected if f": {which}: " in line]


def test_what_does_not_compile_or_fit_is_not_timed() -> None:
    def needs(problem: Problem, config: Any, variant: str) -> Resources | str:
        return {16: "CompilationError: no", 32: replace(NEEDS, shared=SM90.shared + 1)}.get(config.BT, NEEDS)

    judge = Judge()
    tuner = tune(judge, pool=Pool(needs=needs))
    assert {config.BT for config in judge.timed} == {64, 128}
    assert set(tuner.funnel.failures) == {"CompilationError", "shared memory"}


def test_model_recommends_nothing_that_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    promise(monkeypatch, steep)
    pool = Pool(needs=lambda problem, config, states: replace(NEEDS, spills=8 * (config.num_warps == 8)))
    assert tune(Judge(steep, modelled=True), pool=pool).winners[PROBLEM].config.num_warps == 4
    assert tune(Judge(steep, modelled=False), pool=pool).winners[PROBLEM].config.num_warps == 8
    everything = Pool(needs=lambda problem, config, states: replace(NEEDS, spills=8))
    assert tune(Judge(steep, modelled=True), pool=everything).winners == {}


@pytest.mark.parametrize("use", [PROBLEM.default(), min(candidates(), key=landscape)], ids=["default", "best"])
def test_for_a_model_nothing_is_compiled_that_cannot_replace_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    compiled: set[Any] = set()

    def needs(problem: Problem, config: Any, variant: str) -> Resources:
        compiled.add(config)
        return NEEDS

    promise(monkeypatch, steep)
    judge = Judge(steep, modelled=True)
    tuner = tune(judge, pool=Pool(needs=needs), incumbents=lambda problem: [use])
    able = {config for config in candidates() if steep(config) < (1 - MODEL_NOISE) * steep(use)}
    assert (len(able) > 1) == (use == PROBLEM.default())
    assert compiled == set(judge.timed) == {*able, use, PROBLEM.default()}
    assert tuner.funnel.compiled == len(compiled)
    assert tuner.funnel.dropped["too little promised"] == len({*candidates()} - compiled)


@pytest.mark.parametrize(("gain", "stays"), [(HELD / 2, True), (HELD * 2, False)])
def test_incumbent_stays_unless_it_is_beaten_beyond_the_noise(gain: float, stays: bool) -> None:
    incumbent, challenger = candidates()[:2]
    times = {challenger: 1.0 - gain, incumbent: 1.0}
    tuner = tune(Judge(lambda config: times.get(config, 2.0)), incumbents=lambda problem: [incumbent])
    assert (tuner.winners[PROBLEM].config == incumbent) is stays


def test_default_does_not_replace_the_incumbent_within_the_noise() -> None:
    incumbent = next(config for config in candidates() if config != PROBLEM.default())
    times = {PROBLEM.default(): 1.0 - NOISE / 2, incumbent: 1.0}
    tuner = tune(Judge(lambda config: times.get(config, 2.0)), incumbents=lambda problem: [incumbent])
    assert tuner.winners[PROBLEM].config == incumbent


def test_interrupt_keeps_what_was_found() -> None:
    judge = Judge(stop_after=7)
    tuner = tune(judge, problems=[PROBLEM, replace(PROBLEM, K=128)])
    assert tuner.interrupted
    assert tuner.unfinished == 2
    assert tuner.winners[PROBLEM].ms == min(map(landscape, judge.timed))


def test_interrupt_leaves_a_rule_that_nothing_was_raced_against() -> None:
    incumbent, lucky = candidates()[3], candidates()[0]
    times = {incumbent: 1.0, lucky: 0.5}
    judge = Judge(lambda config: times.get(config, 2.0), stop_after=20)
    tuner = tune(judge, incumbents=lambda problem: [incumbent])
    assert tuner.interrupted
    assert lucky in judge.timed
    assert (tuner.winners[PROBLEM].config, tuner.funnel.flipped) == (incumbent, 0)


def test_interrupt_while_proving_keeps_what_was_proven() -> None:
    judge, calls = Judge(), iter([0.001])

    def prove(*arguments: Any) -> float:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    judge.prove = prove  # type: ignore[method-assign]
    tuner = tune(judge, problems=[PROBLEM, replace(PROBLEM, K=128)])
    assert (list(tuner.winners), tuner.interrupted) == ([PROBLEM], True)


def test_deadline_ends_the_search_after_the_first_result() -> None:
    judge = Judge()
    tuner = tune(judge, seconds=-1.0)
    assert len(judge.timed) == tuner.unfinished == 1
    assert tuner.winners[PROBLEM].config == PROBLEM.default()


def test_deadline_cuts_all_searches_short_of_which_candidates_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, problems = Judge(), [replace(PROBLEM, K=K) for K in (32, 64, 128, 256)]
    monkeypatch.setattr(Tuner, "seconds_left", lambda tuner: 100.0 if len(judge.timed) < 8 else 0.0)
    tuner = tune(judge, problems=problems)
    assert tuner.unfinished == len(problems)
    assert all(found.cut_short for found in tuner.found.values())
    assert 8 <= len(judge.timed) <= 8 + AHEAD + 1


def test_two_candidates_of_a_search_are_handed_over_where_the_gpu_would_wait() -> None:
    under_way = most = 0

    class Watching(Judge):
        def begin(self, *job: Any) -> Callable[[], Any]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            return partial(self.answer, super().begin(*job))

        def answer(self, run: Callable[[], Any]) -> Any:
            nonlocal under_way
            under_way -= 1
            return run()

    judge = Watching()
    tuner = tune(judge)
    assert most == 2
    assert len(judge.timed) == len(set(judge.timed)) == tuner.funnel.timed == len(candidates())
    assert tuner.winners[PROBLEM].config == min(candidates(), key=landscape)


def test_the_measuring_process_is_renewed_for_the_last_races_alone() -> None:
    judge = Judge()
    tune(judge, problems=[PROBLEM, replace(PROBLEM, K=128)])
    assert judge.renewed == 1


def test_deadline_does_not_wait_for_the_compiler() -> None:
    class Stuck(Pool):
        """Only the default comes out of the compiler."""

        def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
            return super().submit(problem, config, variant=variant) if config == problem.default() else Future()

    pool, started = Stuck(), time.monotonic()
    tuner = tune(Judge(), pool=pool, seconds=0.2)
    assert time.monotonic() - started < 5
    assert tuner.unfinished == 1
    assert list(tuner.winners) == [PROBLEM]


def test_what_is_compiled_is_proven_while_the_gpu_waits_for_the_compiler() -> None:
    slow, late = replace(PROBLEM, K=128), list[Future[Any]]()

    class Busy(Pool):
        """From when a proof's launches are asked for; what is slow comes out once something was proven."""

        def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
            if variant != PLAIN:
                self.outstanding = lambda: 100  # type: ignore[method-assign]
            if problem != slow or config == problem.default() or proven:
                return super().submit(problem, config, variant=variant)
            late.append(Future())
            return late[-1]

    class Proving(Judge):
        def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float | None:
            proven.append(problem)
            while late:
                late.pop().set_result(NEEDS)
            return super().prove(problem, config, extra)

    proven: list[Problem] = []
    tuner = tune(Proving(), problems=[PROBLEM, slow], pool=Busy(), seconds=20.0)
    assert (proven, tuner.unfinished) == ([PROBLEM, slow], 0)
    assert {problem: winner.config for problem, winner in tuner.winners.items()} == {
        problem: min(candidates(problem), key=landscape) for problem in (PROBLEM, slow)
    }


def test_incumbent_that_was_not_tried_in_time_is_not_replaced() -> None:
    first, other = PROBLEM, replace(PROBLEM, K=128)
    tuner = tune(Judge(stop_after=1), problems=[first, other], incumbents=lambda problem: candidates(problem)[:2])
    assert tuner.interrupted
    assert tuner.winners == {}


def test_what_waiting_searches_will_begin_with_is_compiled_before_anything_is_measured() -> None:
    problem, states = replace(PROBLEM, form="chunk"), replace(PROBLEM, form="chunk_states")
    events: list[tuple[Problem, Any]] = []
    measured = 0

    class Watching(Judge):
        def time(self, *arguments: Any) -> Any:
            nonlocal measured
            measured = measured or len(events)
            return super().time(*arguments)

    class Compiler(Pool):
        def submit(self, problem: Problem, config: Any, **options: Any) -> Future[Any]:
            events.append((problem, config))
            return super().submit(problem, config, **options)

    tune(Watching(), problems=[problem, states], effort=Effort(10, 2, 5, 3), pool=Compiler())
    assert {config for one, config in events[:measured] if one == states} >= {states.default()}
    assert {config for one, config in events[:measured] if one == problem} == {
        problem.default(),
        *likely_first(problem, SM90)[:10],
    }


@pytest.mark.parametrize(
    ("compiled", "seconds", "late"),
    [(20, 1.0, True), (200, 30.0, True), (225, 30.0, False), (22, 0.01, False), (230, 1000.0, False)],
)
def test_more_is_compiled_ahead_where_the_compiler_would_end_after_the_gpu(
    compiled: int, seconds: float, late: bool
) -> None:
    """Ten searches of 20 measurements: 230 candidates, which the GPU takes 3 seconds for."""
    pool = Pool()
    pool.outstanding = lambda: pool.submitted - compiled  # type: ignore[method-assign]
    tuner = Tuner(Judge(), pool, SM90, Effort(10, 2, 5, 3, compiled=23), 0.0, lambda _: [], lambda *_: None)  # type: ignore[arg-type]
    assert tuner._compiler_is_late(10, seconds) is late


def test_what_a_slow_compiler_gets_ahead_ends_with_the_candidates() -> None:
    class Slow(Pool):
        submitted = 0

        def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
            time.sleep(0.001)
            return super().submit(*arguments, **options)

    tuner = tune(Judge(), effort=Effort(10, 2, 5, 3, compiled=23), pool=Slow())
    assert tuner.winners[PROBLEM].config == min(candidates(), key=landscape)


def test_what_fused_chunk_was_measured_with_is_not_measured_again_as_chunk() -> None:
    class Told(Pool):
        """Says what code a launch comes to."""

        def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(self.result(problem, config))
            return future

        def result(self, problem: Problem, config: Any, **options: Any) -> Any:
            return replace(NEEDS, digest=repr(compile_key(problem, config)))

    whole = replace(PROBLEM, form="chunk")
    judge = Judge()
    tuner = tune(judge, problems=[PROBLEM, whole], pool=Told(), effort=Effort(20, 2, 5, 3))
    tiles = {(config.BT, config.BV, config.num_warps, config.num_stages, config.maxnreg, config.descriptors)
             for config in judge.timed if not hasattr(config, "L")}  # fmt: skip
    again = [config for config in judge.timed if getattr(config, "L", 0) >= PROBLEM.T]
    assert all((c.BT, c.BV, c.num_warps, c.num_stages, c.maxnreg, c.descriptors) not in tiles for c in again)
    assert tuner.funnel.same_code > 0
    assert list(tuner.winners) == [PROBLEM, whole]


def test_chunk_runs_with_the_states_pass_that_won() -> None:
    problem = replace(PROBLEM, form="chunk")
    seen: list[dict[str, Any]] = []

    class Watching(Judge):
        def time(self, problem: Problem, config: Any, needs: Resources, stop_above_ms: float, extra: Any) -> float:
            if problem.form == "chunk":
                seen.append(extra)
            return super().time(problem, config, needs, stop_above_ms, extra)

    class Compiler(Pool):
        def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
            if problem.form == "chunk":
                seen.append(extra)
            return super().submit(problem, config, variant=variant)

    states = replace(PROBLEM, form="chunk_states")
    tuner = tune(Watching(), problems=[problem, states], effort=Effort(10, 2, 5, 3), pool=Compiler())
    measured_with = [extra for extra in seen if extra]  # nothing yet, where the search was only going to begin
    assert measured_with
    assert all(extra["states_config"] == tuner.winners[states].config for extra in measured_with)
    assert list(tune(Judge(), problems=[problem], effort=Effort(5, 0, 0, 3)).winners) == [problem]


# Rules

USE = {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 2}
FIGURES = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}


def entry(T: int = 1024, proof: str = "measured", kernel: str = PROBLEM.kernel, **use: int) -> Entry:
    point = Point("bfloat16", 16, 16, 64, T)
    return Entry(kernel, point, USE | use, proof, FIGURES | {"point": f"K=16 V=16 BH=64 T={T}"})


def write(path: Path, *entries: Entry, device: dict[str, Any] | None = None) -> None:
    rules.write(path, rules.document(list(entries), device or {"arch": "sm90"}, None))


def test_merge_replaces_the_same_point_and_keeps_the_others() -> None:
    merged = rules.merge([entry(64), entry(1024)], [entry(1024, BT=16), entry(9999)])
    assert [(e.point.T, e.use["BT"]) for e in merged] == [(64, 64), (1024, 16), (9999, 64)]


def test_tuners_that_write_one_file_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.yaml"
    lengths = [2**n for n in range(5, 17)]
    with ThreadPoolExecutor(len(lengths)) as threads:
        list(threads.map(lambda T: rules.update(path, [entry(T)], {"arch": "sm90"}, None), lengths))
    assert sorted(e.point.T for e in rules.existing_entries(path)) == lengths
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="another GPU"):
        rules.update(path, [entry(99)], {"arch": "sm80"}, None)
    assert sorted(e.point.T for e in rules.existing_entries(path)) == lengths


def test_entries_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.yaml"
    write(path, entry(64), entry(1024))
    assert rules.existing_entries(path) == [entry(64), entry(1024)]
    assert rules.config_from(entry()) == type(PROBLEM.default())(**USE)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("source: ", "source: x"),
        ("BT: 64", "BT: 63"),
        ("kernels:", "kernels: ["),
        ("point: K=16", "point: K=x"),
        ("retention_fused_chunk", "retention_unheard_of"),
    ],
    ids=["stale", "bad knob", "broken", "no point", "unknown kernel"],
)
def test_entries_that_do_not_hold_are_dropped(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.yaml"
    write(path, entry())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert rules.existing_entries(path) == []
    assert rules.former_entries(path) == ([entry()] if new == "source: x" else [])
    assert rules.existing_entries(tmp_path / "absent.yaml") == rules.former_entries(tmp_path / "absent.yaml") == []


def won(form: str, ms: float, **changes: int) -> Winner:
    problem = replace(PROBLEM, form=form, **{"V": PROBLEM.K, **changes})
    return Winner(problem, problem.default(), timing(ms), 100.0, 0.001, NEEDS, 9, modelled=False)


TUNED = [won("fused_chunk", 3.0), won("chunk", 4.0), won("parallel", 2.0), won("chunk_states", 0.1)]


def test_forms_that_change_are_counted_too() -> None:
    forms = rules.form_entries([won(GRADIENTS, 5.8), *TUNED])
    known = [replace(entry, use={"form": "chunk"}) for entry in forms if entry.use == {"form": "parallel"}]
    funnel = Funnel()
    run_module._count_forms(funnel, forms, known)
    assert (funnel.compared, funnel.flipped) == (1, 1)
    run_module._count_forms(funnel, forms, forms)
    assert (funnel.compared, funnel.flipped) == (3, 1)


@pytest.mark.parametrize(
    ("together", "form", "ms"), [(5.8, "fused_chunk", 5.8), (5.9, "sweeps", 6.0), (6.1, "sweeps", 6.0)]
)
def test_gradients_share_a_launch_where_it_is_faster_than_three_of_the_fastest_sweep(
    together: float, form: str, ms: float, tmp_path: Path
) -> None:
    found = rules.form_entries([won(GRADIENTS, together), *TUNED])
    assert {entry.kernel: entry.use for entry in found} == {
        "retention_form": {"form": "parallel"},
        "retention_form_gradients": {"form": form},
    }
    assert [entry.point for entry in found] == [Point("bfloat16", 64, 64, 64, 1024)] * 2
    assert [(entry.figures["ms"], entry.figures["default_ms"]) for entry in found] == [
        (2.0, 3.0),
        (ms, 6.0),
    ]  # chunk's launch is fused_chunk's
    assert [entry.figures["trials"] for entry in found] == [3, 2]
    write(tmp_path / "a.yaml", *found)
    assert rules.existing_entries(tmp_path / "a.yaml") == found
    assert [rules.config_from(entry).form for entry in found] == ["parallel", form]


@pytest.mark.parametrize(
    "winners",
    [
        TUNED,
        [*TUNED, won(GRADIENTS, 0.1, K=128, V=128)],
        [*TUNED, won(GRADIENTS, 0.1, T=2048)],
        [TUNED[0], won(GRADIENTS, 0.1)],
        [won(GRADIENTS, 0.1)],
        [replace(winner, modelled=True) for winner in [won(GRADIENTS, 0.1), TUNED[0], TUNED[2]]],
    ],
    ids=["no gradients", "another width", "another length", "one sweep", "no sweep", "modelled"],
)
def test_no_way_to_the_gradients_is_chosen_where_there_are_not_both(winners: list[Winner]) -> None:
    kernels = [entry.kernel for entry in rules.form_entries(winners)]
    assert kernels == (["retention_form"] if len(winners) >= len(TUNED) else [])


def in_segments(winner: Winner) -> Winner:
    """The same with a chunk that stores states, which is no launch of fused_chunk's."""
    return replace(winner, config=replace(winner.config, L=256))


@pytest.mark.parametrize(
    ("held", "fused", "chosen"),
    [
        (None, 3.98, "chunk"),
        (None, 3.9, "fused_chunk"),
        ("fused_chunk", 4.03, "fused_chunk"),
        ("fused_chunk", 4.1, "chunk"),
        ("chunk", 3.9, "chunk"),  # 2.6 %: what a configuration that is in use, and shared, may be behind
        ("chunk", 3.87, "fused_chunk"),
    ],
)
def test_between_forms_within_the_noise_what_is_in_use_stays_or_else_the_default(
    held: str | None, fused: float, chosen: str
) -> None:
    winners = [won("fused_chunk", fused, T=2048), in_segments(won("chunk", 4.0, T=2048))]
    (found,) = rules.form_entries(winners)
    known = [replace(found, use={"form": held})] if held else []
    (again,) = rules.form_entries(winners, known)
    assert again.use == {"form": chosen}
    assert rules.form_entries(reversed(winners), [again]) == [again]


def test_forms_that_come_to_one_launch_are_as_fast_as_each_other() -> None:
    chunk, fused = in_segments(won("chunk", 4.0, T=2048)), won("fused_chunk", 3.0, T=2048)
    whole = replace(chunk, config=replace(chunk.config, L=1 << 20))
    for winner, config, held, chosen in (
        (whole, whole.config.whole, None, "chunk"),
        (whole, whole.config.whole, "fused_chunk", "fused_chunk"),
        (whole, replace(whole.config.whole, num_warps=8), "chunk", "fused_chunk"),
        (chunk, chunk.config.whole, "chunk", "fused_chunk"),
    ):
        winners = [winner, replace(fused, config=config)]
        (found,) = rules.form_entries(winners)
        known = [replace(found, use={"form": held})] if held else []
        assert [entry.use for entry in rules.form_entries(winners, known)] == [{"form": chosen}]


def test_sweeps_of_one_launch_take_its_best_time_where_gradients_are_chosen() -> None:
    chunk = won("chunk", 4.0, T=2048)
    whole = replace(chunk, config=replace(chunk.config, L=1 << 20))
    fused = replace(won("fused_chunk", 3.0, T=2048), config=whole.config.whole)
    other, together = won("parallel", 9.0, T=2048), won(GRADIENTS, 10.0, T=2048)
    for winners in itertools.permutations([whole, fused, other, together]):
        form, gradients = rules.form_entries(winners)
        assert (form.use, form.figures["ms"], form.figures["default_ms"]) == ({"form": "chunk"}, 3.0, 3.0)
        assert (gradients.use, gradients.figures["ms"]) == ({"form": "sweeps"}, 9.0)
    held = [replace(form, use={"form": "parallel"})]
    for winners in itertools.permutations([whole, fused, other]):
        assert [entry.use for entry in rules.form_entries(winners, held)] == [{"form": "chunk"}]


@pytest.mark.parametrize(("ms", "chosen"), [(2.0, []), (4.0, []), (4.5, [{"form": "chunk"}])])
def test_form_that_was_not_tuned_now_stays_unless_its_figures_are_beaten(ms: float, chosen: list[Any]) -> None:
    winners = [won("fused_chunk", 4.2), won("chunk", 4.0)]
    (found,) = rules.form_entries(winners)
    known = [replace(found, use={"form": "parallel"}, figures={**found.figures, "ms": ms})]
    assert [entry.use for entry in rules.form_entries(winners, known)] == chosen


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    write(path, entry())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write(path, entry(BT=16))
    with pytest.raises(ValueError, match="spills"):  # what cannot be read back is not written
        write(path, replace(entry(), figures=FIGURES | {"spills": -1}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def chosen(T: int = 1024) -> Any:
    configuration.reload()
    shape = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "K": 16, "V": 16, "BH": 64, "T": T}
    return configuration.select_config(PROBLEM.kernel, type(PROBLEM.default()), None, **shape)


@pytest.mark.filterwarnings("ignore::generated.configuration.ConfigurationWarning")
def test_written_rule_is_used_and_a_measured_one_beats_a_modelled_one(only_this_directory: Path) -> None:
    assert chosen() is None
    write(only_this_directory / "a.yaml", entry(proof="modelled", BT=16))
    assert chosen() == type(PROBLEM.default())(**USE | {"BT": 16})
    assert chosen(T=1024 * 4) is None
    write(only_this_directory / "b.yaml", entry(BT=128), device={"arch": "sm90", "name": "Another"})
    assert chosen().BT == 128


# Workloads


def test_every_builtin_workload_has_problems_of_every_form() -> None:
    assert len(builtin()) >= 9
    assert {workload.K == workload.V for workload in parse([])} == {True, False}
    for workload in parse([]):
        for form in FORMS:
            found = problems_of(workload, form)
            widths = {(workload.K, workload.V), (workload.V, workload.K)}
            if form == GRADIENTS and not workload.K == workload.V <= 128:  # whose sweeps have no common launch
                widths = set()
            if form == HOPPER:
                widths = {(K, V) for K, V in widths if K > 128}
            if (form in STEPS) != (workload.T == 1):
                widths = set()
            elif form in STEPS:
                widths = {(workload.K, workload.V)}
            assert len(found) == len(widths)
            assert {(p.K, p.V) for p in found} == widths


SWEEPS = ["fused_chunk", HOPPER, "chunk", "parallel", "fused_recurrent"]


@pytest.mark.parametrize(
    ("forms", "tuned"),
    [
        (["fused_chunk"], ["fused_chunk", GRADIENTS]),
        (["chunk"], ["chunk_states", "chunk", GRADIENTS]),
        (["parallel"], ["parallel"]),
        (["fused_recurrent"], ["fused_recurrent"]),
        (["fused_chunk", "chunk"], ["fused_chunk", GRADIENTS, "chunk_states", "chunk"]),
        (["chunk", "fused_chunk", "chunk"], ["chunk_states", "chunk", GRADIENTS, "fused_chunk"]),
        ([], ["fused_chunk", GRADIENTS, HOPPER, "chunk_states", "chunk", "parallel", "fused_recurrent"]),
    ],
    ids=lambda forms: "+".join(forms) or "all",
)
def test_a_form_is_tuned_with_the_passes_that_it_launches(forms: list[str], tuned: list[str]) -> None:
    equal, unequal = parse(["small", "retnet_1.3b"])
    everywhere = [form for form in tuned if form != HOPPER]
    assert [problem.form for problem in run_module.problems_for([equal], forms, SM90)] == everywhere
    both_ways = [(form, K, V) for form in tuned if form != GRADIENTS for K, V in ((256, 512), (512, 256))]
    assert [(p.form, p.K, p.V) for p in run_module.problems_for([unequal], forms, SM90)] == both_ways
    together = run_module.problems_for([equal, unequal, equal], forms, SM90)
    assert sorted(p.form for p in together) == sorted([*everywhere, *(form for form, _, _ in both_ways)])
    elsewhere = run_module.problems_for([unequal], forms, ARCHS["sm80"])
    assert [p.form for p in elsewhere] == [form for form, _, _ in both_ways if form != HOPPER]


def test_a_step_is_tuned_for_every_kind_of_state_where_tokens_are_few() -> None:
    (decode,) = parse(["retnet_1.3b_b8"])
    for forms, tuned in (([], [*STEPS]), *(([form], parts) for form, parts in STEP_FORMS.items())):
        assert len(STEP_FORMS["step"]) == len(STEP_FORMS["step_buffered"]) == 5
        found = run_module.problems_for([decode, *parse(["small"])], [*forms, "chunk"] if forms else [], SM90)
        steps = [p for p in found if p.form in STEPS]
        assert steps == [Problem(form, "bfloat16", 8, 1, 8, 256, 512) for form in tuned]
        assert {p.T for p in found if p.form not in STEPS} == {1024}
    (few,) = parse(["B=2,T=16,H=3,K=64,V=64"])
    found = {p.form for p in run_module.problems_for([few], [], SM90)}
    assert found & {"chunk", *STEPS} == {"chunk", *STEP_FORMS["step"]}  # others go by the default
    (many,) = parse(["B=128,T=4,H=3,K=64,V=64"])
    assert {p.form for p in run_module.problems_for([many], [], SM90)} & {*STEPS} == {"step"}
    (own,) = parse(["B=2,T=1,H=3,K=64,V=64,form=step_buffered"])
    assert {p.form for p in run_module.problems_for([own], [], SM90)} == {*STEP_FORMS["step_buffered"]}
    long = parse(["B=2,T=17,H=3,K=64,V=64"])
    for forms, workloads in ((["chunk"], [decode]), (["step"], long), (["step_buffered"], long), (["step"], [own])):
        with pytest.raises(WorkloadError, match="nothing to tune"):
            run_module.problems_for(workloads, forms, SM90)


@pytest.mark.parametrize("form", STEP_FORMS["step"])
def test_a_proof_of_a_steps_rule_launches_what_rules_are_for(form: str) -> None:
    """States in registers, also of groups: those that go by in pieces know no rules."""
    problem = Problem(form, "bfloat16", 1, 1, 1, 64, 512)
    heads, size = len(proof.STEP_ROWS) * len(proof.RATES), STEPS[form].dtype.itemsize
    found = [(draw, draw.lengths[0] * draw.group) for draw in proof.draws(problem, problem.default())]
    assert max(outputs for _, outputs in found) == proof.MOST_STEPS
    assert any(draw.group > 1 and not draw.only for draw, _ in found)
    for draw, outputs in found:
        assert not goes_by_in_pieces(outputs, problem.V, heads, size, are_kept="kept" in draw.only)


def test_a_kernel_for_one_architecture_and_some_sizes_is_tuned_there_alone() -> None:
    small, wide, unequal = parse(["small", "wide_256", "retnet_1.3b"])
    found = run_module.problems_for([small, wide, unequal], [HOPPER], SM90)
    assert [(p.form, p.K, p.V) for p in found] == [(HOPPER, 256, 256), (HOPPER, 256, 512), (HOPPER, 512, 256)]


def test_workload_is_given_by_name_or_shape() -> None:
    small, own = parse(["small", "V=512,B=8,T=2048,H=8,K=256,dtype=float16"])
    assert small == builtin()["small"]
    assert own.shape == "B=8 T=2048 H=8 K=256 V=512 float16"
    assert 0 < own.floor_ms(backward=False) < own.floor_ms(backward=True)


MALFORMED = [
    "nope",
    "",
    "=",
    "B=1,T=2,H=3,K=4",
    "B=1,T=2,H=3,K=4,V=5,junk",
    "B=1,B=1,T=2,H=3,K=4,V=5",
    "B=1,T=2,H=3,K=4,V=5,X=6",
    "B=1,T=2,H=3,K=4,V=0",
    "B=1,T=2,H=3,K=4,V=-1",
    "B=1,T=2,H=3,K=4,V=\N{SUPERSCRIPT TWO}",
    "B=1,T=2,H=3,K=4,V=\N{ARABIC-INDIC DIGIT FIVE}",
    "B=1,T=2,H=3,K=4,V=1e2",
    "B=1,T=2,H=3,K=4,V=513",
    f"B=1,T={'9' * 5000},H=3,K=4,V=5",
    "B=2000000000,T=2000000000,H=3,K=4,V=5",
    "B=1,T=2,H=3,K=4,V=5,dtype=float64",
    "B=1,T=2,H=3,K=4,V=5,dtype=float16,dtype=float16",
    "B=1;T=2;H=3;K=4;V=5",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_workload_is_an_error_of_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkloadError, match="workload"):
        parse([text])
    assert main(["run", "--workload", text]) == 2
    assert capsys.readouterr().err.startswith("error: workload ")


# The model


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_estimates_are_positive_for_every_candidate_of_every_space(arch: str) -> None:
    assert set(RATES) == set(ARCHS)
    shapes = [*parse([]), *parse(["B=1,T=1,H=1,K=1,V=1", "B=1,T=33,H=3,K=96,V=512,dtype=float32"])]
    for problem in [problem for shape in shapes for form in FORMS for problem in problems_of(shape, form)]:
        for config in candidates(problem):
            for needs in (None, NEEDS, replace(NEEDS, shared=10**9, spills=100)):
                assert 0 < predict(problem, config, ARCHS[arch], needs) < math.inf


@pytest.mark.parametrize("form", sorted(FORMS))
def test_more_programs_never_take_less_time(form: str) -> None:
    problem = replace(PROBLEM, form=form)
    for config in candidates(problem)[::5]:
        times = [predict(replace(problem, B=B), config, SM90, NEEDS) for B in range(1, 200, 7)]
        assert times == sorted(times)


def test_spills_cost() -> None:
    assert predict(PROBLEM, PROBLEM.default(), SM90, replace(NEEDS, spills=64)) > predict(
        PROBLEM, PROBLEM.default(), SM90, NEEDS
    )


# The check against float64


def test_a_steps_inputs_are_a_pool_with_free_slots_and_rows_of_their_own_in_it() -> None:
    for form, kind in STEPS.items():
        problem = Problem(form, "bfloat16", B=5, T=2, H=3, K=8, V=16)
        x = StepInputs.of(form, problem.inputs("cpu"))
        assert (x.q.shape, x.k.shape, x.v.shape) == ((5, 2, 3, 8), (5, 2, 3, 8), (5, 2, 3, 16))
        assert (x.state.dtype, x.seed is not None, len(x.g_gamma)) == (kind.dtype, kind.is_seeded, 3)
        assert len(x.state) > len(set(x.slots.tolist())) == 5
        assert [pool.shape[:3] for pool in x.buffers] == [(len(x.state), 32, 3)] * (2 * kind.is_buffered)
        assert all(one is other for one, other in zip(x.listed, StepInputs.of(form, x.listed).listed, strict=True))
        assert [(x.shape, x.dtype) for x in problem.inputs("meta")] == [
            (x.shape, x.dtype) for x in problem.inputs("cpu")
        ]
        passes = 1 if kind.is_buffered else 2
        assert problem.floor_ms("NVIDIA H100") == passes * 5 * 3 * 8 * 16 * kind.dtype.itemsize / 3.0e9


@pytest.mark.parametrize(
    ("B", "held"), [(1, [8]), (2, [4, 12]), (4, [2, 6, 10, 14]), (16, [*range(1, 17)]), (40, None)]
)
def test_a_buffered_steps_rows_fold_in_turn(B: int, held: list[int] | None) -> None:
    form = "step_buffered"
    x = StepInputs.of(form, Problem(form, "bfloat16", B, T=1, H=1, K=8, V=8).inputs("cpu"))
    lengths, folded = x.counts
    found = sorted((lengths - folded).tolist())
    assert found == (held or found)
    assert found.count(16) == B // 16
    assert {*found} == {*range(1, 17)} or B < 16
    lengths, folded = x.all_folding.counts
    assert (lengths - folded).tolist() == [16] * B


def test_a_step_is_held_against_the_right_outputs_and_states() -> None:
    problem = Problem("step", "float32", B=3, T=4, H=2, K=5, V=6)
    q, k, v, state, slots, rates = inputs = problem.inputs("cpu")
    expected = oracle.solve(oracle.Problem(q, k, v, torch.zeros_like(v), g_gamma=rates, h0=state[slots]))
    o, pool = device.reference(problem, inputs)
    assert oracle.errors(o, expected["o"])[0] < 1e-12
    assert oracle.errors(pool[slots], expected["final_state"])[0] < 1e-12
    free = [slot for slot in range(len(state)) if slot not in slots]
    assert torch.equal(pool[free], state[free].double())


@pytest.mark.parametrize("T", [1, 4])
def test_a_buffered_step_is_held_against_the_right_outputs_states_and_buffers(T: int) -> None:
    form = "step_buffered"
    problem = Problem(form, "float32", B=16, T=T, H=2, K=5, V=6)
    x = StepInputs.of(form, problem.inputs("cpu"))
    o, *buffers, pool = device.reference(problem, x.listed)
    final = x.state.double()
    for n, (slot, last, first) in enumerate(
        zip(x.slots.tolist(), *(count.tolist() for count in x.counts), strict=True)
    ):
        rows = [p % 32 for p in range(first, last + T)]
        k, v = (
            torch.cat([buffer[slot, rows[: last - first]], new[n]])[None]
            for buffer, new in zip(x.buffers, (x.k, x.v), strict=True)
        )
        q = torch.cat([torch.zeros(last - first, 2, 5), x.q[n]])[None]
        given = oracle.Problem(q, k, v, torch.zeros_like(v), g_gamma=x.g_gamma, h0=x.state[slot][None])
        assert oracle.errors(o[n], oracle.solve(given)["o"][0, last - first :])[0] < 1e-12
        for buffer, new in zip(buffers, (k, v), strict=True):
            assert torch.equal(buffer[slot, rows], new[0])
        if last - first + T > 16:
            alone = replace(given, **{name: getattr(given, name)[:, : last - first] for name in ("q", "k", "v", "do")})
            final[slot] = oracle.solve(alone)["final_state"][0]
    assert oracle.errors(pool, final)[0] < 1e-12
    assert not torch.equal(pool, x.state.double())
    taken = torch.zeros(len(x.state), 32, dtype=torch.bool)
    for n, slot in enumerate(x.slots.tolist()):
        taken[slot, [(int(x.counts[0][n]) + t) % 32 for t in range(T)]] = True
    for buffer, before in zip(buffers, x.buffers, strict=True):
        assert torch.equal(buffer[~taken], before[~taken])


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_in_one_launch_are_held_against_the_right_ones(reverse: bool) -> None:
    problem = Problem(GRADIENTS, "float32", B=2, T=200, H=3, K=8, V=8)
    q, k, v, do, g_gamma = inputs = problem.inputs("cpu")
    expected = oracle.solve(oracle.Problem(q, k, v, do, g_gamma=g_gamma, reverse=reverse))
    got = device.reference(problem, inputs, reverse=reverse)
    for name, x in zip(("dq", "dk", "dv"), got, strict=True):
        assert x.dtype == torch.float64
        assert oracle.errors(x, expected[name])[0] < 1e-12, name


# Processes. What follows runs in children, which import it from here.


def child_that_dies(pipe: Connection) -> None:
    pipe.send(device.Answer("ok", Gpu("Pretended", "sm90", 1, 1, "0")))
    job = pipe.recv()
    if job[2].BT == 32:
        os._exit(1)
    pipe.send(device.Answer("ok", timing(float(os.getpid()))))
    with contextlib.suppress(EOFError):
        pipe.recv()


def child_that_hangs(pipe: Connection) -> None:
    pipe.send(device.Answer("ok", Gpu("Pretended", "sm90", 1, 1, "0")))
    time.sleep(1000)


@pytest.fixture
def measurer_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Measurer]]:
    made: list[Measurer] = []

    def make(child: Any) -> Measurer:
        monkeypatch.setattr(device, "serve", child)
        made.append(Measurer())
        return made[-1]

    yield make
    for measurer in made:
        measurer.close()


def test_child_that_dies_is_an_error_of_that_job_alone(measurer_of: Callable[[Any], Measurer]) -> None:
    measurer = measurer_of(child_that_dies)
    config = PROBLEM.default()
    with pytest.raises(MeasurementError, match="died"):
        measurer.measure(PROBLEM, replace(config, BT=32), math.inf, {})
    timing = measurer.measure(PROBLEM, replace(config, BT=64), math.inf, {})
    assert timing.ms == measurer._process.pid


def test_jobs_that_are_asked_for_at_once_are_answered_in_their_order(measurer_of: Callable[[Any], Measurer]) -> None:
    measurer, config = measurer_of(echo_child), PROBLEM.default()
    first, second = (measurer.begin(PROBLEM, replace(config, BT=BT), math.inf, {}) for BT in (16, 32))
    assert measurer.measure(PROBLEM, replace(config, BT=64), math.inf, {}) == 64
    assert (second(), first()) == (32, 16)


@pytest.mark.parametrize("fatal", [16, 32])
def test_what_follows_a_job_that_kills_the_child_is_answered_by_another(
    measurer_of: Callable[[Any], Measurer], fatal: int
) -> None:
    measurer, config = measurer_of(echo_child_with_a_fault), PROBLEM.default()
    asked = {BT: measurer.begin(PROBLEM, replace(config, BT=BT), fatal, {}) for BT in (16, 32, 64)}
    for BT, answer in asked.items():
        if fatal == BT:
            with pytest.raises(MeasurementError, match="died"):
                answer()
        else:
            assert answer() == BT


def echo_child_with_a_fault(pipe: Connection) -> None:
    pipe.send(device.Answer("ok", Gpu("Fake GPU", "sm90", 132, 80, "580.1")))
    while True:
        _, _, config, fatal, *_ = pipe.recv()
        if fatal == config.BT:
            os._exit(1)
        pipe.send(device.Answer("ok", config.BT))


def test_a_job_has_its_time_from_when_the_one_before_it_has_ended(
    measurer_of: Callable[[Any], Measurer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measurement.DEADLINES, "measure", 1.0)
    measurer, config = measurer_of(slow_child), PROBLEM.default()
    asked = [measurer.begin(PROBLEM, replace(config, BT=BT), math.inf, {}) for BT in (16, 32, 64)]
    assert [answer() for answer in asked] == [16, 32, 64]


def slow_child(pipe: Connection) -> None:
    pipe.send(device.Answer("ok", Gpu("Fake GPU", "sm90", 132, 80, "580.1")))
    while True:
        _, _, config, *_ = pipe.recv()
        time.sleep(0.6)
        pipe.send(device.Answer("ok", config.BT))


def test_child_that_hangs_is_killed(measurer_of: Callable[[Any], Measurer], monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = measurer_of(child_that_hangs)
    monkeypatch.setitem(measurement.DEADLINES, "prove", 0.3)
    process, started = measurer._process, time.monotonic()
    with pytest.raises(MeasurementError, match="hangs"):
        measurer.prove(PROBLEM, PROBLEM.default(), {})
    assert time.monotonic() - started < 10
    assert not process_exists(process.pid)


def test_interrupted_job_leaves_no_answer_for_the_next(
    measurer_of: Callable[[Any], Measurer], monkeypatch: pytest.MonkeyPatch
) -> None:
    measurer = measurer_of(child_that_dies)
    first = measurer._process.pid

    def interrupt(seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        measurer, "_pipe", type("Pipe", (), {"send": lambda *a: None, "poll": lambda *a: interrupt(0)})()
    )
    with pytest.raises(KeyboardInterrupt):
        measurer.measure(PROBLEM, PROBLEM.default(), math.inf, {})
    timing = measurer.measure(PROBLEM, replace(PROBLEM.default(), BT=64), math.inf, {})
    assert first != timing.ms == measurer._process.pid


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("moment", ["_start", "_send"])
def test_an_answer_that_an_interrupt_left_behind_is_nobodys(
    measurer_of: Callable[[Any], Measurer], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    measurer, config = measurer_of(echo_child), PROBLEM.default()
    with monkeypatch.context() as patch:
        if moment == "_start":
            measurer.renew()
            patch.setattr(measurer, "_hear", interrupted)
        else:
            send = measurer._pipe.send
            patch.setattr(measurer._pipe, "send", lambda job: (send(job), interrupted()))
        with pytest.raises(KeyboardInterrupt):
            measurer.begin(PROBLEM, replace(config, BT=128), math.inf, {})
    assert measurer.measure(PROBLEM, replace(config, BT=64), math.inf, {}) == 64


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def echo_child(pipe: Connection) -> None:
    """Answers with a candidate's BT."""
    pipe.send(device.Answer("ok", Gpu("Fake GPU", "sm90", 132, 80, "580.1")))
    while True:
        _, _, config, *_ = pipe.recv()
        pipe.send(device.Answer("ok", config.BT))


def test_child_without_a_gpu_says_so(measurer_of: Callable[[Any], Measurer]) -> None:
    with pytest.raises(MeasurementError, match=r"CUDA|NVIDIA"):
        measurer_of(device.serve)


def process_exists(pid: int) -> bool:
    """Whether a process still runs; one that ended and waits for its parent does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


TINY = Problem("fused_chunk", "bfloat16", 1, 64, 2, 16, 16)


class Sleeper(Problem):
    """A problem whose compilation never ends."""

    def inputs(self, device: str, seed: int = 0) -> Any:
        while True:
            time.sleep(0.01)


class Stuck(Problem):
    """A problem whose compilation does not even hear the alarm."""

    def inputs(self, device: str, seed: int = 0) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(1000)


class StuckWithAssembler(Stuck):
    """The same, after it has started a process that does not end by itself."""

    def run(self, inputs: Any, config: Any, **options: Any) -> Any:
        with Path(config).open("a") as log:
            log.write(f"{subprocess.Popen(['sleep', '1000']).pid}\n")
        super().inputs("meta")

    def inputs(self, device: str, seed: int = 0) -> Any:
        return Problem.inputs(self, device, seed)


class Crash(Problem):
    """A problem whose compilation ends the process."""

    def inputs(self, device: str, seed: int = 0) -> Any:
        os._exit(1)


class SlowAssembler(Problem):
    """A problem whose configuration comes with the assembler to use."""

    def run(self, inputs: Any, config: Any, **options: Any) -> Any:
        tool, config = config
        os.environ |= {"TRITON_PTXAS_PATH": tool, "TRITON_CACHE_DIR": f"{tool}.cache"}
        return super().run(inputs, config, **options)


def like(kind: type[Problem]) -> Problem:
    return kind(**{name: getattr(TINY, name) for name in ("form", "dtype", "B", "T", "H", "K", "V")})


def test_compilation_over_the_limit_gives_a_reason() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    outcome = compile_pool._compile(like(Sleeper), TINY.default(), "sm90", PLAIN, {}, seconds=1)
    assert outcome.needs == "TimeoutError: compiling took more than 1 s"
    assert signal.getsignal(signal.SIGALRM) == handler


def test_what_is_the_same_kernel_is_compiled_once() -> None:
    chunk, config, extra = replace(PROBLEM, form="chunk"), ChunkConfig(512, 64, 32, 4, 2), {"states_config": 1}
    longer, shorter = replace(chunk, T=2 * chunk.T, B=1), replace(config, L=128)
    assert compile_pool.compile_key(chunk, config, extra) == compile_pool.compile_key(longer, shorter, extra)
    assert compile_pool.compile_key(chunk, config, extra) != compile_pool.compile_key(chunk, config)
    for form, kernels in (("step", 1), ("step_buffered", 2)):  # of which that of one token is one
        step = Problem(form, "bfloat16", 8, 1, 8, 256, 512)
        keys = [compile_pool.compile_key(replace(step, T=T), step.default()) for T in (1, 2, 3, 16)]
        assert len({*keys}) == kernels
    whole = compile_pool.compile_key(chunk, replace(config, L=chunk.T), extra)
    assert whole == compile_pool.compile_key(PROBLEM, config.whole)
    hopper = Problem(HOPPER, "bfloat16", 1, 1024, 8, 256, 512)
    keys = [compile_pool.compile_key(replace(hopper, T=T), hopper.default()) for T in (1024, 2048, 1000)]
    assert keys[0] == keys[1] != keys[2]


def test_pool_survives_a_compiler_that_dies_and_leaves_no_process() -> None:
    pool = CompilePool("sm90", 2)
    with contextlib.closing(pool):
        pool.submit(like(Crash), TINY.default())
        outcomes = [pool.result(problem, TINY.default()) for problem in (like(Crash), TINY)]
        assert outcomes[0] == "crash: the compiler died"
        assert isinstance(outcomes[1], Resources)
        assert outcomes[1].shared < SM90.shared
        pool.submit(like(Stuck), TINY.default())
        with pytest.raises(TimeoutError):
            pool.result(like(Stuck), TINY.default(), seconds=0.1)
        pids = list(pool._pool._processes)
        assert pids
        assert all(process_exists(pid) for pid in pids)
    assert not any(process_exists(pid) for pid in pids)


@pytest.mark.parametrize("aside", [False, True])
def test_compilers_leave_the_cores_to_who_measures(*, aside: bool) -> None:
    with contextlib.closing(CompilePool("sm90", 1, aside=aside)) as pool:
        assert isinstance(pool.result(TINY, TINY.default()), Resources)
        (worker,) = pool._pool._processes
        assert os.getpriority(os.PRIO_PROCESS, worker) > os.getpriority(os.PRIO_PROCESS, 0)
        assert (os.sched_getscheduler(worker) == os.SCHED_IDLE) is aside


def test_a_system_that_refuses_to_set_compilers_aside_has_them_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(forkserver, "context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with contextlib.closing(CompilePool("sm90", 1, aside=True)) as pool:
        assert isinstance(pool.result(TINY, TINY.default()), Resources)


def test_a_default_that_compiles_for_long_is_waited_for() -> None:
    default, late = PROBLEM.default(), Future[Any]()

    class Slow(Pool):
        def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Future[Any]:
            return late if (config, variant) == (default, PLAIN) else super().submit(problem, config, variant=variant)

    timer = threading.Timer(0.5, late.set_result, (NEEDS,))
    timer.start()
    judge = Judge()
    tuner = tune(judge, pool=Slow(), effort=EFFORTS["quick"], seconds=60.0)
    timer.join()
    assert default in judge.timed
    assert PROBLEM in tuner.winners


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """Where a compiler's children write their process ids."""
    return tmp_path / "pids"


def children_end(log: Path) -> bool:
    """Whether the two that were started end within a few seconds."""
    pids = [int(pid) for pid in log.read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(process_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(pids) >= 2 and not any(map(process_exists, pids))


def test_nothing_that_a_compiler_has_started_outlives_its_limit(tmp_path: Path, started: Path) -> None:
    tool = tmp_path / "ptxas"
    version = 'echo "Cuda compilation tools, release 12.9, V12.9.86"'
    work = f"sleep 1000 & echo $$ $! >> {started}; wait"
    tool.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {version};; *) {work};; esac\n')
    tool.chmod(0o755)
    with contextlib.closing(CompilePool("sm90", 1, seconds=8)) as pool:
        outcome = pool.result(like(SlowAssembler), (str(tool), TINY.default()))
        assert outcome == "TimeoutError: compiling took more than 8 s"
        assert children_end(started)
        workers = list(pool._pool._processes)
        assert isinstance(pool.result(TINY, None), str)
        assert list(pool._pool._processes) == workers  # the worker lives


def test_what_a_compiler_has_started_ends_with_it_where_it_does_not_hear_the_alarm(started: Path) -> None:
    with contextlib.closing(CompilePool("sm90", 1, seconds=1)) as pool:
        assert pool.result(like(StuckWithAssembler), str(started)) == "crash: the compiler died"
        assert children_end(started)


def test_candidates_of_equal_code_and_launch_are_measured_once() -> None:
    judge = Judge(lambda config: 1.0 + config.BT / config.BV)
    pool = Pool(needs=lambda problem, config, variant: replace(NEEDS, digest=f"{config.BT} {config.BV}"))
    tuner = tune(judge, pool=pool)
    launches = [(config.BT, config.BV, config.scores) for config in judge.timed]
    assert len(launches) == len(set(launches))
    assert tuner.funnel.same_code > 0
    assert tuner.funnel.timed == len(judge.timed)


# The command line, with parts replaced


@pytest.fixture
def fake_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    parts: dict[str, Any] = {"judge": Judge(modelled=True)}
    monkeypatch.setattr(run_module, "CompilePool", Pool)
    monkeypatch.setattr(run_module, "ModelJudge", lambda arch: parts["judge"])
    yield parts
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


RUN = ["run", "--arch", "sm90", "--workload", "small", "--form", "fused_chunk"]


def test_interrupt_writes_what_was_found_and_says_so(
    fake_parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    promise(monkeypatch, steep)
    fake_parts["judge"] = judge = Judge(steep, stop_after=7, modelled=True)
    path = tmp_path / "a.yaml"
    assert main([*RUN, "--out", str(path)]) == 130
    kernels = parse_file(path).kernels
    assert list(kernels) == [PROBLEM.kernel]  # the turn of the gradients' kernel had not come
    assert [rule.use for rule in kernels[PROBLEM.kernel].rules] == [knob_values(min(judge.timed, key=landscape))]
    out = capsys.readouterr().out
    assert "stopped: 2 of 2 searches did not end" in out
    assert f"wrote 1 rule to {path}" in out


def test_spent_budget_is_said(fake_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    assert main([*RUN, "--workload", "short", "--budget", "1e-9", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "the budget of 1e-09 s is spent: 4 of 4 searches did not end" in out
    assert re.search(r"took \d+ s", out)
    assert main([*RUN, "--budget", "1e300", "--out", str(path)]) == 0


@pytest.mark.parametrize("promised", [0.0, 1.0], ids=["compiled", "promised"])
def test_the_model_leaves_the_default_where_it_does_not_predict_three_times_its_speed(
    monkeypatch: pytest.MonkeyPatch, promised: float
) -> None:
    default = PROBLEM.default()
    for gain, kept in ((1 / (1 - MODEL_NOISE) - 0.1, True), (1 / (1 - MODEL_NOISE) + 0.1, False)):
        promise(monkeypatch, lambda config, gain=gain: gain if config == default else promised)
        judge = Judge(lambda config, gain=gain: gain if config == default else 1.0, modelled=True)
        assert (tune(judge).winners[PROBLEM].config == default) is kept


def test_next_run_keeps_the_other_points_and_the_incumbent(fake_parts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    assert main([*RUN, "--workload", "short", "--out", str(path)]) == 0
    before = parse_file(path).kernels
    assert main([*RUN, "--out", str(path)]) == 0
    after = parse_file(path).kernels
    assert [rule.use for rule in after[PROBLEM.kernel].rules] == [rule.use for rule in before[PROBLEM.kernel].rules]
    assert len(after[PROBLEM.kernel].rules) == 2


def test_nothing_found_writes_nothing(
    fake_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_parts["judge"] = Judge(broken=lambda config: True, modelled=True)
    assert main([*RUN, "--out", str(tmp_path / "a.yaml")]) == 1
    assert "wrote nothing" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_line_and_not_a_traceback(
    fake_parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert main([*RUN, "--out", str(tmp_path / "a.yaml")]) == 1
    place = tmp_path / "a.yaml"
    assert capsys.readouterr().err == f"error: {place}: was not written: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_said_before_tuning(
    fake_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.yaml"):
        assert main([*RUN, "--out", str(path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(tmp_path) in error
    assert fake_parts["judge"].timed == []


def test_file_of_another_gpu_is_not_overwritten(
    fake_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    write(path, entry(), device={"arch": "sm90", "name": "NVIDIA H100"})
    before = path.read_bytes()
    assert main([*RUN, "--out", str(path)]) == 1
    assert "holds rules for NVIDIA H100, and these are for sm90" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_gpu_that_does_not_start_is_a_line_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start() -> None:
        raise MeasurementError("RuntimeError: CUDA error: out of memory")

    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    monkeypatch.setattr(run_module, "Measurer", start)
    assert main(["run", "--workload", "small"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: CUDA error: out of memory\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["go"],
        ["run", "--budget", "0"],
        ["run", "--budget", "nan"],
        ["run", "--workers", "0"],
        ["run", "--workers", "-1"],
        ["run", "--arch", "sm1"],
        ["run", "--form", "chunk_states"],
        ["run", "--form", GRADIENTS],
        ["run", "--effort", "some"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_run_offers_the_forms_of_sweeps_and_the_step(
    fake_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert f"--form {{{','.join([*SWEEPS, *STEP_FORMS])}}}" in " ".join(capsys.readouterr().out.split())
    for form in SWEEPS:
        if form == HOPPER:
            continue
        assert main([*RUN[:-1], form, "--budget", "1e-9", "--out", str(tmp_path / f"{form}.yaml")]) == 0


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_a_form_that_runs_none_of_the_workloads_is_an_error(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--arch", arch, "--workload", "small", "--form", HOPPER]) == 2
    assert f"nothing to tune on {arch}" in capsys.readouterr().err


@pytest.mark.parametrize("form", STEP_FORMS)
def test_a_step_of_more_tokens_than_it_takes_is_an_error(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--arch", "sm90", "--workload", "B=1,T=17,H=2,K=64,V=64", "--form", form]) == 2
    assert "a step takes 1 to 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["verify"], ["show"], ["bench"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: python -m tuning" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::generated.configuration.ConfigurationWarning")
def test_show_prints_the_rules_and_their_files(
    only_this_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest's workers set one
    path = only_this_directory / "mine.yaml"
    write(path, entry(), entry(proof="modelled", kernel="retention_chunk", L=256))
    configuration.reload()
    assert main(["show", "--arch", "sm90", "--kernel", "fused"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if PROBLEM.kernel in line)
    assert "BT=64 BV=32 num_warps=4 num_stages=2" in line
    assert "measured" in line
    assert "mine.yaml" in line
    assert "retention_chunk" not in out
    assert f"1 rules from {path}" in out or f"1 rule from {path}" in out
    assert "is installed" not in out
    text = path.read_text()
    path.write_text(re.sub(r"triton: [\d.]+", "triton: 3.0.0", text))
    configuration.reload()
    assert main(["show", "--arch", "sm90"]) == 0
    assert "mine.yaml is of Triton 3.0.0, and " in " ".join(capsys.readouterr().out.split())
    assert main(["show", "--arch", "sm80"]) == 0
    assert "no file" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--workload", "small"]) == 1
    assert capsys.readouterr().err.startswith("error: bench times kernels on a GPU, and this machine shows none")


def test_a_file_that_would_not_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--workload", "small", "--out", str(tmp_path / "rules.txt")]) != 0
    assert "only files that end in .yaml or .yml are read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    path = tmp_path / "file" / "sm90.yaml"
    with pytest.raises(OSError, match="cannot be written here") as caught:
        rules.check_writable(path)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("shape", ["B=1,T=64,H=1,K=33,V=16", "B=1,T=64,H=1,K=16,V=3,dtype=float16"])
def test_odd_widths_are_not_tuned(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--workload", shape]) != 0
    assert "an odd K or V in" in capsys.readouterr().err
