"""The slots' device memory: how a request is written into its slot, and how a slot is parked."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastddim.loop.recording import lasting
from fastddim.serving.request import Network, Work
from fastddim.serving.tables import PARKED
from fastddim.step.backends import again, chosen
from fastddim.step.philox import INITIAL_STREAM


class Slots:
    """Everything that a tick reads and writes, at fixed addresses.

    A tick reads the state of one side and writes the other, and the sides take turns.

    Attributes:
        x: the states of both sides, float32 (slots, ...).
        inputs: the model's inputs of both sides: ``x`` itself, or in the model's dtype, or twice
            for guidance.
        x0: the x0 of the last step, float32 (slots, ...), once a request is of order 2.
        rows: the row of each slot in the tables, int32, of the model's batch.
        moves: the rows that each slot moves on in a tick, 1 or 0, likewise.
        t: the t of each slot, likewise.
        seeds: int64 (slots,).
        w: the weight of guidance, float32 (slots,).
        cond: each condition, of the model's batch.
        side: the side that the next tick reads.
    """

    def __init__(
        self,
        count: int,
        network: Network,
        device: torch.device,
        dtype: torch.dtype,
        times: torch.dtype,
    ) -> None:
        copies = 1 + network.guided
        size = count, *network.shape
        zeros = partial(torch.zeros, device=device)
        with lasting():
            self.x = [zeros(size, dtype=torch.float32) for _ in range(2)]
            self.inputs = self.x
            if network.guided or dtype != torch.float32:
                both = copies * count, *network.shape
                self.inputs = [zeros(both, dtype=dtype) for _ in range(2)]
            self.x0: Tensor | None = None
            self._rows, self._moves = (zeros(copies, count, dtype=torch.int32) for _ in range(2))
            self.t = zeros(copies * count, dtype=times)
            self.seeds = zeros(count, dtype=torch.int64)
            self.w = torch.ones(count, dtype=torch.float32, device=device)
            self.cond = {
                name: zeros(copies * count, *spec.shape, dtype=spec.dtype)
                for name, spec in network.cond.items()
            }
            self._first_row = zeros(1, dtype=torch.int32)
        self.rows, self.moves = self._rows.view(-1), self._moves.view(-1)
        self.step_rows = self._rows[0]
        """The rows as the step reads them, int32 (slots,)."""
        self._count, self._copies = count, copies
        self._chosen = chosen()
        self.side = 0

    def remember(self) -> None:
        """Makes room for the x0 of the last step."""
        if self.x0 is None:
            with lasting():
                self.x0 = torch.zeros_like(self.x[0])

    def fill(self, slot: int, work: Work, base: int) -> None:
        """Writes a request into a slot, whose next tick takes the step of row ``base``."""
        work.await_copies()
        here = self.x[self.side][slot]
        self.seeds[slot].fill_(work.seed)
        if work.x_T is not None:
            here.copy_(work.x_T, non_blocking=True)
        else:
            self.draw(slot)
            if work.program.noise_scale != 1:
                here.mul_(work.program.noise_scale)
        self._feed(slot, here)
        if self.x0 is not None:
            self.x0[slot].zero_()
        for name, memory in self.cond.items():
            own = memory[slot + (self._copies - 1) * self._count]
            own.copy_(work.cond[name], non_blocking=True)
        self.guide(slot, work, work.guidance[0])
        self._rows[:, slot].fill_(base)
        self._moves[:, slot].fill_(1)

    def draw(self, slot: int) -> None:
        """Draws a slot's state from its seed."""
        one = slice(slot, slot + 1)
        # The backend is the engine's, and not that of the thread that takes the ticks.
        with again(self._chosen):
            torch.ops.fastddim.normal_(
                self.x[self.side][one], self.seeds[one], self._first_row, INITIAL_STREAM
            )

    def take(self, slot: int, other: Slots, there: int) -> None:
        """Copies a slot of another batch into a slot of this one, whose next tick goes on with it.

        Only the side that the next tick reads is copied.
        """
        count, of = self._copies * self._count, other
        here, from_ = slice(slot, count, self._count), slice(there, count, self._count)
        pairs = [
            (self.x[self.side][slot], of.x[of.side][there]),
            (self.rows[here], of.rows[from_]),
            (self.moves[here], of.moves[from_]),
            (self.seeds[slot], of.seeds[there]),
            (self.w[slot], of.w[there]),
            *((self.cond[name][here], memory[from_]) for name, memory in of.cond.items()),
        ]
        if self.inputs is not self.x:
            pairs.append((self.inputs[self.side][here], of.inputs[of.side][from_]))
        if self.x0 is not None and of.x0 is not None:
            pairs.append((self.x0[slot], of.x0[there]))
        elif self.x0 is not None:
            self.x0[slot].zero_()
        for mine, theirs in pairs:
            mine.copy_(theirs)

    def guide(self, slot: int, work: Work, w: float) -> None:
        """Sets a slot's weight of guidance. Where it is 1, both halves get the condition.

        Then u + 1·(c − u) is c itself, which DDIM.sample's call with the condition alone returns.
        """
        if self._copies == 1:
            return
        work.await_copies()  # This tick may come on another stream than the last.
        self.w[slot].fill_(w)
        values = work.cond if w == 1 else work.uncond
        for name, memory in self.cond.items():
            memory[slot].copy_(values[name], non_blocking=True)

    def park(self, slot: int) -> None:
        """Lets a slot stand on the parking row, with a state and conditions of zeros.

        A condition that makes the model raise would fail the next requests of the batch as well.
        """
        self._rows[:, slot].fill_(PARKED)
        self._moves[:, slot].zero_()
        self.w[slot].fill_(1)
        for memory in self.cond.values():
            memory[slot :: self._count].zero_()
        here = self.x[self.side][slot].zero_()
        self._feed(slot, here)

    def _feed(self, slot: int, x: Tensor) -> None:
        """Writes a state into the model's input."""
        if self.inputs is not self.x:
            for copy in range(self._copies):
                self.inputs[self.side][slot + copy * self._count].copy_(x)
