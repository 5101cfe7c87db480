"""What it means to refuse a bad argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(call: Callable[[], Any], error: type[Exception], *said: str) -> None:
    """``call`` raises ``error`` itself, in one line that names the argument, ``said[0]``, first."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(said[0]), message
    assert all(words in message for words in said), message
    assert "\n" not in message
