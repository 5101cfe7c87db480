"""Which request is in which slot, and for how many ticks more: the host's view of the batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastddim.coefficients import PREDICTIONS
from fastddim.loop.drive import no_grad
from fastddim.loop.model import Predictor
from fastddim.loop.recording import Memory
from fastddim.serving.landing import Landing
from fastddim.serving.program import Program
from fastddim.serving.request import Network
from fastddim.serving.slots import Slots
from fastddim.serving.tables import Tables
from fastddim.serving.tick import Tick
from fastddim.serving.ticket import Ticket
from fastddim.step.backends import Fixed


class Batch(NamedTuple):
    """The slots of one call of the model, and the call with its step."""

    memory: Slots
    tick: Tick

    @classmethod
    def of(
        cls,
        predictor: Predictor,
        network: Network,
        tables: Tables,
        graphs: Memory | None,
    ) -> Batch:
        """Returns a batch of new slots. The arguments are as in ``Tick``; batches share them."""
        times = tables.times.dtype
        memory = Slots(predictor.batch, network, predictor.device, predictor.dtype, times)
        predictor = replace(predictor, cond=memory.cond, both=memory.cond)
        fixed = Fixed(PREDICTIONS.index(network.prediction), True, network.ddim.clip, False)
        return cls(memory, Tick(predictor, memory, tables, fixed, network.guided, graphs))


class Batches:
    """The slots with their requests. The host counts ticks, and never waits for the device.

    Each batch has the same number of slots, and one without requests makes no call of the model.
    Slots are numbered from batch to batch. A request may move to another batch between two ticks:
    no bit of its sample depends on its slot.

    Attributes:
        tickets: the request in each slot, or None.
        active: the number of slots with a request.
    """

    def __init__(self, batches: Sequence[Batch], tables: Tables, landing: Landing) -> None:
        self._batches, self._tables, self._landing = batches, tables, landing
        self._size = len(batches[0].memory.seeds)
        self.tickets: list[Ticket | None] = [None] * (self._size * len(batches))
        self.active = 0
        self._counts = [0] * len(batches)
        """The number of slots with a request in each batch."""
        self._left: list[set[int]] = [set() for _ in batches]
        """The slots of each batch whose requests have left, and that are not parked yet."""
        self._clock = 0
        """The number of ticks taken."""
        self._ends: defaultdict[int, list[Ticket]] = defaultdict(list)
        """The requests that finish at each tick to come."""
        self._turns: defaultdict[int, list[tuple[Ticket, int]]] = defaultdict(list)
        """The requests whose guidance changes before a tick to come, each with its step."""

    def warm_up(self, programs: Sequence[Program]) -> None:
        """Takes ticks without requests, as they are once requests have had these programs.

        Raises:
            Exception: that of the model.
        """
        for program in programs:
            self._tables.add(program)
            self._tables.release(program)
        with no_grad():
            for i, batch in enumerate(self._batches):
                for program in programs:
                    _prepare(batch, program)
                batch.memory.draw(0)  # The first request does not compile the noise's kernel.
                self._left[i].add(0)
                for _ in range(2):  # Each side of the memory has its own graph.
                    self._park(i)
                    batch.tick()

    def place(self, ticket: Ticket) -> bool:
        """Gives the ticket a free slot of the fullest batch; returns False if all are in use."""
        free = [i for i, count in enumerate(self._counts) if count < self._size]
        if not free:
            return False
        self._enter(max(free, key=self._counts.__getitem__), ticket)
        return True

    def fill(self, ticket: Ticket) -> None:
        """Writes a placed request into its slot."""
        i, slot = self._where(ticket)
        work, batch = ticket.work, self._batches[i]
        self._left[i].add(slot)
        _prepare(batch, work.program)
        ticket.base = self._tables.add(work.program)
        with no_grad():
            batch.memory.fill(slot, work, ticket.base + work.first)
        self._left[i].discard(slot)
        self._ends[self._clock + work.steps].append(ticket)
        self._plan_guidance(ticket, 0)

    def free(self, ticket: Ticket) -> None:
        """Takes a request out of its slot, if it has one."""
        if self._has_slot(ticket):
            self._leave(*self._where(ticket))
            ticket.slot = None
            if ticket.base is not None:
                self._tables.release(ticket.work.program)
            ticket.base = None

    def gather(self, fail: Callable[[Ticket, Exception], None]) -> None:
        """Moves requests together if fewer calls of the model then hold them all.

        A request that cannot be moved, because the device has no memory, say, fails.
        """
        while True:
            used = [i for i, count in enumerate(self._counts) if count]
            if len(used) == 1 or -(-self.active // self._size) == len(used):
                return
            least = min(used, key=self._counts.__getitem__)
            with no_grad():
                for ticket in self._occupants(least):
                    others = [i for i in used if i != least and self._counts[i] < self._size]
                    self._move(ticket, max(others, key=self._counts.__getitem__), fail)

    def tick(self, fail: Callable[[Ticket, Exception], None]) -> int:
        """Takes one tick, and frees the slots of finished requests.

        An exception of the model, or of its step, fails the requests of its batch, which then have
        no slot any more. A request fails alone if the device cannot copy its condition or sample.

        Returns:
            The number of batches, hence of calls of the model.
        """
        with no_grad():
            for ticket, step in self._turns.pop(self._clock, ()):
                if self._has_slot(ticket):
                    self._guide(ticket, step, fail)
            used = [i for i, count in enumerate(self._counts) if count]
            for i in used:
                self._call(i, fail)
            self._clock += 1
            for ticket in self._ends.pop(self._clock, ()):
                if self._has_slot(ticket):
                    self._land(ticket, fail)
                    self.free(ticket)
        return len(used)

    def occupants(self) -> list[Ticket]:
        """Returns the requests that have a slot."""
        return [ticket for ticket in self.tickets if ticket is not None]

    def clear(self) -> None:
        """Empties all slots."""
        for ticket in self.occupants():
            ticket.slot = ticket.base = None
        self.tickets = [None] * len(self.tickets)
        self.active = 0
        self._counts = [0] * len(self._counts)
        for left in self._left:
            left.update(range(self._size))
        self._ends.clear()
        self._turns.clear()
        self._tables.release_all()

    def _has_slot(self, ticket: Ticket) -> bool:
        return ticket.slot is not None and self.tickets[ticket.slot] is ticket

    def _where(self, ticket: Ticket) -> tuple[int, int]:
        """Returns the ticket's batch and its slot there."""
        assert ticket.slot is not None
        return divmod(ticket.slot, self._size)

    def _occupants(self, i: int) -> list[Ticket]:
        here = self.tickets[i * self._size : (i + 1) * self._size]
        return [ticket for ticket in here if ticket is not None]

    def _enter(self, i: int, ticket: Ticket) -> None:
        slot = self.tickets.index(None, i * self._size)
        self.tickets[slot], ticket.slot = ticket, slot
        self._counts[i] += 1
        self.active += 1

    def _leave(self, i: int, slot: int) -> None:
        self.tickets[i * self._size + slot] = None
        self._counts[i] -= 1
        self.active -= 1
        self._left[i].add(slot)

    def _move(self, ticket: Ticket, to: int, fail: Callable[[Ticket, Exception], None]) -> None:
        i, slot = self._where(ticket)
        # After an interrupt in between, the request has both slots, and begins again; it would be
        # lost if it had neither.
        self._enter(to, ticket)
        self._leave(i, slot)
        try:
            _prepare(self._batches[to], ticket.work.program)
            _, there = self._where(ticket)
            self._batches[to].memory.take(there, self._batches[i].memory, slot)
            self._left[to].discard(there)
        except Exception as error:
            fail(ticket, error)
            self.free(ticket)

    def _park(self, i: int) -> None:
        left = self._left[i]
        while left:
            slot = next(iter(left))
            self._batches[i].memory.park(slot)
            left.discard(slot)

    def _call(self, i: int, fail: Callable[[Ticket, Exception], None]) -> None:
        """Calls the model on a batch, and takes its step."""
        try:
            self._park(i)
            self._batches[i].tick()
        except Exception as error:
            # Fail the requests first: after an interrupt here the rest begin again.
            for ticket in self._occupants(i):
                fail(ticket, error)
            for ticket in self._occupants(i):
                self.free(ticket)

    def _guide(self, ticket: Ticket, step: int, fail: Callable[[Ticket, Exception], None]) -> None:
        """Writes a request's new weight of guidance into its slot."""
        i, slot = self._where(ticket)
        try:
            self._batches[i].memory.guide(slot, ticket.work, ticket.work.guidance[step])
            self._plan_guidance(ticket, step)
        except Exception as error:
            fail(ticket, error)
            self.free(ticket)

    def _land(self, ticket: Ticket, fail: Callable[[Ticket, Exception], None]) -> None:
        """Copies a finished sample out of its slot."""
        i, slot = self._where(ticket)
        memory = self._batches[i].memory
        try:
            self._landing.copy(ticket, memory.x[memory.side][slot])
        except Exception as error:  # The device has no memory for the copy, say.
            fail(ticket, error)

    def _plan_guidance(self, ticket: Ticket, step: int) -> None:
        """Notes the next step of a request at which its weight of guidance changes."""
        w = ticket.work.guidance
        for later in range(step + 1, len(w)):
            if w[later] != w[step]:
                self._turns[self._clock + later - step].append((ticket, later))
                return


def _prepare(batch: Batch, program: Program) -> None:
    """Makes the batch's tick one that has the noise and the last x0 that the program needs."""
    if program.remembers:
        batch.memory.remember()
    batch.tick.noisy |= program.noisy
