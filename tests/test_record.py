"""`tuning record` writes down what a program launches, and `--workload FILE` reads it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from generated import launch
from generated.retention import fused_chunk
from tuning.__main__ import main
from tuning.record import VARIABLE, workloads
from tuning.workloads import Workload, WorkloadError, parse, read

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from generated import launch
from generated.retention import fused_chunk as f

def choose(B, T, K, V, dtype, offsets=None):
    q, v = (torch.empty(B, T, 4, D, dtype=dtype, device="meta") for D in (K, V))
    launch.choose_config(f.KERNEL, f.FusedChunkConfig, f.default_config, q, v, offsets)

for _ in range(3):
    choose(2, 100, 64, 128, torch.bfloat16)
    choose(2, 100, 128, 64, torch.bfloat16)
choose(1, 90, 33, 33, torch.float16, None)
choose(1, 90, 34, 34, torch.float16, torch.empty(4, device="meta"))
raise SystemExit(7)
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *program: str) -> int:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return main(["record", "--out", str(tmp_path / "seen.yaml"), "--", *program])


def test_shapes_of_a_program_are_written_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, sys.executable, "-c", PROGRAM) == 7
    assert parse([str(tmp_path / "seen.yaml")]) == [
        Workload("B2_T100_H4_K64_V128_bfloat16", 2, 100, 4, 64, 128, "bfloat16"),
        Workload("B3_T30_H4_K34_V34_float16", 3, 30, 4, 34, 34, "float16"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["seen.yaml"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (["true"], 1, "no kernel was launched"),
        (["false"], 1, "no kernel was launched"),
        ([sys.executable, "-c", "raise SystemExit(5)"], 5, "no kernel was launched"),
    ],
)
def test_a_program_that_launches_nothing_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: list[str],
    status: int,
    said: str,
) -> None:
    assert run(tmp_path, monkeypatch, *program) == status
    assert said in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_or_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, monkeypatch, "no-such-program") == 1
    assert "no-such-program cannot be run" in capsys.readouterr().err
    assert run(tmp_path, monkeypatch) == 1
    assert "nothing to run" in capsys.readouterr().err
    assert main(["record", "--out", str(tmp_path / "a.txt"), "--", "true"]) == 1
    assert "must end in .yaml" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seen.yaml").write_text("mine")
    assert run(tmp_path, monkeypatch, "true") == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "seen.yaml").read_text() == "mine"


def test_ctrl_c_is_the_programs_own_and_what_it_used_is_kept(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        "raise SystemExit(7)",
        """
import pathlib, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1.5)
    pathlib.Path("checkpoint").touch()
    raise SystemExit(9)
""",
    )
    command = [sys.executable, "-m", "tuning", "record", "--out", "seen.yaml", "--", sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 9
    assert (tmp_path / "checkpoint").exists()
    assert len(read(tmp_path / "seen.yaml")) == 2


def test_a_signal_that_ends_the_program_is_told_as_a_shell_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, "sh", "-c", "kill -TERM $$") == 128 + signal.SIGTERM


def test_lines_that_no_tuner_takes_cost_themselves_alone() -> None:
    lines = ["B=1,T=0,H=2,K=8,V=8,dtype=float16", "B=1,T=8,H=2,K=8,V=8,dtype=float16", "B=1,T=8,H"]
    assert [workload.T for workload in workloads(lines)] == [8]


def test_nothing_is_recorded_unless_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "shapes"
    monkeypatch.setattr(launch, "_recorded", set())
    q: Any = torch.empty(1, 8, 2, 16)
    for wanted, lines in (
        (None, []),
        (str(file), ["B=1,T=8,H=2,K=16,V=16,dtype=float32"]),
        ("/no/such/folder/x", None),
    ):
        monkeypatch.setattr(launch, "RECORD", wanted)
        launch.choose_config(fused_chunk.KERNEL, fused_chunk.FusedChunkConfig, fused_chunk.default_config, q, q, None)
        if lines is not None:
            assert (file.read_text().splitlines() if file.exists() else []) == lines
    assert VARIABLE == "RETGEN_RECORD"


def test_a_shape_and_its_gradients_are_one_workload() -> None:
    lines = [f"B=1,T=8,H=2,K={K},V={V},dtype=float16" for K, V in ((8, 4), (4, 8), (8, 8), (4, 4), (8, 4))]
    assert [(w.K, w.V) for w in workloads(lines)] == [(8, 4), (8, 8), (4, 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "while parsing"),
        ("- B: 1", "must hold groups"),
        ("a: 1", "must hold groups"),
        ("{}", "holds none"),
        ("a: {}", "holds none"),
        ("a: {b: 1}", "b is 1; it must be a mapping"),
        ("a: {b: {}}", "must give each of B, T, H, K and V once"),
        ("a: {b: {B: 1, T: 2, H: 1, K: 8}}", "must give each of B, T, H, K and V once"),
        ("a: {b: {B: 1, T: 2, H: 1, K: 8, V: 0}}", "V is '0'; it must be a whole number"),
        ("a: {b: {B: 1, T: 2, H: 1, K: 8, V: 8, dtype: int8}}", "dtype is 'int8'"),
        ("a: {b: {B: 1, T: 2, H: 1, K: 8, V: 8, W: 9}}", "nothing else but dtype"),
    ],
)
def test_a_malformed_file_of_workloads_is_named_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError) as caught:
        read(path)
    assert str(caught.value).startswith(f"workloads {path}: ")
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--workload", "absent.yaml"]) == 2
    assert "workloads absent.yaml: No such file" in capsys.readouterr().err


def test_the_builtin_workloads_are_such_a_file() -> None:
    assert read(ROOT / "tuning" / "workloads.yaml") == parse([])
