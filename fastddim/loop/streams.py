"""The order of calls that come on several CUDA streams and write the same memory."""

from __future__ import annotations

from contextlib import suppress

import torch

from fastddim.loop.devices import check_not_capturing


class Streams:
    """Makes each call wait, on the device, for the call before it.

    CUDA orders the work of one stream alone. The memory of a graph or of an engine belongs to no
    stream: its calls may come from several threads, each with its own current stream. The first
    call allocates the memory, which is freed together with this object.

    Args:
        device: the device of the memory; on other devices than CUDA, ``join`` does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._first: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None

    def join(self) -> None:
        """Makes the current stream wait for the last call, if that call came on another stream.

        Raises:
            RuntimeError: a CUDA graph is being captured. The wait would invalidate the capture.
        """
        if self._device is None:
            return
        check_not_capturing(self._device)
        here, last = torch.cuda.current_stream(self._device), self._last
        if last is not None and last != here:
            here.wait_stream(last)
        self._first, self._last = self._first or here, here

    def __del__(self) -> None:
        """Makes the first call's stream wait for the last call.

        PyTorch hands freed memory out again on the stream that it was allocated on.
        """
        if self._first is not None and self._last is not None and self._first != self._last:
            with suppress(Exception):  # At the interpreter's end CUDA may be gone.
                self._first.wait_stream(self._last)
