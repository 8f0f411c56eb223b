"""Any number of workers tune as one: no point is measured twice, and one file comes out, whoever dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import PROBLEM, candidates

from generated.configuration_file import parse_file
from tuning.journal import Journal
from tuning.storage import StorageError
from tuning.workers import GpuBusyError, gpu_alone

TESTS = Path(__file__).resolve().parent
PROGRAM = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
from fakes import PROBLEM, Judge, landscape, tune
from tuning import rules, storage
from tuning.journal import Journal
from tuning.tuner import Effort

storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 3
place, launched, out = sys.argv[1:]

class Logging(Judge):
    def time(self, problem, config, *rest):
        with open(launched, "a") as file:
            file.write(f"{os.getpid()} {problem.T} {config}\\n")
        time.sleep(0.1)
        return super().time(problem, config, *rest)

problems = [replace(PROBLEM, T=T) for T in (512, 4096)]
journal = Journal(place if "://" in place else Path(place), {"gpu": "H100"}, print)
tuner = tune(Logging(landscape), problems=problems, effort=Effort(4, 1, 2, 2), journal=journal)
entries = [rules.entry_of(winner) for winner in tuner.winners.values()]
device = {"name": "H100", "arch": "sm90", "sms": 132, "memory_gb": 80}
rules.update(Path(out), entries, device, "580.1")
journal.run().finish(1.0)
"""


def initdb() -> Path | None:
    places = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return places[-1] if places else None


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own with a user whose password no message may hold."""
    program = initdb()
    if program is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path("/tmp") / f"retgen-pg-{os.getpid()}"  # noqa: S108 - root's temporary directories are closed to others
    folder.mkdir()
    (folder / "password").write_text("s3cr/et%w\n")
    user = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.getuid() == 0 else []
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    make = [str(program), "-D", str(data), "-U", "tuner", "-A", "scram-sha-256", "--no-sync"]
    subprocess.run([*user, *make, f"--pwfile={folder / 'password'}"], check=True, capture_output=True, cwd="/")
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    server = subprocess.Popen(
        [*user, str(program.with_name("postgres")), "-D", str(data), *options], cwd="/", stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"postgresql://tuner:s3cr%2Fet%25w@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        shutil.rmtree(folder)


def start(place: str, launched: Path, out: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, "-c", PROGRAM, place, str(launched), str(out)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check(place: str, count: int, folder: Path) -> None:
    """One of so many workers is killed while it measures: the others do the rest, each point once."""
    launched, out = folder / "launched", folder / "rules.yaml"
    launched.touch()
    workers = [start(place, launched, out) for _ in range(count)]
    while not (lines := launched.read_text().splitlines()):
        time.sleep(0.02)
        assert any(worker.poll() is None for worker in workers)
    killed = next(worker for worker in workers if worker.pid == int(lines[0].split()[0]))
    killed.kill()
    for worker in workers:
        output, _ = worker.communicate(timeout=100)
        assert "s3cr" not in output
        assert (worker.returncode, output) == ((-signal.SIGKILL, "") if worker is killed else (0, ""))
    points = [line.partition(" ")[2] for line in launched.read_text().splitlines()]
    assert len(points) == len(set(points))
    (kernel,) = parse_file(out).kernels.values()
    assert len(kernel.rules) == 2
    assert not list(folder.glob("*.broken*"))


def test_four_workers_on_postgresql_measure_no_point_twice_though_one_is_killed(postgres: str, tmp_path: Path) -> None:
    check(postgres, 4, tmp_path)


def test_two_workers_on_one_file_measure_no_point_twice_though_one_is_killed(tmp_path: Path) -> None:
    check(str(tmp_path / "a.journal"), 2, tmp_path)


@pytest.mark.parametrize("url", ["postgresql://u:s3cr-et@127.0.0.1:1/x", "postgresql://u:s3cr@et@h/x", "no://u:s3cr@h"])
def test_a_database_that_is_not_there_is_said_before_anything_and_without_its_password(url: str) -> None:
    with pytest.raises(StorageError) as raised:
        Journal(url, {"gpu": "H100"}, print)
    assert "s3cr" not in str(raised.value)
    assert raised.value.__context__ is raised.value.__cause__ is None


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"retgen\[postgres\]"):
        Journal("postgresql://u@127.0.0.1:1/x", {"gpu": "H100"}, print)


def test_a_gpu_is_one_tuners_at_a_time() -> None:
    name = f"GPU-test-{os.getpid()}"
    with gpu_alone(name), pytest.raises(GpuBusyError, match="another tuner"), gpu_alone(name):
        pass
    with gpu_alone(name):
        assert candidates(PROBLEM)
