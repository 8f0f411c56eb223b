"""Serve a language model of train_retnet.py: many requests in one batch, which join and leave as they come and end.

    python examples/train_retnet.py --save model.pt
    python examples/serve_retnet.py --load model.pt
    python examples/serve_retnet.py --load model.pt --requests 200 --slots 64 --temperature 0 --check

A pool has a slot for each request that runs, with its state in every layer. Prompts that join are packed into one row
and read at once by the chunk form, which writes their states to the slots; then each step writes a byte of every
request with `retention_step`, which updates the slots where they lie. A request's text depends on its prompt,
temperature and seed, not on the rest of the batch, up to the rounding of matrix products, which depends on their size.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # of train_retnet, which finds `generated`

from train_retnet import SEPARATOR, RetNet, Rotation, as_tokens, autocast, choose, generate, load_model

from generated import chunk_retention, retention_step

PROMPTS = ("import ", "class Parser", "def read(", "# The ", "    return ", "for ")

Retain = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """What to write: one or more bytes after the prompt, the likeliest at temperature 0, else drawn by the seed."""

    prompt: bytes
    count: int
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; a request is for one or more bytes")


@dataclass
class Running:
    """A request in its slot; the last of the bytes written stands at `position`."""

    request: Request
    slot: int
    position: int
    draws: torch.Generator
    written: list[Tensor]


class Server:
    """Writes the texts of the requests that run, of which there is room for `slots`."""

    def __init__(self, model: RetNet, slots: int) -> None:
        config, self.model = model.config, model
        self.device = model.embedding.weight.device
        size = config.width // config.heads
        self.pool = torch.zeros(config.layers, slots, config.heads, size, 2 * size, device=self.device)
        self.free, self.running = list(range(slots)), list[Running]()

    def serve(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        """Each request with its text, as soon as it is written; requests are asked for as slots become free."""
        coming = iter(requests)
        while (joining := list(islice(coming, len(self.free)))) or self.running:
            self.join(joining)
            yield from self.leave()
            self.step()

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> None:
        """Read the prompts into slots of their own, and write the first byte of each."""
        if not requests:
            return
        prompts = [as_tokens(request.prompt or SEPARATOR).long() for request in requests]
        numbers = [self.free.pop() for _ in requests]
        slots = torch.tensor(numbers, device=self.device)
        ends = torch.tensor([0, *map(len, prompts)], device=self.device).cumsum(0)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])

        def retain(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            to_slots = {"final_state": self.pool[layer], "state_indices": slots}
            return chunk_retention(q, k, v, cu_seqlens=ends, **to_slots)[0]

        x = self.read(torch.cat(prompts)[None], positions[None], retain)
        joined = [
            Running(request, slot, len(prompt) - 1, torch.Generator(self.device).manual_seed(request.seed), [])
            for request, prompt, slot in zip(requests, prompts, numbers, strict=True)
        ]
        self.write(joined, x[0, ends[1:] - 1, None])
        self.running += joined

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more byte of every request that runs."""
        if not self.running:
            return
        slots = torch.tensor([one.slot for one in self.running], device=self.device)
        positions = torch.tensor([[one.position] for one in self.running])

        def retain(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return retention_step(q, k, v, self.pool[layer], state_indices=slots)

        x = self.read(torch.stack([one.written[-1] for one in self.running]), positions, retain)
        self.write(self.running, x)

    def leave(self) -> Iterator[tuple[Request, bytes]]:
        """Free the slots of the requests whose texts are written."""
        done = [one for one in self.running if len(one.written) == one.request.count]
        self.running = [one for one in self.running if len(one.written) < one.request.count]
        self.free += [one.slot for one in done]
        for one in done:
            yield one.request, bytes(torch.cat(one.written).tolist())

    def read(self, tokens: Tensor, positions: Tensor, retain: Retain) -> Tensor:
        """The layers' output for tokens [B, T] at their positions; retain(layer, q, k, v) returns o."""
        x, rotation = self.model.embedding(tokens.to(self.device)), self.rotation(positions.to(self.device))
        for layer, block in enumerate(self.model.blocks):
            normed = block.norm(x)
            o = retain(layer, *block.retention.project(normed, rotation))
            x = x + block.retention.merge(normed, o)
            x = x + block.feed_forward(x)
        return x

    def rotation(self, positions: Tensor) -> Rotation:
        """Cosines and sines [B, T, 1, K / 2] of `train_retnet.rotary_angles` for any positions [B, T]."""
        size = self.pool.shape[3] // 2
        angles = positions[..., None, None] * 10000.0 ** -torch.linspace(0, 1, size, device=self.device)
        return angles.cos(), angles.sin()

    def write(self, requests: Sequence[Running], x: Tensor) -> None:
        """Choose each request's next byte from the layers' output at its last one, [B, 1, width]."""
        logits = self.model.head(x)
        tokens = logits[:, 0].argmax(-1, keepdim=True)
        for i, one in enumerate(requests):
            if one.request.temperature > 0:
                tokens[i] = choose(logits[i : i + 1], one.request.temperature, one.draws)[0]
            one.written.append(tokens[i])
            one.position += 1


def check_text(model: RetNet, request: Request, text: bytes) -> None:
    """End the program with an error unless the request alone, byte by byte, gives the same text."""
    alone = generate(model, request.prompt, request.count, request.temperature, request.seed)
    if text != alone:
        i = next(i for i, (one, other) in enumerate(zip_longest(text, alone)) if one != other)
        raise SystemExit(
            f"error: {request} got {text!r} in the batch, but alone {alone!r}; byte {i} is the first to differ"
        )


def draw_requests(args: argparse.Namespace) -> list[Request]:
    """As many requests as asked for, of the prompts in turn, each with a length and a seed of its own."""
    draws = random.Random(args.seed)  # noqa: S311 - lengths are no secret
    prompts = [prompt.encode() for prompt in args.prompt or PROMPTS]
    lengths = [draws.randint((args.generate + 1) // 2, args.generate) for _ in range(args.requests)]
    return [
        Request(prompts[i % len(prompts)], length, args.temperature, (args.seed + i) % 2**63)
        for i, length in enumerate(lengths)
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; a wrong value ends the program with a message that names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, help="model that train_retnet.py --save wrote")
    add("--requests", type=int, default=24, help="how many there are")
    add("--slots", type=int, default=8, help="how many of them run at once")
    add("--prompt", action="append", help="text to go on from; may be given again, and each is used in turn")
    add("--generate", type=int, default=80, help="bytes to write for a request, or down to half as many")
    add("--temperature", type=float, default=0.7, help="0 always takes the likeliest byte")
    add("--seed", type=int, default=0, help="of the first request; each has the next")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="bfloat16: mixed precision")
    add("--check", action="store_true", help="compare each text with that of the request alone; for float32")
    args = parser.parse_args(argv)
    for name in ("requests", "slots", "generate"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature is {args.temperature}; it must be at least 0")
    if args.check and args.dtype != "float32":
        parser.error(f"--check compares texts of float32; --dtype is {args.dtype}")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device is {args.device}; it must be cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but this PyTorch finds no GPU; use --device cpu")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the requests of the command line and print their texts."""
    args = parse_arguments(argv)
    model = load_model(args.load).to(args.device)
    server, requests = Server(model, args.slots), draw_requests(args)
    started = time.perf_counter()
    with autocast(server.device, args.dtype):
        texts = []
        for request, text in server.serve(requests):
            texts.append((request, text))
            print(f"---- {len(texts)} of {len(requests)}, seed {request.seed}")
            print((request.prompt + text).decode(errors="backslashreplace"))
    seconds = time.perf_counter() - started
    if args.check:
        for request, text in texts:
            check_text(model, request, text)
        print(f"check: each of the {len(texts)} texts is that of the request alone")
    written = sum(len(text) for _, text in texts)
    print(
        f"{len(texts)} requests in {args.slots} slots, {written / seconds:,.0f} bytes/s, {args.dtype} on {args.device}"
    )


if __name__ == "__main__":
    main()
