"""Command line of the generator: `python -m gen build`, `list` and `show`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gen.build import Drift, compare, default_output, describe, write
from gen.errors import GenError, UsageError
from gen.family import FAMILIES, FORMS, KNOWN_FAMILIES, Family
from gen.render import Emission, emissions, find_templates, render, render_all

_EXAMPLES = """\
examples:
  python -m gen build                      rebuild generated/ after a change of a template
  python -m gen build --check              fail, with a diff, if generated/ is not what the templates give
  python -m gen build --family linear_attention --out /tmp/linear
                                           build another family, runtime files included, somewhere else
  python -m gen list                       which template gives which file
  python -m gen show fused_chunk           print the emitted module of one form
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 drift or a template's fault, 2 a wrong argument."""
    _write_utf8()
    options = _parser().parse_args(argv)
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except GenError as error:
        print(f"gen: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # `gen show chunk | head` is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"gen: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gen",
        description="Render the templates into plain Triton modules.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = _command(commands, "build", _build, "write the generated files that differ, remove stale ones")
    build.add_argument("--check", action="store_true", help="write nothing; exit 1 with a diff if anything differs")
    build.add_argument("--out", type=Path, metavar="DIR", help="output directory (default: generated, beside gen)")
    _command(commands, "list", _list, "list the files that are emitted, their templates and decay kinds")
    show = _command(commands, "show", _show, "print the emitted module of one form")
    show.add_argument("form", metavar="FORM", help=f"one of {', '.join(FORMS)}, or another module of the family")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [family.name for family in KNOWN_FAMILIES]
    parser.add_argument(
        "--family", choices=names, metavar="NAME", help=f"{' or '.join(names)} (default: what is shipped)"
    )
    parser.add_argument("--templates", type=Path, metavar="DIR", help="another template directory")
    parser.set_defaults(command=run)
    return parser


def _build(options: argparse.Namespace) -> int:
    families = _families(options)
    if options.out is None and families != FAMILIES:
        raise UsageError(f"--family {options.family} is not what {default_output()} holds; name a directory with --out")
    out = (options.out or default_output()).resolve()
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {options.out}: is a file, not a directory")
    files = render_all(_templates(options), families)
    drift = compare(out, files)
    if options.check:
        return _report_check(options, out, files, drift)
    write(out, files, drift)
    for verb, names in (("wrote", (*drift.missing, *drift.changed)), ("removed", drift.stale)):
        for name in sorted(names):
            print(f"{verb} {out / name}")
    print(f"{out}: {len(files)} files, {'built' if drift else 'nothing to do'}")
    return 0


def _report_check(options: argparse.Namespace, out: Path, files: Mapping[str, str], drift: Drift) -> int:
    if not drift:
        print(f"{out}: {len(files)} files, all as the templates give them")
        return 0
    arguments = [
        f"--{name} {getattr(options, name)}" for name in ("out", "family", "templates") if getattr(options, name)
    ]
    print(describe(out, files, drift, " ".join(["python -m gen build", *arguments])), end="")
    return 1


def _list(options: argparse.Namespace) -> int:
    rows = [("OUTPUT", "TEMPLATE", "DECAY", "FORM")]
    for emission in emissions(_templates(options), _families(options)):
        form = emission.form if emission.family and emission.form in FORMS else "-"
        rows.append((emission.output, emission.template, emission.decay or "-", form))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    root, families = _templates(options), _families(options)
    modules = {file.form: file for file in emissions(root, families) if file.family == families[0]}
    if options.form not in modules:
        raise UsageError(f"show: no form {options.form!r}; {_choices(modules)}")
    print(render(root, modules[options.form], families), end="")
    return 0


def _choices(modules: Mapping[str, Emission]) -> str:
    forms = [form for form in FORMS if form in modules]
    others = [name for name in modules if name not in FORMS]
    return f"the forms are {', '.join(forms) or 'none'}" + (f"; other modules: {', '.join(others)}" if others else "")


def _families(options: argparse.Namespace) -> tuple[Family, ...]:
    return tuple(family for family in KNOWN_FAMILIES if family.name == options.family) or FAMILIES


def _templates(options: argparse.Namespace) -> Path:
    return (options.templates or find_templates()).resolve()


def _write_utf8() -> None:
    """Print the same bytes in every locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
