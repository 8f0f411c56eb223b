"""The kernels compile, without a GPU, for every architecture that is supported, and fit there.

What is compiled, and how, is in cross_compile.py; scripts of other Triton versions run it too.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cross_compile
import pytest
import torch
import triton_versions
import yaml
from cross_compile import Case, Problem

from generated import configuration
from generated.launch import padded
from generated.retention import step, step_buffered
from tuning.compilation import ARCHS, offline, resources
from tuning.problems import FORM_KERNEL, FORMS, GRADIENTS, GRADIENTS_FORM_KERNEL, HOPPER
from tuning.problems import STEPS as STEP_FORMS

SCRIPT = Path(cross_compile.__file__)
SHIPPED = [path for path in configuration.packaged_directory().glob("*.yaml") if ".modelled" not in path.name]
HALVES = (torch.float16, torch.bfloat16)
SMALL = Problem("fused_recurrent", "float16", B=1, T=1, H=1, K=16, V=16)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="there is nothing to compile under the interpreter"
)


def run_script(*arguments: str) -> str:
    """Run cross_compile.py in a process of its own; fail with what failed unless it succeeds."""
    command = [sys.executable, str(SCRIPT), *arguments, "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.endswith(": fits")]
    assert done.returncode == 0, "\n".join([*lines[-100:], done.stderr[-5000:]])
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shipped", "defaults", "variants"])
def test_every_kernel_compiles_and_fits(what: str) -> None:
    assert run_script(f"--{what}").count(": fits") > 0


# What is compiled


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_rules_are_for_these_kernels(path: Path) -> None:
    kernels = configuration.parse_file(path).kernels
    assert {kernel: configuration.kernel_problem(kernel, entry) for kernel, entry in kernels.items()} == dict.fromkeys(
        kernels
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_rule_is_compiled(path: Path) -> None:
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    types = {kernel: entry.config_type for kernel, entry in configuration.kernel_registry().items()}
    wanted = {
        (kernel, file["device"]["arch"], rule["when"]["dtype"], types[kernel](**rule["use"]))
        for kernel, entry in file["kernels"].items()
        for rule in entry["rules"]
        if kernel not in (FORM_KERNEL, GRADIENTS_FORM_KERNEL)  # which name a form, and are no kernels
    }
    compiled = {
        (case.problem.kernel, case.arch, case.problem.dtype, case.config) for case in cross_compile.shipped_cases()
    }
    assert wanted <= compiled


def test_shipped_rules_are_compiled_inside_their_intervals() -> None:
    rules = [
        (kernel, rule)
        for path in SHIPPED
        for kernel, entry in configuration.parse_file(path).kernels.items()
        for rule in entry.rules
    ]
    for case in cross_compile.shipped_cases():
        p = case.problem
        config_type = type(case.config)
        used = [rule.when for kernel, rule in rules if kernel == p.kernel and config_type(**rule.use) == case.config]
        assert any(when.K[0] <= p.K <= when.K[1] and when.V[0] <= p.V <= when.V[1] for when in used), str(case)


def values_of(case: Case) -> tuple[object, ...]:
    """Where a case lies on the axes of the defaults."""
    p = case.problem
    return case.arch, p.form, p.dtype, (p.K, p.V)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(range(4), 2)))
def test_any_two_values_meet_in_the_defaults_that_are_compiled(first: int, second: int) -> None:
    def pairs(cases: list[Case]) -> set[tuple[object, object]]:
        return {(values_of(case)[first], values_of(case)[second]) for case in cases}

    assert pairs(cross_compile.default_cases()) == pairs(cross_compile.default_cases(every=True))


def test_every_combination_is_each_architecture_form_dtype_and_width() -> None:
    axes = [set(axis) for axis in zip(*map(values_of, cross_compile.default_cases(every=True)), strict=True)]
    widths = {(1, 1), (64, 64), (80, 80), (128, 128), (256, 512), (512, 256), (512, 512)}
    assert axes == [set(ARCHS), {*FORMS} - {"chunk_states", HOPPER}, {"bfloat16", "float16", "float32"}, widths]


@pytest.mark.parametrize("form", sorted({*FORMS} - {"chunk_states", HOPPER}))
def test_every_form_is_compiled_with_packed_sequences_or_as_steps_are_launched(form: str) -> None:
    words = {word for case in cross_compile.variant_cases() if case.problem.form == form for word in case.variant}
    if form in STEP_FORMS:
        if STEP_FORMS[form].is_buffered:
            assert words == {"in rows", "slots of 32 bits"}
        else:
            assert words == {"grouped", "kept", "grouped, kept", "in rows", "slots of 32 bits"}
        return
    states = {"initial_state", "final_state", "adjoint"}
    assert words >= {"int32", "int64"}
    assert words & states == (set() if form in ("parallel", GRADIENTS) else states)


# How it is compiled


class Fatal(Problem):
    """A launch that takes its process down, as compilers do."""

    def run(self, *args: Any, **options: Any) -> Any:
        os._exit(3)


def test_what_fails_or_does_not_fit_is_named_and_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, wide = FORMS["fused_chunk"].config_type, FORMS["parallel"].config_type
    cases = [
        Case("sm90", Problem("fused_chunk", "float16", 1, 1, 1, 16, 16), small(BT=8, BV=16, num_warps=4, num_stages=1)),
        Case("sm90", Fatal(**vars(SMALL))),
        Case("sm86", Problem("parallel", "float16", 1, 1, 1, 256, 16), wide(128, 128, 64, 4, 2)),
        Case("sm90", SMALL),
    ]
    monkeypatch.setattr(cross_compile, "selected_cases", lambda options: cases)
    assert cross_compile.main(["--jobs", "1"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("    ")]
    assert [line.rpartition(": ")[2] for line in lines[:4]] == ["FAILED", "FAILED", "DOES NOT FIT", "fits"]
    assert "4 launches, 3 failed" in lines[4]


def test_what_needs_too_much_tensor_memory_does_not_fit() -> None:
    def needs(columns: int) -> cross_compile.Resources:
        return cross_compile.Resources(registers=64, spills=0, shared=0, warps=4, tensor_memory=columns)

    assert needs(512).fits(ARCHS["sm100"])
    assert not needs(513).fits(ARCHS["sm100"])
    assert needs(513).blocks_per_sm(ARCHS["sm100"]) == 0


@pytest.mark.parametrize("form", sorted({*FORMS} - {HOPPER}))  # which runs no tensors of the CPU
def test_a_launch_of_tensors_uses_what_a_launch_of_shapes_compiled(form: str) -> None:
    with offline(ARCHS["sm90"].target) as compiled:
        sizes = ((1, 16), (1, 1)) if form.startswith("step") else ((2048, 16), (1333, 1))
        shapes, tensors = (Problem(form, "float16", 1, T, H, 16, 16) for T, H in sizes)
        shapes.run(shapes.inputs("meta"), shapes.default())
        tensors.run(tensors.inputs("cpu"), tensors.default())
    first, second = compiled[: len(compiled) // 2], compiled[len(compiled) // 2 :]
    assert [kernel.hash for kernel in first] == [kernel.hash for kernel in second]
    assert len(first) == {"chunk": 3, "chunk_states": 2}.get(form, 1)


def compile_groups(form: str, *heads: tuple[int, int], variant: tuple[str, ...] = ()) -> list[Any]:
    """The kernels of a form's sweeps with these heads of q, and of k and v."""
    with offline(ARCHS["sm90"].target) as compiled:
        for of_q, of_k in heads:
            problem = Problem(form, "bfloat16", 1, 2048, min(of_q, of_k), 64, 64)
            *_, rates = problem.inputs("meta")
            q, k = (torch.empty(1, 2048, H, 64, device="meta", dtype=torch.bfloat16) for H in (of_q, of_k))
            given = cross_compile.launch_options(Case("sm90", problem, None, variant))
            problem.run((q, k, k, rates), problem.default(), **given)
    return compiled


@pytest.mark.parametrize("form", ["chunk", "fused_chunk", "fused_recurrent", "parallel"])
def test_groups_of_any_size_have_one_kernel_for_each_side(form: str) -> None:
    kernels = [kernel.hash for kernel in compile_groups(form, (2, 1), (6, 2), (32, 2), (1, 2), (2, 6), (2, 32))]
    count = len(kernels) // 6
    assert kernels[:count] == kernels[count : 2 * count] == kernels[2 * count : 3 * count]
    assert kernels[3 * count : 4 * count] == kernels[4 * count : 5 * count] == kernels[5 * count :]


@pytest.mark.parametrize("form", ["chunk", "fused_chunk", "fused_recurrent", "parallel"])
@pytest.mark.parametrize("states", [False, True])
def test_groups_need_no_more_than_single_heads(form: str, states: bool) -> None:
    if states and form == "parallel":
        pytest.skip("it has no states")
    variant = ("initial_state", "final_state", "adjoint") if states else ()
    single, shared, summed = (
        [resources(kernel) for kernel in compile_groups(form, heads, variant=variant)]
        for heads in ((3, 3), (6, 3), (3, 6))
    )
    for grouped in (shared, summed):
        for one, other in zip(single, grouped, strict=True):
            assert (other.spills, other.shared) == (one.spills, one.shared)
            assert 2 * other.registers * 32 * other.warps <= 65536  # two programs have room


@pytest.mark.parametrize("arch", ARCHS)
def test_the_scan_of_states_reads_a_segment_before_it_writes_there(arch: str) -> None:
    problem = Problem("chunk_states", "bfloat16", 1, 2048, 2, 128, 128)
    with offline(ARCHS[arch].target) as compiled:
        problem.run(problem.inputs("meta"), problem.default())
    loop = compiled[-1].asm["ttgir"].partition("scf.for")[2]
    waits, loads, stores = (loop.index(name) for name in ("ttg.async_wait", "ttg.local_load", "tt.store"))
    assert waits < loads < stores


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_once() -> tuple[Any, dict[str, int]]:
        outcome = list(cross_compile.compile_all([Case("sm90", SMALL)], jobs=1))
        return outcome, {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}

    first, second = compile_once(), compile_once()
    assert len(first[1]) == 1
    assert first == second


def test_other_versions_compile_with_their_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(triton_versions, "environment", lambda version, cache: asked.append(version) or sys.executable)
    assert triton_versions.main(["3.6.0", "newest", "--", "--help"]) == 0
    assert triton_versions.main(["3.6.0", "--", "--unknown"]) == 1
    assert asked == ["3.6.0", "newest", "3.6.0"]


# The step: what more than to fit is asked of its defaults

STEPS = [  # dtypes of inputs, indices and states, and whether states are kept after each token
    (torch.bfloat16, torch.int32, torch.float32, True),
    (torch.float32, torch.int64, torch.float32, False),
    *((torch.bfloat16, torch.int32, half, kept) for half in HALVES for kept in (False, True)),
]


def compile_step(arch: str, B: int, K: int, V: int, *kind: Any, G: int = 1, T: int = 1) -> tuple[Any, step.StepConfig]:
    """The kernel for 8 heads, each of G queries, with its default; states of 16 bits are rounded stochastically."""
    dtype, indices, stored, kept = kind
    empty = functools.partial(torch.empty, device="meta")
    k, v = (empty(B, T, 8, width, dtype=dtype) for width in (K, V))
    q, o = (empty(B, T, 8 * G, width, dtype=dtype) for width in (K, V))
    states = empty(B, T, 8, K, V, dtype=stored)
    seed = empty(1, dtype=torch.int64) if stored in HALVES else None
    last = (empty(B, dtype=indices), seed, states if kept else None, o)
    config = step.config_for(q, k, v, states[:, 0], seed, last[2])
    with offline(ARCHS[arch].target) as compiled:
        step.step_update(q, k, v, empty(8), None, states[:, 0], *last, config)
    (kernel,) = compiled
    return kernel, config


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("K", "V"), [(1, 1), (80, 80), (128, 128), (256, 512), (512, 512)])
def test_the_step_compiles_and_fits(arch: str, K: int, V: int) -> None:
    for kind in STEPS:
        kernel, _ = compile_step(arch, 128, K, V, *kind)
        needs = resources(kernel)
        assert needs.fits(ARCHS[arch])
        assert needs.spills <= 64


@pytest.mark.parametrize("B", [1, 128])
@pytest.mark.parametrize(("K", "V"), [(80, 80), (128, 128), (256, 512), (512, 512)])
def test_on_hopper_the_steps_state_goes_from_memory_to_registers_and_back(B: int, K: int, V: int) -> None:
    """By 16 bytes, without spills, not through shared memory, also with random bits; and two programs have room."""
    for *kind, kept in STEPS:
        kernel, config = compile_step("sm90", B, K, V, *kind, kept)
        needs, tile = resources(kernel), padded(K) * config.BV * kind[2].itemsize
        assert needs.spills == 0
        assert needs.shared <= tile // 8
        assert needs.registers * 32 * config.num_warps <= (65536 if kept else 65536 // 2)
        for access in ("ld.global.v4.b32", "st.global.v4.b32"):
            assert kernel.asm["ptx"].count(access) >= tile // 16 // (32 * config.num_warps)


@pytest.mark.parametrize(("B", "G"), [(1, 3), (1, 16), (64, 3), (64, 8), (64, 64)])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (256, 512), (512, 512)])
def test_on_hopper_a_groups_queries_are_served_from_registers(K: int, V: int, B: int, G: int) -> None:
    """One row is under way, a program has room, the state is read and written once, and at most eight bytes spill."""
    for *kind, kept in STEPS:
        if step.goes_by_in_pieces(G, V, 8 * B, kind[2].itemsize, are_kept=kept):
            continue
        kernel, config = compile_step("sm90", B, K, V, *kind, kept, G=G)
        alone, _ = compile_step("sm90", B, K, V, *kind, kept)
        needs = resources(kernel)
        assert needs.spills <= (8 if K == 512 and kept else 0)
        assert needs.registers * 32 * config.num_warps <= 65536
        # 1.3 times or fewer but for the widest states kept in float32
        assert needs.registers <= 2 * resources(alone).registers
        for access in ("ld.global.v4.b32", "st.global.v4.b32"):
            assert kernel.asm["ptx"].count(access) == alone.asm["ptx"].count(access)


# Steps whose last tokens lie in buffers, by their default too


def compile_buffered(
    arch: str, B: int, K: int, V: int, dtype: torch.dtype, stored: torch.dtype, G: int = 1, T: int = 1
) -> tuple[Any, step.StepConfig]:
    """The kernel for 8 heads, each of G queries, and 16 buffered tokens; 16 bits are rounded stochastically."""
    empty = functools.partial(torch.empty, device="meta")
    k, v = (empty(B, T, 8, width, dtype=dtype) for width in (K, V))
    q, o = (empty(B, T, 8 * G, width, dtype=dtype) for width in (K, V))
    buffers = (empty(B, 32, 8, width, dtype=dtype) for width in (K, V))
    counts, seed = [empty(B, dtype=torch.int32)] * 3, empty(1, dtype=torch.int64) if stored in HALVES else None
    config = step_buffered.default_config(dtype, K, V, 8 * B, T, stored.itemsize, G)
    with offline(ARCHS[arch].target) as compiled:
        state = empty(B, 8, K, V, dtype=stored)
        step_buffered.step_buffered_update(q, k, v, empty(8), None, state, *buffers, *counts, seed, o, config)
    (kernel,) = compiled
    return kernel, config


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("B", "K", "V"),
    [(128, 1, 1), (128, 80, 80), (128, 128, 128), (1, 128, 128), (128, 256, 512), (128, 512, 512), (1, 512, 64)],
)
def test_the_buffered_step_compiles_and_fits(arch: str, B: int, K: int, V: int) -> None:
    for dtype, stored in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
    ):
        needs = resources(compile_buffered(arch, B, K, V, dtype, stored)[0])
        assert needs.fits(ARCHS[arch])
        assert needs.spills <= 64


@pytest.mark.parametrize("B", [1, 64, 256])
@pytest.mark.parametrize(("K", "V"), [(80, 80), (128, 128), (256, 512), (512, 512)])
def test_on_hopper_the_buffered_steps_state_is_asked_for_ahead(B: int, K: int, V: int) -> None:
    """By 16 bytes, of one output piece by piece, without spills, and four programs have room."""
    for stored in (torch.float32, torch.bfloat16):
        kernel, config = compile_buffered("sm90", B, K, V, torch.bfloat16, stored)
        needs = resources(kernel)
        assert needs.spills == 0
        assert needs.blocks_per_sm(ARCHS["sm90"]) >= 4
        copies = kernel.asm["ttgir"].count("async_copy_global_to_local %p_f")
        _, stages = step_buffered.pieces(K, config.BV, stored.itemsize)
        assert copies == 2 * stages  # in two loops, ahead and within


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("K", "V"), [(80, 80), (256, 512)])
@pytest.mark.parametrize(
    ("B", "T", "G"), [(1, 1, 32), (1, 16, 8), (64, 1, 8), (64, 1, 64), (64, 3, 2), (64, 8, 1), (64, 16, 8)]
)
def test_many_outputs_find_room_beside_pieces_of_the_state(arch: str, K: int, V: int, B: int, T: int, G: int) -> None:
    """Pieces are asked for ahead, and products are of float32 but for those of buffered tokens, in three parts.

    Queries of float32 and many outputs take more registers than there are, more than 64 on sm100 far more (a limit);
    on Hopper three programs of few have room.
    """
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        plain, _ = compile_step(arch, B, K, V, dtype, torch.int32, stored, False, G=G, T=T)
        buffered, _ = compile_buffered(arch, B, K, V, dtype, stored, G, T)
        for kernel in (plain, buffered):
            needs = resources(kernel)
            assert needs.fits(ARCHS[arch])
            most = 256 if T == 1 else 288 if T * G <= 8 and dtype == torch.bfloat16 else 848
            assert needs.spills <= most or (arch == "sm100" and T * G > 64)
            assert arch != "sm90" or needs.blocks_per_sm(ARCHS[arch]) >= (3 if T * G <= 8 else 1)
            assert kernel.asm["ttgir"].count("async_copy_global_to_local") > 0
        assert plain.asm["ttir"].count("inputPrecision") == 0
        assert (
            buffered.asm["ttir"].count("inputPrecision") == buffered.asm["ttir"].count("inputPrecision = tf32x3") == 1
        )


@pytest.mark.parametrize(("T", "G"), [(2, 1), (4, 1), (8, 1), (16, 1), (1, 8)])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (256, 512)])
def test_on_hopper_few_programs_of_several_outputs_spill_a_few_numbers_at_most(K: int, V: int, T: int, G: int) -> None:
    for stored in (torch.float32, torch.bfloat16):
        kernel, _ = compile_buffered("sm90", 1, K, V, torch.bfloat16, stored, G, T)
        assert resources(kernel).spills <= 64


@pytest.mark.parametrize(("K", "V"), [(128, 128), (256, 512), (512, 512)])
def test_on_hopper_a_flush_fits(K: int, V: int) -> None:
    needs = resources(compile_buffered("sm90", 64, K, V, torch.bfloat16, torch.float32, T=0)[0])
    assert needs.spills == 0
    assert needs.blocks_per_sm(ARCHS["sm90"]) >= 4


# Lanes that hold copies of one sum, of which the hardware stores any


def fused_with_another_lanes(ptx: str) -> list[str]:
    """Multiply-adds to what another lane has sent: of two that add each other's product, each rounds the other's."""
    sent: dict[str, bool] = {}
    found = []
    for operation, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)\s+(.*);", ptx, re.MULTILINE):
        registers = re.findall(r"%\w+", operands)
        if operation.startswith("fma") and sent.get(registers[-1]):
            found.append(f"{operation} {operands}")
        if registers:
            is_copy = operation == "mov.b32" and sent.get(registers[-1], False)
            sent[registers[0]] = operation.startswith("shfl") or is_copy
    return found


def test_a_product_that_is_added_to_another_lanes_is_found() -> None:
    lines = ["shfl.sync.bfly.b32 \t%r5, %r4, 1, 31, -1;", "mov.b32 \t%r6, %r5;", "fma.rn.f32 \t%r7, %r1, %r2, %r6;"]
    assert len(fused_with_another_lanes("\n\t".join(lines))) == 1
    assert fused_with_another_lanes("\n\t".join([*lines[:2], "add.f32 \t%r6, %r6, %r3;", lines[2]])) == []


@pytest.mark.parametrize("form", ["step", "step_buffered", "step_buffered_bf16_seed"])
@pytest.mark.parametrize(("K", "BV", "num_warps"), [(24, 8, 8), (24, 16, 4), (256, 16, 4), (256, 64, 8), (256, 128, 8)])
def test_on_hopper_copies_of_a_steps_sum_are_the_same_bits(form: str, K: int, BV: int, num_warps: int) -> None:
    problem = Problem(form, "bfloat16", B=4, T=1, H=4, K=K, V=72)
    with offline(ARCHS["sm90"].target) as compiled:
        problem.run(problem.inputs("meta"), step.StepConfig(BV=BV, num_warps=num_warps))
    (kernel,) = compiled
    assert "shfl.sync" in kernel.asm["ptx"]
    assert fused_with_another_lanes(kernel.asm["ptx"]) == []
