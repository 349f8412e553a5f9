"""What can go wrong with an answer of the tests' Hub; see Hub.fail. True: the fault has answered."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .server import Handler


def status(code: int, **headers: str) -> Callable[[Handler], bool]:
    """The fault of an answer with this code."""

    def act(handler: Handler) -> bool:
        handler.answer(code, b"{}", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return act


def cut(nbytes: int) -> Callable[[Handler], bool]:
    """The fault of a connection that ends in good order after so many bytes of the body."""

    def act(handler: Handler) -> bool:
        handler.limit = nbytes
        return False

    return act


def reset(handler: Handler) -> bool:
    """The fault of a connection that breaks before the answer."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()
    return True


def hang(seconds: float) -> Callable[[Handler], bool]:
    """The fault of an answer that does not come."""

    def act(handler: Handler) -> bool:
        time.sleep(seconds)
        return reset(handler)

    return act


def corrupt(handler: Handler) -> bool:
    """The fault of a body with a flipped bit."""
    handler.flip = True
    return False
