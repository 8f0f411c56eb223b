"""Pictures, by matplotlib where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tuning.run import RunError


def check_available() -> None:
    """Raise RunError where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("--plot needs matplotlib, which is not installed: pip install 'retgen[plot]'")


def figure(width: float, height: float) -> Any:
    """A new figure, of so many inches, that no display shows."""
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def strip(axes: Any) -> None:
    """Leave a plot only the frame that its axes need, and a faint grid."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
