"""Command line of the tuner: `python -m tuning --help` lists its commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console

from tuning import bench, check, landscape, precompile, record, report, run, show, simulate, verify
from tuning.compilation import ARCHS
from tuning.measurement import MeasurementError
from tuning.peers import PEERS
from tuning.problems import FORMS, PASSES
from tuning.run import RunError
from tuning.samplers import EXHAUSTIVE, INFORMED, SAMPLERS, SamplerError
from tuning.search import EFFORTS
from tuning.storage import StorageError, masked
from tuning.workers import GpuBusyError
from tuning.workloads import DTYPES, WorkloadError, builtin, groups

FILE_WIDTH = 1000
EXAMPLES = """examples:
  python -m tuning run                                     every workload, measured on this GPU (modelled without one)
  python -m tuning run --workload retnet_1.3b --form chunk one workload, one form
  python -m tuning run --workload B=4,T=4096,H=16,K=128,V=128 --budget 120
  python -m tuning run --arch sm80                         without a GPU: rules for the A100's architecture, modelled
  python -m tuning compile --arch sm90                     ahead of a run, on any machine: fill Triton's cache
  python -m tuning record -- python train.py               the shapes that a program uses, for run --workload FILE
  python -m tuning check                                   without a GPU: are the files whole, fresh and compilable
  python -m tuning verify                                  on the GPU: are the rules as fast as when they were tuned
  python -m tuning show                                    the rules that hold on this machine, and where they lie
  python -m tuning simulate --sampler informed --sampler tpe   without a GPU: how well ways of searching do
  python -m tuning bench --workload short --form chunk     times and errors, against the floor and fla
  python -m tuning report                                  what was searched, found and spent, as a page and a table
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 for success, 1 for a failure, 2 for wrong usage, 128 and its number after a signal."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given, argparse.Namespace(given=given))
    try:
        return int(options.command(options, _console()))
    except WorkloadError as error:
        return _fail(error, 2)
    except (RunError, SamplerError, MeasurementError, StorageError, GpuBusyError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _console() -> Console:
    """A file or a pipe has no width to keep to, and rich would take 80 columns."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH)


def _fail(error: Exception, code: int) -> int:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or text
    print(f"error: {masked(text)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Tells of wrong arguments without the passwords in them."""

    def error(self, message: str) -> NoReturn:
        super().error(masked(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tuning",
        description="Find the fastest configurations of the generated kernels, and write them where imports find them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compile(commands)
    _add_record(commands)
    _add_check(commands)
    _add_verify(commands)
    show_parser = commands.add_parser("show", help="print the rules that hold on this machine and where each came from")
    show_parser.add_argument("--arch", choices=sorted(ARCHS), help="show another architecture's instead")
    show_parser.add_argument("--kernel", metavar="TEXT", help="only kernels whose names hold this text")
    show_parser.set_defaults(command=show.show)
    _add_bench(commands)
    _add_report(commands)
    _add_simulate(commands)
    _add_landscape(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the forms over workloads, against the floor and other libraries",
        description="Time the forms over workloads on this GPU, tuned and by default, hold their results against "
        "float64 and their times against the floor and other libraries.",
    )
    _add_selection(parser, bench.FORMS)
    parser.add_argument("--dtype", choices=DTYPES, help="of all inputs (default: each workload's own)")
    parser.add_argument(
        "--against",
        type=_peers,
        default=["fla"],
        metavar="NAMES",
        help=f"others to time, where they are installed: any of {', '.join(PEERS)}, or none (default: fla)",
    )
    parser.add_argument("--no-default", action="store_true", help="leave out the default configuration")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--plot", metavar="FOLDER", help="also draw speed-ups and the roofline: speedups.png and roofline.png"
    )
    parser.add_argument("--from", dest="figures", metavar="FILE", help="only draw what an earlier --json FILE holds")
    parser.set_defaults(command=bench.bench)


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip() and text != "none"]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; any of {', '.join(PEERS)}, or none")
    return list(dict.fromkeys(names))


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "run",
        help="tune, and write a configuration file",
        description="Tune the kernels: by measuring where there is a GPU, by a model of one where there is none.",
    )
    _add_selection(parser, [form for form in FORMS if form not in PASSES])
    parser.add_argument(
        "--effort", choices=sorted(EFFORTS), default="quick", help="how many candidates (default: quick)"
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=INFORMED,
        help=f"which way to search: {INFORMED} by a model, the compiler's figures and what was measured, the others "
        f"are Optuna's; gp takes seconds a candidate, {EXHAUSTIVE} tries every one, whatever --effort says "
        f"(default: {INFORMED})",
    )
    _add_budget(
        parser,
        "end the search after this time, once there is something; what was found is then confirmed and proved, which "
        "takes longer",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (default: generated/configs or the user directory)"
    )
    parser.add_argument(
        "--storage",
        metavar="FILE|URL",
        help="where measurements are kept, so that a stopped run goes on and others share them: a file here, or "
        "postgresql://user@host/database for many (default: RETGEN_STORAGE, where other users do not see it as they "
        "see a command line, or a file in the user's cache directory); a password may also be in ~/.pgpass",
    )
    parser.add_argument(
        "--devices",
        metavar="LIST",
        help="the GPUs to measure on, each by a worker of its own, as torch counts them or by UUID: 0,2 (default: all "
        "that CUDA_VISIBLE_DEVICES lets be seen)",
    )
    parser.add_argument("--fresh", action="store_true", help="measure anew what is kept there")
    parser.add_argument(
        "--arch", choices=sorted(ARCHS), help="model this architecture, GPU or not (default without a GPU: sm90)"
    )
    _add_workers(parser)
    parser.set_defaults(command=run.run)


def _add_compile(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile candidates ahead of a run, without a GPU",
        description="Compile what a run would, into Triton's cache. A run that finds the cache (TRITON_CACHE_DIR; copy "
        "it to the machine that has the GPU) and has the same Triton does not compile it again.",
    )
    _add_selection(parser, [form for form in FORMS if form not in PASSES])
    parser.add_argument("--arch", choices=sorted(ARCHS), default="sm90", help="for which GPUs (default: sm90)")
    parser.add_argument(
        "--effort",
        choices=sorted(EFFORTS),
        default="quick",
        help="what a run of that effort is likely to want (default: quick)",
    )
    _add_budget(parser, "stop after this time")
    _add_workers(parser)
    parser.set_defaults(command=precompile.precompile)


def _add_record(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "record",
        help="run a program and write down the shapes that it uses",
        description="Run a program, on a GPU or on the CPU, and write the shapes that it gives the operators to a "
        "file, which `python -m tuning run --workload FILE` tunes. Processes that the program starts are watched too.",
    )
    parser.add_argument("--out", metavar="FILE", default="workloads.yaml", help="default: workloads.yaml")
    parser.add_argument("--append", action="store_true", help="add to the file what is not in it yet")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM", help="the program and its arguments")
    parser.set_defaults(command=record.record)


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "check",
        help="check configuration files, without a GPU",
        description="Check configuration files: schema, kernels' hashes, intervals, each point's figures, and that "
        "every rule compiles with the installed Triton, also with states and packed; tells where registers, spills or "
        "shared memory are no longer what the file says.",
    )
    parser.add_argument("file", nargs="*", metavar="FILE", help="files to check (default: all that imports look for)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiler")
    _add_workers(parser)
    parser.set_defaults(command=check.check)


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "report",
        help="show what was searched, found and spent, as a page and a table",
        description="Write one self-contained HTML page and a Markdown table of what a storage holds: results against "
        "the default and fla, funnel, regret, importance of knobs, tile sizes, cost, rejected candidates.",
    )
    parser.add_argument(
        "--storage",
        metavar="PATH|URL",
        help="what to read (default: RETGEN_STORAGE, or what `run` keeps for this GPU; without a GPU the only one in "
        "the user's cache)",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="of a storage that holds several (default: the last that measured)"
    )
    parser.add_argument(
        "--bench", action="append", default=[], metavar="FILE", help="of `bench --json`, for fla; may be repeated"
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--markdown", default="report.md", metavar="FILE", help="the table (default: report.md)")
    parser.set_defaults(command=report.report)


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="time a sample of the active rules again, on the GPU",
        description="Check and time rules at the points where they were tuned, each beside its default in interleaved "
        "rounds, and name those that are stale: slower than they were or than the default, wrong, or not running. "
        "Ends with 1 if there are any, and with the command that tunes them again.",
    )
    count = parser.add_mutually_exclusive_group()
    count.add_argument(
        "--sample", type=_positive, default=verify.SAMPLE, metavar="N", help=f"how many (default: {verify.SAMPLE})"
    )
    count.add_argument("--all", action="store_true", help="every point of every active rule")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws another sample (default: 0)")
    parser.add_argument("--kernel", metavar="TEXT", help="only kernels whose names hold this text")
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=verify.TOLERANCE,
        metavar="SHARE",
        help=f"slower than when it was tuned is what takes longer by more than this (default: {verify.TOLERANCE})",
    )
    _add_budget(parser, "look at no further rule after this time")
    parser.set_defaults(command=verify.verify)


def _add_simulate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "simulate",
        help="replay samplers over measured landscapes, without a GPU",
        description="Replay ways of searching over landscapes, in which every candidate was measured, and tell how "
        "much slower than the best what they find is. A landscape of fewer candidates than measurements is searched "
        "to its end, which leaves no regret.",
    )
    default = ", ".join(simulate.DEFAULT_SAMPLERS)
    parser.add_argument(
        "--sampler",
        action="append",
        default=[],
        choices=SAMPLERS,
        help=f"may be repeated (default: {default}; gp takes minutes)",
    )
    parser.add_argument(
        "--landscape",
        action="append",
        default=[],
        metavar="NAME",
        help="a file, or a pattern for the shipped ones' names, such as 'chunk_*'; may be repeated (default: all)",
    )
    parser.add_argument("--measurements", type=_positive, default=60, metavar="N", help="of each search (default: 60)")
    parser.add_argument(
        "--seeds", type=_positive, default=5, metavar="N", help="searches of each sampler that chance has a part in"
    )
    parser.add_argument("--each", action="store_true", help="also tell the regret on each landscape")
    parser.add_argument("--plot", metavar="FILE", help="also draw the regret by measurements (.png, .svg or .pdf)")
    parser.add_argument("--json", metavar="FILE", help="also write the curves to this file")
    parser.set_defaults(command=simulate.simulate)


def _add_landscape(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "landscape",
        help="measure every candidate, for simulate to replay",
        description="Measure every candidate of the selected searches on this GPU, and write a file for each.",
    )
    _add_selection(parser, [form for form in FORMS if form not in PASSES])
    _add_budget(parser, "stop after this time: searches that are not complete are not written")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: tuning/landscapes/<gpu>)")
    _add_workers(parser)
    parser.set_defaults(command=landscape.landscape)


def _add_budget(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help=what)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_positive, metavar="N", help="compiling processes (default: one a core)")


def _add_selection(parser: argparse.ArgumentParser, forms: Sequence[str]) -> None:
    names = ", ".join([*builtin(), *groups()])
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{names}, or B=..,T=..,H=..,K=..,V=..[,dtype=..], or a file of them, in YAML or one a line; "
        "may be repeated (default: all)",
    )
    parser.add_argument("--form", action="append", default=[], choices=forms, help="may be repeated (default: all)")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1024")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 10, such as 0.1 for 10 %")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
