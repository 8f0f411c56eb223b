"""What examples/serve_retnet.py promises: a request's text is the same in any batch as alone, but for rounding."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fakes import module_at

program = module_at(Path(__file__).parents[1] / "examples" / "serve_retnet.py", "serve_retnet")
training = sys.modules["train_retnet"]


def make_model(device: str = "cpu") -> torch.nn.Module:
    """A small model without training, but with opinions."""
    torch.manual_seed(0)
    model = training.RetNet(training.ModelConfig(layers=2, width=32, heads=2)).to(device)
    torch.nn.init.normal_(model.head[1].weight, std=1.0)
    return model


def requests(temperature: float) -> list[object]:
    """Prompts of one byte to some chunks, short and long texts; none of them ends with the others."""
    prompts = [b"", b"import os\n", b"x", b"class Parser:\n    " * 9, b"def ", b"for i in range(10):" * 20]
    counts = [30, 1, 7, 19, 45, 3, 12, 28, 2, 16, 33, 8]
    return [program.Request(prompts[i % 6], count, temperature, seed=i) for i, count in enumerate(counts)]


def serve(model: torch.nn.Module, given: list[object], slots: int) -> dict[int, bytes]:
    """The texts by the requests' seeds; afterwards all slots are free."""
    server = program.Server(model, slots)
    texts = {request.seed: text for request, text in server.serve(given)}
    assert sorted(server.free) == list(range(slots))
    return texts


def alone(model: torch.nn.Module, given: list[object]) -> dict[int, bytes]:
    """The texts that the training program writes, one byte after the other."""
    return {one.seed: training.generate(model, one.prompt, one.count, one.temperature, one.seed) for one in given}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("slots", [1, 3, 12])
def test_texts_are_those_of_one_by_one_generation(slots: int, temperature: float) -> None:
    model, given = make_model(), requests(temperature)
    assert serve(model, given, slots) == alone(model, given)


def test_greedy_and_drawn_texts_go_together_in_any_order() -> None:
    model = make_model()
    given = [one for pair in zip(requests(0.0)[::2], requests(1.0)[1::2], strict=True) for one in pair]
    expected = alone(model, given)
    assert serve(model, given, 4) == serve(model, given[::-1], 5) == expected
    assert (
        serve(model, [*given, *(program.Request(b"more", 5, 0.9, seed) for seed in range(20, 30))], 7).items()
        >= expected.items()
    )


def test_requests_leave_and_others_take_their_slots() -> None:
    server = program.Server(make_model(), 2)
    left = [request.count for request, _ in server.serve([program.Request(b"a", count) for count in (9, 2, 2, 2, 20)])]
    assert left == [2, 2, 2, 9, 20]


def test_the_program_prints_texts_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, tmp_path / "model.pt")
    arguments = ["--load", str(tmp_path / "model.pt"), "--device", "cpu", "--requests", "5", "--slots", "2"]
    program.main([*arguments, "--generate", "8", "--prompt", "import ", "--check"])
    out = capsys.readouterr().out
    assert out.count("\nimport ") == 5
    assert "check: each of the 5 texts is that of the request alone" in out
    assert re.fullmatch(r"5 requests in 2 slots, [\d,]+ bytes/s, float32 on cpu", out.splitlines()[-1])


def test_a_text_that_is_another_is_told() -> None:
    model, request = make_model(), program.Request(b"x", 3)
    (text,) = alone(model, [request]).values()
    for i in range(3):
        other = text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :]
        with pytest.raises(SystemExit, match=rf"in the batch, but alone .*; byte {i} is the first to differ"):
            program.check_text(model, request, other)
    with pytest.raises(SystemExit, match="byte 2 is the first to differ"):
        program.check_text(model, request, text[:2])


@pytest.mark.parametrize("count", [0, -1])
def test_a_request_for_no_bytes_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}; a request is for one or more bytes"):
        program.Request(b"x", count)


def test_requests_are_asked_for_as_slots_become_free() -> None:
    """So that there may be no end of them."""
    asked: list[int] = []

    def endless() -> Iterator[object]:
        for seed in itertools.count():
            asked.append(seed)
            yield program.Request(b"a", 2, seed=seed)

    served = program.Server(make_model(), 3).serve(endless())
    assert [request.seed for request, _ in itertools.islice(served, 4)] == [0, 1, 2, 3]
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "--slots is 0; it must be at least 1"),
        (["--requests", "-1"], "--requests is -1"),
        (["--dtype", "bfloat16", "--check"], "--check compares texts of float32; --dtype is bfloat16"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["--load", "model.pt", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::generated.ConfigurationWarning")  # as in test_gpu.py
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_on_a_gpu_are_those_of_one_by_one_generation(temperature: float) -> None:
    model, given = make_model("cuda"), requests(temperature)
    assert serve(model, given, 5) == alone(model, given)
