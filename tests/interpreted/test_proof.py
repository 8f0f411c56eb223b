"""The proof that a rule needs: right kernels pass it, and every way in which one may go wrong is found."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sanitized
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from generated.launch import padded
from generated.retention import chunk, fused_chunk, fused_recurrent, parallel, step, step_buffered
from tuning import problems, proof
from tuning.problems import FORMS, GRADIENTS, Problem, StepInputs

pytestmark = [  # NumPy speaks up where a kernel computes infinities that it then masks
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
]

LARGE = Problem("fused_chunk", "float16", 4, 20, 6, 16, 24)  # more rows and heads than a draw has
TILES = {"num_warps": 4, "num_stages": 1}
CONFIG = fused_chunk.FusedChunkConfig(BT=32, BV=16, **TILES)
# The kernel of each part, where its text is, and small tiles.
KERNELS: dict[str, tuple[str, ModuleType, Any]] = {
    "fused_chunk": ("fused_chunk_kernel", fused_chunk, CONFIG),
    GRADIENTS: ("fused_chunk_gradients_kernel", fused_chunk, CONFIG),
    "chunk_states": ("chunk_states_kernel", chunk, chunk.ChunkStatesConfig(BT=64, BK=16, BV=32, **TILES)),
    "chunk": ("chunk_outputs_kernel", chunk, chunk.ChunkConfig(L=32, BT=16, BV=32, **TILES)),
    "parallel": ("parallel_kernel", parallel, parallel.ParallelConfig(BT=32, BS=16, BV=32, **TILES)),
    "fused_recurrent": ("fused_recurrent_kernel", fused_recurrent, fused_recurrent.FusedRecurrentConfig(32, 1)),
}
STEP_CONFIG = step.StepConfig(BV=32, num_warps=1)
BUFFERED_CONFIG = step.StepConfig(BV=16, num_warps=1)  # two programs a state
EXTRA = {"chunk": {"states_config": KERNELS["chunk_states"][2]}}
PARTS = {"fused_chunk": ("fused_chunk", GRADIENTS), "chunk": ("chunk_states", "chunk")}
STORE = "(b_o * scale).to(b_v.dtype)"
MASKED = "b_o, mask=m_t[:, None] & m_v[None, :])"
OUTPUTS_MASK = "m_o = m_t[:, None] & m_v[None, :]"
UPDATE = "b_h = product(tl.trans(b_k), b_v, b_h, TRANSPOSED, PRECISION)"
START = "b_h = tl.zeros([BK, BV], dtype=tl.float32)"
LOADED = "b_h += tl.load(p_h0, mask=m_h & (i_h % G_q == 0), other=0.0).to(tl.float32)"
STORED = "tl.store(p_ht, b_h, mask=m_h & (i_h % G_kv == 0) & (i_to >= 0) & (i_to < slots))"
OUTPUT = "o += (bos * H + i_h) * V + i_v * BV"
# The last tile ends where the columns do, as is done to save a mask; each program rounds in its own way.
OVERLAP = f"""{OUTPUT}
    back = tl.maximum((i_v + 1) * BV - V, 0)
    v, o, o_v = v - back, o - back, o_v - back
    m_v = o_v < V
    scale *= 1 + i_v * 6e-4"""
# What is wrong: the kernel's text, what stands there instead, and what the proof must say.
WRONG = "wrong result"
FAULTS = {
    "mask of one token too many": ("o_t[:, None] >= o_t[None, :]", "o_t[:, None] >= o_t[None, :] - 1", WRONG),
    "decay off by one between chunks": ("(o_t + LEAD) * b_g", "(o_t + LEAD + 1) * b_g", WRONG),
    "decay off by one within a chunk": (
        "(o_t[:, None] - o_t[None, :]) *",
        "(o_t[:, None] - o_t[None, :] + 1) *",
        WRONG,
    ),
    "missing scale": (STORE, STORE.replace(" * scale", ""), WRONG),
    "wrong factor of dh0": ("b_h *= scale", "b_h *= 1.0", WRONG),
    "wrong factor of dht": ("b_h /= scale", "b_h /= 1.0", WRONG),
    "last chunk stored without a mask": (OUTPUTS_MASK, OUTPUTS_MASK.replace("m_t[:, None] & ", ""), ""),
    "rows of the batch taken for one": (
        "(i_nh // H).to(tl.int64)",
        "(i_nh // H * 0).to(tl.int64)",
        WRONG,
    ),
    "store before the output": (UPDATE, f"{UPDATE}\n        tl.store(o - 1, 0.0, mask=i_p == 0)", "beside a tensor"),
    "store behind the state": (STORED, "tl.store(p_ht, b_h, mask=m_h | (o_v >= V))", ""),
    "read beyond the sequence": ("(i_r + o_r < T)", "(i_r + o_r < T + 1)", ""),
    "last chunk never written": ("range(tl.cdiv(T, BT))", "range(T // BT)", WRONG),
    "stale state": ("b_h *= b_dh", "b_h *= 1.0", WRONG),
    "initial state left out": (LOADED, "b_h += 0.0", WRONG),
    "swapped heads": (OUTPUT, OUTPUT.replace("i_h", "H - 1 - i_h"), WRONG),
    "state summed in 16 bits": (
        UPDATE,
        f"{UPDATE}\n        b_h = b_h.to(b_q.dtype).to(tl.float32)",
        "states: " + WRONG,
    ),
    "input written to": (UPDATE, f"{UPDATE}\n        tl.store(q, 1.0, mask=i_p == 0)", "an input was written to"),
    "sum added to what nobody cleared": (
        "(b_o * scale)",
        "(b_o * scale + tl.load(o + i_r.to(tl.int64) * (H * V) + p_o))",
        WRONG,
    ),
    "race of two programs": (OUTPUT, OVERLAP, "two runs"),
}
GRADIENTS_FAULTS = {
    "dq without scale": ("(b_o * scale)", "(b_o * tl.where(i_g == 0, 1.0, scale))", WRONG),
    "dk in the direction of dq": (
        "tl.where(i_g == 0, direction, -direction)",
        "tl.where(i_g == 2, -direction, direction)",
        WRONG,
    ),
    "last chunk stored without a mask": (MASKED, MASKED.replace("m_t[:, None] & ", ""), ""),
}
OF_BOTH = "^scores of both, from the last token: " + WRONG
SCORED_FAULTS = {
    "scores as the other direction has them": (
        "product(tl.trans(b_s), b_v",
        "product(b_s, b_v",
        "scores turned: " + WRONG,
    ),
    "scores of the chunk before": ("load_tile(scores, i_t *", "load_tile(scores, tl.maximum(i_t - 1, 0) *", WRONG),
    "sum of one part of K left out": ("b_o += b_p", "b_o += 0.0", WRONG),
    "scores of both for one direction": ("direction = -direction", "direction = direction", OF_BOTH),
    "keys in the queries' place in one of both": ("q, k = k, q", "q, k = q, k", OF_BOTH),
    "scores of both where the other's are": ("i_slot += tl.cdiv(T, BT) - 1 - 2 * i_t", "i_slot += 0", OF_BOTH),
}
STATES_FAULTS = {
    "stale state": ("b_h *= b_dh", "b_h *= 1.0", WRONG),
    "state stored before its decay": ("tl.store(p_hs, b_h,", "tl.store(p_hs, b_h * tl.exp2(-b_g),", WRONG),
    "segment without its last chunk": ("(i_s + 1) * (L // BT)", "(i_s + 1) * (L // BT) - 1", WRONG),
}
SCAN_FAULTS = {
    "stale state": ("b_h *= b_dh", "b_h *= 1.0", WRONG),
    "decay of two segments": ("tl.minimum(T - i_s * L, L)", "2 * tl.minimum(T - i_s * L, L)", WRONG),
    "state after the segment": ("        b_h += b_own\n", "", WRONG),
    "last segment left out": ("tl.range(0, tl.cdiv(T, L)", "tl.range(0, tl.cdiv(T, L) - 1", WRONG),
}
OUTPUTS_FAULTS = {
    "carried state left out": (
        "tl.load(p_hs, mask=m_h, other=0.0).to(tl.float32)",
        "tl.zeros([BK, BV], dtype=tl.float32)",
        WRONG,
    ),
    "state of the segment before": ("(i_slot.to(tl.int64) * H", "(tl.maximum(i_slot - 1, 0).to(tl.int64) * H", WRONG),
}
PARALLEL_FAULTS = {
    "window cut too short": ("-32.0 / b_g", "-1.0 / b_g", WRONG),
    "mask of one token too few": ("o_d >= 0", "o_d > 0", WRONG),
}
RECURRENT_FAULTS = {
    "decay after the addition": ("b_k[:, None] * b_v[None, :]", "b_k[:, None] * b_v[None, :] * (b_a + b_e)", WRONG),
}
# Of a step the form too.
SLOT = "tl.load(state_indices + i_n).to(tl.int64)"
BITS = "random_bits(seed, i_sh, i_t, o_k, i_v, V, BK, BV)"
STEP_FAULTS = {
    "decay left out": ("step", "b_u += b_h * b_e", "b_u += 0.0", WRONG),
    "missing scale": ("step", "b_h, 0) * scale", "b_h, 0)", WRONG),
    "rows in the place of slots": ("step", SLOT, "i_n + 1", "slot that no row"),
    "a row that is skipped takes a slot": ("step", SLOT, f"tl.maximum({SLOT}, 0)", "is skipped"),
    "heads of one state": ("step", "i_s * s_slot + i_h * K * V", "i_s * s_slot", WRONG),
    "columns beyond": ("step", "m_v = o_v < V", "m_v = o_v < V + 8", ""),
    "first token's key again": ("step", "p_k += s_kt", "p_k += 0", "most tokens: " + WRONG),
    "state after the first token": ("step", "(i_t + 1 == T)", "(i_t == 0)", "states after each token: " + WRONG),
    "states not kept": ("step", "p_hs += H.to(tl.int64) * K * V", "p_hs += 0", "states after each token: " + WRONG),
    "first query for all": ("step", "p_q += tl.where(m_g, s_qg,", "p_q += tl.where(m_g, 0,", "grouped heads: " + WRONG),
    "a group's outputs in one place": ("step", "                    p_o += V\n", "", "grouped heads: "),
    "rounded at each token": (
        "step_f16",
        "b_h = b_h * b_a + b_u",
        "b_h = (b_h * b_a + b_u).to(state.dtype.element_ty).to(tl.float32)",
        "most tokens: wrong result: a state is off",
    ),
    "rounded by a seed that was not asked for": ("step_f16", "if STOCHASTIC:\n        x", "if True:\n        x", ""),
    "rounded to the nearest": ("step_f16_seed", "if STOCHASTIC:\n        x", "if False:\n        x", "two seeds give"),
    "rounded towards zero": ("step_f16_seed", BITS, f"{BITS} * 0", "in the mean"),
    "bits that are too few": ("step_f16_seed", "b_r & 0xFFFF", "b_r & 0xFFF", "in the mean"),
    "half of the seed": ("step_f16_seed", "tl.load(seed)", "tl.load(seed).to(tl.int32)", "two seeds give"),
}
FOLD = "n_b + T > most"
NEW_PLACE = "(i_r + n_b + o_j) % (2 * L) * H"
# Of a buffered step the kernel's own text; what it rounds by is in the other's.
BUFFERED_FAULTS = {
    "nothing is folded": ("step_buffered", FOLD, "n_b + T > 1000", "one token: wrong result: a state is off"),
    "folded a token too early": ("step_buffered", FOLD, "n_b + T >= most", "slot that no row stores"),
    "folded a token too late": ("step_buffered", FOLD, "n_b + T > most + 1", "wrong result: a state is off"),
    "all rows fold": ("step_buffered", FOLD, "n_b + T > 0", "slot that no row stores"),
    "the first token is not folded": (
        "step_buffered",
        "o_d = n_b - 1 - o_b",
        "o_d = n_b - 1 - o_b - (o_b == 0) * 99",
        WRONG,
    ),
    "weights of one token more": ("step_buffered", "o_d = n_b - 1 - o_b", "o_d = n_b - o_b", WRONG),
    "the state is not decayed": ("step_buffered", "b_u += b_h * b_e", "b_u += 0.0", "a state is off"),
    "rows that skip by count": ("step_buffered", " & (n_all <= L)", "", "slot that no row stores"),
    "rows of negative counts": ("step_buffered", " & (i_first >= 0)", "", "is skipped"),
    "counts of 32 bits": (
        "step_buffered",
        "tl.load(folded + i_n).to(tl.int64)",
        "tl.load(folded + i_n).to(tl.int32)",
        "",
    ),
    "no ring": ("step_buffered", "o_r = (i_r + o_b) % (2 * L) * H", "o_r = (i_r + o_b) * H", ""),
    "a ring of L rows": ("step_buffered", "(i_r + o_b) % (2 * L)", "(i_r + o_b) % L", WRONG),
    "the new token in another row": ("step_buffered", NEW_PLACE, "(i_r + n_b + o_j + 1) % (2 * L) * H", "buffers have"),
    "the new token beyond the ring": ("step_buffered", NEW_PLACE, "(i_r + n_b + o_j) * H", ""),
    "the new token is not kept": (
        "step_buffered",
        "tl.store(p_kb + o_n * K + o_k[None, :], b_k, mask=m_j[:, None] & m_k[None, :] & (i_v == 0))",
        "pass",
        "buffers have",
    ),
    "the values of one program alone": (
        "step_buffered",
        "b_v, mask=m_j[:, None] & m_v[None, :])",
        "b_v, mask=m_j[:, None] & m_v[None, :] & (o_v < 16)[None, :])",
        "buffers have",
    ),
    "a row that is skipped keeps its token": (
        "step_buffered",
        "m_j = (o_j < T) & is_used",
        "m_j = o_j < T",
        "buffers have",
    ),
    "buffers of one head": ("step_buffered", "k_buffer + i_s * s_kslot + i_h * K", "k_buffer + i_s * s_kslot", ""),
    "buffers by row": ("step_buffered", "k_buffer + i_s * s_kslot", "k_buffer + i_n * s_kslot", ""),
    "the token's own part left out": (
        "step_buffered",
        "sum_alike(b_q * b_k, 1)[:, None]",
        "b_oj",
        "one token: " + WRONG,
    ),
    "rows of a piece that is not full": ("step_buffered", "(o_f < K) | (K % BF == 0)", "o_f < BF", ""),
    "rounded by bits of another place": ("step_buffered_f16_seed", "o_f, i_v, p_h", "o_f * 0, i_v, p_h", ""),
    "rounded to the nearest": ("step_buffered_f16_seed", "BF, BV, STOCHASTIC)", "BF, BV, False)", "two seeds give"),
    "half of the seed": ("step_buffered_f16_seed", "tl.load(seed)", "tl.load(seed).to(tl.int32)", "two seeds give"),
}
WHOLE_FAULTS = {  # what two rows and three heads do not show
    "rows after the second never written": ("bos = i_n * T", "bos = i_n % 2 * T", WRONG),
    "one row that is neither first nor last": (START, START + " + tl.where(i_n == 1, 1e-2, 0.0)", "next one's place"),
    "one head of many": ("(b_o * scale)", "(b_o * scale * tl.where(i_h == 5, 1.0025, 1.0))", WRONG),
    "store before the output": (OUTPUT, f"tl.store(o - 1, 0.0, mask=i_n == 3)\n    {OUTPUT}", "beside a tensor"),
    "race of two programs": (OUTPUT, OVERLAP, "two runs"),
}
Plant = Callable[..., None]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a segment where the pass that stores states is alone: the interpreter is slow."""
    for module in (problems, proof):
        monkeypatch.setattr(module, "STATES_SEGMENT", 128)


def problem_of(part: str, dtype: str = "float16") -> Problem:
    """A small problem of one part."""
    return Problem(part, dtype, 2, 1024, 3, 16, 16 if part == GRADIENTS else 24)


SMALL = problem_of("fused_chunk")


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a module with another text in its kernel in the place of a part's."""

    def put(part: str, old: str, new: str, kernel: str | None = None) -> None:
        name_of, module, _ = KERNELS[part]
        kernel = kernel or name_of
        text = Path(str(module.__file__)).read_text(encoding="utf-8").partition("\nregister_kernel(")[0]
        before, name, after = text.partition(f"def {kernel}(")
        body, end, rest = after.partition("\n\n\n")
        assert old in body
        path = tmp_path / "broken.py"
        path.write_text("".join((before, name, body.replace(old, new, 1), end, rest)), encoding="utf-8")
        broken, form = _module(path, monkeypatch), module.__name__.rpartition(".")[2]
        monkeypatch.setattr(problems, form, broken)
        if part == form:
            monkeypatch.setitem(FORMS, part, replace(FORMS[part], run=getattr(broken, f"{form}_sweep")))

    return put


@pytest.fixture
def either_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the programs of every second launch from the last to the first, as a GPU may."""
    number, begin, go_to = itertools.count(), interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def set_dim(x: int, y: int, z: int) -> None:
        begin(x, y, z)
        turned = next(number) % 2
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda i, *ij: go_to(x - 1 - i if turned else i, *ij))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", go_to)
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", set_dim)


def _module(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = f"generated.retention.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finds(plant: Plant, either_order: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asserts that a part's proof finds a fault, in a draw that it names."""
    monkeypatch.setattr(proof, "TOKENS", 93)  # what a chunk without a mask stores lies within the margin

    def check(part: str, old: str, new: str, said: str, kernel: str | None = None) -> None:
        plant(part, old, new, kernel)
        problem, config = problem_of(part), KERNELS[part][2]
        with pytest.raises(ArithmeticError) as caught:
            proof.prove(problem, config, EXTRA.get(part, {}), "cpu")
        assert said in str(caught.value)
        assert str(caught.value).split(":")[0] in {draw.name for draw in proof.draws(problem, config)}

    return check


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds(form, *FAULTS[fault])


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("fault", GRADIENTS_FAULTS)
def test_every_fault_of_gradients_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds(GRADIENTS, *GRADIENTS_FAULTS[fault])


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("fault", [*SCORED_FAULTS, None])
def test_every_fault_of_scores_that_are_read_is_found(
    form: str, plant: Plant, either_order: None, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, said = SCORED_FAULTS[fault] if fault else ("b_h *= b_dh", "b_h = b_h * b_dh", "")
    plant(form, old, new, "chunk_scores_kernel" if said == OF_BOTH else None)
    monkeypatch.setattr(problems.fused_chunk, "WIDEST_PART", 16)
    monkeypatch.setattr(proof, "TOKENS", 40)
    problem, config = replace(SMALL, K=24), replace(CONFIG, BT=16, transposed=1, scores=1)
    if fault is None:
        assert 0 < proof.prove(problem, config, {}, "cpu") < proof.ERROR_LIMITS["float16"]
        return
    with pytest.raises(ArithmeticError, match=said):
        proof.prove(problem, config, {}, "cpu")


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("fault", STATES_FAULTS)
def test_every_fault_of_stored_states_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds("chunk_states", *STATES_FAULTS[fault])


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("fault", SCAN_FAULTS)
def test_every_fault_of_the_scan_of_states_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds("chunk_states", *SCAN_FAULTS[fault], kernel="chunk_scan_kernel")


@pytest.mark.forms("chunk")
@pytest.mark.parametrize("fault", OUTPUTS_FAULTS)
def test_every_fault_of_outputs_from_states_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds("chunk", *OUTPUTS_FAULTS[fault])


@pytest.mark.forms("parallel")
@pytest.mark.parametrize("fault", PARALLEL_FAULTS)
def test_every_fault_of_parallel_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds("parallel", *PARALLEL_FAULTS[fault])


@pytest.mark.forms("fused_recurrent")
@pytest.mark.parametrize("fault", RECURRENT_FAULTS)
def test_every_fault_of_fused_recurrent_is_found(form: str, finds: Callable[..., None], fault: str) -> None:
    finds("fused_recurrent", *RECURRENT_FAULTS[fault])


@pytest.fixture
def plant_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts another text in the place of the step's kernel, of which draws have few tokens."""
    monkeypatch.setattr(proof, "MOST_STEPS", 3)

    def put(old: str, new: str, owner: Any = step) -> None:
        name = f"{owner.__name__.rpartition('.')[2]}_kernel"
        text = Path(str(owner.__file__)).with_name(f"{name}.py").read_text(encoding="utf-8")
        assert old in text
        path = tmp_path / "broken.py"
        whole = text.replace("from .step_kernel", "from generated.retention.step_kernel")
        # Of a step in the last place: before it come one token's many queries, which go by no rules.
        broken = new.join(whole.rsplit(old, 1)) if owner is step else whole.replace(old, new, 1)
        path.write_text(broken, encoding="utf-8")
        monkeypatch.setitem(sys.modules, f"generated.retention.{name}", _module(path, monkeypatch))
        monkeypatch.setattr(owner, "_launches", {})

    return put


def assert_found(problem: Problem, config: Any, said: str) -> None:
    """Fail unless a draw that a proof consists of finds the fault that was planted, and says so."""
    with pytest.raises(ArithmeticError) as caught:
        proof.prove(problem, config, {}, "cpu")
    assert said in str(caught.value)
    assert str(caught.value).split(":")[0] in {draw.name for draw in proof.draws(problem, config)}


def assert_passes(problem: Problem, config: Any) -> None:
    """Fail unless a proof, also at the full shape, takes a kernel for right, and leaves the inputs as they are."""
    assert 0 < proof.prove(problem, config, {}, "cpu") < proof.ERROR_LIMITS["float16"]
    inputs = problem.inputs("cpu")
    assert 0 < proof.prove_whole(problem, config, {}, inputs) < proof.ERROR_LIMITS["float16"]
    assert proof.same_bits(inputs, problem.inputs("cpu"))


@pytest.mark.forms("step")
@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_every_fault_of_a_step_is_found(form: str, plant_step: Callable[[str, str], None], fault: str) -> None:
    part, old, new, said = STEP_FAULTS[fault]
    plant_step(old, new)
    assert_found(Problem(part, "float16", 2, 1, 3, 16, 24), STEP_CONFIG, said)


@pytest.mark.forms("step")
@pytest.mark.parametrize(
    "part", ["step", "step_f16", "step_f16_seed"]
)  # the interpreter rounds bfloat16 in its own way
def test_right_steps_pass(form: str, part: str, plant_step: Callable[[str, str], None]) -> None:
    plant_step("b_h * b_a + b_u", "b_u + b_h * b_a")
    assert_passes(Problem(part, "float16", 6, 2, 3, 16, 24), STEP_CONFIG)


@pytest.mark.forms("step_buffered")
@pytest.mark.parametrize("fault", BUFFERED_FAULTS)
def test_every_fault_of_a_buffered_step_is_found(form: str, plant_step: Callable[..., None], fault: str) -> None:
    part, old, new, said = BUFFERED_FAULTS[fault]
    plant_step(old, new, step_buffered)
    assert_found(Problem(part, "float16", 2, 1, 3, 24, 24), BUFFERED_CONFIG, said)


@pytest.mark.forms("step_buffered")
@pytest.mark.parametrize("part", ["step_buffered", "step_buffered_f16", "step_buffered_f16_seed"])
def test_right_buffered_steps_pass(form: str, part: str, plant_step: Callable[..., None]) -> None:
    plant_step("b_oh += b_q[:, None] * b_h", "b_oh = b_q[:, None] * b_h + b_oh", step_buffered)
    assert_passes(Problem(part, "float16", 6, 1, 3, 24, 24), BUFFERED_CONFIG)


@pytest.mark.forms("step_buffered")
def test_a_buffered_step_with_one_wrong_row_of_many_is_found(form: str, plant_step: Callable[..., None]) -> None:
    """Though it does not fold in turn."""
    problem = Problem("step_buffered", "float16", 6, 1, 3, 24, 24)
    x = StepInputs.of(problem.form, problem.inputs("cpu"))
    slot = int(x.slots[(x.counts[0] - x.counts[1]).argmin()])
    plant_step("tl.store(p_f, b_s,", f"tl.store(p_f, b_s * tl.where(i_sh // 3 == {slot}, 1.01, 1.0),", step_buffered)
    with pytest.raises(ArithmeticError, match="a state is off"):
        proof.prove_whole(problem, BUFFERED_CONFIG, {}, x.listed)


@pytest.mark.forms("step")
def test_a_step_with_one_wrong_row_of_many_is_found(form: str, plant_step: Callable[[str, str], None]) -> None:
    stored = "round_state(b_h, b_seed, i_sh, T - 1"
    plant_step(stored, stored.replace("b_h", "b_h * tl.where(i_n == 4, 1.001, 1.0)"))
    problem = Problem("step", "float16", 6, 1, 3, 16, 24)
    with pytest.raises(ArithmeticError, match="a state is off"):
        proof.prove_whole(problem, STEP_CONFIG, {}, problem.inputs("cpu"))


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_what_only_the_full_shape_shows_is_found(form: str, plant: Plant, either_order: None, fault: str) -> None:
    old, new, said = WHOLE_FAULTS[fault]
    plant("fused_chunk", old, new)
    with pytest.raises(ArithmeticError, match=said):
        proof.prove_whole(LARGE, CONFIG, {}, LARGE.inputs("cpu"))


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize("mask", ["m_k = o_k < K", "m_v = o_v < V"])
def test_what_heads_that_fill_their_tiles_hide_is_found(form: str, plant: Plant, mask: str) -> None:
    plant(form, mask, f"{mask} + 32")
    with pytest.raises(ArithmeticError, match="narrower heads: "):
        proof.prove(replace(SMALL, K=32, V=32), CONFIG, {}, "cpu")


@pytest.mark.forms("fused_chunk")
@pytest.mark.parametrize(
    ("K", "V", "narrower"),
    [(256, 512, (136, 264)), (64, 16, (40, 8)), (428, 80, (264, 72)), (36, 4, (36, 4)), (136, 72, (136, 72))],
)
def test_narrower_heads_have_the_same_tiles(form: str, K: int, V: int, narrower: tuple[int, int]) -> None:
    other = replace(SMALL, K=K, V=V).narrower()
    assert narrower == (other.K, other.V)
    on_hopper = replace(SMALL, form=proof.HOPPER, K=256, V=512, H=5).narrower()
    assert (on_hopper.H, on_hopper.K, on_hopper.V) == (6, 132, 260)
    assert on_hopper.is_for_hopper or on_hopper.dtype == "float32"
    assert [padded(size) for size in narrower] == [padded(K), padded(V)]
    assert other.default() == replace(SMALL, K=K, V=V).default()


@pytest.mark.forms("fused_chunk")
def test_the_sanitizer_is_shown_every_draw(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Problem, dict[str, Any]]] = []
    run = Problem.run

    def running(problem: Problem, inputs: Any, config: Any, **options: Any) -> Any:
        runs.append((problem, options))
        return run(problem, inputs, config, **options)

    monkeypatch.setattr(Problem, "run", running)
    problem: Any = replace(SMALL, K=32, V=32)
    expected = proof.draws(problem, CONFIG)
    assert sanitized.launch(problem, CONFIG, "cpu") == len(expected) == len(runs)
    for draw, (launched, options) in zip(expected, runs, strict=True):
        assert launched == (problem.narrower() if draw.narrower else problem)
        assert options.items() >= draw.order.items()
        assert (options["cu_seqlens"] is not None) is (len(draw.lengths) > 1)
        assert ("initial_state" in options) is draw.states


@pytest.mark.forms("step")
def test_the_sanitizer_is_shown_every_draw_of_a_step_with_every_configuration(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "MOST_STEPS", 3)
    for part in ("step", "step_buffered"):
        problem = Problem(part, "float16", 1, 1, 1, 16, 24)
        assert sanitized.launch(problem, STEP_CONFIG, "cpu") == len(proof.draws(problem, STEP_CONFIG))
    shown = sanitized.steps("sm90")
    kinds = ("", "_bf16_seed", "_f16_seed")
    assert {problem.form for problem, _ in shown} == {of + kind for of in ("step", "step_buffered") for kind in kinds}
    assert {(config.BV, config.num_warps) for _, config in shown} == {
        (BV, num_warps) for BV in (8, 16, 32, 64, 128) for num_warps in (1, 2, 4, 8)
    }


@pytest.mark.forms("fused_chunk")
def test_planting_alone_breaks_nothing(form: str, plant: Plant, either_order: None) -> None:
    plant(form, "b_h *= b_dh", "b_h = b_h * b_dh")
    assert 0 < proof.prove_whole(LARGE, CONFIG, {}, LARGE.inputs("cpu")) < proof.ERROR_LIMITS["float16"]


@pytest.mark.forms("parallel", "chunk", "fused_chunk", "fused_recurrent")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_right_kernels_pass(form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_token = form == "fused_recurrent"  # each of which the interpreter takes as long for as for a chunk
    monkeypatch.setattr(proof, "TOKENS", 7 if by_token else 40)
    for part in PARTS.get(form, (form,)):
        problem, config, limit = problem_of(part, dtype), KERNELS[part][2], proof.ERROR_LIMITS[dtype]
        if dtype == "float32":
            config = replace(problem.default(), L=64) if part == "chunk" else problem.default()
        assert 0 < proof.prove(problem, config, EXTRA.get(part, {}), "cpu") < limit
        whole = replace(
            problem, B=3, H=2, T=proof.STATES_SEGMENT + 10 if part == "chunk_states" else 9 if by_token else 70
        )
        assert 0 < proof.prove_whole(whole, config, EXTRA.get(part, {}), whole.inputs("cpu")) < limit


@pytest.mark.forms("fused_chunk")
def test_errors_are_those_of_the_worst_head(form: str) -> None:
    wrong, right = torch.ones(1, 3, 3, 3), torch.ones(1, 3, 3, 3, dtype=torch.float64)
    wrong[:, 1] = 1.5
    assert proof._errors(SMALL, [wrong.mT.transpose(1, 2), wrong], [right, right])[1] == 0.5
    assert proof._errors(SMALL, [wrong.transpose(1, 2)], [right]) == [0.5]
    assert proof._errors(replace(SMALL, form="chunk_states"), [wrong[:, None]], [right[:, None]]) == [0.5]
    wrong[0, 0, 0, 0] = torch.nan
    assert not proof._errors(SMALL, [wrong], [right])[0] < 1


@pytest.mark.forms("fused_chunk")
def test_an_output_that_is_near_zero_by_chance_may_be_off_by_rounding(form: str) -> None:
    right = torch.full((1, 1, 96, 16), 1e-3, dtype=torch.float64)
    assert proof._errors(SMALL, [right + 1e-7], [right])[0] < proof.ERROR_LIMITS["float32"]
    assert proof._errors(SMALL, [right + 1e-7], [right], 2.0**-60)[0] > proof.ERROR_LIMITS["float32"]


@pytest.mark.forms("chunk")
def test_segments_are_looked_at_where_there_are_any(form: str) -> None:
    problem = replace(SMALL, form="chunk", T=4096)
    for L, tokens in ((256, 2 * 256 + proof.TOKENS), (1 << 20, proof.TOKENS)):
        lengths = [draw.lengths for draw in proof.draws(problem, replace(problem.default(), L=L))]
        assert max(map(max, lengths)) == tokens


@pytest.mark.forms("fused_chunk")
def test_new_tensors_lie_between_margins_full_of_nan(form: str) -> None:
    guard = proof.Guard()
    with guard:
        made: list[Tensor] = [torch.empty(3, 5), torch.empty_like(torch.ones(4)), torch.ones(2).new_empty(7)]
    assert all(x.isnan().all() for x in made)
    guard.check()
    made[0].fill_(1.0)
    guard.check()
    beside: Any = made[1].as_strided((1,), (1,), made[1].storage_offset() + 4)
    beside.fill_(0.0)
    with pytest.raises(ArithmeticError, match="beside a tensor"):
        guard.check()
