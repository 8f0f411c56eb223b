"""What was measured, written down as it is measured: a run that is stopped in any way loses one point at most.

Each search is a study of Optuna's in a journal file (`optuna-dashboard` opens it), each candidate a trial. A trial is
written before its candidate is launched. One that a dead process has left running was the last thing that this process
did, and may have been what killed it, or the machine: it counts as failed, and is never launched again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from generated.configuration import kernel_registry
from tuning.problems import Problem
from tuning.space import knob_values

PROTOCOL = 1  # of measuring: a change makes what was measured before no longer comparable
KNOB = IntDistribution(1, 1 << 30, log=True)  # one for every knob and for all times: a study's may not change
SUSPECT = "killed: the tuner died while this was measured, so it is not launched again"
TRANSIENT = "out of memory"  # says nothing about a candidate
T = TypeVar("T")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave: milliseconds, or why there are none."""

    ms: float | None
    reason: str = ""


@dataclass
class _Study:
    number: int | None
    outcomes: dict[Any, Outcome]


class Journal:
    """The record, in one file, of what was measured in one context: all that times depend on beside the problem.

    `fresh` forgets what the file has of every problem that is asked about. Where the file cannot be written, `say` is
    told so once, and tuning goes on without a record.
    """

    def __init__(self, path: Path, context: str, say: Callable[[str], None], *, fresh: bool = False) -> None:
        self._path, self._context, self._say, self._fresh = path, context, say, fresh
        self._studies: dict[Problem, _Study] = {}
        self._storage: JournalStorage | None = None
        try:
            self._storage = _open(path, say)
        except OSError as error:
            self._lose(error)

    def remembered(self, problem: Problem, config: Any) -> Outcome | None:
        """What is known of a candidate."""
        return self._study(problem).outcomes.get(config)

    @contextlib.contextmanager
    def measuring(self, problem: Problem, config: Any) -> Iterator[Callable[[Outcome], None]]:
        """Write the candidate down, to be launched within, and take the outcome by what this yields.

        Without an outcome, as after Ctrl-C, the candidate counts as not tried.
        """
        study = self._study(problem)
        trial = self._try(lambda storage: storage.create_new_trial(study.number, _running(config)))
        told: list[Outcome] = []
        try:
            yield told.append
        finally:
            kept = [outcome for outcome in told if TRANSIENT not in outcome.reason]
            for outcome in kept:
                study.outcomes[config] = outcome
            if trial is not None:
                self._try(lambda storage: _finish(storage, trial, kept[-1] if kept else None))

    def _study(self, problem: Problem) -> _Study:
        if problem not in self._studies:
            name = self._name(problem)
            found = self._try(lambda storage: _load(storage, name, type(problem.default()), fresh=self._fresh))
            self._studies[problem] = found or _Study(None, {})
        return self._studies[problem]

    def _name(self, problem: Problem) -> str:
        sizes = " ".join(f"{axis}={getattr(problem, axis)}" for axis in "BTHKV")
        source = kernel_registry()[problem.kernel].source
        return f"{problem.kernel} {source} {problem.dtype} {sizes}; {self._context}; protocol {PROTOCOL}"

    def _try(self, action: Callable[[Any], T]) -> T | None:
        if self._storage is None:
            return None
        try:
            return action(self._storage)
        except OSError as error:
            self._lose(error)
            return None

    def _lose(self, error: OSError) -> None:
        self._storage = None
        self._say(f"{self._path}: {error.strerror or error}: what is measured from here on is not remembered")


def default_path(device: str) -> Path:
    """Where the record of a GPU lies: in the user's cache directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "retgen" / f"{device}.journal"


def _open(path: Path, say: Callable[[str], None]) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    try:
        return JournalStorage(_backend(path))
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # what damaged lines lead Optuna to
        broken = path.rename(path.with_name(f"{path.name}.broken-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}"))
        say(f"{path} could not be read ({type(error).__name__}): it is now {broken}, and a new one begins")
        return JournalStorage(_backend(path))


def _backend(path: Path) -> JournalFileBackend:
    lock: Any = _Lock(path)
    return JournalFileBackend(str(path), lock)


def _mend(path: Path) -> None:
    """Cut off a line that was not written to its end: the next would continue it, and neither could be read."""
    with _Lock(path) as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)


class _Lock:
    """Held by whoever writes the file, as Optuna's own locks, which outlive a process that is killed; this does not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("a+b")
        self._file.seek(0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()

    def __enter__(self) -> BinaryIO:
        self.acquire()
        assert self._file is not None
        return self._file

    def __exit__(self, *error: object) -> None:
        self.release()


def _running(config: Any) -> FrozenTrial:
    params = knob_values(config)
    distributions: dict[str, BaseDistribution] = dict.fromkeys(params, KNOB)
    worker = {"worker": _worker(os.getpid())}
    return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=worker)


def _finish(storage: JournalStorage, trial: int, outcome: Outcome | None) -> None:
    if outcome is None:
        storage.set_trial_state_values(trial, TrialState.PRUNED)
    elif outcome.ms is None:
        storage.set_trial_user_attr(trial, "reason", outcome.reason)
        storage.set_trial_state_values(trial, TrialState.FAIL)
    else:
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [outcome.ms])


def _load(storage: JournalStorage, name: str, config_type: type[Any], *, fresh: bool) -> _Study:
    numbers = {study.study_name: study._study_id for study in storage.get_all_studies()}
    if fresh and name in numbers:
        storage.delete_study(numbers.pop(name))
    if name not in numbers:
        return _Study(storage.create_new_study([StudyDirection.MINIMIZE], name), {})
    found = _Study(numbers[name], {})
    for trial in storage.get_all_trials(numbers[name], deepcopy=False):
        outcome = _outcome(storage, trial)
        if outcome is not None:
            found.outcomes[config_type(**trial.params)] = outcome
    return found


def _outcome(storage: JournalStorage, trial: FrozenTrial) -> Outcome | None:
    if trial.state == TrialState.COMPLETE:
        return Outcome(trial.value)
    if trial.state == TrialState.FAIL:
        return Outcome(None, str(trial.user_attrs.get("reason", "")))
    if trial.state == TrialState.RUNNING and _is_dead(str(trial.user_attrs.get("worker"))):
        outcome = Outcome(None, SUSPECT)
        _finish(storage, trial._trial_id, outcome)
        return outcome
    return None


def _worker(pid: int) -> str:
    """A process that no other is taken for: its machine, its number, and how long after which boot it began."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        boot = started = "unknown"
    return f"{platform.node()} {pid} {started} {boot}"


def _is_dead(worker: str) -> bool:
    """Whether a process of this machine has ended; of another machine's nothing is known."""
    node, _, rest = worker.partition(" ")
    return node == platform.node() and _worker(int(rest.split()[0])) != worker
