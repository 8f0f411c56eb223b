"""What was measured, written down as it is measured: a run that is stopped in any way loses one point at most.

Each search is a study of Optuna's (`optuna-dashboard` opens it), each candidate a trial; beside it lies a study of the
search's finals: races, races again in a fresh process, and proofs. A trial is written before its candidate is launched,
and is this worker's claim to it: of the trials of one candidate the first counts, so that of any number of workers one
measures it, and the others take its outcome.

A trial that a dead process has left running was the last thing that this process did, and may have been what killed
it, or the machine: it counts as failed, and is never launched again, not by a run that measures anew either; but not
one that was to follow another, which had not ended. What was raced or proven has run before: where the machine was not
started since, the process was killed from outside, and that is done once more. Otherwise each of those in a race may
have been it: none of them is raced again, its own measurement is what is known of it, and it may be proved, alone.

Measurements hold for as long as their context does. Races and proofs hold for the workers of one tuning, whenever they
start, and for those who take up a tuning of the same effort that was stopped: a run after one that ended races and
proves anew.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from generated.configuration import kernel_registry
from generated.configuration_file import MOST
from generated.retention.chunk import WHOLE
from tuning import forkserver
from tuning.compilation import Resources
from tuning.compile_pool import same_kernel
from tuning.device import OTHER, Mark
from tuning.measurement import HANGS, is_crash
from tuning.problems import FORMS, Problem
from tuning.space import knob_values
from tuning.storage import Database, StorageError, Store, is_url, masked, named, open_store, reason_of

PROTOCOL = 1  # of measuring: a change makes what was measured before no longer comparable
KNOB = IntDistribution(1, 1 << 30, log=True)  # one for every knob and for all times: a study's may not change
SUSPECT = "killed: the tuner died while this was measured, so it is not launched again"
KILLED = "killed"  # of what was being raced or proven when its tuner was
NOT_LAUNCHED = "not launched"  # of what a dead tuner had handed over, or had ended when it went on
RACED = "race"  # of a trial: the first of those that it is raced against, which is settled last
FORGETS = "forgets"  # of a mark among the trials: those before it do not count
MEASURE, RACE, FRESH, PROVE = "measure", "race", "fresh", "prove"
RACES = (RACE, FRESH)
POLL_SECONDS = 0.05  # between two looks at what another worker is at
# What a candidate does beside crashes, which are held against it at every shape, also by a run that measures anew.
VERDICTS = ("ArithmeticError", "out of resource")
CRASHED = "crashes; "  # begins the name of the study that holds them
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave: milliseconds and what else is known of them, or why there are none.

    Of a proof `ms` is the largest error. `needs` is what the compiled kernel needs, where that was written down.
    `spare`: it was measured because the GPU had nothing else to do.
    """

    ms: float | None
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    needs: Resources | None = field(default=None, compare=False)
    spare: bool = field(default=False, compare=False)


@dataclass
class _Study:
    """What is known of a search or of its finals: by step, what came of each configuration, and who is at it."""

    number: int | None
    problem: Problem
    config_type: type[Any]
    outcomes: dict[str, dict[Any, Outcome]] = field(default_factory=dict)
    busy: dict[str, set[Any]] = field(default_factory=dict)  # which other workers are launching
    barred: set[Any] = field(default_factory=set)  # from races
    spared: set[Any] = field(default_factory=set)  # steps and configurations at which a tuner was killed once
    read: set[int] = field(default_factory=set)  # numbers of trials that have ended, and need not be read again
    since: int = 0  # the number of the first trial that is not forgotten

    def of(self, step: str) -> dict[Any, Outcome]:
        return self.outcomes.setdefault(step, {})

    def is_taken(self, step: str, configs: Sequence[Any]) -> bool:
        """Whether this was done or is being done. A race is one, whoever takes part."""
        known, busy = self.of(step), self.busy.get(step, set())
        if step in RACES:
            return bool(known or busy) or not self.barred.isdisjoint(configs)
        return any(config in known or config in busy for config in configs)


class Journal:
    """The record of what was measured in one context: all that times depend on beside the problem.

    place: a journal file's path, or a database's URL (`tuning.storage`). context: by name, such as gpu and driver.
    `fresh` forgets what it has of every problem that is asked about, but for suspects, once for all workers of one
    `session`. Where nothing can be written, `say` is told so once, and tuning goes on without a record; but a database
    that is not there from the start is a StorageError, also where it was opened beforehand and is given in place of
    its URL.
    `effort`: races and proofs of another do not hold. `shared` says whether others may tune beside this one.
    """

    def __init__(
        self,
        place: Path | str | Database,
        context: Mapping[str, str],
        say: Callable[[str], None],
        *,
        fresh: bool = False,
        session: str = "",
        effort: str = "",
    ) -> None:
        self._context, self._say, self._fresh, self._effort = dict(context), say, fresh, effort
        self._name = place.name if isinstance(place, Database) else named(place)
        self._studies: dict[Any, _Study] = {}  # by problem, what runs beside it, and whether they are of its search
        self._ended: set[str] = set()  # workers whose races and proofs do not hold
        self._store: Store | None = None
        self._about: dict[str, Any] = {}  # what was written of this run
        self._crashes: list[FrozenTrial] = []
        self._run = self._runs = self._crashed = -1  # trial of this run, the study that holds it, and that of crashes
        self.rank, self.shared = 0, False
        try:
            self._store = place if isinstance(place, Database) else open_store(place, say)
            self._session = session or self._store.worker
            self._begin(self._store)
            self.shared = bool(session or self.rank or isinstance(self._store, Database))
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 - a record must not cost the run, whatever becomes of it
            if not (isinstance(place, Database) or is_url(place)):
                self._lose(error)
                return
            reason = reason_of(error)
        else:
            return
        raise StorageError(f"{self._name}: {reason}")

    # What is known

    def remembered(
        self, problem: Problem, config: Any, extra: dict[str, Any], *, step: str = MEASURE
    ) -> Outcome | None:
        """What is known of a candidate that runs with `extra` beside its own configuration; nothing is read anew.

        What failed in its proof has failed, whatever its time.
        """
        proof = self._study(problem, extra, PROVE).of(PROVE).get(config)
        if proof is not None and proof.ms is None:
            return proof
        return self._study(problem, extra, step).of(step).get(config)

    def outcomes(self, problem: Problem, extra: dict[str, Any]) -> dict[Any, Outcome]:
        """What all workers have measured by now of one problem."""
        self._refresh(problem, extra, PROVE)
        found = dict(self._refresh(problem, extra, MEASURE).of(MEASURE))
        failed = {c: proof for c, proof in self._study(problem, extra, PROVE).of(PROVE).items() if proof.ms is None}
        return found | {config: proof for config, proof in failed.items() if config in found}

    def raced(self, problem: Problem, extra: dict[str, Any], step: str) -> dict[Any, Outcome] | None:
        """The outcome of a race of this tuning, whoever held it; None where there was none or it is not over."""
        study = self._refresh(problem, extra, step)
        return None if study.busy.get(step) else dict(study.of(step)) or None

    def is_held(self, problem: Problem, extra: dict[str, Any], step: str) -> bool:
        """Whether another worker, which lives, is at this step of a problem right now."""
        return bool(self._refresh(problem, extra, step).busy.get(step))

    def is_measured(self, problem: Problem, config: Any, extra: dict[str, Any]) -> bool:
        """Whether another worker, which lives, is measuring this candidate right now."""
        return config in self._refresh(problem, extra, MEASURE).busy.get(MEASURE, ())

    def elsewhere(self, problems: Sequence[Problem]) -> set[Problem]:
        """At which of these other workers, which live, said that they are (`go_to`)."""
        none: set[str] = set()
        names = self._try(self._others, none)
        return {problem for problem in problems if self._name_of(problem) in names}

    def barred(self, problem: Problem, extra: dict[str, Any]) -> set[Any]:
        """Which configurations must not be raced: a race in which they took part ended its process."""
        return set(self._study(problem, extra, RACE).barred)

    def crashes(self, problem: Problem) -> dict[Any, str]:
        """Which configurations have ended a measuring process as any that compile to the same kernel; and how.

        At any shape and by any form, with this compiler.
        """
        self._try(self._read_crashes, None)
        if not self._crashes:
            return {}
        # With a T that only a segment for all sequences reaches: none was written down.
        kernels = {_kernel_of(one): one for one in (replace(problem, form=form, T=WHOLE) for form in FORMS)}
        found: dict[Any, str] = {}
        for trial in self._crashes:
            one = kernels.get(str(trial.user_attrs.get("kernel")))
            config = None if one is None else _config(type(one.default()), trial.params)
            if one is not None and config is not None:
                same, reason = same_kernel(one, config), str(trial.user_attrs.get("reason"))
                alike = [own for own in _as_of(problem, config) if same_kernel(problem, own) == same]
                found |= dict.fromkeys(alike, reason)
        return found

    # What is written

    def go_to(self, problems: Sequence[Problem]) -> None:
        """Tell the other workers which searches this one is at."""
        names = list(map(self._name_of, problems))
        self._try(lambda storage: _set(storage, self._run, "at", names), None)

    def claim(
        self,
        problem: Problem,
        config: Any,
        extra: dict[str, Any],
        *,
        step: str = MEASURE,
        needs: Resources | None = None,
        constraints: Mapping[str, float] | None = None,
        spare: bool = False,
        behind: Claim | RaceClaim | None = None,
    ) -> Claim | None:
        """Write a candidate down, to be launched now; None, where another worker is at it or it is known by now.

        `constraints` are Optuna's: feasible up to 0. `behind`: it is launched when that one has ended.
        """
        study = self._study(problem, extra, step)
        attributes = ({"needs": asdict(needs)} if needs else {}) | ({"spare": True} if spare else {})
        attributes |= {"behind": behind.trial} if behind else {}
        trials = self._claim(study, [config], step, attributes, constraints)
        return None if trials is None else Claim(self, study, step, config, trials[0])

    @contextlib.contextmanager
    def measuring(
        self, problem: Problem, config: Any, extra: dict[str, Any], **options: Any
    ) -> Iterator[Callable[[Outcome], None] | None]:
        """A claim for as long as what is within lasts, which gives the outcome to what this yields.

        It yields None, and nothing may be launched, where there is no claim. Without an outcome, as after Ctrl-C, the
        candidate counts as not tried.
        """
        claim = self.claim(problem, config, extra, **options)
        if claim is None:
            yield None
            return
        told: list[Outcome] = []
        try:
            yield told.append
        finally:
            claim.settle(told[-1] if told else None)

    def launch(
        self, problem: Problem, config: Any, extra: dict[str, Any], action: Callable[[], Outcome], **options: Any
    ) -> Outcome:
        """What is known of a candidate, or what another worker, waited for, finds out, or what `action` does.

        options: as of `claim`.
        """
        while True:
            with self.measuring(problem, config, extra, **options) as record:
                if record is not None:
                    outcome = action()
                    record(outcome)
                    return outcome
            if known := self.remembered(problem, config, extra, step=options.get("step", MEASURE)):
                return known
            time.sleep(POLL_SECONDS)

    def claim_race(
        self, problem: Problem, configs: Sequence[Any], extra: dict[str, Any], *, step: str
    ) -> RaceClaim | dict[Any, Outcome] | None:
        """Write down that these are raced against each other, without those that may not be.

        Or what came of the race that was held already: nothing of fewer than two. None where another worker is at it.
        """
        if known := self.raced(problem, extra, step):
            return {config: outcome for config, outcome in known.items() if outcome.ms is not None}
        fit = [config for config in configs if config not in self.barred(problem, extra)]
        if len(fit) < 2:
            return {}
        study = self._study(problem, extra, step)
        trials = self._claim(study, fit, step)
        return None if trials is None else RaceClaim(self, study, step, fit, trials)

    def run(self, **attributes: Any) -> Run:
        """Write down that a run of the tuner has begun; passwords in the attributes are masked."""
        run = Run(self)
        run.add(**attributes)
        return run

    @property
    def marks(self) -> bool:
        """Whether it would be known which of several was launched last, if this worker was killed."""
        return self._mark(0) is not None

    def sync(self) -> None:
        """Let what was written outlive a loss of power: rules are to name nothing that is forgotten then."""
        self._try(lambda storage: self._store.sync() if self._store else None, None)

    def close(self) -> None:
        """End the record; what this worker has not finished is another's to judge."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _begin(self, store: Store) -> None:
        """Write the run down, and find out which earlier ones came to their end, and how many go on beside it."""
        storage, self.rank = store.storage, 0
        self._runs = _study_number(storage, f"runs; {_text(self._context)}", {"context": self._context, "runs": True})
        compiler = {name: value for name, value in self._context.items() if name in ("gpu", "triton")}
        self._crashed = _study_number(storage, CRASHED + _text(compiler), {"context": compiler})
        earlier = storage.get_all_trials(self._runs, deepcopy=False)
        attributes = {"worker": store.worker, "session": self._session, "effort": self._effort, "boot": boot_id()}
        attributes |= self._about
        trial = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        self._run = storage.create_new_trial(self._runs, trial)
        store.begin(self._runs, self._run)
        others = [run for run in earlier if run.user_attrs.get("session") != self._session]
        last = max((run.number for run in others if run.state == TrialState.COMPLETE), default=-1)
        over = [run for run in earlier if run.user_attrs.get("effort") != self._effort]
        over += [run for run in others if run.number <= last]
        self._ended = {str(run.user_attrs.get("worker")) for run in over}
        for run in earlier:
            worker = str(run.user_attrs.get("worker"))
            if run.state == TrialState.RUNNING and store.is_dead(worker):
                launched = store.launched(worker)
                mark = {} if launched is None else {"launched": launched}
                _close(storage, run._trial_id, TrialState.FAIL, {"reason": KILLED, **mark})
                store.forget(worker)
            elif run.state == TrialState.RUNNING:
                self.rank += 1

    def _others(self, storage: Any) -> set[str]:
        """The searches that other workers are at, by name."""
        assert self._store is not None
        runs = storage.get_all_trials(self._runs, deepcopy=False)
        running = [run.user_attrs for run in runs if run.state == TrialState.RUNNING and run._trial_id != self._run]
        living = [run for run in running if not self._store.is_dead(str(run.get("worker")))]
        return {name for run in living for name in run.get("at", ())}

    def _claim(
        self,
        study: _Study,
        configs: Sequence[Any],
        step: str,
        attributes: Mapping[str, Any] = MappingProxyType({}),
        constraints: Mapping[str, float] | None = None,
    ) -> list[Any] | None:
        """The trials by which these configurations are this worker's to launch; None where they are not."""

        def claim(storage: Any) -> list[Any] | None:
            assert self._store is not None
            if self._store.is_taken_for_dead():
                self._begin(self._store)
            self._read(storage, study)
            if study.is_taken(step, configs):
                return None
            ours = {"worker": self._store.worker, **attributes}
            ours |= {} if step == MEASURE else {"step": step, "rivals": len(configs)}
            trials: list[Any] = []
            kept = False
            try:
                with forkserver.uninterrupted():
                    for config in configs:
                        race = {RACED: trials[0]} if trials else {}
                        trial = _trial(config, TrialState.RUNNING, ours | race, constraints)
                        trials.append(storage.create_new_trial(study.number, trial))
                self._read(storage, study, before=storage.get_trial(trials[0]).number)
                kept = not study.is_taken(step, configs)
            finally:  # also after Ctrl-C: what was not launched must not look as if it had
                for trial in [] if kept else trials:
                    _close(storage, trial, TrialState.PRUNED, {"withdrawn": True})
            return trials if kept else None

        unrecorded: list[Any] | None = [None] * len(configs)
        return self._try(claim, unrecorded)

    def _mark(self, trial: Any) -> Mark | None:
        return None if self._store is None or trial is None else self._store.mark(trial)

    def _settle(self, study: _Study, step: str, config: Any, trial: Any, outcome: Outcome | None) -> None:
        kept = outcome if outcome and (outcome.ms is not None or is_verdict(outcome.reason)) else None
        if kept is not None:
            _take(study, step, config, kept, alone=False)
        if trial is not None:
            self._try(lambda storage: _finish(storage, trial, step, kept), None)
        # A proof that takes too long may be float64's doing.
        crashed = kept is not None and is_crash(kept.reason) and (step == MEASURE or HANGS not in kept.reason)
        if kept is not None and crashed and step not in RACES:
            self._write_crash(study.problem, config, kept.reason)

    def _write_crash(self, problem: Problem, config: Any, reason: str) -> None:
        kernel, own = same_kernel(problem, config)
        trial = _trial(own, TrialState.FAIL, {"kernel": _kernel_of(kernel), "reason": reason})
        self._crashes.append(trial)
        self._try(lambda storage: storage.create_new_trial(self._crashed, trial), None)

    def _read_crashes(self, storage: Any) -> None:
        self._crashes = storage.get_all_trials(self._crashed, deepcopy=False)

    # Studies

    def _refresh(self, problem: Problem, extra: dict[str, Any], step: str) -> _Study:
        study = self._study(problem, extra, step)
        self._try(lambda storage: self._read(storage, study), None)
        return study

    def _study(self, problem: Problem, extra: dict[str, Any], step: str) -> _Study:
        key = problem, tuple(sorted(extra.items())), step == MEASURE
        if key not in self._studies:
            described = "".join(f"; {name} {knob_values(value)}" for name, value in sorted(extra.items()))
            full_name = self._name_of(problem) + described + ("" if step == MEASURE else "; finals")
            empty = _Study(None, problem, type(problem.default()))
            attributes = self._described(problem, extra, step)
            self._studies[key] = self._try(lambda storage: self._load(storage, full_name, empty, attributes), empty)
        return self._studies[key]

    def _load(self, storage: Any, name: str, empty: _Study, attributes: dict[str, Any]) -> _Study:
        study = replace(empty, number=_study_number(storage, name, attributes))
        if self._fresh:
            self._forget(storage, study.number)
        self._read(storage, study)
        return study

    def _forget(self, storage: Any, number: int | None) -> None:
        """Let nothing count that was there before this session, unless another worker of it has done so."""
        trials = storage.get_all_trials(number, deepcopy=False)
        if all(trial.user_attrs.get(FORGETS) != self._session for trial in trials):
            mark = create_trial(state=TrialState.PRUNED, user_attrs={FORGETS: self._session})
            storage.create_new_trial(number, mark)

    def _name_of(self, problem: Problem) -> str:
        sizes = " ".join(f"{axis}={getattr(problem, axis)}" for axis in "BTHKV")
        source = kernel_registry()[problem.kernel].source
        return f"{problem.kernel} {source} {problem.dtype} {sizes}; {_text(self._context)}; protocol {PROTOCOL}"

    def _described(self, problem: Problem, extra: dict[str, Any], step: str) -> dict[str, Any]:
        floor = problem.floor_ms(self._context.get("gpu", ""))
        return {
            "problem": asdict(problem),
            "context": self._context,
            "extra": {key: knob_values(value) for key, value in sorted(extra.items())},
            "source": kernel_registry()[problem.kernel].source,
            "default": knob_values(problem.default()),
            **({} if floor is None else {"floor_ms": floor}),
            **({} if step == MEASURE else {"finals": True}),
        }

    def _read(self, storage: Any, study: _Study, *, before: int | None = None) -> None:
        """Take in what all workers have written since; of a trial from a number on, nobody is at it yet."""
        study.busy = {}
        trials = storage.get_all_trials(study.number, deepcopy=False)
        if (since := counts_since(trials)) > study.since:  # another worker's session has forgotten the rest
            study.since = since
            study.outcomes.clear()
            study.barred.clear()
            study.read.clear()
        for trial in trials:
            if trial.number not in study.read:
                counts = trial.number >= study.since and (before is None or trial.number < before)
                self._take_in(storage, study, trial, counts=counts)

    def _take_in(self, storage: Any, study: _Study, trial: FrozenTrial, *, counts: bool) -> None:
        """Take in a trial that has ended, of those that were forgotten only suspects; who is at one that `counts`."""
        assert self._store is not None
        worker, step = str(trial.user_attrs.get("worker")), str(trial.user_attrs.get("step", MEASURE))
        is_running = trial.state == TrialState.RUNNING
        if is_running and worker == self._store.worker:
            return
        config = _config(study.config_type, trial.params)
        if config is not None and self._goes_on(storage, trial, worker):
            if counts:
                study.busy.setdefault(step, set()).add(config)
            return
        study.read.add(trial.number)
        if _is_void(storage, trial) or (is_running and self._let_off(storage, study, trial, worker, config)):
            return
        if trial.user_attrs.get(KILLED):
            study.spared.add((step, config))
        outcome = None if config is None else self._outcome(storage, trial, worker, step)
        if outcome is not None and (trial.number >= study.since or outcome.reason == SUSPECT):
            _take(study, step, config, outcome, alone=trial.user_attrs.get("rivals", 1) == 1)

    def _goes_on(self, storage: Any, trial: FrozenTrial, worker: str) -> bool:
        """Whether a worker that lives is at it, or at the race that it is part of."""
        assert self._store is not None
        if trial.state == TrialState.RUNNING:
            return not self._store.is_dead(worker)
        race = trial.user_attrs.get(RACED)
        return race is not None and not storage.get_trial(race).state.is_finished()

    def _let_off(self, storage: Any, study: _Study, trial: FrozenTrial, worker: str, config: Any) -> bool:
        """Close what a dead tuner has left running, where it may be launched again."""
        step = str(trial.user_attrs.get("step", MEASURE))
        if not self._may_have_broken(storage, trial, worker, step):
            _close(storage, trial._trial_id, TrialState.PRUNED, {NOT_LAUNCHED: True})
            return True
        # What is raced or proven has run before. If its tuner goes twice, that may be for the memory that it takes.
        if step == MEASURE or (step, config) in study.spared or not self._was_killed(storage, worker):
            return False
        _close(storage, trial._trial_id, TrialState.PRUNED, {KILLED: True})
        study.spared.add((step, config))
        return True

    def _outcome(self, storage: Any, trial: FrozenTrial, worker: str, step: str) -> Outcome | None:
        figures, needs = trial.user_attrs.get("figures", {}), trial.user_attrs.get("needs")
        spare = bool(trial.user_attrs.get("spare"))
        if trial.state == TrialState.COMPLETE and (step == MEASURE or worker not in self._ended):
            return Outcome(trial.value, "", figures, Resources(**needs) if needs else None, spare)
        if trial.state == TrialState.FAIL:
            return Outcome(None, str(trial.user_attrs.get("reason", "")), spare=spare)
        if trial.state == TrialState.RUNNING:
            _finish(storage, trial._trial_id, step, Outcome(None, SUSPECT))
            return Outcome(None, SUSPECT)
        return None

    def _may_have_broken(self, storage: Any, trial: FrozenTrial, worker: str, step: str) -> bool:
        """Whether what a dead tuner has not settled may be what ended it.

        Not if it was not launched, or had ended when something else was. Where no mark says so, that can be told of
        candidates alone, and the machine must be as it was.
        """
        assert self._store is not None
        launched = self._store.launched(worker)  # first: whoever takes it away has noted it before
        runs = storage.get_all_trials(self._runs, deepcopy=False)
        own = [run.user_attrs for run in runs if run.user_attrs.get("worker") == worker]
        noted = [attributes["launched"] for attributes in own if "launched" in attributes]
        launched = noted[-1] if noted else launched
        if launched is None:
            return not (self._was_killed(storage, worker) and self._was_waiting(storage, trial))
        return launched == (OTHER if step == PROVE else trial.user_attrs.get(RACED, trial._trial_id))

    def _was_waiting(self, storage: Any, trial: FrozenTrial) -> bool:
        """Whether it was not launched yet: what it was to follow has not been settled."""
        behind = trial.user_attrs.get("behind")
        if behind is None:
            return False
        first = storage.get_trial(behind)
        is_open = first.state == TrialState.RUNNING or first.user_attrs.get("reason") == SUSPECT
        return bool(is_open or any(first.user_attrs.get(name) for name in (KILLED, NOT_LAUNCHED)))

    def _was_killed(self, storage: Any, worker: str) -> bool:
        """Whether a tuner is gone, but its machine was not started again since: it was killed from outside."""
        runs = storage.get_all_trials(self._runs, deepcopy=False)
        boots = {run.user_attrs.get("boot") for run in runs if run.user_attrs.get("worker") == worker}
        return boots == {boot_id()} != {""}

    def _try(self, action: Callable[[Any], T], otherwise: T) -> T:
        if self._store is None:
            return otherwise
        try:
            return action(self._store.storage)
        except Exception as error:  # noqa: BLE001 - a record must not cost the run, whatever becomes of it
            self._lose(error)
            return otherwise

    def _lose(self, error: Exception) -> None:
        if self._store is not None:  # nothing that stays open there may have ended this process
            store, self._store = self._store, None
            store.leave()
        for study in self._studies.values():
            study.busy.clear()  # what others are at is not going to be heard of any more
        self._say(f"{self._name}: {reason_of(error)}: what is measured from here on is not remembered")


@dataclass(frozen=True)
class Claim:
    """A candidate that is this worker's to launch."""

    journal: Journal
    study: _Study
    step: str
    config: Any
    trial: Any

    @property
    def mark(self) -> Mark | None:
        """What its measuring process has to make when it launches this; None where nobody could read it."""
        return self.journal._mark(self.trial)

    def settle(self, outcome: Outcome | None) -> None:
        """Write down what came of it; None: it counts as not tried."""
        self.journal._settle(self.study, self.step, self.config, self.trial, outcome)


@dataclass(frozen=True)
class RaceClaim:
    """Several configurations that are this worker's to race."""

    journal: Journal
    study: _Study
    step: str
    configs: list[Any]
    trials: list[Any]

    @property
    def trial(self) -> Any:
        """The one that stands for the race: the others name it, and count once it is settled."""
        return self.trials[0]

    @property
    def mark(self) -> Mark | None:
        """As a `Claim`'s."""
        return self.journal._mark(self.trial)

    def settle(self, outcomes: Sequence[Outcome] | None) -> None:
        """Write down what came of each; None: the race counts as not held."""
        each: Sequence[Outcome | None] = [None] * len(self.configs) if outcomes is None else outcomes
        with forkserver.uninterrupted():
            for config, trial, outcome in reversed([*zip(self.configs, self.trials, each, strict=True)]):
                self.journal._settle(self.study, self.step, config, trial, outcome)


class Run:
    """The record of one run of the tuner, which counts as running until it is finished or its process has ended."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def add(self, **attributes: Any) -> None:
        """Write attributes down; passwords in them are masked."""
        for name, value in _masked(attributes).items():
            self._journal._about[name] = value
            self._journal._try(partial(_set, trial=self._journal._run, name=name, value=value), None)

    def finish(self, total: float, /, *, interrupted: bool = False, **attributes: Any) -> None:
        """Write down how the run ended, and how many seconds it took.

        One that was interrupted can be taken up: its races and proofs still hold.
        """
        self.add(**attributes)
        state = TrialState.PRUNED if interrupted else TrialState.COMPLETE
        values = None if interrupted else [total]
        self._journal._try(lambda storage: _close(storage, self._journal._run, state, {}, values), None)


def boot_id() -> str:
    """What tells this machine's start from any other's; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def counts_since(trials: Sequence[FrozenTrial]) -> int:
    """The number of the first of a study's trials that counts: what lies before it was forgotten by `fresh`.

    Of the marks of one session the first holds, so that its workers forget nothing of each other's.
    """
    marks = [trial for trial in trials if FORGETS in trial.user_attrs]
    first = {trial.user_attrs[FORGETS]: trial.number for trial in reversed(marks)}
    return max(first.values(), default=-1) + 1


def distributions_of(config: Any) -> dict[str, BaseDistribution]:
    """The values that each knob of a configuration may have in a study, as Optuna is told of them."""
    most = {knob.name: knob.metadata.get(MOST) for knob in fields(config)}
    return {name: KNOB if limit is None else IntDistribution(0, limit) for name, limit in most.items()}


def default_path(device: str) -> Path:
    """Where the record of a GPU lies: in the user's cache directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            base = Path(tempfile.gettempdir())
    return base / "retgen" / f"{device}.journal"


def _kernel_of(problem: Problem) -> str:
    """A kernel's text, and the sizes that it is compiled for."""
    source = kernel_registry()[problem.kernel].source
    return f"{problem.kernel} {source} {problem.dtype} K={problem.K} V={problem.V}"


def _text(context: Mapping[str, str]) -> str:
    return ", ".join(value if name == "gpu" else f"{name} {value}" for name, value in context.items())


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {_masked(name): _masked(inner) for name, inner in value.items()}
    return [_masked(inner) for inner in value] if isinstance(value, list | tuple) else value


def _study_number(storage: Any, name: str, attributes: dict[str, Any]) -> int:
    """The study of a name, made where there is none."""
    try:
        number = storage.get_study_id_from_name(name)
    except KeyError:
        with contextlib.suppress(DuplicatedStudyError):  # by another worker, between the two calls
            storage.create_new_study([StudyDirection.MINIMIZE], name)
        number = storage.get_study_id_from_name(name)
    known = storage.get_study_user_attrs(number)  # none, where who made it was killed since
    for key in attributes.keys() - known.keys():
        storage.set_study_user_attr(number, key, attributes[key])
    return int(number)


def _set(storage: Any, trial: int, name: str, value: Any) -> None:
    with contextlib.suppress(UpdateFinishedTrialError):  # another worker took this one for dead
        storage.set_trial_user_attr(trial, name, value)


def _config(config_type: type[Any], knobs: Mapping[str, Any]) -> Any | None:
    """The configuration of a trial's knobs, or None where they are of another time."""
    try:
        return config_type(**knobs)
    except (TypeError, ValueError):
        return None


def _as_of(problem: Problem, config: Any) -> list[Any]:
    """The configurations of a problem with the knobs of another's: with every length, where its segments have one."""
    kind = type(problem.default())
    names = {knob.name for knob in fields(kind)}
    knobs = {name: value for name, value in knob_values(config).items() if name in names}
    powers = range(WHOLE.bit_length()) if "L" in names else ()
    lengths: list[dict[str, int]] = [{"L": 1 << power} for power in powers] or [{}]
    made = [_config(kind, knobs | length) for length in lengths]
    return [own for own in made if own is not None]


def is_verdict(reason: str) -> bool:
    """Whether this is what a candidate did, and neither the machine nor whoever uses it too: others are forgotten."""
    return is_crash(reason) or any(text in reason for text in VERDICTS)


def _is_void(storage: Any, trial: FrozenTrial) -> bool:
    """Whether it is an outcome of a race that its tuner has not settled to the end."""
    race = trial.user_attrs.get(RACED)
    is_outcome = trial.state in (TrialState.COMPLETE, TrialState.FAIL) and trial.user_attrs.get("reason") != SUSPECT
    if race is None or not is_outcome:
        return False
    first = storage.get_trial(race)
    return bool(first.state == TrialState.PRUNED or first.user_attrs.get("reason") == SUSPECT)


def _take(study: _Study, step: str, config: Any, outcome: Outcome, *, alone: bool) -> None:
    """Take in what came of a configuration; which of those that raced ended a race, nobody knows."""
    if step in RACES and outcome.ms is None:
        study.barred.add(config)
        if not alone:
            return
        step = PROVE  # it is known: it was alone, and is not to be launched for its proof either
    study.of(step).setdefault(config, outcome)


def _trial(
    config: Any, state: TrialState, attributes: dict[str, Any], constraints: Mapping[str, float] | None = None
) -> FrozenTrial:
    return create_trial(
        state=state,
        params=knob_values(config),
        distributions=distributions_of(config),
        user_attrs=attributes,
        constraints=dict(constraints) if constraints else None,
    )


def _finish(storage: Any, trial: int, step: str, outcome: Outcome | None) -> None:
    if outcome is None:
        _close(storage, trial, TrialState.PRUNED, {})
    elif outcome.ms is None:
        _close(storage, trial, TrialState.FAIL, {"reason": outcome.reason})
    else:
        figures = dict(outcome.figures)
        attributes: dict[str, Any] = {"figures": figures} if figures else {}
        if step in RACES and {"low", "high"} <= figures.keys():
            attributes["interval"] = [figures["low"], figures["high"]]
        _close(storage, trial, TrialState.COMPLETE, attributes, [outcome.ms])


def _close(
    storage: Any, trial: int, state: TrialState, attributes: dict[str, Any], values: list[float] | None = None
) -> None:
    """End a trial, its attributes first: afterwards it cannot be changed, by no worker."""
    with contextlib.suppress(UpdateFinishedTrialError):  # another worker took this one for dead, or has said the same
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial, name, value)
        storage.set_trial_state_values(trial, state, values)
