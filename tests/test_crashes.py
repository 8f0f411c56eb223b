"""Whatever happens to a tuner, at most the point that it was measuring is lost: each way to break is tried for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_device
import pytest
from fakes import PROBLEM, Judge, candidates, landscape, tune
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from generated.configuration_file import parse_file
from tuning import forkserver, rules, storage
from tuning.journal import PROVE, SUSPECT, Journal, Outcome
from tuning.rules import Entry, Point
from tuning.search import Effort
from tuning.space import knob_values
from tuning.tuner import AHEAD

TESTS = Path(__file__).resolve().parent
READ_ONLY = Path("/sys")  # also to root
KERNEL = "retention_fused_chunk"
SHAPE = "B=8,T=1024,H=8,K=64,V=64"
BEST = min(candidates(), key=landscape)


class Machine:
    """A directory with a fake GPU beside it: runs tuners there, and knows what was launched."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.log = directory, directory / "launches"
        self.rules = directory / "rules.yaml"

    def command(self, *arguments: str) -> list[str]:
        """The tuner's, for one form unless others are given."""
        return ["run", "--workload", SHAPE, "--out", str(self.rules), *(arguments or ("--form", "fused_chunk"))]

    def environment(self, faults: dict[str, str], variables: dict[str, str]) -> dict[str, str]:
        """What the fake GPU is to do, and homes of its own."""
        given = {"FAKE_LOG": str(self.log), "FAKE_FAULTS": json.dumps(faults), **variables}
        return given | {"HOME": str(self.directory), "XDG_CACHE_HOME": str(self.directory / "cache")}

    def start(self, *arguments: str, faults: dict[str, str] | None = None, **variables: str) -> tuple[Any, Path]:
        """Start a tuner; `faults`: what part of a launch's line makes what happen. The process, and its output."""
        return self.start_command(self.command(*arguments), faults=faults, **variables)

    def start_command(
        self, command: list[str], *, faults: dict[str, str] | None = None, **variables: str
    ) -> tuple[Any, Path]:
        """The same by the whole command."""
        output = self.directory / f"output{len(list(self.directory.glob('output*')))}"
        output.touch()
        given = (self.environment(faults or {}, variables), command, str(output))
        process = forkserver.context().Process(target=fake_device.run, args=given)
        process.start()
        return process, output

    def tune(self, *arguments: str, faults: dict[str, str] | None = None, **variables: str) -> tuple[int, str]:
        """Run one to its end: exit status and output."""
        return ended(*self.start(*arguments, faults=faults, **variables))

    def launches(self, job: str = "measure") -> Counter[str]:
        """How often each candidate was launched."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return Counter(line for line in lines if line.startswith(f"{job} fused_chunk "))

    def used(self) -> dict[str, Any]:
        """The configuration in the only rule for the kernel."""
        (rule,) = parse_file(self.rules).kernels[KERNEL].rules
        return dict(rule.use)


def ended(process: Any, output: Path) -> tuple[int, str]:
    """The exit status of a process that was started, and its output."""
    process.join(timeout=120)
    return process.exitcode, output.read_text(encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def line(job: str, config: Any) -> str:
    """What the fake device writes down of a launch."""
    return " ".join([job, "fused_chunk", *(f"{name}={value}" for name, value in knob_values(config).items())])


# Processes that are killed


def test_killed_tuner_loses_the_point_it_measured_and_launches_it_never_again(machine: Machine) -> None:
    fatal = line("measure", BEST)
    code, _ = machine.tune(faults={fatal: "kill tuner"})
    assert code == -signal.SIGKILL
    assert not machine.rules.exists()
    before = machine.launches()
    assert before[fatal] == 1
    code, output = machine.tune()
    assert code == 0, output
    after = machine.launches()
    assert all(after[launch] == 1 for launch in before)  # neither what was known nor what killed it
    assert len(after) > len(before)
    assert machine.used() != knob_values(BEST)
    assert "killed: the tuner died while this was measured" in output


def test_of_what_was_handed_over_to_the_gpu_only_what_killed_the_tuner_is_lost(machine: Machine) -> None:
    shapes = [SHAPE.replace("=64", f"={width}") for width in (64, 128, 256)]  # no two of which have a kernel in common
    workloads = [argument for shape in shapes for argument in ("--workload", shape)]
    journal = machine.directory / "a.journal"
    command = ["run", *workloads, "--out", str(machine.rules), "--form", "fused_chunk", "--storage", str(journal)]
    code, _ = ended(*machine.start_command(command, faults={line("measure", BEST): "kill tuner"}))
    assert code == -signal.SIGKILL
    assert 2 <= len(of_candidates(journal, TrialState.RUNNING)) <= 2 + AHEAD  # one may have been written down alone
    code, output = ended(*machine.start_command(command))
    assert code == 0, output
    (suspect,) = [trial for trial in of_candidates(journal, TrialState.FAIL) if trial.user_attrs["reason"] == SUSPECT]
    assert suspect.params == knob_values(BEST)
    assert of_candidates(journal, TrialState.RUNNING) == []


def of_candidates(journal: Path, state: TrialState) -> list[FrozenTrial]:
    """The trials in a state that are of candidates."""
    read = JournalStorage(JournalFileBackend(str(journal)))
    trials = [trial for study in read.get_all_studies() for trial in read.get_all_trials(study._study_id)]
    return [trial for trial in trials if trial.params and trial.state == state]


def test_what_killed_the_tuner_is_not_launched_by_runs_that_measure_anew_either(machine: Machine) -> None:
    fatal = line("measure", BEST)
    assert machine.tune(faults={fatal: "kill tuner"})[0] == -signal.SIGKILL
    for _ in range(2):
        code, output = machine.tune("--form", "fused_chunk", "--fresh")
        assert code == 0, output
    assert machine.launches()[fatal] == 1
    assert max(machine.launches().values()) > 1


@pytest.mark.parametrize("job", ["compare", "prove"])
def test_tuner_killed_in_its_last_steps_measures_nothing_again(machine: Machine, job: str) -> None:
    assert machine.tune(faults={job: "kill tuner"})[0] == -signal.SIGKILL
    before = machine.launches()
    code, output = machine.tune()
    assert code == 0, output
    assert machine.launches() == before
    assert machine.used() == knob_values(BEST)


@pytest.mark.parametrize(("job", "kills"), [("compare", 1), ("compare", 2), ("prove", 1)])
def test_a_rule_in_use_stays_whatever_kills_the_tuners_after_it(machine: Machine, job: str, kills: int) -> None:
    assert machine.tune()[0] == 0
    assert machine.used() == knob_values(BEST)
    for _ in range(kills):
        assert machine.tune("--form", "fused_chunk", "--fresh", faults={job: "kill tuner"})[0] == -signal.SIGKILL
    code, output = machine.tune("--form", "fused_chunk", "--effort", "full")
    assert code == 0, output
    assert machine.used() == knob_values(BEST)


@pytest.mark.parametrize("kills", [1, 2])
def test_what_a_tuner_was_killed_at_while_it_was_proven_is_proven_once_more(machine: Machine, kills: int) -> None:
    fatal = line("prove", BEST)
    for _ in range(kills):
        assert machine.tune(faults={fatal: "kill tuner"})[0] == -signal.SIGKILL
    assert machine.tune()[0] == 0
    assert machine.launches("prove")[fatal] == 2
    assert (machine.used() == knob_values(BEST)) == (kills == 1)


def test_measuring_process_that_crashes_costs_its_candidate_alone(machine: Machine) -> None:
    code, output = machine.tune(faults={line("measure", BEST): "abort"})
    assert code == 0, output
    assert "the measuring process died: the kernel crashed" in output
    assert machine.used() != knob_values(BEST)


def test_killed_fork_server_ends_no_run_and_loses_at_most_the_point_that_was_measured(machine: Machine) -> None:
    # As users start it: the others here are forked from one server.
    fatal = line("measure", BEST)
    variables = machine.environment({fatal: "kill server"}, {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"})
    command = [sys.executable, "-c", "import fake_device, sys; sys.exit(fake_device.main())", *machine.command()]
    done = subprocess.run(
        command, env=os.environ | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    before = machine.launches()
    assert set(before.values()) == {1}
    code, output = machine.tune()
    assert code == 0, output
    again = machine.launches() - before
    assert again.total() == again[fatal] <= 1


# Kernels that break


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hang", "the kernel hangs"),
        ("illegal access", "an illegal memory access was encountered"),
        ("out of memory", "CUDA out of memory"),
    ],
)
def test_broken_candidate_is_named_and_the_next_best_wins(machine: Machine, fault: str, said: str) -> None:
    code, output = machine.tune(faults={line("measure", BEST): fault})
    assert code == 0, output
    assert said in output
    sound = [config for config in candidates() if config != BEST and line("measure", config) in machine.launches()]
    assert landscape(type(BEST)(**machine.used())) == min(map(landscape, sound))


@pytest.mark.parametrize("fault", ["hang", "illegal access", "abort"])
def test_what_ended_a_measuring_process_is_never_launched_again_at_any_shape(machine: Machine, fault: str) -> None:
    fatal = line("measure", BEST)
    assert machine.tune(faults={fatal: fault})[0] == 0
    assert machine.tune("--form", "fused_chunk", "--fresh")[0] == 0
    code, output = machine.tune("--form", "fused_chunk", "--workload", SHAPE.replace("T=1024", "T=4096"))
    assert code == 0, output
    assert machine.launches()[fatal] == 1
    assert len(machine.launches()) > 20
    assert all(line("", BEST) not in launch for launch in (*machine.launches("compare"), *machine.launches("prove")))


@pytest.mark.parametrize("job", ["measure", "compare", "prove"])
def test_a_measuring_process_that_somebody_kills_costs_nothing(machine: Machine, job: str) -> None:
    code, output = machine.tune(faults={line(job, BEST): "kill device once"})
    assert code == 0, output
    assert machine.used() == knob_values(BEST)
    assert "crashed" not in output


def test_what_is_killed_from_outside_each_time_is_given_up_in_this_run_alone(machine: Machine) -> None:
    fatal = line("measure", BEST)
    code, output = machine.tune(faults={fatal: "kill device"})
    assert code == 0, output
    assert machine.launches()[fatal] == 2
    assert "ended from outside, by SIGKILL" in output
    assert machine.tune()[0] == 0
    assert machine.used() == knob_values(BEST)


def test_what_ended_a_measuring_process_is_not_launched_by_the_runs_other_searches_either(machine: Machine) -> None:
    fatal, shapes = line("measure", BEST), [SHAPE.replace("T=1024", f"T={T}") for T in (1024, 2048, 4096)]
    workloads = [argument for shape in shapes for argument in ("--workload", shape)]
    command = ["run", *workloads, "--out", str(machine.rules), "--form", "fused_chunk"]
    code, output = ended(*machine.start_command(command, faults={fatal: "illegal access"}))
    assert code == 0, output
    assert machine.launches()[fatal] == 1


def test_no_memory_for_anything_writes_nothing_and_says_why(machine: Machine) -> None:
    code, output = machine.tune(faults={"measure": "out of memory"})
    assert code == 1
    assert "OutOfMemoryError" in output
    assert "wrote nothing" in output
    assert not machine.rules.exists()
    assert machine.tune()[0] == 0  # it is not held against the candidates
    assert machine.used() == knob_values(BEST)


# Disks


@pytest.mark.parametrize("size", ["30000", "60000"])
def test_what_was_open_when_the_record_was_lost_is_not_taken_for_fatal(machine: Machine, size: str) -> None:
    shapes = [SHAPE.replace("=64", f"={width}") for width in (64, 128, 256)]
    workloads = [argument for shape in shapes for argument in ("--workload", shape)]
    journal = machine.directory / "a.journal"
    command = ["run", *workloads, "--out", str(machine.rules), "--form", "fused_chunk", "--storage", str(journal)]
    ended(*machine.start_command(command, FAKE_DISK=size))
    assert of_candidates(journal, TrialState.RUNNING)
    code, output = ended(*machine.start_command(command))
    assert code == 0, output
    assert "killed" not in output
    assert not [trial for trial in of_candidates(journal, TrialState.FAIL) if trial.user_attrs["reason"] == SUSPECT]


def test_disk_that_fills_up_is_said_once_and_the_old_rules_stay(machine: Machine) -> None:
    assert machine.tune()[0] == 0
    old = machine.rules.read_bytes()
    code, output = machine.tune("--form", "fused_recurrent", "--storage", str(machine.directory / "x"), FAKE_DISK="900")
    assert code == 1
    assert output.count("is not remembered") == 1
    assert re.search(r"proven +│ 1 ", output)  # the tables are there
    assert re.search(r"error: .*(File too large|rules\.yaml)", output)
    assert "Traceback" not in output
    assert machine.rules.read_bytes() == old
    assert [path.name for path in machine.directory.glob(".*.tmp")] == []


def test_rules_that_find_no_place_are_said_to_before_anything_is_launched(machine: Machine) -> None:
    code, output = machine.tune("--form", "fused_chunk", "--out", str(READ_ONLY / "rules.yaml"))
    assert code == 1
    assert re.search(rf"error: .*{READ_ONLY}", output)
    assert "Traceback" not in output
    assert not machine.log.exists()


@pytest.mark.parametrize("place", ["a directory", "a read-only directory", "below a file", "a full disk"])
def test_where_nothing_can_be_kept_the_run_says_so_once_and_does_its_work(machine: Machine, place: str) -> None:
    (machine.directory / "file").touch()
    places = {
        "a directory": ".",
        "a read-only directory": READ_ONLY / "x",
        "below a file": "file/x",
        "a full disk": "x",
    }
    where = places[place]
    full = {"FAKE_DISK": "300"} if place == "a full disk" else {}
    code, output = machine.tune("--form", "fused_chunk", "--storage", str(machine.directory / where), **full)
    assert output.count("is not remembered") == 1, output
    assert "Traceback" not in output
    assert sum(machine.launches().values()) > 10
    assert code == 1 if full else machine.used() == knob_values(BEST)  # the rules find no room either


def test_two_tuners_at_once_write_one_file_with_the_rules_of_both(machine: Machine) -> None:
    forms = ("fused_chunk", "fused_recurrent", "parallel")
    running = [machine.start("--form", form, FAKE_UUID=form) for form in forms]
    results = [ended(*one) for one in running]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert {f"retention_{form}" for form in forms} <= set(parse_file(machine.rules).kernels)


def test_what_won_with_an_earlier_kernel_is_no_rule_any_more_and_tried_first(machine: Machine) -> None:
    assert machine.tune()[0] == 0
    machine.rules.write_text(machine.rules.read_text().replace("source: ", "source: 0"))
    assert rules.existing_entries(machine.rules) == []
    machine.log.unlink()
    code, output = machine.tune("--form", "fused_chunk", "--fresh")
    assert code == 0, output
    assert line("measure", BEST) in list(machine.launches())[:3]
    assert machine.used() == knob_values(BEST)


class PowerLossError(BaseException):
    """The machine is gone: nothing after this happens."""


def until_power_fails(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], int]:
    """Let so many writes to the disk happen, and end there; what comes back tells how many happened."""
    happened = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal happened
            if happened == count:
                raise PowerLossError
            happened += 1
            return call(*arguments, **options)

        return instead

    for owner, name in (
        (os, "fsync"),
        (os, "fdopen"),
        (os, "open"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "chmod"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return lambda: happened


def entry(ms: float) -> Entry:
    """A rule whose figures tell which of two it is."""
    figures = {"ms": ms, "default_ms": 9.0, "error": 0.001, "spills": 0, "trials": 9, "point": "K=64 V=64 BH=64 T=1024"}
    return Entry(KERNEL, Point("bfloat16", 64, 64, 64, 1024), knob_values(BEST), "measured", figures)


def times(path: Path) -> list[float]:
    """The milliseconds in a file of rules, which must be whole."""
    return [rule.figures["ms"] for rule in parse_file(path).kernels[KERNEL].rules]


def test_power_that_fails_while_a_damaged_journal_is_cut_off_leaves_what_it_held(tmp_path: Path) -> None:
    with (journal := tmp_path / "a.journal").open("wb") as file:
        file.write(
            data := b"".join(
                b'{"op_code":0,"worker_id":"w","study_name":"%d","directions":[1]}\n' % i for i in range(3)
            )
        )
    damaged = data + b"[]\n" + data
    for moment in every_moment():
        journal.write_bytes(damaged)
        with pytest.MonkeyPatch.context() as patch:
            until_power_fails(patch, moment)
            try:
                storage._cut(journal)
            except PowerLossError:
                assert journal.read_bytes() == damaged or any(
                    aside.read_bytes() == damaged for aside in tmp_path.glob("*.broken-*")
                )
            else:
                break
    assert moment > 2
    assert journal.read_bytes() == data


def test_power_that_fails_after_a_run_makes_no_suspect_of_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not synced is gone, and a file without its folder's entry too."""
    path, left, safe, sync = tmp_path / "new" / "a.journal", tmp_path / "left.journal", {}, os.fsync

    def synced(handle: int) -> None:
        sync(handle)
        state = os.fstat(handle)
        safe[state.st_ino] = state.st_size

    def say(message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(os, "fsync", synced)
    journal = Journal(path, {"gpu": "H100"}, say)
    record = journal.run()
    (winner,) = tune(Judge(), effort=Effort(10, 2, 5, 3), journal=journal).winners.values()
    assert path.parent.stat().st_ino in safe
    outcomes = journal.outcomes(PROBLEM, {})
    left.write_bytes(path.read_bytes()[: safe[path.stat().st_ino]])
    again = Journal(left, {"gpu": "H100"}, say)
    assert again.outcomes(PROBLEM, {}) == outcomes
    assert again.remembered(PROBLEM, winner.config, {}, step=PROVE) == Outcome(winner.error)
    record.add(note="the last")
    journal.close()
    assert safe[path.stat().st_ino] == path.stat().st_size


def every_moment() -> Iterator[int]:
    """From the first write on."""
    yield from range(40)


def test_power_that_fails_between_any_two_writes_leaves_the_old_rules_or_the_new(tmp_path: Path) -> None:
    path, device = tmp_path / "rules.yaml", {"name": "Fake GPU", "arch": "sm90", "sms": 132, "memory_gb": 80}
    rules.update(path, [entry(1.0)], device, "580.1")
    found = set()
    for moment in every_moment():
        with pytest.MonkeyPatch.context() as patch:
            until_power_fails(patch, moment)
            try:
                rules.update(path, [entry(2.0)], device, "580.1")
            except PowerLossError:
                found.add(tuple(times(path)))
            else:
                break
    else:
        pytest.fail("the update never came to its end")
    assert moment > 5
    assert times(path) == [2.0]
    assert found == {(1.0,), (2.0,)}
