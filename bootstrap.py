"""Set this project up on a machine that has nothing but Python, pip and a C compiler, and use it.

    python3 bootstrap.py run      install, build the kernels, tune them for this machine, use them once
    python3 bootstrap.py test     install what the tests need too, and run them

Needs the standard library alone. What it installs goes into a virtual environment (default: .venv), from the package
index that pip is configured for, in the versions of constraints.txt. Both commands may be repeated, and go on where
a stopped one left off.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OLDEST = (3, 10)
if sys.version_info < OLDEST:  # everything above and below must parse on Python 3.6, for this message to be seen
    sys.exit(
        f"bootstrap: this is Python {sys.version.split()[0]}, but Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; "
        "name one, for example: python3.12 bootstrap.py run"
    )

ROOT = Path(__file__).resolve().parent
STAMP = ".retgen.json"
LOG = "retgen-install.log"
BUDGET = 150  # seconds
SILENCE = 20  # seconds
# What the budget suffices for: without a GPU, compiling on a few cores takes the most of it.
WORKLOADS = {True: ("small", "short", "retnet_1.3b"), False: ("small", "short")}
EXTRAS = "plot,samplers"  # what commands in the README need beside the rest
USED_BY_RUN = ("torch", "triton", "yaml", "jinja2", "numpy", "optuna", "rich", "ruff")
USED_BY_TEST = (*USED_BY_RUN, "pytest", "pytest_timeout", "xdist")
EXAMPLES = """\
examples:
  python3 bootstrap.py run                             the whole way, at most about five minutes plus downloads
  python3 bootstrap.py run --budget 1200               tune for longer
  python3 bootstrap.py run -- --workload small         tune other shapes, or with other options
  python3 bootstrap.py run --here                      use the running Python's packages, install nothing
  python3 bootstrap.py test                            all tests
  python3 bootstrap.py test -- -m gpu -x               pass arguments on to pytest
"""
# What pip prints, and what helps.
HINTS = {
    r"No space left on device|Errno 28": "The disk is full, and torch with CUDA takes several GB: free some.",
    r"name resolution|Max retries|Connection|timed out|ProxyError|SSLError": (
        "The package index was not reached: check the network, and pip's own settings for an index or a proxy "
        "(`python3 -m pip config list`)."
    ),
    r"No matching distribution|Could not find a version|ResolutionImpossible": (
        "The package index has no such version for this Python and platform: try another Python 3.10 to 3.13, "
        "on 64-bit Linux."
    ),
    r"Permission denied|Errno 13|Read-only file system": "That folder is not yours to write: name another with --venv.",
}


class SetupError(Exception):
    """A step failed; the message says which, why, and what to do."""


class Toolbox(NamedTuple):
    """The Python that has the project's packages, and the environment variables to run it with."""

    python: str
    variables: Mapping[str, str]

    def run(self, *arguments: str) -> None:
        """Run this Python in the project's folder, its output shown; raise `StatusError` unless it succeeds."""
        with subprocess.Popen([self.python, *arguments], cwd=ROOT, env=self.variables) as program:
            try:
                status = program.wait()
            except KeyboardInterrupt:  # Ctrl-C reached the program too: let it keep what it found
                program.wait()
                raise
        if status:
            raise StatusError(status)


class StatusError(Exception):
    """A program that reported its own failure: all that is left to do is to pass on its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        check_machine()
        options.command(options)
    except StatusError as stopped:
        return stopped.status
    except SetupError as failure:
        print(f"bootstrap: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bootstrap: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what stands after -- is passed on."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python3 bootstrap.py",
        description=f"{summary}\n\n{details}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", run_project, "install, build the kernels, tune them, use them once", "the tuner")
    budget = f"time for the search; confirming and proving what it found takes longer (default {BUDGET})"
    run.add_argument("--budget", type=_seconds, default=BUDGET, metavar="SECONDS", help=budget)
    _command(commands, "test", run_tests, "install what the tests need too, and run them", "pytest")
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.passed_on = list(argv[split + 1 :])
    return options


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: object, summary: str, receiver: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. What stands after -- is passed on to {receiver}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", metavar="DIR", help="virtual environment to make or use (.venv)"
    )
    place.add_argument("--here", action="store_true", help="use the running Python's packages and install nothing")
    parser.set_defaults(command=run)
    return parser


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, such as {BUDGET}")
    return int(text)


# The commands


def run_project(options: argparse.Namespace) -> None:
    """Install, build, tune, use."""
    started = time.monotonic()
    toolbox = prepare(options, extra=EXTRAS, uses=USED_BY_RUN)
    with phase("Build: kernels from templates"):
        toolbox.run("-m", "gen", "build")
    shapes = [f"--workload={name}" for name in WORKLOADS[has_gpu()]]
    with phase(f"Tune: about {options.budget} s; Ctrl-C keeps what was found"):
        toolbox.run("-m", "tuning", "run", "--budget", str(options.budget), *(options.passed_on or shapes))
    with phase("Use: one forward and backward pass"):
        toolbox.run("examples/first_call.py")
    print(f"\nDone in {time.monotonic() - started:.0f} s. To go on:")
    if not options.here:
        print(f"  . {_shown(options.venv)}/bin/activate")
    print("  python -m tuning show                # the rules in use, and the file that each came from")
    print("  python examples/train_retnet.py      # train a small RetNet on real text")


def run_tests(options: argparse.Namespace) -> None:
    """Install what the tests need, and run them."""
    toolbox = prepare(options, extra="test", uses=USED_BY_TEST)
    with phase("Test"):
        toolbox.run("-m", "pytest", *options.passed_on)


@contextlib.contextmanager
def phase(title: str) -> Iterator[None]:
    """Print what begins, and how long it took once it is done."""
    print(f"== {title}", flush=True)
    started = time.monotonic()
    yield
    print(f"   {time.monotonic() - started:.1f} s", flush=True)


# The machine


def check_machine() -> None:
    """Refuse, before anything is downloaded, a machine on which the work would fail at its end."""
    if not sys.platform.startswith("linux"):
        raise SetupError(f"this is {sys.platform}, but Triton is there for Linux only; use Linux, or WSL on Windows")
    problem = compiler_problem()
    if problem and has_gpu():
        raise SetupError(f"{problem}: Triton needs both for its launcher on a GPU")
    if problem:
        print(f"note: {problem}; there is no GPU here, so only torch.compile will miss it")


def compiler_problem() -> str | None:
    """Say what is missing to compile a C extension for this Python, and the packages that bring it, or return None."""
    compilers = (*os.environ.get("CC", "").split()[:1], "gcc", "clang")
    if not any(map(shutil.which, compilers)):
        return "no C compiler (gcc or clang on the PATH, or CC); on Debian and Ubuntu: apt install gcc libc6-dev"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"Python's C headers are missing ({header}); on Debian and Ubuntu: apt install python3-dev"
    return None


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, as far as can be told without torch."""
    return bool(shutil.which("nvidia-smi")) or any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg"))


# The environment


def prepare(options: argparse.Namespace, extra: str, uses: Sequence[str]) -> Toolbox:
    """Return a Python that has the project and its requirements, those of an extra included."""
    if options.here:
        return running_python(uses)
    venv = options.venv.absolute()
    with alone_in(venv.parent):
        if not is_usable(venv, read_stamp(venv)):
            with phase(f"Environment: {_shown(venv)}, Python {sys.version.split()[0]}"):
                make_environment(venv)
        stamp, wanted = read_stamp(venv), requirements(venv)
        present = stamp["extras"] if stamp.get("installed") == wanted else None
        if present is None or extra not in present:
            with phase(f"Install: retgen and what it needs, by pip, into {_shown(venv)} (minutes, the first time)"):
                install(venv, extra)
            write_stamp(venv, installing=False, installed=wanted, extras=sorted({"", extra, *(present or [])}))
    return Toolbox(str(venv / "bin" / "python"), clean_variables())


def running_python(uses: Sequence[str]) -> Toolbox:
    """Return the running Python, if it has the packages."""
    missing = [name for name in uses if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"--here: {sys.executable} has no {', '.join(missing)}; leave --here out, or install them: "
            f"{sys.executable} -m pip install -c constraints.txt -e '.[test]'"
        )
    variables = clean_variables()
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return Toolbox(sys.executable, variables)


def clean_variables() -> dict[str, str]:
    """Return the environment variables for the steps: pip's settings stay, but it must not leave the environment."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    variables["PIP_USER"] = "0"
    return variables


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one set-up at a time work on the environments in a folder."""
    import fcntl  # noqa: PLC0415 - not on every platform, and check_machine() is to say so

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another set-up in {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_usable(venv: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether an environment was made here by this program to its end, and its Python still runs."""
    # Scripts in an environment name its folder, and a stopped pip may have left half of a package.
    if stamp.get("made") != str(venv) or stamp.get("installing"):
        return False
    try:
        done = subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], capture_output=True, check=False)
    except OSError:  # the Python that it was made from is gone
        return False
    return done.returncode == 0


def make_environment(venv: Path) -> None:
    """Make a virtual environment with pip, in place of one that this program made and can't use."""
    refuse_foreign(venv)
    if venv.is_symlink():
        raise SetupError(f"{venv} is a link; name the folder that it leads to with --venv")
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True, exist_ok=True)
    write_stamp(venv)  # so that the next run knows whose half-made environment this is
    log = venv / LOG
    if _imports("ensurepip"):
        _logged([sys.executable, "-m", "venv", str(venv)], log, "making the virtual environment")
    else:
        borrow_pip(venv, log)
    write_stamp(venv, made=str(venv))


def refuse_foreign(venv: Path) -> None:
    """Keep --venv from removing what somebody else put there."""
    if venv.exists() and not venv.is_dir():
        raise SetupError(f"{venv} is a file; name a folder for the virtual environment with --venv")
    if venv.is_dir() and any(venv.iterdir()) and not (venv / STAMP).exists():
        raise SetupError(
            f"{venv} holds something that this program did not make; name another folder with --venv, remove it, or, "
            f"if it is an environment with the packages, run {venv}/bin/python bootstrap.py with --here"
        )


def borrow_pip(venv: Path, log: Path) -> None:
    """Make an environment where Python came without ensurepip, as on Debian: its own pip installs one there."""
    if not _imports("venv") or not _imports("pip"):
        raise SetupError(
            f"{sys.executable} has no ensurepip, and no pip to do its work; on Debian and Ubuntu: "
            f"apt install python3-venv (or python{sys.version_info[0]}.{sys.version_info[1]}-venv); "
            "on Fedora: dnf install python3-pip"
        )
    _logged([sys.executable, "-m", "venv", "--without-pip", str(venv)], log, "making the virtual environment")
    spec = importlib.util.find_spec("pip")
    pip = str(Path(spec.origin).parent) if spec and spec.origin else "pip"
    _logged([str(venv / "bin" / "python"), pip, "install", "--ignore-installed", "pip"], log, "installing pip")


def install(venv: Path, extra: str) -> None:
    """Install the project, editable, with its requirements in the tested versions."""
    project = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    write_stamp(venv, installing=True)
    try:
        _logged([*command, "-c", str(ROOT / "constraints.txt"), "-e", project], venv / LOG, "installing the packages")
    except SetupError:
        write_stamp(venv, installing="Installing collected packages" in _read(venv / LOG))
        raise


def _logged(command: Sequence[str], log: Path, doing: str) -> None:
    with log.open("wb") as file:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        with subprocess.Popen(command, cwd=ROOT, env=clean_variables(), **streams) as program:
            status = _wait(program, log)
    if status:
        text = _read(log)
        last = "\n".join(f"  {line}" for line in text.splitlines()[-15:])
        raise SetupError(f"{doing} failed (status {status}). The last lines of {log}:\n{last}\n{hint(text)}")


def _wait(program: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait for a program, and print now and then what it is about."""
    started = time.monotonic()
    while True:
        try:
            return program.wait(timeout=SILENCE)
        except subprocess.TimeoutExpired:
            last = (_read(log).splitlines() or [""])[-1].strip()
            print(f"   {time.monotonic() - started:4.0f} s: {last[:100]}", flush=True)


def _read(log: Path) -> str:
    return log.read_bytes().decode(errors="replace")


def hint(text: str) -> str:
    """Say what helps against the failure that pip's output shows."""
    found = [advice for pattern, advice in HINTS.items() if re.search(pattern, text)]
    return "\n".join(found) or "The same command tries again; nothing outside that folder was changed."


def requirements(venv: Path) -> str:
    """Hash all that decides what is installed, and where from."""
    digest = hashlib.sha256(f"{ROOT} {venv}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, Any]:
    """Read what this program noted in an environment that it made; nothing, if it did not."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, **notes: object) -> None:
    """Add notes to an environment's stamp."""
    text = json.dumps({**read_stamp(venv), **notes}, indent=1)
    partial = venv / f"{STAMP}.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(venv / STAMP)


def _imports(module: str) -> bool:
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _shown(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(ROOT)) if ROOT in path.parents else str(path)


if __name__ == "__main__":
    sys.exit(main())
