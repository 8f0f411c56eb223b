"""`tuning check` finds what is wrong with a file, and `tuning compile` leaves nothing to compile twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fakes import Judge, Pool, timing, tune

from generated import configuration
from generated.configuration_file import When
from tuning import check as checking
from tuning import coverage, landscape, precompile, proof, rules, space
from tuning.__main__ import main
from tuning.compilation import ARCHS, Resources
from tuning.compile_pool import compile_key
from tuning.coverage import Point
from tuning.landscape import Landscape
from tuning.measurement import MeasurementError, Timing
from tuning.problems import FORM_KERNEL, GRADIENTS, GRADIENTS_FORM_KERNEL, PLAIN, Problem, problem_at
from tuning.rules import Entry
from tuning.search import EFFORTS
from tuning.space import SWEEPS, knob_values
from tuning.winners import HELD, NOISE

ROOT = Path(__file__).resolve().parent.parent
SM90 = ARCHS["sm90"]
NEEDS = Resources(registers=100, spills=8, shared=8192, warps=4)
KERNEL = "retention_fused_chunk"
USE = {"BT": 16, "BV": 16, "num_warps": 4, "num_stages": 2}
WHEN = When("bfloat16", (1, 16), (1, 16), (32, 128), (512, 2048))
POINT = Point("bfloat16", 16, 16, 64, 1024)


def entry(T: int = 1024, *, use: dict[str, int] | None = None, **figures: Any) -> Entry:
    shown = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 8, "trials": 9} | figures
    point = {"point": f"K=16 V=16 BH=64 T={T}"}
    return Entry(KERNEL, replace(POINT, T=T), USE | (use or {}), "measured", shown | point)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with two rules."""
    path = tmp_path / "a.yaml"
    rules.write(path, rules.document([entry(), entry(8192)], {"arch": "sm90"}, None))
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A file with one rule of two points, of which the longer is farther behind the fastest there."""
    path = tmp_path / "a.yaml"
    entries = [entry(), entry(2048, ms=0.8, best_ms=0.77)]
    rules.write(path, rules.document(entries, {"arch": "sm90"}, None))
    return path


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Makes the compiler give this answer to everything; returns what it is asked for."""

    def answer(needs: Resources | str | Callable[[str], Resources | str]) -> list[Any]:
        asked: list[Any] = []

        class Pool:
            def __init__(self, arch: str, workers: int | None) -> None:
                asked.append(arch)

            def submit(self, problem: Problem, config: Any, *, variant: str) -> None:
                asked.append((problem, config, variant))

            def result(self, problem: Problem, config: Any, *, variant: str) -> Resources | str:
                return needs(variant) if callable(needs) else needs

            def close(self) -> None:
                asked.append("closed")

        monkeypatch.setattr(checking, "CompilePool", Pool)
        return asked

    return answer


def lines(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def check_changed(file: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, without the compiler, of a file in which something was changed for the worse."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    assert main(["check", "--no-compile", str(file)]) == 1
    return lines(capsys)


# check


def test_a_file_that_is_whole_and_compiles_as_it_did_passes(
    file: Path, compiler: Callable[[Any], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = compiler(NEEDS)
    assert main(["check", str(file)]) == 0
    assert lines(capsys) == f"{file}: 2 rules, 2 of them compiled for sm90 in 6 launches, nothing wrong"
    problems = [Problem("fused_chunk", "bfloat16", 1, T, 64, 16, 16) for T in (1024, 8192)]
    config = type(problems[0].default())(**USE)
    variants = (PLAIN, "states", "packed")
    assert asked == ["sm90", *((problem, config, variant) for problem in problems for variant in variants), "closed"]


def test_a_rule_of_several_points_is_compiled_once(shared: Path, compiler: Callable[[Any], list[Any]]) -> None:
    asked = compiler(NEEDS)
    assert main(["check", str(shared)]) == 0
    assert [variant for _, _, variant in asked[1:-1]] == [PLAIN, "states", "packed"]


def test_a_launch_that_only_fails_with_states_is_a_fault(
    file: Path, compiler: Callable[[Any], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(lambda variant: "TimeoutError: too long" if variant == "states" else NEEDS)
    assert main(["check", str(file)]) == 1
    assert f"wrong: kernels.{KERNEL}.rules[1], states: does not compile: TimeoutError" in lines(capsys)


def test_what_the_compiler_does_otherwise_is_shown_and_is_no_fault(
    tmp_path: Path, compiler: Callable[[Any], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    figures = {"registers": 90, "shared": 8192, "spills": 0, "triton": "3.5.1"}
    rules.write(path, rules.document([entry(**figures)], {"arch": "sm90"}, None))
    compiler(NEEDS)
    assert main(["check", str(path)]) == 0
    said = lines(capsys)
    assert f"than when tuned (Triton 3.5.1, here {version('triton')}): not proven with this Triton; `python -m" in said
    assert "right" not in said
    out = re.sub(r"[^\w.\[\] ]", "", said)
    assert re.search(r"rules\[0\] +registers +90 +100", out)
    assert re.search(r"rules\[0\] +spills +0 +8", out)
    assert re.search(r"rules\[0\] +programs a multiprocessor +5 +4", out)
    assert "8192" not in out


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ("TimeoutError: compiling took more than 20 s", "does not compile: TimeoutError"),
        (replace(NEEDS, shared=300_000), "needs 300000 bytes of shared memory; sm90 has 232448"),
        (replace(NEEDS, tensor_memory=600), "needs 600 columns of tensor memory; sm90 has 512"),
    ],
    ids=["no code", "too large", "too wide"],
)
def test_rules_that_no_gpu_could_launch_are_faults(
    file: Path,
    compiler: Callable[[Any], list[Any]],
    capsys: pytest.CaptureFixture[str],
    needs: Resources | str,
    said: str,
) -> None:
    compiler(needs)
    assert main(["check", str(file)]) == 1
    out = lines(capsys)
    assert f"wrong: kernels.{KERNEL}.rules[0]: {said}" in out
    assert "6 wrong" in out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("source: ", "source: x", "stale: "),
        ("BT: 16", "BT: 17", "a power of two"),
        (f"  {KERNEL}:", "  unheard_of:", "kernels.unheard_of is no kernel"),
        ("format: 1", "format: 2", "format is 2"),
        ("T: [512, 2048]", "T: [512, 5000]", "rules[0].when covers K=1 V=1 BH=32 T=2049, which is beyond the reach"),
        ("T: [512, 2048]", "T: [511, 2048]", "rules[0].when covers K=1 V=1 BH=32 T=511, which is beyond the reach"),
        ("K: [1, 16]", "K: [1, 17]", "rules[0].when covers K=17 V=1 BH=32 T=512, which is beyond the reach"),
    ],
)
def test_faults_are_named_without_the_compiler(
    file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    assert said in check_changed(file, old, new, capsys)


def test_a_rule_of_a_users_own_compiles_at_its_upper_bounds_and_may_reach_as_far_as_it_likes(
    file: Path, compiler: Callable[[Any], list[Any]]
) -> None:
    text = re.sub(r", point: [^}]*", "", file.read_text()).replace("T: [512, 2048]", "T: [1, 4000]")
    file.write_text(text)
    asked = compiler(NEEDS)
    assert main(["check", str(file)]) == 0
    assert asked[1][0] == problem_at(KERNEL, "bfloat16", 16, 16, 128, 4000)


def test_a_steps_rule_of_a_users_own_compiles_where_it_is_used(
    tmp_path: Path, compiler: Callable[[Any], list[Any]]
) -> None:
    """Of two tokens of bfloat16 states it is not where these are many: they go by in pieces."""
    path = tmp_path / "a.yaml"
    given = {"kernel": "retention_step_bf16", "point": Point("bfloat16", 64, 64, 512, 1)}
    step = replace(entry(), **given, use={"BV": 16, "num_warps": 4})
    rules.write(path, rules.document([step], {"arch": "sm90"}, None))
    text = re.sub(r", point: [^}]*", "", path.read_text())
    path.write_text(re.sub(r"\bT: \[1, \d+\]", "T: [1, 2]", text))
    asked = compiler(NEEDS)
    assert main(["check", str(path)]) == 0
    assert "T: [1, 2]" in path.read_text()
    assert {problem.T for problem, *_ in asked[1:-1]} == {1}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ms: 0.5", "ms: 1.5", "its 1.5 ms are more than the default's 1.0"),
        ("ms: 0.5", "ms: 1.012", "its 1.012 ms are more than the default's 1.0"),
        ("ms: 0.5, default_ms: 1.0", "ms: 0.5, default_ms: 1.0, best_ms: 0.47", "over 5% more than the 0.47"),
        ("error: 0.001", "error: 0.9", "its error is 0.9, over the 1e-02"),
        ("T: [512, 2048]", "T: [1500, 2048]", "does not hold the point"),
    ],
)
def test_figures_that_speak_against_their_rule_are_faults(
    file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    out = check_changed(file, old, new, capsys)
    assert said in out
    assert "1 wrong" in out


def test_what_stays_in_use_within_the_noise_of_the_default_is_right(
    file: Path, compiler: Callable[[Any], list[Any]]
) -> None:
    compiler(NEEDS)
    chosen = SWEEPS.choose({"chunk": 1.0, "parallel": 1.01}, "parallel", hold=HELD, noise=NOISE)
    assert chosen == "parallel"
    file.write_text(file.read_text().replace("ms: 0.5, default_ms: 1.0", "ms: 1.01, default_ms: 1.0"))
    assert main(["check", str(file)]) == 0


@pytest.mark.parametrize(("kernel", "choice"), [(FORM_KERNEL, SWEEPS), (GRADIENTS_FORM_KERNEL, space.GRADIENTS)])
def test_a_form_that_is_no_choice_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kernel: str, choice: space.Choice
) -> None:
    path = tmp_path / "a.yaml"
    for form in choice.values:
        chosen = replace(entry(), kernel=kernel, use={choice.name: form})
        rules.write(path, rules.document([chosen], {"arch": "sm90"}, None))
        assert main(["check", "--no-compile", str(path)]) == 0
    out = check_changed(path, f"form: {choice.values[-1]}", "form: diagonal", capsys)
    assert f"kernels.{kernel}.rules[0].use is {{'form': 'diagonal'}}: form is 'diagonal'; it must be" in out


def test_rules_may_overlap_that_say_the_same(
    tmp_path: Path, compiler: Callable[[Any], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, beside = tmp_path / "a.yaml", {"K": 16, "V": 16, "BH": 96, "T": 2000}
    other = replace(entry(), point=Point("bfloat16", **beside))
    other.figures["point"] = rules.point_text(other.point)
    rules.write(path, rules.document([entry(), other], {"arch": "sm90"}, None))
    compiler(NEEDS)
    assert main(["check", str(path)]) == 0
    assert "2 rules" in lines(capsys)
    out = check_changed(path, "BT: 16", "BT: 32", capsys)
    assert "rules[1].when covers shapes that kernels.retention_fused_chunk.rules[0] covers already" in out


def test_a_rule_of_several_points_is_as_its_worst_and_right(
    shared: Path, compiler: Callable[[Any], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(NEEDS)
    (rule,) = configuration.parse_file(shared).kernels[KERNEL].rules
    assert rule.when.T == (512, 4096)
    assert [figures["point"] for figures in (rule.figures, *rule.also)] == [
        f"K=16 V=16 BH=64 T={T}" for T in (2048, 1024)
    ]
    assert main(["check", str(shared)]) == 0
    assert "1 rules, 1 of them compiled" in lines(capsys)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{ms: 0.5, default_ms: 1.0", "{ms: 1.5, default_ms: 1.0", "rules[0].also[0]: its 1.5 ms are more than"),
        (
            "{ms: 0.5, default_ms: 1.0",
            "{ms: 0.5, default_ms: 1.0, best_ms: 0.4",
            "rules[0].also[0]: its 0.5 ms are over",
        ),
        ("best_ms: 0.77", "best_ms: 0.7", "rules[0]: its 0.8 ms are over 5% more than the 0.7 of the fastest"),
        ("T=1024", "T=16384", "does not hold the point K=16 V=16 BH=64 T=16384"),
        ("T=1024", "T=16384", "rules[0].when covers K=1 V=1 BH=32 T=512, which is beyond the reach of all its points"),
        ("point: K=16 V=16 BH=64 T=1024", "point: here", "must name each, and its point is 'here'"),
        ("T: [512, 4096]", "T: [511, 4096]", "rules[0].when covers K=1 V=1 BH=32 T=511, which is beyond the reach"),
        ("also:", "also: []\n        x:", "unknown key 'x'"),
        ("{ms: 0.5, default", "{default", "rules[0].also[0]: missing key ms"),
    ],
)
def test_each_point_of_a_rule_is_held_against_it(
    shared: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    assert said in check_changed(shared, old, new, capsys)


def test_an_architecture_that_is_not_known_is_not_compiled_for(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("sm90", "gfx942"))
    assert main(["check", str(file)]) == 0
    assert "not compiled: gfx942 is none of" in lines(capsys)


def test_shipped_files_are_right_and_found_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RETGEN_CONFIG_DIR", raising=False)
    assert main(["check", "--no-compile"]) == 0
    out = lines(capsys)
    for path in configuration.packaged_directory().glob("*.yaml"):
        assert f"{path}: " in out


def test_no_file_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configuration, "config_directories", lambda: [tmp_path, tmp_path / "absent"])
    assert main(["check"]) == 0
    assert "no configuration file" in lines(capsys)


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        ({"T": (2049, 4096)}, True),
        ({"T": (2048, 4096)}, False),
        ({"dtype": "float16"}, True),
        ({"K": (17, 32)}, True),
        ({"BH": (1, 32), "V": (1, 9)}, False),
    ],
)
def test_rules_overlap_where_a_shape_is_in_both(change: dict[str, Any], apart: bool) -> None:
    assert coverage.overlap(WHEN, replace(WHEN, **change)) is not apart
    assert coverage.overlap(replace(WHEN, **change), WHEN) is not apart


def test_a_rule_reaches_as_far_as_its_points_and_over_no_gap() -> None:
    assert coverage.beyond(WHEN, [POINT]) is None
    assert coverage.beyond(replace(WHEN, BH=(31, 129), T=(1024, 1024)), [POINT]) == Point("bfloat16", 1, 1, 31, 1024)
    longer = [replace(POINT, T=T) for T in (1024, 4096, 65536)]
    assert coverage.beyond(replace(WHEN, T=(512, 8192)), longer[:2]) is None
    assert coverage.beyond(replace(WHEN, T=(512, 131072)), longer) == Point("bfloat16", 1, 1, 32, 8193)


def test_points_on_a_diagonal_hold_no_corner_beside_it() -> None:
    diagonal = [replace(POINT, BH=BH, T=T) for BH, T in ((2, 65536), (8, 16384), (32, 4096), (128, 1024))]
    hull = replace(WHEN, BH=(1, 256), T=(512, 131072))
    assert coverage.beyond(hull, diagonal) == Point("bfloat16", 1, 1, 1, 512)
    assert [region.points for region in coverage.regions(dict.fromkeys(diagonal, "same"))] == [
        (point,) for point in diagonal
    ]


# compile


ONE = Problem("chunk", "bfloat16", 4, 2048, 16, 128, 128)
ASKS = """
from fakes import Judge, tune
from tuning.compile_pool import CompilePool
from tuning.problems import Problem
from tuning.search import EFFORTS
if __name__ == "__main__":
    pool = CompilePool("sm90", 1)
    problem = Problem("fused_recurrent", "bfloat16", 1, 64, 1, 16, 16)
    tuner = tune(Judge(lambda config: 9.0 - config.BV / 8), problems=[problem], pool=pool, effort=EFFORTS["quick"])
    pool.close()
    print(tuner.funnel.compiled, tuner.funnel.proven)
"""


class Asked(Pool):
    """Says what known landscapes say, and remembers what it was asked for."""

    def __init__(self, known: list[Landscape]) -> None:
        answers = {(one.problem, c.config): c.needs for one in known for c in one.candidates}
        super().__init__(needs=lambda problem, config, variant: answers.get((problem, config), NEEDS))
        self.asked: set[tuple[Problem, Any, str]] = set()

    def submit(self, problem: Problem, config: Any, *, variant: str = PLAIN, extra: Any = None) -> Any:
        self.asked.add((problem, config, variant))
        return super().submit(problem, config, variant=variant)

    @property
    def kernels(self) -> set[tuple[Any, ...]]:
        """What that comes to: one kernel may be asked for under several names."""
        return {(*compile_key(problem, config), variant) for problem, config, variant in self.asked}


def test_the_error_that_is_taken_for_rounding_grows_with_the_sequence() -> None:
    assert proof.error_limit("chunk", "bfloat16", 4096) < 1.01 * proof.ERROR_LIMITS["bfloat16"]
    assert proof.error_limit("chunk", "float32", 1 << 17) > 10 * proof.error_limit("chunk", "float32", 333)
    assert proof.error_limit("fused_recurrent", "float16", 1 << 17) > proof.error_limit("chunk", "float16", 1 << 17)


class Measured(Judge):
    """Knows the times of landscapes."""

    def __init__(self, known: list[Landscape]) -> None:
        super().__init__()
        self.times = {(one.problem, c.config): c.ms for one in known for c in one.candidates}

    def time(self, problem: Problem, config: Any, *given: Any) -> Timing:
        if (ms := self.times.get((problem, config))) is None:
            raise MeasurementError("ArithmeticError: not known")
        return timing(ms)

    def rank(self, problem: Problem, configs: list[Any], extra: dict[str, Any]) -> list[Timing]:
        return [self.time(problem, config) for config in configs]


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_a_run_with_the_gpus_times_asks_for_little_that_was_not_compiled_ahead(effort: str) -> None:
    known = [one for one in landscape.shipped() if replace(one.problem, form=ONE.form) == ONE]
    problems = [one.problem for one in known]
    assert {problem.form for problem in problems} >= {"chunk", "chunk_states", "fused_chunk", GRADIENTS}
    ahead, later = Asked(known), Asked(known)
    precompile.rehearse(ahead, SM90, EFFORTS[effort], problems)  # type: ignore[arg-type]
    tune(Measured(known), problems=problems, pool=later, effort=EFFORTS[effort])
    assert {
        (problem, problem.default(), variant) for problem in problems for variant in problem.variants(problem.default())
    } <= ahead.asked
    before, wanted = ahead.kernels, later.kernels
    assert len(wanted - before) < 0.2 * len(wanted)
    assert len(before) < 2.5 * len(wanted)


def test_what_rules_hold_is_compiled_ahead_with_its_variants() -> None:
    held = replace(ONE.default(), BT=16, num_stages=1)
    entry = Entry(ONE.kernel, rules.point_of(ONE), knob_values(held), "measured", {})
    pool = Asked([])
    precompile.rehearse(pool, SM90, EFFORTS["quick"], [ONE], known=[entry])  # type: ignore[arg-type]
    assert {(ONE, held, variant) for variant in ONE.variants(held)} <= pool.asked


def test_the_files_of_an_architecture_are_known_ahead() -> None:
    assert {entry.proof for entry in precompile.known_entries(SM90)} == {"measured"}
    assert {entry.proof for entry in precompile.known_entries(ARCHS["sm89"])} == {"modelled"}


def test_a_run_and_a_second_call_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    ahead = ["-m", "tuning", "compile", "--workload", "B=1,T=64,H=1,K=16,V=16"]
    ahead += ["--form", "fused_recurrent", "--workers", "1"]
    asks = tmp_path / "asks.py"
    asks.write_text(ASKS)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    cubins = []
    for command in (ahead, [str(asks)], ahead):
        done = subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True, check=True)
        out = " ".join(done.stdout.split())
        if command == ahead:
            assert f"into {tmp_path}" in out
            assert re.search(r"retention_fused_recurrent │ (\d+) │ 0 │ 0 │ 0 │ (\d+) │ \2 │ 0 │ 0 │ 0 │ \d+\.\d", out)
        else:
            assert re.fullmatch(r"[1-9]\d* 1", out)
        cubins.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert cubins[0] == cubins[1] == cubins[2] != {}


def test_what_the_budget_leaves_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compile", "--workload", "retnet_1.3b", "--form", "parallel", "--budget", "0.01", "--workers", "1"]
    assert main(command) in (0, 1)
    assert re.search(r"the budget of 0.01 s is spent: \d+ of \d+ searches did not end", lines(capsys))
