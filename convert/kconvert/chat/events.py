"""The events of a stream: https://html.spec.whatwg.org/multipage/server-sent-events.html, of which APIs use the data alone."""

from __future__ import annotations

from collections.abc import Iterator


class Events:
    """Puts events together from a body that comes in pieces, cut anywhere."""

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line whose end has not come
        self._data: list[bytes] = []  # lines of an event whose end has not come

    def of(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that ends in this piece."""
        self._rest += piece
        if b"\n" not in piece:
            return
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest[:] = rest
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line.strip() and self._data:
                yield b"\n".join(self._data)
                self._data.clear()
