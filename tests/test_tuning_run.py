"""`python -m tuning run` as users run it: in a process of its own, with real compilers and no GPU used."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from generated import configuration
from generated.configuration_file import File, Rule, parse_file
from generated.retention import fused_chunk
from generated.tiles import PRODUCTS
from tuning.__main__ import main
from tuning.compilation import ARCHS, Resources
from tuning.compile_pool import CompilePool
from tuning.problems import FORMS, GRADIENTS, PLAIN, STEP_FORMS, Problem

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = "B=2,T=128,H=2,K=16,V=16"
PROBLEM = Problem("fused_chunk", "bfloat16", 2, 128, 2, 16, 16)
# What `--form fused_chunk` tunes, and the kernels: K is V.
KERNELS = {
    PROBLEM: (fused_chunk.chunk_scores_kernel, fused_chunk.fused_chunk_kernel),
    replace(PROBLEM, form=GRADIENTS): (fused_chunk.fused_chunk_gradients_kernel,),
}

every_problem = pytest.mark.parametrize("problem", KERNELS, ids=lambda problem: problem.form)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's processes have their files, Triton's cache among them: what is compiled is compiled once."""
    return tmp_path_factory.mktemp("tuning")


def environment(directory: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(directory / "cache")}
    own |= {"XDG_CONFIG_HOME": str(directory / "none")}
    return {name: value for name, value in os.environ.items() if name != "RETGEN_CONFIG_DIR"} | own


def tune(directory: Path, name: str, *arguments: str) -> tuple[File, str]:
    """Run with a file to write; the file and what was printed."""
    path = directory / name
    command = [sys.executable, "-m", "tuning", "run", "--workload", WORKLOAD, "--out", str(path), *arguments]
    done = subprocess.run(
        command, env=environment(directory), cwd=directory, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return parse_file(path), done.stdout


@pytest.fixture(scope="module")
def modelled(directory: Path) -> tuple[File, str]:
    return tune(directory, "first/a.yaml", "--form", "fused_chunk", "--arch", "sm90", "--budget", "60")


def only_rule(file: File, problem: Problem) -> Rule:
    """The problem's rule in a file that holds one rule for each of them, and nothing else."""
    assert list(file.kernels) == [one.kernel for one in KERNELS]
    (rule,) = file.kernels[problem.kernel].rules
    return rule


def check_resources(problem: Problem, config: Any, arch: str) -> None:
    pool = CompilePool(arch, 1)
    try:
        for variant in problem.variants(config):
            needs = pool.result(problem, config, variant=variant)
            assert isinstance(needs, Resources), needs
            assert needs.shared <= ARCHS[arch].shared
            assert variant != PLAIN or needs.spills == 0
    finally:
        pool.close()


@every_problem
def test_rule_is_modelled_and_its_kernel_fits_and_does_not_spill(modelled: tuple[File, str], problem: Problem) -> None:
    file, output = modelled
    rule = only_rule(file, problem)
    assert (file.device.arch, file.device.name, rule.proof) == ("sm90", None, "modelled")
    assert rule.figures["spills"] == 0
    assert 0 < rule.figures["ms"] <= rule.figures["default_ms"]
    assert file.kernels[problem.kernel].source == configuration.source_hash(*KERNELS[problem], *PRODUCTS)
    assert rule.when.matches("bfloat16", K=16, V=16, BH=4, T=128)
    assert not rule.when.matches("float16", K=16, V=16, BH=4, T=128)
    assert not rule.when.matches("bfloat16", K=17, V=16, BH=4, T=128)
    check_resources(problem, FORMS[problem.form].config_type(**rule.use), "sm90")
    assert "modelling sm90" in output
    assert "2 searches for 1 workload" in output
    assert "wrote 2 rules to" in output
    assert re.search(r"^took \d+ s$", output, re.MULTILINE)
    assert f"set RETGEN_CONFIG_DIR={file.path.resolve().parent}" in output
    assert max(map(len, output.splitlines())) > 80  # a table that no terminal bounds is not broken


def test_second_run_finds_the_same(modelled: tuple[File, str], directory: Path) -> None:
    again, _ = tune(directory, "second.yaml", "--form", "fused_chunk", "--arch", "sm90")
    assert again.kernels == modelled[0].kernels


def test_run_over_its_own_file_is_no_worse(modelled: tuple[File, str], directory: Path) -> None:
    path = directory / "copy.yaml"
    path.write_bytes(modelled[0].path.read_bytes())
    again, _ = tune(directory, "copy.yaml", "--form", "fused_chunk", "--arch", "sm90")
    for problem in KERNELS:
        assert only_rule(again, problem).figures["ms"] <= only_rule(modelled[0], problem).figures["ms"]


def test_every_form_is_tuned_for_another_architecture(directory: Path) -> None:
    file, _ = tune(directory, "sm80.yaml", "--arch", "sm80", "--budget", "25")
    assert file.device.arch == "sm80"
    assert set(file.kernels) <= {f"retention_{form}" for form in [*FORMS, "form", "form_gradients"]}
    assert PROBLEM.kernel in file.kernels
    assert all(rule.proof == "modelled" for kernel in file.kernels.values() for rule in kernel.rules)
    for form in FORMS.keys() & {name.removeprefix("retention_") for name in file.kernels}:
        problem = Problem(form, "bfloat16", 2, 128, 2, 16, 16)
        (rule,) = file.kernels[problem.kernel].rules
        check_resources(problem, FORMS[form].config_type(**rule.use), "sm80")


@pytest.mark.parametrize("of", STEP_FORMS)
def test_a_step_is_modelled_with_each_kind_of_states_and_holds(directory: Path, of: str) -> None:
    selected = ("--workload", "B=2,T=1,H=2,K=16,V=24", "--form", of)
    file, _ = tune(directory, f"{of}.yaml", *selected, "--arch", "sm89")
    assert file.kernels.keys() == {f"retention_{form}" for form in STEP_FORMS[of]}
    for form in STEP_FORMS[of]:
        problem = Problem(form, "bfloat16", 2, 1, 2, 16, 24)
        (rule,) = file.kernels[problem.kernel].rules
        assert rule.proof == "modelled"
        check_resources(problem, FORMS[form].config_type(**rule.use), "sm89")
    assert main(["check", str(file.path)]) == 0


@pytest.fixture
def pretended_gpu(modelled: tuple[File, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of architecture sm90 whose rules are the tuner's file."""
    with monkeypatch.context() as patch:
        patch.setenv("RETGEN_CONFIG_DIR", str(modelled[0].path.parent))
        patch.setattr(configuration, "identify", lambda device: configuration.Gpu("Pretended", "sm90"))
        configuration.reload()
        yield
    configuration.reload()


@every_problem
@pytest.mark.filterwarnings("ignore::generated.configuration.ConfigurationWarning")
@pytest.mark.usefixtures("pretended_gpu")
def test_written_rule_is_what_the_launcher_asks_for(modelled: tuple[File, str], problem: Problem) -> None:
    config_type = FORMS[problem.form].config_type

    def chosen(T: int) -> Any:
        shape = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "K": 16, "V": 16, "BH": 4, "T": T}
        return configuration.select_config(problem.kernel, config_type, None, **shape)

    assert chosen(128) == config_type(**only_rule(modelled[0], problem).use)
    assert chosen(128 * 100) is None


SAYS_WHAT_IT_TIMES = """
import sys
from tuning import judges, tuner
from tuning.__main__ import main
tuner.promising = lambda problem, candidates, *asked: candidates
real = judges.ModelJudge.begin
def begin(judge, problem, config, *arguments):
    print("default" if problem.form == "fused_chunk" and config == problem.default() else "timed", flush=True)
    return real(judge, problem, config, *arguments)
judges.ModelJudge.begin = begin
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signal_keeps_what_was_found_and_leaves_no_process(directory: Path, sent: signal.Signals) -> None:
    path = directory / f"{sent.name}.yaml"
    command = [sys.executable, "-c", SAYS_WHAT_IT_TIMES, "run", "--workload", WORKLOAD, "--effort", "full"]
    command += ["--form", "fused_chunk", "--form", "parallel", "--arch", "sm90", "--workers", "2", "--out", str(path)]
    with subprocess.Popen(
        command, env=environment(directory), cwd=directory, text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for awaited in ("default", "timed", "timed"):  # a search in which the default was not tried has no result
            while process.stdout.readline() != f"{awaited}\n":
                assert process.poll() is None
        process.send_signal(sent)
        output = process.stdout.read()  # ends when the last process that could write has ended
        assert process.wait(60) == 128 + sent
    assert "stopped: " in output
    rule = parse_file(path).kernels[PROBLEM.kernel].rules[0]
    assert rule.proof == "modelled"
    assert 1 <= rule.figures["trials"] < 200  # the others may be of another search


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
def test_ctrl_c_while_the_workers_start_says_no_more_than_that(directory: Path, seconds: float) -> None:
    """A terminal sends it to all processes at once."""
    command = [
        sys.executable,
        "-m",
        "tuning",
        "run",
        "--workload",
        WORKLOAD,
        "--effort",
        "full",
        "--form",
        "fused_chunk",
    ]
    command += ["--arch", "sm90", "--workers", "2", "--out", str(directory / f"early{seconds}.yaml")]
    with subprocess.Popen(
        command,
        env=environment(directory) | {"PYTHONUNBUFFERED": "1"},
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while "rules go to" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        output = process.stdout.read()
        assert process.wait(60) == 130
    assert "Traceback" not in output
    assert "stopped" in output
