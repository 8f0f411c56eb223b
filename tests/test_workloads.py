"""Ways to say which shapes are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.coverage import Point, box
from tuning.workloads import FORMS, Workload, WorkloadError, groups, parse

SHAPES = """
# what my model uses
B=4, T=4096, H=16, K=128, V=128   # attention of every layer

  B = 1,T=1,H=16,K=128,V=128,dtype=float16
"""


def test_a_group_stands_for_its_workloads() -> None:
    assert parse(["train"]) == list(groups()["train"].values())
    assert "small" in groups()["train"]


def test_rules_of_the_decoding_workloads_hold_for_every_batch() -> None:
    shapes = {(w.H, w.K, w.V, w.T, w.form) for w in groups()["decode"].values()}
    both = "step+step_buffered"
    assert shapes == {(8, 256, 512, 1, both), (64, 128, 128, 1, both)}
    for H, K, V, T, _ in shapes:
        points = [Point("bfloat16", K, V, w.B * H, T) for w in groups()["decode"].values() if w.H == H]
        held = [box(point)["BH"] for point in points]
        assert all(any(low <= B * H <= high for low, high in held) for B in range(1, 513))


def test_spaces_around_commas_and_signs_do_not_matter() -> None:
    assert parse([" B=4, T = 8,H=2 , K=16,V=16 "]) == parse(["B=4,T=8,H=2,K=16,V=16"])


def test_a_space_within_a_number_does() -> None:
    with pytest.raises(WorkloadError, match="B is '4 4'; it must be a whole number"):
        parse(["B=4 4,T=8,H=2,K=16,V=16"])


def test_what_is_named_twice_is_there_once() -> None:
    assert parse(["small", "train", "small"])[:2] == [groups()["train"][name] for name in ("small", "retnet_1.3b")]
    assert len(parse(["small", "train"])) == len(groups()["train"])


@pytest.mark.parametrize("name", ["shapes.txt", "shapes", "a=b.txt"])
def test_any_file_is_read_a_shape_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(SHAPES)
    assert parse([str(tmp_path / name)]) == [
        Workload("B=4,T=4096,H=16,K=128,V=128", 4, 4096, 16, 128, 128),
        Workload("B=1,T=1,H=16,K=128,V=128,dtype=float16", 1, 1, 16, 128, 128, "float16"),
    ]


def test_a_workload_may_be_for_some_forms_alone() -> None:
    for form, forms in (("step", {"step"}), ("step+step_buffered", {"step", "step_buffered"}), ("", {*FORMS})):
        (workload,) = parse([f"B=4,T=8,H=2,K=16,V=16{form and ',form='}{form}"])
        assert (workload.form, workload.dtype) == (form, "bfloat16")
        assert {name for name in FORMS if workload.is_for(name)} == forms
    with pytest.raises(WorkloadError, match=r"form is 'step\+'; it must be one of"):
        parse(["B=4,T=8,H=2,K=16,V=16,form=step+"])
    with pytest.raises(WorkloadError, match=r"form is 'steps'; it must be one of fused_chunk, .*, step"):
        parse(["B=4,T=8,H=2,K=16,V=16,form=steps"])
    with pytest.raises(WorkloadError, match="form is ''; it must be one of"):
        parse(["B=4,T=8,H=2,K=16,V=16,form="])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nB=1,T=2\n", "line 2: workload 'B=1,T=2' must give each of B, T, H, K and V once"),
        ("small\n", "line 1: workload 'small' is not known"),
        ("# nothing\n", "holds none"),
        ("", "holds none"),
    ],
)
def test_a_malformed_line_is_named_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "shapes").write_text(text)
    with pytest.raises(WorkloadError) as caught:
        parse([str(tmp_path / "shapes")])
    assert str(caught.value).startswith(f"workloads {tmp_path / 'shapes'}: {said}")


def test_what_is_no_text_is_no_file_of_shapes(tmp_path: Path) -> None:
    (tmp_path / "shapes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"workloads .*shapes: .* can't decode"):
        parse([str(tmp_path / "shapes")])


@pytest.mark.parametrize("text", ["trian", "x" * 5000, "a\0b"])
def test_what_is_not_known_is_told_with_what_is(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"is not known, and no file here; use one of train, .*small, .*B=\.\."):
        parse([text])
