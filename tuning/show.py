"""`python -m tuning show`: the rules that hold on this machine, and where each came from."""

from __future__ import annotations

import argparse
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated import configuration
from tuning.measurement import describe_gpu, gpu_present


def show(options: argparse.Namespace, console: Console) -> int:
    """Print the rules in the order in which they are tried."""
    gpu = describe_gpu() if not options.arch and gpu_present() else None
    device = (gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs) if gpu else (None, options.arch or "sm90", None, None)
    console.print(escape(f"{device[0] or 'no GPU: rules for an unnamed one of architecture'} {device[1]}"))
    for directory in configuration.config_directories():
        console.print(escape(f"looking in {directory}"))
    rules = configuration.active_rules(*device)
    found = [rule for rule in rules if (options.kernel or "") in rule.kernel]
    table = Table("kernel", "when", "use", "proof", "ms", "file", "status")
    for rule in found:
        when = f"{rule.when.dtype} " + " ".join(f"{axis}={getattr(rule.when, axis)}" for axis in ("K", "V", "BH", "T"))
        use = " ".join(f"{knob}={value}" for knob, value in rule.use.items())
        table.add_row(
            rule.kernel, when, use, rule.proof, str(rule.figures.get("ms", "")), rule.path.name, escape(rule.status)
        )
    console.print(table)
    files = sorted({rule.path for rule in found})
    console.print(escape(f"{len(found)} rules from {', '.join(map(str, files)) or 'no file'}"))
    for path in files:
        if (triton := configuration.parse_file(path).software.get("triton")) not in (None, version("triton")):
            console.print(
                escape(
                    f"{path.name} is of Triton {triton}, and {version('triton')} is installed: `python -m tuning check "
                    f"{path}` says what it compiles differently, `python -m tuning verify` whether it is as fast"
                ),
                soft_wrap=True,
            )
    if not any(rule.status == "active" for rule in rules):
        model = "" if gpu else f" --arch {device[1]}"
        console.print(f"every kernel runs its default here: tune with `python -m tuning run{model}`")
    console.print("float16 goes by bfloat16's rules too; any other shape uses the default")
    return 0
