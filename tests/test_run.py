"""What `tuning run` refuses, prints and returns, with a judge that knows every time and no compiler."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from fakes import NEEDS, Judge, Pool, landscape, tune
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console

from generated.configuration_file import parse_file
from tuning import compile_pool, forkserver, rules
from tuning import run as run_module
from tuning.__main__ import main
from tuning.compilation import ARCHS
from tuning.measurement import Gpu

RUN = ["run", "--arch", "sm90", "--workload", "small", "--form", "fused_chunk"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake judge for the model's place, and no compiler."""
    parts = SimpleNamespace(judge=Judge(modelled=True))
    monkeypatch.setattr(run_module, "CompilePool", Pool)
    monkeypatch.setattr(run_module, "ModelJudge", lambda arch: parts.judge)
    return parts


def cells(output: str) -> dict[str, list[str]]:
    """The rows of printed tables, by their first cell; of several with the same the last."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_a_modelled_run_claims_nothing_that_did_not_run(
    parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--out", str(tmp_path / "a.yaml")]) == 0
    output = capsys.readouterr().out
    stages = list(cells(output))
    assert stages[stages.index("stage") :] == ["stage", "enumerated", "compiled", "fit", "estimated", "written"]
    assert cells(output)["written"][0] == "2"
    assert "prov" not in output
    assert re.search(r"\d of 2 keep the default: by a model another must promise 3.3 times its speed", output)


def test_the_last_phase_of_a_modelled_run_is_compiling() -> None:
    said: list[tuple[Any, ...]] = []
    say = run_module._without_proofs(lambda *step: said.append(step))
    say(1, 2, None, "searching", "best")
    say(2, 2, None, "proving", "")
    assert [step[3] for step in said] == ["searching", "compiling"]


@pytest.mark.parametrize("width", [100, 240])
def test_what_a_winner_needs_is_printed_beside_it_or_below(width: int) -> None:
    winners = list(tune(Judge()).winners.values())
    console = Console(width=width, file=io.StringIO())
    with console.capture() as shown:
        console.print(*run_module._tables(winners, ARCHS["sm90"], width))
    output = shown.get()
    assert max(map(len, output.splitlines())) <= width
    assert output.count("kernel") == (2 if width == 100 else 1)
    assert cells(output)["kernel"][-4:] == ["registers", "spills", "shared", "occupancy"]
    # Of 65536 registers 64 * 128 each, so 8 programs of 4 warps of 64 at once.
    assert cells(output)["fused_chunk"][-4:] == ["64", "0", "8 KiB", "50%"]
    assert "…" not in output
    assert NEEDS.blocks_per_sm(ARCHS["sm90"]) == 8


def test_the_gpu_was_busy_once_for_what_is_in_two_phases() -> None:
    judge = Judge()

    def ms(config: Any) -> float:
        judge.busy += 1.0
        return landscape(config)

    judge.ms = ms
    tuner = tune(judge)
    assert sum(tuner.funnel.busy.values()) > judge.busy  # the race lies in the search
    assert run_module._figures(tuner, {}, "H100")["gpu"]["busy_seconds"] == judge.busy


@pytest.mark.parametrize(
    "option", [["--storage", "postgresql://host/database"], ["--storage", "a.journal"], ["--fresh"], ["--devices", "0"]]
)
def test_options_for_measuring_are_refused_where_a_model_would_ignore_them(
    parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert main([*RUN, *option, "--out", str(tmp_path / "a.yaml")]) == 1
    assert f"error: {option[0]} is for measuring, and --arch sm90 models" in capsys.readouterr().err
    assert parts.judge.timed == []


def test_they_are_refused_without_a_gpu_too(
    monkeypatch: pytest.MonkeyPatch, parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "gpu_present", lambda: False)
    assert main(["run", "--workload", "small", "--fresh", "--out", str(tmp_path / "a.yaml")]) == 1
    assert "error: --fresh is for measuring, and there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["precious: 1\n", "- a\n- b\n", "rules: {kernels: no}\n", "\x00\x01"])
def test_a_file_that_was_never_one_of_rules_is_refused_before_tuning(
    parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main([*RUN, "--out", str(path)]) == 1
    assert "is no file of rules: give another file with --out" in capsys.readouterr().err
    assert [one.read_text() for one in tmp_path.iterdir()] == [text]
    assert parts.judge.timed == []


@pytest.mark.parametrize(
    "damage", [lambda text: text[:150], lambda text: text.partition("\n")[2] + "{", lambda text: ""]
)
def test_a_damaged_file_of_rules_is_set_aside(
    parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    path = tmp_path / "a.yaml"
    assert main([*RUN, "--out", str(path)]) == 0
    path.write_text(damaged := damage(path.read_text()))
    assert main([*RUN, "--out", str(path)]) == 0
    assert "could not be read: what it held is now" in capsys.readouterr().out
    (aside,) = tmp_path.glob("a.yaml.broken-*")
    assert aside.read_text() == damaged
    assert parse_file(path).kernels


@pytest.fixture
def measured(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is measured by the judge."""
    parts.judge.modelled = False
    measurer = SimpleNamespace(gpu=Gpu("Pretended", "sm90", 132, 80, "580.1"), close=lambda: None)
    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    monkeypatch.setattr(run_module, "Measurer", lambda: measurer)
    monkeypatch.setattr(run_module, "GpuJudge", lambda measurer: parts.judge)
    monkeypatch.setattr(run_module, "_devices", lambda options: [])


def states_of_runs(path: Path) -> list[TrialState]:
    """How each run that a journal knows of ended."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    names = [name for name in optuna.get_all_study_names(storage) if name.startswith("runs;")]
    return [trial.state for name in names for trial in optuna.load_study(study_name=name, storage=storage).trials]


def test_rules_that_cannot_be_written_cost_neither_the_tables_nor_the_record(
    measured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    path, journal = tmp_path / "a.yaml", tmp_path / "a.journal"
    command = ["run", *RUN[3:], "--out", str(path), "--storage", str(journal)]
    with monkeypatch.context() as patch:
        patch.setattr(rules, "update", full)
        assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.err == f"error: {path}: No space left on device\n"
    assert cells(shown.out)["proven"][0] == "2"
    assert "BT=" in shown.out
    assert "wrote" not in shown.out
    assert states_of_runs(journal) == [TrialState.PRUNED]
    assert main(command) == 0
    assert parse_file(path).kernels
    assert states_of_runs(journal) == [TrialState.PRUNED, TrialState.COMPLETE]


def test_rules_are_written_where_nobody_reads_the_tables(
    measured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    path, journal = tmp_path / "a.yaml", tmp_path / "a.journal"
    monkeypatch.setattr(run_module, "_report", closed)
    assert main(["run", *RUN[3:], "--out", str(path), "--storage", str(journal)]) == 1
    assert parse_file(path).kernels
    assert states_of_runs(journal) == [TrialState.PRUNED]


class Telling(Judge):
    """Sends this process a signal while the second candidate is timed."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(modelled=True)
        self.number = number

    def time(self, *job: Any) -> Any:
        if len(self.timed) == 1:
            os.kill(os.getpid(), self.number)
        return super().time(*job)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def sent(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that nothing ignores, as nohup has one ignored; its handling is as it was afterwards."""
    number: signal.Signals = request.param
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    yield number
    signal.signal(number, before)


def test_a_signal_keeps_what_was_found_and_the_status_names_it(
    parts: SimpleNamespace, tmp_path: Path, sent: signal.Signals
) -> None:
    before, parts.judge = signal.getsignal(sent), Telling(sent)
    assert main([*RUN, "--out", str(tmp_path / "a.yaml")]) == 128 + sent
    assert parse_file(tmp_path / "a.yaml").kernels
    assert signal.getsignal(sent) == before


def test_a_signal_that_is_ignored_stays_ignored(parts: SimpleNamespace, tmp_path: Path, sent: signal.Signals) -> None:
    signal.signal(sent, signal.SIG_IGN)
    parts.judge = Telling(sent)
    assert main([*RUN, "--out", str(tmp_path / "a.yaml")]) == 0
    assert len(parts.judge.timed) == 2
    assert signal.getsignal(sent) == signal.SIG_IGN


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], indirect=True)
def test_a_signal_while_a_process_starts_is_held_also_where_ctrl_c_is_ignored(sent: signal.Signals) -> None:
    before, ended = signal.signal(signal.SIGINT, signal.SIG_IGN), False
    try:
        with run_module._termination_as_interrupt() as told:
            try:
                with forkserver.uninterrupted():
                    os.kill(os.getpid(), sent)
                    started = True
            except KeyboardInterrupt:
                ended = True
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert started
    assert (ended, told) == ((True, [sent]) if sent == signal.SIGTERM else (False, []))


def test_a_cache_that_cannot_be_written_to_ends_a_run_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(compile_pool.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    assert main([*RUN, "--arch", "sm90", "--out", str(tmp_path / "a.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/file/cache: Triton's cache can't be written to: Not a directory; ")
    assert "set TRITON_CACHE_DIR" in said


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="was not written: No space left on device") as caught:
        rules.write_whole(tmp_path / "a.yaml", "text")
    assert caught.value.filename == str(tmp_path / "a.yaml")
    assert list(tmp_path.iterdir()) == []


LOCKING = """
def lock():
    lock_is_held.append(True)
    os.kill(os.getpid(), number)
    lock_is_held.pop()
"""


def test_an_interrupt_leaves_no_future_locked(sent: signal.Signals) -> None:
    lock_is_held: list[bool] = []
    names = {"__name__": "concurrent.futures._base", "os": os, "number": sent, "lock_is_held": lock_is_held}
    exec(LOCKING, names)  # noqa: S102 - code as if of that module

    def work() -> None:
        names["lock"]()  # type: ignore[operator]
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), run_module._termination_as_interrupt():
        work()
    assert lock_is_held == []
