"""Cross-compile the kernels with the installed Triton for GPUs that need not be there, and print what each needs.

    python tests/cross_compile.py                         shipped configurations, defaults and variants
    python tests/cross_compile.py --shipped --jobs 8      shipped configurations only, in eight processes
    python tests/cross_compile.py --defaults --arch sm86  defaults only, for one architecture
    python tests/cross_compile.py --defaults --every      defaults at all widths: about ten minutes on two cores

Shipped configurations are those of generated/configs/*.yaml, each for its file's architecture at the point where it was
measured. Defaults are what every form uses where no rule holds; of all combinations of architecture, form, dtype and
widths a part is compiled in which any two values meet. Variants are launches with states, packed sequences and the
like. Ends with status 1 if a kernel does not compile, or needs more than a multiprocessor has. Registers that spill to
memory are printed, and allowed: a measured configuration was fast with them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
import triton

from generated.configuration import packaged_directory
from generated.configuration_file import Rule, parse_file
from generated.retention.fused_chunk import WIDEST_TOGETHER
from tuning.compilation import ARCHS, Resources, offline, resources
from tuning.problems import FAMILY, FORMS, GRADIENTS, HOPPER, PLAIN, STEPS, WITH_STATES, Problem
from tuning.space import knob_values

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = ((1, 1), (64, 64), (80, 80), (128, 128), (256, 512), (512, 256), (512, 512))
# chunk launches its states' pass too, and fused_chunk stands for HOPPER elsewhere than at its sizes.
PUBLIC_FORMS = tuple(form for form in FORMS if form not in ("chunk_states", HOPPER))
SECONDS = 120  # for one launch
TOKENS = 1024  # more than the default segment of chunk
SEQUENCES = 3

# What launches differ in that the kernels are compiled for; the words are those of `launch_options`.
PACKED = (("int32",), ("int64",))
VARIANTS = {
    **dict.fromkeys(PUBLIC_FORMS, PACKED),
    **dict.fromkeys(
        WITH_STATES,
        (
            *PACKED,
            ("initial_state",),
            ("final_state",),
            ("initial_state", "values first", "adjoint"),  # the gradient of k
            ("initial_state", "final_state", "adjoint", "int64"),  # the gradient of v
        ),
    ),
}
STEP = {form: Problem(form, "bfloat16", 1, 1, 1, 16, 16) for form in STEPS}
OF_STEPS = {form: problem.variants(problem.default()) for form, problem in STEP.items()}
VARIANTS |= {form: tuple((name,) for name in found if name != PLAIN) for form, found in OF_STEPS.items()}
OF_CHUNK = (
    ("chunk_size", "int32"),
    ("chunk_size", "int64", "pool"),
    ("initial_state", "int32", "pool"),
    ("pool", "whole"),
)

Outcome = list[tuple[str, Resources]] | str  # the names and needs of a launch's kernels, or why there are none


@dataclass(frozen=True)
class Case:
    """One launch to compile: of a problem, with a configuration or the default, and what the launch has beside it."""

    arch: str
    problem: Problem
    config: Any = None
    variant: tuple[str, ...] = ()

    def __str__(self) -> str:
        p = self.problem
        knobs = knob_values(self.config) if self.config else {}
        words = [f"{name}={value}" for name, value in knobs.items()] or ["default"]
        return f"{self.arch:5} {p.form:23} {p.dtype:8} K={p.K:<3} V={p.V:<3} {' '.join((*words, *self.variant))}"


# What to compile


def shipped_cases() -> list[Case]:
    """The shipped rules as cases, each combination once."""
    cases = []
    for path in sorted(packaged_directory().glob("*.yaml")):
        if path.name.endswith(".modelled.yaml"):
            continue
        file = parse_file(path)
        for kernel, entry in file.kernels.items():
            form = kernel.removeprefix(f"{FAMILY}_")
            if form in FORMS:
                cases += [_rule_case(file.device.arch, form, rule) for rule in entry.rules]
    return list(dict.fromkeys(cases))


def _rule_case(arch: str, form: str, rule: Rule) -> Case:
    config = FORMS[form].config_type(**rule.use)
    shape = {axis: getattr(rule.when, axis)[1] for axis in ("K", "V", "T")}
    shape |= {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", str(rule.figures.get("point", "")))}
    tokens = shape["T"] if form in STEPS else TOKENS
    problem = Problem(form, rule.when.dtype, B=1, T=tokens, H=2, K=shape["K"], V=shape["V"])
    if form == "chunk":  # all that the number of tokens decides is whether there are states to store
        problem = replace(problem, T=config.L + (shape["T"] > config.L))
    return Case(arch, problem, config)


def default_cases(*, every: bool = False) -> list[Case]:
    """The defaults at every combination, or at a seventh of them, in which any two values meet."""
    return [
        Case(arch, Problem(form, dtype, B=1, T=_tokens(form), H=1, K=K, V=V))
        for i, arch in enumerate(ARCHS)
        for j, form in enumerate(PUBLIC_FORMS)
        for n, dtype in enumerate(DTYPES)
        for m, (K, V) in enumerate(WIDTHS)
        if (form != GRADIENTS or K == V <= WIDEST_TOGETHER) and (every or (m - i - 2 * j - 3 * n) % len(WIDTHS) == 0)
    ]


def _tokens(form: str) -> int:
    return 1 if form in STEPS else TOKENS


def variant_cases() -> list[Case]:
    """The variants of every form's launch at one width, the architectures and dtypes in turn; and HOPPER's."""
    archs = list(ARCHS)
    wholes = [Problem(HOPPER, *of, 512) for of in (("bfloat16", 1, TOKENS, 1, 256), ("float16", 1, TOKENS, 1, 512))]
    hopper = [(problem, variant) for problem in wholes for variant in ((), ("reverse",), *PACKED)]
    hopper += [(replace(problem, T=TOKENS + 1), ()) for problem in wholes]
    hopper += [(Problem(HOPPER, "float16", 1, TOKENS, 2, 428, 260), variant) for variant in ((), PACKED[1])]
    cases = [Case("sm90", problem, problem.default(), variant) for problem, variant in hopper]
    in_segments = [(problem, replace(problem.default(), L=256)) for problem in wholes]
    cases += [Case("sm90", *one, variant) for one in in_segments for variant in ((), PACKED[0])]
    return cases + [
        Case(archs[(i + j) % len(archs)], Problem(form, DTYPES[i % 3], 1, _tokens(form), 1, 64, 64), None, variant)
        for j, form in enumerate(PUBLIC_FORMS)
        for i, variant in enumerate((*VARIANTS[form], *(OF_CHUNK if form == "chunk" else ())))
    ]


# Compiling, in a process of its own


def compile_case(case: Case) -> Outcome:
    """Compile the kernels of a launch. A warning counts as a failure."""
    signal.alarm(SECONDS)  # ends the process: the compiler would not come back to Python for less
    try:
        with warnings.catch_warnings(), offline(ARCHS[case.arch].target) as compiled:
            warnings.simplefilter("error")
            case.problem.run(case.problem.inputs("meta"), case.config, **launch_options(case))
        return [(kernel.metadata.name, resources(kernel)) for kernel in compiled]
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way, and not every error can be pickled
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def launch_options(case: Case) -> dict[str, Any]:
    """The arguments of a sweep that a case's variant names."""
    problem, words = case.problem, case.variant
    if problem.form in STEPS:
        return {name: value for word in words for name, value in OF_STEPS[problem.form][word].items()}
    rows = SEQUENCES if {"int32", "int64"} & {*words} else problem.B
    shape = (rows, problem.H, problem.K, problem.V)
    state = torch.empty(shape, device="meta")
    if "values first" in words:
        state = torch.empty((*shape[:2], problem.V, problem.K), device="meta").mT
    options: dict[str, Any] = {name: state for name in ("initial_state", "final_state") if name in words}
    offsets = (torch.empty(SEQUENCES + 1, device="meta", dtype=getattr(torch, w)) for w in words if w.startswith("int"))
    options |= {"cu_seqlens": next(offsets, None), "adjoint": "adjoint" in words, "reverse": "reverse" in words}
    if "pool" in words:
        pool = torch.empty((SEQUENCES, 2, *shape[1:]), dtype=getattr(torch, problem.dtype), device="meta")
        options |= {"final_state": pool[:, 0], "state_indices": torch.empty(rows, device="meta").long()}
    sizes = [size for word, size in (("chunk_size", 16), ("whole", TOKENS)) if word in words]
    return options | ({"chunk_size": sizes[0]} if sizes else {})


def compile_all(cases: Sequence[Case], jobs: int) -> Iterator[Outcome]:
    """The outcome of each case in turn; a number of processes compile at once."""
    workers: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
    for _ in range(jobs):
        workers.put(_worker())

    def outcome(case: Case) -> Outcome:
        worker = workers.get()
        try:
            return worker.submit(compile_case, case).result()
        except BrokenProcessPool:
            worker = _worker()
            return f"the compiler took its process down, or more than {SECONDS} s"
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(outcome, cases)
    for _ in range(jobs):
        workers.get().shutdown()


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


# The command line


def report(case: Case, outcome: Outcome) -> bool:
    """Print a line for each kernel of a case; return whether all is well."""
    if isinstance(outcome, str):
        reason = "\n".join(f"    {line}" for line in outcome.strip().splitlines()[-20:])
        print(f"{case}: FAILED\n{reason}", flush=True)
        return False
    for name, needs in outcome:
        verdict = "fits" if needs.fits(ARCHS[case.arch]) else "DOES NOT FIT"
        figures = f"{needs.registers:3} registers, {needs.spills:5} spilled, {needs.shared:6} shared"
        columns = f", {needs.tensor_memory} columns" if needs.tensor_memory else ""
        print(f"{case}: {name}: {figures}{columns}: {verdict}", flush=True)
    return all(needs.fits(ARCHS[case.arch]) for _, needs in outcome)


def selected_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    everything = not (options.shipped or options.defaults or options.variants)
    cases = shipped_cases() if options.shipped or everything else []
    cases += default_cases(every=options.every) if options.defaults or everything else []
    cases += variant_cases() if options.variants or everything else []
    return [case for case in cases if not options.arch or case.arch in options.arch]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, metavar="smNN", help=f"only these of {', '.join(ARCHS)}")
    parser.add_argument("--shipped", action="store_true", help="the shipped configurations")
    parser.add_argument("--defaults", action="store_true", help="the defaults")
    parser.add_argument("--variants", action="store_true", help="launches with states, packed sequences and the like")
    parser.add_argument("--every", action="store_true", help="the defaults at every combination")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the command line asks for; return the exit status."""
    options = parse(argv)
    cases, started = selected_cases(options), time.monotonic()
    outcomes = compile_all(cases, max(1, options.jobs))
    well = [report(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)]
    seconds = time.monotonic() - started
    print(f"Triton {triton.__version__}: {len(cases)} launches, {well.count(False)} failed, in {seconds:.0f} s")
    return int(not cases or not all(well))


if __name__ == "__main__":
    sys.exit(main())
