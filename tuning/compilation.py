"""Compile a launch without a GPU, and read from the binary what it will cost there."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Arch:
    """What a generation of GPUs offers a program: shared memory in bytes, and per multiprocessor its limits.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    name: str
    shared: int
    shared_per_sm: int
    warps_per_sm: int

    @property
    def target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", int(self.name.removeprefix("sm")), 32)


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm80", shared=166_912, shared_per_sm=167_936, warps_per_sm=64),
        Arch("sm86", shared=101_376, shared_per_sm=102_400, warps_per_sm=48),
        Arch("sm89", shared=101_376, shared_per_sm=102_400, warps_per_sm=48),
        Arch("sm90", shared=232_448, shared_per_sm=233_472, warps_per_sm=64),
        Arch("sm100", shared=232_448, shared_per_sm=233_472, warps_per_sm=64),
        Arch("sm120", shared=101_376, shared_per_sm=102_400, warps_per_sm=48),
    )
}

TENSOR_MEMORY = 512  # columns, where there is any
REGISTER_UNIT = 8  # a thread is given a multiple of so many registers: a warp 256 at a time
SIZED, REGISTERS, FRAME = 4, 0x2F, 0x11  # in .nv.info: a format with a size, and two kinds, a number for each function


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: registers and spilled bytes a thread, shared memory in bytes a program.

    On sm100 also columns of tensor memory a program. `digest` tells the machine code: equal code, equal digest.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    tensor_memory: int = 0
    digest: str = ""

    def fits(self, arch: Arch) -> bool:
        """Whether a multiprocessor can hold a program; where not, Triton compiles the kernel and fails to launch it."""
        return self.excess(arch) is None

    def excess(self, arch: Arch) -> str | None:
        """What a program needs more of than a multiprocessor has, with both figures; None where it fits."""
        if self.shared > arch.shared:
            return f"{self.shared} bytes of shared memory; {arch.name} has {arch.shared}"
        if self.tensor_memory > TENSOR_MEMORY:
            return f"{self.tensor_memory} columns of tensor memory; {arch.name} has {TENSOR_MEMORY}"
        return None

    def blocks_per_sm(self, arch: Arch) -> int:
        """How many programs a multiprocessor holds at once; 0 if one is too much for it."""
        if not self.fits(arch):
            return 0
        by_shared = arch.shared_per_sm // (self.shared + 1024)  # the driver keeps 1 KiB of each block's
        registers = -(-max(self.registers, 16) // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = 65536 // (registers * 32 * self.warps)
        return min(32, by_shared, by_registers, arch.warps_per_sm // self.warps)


class _OfflineDriver:
    """Stands for Triton's driver where only a target is needed."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps compiled kernels by device: one for each target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Any]]:
    """Within it, launching any Triton kernel only compiles it for `target`; collects what was compiled.

    Tensors may be on the meta device. The compiled code lands in Triton's cache under the key that a launch asks for.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    JITFunction.run = compile_only
    driver.set_active(_OfflineDriver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


def compile_launch(launch: Callable[[], object], arch: Arch) -> list[Resources]:
    """Compile every kernel that `launch` would launch; raises whatever the compiler raises."""
    with offline(arch.target) as compiled:
        launch()
    return [resources(kernel) for kernel in compiled]


def resources(kernel: Any) -> Resources:
    """Read what a compiled kernel needs from its metadata and its cubin."""
    code = read_cubin(kernel.asm["cubin"])
    return Resources(
        registers=code.registers,
        spills=code.stack,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        digest=code.digest,
    )


@dataclass(frozen=True)
class MachineCode:
    """What a cubin holds of its one kernel: registers and bytes of stack a thread, and a hash of code and constants."""

    registers: int
    stack: int
    digest: str


def read_cubin(cubin: bytes) -> MachineCode:
    """Read a cubin, an ELF file of 64 bits; `cuobjdump -res-usage` says the same, but takes a process for it."""
    registers, stack, digest = 0, 0, hashlib.sha256()
    for name, content in _sections(cubin):
        if name.startswith((".text.", ".nv.constant")):
            digest.update(content)
        if name == ".nv.info":
            registers, stack = (_attribute(content, kind) for kind in (REGISTERS, FRAME))
    return MachineCode(registers, stack, digest.hexdigest()[:32])


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQII", cubin, offset + i * size) for i in range(count)]
    for name, _, _, _, start, length, _, _ in heads:
        at = heads[names][4] + name
        yield cubin[at : cubin.index(b"\0", at)].decode(), cubin[start : start + length]


def _attribute(attributes: bytes, wanted: int) -> int:
    """The greatest number of one kind in .nv.info, where each attribute is a format, a kind, and a size or a value."""
    at, found = 0, 0
    while at < len(attributes):
        form, kind, size = struct.unpack_from("<BBH", attributes, at)
        if (form, kind) == (SIZED, wanted):
            found = max(found, struct.unpack_from("<II", attributes, at + 4)[1])
        at += 4 + (size if form == SIZED else 0)
    return found
