"""Files come over a line one after another, as far as that makes them come no later."""

import threading
import time

import pytest

from kconvert.checkpoint import download
from kconvert.checkpoint.download import Line, _counts


def settled(speed, most=4, periods=200):
    """How many connections a line gets in its last fifty periods that has this speed with so many."""
    search = _counts(most)
    number, seen = next(search), []
    for _ in range(periods):
        seen.append(number)
        number = search.send(speed(number))
    return seen[-50:]


def test_a_line_that_one_connection_fills_is_left_to_one():
    seen = settled(lambda number: 100)
    assert seen.count(1) >= 45
    assert max(seen) == 2  # tried now and then


def test_connections_that_are_slow_each_are_all_used():
    seen = settled(lambda number: 10 * number)
    assert seen.count(4) >= 45


def test_no_more_are_used_than_fill_the_line():
    seen = settled(lambda number: min(10 * number, 22))
    assert seen.count(3) + seen.count(2) >= 45


def test_a_line_that_has_become_faster_for_each_connection_gets_fewer():
    search = _counts(4)
    number = next(search)
    for _ in range(50):
        number = search.send(10 * number)
    seen = []
    for _ in range(150):
        number = search.send(100)
        seen.append(number)
    assert seen[-20:].count(1) >= 18


def test_a_line_on_which_nothing_comes_is_given_to_the_next():
    assert max(settled(lambda number: 0 if number == 1 else 50)) > 1


class Downloads:
    """Some that want to receive, each in a thread; `receiving` are those that may."""

    def __init__(self, line):
        self.line, self.stopped = line, threading.Event()
        self.receiving = set()

    def want(self, turn):
        def wait():
            turn.begin()
            if not self.stopped.is_set():
                self.receiving.add(turn.number)

        threading.Thread(target=wait, daemon=True).start()

    def become(self, expected):
        deadline = time.monotonic() + 5
        while self.receiving != expected and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.receiving


@pytest.fixture
def downloads(monkeypatch):
    monkeypatch.setattr(download, "PERIOD", 60.0)
    found = Downloads(Line(4))
    yield found
    found.stopped.set()


def test_whoever_came_first_receives_and_the_next_while_it_does_not(downloads):
    first, second, third = (downloads.line.turn(downloads.stopped) for _ in range(3))
    first.begin()
    downloads.want(third)
    downloads.want(second)
    time.sleep(0.05)
    assert downloads.receiving == set()
    first.end()
    assert downloads.become({1}) == {1}
    first.begin()  # at once, although the second has not ended
    second.end()
    first.end()
    assert downloads.become({1, 2}) == {1, 2}


def test_one_that_waits_hears_that_it_is_to_end(downloads, monkeypatch):
    monkeypatch.setattr(download, "PERIOD", 0.02)
    first, second = downloads.line.turn(downloads.stopped), downloads.line.turn(downloads.stopped)
    monkeypatch.setattr(downloads.line, "_measure", lambda: None)
    first.begin()
    waiting = threading.Thread(target=second.begin)
    waiting.start()
    downloads.stopped.set()
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_download_that_has_stalled_does_not_hold_up_the_others(downloads, monkeypatch):
    monkeypatch.setattr(download, "PERIOD", 0.02)
    stalled, other = downloads.line.turn(downloads.stopped), downloads.line.turn(downloads.stopped)
    stalled.begin()
    downloads.want(other)
    assert downloads.become({1}) == {1}


def test_time_in_which_nobody_would_receive_says_nothing_of_a_line(monkeypatch):
    monkeypatch.setattr(download, "PERIOD", 0.2)
    line = Line(4)
    time.sleep(0.25)
    turn = line.turn(threading.Event())
    turn.begin()
    line.received(1)
    assert line._allowed == 1
