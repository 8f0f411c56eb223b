"""Use a generated operator once: `chunk_retention`, forward and backward, against the definition.

    python examples/first_call.py

Prints the machine, the errors, the times, and which tuned rules the call used, from which file. Ends with status 1 if
the results are not those of the naive form.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from generated import chunk_retention, naive_retention
from generated.configuration import ActiveRule, active_rules, identify

B, T, H, K, V = 8, 1024, 8, 64, 64  # the workload `small`
REPEATS = 5
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
ARCH_WITHOUT_GPU = "sm90"  # what the tuner models by default where there is no GPU

Operator = Callable[..., tuple[Tensor, Tensor | None]]


def make_inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v and the gradient of the output."""
    draws = torch.Generator(device).manual_seed(0)
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, V))
    return [torch.randn(shape, generator=draws, device=device, dtype=dtype) for shape in shapes]


def run(operator: Operator, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients: o, dq, dk, dv."""
    *tensors, do = inputs
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    o, _ = operator(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def timed(inputs: list[Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    run(chunk_retention, inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def relative_errors(inputs: list[Tensor]) -> dict[str, float]:
    """Distance of the chunk form from the naive form in float32, relative to the latter's size."""
    wanted = run(naive_retention, [x.float() for x in inputs])
    found = run(chunk_retention, inputs)
    return {
        name: ((x.float() - y).norm() / y.norm()).item()
        for name, x, y in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True)
    }


def rules_used(device: torch.device, dtype: torch.dtype) -> list[ActiveRule]:
    """The rules that the chunk form's kernels follow at this shape; on the CPU, those that a GPU would follow."""
    gpu = identify(device) if device.type == "cuda" else None
    shape = (str(torch.bfloat16 if gpu is None else dtype).removeprefix("torch."), K, V, B * H, T)
    first: dict[str, ActiveRule] = {}
    for rule in (
        active_rules(gpu.name, gpu.arch, gpu.sms, gpu.bandwidth_gbs) if gpu else active_rules(None, ARCH_WITHOUT_GPU)
    ):
        ours = rule.kernel.startswith("retention_chunk") and rule.status == "active"
        if ours and rule.when.matches(*shape):
            first.setdefault(rule.kernel, rule)
    return list(first.values())


def report_rules(rules: list[ActiveRule], device: torch.device) -> None:
    """Print each file that rules came from, and their knobs."""
    for path in dict.fromkeys(rule.path for rule in rules):
        print(f"configuration  {path}{'' if device.type == 'cuda' else f', for a GPU of {ARCH_WITHOUT_GPU}'}")
        for rule in (rule for rule in rules if rule.path == path):
            knobs = ", ".join(f"{knob}={value}" for knob, value in rule.use.items())
            print(f"               {rule.kernel}: {knobs} ({rule.proof})")
    if not rules:
        print("configuration  each kernel's default: no rule covers this shape; `python -m tuning run` makes one")


def main() -> int:
    """Run, compare, report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (PyTorch code; the kernels need a GPU)"
    inputs = make_inputs(device, dtype)
    print(f"device         {name}; torch {torch.__version__}, triton {triton.__version__}")
    print(f"call           chunk_retention, forward + backward, B={B} T={T} H={H} K={K} V={V}, {dtype}")
    print(f"first call     {timed(inputs):.3f} s")
    print(
        f"then           {1e3 * statistics.median(timed(inputs) for _ in range(REPEATS)):.3f} ms, median of {REPEATS}"
    )
    errors = relative_errors(inputs)
    print(f"relative error {', '.join(f'{key} {value:.1e}' for key, value in errors.items())}, against the naive form")
    report_rules(rules_used(device, dtype), device)
    wrong = [key for key, value in errors.items() if not value <= LARGEST_ERROR[dtype]]
    if wrong:
        print(f"error: {', '.join(wrong)} differ by more than {LARGEST_ERROR[dtype]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
