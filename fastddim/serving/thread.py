"""The background thread that takes an engine's ticks while there is work."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable

from fastddim.serving.guard import Guard
from fastddim.serving.order import ClosedError


class Runner:
    """A thread that calls ``step`` while ``busy``, and waits for ``arrived`` otherwise.

    An engine that nobody holds any more and that has no work ends its thread: while the thread
    waits, it holds the engine by weak references.

    Args:
        arrived: guards the work, and is notified of new work.
        busy: a method of the engine, which returns whether there is work.
        step: likewise; takes one tick.
        broken: likewise; is called with an exception of ``step`` itself, after which the thread
            ends.

    Attributes:
        kept: the engine, from new work until the thread finds none.
    """

    def __init__(
        self,
        arrived: Guard,
        busy: Callable[[], bool],
        step: Callable[[], bool],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._arrived = arrived
        self._busy = weakref.WeakMethod(busy, self._left_alone)
        self._step, self._broken = weakref.WeakMethod(step), weakref.WeakMethod(broken)
        self.kept: object = None
        self._stopping = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="fastddim-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    def check_process(self) -> None:
        """Raises ``ClosedError`` in a process that was forked from the thread's."""
        if self._process != os.getpid():
            raise ClosedError(
                "the engine's thread runs in the process that called start, and not in this fork "
                "of it: make an engine in each process"
            )

    def stop(self) -> None:
        """Ends the thread after its tick."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify_all()
        self._thread.join()
        _running.discard(self)

    def _left_alone(self, _: object) -> None:
        with self._arrived:
            self._stopping = True
            self._arrived.notify_all()

    def _loop(self) -> None:
        while self._has_work():
            self._tick()

    def _has_work(self) -> bool:
        """Waits for work, and returns False if the thread is to end."""
        with self._arrived:
            while not self._stopping and not self._is_busy():
                self.kept = None  # This may be the engine's end, which sets ``_stopping``.
                if not self._stopping:
                    self._arrived.notify_all()  # ``drain`` waits for this.
                    self._arrived.wait()
            return not self._stopping

    def _is_busy(self) -> bool:
        busy = self._busy()
        return busy is not None and busy()

    def _tick(self) -> None:
        step, broken = self._step(), self._broken()
        if step is None or broken is None:
            return
        try:
            step()
        except BaseException as error:
            self._stopping = True
            broken(error)


_running: weakref.WeakSet[Runner] = weakref.WeakSet()
os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def _stop_all() -> None:
    """Ends the threads before Python does, since a thread in PyTorch's code would crash it."""
    for runner in list(_running):
        runner.stop()
