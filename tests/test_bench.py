"""`python -m tuning bench` without a GPU: what it measures in which order, what it computes, and what it prints."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import generated
from tuning import bench, bench_plots, peers
from tuning.__main__ import main
from tuning.bench import HEAD, WIDTH, Contender, Failure, Row, Times
from tuning.measurement import Gpu
from tuning.peers import Peer
from tuning.problems import STEP_FORMS, STEPS
from tuning.workers import gpu_alone
from tuning.workloads import Workload, parse

SHAPE = "B=2,T=70,H=5,K=16,V=24"
WORKLOAD = parse([SHAPE + ",dtype=float32"])[0]
INPUTS = bench.make_inputs(WORKLOAD, "cpu")
EXPECTED = bench.reference(*INPUTS)
NAMES = ("o", "dq", "dk", "dv")
DOCS = Path(__file__).resolve().parent.parent / "docs"


def row(
    variant: str = "tuned", speedups: tuple[float, ...] = (), errors: tuple[float, ...] = (1e-3,) * 4, **changes: Any
) -> Row:
    times = Times(ms=2.0, spread=0.125, samples=5, floor_ms=0.25, gpu_ms=1.0)
    places = {"workload": "small", "shape": "B=1", "form": "chunk", "forward": times, "both": times, **changes}
    named = dict(zip(NAMES, errors, strict=True))
    return Row(variant=variant, speedups=list(speedups), extra_mib=32.0, errors=named, **places)


class Replayed:
    """Stands in for a CUDA graph, whose calls take 40 ms."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.times = lambda: [40.0]

    @classmethod
    def release(cls) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for CUDA: every call is made and takes 60 ms; the numbers of calls that were asked for."""
    asked: list[int] = []

    def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
        asked.append(repeats)
        for _ in range(repeats):
            run()
        return [60.0] * repeats

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "time_calls", time_calls)
    monkeypatch.setattr(bench, "_extra_mib", lambda call: 1.0)
    monkeypatch.setattr(bench, "gpu_present", lambda: True)
    monkeypatch.setattr(bench, "describe_gpu", lambda: Gpu("Imagined GPU", "sm90", 132, 80, "1.2"))
    monkeypatch.setattr(bench, "Replay", Replayed)
    return asked


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Operators that pass for fla's, by form: empty to begin with."""
    functions: dict[str, Any] = {}
    monkeypatch.setitem(peers.PEERS, "fla", lambda: Peer("fla", "7.8", functions))
    return functions


# Errors


@pytest.mark.parametrize("fault", [2e-5, 1.0, float("nan")])
def test_wrong_results_of_our_own_are_a_failure_and_a_peers_are_shown(calls: list[int], fault: float) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return generated.chunk_retention(q, k, v)[0] * (1 + fault), None

    ours, peer = (Contender(variant, wrong, INPUTS, EXPECTED) for variant in ("tuned", "fla"))
    bench.race([ours, peer])
    assert ours.failure.startswith("ArithmeticError: wrong result: relative errors o ")
    assert isinstance(ours.row(WORKLOAD, "chunk"), Failure)
    assert isinstance(peer.row(WORKLOAD, "chunk", ours), Row)


def test_reference_is_the_oracles_for_the_first_row_and_three_heads() -> None:
    q, k, v, do = INPUTS
    expected = oracle.solve(oracle.Problem(q, k, v, do).part([0], [0, 2, 4]))
    assert EXPECTED.keys() == set(NAMES)
    for name in NAMES:
        torch.testing.assert_close(EXPECTED[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("H", [1, 2])
def test_reference_takes_few_heads_once(H: int) -> None:
    inputs = bench.make_inputs(parse([f"B=1,T=9,H={H},K=4,V=8,dtype=float32"])[0], "cpu")
    expected = oracle.solve(oracle.Problem(*inputs))
    torch.testing.assert_close(bench.reference(*inputs)["dk"], expected["dk"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wrong", NAMES)
def test_error_is_told_for_the_result_that_has_it(wrong: str) -> None:
    results = oracle.solve(oracle.Problem(*INPUTS))
    results = {name: results[name] * (1.01 if name == wrong else 1.0) for name in NAMES}
    errors = bench.errors_of(results, EXPECTED)
    assert errors.pop(wrong) == pytest.approx(0.01)
    assert max(errors.values()) < 1e-10


def test_errors_of_a_low_precision_are_those_against_the_oracle() -> None:
    inputs = tuple(x.to(torch.bfloat16) for x in INPUTS)
    problem = oracle.Problem(*inputs)
    results = oracle.run(generated.fused_chunk_retention, problem)
    heads = [0, 2, 4]
    expected = oracle.solve(problem.part([0], heads))
    found = bench.errors_of(results, bench.reference(*inputs))
    for name in NAMES:
        error, _ = oracle.errors(results[name][:1, :, heads], expected[name])
        assert error > 1e-4
        assert found[name] == pytest.approx(error)


# Times


def test_variants_take_turns_in_a_rotating_order_each_in_its_context(calls: list[int]) -> None:
    order: list[str] = []
    strayed: list[str] = []

    def contender(name: str) -> Contender:
        inside: list[bool] = []

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            order.append(name)
            inside.append(True)
            yield
            inside.clear()

        def function(*inputs: Tensor) -> Any:
            if not inside:
                strayed.append(name)
            return generated.chunk_retention(*inputs)

        return Contender(name, function, INPUTS, EXPECTED, entered)

    bench.race([contender(name) for name in "abc"])
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"  # the first turns prepare
    assert not strayed


def test_a_default_is_timed_without_the_rules(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []

    @contextlib.contextmanager
    def defaults_only() -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(bench, "defaults_only", defaults_only)
    (rows,) = bench._measure(WORKLOAD, ["chunk"], [], with_default=True)
    assert [row.variant for row in rows] == ["tuned", "default"]
    assert len(entered) == 1 + bench.ROUNDS


@pytest.mark.parametrize(("ms", "samples"), [(0.01, 50), (7.0, 40), (200.0, 5), (5000.0, 5)])
def test_samples_of_all_rounds_fill_the_budget(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, ms: float, samples: int
) -> None:
    monkeypatch.setattr(bench, "time_calls", lambda run, repeats: [1e9] + [ms] * (repeats - 1))
    contender = Contender("tuned", generated.chunk_retention, INPUTS, EXPECTED)
    bench.race([contender])
    found = contender.row(WORKLOAD, "chunk")
    assert isinstance(found, Row)
    assert found.forward == Times(ms, 0.0, samples, WORKLOAD.floor_ms(backward=False), 40.0)
    assert found.both == Times(ms, 0.0, samples, WORKLOAD.floor_ms(backward=True), 40.0)


def test_median_and_quartiles_are_over_all_rounds(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    series = iter([60.0, 60.0, 5.0, 8.0, 1.0, 8.0, 4.0, 8.0, 2.0, 8.0, 3.0, 8.0])  # forward and both in turn
    monkeypatch.setattr(bench, "time_calls", lambda run, repeats: [1e9, next(series)][:repeats])
    contender = Contender("tuned", generated.chunk_retention, INPUTS, EXPECTED)
    bench.race([contender])
    found = contender.row(WORKLOAD, "chunk")
    assert isinstance(found, Row)
    assert (found.forward.ms, found.forward.spread, found.forward.samples) == (3.0, 3.0, 5)
    assert (found.both.ms, found.both.spread, found.both.samples) == (8.0, 0.0, 5)


def test_speed_ups_are_a_variants_medians_over_the_tuned_ones() -> None:
    own, peer = (Contender(name, generated.chunk_retention, INPUTS, EXPECTED) for name in ("tuned", "fla"))
    own._times, peer._times = ([1.0, 2.0, 9.0], [4.0, 4.0]), ([6.0, 6.0], [1.0, 2.0, 3.0])
    found, tuned = peer.row(WORKLOAD, "chunk", own), own.row(WORKLOAD, "chunk")
    assert isinstance(found, Row)
    assert isinstance(tuned, Row)
    assert (found.speedups, tuned.speedups) == ([3.0, 0.5], [])


def test_the_floor_is_held_against_the_gpus_time_where_that_is_known() -> None:
    assert Times(ms=4.0, spread=0.0, samples=5, floor_ms=1.0, gpu_ms=2.0).floor_share == 0.5
    assert Times(ms=4.0, spread=0.0, samples=5, floor_ms=1.0).floor_share == 0.25


def test_a_call_that_no_graph_can_hold_has_no_gpu_time(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(call: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench, "Replay", refused)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    contender = Contender("tuned", generated.chunk_retention, INPUTS, EXPECTED)
    bench.race([contender])
    found = contender.row(WORKLOAD, "chunk")
    assert isinstance(found, Row)
    assert (found.forward.gpu_ms, found.both.gpu_ms) == (None, None)
    assert len(bench.line(found)) == len(HEAD)


# Steps

DECODE = Workload("decode", 2, 1, 4, 16, 24, "float32", "step+step_buffered")


def test_a_workload_is_timed_with_the_forms_that_it_is_for() -> None:
    assert bench.forms_for(DECODE) == [*STEPS]
    assert bench.forms_for(DECODE, ["chunk", "auto"]) == []
    assert bench.forms_for(WORKLOAD, ["chunk", "step"]) == ["chunk"]
    assert bench.forms_for(WORKLOAD) == [*bench.FORMS[:-2]]
    (few,) = parse(["B=2,T=16,H=5,K=16,V=24"])
    assert bench.forms_for(few, ["step", "chunk"]) == [*STEP_FORMS["step"], "chunk"]
    assert bench.forms_for(replace(DECODE, form="step_buffered")) == [*STEP_FORMS["step_buffered"]]


@pytest.mark.parametrize("form", STEPS)
def test_steps_are_timed_on_states_of_their_own_beside_one_read_and_write_of_these(calls: list[int], form: str) -> None:
    given: list[Tensor] = []

    def peer(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor) -> Any:
        given.append(initial_state)
        return generated.fused_recurrent_retention(q, k, v, initial_state=initial_state, output_final_state=True)

    (rows,) = bench._measure(DECODE, [form], [Peer("fla", "7.8", {"step": peer})], with_default=True)
    kind = STEPS[form]
    others = ["folding"] if kind.is_buffered else ["fla"] if form == "step" else []
    assert [row.variant for row in rows] == ["tuned", "default", *others]
    for found in rows:
        assert isinstance(found, Row)
        passes = 1 if kind.is_buffered and found.variant != "folding" else 2
        assert found.forward.floor_ms == passes * kind.dtype.itemsize * (2 * 4 * 16 * 24) / 3.0e9
        assert (found.both, found.forward.gpu_ms) == (None, 40.0)
        assert found.errors["o"] < 1e-5
        assert len(bench.line(found)) == len(HEAD)
        assert found.speedups == ([] if found.variant == "tuned" else [1.0])
    assert all(x.shape == (2, 4, 16, 24) for x in given)
    assert not bench_plots.has_times(asdict(rows[0]))
    expected = "vs fla, steps, geometric mean of 1: 1.00x, at the least 1.00x"
    assert bench.summary(rows) == (expected if form == "step" else "no row to compare with another library")


def test_steps_take_microseconds_which_are_told_to_a_tenth() -> None:
    times = Times(ms=0.00481, spread=0.0, samples=5, floor_ms=0.0028, gpu_ms=0.0999)
    text = bench.line(row(forward=times, both=None, errors=(1e-3,) * 4))
    assert text.split()[2:6] == ["0.0048", "0.000", "0.0999", "3%"]


@pytest.mark.parametrize("name", ["retnet_1.3b_b64", "lightning_b64"])
def test_the_floor_of_a_step_is_that_of_a_copy_of_its_states(name: str) -> None:
    (workload,) = parse([name])
    assert workload.step_floor_ms(4) == pytest.approx(0.179, rel=1e-3)


# Failures


def refuse(*inputs: Tensor) -> Any:
    raise ValueError("unsupported shape\nand more")


def test_a_peer_that_fails_says_so_and_the_others_go_on(calls: list[int]) -> None:
    peer = Peer("fla", "7.8", {"chunk": refuse, "parallel": generated.parallel_retention})
    chunk, parallel = bench._measure(WORKLOAD, ["chunk", "parallel"], [peer], with_default=False)
    assert isinstance(chunk[0], Row)
    assert chunk[1] == Failure(WORKLOAD.name, WORKLOAD.shape, "chunk", "fla", "ValueError: unsupported shape")
    assert isinstance(parallel[1], Row)
    assert parallel[1].speedups == [1.0, 1.0]


def test_a_peer_that_fails_while_it_is_timed_is_out(calls: list[int]) -> None:
    made: list[int] = []

    def late(*inputs: Tensor) -> Any:
        made.append(len(made))
        return refuse() if len(made) > 10 else generated.chunk_retention(*inputs)

    peer, own = (
        Contender(name, f, INPUTS, EXPECTED) for name, f in (("fla", late), ("tuned", generated.chunk_retention))
    )
    bench.race([peer, own])
    assert isinstance(peer.row(WORKLOAD, "chunk", own), Failure)
    assert isinstance(own.row(WORKLOAD, "chunk"), Row)
    assert len(made) == 11


def test_a_workload_that_does_not_fit_is_one_row(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> Any:
        raise torch.OutOfMemoryError("640 GiB")

    monkeypatch.setattr(bench, "make_inputs", too_large)
    ((found,),) = bench._measure(WORKLOAD, ["chunk", "parallel"], [], with_default=False)
    assert isinstance(found, Failure)
    assert "OutOfMemoryError: 640 GiB" in found.failure


@pytest.mark.parametrize(
    ("error", "words"), [(ImportError("none"), "not installed"), (RuntimeError("too old"), "RuntimeError: too old")]
)
def test_a_peer_that_does_not_import_is_left_out(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr(peers.importlib, "import_module", import_module)
    for name in ("fla", "helion"):
        found = peers.find(name)
        assert words in found.version
        assert found.functions == {}


def test_pytorchs_attention_is_timed_and_not_held_against_retention(calls: list[int]) -> None:
    (rows,) = bench._measure(WORKLOAD, ["parallel"], [peers.find("sdpa")], with_default=False)
    assert isinstance(rows[1], Row)
    assert (rows[1].variant, rows[1].errors, rows[1].speedups) == ("sdpa", {}, [1.0, 1.0])
    assert len(bench.line(rows[1])) == len(HEAD)
    q, k, v, _ = INPUTS
    o, _ = peers.find("sdpa").functions["parallel"](q, k, v)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / 4 + torch.full((70, 70), float("-inf")).triu(1)
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores.softmax(3), v), rtol=1e-4, atol=1e-5)


# What is printed and written


def at(ms: float) -> dict[str, Times]:
    return dict.fromkeys(("forward", "both"), Times(ms, 0.0, 5, 0.25, ms))


def test_summary_goes_form_by_form_and_by_the_best_of_each_workload() -> None:
    rows = [
        row(**at(2.0)),
        row("fla", speedups=(2.0, 1.0), **at(4.0)),
        row(form="parallel", **at(1.0)),
        row("fla", form="parallel", speedups=(8.0, 1.5), **at(8.0)),
        row("sdpa", form="parallel", speedups=(3.0, 3.0), **at(3.0)),
        row("default", speedups=(9.0, 9.0), **at(9.0)),
    ]
    failure = Failure("small", "B=1", "chunk", "fla", "too large")
    by_form, best = "form by form, geometric mean of", "best form against best form of"
    assert bench.summary([*rows, failure]).splitlines() == [
        f"vs fla, {by_form} 2 rows: 4.00x forward, 1.22x forward + backward, at the least 1.00x",
        f"vs fla, {best} 1 workload: 4.00x forward, 4.00x forward + backward, at the least 4.00x",
        f"vs sdpa, {by_form} 1 row: 3.00x forward, 3.00x forward + backward, at the least 3.00x",
        f"vs sdpa, {best} 1 workload: 3.00x forward, 3.00x forward + backward, at the least 3.00x",
    ]
    assert bench.summary([row(), failure]) == "no row to compare with another library"


def test_a_line_holds_the_figures_below_their_names() -> None:
    text = bench.line(row(speedups=(2.345, 0.5), errors=(1e-3, 4e-3, 2e-3, 3e-3)))
    half = ["2.000", "0.125", "1.000", "25%"]
    assert text.split() == ["chunk", "tuned", *half, "2.35x", *half, "0.50x", "32", "4.0e-03"]
    assert len(text) == len(HEAD) <= WIDTH
    cells = (("fwd ms", "2.000"), ("GPU ms", "1.000"), ("floor", "25%"), ("x tuned", "2.35x"), ("error", "4.0e-03"))
    for name, cell in cells:
        assert HEAD.index(name) + len(name) == text.index(cell) + len(cell)


def test_a_line_without_a_peer_leaves_the_speed_ups_out() -> None:
    assert "x" not in bench.line(row("default"))
    assert len(bench.line(row("default"))) == len(HEAD)


def test_an_error_that_is_no_number_is_the_largest() -> None:
    assert bench.line(row(errors=(1e-3, float("nan"), 2e-3, 3e-3))).endswith(" nan")


def test_a_failures_line_keeps_to_the_width() -> None:
    text = bench.line(Failure("small", "B=1", "chunk", "fla", "RuntimeError: " + "long " * 99))
    assert text.startswith(f"{'chunk':23} fla      failed: RuntimeError: long")
    assert len(text) == WIDTH


def test_bench_prints_every_row_and_writes_the_figures(
    calls: list[int],
    fla: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest's workers set one
    fla |= {"chunk": refuse, "parallel": generated.parallel_retention}
    path = tmp_path / "figures.json"
    forms = ["--form", "chunk", "--form", "parallel"]
    assert main(["bench", "--workload", SHAPE, "--dtype", "float16", *forms, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Imagined GPU" in lines[0]
    assert "fla 7.8" in lines[0]
    assert f"{SHAPE}: B=2 T=70 H=5 K=16 V=24 float16" in lines
    begin = lines.index(HEAD) + 1
    assert [line.split()[:2] for line in lines[begin : begin + 6]] == [
        [form, variant] for form in ("chunk", "parallel") for variant in ("tuned", "default", "fla")
    ]
    assert "1.00x" in lines[begin + 5]
    assert lines[begin + 2].endswith("failed: ValueError: unsupported shape")
    assert lines[-1].startswith("vs fla, best form against best form of 1 workload: 1.00x forward, 1.00x forward + ")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["peers"] == {"fla": "7.8"}
    assert [row["variant"] for row in found["rows"]] == ["tuned", "default", "fla"] * 2
    assert found["rows"][0]["shape"].endswith("float16")
    assert found["rows"][0]["forward"]["ms"] == 60.0
    assert set(found["rows"][0]["errors"]) == set(NAMES)
    assert all(1e-5 < error < 2e-3 for error in found["rows"][0]["errors"].values())
    assert found["rows"][2]["failure"] == "ValueError: unsupported shape"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_measured_is_written_before_the_run_ends(
    calls: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*inputs: Tensor) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generated, "parallel_retention", stop)
    path = tmp_path / "figures.json"
    forms = ["--form", "chunk", "--form", "parallel", "--no-default", "--against", "none"]
    assert main(["bench", "--workload", SHAPE, *forms, "--json", str(path)]) == 130
    assert [row["form"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["chunk"]
    assert f"\n{'chunk':23} tuned" in capsys.readouterr().out


def test_a_gpu_on_which_a_tuner_measures_is_left_alone(
    calls: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu("Imagined GPU", "sm90", 132, 80, "1.2", f"bench-{os.getpid()}")
    monkeypatch.setattr(bench, "describe_gpu", lambda: gpu)
    command = ["bench", "--workload", SHAPE, "--form", "chunk", "--against", "none"]
    with gpu_alone(gpu.uuid):
        assert main(command) == 1
    assert f"error: another process measures on {gpu.uuid}" in capsys.readouterr().err
    assert calls == []
    assert main(command) == 0  # and is free for others afterwards
    with gpu_alone(gpu.uuid):
        pass


def test_bench_that_measures_nothing_fails(
    calls: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "chunk_retention", refuse)
    assert main(["bench", "--workload", SHAPE, "--form", "chunk"]) == 1
    assert capsys.readouterr().out.count("failed: ValueError: unsupported shape") == 2


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(
    calls: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--workload", SHAPE, "--form", "chunk", "--json", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize("given", [["--dtype", "float64"], ["--dtype", "half"], ["--dtype"]])
def test_a_dtype_that_no_workload_has_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *given])
    assert ended.value.code == 2
    assert "--dtype" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--dtype", "bfloat16"], ["--dtype", "float16"], ["--dtype", "float32"]])
def test_dtype_overrides_the_workloads_own(
    given: list[str], calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--workload", f"{SHAPE},dtype=float32", "--form", "chunk", "--no-default"]
    assert main([*arguments, *given]) == 0
    assert f"V=24 {given[1] if given else 'float32'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["fla,torch", "Fla"])
def test_a_peer_that_is_not_known_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--against", given])
    assert ended.value.code == 2
    assert "is not known; any of fla, sdpa, helion, or none" in capsys.readouterr().err


# Plots


def figures() -> dict[str, Any]:
    """What --json has written of two workloads."""
    names = ("small", "short")
    rows: list[Row | Failure] = [Failure("short", "B=1", "naive", "tuned", "too large")]
    for workload in names:
        rows += [row(workload=workload, form=form, **at(ms)) for form, ms in (("chunk", 1.0), ("parallel", 0.5))]
        rows += [row(peer, workload=workload, form="parallel", **at(ms)) for peer, ms in (("fla", 2.0), ("sdpa", 0.25))]
    return {
        "gpu": {"name": "Imagined GPU"},
        "torch": "2",
        "triton": "3",
        "peers": {"fla": "7.8"},
        "workloads": {workload.name: asdict(workload) for workload in parse(list(names))},
        "rows": [asdict(one) for one in rows],
    }


def test_of_each_variant_the_fastest_form_is_drawn() -> None:
    rows = [one for one in figures()["rows"] if "failure" not in one]
    fastest = {"tuned": 0.5, "fla": 2.0, "sdpa": 0.25}
    assert bench_plots.best(rows, "both", "gpu_ms") == {"small": fastest, "short": fastest}


def test_figures_are_drawn_again_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "figures.json", tmp_path / "plots"
    path.write_text(json.dumps(figures()), encoding="utf-8")
    assert main(["bench", "--from", str(path), "--plot", str(folder)]) == 0
    drawn = sorted(folder.iterdir())
    assert [found.name for found in drawn] == ["roofline.png", "speedups.png"]
    assert all(found.read_bytes().startswith(b"\x89PNG") for found in drawn)
    assert capsys.readouterr().out.count("wrote ") == 2


def test_the_readmes_figures_are_drawn_from_the_file_that_it_names(tmp_path: Path) -> None:
    assert main(["bench", "--from", str(DOCS / "bench_h100.json"), "--plot", str(tmp_path)]) == 0
    assert (DOCS / "speedups.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((DOCS / "bench_h100.json").read_text(encoding="utf-8"))["rows"]
    table = DOCS.with_name("README.md").read_text(encoding="utf-8")
    ours = {row["workload"]: row for row in rows if row["form"] == "auto"}
    for row in (row for row in rows if row["variant"] == "fla"):
        pair, place = (ours[row["workload"]], row), f"| {row['workload']} | "
        (line,) = (line for line in table.splitlines() if line.startswith(place) and line.count("|") == 12)
        for measure in ("ms", "gpu_ms"):
            times = [f"{one['forward'][measure]:.3f} / {one['both'][measure]:.3f}" for one in pair]
            assert f"| {' | '.join(times)} |" in line


def test_what_bars_stand_for_is_the_ratio_to_retgens_best(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = figures()
    workloads = {name: Workload(**sizes) for name, sizes in found["workloads"].items()}
    bench_plots._speedups(figure, [one for one in found["rows"] if "failure" not in one], workloads)
    heights = {axes.get_title(): [bar.get_y() + bar.get_height() for bar in axes.patches] for axes in figure.axes}
    assert heights["forward"] == heights["forward + backward"] == [4.0, 4.0, 0.5, 0.5]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_file_that_is_none_of_benchs_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    path.write_text(text, encoding="utf-8")
    assert main(["bench", "--from", str(path), "--plot", str(tmp_path)]) == 1
    assert "not a file of `python -m tuning bench --json FILE`" in capsys.readouterr().err
    assert main(["bench", "--from", str(path)]) == 1
    assert "--plot FOLDER" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::generated.configuration.ConfigurationWarning")
def test_bench_on_a_gpu_measures_what_the_oracle_accepts(tmp_path: Path, measures_alone: None) -> None:
    path = tmp_path / "figures.json"
    forms = ["--form", "chunk", "--form", "naive", "--form", "parallel", "--against", "sdpa"]
    assert main(["bench", "--workload", "B=2,T=300,H=4,K=32,V=64", *forms, "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["form"], row["variant"]) for row in rows] == [
        ("chunk", "tuned"),
        ("chunk", "default"),
        ("naive", "tuned"),
        ("parallel", "tuned"),
        ("parallel", "default"),
        ("parallel", "sdpa"),
    ]
    for measure in ("ms", "gpu_ms"):
        assert all(0 < row["forward"][measure] < row["both"][measure] for row in rows)
    assert all(row["extra_mib"] > 0 for row in rows)
    assert all(0 < error < 1e-2 for row in rows for error in row["errors"].values())
