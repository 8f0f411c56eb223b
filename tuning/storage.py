"""Where measurements are kept: a journal file for one host, a database for many. And who of its users still lives.

A password in a database's URL stays in here: it reaches the driver as an argument of its own, Optuna and SQLAlchemy
are given the URL without it, and `masked` takes it out of whatever is said, raised or stored.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import random
import re
import tempfile
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote, quote_plus, unquote

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from tuning.device import OTHER, Mark, mark_text

HEARTBEAT_SECONDS = 5  # between two signs of life in a database
GRACE_SECONDS = 20  # without one, after which a worker counts as dead
LOOK_SECONDS = 1.0  # between two looks at who is silent
OPEN_TRIES = 8  # workers that start together all make the tables, which one of them can
MADE_BY_ANOTHER = "already exists|duplicate (key|entry)|unique constraint|is locked"
VARIABLE = "RETGEN_STORAGE"
POSTGRES = "postgresql+psycopg"
# Of the server's side and of the network's: nothing waits for longer than a worker may be silent.
POSTGRES_ARGUMENTS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
    "options": "-c lock_timeout=20s -c idle_in_transaction_session_timeout=60s",
}
_secrets: set[str] = set()

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StorageError(Exception):
    """A storage that cannot be used; the message says why, without its password."""


class Store(Protocol):
    """An open storage, and this process as one of its users: `name` can be printed, `worker` names the process."""

    storage: Any
    name: str
    worker: str

    def begin(self, runs: int, trial: int) -> None:
        """From now on this process lives, and the trial of the study `runs` stands for it."""

    def is_taken_for_dead(self) -> bool:
        """Whether others may take this process for dead: it must begin again, as another worker."""

    def is_dead(self, worker: str) -> bool:
        """Whether the process that wrote this name into the storage has ended."""

    def mark(self, trial: int) -> Mark | None:
        """How this process's measuring process says that it launches a trial; None where that cannot be known."""

    def launched(self, worker: str) -> int | None:
        """The trial that a dead process's one said last, or OTHER; None where that is not known."""

    def forget(self, worker: str) -> None:
        """Nobody will ask about this dead process any more."""

    def sync(self) -> None:
        """What was written outlives a loss of power from now on."""

    def leave(self) -> None:
        """This process writes no more, and ends none of what it has written down: none of that has ended it."""

    def close(self) -> None:
        """This process is no user any more."""


def is_url(place: str | Path) -> bool:
    """Whether a storage is a database; everything else is a file's path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][\w+.-]*://", place) is not None


def check_place(place: str) -> None:
    """Raise StorageError for what would be a file's path but looks like a URL gone wrong: it may hold a password."""
    if not is_url(place) and (masked(place) != place or re.search(r"^[A-Za-z][\w+.-]+:|:.*@", place)):
        raise StorageError(
            "the storage that was given looks like a URL and is none (dialect://user:password@host:port/database); "
            "a file's path may be written ./..."
        )


def open_store(place: str | Path, say: Callable[[str], None]) -> Store:
    """Open a journal file, repaired where it is damaged, of which `say` is told; or a database; StorageError if not."""
    return Database(str(place)) if is_url(place) else JournalFile(Path(place), say)


def named(place: str | Path) -> str:
    """A storage as it may be printed: passwords in its URL are known from here on."""
    if is_url(place):
        _remember_secrets(str(place))
    return masked(str(place))


def masked(text: str) -> str:
    """A text without the passwords of URLs: of those that stand in it, and of those that were named before.

    Of one that was not, nobody can tell where it ends in a text: all up to the line's last @, or to its end, is taken
    for it.
    """
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(pass(?:w\w*)?=)(?!\*\*\*)[^&\n]*", r"\1***", text, flags=re.IGNORECASE)
    return re.sub(r"(://[^:/\n]*):(?!\*\*\*@).*@", r"\1:***@", text)


# Databases


class Database:
    """A database by its URL, whose users give signs of life."""

    def __init__(self, url: str) -> None:
        self.name, self.worker = named(url), uuid.uuid4().hex
        self.storage: Any = connected(url)
        self._runs = -1
        self._alive: set[str] = set()
        self._dead: set[str] = set()
        self._looked = 0.0
        self._pulse = Pulse()

    def begin(self, runs: int, trial: int) -> None:
        """Give signs of life by this trial, from a thread, until the end."""
        self._pulse.end()
        self._runs, self._pulse = runs, Pulse()
        self._pulse.start(self.storage, trial)
        weakref.finalize(self, self._pulse.end)

    def is_taken_for_dead(self) -> bool:
        """Whether it was silent for as long as others wait; from here on it has another name."""
        if not self._pulse.was_silent():
            return False
        self.worker = uuid.uuid4().hex
        return True

    def is_dead(self, worker: str) -> bool:
        """Whether its run has ended or is silent; the database's clock counts, of one that died none again."""
        if worker in self._dead or worker == self.worker:
            return worker in self._dead
        if worker not in self._alive or time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        if worker not in self._alive:
            self._dead.add(worker)
        return worker in self._dead

    def mark(self, trial: int) -> Mark | None:
        """Other hosts could not read it."""
        return None

    def launched(self, worker: str) -> int | None:
        """Nothing is known."""
        return None

    def forget(self, worker: str) -> None:
        """There is nothing."""

    def sync(self) -> None:
        """A database sees to that itself."""

    def leave(self) -> None:
        """The same as `close`."""
        self.close()

    def close(self) -> None:
        """Give no more signs of life."""
        self._pulse.end()
        self.storage._backend.engine.dispose()

    def _look(self) -> None:
        runs = self.storage.get_all_trials(self._runs, deepcopy=False)
        silent = self.storage._get_stale_trial_ids(self._runs)
        living = [run for run in runs if not run.state.is_finished() and run._trial_id not in silent]
        self._alive = {str(run.user_attrs.get("worker")) for run in living} - self._dead
        self._looked = time.monotonic()


def connected(url: str) -> BaseStorage:
    """A database, its tables made; the driver is given the password, and nobody else. StorageError where it cannot."""
    name = named(url)
    bare, arguments = _arguments(url, name)
    for left in reversed(range(OPEN_TRIES)):
        reason = ""
        try:
            return _opened(bare, arguments)
        except ImportError:
            hint = "pip install 'retgen[postgres]'" if bare.startswith("postgresql") else "install it"
            reason, left = f"the driver of this database is not installed: {hint}", 0
        except Exception as error:  # noqa: BLE001 - the drivers' are not related to each other
            reason = reason_of(error)
            if not re.search(MADE_BY_ANOTHER, reason, re.IGNORECASE):
                left = 0
        if not left:
            break
        time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - no secret
    # Not in the except clause: what was raised there holds more than is to be told.
    raise StorageError(f"{name}: {reason}")


def _opened(url: str, arguments: dict[str, Any]) -> BaseStorage:
    options = {"connect_args": arguments, "pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
        )
    weakref.finalize(storage, storage.engine.dispose)  # or its connections would be left open
    return get_storage(storage)


def _arguments(url: str, name: str) -> tuple[str, dict[str, Any]]:
    """The URL without its password, and what the driver is given beside it."""
    from sqlalchemy.engine import make_url  # noqa: PLC0415 - takes 0.2 s, which a journal file need not pay

    authority = url.partition("://")[2]
    if authority.count("@") > 1 or "@" in authority.partition("?")[2]:
        raise StorageError("a storage's URL holds an @ that is not before its host: in a password, write it as %40")
    try:
        parsed = make_url(url)
    except Exception:  # noqa: BLE001 - may hold the URL
        parsed = None
    if parsed is None:
        raise StorageError(f"{name}: not a URL of the form dialect://user:password@host:port/database")
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername=POSTGRES)
    given = {key: value for key, value in parsed.query.items() if "password" in key.lower()}
    if parsed.password:
        given["password"] = str(parsed.password)
    _secrets.update(form for secret in given.values() for form in _forms(str(secret)))
    bare = parsed.set(password=None).difference_update_query(list(given))
    defaults = POSTGRES_ARGUMENTS if parsed.drivername == POSTGRES else {}
    if parsed.get_backend_name() == "sqlite":
        defaults = {"timeout": 60}
    arguments = {key: value for key, value in defaults.items() if key not in parsed.query} | given
    return bare.render_as_string(hide_password=False), arguments


def _remember_secrets(url: str) -> None:
    """A URL's passwords, as they are written and as they are meant, whatever becomes of the URL."""
    given = re.findall(r"(?<=[?&])([^=&?]+)=(?=([^&]*))", url)
    secrets = [value for name, value in given if value and "pass" in unquote(name).lower()]
    for secret in secrets:  # or an @ in it would be taken for the one before the host
        url = url.replace(secret, "")
    authority = url.partition("://")[2]
    if not authority.startswith("/"):  # as a file's path does
        secrets.append(authority.rpartition("@")[0].partition(":")[2])
    _secrets.update(form for secret in secrets for meant in (secret, unquote(secret)) for form in _forms(meant))


def _forms(secret: str) -> set[str]:
    """A password as it may stand in a text, or in a command's quotes."""
    quoted = {quote(secret), quote(secret, safe=""), quote_plus(secret), secret.replace("'", "'\"'\"'")}
    return {secret, repr(secret)[1:-1], *quoted} - {""}


class Pulse:
    """Signs of life by a trial, in a thread."""

    def __init__(self) -> None:
        self._ended, self._last, self._longest = threading.Event(), time.time(), 0.0

    def start(self, storage: Any, trial: int) -> None:
        """Begin with one that must succeed."""
        storage.record_heartbeat(trial)
        threading.Thread(target=self._beat, args=(storage, trial), daemon=True).start()

    def end(self) -> None:
        """Give no more."""
        self._ended.set()

    def was_silent(self) -> bool:
        """Whether there was ever none for as long as others wait; machines that slept count that too."""
        return max(self._longest, time.time() - self._last) > GRACE_SECONDS

    def _beat(self, storage: Any, trial: int) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(Exception):  # the server may come back; if it does not, the tuner finds out itself
                storage.record_heartbeat(trial)
                now = time.time()
                self._longest, self._last = max(self._longest, now - self._last), now


def reason_of(error: BaseException) -> str:
    """Why an access failed, in a line that can be printed."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    told = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
    return masked((told.strip().splitlines() or [""])[0])


# Journal files


class JournalFile:
    """A journal file, whose users each hold a lock on a file beside it."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.name, self._path = str(path), path
        self.storage = _open(path, say)
        self._alive = Alive(path)
        self.worker = self._alive.name

    def begin(self, runs: int, trial: int) -> None:
        """The lock says it already."""

    def is_taken_for_dead(self) -> bool:
        """Never: who holds its lock lives."""
        return False

    def is_dead(self, worker: str) -> bool:
        """Whether nobody holds its lock."""
        return is_dead(self._path, worker)

    def mark(self, trial: int) -> Mark:
        """In the file that is locked."""
        return Mark(str(alive_path(self._path, self.worker)), trial)

    def launched(self, worker: str) -> int | None:
        """What stands in its file."""
        with contextlib.suppress(OSError, ValueError):
            return int(alive_path(self._path, worker).read_text(encoding="ascii"))
        return None

    def forget(self, worker: str) -> None:
        """Remove its file."""
        with contextlib.suppress(OSError):
            alive_path(self._path, worker).unlink()

    def sync(self) -> None:
        """Wait for the disk."""
        _sync(self._path)

    def leave(self) -> None:
        """Hold the lock for as long as this process lives, and leave its file to the next run."""
        self._alive.end.detach()
        self.mark(OTHER).make()

    def close(self) -> None:
        """Let go of the lock, once all that was written is safe."""
        with contextlib.suppress(OSError):  # a disk that is full or gone
            self.sync()
        self._alive.end()


def _open(path: Path, say: Callable[[str], None]) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(_Backend(path))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged lines lead Optuna to
        kept, lines, aside = _cut(path)
        say(
            f"{path} is damaged ({type(error).__name__}): the {kept} of its {len(lines)} lines before the damage are "
            f"kept, and {aside} is a copy of it all"
        )
        storage = JournalStorage(_Backend(path))
        if any(map(_is_whole, lines[kept + 1 :])):
            _forgive(storage, path)
        return storage


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _forgive(storage: JournalStorage, path: Path) -> None:
    """Count as not tried what dead processes seem to have been at: that it ended may be told behind the damage."""
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.params and is_dead(path, str(trial.user_attrs.get("worker"))):
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another tuner has, just now
                    storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)


class _Backend(JournalFileBackend):
    """Optuna's, which makes sure of every line; this one of those that must not be lost, and of all before them.

    That is a new trial's line, written before its candidate is launched: if power is lost, so is at most what came of
    the one before. What came of the last is for `JournalFile.sync`: the GPU waits for every line that is made sure of.
    """

    def __init__(self, path: Path) -> None:
        self._held = _Lock(path)
        lock: Any = self._held  # Optuna asks for a class of its own
        new = not path.exists()
        super().__init__(str(path), lock)
        if new:
            _sync(path.parent)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write whole lines at the file's end."""
        with self._held as file:
            file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
            file.flush()
            if any(log["op_code"] == JournalOperation.CREATE_TRIAL for log in logs):
                os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Let what was written to a file, or what a folder holds, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cut(path: Path) -> tuple[int, list[bytes], Path]:
    """Cut a damaged journal off where the damage begins; how many lines are left, those that there were, and the copy.

    Optuna counts trials by their lines: what follows a line that is lost would be taken for other trials'.
    """
    with _Lock(path) as file:
        data = file.read()
        lines = data.splitlines(keepends=True)
        kept = _replayable(lines)
        aside = _copy(path, data)
        file.truncate(sum(map(len, lines[:kept])))  # at once, unlike writing
        os.fsync(file.fileno())
    return kept, lines, aside


def _copy(path: Path, data: bytes) -> Path:
    """A new file beside another, safely on the disk."""
    name = f"{path.name}.broken-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}-"
    handle, copy = tempfile.mkstemp(prefix=name, dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Path(copy)


def _replayable(lines: list[bytes]) -> int:
    """How many of the first lines Optuna can take in."""
    storage = JournalStorage(_Lines([]))
    for number, line in enumerate(lines):
        try:
            storage._replay_result.apply_logs([json.loads(line)])
        except Exception:  # noqa: BLE001 - as above
            return number
    return len(lines)


class _Lines(BaseJournalBackend):
    """A journal in memory."""

    def __init__(self, logs: list[dict[str, Any]]) -> None:
        self._logs = logs

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The lines from a number on."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """More lines."""
        self._logs += logs


class _Lock:
    """Held by whoever writes the file, as Optuna's own locks, which outlive a process that is killed; this does not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and cut off a line that was not written to its end: the next would continue it."""
        self._file = self._path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        self._file.seek(0)
        return True

    def release(self) -> None:
        """Let others write."""
        assert self._file is not None
        self._file.close()

    def __enter__(self) -> BinaryIO:
        self.acquire()
        assert self._file is not None
        return self._file

    def __exit__(self, *error: object) -> None:
        self.release()


class Alive:
    """A file beside the journal that is locked while this process lives: its number and machine's name tell less.

    It holds the measuring process's last mark.
    """

    def __init__(self, path: Path) -> None:
        self.name = uuid.uuid4().hex
        file = alive_path(path, self.name)
        handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, mark_text(OTHER))
        os.fsync(handle)
        _sync(path.parent)
        self.end = weakref.finalize(self, _end, handle, file)


def _end(handle: int, file: Path) -> None:
    file.unlink(missing_ok=True)
    os.close(handle)


def alive_path(path: Path, name: str) -> Path:
    """The file that a user of a journal, by its name there, holds locked."""
    return path.with_name(f".{path.name}.{name}.alive")


def is_dead(path: Path, name: str) -> bool:
    """Whether the process that wrote this name into a journal has ended; others may look at the same time."""
    file = alive_path(path, name)
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
