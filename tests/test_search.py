"""Which candidates are tried: a finite list, each once, in an order that every sampler of the command line can give."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from fakes import NEEDS, PROBLEM, SM90, Judge, Pool, candidates, landscape, tune
from optuna.trial import TrialState

from tuning.compilation import Resources
from tuning.samplers import INFORMED, SAMPLERS, Candidates, SamplerError, check_available
from tuning.search import MAX_SPILLS, Effort, Search
from tuning.tuner import Tuner, distance

EVERYTHING = Effort(first=10, rounds=50, per_round=5, finalists=3, ahead=7)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def search_for(listed: list[Any] | None = None, **options: Any) -> Search:
    """A search over all candidates of the problem, or over some."""
    given: dict[str, Any] = {"kept": [PROBLEM.default()], "effort": EVERYTHING} | options
    over = Candidates(PROBLEM, listed or candidates(), SM90, kept=given.pop("kept"))
    return Search(over, given.pop("effort"), **given)


def run(search: Search, needs: Resources = NEEDS, ms: Any = landscape) -> list[Any]:
    """Search to the end; what was measured, in order."""
    measured = []
    while not search.finished:
        for config in search.ask():
            search.compiled(config, needs)
        while (config := search.next()) is not None:
            measured.append(config)
            search.tell(config, ms(config))
    return measured


@every_sampler
def test_everything_is_measured_once_and_nothing_off_the_list(name: str) -> None:
    listed = candidates()[::6]
    measured = run(search_for(listed, name=name))
    assert len(measured) == len(set(measured))
    assert set(measured) == {*listed, PROBLEM.default()}


def test_brute_force_tries_every_candidate_whatever_the_effort() -> None:
    few = Effort(first=4, rounds=1, per_round=2, finalists=3)
    judge = Judge()
    tuner = Tuner(judge, Pool(), SM90, few, math.inf, lambda problem: [], lambda *_: None, sampler="brute-force")
    tuner.run([PROBLEM])
    assert set(judge.timed) == {*candidates(), PROBLEM.default()}
    assert tuner.ranked[PROBLEM][0].config == min(candidates(), key=landscape)


def test_a_round_is_what_was_proposed_when_it_became_late() -> None:
    told = iter([False, False, True])
    search = search_for()
    assert len(search.ask(lambda: next(told))) == 3
    assert len(search_for().ask(lambda: True)) == 1


@every_sampler
def test_a_search_is_the_same_each_time(name: str) -> None:
    effort = Effort(first=5, rounds=1, per_round=3, finalists=3, ahead=5)
    assert run(search_for(name=name, effort=effort)) == run(search_for(name=name, effort=effort))


@every_sampler
def test_what_is_asked_for_at_once_is_different(name: str) -> None:
    batch = search_for(name=name).ask()
    assert len(batch) == len(set(batch)) >= EVERYTHING.first


def test_what_is_in_use_comes_first_even_off_the_list() -> None:
    outside = type(PROBLEM.default())(BT=256, BV=16, num_warps=4, num_stages=1)
    assert run(search_for(kept=[outside, PROBLEM.default()]))[:2] == [outside, PROBLEM.default()]


def test_what_is_in_use_is_measured_before_all_others_are_compiled() -> None:
    search = search_for()
    first, *_ = search.ask()
    search.compiled(first, NEEDS)
    assert (first, search.next(), search.next()) == (PROBLEM.default(), PROBLEM.default(), None)


def test_neighbours_come_next_where_they_are_on_the_list() -> None:
    worst = max(candidates(), key=landscape)
    outside = type(PROBLEM.default())(BT=256, BV=16, num_warps=4, num_stages=1)
    search = search_for()
    search.enqueue([outside, worst])
    assert search.ask()[:2] == [PROBLEM.default(), worst]


def test_neighbours_found_later_are_the_next_rounds_first() -> None:
    search = search_for()
    for config in search.ask():
        search.compiled(config, NEEDS)
    while (config := search.next()) is not None:
        search.tell(config, landscape(config))
    asked = {search._list.configs[search._list.number(trial.params)] for trial in search.study.trials}
    worst = max((config for config in candidates() if config not in asked), key=landscape)
    search.enqueue([worst])
    for config in search.ask():
        search.compiled(config, NEEDS)
    assert search.next() == worst


@pytest.mark.parametrize(("promises", "count"), [(0, 0), (2, 0), (3, 3), (9, 6)])
def test_a_later_round_compiles_what_promises_far_more_than_what_is_there(
    promises: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of what is not compiled promise eleven times as much as all that is, the others nine times."""
    search = search_for(effort=Effort(first=2, rounds=2, per_round=6, finalists=1, ahead=8), kept=[])
    for config in search.ask():
        search.compiled(config, NEEDS)
    while (config := search.next()) is not None:
        search.tell(config, landscape(config))
    best = search._list.open(search.study)[:promises]
    ready = {search._list.numbers[config] for config in search._ready}
    gains = {number: 1.0 if number in ready else 11.0 if number in best else 9.0 for number in range(len(candidates()))}
    sampler: Any = search._sampler
    monkeypatch.setattr(sampler, "gains", lambda _, numbers: np.array([gains[number] for number in numbers]))
    assert len(search.ask()) == count


def test_more_is_compiled_than_measured_and_the_compiler_decides_what_comes_first() -> None:
    search = search_for(effort=Effort(first=2, rounds=0, per_round=0, finalists=1, ahead=10), kept=[])
    batch = search.ask()
    assert len(batch) == 12
    for config in batch:
        search.compiled(config, NEEDS if config == batch[-1] else replace(NEEDS, spills=900))
    assert search.next() == batch[-1]


def test_the_last_that_the_compiler_is_at_are_not_waited_for() -> None:
    search = search_for(effort=Effort(first=3, rounds=1, per_round=3, finalists=1, ahead=5, gain=0.0002), kept=[])
    batch = search.ask()
    for config in batch[:5]:
        search.compiled(config, NEEDS)
    assert search.next() is None
    assert search.waits
    search.compiled(batch[5], NEEDS)
    measured = [search.next() for _ in range(3)]
    assert {None}.isdisjoint(measured)
    assert search.next() is None
    assert not search.waits  # the next round may begin
    for config in measured:
        search.tell(config, landscape(config))
    assert not set(search.ask()) & set(batch)
    measured.append(search.next())
    assert measured[-1] is not None
    for late in batch[6:]:
        search.compiled(late, NEEDS)
    assert set(batch) <= {*measured, *search._ready}


def test_a_search_does_not_end_before_what_promises_most_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_for(effort=Effort(first=4, rounds=2, per_round=4, finalists=1, ahead=4, gain=0.01), kept=[])
    *batch, late = search.ask()
    for config in batch:
        search.compiled(config, NEEDS)
    for _ in range(4):
        config = search.next()
        search.tell(config, landscape(config))
    for config in search.ask():
        search.compiled(config, NEEDS)
    promising, sampler = search._list.numbers[late], cast(Any, search._sampler)
    monkeypatch.setattr(sampler, "gains", lambda _, numbers: np.array([float(n == promising) for n in numbers]))
    assert search.next() is None
    assert search.waits  # and measures nothing that promises nothing
    assert not search.stopped
    monkeypatch.setattr(sampler, "gains", lambda _, numbers: np.zeros(len(numbers)))
    assert search.next() is None
    assert search.stopped
    monkeypatch.setattr(sampler, "gains", lambda _, numbers: np.ones(len(numbers)))  # since another's time is known
    assert search.next() is not None
    assert not search.stopped


def with_late(search: Search, late: set[Any]) -> list[Any]:
    """What is measured where some come out of the compiler only once the search says no more without them."""
    measured: list[Any] = []
    waiting: list[Any] = []
    while not search.finished:
        while (config := search.next()) is not None:
            search.tell(config, landscape(config))
            measured.append(config)
        if search.left and search.waits:
            search.compiled(waiting.pop(0), NEEDS)
            continue
        for config in search.ask():
            if config in late:
                waiting.append(config)
            else:
                search.compiled(config, NEEDS)
    return measured


@pytest.mark.parametrize("gain", [0.0, 0.0002])
def test_a_short_list_is_measured_whole_though_some_are_late(gain: float) -> None:
    effort = Effort(first=16, rounds=4, per_round=6, finalists=3, ahead=24, gain=gain)
    search = search_for(candidates()[:20], effort=effort, kept=[])
    measured = with_late(search, set(search._list.configs[-5:]))
    assert search.stopped or len(measured) == 20


def test_what_is_in_use_is_always_waited_for() -> None:
    effort = Effort(first=16, rounds=4, per_round=6, finalists=3, ahead=24, gain=0.0002)
    assert PROBLEM.default() in with_late(search_for(effort=effort), {PROBLEM.default()})


def test_what_was_late_before_does_not_count_for_a_round() -> None:
    search = search_for(effort=Effort(first=16, rounds=4, per_round=6, finalists=3, ahead=24), kept=[])
    *batch, late, later = search.ask()
    for config in batch:
        search.compiled(config, NEEDS)
    while (config := search.next()) is not None:
        search.tell(config, landscape(config))
    own = search.ask()
    assert own
    for config in (late, later):
        search.compiled(config, NEEDS)
    assert search.next() is None
    for config in own:
        search.compiled(config, NEEDS)
    assert search.next() is not None


def test_what_was_measured_while_the_compiler_was_behind_takes_nothing_from_the_budget() -> None:
    effort = Effort(first=4, rounds=6, per_round=2, finalists=1, ahead=3)
    search, asked, spares = search_for(effort=effort, kept=[]), [], 0
    while not search.finished:
        batch = search.ask()
        asked.append(len(batch))
        for config in batch:
            search.compiled(config, NEEDS)
            if config != batch[-1] and (spare := search.spare()) is not None:  # the GPU has nothing else to do
                search.tell(spare, landscape(spare))
                spares += 1
        while (config := search.next()) is not None:
            search.tell(config, landscape(config))
    assert search.measured == effort.measurements + spares
    assert search.left == 0
    assert asked[0] == 7


def test_a_search_that_goes_on_looks_ahead_from_its_first_round() -> None:
    search = search_for(effort=Effort(first=4, rounds=6, per_round=2, finalists=1, ahead=3), kept=[])
    for config in candidates()[:5]:
        assert search.take(config, landscape(config), NEEDS, free=True)
    assert len(search.ask()) == 2 + 3


def test_a_trial_holds_what_its_kernel_needs_as_constraints() -> None:
    search = search_for(effort=Effort(first=3, rounds=0, per_round=0, finalists=1))
    run(search, replace(NEEDS, spills=24))
    for trial in search.study.get_trials(states=(TrialState.COMPLETE,)):
        assert trial.constraints["spills"] == 24 - MAX_SPILLS
        assert trial.constraints["shared memory"] == NEEDS.shared - SM90.shared
        assert trial.user_attrs["needs"]["registers"] == NEEDS.registers


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (replace(NEEDS, shared=SM90.shared + 1), "shared memory"),
        (replace(NEEDS, spills=MAX_SPILLS + 1), "spills"),
        ("CompilationError: no", "CompilationError: no"),
    ],
    ids=["large", "spills", "no"],
)
def test_what_cannot_be_worth_measuring_is_pruned(needs: Resources | str, reason: str) -> None:
    search = search_for(kept=[])
    batch = search.ask()
    assert {search.compiled(config, needs) for config in batch} == {reason}
    assert search.next() is None
    assert {trial.state for trial in search.study.trials} == {TrialState.PRUNED}


def test_what_is_in_use_is_measured_though_it_spills() -> None:
    search = search_for()
    run(search, replace(NEEDS, spills=MAX_SPILLS + 1))
    assert list(search.results) == [PROBLEM.default()]


def test_a_search_ends_where_nothing_better_is_expected() -> None:
    search = search_for(effort=replace(EVERYTHING, gain=0.01))
    measured = run(search, ms=lambda config: 1.0 if config == PROBLEM.default() else 8.0)
    assert search.stopped
    assert EVERYTHING.first <= len(measured) < len(candidates())


def test_a_search_ends_with_its_measurements() -> None:
    effort = Effort(first=5, rounds=2, per_round=4, finalists=3, ahead=6)
    search = search_for(effort=effort)
    assert len(run(search)) == effort.measurements == 13
    assert not search.stopped


def test_what_others_measured_is_taken_and_not_measured_again() -> None:
    search, known = search_for(), candidates()[0]
    search.tell(known, 0.5)
    assert known not in run(search)
    assert search.results[known] == 0.5


def test_what_is_left_over_is_measured_while_nothing_else_can_be_and_costs_the_search_nothing() -> None:
    effort = Effort(first=5, rounds=2, per_round=4, finalists=3, ahead=6)
    search = search_for(effort=effort)
    assert search.spare() is None  # nothing is known yet
    for config in search.ask():
        search.compiled(config, NEEDS)
    while (config := search.next()) is not None:
        search.tell(config, landscape(config))
    assert search.measured == effort.first
    spares = []
    while (config := search.spare()) is not None:
        search.tell(config, landscape(config))
        spares.append(config)
    assert 0 < len(spares) <= effort.ahead
    assert len(set(run(search)) - set(spares)) == effort.measurements - effort.first


def test_failures_are_counted_and_passed_over() -> None:
    search = search_for()
    run(search, ms=lambda config: None if config.BT == 32 else landscape(config))
    assert not [config for config in search.results if config.BT == 32]
    assert len(search.study.get_trials(states=(TrialState.FAIL,))) == sum(c.BT == 32 for c in candidates())


@pytest.mark.parametrize(("name", "package"), [("gp", "scipy"), ("cmaes", "cmaes")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    with pytest.raises(SamplerError, match=rf"--sampler {name} needs {package}.*pip install 'retgen\[samplers\]'"):
        check_available(name)
    check_available(INFORMED)


def test_what_won_with_an_earlier_kernel_is_a_neighbour_and_the_nearest_problem_s_winner() -> None:
    near, far = replace(PROBLEM, T=2 * PROBLEM.T), replace(PROBLEM, T=16 * PROBLEM.T)
    other = replace(near, dtype="float32")
    one, two, three, *_ = candidates()
    tuner = tune(Judge(), effort=Effort(2, 0, 0, 1))
    given = (tuner.judge, tuner.pool, SM90, tuner.effort, 0.0, lambda problem: [], lambda *progress: None)
    again = Tuner(*given, earlier={far: one, near: two, other: three, PROBLEM: three})
    assert again.neighbours(PROBLEM) == [three, two]
    assert distance(PROBLEM, near) == 1
