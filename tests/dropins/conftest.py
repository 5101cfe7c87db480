"""The fixtures that tests of several drop-ins share."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches for the network."""
    monkeypatch.setattr(socket.socket, "connect", None)
