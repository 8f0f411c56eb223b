"""What a compiler is known to get wrong is never launched, whoever asks for it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import PROBLEM, Judge, candidates, tune

from generated import configuration
from generated.known_bad import ENTRIES, KnownBad, form_of, known_bad
from generated.retention.chunk import ChunkConfig, ChunkStatesConfig
from generated.retention.fused_chunk import FusedChunkConfig
from generated.retention.fused_recurrent import FusedRecurrentConfig
from tuning import rules
from tuning.__main__ import main
from tuning.compilation import ARCHS
from tuning.problems import FORMS, Problem
from tuning.rules import Entry, Point
from tuning.tuner import likely_first

BAD = FusedChunkConfig(BT=64, BV=32, num_warps=4, num_stages=1)


@pytest.mark.parametrize(
    ("form", "config", "arch", "triton", "bad"),
    [
        ("fused_chunk", BAD, "sm90", "3.6.0", True),
        ("fused_chunk", BAD, "sm90", "3.9.0", True),
        ("fused_chunk", BAD, "sm90", "3.5.1", False),
        ("fused_chunk", BAD, "sm80", "3.6.0", False),
        ("fused_chunk", replace(BAD, BT=32), "sm90", "3.6.0", False),
        ("fused_chunk", replace(BAD, BV=64), "sm90", "3.6.0", False),
        ("fused_chunk", replace(BAD, num_stages=2), "sm90", "3.6.0", False),
        ("chunk", ChunkConfig(L=512, **vars(replace(BAD, BT=128, BV=16))), "sm90", "3.6.0", True),
        ("chunk_states", ChunkStatesConfig(BT=64, BK=64, BV=32, num_warps=8, num_stages=1), "sm90", "3.6.0", True),
        ("fused_recurrent", FusedRecurrentConfig(BV=16, num_warps=4), "sm90", "3.6.0", False),
    ],
)
def test_the_list_is_about_forms_architectures_versions_and_knobs(
    form: str, config: Any, arch: str, triton: str, bad: bool
) -> None:
    assert (known_bad(form, config, arch, triton) is not None) is bad


def test_an_entry_may_end_before_a_version() -> None:
    entry = KnownBad(("a",), ("sm90",), "3.6.0", "3.8", {"BT": (64, math.inf)}, "seen")
    versions = ("3.5.9", "3.6", "3.6.0", "3.7.1", "3.8", "3.8.0", "3.10.0")
    found = [entry.covers("a", BAD, "sm90", triton) for triton in versions]
    assert found == [False, True, True, True, False, False, False]


def test_every_entry_is_about_what_exists_and_says_what_was_seen() -> None:
    assert ENTRIES
    for entry in ENTRIES:
        assert entry.forms
        assert entry.archs
        assert entry.knobs
        assert set(entry.forms) <= set(FORMS)
        assert set(entry.archs) <= set(ARCHS)
        assert re.search(r"Triton \d+\.\d+", entry.evidence)  # with which it was seen
        for form in entry.forms:
            config = Problem(form, "bfloat16", 1, 1024, 1, 64, 64).default()
            assert all(hasattr(config, name) for name in entry.knobs)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("form", FORMS)
def test_neither_candidates_nor_defaults_are_on_the_list(form: str, arch: str) -> None:
    for dtype in ("bfloat16", "float32"):
        for K, V in ((1, 1), (33, 20), (64, 64), (128, 128), (256, 512), (512, 512)):
            problem = Problem(form, dtype, 1, 4096, 1, K, V)
            for config in (problem.default(), *likely_first(problem, ARCHS[arch])):
                assert known_bad(form, config, arch) is None


def test_an_incumbent_on_the_list_is_not_launched_and_named() -> None:
    judge = Judge()
    tuner = tune(judge, incumbents=lambda problem: [BAD])
    assert BAD not in judge.timed
    assert tuner.winners[PROBLEM].config in candidates()
    (line,) = tuner.funnel.rejected
    assert "known bad: Unpipelined" in line


def test_a_file_with_a_rule_on_the_list_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    figures = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}
    entry = Entry(PROBLEM.kernel, Point("bfloat16", 64, 64, 64, 1024), vars(BAD), "measured", figures)
    rules.write(path, rules.document([entry], {"arch": "sm90"}, None))
    assert main(["check", "--no-compile", str(path)]) == 1
    assert "rules[0] is known bad: Unpipelined" in " ".join(capsys.readouterr().out.split())


def test_a_rule_on_the_list_is_not_used_and_the_warning_names_it(only_this_directory: Path) -> None:
    figures = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}
    good = replace(BAD, num_stages=2)
    points = [Point("bfloat16", 64, 64, 64, T) for T in (1024, 8192)]
    entries = [
        Entry(PROBLEM.kernel, point, vars(config), "measured", figures | {"point": rules.point_text(point)})
        for point, config in zip(points, (BAD, good), strict=True)
    ]
    device = {"name": "Pretended", "arch": "sm90"}
    rules.write(only_this_directory / "a.yaml", rules.document(entries, device, None))
    configuration.reload()

    def chosen(T: int) -> Any:
        shape = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "K": 64, "V": 64, "BH": 64, "T": T}
        return configuration.select_config(PROBLEM.kernel, FusedChunkConfig, "the default", **shape)  # type: ignore[misc]

    with pytest.warns(
        configuration.ConfigurationWarning, match=r"known bad: Unpipelined .* not tried\. Tune again"
    ) as told:
        assert chosen(1024) == "the default"
    assert chosen(8192) == good
    assert len([one for one in told if "known bad" in str(one.message)]) == 1
    found = {rule.use["num_stages"]: rule.status for rule in configuration.active_rules("Pretended", "sm90")}
    assert found[2] == "active"
    assert found[1].startswith("known bad: Unpipelined")
    (entry,) = rules.existing_entries(only_this_directory / "a.yaml")
    assert entry.use == vars(good)


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        ("retention_chunk", "chunk"),
        ("retention_fused_chunk", "fused_chunk"),
        ("linear_attention_fused_chunk_gradients", "fused_chunk_gradients"),
        ("retention_fused_recurrent", ""),
        ("retention_form", ""),
    ],
)
def test_a_kernels_name_ends_in_its_form(kernel: str, form: str) -> None:
    assert form_of(kernel) == form
