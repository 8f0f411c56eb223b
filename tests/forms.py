"""The public functions by the names of their forms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import generated

FORMS = ("naive", "parallel", "chunk", "fused_chunk", "fused_recurrent", "auto")
WITH_STATES = tuple(form for form in FORMS if form != "parallel")

all_forms = pytest.mark.parametrize("form", FORMS)
forms_with_states = pytest.mark.parametrize("form", WITH_STATES)

Function = Callable[..., Any]


def public(form: str) -> Function:
    """The function that a user calls; `segments` is chunk in segments of two chunks or more, also where T is small."""
    if form == "segments":
        return functools.partial(generated.chunk_retention, chunk_size=128)
    return generated.retention if form == "auto" else getattr(generated, f"{form}_retention")


def has_states(form: str) -> bool:
    """Whether a form takes and returns states."""
    return form != "parallel"
