"""Sequences that join, wait, go on by drafts, are rolled back and leave a pool of states: as if each were alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from oracle import FLOAT32_ERROR, WORST_ROW, errors, retnet_rates
from torch import Tensor

Step = Callable[..., Tensor]
LONGEST = 24  # tokens of a sequence
TOKENS = (1, 1, 1, 1, 2, 3, 5, 16)  # of a step
JOINS, WAITS, CANCELS = 0.8, 0.1, 0.01  # how likely it is
NAN = float("nan")


@dataclass(frozen=True)
class Sequences:
    """Each one's queries, keys and values, the state after its prompt, and how many tokens it has; noise to draw."""

    q: Tensor
    k: Tensor
    v: Tensor
    h0: Tensor
    lengths: list[int]
    generator: torch.Generator

    @classmethod
    def draw(cls, count: int, V: int, draws: random.Random, device: str) -> Sequences:
        """Normally distributed, with four query heads on two states [5, V]."""
        generator = torch.Generator(device).manual_seed(draws.getrandbits(32))
        sizes = ((LONGEST, 4, 5), (LONGEST, 2, 5), (LONGEST, 2, V), (2, 5, V))
        parts = [torch.randn(count, *size, generator=generator, device=device) for size in sizes]
        return cls(*parts, [draws.randint(1, LONGEST) for _ in range(count)], generator)

    def alone(self) -> tuple[Tensor, Tensor]:
        """The outputs [count, LONGEST, 4, V], and the states after the last tokens, from the formulas in float64."""
        q, k, v, h = (x.double() for x in (self.q, self.k, self.v, self.h0))
        decay = retnet_rates(k.shape[2]).exp().to(h)[:, None, None]
        lengths = torch.tensor(self.lengths, device=h.device)[:, None, None, None]
        o, last = [], h
        for t in range(LONGEST):
            h = decay * h + k[:, t, :, :, None] * v[:, t, :, None, :]
            of_heads = h.repeat_interleave(q.shape[2] // k.shape[2], 1)
            o.append((q[:, t, :, :, None] * of_heads).sum(2) * q.shape[3] ** -0.5)
            last = torch.where(t < lengths, h, last)
        return torch.stack(o, 1), last


@dataclass
class Server:
    """A batch whose rows have sequences in slots of a pool, or none; what is of nobody is NaN."""

    sequences: Sequences
    rows: int
    draws: random.Random
    slots: dict[int, int] = field(default_factory=dict)  # of the sequences that run
    read: dict[int, int] = field(default_factory=dict)  # how many tokens they have

    def __post_init__(self) -> None:
        s = self.sequences
        self.pool = s.h0.new_full((2 * self.rows, *s.h0.shape[1:]), NAN)
        self.free = list(range(2 * self.rows))
        self.outputs = s.q.new_full((*s.q.shape[:3], s.v.shape[3]), NAN)
        self.last = torch.full_like(s.h0, NAN)

    def serve(self, step: Step) -> None:
        """Let all join, and go on until the last one has left."""
        coming = list(range(len(self.sequences.lengths)))
        while coming or self.slots:
            while coming and len(self.slots) < self.rows and self.draws.random() < JOINS:
                self.join(coming.pop())
            self.advance(step)
            for i in list(self.slots):
                if self.read[i] and self.draws.random() < CANCELS:
                    self.sequences.lengths[i] = self.read[i]
                if self.read[i] == self.sequences.lengths[i]:
                    self.leave(i)

    def join(self, i: int) -> None:
        self.slots[i], self.read[i] = self.free.pop(self.draws.randrange(len(self.free))), 0
        self.pool[self.slots[i]] = self.sequences.h0[i]

    def leave(self, i: int) -> None:
        slot = self.slots.pop(i)
        self.last[i] = self.pool[slot]
        self.pool[slot] = NAN
        self.free.append(slot)

    def batch(self, T: int) -> list[tuple[int, int, int, int]]:
        """Each row's slot, sequence, its tokens until now and how many of T it accepts; slot -1: the row is skipped."""
        rows = [(-1, 0, 0, 0)] * self.rows
        for row, (i, slot) in enumerate(self.slots.items()):
            if self.draws.random() > WAITS:
                accepted = self.draws.choice((T, self.draws.randint(0, T)))
                rows[row] = (slot, i, self.read[i], min(accepted, self.sequences.lengths[i] - self.read[i]))
        self.draws.shuffle(rows)
        return rows

    def advance(self, step: Step) -> None:
        """A step of drafts, of which a sequence accepts some of the first; the others are wrong, and rolled back."""
        s, T, device = self.sequences, self.draws.choice(TOKENS), self.pool.device
        batch = self.batch(T)
        slots, numbers, first, accepted = torch.tensor(list(zip(*batch, strict=True)), device=device)
        tokens = torch.arange(T, device=device)
        is_right, places = tokens < accepted[:, None], (first[:, None] + tokens).clamp(max=LONGEST - 1)
        inputs = [self.drafts(x[numbers[:, None], places], is_right, slots) for x in (s.q, s.k, s.v)]
        o = self.call(step, inputs, slots, accepted)
        self.outputs[numbers[:, None].expand(-1, T)[is_right], places[is_right]] = o[is_right]
        for slot, i, read, count in batch:
            if slot >= 0:
                self.read[i] = read + count

    def call(self, step: Step, inputs: list[Tensor], slots: Tensor, accepted: Tensor) -> Tensor:
        """Step, and put back the states of those that did not accept all tokens."""
        T, before = inputs[0].shape[1], self.pool[slots, None]
        kept = before.new_full((self.rows, T, *before.shape[2:]), NAN)
        back = (slots >= 0) & (accepted < T)
        o = step(*inputs, self.pool, state_indices=slots, states_out=kept if back.any() else None)
        self.pool[slots[back]] = torch.cat([before, kept], 1)[back, accepted[back]]
        return o

    def drafts(self, x: Tensor, is_right: Tensor, slots: Tensor) -> Tensor:
        """The tokens, noise where they are not right, and NaN in rows that are skipped."""
        noise = torch.randn(x.shape, generator=self.sequences.generator, device=x.device)
        drafts = torch.where(is_right[..., None, None], x, noise)
        return torch.where(slots[:, None, None, None] < 0, NAN, drafts)


def assert_served_as_alone(
    step: Step, count: int, rows: int, device: str = "cpu", V: int = 6, seed: int = 0, kind: type[Server] = Server
) -> None:
    """Fail unless so many sequences have the outputs and last states that the formulas give each without the others.

    And the tokens: an output's largest number names one.
    """
    draws = random.Random(seed)  # noqa: S311 - what is drawn is no secret
    server = kind(Sequences.draw(count, V, draws, device), rows, draws)
    server.serve(step)
    o, last = server.sequences.alone()
    is_token = torch.arange(LONGEST) < torch.tensor(server.sequences.lengths)[:, None]
    for got, expected in ((server.outputs[is_token], o[is_token]), (server.last, last)):
        whole, worst = errors(got, expected)
        assert whole < FLOAT32_ERROR
        assert worst < WORST_ROW * FLOAT32_ERROR
    largest, next_largest = o[is_token].topk(2).values.unbind(-1)
    is_clear = largest - next_largest > FLOAT32_ERROR
    assert is_clear.double().mean() > 0.999
    got, expected = (x[is_token].argmax(-1)[is_clear] for x in (server.outputs, o))
    assert torch.equal(got, expected)
    assert server.pool.isnan().all()
