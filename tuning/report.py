"""`python -m tuning report`: what was searched, found and spent, as one self-contained HTML page and as Markdown."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import math
import os
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from rich.console import Console
from rich.markup import escape

from generated import configuration
from generated.configuration_file import ConfigurationError, parse_file
from tuning.bench_plots import has_times
from tuning.compilation import ARCHS, Arch, Resources
from tuning.history import History, PastRun, PastSearch, PastTrial, read
from tuning.journal import default_path
from tuning.measurement import describe_gpu, gpu_present
from tuning.problems import Problem
from tuning.rules import check_writable, write_whole
from tuning.run import RunError
from tuning.storage import VARIABLE, masked
from tuning.workloads import Workload, builtin

LEVELS = (1.02, 1.05, 1.15, 1.4, 2.0, 4.0)  # a heat map's colours change at these multiples of the best
LINEAR_REGRET = 0.02  # below it the regret's axis is linear, above it logarithmic: it ends at 0
REGRET_TICKS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
FLOOR_OF = "H100"  # in the name of a GPU that the floors of `bench` are of, as in Problem.floor_ms
FEWEST_TRIALS = 20  # of a kernel, for the importance of its knobs
STEPS = {"": "search", "race": "race", "fresh": "fresh process", "prove": "proof", "failed": "failed"}
RESOURCES = (
    "Resources are registers and spilled bytes a thread, shared memory a program, and, as programs times warps, what a "
    "multiprocessor holds at once of the warps that it can."
)
SECTIONS = (
    ("summary", "Summary"),
    ("results", "Against the default"),
    ("fla", "Against fla"),
    ("funnel", "Funnel"),
    ("regret", "Regret"),
    ("importance", "Knob importance"),
    ("tiles", "Tile sizes"),
    ("cost", "Cost"),
    ("rejected", "Rejected"),
    ("runs", "Runs and the GPU"),
    ("rules", "Rules written"),
)
HEADINGS = ("workload", "configuration", "ms", "default ms", "vs default", "fla ms", "vs fla", "of floor", "error")


@dataclass(frozen=True)
class Result:
    """What came out for one problem: the rule or else the fastest, in milliseconds, against default, floor and fla.

    `resources` are in words what the compiled kernel needs, empty where that was not kept.
    `fla_ms` and `fla_speedup` are of a whole forward call of the form, from a file of `bench`.
    """

    problem: Problem
    config: dict[str, int]
    ms: float
    default_ms: float | None
    floor_ms: float | None
    error: float | None
    resources: str
    fla_ms: float | None
    fla_speedup: float | None
    trials: int
    seconds: float
    is_rule: bool

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the default."""
        return self.default_ms / self.ms if self.default_ms else None

    @property
    def of_floor(self) -> float | None:
        """The floor's share of the time."""
        return self.floor_ms / self.ms if self.floor_ms else None


@dataclass(frozen=True)
class Cell:
    """The fastest of a heat map's tile size as a multiple of the best; without one where it failed or was not tried.

    `about` is empty where it was not tried.
    """

    ratio: float | None
    level: int
    about: str
    is_best: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Two knobs' values and a row of cells for each value of the first."""

    problem: Problem
    down: str
    across: str
    columns: list[int]
    rows: list[tuple[int, list[Cell]]]


@dataclass(frozen=True)
class Curve:
    """A search's regret after each measurement, None before the first that has a time."""

    problem: Problem
    regret: list[float | None]


@dataclass(frozen=True)
class Rejected:
    """Candidates, or races of several, of a kernel that failed for one reason, and one message of them."""

    kernel: str
    kind: str
    is_race: bool
    count: int
    seconds: float
    message: str


@dataclass(frozen=True)
class Line:
    """One form's milliseconds by variant, each with its place on the axis in per cent."""

    form: str
    dots: list[tuple[str, float, float]]

    @property
    def ms(self) -> float:
        """The tuned variant's."""
        return self.of("tuned") or math.nan

    @property
    def speedup(self) -> float | None:
        """How many times as fast as fla."""
        return self.over("fla")

    def of(self, variant: str) -> float | None:
        """A variant's milliseconds."""
        return next((ms for name, ms, _ in self.dots if name == variant), None)

    def over(self, variant: str) -> float | None:
        """How many times as fast as a variant."""
        ms = self.of(variant)
        return ms / self.ms if ms else None


@dataclass(frozen=True)
class Half:
    """The forms' forward calls, or forward with backward, at one workload, and the floor where the GPU has one."""

    name: str
    floor_ms: float | None
    floor_at: float | None
    lines: list[Line]

    def of_floor(self, line: Line) -> float | None:
        """The floor's share of a line's time."""
        return self.floor_ms / line.ms if self.floor_ms else None


@dataclass(frozen=True)
class Comparison:
    """One workload of `bench`."""

    workload: str
    shape: str
    halves: list[Half]


@dataclass(frozen=True)
class Peers:
    """The rows of files of `bench`: by workload, form and variant; `machines` are what they were made on."""

    rows: list[dict[str, Any]]
    machines: list[str]

    @cached_property
    def by_shape(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """Shape, then form, then variant."""
        found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        for row in self.rows:
            found.setdefault(row["shape"], {}).setdefault(row["form"], {})[row["variant"]] = row
        return found

    def of(self, problem: Problem, variant: str) -> dict[str, Any] | None:
        """The row of a problem's form at its shape."""
        return self.by_shape.get(shape(problem), {}).get(problem.form, {}).get(variant)


def report(options: argparse.Namespace, console: Console) -> int:
    """Read the storage, and write the page and the table."""
    outputs = [Path(name) for name in (options.out, options.markdown)]
    for path in outputs:
        check_writable(path)
    place = options.storage or os.environ.get(VARIABLE) or default_storage()
    history, peers = read(place, options.gpu), read_peers(options.bench)
    page = Page(history, peers, masked(place))
    for path, text in zip(outputs, (page.html(), page.markdown()), strict=True):
        write_whole(path, text)
        console.print(escape(f"wrote {path}"), soft_wrap=True)
    for name, value, _ in page.key_figures:
        console.print(escape(f"{value:>10}  {name}"))
    return 0


def default_storage() -> str:
    """The storage of this GPU, or without a GPU the only one in the user's cache; RunError where one must be chosen."""
    if gpu_present():
        return str(default_path(configuration.slug(describe_gpu().name)))
    folder = default_path("any").parent
    found = sorted(folder.glob("*.journal"))
    if len(found) != 1:
        held = f"holds {len(found)}: {', '.join(path.name for path in found)}" if found else "holds none"
        raise RunError(f"there is no GPU here whose storage to read, and {folder} {held}; choose one by --storage FILE")
    return str(found[0])


def read_peers(paths: Iterable[str]) -> Peers:
    """The rows that `bench --json` wrote, failures and steps left out; RunError for another file."""
    rows, machines = [], []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            has_floor = FLOOR_OF in found["gpu"]["name"]
            rows += [_checked(row, has_floor=has_floor) for row in found["rows"] if has_times(row)]
            versions = {name: found[name] for name in ("torch", "triton")} | found["peers"]
            software = ", ".join(f"{name} {known}" for name, known in versions.items())
            machines.append(f"{found['gpu']['name']}, driver {found['gpu']['driver']}, {software}")
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"--bench {path}: not a file of `python -m tuning bench --json FILE` ({error!r})") from error
    return Peers(rows, machines)


def _checked(row: dict[str, Any], *, has_floor: bool) -> dict[str, Any]:
    """The row, without its floors where these are another GPU's; raises for what is no row."""
    for half in ("forward", "both"):
        if not all(row[half][name] > 0 for name in ("ms", "floor_ms")):
            raise ValueError(f"{half} of {row['workload']!r} is not positive")
    if not all(isinstance(row[name], str) for name in ("workload", "shape", "form", "variant")):
        raise TypeError(f"a name of {row['workload']!r} is no text")
    return row if has_floor else row | {half: row[half] | {"floor_ms": None} for half in ("forward", "both")}


class Page:
    """Every figure of the report, by the section that shows it."""

    def __init__(self, history: History, peers: Peers, place: str) -> None:
        self.history, self.peers, self.place = history, peers, place
        self.every_search, self.runs = history.searches, history.runs
        self.searches = [search for search in self.every_search if search.timed]
        self.written = dt.datetime.now().astimezone()

    def html(self) -> str:
        """The page."""
        return _environment(autoescape=True).get_template("report.html.jinja").render(page=self)

    def markdown(self) -> str:
        """The funnel and a row a problem."""
        return _environment(autoescape=False).get_template("report.md.jinja").render(page=self)

    @property
    def last_run(self) -> PastRun | None:
        """The latest run that ended."""
        return self.runs[-1] if self.runs else None

    @cached_property
    def context(self) -> dict[str, str]:
        """The driver and versions of the latest search."""
        return {name: value for name, value in self._latest.context.items() if name != "gpu"}

    @property
    def mixed(self) -> int:
        """How many versions of the driver and software the searches were measured with."""
        return len({tuple(sorted(search.context.items())) for search in self.every_search})

    @property
    def _latest(self) -> PastSearch:
        return max(self.every_search, key=lambda search: search.ended)

    @property
    def measured_on(self) -> dt.datetime:
        """When the last candidate was measured."""
        return self._latest.ended

    @cached_property
    def arch(self) -> Arch | None:
        """The GPU's architecture, as its file of rules has it; None without one."""
        gpu = self.history.gpu
        for directory in configuration.config_directories():
            with contextlib.suppress(ConfigurationError):
                device = parse_file(directory / f"{configuration.slug(gpu)}.yaml").device
                if device.name == gpu:
                    return ARCHS.get(device.arch)
        return None

    @cached_property
    def rows(self) -> list[Result]:
        """One for each problem."""
        return [self._row(search) for search in self.searches]

    def _row(self, search: PastSearch) -> Result:
        """The rule that came of the search, or its fastest where none did."""
        rule, best = self.history.rule(search), search.best
        needs = search.needs(rule.config if rule else best.knobs)
        tuned, fla = (self.peers.of(search.problem, variant) for variant in ("tuned", "fla"))
        return Result(
            problem=search.problem,
            config=rule.config if rule else best.knobs,
            ms=rule.ms if rule else best.value or 0.0,
            default_ms=rule.default_ms if rule else search.default_ms,
            floor_ms=search.floor_ms,
            error=rule.error if rule else None,
            resources=resources(needs, self.arch) if needs else "",
            fla_ms=fla["forward"]["ms"] if fla else None,
            fla_speedup=fla["forward"]["ms"] / tuned["forward"]["ms"] if fla and tuned else None,
            trials=len(search.trials),
            seconds=search.seconds,
            is_rule=rule is not None,
        )

    @cached_property
    def key_figures(self) -> list[tuple[str, str, str]]:
        """Name, value and what it is made of."""
        launched, failed = (sum(len(getattr(s, n)) for s in self.every_search) for n in ("launched", "rejected"))
        speedups = [row.speedup for row in self.rows if row.speedup]
        floors = [row.of_floor for row in self.rows if row.of_floor]
        found = [("searches", f"{len(self.every_search)}", f"{len(kernels(self.every_search))} kernels")]
        found.append(("candidates", f"{launched:,}", f"launched, {failed:,} of them rejected"))
        found.append(("GPU seconds", f"{sum(s.seconds for s in self.every_search):,.0f}", "launching and timing"))
        if speedups:
            mean = statistics.geometric_mean(speedups)
            found.append(("vs default", f"{mean:.2f}\N{MULTIPLICATION SIGN}", f"geometric mean of {len(speedups)}"))
        if self.fla_speedups:
            mean = statistics.geometric_mean(self.fla_speedups)
            found.append(
                ("vs fla", f"{mean:.2f}\N{MULTIPLICATION SIGN}", f"forward, geometric mean of {len(self.fla_speedups)}")
            )
        if floors:
            found.append(("of the floor", f"{statistics.median(floors):.0%}", f"median of {len(floors)}"))
        if (idle := self.idle_share) is not None:
            found.append(("GPU idle", f"{idle:.1%}", "of the measuring phase, last run"))
        return found

    @property
    def idle_share(self) -> float | None:
        """Of the last run, where it was kept."""
        return self.last_run.gpu_number("idle_share") if self.last_run else None

    @cached_property
    def fla_speedups(self) -> list[float]:
        """Of every form and shape that was timed beside fla, forward."""
        pairs = [
            (forms.get("tuned"), forms.get("fla")) for shape in self.peers.by_shape.values() for forms in shape.values()
        ]
        return [fla["forward"]["ms"] / tuned["forward"]["ms"] for tuned, fla in pairs if tuned and fla]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """A card for each workload of the files of `bench`."""
        return [compare(forms) for forms in self.peers.by_shape.values() if any("tuned" in f for f in forms.values())]

    @property
    def has_floors(self) -> bool:
        """Whether a card has a floor."""
        return any(half.floor_ms for card in self.comparisons for half in card.halves)

    @cached_property
    def funnel(self) -> list[tuple[str, float]]:
        """Stages and counts: the last run's, or what the trials tell where none was kept."""
        if self.last_run and self.last_run.funnel:
            return list(self.last_run.funnel.items())
        finals = [trial for search in self.every_search for trial in search.finals if trial.value is not None]
        counts = {"launched": sum(len(search.trials) for search in self.every_search)}
        counts["timed"] = sum(len(search.timed) for search in self.searches)
        return [*counts.items(), *Counter(STEPS.get(trial.step, trial.step) for trial in finals).items()]

    @cached_property
    def by_kernel(self) -> dict[str, list[PastSearch]]:
        """The searches of each kernel."""
        return kernels(self.searches)

    @cached_property
    def curves(self) -> list[Curve]:
        """The regret of each search."""
        return [Curve(search.problem, regret(search)) for search in self.searches]

    @cached_property
    def plot(self) -> Plot | None:
        """The regret curves as points in a square of 100 by 100; None where nothing has a time."""
        return Plot(self.curves) if self.curves else None

    @cached_property
    def importances(self) -> dict[str, dict[str, float] | None]:
        """Of each kernel's knobs, or None where too little was measured."""
        return {kernel: importance(searches) for kernel, searches in self.by_kernel.items()}

    @cached_property
    def heat_maps(self) -> dict[str, list[HeatMap]]:
        """Of each kernel."""
        return {kernel: [heat_map(search) for search in searches] for kernel, searches in self.by_kernel.items()}

    @cached_property
    def costs(self) -> list[tuple[Problem, dict[str, float]]]:
        """GPU seconds of each search by step, the dearest first."""
        return [(s.problem, cost(s)) for s in sorted(self.every_search, key=lambda search: -search.seconds)]

    @cached_property
    def cost(self) -> dict[str, float]:
        """GPU seconds of all searches by step."""
        return {step: sum(one[step] for _, one in self.costs) for step in STEPS.values()}

    @cached_property
    def rejected(self) -> list[Rejected]:
        """What was launched and is not used, the most frequent first."""
        return rejections(self.every_search)


def compare(forms: dict[str, dict[str, dict[str, Any]]]) -> Comparison:
    """The variants of each form on one logarithmic axis, on which all times and floors lie."""
    rows = [row for variants in forms.values() for row in variants.values()]
    drawn = [row[half][name] for row in rows for half in ("forward", "both") for name in ("ms", "floor_ms")]
    low, high = 0.9 * min(filter(None, drawn)), 1.1 * max(filter(None, drawn))

    def place(ms: float) -> float:
        return 100 * math.log(ms / low) / math.log(high / low)

    halves = []
    for half, name in (("forward", "forward"), ("both", "forward + backward")):
        order = ("default", "fla", "tuned")  # the last drawn lies on top
        lines = [
            Line(form, [(v, variants[v][half]["ms"], place(variants[v][half]["ms"])) for v in order if v in variants])
            for form, variants in forms.items()
            if "tuned" in variants
        ]
        floor = rows[0][half]["floor_ms"]
        halves.append(Half(name, floor, place(floor) if floor else None, sorted(lines, key=lambda line: line.ms)))
    return Comparison(rows[0]["workload"], rows[0]["shape"], halves)


class Plot:
    """Regret curves in a square of 100 by 100, with the origin at the top left, as SVG has it."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.measurements = max(len(curve.regret) for curve in curves)
        self.highest = max([0.1, *(value for curve in curves for value in curve.regret if value)])
        self.lines = [(curve, self._points(curve.regret)) for curve in curves]
        self.medians = medians([curve.regret for curve in curves])
        self.median = self._points(self.medians)
        self.y_ticks = [(f"{tick:.0%}", self._y(tick)) for tick in REGRET_TICKS if tick <= self.highest]
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if self.measurements / s <= 8)
        self.x_ticks = [(n, self._x(n)) for n in range(step, self.measurements + 1, step)]

    def within(self, share: float) -> int | None:
        """After how many measurements the median search is within a share of its best for good."""
        good = [value is not None and value <= share for value in self.medians]
        return good.index(True) + 1 if True in good else None

    def _points(self, values: Sequence[float | None]) -> str:
        """A step for each measurement."""
        corners: list[str] = []
        for number, value in enumerate(values, 1):
            if value is not None:
                y = self._y(value)
                corners += [f"{self._x(number):.2f},{y:.2f}", f"{self._x(number + 1):.2f},{y:.2f}"]
        return " ".join(corners)

    def _x(self, number: int) -> float:
        return 100 * (number - 1) / self.measurements

    def _y(self, value: float) -> float:
        return 100 * (1 - math.asinh(value / LINEAR_REGRET) / math.asinh(1.05 * self.highest / LINEAR_REGRET))


def kernels(searches: Iterable[PastSearch]) -> dict[str, list[PastSearch]]:
    """The searches of each kernel, in their order."""
    found: dict[str, list[PastSearch]] = defaultdict(list)
    for search in searches:
        found[search.problem.kernel].append(search)
    return dict(found)


def regret(search: PastSearch) -> list[float | None]:
    """How much slower than the search's final best the best so far was, after each measurement, failed ones too."""
    final, best = search.best.value or 0.0, math.inf
    found: list[float | None] = []
    for trial in search.trials:
        best = min(best, trial.value or math.inf)
        found.append(best / final - 1 if best < math.inf else None)
    return found


def medians(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The median curve; a search that has ended stays at its best, one without a time yet counts as worst."""
    longest = max(map(len, curves))
    padded = [[math.inf if value is None else value for value in curve] + [0.0] * longest for curve in curves]
    found = [statistics.median_high(curve[number] for curve in padded) for number in range(longest)]
    return [None if math.isinf(value) else value for value in found]


def importance(searches: Sequence[PastSearch]) -> dict[str, float] | None:
    """How much each knob decides about being among the fastest tenth, in shares of 1, the most important first.

    PED-ANOVA over all searches of a kernel, each time as a multiple of its search's best. None where there are too few
    trials, or all knobs have one value.
    """
    trials = [(trial.knobs, (trial.value or 0.0) / (s.best.value or 1.0)) for s in searches for trial in s.timed]
    values = {name: sorted({knobs[name] for knobs, _ in trials if name in knobs}) for name in trials[0][0]}
    choices: dict[str, BaseDistribution] = {name: CategoricalDistribution(found) for name, found in values.items()}
    trials = [(knobs, ratio) for knobs, ratio in trials if knobs.keys() == choices.keys()]
    if len(trials) < FEWEST_TRIALS or all(len(found) == 1 for found in values.values()):
        return None
    study = optuna.create_study()
    study.add_trials([optuna.create_trial(params=knobs, distributions=choices, value=ratio) for knobs, ratio in trials])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is new, and where its quantiles coincide
        return optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def heat_map(search: PastSearch) -> HeatMap:
    """The fastest of each size of the tile, relative to the search's best, whatever the other knobs."""
    names = dict.fromkeys(name for name in ("BT", "BV", "num_warps", *search.best.knobs) if name in search.best.knobs)
    down, across = [*names, *names][:2]
    tiles: dict[tuple[int, int], list[PastTrial]] = defaultdict(list)
    for trial in search.trials:
        if {down, across} <= trial.knobs.keys():
            tiles[trial.knobs[down], trial.knobs[across]].append(trial)
    columns = sorted({second for _, second in tiles})
    rows = [
        (first, [_cell(search, tiles.get((first, second), [])) for second in columns])
        for first in sorted({first for first, _ in tiles})
    ]
    return HeatMap(search.problem, down, across, columns, rows)


def _cell(search: PastSearch, trials: Sequence[PastTrial]) -> Cell:
    timed = [trial for trial in trials if trial.value]
    if not timed:
        return Cell(None, 0, f"failed: {trials[0].reason}" if trials else "")
    best = min(timed, key=lambda trial: trial.value or 0.0)
    ratio = (best.value or 0.0) / (search.best.value or 1.0)
    about = f"{spelled(best.knobs)}: {best.value:.4g} ms, the fastest of {len(timed)}"
    return Cell(ratio, sum(ratio <= limit for limit in LEVELS), about, best == search.best)


def cost(search: PastSearch) -> dict[str, float]:
    """GPU seconds by step."""
    found = dict.fromkeys(STEPS.values(), 0.0)
    for trial in (*search.trials, *search.finals):
        step = trial.step if trial.value is not None else "failed"
        found[STEPS.get(step, STEPS[""])] += trial.seconds
    return found


def rejections(searches: Iterable[PastSearch]) -> list[Rejected]:
    """Failed candidates and races by kernel and kind of reason, the most frequent first."""
    found: dict[tuple[str, str, bool], list[tuple[Problem, PastTrial]]] = defaultdict(list)
    for search in searches:
        for trial in search.failed:
            found[search.problem.kernel, kind(trial.reason), trial.rivals > 1].append((search.problem, trial))
    groups = []
    for (kernel, why, is_race), failed in found.items():
        configs, races = {(problem, trial.config) for problem, trial in failed}, sum(1 / t.rivals for _, t in failed)
        seconds, message = sum(trial.seconds for _, trial in failed), failed[0][1].reason
        groups.append(Rejected(kernel, why, is_race, round(races) if is_race else len(configs), seconds, message))
    return sorted(groups, key=lambda group: (-group.count, group.kernel, group.kind))


def kind(reason: str) -> str:
    """What reasons of one kind share: the error's class and what it says first, without the figures."""
    parts = [part.strip() for part in reason.split(":")]
    return ": ".join(parts[:2])[:80]


def workload_name(problem: Problem) -> str:
    """The builtin workload that has the problem's sizes, marked where K and V change places; else the sizes."""
    p = problem
    for w in _builtin():
        if (w.B, w.T, w.H, w.dtype, {w.K, w.V}) == (p.B, p.T, p.H, p.dtype, {p.K, p.V}):
            return w.name if (w.K, w.V) == (p.K, p.V) else f"{w.name}, K↔V"
    return f"B={p.B} T={p.T} H={p.H}"


@cache
def _builtin() -> list[Workload]:
    """Read once, for every bar asks."""
    return list(builtin().values())


def shape(problem: Problem) -> str:
    """Sizes and dtype in a line."""
    p = problem
    return f"B={p.B} T={p.T} H={p.H} K={p.K} V={p.V} {p.dtype}"


def resources(needs: Resources, arch: Arch | None) -> str:
    """Registers, spills and shared memory in words; and where the architecture is known the occupancy."""
    found = [f"{needs.registers} registers", f"{needs.spills} B spilled", f"{needs.shared / 1024:.4g} KiB shared"]
    if arch:
        blocks = needs.blocks_per_sm(arch)
        found.append(f"{blocks} \N{MULTIPLICATION SIGN} {needs.warps} of {arch.warps_per_sm} warps")
    return ", ".join(found)


def spelled(knobs: dict[str, int]) -> str:
    """Knobs and values in a line."""
    return " ".join(f"{name}={value}" for name, value in knobs.items())


def in_cell(text: str) -> str:
    """The text so that Markdown shows it as it is, in a table's cell."""
    for character in "\\`*_[]|~":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _number(value: float | None, pattern: str = "{:.4g}", scale: float = 1.0) -> str:
    return "" if value is None else pattern.format(scale * value)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,  # noqa: S701 - off for Markdown alone, whose cells go through in_cell
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "headings": HEADINGS,
        "about_resources": RESOURCES,
        "sections": SECTIONS,
        "dict": dict,
        "range": range,
    }
    named = {
        "zip": zip,
        "workload": workload_name,
        "shape": shape,
        "spelled": spelled,
        "cell": in_cell,
        "number": _number,
    }
    environment.filters |= named
    return environment
