"""Texts that are kept as what makes them."""

from hashlib import sha256

from kconvert.planning.texts import Made, digest_of

PIECES = (b"{", b"", b'"a": 1', b"}")


def test_what_is_made_has_the_length_and_the_digest_of_its_bytes():
    made = Made(lambda: iter(PIECES))
    whole = b"".join(PIECES)
    assert (bytes(made), len(made), made.digest) == (whole, len(whole), sha256(whole).digest())
    assert digest_of(made) == digest_of(whole)


def test_what_is_made_is_not_kept_but_made_again_each_time():
    calls = []

    def pieces():
        calls.append(None)
        yield from PIECES

    made = Made(pieces)
    assert len(calls) == 1
    assert len(made)
    assert made.digest
    assert len(calls) == 1
    assert [bytes(made), bytes(made)] == [b"".join(PIECES)] * 2
    assert len(calls) == 3


def test_what_is_made_of_nothing_is_empty():
    made = Made(lambda: ())
    assert (bytes(made), len(made), made.digest) == (b"", 0, sha256().digest())
