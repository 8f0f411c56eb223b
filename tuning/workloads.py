"""The shapes that are tuned and timed: those of workloads.yaml by name, or a user's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from generated.launch import MAX_WIDTH

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMS = (
    "fused_chunk",
    "fused_chunk_hopper",
    "chunk",
    "parallel",
    "fused_recurrent",
    "step",
    "step_buffered",
)  # as they are tuned in turn
COPY_BYTES_PER_MS = 3.0e9  # an H100's measured device-to-device copy, bytes read and written
MAX_SIZE = 2**31 - 1
MAX_ELEMENTS = 2**38  # of one tensor: 512 GiB in bfloat16
MATRIX_FLOPS_PER_MS = 745e9  # an H100's measured bfloat16 matrix product


class WorkloadError(ValueError):
    """A workload that is not known or not well formed."""


@dataclass(frozen=True)
class Workload:
    """One shape: q and k are [B, T, H, K], v is [B, T, H, V].

    `form`: the only one that it is for, if there is such, or more with a + between them.
    """

    name: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str = "bfloat16"
    form: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and the output."""
        return DTYPES[self.dtype]

    def is_for(self, form: str) -> bool:
        """Whether the form is one of those that it is for."""
        return not self.form or form in self.form.split("+")

    @property
    def shape(self) -> str:
        """Sizes and dtype in a line."""
        return f"B={self.B} T={self.T} H={self.H} K={self.K} V={self.V} {self.dtype}"

    def passes(self, *, backward: bool) -> list[tuple[int, int]]:
        """Compulsory bytes, and FLOPs of the chunked form: of the forward pass and, if asked, of the backward."""
        tokens, size, K, V = self.B * self.T * self.H, self.torch_dtype.itemsize, self.K, self.V
        forward = tokens * size * (2 * K + 2 * V), tokens * (4 * K * V + 64 * (K + V))
        return [forward, (tokens * size * (4 * K + 3 * V), tokens * 10 * K * V)][: 1 + backward]

    def floor_ms(self, *, backward: bool) -> float:
        """The time an H100 cannot beat: that of the bytes or of the FLOPs of each pass, whichever is longer."""
        passes = self.passes(backward=backward)
        return sum(max(moved / COPY_BYTES_PER_MS, flops / MATRIX_FLOPS_PER_MS) for moved, flops in passes)

    def step_floor_ms(self, size: int, *, is_written: bool = True) -> float:
        """The same for a step on states of so many bytes a number: that of one read, and one write, of these."""
        return (1 + is_written) * self.B * self.H * self.K * self.V * size / COPY_BYTES_PER_MS


def groups() -> dict[str, dict[str, Workload]]:
    """The workloads of workloads.yaml by group and name."""
    found = yaml.safe_load((Path(__file__).parent / "workloads.yaml").read_text(encoding="utf-8"))
    return {group: {name: Workload(name, **shape) for name, shape in of.items()} for group, of in found.items()}


def builtin() -> dict[str, Workload]:
    """The workloads of workloads.yaml by name."""
    return {name: workload for group in groups().values() for name, workload in group.items()}


def parse(texts: list[str]) -> list[Workload]:
    """Workloads by name, group, shape (`B=8,T=2048,H=8,K=256,V=512[,dtype=float16]`) or file; all builtin for no text.

    None is there twice, whatever names it.
    """
    known = groups()
    named = {name: [workload] for group in known.values() for name, workload in group.items()}
    names = {group: list(of.values()) for group, of in known.items()} | named
    found = [_parse(text.strip(), names) for text in texts] if texts else named.values()
    return list(dict.fromkeys(workload for workloads in found for workload in workloads))


def _parse(text: str, names: dict[str, list[Workload]]) -> list[Workload]:
    if text in names:
        return names[text]
    if text.endswith((".yaml", ".yml")):
        return read(Path(text))
    # Of a text that is too long for a name, or cannot be one, these say no.
    return _read_lines(Path(text)) if os.path.isfile(text) else [parse_shape(text, names)]  # noqa: PTH113


def _read_lines(path: Path) -> list[Workload]:
    """The workloads of a file with a shape a line; what follows a # is a comment."""
    lines = [line.partition("#")[0].strip() for line in _text(path).splitlines()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [parse_shape(line)] if line else []
        except WorkloadError as error:
            raise WorkloadError(f"workloads {path}: line {number}: {error}") from error
    if not found:
        raise WorkloadError(f"workloads {path}: holds none")
    return found


def read(path: Path) -> list[Workload]:
    """The workloads of a YAML file: groups of names and shapes, as in workloads.yaml."""
    text = _text(path)
    try:
        groups = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise WorkloadError(f"workloads {path}: {' '.join(str(error).split())}") from error
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise WorkloadError(f"workloads {path}: must hold groups, and each group names with shapes below them")
    found = [(name, shape) for group in groups.values() for name, shape in group.items()]
    if not found:
        raise WorkloadError(f"workloads {path}: holds none")
    return [_read_shape(path, str(name), shape) for name, shape in found]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WorkloadError(f"workloads {path}: {getattr(error, 'strerror', None) or error}") from error


def _read_shape(path: Path, name: str, shape: Any) -> Workload:
    if not isinstance(shape, dict):
        raise WorkloadError(
            f"workloads {path}: {name} is {shape!r}; it must be a mapping of B, T, H, K and V, below a name, "
            "and that below a group"
        )
    text = ",".join(f"{key}={value}" for key, value in shape.items())
    try:
        return replace(parse_shape(text or "="), name=name)
    except WorkloadError as error:
        raise WorkloadError(f"workloads {path}: {name}: {error}") from error


def parse_shape(text: str, names: Iterable[str] = ()) -> Workload:
    """The workload of a shape; `names` are what else could have been meant."""
    if "=" not in text:
        either = ", ".join([*names, "B=..,T=..,H=..,K=..,V=.."])
        what = "a directory" if os.path.isdir(text) else "not known, and no file here"  # noqa: PTH112
        raise WorkloadError(f"workload {text!r} is {what}; use one of {either}")
    text = re.sub(r"\s*([,=])\s*", r"\1", text.strip())
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    names, fields = sorted(name for name, _ in pairs), dict(pairs)
    if names != sorted(["B", "T", "H", "K", "V", *({"dtype", "form"} & fields.keys())]):
        raise WorkloadError(
            f"workload {text!r} must give each of B, T, H, K and V once, and nothing else but dtype and form"
        )
    dtype, form = fields.pop("dtype", "bfloat16"), fields.pop("form", None)
    for name, value, allowed in (("dtype", dtype, DTYPES), ("form", form, FORMS)):
        if value is not None and not {*(value.split("+") if name == "form" else [value])} <= {*allowed}:
            choices = ", ".join(allowed)
            raise WorkloadError(f"workload {text!r}: {name} is {value!r}; it must be one of {choices}")
    for name, value in fields.items():
        limit = MAX_WIDTH if name in "KV" else MAX_SIZE
        # At most ten digits are looked at, so that no text takes long.
        if not re.fullmatch(r"0*[1-9][0-9]{0,9}", value, re.ASCII) or int(value) > limit:
            raise WorkloadError(f"workload {text!r}: {name} is {value!r}; it must be a whole number from 1 to {limit}")
    B, T, H, K, V = (int(fields[name]) for name in "BTHKV")
    workload = Workload(text, B, T, H, K, V, dtype, form or "")
    if workload.B * workload.T * workload.H * max(workload.K, workload.V) > MAX_ELEMENTS:
        raise WorkloadError(f"workload {text!r}: B * T * H * K or V is over {MAX_ELEMENTS}, more than a GPU holds")
    return workload
