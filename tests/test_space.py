"""The search space: what is enumerated, what is sifted out, and what the table says of each knob."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import triton

from generated.known_bad import known_bad
from generated.retention import auto, chunk
from generated.retention.chunk import WHOLE
from tuning import landscape
from tuning.compilation import ARCHS, Resources, compile_launch, offline, read_cubin
from tuning.problems import FORMS, HOPPER, Problem
from tuning.space import BT, GRADIENTS, SLACK, SPACES, SWEEPS, L, Place, Sifted, knob_values, launched

SM90 = ARCHS["sm90"]
PROBLEM = Problem("fused_chunk", "bfloat16", 1, 2048, 4, 128, 256)
LOW = 64  # a limit on registers below what kernels take, and above the 58 that a product of Hopper's must have

# How many candidates there were, and a hash of their knobs, before spaces were tables and had maxnreg; for chunk
# without the segment lengths that are no shorter than T but one, which are all the same launch. Where there were
# none (chunk_states and parallel at T=16), what there is since; and at T=2048 without those that exceed sm90's shared
# memory, since that is known before compiling; float32 with those that an estimate had left out.
BEFORE = {
    "fused_chunk bfloat16 T=2048 K=128 V=256 sm90": (82, "cd386985e1cd6161"),
    "fused_chunk bfloat16 T=2048 K=256 V=512 sm90": (57, "06cfb34ee5e67087"),
    "fused_chunk float32 T=1024 K=64 V=64 sm89": (70, "ee06b460475a08f3"),
    "fused_chunk bfloat16 T=100 K=40 V=24 sm80": (48, "a6e4673dcc700961"),
    "fused_chunk float16 T=16 K=512 V=512 sm100": (15, "6637ff02bb73c179"),
    "fused_chunk_gradients bfloat16 T=2048 K=128 V=256 sm90": (82, "cd386985e1cd6161"),
    "fused_chunk_gradients bfloat16 T=2048 K=256 V=512 sm90": (57, "06cfb34ee5e67087"),
    "fused_chunk_gradients float32 T=1024 K=64 V=64 sm89": (70, "ee06b460475a08f3"),
    "fused_chunk_gradients bfloat16 T=100 K=40 V=24 sm80": (48, "a6e4673dcc700961"),
    "fused_chunk_gradients float16 T=16 K=512 V=512 sm100": (15, "6637ff02bb73c179"),
    "chunk_states bfloat16 T=2048 K=128 V=256 sm90": (189, "1133d76ef2642a9e"),
    "chunk_states bfloat16 T=2048 K=256 V=512 sm90": (189, "1133d76ef2642a9e"),
    "chunk_states float32 T=1024 K=64 V=64 sm89": (108, "2a2ae685899bead3"),
    "chunk_states bfloat16 T=100 K=40 V=24 sm80": (72, "f209fb6a3334034b"),
    "chunk_states float16 T=16 K=512 V=512 sm100": (72, "fd2c465b48e57e8b"),
    "chunk bfloat16 T=2048 K=128 V=256 sm90": (410, "c995d12a7e647823"),
    "chunk bfloat16 T=2048 K=256 V=512 sm90": (285, "0838321c323bf369"),
    "chunk float32 T=1024 K=64 V=64 sm89": (280, "b78870833706cc72"),
    "chunk bfloat16 T=100 K=40 V=24 sm80": (48, "b23af7c5aebd3914"),
    "chunk float16 T=16 K=512 V=512 sm100": (15, "d5f48122fd5d252c"),
    "parallel bfloat16 T=2048 K=128 V=256 sm90": (94, "6df0d39b7b5c60e1"),
    "parallel bfloat16 T=2048 K=256 V=512 sm90": (87, "f2d885532ad5c2f1"),
    "parallel float32 T=1024 K=64 V=64 sm89": (57, "5868ad76632a0341"),
    "parallel bfloat16 T=100 K=40 V=24 sm80": (30, "cb1ef182ebb3ad0b"),
    "parallel float16 T=16 K=512 V=512 sm100": (24, "59202e846234f308"),
    "fused_recurrent bfloat16 T=2048 K=128 V=256 sm90": (19, "e12468456cf1fddd"),
    "fused_recurrent bfloat16 T=2048 K=256 V=512 sm90": (17, "f82af063bed23035"),
    "fused_recurrent float32 T=1024 K=64 V=64 sm89": (20, "665e700da3d7eb8e"),
    "fused_recurrent bfloat16 T=100 K=40 V=24 sm80": (16, "f66a07f296eec751"),
    "fused_recurrent float16 T=16 K=512 V=512 sm100": (14, "bdbcfd76075900f3"),
}


def sifted(key: str) -> Sifted:
    form, dtype, T, K, V, arch = key.split()
    problem = Problem(form, dtype, 1, *(int(size[2:]) for size in (T, "H=4", K, V)))
    return problem.sift(ARCHS[arch])


@pytest.mark.parametrize("key", BEFORE)
def test_without_later_knobs_the_candidates_are_those_that_there_were_before(key: str) -> None:
    every = map(knob_values, sifted(key).candidates)
    later = ("maxnreg", "descriptors", "transposed", "scores", "save_states")
    plain = [knobs for knobs in every if not any(knobs.get(name) for name in later)]
    lines = sorted(",".join(f"{name}={value}" for name, value in knobs.items() if name not in later) for knobs in plain)
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == BEFORE[key]


@pytest.mark.parametrize("key", BEFORE)
def test_no_candidate_comes_twice_and_limits_on_registers_do_not_double_the_space(key: str) -> None:
    later = ("descriptors", "transposed")
    candidates = [c for c in sifted(key).candidates if not any(getattr(c, name, 0) for name in later)]
    assert len(set(candidates)) == len(candidates) < 2 * BEFORE[key][0]


@pytest.mark.parametrize("key", BEFORE)
def test_descriptors_double_the_space_where_there_are_any_and_rows_allow_them(key: str) -> None:
    candidates = sifted(key).candidates
    with_descriptors = [config for config in candidates if getattr(config, "descriptors", 0)]
    possible = key.endswith(("sm90", "sm100")) and not key.startswith("fused_recurrent")
    assert len(with_descriptors) == (len(candidates) // 2 if possible else 0)


def test_descriptors_need_rows_that_begin_at_multiples_of_16_bytes() -> None:
    for V, possible in ((432, True), (428, False)):
        candidates = replace(PROBLEM, V=V).sift(SM90).candidates
        assert any(config.descriptors for config in candidates) is possible


@pytest.mark.parametrize("form", FORMS)
def test_a_space_names_every_knob_of_its_kernel_once(form: str) -> None:
    knobs = SPACES[form].knobs
    assert sorted(knob.name for knob in knobs) == sorted(field.name for field in fields(FORMS[form].config_type))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_combination_is_a_valid_configuration(form: str, arch: str) -> None:
    for T, K, V in ((1, 1, 1), (100, 40, 24), (4096, 512, 512)):
        place = Problem(form, "bfloat16", 1, T, 1, K, V).place(ARCHS[arch])
        for values in SPACES[form].combinations(place):
            FORMS[form].config_type(**values)  # raises where it is not


@pytest.mark.parametrize("K", [64, 256, 512])
def test_a_buffered_step_may_have_any_tile(K: int) -> None:
    problem = Problem("step_buffered", "bfloat16", 64, 1, 8, K, 512)
    found = {(c.BV, c.num_warps) for c in problem.sift(SM90).candidates}
    assert (problem.default().BV, problem.default().num_warps) in found
    assert found == {(BV, warps) for BV in (8, 16, 32, 64, 128) for warps in (1, 2, 4, 8)}


def test_what_each_filter_dropped_is_counted() -> None:
    found = replace(PROBLEM, K=256, V=512).sift(SM90)
    assert set(found.dropped) == {"known bad", "registers", "shared memory"}
    assert found.enumerated == len(found.candidates) + sum(found.dropped.values())
    assert not any(known_bad("fused_chunk", config, "sm90") for config in found.candidates)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_shape_has_something_to_search(form: str, arch: str) -> None:
    shapes = itertools.product(("bfloat16", "float32"), (1, 32, 1024), (1, 17, 64, 256, 512), (1, 16, 64, 512))
    problems = [Problem(form, dtype, 1, T, 1, K, V) for dtype, T, K, V in shapes]
    if form == HOPPER:
        problems = [problem for problem in problems if problem.is_for_hopper]
        widths = set(itertools.product((256, 512), (16, 64, 512)))
        assert {(p.T, p.K, p.V) for p in problems} == {(T, *both) for T in (1, 32, 1024) for both in widths}
        assert {p.dtype for p in problems} == {"bfloat16"}
        assert all(bool(problem.sift(ARCHS[arch]).candidates) is (arch == "sm90") for problem in problems)
        return
    assert [problem for problem in problems if not problem.sift(ARCHS[arch]).candidates] == []


@pytest.mark.parametrize(("form", "T"), [("chunk_states", 16), ("parallel", 32)])
def test_tiles_that_are_smaller_than_a_space_begins_with_compile(form: str, T: int) -> None:
    problem = Problem(form, "bfloat16", 1, T, 1, 16, 16)
    config = min(problem.sift(SM90).candidates, key=lambda config: tuple(knob_values(config).values()))
    assert (config.BT, config.BV) == (T, 16)
    assert compile_launch(lambda: problem.run(problem.inputs("meta"), config), SM90)


def test_segments_cut_the_sequence_or_hold_all_of_it_and_chunks_divide_them() -> None:
    place = Place("chunk", 512, 64, 64, 2, SM90)
    assert list(L(128, 1024).values(place, None)) == [128, 256, WHOLE]
    for values in SPACES["chunk"].combinations(place):
        assert values["L"] % values["BT"] == 0
    assert max(BT(16, 128).values(replace(place, T=20), object())) == 32


def test_a_limit_on_registers_is_tried_only_where_another_program_fits_by_it() -> None:
    place, needs = PROBLEM.place(SM90), SPACES["fused_chunk"].needs
    limited = [config for config in PROBLEM.sift(SM90).candidates if config.maxnreg]
    assert {config.maxnreg for config in limited} == {128, 168}
    for config in limited:
        free = needs.estimate(place, replace(config, maxnreg=0))
        assert replace(free, registers=config.maxnreg).blocks_per_sm(SM90) > free.blocks_per_sm(SM90)


# The largest that fit and the smallest that don't: what is estimated decides whether they are compiled.
@pytest.mark.parametrize(
    ("form", "K", "knobs"),
    [
        ("fused_chunk", 256, {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 3}),
        ("fused_chunk", 256, {"BT": 64, "BV": 64, "num_warps": 4, "num_stages": 3}),
        ("fused_chunk", 256, {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 3, "descriptors": 1}),
        ("fused_chunk_gradients", 128, {"BT": 128, "BV": 32, "num_warps": 8, "num_stages": 3}),
        ("chunk", 256, {"L": 512, "BT": 64, "BV": 128, "num_warps": 8, "num_stages": 2}),
        ("parallel", 256, {"BT": 128, "BS": 32, "BV": 128, "num_warps": 8, "num_stages": 3}),
        ("parallel", 256, {"BT": 128, "BS": 32, "BV": 128, "num_warps": 8, "num_stages": 3, "descriptors": 1}),
    ],
)
def test_shared_memory_is_known_before_compiling(form: str, K: int, knobs: dict[str, int]) -> None:
    problem, config = Problem(form, "bfloat16", 1, 2048, 1, K, K), FORMS[form].config_type(**knobs)
    (*_, needs) = compile_launch(lambda: problem.run(problem.inputs("meta"), config), SM90)
    barriers = needs.shared - problem.space.needs.estimate(problem.place(SM90), config).shared
    assert 0 <= barriers <= 64 * config.descriptors


# Elsewhere nothing may be left uncompiled that would have fitted.
@pytest.mark.parametrize(
    ("form", "dtype", "arch", "knobs"),
    [
        ("fused_chunk", "float32", "sm90", {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 2}),
        ("fused_chunk", "float32", "sm90", {"BT": 32, "BV": 64, "num_warps": 8, "num_stages": 3}),
        ("fused_chunk", "float32", "sm80", {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 2}),
        ("chunk", "float32", "sm89", {"L": 512, "BT": 32, "BV": 32, "num_warps": 4, "num_stages": 2}),
        ("fused_chunk", "bfloat16", "sm89", {"BT": 128, "BV": 16, "num_warps": 4, "num_stages": 3}),
        ("fused_chunk", "float32", "sm90", {"BT": 128, "BV": 128, "num_warps": 8, "num_stages": 1}),
        ("parallel", "float32", "sm100", {"BT": 64, "BS": 32, "BV": 64, "num_warps": 8, "num_stages": 3}),
    ],
)
def test_shared_memory_is_estimated_too_high_by_less_than_the_slack(
    form: str, dtype: str, arch: str, knobs: dict[str, int]
) -> None:
    problem, config = Problem(form, dtype, 1, 2048, 1, 128, 128), FORMS[form].config_type(**knobs)
    (*_, needs) = compile_launch(lambda: problem.run(problem.inputs("meta"), config), ARCHS[arch])
    assert problem.space.needs.estimate(problem.place(ARCHS[arch]), config).shared <= SLACK * needs.shared


@pytest.mark.parametrize("form", ["fused_chunk", "fused_chunk_gradients", "chunk", "chunk_states", "parallel"])
def test_the_assembler_keeps_to_a_limit_on_registers(form: str) -> None:
    problem = Problem(form, "bfloat16", 1, 2048, 2, 64, 64)
    config = replace(problem.default(), maxnreg=LOW)
    (*_, needs) = compile_launch(lambda: problem.run(problem.inputs("meta"), config), SM90)
    assert needs.registers <= LOW


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_a_cubin_is_read_as_nvidias_own_tool_reads_it(arch: str, tmp_path: Path) -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    problem = Problem("fused_chunk", "bfloat16", 1, 256, 1, 64, 64)
    digests = set()
    for maxnreg in (0, LOW):
        config = replace(problem.default(), maxnreg=maxnreg)
        with offline(ARCHS[arch].target) as compiled:
            problem.run(problem.inputs("meta"), config)
        path = tmp_path / f"{maxnreg}.cubin"
        path.write_bytes(compiled[-1].asm["cubin"])
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
        code = read_cubin(path.read_bytes())
        assert (code.registers, code.stack) == (usage["REG"], usage["STACK"] + usage.get("LOCAL", 0))
        digests.add(code.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(("registers", "blocks"), [(128, 4), (129, 3), (168, 3), (169, 2), (255, 2)])
def test_registers_are_given_out_eight_at_a_time(registers: int, blocks: int) -> None:
    assert Resources(registers, spills=0, shared=0, warps=4).blocks_per_sm(SM90) == blocks


def test_a_launch_is_told_by_its_tiles_and_its_code() -> None:
    config = PROBLEM.default()
    assert launched(config) == launched(replace(config, num_stages=1, maxnreg=128))
    assert launched(config) != launched(replace(config, BV=2 * config.BV))
    chunked = replace(PROBLEM, form="chunk").default()
    assert launched(chunked) == launched(replace(chunked, save_states=1))


def test_the_choices_of_what_is_fused_are_the_packages_and_their_defaults_too() -> None:
    assert sorted(SWEEPS.values) == sorted(auto.SWEEPS)
    assert auto.default_config(torch.bfloat16, 64, 64, 8, 1024) == auto.FormConfig(SWEEPS.values[0])
    for BH, T, way in (
        (8, 1024, "fused_chunk"),
        (8, 2048, "sweeps"),
        (64, 2048, "fused_chunk"),
    ):  # the second in segments
        assert auto.default_gradients_config(torch.bfloat16, 64, 64, BH, T) == auto.GradientsFormConfig(way)
    assert [auto.GradientsFormConfig(way).form for way in GRADIENTS.values] == ["sweeps", "fused_chunk"]


def test_the_defaults_are_near_the_best_that_was_measured() -> None:
    for each in landscape.shipped():
        problem, times = each.problem, {one.config: one.ms for one in each.candidates if one.ms is not None}
        if problem.form != "parallel" or problem.K <= 128:  # a wider parallel needs more than every GPU has
            assert times[problem.default()] < 1.4 * min(times.values()), problem


@pytest.mark.parametrize(
    ("BH", "V", "T", "L"),
    [
        (64, 128, 2048, WHOLE),  # 128 programs of 64 columns
        (32, 128, 2048, WHOLE),
        (31, 128, 2048, 512),
        (64, 128, 65536, WHOLE),
        (63, 128, 65536, 32768),
        (8, 128, 131072, 8192),
        (8, 128, 2048, 256),
        (1, 64, 2048, 128),  # little work
        (1, 64, 256, WHOLE),
        (2, 64, 131072, 1024),
    ],
)
def test_chunk_by_default_has_as_many_segments_as_fill_the_gpu(BH: int, V: int, T: int, L: int) -> None:
    assert chunk.default_config(torch.bfloat16, 128, V, BH, T).L == L
