"""Tests of the Triton kernels on the CPU, by Triton's interpreter. Run by test_kernels_interpreted.py, a form each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before these tests start: Triton reads it where it decorates a kernel")

FORMS = ("parallel", "chunk", "fused_chunk", "fused_recurrent", "auto")
STEPS = ("step", "step_buffered")
CHOICES = (*FORMS, *STEPS)


def _call_once_patched(function: Any, *args: Any, **options: Any) -> Any:
    """Call a device function; what it sees of the language is patched for the interpreter already but the first time.

    To patch it again at each call, as Triton does, takes a third of the time.
    """
    seen = [value for value in function.fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in seen):
        return call(function, *args, **options)
    return function.rewrite()(*args, **options)


call = interpreter.InterpretedFunction.__call__
interpreter.InterpretedFunction.__call__ = _call_once_patched


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the outer test choose a form."""
    parser.addoption("--form", choices=CHOICES, action="append", help="test this form only")
    parser.addoption(
        "--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every Nth test, from the Ith"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a form for every form, or for those that its `forms` marker names."""
    marker = metafunc.definition.get_closest_marker("forms")
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", FORMS if marker is None else marker.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the forms and parts that were not chosen."""
    forms, (first, step) = config.getoption("--form") or CHOICES, config.getoption("--part")
    chosen = [item for item in items if item.callspec.params["form"] in forms][first::step]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker by which a test names its forms."""
    config.addinivalue_line("markers", "forms(*names): the forms that a test is for")


@pytest.fixture
def function(form: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The public function of a form, on the CPU, through the sweep that a GPU would run."""
    package = importlib.import_module("generated.retention")
    owner = package if form == "auto" else importlib.import_module(f"generated.retention.{form}")
    monkeypatch.setattr(owner, "OPERATOR", _interpreted_operator(form))
    if form in ("chunk", "auto"):
        chunk = importlib.import_module("generated.retention.chunk")
        monkeypatch.setattr(chunk, "TO_POOL", _interpreted_operator("to_pool"))
    importlib.import_module("generated.configuration").clear_caches()  # a test may choose configurations
    if form in STEPS:
        return getattr(package, f"retention_{form}")
    return package.retention if form == "auto" else getattr(owner, f"{form}_retention")


_operators: dict[str, Any] = {}


def _interpreted_operator(form: str) -> Any:
    if form in STEPS and form not in _operators:
        module = importlib.import_module(f"generated.retention.{form}")
        define = importlib.import_module("generated.retention.operators").define_in_place
        update = getattr(module, f"{form}_update")
        _operators[form] = define(f"interpreted_{form}", module.SCHEMA, update, update)
    if form == "to_pool" and form not in _operators:
        sweep = importlib.import_module("generated.retention.chunk").chunk_sweep
        define = importlib.import_module("generated.retention.operators").define_to_pool
        _operators[form] = define("interpreted_chunk", sweep, sweep)
    if form not in _operators:
        module = importlib.import_module(f"generated.retention.{form}")
        operators = importlib.import_module("generated.retention.operators")
        own = operators.Form(*(getattr(module, f"{form}_{part}", None) for part in operators.Form._fields))
        _operators[form] = operators.define_operator(f"interpreted_{form}", own, cpu=own)
    return _operators[form]
