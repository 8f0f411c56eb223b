"""What was measured, written down as it is measured: a run that is stopped in any way loses one point at most.

Each search is a study of Optuna's in a journal file (`optuna-dashboard` opens it), each candidate a trial. A trial is
written before its candidate is launched. One that a dead process has left running was the last thing that this process
did, and may have been what killed it, or the machine: it counts as failed, and is never launched again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from generated.configuration import kernel_registry
from tuning.problems import Problem
from tuning.space import knob_values

PROTOCOL = 1  # of measuring: a change makes what was measured before no longer comparable
KNOB = IntDistribution(1, 1 << 30, log=True)  # one for every knob and for all times: a study's may not change
LIMIT = IntDistribution(0, 255)  # for maxnreg, which may be none
SUSPECT = "killed: the tuner died while this was measured, so it is not launched again"
# What a candidate does, and neither the machine nor whoever uses it too; other failures are not remembered.
VERDICTS = (
    "ArithmeticError",
    "the kernel hangs",
    "the kernel crashed",
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "unspecified launch failure",
    "out of resource",
)
T = TypeVar("T")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave: milliseconds and what else is known of them, or why there are none."""

    ms: float | None
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


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
        self._studies: dict[str, _Study] = {}
        self._storage: JournalStorage | None = None
        try:
            self._storage = _open(path, say)
            self._alive = _Alive(path)
        except Exception as error:  # noqa: BLE001 - a record must not cost the run, whatever becomes of it
            self._lose(error)

    def remembered(self, problem: Problem, config: Any, extra: dict[str, Any]) -> Outcome | None:
        """What is known of a candidate that runs with `extra` beside its own configuration."""
        return self._study(problem, extra).outcomes.get(config)

    @contextlib.contextmanager
    def measuring(self, problem: Problem, config: Any, extra: dict[str, Any]) -> Iterator[Callable[[Outcome], None]]:
        """Write the candidate down, to be launched within, and take the outcome by what this yields.

        Without an outcome, as after Ctrl-C, the candidate counts as not tried.
        """
        study = self._study(problem, extra)
        trial = self._try(lambda storage: storage.create_new_trial(study.number, _running(config, self._alive.name)))
        told: list[Outcome] = []
        try:
            yield told.append
        finally:
            kept = [outcome for outcome in told if outcome.ms is not None or _is_verdict(outcome.reason)]
            for outcome in kept:
                study.outcomes[config] = outcome
            if trial is not None:
                self._try(lambda storage: _finish(storage, trial, kept[-1] if kept else None))

    def _study(self, problem: Problem, extra: dict[str, Any]) -> _Study:
        name = self._name(problem) + "".join(f"; {key} {knob_values(value)}" for key, value in sorted(extra.items()))
        if name not in self._studies:
            found = self._try(lambda storage: self._load(storage, name, type(problem.default())))
            self._studies[name] = found or _Study(None, {})
        return self._studies[name]

    def _load(self, storage: JournalStorage, name: str, config_type: type[Any]) -> _Study:
        numbers = {study.study_name: study._study_id for study in storage.get_all_studies()}
        if self._fresh and name in numbers:
            storage.delete_study(numbers.pop(name))
        if name not in numbers:
            with contextlib.suppress(DuplicatedStudyError):  # by another tuner, between the two calls
                return _Study(storage.create_new_study([StudyDirection.MINIMIZE], name), {})
        number = storage.get_study_id_from_name(name)
        found = _Study(number, {})
        for trial in storage.get_all_trials(number, deepcopy=False):
            outcome = _outcome(storage, trial, self._path)
            if outcome is not None:
                with contextlib.suppress(TypeError, ValueError):  # knobs of another time
                    found.outcomes[config_type(**trial.params)] = outcome
        return found

    def _name(self, problem: Problem) -> str:
        sizes = " ".join(f"{axis}={getattr(problem, axis)}" for axis in "BTHKV")
        source = kernel_registry()[problem.kernel].source
        return f"{problem.kernel} {source} {problem.dtype} {sizes}; {self._context}; protocol {PROTOCOL}"

    def _try(self, action: Callable[[Any], T]) -> T | None:
        if self._storage is None:
            return None
        try:
            return action(self._storage)
        except Exception as error:  # noqa: BLE001 - as above
            self._lose(error)
            return None

    def _lose(self, error: Exception) -> None:
        self._storage = None
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        self._say(f"{self._path}: {reason}: what is measured from here on is not remembered")


def default_path(device: str) -> Path:
    """Where the record of a GPU lies: in the user's cache directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            base = Path(tempfile.gettempdir())
    return base / "retgen" / f"{device}.journal"


def _open(path: Path, say: Callable[[str], None]) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(_backend(path))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged lines lead Optuna to
        broken = path.with_name(f"{path.name}.broken-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}")
        say(f"{path} is damaged ({type(error).__name__}): as it was it is now {broken}, and what can be read is kept")
        return _salvaged(path, broken)


def _backend(path: Path) -> JournalFileBackend:
    lock: Any = _Lock(path)
    return JournalFileBackend(str(path), lock)


def _salvaged(path: Path, broken: Path) -> JournalStorage:
    """The storage of the lines that can be read, or an empty one where these make no whole."""
    with _Lock(path) as file:
        data = file.read()
        broken.write_bytes(data)
        whole = b"".join(line for line in data.splitlines(keepends=True) if _is_record(line))
        file.truncate(0)
        file.write(whole)
    try:
        return JournalStorage(_backend(path))
    except Exception:  # noqa: BLE001 - as above
        with _Lock(path) as file:
            file.truncate(0)
        return JournalStorage(_backend(path))


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "op_code" in record


def _is_verdict(reason: str) -> bool:
    return any(text in reason for text in VERDICTS)


class _Lock:
    """Held by whoever writes the file, as Optuna's own locks, which outlive a process that is killed; this does not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and cut off a line that was not written to its end: the next would continue it."""
        self._file = self._path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        self._file.seek(0)
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


class _Alive:
    """A file beside the journal that is locked while this process lives: its number and machine's name tell less."""

    def __init__(self, path: Path) -> None:
        self.name = uuid.uuid4().hex
        file = _alive_path(path, self.name)
        handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        weakref.finalize(self, _end, handle, file)


def _end(handle: int, file: Path) -> None:
    file.unlink(missing_ok=True)
    os.close(handle)


def _alive_path(path: Path, name: str) -> Path:
    return path.with_name(f".{path.name}.{name}.alive")


def _is_dead(path: Path, name: str) -> bool:
    """Whether the process that wrote this name into a journal has ended."""
    file = _alive_path(path, name)
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    file.unlink(missing_ok=True)
    return True


def _running(config: Any, worker: str) -> FrozenTrial:
    params = knob_values(config)
    distributions: dict[str, BaseDistribution] = {name: LIMIT if name == "maxnreg" else KNOB for name in params}
    attributes = {"worker": worker}
    return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attributes)


def _finish(storage: JournalStorage, trial: int, outcome: Outcome | None) -> None:
    if outcome is None:
        storage.set_trial_state_values(trial, TrialState.PRUNED)
    elif outcome.ms is None:
        storage.set_trial_user_attr(trial, "reason", outcome.reason)
        storage.set_trial_state_values(trial, TrialState.FAIL)
    else:
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [outcome.ms])


def _outcome(storage: JournalStorage, trial: FrozenTrial, path: Path) -> Outcome | None:
    if trial.state == TrialState.COMPLETE:
        return Outcome(trial.value)
    if trial.state == TrialState.FAIL:
        return Outcome(None, str(trial.user_attrs.get("reason", "")))
    if trial.state == TrialState.RUNNING and _is_dead(path, str(trial.user_attrs.get("worker"))):
        outcome = Outcome(None, SUSPECT)
        with contextlib.suppress(UpdateFinishedTrialError):  # another tuner has said the same
            _finish(storage, trial._trial_id, outcome)
        return outcome
    return None
