"""The background thread that takes an engine's ticks while there is work."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable


class Runner:
    """A thread that calls ``step`` while ``busy``, and waits for ``arrived`` otherwise.

    Args:
        arrived: the condition that is notified of new work.
        busy: returns whether there is work.
        step: takes one tick.
        broken: is called with an exception of ``step`` itself, after which the thread ends.
    """

    def __init__(
        self,
        arrived: threading.Condition,
        busy: Callable[[], bool],
        step: Callable[[], bool],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._arrived, self._busy, self._step, self._broken = arrived, busy, step, broken
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="fastddim-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    def stop(self) -> None:
        """Ends the thread after its tick."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify_all()
        self._thread.join()
        _running.discard(self)

    def _loop(self) -> None:
        while True:
            with self._arrived:
                while not self._stopping and not self._busy():
                    self._arrived.notify_all()  # ``drain`` waits for this.
                    self._arrived.wait()
                if self._stopping:
                    return
            try:
                self._step()
            except BaseException as error:
                self._broken(error)
                return


_running: weakref.WeakSet[Runner] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Ends the threads before Python does, since a thread in PyTorch's code would crash it."""
    for runner in list(_running):
        runner.stop()
