"""What launchers ask before a launch holds where no GPU is needed to see it."""

from __future__ import annotations

import pytest
import torch

import generated
from generated.launch import padded


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


def test_compiled_code_refuses_wrong_offsets_too() -> None:
    x = torch.randn(1, 8, 1, 2)
    run = torch.compile(lambda q, offsets: generated.chunk_retention(q, q, q, cu_seqlens=offsets)[0], backend="eager")
    with pytest.raises(ValueError, match="must end at T = 8"):
        run(x, torch.tensor([0, 3, 7]))
