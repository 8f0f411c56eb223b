"""Whatever ends a run, the next one goes on where it was: nothing is measured twice, and no crash is repeated."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import PROBLEM, Judge, candidates, landscape, timing, tune
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from generated.configuration_file import optional_knob
from tuning import device, forkserver
from tuning import journal as journals
from tuning import run as run_module
from tuning import storage as storage_module
from tuning.__main__ import main
from tuning.device import OTHER
from tuning.history import read
from tuning.journal import FORGETS, PROVE, RACE, SUSPECT, Claim, Journal, Outcome, RaceClaim
from tuning.measurement import Gpu, Timing
from tuning.problems import FORMS, Problem
from tuning.space import WHOLE, knob_values

FIRST, SECOND, THIRD = candidates()[:3]


class Said(list[str]):
    """What the user was told."""

    def __call__(self, message: str) -> None:
        self.append(message)


def open_journal(path: Path, context: str = "H100", *, fresh: bool = False) -> Journal:
    """A journal that has nothing to say."""

    def say(message: str) -> None:
        raise AssertionError(message)

    return Journal(path, {"gpu": context}, say, fresh=fresh)


def measured(journal: Journal, config: Any, outcome: Outcome) -> None:
    with journal.measuring(PROBLEM, config, {}) as record:
        assert record is not None
        record(outcome)


def storage_of(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "a.journal"


# What is remembered


def test_times_and_failures_are_remembered(path: Path) -> None:
    journal = open_journal(path)
    outcomes = {FIRST: Outcome(0.25), SECOND: Outcome(None, "ArithmeticError: wrong result")}
    for config, outcome in outcomes.items():
        measured(journal, config, outcome)
    for again in (journal, open_journal(path)):
        assert {config: again.remembered(PROBLEM, config, {}) for config in outcomes} == outcomes
        assert again.remembered(PROBLEM, THIRD, {}) is None
        assert again.remembered(replace(PROBLEM, T=2048), FIRST, {}) is None


def test_the_report_reads_past_what_is_kept_of_crashes(path: Path) -> None:
    journal = open_journal(path)
    measured(journal, FIRST, Outcome(1.0))
    measured(journal, SECOND, Outcome(None, "no answer from the measuring process within 30 s: the kernel hangs"))
    assert journal.crashes(replace(PROBLEM, T=7)) == {SECOND: journal.remembered(PROBLEM, SECOND, {}).reason}
    assert journal.crashes(replace(PROBLEM, K=128)) == {}
    assert read(str(path), "H100").foreign == 0


CHUNK = replace(PROBLEM, form="chunk", T=4096)
CUT = FORMS["chunk"].config_type(L=256, BT=32, BV=64, num_warps=4, num_stages=3)


@pytest.mark.parametrize(
    ("crashed", "alike", "others"),
    [
        (
            (CHUNK, replace(CUT, L=WHOLE)),
            [(PROBLEM, CUT.whole), (replace(CHUNK, T=256), CUT), (CHUNK, replace(CUT, L=4096))],
            [(CHUNK, CUT), (PROBLEM, replace(CUT.whole, BV=32))],
        ),
        (
            (PROBLEM, CUT.whole),
            [(CHUNK, replace(CUT, L=WHOLE)), (replace(CHUNK, T=200), CUT)],
            [(CHUNK, CUT), (replace(PROBLEM, form="fused_chunk_gradients"), CUT.whole)],
        ),
        (
            (CHUNK, CUT),
            [(CHUNK, replace(CUT, L=512)), (replace(CHUNK, T=300), CUT), (CHUNK, replace(CUT, L=32))],
            [(CHUNK, replace(CUT, L=WHOLE)), (PROBLEM, CUT.whole)],
        ),
    ],
    ids=["whole", "fused", "cut"],
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_crash_is_held_against_all_that_compile_to_the_same_kernel(
    path: Path, *, old: bool, crashed: tuple[Problem, Any], alike: list[Any], others: list[Any]
) -> None:
    journal = open_journal(path)
    if old:  # such a record names the form and the configuration that were launched
        study = next(n for n in optuna.get_all_study_names(storage_of(path)) if n.startswith(journals.CRASHED))
        attributes = {"kernel": journals._kernel_of(crashed[0]), "reason": "the kernel crashed"}
        trial = journals._trial(crashed[1], TrialState.FAIL, attributes)
        optuna.load_study(study_name=study, storage=storage_of(path)).add_trial(trial)
    else:
        journal.launch(*crashed, {}, lambda: Outcome(None, "the kernel crashed"))
    for again in (journal, open_journal(path)):
        for problem, config in (crashed, *alike):
            assert again.crashes(problem)[config] == "the kernel crashed"
        for problem, config in others:
            assert config not in again.crashes(problem)


def test_what_was_stopped_or_found_no_memory_is_not_remembered(path: Path) -> None:
    journal = open_journal(path)
    with pytest.raises(KeyboardInterrupt), journal.measuring(PROBLEM, FIRST, {}):
        raise KeyboardInterrupt
    measured(journal, SECOND, Outcome(None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"))
    for again in (journal, open_journal(path)):
        assert again.remembered(PROBLEM, FIRST, {}) is again.remembered(PROBLEM, SECOND, {}) is None


def test_another_context_and_another_kernel_know_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(open_journal(path), FIRST, Outcome(1.0))
    assert open_journal(path, "H200").remembered(PROBLEM, FIRST, {}) is None
    registry = journals.kernel_registry()
    changed = registry | {PROBLEM.kernel: replace(registry[PROBLEM.kernel], source="another")}
    monkeypatch.setattr(journals, "kernel_registry", lambda: changed)
    assert open_journal(path).remembered(PROBLEM, FIRST, {}) is None
    monkeypatch.undo()
    assert open_journal(path).remembered(PROBLEM, FIRST, {}) == Outcome(1.0)


def test_fresh_forgets_what_it_asks_about_and_nothing_else(path: Path) -> None:
    measured(open_journal(path), FIRST, Outcome(1.0))
    measured(open_journal(path, "H200"), FIRST, Outcome(2.0))
    fresh = open_journal(path, fresh=True)
    assert fresh.remembered(PROBLEM, FIRST, {}) is None
    measured(fresh, FIRST, Outcome(3.0))
    assert open_journal(path).remembered(PROBLEM, FIRST, {}) == Outcome(3.0)
    (search,) = read(str(path), "H100").searches
    assert [trial.value for trial in search.trials] == [3.0]
    assert open_journal(path, "H200").remembered(PROBLEM, FIRST, {}) == Outcome(2.0)


def test_a_study_whose_maker_was_killed_at_once_is_completed_by_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(JournalStorage, "set_study_user_attr", lambda *arguments: None)
        measured(open_journal(path), FIRST, Outcome(1.0))
    measured(open_journal(path), SECOND, Outcome(2.0))
    (search,) = read(str(path), "H100").searches
    assert [trial.value for trial in search.trials] == [1.0, 2.0]


def test_optuna_reads_it_as_studies_and_trials(path: Path) -> None:
    journal = open_journal(path)
    measured(journal, FIRST, Outcome(0.25))
    measured(journal, SECOND, Outcome(None, "ArithmeticError: why"))
    storage = storage_of(path)
    (name,) = (
        n for n in optuna.get_all_study_names(storage) if n.startswith(f"{PROBLEM.kernel} ") and "finals" not in n
    )
    study = optuna.load_study(study_name=name, storage=storage)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert study.best_params == knob_values(FIRST)
    assert study.trials[1].user_attrs["reason"] == "ArithmeticError: why"


def test_a_knob_may_have_what_its_own_kernel_allows_though_another_has_one_of_its_name() -> None:
    @dataclass(frozen=True)
    class Other:
        BT: int
        descriptors: int = optional_knob(3, zero="none")

    for config, most in ((FIRST, 1), (Other(16), 3)):
        known = journals.distributions_of(config)
        assert known["descriptors"] == optuna.distributions.IntDistribution(0, most)
        assert known["BT"] == journals.KNOB


def races_and_proofs(path: Path, session: str = "", *, interrupted: bool = False) -> tuple[int, int]:
    """How many of each a tuning does, which ends or is interrupted after all of them."""

    class Counting(Judge):
        races = proofs = 0

        def rank(self, *job: Any) -> list[Timing]:
            self.races += 1
            return super().rank(*job)

        def prove(self, *job: Any) -> float | None:
            self.proofs += 1
            return super().prove(*job)

    judge, journal = Counting(), Journal(path, {"gpu": "H100"}, Said(), session=session, effort="quick")
    record = journal.run()
    assert tune(judge, journal=journal).winners
    record.finish(1.0, interrupted=interrupted)
    journal.close()
    return judge.races, judge.proofs


def test_races_and_proofs_of_an_interrupted_run_hold_until_one_that_took_it_up_has_ended(path: Path) -> None:
    anew = races_and_proofs(path, interrupted=True)
    assert min(anew) > 0
    assert races_and_proofs(path, interrupted=True) == (0, 0)
    assert races_and_proofs(path, "one") == (0, 0)
    assert races_and_proofs(path, "one") == (0, 0)  # another worker of the run that took it up
    assert races_and_proofs(path, "two") == anew
    assert races_and_proofs(path, "two") == (0, 0)


# A tuner that dies


def tune_and_die(path: Path, launched: Path, last: int) -> None:
    """Tune, in a process that kills itself while it measures its `last` candidate; what wins is in a file."""

    def ms(config: Any) -> float:
        with launched.open("a") as file:
            file.write(f"{config!r}\n")
        if len(judge.timed) - 1 == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return landscape(config)

    judge = Judge(ms)
    (winner,) = tune(judge, journal=open_journal(path)).winners.values()
    launched.with_suffix(".winner").write_text(repr(winner.config))


def tuned(path: Path, launched: Path, last: int) -> int:
    """How such a process ended."""
    process = forkserver.context().Process(target=tune_and_die, args=(path, launched, last))
    process.start()
    process.join(60)
    return int(process.exitcode)


def test_a_tuner_that_is_killed_again_and_again_loses_one_point_each_time(path: Path, tmp_path: Path) -> None:
    launched = tmp_path / "launched"
    for last in (0, 7, 20):
        assert tuned(path, launched, last) == -signal.SIGKILL
    suspects = [launched.read_text().splitlines()[i] for i in (0, 8, 29)]
    assert tuned(path, launched, -1) == 0
    lines = launched.read_text().splitlines()
    everything = {*candidates(), PROBLEM.default()}
    ranked = len(lines) - len(set(lines))  # the race of the finalists, and that in a fresh process
    assert set(lines) == set(map(repr, everything))
    assert ranked <= 9
    best = min((config for config in everything if repr(config) not in suspects), key=landscape)
    assert launched.with_suffix(".winner").read_text() == repr(best)
    journal = open_journal(path)
    assert [config for config in everything if journal.remembered(PROBLEM, config, {}) == Outcome(None, SUSPECT)] == [
        config for config in everything if repr(config) in suspects
    ]


@pytest.mark.usefixtures("started_again")
def test_fresh_forgets_no_suspect_and_bars_from_races_whom_it_barred_before(path: Path) -> None:
    process = forkserver.context().Process(target=measure_and_die, args=(path,))
    process.start()
    process.join(60)
    known: list[Journal] = [open_journal(path, fresh=True), open_journal(path, fresh=True), open_journal(path)]
    for journal in known:
        assert journal.outcomes(PROBLEM, {}) == {SECOND: Outcome(None, SUSPECT)}
        assert journal.claim(PROBLEM, SECOND, {}) is None
        assert journal.barred(PROBLEM, {}) == {FIRST, THIRD}


@pytest.fixture
def started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is not as it was when other processes' runs began: it may have gone down with them."""
    monkeypatch.setattr(journals, "boot_id", lambda: "another")


def measure_and_die(path: Path) -> None:
    journal = open_journal(path)
    measured(journal, FIRST, Outcome(1.0))
    journal.claim_race(PROBLEM, [FIRST, THIRD], {}, step=RACE)
    journal.claim(PROBLEM, SECOND, {})
    lose_mark(journal)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_mark(journal: Journal) -> None:
    """Nobody is going to know what was launched last."""
    mark = journal._mark(0)
    assert mark is not None
    Path(mark.file).write_text("", encoding="ascii")


@pytest.mark.parametrize(("settled", "suspects"), [(False, {FIRST}), (True, {SECOND})])
def test_what_was_still_to_follow_when_the_tuner_died_is_no_suspect(
    path: Path, settled: bool, suspects: set[Any]
) -> None:
    process = forkserver.context().Process(target=claim_two_and_die, args=(path, settled))
    process.start()
    process.join(60)
    for journal in (open_journal(path), open_journal(path, fresh=True)):
        assert {c for c, found in journal.outcomes(PROBLEM, {}).items() if found.reason == SUSPECT} == suspects


@pytest.mark.parametrize(("launched", "suspects"), [(0, {FIRST}), (1, {SECOND}), (2, {THIRD}), (OTHER, set())])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("boot", [journals.boot_id(), "another"])
def test_of_what_a_killed_tuner_had_handed_over_what_was_launched_last_is_the_suspect(
    path: Path, launched: int, suspects: set[Any], order: int, boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the tuner was killed, or the machine has gone down with it: a mark outlives that too."""
    monkeypatch.setattr(journals, "boot_id", lambda: boot)
    process = forkserver.context().Process(target=hand_over_three_and_die, args=(path, launched))
    process.start()
    process.join(60)
    for _ in range(2):
        journal = open_journal(path)
        found = {config: journal.outcomes(problem, {}).get(config) for problem, config in HANDED_OVER[::order]}
        assert found == {c: Outcome(None, SUSPECT) if c in suspects else None for _, c in HANDED_OVER}
        for problem, config in HANDED_OVER:
            claim = journal.claim(problem, config, {})
            assert (claim is None) == (config in suspects)
            if claim:
                claim.settle(None)
        journal.run().finish(1.0)
        journal.close()


HANDED_OVER = [(replace(PROBLEM, T=T), config) for T, config in ((256, FIRST), (512, SECOND), (1024, THIRD))]


def hand_over_three_and_die(path: Path, launched: int, lost: bool = False) -> None:
    journal, claims = open_journal(path), list[Claim]()
    for problem, config in HANDED_OVER:
        claim = journal.claim(problem, config, {}, behind=claims[-1] if claims else None)
        assert claim is not None
        claims.append(claim)
    mark = claims[launched].mark
    assert mark is not None
    (mark._replace(trial=OTHER) if launched == OTHER else mark).make()
    if lost:
        lose_mark(journal)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("started_again")
def test_where_the_machine_may_have_died_what_was_to_follow_is_a_suspect_too(path: Path) -> None:
    process = forkserver.context().Process(target=claim_two_and_die, args=(path, False))
    process.start()
    process.join(60)
    assert open_journal(path).outcomes(PROBLEM, {}) == dict.fromkeys((FIRST, SECOND), Outcome(None, SUSPECT))


def test_where_no_mark_can_be_read_the_first_that_was_handed_over_is_the_only_suspect(path: Path) -> None:
    process = forkserver.context().Process(target=hand_over_three_and_die, args=(path, OTHER, True))
    process.start()
    process.join(60)
    journal = open_journal(path)
    assert [config for problem, config in HANDED_OVER if journal.outcomes(problem, {}).get(config)] == [FIRST]


def test_a_mark_is_known_though_another_tuner_takes_it_away_just_now(path: Path) -> None:
    journal = open_journal(path)
    process = forkserver.context().Process(target=hand_over_three_and_die, args=(path, 1))
    process.start()
    process.join(60)
    assert journal._store is not None
    launched, others = journal._store.launched, list[Journal]()

    def launched_and_taken_away(worker: str) -> int | None:
        before = launched(worker)
        others.append(open_journal(path))
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal._store, "launched", launched_and_taken_away)
        found = [config for problem, config in HANDED_OVER if journal.outcomes(problem, {}).get(config)]
    assert found == [SECOND]
    assert others


def claim_two_and_die(path: Path, settled: bool) -> None:
    journal = open_journal(path)
    first = journal.claim(PROBLEM, FIRST, {})
    assert first is not None
    assert journal.claim(PROBLEM, SECOND, {}, behind=first) is not None
    if settled:
        first.settle(Outcome(1.0))
    lose_mark(journal)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_living_process_measures_is_no_suspect(path: Path) -> None:
    journal = open_journal(path)
    with journal.measuring(PROBLEM, FIRST, {}) as record:
        other = open_journal(path)
        assert other.remembered(PROBLEM, FIRST, {}) is None
        measured(other, SECOND, Outcome(2.0))
        record(Outcome(1.0))
    both = open_journal(path)
    assert [both.remembered(PROBLEM, config, {}) for config in (FIRST, SECOND)] == [Outcome(1.0), Outcome(2.0)]


def test_a_process_lives_as_long_as_it_holds_its_file(path: Path) -> None:
    path.parent.mkdir()
    alive = storage_module.Alive(path)
    name = alive.name
    assert not storage_module.is_dead(path, name)
    del alive
    assert storage_module.is_dead(path, name)
    assert list(path.parent.iterdir()) == []
    left = storage_module.alive_path(path, "left-by-a-process-that-was-killed")
    left.touch()
    assert storage_module.is_dead(path, "left-by-a-process-that-was-killed")


def test_what_a_killed_process_leaves_is_gone_once_a_later_run_has_written_it_down(path: Path) -> None:
    process = forkserver.context().Process(target=claim_two_and_die, args=(path, False))
    process.start()
    process.join(60)
    (left,) = path.parent.glob(".*.alive")
    journal = open_journal(path)
    assert not left.exists()
    journal.close()
    assert list(path.parent.iterdir()) == [path]


def test_two_that_look_at_a_dead_process_at_once_both_find_it_dead(path: Path) -> None:
    path.parent.mkdir()
    left = storage_module.alive_path(path, "left")
    left.touch()
    looks: list[bool] = []

    def look_too(*arguments: Any) -> None:
        monkeypatch.undo()
        lock(*arguments)
        looks.append(storage_module.is_dead(path, "left"))

    lock = storage_module.fcntl.flock
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(storage_module.fcntl, "flock", look_too)
        looks.append(storage_module.is_dead(path, "left"))
    assert looks == [True, True]


@pytest.mark.parametrize(
    ("error", "crash"),
    [
        ("invalid program counter", True),
        ("hardware stack error", True),
        ("operation not supported on global/shared address space", True),
        ("the launch timed out and was terminated", True),
        ("device-side assert triggered", True),
        ("misaligned address", True),
        ("out of memory", False),
        ("uncorrectable ECC error encountered", False),
        ("no CUDA-capable device is detected", False),
        ("GPU is lost", False),
    ],
)
@pytest.mark.parametrize("said", ["AcceleratorError: CUDA error: {}", "RuntimeError: Triton Error [CUDA]: {}"])
def test_what_ends_the_process_by_an_error_of_cudas_is_a_crash_unless_it_is_the_machines(
    path: Path, said: str, error: str, crash: bool
) -> None:
    measured(open_journal(path), FIRST, Outcome(None, said.format(error)))
    assert (FIRST in open_journal(path).crashes(replace(PROBLEM, T=7))) is crash
    assert (open_journal(path).remembered(PROBLEM, FIRST, {}) is not None) is crash


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("ArithmeticError: wrong result: relative errors", True),
        ("no answer from the measuring process within 60 s: the kernel hangs", True),
        ("the measuring process died: the kernel crashed", True),
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", True),
        ("no answer from the measuring process within 180 s: it does not start", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("OSError: [Errno 28] No space left on device", False),
        ("AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", False),
    ],
)
def test_only_what_a_candidate_did_itself_is_held_against_it(path: Path, reason: str, kept: bool) -> None:
    measured(open_journal(path), FIRST, Outcome(None, reason))
    assert (open_journal(path).remembered(PROBLEM, FIRST, {}) is not None) is kept


def test_what_was_measured_with_another_states_kernel_is_not_remembered(path: Path) -> None:
    one, other = ({"states_config": config} for config in (FIRST, SECOND))
    journal = open_journal(path)
    with journal.measuring(PROBLEM, FIRST, one) as record:
        record(Outcome(1.0))
    for again in (journal, open_journal(path)):
        assert again.remembered(PROBLEM, FIRST, one) == Outcome(1.0)
        assert again.remembered(PROBLEM, FIRST, other) is again.remembered(PROBLEM, FIRST, {}) is None


def test_tuners_at_once_do_not_end_each_other(path: Path) -> None:
    said = Said()
    first, second = Journal(path, {"gpu": "H100"}, said), Journal(path, {"gpu": "H100"}, said)
    assert first.remembered(PROBLEM, FIRST, {}) is second.remembered(PROBLEM, FIRST, {}) is None
    measured(first, FIRST, Outcome(1.0))
    fresh = Journal(path, {"gpu": "H100"}, said, fresh=True)
    assert fresh.remembered(PROBLEM, FIRST, {}) is None
    measured(first, SECOND, Outcome(2.0))
    measured(second, THIRD, Outcome(3.0))
    assert said == []
    for journal in (first, second, fresh, Journal(path, {"gpu": "H100"}, said)):
        assert journal.outcomes(PROBLEM, {}) == {SECOND: Outcome(2.0), THIRD: Outcome(3.0)}


def test_what_was_being_measured_when_it_was_forgotten_does_not_count(path: Path) -> None:
    first = open_journal(path)
    with first.measuring(PROBLEM, FIRST, {}) as record:
        assert open_journal(path, fresh=True).remembered(PROBLEM, FIRST, {}) is None
        assert record is not None
        record(Outcome(1.0))
    assert open_journal(path).remembered(PROBLEM, FIRST, {}) is None


def test_the_second_mark_of_a_session_forgets_nothing(path: Path) -> None:
    """Two workers that start together may both find none, and write one each."""
    measured(open_journal(path), FIRST, Outcome(1.0))
    one, other = (Journal(path, {"gpu": "H100"}, Said(), fresh=True, session="s") for _ in range(2))
    measured(one, SECOND, Outcome(2.0))
    name = next(n for n in optuna.get_all_study_names(storage_of(path)) if n.startswith(f"{PROBLEM.kernel} "))
    optuna.load_study(study_name=name, storage=storage_of(path)).add_trial(
        optuna.create_trial(state=TrialState.PRUNED, user_attrs={FORGETS: "s"})
    )
    for journal in (one, other, open_journal(path)):
        assert journal.outcomes(PROBLEM, {}) == {SECOND: Outcome(2.0)}


def test_a_search_that_a_deadline_cut_short_goes_on_in_the_next_run(path: Path) -> None:
    class Slow(Judge):
        def time(self, *job: Any) -> Timing:
            time.sleep(0.02)
            return super().time(*job)

    first = tune(Slow(), seconds=0.1, journal=open_journal(path))
    assert first.unfinished == 1
    assert first.winners
    judge = Judge()
    again = tune(judge, journal=open_journal(path))
    assert again.unfinished == 0
    assert again.winners[PROBLEM].config == min(candidates(), key=landscape)
    assert len(judge.timed) + again.funnel.remembered == len(candidates())


@pytest.mark.usefixtures("started_again")
def test_a_deadline_does_not_race_again_what_killed_a_race(path: Path) -> None:
    process = forkserver.context().Process(target=race_and_die, args=(path,))
    process.start()
    process.join(60)
    raced: list[Any] = []

    class Slow(Judge):
        def time(self, *job: Any) -> Timing:
            time.sleep(0.01)
            return super().time(*job)

        def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            raced.extend(configs)
            return super().rank(problem, configs, extra)

    journal = open_journal(path)
    barred = journal.barred(PROBLEM, {})
    assert barred
    assert tune(Slow(), seconds=0.4, journal=journal).unfinished == 1
    assert raced
    assert barred.isdisjoint(raced)


@pytest.mark.usefixtures("started_again")
def test_a_race_that_killed_another_worker_is_not_held_again_by_one_that_waited_for_it(path: Path) -> None:
    waiting = open_journal(path)
    assert waiting.barred(PROBLEM, {}) == set()
    process = forkserver.context().Process(target=race_and_die, args=(path,))
    process.start()
    process.join(60)
    assert waiting.claim_race(PROBLEM, [FIRST, SECOND], {}, step=RACE) == {}


def test_a_race_whose_tuner_was_killed_is_held_again_once_where_the_machine_has_lived_on(path: Path) -> None:
    for barred in (set(), {FIRST, SECOND}):
        process = forkserver.context().Process(target=race_and_die, args=(path,))
        process.start()
        process.join(60)
        assert open_journal(path).barred(PROBLEM, {}) == open_journal(path, fresh=True).barred(PROBLEM, {}) == barred


def race_and_die(path: Path) -> None:
    claim = open_journal(path).claim_race(PROBLEM, [FIRST, SECOND], {}, step=RACE)
    assert isinstance(claim, RaceClaim)
    assert claim.mark is not None
    claim.mark.make()
    os.kill(os.getpid(), signal.SIGKILL)


def test_races_that_were_handed_over_and_not_launched_are_held_again(path: Path, started_again: None) -> None:
    process = forkserver.context().Process(target=hand_over_two_races_and_die, args=(path,))
    process.start()
    process.join(60)
    journal = open_journal(path)
    assert journal.barred(PROBLEM, {}) == {FIRST, SECOND}
    assert journal.barred(LONGER, {}) == set()
    assert isinstance(journal.claim_race(LONGER, [FIRST, SECOND], {}, step=RACE), RaceClaim)


def hand_over_two_races_and_die(path: Path) -> None:
    journal = open_journal(path)
    claims = [journal.claim_race(problem, [FIRST, SECOND], {}, step=RACE) for problem in (PROBLEM, LONGER)]
    assert isinstance(claims[0], RaceClaim)
    assert claims[0].mark is not None
    claims[0].mark.make()
    os.kill(os.getpid(), signal.SIGKILL)


LONGER = replace(PROBLEM, T=2 * PROBLEM.T)


def test_before_anything_was_launched_a_loss_of_power_leaves_no_suspect(path: Path, started_again: None) -> None:
    process = forkserver.context().Process(target=claim_race_and_die, args=(path, 0))
    process.start()
    process.join(60)
    journal = open_journal(path)
    assert journal.barred(PROBLEM, {}) == set()
    assert journal.claim(LONGER, FIRST, {}) is not None


@pytest.mark.parametrize("settled", [1, 2])
def test_a_race_of_which_not_all_was_written_down_is_held_again(path: Path, settled: int) -> None:
    process = forkserver.context().Process(target=claim_race_and_die, args=(path, settled))
    process.start()
    process.join(60)
    assert isinstance(open_journal(path).claim_race(PROBLEM, [FIRST, SECOND, THIRD], {}, step=RACE), RaceClaim)


def claim_race_and_die(path: Path, settled: int) -> None:
    """Be killed before a race and what is to follow it were launched, or while the race is settled."""
    journal = open_journal(path)
    claim = journal.claim_race(PROBLEM, [FIRST, SECOND, THIRD], {}, step=RACE)
    assert isinstance(claim, RaceClaim)
    journal.claim(LONGER, FIRST, {}, behind=claim)
    written: list[Any] = []
    settle = journal._settle
    if settled:

        def settle_some(*arguments: Any) -> None:
            if len(written) == settled:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(arguments)
            settle(*arguments)

        journal._settle = settle_some  # type: ignore[method-assign]
        claim.settle([Outcome(1.0), Outcome(2.0), Outcome(3.0)])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_launched_last_is_known_however_many_runs_end_before_it_is_asked_about(path: Path) -> None:
    process = forkserver.context().Process(target=hand_over_three_and_die, args=(path, 1))
    process.start()
    process.join(60)
    for _ in range(2):
        other = open_journal(path)
        other.outcomes(replace(PROBLEM, T=4096), {})
        other.run().finish(1.0)
        other.close()
    journal = open_journal(path)
    assert [config for problem, config in HANDED_OVER if journal.outcomes(problem, {}).get(config)] == [SECOND]


def test_a_mark_that_could_not_be_written_says_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(path)
    mark = journal._mark(7)
    assert mark is not None
    mark.make()
    assert journal._store is not None
    worker = journal._store.worker
    assert journal._store.launched(worker) == 7
    monkeypatch.setattr(device.os, "pwrite", no_space)
    mark._replace(trial=8).make()
    assert journal._store.launched(worker) is None


def test_a_race_that_another_worker_holds_keeps_a_worker_from_nothing_else(path: Path) -> None:
    """Each may hold one that the other waits for."""
    other = open_journal(path)
    held = other.claim_race(PROBLEM, [FIRST, SECOND], {}, step=RACE)
    assert isinstance(held, RaceClaim)
    ended: list[str] = []

    def end(how: str) -> None:
        if not ended:
            ended.append(how)
            held.settle([Outcome(1.0), Outcome(2.0)])

    class Two(Judge):
        def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            if problem == LONGER:
                end("by the other's race")
            return super().rank(problem, configs, extra)

    too_late = threading.Timer(30, end, ["by the clock"])
    too_late.start()
    journal = open_journal(path)
    tuner = tune(Two(), problems=[PROBLEM, LONGER], journal=journal)
    too_late.cancel()
    assert ended == ["by the other's race"]
    assert set(tuner.winners) == {PROBLEM, LONGER}
    assert tuner.found[PROBLEM].timings[FIRST].low == 1.0  # as the other's race told


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_a_record_nobody_waits_for_another_worker(path: Path) -> None:
    said = Said()
    waiting = Journal(path, {"gpu": "H100"}, said)
    with open_journal(path).measuring(PROBLEM, FIRST, {}):
        assert waiting.is_measured(PROBLEM, FIRST, {})
        waiting._lose(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert not waiting.is_measured(PROBLEM, FIRST, {})
        assert waiting.claim(PROBLEM, FIRST, {}) is not None


def test_a_proof_that_takes_too_long_is_held_against_its_shape_alone(path: Path) -> None:
    journal = open_journal(path)
    journal.launch(PROBLEM, FIRST, {}, lambda: Outcome(None, "no answer within 120 s: the kernel hangs"), step=PROVE)
    journal.launch(PROBLEM, SECOND, {}, lambda: Outcome(None, "the kernel crashed"), step=PROVE)
    assert set(journal.crashes(PROBLEM)) == {SECOND}


def test_a_run_that_ended_measures_nothing_again(path: Path) -> None:
    first = tune(Judge(broken=lambda config: config.BT == 32), journal=open_journal(path))
    judge = Judge()
    again = tune(judge, journal=open_journal(path))
    assert judge.timed == []
    assert again.winners == first.winners
    assert (again.funnel.timed, again.funnel.remembered) == (0, first.funnel.timed + len(first.funnel.rejected))
    assert again.funnel.rejected == first.funnel.rejected


def test_the_command_goes_on_where_it_was_and_begins_again_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Measuring:
        gpu = Gpu("Any GPU", "sm90", 132, 80, "580.1")
        busy = 0.0

        def measure(
            self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any], *_: Any
        ) -> Timing:
            return timing(float(config.BV))

        def begin(self, *job: Any) -> Callable[[], Timing]:
            return lambda: self.measure(*job)

        def begin_compare(self, *job: Any) -> Callable[[], list[Timing]]:
            *asked, _ = job
            return lambda: self.compare(*asked)

        def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
            return [self.measure(problem, config, 0.0, extra) for config in configs]

        def prove(self, problem: Problem, config: Any, extra: dict[str, Any]) -> float:
            return 0.001

        def renew(self) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    monkeypatch.setattr(run_module, "Measurer", Measuring)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["run", "--workload", "B=1,T=64,H=1,K=16,V=16", "--form", "fused_recurrent", "--workers", "1"]
    command += ["--out", str(tmp_path / "rules.yaml")]
    said = []
    for more in ([], [], ["--fresh"], ["--storage", str(tmp_path / "other")], ["--storage", str(tmp_path / "other")]):
        assert main([*command, *more]) == 0
        out = " ".join(capsys.readouterr().out.split())
        (timed,) = re.findall(r"│ timed │ (\d+) │", out)
        known = re.findall(r"(\d+) known from earlier runs", out)
        said.append((int(timed), int(known[0]) if known else 0))
        place = tmp_path / "other" if "--storage" in more else tmp_path / "cache/retgen/any_gpu.journal"
        assert f"what is measured is kept in {place}" in out
    number = said[0][0]
    assert number > 1
    assert said == [(number, 0), (0, number), (number, 0), (number, 0), (0, number)]


def test_a_run_with_a_journal_chooses_as_one_without(path: Path) -> None:
    assert tune(Judge(), journal=open_journal(path)).winners == tune(Judge()).winners


# A file that fails


def test_a_record_that_was_cut_off_anywhere_costs_itself_alone(path: Path) -> None:
    journal = open_journal(path)
    measured(journal, FIRST, Outcome(1.0))
    whole = path.read_bytes()
    measured(journal, SECOND, Outcome(2.0))
    complete = path.read_bytes()
    for size in [*range(len(whole), len(complete), 41), len(complete) - 1]:
        path.write_bytes(complete[:size])
        again = open_journal(path)
        assert again.remembered(PROBLEM, FIRST, {}) == Outcome(1.0)
        assert again.remembered(PROBLEM, SECOND, {}) is None
        measured(again, THIRD, Outcome(3.0))
        assert open_journal(path).remembered(PROBLEM, THIRD, {}) == Outcome(3.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\0" * len(line.rstrip()) + b"\n",
        lambda line: b"[" * 10**5 + b"\n",
        lambda line: b"[]\n",
        lambda line: line.replace(b'"op_code"', b'"opcode"', 1),
        lambda line: b'{"op_code": 99, "worker_id": "x"}\n',
    ],
    ids=["zeros", "deep", "no mapping", "no code", "unknown code"],
)
def test_of_a_damaged_file_what_lies_before_the_damage_is_kept_and_nothing_is_taken_for_anothers(
    path: Path, damage: Callable[[bytes], bytes]
) -> None:
    measured(open_journal(path), FIRST, Outcome(1.0))
    lines = path.read_bytes().splitlines(keepends=True)
    measured(open_journal(path), SECOND, Outcome(2.0))
    whole = path.read_bytes()
    # The line that opens the second trial: without it, what follows would be the first's.
    rest = whole[len(b"".join(lines)) :].splitlines(keepends=True)
    opened = next(
        number for number, line in enumerate(rest) if b'"params":{"BT"' in line.replace(b" ", b"") or b"BT" in line
    )
    data = b"".join([*lines, *rest[:opened], damage(rest[opened]), *rest[opened + 1 :]])
    path.write_bytes(data)
    said = Said()
    journal = Journal(path, {"gpu": "H100"}, said)
    assert journal.outcomes(PROBLEM, {}) == {FIRST: Outcome(1.0)}
    measured(journal, THIRD, Outcome(3.0))
    (aside,) = path.parent.glob("a.journal.broken-*")
    assert aside.read_bytes() == data
    assert len(said) == 1
    assert str(aside) in said[0]
    assert open_journal(path).outcomes(PROBLEM, {}) == {FIRST: Outcome(1.0), THIRD: Outcome(3.0)}


@pytest.mark.parametrize(("behind", "known"), [(b"", {FIRST: Outcome(None, SUSPECT)}), (b'{"op_code":9}\n', {})])
def test_what_may_have_ended_behind_a_damage_is_no_suspect(
    path: Path, behind: bytes, known: dict[Any, Outcome]
) -> None:
    process = forkserver.context().Process(target=claim_and_die, args=(path,))
    process.start()
    process.join(60)
    path.write_bytes(path.read_bytes() + b"[]\n" + behind)
    assert Journal(path, {"gpu": "H100"}, Said()).outcomes(PROBLEM, {}) == known


def claim_and_die(path: Path) -> None:
    claim = open_journal(path).claim(PROBLEM, FIRST, {})
    assert claim is not None
    assert claim.mark is not None
    claim.mark.make()
    os.kill(os.getpid(), signal.SIGKILL)


def test_tuners_that_find_a_damage_at_once_keep_a_copy_each(path: Path) -> None:
    measured(open_journal(path), FIRST, Outcome(1.0))
    data = b"[]\n" + path.read_bytes()
    for _ in range(2):
        path.write_bytes(data)
        Journal(path, {"gpu": "H100"}, Said())
    assert [aside.read_bytes() for aside in path.parent.glob("a.journal.broken-*")] == [data, data]


def test_a_torn_line_does_not_end_a_tuner_that_still_runs(path: Path) -> None:
    journal = open_journal(path)
    measured(journal, FIRST, Outcome(1.0))
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    measured(journal, SECOND, Outcome(2.0))
    again = open_journal(path)
    assert [again.remembered(PROBLEM, config, {}) for config in (FIRST, SECOND)] == [Outcome(1.0), Outcome(2.0)]


def tune_on_a_full_disk(path: Path, timed: Path) -> None:
    """Tune, in a process of its own that then ends: while it lived, others would wait for what it had open."""
    append, calls = storage_module._Backend.append_logs, []

    def fill(self: Any, logs: list[dict[str, Any]]) -> None:
        calls.append(logs)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, logs)

    storage_module._Backend.append_logs = fill
    said = Said()
    tuner = tune(Judge(), journal=Journal(path, {"gpu": "H100"}, said))
    assert tuner.winners == tune(Judge()).winners
    assert said == [f"{path}: No space left on device: what is measured from here on is not remembered"]
    timed.write_text(str(tuner.funnel.timed))


def test_a_full_disk_costs_the_record_and_not_the_run(path: Path, tmp_path: Path) -> None:
    timed = tmp_path / "timed"
    process = forkserver.context().Process(target=tune_on_a_full_disk, args=(path, timed))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    again = tune(Judge(), journal=open_journal(path))
    assert 0 < again.funnel.remembered < int(timed.read_text())
    assert again.winners[PROBLEM].config == min(candidates(), key=landscape)


def test_a_place_where_nothing_can_be_written_costs_the_record_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = Said()
    tuner = tune(Judge(), journal=Journal(tmp_path / "file" / "a.journal", {"gpu": "H100"}, said))
    assert tuner.winners == tune(Judge()).winners
    assert len(said) == 1
    assert "is not remembered" in said[0]


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert journals.default_path("nvidia_h100") == tmp_path / "retgen" / "nvidia_h100.journal"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert journals.default_path("x") == Path.home() / ".cache" / "retgen" / "x.journal"


def test_what_ctrl_c_interrupts_is_claimed_no_more(path: Path) -> None:
    judge = Judge(stop_after=3)
    assert tune(judge, journal=open_journal(path)).interrupted
    names = [name for name in optuna.get_all_study_names(storage_of(path)) if name.startswith(f"{PROBLEM.kernel} ")]
    trials = [t for name in names for t in optuna.load_study(study_name=name, storage=storage_of(path)).trials]
    assert trials
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]
