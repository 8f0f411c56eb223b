"""What a storage tells of past searches and runs, read through Optuna's public functions and checked as it is read.

What another program, or another version of the tuner, has put there is counted and left out: a report is about the
rest. Times of day are Optuna's own, local and without a zone.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tuning.compilation import Resources
from tuning.journal import CRASHED, SUSPECT, counts_since
from tuning.problems import Problem
from tuning.run import RunError
from tuning.storage import check_place, connected, is_url, masked

RUNS = "runs; "
TRIED = (TrialState.COMPLETE, TrialState.FAIL)  # a pruned trial was not launched, a running one has not ended
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)  # a pruned run was interrupted, and wrote rules all the same
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
T = TypeVar("T")


@dataclass(frozen=True)
class PastTrial:
    """One candidate's time on the GPU: its knobs, milliseconds or why there are none, and the seconds that it cost.

    `step` is empty in a search; of finalists it is `race`, `fresh` or `prove`, and the last one's `value` is an error.
    `rivals` took part in a race, and each is charged its share of it. `needs` is what the compiler said of it.
    """

    knobs: dict[str, int]
    value: float | None
    reason: str
    seconds: float
    ended: dt.datetime
    step: str = ""
    rivals: int = 1
    needs: Resources | None = None

    @property
    def config(self) -> tuple[tuple[str, int], ...]:
        """Its knobs, to be told from others' by."""
        return tuple(sorted(self.knobs.items()))


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
        """Those that have none; of a race all that took part, for nobody knows which of them it was."""
        return [trial for trial in (*self.trials, *self.finals) if trial.value is None]

    @property
    def launched(self) -> set[Any]:
        """Every configuration once, however often it was measured."""
        return {trial.config for trial in (*self.trials, *self.finals)}

    @property
    def rejected(self) -> set[Any]:
        """The configurations that failed alone."""
        return {trial.config for trial in self.failed if trial.rivals == 1}

    @property
    def best(self) -> PastTrial:
        """The fastest."""
        return min(self.timed, key=lambda trial: trial.value or 0.0)

    @property
    def default_ms(self) -> float | None:
        """The default's milliseconds, where it was timed."""
        return next((trial.value for trial in self.timed if trial.knobs == self.default), None)

    def has_proved(self, config: dict[str, int]) -> bool:
        """Whether a configuration passed its proof."""
        return any(t.step == "prove" and t.value is not None and t.knobs == config for t in self.finals)

    def needs(self, config: dict[str, int]) -> Resources | None:
        """What a configuration's compiled kernel needs, where that was kept."""
        return next((t.needs for t in (*self.trials, *self.finals) if t.needs and t.knobs == config), None)

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
    error: float | None = None


@dataclass(frozen=True)
class PastRun:
    """One run of the tuner. `gpu` has idle_share and, each as least, median and most, clocks, temperature and power."""

    started: dt.datetime
    seconds: float | None
    interrupted: bool
    context: dict[str, str]
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
    def rules(self) -> dict[Problem, tuple[PastRun, PastWinner]]:
        """The rule of each problem that was written last, and the run that wrote it."""
        return {winner.problem: (run, winner) for run in self.runs for winner in run.winners}

    def rule(self, search: PastSearch) -> PastWinner | None:
        """The rule that was written last with a search's own software and kernel, which is the one that proved it."""
        ours = [winner for run in self.runs if run.context == search.context for winner in run.winners]
        proved = [one for one in ours if one.problem == search.problem and search.has_proved(one.config)]
        return proved[-1] if proved else None


def open_storage(place: str) -> BaseStorage:
    """The storage at a path or a database's URL; RunError where there is none or it cannot be read."""
    check_place(place)
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
            f"{masked(place)} holds no candidate that was launched"
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
        runs=sorted((run for run in runs if run.context["gpu"] == wanted), key=lambda run: run.started),
        earlier=len(ours) - len(latest),
        foreign=foreign,
    )


def _order(search: PastSearch) -> tuple[Any, ...]:
    p = search.problem
    return p.form, p.dtype, p.K * p.V, p.B * p.T * p.H, p.K


def _read_all(storage: BaseStorage) -> tuple[list[PastSearch], list[PastRun], int]:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    searches: list[PastSearch] = []
    runs: list[PastRun] = []
    foreign = 0
    for name, about in ((summary.study_name, summary.user_attrs) for summary in summaries):
        if name.startswith(CRASHED):  # they are in their searches too
            continue
        try:
            trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
            if name.startswith(RUNS):
                found, odd = _each(partial(_run, _context(name, about)), trials, ENDED)
                runs += found
            else:
                measured, odd = _each(_trial, trials[counts_since(trials) :], TRIED)
                searches.append(_search(about, measured))
            foreign += odd
        except MALFORMED:
            foreign += 1
    return _merged(searches), runs, foreign


def _each(
    parse: Callable[[FrozenTrial], T], trials: Sequence[FrozenTrial], states: tuple[TrialState, ...]
) -> tuple[list[T], int]:
    """What trials in some states say, and how many could not be understood."""
    found, foreign = [], 0
    for trial in trials:
        if trial.state in states:
            try:
                found.append(parse(trial))
            except MALFORMED:
                foreign += 1
    return found, foreign


def _trial(trial: FrozenTrial) -> PastTrial:
    about, failed = trial.user_attrs, trial.state is TrialState.FAIL
    step, value, rivals = str(about.get("step", "")), _number(trial.value), max(1, int(about.get("rivals", 1)))
    if not trial.params or (not failed and not value and not (step and value == 0)):
        raise ValueError(f"trial {trial.number} has no knobs or no time")
    ended = trial.datetime_complete or trial.datetime_start or dt.datetime.min  # noqa: DTZ901 - Optuna's have no zone
    return PastTrial(
        knobs={name: int(knob) for name, knob in trial.params.items()},
        value=None if failed else value,
        reason=str(about.get("reason") or "no reason was kept") if failed else "",
        seconds=_duration(trial) / rivals,  # all who race begin and end together
        ended=ended,
        step=step,
        rivals=rivals,
        needs=_needs(about["needs"]) if "needs" in about else None,
    )


def _needs(found: Mapping[str, Any]) -> Resources:
    registers, spills, shared, warps = (int(found[name]) for name in ("registers", "spills", "shared", "warps"))
    return Resources(registers, spills, shared, warps, int(found.get("tensor_memory", 0)))


def _duration(trial: FrozenTrial) -> float:
    """From beginning to end; none of what a killed tuner was at, whose end is when another noticed."""
    if trial.user_attrs.get("reason") == SUSPECT or not trial.duration:
        return 0.0
    return max(0.0, trial.duration.total_seconds())


def _search(about: Mapping[str, Any], trials: Sequence[PastTrial]) -> PastSearch:
    return PastSearch(
        problem=_problem(about["problem"]),
        context={"gpu": "unnamed GPU"} | _texts(about["context"]),
        source=str(about.get("source", "")),
        default={str(name): int(value) for name, value in about.get("default", {}).items()},
        floor_ms=_number(about.get("floor_ms")),
        trials=tuple(trial for trial in trials if not trial.step),
        finals=tuple(trial for trial in trials if trial.step),
    )


def _merged(searches: Iterable[PastSearch]) -> list[PastSearch]:
    """Those of which any trial counts, as one where only the step differs, or what ran beside the kernel."""
    groups: dict[Any, list[PastSearch]] = defaultdict(list)
    for search in searches:
        if search.trials or search.finals:
            groups[search.problem, search.source, tuple(sorted(search.context.items()))].append(search)
    return [
        replace(
            group[0],
            trials=_in_time(trial for search in group for trial in search.trials),
            finals=_in_time(trial for search in group for trial in search.finals),
        )
        for group in groups.values()
    ]


def _in_time(trials: Iterable[PastTrial]) -> tuple[PastTrial, ...]:
    return tuple(sorted(trials, key=lambda trial: trial.ended))


def _context(name: str, about: Mapping[str, Any]) -> dict[str, str]:
    """What a study of runs was measured with; without attributes its name still begins with the GPU."""
    return {"gpu": name.removeprefix(RUNS).partition(", driver ")[0]} | _texts(about.get("context", {}))


def _run(context: dict[str, str], trial: FrozenTrial) -> PastRun:
    about, interrupted = trial.user_attrs, trial.state is TrialState.PRUNED
    return PastRun(
        started=trial.datetime_start or dt.datetime.min,  # noqa: DTZ901 - as above
        seconds=_duration(trial) if interrupted else trial.value,
        interrupted=interrupted,
        context=context,
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
            *(_number(one.get(name)) for name in ("default_ms", "error")),
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
