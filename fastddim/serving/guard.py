"""A condition that an interrupt does not leave locked."""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import Any


class Guard(threading.Condition):
    """A ``threading.Condition`` whose lock is free after ``with``, wherever an interrupt comes.

    The methods of ``Condition`` are written in Python. A ``KeyboardInterrupt`` in ``__enter__``
    after the lock is taken, or in ``__exit__`` before the lock is free, would leave the lock taken,
    and each other thread would wait for ever. Here ``with`` calls the lock's own methods, which an
    interrupt cannot end halfway.
    """

    def __init__(self) -> None:
        self._own = threading.RLock()
        super().__init__(self._own)

    __enter__: Any = property(attrgetter("_own.__enter__"))
    __exit__: Any = property(attrgetter("_own.__exit__"))

    def wait(self, timeout: float | None = None) -> bool:
        """Waits as ``Condition.wait`` does; the lock is also taken again after an interrupt."""
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]
                self.acquire()
            raise
