"""What launchers ask before a launch holds where no GPU is needed to see it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from forms import all_forms, public
from torch import Tensor
from torch.autograd import forward_ad

import generated
from generated import configuration, known
from generated import launch as launching
from generated.launch import choose_config, dot_precision, has_aligned_rows, padded, use_descriptors
from generated.retention import auto, chunk, fused_chunk, fused_recurrent, operators, parallel
from tuning.compilation import ARCHS, offline


@pytest.mark.parametrize(("size", "width"), [(1, 16), (16, 16), (17, 32), (256, 256), (428, 512)])
def test_a_tile_is_a_power_of_two_that_holds_the_width(size: int, width: int) -> None:
    assert padded(size) == width


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_forward_mode_is_refused_instead_of_losing_the_tangent() -> None:
    x = torch.randn(1, 4, 1, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: generated.chunk_retention(q, q, q)[0], (x,), (x,))


@pytest.mark.parametrize("rate", [float("nan"), float("-inf"), 0.5, -61.0])
def test_a_decay_that_is_none_is_refused(rate: float) -> None:
    x = torch.randn(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"g_gamma holds .* must be from -60 to 0"):
        generated.chunk_retention(x, x, x, g_gamma=torch.tensor([rate]))


@all_forms
def test_compiled_code_refuses_wrong_offsets_too(form: str) -> None:
    x = torch.randn(1, 8, 1, 2)
    run = torch.compile(lambda q, offsets: public(form)(q, q, q, cu_seqlens=offsets)[0], backend="eager")
    with pytest.raises(ValueError, match="must end at T = 8"):
        run(x, torch.tensor([0, 3, 7]))


@pytest.mark.parametrize(
    ("dtype", "K", "V", "aligned"),
    [
        (torch.bfloat16, 64, 33, False),
        (torch.float16, 1, 2, False),
        (torch.bfloat16, 34, 18, True),
        (torch.float32, 1, 3, True),
    ],
)
def test_rows_are_aligned_at_multiples_of_four_bytes(dtype: torch.dtype, K: int, V: int, aligned: bool) -> None:
    assert has_aligned_rows(dtype, K, V) is aligned


@pytest.mark.parametrize(
    ("dtype", "K", "V", "ruled"),
    [
        (torch.bfloat16, 64, 72, True),
        (torch.bfloat16, 60, 64, False),
        (torch.bfloat16, 64, 66, False),
        (torch.float32, 60, 64, True),
    ],
)
@pytest.mark.parametrize("descriptors", [0, 1])
def test_a_rule_that_goes_by_descriptors_is_used_only_where_rows_begin_at_multiples_of_16_bytes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, K: int, V: int, ruled: bool, descriptors: int
) -> None:
    rule = fused_chunk.FusedChunkConfig(BT=32, BV=16, num_warps=8, num_stages=3, descriptors=descriptors)
    default = fused_chunk.default_config
    monkeypatch.setattr(launching, "select_config", lambda *_, **shape: rule)
    q, v = (torch.empty(1, 8, 1, width, dtype=dtype) for width in (K, V))
    expected = rule if ruled or not descriptors else default(dtype, K, V, 1, 8)
    assert choose_config(fused_chunk.KERNEL, fused_chunk.FusedChunkConfig, default, q, v, None) == expected
    assert use_descriptors(expected, dtype, K, V) == bool(expected.descriptors)


def test_a_rule_without_tiles_is_used_whatever_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, x = auto.FormConfig("parallel"), torch.empty(1, 8, 1, 66, dtype=torch.bfloat16)
    monkeypatch.setattr(launching, "select_config", lambda *_, **shape: rule)
    assert choose_config(auto.KERNEL, auto.FormConfig, auto.default_config, x, x, None) == rule


@pytest.fixture
def matmul_precision() -> Iterator[Any]:
    """PyTorch's switches of the float32 precision, set back afterwards."""
    matmul = torch.backends.cuda.matmul
    yield matmul
    matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_float32_is_multiplied_as_pytorch_was_told_by_either_of_its_switches(matmul_precision: Any) -> None:
    found = []
    for precision in ("highest", "high", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        found.append(dot_precision(torch.float32))
    for precision in ("tf32", "ieee"):
        matmul_precision.fp32_precision = precision
        found.append(dot_precision(torch.float32))
    assert found == ["tf32x3", "tf32", "tf32", "tf32x3", "tf32", "tf32x3"]
    assert dot_precision(torch.float16) == "ieee"


def test_prepared_calls_of_ever_new_shapes_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "CACHE_LIMIT", 4)
    prepared: list[int] = []
    calls = operators._PreparedCalls(
        lambda q, *_: prepared.append(q.shape[1]), lambda q, *_: q.shape[1], None, operators.KnownCalls()
    )
    for T in (1, 2, 3, 3, 4, 5, 5, 6):
        x = torch.randn(1, T, 1, 2)
        assert calls(x, x, x, None, None, None, False, None, False, False, None) == T
        assert len(calls._kinds) <= 4
    assert prepared == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("form", "together", "V", "gradients"),
    [
        ("chunk", "fused_chunk", 64, fused_chunk.run_gradients),
        ("fused_chunk", "fused_chunk", 64, fused_chunk.run_gradients),
        ("parallel", "fused_chunk", 64, fused_chunk.run_gradients),
        ("parallel", "sweeps", 64, operators._run_sweeps),
        ("parallel", "sweeps", 32, operators._run_sweeps),
        ("fused_chunk", "sweeps", 64, operators._run_sweeps),
        ("fused_chunk", "fused_chunk", 32, operators._run_sweeps),
        ("fused_recurrent", "sweeps", 64, None),  # which does not know before
    ],
)
def test_auto_prepares_the_gradients_that_its_rules_choose(
    form: str, together: str, V: int, gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {auto.KERNEL: auto.FormConfig(form), auto.GRADIENTS_KERNEL: auto.GradientsFormConfig(together)}
    monkeypatch.setattr(auto, "choose_config", lambda kernel, *_: chosen[kernel])
    q, v = torch.randn(2, 64, 4, 64), torch.randn(2, 64, 4, V)
    ready = auto.auto_ready(q, v, 1.0, None, False, None)
    if gradients is None:
        assert ready is None
        return
    assert ready is not None
    assert ready.gradients.func is gradients  # type: ignore[union-attr]
    own = parallel if form == "parallel" else fused_chunk
    sweeps = [ready.output, *(ready.gradients.args[2:] if gradients is operators._run_sweeps else [])]  # type: ignore[union-attr]
    assert [sweep.func for sweep in sweeps] == [own.run_output] * len(sweeps)  # type: ignore[attr-defined]


@pytest.mark.parametrize("save_states", [0, 1])
def test_sweeps_in_segments_are_prepared_unless_they_save_their_states(
    save_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {"BT": 16, "BV": 16, "num_warps": 4, "num_stages": 1, "save_states": save_states}
    configuration.clear_caches()
    monkeypatch.setattr(chunk, "default_config", lambda *_: chunk.ChunkConfig(L=32, **tiles))
    for V in (16, 32):
        ready = chunk.chunk_ready(torch.randn(2, 64, 4, 16), torch.randn(2, 64, 4, V), 1.0, None, False, None)
        assert (ready is None) == bool(save_states)
        if ready is not None:
            share, have_states, *sweeps = ready.gradients.args  # type: ignore[union-attr]
            assert (share, have_states) == (None, True)
            assert [sweep.func for sweep in (ready.output, *sweeps)] == [chunk.run_segments] * 4  # type: ignore[attr-defined]
    configuration.clear_caches()


@pytest.mark.parametrize(
    ("dtype", "K", "V", "BH", "T", "form", "L"),
    [
        (torch.bfloat16, 256, 512, 1, 512, "parallel", 128),
        (torch.bfloat16, 256, 512, 9, 512, "chunk", chunk.WHOLE),
        (torch.bfloat16, 512, 256, 1, 256, "chunk", 128),
        (torch.bfloat16, 64, 64, 16, 1024, "chunk", 128),
        (torch.bfloat16, 64, 64, 17, 1024, "chunk", 256),
        (torch.bfloat16, 64, 64, 1, 128, "parallel", chunk.WHOLE),
        (torch.float32, 64, 32, 1, 512, "chunk", chunk.WHOLE),
    ],
)
def test_little_work_is_in_parallel_or_in_short_segments(
    dtype: torch.dtype, K: int, V: int, BH: int, T: int, form: str, L: int
) -> None:
    assert auto.default_config(dtype, K, V, BH, T).form == form
    assert chunk.default_config(dtype, K, V, BH, T).L == L


@pytest.mark.parametrize("form", ["fused_chunk", "parallel", "chunk"])
def test_packed_sequences_are_chunks_whatever_their_mean(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "choose_config", lambda *_: auto.FormConfig(form))
    q = torch.empty(1, 300, 2, 16)
    assert auto.chosen_form(q, q, None) == form
    assert auto.chosen_form(q, q, torch.tensor([0, 1, 2, 300])) == "chunk"


@pytest.mark.parametrize(
    ("sequences", "mean", "K", "L"),
    [
        (8, 2048, 256, 2048),
        (11, 1489, 128, 2048),
        (11, 1489, 512, 4096),
        (64, 400, 128, 1024),
        (64, 300, 128, 2048),
        (64, 250, 128, chunk.WHOLE),
        (4096, 16, 128, chunk.WHOLE),
        (1024, 64, 512, chunk.WHOLE),
        (1, 131072, 128, 4096),
        (2, 4096, 64, 256),  # little work
    ],
)
def test_packed_sequences_are_cut_unless_the_states_would_take_more_than_v(
    sequences: int, mean: int, K: int, L: int
) -> None:
    q, v = (torch.empty(1, sequences * mean, 4, width, dtype=torch.bfloat16, device="meta") for width in (K, 128))
    offsets = torch.empty(sequences + 1, dtype=torch.int64, device="meta")
    config = chunk.segments_of(q, v, offsets)
    assert config.L == L
    if L < chunk.WHOLE:
        hs = chunk.segment_states(q, v, offsets, L)
        assert hs.numel() * hs.itemsize <= v.numel() * v.itemsize


class Device:
    """Stands for Triton, its driver and a GPU: records what is dispatched by Triton and what is launched directly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dispatched: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.hooked: list[tuple[Any, ...]] = []
        self.kernel: Any = Compiled(self)
        active = SimpleNamespace(get_current_stream=lambda index: f"stream {index}")
        monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(launching, "current_device", lambda: 1)
        monkeypatch.setattr(launching, "_compiled", {})
        monkeypatch.setattr(launching._thread, "has_context", True)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def dispatch(*arguments: Any, **options: Any) -> Any:
            self.dispatched.append((grid, arguments, options))
            return self.kernel

        return dispatch

    def launch(
        self, *addresses: int | None, programs: int = 7, numbers: tuple[float, ...] = (0.5, 3), warps: int = 4
    ) -> None:
        tensors = tuple(None if address is None else fake_tensor(address) for address in addresses)
        launching.Launch(self, programs, numbers, (8, 1), {"BT": 64, "EVEN": True}, warps, 2)(*tensors)


class Compiled:
    """Stands for a compiled kernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, device: Device) -> None:
        self.run = lambda *arguments: device.launched.append(arguments)
        self._hooked = device.hooked

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._hooked.append((grid, arguments))


def fake_tensor(address: int) -> Any:
    return SimpleNamespace(
        data_ptr=lambda: address,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 1),
        get_device=lambda: 1,
        is_cuda=True,
    )


def test_triton_dispatches_a_kernel_once_and_then_it_is_launched_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.launch(16, None, 32)
    device.launch(48, None, 64, programs=9, numbers=(0.25, 4))
    ((grid, arguments, options),) = device.dispatched
    assert grid == (7,)
    assert [None if x is None else x.data_ptr() for x in arguments[:3]] == [16, None, 32]
    assert arguments[3:] == (0.5, 3, 8, 1)
    assert options == {"BT": 64, "EVEN": True, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    head = (9, 1, 1, "stream 1", "function", "metadata", None, None, None)
    assert device.launched == [(*head, 48, None, 64, 0.25, 4, 8, 1, 64, True)]


def test_what_triton_would_compile_otherwise_is_dispatched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.launch(16, None)
    device.launch(16, 32)  # a tensor where there was none
    device.launch(16, None, warps=8)
    assert len(device.dispatched) == 3
    device.launch(16, 40)  # not a multiple of 16: another kernel, which is not kept
    device.launch(16, 40)
    assert len(device.dispatched) == 5
    assert not device.launched
    device.launch(16, 32)
    assert len(device.launched) == 1


def test_a_launch_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    launch = launching.Launch(device, 5, (0.5,), (), {"BT": 64}, 4, 2)
    for address in (16, 32, 8, 48):
        launch(fake_tensor(address))
    assert len(device.dispatched) == 2  # the first, and the one that is not aligned
    assert [arguments[9:] for arguments in device.launched] == [(32, 0.5, 64), (48, 0.5, 64)]


class Started(Compiled):
    """A compiled kernel of two tensors, None and numbers, as Triton describes it, which PyTorch may start."""

    def __init__(self, device: Device, **metadata: Any) -> None:
        super().__init__(device)
        least = {"num_ctas": 1, "num_warps": 4, "shared": 512, "launch_cooperative_grid": False, "launch_pdl": False}
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        self.metadata = SimpleNamespace(**least | scratch | metadata)
        kinds = {
            "q": "*bf16",
            "indices": "constexpr",
            "o": "*bf16",
            "scale": "fp32",
            "T": "i32",
            "s_q": "i32",
            "s_o": "i32",
        }
        kinds |= {"BT": "constexpr", "EVEN": "constexpr"}
        self.src = SimpleNamespace(signature=kinds, constants={(1,): None, (6,): 1, (7,): 64, (8,): True})


def start_by_pytorch(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", SimpleNamespace(_launch_kernel=launch), raising=False)


def test_pytorchs_launcher_starts_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that the kernel takes, by their kinds: what is constant, a stride of 1 too, is none."""
    device, started = Device(monkeypatch), list[Any]()
    start_by_pytorch(monkeypatch, lambda *arguments: started.append(arguments))
    device.kernel = Started(device)
    for _ in range(3):
        device.launch(16, None, 32)
    call = ("function", 7, 1, 1, 4, 512, "OOfiiOO", (16, 32, 0.5, 3, 8, None, None), "stream 1")
    assert started == [call] * 2
    assert len(device.dispatched) == 1
    assert not device.launched


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
    ],
    ids=str,
)
def test_triton_launches_what_pytorchs_launcher_does_not_know(
    metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, started = Device(monkeypatch), list[Any]()
    start_by_pytorch(monkeypatch, lambda *arguments: started.append(arguments))
    device.kernel = Started(device, **metadata)
    for _ in range(2):
        device.launch(16, None, 32)
    assert len(device.launched) == 1
    assert not started


@pytest.mark.parametrize("kind", ["tensordesc<bf16[64, 64]>", "fp64"])
def test_triton_launches_with_arguments_of_other_kinds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start_by_pytorch(monkeypatch, lambda *_: None)
    compiled, arguments = Started(Device(monkeypatch)), (0.5, 3, 8, 1, 64, True)
    assert launching.start_of(compiled, 7, 3, arguments) is not None
    assert launching.start_of(compiled, 7, 3, (0.5, 2**31, *arguments[2:])) is None  # it would be cut off
    compiled.src.signature["scale" if kind == "fp64" else "q"] = kind
    assert launching.start_of(compiled, 7, 3, arguments) is None


def test_triton_launches_where_pytorchs_launcher_takes_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = Device(monkeypatch), list[Any]()

    def refuse(*arguments: Any) -> None:
        asked.append(arguments)
        raise TypeError("function takes exactly 10 arguments (9 given)")

    start_by_pytorch(monkeypatch, refuse)
    device.kernel = Started(device)
    launch = launching.Launch(device, 7, (0.5, 3), (8, 1), {"BT": 64, "EVEN": True}, 4, 2)
    for _ in range(3):
        launch(fake_tensor(16), None, fake_tensor(32))
    assert len(asked) == 1
    assert [arguments[9:] for arguments in device.launched] == [(16, None, 32, 0.5, 3, 8, 1, 64, True)] * 2


def test_triton_launches_all_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    device, started = Device(monkeypatch), list[Any]()
    start_by_pytorch(monkeypatch, lambda *arguments: started.append(arguments))
    monkeypatch.setattr(launching, "LAUNCHER", "triton")
    device.kernel = Started(device)
    for _ in range(2):
        device.launch(16, None, 32)
    assert len(device.launched) == 1
    assert not started


def test_a_thread_has_the_gpus_context_before_anything_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, seen = Device(monkeypatch), list[str]()
    start_by_pytorch(monkeypatch, lambda *_: seen.append("start"))
    monkeypatch.setattr(launching._thread, "has_context", False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: seen.append("context")))
    device.kernel = Started(device)
    for _ in range(3):
        device.launch(16, None, 32)
    assert seen == ["context", "start", "start"]


def test_what_is_compiled_side_by_side_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())  # there may be none
    q, v, rates = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((1, 64, 2, 32), (1, 64, 2, 64), 2)
    )
    ready = fused_chunk.fused_chunk_ready(q, v, 0.5, None, False, None)
    assert ready is not None
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **_: compiled.append(src.fn.__name__))
    with offline(ARCHS["sm90"].target):
        operators._compile_all(ready, q, q, v, rates, None, None, False, None)
        ahead = list(compiled)
        assert ahead == ["fused_chunk_kernel"] * 2  # of the output and the gradient of v, and of those of q and k
        ready.output(q, q, v, rates, None)
        ready.gradients(q, q, v, v, rates, None)  # type: ignore[misc]
    assert compiled == ahead
    assert launching._compiles_only.get() is None


def test_a_kind_is_compiled_side_by_side_at_its_first_call_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(operators, "_compile_all", lambda ready, *_: compiled.append(ready))
    monkeypatch.setattr(operators._PreparedCalls, "_prepared", lambda _, ready, *__: lambda *inputs: ready)
    calls = operators._PreparedCalls(lambda *_: "ready", lambda *_: "not ready", None, None)  # type: ignore[arg-type,return-value]
    x = torch.empty(1, 64, 2, 16, device="meta")
    on_gpu: Any = type("OnGpu", (Tensor,), {"is_cuda": True})
    q, leaf = x.as_subclass(on_gpu), x.clone().requires_grad_().as_subclass(on_gpu)
    for number, (tensor, expected) in enumerate([(q, 0), (q, 0), (leaf, 1), (leaf, 1), (q, 1)]):
        inputs = (tensor, tensor, tensor, None, 0.5, None, False, None, False, None, None)
        assert calls(*inputs) == "ready"
        assert len(compiled) == expected, number


def test_what_fails_to_compile_side_by_side_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    q, rates = torch.empty(1, 64, 2, 16, dtype=torch.bfloat16, device="meta"), torch.empty(2, device="meta")
    ready = fused_chunk.fused_chunk_ready(q, q, 0.25, None, False, None)
    assert ready is not None

    def fail(*_: object, **__: object) -> None:
        raise OSError("no room on the disk")

    with offline(ARCHS["sm90"].target):
        with pytest.MonkeyPatch.context() as patch:
            for kernel in (fused_chunk.fused_chunk_kernel, fused_chunk.fused_chunk_gradients_kernel):
                assert kernel.device_caches[90]  # by which it gets its compiler
                patch.setattr(kernel, "compile", fail)
            operators._compile_all(ready, q, q, q, rates, None, None, False, None)
            with pytest.raises(OSError, match="no room"):
                ready.output(q, q, q, rates, None)
        ready.output(q, q, q, rates, None)


def test_a_kernel_that_another_thread_compiles_side_by_side_is_kept_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    device, ahead = Device(monkeypatch), Future[Any]()
    ahead.set_result(Compiled(device))
    monkeypatch.setattr(device, "kernel", triton.FutureKernel(lambda _: None, ahead))
    device.launch(16)
    assert list(launching._compiled.values()) == [ahead.result()]


def test_nothing_is_launched_while_it_is_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    device = Device(monkeypatch)
    warmed: list[Any] = []
    device.warmup = lambda *arguments, grid, **options: warmed.append((grid, arguments[1:], options))  # type: ignore[attr-defined]
    launching.compile_side_by_side(lambda: device.launch(16, None), torch.device("cuda", 1))
    assert [(grid, numbers) for grid, numbers, _ in warmed] == [((7,), (None, 0.5, 3, 8, 1))]
    assert not device.dispatched
    device.launch(16, None)
    assert len(device.dispatched) == 1


def test_a_profilers_hook_sees_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.launch(16)
    monkeypatch.setattr(launching, "runtime", SimpleNamespace(launch_enter_hook=lambda _: None, launch_exit_hook=None))
    device.launch(16)
    ((grid, arguments),) = device.hooked
    assert grid == (7, 1, 1)
    assert arguments[1:] == (0.5, 3, 8, 1, 64, True)
    assert not device.launched


def test_the_recurrence_is_launched_straight_by_calls_like_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, as if that were a GPU; nothing is computed."""
    device, ran = Device(monkeypatch), []
    q, k, rates = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 16), torch.tensor([-0.1, -0.2, -0.3])
    v, state = torch.randn(2, 1, 3, 8), torch.randn(2, 3, 16, 8)
    configuration.clear_caches()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(launching, "current_device", lambda: None)
    monkeypatch.setattr(known, "current_device", lambda: -1)
    monkeypatch.setattr(fused_recurrent, "fused_recurrent_kernel", device)
    monkeypatch.setattr(fused_recurrent, "check_decay", lambda *_: None)
    monkeypatch.setattr(fused_recurrent, "OPERATOR", lambda *_: ran.append(1) or (v.clone(), state.clone()))
    monkeypatch.setattr(launching, "_compiled", {})

    def call(**options: Any) -> Any:
        inputs = {"q": q, "k": k, "v": v, "g_gamma": rates, "initial_state": state, "output_final_state": True}
        return generated.fused_recurrent_retention(**inputs | options)

    call()
    results = [call() for _ in range(3)]
    assert len(ran) == 1
    assert len({x.data_ptr() for pair in results for x in pair}) == 6
    for o, final_state in results:
        assert (o.shape, o.dtype, final_state.shape) == (v.shape, v.dtype, state.shape)
    monkeypatch.setattr(launching, "_compiled", launching._compiled | dict.fromkeys(launching._compiled, device.kernel))
    for other in ({"q": q.clone().requires_grad_()}, {"reverse": True}, {"scale": 2.0}, {"g_gamma": rates[:2]}):
        call(**other)
    assert len(ran) == 5
    misaligned = torch.zeros(q.numel() + 1)[1:].view(q.shape)
    call(q=misaligned)
    assert len(ran) == 6
    launched = [[x if x is None else x.data_ptr() for x in arguments[:8]] for _, arguments, _ in device.dispatched]
    for tensors, (o, final_state) in zip(launched, results, strict=True):
        assert tensors == [*(x.data_ptr() for x in (q, k, v, o, rates, state, final_state)), None]


def test_room_for_results_is_like_one_that_was_made() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            like = torch.zeros(2, 1, 3, 5, dtype=torch.bfloat16)
            room = known.maker_of(like)()
            assert known._looks(room) == known._looks(like)


def test_states_are_saved_where_a_sweep_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"BT": 16, "BV": 16, "num_warps": 4, "num_stages": 1, "save_states": 1}
    monkeypatch.setattr(chunk, "default_config", lambda *_: chunk.ChunkConfig(L=chunk.WHOLE, **tiles))
    q, offsets = torch.empty(1, 936, 1, 16), torch.tensor([0, 5, 305, 905, 906, 936])
    assert chunk.segments_of(q, q, offsets).L < 936
    assert not chunk.chunk_saves(q, q, False, offsets, None)  # one launch gives all gradients, uncut
    assert chunk.chunk_saves(q, q, True, offsets, None)
    assert chunk.chunk_saves(q, q, False, offsets, 64)


@pytest.mark.parametrize("L", [48, 0])
def test_a_segment_holds_whole_chunks_of_the_states_too(L: int) -> None:
    with pytest.raises(ValueError, match=f"L is {L}"):
        chunk.ChunkConfig(L=L, BT=16, BV=16, num_warps=4, num_stages=1)


@pytest.mark.parametrize("scale", [1, 2, True, 0.5])
def test_kernels_get_a_float_for_every_scale(scale: float) -> None:
    """Triton compiles another kernel for an integer, and a third one for 1."""
    operators = importlib.import_module("generated.retention.operators")
    seen = []

    def sweep(q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor, scale: float, **_: Any) -> Tensor:
        seen.append(scale)
        return torch.empty_like(v)

    x = torch.randn(1, 2, 1, 3)
    operators._forward(sweep, x, x, x, None, scale, None, False, None, False, False, None)
    assert seen == [scale]
    assert type(seen[0]) is float


@pytest.mark.parametrize("name", ["q", "v", "initial_state", "g_gamma"])
@pytest.mark.parametrize("form", ["naive", "chunk"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_no_inputs_tangent_is_lost(form: str, name: str) -> None:
    x = torch.randn(1, 4, 2, 3)
    inputs = {"q": x, "k": x, "v": x, "initial_state": torch.randn(1, 2, 3, 3), "g_gamma": torch.tensor([-0.1, -0.2])}
    with forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(generated, f"{form}_retention")(**inputs)
