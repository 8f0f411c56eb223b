"""`python -m tuning run`: tune the workloads and write the configuration file."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated import configuration
from generated.arguments import MOST_STEPS
from generated.launch import has_aligned_rows
from tuning import nvml, rules
from tuning.compilation import ARCHS, Arch, Resources
from tuning.compile_pool import CompilePool, cores
from tuning.coverage import Point
from tuning.funnel import Funnel
from tuning.journal import Journal, Run
from tuning.journal import default_path as default_journal
from tuning.judges import GpuJudge, Judge, ModelJudge
from tuning.measurement import Gpu, Measurer, gpu_fields, gpu_present
from tuning.problems import (
    FORM_KERNEL,
    GRADIENTS,
    GRADIENTS_FORM_KERNEL,
    STEP_FORMS,
    Problem,
    problem_at,
    problems_of,
)
from tuning.progress import SearchProgress
from tuning.samplers import check_available
from tuning.search import EFFORTS
from tuning.space import knob_values
from tuning.storage import VARIABLE, Database, check_place, is_url, named
from tuning.tuner import Tuner
from tuning.winners import MODEL_NOISE, Winner
from tuning.workers import SESSION, chosen, run_all, without
from tuning.workloads import FORMS, Workload, WorkloadError, parse

FOREVER = 10 * 365 * 86400.0
RULES = re.compile(r"\A# Written by `python -m tuning run`|^kernels:", re.MULTILINE)  # also in a damaged file
WIDE = 200  # columns: room for all that is told of a winner in one table
LAST_STAGES = {"raced": "race", "confirmed": "confirm", "proven": "prove"}  # of the funnel, and their phases
SOON = 0.001  # seconds


class RunError(Exception):
    """What was asked for cannot be done here; the message says why and what can."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Tune what the options select; write even after Ctrl-C what was found until then."""
    started, workloads = time.monotonic(), parse(options.workload)
    check_available(options.sampler)
    for workload in workloads:
        if not has_aligned_rows(workload.torch_dtype, workload.K, workload.V):
            raise RunError(f"{workload.name}: an odd K or V in {workload.dtype} always runs the defaults, never a rule")
    _check_measures(options)
    devices, store = _devices(options), _store(options, console)
    if len(devices) > 1:
        return _run_workers(options, console, devices, store)
    measurer = None if options.arch or not gpu_present() else Measurer()
    try:
        return _run(options, console, workloads, measurer, store, started)
    finally:
        if measurer:
            measurer.close()


def _run(
    options: argparse.Namespace,
    console: Console,
    workloads: list[Workload],
    measurer: Measurer | None,
    store: Database | Path | None,
    started: float,
) -> int:
    arch = _architecture(options.arch, measurer)
    path = Path(options.out) if options.out else default_path(measurer.gpu if measurer else None, arch)
    _check_output(path, measurer.gpu.name if measurer else arch.name)
    judge: Judge = GpuJudge(measurer) if measurer else ModelJudge(arch)
    # A model remembers without a journal.
    journal, record = _journal(options, console, measurer.gpu, store) if measurer else (None, None)
    problems = problems_for(workloads, options.form, arch)
    _announce(console, measurer, arch, workloads, problems, path)
    with nvml.logging(measurer.gpu.uuid if measurer else "") as log, _termination_as_interrupt() as told:
        tuner = _tune(options, console, judge, arch, problems, path, journal)
    winners, complete = list(tuner.winners.values()), False
    known = rules.existing_entries(path)
    forms, unused = rules.form_entries(winners, known), rules.without_use(winners, known)
    _count_forms(tuner.funnel, forms, known)
    try:
        try:
            _report(console, winners, tuner, len(problems), options.budget, log.summary())
            for winner in unused:
                place = f"{winner.problem.form} at {rules.point_text(rules.point_of(winner.problem))}"
                console.print(f"no rule for {place}: no other form is known to be slower there", soft_wrap=True)
        finally:  # also where nobody reads what is printed any more
            _write(console, winners, unused, forms, path, measurer, arch)
        complete = not tuner.interrupted
    finally:
        if journal and record and measurer:
            figures = _figures(tuner, log.summary(), measurer.gpu.name)
            record.finish(time.monotonic() - started, interrupted=not complete, **figures)
            journal.close()
    _conclude(console, len(winners) - len(unused), path, time.monotonic() - started)
    return 128 + (told or [signal.SIGINT])[0] if tuner.interrupted else int(not winners)


def _check_measures(options: argparse.Namespace) -> None:
    """Refuse what is for measurements alone where there will be none."""
    given = {"--devices": options.devices, "--storage": options.storage, "--fresh": options.fresh}
    for option in (option for option, value in given.items() if value):
        if options.arch:
            raise RunError(f"{option} is for measuring, and --arch {options.arch} models: give one of them")
        if option != "--devices" and not gpu_present():
            raise RunError(f"{option} is for measuring, and there is no GPU here: leave it out, for a modelled run")


def _devices(options: argparse.Namespace) -> list[str]:
    """The GPUs to measure on, one worker each; where it is a single one, this process sees no other from now on."""
    if options.arch:
        return []
    try:
        devices = chosen(options.devices)
    except ValueError as error:
        raise RunError(str(error)) from None
    if len(devices) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]
    return devices


def _store(options: argparse.Namespace, console: Console) -> Database | Path | None:
    """Where measurements are to be kept, a database opened before anything is started; None for the default place."""
    place = options.storage or os.environ.get(VARIABLE)
    if options.storage and named(options.storage) != options.storage:
        console.print(
            f"note: every user of this machine can read a password on a command line; {VARIABLE}, PGPASSWORD and "
            "~/.pgpass are not seen",
            soft_wrap=True,
        )
    if options.arch or not place:
        return None
    check_place(place)
    return Database(place) if is_url(place) else Path(place)


def _run_workers(
    options: argparse.Namespace, console: Console, devices: list[str], store: Database | Path | None
) -> int:
    """Tune on several GPUs as one, each by a process of its own."""
    if isinstance(store, Database):
        store.close()
    console.print(f"one worker a GPU: {', '.join(devices)}")
    arguments = without(options.given, "devices", "storage", "workers")
    compilers = options.workers or cores()
    return run_all(arguments, devices, options.storage, compilers, partial(_say, console))


def _say(console: Console, message: str) -> None:
    console.print(escape(message), soft_wrap=True)


def default_path(gpu: Gpu | None, arch: Arch) -> Path:
    """Where a file goes by default: into the package in a source checkout, else into the user directory."""
    packaged = configuration.packaged_directory()
    checkout = (packaged.parent.parent / "pyproject.toml").is_file()
    name = f"{configuration.slug(gpu.name)}.yaml" if gpu else f"{arch.name}.modelled.yaml"
    return (packaged if checkout else configuration.user_directory()) / name


def _journal(
    options: argparse.Namespace, console: Console, gpu: Gpu, store: Database | Path | None
) -> tuple[Journal, Run]:
    """What earlier runs and other workers measured on such a GPU with this compiler, and this run's own record."""
    place = store or default_journal(configuration.slug(gpu.name))
    _say(console, f"what is measured is kept in {place.name if isinstance(place, Database) else place}")
    software = {"driver": gpu.driver} | {name: version(name) for name in ("triton", "torch")}
    session = os.environ.get(SESSION, "")
    journal = Journal(
        place,
        {"gpu": gpu.name} | software,
        partial(_say, console),
        fresh=options.fresh,
        session=session,
        effort=options.effort,
    )
    command = shlex.join(["python", "-m", "tuning", *options.given])
    return journal, journal.run(command=command, sampler=options.sampler, versions=software)


def _figures(tuner: Tuner, log: dict[str, Any], gpu: str) -> dict[str, Any]:
    """What a run's record says at its end."""
    funnel = tuner.funnel
    known = funnel.timed + funnel.remembered + funnel.same_code
    stages = {
        "enumerated": funnel.enumerated,
        "worth compiling": funnel.enumerated - sum(funnel.dropped.values()),
        "compiled": funnel.compiled,
        "fit": funnel.clean,
        "timed or known": known,
    }
    stages |= {"raced": funnel.raced, "raced again": funnel.confirmed, "proven": funnel.proven}
    counts = {name: getattr(funnel, name) for name in ("timed", "remembered", "same_code", "stopped")}
    return {
        "funnel": stages,
        "counts": counts | {"dropped": dict(funnel.dropped), "failures": funnel.failures},
        "seconds": funnel.seconds,
        "gpu": {"idle_share": funnel.idle_share(), "busy_seconds": tuner.judge.busy, **log},
        "flips": {"compared": funnel.compared, "changed": funnel.flipped},
        "winners": [_winner(winner, gpu) for winner in tuner.winners.values()],
    }


def _winner(winner: Winner, gpu: str) -> dict[str, Any]:
    times = {"ms": winner.ms, "default_ms": winner.default_ms, "floor_ms": winner.problem.floor_ms(gpu)}
    return {
        "problem": asdict(winner.problem),
        "config": knob_values(winner.config),
        **times,
        "error": winner.error,
    }


def _architecture(name: str | None, measurer: Measurer | None) -> Arch:
    wanted = name or (measurer.gpu.arch if measurer else "sm90")
    if wanted not in ARCHS:
        raise RunError(f"this GPU's architecture {wanted} is not known; --arch models one of {', '.join(ARCHS)}")
    return ARCHS[wanted]


def _check_output(path: Path, device: str) -> None:
    """Say before tuning that the file cannot be written, would not be read or holds another GPU's rules."""
    if path.suffix not in (".yaml", ".yml"):
        raise RunError(f"--out {path}: only files that end in .yaml or .yml are read")
    rules.check_writable(path)
    owner = rules.owner(path)
    if owner not in (None, device):
        raise RunError(f"{path} holds rules for {owner}, and these are for {device}: give another file with --out")
    if owner is None and path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and not RULES.search(text):
            raise RunError(f"{path} is there, and is no file of rules: give another file with --out, or move it away")


def problems_for(workloads: list[Workload], forms: list[str], arch: Arch) -> list[Problem]:
    """What to tune, the cheap and widely used first, with the passes that a form's own launches are made of.

    WorkloadError where there is nothing: a form may be written for some sizes and one architecture alone.
    """
    passes = {"fused_chunk": ("fused_chunk", GRADIENTS), "chunk": ("chunk_states", "chunk", GRADIENTS)}
    passes |= STEP_FORMS
    parts = [part for form in forms or FORMS for part in passes.get(form, (form,))]
    found = [problem for part in parts for workload in workloads for problem in problems_of(workload, part)]
    problems = [problem for problem in dict.fromkeys(found) if problem.space.is_for(arch) and problem.is_tuned]
    if not problems:
        tokens = (
            f"; a step takes 1 to {MOST_STEPS} tokens, and with several may go by its default: tune T=1"
            if STEP_FORMS.keys() & {*forms}
            else ""
        )
        raise WorkloadError(
            f"nothing to tune on {arch.name}: no form that was chosen runs any of these workloads there{tokens}"
        )
    return problems


def _announce(
    console: Console,
    measurer: Measurer | None,
    arch: Arch,
    workloads: list[Workload],
    problems: list[Problem],
    path: Path,
) -> None:
    how = (
        f"measuring on {measurer.gpu.name}" if measurer else f"no GPU used: modelling {arch.name} from compiled kernels"
    )
    names = ", ".join(workload.name for workload in workloads)
    what = f"{_count(len(problems), 'search', 'searches')} for {_count(len(workloads), 'workload')} ({names})"
    console.print(escape(f"{how}\n{what}\nrules go to {path}"), soft_wrap=True)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _tune(
    options: argparse.Namespace,
    console: Console,
    judge: Judge,
    arch: Arch,
    problems: list[Problem],
    path: Path,
    journal: Journal | None,
) -> Tuner:
    deadline = time.monotonic() + min(options.budget or FOREVER, FOREVER)
    known = rules.existing_entries(path)
    incumbents = incumbents_among(known)
    with (
        contextlib.closing(CompilePool(arch.name, options.workers, aside=not judge.modelled)) as pool,
        SearchProgress(console, pool.outstanding, deadline) as progress,
    ):
        earlier = earlier_winners(rules.former_entries(path))
        effort, how = EFFORTS[options.effort], {"sampler": options.sampler, "earlier": earlier}
        say = _without_proofs(progress) if judge.modelled else progress
        tuner = Tuner(judge, pool, arch, effort, deadline, incumbents, say, journal, **how)
        tuner.run(problems)
        tuner.conclude()
    return tuner


def _without_proofs(progress: Callable[..., None]) -> Callable[..., None]:
    """The same, for a model, to which proving is compiling: nothing runs."""
    names = {"proving": "compiling"}
    return lambda done, total, problem, phase, standing: progress(
        done, total, problem, names.get(phase, phase), standing
    )


def incumbents_among(entries: list[rules.Entry]) -> Callable[[Problem], list[Any]]:
    """What rules say for just the problem that is asked for."""
    held: dict[tuple[str, Point], list[Any]] = {}
    for entry in entries:
        held.setdefault((entry.kernel, entry.point), []).append(rules.config_from(entry))
    return lambda problem: held.get((problem.kernel, rules.point_of(problem)), [])


def earlier_winners(entries: list[rules.Entry]) -> dict[Problem, Any]:
    """What a file's rules say for the problems that they were measured at."""
    return {
        problem_at(entry.kernel, **asdict(entry.point)): rules.config_from(entry)
        for entry in entries
        if entry.kernel not in (FORM_KERNEL, GRADIENTS_FORM_KERNEL)
    }


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[list[int]]:
    """Being told to end keeps what was found, as Ctrl-C does; yields the signals other than Ctrl-C's that came.

    An interrupt waits where it would leave a future locked: nobody would ever come past that lock.
    """
    told: list[int] = []
    again: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_tell_again, args=(again,), daemon=True).start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if frame is None or not _is_locking(frame):
            raise KeyboardInterrupt
        again.put(number)

    def end(number: int, frame: FrameType | None) -> None:
        told.append(number)
        as_ctrl_c = signal.getsignal(signal.SIGINT)  # another one while a process starts
        (as_ctrl_c if callable(as_ctrl_c) else interrupt)(number, frame)

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end, signal.SIGHUP: end}
    # One that is ignored stays so: nohup and shells ask for that.
    previous = {number: handler for number in handlers if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, handlers[number])
        yield told
    finally:
        again.put(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell_again(numbers: SimpleQueue[int]) -> None:
    """Send this process the signals that were put off, a moment later."""
    while number := numbers.get():
        time.sleep(SOON)
        os.kill(os.getpid(), number)


def _is_locking(frame: FrameType) -> bool:
    """Whether this is code of futures or locks themselves, other than that which waits for others."""
    module = str(frame.f_globals.get("__name__"))
    return module.startswith(("threading", "concurrent.futures")) and frame.f_code.co_name != "wait"


def _report(
    console: Console, winners: list[Winner], tuner: Tuner, searches: int, budget: float | None, log: dict[str, Any]
) -> None:
    if winners:
        console.print(*_tables(winners, tuner.arch, console.width))
    else:
        console.print("no candidate was compiled and accepted")
    funnel = tuner.funnel
    console.print(_funnel_table(funnel, modelled=tuner.judge.modelled))
    if funnel.compared:
        share = funnel.flipped / funnel.compared
        console.print(f"{funnel.flipped} of {_count(funnel.compared, 'rule')} in use before changed ({share:.0%})")
    if tuner.judge.modelled:
        kept = sum(winner.config == winner.problem.default() for winner in winners)
        promise = f"another must promise {1 / (1 - MODEL_NOISE):.1f} times its speed"
        console.print(f"{kept} of {len(winners)} keep the default: by a model {promise}")
    else:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in funnel.seconds.items())
        waited = f"{funnel.idle_share():.0%} of all measuring, {funnel.idle_share('search'):.0%} of the search"
        console.print(f"{phases}; the GPU waited {waited}; {funnel.waited:.1f} s of these for the compiler")
        if log:
            console.print(escape(f"while measuring: {log}"))
    for line in funnel.rejected or ([] if winners else funnel.examples.values()):
        console.print(escape(f"not used: {line}"), soft_wrap=True)
    if tuner.unfinished or tuner.interrupted:
        cause = "stopped" if tuner.interrupted else f"the budget of {budget:g} s is spent"
        count = _count(searches, "search", "searches")
        have = "winner" if tuner.judge.modelled else "proven winner; another run goes on"
        console.print(f"{cause}: {tuner.unfinished} of {count} did not end, {len(winners)} have a {have}")


def _count_forms(funnel: Funnel, forms: list[rules.Entry], known: list[rules.Entry]) -> None:
    """Which form runs is a rule as the others are."""
    held = {(entry.kernel, entry.point): entry.use for entry in known}
    before = [(held[entry.kernel, entry.point], entry.use) for entry in forms if (entry.kernel, entry.point) in held]
    funnel.compared += len(before)
    funnel.flipped += sum(old != new for old, new in before)


def _write(
    console: Console,
    winners: list[Winner],
    unused: list[Winner],
    forms: list[rules.Entry],
    path: Path,
    measurer: Measurer | None,
    arch: Arch,
) -> None:
    entries = [rules.entry_of(winner) for winner in winners if winner not in unused] + forms
    gone = [(winner.problem.kernel, rules.point_of(winner.problem)) for winner in unused]
    if not entries and not (gone and path.exists()):
        return
    device: dict[str, Any] = gpu_fields(measurer.gpu) if measurer else {"arch": arch.name}
    if aside := rules.update(path, entries, device, measurer.gpu.driver if measurer else None, gone=gone):
        console.print(escape(f"{path} could not be read: what it held is now {aside}"), soft_wrap=True)


def _funnel_table(funnel: Funnel, *, modelled: bool) -> Table:
    """How many candidates came to each stage and what became of the rest; the seconds of the stages that have any."""
    losses = {"dropped": funnel.dropped, "failures": funnel.failures}
    lost = {name: ", ".join(f"{count} {why}" for why, count in sorted(of.items())) for name, of in losses.items()}
    shortcuts = {
        "known from earlier runs": funnel.remembered,
        "of the same code as another": funnel.same_code,
        "while nothing else could be": funnel.spare,
        "searches ended early": funnel.stopped,
    }
    words = ", ".join(f"{count} {what}" for what, count in shortcuts.items() if count)
    rows = [
        ("enumerated", funnel.enumerated, "", lost["dropped"] and f"dropped: {lost['dropped']}"),
        ("compiled", funnel.compiled, "compile", ""),
        ("fit", funnel.clean, "", lost["failures"] and f"not used: {lost['failures']}"),
        ("estimated" if modelled else "timed", funnel.timed, "search", words),
    ]
    if modelled:  # nothing ran
        rows += [("written", funnel.proven, "prove", "")]
    else:
        rows += [(stage, getattr(funnel, stage), phase, "") for stage, phase in LAST_STAGES.items()]
    table = Table("stage", "candidates", "seconds", "beside")
    for stage, count, phase, beside in rows:
        seconds = f"{funnel.seconds[phase]:.1f}" if phase in funnel.seconds else ""
        table.add_row(stage, str(count), seconds, escape(beside))
    return table


def _conclude(console: Console, winners: int, path: Path, seconds: float) -> None:
    """Say what was written and who reads it, and how long it took."""
    if winners:
        console.print(escape(f"wrote {_count(winners, 'rule')} to {path}"), soft_wrap=True)
        if path.resolve().parent not in [directory.resolve() for directory in configuration.config_directories()]:
            folder = path.resolve().parent
            console.print(escape(f"to use them, set RETGEN_CONFIG_DIR={folder}"), soft_wrap=True)
    else:
        console.print("wrote nothing; what was in use stays in use")
    console.print(f"took {seconds:.0f} s")


def _tables(winners: list[Winner], arch: Arch, width: int) -> list[Table]:
    """What was found, and what it needs of a multiprocessor: beside it, or below where there is no room for that."""
    results, needs = [_result(winner) for winner in winners], [_needs(winner.needs, arch) for winner in winners]
    if width >= WIDE:
        return [_table(winners, [found | needed for found, needed in zip(results, needs, strict=True)])]
    return [_table(winners, results), _table(winners, needs)]


def _table(winners: list[Winner], cells: list[dict[str, str]]) -> Table:
    table = Table("kernel", "shape", *cells[0])
    table.columns[0].no_wrap = True
    for winner, row in zip(winners, cells, strict=True):
        problem = winner.problem
        shape = f"B={problem.B} T={problem.T} H={problem.H} K={problem.K} V={problem.V}"
        table.add_row(problem.form, shape, *row.values())
    return table


def _result(winner: Winner) -> dict[str, str]:
    return {
        "configuration": " ".join(f"{name}={value}" for name, value in knob_values(winner.config).items()),
        "ms": f"{winner.ms:.4g}",
        "default ms": "" if winner.default_ms is None else f"{winner.default_ms:.4g}",
        "error": "" if winner.error is None else f"{winner.error:.1e}",
    }


def _needs(needs: Resources, arch: Arch) -> dict[str, str]:
    """Registers a thread, bytes that it spills, shared memory a program, and the share of the warps that can run."""
    return {
        "registers": str(needs.registers),
        "spills": str(needs.spills),
        "shared": f"{needs.shared / 1024:.4g} KiB",
        "occupancy": f"{needs.blocks_per_sm(arch) * needs.warps / arch.warps_per_sm:.0%}",
    }
