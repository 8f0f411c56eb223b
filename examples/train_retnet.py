"""Train a small RetNet language model on the sources of Python's standard library, then let it write some text.

    python examples/train_retnet.py                                  about a minute on two CPU cores
    python examples/train_retnet.py --form fused_chunk --steps 2000 --width 512 --layers 8 --heads 4 --compile
    python examples/train_retnet.py --steps 0 --load model.pt --prompt "class Parser" --temperature 0 --check

The model is that of Sun et al., "Retentive Network" (arXiv 2307.08621): blocks of multi-scale retention and a GELU
feed-forward layer, each behind a layer norm. Its tokens are bytes. Training runs any form of the operator; writing
reads the prompt with the chunk form, then goes on one token at a time with the recurrent form, whose memory does not
grow with the text.
"""

import argparse
import csv
import math
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from generated import (
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_retention,
    naive_retention,
    parallel_retention,
    retention,
)

FORMS = {
    "auto": retention,
    "naive": naive_retention,
    "parallel": parallel_retention,
    "chunk": chunk_retention,
    "fused_chunk": fused_chunk_retention,
    "fused_recurrent": fused_recurrent_retention,
}
VOCABULARY = 256
SEPARATOR = b"\0"  # stands between two files; no Python source holds it
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VALIDATION_SHARE = 20  # one file in so many is kept for validation

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model: `width` is split over `heads`; values and gates are twice as wide."""

    layers: int = 2
    width: int = 128
    heads: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """How to train: `length` tokens in each of `batch` windows a step, `lr` at the peak of its schedule."""

    form: str = "auto"
    steps: int = 400
    batch: int = 8
    length: int = 256
    lr: float = 3e-3
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False


# ---- The model


def rotary_angles(start: int, length: int, size: int, device: torch.device) -> Rotation:
    """Cosines and sines [length, 1, size / 2] for queries and keys of `size` features at positions from `start` on."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, size // 2, device=device)
    angles = torch.arange(start, start + length, device=device)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of features of x [B, T, H, K] by its position's angle, so that q·k depends on the distance."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class MultiScaleRetention(nn.Module):
    """Retention with one decay per head, group norm per head and a swish gate (equation 8 of the paper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, 2 * width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, H, K] and values [B, T, H, 2K] of x [B, T, H·K]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        return rotate(q, rotation), rotate(k, rotation), v

    def merge(self, x: Tensor, o: Tensor) -> Tensor:
        """Normalise the heads' outputs o [B, T, H, 2K], gate them by x and project them back to its width."""
        normed = F.group_norm(o.flatten(0, 1).flatten(1), self.heads).view(*x.shape[:2], -1)
        return self.out(F.silu(self.gate(x)) * normed)

    def forward(self, x: Tensor, rotation: Rotation, form: str) -> Tensor:
        o, _ = FORMS[form](*self.project(x, rotation))
        return self.merge(x, o)

    def advance(self, x: Tensor, rotation: Rotation, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Go on from `state` [B, H, K, 2K]; without one, x is the beginning of the text."""
        operator = chunk_retention if state is None else fused_recurrent_retention
        o, state = operator(*self.project(x, rotation), initial_state=state, output_final_state=True)
        return self.merge(x, o), state


class Block(nn.Module):
    """One layer: retention and a feed-forward network, each with a layer norm before and a residual around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.retention = MultiScaleRetention(width, heads)
        wide = nn.Linear(width, 2 * width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, rotation: Rotation, form: str) -> Tensor:
        x = x + self.retention(self.norm(x), rotation, form)
        return x + self.feed_forward(x)

    def advance(self, x: Tensor, rotation: Rotation, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for tokens that go on from `state`; also returns the state after them."""
        mixed, state = self.retention.advance(self.norm(x), rotation, state)
        x = x + mixed
        return x + self.feed_forward(x), state


class RetNet(nn.Module):
    """A byte-level RetNet; `forward` reads whole windows with any form, `advance` goes on from what was read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, VOCABULARY, bias=False))
        nn.init.normal_(self.head[1].weight, std=0.02)  # training starts near the loss of a uniform guess

    def embed(self, tokens: Tensor, position: int) -> tuple[Tensor, Rotation]:
        """Embeddings of tokens [B, T], the first of which stands at `position`, and their rotary angles."""
        size = self.config.width // self.config.heads
        return self.embedding(tokens), rotary_angles(position, tokens.shape[1], size, tokens.device)

    def forward(self, tokens: Tensor, form: str = "auto") -> Tensor:
        """Logits [B, T, 256] of the byte after each of tokens [B, T]."""
        x, rotation = self.embed(tokens, 0)
        for block in self.blocks:
            x = block(x, rotation, form)
        return self.head(x)

    def advance(self, tokens: Tensor, position: int, states: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits of tokens [B, T] from `position` on, given each layer's state before them, and the states after."""
        x, rotation = self.embed(tokens, position)
        new_states = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state = block.advance(x, rotation, state)
            new_states.append(state)
        return self.head(x), new_states


# ---- The text


def read_sources(folder: Path) -> list[bytes]:
    """The Python files under `folder` that can be read, in the order of their paths, without tests and packages."""
    sources = []
    for name in sorted(path.relative_to(folder) for path in folder.rglob("*.py")):
        try:
            sources += [] if SKIPPED_FOLDERS.intersection(name.parts) else [(folder / name).read_bytes()]
        except OSError:
            continue
    return sources


def load_text(folder: Path, length: int) -> tuple[Tensor, Tensor]:
    """The bytes to train on and those of the files kept for validation, each enough for windows of `length`."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, source in enumerate(read_sources(folder)):
        parts[i % VALIDATION_SHARE == VALIDATION_SHARE - 1].append(source)
    trained, kept = (as_tokens(SEPARATOR.join(part)) for part in parts)
    files = len(parts[0]) + len(parts[1])
    print(f"text: {files} files of {folder}, {len(trained):,} bytes to train on and {len(kept):,} to validate with")
    if min(len(trained), len(kept)) <= length:
        raise SystemExit(f"error: {folder} has too little Python source for --length {length}; name another by --data")
    return trained, kept


def as_tokens(text: bytes) -> Tensor:
    """The bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def draw_windows(text: Tensor, batch: int, length: int, draws: torch.Generator) -> Tensor:
    """Random windows [batch, length + 1] of the text: inputs, and the same shifted by one as targets."""
    starts = torch.randint(len(text) - length, (batch, 1), generator=draws)
    return text[starts + torch.arange(length + 1)].long()


# ---- Training


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Automatic mixed precision in bfloat16, or none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def window_loss(model: RetNet, windows: Tensor, form: str) -> Tensor:
    """Mean cross entropy of the windows' bytes, in nats a byte."""
    logits = model(windows[:, :-1], form)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first fifth of the steps, then half a cosine down to a tenth of the peak."""
    warm_up = max(1, config.steps // 5)
    progress = max(0, step - warm_up) / max(1, config.steps - warm_up)
    return config.lr * min(1.0, step / warm_up) * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(model: RetNet, text: Tensor, config: TrainConfig) -> tuple[list[float], float]:
    """Train on windows of the text, printing a table; returns the loss of every step and the tokens per second."""
    device, draws = model.embedding.weight.device, torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.05)
    loss_of = torch.compile(window_loss, fullgraph=True) if config.compile else window_loss
    every, losses, speed, started = max(1, config.steps // 10), [], 0.0, time.perf_counter()
    print(f"{'step':>6}  {'loss':>7}  {'tokens/s':>9}")
    for step in range(1, config.steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        windows = draw_windows(text, config.batch, config.length, draws).to(device)
        with autocast(device, config.dtype):
            loss = loss_of(model, windows, config.form)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if step == 1 or step == config.steps or step % every == 0:
            recent = mean_loss(losses[-every:])  # waits for the device, so that the clock is right
            speed = max(1, step - 1) * config.batch * config.length / (time.perf_counter() - started)
            print(f"{step:>6}  {recent:>7.4f}  {speed:>9,.0f}", flush=True)
            if step == 1:  # the first step compiles and allocates: the others are timed without it
                started = time.perf_counter()
    return torch.stack(losses).tolist(), speed


def mean_loss(losses: Sequence[Tensor]) -> float:
    """The mean of some losses; ends the program where training has diverged."""
    mean = torch.stack(list(losses)).mean().item()
    if not math.isfinite(mean):
        raise SystemExit(f"error: the loss became {mean}; train again with a smaller --lr")
    return mean


@torch.no_grad()
def validation_loss(model: RetNet, text: Tensor, config: TrainConfig) -> float:
    """Mean loss over the same eight batches of the validation text in every run."""
    device, draws = model.embedding.weight.device, torch.Generator().manual_seed(0)
    batches = [draw_windows(text, config.batch, config.length, draws).to(device) for _ in range(8)]
    with autocast(device, config.dtype):
        return mean_loss([window_loss(model, windows, config.form) for windows in batches])


# ---- Writing


def choose(logits: Tensor, temperature: float, draws: torch.Generator) -> Tensor:
    """The next token [B, 1] from logits [B, T, 256]: the likeliest at temperature 0, else drawn."""
    last = logits[:, -1].float()
    if temperature == 0:
        return last.argmax(-1, keepdim=True)
    return torch.multinomial((last / temperature).softmax(-1), 1, generator=draws)


@torch.no_grad()
def generate(model: RetNet, prompt: bytes, count: int, temperature: float = 0.0, seed: int = 0) -> bytes:
    """Write `count` bytes after the prompt: it is read by the chunk form, the rest goes token by token."""
    device = model.embedding.weight.device
    draws = torch.Generator(device).manual_seed(seed)
    position, states, token, written = 0, [], as_tokens(prompt or SEPARATOR).long().to(device)[None], []
    for _ in range(count):
        logits, states = model.advance(token, position, states)
        position += token.shape[1]
        token = choose(logits, temperature, draws)
        written.append(token)
    return bytes(torch.cat(written, 1)[0].tolist()) if written else b""


@torch.no_grad()
def generate_by_parallel(model: RetNet, prompt: bytes, count: int) -> bytes:
    """The greedy text again, by reading all of it anew for every byte with the parallel form."""
    start = prompt or SEPARATOR
    tokens = as_tokens(start).long().to(model.embedding.weight.device)[None]
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens, "parallel")[:, -1:].argmax(-1)), 1)
    return bytes(tokens[0, len(start) :].tolist())


def check_generation(model: RetNet, prompt: bytes, count: int) -> None:
    """End the program with an error unless both ways write the same greedy text, in float32."""
    recurrent, parallel = generate(model, prompt, count), generate_by_parallel(model, prompt, count)
    if recurrent != parallel:
        raise SystemExit(f"error: after {prompt!r}, chunk + recurrent wrote {recurrent!r}, but parallel {parallel!r}")
    print(f"check: the {count} greedy bytes of chunk + recurrent are those of the parallel form")


def write_text(model: RetNet, args: argparse.Namespace) -> None:
    """Print a generated text and the speed of writing it."""
    started = time.perf_counter()
    with autocast(model.embedding.weight.device, args.dtype):
        text = generate(model, args.prompt.encode(), args.generate, args.temperature, args.seed)
    speed = args.generate / (time.perf_counter() - started)
    print(f"---- {args.generate} bytes, written at {speed:,.0f} bytes/s")
    print((args.prompt.encode() + text).decode(errors="backslashreplace"), end="\n----\n")


# ---- The command line


def load_model(path: Path) -> RetNet:
    """The model in a file that --save wrote; nothing in the file is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = RetNet(ModelConfig(**saved["config"]))
        model.load_state_dict(saved["weights"])
    except Exception as error:  # whatever is wrong with the file, its name helps most
        reason = f"{type(error).__name__}, {error}"
        raise SystemExit(f"error: --load {path} is not a model that --save wrote: {reason}") from error
    return model


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; a wrong value ends the program with a message that names it."""
    train, shape = TrainConfig(), ModelConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--form", choices=FORMS, default=train.form, help="form of the operator that training runs")
    add("--steps", type=int, default=train.steps, help="training steps; 0 only writes")
    add("--batch", type=int, default=train.batch, help="windows in a step")
    add("--length", type=int, default=train.length, help="bytes in a window")
    add("--layers", type=int, default=shape.layers)
    add("--width", type=int, default=shape.width)
    add("--heads", type=int, default=shape.heads)
    add("--lr", type=float, default=train.lr, help="learning rate at the peak of its schedule")
    add("--seed", type=int, default=train.seed)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="bfloat16: mixed precision (default on a GPU)")
    add("--compile", action="store_true", help="train through torch.compile(fullgraph=True)")
    add("--data", type=Path, default=sysconfig.get_paths()["stdlib"], help="folder of .py files to learn from")
    add("--generate", type=int, default=200, help="bytes to write after training")
    add("--prompt", default="import ", help="text to go on from")
    add("--temperature", type=float, default=0.7, help="0 always takes the likeliest byte")
    add("--check", action="store_true", help="compare the greedy text with the parallel form's, in float32")
    add("--save", type=Path, help="file to write the trained model to")
    add("--load", type=Path, help="model to start from; it sets the layers, width and heads")
    add("--csv", type=Path, help="file to write the loss of every step to")
    args = parser.parse_args(argv)
    if problem := find_problem(args):
        parser.error(problem)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, if anything."""
    for name, low in (("steps", 0), ("batch", 1), ("length", 1), ("layers", 1), ("heads", 1), ("generate", 0)):
        if getattr(args, name) < low:
            return f"--{name} is {getattr(args, name)}; it must be at least {low}"
    if args.width < 1 or args.width % (2 * args.heads):
        rule = f"with --heads {args.heads} it must be a multiple of {2 * args.heads}"
        return f"--width is {args.width}; {rule}, so that every head has an even number of features to rotate"
    if not (0 < args.lr < math.inf and 0 <= args.temperature < math.inf):
        return f"--lr is {args.lr} and --temperature is {args.temperature}; they must be above 0, and at least 0"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return f"--device is {args.device}, but this PyTorch ({torch.__version__}) finds no GPU; use --device cpu"
    for path in (args.save, args.csv):
        if path and not path.absolute().parent.is_dir():
            return f"{path} cannot be written: there is no folder {path.absolute().parent}"
    return None


def run_training(model: RetNet, args: argparse.Namespace) -> str:
    """Train and validate as the arguments say; returns the line that sums it up."""
    config = TrainConfig(args.form, args.steps, args.batch, args.length, args.lr, args.seed, args.dtype, args.compile)
    text, kept = load_text(args.data, args.length)
    losses, speed = train(model, text, config)
    print(f"validation loss {validation_loss(model, kept, config):.4f}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    last = losses[-max(1, args.steps // 10) :]
    return f"loss {losses[0]:.4f} -> {sum(last) / len(last):.4f}, {speed:,.0f} tokens/s, form {args.form}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and write as the command line says."""
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    model = load_model(args.load) if args.load else RetNet(ModelConfig(args.layers, args.width, args.heads))
    model.to(args.device)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"model: {model.config}, {size:,} weights, {args.dtype} on {args.device}")
    summary = run_training(model, args) if args.steps else "no training steps"
    if args.save:
        torch.save({"config": asdict(model.config), "weights": model.state_dict()}, args.save)
    if args.generate:
        write_text(model, args)
    if args.check:
        check_generation(model, args.prompt.encode(), args.generate)
    print(summary)


if __name__ == "__main__":
    main()
