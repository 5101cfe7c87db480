"""The check that a bad argument is refused in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(call: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """Asserts that ``call`` raises exactly ``error``, in one line that begins with ``words[0]``."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(words[0]), message
    assert all(word in message for word in words), message
    assert "\n" not in message
