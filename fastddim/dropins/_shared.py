"""What several drop-ins need of the machine they run on."""

from __future__ import annotations

import torch


def stream_of(device: torch.device) -> int:
    """The stream that is current on ``device``; 0 where there are none.

    Tables that are kept belong to a stream: another one would have to wait until they are made.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
