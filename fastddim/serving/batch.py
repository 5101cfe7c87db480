"""Which request is in which slot, and for how many ticks more: the host's view of the batch."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from fastddim.loop.drive import no_grad
from fastddim.serving.landing import Landing
from fastddim.serving.slots import Slots
from fastddim.serving.tables import Tables
from fastddim.serving.tick import Tick
from fastddim.serving.ticket import Ticket


class Batch:
    """The slots with their requests. The host counts ticks, and never waits for the device.

    Attributes:
        tickets: the request in each slot, or None.
        active: the number of slots with a request.
    """

    def __init__(self, slots: Slots, tables: Tables, tick: Tick, landing: Landing) -> None:
        self._slots, self._tables, self._tick, self._landing = slots, tables, tick, landing
        self.tickets: list[Ticket | None] = [None] * len(slots.seeds)
        self.active = 0
        self._left: set[int] = set()
        """The slots whose requests have left, and that are not parked yet."""
        self._clock = 0
        """The number of ticks taken."""
        self._ends: defaultdict[int, list[tuple[int, Ticket]]] = defaultdict(list)
        """The slots that finish at each tick to come, and the requests in them."""
        self._turns: defaultdict[int, list[tuple[int, Ticket, int]]] = defaultdict(list)
        """The slots whose guidance changes before a tick to come: (slot, request, its step)."""

    def place(self, ticket: Ticket) -> int | None:
        """Returns a free slot, which is the ticket's from now on; None if all are in use."""
        if self.active == len(self.tickets):
            return None
        slot = self.tickets.index(None)
        self.tickets[slot], ticket.slot = ticket, slot
        self.active += 1
        return slot

    def fill(self, slot: int, ticket: Ticket) -> None:
        """Writes a placed request into its slot."""
        work, slots = ticket.work, self._slots
        self._left.add(slot)
        if work.program.remembers:
            slots.remember()
        self._tick.noisy |= work.program.noisy
        ticket.base = self._tables.add(work.program)
        with no_grad():
            slots.fill(slot, work, ticket.base + work.first)
        self._left.discard(slot)
        self._ends[self._clock + work.steps].append((slot, ticket))
        self._plan_guidance(slot, ticket, 0)

    def free(self, slot: int, ticket: Ticket) -> None:
        """Takes a request out of its slot."""
        if self.tickets[slot] is ticket:
            self.tickets[slot] = ticket.slot = None
            self.active -= 1
            self._left.add(slot)
            if ticket.base is not None:
                self._tables.release(ticket.work.program)
            ticket.base = None

    def tick(self) -> list[Ticket]:
        """Takes one tick, frees the slots of finished requests and returns these requests.

        Raises:
            Exception: that of the model, or of the device. No slot has moved then.
        """
        with no_grad():
            while self._left:
                slot = next(iter(self._left))
                self._slots.park(slot)
                self._left.discard(slot)
            for slot, ticket, step in self._turns.pop(self._clock, ()):
                if self.tickets[slot] is ticket:
                    self._slots.guide(slot, ticket.work, ticket.work.guidance[step])
                    self._plan_guidance(slot, ticket, step)
            self._tick()
            self._clock += 1
            finished = []
            for slot, ticket in self._ends.pop(self._clock, ()):
                if self.tickets[slot] is ticket:
                    self._landing.copy(ticket, self._state_of(slot))
                    self.free(slot, ticket)
                    finished.append(ticket)
        return finished

    def occupants(self) -> list[Ticket]:
        """Returns the requests that have a slot."""
        return [ticket for ticket in self.tickets if ticket is not None]

    def clear(self) -> None:
        """Empties all slots."""
        for ticket in self.occupants():
            ticket.slot = ticket.base = None
        self.tickets = [None] * len(self.tickets)
        self.active = 0
        self._left.update(range(len(self.tickets)))
        self._ends.clear()
        self._turns.clear()
        self._tables.release_all()

    def _state_of(self, slot: int) -> Tensor:
        return self._slots.x[self._slots.side][slot]

    def _plan_guidance(self, slot: int, ticket: Ticket, step: int) -> None:
        """Notes the next step of a request at which its weight of guidance changes."""
        w = ticket.work.guidance
        for later in range(step + 1, len(w)):
            if w[later] != w[step]:
                self._turns[self._clock + later - step].append((slot, ticket, later))
                return
