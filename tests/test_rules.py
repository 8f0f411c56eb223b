"""What a tuner writes is merged with what is there: nothing is lost, and nothing is said of it that is not so."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import NEEDS, PROBLEM, timing

from generated.configuration_file import parse_file
from tuning import rules
from tuning.coverage import Point
from tuning.rules import Entry
from tuning.winners import Winner

DEVICE = {"arch": "sm90", "name": "Pretended"}
USE = {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 2}
FIGURES = {"ms": 0.5, "default_ms": 1.0, "error": 0.001, "spills": 0, "trials": 9}


def entry(T: int = 1024, use: dict[str, Any] = USE, **figures: Any) -> Entry:
    point = Point("bfloat16", 16, 16, 64, T)
    return Entry(PROBLEM.kernel, point, use, "measured", FIGURES | figures | {"point": rules.point_text(point)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a rule of two points."""
    path = tmp_path / "a.yaml"
    rules.update(path, [entry(), entry(2048)], DEVICE, "570.1")
    return path


# What is there


@pytest.mark.parametrize("broken", ["not yaml: [", "format: 9"])
def test_a_broken_file_is_kept_under_another_name_and_a_link_to_it_stays(tmp_path: Path, broken: str) -> None:
    real, link = tmp_path / "real" / "sm90.yaml", tmp_path / "sm90.yaml"
    real.parent.mkdir()
    real.write_text(broken, encoding="utf-8")
    link.symlink_to(real)
    kept = rules.update(link, [entry()], DEVICE, None)
    assert kept is not None
    assert kept.parent == real.parent
    assert kept.name.startswith("sm90.yaml.broken-")
    assert kept.read_text(encoding="utf-8") == broken
    assert link.is_symlink()
    assert rules.existing_entries(real) == [entry()]
    assert rules.update(link, [entry(2048)], DEVICE, None) is None


def test_an_error_of_the_disk_loses_no_rule(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def read_bytes(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        for read in (rules.existing_entries, rules.owner, lambda path: rules.update(path, [entry(8192)], DEVICE, None)):
            with pytest.raises(OSError, match="Input/output"):
                read(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Workloads of one B * H


def test_of_workloads_that_share_a_point_the_one_that_loses_least_is_used_in_any_order() -> None:
    one, other = entry(ms=0.5, best_ms=0.49, B=2), entry(use=USE | {"BT": 32}, ms=0.5, best_ms=0.5, B=4)
    more, least = entry(ms=0.4, best_ms=0.4, B=4), entry(ms=0.4, best_ms=0.4, B=1)
    for together, used in (((one, other), other), ((one, other, more), more), ((one, other, more, least), least)):
        assert all(rules.merge([one], new) == [used] for new in itertools.permutations(together))


def test_forms_are_held_against_each_other_at_one_workload() -> None:
    def won(form: str, ms: float, B: int) -> Winner:
        problem = replace(PROBLEM, form=form, B=B, H=64 // B)
        return Winner(problem, problem.default(), timing(ms), 100.0, 0.001, NEEDS, 9, modelled=False)

    apart = [won("chunk", 4.0, 1), won("fused_chunk", 1.0, 2)]
    assert rules.form_entries(apart) == []
    found = rules.form_entries([*apart, won("chunk", 0.5, 2), won("fused_chunk", 9.0, 1)])
    assert [(entry.figures["B"], entry.use["form"]) for entry in found] == [(1, "chunk"), (2, "chunk")]


@pytest.mark.parametrize(("ms", "form"), [(0.3, "parallel"), (0.499, "chunk"), (0.6, "chunk")])
def test_a_form_that_was_not_tuned_now_takes_part_with_what_its_rule_says(ms: float, form: str) -> None:
    def won(form: str, ms: float) -> Winner:
        problem = replace(PROBLEM, form=form, B=2, H=32)
        return Winner(problem, problem.default(), timing(ms), 100.0, 0.001, NEEDS, 9, modelled=False)

    known = [rules.entry_of(won("parallel", ms))]
    (found,) = rules.form_entries([won("chunk", 0.5), won("fused_chunk", 0.7)], known)
    assert (found.use, found.figures["ms"]) == ({"form": form}, ms if form == "parallel" else 0.5)
    assert rules.form_entries([], known) == []


def test_what_was_launched_now_is_not_as_fast_as_it_was_once() -> None:
    def won(form: str, ms: float, config: Any) -> Winner:
        problem = replace(PROBLEM, form=form, B=2, H=32)
        return Winner(problem, config, timing(ms), 100.0, 0.001, NEEDS, 9, modelled=False)

    chunk = replace(replace(PROBLEM, form="chunk").default(), L=1 << 20)
    once = rules.entry_of(won("chunk", 0.5, chunk))
    now = [won("fused_chunk", 0.7, chunk.whole), won("parallel", 0.6, replace(PROBLEM, form="parallel").default())]
    (found,) = rules.form_entries(now, [once])
    assert (found.use, found.figures["ms"]) == ({"form": "parallel"}, 0.6)


# Where it came from


def test_a_point_that_stays_tells_when_and_with_what_it_was_tuned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(path.read_text().replace(str(parse_file(path).tuned), "2026-01-02"))
    (before,) = parse_file(path).kernels[PROBLEM.kernel].rules
    monkeypatch.setattr(rules, "version", {"triton": "9.9.9", "torch": parse_file(path).software["torch"]}.get)
    for _ in range(2):  # the second time it is not said of itself again
        rules.update(path, [entry(2048)], DEVICE, "580.1")
        file = parse_file(path)
        (rule,) = file.kernels[PROBLEM.kernel].rules
        found = {figures["point"]: figures for figures in (rule.figures, *rule.also)}
        stays, new = (found[rules.point_text(entry(T).point)] for T in (1024, 2048))
        assert (file.software["triton"], file.software["driver"]) == ("9.9.9", "580.1")
        assert new == entry(2048).figures
        assert {name: stays[name] for name in ("driver", "tuned")} == {"driver": "570.1", "tuned": "2026-01-02"}
        assert "triton" in stays
        assert "torch" not in stays
    assert rule.when == before.when


def test_a_file_of_one_run_says_nothing_twice(path: Path) -> None:
    before = path.read_bytes()
    rules.update(path, [], DEVICE, "570.1")
    assert path.read_bytes() == before
    assert "tuned" not in parse_file(path).kernels[PROBLEM.kernel].rules[0].figures
