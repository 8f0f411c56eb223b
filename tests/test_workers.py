"""Any number of workers tune as one: no point is measured twice, and one file comes out, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import NEEDS, PROBLEM, Judge, candidates, landscape, timing, tune

from generated.configuration_file import parse_file
from tuning import forkserver, rules, storage
from tuning import journal as journals
from tuning import run as run_module
from tuning import workers as workers_module
from tuning.__main__ import main
from tuning.compilation import ARCHS
from tuning.history import open_storage, read
from tuning.journal import PROVE, RACE, SUSPECT, Journal, Outcome, RaceClaim
from tuning.run import RunError
from tuning.search import Effort, constraints
from tuning.storage import StorageError, masked, named
from tuning.workers import GpuBusyError, gpu_alone, without

TESTS = Path(__file__).resolve().parent
CONTEXT = {"gpu": "H100"}
FIRST, SECOND, THIRD = candidates()[:3]
PROBLEMS = [replace(PROBLEM, T=T) for T in (512, 4096)]
SMALL = Effort(first=4, rounds=1, per_round=2, finalists=2)
PASSWORD = "s3cr/et%w"  # noqa: S105


class Server:
    """A PostgreSQL of the tests' own, with a user whose password no message may hold; it ends with this process."""

    def __init__(self, folder: Path, initdb: Path) -> None:
        self.folder, self._program, self._process = folder, initdb.with_name("postgres"), None
        self._user = ["--reuid=nobody", "--clear-groups"] if os.getuid() == 0 else []
        folder.mkdir()
        (folder / "password").write_text(PASSWORD + "\n")
        if self._user:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        make = [str(initdb), "-D", str(folder / "data"), "-U", "tuner", "-A", "scram-sha-256", "--no-sync"]
        making = self._run([*make, f"--pwfile={folder / 'password'}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = making.communicate(timeout=60)
        assert making.returncode == 0, said
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tuner:s3cr%2Fet%25w@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder), "-F"]
        command = [str(self._program), "-D", str(self.folder / "data"), *options]
        self._process: Any = self._run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        import psycopg  # noqa: PLC0415 - where there is a server

        for _ in range(200):  # it listens before it lets anybody in
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url(), connect_timeout=2):
                return
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGQUIT)  # at once, whoever is connected
        self._process.wait(20)

    def _run(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        # Signals of a process whose parent dies; one that has changed its user asks for that last.
        return subprocess.Popen(["setpriv", *self._user, "--pdeathsig=INT", *command], cwd="/", **options)


def initdb() -> Path | None:
    places = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return places[-1] if places else None


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    program = initdb()
    if program is None:
        pytest.skip(
            "PostgreSQL is not installed (no initdb in PATH or /usr/lib/postgresql): apt-get install postgresql"
        )
    # Not in a temporary directory of pytest's: root's are closed to the user that the server runs as.
    server = Server(Path("/tmp") / f"retgen-pg-{os.getpid()}", program)  # noqa: S108
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)


@pytest.fixture(params=["journal file", "SQLite", "PostgreSQL"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """A storage of each kind, empty."""
    if request.param == "journal file":
        yield tmp_path / "a.journal"
    elif request.param == "SQLite":
        yield f"sqlite:///{tmp_path / 'a.db'}"
    else:
        server: Server = request.getfixturevalue("postgres")
        name = f"test{time.monotonic_ns()}"
        import psycopg  # noqa: PLC0415 - where there is a server

        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(f"create database {name}")
        yield server.url(name)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent is found dead at once."""
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "GRACE_SECONDS", 3)


def opened(place: Path | str, say: Callable[[str], None] | None = None, **options: Any) -> Journal:
    """A journal that has nothing to say, unless it is heard."""

    def nothing(message: str) -> None:
        raise AssertionError(message)

    return Journal(place, CONTEXT, say or nothing, **options)


# Many workers


class Logging(Judge):
    """Writes down what it times, by whom."""

    def __init__(self, launched: Path) -> None:
        super().__init__()
        self._launched = launched

    def time(self, problem: Any, config: Any, *rest: Any) -> Any:
        with self._launched.open("a") as file:
            file.write(f"{os.getpid()} {problem.T} {config}\n")
        time.sleep(0.1)
        return super().time(problem, config, *rest)


def work(place: Path | str, launched: Path, out: Path, said: Path, options: dict[str, Any]) -> None:
    """A worker of a tuning, as `tuning run` is one; what goes wrong is in `said`."""
    storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 3
    try:
        journal = opened(place, **options)
        record = journal.run()
        tuner = tune(Logging(launched), problems=PROBLEMS, effort=SMALL, journal=journal)
        entries = [rules.entry_of(winner) for winner in tuner.winners.values()]
        rules.update(out, entries, {"name": "H100", "arch": "sm90", "sms": 132, "memory_gb": 80}, "580.1")
        record.finish(1.0)
        journal.close()
    except BaseException:
        said.write_text(traceback.format_exc())
        raise


def run_workers(place: Path | str, count: int, folder: Path, *, kill: bool = False, **options: Any) -> list[str]:
    """So many workers, of which one may be killed while it measures: the others do the rest; what was launched."""
    launched, out = folder / "launched", folder / "rules.yaml"
    launched.write_text("")
    context, logs = forkserver.context(), [folder / f"said{number}" for number in range(count)]
    workers = [context.Process(target=work, args=(place, launched, out, log, options)) for log in logs]
    for worker in workers:
        worker.start()
    killed = None
    while kill and killed is None and any(worker.is_alive() for worker in workers):
        time.sleep(0.02)
        pids = [int(line.split()[0]) for line in launched.read_text().splitlines()]
        killed = next((worker for worker in workers if worker.pid in pids[2:]), None)
    if killed:
        killed.kill()
    for worker in workers:
        worker.join(60)
    assert [log.read_text() for log in logs if log.exists()] == []
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL if w is killed else 0 for w in workers]
    assert (killed is not None) == kill
    (kernel,) = parse_file(out).kernels.values()
    assert len(kernel.rules) == len(PROBLEMS)
    return [line.partition(" ")[2] for line in launched.read_text().splitlines()]


def test_four_workers_on_postgresql_measure_no_point_twice_though_one_is_killed(
    postgres: Server, tmp_path: Path
) -> None:
    points = run_workers(postgres.url(), 4, tmp_path, kill=True)
    assert len(points) == len(set(points)) > len(PROBLEMS)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_workers_on_one_file_measure_no_point_twice_though_one_is_killed(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "a.journal" if kind == "journal" else f"sqlite:///{tmp_path / 'a.db'}"
    points = run_workers(place, 2, tmp_path, kill=True)
    assert len(points) == len(set(points)) > len(PROBLEMS)
    assert not list(tmp_path.glob("*.broken*"))


def test_workers_share_the_budget_of_a_search_and_fresh_forgets_once_for_all_of_them(tmp_path: Path) -> None:
    place = tmp_path / "a.journal"
    before = set(run_workers(place, 2, tmp_path, session="one"))
    # Two workers may be at the last one at once, and each has the next written down by then.
    assert len(before) <= len(PROBLEMS) * (SMALL.measurements + 2)
    assert run_workers(place, 2, tmp_path, session="two") == []
    again = run_workers(place, 2, tmp_path, session="three", fresh=True)
    assert len(again) == len(set(again)) > len(PROBLEMS)


def test_a_worker_goes_where_no_other_is(place: Path | str) -> None:
    one, other = opened(place), opened(place)
    one.go_to(PROBLEMS[:1])
    assert other.elsewhere(PROBLEMS) == {PROBLEMS[0]}
    assert one.elsewhere(PROBLEMS) == set()
    if isinstance(place, Path):  # where the tuner itself takes no time
        assert list(tune(Judge(), problems=PROBLEMS, effort=SMALL, journal=other).found) == PROBLEMS[::-1]
    one.go_to([])
    assert other.elsewhere(PROBLEMS) == set()


# What dies


@pytest.mark.parametrize("restarted", [True, False])
def test_what_a_dead_worker_was_at_is_known_to_have_failed_and_nothing_else_is_lost(
    place: Path | str, restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if restarted:  # the machine, which may have died of it
        monkeypatch.setattr(journals, "boot_id", lambda: "another")
    process = forkserver.context().Process(target=die, args=(place,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    journal = opened(place)
    until = time.monotonic() + 20
    while journal.is_held(PROBLEM, {}, PROVE) and time.monotonic() < until:
        time.sleep(0.2)
    assert journal.outcomes(PROBLEM, {})[FIRST] == Outcome(1.0)
    assert journal.remembered(PROBLEM, SECOND, {}, step=PROVE) == (Outcome(None, SUSPECT) if restarted else None)
    assert journal.raced(PROBLEM, {}, RACE) is None
    is_marked = isinstance(place, Path)  # then it is known that the proof was launched last
    assert journal.barred(PROBLEM, {}) == ({FIRST, THIRD} if restarted and not is_marked else set())
    if restarted and not is_marked:
        assert journal.claim_race(PROBLEM, [FIRST, SECOND, THIRD], {}, step=RACE) == {}


def test_a_worker_that_was_silent_goes_on_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"sqlite:///{tmp_path / 'a.db'}"
    sleeper, other = opened(place), opened(place)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Pulse, "was_silent", lambda self: True)
        sleeper._store.is_dead = lambda worker: False  # type: ignore[union-attr,method-assign]
        before = sleeper._store.worker  # type: ignore[union-attr]
        sleeper.launch(PROBLEM, FIRST, {}, lambda: Outcome(1.0))
    assert sleeper._store.worker != before  # type: ignore[union-attr]
    other._store._dead.add(before)  # type: ignore[union-attr]
    sleeper.launch(PROBLEM, SECOND, {}, lambda: Outcome(2.0))
    assert other.outcomes(PROBLEM, {}) == {FIRST: Outcome(1.0), SECOND: Outcome(2.0)}


def test_a_pulse_tells_of_a_silence_as_long_as_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(storage.time, "time", lambda: now[0])
    pulse = storage.Pulse()
    now[0] += storage.GRACE_SECONDS
    assert not pulse.was_silent()
    now[0] += 1
    assert pulse.was_silent()


def die(place: Path | str) -> None:
    """Be killed in a race and in a proof, after a measurement."""
    storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 3
    journal = opened(place)
    journal.launch(PROBLEM, FIRST, {}, lambda: Outcome(1.0))
    journal.claim_race(PROBLEM, [FIRST, THIRD], {}, step=RACE)
    with journal.measuring(PROBLEM, SECOND, {}, step=PROVE, needs=NEEDS):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_database_that_goes_away_is_said_once_and_tuning_goes_on(postgres: Server) -> None:
    said: list[str] = []
    journal = opened(postgres.url(), said.append, fresh=True)
    record = journal.run(command="x")

    def stop(config: Any) -> float:
        if not said and len(judge.timed) == 3:
            postgres.stop()
        return landscape(config)

    judge = Judge(stop)
    try:
        tuner = tune(judge, effort=SMALL, journal=journal)
    finally:
        postgres.start()
    record.finish(1.0)
    assert tuner.winners == tune(Judge(), effort=SMALL).winners
    assert len(said) == 1
    assert "is not remembered" in said[0]
    assert "s3cr" not in said[0]


# What is written


def test_constraints_and_a_limit_of_no_registers_are_kept_in_every_storage(place: Path | str) -> None:
    assert FIRST.maxnreg == 0
    limits = constraints(NEEDS, ARCHS["sm90"])
    opened(place).launch(PROBLEM, FIRST, {}, lambda: Outcome(1.0), needs=NEEDS, constraints=limits)
    known = opened(place).outcomes(PROBLEM, {})
    assert known == {FIRST: Outcome(1.0)}
    assert known[FIRST].needs == NEEDS
    study = search_in(str(place))
    (trial,) = study.trials
    assert trial.params["maxnreg"] == 0
    assert trial.constraints == limits
    assert study.user_attrs["floor_ms"] == PROBLEM.floor_ms("H100")


def search_in(place: str) -> optuna.Study:
    """The only search there."""
    kept = open_storage(place)
    names = [name for name in optuna.get_all_study_names(kept) if name.startswith(PROBLEM.kernel)]
    (name,) = [name for name in names if not name.endswith("; finals")]
    return optuna.load_study(study_name=name, storage=kept)


def test_races_of_another_effort_do_not_hold(tmp_path: Path) -> None:
    path, known = tmp_path / "a.journal", [timing(landscape(config)) for config in (FIRST, SECOND)]
    outcomes = [Outcome(one.ms, figures=one.figures) for one in known]
    claim = opened(path, effort="quick").claim_race(PROBLEM, [FIRST, SECOND], {}, step=RACE)
    assert isinstance(claim, RaceClaim)
    claim.settle(outcomes)
    assert opened(path, effort="full").raced(PROBLEM, {}, RACE) is None
    assert opened(path, effort="quick").raced(PROBLEM, {}, RACE) == dict(zip((FIRST, SECOND), outcomes, strict=True))


# Passwords and servers that are not there


@pytest.mark.parametrize("url", ["postgresql://u:s3cr-et@127.0.0.1:1/x", "postgresql://u:s3cr@et@h/x", "no://u:s3cr@h"])
def test_a_database_that_is_not_there_is_said_before_anything_and_without_its_password(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    with pytest.raises(StorageError) as raised:
        opened(url)
    assert "s3cr" not in str(raised.value)
    assert raised.value.__context__ is raised.value.__cause__ is None
    assert main(["run", "--storage", url]) == 1
    output = "".join(capsys.readouterr())
    assert "error: " in output
    assert "every user of this machine can read a password on a command line" in output
    assert "s3cr" not in output


@pytest.mark.parametrize("between", [" ", "@", ":", "/", "?", "%20", "%40", "'", '"', "+", "\\", " ' @ "])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://tuner:{}@127.0.0.1:1/x",
        "postgresql://a user:{}@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=tuner&password={}",
        "postgresql://127.0.0.1:1/x?sslPassword={}&user=tuner",
        "postgresql://tuner:{0}@127.0.0.1:1/x?password={0}",
    ],
)
def test_a_password_is_masked_whatever_it_is_of(
    url: str, between: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    monkeypatch.setattr(workers_module, "visible", lambda: ["0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command sets; the next tests shall not see it
    place = url.format(f"hunt{between}er2")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_secrets", set())  # a mistyped option is all that was heard of it
        with pytest.raises(SystemExit):
            main(["run", "--stroage", place])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_secrets", set())
        patch.setenv(storage.VARIABLE, place)
        assert main(["run"]) == 1
    monkeypatch.setattr(storage, "_secrets", set())
    assert main(["run", "--storage", place]) == 1
    said = "".join(capsys.readouterr()) + named(place) + masked(shlex.join(["run", "--storage", place]))
    assert said.count("error: ") == 3
    assert not [part for part in ("hunt", "er2") if part in said]


def test_a_password_is_masked_though_its_parameters_name_is_written_otherwise() -> None:
    assert named("postgresql://host/db?pass%77ord=hunt er2&x=1") == "postgresql://host/db?pass%77ord=***&x=1"


def test_of_a_text_nothing_else_is_masked() -> None:
    named("postgresql://tuner:hunt er2@host/db?sslmode=require")
    known = "run --storage 'postgresql://tuner:hunt er2@host/db?sslmode=require' --out a@b.yaml"
    assert masked(known) == known.replace("hunt er2", "***")
    for text in ("sqlite:////home/a:b/c@d.db", "postgresql://host:5432/db", "passes=3 of 4", "http://host/a?x=1"):
        assert named(text) == masked(f"at {text}").removeprefix("at ") == text


def test_a_password_is_in_no_record_and_no_traceback(postgres: Server) -> None:
    journal = opened(postgres.url(), fresh=True)
    record = journal.run(command=f"run --storage {postgres.url()}", versions={"x": PASSWORD})
    record.finish(1.0, winners=[{"note": PASSWORD}])
    (about,) = [study.user_attrs for study in optuna.get_all_study_summaries(open_storage(postgres.url()))
                if study.study_name.startswith("runs; ")]  # fmt: skip
    study = next(s for s in optuna.get_all_study_names(open_storage(postgres.url())) if s.startswith("runs; "))
    trials = optuna.load_study(study_name=study, storage=open_storage(postgres.url())).trials
    kept = json.dumps([about, [trial.user_attrs for trial in trials]])
    assert "run --storage postgresql://tuner:***@" in kept
    try:
        open_storage(postgres.url("absent"))
    except RunError:
        kept += traceback.format_exc()
    assert "absent" in kept
    for form in (PASSWORD, "s3cr%2Fet%25w", "s3cr"):
        assert form not in kept
        assert form not in masked(f"x {PASSWORD} s3cr%2Fet%25w")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"retgen\[postgres\]"):
        opened("postgresql://u@127.0.0.1:1/x")


# A worker a GPU


@pytest.mark.parametrize("command", ["run", "report"])
@pytest.mark.parametrize(
    "place",
    [
        "postgresql:/me:hunter2@host/db",
        "me:hunter2@host/db",
        "postgresql+psycopg:me:hunter2@h",
        "host=h password=hunter2",
    ],
)
def test_a_url_gone_wrong_is_no_file_and_its_password_is_nowhere(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "gpu_present", lambda: True)
    monkeypatch.setattr(workers_module, "visible", lambda: ["0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command sets; the next tests shall not see it
    assert main([command, "--storage", place]) == 1
    said = "".join(capsys.readouterr())
    assert "looks like a URL" in said
    assert "hunter2" not in said
    assert not any("hunter2" in str(path) for path in tmp_path.rglob("*"))


def test_a_gpu_is_one_tuners_at_a_time() -> None:
    name = f"GPU-test-{os.getpid()}"
    with gpu_alone(name), pytest.raises(GpuBusyError, match="another process"), gpu_alone(name):
        pass
    with gpu_alone(name):
        pass


def test_workers_are_given_the_command_without_what_is_their_parents() -> None:
    command = ["run", "--devices=0,1", "--form", "chunk", "--stor", "postgresql://u:p@h/d", "--out", "a.yaml"]
    assert without([*command, "--workers", "4", "--fresh"], "devices", "storage", "workers") == [
        "run", "--form", "chunk", "--out", "a.yaml", "--fresh",
    ]  # fmt: skip


class Gpus:
    """A machine with two fake GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rules, self.log = folder, folder / "rules.yaml", folder / "launches"

    def start(self, *arguments: str, faults: dict[str, str] | None = None) -> subprocess.Popen[str]:
        given = {"FAKE_LOG": str(self.log), "FAKE_FAULTS": json.dumps(faults or {}), "FAKE_GPUS": "2"}
        given |= {"FAKE_HOST": str(os.getpid()), "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        given |= {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        command = [sys.executable, "-c", "import fake_device, sys; sys.exit(fake_device.main())", "run"]
        command += ["--workload", "B=8,T=1024,H=8,K=64,V=64", "--form", "fused_chunk", "--out", str(self.rules)]
        return subprocess.Popen(
            [*command, *arguments],
            env=os.environ | given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_each_gpu_has_a_worker_and_one_that_is_killed_leaves_its_work_to_the_other(tmp_path: Path) -> None:
    gpus = Gpus(tmp_path)
    best = min(candidates(), key=landscape)
    fatal = f"measure fused_chunk BT={best.BT} BV={best.BV} num_warps={best.num_warps} num_stages={best.num_stages}"
    output, _ = (process := gpus.start(faults={fatal: "kill tuner"})).communicate(timeout=100)
    assert process.returncode == 0, output
    assert output.count("ended by signal 9: the others take its work") == 1
    assert "[gpu FAKE" in output
    launches = [line for line in gpus.log.read_text().splitlines() if line.startswith("measure")]
    assert len(launches) == len(set(launches)) > 5
    assert len(parse_file(gpus.rules).kernels) == 2  # the gradients' is one of its own
    check_record(tmp_path / "retgen" / "fake_gpu.journal")


def check_record(place: Path) -> None:
    """The only run that came to its end, as the report reads it."""
    (run,) = read(str(place)).runs
    assert run.command.startswith("python -m tuning run --workload B=8")
    assert (run.effort, run.sampler, set(run.versions)) == ("quick", "informed", {"driver", "triton", "torch"})
    assert next(iter(run.funnel)) == "enumerated"
    assert run.funnel["timed or known"] > run.funnel["proven"] == len(run.winners) == 2
    assert {"compile", "search", "race", "confirm", "prove"} == set(run.phases)
    assert run.seconds is not None
    assert run.seconds > 0
    assert 0 <= (run.gpu_number("idle_share") or 0.0) <= 1
    assert {winner.problem.form for winner in run.winners} == {"fused_chunk", "fused_chunk_gradients"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "7"], "--devices 7: no GPU is visible"),
        (["--devices", "0", "--arch", "sm90"], "--devices is for measuring, and --arch sm90 models: give one of them"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "visible", list)
    assert main(["run", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_workers_in_order(tmp_path: Path, sent: signal.Signals) -> None:
    gpus = Gpus(tmp_path)
    # A script's `&` ignores Ctrl-C, and what it starts inherits that.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if sent == signal.SIGTERM else None
    try:
        process = gpus.start("--effort", "full")
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    while not gpus.log.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, output
    assert "Traceback" not in output
    assert "ended by signal" not in output
