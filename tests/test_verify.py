"""`tuning verify` tells fresh rules from stale ones, and how to tune those again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import timing

from generated import configuration
from tuning import rules, verify
from tuning.__main__ import main
from tuning.coverage import Point
from tuning.measurement import Gpu, MeasurementError, StartError, Timing
from tuning.problems import GRADIENTS, HOPPER, STEPS, Problem
from tuning.rules import Entry
from tuning.workloads import builtin

GPU = Gpu("Pretended", "sm90", 132, 80, "580.1", bandwidth_gbs=3352)
KERNEL = "retention_fused_chunk"
USE = {"BT": 16, "BV": 16, "num_warps": 4, "num_stages": 2}
LENGTHS = (1024, 8192, 65536)


class Measurer:
    """Times by what a test says; a text in place of milliseconds is the error that measuring ends with."""

    gpu = GPU

    def __init__(self, answer: Callable[[Problem, bool], float | str]) -> None:
        self.answer, self.compared, self.closed = answer, list[tuple[Problem, list[Any]]](), False

    def measure(self, problem: Problem, config: Any, stop_above_ms: float, extra: dict[str, Any]) -> Timing:
        found = self.answer(problem, config == problem.default())
        if isinstance(found, str):
            raise (StartError if "start" in found else MeasurementError)(found)
        return timing(found)

    def compare(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        self.compared.append((problem, configs))
        return [self.measure(problem, config, math.inf, extra) for config in configs]

    def close(self) -> None:
        self.closed = True


Answer = Callable[[Callable[[Problem, bool], float | str]], Measurer]


@pytest.fixture
def path(only_this_directory: Path) -> Path:
    """The only file that is read."""
    return only_this_directory / "a.yaml"


@pytest.fixture
def measuring(path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A GPU that times as a test says; three rules of it, which were tuned at 1 ms and 2 ms by default."""
    write(path)

    def start(answer: Callable[[Problem, bool], float | str]) -> Measurer:
        measurer = Measurer(answer)
        monkeypatch.setattr(verify, "Measurer", lambda: measurer)
        monkeypatch.setattr(verify, "gpu_present", lambda: True)
        return measurer

    return start


def entry(T: int, kernel: str = KERNEL, proof: str = "measured", K: int = 16, **figures: int) -> Entry:
    shown = {"ms": 1.0, "default_ms": 2.0, "error": 0.001, "spills": 0, "trials": 9} | figures
    point = Point("bfloat16", K, 16, 64, T)
    return Entry(kernel, point, dict(USE), proof, shown | {"point": rules.point_text(point)})


def write(path: Path, *entries: Entry, name: str = GPU.name) -> None:
    device = {"arch": "sm90", "name": name}
    rules.write(path, rules.document(list(entries or map(entry, LENGTHS)), device, None))
    configuration.reload()


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["verify", *options])
    return code, " ".join(capsys.readouterr().out.replace("│", " ").split())


def slow_at(T: int, ms: float | str) -> Callable[[Problem, bool], float | str]:
    """One millisecond everywhere but at one length, and two by default."""
    return lambda problem, default: 2.0 if default else ms if problem.T == T else 1.0


def test_rules_as_fast_as_when_they_were_tuned_are_fresh(measuring: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    measurer = measuring(slow_at(1024, 1.099))
    code, out = run(capsys)
    assert code == 0
    assert "3 of 3 points of active rules, on Pretended" in out
    assert f"{KERNEL} bfloat16 K=16 V=16 BH=64 T=1024 1 1.099 1.10 2 fresh" in out
    assert out.endswith("3 fresh")
    config = type(measurer.compared[0][0].default())(**USE)
    problems = [Problem("fused_chunk", "bfloat16", 1, T, 64, 16, 16) for T in LENGTHS]
    assert measurer.compared == [(problem, [config, problem.default()]) for problem in problems]
    assert measurer.closed


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (1.2, "slower than it was"),
        (2.1, "slower than the default"),
        ("ArithmeticError: wrong result: relative errors [0.5]", "wrong"),
        ("the measuring process died: the kernel crashed", "does not run"),
    ],
)
def test_a_stale_rule_is_named_and_the_command_that_tunes_it_again(
    measuring: Answer, capsys: pytest.CaptureFixture[str], answer: float | str, verdict: str
) -> None:
    measuring(slow_at(8192, answer))
    code, out = run(capsys)
    assert code == 1
    assert f"1 {verdict}" in out
    assert "2 fresh" in out
    assert "tune them again with python -m tuning run --fresh --form fused_chunk --workload" in out
    assert out.endswith("--workload B=1,T=8192,H=64,K=16,V=16")
    assert not isinstance(answer, str) or answer in out


def test_how_much_slower_is_stale_is_for_the_user_to_say(measuring: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    measuring(slow_at(8192, 1.2))
    assert run(capsys, "--tolerance", "0.25")[0] == 0
    assert run(capsys, "--tolerance", "0.1")[0] == 1


def test_a_default_that_does_not_run_is_not_held_against_a_rule(
    measuring: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    measurer = measuring(lambda problem, default: "OutOfResources: shared memory" if default else 1.0)
    assert run(capsys)[0] == 0
    assert all(len(configs) == 1 for _, configs in measurer.compared)


@pytest.mark.parametrize("by_default", [False, True])
def test_a_measuring_process_that_starts_no_more_is_no_rules_fault_and_ends_the_command(
    measuring: Answer, capsys: pytest.CaptureFixture[str], by_default: bool
) -> None:
    measurer = measuring(lambda problem, default: "no answer: it does not start" if default is by_default else 1.0)
    assert main(["verify"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: no answer: it does not start\n"
    assert "tune them again" not in shown.out
    assert measurer.closed


def test_what_is_known_bad_is_named_and_never_launched(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"BT": 64, "BV": 16, "num_warps": 4, "num_stages": 1}
    measurer = measuring(slow_at(0, 1.0))
    measurer.measure = None  # type: ignore[method-assign, assignment]
    write(path, replace(entry(1024), use=bad))
    code, out = run(capsys)
    assert code == 1
    assert "rules not used: known bad: Unpipelined" in out
    assert "reads of memory that is not the program's own" in out
    assert "--workload B=1,T=1024" in out


def test_timings_that_overlap_are_no_proof_that_the_default_is_faster(
    measuring: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    measurer = measuring(lambda problem, default: 1.0)
    for spread, code in ((0.1, 0), (0.0, 1)):
        measurer.compare = lambda problem, configs, extra, spread=spread: [  # type: ignore[method-assign]
            replace(timing(ms), low=ms - spread, high=ms + spread) for ms in (1.04, 1.0)
        ]
        assert run(capsys)[0] == code


def test_the_sample_is_as_large_as_wanted_and_drawn_by_a_seed(
    measuring: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    measurer, lengths = measuring(slow_at(0, 1.0)), []
    for options in (["--sample", "1"], ["--sample", "1"], *(["--sample", "1", "--seed", str(n)] for n in range(1, 9))):
        measurer.compared.clear()
        assert "1 of 3 points" in run(capsys, *options)[1]
        lengths += [problem.T for problem, _ in measurer.compared]
    assert lengths[0] == lengths[1]
    assert set(lengths) == set(LENGTHS)
    assert "3 of 3 points" in run(capsys, "--all")[1]
    assert "0 of 0 points" in run(capsys, "--kernel", "parallel")[1]


def test_the_budget_ends_it_and_what_is_left_is_told(measuring: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    measuring(slow_at(0, 1.0))
    code, out = run(capsys, "--budget", "1e-9")
    assert code == 0
    assert "left 3 unlooked at" in out


def test_ctrl_c_reports_what_was_found(measuring: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    measurer = measuring(slow_at(0, 1.0))

    def compare(problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        if LENGTHS[1] == problem.T:
            raise KeyboardInterrupt
        return Measurer.compare(measurer, problem, configs, extra)

    measurer.compare = compare  # type: ignore[method-assign]
    code, out = run(capsys)
    assert code == 130
    assert "left 2 unlooked at 1 fresh" in out
    assert measurer.closed


def test_times_of_another_gpu_or_of_a_model_are_no_measure(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring(slow_at(1024, 1.9))
    write(path, name="Another")
    assert run(capsys) == (0, run(capsys)[1])
    write(path, entry(1024, proof="modelled"))
    assert run(capsys)[0] == 0
    measuring(slow_at(1024, 2.5))
    assert "1 slower than the default" in run(capsys)[1]


def test_rules_that_the_kernels_have_outgrown_are_stale_without_being_timed(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measurer = measuring(slow_at(0, 1.0))
    path.write_text(path.read_text().replace("source: ", "source: x"))
    configuration.reload()
    code, out = run(capsys)
    assert code == 1
    assert f"{path}: rules not used: stale: kernels.{KERNEL}.source" in out
    assert out.endswith(" ".join(f"--workload B=1,T={T},H=64,K=16,V=16" for T in LENGTHS))
    assert measurer.compared == []


def test_every_point_of_a_rule_is_looked_at_unless_another_rule_is_used_there(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measurer = measuring(slow_at(0, 1.0))
    write(path, entry(1024), entry(2048), entry(4096))
    write(path.with_name("b.yaml"), entry(1024), entry(2048, proof="modelled"), entry(16384, proof="modelled"))
    assert "4 of 4 points" in run(capsys)[1]
    assert [problem.T for problem, _ in measurer.compared] == [1024, 2048, 4096, 16384]


def choice(use: str, kernel: str = "retention_form", T: int = 1024, ms: float = 1.0, K: int = 16) -> Entry:
    return replace(entry(T, kernel, K=K), use={"form": use}, figures=entry(T, kernel, K=K).figures | {"ms": ms})


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [
        ({"chunk": 1.0, "fused_chunk": 0.95}, "1 fresh"),
        ({"chunk": 1.0, "fused_chunk": 0.8}, "1 slower than fused_chunk"),
        ({"chunk": 1.2, "fused_chunk": 1.2}, "1 slower than it was"),
        ({"chunk": 1.0, "fused_chunk": "OutOfResources: shared memory"}, "1 fresh"),
        ({"chunk": "the measuring process died: the kernel crashed", "fused_chunk": 1.0}, "1 does not run"),
    ],
)
def test_the_choice_of_a_form_is_stale_where_another_is_faster_by_now(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str], ms: dict[str, Any], verdict: str
) -> None:
    measuring(lambda problem, default: ms.get(problem.form, 9.0))
    write(path, choice("chunk"))
    code, out = run(capsys)
    assert verdict in out
    assert code == int(verdict != "1 fresh")
    assert code == 0 or "tuning run --fresh --workload B=1,T=1024,H=64,K=16,V=16" in out


@pytest.mark.parametrize(
    ("hopper", "chosen", "fresh"), [(None, "sweeps", False), (0.5, "sweeps", True), (0.9, "sweeps", False)]
)
def test_three_sweeps_are_timed_by_what_runs_them(
    measuring: Answer, path: Path, capsys: pytest.CaptureFixture[str], hopper: float | None, chosen: str, fresh: bool
) -> None:
    ms = {"chunk": 1.0, "fused_chunk": 1.0, GRADIENTS: 2.0, HOPPER: hopper or 0.0}
    measured: list[str] = []

    def time(problem: Problem, default: bool) -> float:
        measured.append(problem.form)
        return ms[problem.form]

    measuring(time)
    entries = [choice(chosen, "retention_form_gradients", ms=2.0), choice("fused_chunk")]
    if hopper is not None:
        entries.append(replace(entry(1024, f"retention_{HOPPER}"), use={"BT": 64, "num_stages": 2}))
    write(path, *entries)
    code, out = run(capsys, "--kernel", "form_gradients")
    assert ("1 fresh" in out) is (code == 0) is fresh
    assert measured == [HOPPER if hopper is not None else "fused_chunk", GRADIENTS]


def test_shapes_are_timed_and_tuned_with_the_heads_that_they_were_tuned_with(measuring: Answer, path: Path) -> None:
    measuring(slow_at(0, 1.0))
    write(path, entry(1024, B=4), entry(1024, GRADIENTS.join(("retention_", "")), B=2), entry(1024, K=32, B=16))
    claims = verify.claims_of(configuration.active_rules(GPU.name, "sm90"))
    assert sorted((claim.problem.form, claim.problem.B, claim.problem.H) for claim in claims) == [
        ("fused_chunk", 4, 16),
        ("fused_chunk", 16, 4),
        (GRADIENTS, 2, 32),
    ]
    assert verify.command(claims) == (
        "python -m tuning run --fresh --form fused_chunk --workload B=4,T=1024,H=16,K=16,V=16 "
        "--workload B=16,T=1024,H=4,K=16,V=32 --workload B=2,T=1024,H=32,K=16,V=16"
    )


def test_a_step_is_tuned_again_with_its_own_widths_and_by_the_name_of_its_form(measuring: Answer, path: Path) -> None:
    measuring(slow_at(0, 1.0))
    steps = [replace(entry(1, f"retention_{form}", K=32, B=2), use={"BV": 8, "num_warps": 1}) for form in STEPS]
    write(path, *steps)
    claims = verify.claims_of(configuration.active_rules(GPU.name, "sm90"))
    assert {claim.problem for claim in claims} == {Problem(form, "bfloat16", 2, 1, 32, 32, 16) for form in STEPS}
    command = "python -m tuning run --fresh --form step --form step_buffered --workload B=2,T=1,H=32,K=32,V=16"
    assert verify.command(claims) == command


def test_shipped_rules_name_the_builtin_workloads_they_were_tuned_at() -> None:
    claims = verify.claims_of(configuration.active_rules("NVIDIA H100 80GB HBM3", "sm90"))
    tuned = {(workload.B, workload.H) for workload in builtin().values() if not workload.form}
    assert {(claim.problem.B, claim.problem.H) for claim in claims if claim.problem.form not in STEPS} == tuned


def test_without_a_gpu_it_says_what_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 1
    assert "there is no GPU here; `python -m tuning check` needs none" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--sample", "0"], ["--sample", "2", "--all"], ["--tolerance", "-1"]])
def test_wrong_usage_is_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *options])
    assert ended.value.code == 2
