"""What a storage tells of past searches and runs, read through Optuna's public functions and checked as it is read.

What another program, or another version of the tuner, has put there is counted and left out: a report is about the
rest. Times of day are Optuna's own, local and without a zone.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tuning.journal import counts_since
from tuning.problems import Problem
from tuning.run import RunError
from tuning.storage import connected, is_url, masked

FINALS, RUNS = "; finals", "runs; "
TRIED = (TrialState.COMPLETE, TrialState.FAIL)  # a pruned trial was not launched, a running one has not ended
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class PastTrial:
    """One candidate's time on the GPU: its knobs, milliseconds or why there are none, and the seconds that it cost.

    `step` is empty in a search; of finalists it is `race`, `fresh` or `prove`, and the last one's `value` is an error.
    """

    knobs: dict[str, int]
    value: float | None
    reason: str
    seconds: float
    ended: dt.datetime
    step: str = ""


@dataclass(frozen=True)
class PastSearch:
    """All that was measured of one problem with one version of its kernel and of the software, in order of time."""

    problem: Problem
    context: dict[str, str]
    source: str
    default: dict[str, int]
    floor_ms: float | None
    trials: tuple[PastTrial, ...]
    finals: tuple[PastTrial, ...]

    @property
    def timed(self) -> list[PastTrial]:
        """Those that have a time."""
        return [trial for trial in self.trials if trial.value is not None]

    @property
    def failed(self) -> list[PastTrial]:
        """Those that were launched, and are not used."""
        return [trial for trial in (*self.trials, *self.finals) if trial.value is None]

    @property
    def best(self) -> PastTrial:
        """The fastest."""
        return min(self.timed, key=lambda trial: trial.value or 0.0)

    @property
    def default_ms(self) -> float | None:
        """The default's milliseconds, where it was timed."""
        return next((trial.value for trial in self.timed if trial.knobs == self.default), None)

    @property
    def seconds(self) -> float:
        """What all trials cost."""
        return sum(trial.seconds for trial in (*self.trials, *self.finals))

    @property
    def ended(self) -> dt.datetime:
        """When the last trial ended."""
        return max(trial.ended for trial in (*self.trials, *self.finals))


@dataclass(frozen=True)
class PastWinner:
    """A rule that a run wrote: the problem, what to use, and the figures that it was written with."""

    problem: Problem
    config: dict[str, int]
    ms: float
    default_ms: float | None = None
    floor_ms: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class PastRun:
    """One run of the tuner. `gpu` has idle_share and, each as least, median and most, clocks, temperature and power."""

    started: dt.datetime
    seconds: float | None
    command: str
    effort: str
    sampler: str
    versions: dict[str, str]
    funnel: dict[str, float]
    phases: dict[str, float]
    gpu: dict[str, Any]
    flips: dict[str, Any]
    winners: tuple[PastWinner, ...]

    def gpu_number(self, name: str) -> float | None:
        """One of the GPU's figures, where it was kept."""
        return _number(self.gpu.get(name))

    def gpu_range(self, name: str) -> list[float]:
        """Least, median and most of one of the GPU's figures; empty where none were kept."""
        found = self.gpu.get(name)
        return list(_numbers(dict(enumerate(found))).values()) if isinstance(found, (list, tuple)) else []


@dataclass(frozen=True)
class History:
    """The latest search of every problem on one GPU and the runs there, oldest first; `gpus` are all there are.

    `earlier` counts the searches of the same problems by older kernels or software, `foreign` the studies and trials
    that could not be understood.
    """

    gpu: str
    gpus: list[str]
    searches: list[PastSearch] = field(default_factory=list)
    runs: list[PastRun] = field(default_factory=list)
    earlier: int = 0
    foreign: int = 0

    @property
    def winners(self) -> dict[Problem, PastWinner]:
        """The rule of each problem that was written last."""
        return {winner.problem: winner for run in self.runs for winner in run.winners}


def open_storage(place: str) -> BaseStorage:
    """The storage at a path or a database's URL; RunError where there is none or it cannot be read."""
    try:
        if is_url(place):
            return connected(place)
        if not Path(place).is_file():
            raise RunError(
                f"{place}: no such storage; `python -m tuning run --storage {place}` makes one, and without "
                "--storage the default one is read"
            )
        return JournalStorage(JournalFileBackend(place))
    except (RunError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged lines or a driver lead Optuna to
        raise _unreadable(place, error) from None


def _unreadable(place: str, error: Exception) -> RunError:
    reason = " ".join(masked(f"{type(error).__name__}: {error}").split())[:300]
    hint = "" if is_url(place) else f"; `python -m tuning run --storage {place}` keeps of it what can be read"
    return RunError(f"{masked(place)} cannot be read as a storage ({reason}){hint}")


def read(place: str, gpu: str | None = None) -> History:
    """The history of a GPU, by default the one that measured last; RunError where nothing was measured."""
    storage = open_storage(place)
    try:
        searches, runs, foreign = _read_all(storage)
    except Exception as error:  # noqa: BLE001 - as above
        raise _unreadable(place, error) from None
    searches.sort(key=lambda search: search.ended)
    gpus = sorted({search.context["gpu"] for search in searches})
    if not searches:
        raise RunError(
            f"{masked(place)} holds no search that timed a candidate"
            f"{f' ({foreign} studies or trials are not of this tuner)' if foreign else ''}; "
            "`python -m tuning run --storage ...` fills one"
        )
    if gpu is not None and gpu not in gpus:
        raise RunError(f"--gpu {gpu!r}: the storage holds {', '.join(map(repr, gpus))}")
    wanted = gpu or searches[-1].context["gpu"]
    ours = [search for search in searches if search.context["gpu"] == wanted]
    latest = {search.problem: search for search in ours}
    return History(
        gpu=wanted,
        gpus=gpus,
        searches=sorted(latest.values(), key=_order),
        runs=sorted(runs.get(wanted, []), key=lambda run: run.started),
        earlier=len(ours) - len(latest),
        foreign=foreign,
    )


def _order(search: PastSearch) -> tuple[Any, ...]:
    p = search.problem
    return p.form, p.dtype, p.K * p.V, p.B * p.T * p.H, p.K


def _read_all(storage: BaseStorage) -> tuple[list[PastSearch], dict[str, list[PastRun]], int]:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    attributes = {summary.study_name: summary.user_attrs for summary in summaries}
    searches, foreign = [], 0
    runs: dict[str, list[PastRun]] = defaultdict(list)
    for name, about in attributes.items():
        try:
            if name.startswith(RUNS):
                gpu, found = _runs(storage, name, about)
                runs[gpu] += found
            elif not name.endswith(FINALS):
                finals = name + FINALS
                searches.append(_search(about, _trials(storage, name), _trials(storage, finals, finals in attributes)))
        except MALFORMED:
            foreign += 1
    return [search for search in searches if search.timed], runs, foreign


def _trials(storage: BaseStorage, name: str, exists: bool = True) -> tuple[PastTrial, ...]:
    study = optuna.load_study(study_name=name, storage=storage) if exists else None
    trials = study.get_trials(deepcopy=False) if study else []
    counted = [trial for trial in trials[counts_since(trials) :] if trial.state in TRIED]
    return tuple(sorted(map(_trial, counted), key=lambda trial: trial.ended))


def _trial(trial: FrozenTrial) -> PastTrial:
    failed = trial.state is TrialState.FAIL
    ended = trial.datetime_complete or trial.datetime_start or dt.datetime.min  # noqa: DTZ901 - Optuna's have no zone
    return PastTrial(
        knobs={name: int(value) for name, value in trial.params.items()},
        value=None if failed else float(trial.value or 0.0),
        reason=str(trial.user_attrs.get("reason") or "no reason was kept") if failed else "",
        seconds=max(0.0, trial.duration.total_seconds()) if trial.duration else 0.0,
        ended=ended,
        step=str(trial.user_attrs.get("step", "")),
    )


def _search(about: Mapping[str, Any], trials: tuple[PastTrial, ...], finals: tuple[PastTrial, ...]) -> PastSearch:
    return PastSearch(
        problem=_problem(about["problem"]),
        context={"gpu": "unnamed GPU"} | _texts(about["context"]),
        source=str(about.get("source", "")),
        default={str(name): int(value) for name, value in about.get("default", {}).items()},
        floor_ms=_number(about.get("floor_ms")),
        trials=trials,
        finals=finals,
    )


def _runs(storage: BaseStorage, name: str, about: Mapping[str, Any]) -> tuple[str, list[PastRun]]:
    """The GPU, which is in the study's attributes or first in its name, and the runs that ended."""
    gpu = str(about.get("context", {}).get("gpu") or name.removeprefix(RUNS).partition(", driver ")[0])
    study = optuna.load_study(study_name=name, storage=storage)
    return gpu, [_run(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]


def _run(trial: FrozenTrial) -> PastRun:
    about = trial.user_attrs
    return PastRun(
        started=trial.datetime_start or dt.datetime.min,  # noqa: DTZ901 - as above
        seconds=trial.value,
        command=masked(str(about.get("command", ""))),
        effort=str(about.get("effort", "")),
        sampler=str(about.get("sampler", "")),
        versions=_texts(about.get("versions", {})),
        funnel=_numbers(about.get("funnel", {})),
        phases=_numbers(about.get("seconds", {})),
        gpu={name: value for name, value in about.get("gpu", {}).items() if value is not None},
        flips=dict(about.get("flips") or {}),
        winners=tuple(_winners(about.get("winners", []))),
    )


def _winners(found: Iterable[Mapping[str, Any]]) -> list[PastWinner]:
    return [
        PastWinner(
            _problem(one["problem"]),
            {str(name): int(value) for name, value in one["config"].items()},
            float(one["ms"]),
            *(_number(one.get(name)) for name in ("default_ms", "floor_ms", "error")),
        )
        for one in found
    ]


def _problem(values: Mapping[str, Any]) -> Problem:
    form, dtype = str(values["form"]), str(values["dtype"])
    return Problem(form, dtype, *(int(values[f.name]) for f in fields(Problem) if f.name in "BTHKV"))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items()}


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """The numbers of a mapping, in its order; what else may lie between them is not drawn."""
    return {str(name): number for name, value in values.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """A finite number, not negative, as times, counts and errors are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value < float("inf") else None
