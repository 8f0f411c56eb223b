"""Tests of the Triton kernels on the CPU, by Triton's interpreter. Run by test_kernels_interpreted.py, a form each."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
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
# It would compute with 64 bits whether sums and products overflow, and, as `debug` is off, throw away what it finds.
builder = interpreter.interpreter_builder
builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

# The types of tensors are few: what the interpreter would work out for each tensor is kept.
_np_dtypes: dict[str, Any] = {}
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
_shapes: dict[str, tuple[Any, ...]] = {}


def _known_np_dtype(dtype: Any) -> Any:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = find_np_dtype(dtype)
    return _np_dtypes[name]


def _known_block(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *map(tl.core._unwrap_if_constexpr, shape))
    if key not in _blocks:
        make_block(self, element_ty, shape)
        _blocks[key] = dict(vars(self))
    vars(self).update(_blocks[key])


def _known_shape(self: Any, handle: Any, type: Any) -> None:  # noqa: A002
    if type.name not in _shapes:
        make_tensor(self, handle, type)
        _shapes[type.name] = (self.shape, self.numel, self.dtype)
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = _shapes[type.name]


find_np_dtype, interpreter._get_np_dtype = interpreter._get_np_dtype, _known_np_dtype
make_block, tl.core.block_type.__init__ = tl.core.block_type.__init__, _known_block
make_tensor, tl.core.tensor.__init__ = tl.core.tensor.__init__, _known_shape


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
    gc.freeze()  # what was imported stays, and is much to look through
    gc.set_threshold(50_000, 20, 100)


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
