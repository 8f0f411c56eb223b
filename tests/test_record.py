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
from tuning.compilation import ARCHS
from tuning.record import VARIABLE, shapes
from tuning.run import problems_for
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
choose(1, 90, 34, 34, torch.float16, torch.tensor([0, 20, 70, 90]))
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


def test_what_is_not_tuned_is_told_and_how_packed_sequences_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, monkeypatch, sys.executable, "-c", PROGRAM)
    rows = capsys.readouterr().out.splitlines()
    (odd,) = (row for row in rows if " 33 " in row)
    assert "odd K or V in 16 bits: runs the defaults, is not tuned" in odd
    (packed,) = (row for row in rows if " 34 " in row)
    assert "packed: mean T, longest 50" in packed
    assert "# packed: T is the mean length, the longest is 50" in (tmp_path / "seen.yaml").read_text()


ON_THE_CPU = """
import torch
from generated import retention, fused_recurrent_retention as recurrent
q, v = torch.randn(2, 8, 4, 16, requires_grad=True), torch.randn(2, 8, 4, 32)
retention(q, q, v)[0].sum().backward()
recurrent(q[:1], q[:1], v[:1], cu_seqlens=torch.tensor([0, 1, 8]))
retention(q.double(), q.double(), v.double())
"""


def test_shapes_on_the_cpu_are_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, monkeypatch, sys.executable, "-c", ON_THE_CPU) == 0
    found = [(w.B, w.T, w.H, w.K, w.V, w.dtype) for w in read(tmp_path / "seen.yaml")]
    assert found == [(2, 8, 4, 16, 32, "float32"), (2, 4, 4, 16, 32, "float32")]
    assert (
        "not for tuning: workload 'B=2,T=8,H=4,K=16,V=32,dtype=float64': dtype is 'float64'" in capsys.readouterr().out
    )


A_STEP = """
import torch
from generated import retention, retention_step, retention_step_buffered, retention_step_flush
q, k, v = torch.randn(2, 1, 40, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 32)
for dtype in (torch.float32, torch.bfloat16):
    for queries in (q, k):
        retention_step(*(x.repeat(1, 2, 1, 1) for x in (queries, k, v)), torch.zeros(2, 2, 16, 32, dtype=dtype))
retention_step(q, k, v, torch.zeros(2, 2, 16, 32))
retention_step(q[:, :, :4], k, v, torch.zeros(2, 2, 16, 32))
retention_step(v, v, k, torch.zeros(2, 2, 32, 16))
state, buffers = torch.zeros(2, 2, 16, 32), (torch.zeros(2, 32, 2, 16), torch.zeros(2, 32, 2, 32))
counts = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
retention_step_buffered(k, k, v, state, *buffers, *counts)
retention_step_buffered(q, k, v, state, *buffers, *counts)
retention_step_flush(state, *buffers, *counts)
retention(k, k, v)
"""


def test_steps_are_recorded_by_the_heads_of_their_states_and_are_for_the_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What rules are never used for is not: large groups, buffered ones of more outputs, and flushes."""
    assert run(tmp_path, monkeypatch, sys.executable, "-c", A_STEP) == 0
    found = [(w.B, w.T, w.H, w.K, w.V, w.form) for w in read(tmp_path / "seen.yaml")]
    steps = [(2, T, 2, K, V, "step") for T, K, V in ((2, 16, 32), (1, 16, 32), (1, 32, 16))]
    steps.append((2, 1, 2, 16, 32, "step_buffered"))
    assert found == [*steps, (2, 1, 2, 16, 32, "")]
    said = capsys.readouterr().out
    assert "step alone" in said
    assert "step_buffered alone" in said


def test_steps_that_run_the_default_are_told_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """States that are kept after each token are in registers, but rules are made without."""
    program = """
import torch
from generated import retention_step
for T in (1, 5):
    x = torch.ones(64, T, 8, 16)
    retention_step(x, x, x, torch.zeros(64, 8, 16, 16), states_out=torch.zeros(64, T, 8, 16, 16))
"""
    assert run(tmp_path, monkeypatch, sys.executable, "-c", program) == 0
    (written,) = read(tmp_path / "seen.yaml")
    assert (written.B, written.T, written.form) == (64, 1, "step")
    assert "several tokens: runs the default" in " ".join(capsys.readouterr().out.split())
    assert problems_for([written], [], ARCHS["sm90"])


def test_append_adds_what_is_new_and_leaves_the_rest_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "seen.yaml"
    before = "# mine\nrecorded:\n  known: {B: 2, T: 100, H: 4, K: 64, V: 128, dtype: bfloat16}  # attention"
    path.write_text(before)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["record", "--append", "--out", str(path), "--", sys.executable, "-c", PROGRAM]
    for _ in range(2):
        assert main(command) == 7
        assert path.read_text().startswith(before + "\nrecorded2:\n")
        assert [workload.name for workload in read(path)] == ["known", "B3_T30_H4_K34_V34_float16"]


def test_append_to_what_is_no_file_of_workloads_is_refused_before_the_program_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "seen.yaml"
    path.write_text("mine")
    assert main(["record", "--append", "--out", str(path), "--", "touch", str(tmp_path / "ran")]) == 2
    assert "must hold groups" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["seen.yaml"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (["true"], 1, "no shape was seen"),
        (["false"], 1, "no shape was seen"),
        ([sys.executable, "-c", "raise SystemExit(5)"], 5, "no shape was seen"),
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


def test_lines_that_no_tuner_takes_cost_themselves_alone_and_are_named() -> None:
    lines = ["B=1,T=0,H=2,K=8,V=8,dtype=float16,longest=0", "B=1,T=8,H=2,K=8,V=8,dtype=float64,longest=8"]
    lines += ["B=1,T=8,H=2,K=8,V=8,dtype=float16,longest=8", "B=1,T=8,H", "B=1,T=8,H=2,K=4,V=8,dtype=float16"]
    found, refused = shapes(lines)
    assert [workload.T for workload in found] == [8]
    assert [reason.split(": ")[1][:5] for reason in refused] == ["T is ", "dtype"]


def test_of_packed_sequences_the_mean_and_the_longest_are_kept() -> None:
    lines = [f"B=3,T=30,H=2,K=8,V=8,dtype=float16,longest={longest}" for longest in (40, 70, 50)]
    (kept,) = shapes(lines)[0].items()
    assert (kept[0].T, kept[1]) == (30, 70)


def test_nothing_is_recorded_unless_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "shapes"
    monkeypatch.setattr(launch, "_recorded", set())
    q: Any = torch.empty(1, 8, 2, 16)
    for wanted, lines in (
        (None, []),
        (str(file), ["B=1,T=8,H=2,K=16,V=16,dtype=float32,longest=8"]),
        ("/no/such/folder/x", None),
    ):
        monkeypatch.setattr(launch, "RECORD", wanted)
        launch.choose_config(fused_chunk.KERNEL, fused_chunk.FusedChunkConfig, fused_chunk.default_config, q, q, None)
        if lines is not None:
            assert (file.read_text().splitlines() if file.exists() else []) == lines
    assert VARIABLE == "RETGEN_RECORD"


def test_a_shape_and_its_gradients_are_one_workload() -> None:
    lines = [f"B=1,T=8,H=2,K={K},V={V},dtype=float16,longest=8" for K, V in ((8, 4), (4, 8), (8, 8), (4, 4), (8, 4))]
    assert [(w.K, w.V) for w in shapes(lines)[0]] == [(8, 4), (8, 8), (4, 4)]


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
