"""How near the searches come to the best, on the landscapes that come with the package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Pool, timing

from tuning import landscape, simulate
from tuning.__main__ import main
from tuning.landscape import Landscape
from tuning.measurement import Gpu, MeasurementError, StartError, Timing
from tuning.problems import Problem
from tuning.samplers import INFORMED
from tuning.search import EFFORTS

MEASUREMENTS, SEEDS = 60, 3
SMALL = "fused_chunk_bfloat16_B8_T2048_H8_K512_V256"


@cache
def shipped() -> list[Landscape]:
    """All landscapes of the package."""
    return landscape.shipped()


def regret(sampler: str, known: list[Landscape]) -> float:
    """The mean regret after 60 measurements."""
    replays = simulate._replays(known, sampler, MEASUREMENTS, SEEDS)
    return float(np.mean([one.regrets(MEASUREMENTS)[-1] for seeds in replays for one in seeds]))


def test_the_default_sampler_s_regret_is_small_and_below_tpe_s_and_random_s() -> None:
    informed, tpe, random = (regret(sampler, shipped()) for sampler in (INFORMED, "tpe", "random"))
    assert informed < 0.03
    assert informed < tpe
    assert informed < random


@pytest.mark.parametrize(("effort", "limit"), [("quick", 0.05), ("full", 0.02)])
def test_an_effort_ends_near_the_best_on_every_landscape(effort: str, limit: float) -> None:
    chosen = EFFORTS[effort]
    worst = {one.name: simulate.replay(one, INFORMED, chosen).regrets(chosen.measurements)[-1] for one in shipped()}
    assert {name: found for name, found in worst.items() if found >= limit} == {}


@pytest.mark.parametrize(("first", "ahead"), [(16, 16), (20, 28)])
def test_what_an_effort_finds_does_not_hang_on_its_very_numbers(first: int, ahead: int) -> None:
    effort = replace(EFFORTS["quick"], first=first, ahead=ahead)
    ends = {one.name: simulate.replay(one, INFORMED, effort).regrets(effort.measurements)[-1] for one in shipped()}
    assert {name: found for name, found in ends.items() if found >= 0.05} == {}


def test_regret_is_none_once_everything_was_tried() -> None:
    (one,) = (one for one in shipped() if one.name == SMALL)
    more = len(one.candidates) + 8
    replayed = simulate.replay(one, "random", simulate.sampler_effort(more))
    assert len(replayed.times) <= len(one.candidates)
    regrets = replayed.regrets(more)
    assert len(regrets) == more
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] == 0


def test_simulate_prints_tables_and_writes_curves_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    picture, curves = tmp_path / "regret.png", tmp_path / "regret.json"
    options = ["--landscape", SMALL, "--sampler", "informed", "--sampler", "random", "--seeds", "2", "--each"]
    assert main(["simulate", *options, "--measurements", "20", "--plot", str(picture), "--json", str(curves)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("informed", "random", "quick", "full", SMALL, "to 2 %"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    regrets = json.loads(curves.read_text(encoding="utf-8"))["regret"]
    assert np.shape(regrets["random"]) == (1, 2, 20)


def test_a_landscape_of_another_kernel_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = (one for one in shipped() if one.name == SMALL)
    path = landscape.write(tmp_path, one)
    path.write_text(path.read_text(encoding="utf-8").replace(one.source, "0" * 16), encoding="utf-8")
    assert main(["simulate", "--landscape", str(path), "--sampler", "informed"]) == 0
    assert f"earlier version of the kernel: {SMALL}" in capsys.readouterr().out


def test_a_landscape_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = shipped()[0]
    assert landscape.read(landscape.write(tmp_path, one)) == one


def test_landscapes_of_two_gpus_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = (one for one in shipped() if one.name == SMALL)
    monkeypatch.setattr(landscape, "DIRECTORY", tmp_path)
    for gpu in ("one", "other"):
        landscape.write(tmp_path / gpu, replace(one, gpu=replace(one.gpu, name=gpu, uuid="secret")))
    assert [found.gpu.name for found in simulate._selected([SMALL])] == ["one", "other"]
    assert [found.gpu.name for found in simulate._selected(["other/*"])] == ["other"]
    assert landscape.shipped() == simulate._selected([])
    assert not any("uuid" in path.read_text() for path in landscape.paths().values())


def test_no_shipped_landscape_tells_which_machine_it_was() -> None:
    assert [name for name, path in landscape.paths().items() if "uuid" in path.read_text(encoding="utf-8")] == []


def test_a_search_that_never_comes_near_counts_as_such() -> None:
    far, soon, late = [False] * 4, [False, True, True, True], [False, False, False, True]
    assert simulate._reached(np.array([[soon], [late], [far]])) == ("4", "67%")
    assert simulate._reached(np.array([[soon], [far], [far]])) == ("never", "33%")


class Measurer:
    """Measures what a test says."""

    gpu = Gpu("Pretended", "sm90", 132, 80, "580.1")

    def __init__(self, answer: Callable[[Any], float | str], compares: str = "") -> None:
        self.answer, self.compares = answer, compares

    def measure(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
        if isinstance(found := self.answer(config), str):
            raise (StartError if "start" in found else MeasurementError)(found)
        return timing(found)

    def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        if self.compares:
            raise MeasurementError(self.compares)
        return [self.measure(problem, config, 0.0, extra) for config in configs]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "compares", "said"),
    [
        (lambda config: "the kernel crashed", "", "candidates ran"),
        (lambda config: 1.0, "the kernel hangs", "nothing is written: the kernel hangs"),
    ],
)
def test_a_search_that_cannot_be_measured_writes_nothing_and_the_next_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[Any], float | str],
    compares: str,
    said: str,
) -> None:
    assert measured(tmp_path, monkeypatch, Measurer(answer, compares)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(said) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("starts", [lambda config: config.num_warps == 4, lambda config: False])
def test_a_measuring_process_that_starts_no_more_ends_the_command(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    starts: Callable[[Any], bool],
) -> None:
    gone = Measurer(lambda config: 1.0 if starts(config) else "no answer: it does not start")
    assert measured(tmp_path, monkeypatch, gone) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: no answer: it does not start\n"
    assert "nothing is written" not in shown.out
    assert not list(tmp_path.iterdir())


def measured(directory: Path, monkeypatch: pytest.MonkeyPatch, measurer: Measurer) -> int:
    """The exit status of measuring two searches' landscapes."""
    monkeypatch.setattr(landscape, "gpu_present", lambda: True)
    monkeypatch.setattr(landscape, "Measurer", lambda: measurer)
    monkeypatch.setattr(landscape, "CompilePool", lambda *given, **how: Pool())
    workload = "B=1,T=64,H=1,K=16,V=32"
    return main(["landscape", "--form", "fused_recurrent", "--workload", workload, "--out", str(directory)])


def test_what_always_runs_the_defaults_has_no_landscape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landscape, "gpu_present", lambda: True)
    assert main(["landscape", "--workload", "B=1,T=64,H=1,K=15,V=16"]) == 1
    assert "an odd K or V" in capsys.readouterr().err


def test_what_cannot_be_simulated_is_refused_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["simulate", "--landscape", "nothing*"]) == 1
    assert SMALL in capsys.readouterr().err
    assert main(["simulate", "--plot", str(tmp_path / "regret.txt")]) == 1
    assert ".png" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["simulate", "--plot", str(tmp_path / "regret.png")]) == 1
    assert "pip install 'retgen[plot]'" in capsys.readouterr().err


def test_a_landscape_is_not_measured_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landscape, "gpu_present", lambda: False)
    assert main(["landscape"]) == 1
    assert "no GPU here" in capsys.readouterr().err
