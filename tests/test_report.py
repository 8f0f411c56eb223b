"""The report: every figure is that of the storage it was made from, and the page holds all that it needs."""

from __future__ import annotations

import datetime as dt
import json
import random
import re
import statistics
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tuning import report as reports
from tuning.__main__ import main
from tuning.compilation import ARCHS
from tuning.history import History, PastSearch, PastTrial, open_storage, read
from tuning.journal import SUSPECT
from tuning.landscape import DIRECTORY, Landscape
from tuning.landscape import read as read_landscape
from tuning.problems import PASSES, Problem
from tuning.report import Page, Peers
from tuning.run import RunError
from tuning.space import knob_values
from tuning.storage import masked
from tuning.workloads import Workload

CONTEXT = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "triton": "3.6.0", "torch": "2.11.0"}
WRONG = "ArithmeticError: wrong result: relative errors 0.31 and 0.29, and the budget is 0.0062"
HANGS = "no answer from the measuring process within 60 s: the kernel hangs"
HOSTILE = "<script>alert('x')</script> | `b` \n http://user:secret@host/?password=secret"
START = dt.datetime(2026, 11, 26, 8, 0, 0)  # noqa: DTZ001 - as Optuna's are
GPU = {
    "idle_share": 0.083,
    "busy_seconds": 214.0,
    "clock_mhz": [1755, 1965, 1980],
    "temperature_c": [41, 57, 63],
    "power_w": [118, 402, 689],
}

CARD = {"name": CONTEXT["gpu"], "driver": CONTEXT["driver"]}
MACHINE = {
    "gpu": CARD,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "peers": {"fla": "0.5.1"},
}
TIMED = {half: {"ms": 1.0, "floor_ms": 1.0} for half in ("forward", "both")}
NAMELESS = {**MACHINE, "rows": [{"workload": "x", "shape": "x", "form": 3, "variant": "tuned", **TIMED}]}
MARK = '<i class="tag">no rule</i>'


class Storage:
    """A storage that is filled as the tuner fills it, from landscapes that were measured on the H100."""

    def __init__(self, place: str, trials: int = 24) -> None:
        self.place, self.trials, self.now, self.random = place, trials, START, random.Random(0)  # noqa: S311
        self.storage = RDBStorage(place) if "://" in place else JournalStorage(JournalFileBackend(place))
        self.winners: list[dict[str, Any]] = []

    def study(self, name: str, **attributes: Any) -> optuna.Study:
        study = optuna.create_study(storage=self.storage, study_name=name, direction="minimize")
        for key, value in attributes.items():
            study.set_user_attr(key, value)
        return study

    def trial(
        self,
        study: optuna.Study,
        knobs: dict[str, int],
        value: float | None,
        cost: float,
        *,
        without: TrialState = TrialState.FAIL,
        **attributes: Any,
    ) -> None:
        """One after the other; without a value it ends as `without` says."""
        state = TrialState.COMPLETE if value is not None else without
        given = {
            "params": knobs,
            "distributions": dict.fromkeys(knobs, IntDistribution(0, 1 << 30)),
            "user_attrs": attributes,
        }
        trial = optuna.create_trial(state=state, value=value, **given)
        trial.datetime_start, self.now = self.now, self.now + dt.timedelta(seconds=cost)
        trial.datetime_complete = self.now
        study.add_trial(trial)

    def search(self, found: Landscape, **changes: Any) -> None:
        """The default, then candidates by luck, the faster the likelier as a model has them; then the finalists."""
        default, problem = found.problem.default(), found.problem
        known = [c for c in found.candidates if c.config == default]
        others = [c for c in found.candidates if c.config != default]
        luck = sorted(others, key=lambda c: (c.ms or 9 * found.best_ms) ** 0.7 * self.random.lognormvariate(0, 1))
        w = Workload("", **{axis: getattr(problem, axis) for axis in "BTHKV"})
        name = f"{problem.kernel} {reports.shape(problem)}; {CONTEXT['gpu']}"
        about = {"problem": asdict(problem), "context": CONTEXT, "extra": {}, "source": "2cc8116ace7364aa"}
        about |= {
            "default": knob_values(default),
            "floor_ms": None if problem.form in PASSES else w.floor_ms(backward=False),
        }
        about |= changes
        study = self.study(name, **about)
        times: dict[Any, float] = {}
        for number, candidate in enumerate([*known, *luck][: self.trials]):
            spoiled = WRONG if number % 9 == 8 else HANGS if number == 13 and problem.B == 2 else None
            ms = None if spoiled else candidate.ms
            why = {} if ms else {"reason": spoiled or WRONG}
            cost = 60.0 if spoiled == HANGS else 0.12 + 24 * (candidate.ms or 1) / 1000 + self.random.random() / 8
            figures = {"spread": 0.004 * candidate.ms, "repeats": 12, "error": 0.0026} if ms and candidate.ms else {}
            self.trial(study, knob_values(candidate.config), ms, cost, worker="w0", needs=asdict(candidate.needs),
                       figures=figures, **why)  # fmt: skip
            if ms:
                times[candidate.config] = ms
        self.finals(name, about, times, default)

    def finals(self, name: str, about: dict[str, Any], times: dict[Any, float], default: Any) -> None:
        study = self.study(f"{name}; finals", **about, finals=True)
        best, began = sorted(times, key=times.__getitem__)[:3], self.now
        for config in best:
            interval, self.now = [0.99 * times[config], 1.01 * times[config]], began  # all at once
            self.trial(study, knob_values(config), times[config], 0.9, worker="w0", step="race", rivals=len(best),
                       interval=interval)  # fmt: skip
        interval = [0.99 * times[best[0]], 1.01 * times[best[0]]]
        self.trial(study, knob_values(best[0]), times[best[0]], 3.1, worker="w0", step="fresh", interval=interval)
        self.trial(study, knob_values(best[0]), 0.0026, 4.2, worker="w0", step="prove")
        winner = {"problem": about["problem"], "config": knob_values(best[0]), "ms": times[best[0]], "error": 0.0026}
        self.winners.append(winner | {"default_ms": times.get(default), "floor_ms": about["floor_ms"]})

    def run(self, seconds: float | None = 254.0, **changes: Any) -> None:
        """A run that ended, or without `seconds` was interrupted after five."""
        name = f"runs; {CONTEXT['gpu']}, driver {CONTEXT['driver']}, triton 3.6.0, torch 2.11.0"
        about = {
            "command": "python -m tuning run --effort full --form fused_chunk --form chunk --form parallel",
            "effort": "full",
            "sampler": "surrogate",
            "versions": {"triton": "3.6.0", "torch": "2.11.0", "driver": "580.159.04", "retgen": "0.1.0"},
            "funnel": {"enumerated": 5120, "worth compiling": 2616, "compiled": 1184, "distinct": 1121, "fit": 1034,
                       "right": 502, "timed": 480, "raced": 100, "proven": 20, "written": 20},
            "seconds": {"compile ahead": 21.4, "search": 148.2, "race": 18.1, "fresh process": 31.0, "proof": 35.3},
            "gpu": GPU,
            "flips": {"compared": 20, "changed": 1},
            "winners": self.winners,
        }  # fmt: skip
        known = name in optuna.get_all_study_names(self.storage)
        study = optuna.load_study(study_name=name, storage=self.storage) if known else self.study(name, context=CONTEXT)
        self.trial(study, {}, seconds, seconds or 5.0, without=TrialState.PRUNED, **(about | changes))


def landscapes(number: int | None = None) -> list[Landscape]:
    """Measured on the H100."""
    return [read_landscape(path) for path in sorted(DIRECTORY.rglob("*.csv"))[:number]]


def bench_file(path: Path, workloads: list[Workload], gpu: str = CARD["name"], fastest: float = 1.5) -> Path:
    """A file as `bench --json` writes it; the times are made up, the least is `fastest` times the floor."""
    rows = []
    for w in workloads:
        for form, slower in (("fused_chunk", fastest), ("chunk", 1.9), ("parallel", 4.0), ("fused_recurrent", 21.0)):
            for variant, factor in (("tuned", 1.0), ("default", 1.7), ("fla", 2.5)):
                halves = {
                    half: {"ms": floor * slower * factor, "spread": 0.01, "samples": 50, "floor_ms": floor}
                    for half, floor in (("forward", w.floor_ms(backward=False)), ("both", w.floor_ms(backward=True)))
                }
                rows.append({"workload": w.name, "shape": w.shape, "form": form, "variant": variant, **halves})
        rows.append({"workload": w.name, "shape": w.shape, "form": "naive", "variant": "fla", "failure": "memory"})
    path.write_text(json.dumps({**MACHINE, "gpu": CARD | {"name": gpu}, "rows": rows}))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A journal of six searches and two runs."""
    path = tmp_path_factory.mktemp("report") / "h100.journal"
    filled = Storage(str(path))
    for found in landscapes()[4:16:2]:
        filled.search(found)
    filled.run(seconds=310.0, effort="quick")
    filled.run()
    return str(path)


@pytest.fixture(scope="module")
def history(place: str) -> History:
    """What is read of it."""
    return read(place)


@pytest.fixture
def empty(tmp_path: Path) -> Storage:
    """A storage that a test fills."""
    return Storage(str(tmp_path / "a.journal"), trials=6)


def page_of(history: History, **peers: Any) -> Page:
    return Page(history, Peers(peers.get("rows", []), peers.get("machines", [])), "a place")


def search_of(history: History, form: str) -> PastSearch:
    return next(search for search in history.searches if search.problem.form == form)


class Reader(HTMLParser):
    """The page's elements, by id; fails where they are not closed as they were opened."""

    VOID = ("meta", "br", "line", "link", "img")  # line is SVG's, and ends itself

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.ids += [value for name, value in found.items() if name == "id" and value]
        self.links += [value for name, value in found.items() if name in ("href", "src", "srcset", "data") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def cells(line: str) -> list[str]:
    """A row of a Markdown table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of a Markdown text."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    return [[cells(line) for line in block.splitlines()] for block in blocks]


# What is read


def test_every_candidate_and_finalist_is_read(place: str, history: History) -> None:
    storage = open_storage(place)
    for search in history.searches:
        name = f"{search.problem.kernel} {reports.shape(search.problem)}; {CONTEXT['gpu']}"
        theirs = [optuna.load_study(study_name=n, storage=storage).trials for n in (name, f"{name}; finals")]
        assert [len(found) for found in theirs] == [len(search.trials), len(search.finals)]
        assert search.best.value == min(trial.value for trial in theirs[0] if trial.value is not None)
        assert len(search.failed) == sum(trial.state is TrialState.FAIL for found in theirs for trial in found)


def test_the_seconds_of_all_trials_are_those_that_passed_though_racers_share_them(empty: Storage) -> None:
    empty.search(landscapes()[8])
    (search,) = read(empty.place).searches
    assert search.seconds == pytest.approx((empty.now - START).total_seconds())
    assert [trial.rivals for trial in search.finals] == [3, 3, 3, 1, 1]


def test_the_night_after_a_tuner_was_killed_is_no_time_of_the_gpus(empty: Storage) -> None:
    found = landscapes()[8]
    study = empty.study("a search", problem=asdict(found.problem), context=CONTEXT)
    empty.trial(study, {"BT": 64}, 1.0, 2.0)
    empty.trial(study, {"BT": 32}, None, 30000.0, reason=SUSPECT)
    (search,) = read(empty.place).searches
    assert search.seconds == pytest.approx(2.0)
    assert len(search.failed) == 1


def test_a_trial_that_is_not_understood_is_left_out_and_its_study_stays(empty: Storage) -> None:
    found = landscapes()[8]
    study = empty.study("a search", problem=asdict(found.problem), context=CONTEXT)
    empty.trial(study, {"BT": 64}, 1.0, 1.0)
    empty.trial(study, {"BT": 32}, 1.0, 1.0, rivals="many")
    empty.trial(study, {"BT": 16}, 0.0, 1.0)
    empty.trial(study, {}, 1.0, 1.0)
    empty.run(winners=[{"problem": "none"}])
    empty.run()
    history = read(empty.place)
    assert [trial.knobs for trial in history.searches[0].trials] == [{"BT": 64}]
    assert (len(history.runs), history.foreign) == (1, 4)


def test_studies_of_one_search_that_ran_with_different_passes_are_one(empty: Storage) -> None:
    problem = next(found.problem for found in landscapes() if found.problem.form == "chunk")
    for number, (name, BT) in enumerate((("a", 32), ("b", 64), ("b; finals", 64), ("c; finals", 16))):
        extra, step = {"states_config": {"BT": BT}}, {"step": "race"} if "finals" in name else {}
        study = empty.study(name, problem=asdict(problem), context=CONTEXT, source="same", extra=extra)
        empty.trial(study, {"BT": 64}, 1.0 + number, 1.0, **step)
    history = read(empty.place)
    (search,) = history.searches
    assert [trial.value for trial in search.trials] == [1.0, 2.0]
    assert [trial.value for trial in search.finals] == [3.0, 4.0]
    assert history.earlier == 0


def test_a_search_in_which_all_failed_is_told_of(empty: Storage) -> None:
    first, second = (found.problem for found in landscapes()[8:10])
    study = empty.study("nothing timed", problem=asdict(first), context=CONTEXT)
    for BT in (16, 32, 64):
        empty.trial(study, {"BT": BT}, None, 2.0, reason=WRONG)
    alone = page_of(read(empty.place))
    assert "No candidate has a time: all that were launched failed." in Reader(alone.html()).text
    assert tables(alone.markdown())[0][2:] == []
    empty.trial(empty.study("timed", problem=asdict(second), context=CONTEXT), {"BT": 16}, 1.0, 1.0)
    page = page_of(read(empty.place))
    figures = {name: value for name, value, _ in page.key_figures}
    assert (figures["searches"], figures["candidates"], figures["GPU seconds"]) == ("2", "4", "7")
    assert page.cost["failed"] == pytest.approx(6.0)
    assert [group.count for group in page.rejected] == [3]
    assert [row.problem for row in page.rows] == [second]


def test_a_run_that_was_interrupted_wrote_its_rules_all_the_same(empty: Storage) -> None:
    empty.search(landscapes()[8])
    empty.run(seconds=None)
    history = read(empty.place)
    assert [(run.interrupted, run.seconds) for run in history.runs] == [(True, 5.0)]
    assert page_of(history).rows[0].is_rule
    assert "5<small>interrupted</small>" in page_of(history).html()


def test_a_page_without_a_time_of_any_default_says_nothing_of_gains(empty: Storage) -> None:
    empty.search(landscapes()[8], default={})
    page = page_of(read(empty.place))
    assert [row.speedup for row in page.rows] == [None]
    assert "largest gain" not in page.html()


def test_a_database_gives_what_a_journal_gives(tmp_path: Path) -> None:
    found, database = landscapes()[8], Storage(f"sqlite:///{tmp_path / 'test.db'}", trials=3)
    database.search(found)
    database.run()
    history = read(database.place)
    assert [search.problem for search in history.searches] == [found.problem]
    assert list(history.runs[0].funnel)[:2] == ["enumerated", "worth compiling"]


def test_the_latest_search_of_a_problem_counts_and_earlier_ones_are_told_of(empty: Storage) -> None:
    found = landscapes()[8]
    old = empty.study("an older kernel's", problem=asdict(found.problem), context=CONTEXT, source="old", default={})
    empty.trial(old, knob_values(found.candidates[0].config), 0.001, 1.0)
    empty.search(found)
    history = read(empty.place)
    assert (len(history.searches), history.earlier) == (1, 1)
    assert history.searches[0].source == "2cc8116ace7364aa"
    assert "1 earlier searches" in page_of(history).html()


def test_a_storage_of_several_gpus_shows_the_one_that_is_named(empty: Storage) -> None:
    first, second = landscapes()[8:10]
    empty.search(first, context=CONTEXT | {"gpu": "NVIDIA H200"})
    empty.search(second)
    url = empty.place
    assert read(url).gpu == CONTEXT["gpu"]
    assert [search.problem for search in read(url, "NVIDIA H200").searches] == [first.problem]
    assert "NVIDIA H200" in page_of(read(url)).html()


def test_what_others_left_in_the_storage_is_left_out_and_counted(empty: Storage) -> None:
    empty.study("somebody's own")
    empty.study("no problem of ours", problem={"form": "chunk"}, context=CONTEXT)
    empty.study("runs; NVIDIA H100", context="not a mapping")
    empty.search(landscapes()[8])
    history = read(empty.place)
    assert (len(history.searches), history.foreign) == (1, 3)


# Figures


def test_the_funnel_is_the_last_runs_in_its_order(history: History) -> None:
    page = page_of(history)
    assert page.funnel[0] == ("enumerated", 5120)
    assert page.funnel[-1] == ("written", 20)
    assert len(page.funnel) == 10
    assert history.runs[-1].phases["search"] == 148.2
    assert (history.runs[0].effort, history.runs[0].seconds) == ("quick", 310.0)


def test_without_a_run_the_funnel_counts_the_trials(history: History) -> None:
    funnel = dict(page_of(replace(history, runs=[])).funnel)
    assert funnel["launched"] == sum(len(search.trials) for search in history.searches)
    assert funnel["timed"] == sum(len(search.timed) for search in history.searches)
    assert (funnel["race"], funnel["proof"]) == (3 * len(history.searches), len(history.searches))


def test_a_regret_never_rises_and_ends_at_nothing(history: History) -> None:
    curves = [[value for value in curve.regret if value is not None] for curve in page_of(history).curves]
    assert any(values[0] > 0 for values in curves)  # all but those whose search begins at the best
    for values in curves:
        assert values == sorted(values, reverse=True)
        assert values[-1] == 0


def test_a_failed_candidate_counts_as_a_measurement_and_leaves_the_best(history: History) -> None:
    search = search_of(history, "fused_chunk")
    number = next(i for i, trial in enumerate(search.trials) if trial.value is None)
    curve = reports.regret(search)
    assert len(curve) == len(search.trials)
    assert curve[number] == curve[number - 1]


def test_the_median_regret_keeps_searches_that_ended_and_counts_those_without_a_time_as_worst() -> None:
    assert reports.medians([[None, 0.5, 0.0], [0.4], [None, 0.3, 0.2]]) == [None, 0.3, 0.0]


def test_the_regrets_points_lie_within_the_plot(history: History) -> None:
    plot = page_of(history).plot
    points = [point.split(",") for _, line in plot.lines for point in [*line.split(), *plot.median.split()]]
    assert all(0 <= float(value) <= 100 for point in points for value in point)
    assert plot.medians[(plot.within(0.05) or 0) - 1] <= 0.05


def test_a_heat_maps_least_is_the_searchs_best(history: History) -> None:
    for maps in page_of(history).heat_maps.values():
        for found in maps:
            best = [(down, across, cell) for down, row in found.rows
                    for across, cell in zip(found.columns, row, strict=True) if cell.is_best]  # fmt: skip
            search = next(search for search in history.searches if search.problem == found.problem)
            assert [(down, across) for down, across, _ in best] == [(search.best.knobs["BT"], search.best.knobs["BV"])]
            assert best[0][2].ratio == min(cell.ratio for _, row in found.rows for cell in row if cell.ratio) == 1.0
            assert best[0][2].level == len(reports.LEVELS)


def test_a_heat_map_tells_what_failed_from_what_was_not_tried() -> None:
    def trial(BT: int, BV: int, ms: float | None) -> PastTrial:
        return PastTrial({"BT": BT, "BV": BV}, ms, "" if ms else WRONG, 1.0, START)

    trials = (trial(16, 16, 2.0), trial(16, 32, None), trial(32, 32, 1.0))
    search = PastSearch(landscapes(1)[0].problem, CONTEXT, "", {}, None, trials, ())
    rows = reports.heat_map(search).rows
    assert [[cell.ratio for cell in row] for _, row in rows] == [[2.0, None], [None, 1.0]]
    assert rows[0][1][1].about == f"failed: {WRONG}"
    assert rows[1][1][0].about == ""


def test_a_kernel_without_tiles_is_mapped_over_its_other_knobs() -> None:
    trials = tuple(PastTrial({"BV": BV, "num_warps": 1}, 1.0 * BV, "", 1.0, START) for BV in (4, 8))
    problem = Problem("fused_recurrent", "bfloat16", 8, 1024, 8, 64, 64)
    found = reports.heat_map(PastSearch(problem, CONTEXT, "", {}, None, trials, ()))
    assert (found.down, found.across, found.columns) == ("BV", "num_warps", [1])
    assert [[cell.ratio for cell in row] for _, row in found.rows] == [[1.0], [2.0]]


def test_importances_are_shares_and_find_the_knob_that_decides() -> None:
    values = [(BT, BV, warps) for BT in (16, 32, 64, 128) for BV in (16, 32, 64) for warps in (4, 8)]
    knobs = [{"BT": BT, "BV": BV, "num_warps": warps, "num_stages": 2} for BT, BV, warps in values]
    times = [1.0 + 10 * (k["BT"] != 64) + 0.01 * k["BV"] + 0.001 * k["num_warps"] for k in knobs]
    trials = tuple(PastTrial(k, ms, "", 1.0, START) for k, ms in zip(knobs, times, strict=True))
    problem = landscapes(1)[0].problem
    shares = reports.importance([PastSearch(problem, CONTEXT, "", {}, None, trials, ())])
    assert shares is not None
    assert next(iter(shares)) == "BT"
    assert shares["num_stages"] == 0
    assert sum(shares.values()) == pytest.approx(1)


def test_too_few_trials_or_one_value_of_each_knob_give_no_importance() -> None:
    problem = landscapes(1)[0].problem
    same = tuple(PastTrial({"BT": 64}, 1.0 + i, "", 1.0, START) for i in range(40))
    few = tuple(PastTrial({"BT": 16 << i}, 1.0 + i, "", 1.0, START) for i in range(4))
    for trials in (same, few):
        assert reports.importance([PastSearch(problem, CONTEXT, "", {}, None, trials, ())]) is None


def test_a_row_is_the_rule_that_was_written_with_its_gain(history: History) -> None:
    for row, search in zip(page_of(history).rows, history.searches, strict=True):
        assert row.is_rule
        assert (row.ms, row.config, row.error) == (search.best.value, search.best.knobs, 0.0026)
        assert row.default_ms == search.default_ms
        assert row.speedup == pytest.approx(row.default_ms / row.ms)
        assert row.of_floor == (None if search.problem.form in PASSES else pytest.approx(search.floor_ms / row.ms))


def test_a_row_tells_registers_spills_shared_memory_and_occupancy(empty: Storage) -> None:
    found = landscapes()[8]
    empty.search(found)
    empty.run()
    history = read(empty.place)
    page = page_of(history)
    (row,), (needs,) = page.rows, [c.needs for c in found.candidates if knob_values(c.config) == page.rows[0].config]
    blocks = needs.blocks_per_sm(ARCHS["sm90"])
    known = f"{needs.registers} registers, {needs.spills} B spilled, {needs.shared / 1024:.4g} KiB shared"
    assert blocks > 0
    assert row.resources == f"{known}, {blocks} \N{MULTIPLICATION SIGN} {needs.warps} of 64 warps"
    assert row.resources in page.markdown()
    assert row.resources in " ".join("".join(Reader(page.html()).text).split())
    assert page_of(replace(history, gpu="one without rules")).rows[0].resources == known


def test_without_a_run_a_row_is_the_searchs_fastest(history: History) -> None:
    page = page_of(replace(history, runs=[]))
    for row, search in zip(page.rows, history.searches, strict=True):
        assert not row.is_rule
        assert (row.ms, row.default_ms, row.error) == (search.best.value, search.default_ms, None)
    assert "not proven" in page.html()
    assert page.html().count(MARK) == 1 + 2 * len(page.rows)
    assert page.markdown().count("(no rule)") == len(page.rows)


def test_a_rule_of_other_software_or_of_an_older_kernel_is_not_the_latest_searchs(empty: Storage) -> None:
    found = landscapes()[8]
    empty.search(found)
    empty.run()
    history = read(empty.place)
    assert page_of(history).rows[0].is_rule
    assert MARK not in page_of(history).html()
    (search,) = history.searches
    for other in (replace(search, context=CONTEXT | {"driver": "590.1"}), replace(search, finals=())):
        page = page_of(replace(history, searches=[other]))
        assert not page.rows[0].is_rule
        assert (page.rows[0].ms, page.rows[0].error) == (search.best.value, None)
        assert list(page.history.rules) == [found.problem]


def test_key_figures_are_those_of_the_storage(history: History) -> None:
    found = {name: value for name, value, _ in page_of(history).key_figures}
    assert found["searches"] == "6"
    assert found["candidates"] == str(sum(len(search.trials) for search in history.searches))  # each is of its own
    assert found["GPU seconds"] == f"{sum(search.seconds for search in history.searches):,.0f}"
    mean = statistics.geometric_mean(search.default_ms / search.best.value for search in history.searches)
    assert found["vs default"] == f"{mean:.2f}\N{MULTIPLICATION SIGN}"
    assert found["GPU idle"] == "8.3%"


def test_costs_by_step_add_up_to_the_searches(history: History) -> None:
    page = page_of(history)
    assert sum(page.cost.values()) == pytest.approx(sum(search.seconds for search in history.searches))
    assert page.cost["proof"] == pytest.approx(4.2 * len(history.searches))
    spent = [sum(steps.values()) for _, steps in page.costs]
    assert spent == sorted(spent, reverse=True)


def test_rejected_candidates_are_counted_by_kernel_and_reason(history: History) -> None:
    groups = page_of(history).rejected
    assert sum(group.count for group in groups) == sum(len(search.failed) for search in history.searches)
    assert sum(group.seconds for group in groups) == pytest.approx(page_of(history).cost["failed"])
    assert {group.kind for group in groups} <= {"ArithmeticError: wrong result", HANGS}


def test_a_configuration_counts_once_and_a_race_that_failed_rejects_none(empty: Storage) -> None:
    study = empty.study("a search", problem=asdict(landscapes()[8].problem), context=CONTEXT)
    race = {"step": "race", "rivals": 2, "reason": HANGS}
    for BT, ms, about in (
        (16, 1.0, {}), (32, 2.0, {}), (64, 3.0, {}), (128, None, {"reason": WRONG}), (128, None, {"reason": WRONG}),
        (16, None, race), (32, None, race), (64, None, {"step": "prove", "reason": WRONG}),
    ):  # fmt: skip
        empty.trial(study, {"BT": BT}, ms, 1.0, **about)
    page = page_of(read(empty.place))
    assert ("candidates", "4", "launched, 2 of them rejected") in page.key_figures
    assert [(group.count, group.is_race, group.seconds) for group in page.rejected] == [(2, False, 3), (1, True, 1)]
    assert "1 race<" in page.html()


def test_flas_times_come_from_files_of_bench(history: History, tmp_path: Path) -> None:
    problem = search_of(history, "fused_chunk").problem
    w = Workload("mine", **{axis: getattr(problem, axis) for axis in "BTHKV"})
    page = Page(history, reports.read_peers([str(bench_file(tmp_path / "b.json", [w]))]), "a place")
    row = next(row for row in page.rows if row.problem == problem)
    assert row.fla_ms == pytest.approx(1.5 * 2.5 * w.floor_ms(backward=False))
    assert row.fla_speedup == pytest.approx(2.5)
    forward, both = page.comparisons[0].halves
    assert [line.form for line in forward.lines] == ["fused_chunk", "chunk", "parallel", "fused_recurrent"]
    assert both.floor_ms == w.floor_ms(backward=True)
    assert all(0 <= forward.floor_at < at <= 100 for line in forward.lines for _, _, at in line.dots)


@pytest.mark.parametrize("gpu", [CARD["name"], "NVIDIA H200"])
def test_what_is_faster_than_the_floor_stays_on_its_card_and_another_gpu_has_no_floor(
    gpu: str, history: History, tmp_path: Path
) -> None:
    path = bench_file(tmp_path / "b.json", [Workload("mine", 8, 1024, 8, 64, 64)], gpu, fastest=0.7)
    page = Page(history, reports.read_peers([str(path)]), "a place")
    halves = page.comparisons[0].halves
    places = [at for half in halves for line in half.lines for _, _, at in line.dots]
    assert all(0 < at < 100 for at in places)
    assert all((half.floor_at is None) == (gpu != CARD["name"]) for half in halves)
    assert {round(half.of_floor(half.lines[0]) or 0, 2) for half in halves} == {1.43 if gpu == CARD["name"] else 0}
    section = page.html().partition('<section id="fla">')[2].partition("</section>")[0]
    assert ("floor" in section.replace("of floor", "")) == (gpu == CARD["name"])


# Pages


def test_the_page_is_whole_and_fetches_nothing(history: History, tmp_path: Path) -> None:
    peers = reports.read_peers([str(bench_file(tmp_path / "b.json", [Workload("mine", 8, 1024, 8, 64, 64)]))])
    text = Page(history, peers, "a place").html()
    page = Reader(text)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert "url(" not in text
    assert "@import" not in text
    assert {f"#{name}" for name in page.ids} >= set(page.links)
    assert set(page.ids) == {name for name, _ in reports.SECTIONS}


def test_the_page_follows_the_readers_light_width_and_printer(history: History) -> None:
    text = page_of(history).html()
    for rule in ("prefers-color-scheme: dark", "max-width: 560px", "@media print", 'name="viewport"', 'lang="en"'):
        assert rule in text
    assert 'role="img" aria-label="Regret of 6 searches' in text


def test_what_is_missing_is_said_with_the_command_that_gives_it(history: History) -> None:
    text = " ".join(Reader(page_of(replace(history, runs=[])).html()).text)
    for command in ("bench --json", "python -m tuning run"):
        assert command in text


def test_hostile_names_stay_text_in_both(empty: Storage) -> None:
    found = landscapes()[8]
    empty.search(found, context=CONTEXT | {"gpu": HOSTILE, "driver": HOSTILE})
    problem = asdict(found.problem) | {"form": HOSTILE}
    study = empty.study(f"odd; {HOSTILE}", problem=problem, context=CONTEXT | {"gpu": HOSTILE}, default={})
    for number in range(3):
        empty.trial(study, {HOSTILE: number + 1}, None if number else 1.0, 1.0, reason=HOSTILE)
    history = read(empty.place)
    assert len(history.searches) == 2
    page = page_of(history)
    assert "script" not in Reader(page.html()).tags
    markdown = page.markdown()
    assert "<script" not in markdown
    assert all(len({len(row) for row in table}) == 1 for table in tables(markdown))
    assert HOSTILE.partition("|")[0] in "".join(Reader(page.html()).text)


def test_the_markdowns_tables_hold_a_row_a_problem_and_a_row_a_stage(history: History) -> None:
    page = page_of(history)
    results, funnel, phases = tables(page.markdown())
    assert [len(table) - 2 for table in (results, funnel, phases)] == [6, 10, 5]
    assert all(len(row) == len(results[0]) == 13 for row in results)
    for row, found in zip(results[2:], page.rows, strict=True):
        assert row[3:6] == [f"{found.ms:.4g}", f"{found.default_ms:.4g}", f"{found.speedup:.2f}×"]  # noqa: RUF001
    assert funnel[2] == ["enumerated", "5120"]


# The command


def test_the_command_writes_both_and_says_where(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table = tmp_path / "new" / "r.html", tmp_path / "r.md"
    assert main(["report", "--storage", place, "--out", str(page), "--markdown", str(table)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {page}\nwrote {table}\n" in out
    assert "vs default" in out
    assert Reader(page.read_text()).links
    assert table.read_text().startswith("# Tuning report: NVIDIA H100")


def test_without_a_gpu_the_only_journal_is_read_and_of_several_one_must_be_chosen(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reports, "gpu_present", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["report", "--out", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    assert main(command) == 1
    assert f"{tmp_path / 'retgen'} holds none; choose one by --storage" in capsys.readouterr().err
    (tmp_path / "retgen").mkdir()
    (tmp_path / "retgen" / "h100.journal").write_bytes(Path(place).read_bytes())
    assert main(command) == 0
    (tmp_path / "retgen" / "h200.journal").touch()
    assert main(command) == 1
    assert "holds 2: h100.journal, h200.journal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such storage"),
        (b"", "holds no candidate that was launched"),
        (b'{"op_code": 99, "worker_id": "x"}\n', "cannot be read as a storage"),
        (b'{"op_code": 4, "worker_id": "x", "trial_id": 7}\n', "cannot be read as a storage"),
        (b"\0" * 40 + b"\n" + b"[]\n", "cannot be read as a storage"),
    ],
    ids=["absent", "empty", "unknown code", "no trial", "zeros"],
)
def test_a_storage_that_tells_nothing_is_an_error_and_writes_nothing(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "a.journal", tmp_path / "r.html"
    if content is not None:
        path.write_bytes(content)
    assert main(["report", "--storage", str(path), "--out", str(page), "--markdown", str(tmp_path / "r.md")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert str(path) in error
    assert not page.exists()
    assert path.exists() is (content is not None)
    assert content is None or path.read_bytes() == content


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(place: str) -> None:
    with pytest.raises(RunError, match="'H300': the storage holds 'NVIDIA H100 80GB HBM3'"):
        read(place, "H300")


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"workload": "x"}]}', '{"rows": 3}', json.dumps(NAMELESS)])
def test_a_file_that_bench_did_not_write_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"b\.json: not a file of `python -m tuning bench"):
        reports.read_peers([str(path)])


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://tuner:hunter2@127.0.0.1:1/retgen",
        "postgresql+psycopg://tuner:hun%32ter2@127.0.0.1:1/retgen?password=hunter2",
        "nonsense://tuner:hunter2@host/retgen",
        "postgresql+psycopg://tuner:hunter2@[oops/retgen",
    ],
)
def test_a_password_is_in_no_message(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["report", "--storage", url, "--out", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]) == 1
    )
    said = "".join(capsys.readouterr())
    assert "hunter2" not in said
    assert "cannot be read as a storage" in said


def test_a_password_is_in_no_page(empty: Storage) -> None:
    empty.search(landscapes()[8])
    empty.run(command="python -m tuning run --storage postgresql://tuner:hunter2@host/db?password=hunter2&x=1")
    place = masked("postgresql://tuner:hunter2@host/db")
    page = Page(read(empty.place), Peers([], []), place)
    for text in (page.html(), page.markdown()):
        assert "hunter2" not in text
        assert "host/db" in text


def test_sixty_searches_of_sixty_trials_take_a_few_seconds() -> None:
    rng = random.Random(0)  # noqa: S311
    searches = []
    for number in range(60):
        knobs = [{name: rng.choice((16, 32, 64, 128)) for name in ("BT", "BV", "num_warps")} for _ in range(60)]
        trials = tuple(PastTrial(k, rng.lognormvariate(0, 1), "", 0.5, START) for k in knobs)
        problem = Problem(("chunk", "fused_chunk", "parallel")[number % 3], "bfloat16", number + 1, 1024, 8, 64, 64)
        searches.append(PastSearch(problem, CONTEXT, "", knobs[0], None, trials, ()))
    started = time.process_time()
    page = page_of(History(CONTEXT["gpu"], [CONTEXT["gpu"]], searches))
    page.html()
    page.markdown()
    assert time.process_time() - started < 8
