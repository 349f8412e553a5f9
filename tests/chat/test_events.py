"""Events come out of a stream whole, wherever its pieces are cut."""

import pytest

from kconvert.chat.events import Events

STREAM = (
    b": hello\n\ndata: {1}\n\ndata:{2}\r\n\r\nevent: error\nid: 7\ndata: {3\ndata: 4}\n\n"
    b"\n\ndata: \xe5\x8c\x97\n\ndata: half"
)
EVENTS = [b"{1}", b"{2}", b"{3\n4}", "\u5317".encode()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_are_whole_wherever_the_stream_is_cut(size):
    events = Events()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in events.of(piece)] == EVENTS
