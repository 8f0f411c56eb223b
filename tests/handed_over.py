"""A kernel without a race in which racecheck finds some: one group of warps hands numbers to another in shared memory.

They are written, all of the group's warps meet at a barrier of their own, one thread arrives at an mbarrier, and the
other group waits there before it reads: by PTX's memory model what came before the barrier is seen.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from generated.retention.fused_chunk_hopper_kernel import barrier

SIZE = gl.constexpr(512)
LAYOUT = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def take(o, x_s, is_here):  # noqa: ANN001, ANN201 - Triton gives the arguments types
    mbarrier.wait(is_here, 0)
    gl.store(o + gl.arange(0, SIZE, layout=LAYOUT), x_s.load(LAYOUT))


@gluon.jit
def give(o, x_s, is_here):  # noqa: ANN001, ANN201
    x_s.store(gl.arange(0, SIZE, layout=LAYOUT))
    barrier()
    mbarrier.arrive(is_here)


@gluon.jit
def handing_recurrent_kernel(o):  # noqa: ANN001, ANN201 - a name that the sanitizer looks at
    x_s = gl.allocate_shared_memory(gl.int32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    is_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(is_here, count=1)
    barrier()
    gl.warp_specialize([(take, (o, x_s, is_here)), (give, (o, x_s, is_here))], [4], [64])


def hand_over() -> None:
    """Launch it, and see that what arrives is right."""
    o = torch.full((SIZE.value,), -1, dtype=torch.int32, device="cuda")
    for _ in range(8):
        handing_recurrent_kernel[(256,)](o.fill_(-1), num_warps=4)
        assert torch.equal(o.cpu(), torch.arange(SIZE.value, dtype=torch.int32))
